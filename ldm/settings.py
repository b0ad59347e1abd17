"""The settings of the pipeline's call as text: what reads each of them, and within which limits.

The command line, prompt files and pictures' files are read with the same readers. A reader takes
a text and raises argparse's `ArgumentTypeError` where it does not fit. Imports no torch.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from itertools import pairwise
from math import isfinite
from typing import Any, get_args

from ldm.config import LongPrompts, SamplerName, Spacing, Variance
from ldm.errors import suggest

MAX_SEED = 2**63 - 1
INFINITY = float("inf")


def within(low: float, high: float = INFINITY, kind: type = int) -> Callable[[str], Any]:
    """A reader of one finite number of this kind, from `low` to `high`."""

    def read(text: str) -> Any:
        try:
            number = kind(text)
            fits = low <= number <= high and isfinite(number)
        except (ValueError, OverflowError):
            raise ArgumentTypeError(f"'{text}' is not a number of type {kind.__name__}") from None
        if not fits:
            end = f"{low} or more" if high == INFINITY else f"{low} to {high}"
            end = "finite" if low == -INFINITY else end
            raise ArgumentTypeError(f"{text} is out of range; it must be {end}")
        return number

    return read


def numbers(kind: Callable[[str], Any], falling: bool = False) -> Callable[[str], list[Any]]:
    """A reader of values of this kind with commas between them, each below the last if `falling`.

    Brackets around them, as in JSON, are left out.
    """

    def read(text: str) -> list[Any]:
        values = [kind(word.strip()) for word in text.strip("[]").split(",")]
        if falling and any(a <= b for a, b in pairwise(values)):
            raise ArgumentTypeError(f"{text} does not descend; give the highest first")
        return values

    return read


def _pair(fits: Callable[[float, float], bool], rule: str) -> Callable[[str], list[float]]:
    def read(text: str) -> list[float]:
        values = numbers(real)(text)
        if len(values) != 2 or not fits(*values):
            raise ArgumentTypeError(f"{' '.join(f'{value:g}' for value in values)}; {rule}")
        return values

    return read


def _one_of(what: str, literal: Any) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in (names := get_args(literal)):
            raise ArgumentTypeError(f"there is no {what} '{text}'; {suggest(text, names)}")
        return text

    return read


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ArgumentTypeError(f"'{text}' is neither true nor false")
    return text == "true"


real = within(-INFINITY, kind=float)
_share = within(0, 1, float)
_levels = numbers(within(0, kind=float), falling=True)

READERS: dict[str, Callable[[str], Any]] = {
    "seed": within(0, MAX_SEED),
    "num_inference_steps": within(1),
    "sampler": _one_of("sampler", SamplerName),
    "timestep_spacing": _one_of("spacing", Spacing),
    "guidance_scale": real,
    "width": within(1),
    "height": within(1),
    "strength": _share,
    "timesteps": _levels,
    "sigmas": _levels,
    "guidance_rescale": _share,
    "guidance_interval": _pair(lambda a, b: 0 <= a < b, "give the lower one first, from 0 up"),
    "dynamic_threshold": _pair(
        lambda a, b: 0 < a <= 1 and b > 0, "the percentile must be in (0, 1], the limit above 0"
    ),
    "variation_seed": within(0, MAX_SEED),
    "variation_strength": _share,
    "eta": _share,
    "class_labels": within(0),
    "variance": _one_of("variance", Variance),
    "clip_skip": within(0),
    "long_prompts": _one_of("way with long prompts", LongPrompts),
    "prompt_weights": _truth,
}
"""What reads a setting, by its name in the call."""
