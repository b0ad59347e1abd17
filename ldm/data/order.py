"""Which sample at which step: a pure function of the seed and the step, for ever resumable.

The samples of all epochs stand in one endless line; step s takes positions s * batch_size up to
(s + 1) * batch_size of it. A batch may straddle two epochs, no sample is dropped, and nothing
depends on the number of processes: each takes a contiguous slice of the global batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ldm.errors import ConfigError, DataError
from ldm.rng import Draws


class Visit(NamedTuple):
    """One sample at one time.

    Attributes:
        index: the sample, in [0, length).
        visit: how often it has been seen before, which is the epoch; it addresses fresh draws.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    visit: int


def positions(seed: int, step: int, batch_size: int, length: int) -> list[Visit]:
    """The samples of the global batch of an optimizer step (or of a micro step, so counted).

    Args:
        seed: the run's seed.
        step: from 0.
        batch_size: samples in the global batch, over all processes.
        length: samples in the data set.

    Raises:
        DataError: the data set is smaller than a batch.
    """
    check_length(length, batch_size)
    visits = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, length)
        visits.append(Visit(int(_permutation(seed, epoch, length)[place]), epoch))
    return visits


def rank_slots(batch_size: int, world_size: int, rank: int) -> slice:
    """The slots of the global batch that a process takes.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(
            f"a global batch of {batch_size} cannot be shared by {world_size} processes;"
            f" make it a multiple of {world_size}"
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def check_length(length: int, batch_size: int) -> None:
    """Refuse a data set that would put the same sample into a batch twice.

    Raises:
        DataError: it is smaller than a batch.
    """
    if length < batch_size:
        raise DataError(
            f"the data set has {length} samples, fewer than a batch of {batch_size};"
            " add pictures or make the batch smaller"
        )


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of one epoch. Two are kept, for batches that straddle epochs."""
    return Draws(seed, "order", epoch).permutation(length)
