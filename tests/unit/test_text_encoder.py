"""Weights, chunks and textual inversion on both towers, against closed forms and diffusers."""

from __future__ import annotations

import copy
import unicodedata
from functools import cache

import pytest
import torch
from clips import their_tokenizer, their_tower
from diffusers.loaders import TextualInversionLoaderMixin
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor
from transformers import CLIPTextModel

from ldm.checkpoint.tokenizer import clip_tokenizer
from ldm.errors import ConfigError
from ldm.models.clip import ClipTextConfig, ClipTextModel
from ldm.models.text_encoder import ClipTower, OpenClipTower, TextEncoder

START, END, VOCABULARY, WIDTH = 49406, 49407, 49408, 16
SCRIPTS = {
    "korean": "붉은 꽃, 그리고 파란 하늘",
    "decomposed korean": unicodedata.normalize("NFD", "붉은 꽃"),
    "japanese": "赤い花。猫が好き",
    "arabic": "زهرة حمراء",
    "hindi": "लाल फूल",
    "thai": "ดอกไม้สีแดง",
    "emoji": "🌹 a 👩🏽‍🚀 rose❤️",
    "combining": "e\u0301te\u0301 naïve Œuvre",
    "latin": "3 roses' petals,  don't? 1234 #tag",
}
scripts = pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS.keys())


@cache
def make(kind: str, length: int) -> TextEncoder:
    """Full vocabulary, `length` tokens, padding with zeros, random weights, a mean of about 0.3."""
    torch.manual_seed(0)
    if kind == "own":
        config = ClipTextConfig(
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=length,
        )
        model = ClipTextModel(config)
        tower = ClipTower(model, clip_tokenizer(max_tokens=length, pad_token="!"))
        norm = model.final_layer_norm
    else:
        model = TextTransformer(
            context_length=length, vocab_size=VOCABULARY, width=WIDTH, heads=2, layers=3
        ).eval()
        tower = OpenClipTower(model, SimpleTokenizer())
        norm = model.ln_final
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        norm.bias += 0.3
    return TextEncoder(tower)


@pytest.fixture(params=["own", "open_clip"])
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    return make(request.param, 77)


@pytest.fixture(params=["own", "open_clip"])
def short(request: pytest.FixtureRequest) -> TextEncoder:
    """A chunk holds ten words."""
    return make(request.param, 12)


def context(encoder: TextEncoder, prompt: str, **options) -> Tensor:
    return encoder.contexts([prompt], **options)[0]  # n d


def row(*words: int, length: int = 12) -> Tensor:
    """What a chunk looks like to a tower."""
    ids = [START, *words, END]
    return torch.tensor([ids + [0] * (length - len(ids))])


def words(*texts: str) -> list[int]:
    return [SimpleTokenizer().encode(text)[0] for text in texts]


# scripts


@scripts
def test_every_script_gives_clips_own_tokens(encoder: TextEncoder, text: str) -> None:
    assert torch.equal(encoder.token_ids([text]), SimpleTokenizer()([text]))


@scripts
def test_dropped_text_is_whole(encoder: TextEncoder, text: str) -> None:
    """Wherever the limit falls, no letter of any script is broken or lost."""

    def plain(text: str) -> str:  # open_clip lower-cases and joins what it reads
        return " ".join(unicodedata.normalize("NFC", text).lower().split())

    parts = [part for _, part in encoder.tower.tokenize(text)]
    assert plain("".join(parts)) == plain(text)
    assert encoder.dropped("a " * (75 - len(parts)) + text) == ""
    for room in range(len(parts)):
        dropped = encoder.dropped("a " * (75 - room) + text)
        assert dropped and plain(text).endswith(plain(dropped))


def test_dropped_starts_at_the_letter_that_is_cut(encoder: TextEncoder) -> None:
    # each of these syllables is two or three tokens
    for room, expected in ((0, "붉은 꽃"), (1, "붉은 꽃"), (3, "은 꽃"), (4, "은 꽃"), (6, "꽃")):
        assert encoder.dropped("a " * (75 - room) + "붉은 꽃") == expected


# weights


@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("prompt", ["", "a red flower", "붉은 꽃", "a, b: c | d AND e", "x " * 200])
def test_without_weights_nothing_changes(
    encoder: TextEncoder, prompt: str, clip_skip: int | None
) -> None:
    expected = encoder.encode([prompt], clip_skip)[0]
    assert torch.equal(context(encoder, prompt, clip_skip=clip_skip), expected)


@pytest.mark.parametrize(
    ("prompt", "weights"),
    [
        ("a (red) rose", [1, 1.1, 1]),
        ("a [red rose]", [1, 1 / 1.1, 1 / 1.1]),
        ("(a:1.5) ((red)) rose", [1.5, 1.21, 1]),
        ("a (red (rose:2):0.5)", [1, 0.5, 1]),
        ("a (red:0) (rose:-1)", [1, 0, -1]),
        ("((a red rose", [1.21, 1.21, 1.21]),
    ],
)
@pytest.mark.parametrize("clip_skip", [None, 1])
def test_weights_multiply_and_the_mean_stays(
    short: TextEncoder, prompt: str, weights: list[float], clip_skip: int | None
) -> None:
    z = short.encode(["a red rose"], clip_skip)[0]
    weighted = z * torch.tensor([1.0, *weights] + [1.0] * 8)[:, None]
    expected = weighted * (z.sum() / weighted.sum())
    actual = context(short, prompt, clip_skip=clip_skip)
    assert (expected - z).abs().max() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_mean_of_chance_is_not_restored() -> None:
    """Dividing by a mean of nothing but noise would multiply the context by any number."""
    encoder = copy.deepcopy(make("own", 12))
    norm = encoder.tower.model.final_layer_norm
    norm.weight.data.fill_(1)
    norm.bias.data.zero_()  # now every token's mean is zero
    z = encoder.encode(["a red rose"])[0]
    expected = z * torch.tensor([1, 1, 1.5, 1] + [1] * 8)[:, None]
    torch.testing.assert_close(context(encoder, "a (red:1.5) rose"), expected)


def test_literal_prompts_keep_their_brackets(encoder: TextEncoder) -> None:
    literal = context(encoder, "a (red:1.3) [rose|tulip] BREAK", prompt_weights=False)
    assert torch.equal(literal, encoder.encode(["a (red:1.3) [rose|tulip] BREAK"])[0])
    escaped = context(encoder, r"a \(red:1.3\) \[rose\] break")
    assert torch.equal(escaped, encoder.encode(["a (red:1.3) [rose] break"])[0])


# chunks


def test_chunks_are_encoded_apart(short: TextEncoder) -> None:
    prompt = "one two three four five six seven eight nine ten eleven twelve"
    first, rest = prompt[: prompt.index(" eleven")], "eleven twelve"
    expected = torch.cat([short.encode([first])[0], short.encode([rest])[0]])
    assert torch.equal(context(short, prompt, long_prompts="chunk"), expected)
    assert torch.equal(context(short, prompt), short.encode([first])[0])
    assert short.dropped(prompt) == rest
    # by the tower itself
    ids = torch.cat([row(*words(*first.split())), row(*words(*rest.split()))])
    torch.testing.assert_close(expected, short.tower.states(ids, 0).flatten(0, 1))


def test_chunks_end_at_a_comma(short: TextEncoder) -> None:
    prompt = "one two three four five six, seven eight nine ten"
    actual = context(short, prompt, long_prompts="chunk")
    pieces = ["one two three four five six,", "seven eight nine ten"]
    assert torch.equal(actual, torch.cat([short.encode([piece])[0] for piece in pieces]))
    # what is cut at the limit uses all its room
    assert short.dropped(prompt) == "ten"


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a rose BREAK a tulip", ["a rose", "a tulip"]),
        ("BREAK a tulip", ["", "a tulip"]),
        ("a rose BREAK BREAK a tulip", ["a rose", "", "a tulip"]),
        ("a rose BREAK red BREAK blue", ["a rose", "red", "blue"]),
        ("a rose BREAK", ["a rose"]),
        ("BREAK", [""]),
        ("", [""]),
    ],
)
def test_break_starts_a_chunk(short: TextEncoder, prompt: str, pieces: list[str]) -> None:
    expected = [short.encode([piece])[0] for piece in pieces]
    assert torch.equal(context(short, prompt, long_prompts="chunk"), torch.cat(expected))
    if len(pieces) == 1:
        assert torch.equal(context(short, prompt), expected[0])
    else:  # one chunk would hold only what stands before the first BREAK
        with pytest.raises(ConfigError, match="BREAK starts a new chunk.*--long_prompts chunk"):
            context(short, prompt)


def test_every_chunk_keeps_its_own_mean(short: TextEncoder) -> None:
    actual = context(short, "a (red:1.5) rose BREAK a [blue] tulip", long_prompts="chunk")
    pieces = [context(short, "a (red:1.5) rose"), context(short, "a [blue] tulip")]
    assert torch.equal(actual, torch.cat(pieces))


def test_dropped_is_the_text_without_its_weights(short: TextEncoder) -> None:
    eight = "one two three four five six seven eight"
    assert short.dropped(f"({eight} nine:1.2) (ten) (eleven:2) [twelve]!") == "eleven twelve!"
    assert short.dropped(f"({eight} nine)") == ""
    assert short.dropped(f"({eight} nine)", prompt_weights=False) == ")"


def test_a_context_depends_on_its_own_prompt_only(short: TextEncoder) -> None:
    prompts = ["a rose", "x " * 25, "a (red:1.2) rose", "a rose", ""]
    together = short.contexts(prompts, long_prompts="chunk")
    for prompt, actual in zip(prompts, together, strict=True):
        assert torch.equal(actual, context(short, prompt, long_prompts="chunk"))
    assert [len(actual) for actual in together] == [12, 36, 12, 12, 12]


def test_pad_adds_chunks_without_words(short: TextEncoder) -> None:
    rose = context(short, "a rose", clip_skip=1)
    empty = short.encode([""], 1)[0]
    assert torch.equal(short.pad(rose, 36, clip_skip=1), torch.cat([rose, empty, empty]))
    assert torch.equal(short.pad(rose, 12, clip_skip=1), rose)


def test_options_that_cannot_be_are_refused(short: TextEncoder) -> None:
    with pytest.raises(ConfigError, match="long_prompts is 'chunks'; did you mean 'chunk'"):
        context(short, "a", long_prompts="chunks")
    with pytest.raises(ConfigError, match="clip_skip is 3; .* allows 0 to 2"):
        context(short, "a", clip_skip=3)
    with pytest.raises(ConfigError, match="prompt editing"):
        context(short, "[a:b:3]")


# textual inversion


class Diffusers(TextualInversionLoaderMixin):
    """The part of diffusers' pipeline that reads embeddings and expands prompts."""

    hf_device_map = None

    def __init__(self, model: CLIPTextModel):
        self.text_encoder = model
        self.tokenizer = their_tokenizer(clip_tokenizer(pad_token="!"))
        self.components: dict = {}

    def encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        expanded = self.maybe_convert_prompt(prompt, self.tokenizer)
        ids = self.tokenizer(
            expanded, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        return ids, self.text_encoder(ids).last_hidden_state


@torch.no_grad()
def test_embeddings_equal_diffusers() -> None:
    encoder = copy.deepcopy(make("own", 77))
    theirs = Diffusers(their_tower(encoder.tower.model))
    torch.manual_seed(1)
    for token, vectors in {"<cat>": torch.randn(3, WIDTH), "<꽃>": torch.randn(1, WIDTH)}.items():
        encoder.add_embeddings(token, vectors)
        theirs.load_textual_inversion({token: vectors})
    assert torch.equal(
        encoder.token_ids(["<꽃>"]), encoder.token_ids([unicodedata.normalize("NFD", "<꽃>")])
    )
    for prompt in ("<cat>", "A <cat>, with a <꽃>.", "<꽃><cat> two <cat>s", "no cat", "x " * 90):
        ids, expected = theirs.encode(prompt)
        assert torch.equal(encoder.token_ids([prompt]), ids)
        torch.testing.assert_close(encoder.encode([prompt]), expected, rtol=1e-5, atol=1e-6)


def test_embeddings_in_weighted_chunks(short: TextEncoder) -> None:
    encoder = copy.deepcopy(short)
    vectors = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    encoder.add_embeddings("<x>", vectors)
    ids = row(*words("a"), VOCABULARY, VOCABULARY + 1, VOCABULARY + 2, *words("rose"))
    assert torch.equal(encoder.token_ids(["a <X> rose"]), ids)
    z = encoder.encode(["a <x> rose"])[0]
    weighted = z * torch.tensor([1, 1, 1.4, 1.4, 1.4] + [1] * 7)[:, None]
    expected = weighted * (z.sum() / weighted.sum())
    torch.testing.assert_close(context(encoder, "a (<x>:1.4) rose"), expected)
    # it is never torn apart, and is dropped by its name
    eight = "one two three four five six seven eight"
    apart = torch.cat([encoder.encode([eight])[0], encoder.encode(["<x> rose"])[0]])
    assert torch.equal(context(encoder, f"{eight} <x> rose", long_prompts="chunk"), apart)
    assert encoder.dropped(f"{eight} (<x>) [<X> rose]") == "<x> <X> rose"


def test_names_are_found_as_words(short: TextEncoder) -> None:
    encoder = copy.deepcopy(short)
    encoder.add_embeddings("easyneg", torch.randn(1, WIDTH))
    encoder.add_embeddings("easyneg-2", torch.randn(1, WIDTH))
    encoder.add_embeddings("(x)", torch.randn(1, WIDTH))
    found = {text: encoder.token_ids([text])[0].tolist() for text in ("EasyNeg, a", "easyneg-2")}
    assert found["EasyNeg, a"][1:4] == [VOCABULARY, *words(",", "a")]
    assert found["easyneg-2"][1:3] == [VOCABULARY + 1, END]
    assert torch.equal(encoder.token_ids(["easynegs"]), short.token_ids(["easynegs"]))
    assert torch.equal(context(encoder, r"\(x\)"), encoder.encode(["(x)"])[0])
    assert encoder.token_ids(["(x)"])[0, 1] == VOCABULARY + 2


@pytest.mark.parametrize("order", [("<a>", "<b>", "<c>"), ("<b>", "<c>", "<a>"), (None,)])
def test_removing_restores_every_bit(short: TextEncoder, order: tuple[str | None, ...]) -> None:
    encoder = copy.deepcopy(short)
    prompt = "<a> and <b> and <c>"
    vectors = {f"<{name}>": torch.randn(k, WIDTH) for name, k in (("a", 2), ("b", 1), ("c", 3))}
    for token, value in vectors.items():
        encoder.add_embeddings(token, value)
    for token in order:
        encoder.remove_embeddings(token)
        for kept in encoder.embeddings:
            ids = encoder.token_ids([kept])[0, 1 : 1 + len(vectors[kept])]
            assert torch.equal(encoder.tower.table(ids), vectors[kept])
    assert not encoder.embeddings
    assert torch.equal(encoder.token_ids([prompt]), short.token_ids([prompt]))
    before, after = short.state_dict(), encoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.add_embeddings("<a>", vectors["<a>"])  # its name is free again


def test_embeddings_take_the_towers_dtype(short: TextEncoder) -> None:
    encoder = copy.deepcopy(short).to(torch.bfloat16)
    encoder.add_embeddings("<x>", torch.randn(2, WIDTH))
    assert encoder.tower.table.weight.dtype == torch.bfloat16
    assert context(encoder, "a (<x>:1.2)").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("token", "shape", "said"),
    [
        ("cat", (1, WIDTH), "knows the word 'cat' already"),
        ("*", (1, WIDTH), "knows the word '\\*' already"),
        ("<Known>", (1, WIDTH), "knows the word '<Known>' already"),
        ("<x>", (1, WIDTH + 8), r"\(1, 24\); this text encoder needs \(k, 16\)"),
        ("<x>", (WIDTH,), r"needs \(k, 16\)"),
        ("<x>", (11, WIDTH), "11 vectors; .* holds 1 to 10"),
        ("<x>", (0, WIDTH), "0 vectors"),
    ],
)
def test_embeddings_that_cannot_be_are_refused(
    short: TextEncoder, token: str, shape: tuple[int, ...], said: str
) -> None:
    encoder = copy.deepcopy(short)
    encoder.add_embeddings("<known>", torch.zeros(1, WIDTH))
    before = encoder.tower.table.weight
    with pytest.raises(ConfigError, match=said) as caught:
        encoder.add_embeddings(token, torch.zeros(shape))
    assert "\n" not in str(caught.value)
    assert encoder.tower.table.weight is before and list(encoder.embeddings) == ["<known>"]
    with pytest.raises(ConfigError, match="no '<know>' is loaded; did you mean '<known>'"):
        encoder.remove_embeddings("<know>")
