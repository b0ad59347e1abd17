"""CLIP's tokenizer without a download: its vocabulary comes inside open_clip's package."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

END = "<|endoftext|>"


def clip_tokenizer(
    vocab_size: int = 49408, max_tokens: int = 77, pad_token: str = END
) -> CLIPTokenizer:
    """CLIP's byte-pair encoding, cut to its first and most frequent merges.

    Every text can still be written, since the single bytes stay; rarer words take more tokens.

    Args:
        vocab_size: tokens, from 514 (single bytes and the two markers) to 49408, all of CLIP's.
        max_tokens: of a prompt, its start and end tokens included.
        pad_token: what fills a prompt up: the end token in SD 1.x, "!" in SD 2.x.
    """
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    merges = _merges()[: vocab_size - 514]
    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters]
    words += ["".join(pair) for pair in merges] + ["<|startoftext|>", END]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=merges,  # type: ignore[arg-type]
        model_max_length=max_tokens,
        pad_token=pad_token,
    )


@cache
def _merges() -> list[tuple[str, ...]]:
    """All of CLIP's, the most frequent first."""
    import gzip

    from open_clip.tokenizer import default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49408 - 514 + 1]  # the first is a version
    return [tuple(line.split()) for line in lines]
