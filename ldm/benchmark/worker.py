"""One side of a comparison, in a process of its own, so that its memory is its own.

    parent: Worker.turn(point) --point--> worker: `for point in pace: pace.output = work(point)`
                               <--Turn---

The clock runs in the worker from the point's arrival until the turn's work is done. Imports no
torch before a side does: a new process is part of what is measured.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.benchmark.cases import Job, Point
from ldm.errors import LdmError


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


class Worker(AbstractContextManager["Worker"]):
    """The parent's end: starts the process and waits until its model is open.

    Args:
        job: what is measured.
        variant: whose side.

    Attributes:
        opened: its first turn.
    """

    def __init__(self, job: Job, variant: str):
        spawn = get_context("spawn")
        self.variant = variant
        self.connection, far_end = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(far_end, job, variant))
        self.process.start()
        far_end.close()
        self.opened = self.turn(None)

    def __exit__(self, error: object, *_: object) -> None:
        self.connection.close()
        self.process.join(0 if error else 10)
        self.process.kill()

    def turn(self, point: Point | None) -> Turn:
        """Let it work at a point; None waits for its model to be open.

        Raises:
            LdmError: what it found wrong, or it has died.
        """
        try:
            if point is not None:
                self.connection.send(point)
            reply = self.connection.recv()
        except (EOFError, OSError):
            raise LdmError(
                f"{self.variant}: its process has died, perhaps for want of memory; compare fewer"
                " --variants at a time"
            ) from None
        if isinstance(reply, Exception):
            raise reply
        return reply


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


def _serve(connection: Connection, job: Job, variant: str) -> None:
    """The worker's process; what it prints goes to a file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's matter
    if job.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # training takes a GPU where there is one
    with (job.scratch / f"{variant}.log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    pace = Pace(connection, job.device)
    try:
        side(job, variant)(pace)
    except LdmError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"{variant}:\n{traceback.format_exc()}"))


def side(job: Job, variant: str) -> Callable[[Pace], None]:
    """Who does the work of a variant, turn by turn."""
    ours = variant.startswith("ldm")
    if job.name == "startup":
        from ldm.benchmark import startup

        return startup.side(job, variant)
    if job.case.trains:
        from ldm.benchmark import training

        return training.ours(job, variant) if ours else training.theirs(job, variant)
    from ldm.benchmark import inference

    return inference.ours(job, variant) if ours else inference.theirs(job, variant)


def _array(item: Any) -> np.ndarray:
    """A tensor, an array or a picture, float32."""
    if hasattr(item, "detach"):
        item = item.detach().float().cpu()
    return np.asarray(item, dtype=np.float32)
