"""One side of a comparison, in a process of its own, so that its memory is its own.

parent: Worker.turn(point) --point--> worker: `for point in pace: pace.output = work(point)`
                           <--Turn---
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing import get_context
from multiprocessing.connection import Connection

from ldm.benchmark.cases import Job, Point
from ldm.benchmark.pace import Pace, Turn
from ldm.errors import LdmError


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
