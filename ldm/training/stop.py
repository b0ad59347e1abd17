"""Ending a run on SIGTERM, SIGINT or SIGHUP: within a step, at the same step everywhere, saved."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENT = timedelta(hours=12)  # the main process may be drawing while the others ask
ECHO = 1.0  # seconds in which a launcher's copy of a signal counts as the same signal


class _Interrupted(BaseException):
    """No Exception, so that nothing which handles errors takes it for one."""


class Stop:
    """While entered, a first signal asks the run to end, and a second one ends it at once.

    A signal may reach one process of several, or each at another moment; `agreed` is where they
    make it one decision. Steps are not interrupted, since a lone process would leave the others
    waiting for its gradients; what waits or only looks is done by `attempt`.

    Attributes:
        asked: the signal that this process has received.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._when = 0.0
        self._breakable = False
        self._parent = os.getppid()
        self._group: Any = None

    def __enter__(self) -> Stop:
        heeded = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # as nohup sets it
        self._before = {number: signal.signal(number, self._receive) for number in heeded}
        if dist.is_initialized() and dist.get_world_size() > 1:
            # It asks no GPU, so it waits for none.
            self._group = dist.new_group(backend="gloo", timeout=PATIENT)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._when = signal.Signals(number), time.monotonic()
        elif os.getppid() != self._parent:  # the launcher has died of the first one: no second one
            self._parent = os.getppid()
        elif time.monotonic() - self._when > ECHO:
            os._exit(128 + number)
        if self._breakable:
            self._breakable = False
            raise _Interrupted

    def attempt(self, work: Callable[[], Result]) -> Result | None:
        """Do some work, or give it up (None) as soon as a signal comes.

        The work must talk to no other process and leave nothing half done.
        """
        try:
            try:
                self._breakable = True
                return None if self.asked else work()
            finally:
                self._breakable = False
        except _Interrupted:
            return None

    def agreed(self) -> bool:
        """Whether any process has been asked to end; all must call it at the same place."""
        asked = int(self.asked is not None)
        if self._group is None:
            return bool(asked)
        flag = torch.tensor(asked)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal has ended."""
        return 128 + (self.asked or signal.SIGTERM)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started inside never see these signals: their parent decides when they end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when its parent dies, however it dies (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(number))


def stop_with_launcher() -> None:
    """Take the launcher's death for a SIGTERM.

    `accelerate launch` of one process dies of a SIGTERM without passing it on, and nobody passes on
    a SIGKILL.
    """
    if os.environ.keys() & {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}:
        die_with_parent(signal.SIGTERM)
