"""A comparison: first whether all compute the same, then who is faster, in rounds A B A B."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ldm.benchmark.cases import Job, as_dict, usual_variants
from ldm.benchmark.pace import Turn
from ldm.benchmark.worker import Worker
from ldm.config import check_size
from ldm.drawing import find_device
from ldm.errors import LdmError

SIDES = (2048, 4096)  # of the square matrices whose product is the machine's rate
GPU_SIDES = (4096, 8192)
HALF = 1.1  # how much farther from float32 than diffusers ldm may be, rounding being chance
PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def measure(job: Job, scratch: Path, work_dir: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure a job.

    Args:
        job: what.
        scratch: a folder for files in between.
        work_dir: where models of random weights are, or are made.
        say: hears what is going on.

    Returns:
        Everything, as JSON holds it; `ldm.benchmark.report` reads it.

    Raises:
        LdmError: they do not compute the same, or a side cannot work at all.
    """
    job = replace(job, device=find_device(job.device), scratch=scratch)
    job = replace(job, variants=job.variants or usual_variants(job))

    from ldm.benchmark.models import SHAPES, flop, model_folder

    preset = SHAPES[job.size][0]
    factor = preset.vae.downsample_factor
    side = preset.unet.sample_size * factor
    points = [replace(p, height=p.height or side, width=p.width or side) for p in job.points]
    for point in points:
        check_size(point.height, point.width, factor)
    say(f"{job.name}: opening the {job.size} model")
    job = replace(job, folder=model_folder(job.size, work_dir), points=tuple(points))
    rates: dict[int, list[float]] = {}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(job, name)) for name in job.variants}
        say(f"{job.name}: comparing results")
        differences, warm_up = check(job, workers)
        results = []
        for point in points:
            turns: dict[str, list[Turn]] = {name: [] for name in workers}
            if results or job.case.trains:  # else the check has warmed up
                warm_up = {name: worker.turn(point).seconds for name, worker in workers.items()}
            for number in range(job.rounds):
                say(f"{job.name}: {label(asdict(point))}, round {number + 1} of {job.rounds}")
                for name, worker in workers.items():
                    turns[name].append(worker.turn(point))
                for n in _sides(job):
                    rates.setdefault(n, []).append(_matrix_seconds(job, n))
            results.append(asdict(point) | {"flop": flop(job, point)} | figures(turns))
            results[-1]["warm_up"] = warm_up
        opened = {name: worker.opened.seconds for name, worker in workers.items()}
    rate = max(2 * n**3 / median(seconds) for n, seconds in rates.items())
    for own in results:
        own["share"] = {n: own["flop"] / seconds / rate for n, seconds in own["median"].items()}
    return as_dict(job) | {
        "machine": _machine(job),
        "versions": {name: version(name) for name in PACKAGES},
        "matrix_rate": rate,
        "opened": opened,
        "differences": differences,
        "points": results,
    }


def figures(turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """What the turns of a point come to, by variant.

    Returns:
        `seconds` of every round and their `median`; `ratio`, a variant's seconds divided by the
        first's of the same round, as median, least and greatest; `memory`, the peak in bytes;
        `outside`, a share of the step.
    """
    first = next(iter(turns))
    seconds = {name: [turn.seconds for turn in own] for name, own in turns.items()}
    pairs = {
        name: [theirs / ours for theirs, ours in zip(own, seconds[first], strict=True)]
        for name, own in seconds.items()
    }
    outside = {n: [t.outside for t in own if t.outside is not None] for n, own in turns.items()}
    return {
        "seconds": seconds,
        "median": {name: median(own) for name, own in seconds.items()},
        "ratio": {name: [median(own), min(own), max(own)] for name, own in pairs.items()},
        "memory": {name: own[-1].memory for name, own in turns.items()},
        "outside": {name: median(own) for name, own in outside.items() if own},
    }


def check(
    job: Job, workers: Mapping[str, Worker]
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """Whether ldm computes what diffusers computes.

    In float32 the greatest difference must be within the case's tolerance; in half precision the
    average one to diffusers in float32 no more than `HALF` times what diffusers' own is.

    Returns:
        For each variant its greatest and average difference, relative to the largest value; and the
        seconds that this, its first turn, took.

    Raises:
        LdmError: they differ by more; the line says by how much.
    """
    reference = "diffusers" if job.dtype == "fp32" else "diffusers fp32"
    point = replace(job.points[0], check=True)
    turns: dict[str, Turn] = {}
    for name in dict.fromkeys((reference, "diffusers", *workers)):
        if name in workers:
            turns[name] = workers[name].turn(point)
        else:  # nobody wants its time
            with Worker(job, name) as worker:
                turns[name] = worker.turn(point)
    exact = turns[reference].output
    found = {n: difference(turn.output, exact) for n, turn in turns.items() if turn.output}
    half = job.dtype != "fp32"
    limit = HALF * found["diffusers"][1] if half else job.case.tolerance
    for name, (greatest, average) in found.items():
        kind, value = ("average", average) if half else ("greatest", greatest)
        if name.startswith("ldm") and not value <= limit:
            raise LdmError(
                f"{job.name}: {name} does not compute what {reference} does: the {kind} difference"
                f" is {value:.2g} of the largest value, and {limit:.2g} is allowed"
            )
    return found, {name: turns[name].seconds for name in workers}


def difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> tuple[float, float]:
    """Greatest and average difference, relative to the largest value of `b`; of the worst pair."""
    pairs = [(np.abs(x - y), np.abs(y).max()) for x, y in zip(a, b, strict=True)]
    return (
        float(max(gap.max() / scale for gap, scale in pairs)),
        float(max(gap.mean() / scale for gap, scale in pairs)),
    )


def label(point: Mapping[str, Any]) -> str:
    """A point in words."""
    steps = f", {point['steps']} steps" if point["steps"] else ""
    batch = f", batch {point['batch']}" if point["batch"] > 1 else ""
    return f"{point['width']}x{point['height']}{steps}{batch}"


def _sides(job: Job) -> tuple[int, ...]:
    if job.size == "tiny":
        return (128,)
    return GPU_SIDES if job.device.startswith("cuda") else SIDES


def _matrix_seconds(job: Job, side: int) -> float:
    """Of one product of square matrices, by `F.linear`."""
    import torch
    import torch.nn.functional as F

    place: Any = {"device": job.device, "dtype": job.torch_dtype("ldm")}
    a, b = (torch.randn(side, side, **place) for _ in range(2))
    for _ in range(2):  # the first makes ready
        if job.device.startswith("cuda"):
            torch.cuda.synchronize()
        began = time.perf_counter()
        F.linear(a, b)
    if job.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _machine(job: Job) -> str:
    import torch

    from ldm.processor import cpuinfo

    if job.device.startswith("cuda"):
        return torch.cuda.get_device_name(job.device)
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
