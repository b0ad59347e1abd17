r"""The language of prompts, as web-UI users write it: weights, escapes and chunks. Pure strings.

    a (red) flower          weight 1.1; ((red)) has 1.21, [red] 1 / 1.1
    a (red:1.3) flower      weight 1.3; brackets nest, and their weights multiply
    a \(red\) flower        the brackets themselves; \\ is a backslash, any other one disappears
    a flower BREAK a tree   BREAK starts a new chunk of the context

A bracket that is never opened is text; one that is never closed weighs all that follows it. What
else the web UI reads in a prompt is not there: `[from:to:when]`, `[a|b]` and `<lora:name:weight>`
are refused, and AND is a word like any other.

Source: the wiki of AUTOMATIC1111's stable-diffusion-webui, page Features: attention/emphasis, BREAK
and prompts of more than 75 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from ldm.errors import ConfigError

ROUND, SQUARE = 1.1, 1 / 1.1
BACKTRACK = 20  # tokens; a clause no longer than this moves to the next chunk whole

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_SYMBOL = re.compile(rf"\\[\\()\[\]]?|:\s*({_NUMBER})\s*\)|[()\[\]]|:|[^\\()\[\]:]+")
_BREAK = re.compile(r"\bBREAK\b")
_EDITING = re.compile(rf":\s*{_NUMBER}\s*$|(?<!\\)\|")
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^>]*>")


def parse_weights(prompt: str) -> list[list[tuple[str, float]]]:
    r"""Read the weights of a prompt.

    Returns:
        The sections that BREAK parts, each a list of (text, weight).

    Raises:
        ConfigError: the prompt asks for prompt editing, alternation, or an extra network.

    >>> parse_weights("a (red:1.3) [tulip]")
    [[('a ', 1.0), ('red', 1.3), (' ', 1.0), ('tulip', 0.9090909090909091)]]
    >>> parse_weights(r"a \(vase\) BREAK (a (big) table")
    [[('a (vase) ', 1.0)], [(' ', 1.0), ('a ', 1.1), ('big', 1.2100000000000002), (' table', 1.1)]]
    """
    if found := _NETWORK.search(prompt):
        raise ConfigError(
            f"prompt: {found[0]} asks for an extra network; load the file as a LoRA instead"
            " and leave this out"
        )
    pieces: list[tuple[str | None, float]] = []  # None is a BREAK
    opened: list[int] = []  # of round brackets, the first piece inside
    opened_square: list[tuple[int, int]] = []  # likewise, and the place in the prompt

    def weigh(first: int, factor: float) -> None:
        pieces[first:] = [(text, weight * factor) for text, weight in pieces[first:]]

    for symbol in _SYMBOL.finditer(prompt):
        text = symbol[0]
        if text[0] == "\\":
            pieces.append((text[1:], 1.0))
        elif text == "(":
            opened.append(len(pieces))
        elif text == "[":
            opened_square.append((len(pieces), symbol.start()))
        elif text[-1] == ")" and opened:
            weigh(opened.pop(), float(symbol[1] or ROUND))
        elif text == "]" and opened_square:
            first, start = opened_square.pop()
            _refuse_editing(prompt[start : symbol.end()])
            weigh(first, SQUARE)
        else:
            for i, part in enumerate(_BREAK.split(text)):
                pieces += [(None, 1.0)] * (i > 0) + [(part, 1.0)]
    for first in opened:
        weigh(first, ROUND)
    for first, _ in opened_square:
        weigh(first, SQUARE)

    sections: list[list[tuple[str, float]]] = [[]]
    for (weight, is_break), run in groupby(pieces, lambda piece: (piece[1], piece[0] is None)):
        if is_break:
            sections += [[] for _ in run]
        elif text := "".join(text or "" for text, _ in run):
            sections[-1].append((text, weight))
    return sections


def _refuse_editing(bracket: str) -> None:
    if _EDITING.search(bracket[1:-1]):
        raise ConfigError(
            f"prompt: {bracket} is prompt editing or alternation, which ldm has not;"
            rf" write \[ and \] for the brackets themselves"
        )


class Token(NamedTuple):
    """A piece of a prompt that is never torn apart.

    Attributes:
        ids: its number in the vocabulary; those of all its vectors for a textual inversion.
        text: what it stands for, and the spaces after it.
        weight: of its part of the context.
    """

    ids: list[int]
    text: str
    weight: float


def split_chunks(
    tokens: Sequence[Token], room: int, backtrack: int = BACKTRACK
) -> list[list[Token]]:
    """Part tokens into chunks, after a comma where one is near.

    Args:
        tokens: of one section.
        room: the ids that a chunk holds, its start and end apart; no token has more.
        backtrack: when a chunk is full, what follows its last comma moves to the next one, if that
            and the comma are no more ids than this.
    """
    chunks: list[list[Token]] = [[]]
    for token in tokens:
        while _length(chunks[-1]) + len(token.ids) > room:
            full = chunks[-1]
            cut = len(full)
            commas = [i for i, other in enumerate(full) if other.text.strip() == ","]
            if commas and token.text.strip() != "," and _length(full[commas[-1] :]) <= backtrack:
                cut = commas[-1] + 1
            chunks.append(full[cut:])
            del full[cut:]
        chunks[-1].append(token)
    return chunks


def _length(tokens: Sequence[Token]) -> int:
    return sum(len(token.ids) for token in tokens)
