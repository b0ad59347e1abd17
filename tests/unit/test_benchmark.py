"""The benchmark's two sides in this process, on the tiny model: equal work, fair figures."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.benchmark.cases import CASES, Job, Point, usual_variants
from ldm.benchmark.measure import check, difference, figures
from ldm.benchmark.models import flop, model_folder
from ldm.benchmark.pace import Pace, Turn, forget_peak, peak_memory
from ldm.benchmark.report import axis_of
from ldm.benchmark.worker import Worker, side
from ldm.errors import CheckpointError, ConfigError, LdmError
from ldm.training.cost import flop_counter


class Script:
    """A connection whose far end sends these points, and keeps the turns."""

    def __init__(self, points):
        self.points, self.turns = list(points), []

    def send(self, turn):
        self.turns.append(turn)

    def recv(self):
        if not self.points:
            raise EOFError
        return self.points.pop(0)


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """What a training's pace watches in torch is itself again after each test."""
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", torch.nn.utils.get_total_norm)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Of a case, on the tiny model."""
    work_dir = tmp_path_factory.mktemp("models")

    def make(name, tmp_path, dtype="fp32"):
        points = (Point(16, 16, 2, CASES[name].steps and 3),)
        folder = model_folder("tiny", work_dir)
        return Job(name, "tiny", dtype, "cpu", (), points, 1, folder, tmp_path)

    return make


def turns(job, variant, points=None):
    """What a side says of its turns, without its process."""
    script = Script(points or [replace(job.points[0], check=True)])
    with suppress(SystemExit):  # as the process ends
        side(job, variant)(Pace(script, "cpu"))  # type: ignore[arg-type]
    return script.turns[1:]


class Said:
    """A worker that has said this."""

    def __init__(self, turn):
        self.turn = lambda _: turn


def disturbed(job, folder):
    """The same job on a model of which one weight of each network is another."""
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / part).mkdir(parents=True)
    for file in job.folder.rglob("*.*"):
        (folder / file.relative_to(job.folder)).write_bytes(file.read_bytes())
    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        name = next(k for k in tensors if k.endswith(("conv_in.weight", "layers.0.mlp.fc1.weight")))
        tensors[name].view(-1)[0] += 1
        save_file(tensors, file, {"format": "pt"})
    return replace(job, folder=folder)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("startup", "small")])
def test_both_sides_compute_the_same_and_a_disturbed_weight_is_an_error(job, tmp_path, name):
    own = job(name, tmp_path)
    [theirs], [ours] = turns(own, "diffusers"), turns(own, "ldm")
    said = {"ldm": Said(ours), "diffusers": Said(theirs)}
    found, seconds = check(own, said)  # type: ignore[arg-type]
    assert seconds == {"ldm": ours.seconds, "diffusers": theirs.seconds}
    assert found["ldm"][1] <= found["ldm"][0] < 1e-4 and found["diffusers"] == (0, 0)
    (tmp_path / "again").mkdir()
    other = disturbed(replace(own, scratch=tmp_path / "again"), tmp_path / "disturbed")
    [wrong] = turns(other, "ldm")
    with pytest.raises(LdmError, match=f"{name}: ldm does not compute what diffusers does"):
        check(own, {"ldm": Said(wrong), "diffusers": Said(theirs)})  # type: ignore[dict-item]


def test_half_precision_is_judged_by_diffusers_own_distance_from_float32(job, tmp_path):
    own = job("unet", tmp_path, "bf16")
    said = {v: turns(own, v)[0] for v in ("ldm", "diffusers", "diffusers fp32")}
    assert len({turn.output[0].tobytes() for turn in said.values()}) == 3
    found, _ = check(own, {v: Said(turn) for v, turn in said.items()})  # type: ignore[misc]
    assert found["diffusers fp32"] == (0, 0) and 1e-4 < found["diffusers"][1] < 1e-2
    pairs = zip(said["diffusers fp32"].output, said["diffusers"].output, strict=True)
    farther = [exact + 1.2 * (rounded - exact) for exact, rounded in pairs]
    said["ldm"] = said["ldm"]._replace(output=farther)
    with pytest.raises(LdmError, match="what diffusers fp32 does: the average difference"):
        check(own, {v: Said(turn) for v, turn in said.items()})  # type: ignore[misc]


def test_nothing_that_is_not_a_number_passes(job, tmp_path):
    right = Turn(1.0, 1, None, [np.ones(3, np.float32)])
    wrong = right._replace(output=[np.full(3, np.nan, np.float32)])
    with pytest.raises(LdmError, match="difference is nan"):
        check(job("unet", tmp_path), {"ldm": Said(wrong), "diffusers": Said(right)})  # type: ignore


@pytest.mark.parametrize("name", ["txt2img", "unet", "vae_decode", "text"])
def test_flop_are_those_that_diffusers_does(job, tmp_path, name):
    own = job(name, tmp_path)  # of one picture: of several, diffusers reads the same prompt twice
    own = replace(own, points=(replace(own.points[0], batch=1),))
    counted = flop_counter()

    class Counting(Script):
        def recv(self):
            point = super().recv()
            counted.__enter__()
            return point

        def send(self, turn):
            if not self.points:
                counted.__exit__(None, None, None)
            super().send(turn)

    with suppress(SystemExit):
        side(own, "diffusers")(Pace(Counting(own.points), "cpu"))  # type: ignore[arg-type]
    assert counted.get_total_flops() == flop(own, own.points[0]) > 0


def test_short_work_is_done_several_times_a_turn(monkeypatch):
    now = [0.0]  # seconds, of a clock that only the work moves
    monkeypatch.setattr("ldm.benchmark.pace.time.perf_counter", lambda: now[0])
    script, done = Script([Point(8, 8, 1, times=3), Point(8, 8, 1)]), []
    with suppress(SystemExit):
        for point in Pace(script, "cpu"):  # type: ignore[arg-type]
            now[0] += 2
            done.append(point.times)
    assert done == [3, 3, 3, 1]
    assert [turn.seconds for turn in script.turns] == [0, 2, 2]  # of the opening, then of one


def test_a_training_step_is_a_step_of_the_run_and_says_what_lies_outside(job, tmp_path):
    own = job("train_unet", tmp_path)
    point = own.points[0]
    [checked, *steps] = turns(own, "ldm", [replace(point, check=True), *[point] * 11])
    assert checked.outside is not None and len(steps) == 11
    assert all(0 < step.outside < 1 and step.seconds > 0 for step in steps)
    lines = (tmp_path / "ldm" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 10  # as logging_steps is, and the checked batch is no step


def test_ratios_are_taken_pair_by_pair():
    """Two machines' worth of noise: the medians alone would say that both are as fast."""
    ours, theirs = [1.0, 2.0, 9.0], [2.0, 4.0, 1.0]
    said = {
        "ldm": [Turn(s, 100 + i, 0.1 * i, []) for i, s in enumerate(ours)],
        "diffusers": [Turn(s, 200 + i, None, []) for i, s in enumerate(theirs)],
    }
    found = figures(said)
    assert found["median"] == {"ldm": 2.0, "diffusers": 2.0}
    assert found["ratio"] == {"ldm": [1.0, 1.0, 1.0], "diffusers": [2.0, 1 / 9, 2.0]}
    assert found["memory"] == {"ldm": 102, "diffusers": 202}
    assert found["outside"] == {"ldm": 0.1}


def test_difference_is_that_of_the_worst_pair():
    a, b = [np.array([1.0, -2.0]), np.array([0.0, 8.0])], [np.array([1.0, -4.0]), np.array([1, 8])]
    assert difference(a, b) == (0.5, 0.25)


def test_the_usual_variants():
    def usual(name, dtype, device):
        return usual_variants(Job(name, "tiny", dtype, device, (), (), 1))

    assert usual("unet", "fp32", "cpu") == (
        "ldm", "ldm plain", "diffusers", "diffusers channels-last",
    )  # fmt: skip
    assert usual("train_vae", "bf16", "cpu") == ("ldm", "diffusers", "diffusers fp32")
    assert "diffusers compiled" in usual("txt2img", "bf16", "cuda")


def test_what_a_worker_finds_wrong_and_that_it_has_died_are_one_line(job, tmp_path):
    lost = replace(job("unet", tmp_path), folder=tmp_path / "nowhere")
    with pytest.raises((CheckpointError, ConfigError), match="nowhere"):
        Worker(lost, "ldm")
    with Worker(job("startup", tmp_path), "ldm") as worker:
        assert worker.opened.memory < 200 * 2**20  # no torch in it
        worker.process.kill()
        worker.process.join()
        with pytest.raises(LdmError, match="ldm: its process has died"):
            worker.turn(Point(16, 16, 1))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells it")
def test_memory_of_before_can_be_forgotten():
    held = bytearray(b"x" * 2**28)
    peak = peak_memory(False)
    del held
    assert peak_memory(False) == peak > 2**28
    forget_peak(False)
    assert peak_memory(False) < peak - 2**27


def test_one_axis_is_drawn():
    def result(*points):
        return {"name": "unet", "points": [dict(steps=s, height=h) for s, h in points]}

    assert axis_of([result((1, 64), (2, 64))]) == "steps"
    assert axis_of([result((1, 64)), result((1, 128))]) == "height"
    for wrong in ([result((1, 64))], [result((1, 64), (2, 128))]):
        with pytest.raises(ConfigError, match="give several --steps or several --height"):
            axis_of(wrong)
