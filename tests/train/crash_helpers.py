"""Processes that die, and what is left of them."""

import itertools
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, set_start_method
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from train_helpers import ROOT

from ldm.checkpoint.io import tensors_sha256

# A tiny autoencoder against a tiny discriminator.
GAN = {
    "max_train_steps": 16,
    "checkpointing_steps": 4,
    "checkpoints_total_limit": 2,
    "validation_steps": 8,
    "disc_start": 6,
    "adam_epsilon": 1e-6,
}


def in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What some work returns in a process without threads, which may therefore fork."""
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare)
    with pool:
        return pool.submit(work, *arguments).result()


def prepare() -> None:
    """Make a new process one to fork trainings from: one thread, a small discriminator."""
    import ldm.training.vae as vae

    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # of loader workers, as in any training
    vae.PatchDiscriminator = partial(vae.PatchDiscriminator, width=4)  # type: ignore


def fork(work: Callable[[], Any], errors: Path | str = os.devnull) -> int:
    """Do some work in a child process, whose exit code tells of it.

    Args:
        work: what it does.
        errors: the file that its standard error goes to.
    """
    if child := os.fork():
        return child
    code: Any = 1
    try:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a child; minus the signal that has killed it, as in `subprocess`."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


OPERATIONS = {
    "__exit__", "close", "fsync", "mkdir", "open", "rename", "replace", "rmdir", "sendfile",
    "serialize_file", "unlink", "write",
}  # fmt: skip


@contextmanager
def before_file_operations(call: Callable[[int, str], None]) -> Iterator[None]:
    """Inside, call with a number and a name before every file operation, and after the last.

    What a file holds when one operation ends is what it holds when the next begins: only
    operations change it, and what Python buffers counts as written with the `close` that does it.
    """
    moments = 0

    def watch(_: Any, event: str, function: Any) -> None:
        nonlocal moments
        if event != "c_call" or function.__name__ not in OPERATIONS:
            return
        owner = function.__self__  # a module or a file
        where = owner.__name__ if isinstance(owner, ModuleType) else type(owner).__module__
        if where in ("posix", "_io") or function.__name__ == "serialize_file":
            call(moments, function.__name__)
            moments += 1

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)
    call(moments, "end")


def digest(state: Any) -> str:
    """Of all that a training state holds: weights, averages, moments."""
    tensors = {}
    for name, module in state.modules.items():
        parts = {"weights": module.state_dict(), "moments": state._moments(name)}
        if name in state.averages:
            parts["average"] = state.averages[name].average
        tensors |= {f"{name} {part} {k}": v for part, own in parts.items() for k, v in own.items()}
    return tensors_sha256(tensors)


@dataclass(frozen=True)
class Hold:
    """Where a training stands still for long enough to be hit.

    Attributes:
        phase: `setup`, `wait` (for data), `step`, `save` or `validation`.
        at: the optimizer step, 0 the first; that many are done when it is held.
        first: the step with which this process begins.
        folder: each process that is held leaves a file `held-<rank>` here, with the world's size.
    """

    phase: str
    at: int
    first: int
    folder: Path

    def arrange(self) -> None:
        """Change the modules of this process so."""
        import ldm.training.samples as samples
        import ldm.training.state as state
        import ldm.training.vae as vae

        def before(owner: Any, name: str, seconds_at: Callable[..., float], mark=True) -> None:
            original = getattr(owner, name)

            def held(*arguments: Any, **named: Any) -> Any:
                if seconds := seconds_at(*arguments):
                    if mark:
                        self._mark()
                    time.sleep(seconds)
                return original(*arguments, **named)

            setattr(owner, name, held)

        match self.phase:
            case "setup":
                before(vae.VaeStage, "setup", lambda *_: LONG)
            case "wait":
                asked = itertools.count(self.first)
                before(samples.Loader, "__next__", lambda _: 1e-9 * (next(asked) == self.at))
                late = lambda _, place: LONG * (place.step == self.at)  # noqa: E731
                before(vae.VaeData, "__getitem__", late, mark=False)
            case "step":
                before(vae.VaeStage, "loss", lambda *given: 1.5 * (given[3] == self.at))
            case "save":
                before(state, "write_tensors", lambda *_: 1.0)
            case "validation":
                before(vae.VaeStage, "validate", lambda *_: LONG)

    def _mark(self) -> None:
        rank = os.environ.get("RANK", "0")
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        (self.folder / f"held-{rank}").write_text(str(world))


LONG = 60.0  # seconds


def processes(mark: str) -> list[int]:
    """The processes that have this in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


if __name__ == "__main__":  # scripts/train.py, held: HOLD=phase:at:first:folder
    phase, at, first, folder = os.environ["HOLD"].split(":")
    Hold(phase, int(at), int(first), Path(folder)).arrange()
    sys.path.insert(0, str(ROOT / "scripts"))
    runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
