"""A disk that is full, and a folder that another training holds: one line, and nothing is lost."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from crash_helpers import GAN, exit_code, fork, prepare
from PIL import Image
from train_helpers import ROOT, assert_same_run, make_config

from ldm.cli import run
from ldm.training import loop
from ldm.training.log import Log
from ldm.training.state import TrainingState, exclusive, find_checkpoint

pytestmark = pytest.mark.crash

OPTIONS = GAN | {"max_train_steps": 3, "checkpointing_steps": 1, "validation_steps": 2}
SIZES = 10
TMPFS = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs"]


@pytest.fixture(scope="module")
def said(pictures, tmp_path_factory) -> list[dict[str, str]]:
    """The last line of each run on a small disk, and of each where no file may grow large.

    Disks are mounted in a namespace of their own, which the last process takes away with it. Where
    that is not allowed, the limit goes through all sizes instead of two.
    """
    folder = tmp_path_factory.mktemp("disk")
    own = ["unshare", "--mount"] + ["--map-root-user"] * (os.geteuid() != 0)
    with_disk = shutil.which("unshare") and not subprocess.call([*own, *TMPFS, str(folder)])
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, __file__, str(folder), str(pictures)]
    runs = [[*command, "files", str(2 if with_disk else SIZES)]]
    if with_disk:
        runs += [[*own, *command, "tmpfs", str(SIZES)]]
    running = [subprocess.Popen(run, env=environment) for run in runs]
    assert not any([process.wait() for process in running])
    return [json.loads(file.read_text()) for file in folder.glob("*.json")]


@pytest.mark.parametrize("size", range(SIZES))
def test_a_full_disk_costs_only_the_new_checkpoint(said, size):
    """The program below has found the checkpoint before whole, and nothing beside it."""
    found = [lines[f"size {size}"] for lines in said if f"size {size}" in lines]
    assert found
    for line in found:
        assert line.startswith("error: ") and "cannot " in line, line
        assert "No space left on device" in line or "File too large" in line, line


@pytest.mark.parametrize("what", ["log", "grid", "tracker", "publish"])
def test_what_else_a_full_disk_stops(said, what):
    for lines in said:
        assert lines[what].startswith("error: "), lines[what]
        assert "make room and resume" in lines[what], lines[what]


def test_a_checkpoint_that_will_not_fit_is_refused_before_the_first_step(said):
    for lines in said:
        assert "GB left and a checkpoint takes 0.00" in lines["space"], lines["space"]


def test_a_second_training_in_the_same_folder_is_refused(said):
    for lines in said:
        assert "another training writes into" in lines["two"]
        assert lines["two"].endswith("choose another --output_dir")


class Disk:
    """A small disk, or a limit on the size of every file of this process and its children."""

    def __init__(self, folder: Path, mount: bool):
        self.folder, self.mount = folder, mount
        folder.mkdir()
        if mount:
            subprocess.run([*TMPFS, str(folder)], check=True)

    def leave(self, part: float, like: Path) -> None:
        """Leave room for a part of such a checkpoint, or of its largest file."""
        sizes = [file.stat().st_blocks * 512 for file in like.rglob("*")]
        if self.mount:
            used = shutil.disk_usage(self.folder).used
            self._mount_again(used + int(part * sum(sizes)))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(part * max(sizes)), -1))

    def grow(self) -> None:
        """Make room."""
        if self.mount:
            self._mount_again(2**26)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))

    def _mount_again(self, size: int) -> None:
        options = f"remount,size={size}"
        subprocess.run(["mount", "-o", options, str(self.folder)], check=True)


def _main(folder: Path, pictures: Path, limit: str, sizes: int) -> None:
    prepare()
    disk = Disk(folder / limit, limit == "tmpfs")
    output = disk.folder / "run"
    first, like = output / "checkpoint-1", folder / f"whole-{limit}" / "checkpoint-3"
    lines: dict[str, str] = {}

    def train(output: Path, change: Callable[[], None] = lambda: None, **options: Any) -> str:
        """Train in a child process, and return its error line; nothing where it went well."""
        own = {"train_data_dir": str(pictures), "resume_from_checkpoint": "latest"}
        config = make_config("vae", **OPTIONS | own | {"output_dir": output} | options)

        def work() -> None:
            change()
            run(lambda _: loop.train("vae", config) and None)

        reader, writer = os.pipe()  # which no disk limits
        code = exit_code(fork(work, f"/dev/fd/{writer}"))
        os.close(writer)
        with open(reader) as pipe:
            text = pipe.read()
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in text and len(errors) == (code != 0), text
        return errors[0] if code else ""

    def die_in_the_second_step() -> None:
        _before(Log, "step", lambda _, step, *__: step < 2 or os._exit(0))

    def blind() -> None:
        TrainingState.check_space = lambda _: None  # type: ignore[method-assign]

    def claim_to_be_full() -> None:
        shutil.disk_usage = lambda _: SimpleNamespace(free=1e6)  # type: ignore[assignment]

    def full_before(owner: Any, name: str) -> Callable[[], None]:
        return lambda: _before(owner, name, lambda *_: disk.leave(0, like))

    def check(checkpoint: Path) -> None:
        disk.grow()
        assert find_checkpoint("latest", output) == checkpoint
        assert not list(output.glob(".checkpoint*")) + list(output.glob(".vae*"))

    assert train(folder / f"whole-{limit}") == "" == train(output, die_in_the_second_step)
    with exclusive(output):
        lines["two"] = train(output)
    for k in range(sizes):
        disk.leave((k + 0.5) / sizes, like)
        lines[f"size {k}"] = train(output, blind)
        check(first)
    lines["log"] = train(output, full_before(Log, "_write"))
    check(first)
    shutil.rmtree(output / "samples")
    lines["grid"] = train(output, full_before(Image.Image, "save"))
    check(first)
    lines["tracker"] = train(output, full_before(Log, "_write"), report_to="tensorboard")
    check(first)
    disk.leave(0.95, like)
    lines["space"] = train(output, lambda: None if disk.mount else claim_to_be_full())
    check(first)
    lines["publish"] = train(output, full_before(loop, "publish"))
    check(output / "checkpoint-3")
    assert train(output) == ""
    assert_same_run(output, folder / f"whole-{limit}", 3)
    (folder / f"{limit}.json").write_text(json.dumps(lines))


def _before(owner: Any, name: str, call: Callable[..., Any]) -> None:
    """Have something called before a function, with the same arguments."""
    original = getattr(owner, name)

    def both(*arguments: Any, **named: Any) -> Any:
        call(*arguments, **named)
        return original(*arguments, **named)

    setattr(owner, name, both)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
