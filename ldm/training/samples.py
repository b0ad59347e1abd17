"""From places in the sample order to batches; bad samples are told of, and workers end with us."""

from __future__ import annotations

import os
import signal
import sys
from bisect import bisect_left
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ldm.data.order import Order, Place
from ldm.errors import DataError
from ldm.training.stop import die_with_parent, signals_blocked

Batch = dict[str, Any]
"""Tensors whose first dimension is the sample, and lists of as many strings."""

NEAR = 64  # so many neighbours are tried in a bad sample's place, and then some farther off


@dataclass(frozen=True)
class Samples(Dataset[Any]):
    """A stage's items, with `bad`: why a sample could not be read and another one stands in.

    Attributes:
        items: of `Stage.dataset`, indexed by a `Place`.
        length: how many samples there are.
        skip: whether a bad sample is replaced.
        order: of the run, which knows what may stand in for a sample.
    """

    items: Dataset[Batch]
    length: int
    skip: bool
    order: Order | None = None

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
        # The next one that can be read; far ones too, for a whole shard may be bad.
        alike = self.order.alike(place.index) if self.order else range(self.length)
        here, near = bisect_left(alike, place.index), min(NEAR, len(alike))
        for ahead in (*range(1, near), *(2**n for n in range(6, len(alike).bit_length()))):
            index = int(alike[(here + ahead) % len(alike)])
            with suppress(DataError):
                # Its draws are addressed by a visit that no epoch has.
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
        batches: Iterable[list[Place]],
        *,
        workers: int,
        pin_memory: bool = False,
    ):
        loader = DataLoader(
            samples,
            batch_sampler=batches,
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
        signal.signal(signal.SIGCHLD, watch or signal.SIG_DFL)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        workers = getattr(self._batches, "_workers", [])
        if not workers:
            return
        if pinning := getattr(self._batches, "_pin_memory_thread_done_event", None):
            pinning.set()
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
        except (RuntimeError, EOFError, ConnectionError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a process that reads pictures has died, perhaps for want of memory; lower"
                f" dataloader_num_workers and resume ({' '.join(str(error).split())[:200]})"
            ) from None
        if isinstance(batch, DataError):
            raise batch
        return batch


def move(batch: Batch, device: torch.device) -> Batch:
    """Pictures and noises go to the device; timesteps stay, since the CPU has the schedule."""
    return {
        key: value.to(device, non_blocking=True)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in batch.items()
    }


def _collate(items: list[Batch | DataError]) -> Batch | DataError:
    """One batch of the items, or the first error among them."""
    return next((i for i in items if isinstance(i, DataError)), None) or default_collate(items)


def _die_with(parent: int, _: int) -> None:
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it has died already
        os._exit(1)
