"""Which samples at which step: a pure function of the seed and the step, for ever resumable.

The samples of all epochs stand in one endless line; the global batches are cut off it one after
the other. A batch may straddle two epochs, no sample is dropped, and nothing depends on the number
of processes: each takes a contiguous slice of the global batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from ldm.errors import ConfigError, DataError
from ldm.rng import Draws


class Place(NamedTuple):
    """What stands in one slot of one global batch.

    Attributes:
        index: the sample, in [0, length).
        visit: how often it has been seen before, which is its epoch; it addresses fresh draws.
            Negative for what stands in for a bad sample.
        step: the optimizer step, from 0.
        slot: its place in the global batch.
        size: height and width in pixels that the batch is cropped to; None for the square of the
            run's resolution.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    visit: int = 0
    step: int = 0
    slot: int = 0
    size: tuple[int, int] | None = None


class Order(Protocol):
    """The global batches of a run, by number. Immutable; it pickles."""

    def batch(self, step: int) -> list[Place]:
        """The global batch of an optimizer step, from 0."""
        ...

    def alike(self, index: int) -> Sequence[int]:
        """Samples that fit into the batches of a sample, in the order of their numbers."""
        ...


@dataclass(frozen=True)
class Shuffled:
    """Every epoch is a new permutation of all samples.

    Attributes:
        seed: the run's seed.
        batch_size: samples in the global batch, over all processes.
        length: samples in the data set.

    Raises:
        DataError: the data set is smaller than a batch.
    """

    seed: int
    batch_size: int
    length: int

    def __post_init__(self) -> None:
        check_length(self.length, self.batch_size)

    def batch(self, step: int) -> list[Place]:
        places = []
        for slot in range(self.batch_size):
            epoch, place = divmod(step * self.batch_size + slot, self.length)
            index = int(_permutations(self.seed, epoch, (self.length,))[0][place])
            places.append(Place(index, epoch, step, slot))
        return places

    def alike(self, index: int) -> Sequence[int]:
        return range(self.length)


@dataclass(frozen=True)
class Bucketed:
    """Pictures of one shape a batch: every bucket has an endless line of its own.

    Before epoch e a bucket of n samples has given floor(e n / batch_size) batches; what is left
    over waits for the next. Whose turn it is, is shuffled over the epoch. With one bucket this is
    `Shuffled`.

    Attributes:
        seed: the run's seed.
        batch_size: samples in the global batch, over all processes.
        bucket_of: the bucket of each sample.
        sizes: height and width of each bucket, in pixels.

    Raises:
        DataError: a bucket is smaller than a batch.
    """

    seed: int
    batch_size: int
    bucket_of: Sequence[int]
    sizes: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        check_length(min(self._counts), self.batch_size)

    def batch(self, step: int) -> list[Place]:
        limit = (step + len(self.sizes) + 1) * self.batch_size // len(self.bucket_of) + 2
        epoch = bisect_right(range(limit), step, key=lambda e: self._given(e).sum()) - 1
        given, next_given = self._given(epoch), self._given(epoch + 1)
        turns = _turns(self.seed, epoch, tuple(next_given - given))
        now = step - given.sum()
        bucket = int(turns[now])
        number = int(given[bucket] + (turns[:now] == bucket).sum())
        members, size = self._members[bucket], self.sizes[bucket]
        places = []
        for slot in range(self.batch_size):
            visit, place = divmod(number * self.batch_size + slot, len(members))
            order = _permutations(self.seed, visit, self._counts)[bucket]
            places.append(Place(int(members[order[place]]), visit, step, slot, size))
        return places

    def alike(self, index: int) -> Sequence[int]:
        return self._members[self.bucket_of[index]]  # type: ignore[return-value]  an array

    @cached_property
    def _members(self) -> list[np.ndarray]:
        """The samples of each bucket."""
        return [np.flatnonzero(np.equal(self.bucket_of, b)) for b in range(len(self.sizes))]

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        return tuple(len(members) for members in self._members)

    def _given(self, epoch: int) -> np.ndarray:
        """The batches that each bucket has given before an epoch."""
        return epoch * np.array(self._counts) // self.batch_size


@dataclass(frozen=True)
class Streamed:
    """For shards that no disk holds: each slot walks along shards of its own.

    The shards of an epoch stand in a shuffled line, and so do the samples of each. The line is cut
    into `batch_size` equal lanes, and every batch takes the next sample of each lane. So a process,
    whose slots are neighbours, reads shards that no other one reads, but for the few in which one
    process's lanes end and another's begin.

    Attributes:
        seed: the run's seed.
        batch_size: samples in the global batch, over all processes.
        shard_lengths: samples in each shard, in the order of their indices in the data set.

    Raises:
        DataError: the data set is smaller than a batch.
    """

    seed: int
    batch_size: int
    shard_lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        check_length(self._starts[-1], self.batch_size)

    def batch(self, step: int) -> list[Place]:
        length = int(self._starts[-1])
        lane_length, longer = divmod(length, self.batch_size)  # the first lanes are longer by one
        first = step * self.batch_size
        epochs = {first // length, (first + self.batch_size - 1) // length}
        lines = {epoch: _shard_line(self.seed, epoch, self.shard_lengths) for epoch in epochs}
        places = []
        for slot in range(self.batch_size):
            epoch, place = divmod(first + slot, length)
            offset, lane = divmod(place, self.batch_size)
            position = lane * lane_length + min(lane, longer) + offset
            shards, starts = lines[epoch]
            number = int(np.searchsorted(starts, position, "right")) - 1
            shard = int(shards[number])
            order = _shard_permutation(self.seed, shard, epoch, self.shard_lengths[shard])
            index = self._starts[shard] + order[position - starts[number]]
            places.append(Place(int(index), epoch, step, slot))
        return places

    def alike(self, index: int) -> Sequence[int]:
        return range(int(self._starts[-1]))

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each shard begins in the data set, and where the last ends."""
        return np.cumsum((0, *self.shard_lengths))


def micro_batches(batch_size: int, world_size: int, rank: int, accumulation: int) -> list[slice]:
    """The slots of the global batch that a process takes: a slice for each of its micro-batches.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """
    size, rest = divmod(batch_size, world_size * accumulation)
    if rest or not size:
        raise ConfigError(
            f"train_batch_size {batch_size} cannot be split over {world_size} process(es) and"
            f" gradient_accumulation_steps {accumulation}; make it a multiple of"
            f" {world_size * accumulation}"
        )
    first = rank * accumulation
    return [slice(i * size, (i + 1) * size) for i in range(first, first + accumulation)]


def check_length(length: int, batch_size: int) -> None:
    """Refuse a data set that would put the same sample into every batch twice.

    Raises:
        DataError: it is smaller than a batch.
    """
    if length < batch_size:
        raise DataError(
            f"the data set has {length} samples, fewer than a batch of {batch_size};"
            " add pictures or make the batch smaller"
        )


@lru_cache(maxsize=2)
def _permutations(seed: int, visit: int, lengths: tuple[int, ...]) -> list[np.ndarray]:
    """The order of each bucket at one visit. Two are kept, for batches that straddle epochs."""
    purposes = ["order", *(f"order/{bucket}" for bucket in range(1, len(lengths)))]
    return [
        Draws(seed, purpose, visit).permutation(length)
        for purpose, length in zip(purposes, lengths, strict=True)
    ]


@lru_cache(maxsize=2)
def _turns(seed: int, epoch: int, counts: tuple[int, ...]) -> np.ndarray:
    """Which bucket each batch of an epoch is of."""
    buckets = np.repeat(np.arange(len(counts)), counts)
    return buckets[Draws(seed, "buckets", epoch).permutation(len(buckets))]


@lru_cache(maxsize=2)
def _shard_line(seed: int, epoch: int, lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The shards of an epoch in their order, and where each begins in the line of samples."""
    shards = Draws(seed, "shards", epoch).permutation(len(lengths))
    return shards, np.cumsum((0, *np.array(lengths)[shards]))


@lru_cache(maxsize=4096)  # one for every slot
def _shard_permutation(seed: int, shard: int, epoch: int, length: int) -> np.ndarray:
    return Draws(seed, "shard", shard, epoch).permutation(length).astype(np.int32)
