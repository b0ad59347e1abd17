"""Aspect-ratio buckets: pictures keep their shape, as nearly as batches of one shape allow.

Source: NovelAI 2022, "Improvements on Stable Diffusion", aspect ratio bucketing. The options that
the errors name are those of kohya's scripts, which made it common.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log

from tqdm import tqdm

from ldm.data.sample import DataSource
from ldm.errors import ConfigError, DataError

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Buckets:
    """Which sizes there may be; all in pixels.

    Attributes:
        resolution: no bucket has more pixels than a square of this side.
        minimum: least side of a bucket.
        maximum: greatest side of a bucket.
        step: what all sides are multiples of.
        no_upscale: a picture that would have to be enlarged gets a bucket of its own size instead,
            rounded down to steps, and below the minimum if need be.

    Raises:
        ConfigError: the square does not fit.
    """

    resolution: int
    minimum: int
    maximum: int
    step: int
    no_upscale: bool = False

    def __post_init__(self) -> None:
        side = self._down(self.resolution)
        if side < self.step or not self.minimum <= side <= self.maximum:
            raise ConfigError(
                f"with bucket_reso_steps {self.step} the square bucket of resolution"
                f" {self.resolution} has side {side}, which min_bucket_reso {self.minimum} and"
                f" max_bucket_reso {self.maximum} do not allow; change one of the four"
            )

    def sizes(self) -> list[Size]:
        """From tall to wide: for each height the greatest width, and for each width likewise."""
        least = self._down(self.minimum - 1) + self.step
        square = self._down(self.resolution)
        found = {(square, square)}
        for side in range(least, self.maximum + 1, self.step):
            other = self._down(min(self.maximum, self.resolution**2 // side))
            if other >= least:
                found |= {(side, other), (other, side)}
        return sorted(found, key=_log_ratio)

    def own(self, width: int, height: int) -> Size:
        """The largest bucket that a picture fills without being enlarged."""
        height, width = (
            max(self.step, self._down(min(side, self.maximum))) for side in (height, width)
        )
        limit = self._down(self.resolution**2 // min(height, width))
        return min(height, limit), min(width, limit)

    def _down(self, side: int) -> int:
        return side // self.step * self.step


def assign_buckets(
    pictures: Sequence[tuple[int, int]], buckets: Buckets, batch_size: int
) -> tuple[list[Size], list[int]]:
    """Give each picture the bucket whose aspect ratio is nearest to its own, as a factor.

    A bucket with fewer pictures than a batch would show one twice in a batch: smallest first, such
    buckets join their neighbours.

    Args:
        pictures: width and height of each, in pixels.
        buckets: which sizes there may be.
        batch_size: pictures in a global batch.

    Returns:
        The sizes of the buckets that are in use, and the bucket of each picture.
    """
    sizes = buckets.sizes()
    borders = [(_log_ratio(a) + _log_ratio(b)) / 2 for a, b in pairwise(sizes)]
    chosen = []
    for width, height in pictures:
        size = sizes[bisect_left(borders, log(width / height))]
        if buckets.no_upscale and (height < size[0] or width < size[1]):
            size = buckets.own(width, height)
        chosen.append(size)
    counts, joined = Counter(chosen), dict[Size, Size]()
    while len(counts) > 1 and min(counts.values()) < batch_size:
        small = min(counts, key=lambda size: (counts[size], size))
        number = counts.pop(small)
        joined[small] = min(counts, key=lambda size: _distance(size, small))
        counts[joined[small]] += number
    numbers = {size: bucket for bucket, size in enumerate(sorted(counts))}
    for small in reversed(joined):  # the last to go has joined one that stays
        numbers[small] = numbers[joined[small]]
    return sorted(counts), [numbers[size] for size in chosen]


def read_buckets(
    source: DataSource, buckets: Buckets, batch_size: int, *, skip: bool
) -> tuple[list[Size], list[int]]:
    """`assign_buckets` of a source's pictures, whose headers are read for it.

    Args:
        source: where from.
        buckets: which sizes there may be.
        batch_size: pictures in a global batch.
        skip: a picture without a header that can be read goes with the square ones, to be skipped
            when its turn comes.

    Raises:
        DataError: a header cannot be read, without `skip`.
    """
    pictures = []
    for index in tqdm(range(len(source)), desc="reading picture sizes", mininterval=1.0):
        try:
            pictures.append(source.size(index))
        except DataError:
            if not skip:
                raise
            pictures.append((buckets.resolution, buckets.resolution))
    return assign_buckets(pictures, buckets, batch_size)


def _log_ratio(size: Size) -> float:
    return log(size[1] / size[0])


def _distance(a: Size, b: Size) -> tuple[float, float]:
    """How far two sizes are apart in aspect ratio, and then in area, as factors."""
    return abs(_log_ratio(a) - _log_ratio(b)), abs(log(a[0] * a[1] / b[0] / b[1]))
