"""CLIP's tokenizer: out of a model's folder and into one; or without any, as open_clip bundles it.

The files are those of transformers and of the `tokenizers` library. Of a folder we take what they
take: the vocabulary, the merges, words added to them and the limit. How CLIP cuts a text is fixed.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import RobertaProcessing

from ldm.checkpoint.io import read_json, write_json
from ldm.errors import CheckpointError
from ldm.models.clip import ClipTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
NAMED = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
WORDS = (  # Radford et al.'s: the markers, English endings, letters, one digit, signs
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def clip_tokenizer(
    vocab_size: int = 49408, max_tokens: int = 77, pad_token: str = END
) -> ClipTokenizer:
    """CLIP's byte-pair encoding, cut to its first and most frequent merges.

    Every text can still be written, since the single bytes stay; rarer words take more tokens.

    Args:
        vocab_size: tokens, from 514 (single bytes and the two markers) to 49408, all of CLIP's.
        max_tokens: of a prompt, its start and end tokens included.
        pad_token: what fills a prompt up: the end token in SD 1.x, "!" in SD 2.x.
    """
    merges = _merges()[: vocab_size - 514]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for every byte
    words = letters + [letter + "</w>" for letter in letters]
    words += ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {word: i for i, word in enumerate(words)}
    return _make(vocabulary, merges, [], {"pad_token": pad_token}, max_tokens)


def read_tokenizer(folder: Path, max_tokens: int) -> ClipTokenizer:
    """The tokenizer of a folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`.

    Args:
        folder: the component's folder.
        max_tokens: of a prompt, where the folder does not say fewer.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    said: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        said |= read_json(folder / name) if (folder / name).is_file() else {}
    try:
        added: list[dict[str, Any]] = []
        merges: list[Any]
        if (folder / "added_tokens.json").is_file():
            words = read_json(folder / "added_tokens.json")
            added = [{"content": word, "id": i} for word, i in words.items()]
        if (folder / "tokenizer.json").is_file():
            whole = read_json(folder / "tokenizer.json")
            vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
            merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
            added += whole["added_tokens"]
        else:
            vocabulary, merges = BPE.read_file(
                str(folder / "vocab.json"), str(folder / "merges.txt")
            )
        if decoder := said.get("added_tokens_decoder"):
            added = [token | {"id": int(i)} for i, token in decoder.items()]
        limit = min(max_tokens, said.get("model_max_length") or max_tokens)
        return _make(vocabulary, merges, added, said, int(limit))
    except CheckpointError:
        raise
    except Exception as error:  # the library raises this very kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{folder} holds no tokenizer of CLIP's ({reason})") from None


def write_tokenizer(tokenizer: ClipTokenizer, folder: Path) -> None:
    """Write the folder that transformers and diffusers open, in all their versions."""
    bpe = tokenizer.bpe
    ids = {"bos_token": tokenizer.start, "eos_token": tokenizer.end, "pad_token": tokenizer.padding}
    write_json(
        folder / "tokenizer_config.json",
        {name: bpe.id_to_token(i) for name, i in ids.items()}
        | {"unk_token": bpe.model.unk_token, "model_max_length": tokenizer.max_tokens}
        | {"tokenizer_class": "CLIPTokenizer"},
    )
    bpe.save(str(folder / "tokenizer.json"))
    bpe.model.save(str(folder))  # vocab.json and merges.txt, from before tokenizer.json


def _make(
    vocabulary: dict[str, int],
    merges: list[tuple[str, str]],
    added: Iterable[Mapping[str, Any]],
    named: Mapping[str, Any],
    max_tokens: int,
) -> ClipTokenizer:
    """`added` words as tokenizer.json lists them, `named` ones as tokenizer_config.json does."""
    tokens = {token["content"]: token for token in sorted(added, key=lambda token: token["id"])}
    names, own = {}, {}
    for name, usual in NAMED.items():
        token = named.get(name) or usual
        token = {"content": token} if isinstance(token, str) else token
        names[name] = token["content"]
        own[token["content"]] = {**token, "special": True}
    tokens |= {word: token for word, token in own.items() if word not in tokens}
    bpe = Tokenizer(
        BPE(
            vocabulary,
            merges,
            unk_token=names["unk_token"],
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), "removed", invert=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    bpe.decoder = decoders.ByteLevel()
    for token in tokens.values():
        options = {key: value for key, value in token.items() if key not in ("id", "__type")}
        bpe.add_tokens([AddedToken(**options)])
    start, end, padding = (  # which are there by now
        cast(int, bpe.token_to_id(names[name])) for name in ("bos_token", "eos_token", "pad_token")
    )
    bpe.post_processor = RobertaProcessing(
        (names["eos_token"], end), (names["bos_token"], start), False, add_prefix_space=False
    )
    return ClipTokenizer(bpe, max_tokens, start, end, padding)


@cache
def _merges() -> list[tuple[str, str]]:
    """All of CLIP's, the most frequent first."""
    package = find_spec("open_clip")  # not imported, which takes seconds
    assert package is not None and package.origin is not None
    file = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")
    return [(left, right) for left, right in map(str.split, lines[1 : 49408 - 514 + 1])]
