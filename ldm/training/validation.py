"""The losses of samples that are not trained on, and a picture of what the model can do."""

from __future__ import annotations

from itertools import pairwise
from math import ceil
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ldm.data.order import Place
from ldm.data.sample import DataSource
from ldm.errors import LdmError
from ldm.training.samples import Loader, move
from ldm.training.stage import Stage
from ldm.training.state import TrainingState
from ldm.training.stop import Stop

BATCH = 32  # at most so many samples at a time


@torch.no_grad()
def run_validation(
    accelerator: Accelerator, state: TrainingState, source: DataSource, stop: Stop
) -> tuple[dict[str, float], Any, list[str]] | None:
    """What the average can do; all processes must call it together.

    Args:
        accelerator: of the run.
        state: whose stage and averages are looked at.
        source: the validation samples.
        stop: may break it off.

    Returns:
        Mean figures over the validation samples, a preview, and what was wrong with samples that
        this process has read; None where a signal came in between.
    """
    number = len(source)
    count = ceil(number / BATCH)
    # Equal batches: a contrastive loss depends on how many captions a picture is compared with.
    ends = [number * i // count for i in range(count + 1)]
    chunks = [[Place(i) for i in range(start, end)] for start, end in pairwise(ends)]
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = chunks[rank::world]
    sharded = state.sharded  # then a forward pass takes all, and cannot be left by one
    attempt = (lambda work: work()) if sharded else stop.attempt
    idle = chunks[: ceil(count / world) - len(mine)] if sharded else []
    with state.averaged():
        own = attempt(lambda: validation_sums(accelerator, state.stage, source, mine))
        attempt(lambda: validation_sums(accelerator, state.stage, source, idle))
        draws = accelerator.is_main_process or sharded
        preview = attempt(lambda: _preview(accelerator, state.stage)) if draws else None
    if stop.agreed() or own is None:
        return None
    sums, bad = own
    parts = gather_object([sums])  # a process may have had no share
    figures = {k: sum(p.get(k, 0) for p in parts) / number for k in sorted(parts[0])}
    return figures, preview, bad


@torch.no_grad()
def validation_sums(
    accelerator: Accelerator, stage: Stage, source: DataSource, chunks: list[list[Place]]
) -> tuple[dict[str, float], list[str]]:
    """Sums of the figures of some samples, and what was wrong with them."""
    sums: dict[str, float] = {}
    bad: list[str] = []
    samples = stage.samples(source, validation=True)
    with Loader(samples, chunks, workers=0) as loader:
        for batch in loader:
            bad += filter(None, batch.pop("bad"))
            batch = move(batch, accelerator.device)
            with accelerator.autocast():
                for key, value in stage.validate(batch).items():
                    sums[key] = sums.get(key, 0) + float(value.sum())
    return sums, bad


def _preview(accelerator: Accelerator, stage: Stage) -> Any:
    try:
        return stage.preview()
    except LdmError as error:  # of a model that puts out NaN, say: more training may mend it
        accelerator.print(f"no sample grid: {error}")
        return None
