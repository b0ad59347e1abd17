"""A run in small before the run: does everything work, how long will it take, what should change.

Every line comes from doing the real thing with the run's own code, in a folder that is thrown away.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from ldm.data.order import Bucketed, Place
from ldm.data.sample import DataSource
from ldm.data.sources import first
from ldm.data.streams import StreamedShards
from ldm.errors import DataError
from ldm.training.config import TrainingConfig, UNetTraining
from ldm.training.cost import unet_cost
from ldm.training.loop import Run
from ldm.training.state import find_checkpoint, is_main_process
from ldm.training.validation import validation_sums

Result = TypeVar("Result")

HEADERS = 2000  # samples whose headers are read, spread over the data
SECONDS = 15.0  # spent on measured steps
STEPS = 10  # at most so many
GRID_STEPS = 4  # of the sampler, in the sample grid


class Measured(NamedTuple):
    """Seconds, but for `waited`, a share of a step.

    Attributes:
        step: of an optimizer step, at the largest shape.
        waited: the part of it in which the process waits for data.
        validation: with its sample grid.
        save: of a checkpoint.
    """

    step: float
    waited: float
    validation: float
    save: float


@dataclass
class Report:
    """What the doctor says.

    Attributes:
        lines: what was found, in the order of finding it.
        advice: what to change.
    """

    lines: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """The result of some work, and the seconds it took."""
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


def examine(name: str, config: TrainingConfig, sources: tuple[DataSource, DataSource]) -> Report:
    """Run a stage small, on the processes that Accelerate has started, and report on it.

    Args:
        name: the stage.
        config: the options of the run that is to be.
        sources: what `open_data` gives.

    Raises:
        LdmError: as the run itself would.
    """
    report = Report()
    data, validation = sources
    with _throwaway_folder(config.output_dir) as folder:
        # A cache of all samples would take hours: what is measured is trained from a small one.
        least = 4 * config.train_batch_size
        small = replace(config, output_dir=folder, report_to=None, resume_from_checkpoint=None)
        if isinstance(small, UNetTraining):
            few_steps = min(small.num_inference_steps, GRID_STEPS)
            small = replace(small, latent_cache_dir=None, num_inference_steps=few_steps)
        few = first(data, least) if getattr(config, "cache_latents", False) else data
        run = Run(name, small, few, first(validation, min(len(validation), 8)))
        report.lines.append(run.summary())
        _read_headers(report, data, config, run)
        _, seconds = timed(run.prepare)
        if few is not data:
            hours = seconds / len(few) * len(data) / 3600
            report.lines.append(f"cache: {len(few)} samples in {seconds:.1f} s; all: {hours:.2g} h")
        step, waited = _measure_steps(report, run)
        render = _measure_validation(report, run, config, len(validation))
        measured = Measured(step, waited, render, _measure_save(report, run))
        if dist.is_initialized():
            weights = torch.zeros(run.parameter_count(), device=run.accelerator.device)
            _, seconds = timed(lambda: dist.all_reduce(weights))
            report.lines.append(
                f"all-reduce of all gradients: {seconds * 1e3:.0f} ms"
                f" over {run.accelerator.num_processes} processes"
            )
        _sum_up(report, run, config, len(data), measured)
        run.accelerator.wait_for_everyone()  # the folder goes
    return report


def _read_headers(report: Report, data: DataSource, config: TrainingConfig, run: Run) -> None:
    """Sizes and captions of samples from all over the data."""
    count = min(HEADERS, len(data))
    indices = [i * len(data) // count for i in range(count)]
    if isinstance(data, StreamedShards):
        indices = list(range(min(count, data.shard_lengths[0])))
    sizes, bad, captions = [], [], []
    for index in indices:
        try:
            sizes.append(data.size(index))
            captions.append(data.caption(index))
        except DataError as error:
            bad.append(str(error))
    report.lines.append(f"headers of {len(indices)} of {len(data)} samples read, {len(bad)} bad")
    if bad:
        share = len(bad) / len(indices)
        report.lines.append(f"the first bad one: {bad[0]}")
        skip = "" if config.on_bad_sample == "skip" else ", or the run ends: --on_bad_sample skip"
        report.advice.append(f"{share:.1%} of the samples are bad: mend them{skip}")
    if sizes:
        sides = sorted(min(size) for size in sizes)
        small = sum(side < config.resolution for side in sides)
        report.lines.append(f"pictures' shorter sides: {sides[0]} to {sides[-1]} px")
        if small > len(sides) / 10:
            report.advice.append(
                f"{small / len(sides):.0%} of the pictures are smaller than {config.resolution} px"
                " and will be enlarged, which teaches blur: choose a lower --resolution"
            )
    if captions and (tokenizer := run.stage.tokenizer):
        lengths = [len(tokenizer.tokenize(caption)) + 2 for caption in captions]
        limit = tokenizer.max_tokens
        over = sum(length > limit for length in lengths)
        report.lines.append(
            f"captions: {max(lengths)} tokens at most, {over} over {limit},"
            f" {sum(not caption for caption in captions)} empty"
        )
        if over:
            report.advice.append(
                f"{over / len(captions):.1%} of the captions have more than {limit} tokens, and"
                " what is beyond is not seen: put what matters first"
            )


def _measure_steps(report: Report, run: Run) -> tuple[float, float]:
    """Seconds of a step at the largest shape, and the share of it that waits for data."""
    if isinstance(run.order, Bucketed):
        report.lines.append(f"buckets: {', '.join(f'{w}x{h}' for h, w in run.order.sizes)}")
    steps, waits = list[float](), list[float]()
    run.state.step = getattr(run.config, "disc_start", None) or 0  # with all that will play
    # The largest shapes of the first steps: where memory ends, the run would end.
    numbers = sorted(range(min(50, run.config.max_train_steps)), key=lambda s: -_area(run, s))
    with run.loader(numbers[:STEPS]) as loader:
        for _ in numbers[:STEPS]:
            (batches, _), wait = timed(lambda: run.read(loader))
            _, step = timed(lambda batches=batches: run.update(batches))
            steps.append(wait + step)
            waits.append(wait)
            enough = torch.tensor(float(sum(steps) > SECONDS), device=run.accelerator.device)
            if dist.is_initialized():
                dist.all_reduce(enough, dist.ReduceOp.MAX)
            if enough:
                break
    # The first step compiles, allocates, and waits for workers to start.
    counted = slice(1 if len(steps) > 1 else 0, None)
    seconds = sorted(steps[counted])[len(steps[counted]) // 2]
    waited = sum(waits[counted]) / sum(steps[counted])
    rate = run.config.train_batch_size / seconds
    report.lines.append(
        f"step: {seconds:.3g} s for {run.config.train_batch_size} pictures,"
        f" {rate:.3g} images/s, {waited:.0%} of it waiting for data"
    )
    if isinstance(run.config, UNetTraining):
        network, half = run.state.modules["unet"].config, run.config.mixed_precision != "no"
        factor = run.stage.vae.config.downsample_factor  # type: ignore[attr-defined]
        side = run.config.resolution // factor
        cost = unet_cost(network, side, side, half=half)  # type: ignore[arg-type]
        report.lines.append(
            f"U-Net: {cost.total / 1e9:.3g} GFLOP a picture, forward and backward:"
            f" {cost.total * rate / 1e12:.3g} TFLOP/s"
        )
    return seconds, waited


def _measure_validation(report: Report, run: Run, config: TrainingConfig, samples: int) -> float:
    """Seconds of a validation, from a few samples and a few of the sampler's steps."""
    few = [[Place(index) for index in range(len(run.validation_data))]]
    _, losses = timed(lambda: validation_sums(run.accelerator, run.stage, run.validation_data, few))
    losses *= samples / len(few[0]) / run.accelerator.num_processes
    _, grid = timed(run.stage.preview)
    if isinstance(config, UNetTraining):
        grid *= config.num_inference_steps / min(config.num_inference_steps, GRID_STEPS)
    report.lines.append(f"validation: {losses:.1f} s, and {grid:.1f} s for its sample grid")
    return losses + grid


def _area(run: Run, step: int) -> int:
    """Pixels of each picture of a step's batch."""
    height, width = run.order.batch(step)[0].size or (run.config.resolution,) * 2
    return height * width


def _measure_save(report: Report, run: Run) -> float:
    """Seconds of a checkpoint, which is loaded again."""
    _, seconds = timed(run.save)
    folder = find_checkpoint("latest", run.config.output_dir)
    assert folder is not None  # it has just been written
    _, loading = timed(lambda: run.state.load(folder))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    report.lines.append(
        f"checkpoint: {size / 1e9:.3g} GB, written in {seconds:.1f} s, loaded in {loading:.1f} s"
    )
    return seconds


def _sum_up(
    report: Report, run: Run, config: TrainingConfig, samples: int, measured: Measured
) -> None:
    """Peak memory, time to finish, disk needed, and what to change."""
    if run.accelerator.device.type == "cuda":
        peak, total = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        report.lines.append(f"peak memory: {peak / 1e9:.3g} of {total / 1e9:.3g} GB on the GPU")
        if peak < total / 3:
            report.advice.append("the GPU's memory is little used: a larger batch is faster")
        if config.mixed_precision == "no" and torch.cuda.is_bf16_supported():
            report.advice.append("--mixed_precision bf16 is faster here and as safe")
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        report.lines.append(f"peak memory: {peak / 1e9:.3g} GB")
    steps = config.max_train_steps
    render = measured.validation / config.validation_steps
    save = measured.save / config.checkpointing_steps
    seconds = steps * (measured.step + render + save)
    epochs = steps * config.train_batch_size / samples
    report.lines.append(
        f"to finish {steps} steps: {seconds / 3600:.2g} h; every sample is seen {epochs:.3g} times"
    )
    kept = config.checkpoints_total_limit or steps // config.checkpointing_steps
    # one more while it is written, and the finished model
    needed = (kept + 2) * run.state.checkpoint_bytes()
    cached = sum(file.stat().st_size for file in run.config.output_dir.glob("latents/*/*"))
    needed += cached * samples // len(run.data)
    free = shutil.disk_usage(run.config.output_dir).free
    report.lines.append(f"disk: {needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free")
    if needed > free:
        report.advice.append("the disk is too small: lower --checkpoints_total_limit, or make room")
    if measured.waited > 0.1:
        share = f"{measured.waited:.0%}"
        report.advice.append(f"{share} of the time waits for data: --dataloader_num_workers 4")
    if getattr(config, "cache_latents", None) is False and epochs > 1 and not config.enable_bucket:
        report.advice.append("--cache_latents true encodes every picture once instead of each time")
    if render > 0.2 * measured.step:
        report.advice.append("sample grids take long: raise --validation_steps")
    if save > 0.2 * measured.step:
        report.advice.append("checkpoints take long: raise --checkpointing_steps")


@contextmanager
def _throwaway_folder(output_dir: Path) -> Iterator[Path]:
    """A folder on the run's own disk, the same for all processes."""
    folder = output_dir.parent / f".doctor-{output_dir.name}"
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if is_main_process():
            shutil.rmtree(folder, ignore_errors=True)
