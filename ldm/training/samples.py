"""From places in the sample order to batches; bad samples are told of, and workers end with us."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from ldm.data.order import Place
from ldm.errors import DataError
from ldm.training.stop import die_with_parent, signals_blocked

Batch = dict[str, Any]
"""Tensors whose first dimension is the sample, and lists of as many strings."""

STAND_INS = 1000  # neighbours that are tried in a bad sample's place


@dataclass(frozen=True)
class Samples(Dataset[Any]):
    """A stage's items, with `bad`: why a sample could not be read and another one stands in.

    Attributes:
        items: of `Stage.dataset`, indexed by a `Place`.
        length: how many samples there are.
        skip: whether a bad sample is replaced.
    """

    items: Dataset[Batch]
    length: int
    skip: bool

    def __getitem__(self, place: Place) -> Batch | DataError:
        """As `read`, but an error is returned: raised in a worker it would lose its shape."""
        try:
            return self.read(place)
        except DataError as error:
            return error

    def read(self, place: Place) -> Batch:
        """The item of a place.

        Raises:
            DataError: it cannot be read, or, with `skip`, none of its neighbours either.
        """
        try:
            return self.items[place] | {"bad": ""}
        except DataError as error:
            if not self.skip:
                raise
            bad = str(error)
        # The next one that can be read. Its draws are addressed by a visit that no epoch has.
        for ahead in range(1, min(STAND_INS, self.length)):
            index = (place.index + ahead) % self.length
            with suppress(DataError):
                stand_in = place._replace(index=index, visit=-1 - place.visit)
                return self.items[stand_in] | {"bad": bad}
        raise DataError(f"{bad}; and of the samples after it none can be read either")


class Loader:
    """Batches in order, from worker processes where there are any.

    Args:
        samples: what is read.
        batches: the places of each batch.
        workers: how many processes read ahead.
        pin_memory: for copies to a GPU that do not wait.
    """

    def __init__(
        self,
        samples: Samples,
        batches: Iterator[list[Place]] | list[list[Place]],
        *,
        workers: int,
        pin_memory: bool = False,
    ):
        loader = DataLoader(
            samples,
            batch_sampler=_Once(batches),
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=partial(_die_with, os.getpid()),
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            pin_memory=pin_memory,
        )
        watch = signal.getsignal(signal.SIGCHLD)
        with signals_blocked():  # a worker that died of a signal to all would end the saving, too
            self._batches = iter(loader)
        # torch's handler would raise a worker's death anywhere, in a save, too; `next` finds it.
        signal.signal(signal.SIGCHLD, watch)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        workers = getattr(self._batches, "_workers", [])
        if not workers:
            return
        # A worker may be waiting for a disk. It holds nothing of value, and blocks SIGTERM.
        for worker in workers:
            worker.kill()
        self._batches._shutdown_workers()  # type: ignore[attr-defined]

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            DataError: a sample cannot be read, or a worker has died.
        """
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"{' '.join(str(error).split('.')[0].split())}: a process that reads pictures has"
                " died, perhaps for want of memory; lower dataloader_num_workers and resume"
            ) from None
        if isinstance(batch, DataError):
            raise batch
        return batch


class _Once:
    """A batch sampler that is run through once."""

    def __init__(self, batches: Iterator[list[Place]] | list[list[Place]]):
        self._batches = batches

    def __iter__(self) -> Iterator[list[Place]]:
        return iter(self._batches)


def _collate(items: list[Batch | DataError]) -> Batch | DataError:
    """One batch of the items, or the first error among them."""
    return next((i for i in items if isinstance(i, DataError)), None) or default_collate(items)


def _die_with(parent: int, _: int) -> None:
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it has died already
        os._exit(1)
