"""A worker's pace: what it is asked to do, turn by turn, and what it tells of each.

The clock runs from a point's arrival until the turn's work is done. Imports no torch before a side
does: a new process is part of what is measured.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.benchmark.cases import Point


class Turn(NamedTuple):
    """What a worker says of a turn.

    Attributes:
        seconds: it took to do the work once; the first, to open the model.
        memory: the process's peak since another point ended, opening included where this is the
            first, in bytes; of a GPU's memory, where it works on one.
        outside: of training, the share of the seconds outside of forward and backward pass,
            optimizer (and the gradient's norm that it needs) and average; None where not known.
        output: float32 arrays, of a turn that is to be checked.
    """

    seconds: float
    memory: int
    outside: float | None
    output: list[np.ndarray]


class Pace:
    """The worker's end, an iterator of points: that of a turn `times` times, then the next turn's.

    Who asks for one more has done his work: the `Turn` is sent, and the next point waited for.

    Attributes:
        output: what the turn has made: pictures, arrays or tensors.
        inside: seconds of the turn in methods that are watched; None without any.
    """

    def __init__(self, connection: Connection, device: str):
        self.connection, self.cuda = connection, device.startswith("cuda")
        self.output: Any = []
        self.inside: float | None = None
        self.point, self.left = Point(0, 0, 0), 0  # before the first turn: the opening
        self.began = time.perf_counter()

    def __iter__(self) -> Pace:
        return self

    def __next__(self) -> Point:
        self.left -= 1
        if self.left > 0:
            return self.point
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        outside = None if self.inside is None else 1 - self.inside / seconds
        seconds /= self.point.times
        output = [_array(item) for item in self.output] if self.point.check else []
        self.connection.send(Turn(seconds, peak_memory(self.cuda), outside, output))
        self.output, self.inside, last = [], None, self.point
        try:
            self.point = self.connection.recv()
        except EOFError:  # the parent needs no more
            raise SystemExit from None
        if last.height and replace(self.point, check=False) != replace(last, check=False):
            forget_peak(self.cuda)
        self.left = self.point.times
        self.began = time.perf_counter()
        return self.point

    def watch(self, owner: Any, method: str) -> None:
        """Count the seconds of a method as inside; on a GPU it returns before they are spent."""
        work = getattr(owner, method)

        def watched(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                self.inside = (self.inside or 0.0) + time.perf_counter() - began

        if not self.cuda:
            setattr(owner, method, watched)


def peak_memory(cuda: bool) -> int:
    """Bytes that this process has held at most, or one that it has started, or of the GPU's."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if (status := Path("/proc/self/status")).exists():  # the other may be what its parent held
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        own = int(lines["VmHWM"].split()[0]) * 1024
    return max(own, children)


def forget_peak(cuda: bool) -> None:
    """Have `peak_memory` begin anew, where the system can."""
    if cuda:
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif (file := Path("/proc/self/clear_refs")).exists():
        file.write_text("5")


def _array(item: Any) -> np.ndarray:
    """A tensor, an array or a picture, float32."""
    if hasattr(item, "detach"):
        item = item.detach().float().cpu()
    return np.asarray(item, dtype=np.float32)
