"""CLIP's text half against transformers' own tower and tokenizer: same files, same numbers."""

import json
import unicodedata

import pytest
import torch
from clips import their_tower
from transformers import CLIPTokenizer

from ldm.checkpoint.tokenizer import END, START, clip_tokenizer, read_tokenizer, write_tokenizer
from ldm.errors import CheckpointError
from ldm.models.clip import ClipTextConfig, ClipTextModel

TEXTS = [
    "", " ", "\t\n ", "a", "a red flower", "The QUICK  brown fox,\njumps! " * 40,
    "don't I'LL we've", "wow!!! what?! 1234 3.14 #tag @you $5 50%", "rosé ÉTÉ naïve Œuvre",
    "İstanbul ẞ ǅ ﬁne Ａ１ ½ ²",
    "a\u00a0b\u3000c\u200bd\ufeffe\u2028f", "\x00 \x07 \x1b[0m \x7f", "🌹 a 👩🏽‍🚀 rose❤️ 🇫🇷",
    unicodedata.normalize("NFD", "čtyři žluté růže 붉은 꽃"),
    "赤い花。猫が好き 붉은 꽃 ดอกไม้สีแดง زهرة लाल",
    f"a {END} b {START}c{END.upper()}", "<cat> a<cat>b <CAT> two <cat>s",
    "'''\"\"``´´", "_-_=+[]{}\\|/",
    "pneumonoultramicroscopicsilicovolcanoconiosis", "\U0010ffff \ue000 ￿",
]  # fmt: skip
OLD = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
CONFIG = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "pad_token": "!"}
ADDED = {"content": "<cat>", "special": False} | OLD
FOLDERS = {  # what stands in a folder beside the vocabulary
    "as ldm writes it": {},
    "only a vocabulary": {"tokenizer.json": None, "tokenizer_config.json": None},
    "of SD 1.x": {
        "tokenizer.json": None,
        "tokenizer_config.json": {
            "model_max_length": 77,
            "pad_token": END,
            "bos_token": {"__type": "AddedToken", "content": START} | OLD,
        },
        "special_tokens_map.json": {"eos_token": {"content": END} | OLD, "pad_token": END},
    },
    "of SD 2.x": {
        "tokenizer.json": None,
        "tokenizer_config.json": CONFIG,
        "special_tokens_map.json": {"pad_token": "!"},
    },
    "with an added word": {
        "tokenizer.json": None,
        "tokenizer_config.json": CONFIG,
        "added_tokens.json": {"<cat>": 49408},
    },
    "with a word in its configuration": {
        "tokenizer.json": None,
        "tokenizer_config.json": CONFIG | {"added_tokens_decoder": {"49408": ADDED}},
    },
    "with a word in the middle of it": {"tokenizer.json": [ADDED | {"id": 49408}]},
}


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_every_layer_equals_transformers(hidden_act):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 500, "layer_norm_eps": 1e-3}
    ours = ClipTextModel(
        ClipTextConfig(**shape, num_hidden_layers=5, num_attention_heads=4, hidden_act=hidden_act)
    )
    for parameter in ours.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    theirs = their_tower(ours)
    for n in (1, 20, 77):
        ids = torch.randint(500, (3, n))
        states = theirs(ids, output_hidden_states=True).hidden_states
        for skip in range(5):
            expected = theirs.final_layer_norm(states[-1 - skip])
            assert expected.std() > 0.5
            torch.testing.assert_close(ours(ids, skip), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_every_folder_gives_the_tokens_of_transformers(tmp_path, files):
    """Their numbers, and the places in the text that they stand for."""
    write_tokenizer(clip_tokenizer(), tmp_path)
    for name, content in files.items():
        file = tmp_path / name
        if isinstance(content, list):  # appended to what is there
            whole = json.loads(file.read_text())
            content = whole | {"added_tokens": whole["added_tokens"] + content}
        file.unlink(missing_ok=True)
        if content:
            file.write_text(json.dumps(content))
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path, 77)
    assert ours.max_tokens == min(theirs.model_max_length, 77)
    names = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (ours.start, ours.end, ours.padding) == names
    write_tokenizer(ours, tmp_path / "again")
    again = CLIPTokenizer.from_pretrained(tmp_path / "again")
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        encoded = ours.bpe.encode(text, add_special_tokens=False)
        assert encoded.ids == expected.input_ids, text
        assert encoded.offsets == expected.offset_mapping, text
        row = theirs(text, truncation=True, max_length=77).input_ids
        assert ours.rows([text])[0].tolist() == row == again(text, truncation=True).input_ids
    if any("cat" in str(content) for content in files.values()):
        assert ours.bpe.encode("a <cat>", add_special_tokens=False).ids[1:] == [49408]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "b"}, "merges": []}, "added_tokens": []}'),
        ("tokenizer_config.json", '{"model_max_length": "many"}'),
        ("tokenizer_config.json", '{"pad_token": 3}'),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_damaged_tokenizers_are_refused_in_one_line(tmp_path, name, text):
    write_tokenizer(clip_tokenizer(600), tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match="tokenizer") as error:
        read_tokenizer(tmp_path, 77)
    assert "\n" not in str(error.value)
