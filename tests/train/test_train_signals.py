"""SIGTERM and SIGINT, by every launcher and in every phase: saved, and no process is left."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_helpers import LONG, Hold, exit_code, fork, in_new_process, processes
from train_helpers import ROOT, make_config, weights

from ldm.checkpoint.io import recover
from ldm.cli import run
from ldm.training import loop
from ldm.training.state import checkpoints

pytestmark = pytest.mark.crash

PROGRAM = str(Path(__file__).with_name("crash_helpers.py"))
LAUNCHERS = {
    "python": [],
    "accelerate": ["-m", "accelerate.commands.launch", "--num_processes=1", "--cpu"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}
PHASES = ("wait", "step", "save", "validation")
LOADING = ("wait", "step", "save")
LAST = 20
SOON = 10.0  # seconds in which everything is saved after a signal
GONE = 30.0  # and in which no process is left; torchrun kills those that take longer


@dataclass
class Launch:
    """A real training that is held, and what became of it.

    Attributes:
        saved: seconds from the first signal until the checkpoint stood at its place.
        ended: seconds until no process was left.
        code: exit code of the launcher.
        world: how many processes trained.
        text: what they said.
    """

    launcher: str
    workers: int
    phase: str
    output: Path
    pictures: Path
    first: int = 0
    saved: float = inf
    ended: float = inf
    code: int | None = None
    text: str = ""
    mark: str = field(default_factory=lambda: f"LDM_TEST={uuid.uuid4()}")

    def __post_init__(self) -> None:
        self.at = self.first + 2
        self.checkpoint = self.output / f"checkpoint-{self.at + (self.phase == 'step')}"
        self.folder = self.output.with_name(f"{self.output.name}-{self.phase}")
        self.folder.mkdir(parents=True)
        options = settings(self.pictures) | {
            "vae": {"block_out_channels": [16, 16, 16], "layers_per_block": 1,
                    "norm_num_groups": 8, "sample_size": 32},
            "output_dir": str(self.output), "report_to": "none",
            "dataloader_num_workers": self.workers, "resume_from_checkpoint": "latest",
            "checkpointing_steps": self.at if self.phase == "save" else 1000,
            "validation_steps": self.at if self.phase == "validation" else 1000,
        }  # fmt: skip
        (self.folder / "run.yaml").write_text(json.dumps(options))  # JSON is YAML, too
        name, _, value = self.mark.partition("=")
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), name: value,
            "HOLD": f"{self.phase}:{self.at}:{self.first}:{self.folder}",
        }  # fmt: skip
        command = [
            sys.executable, *LAUNCHERS[self.launcher], PROGRAM,
            "vae", "--config", str(self.folder / "run.yaml"),
        ]  # fmt: skip
        with (self.folder / "said").open("w") as said:
            self.process = subprocess.Popen(
                command, env=environment, stdout=said, stderr=said, start_new_session=True
            )

    def wait(self) -> None:
        """Until it is held."""
        everybody = self.launcher == "torchrun" and self.phase in ("wait", "step")
        deadline = time.monotonic() + 120
        while len(marks := list(self.folder.glob("held-*"))) < 1 + everybody:
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.02)
        time.sleep(0.2)
        self.world = int(marks[0].read_text())

    def follow(self) -> None:
        """From a signal until nothing is left of it, but no longer than a minute."""
        began = time.monotonic()
        while self.code is None or processes(self.mark):
            if self.checkpoint.is_dir():
                self.saved = min(self.saved, time.monotonic() - began)
            self.code = self.process.poll()
            if time.monotonic() - began > LONG:
                break
            time.sleep(0.02)
        self.ended = time.monotonic() - began
        if self.checkpoint.is_dir():
            self.saved = min(self.saved, self.ended)
        self.text = self.said()
        for left in processes(self.mark):
            os.kill(left, signal.SIGKILL)

    def said(self) -> str:
        return (self.folder / "said").read_text()


def settings(pictures: Path) -> dict[str, Any]:
    return {
        "resolution": 32, "train_batch_size": 4, "learning_rate": 1e-3, "lr_warmup_steps": 5,
        "validation_split": 0.3, "validation_samples": 6, "logging_steps": 1,
        "train_data_dir": str(pictures), "max_train_steps": LAST,
    }  # fmt: skip


@pytest.fixture(scope="module")
def stopped(pictures, tmp_path_factory) -> dict[tuple[str, int, str], Launch]:
    """Every launcher and number of workers: one run, stopped in one phase after the other."""
    folder = tmp_path_factory.mktemp("stopped")

    def stop_again_and_again(launcher: str, workers: int) -> list[Launch]:
        launches: list[Launch] = []
        for phase in PHASES:
            first = int(launches[-1].checkpoint.name.split("-")[1]) if launches else 0
            launch = Launch(
                launcher, workers, phase, folder / f"{launcher}-{workers}", pictures, first
            )
            launch.wait()
            launch.process.send_signal(signal.SIGTERM)
            launch.follow()
            launches.append(launch)
        return launches

    runs = list(itertools.product(LAUNCHERS, (0, 2)))
    with ThreadPoolExecutor(2) as pool:
        chains = list(pool.map(lambda run: stop_again_and_again(*run), runs))
    cells = {(x.launcher, x.workers, x.phase): x for chain in chains for x in chain}
    for cell, launch in cells.items():
        print(*cell, f"saved {launch.saved}, ended {launch.ended}, exit code {launch.code}")
    return cells


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_stopped(stopped, launcher, workers, phase):
    """All is saved within seconds of SIGTERM to the launcher alone, and every process ends."""
    launch = stopped[launcher, workers, phase]
    assert launch.world == (2 if launcher == "torchrun" else 1)
    assert launch.saved < SOON, launch.text
    assert launch.ended < GONE, launch.text
    expected = {"python": 143, "accelerate": -signal.SIGTERM, "torchrun": 1}
    assert launch.code == expected[launcher], launch.text
    assert f"stopped after step {launch.checkpoint.name.split('-')[1]}, saved" in launch.text
    if launch.first:
        assert f"resumed from {launch.output}/checkpoint-{launch.first}" in launch.text
    assert not list(launch.output.glob(".checkpoint*"))
    if launcher == "python":
        assert "Traceback" not in launch.text


def test_a_second_signal_ends_it_at_once(pictures, tmp_path):
    """In the middle of a save, which leaves nothing but what the next run clears away."""
    launch = Launch("python", 2, "save", tmp_path / "run", pictures)
    launch.wait()
    launch.process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    launch.process.send_signal(signal.SIGTERM)
    launch.follow()
    assert launch.code == 143 and launch.ended < 1, launch.text
    assert launch.saved == inf and not checkpoints(launch.output)
    assert list(launch.output.glob(".checkpoint-2.*.tmp"))
    recover(launch.output)
    assert not list(launch.output.glob(".checkpoint*"))


def test_ctrl_c_in_a_terminal(pictures, tmp_path):
    """SIGINT to the launcher and all others; the launcher's own end is no second signal."""
    launch = Launch("accelerate", 2, "save", tmp_path / "run", pictures)
    launch.wait()
    os.killpg(launch.process.pid, signal.SIGINT)
    launch.follow()
    assert launch.saved < SOON, launch.text
    assert launch.ended < GONE and launch.code != 0
    assert "stopped after step 2, saved" in launch.text


def test_a_launcher_that_is_killed(pictures, tmp_path):
    """Nobody passes on a SIGKILL, yet nobody is left, and all is saved."""
    launch = Launch("torchrun", 0, "step", tmp_path / "run", pictures)
    launch.wait()
    launch.process.kill()
    launch.follow()
    assert launch.saved < SOON and launch.ended < GONE, launch.text


def test_stopped_before_the_first_step(pictures, tmp_path):
    """Nothing to save yet, and nothing to be left."""
    launch = Launch("accelerate", 0, "setup", tmp_path / "run", pictures)
    launch.wait()
    launch.process.terminate()
    launch.follow()
    assert launch.ended < GONE and launch.saved == inf, launch.text


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGABRT])
def test_a_process_that_is_killed_ends_the_others(pictures, tmp_path, how):
    """Of two; the one that is left says so in one line. One that crashes tells where it was."""
    launch = Launch("torchrun", 2, "wait", tmp_path / "run", pictures)
    launch.wait()
    [lost] = [p for p in processes(launch.mark) if _is_rank(p, launch.process.pid, "1")]
    os.kill(lost, how)
    launch.follow()
    assert launch.code == 1 and launch.ended < 60, launch.text
    where = ("Fatal Python error: Aborted", "training/loop.py")
    assert all((words in launch.text) == (how == signal.SIGABRT) for words in where), launch.text
    assert launch.text.count("error: another process of this run has ended, see what it said") == 1


def _is_rank(process: int, launcher: int, rank: str) -> bool:
    """Whether this is the process of a rank, and not one of its loader workers."""
    environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    parent = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]
    return f"RANK={rank}".encode() in environment and int(parent) == launcher


def test_a_loader_worker_that_is_killed(pictures, tmp_path):
    """Perhaps for want of memory: one line, whatever the run is doing at the moment."""
    in_new_process(_kill_workers, settings(pictures), tmp_path)
    for phase in LOADING:
        *others, line = (tmp_path / f"errors-{phase}").read_text().splitlines()
        assert line.startswith("error: a process that reads pictures has died"), line
        assert all(not other.strip() or "step/s" in other or "s/step" in other for other in others)


def _kill_workers(options: dict[str, Any], folder: Path) -> None:
    for phase in LOADING:
        hold = Hold(phase, 2, 0, folder / phase)
        hold.folder.mkdir()
        config = make_config(
            "vae", **options, output_dir=folder / f"run-{phase}", dataloader_num_workers=2,
            checkpointing_steps=2,
        )  # fmt: skip

        def work(hold=hold, config=config) -> None:
            hold.arrange()
            run(lambda _: loop.train("vae", config) and None)

        child = fork(work, folder / f"errors-{phase}")
        while not (hold.folder / "held-0").exists():
            time.sleep(0.02)
        time.sleep(0.2)
        children = Path(f"/proc/{child}/task/{child}/children").read_text().split()
        assert len(children) == 2
        began = time.monotonic()
        for worker in children:
            os.kill(int(worker), signal.SIGKILL)
        assert exit_code(child) == 2, (folder / f"errors-{phase}").read_text()
        assert time.monotonic() - began < 60


def test_stopped_runs_end_where_an_undisturbed_one_does(stopped, pictures, tmp_path):
    """Four signals later; on one process bit for bit."""
    outputs = sorted({launch.output for launch in stopped.values()})
    in_new_process(_finish, settings(pictures), [*outputs, tmp_path])
    whole = weights(tmp_path / f"checkpoint-{LAST}")
    for output in outputs:
        ours = weights(output / f"checkpoint-{LAST}")
        assert sorted(ours) == sorted(whole)
        for name, tensor in ours.items():
            tolerance = 2e-3 if "torchrun" in output.name else 0
            torch.testing.assert_close(tensor, whole[name], rtol=tolerance, atol=tolerance)


def _finish(options: dict[str, Any], outputs: list[Path]) -> None:
    for output in outputs:
        config = make_config("vae", **options, output_dir=output, resume_from_checkpoint="latest")
        errors = output / "errors"
        assert exit_code(fork(lambda c=config: loop.train("vae", c), errors)) == 0, (
            errors.read_text()
        )
