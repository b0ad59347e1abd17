"""What a run tells: progress bar, metrics.jsonl, bad_samples.jsonl, sample grids, trackers."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, gather_object
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint.io import write_json
from ldm.data.order import Place
from ldm.data.sample import DataSource
from ldm.errors import ConfigError, suggest
from ldm.training.config import TrainingConfig, flat, plain

Row = dict[str, Any]


class Log:
    """Writes on the main process only; but all processes must call `flush` at the same steps.

    Figures stay on the device until the next flush, so that a GPU need not be waited for.

    Args:
        accelerator: of the run.
        config: of the run.
        step: steps done; what was logged after them will be logged again.
        tracker: of `find_tracker`.

    Attributes:
        waited: seconds since the last flush in which this process waited for data.
    """

    def __init__(
        self, accelerator: Accelerator, config: TrainingConfig, step: int, tracker: str | None
    ):
        self.accelerator, self.config, self.tracker = accelerator, config, tracker
        self.pending: list[tuple[int, dict[str, Tensor], float]] = []
        self.bad: list[tuple[int, str]] = []
        self.metrics = config.output_dir / "metrics.jsonl"
        self.bad_samples = config.output_dir / "bad_samples.jsonl"
        self.known_bad: set[str] = set()
        self.waited, self.since = 0.0, time.perf_counter()
        self.shown: dict[str, str] = {}
        if accelerator.is_main_process:
            config.output_dir.mkdir(parents=True, exist_ok=True)
            _truncate(self.metrics, step)
            self.known_bad = {row["error"] for row in _truncate(self.bad_samples, step)}
            if tracker:
                options = flat(asdict(config)).items()  # trackers take numbers and strings
                known = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in options}
                accelerator.init_trackers("logs", config=known)
        self.bar = tqdm(
            total=config.max_train_steps,
            initial=step,
            disable=not accelerator.is_local_main_process,
            unit="step",
            mininterval=1.0,
        )

    def step(
        self, step: int, figures: dict[str, Tensor], learning_rate: float, bad: list[str]
    ) -> None:
        """Take in the figures of the step that makes `step`, and its bad samples' errors."""
        self.pending.append((step, figures, learning_rate))
        self.bad += [(step, error) for error in bad]
        self.bar.update()

    def flush(self) -> list[Row]:
        """Write what is pending.

        Returns:
            One row a step: its figures, means over all processes.
        """
        if not self.pending:
            return []
        names = sorted({name for _, figures, _ in self.pending for name in figures})
        nan = torch.tensor(float("nan"), device=self.accelerator.device)
        table = torch.stack(
            [torch.stack([f.get(n, nan).float() for n in names]) for _, f, _ in self.pending]
        )
        reduced: Any = self.accelerator.reduce(table, "mean")
        seconds = time.perf_counter() - self.since
        rows = []
        for (step, figures, lr), values in zip(self.pending, reduced.tolist(), strict=True):
            kept = {n: v for n, v in zip(names, values, strict=True) if n in figures}
            rows.append({"step": step, "learning_rate": lr, **kept})
        rate = len(self.pending) * self.config.train_batch_size / seconds
        rows[-1] |= {"images_per_second": rate, "data_wait": self.waited / seconds}
        self._write(rows)
        self._show(loss=f"{rows[-1]['loss']:.4f}", images_per_s=f"{rate:.1f}")
        self.report_bad()
        self.pending = []
        self.waited, self.since = 0.0, time.perf_counter()
        return rows

    def validation(self, step: int, figures: dict[str, float], preview: Any) -> None:
        """Write the figures of a validation, and its picture."""
        self._write([{"step": step, **{f"validation_{k}": v for k, v in figures.items()}}])
        self._show(validation=f"{figures['loss']:.4f}")
        if preview is not None and self.accelerator.is_main_process:
            folder = self.config.output_dir / "samples"
            folder.mkdir(exist_ok=True)
            preview.save(folder / f"step-{step:07d}.png")

    def capsule(self, stage: str, row: Row, places: list[Place], data: DataSource) -> Path:
        """Write down a step that was not finite, for `ldm.training.replay`: small, no weights.

        Args:
            stage: the stage's name.
            row: the step's figures.
            places: its global batch.
            data: the training samples.
        """
        file = self.config.output_dir / "capsules" / f"step-{row['step']:07d}.json"
        if self.accelerator.is_main_process:
            samples = [{"key": data.key(place.index), **place._asdict()} for place in places]
            step = {k: repr(v) for k, v in row.items() if k != "step"}  # JSON has no NaN
            step |= {"stage": stage, "step": row["step"], "samples": samples}
            step["world"] = self.accelerator.num_processes
            write_json(file, step | {"config": plain(asdict(self.config))})
        return file

    def say(self, line: str) -> None:
        """Print a line, on the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            self.bar.write(line)

    def report_bad(self) -> None:
        """Name and count the bad samples that any process has met since the last time."""
        if self.config.on_bad_sample != "skip":
            return
        bad = gather_object(self.bad)
        self.bad = []
        if not self.accelerator.is_main_process:
            return
        new = {error: step for step, error in reversed(bad) if error not in self.known_bad}
        for error, step in sorted(new.items(), key=lambda item: item[1]):
            self.known_bad.add(error)
            self.say(f"bad sample {len(self.known_bad)}, skipped: {error}")
            with self.bad_samples.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, "error": error}) + "\n")
        if new:
            self._show(bad_samples=str(len(self.known_bad)))

    def _show(self, **values: str) -> None:
        self.shown |= values
        self.bar.set_postfix(self.shown, refresh=False)

    def _write(self, rows: list[Row]) -> None:
        if not self.accelerator.is_main_process:
            return
        # JSON has no word for what is infinite or undefined.
        plain = [{k: v if isfinite(v) else None for k, v in row.items()} for row in rows]
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in plain)
        if self.tracker:
            for row in rows:
                values = {key: value for key, value in row.items() if key != "step"}
                self.accelerator.log(values, step=row["step"])


def find_tracker(config: TrainingConfig) -> str | None:
    """The tracker that `report_to` asks for, if it is installed.

    Raises:
        ConfigError: Accelerate knows none of this name.
    """
    name = config.report_to
    if name in (None, "none"):
        return None
    if name not in LoggerType.list():
        raise ConfigError(f"no tracker '{name}'; {suggest(name, ['none', *LoggerType.list()])}")
    if LoggerType(name) not in get_available_trackers():
        print(f"{name} is not installed: metrics go to metrics.jsonl only")
        return None
    return name


def _truncate(file: Path, step: int) -> list[Row]:
    """Drop what was logged after `step`: the run resumes there and will log it again."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # a line torn by a kill
            break
    rows = [row for row in rows if row["step"] <= step]
    temporary = file.with_suffix(".tmp")  # a kill must not cost the log
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(file)
    return rows
