"""A step whose loss or gradient was not finite, written down small, for `ldm.training.replay`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldm.checkpoint.io import write_json
from ldm.data.order import Place
from ldm.data.sample import DataSource
from ldm.training.config import TrainingConfig
from ldm.training.state import plain

PATIENCE = 10  # steps in a row that are not finite: what comes after will not be either


def write_capsule(
    file: Path,
    stage: str,
    config: TrainingConfig,
    row: dict[str, Any],
    places: list[Place],
    data: DataSource,
) -> None:
    """Write what `replay` needs of a step.

    Args:
        file: where to.
        stage: the stage's name.
        config: the run's options.
        row: the step's figures; its `step` counts from 1.
        places: the step's global batch.
        data: the training samples.
    """
    samples = [{"key": data.key(place.index), **place._asdict()} for place in places]
    figures = {k: repr(row[k]) for k in ("loss", "grad_norm")}  # JSON has no NaN
    options = plain(asdict(config))
    write_json(
        file,
        {"stage": stage, "step": row["step"], **figures, "samples": samples, "config": options},
    )
