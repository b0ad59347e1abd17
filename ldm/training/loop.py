"""The training loop: one for every stage.

for each step:  for each piece of this process's share:  for each player:  loss -> backward
                for each player:  clip -> AdamW -> average
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import pairwise
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.checkpoint.io import recover
from ldm.data.order import positions, rank_slots
from ldm.data.sample import DataSource
from ldm.errors import ConfigError, DataError, suggest
from ldm.training.config import STAGES, TrainingConfig, learning_rate_at
from ldm.training.data import open_data
from ldm.training.stage import Batch, Stage
from ldm.training.state import TrainingState, checkpoints, find_checkpoint, publish

VALIDATION_BATCH = 32  # at most so many samples at a time


def make_stage(name: str, config: Any) -> Stage:
    """The stage of this name."""
    match name:
        case "vae":
            from ldm.training.vae import VaeStage as Maker
        case "clip":
            from ldm.training.clip import ClipStage as Maker
        case "unet":
            from ldm.training.unet import UNetStage as Maker
        case _:
            raise ConfigError(f"no stage '{name}'; {suggest(name, STAGES)}")
    return Maker(config)


def train(
    name: str, config: TrainingConfig, sources: tuple[DataSource, DataSource] | None = None
) -> Path:
    """Train a stage to its last step.

    Args:
        name: the stage: `vae`, `clip` or `unet`.
        config: the run's options, of the class that the stage has.
        sources: what `open_data` gave, where it is open already.

    Returns:
        The output folder, which then holds the finished model.

    Raises:
        ConfigError: the options do not fit each other, the processes or the output folder; or the
            training diverges.
        DataError: the data cannot be used.
        CheckpointError: the checkpoint to resume from cannot be used.
    """
    if not config.resume_from_checkpoint and checkpoints(config.output_dir):
        raise ConfigError(
            f"{config.output_dir} holds checkpoints already; add --resume_from_checkpoint latest to"
            " go on, or choose another --output_dir"
        )
    data, validation_data = sources or open_data(config)
    stage = make_stage(name, config)
    tracker = _tracker(config)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision, log_with=tracker, project_dir=config.output_dir
        )
    except ValueError as error:  # a precision that this machine does not have
        raise ConfigError(str(error)) from None
    say = accelerator.print
    if accelerator.is_main_process:
        recover(config.output_dir)
    accelerator.wait_for_everyone()
    size = _piece_size(config, accelerator.num_processes)
    for module in stage.players.values():
        module.to(device=accelerator.device).to(memory_format=torch.channels_last)  # type: ignore
        module.train()
    state = TrainingState(stage, config, data.fingerprint)
    state.scaler = accelerator.scaler
    newest: Path | None = None
    if resume := config.resume_from_checkpoint:
        if newest := find_checkpoint(resume, config.output_dir):
            state.load(newest)
            say(f"resumed from {newest}")
        else:
            say(f"nothing to resume in {config.output_dir}: starting at step 0")
    stage.setup(data, validation_data, accelerator.device)
    for player in stage.players:
        stage.players[player] = accelerator.prepare(stage.players[player])
    optimizers = {
        key: accelerator.prepare(optimizer) for key, optimizer in state.optimizers.items()
    }
    log = _Log(accelerator, config, state.step, tracker)
    parameters = sum(p.numel() for m in state.modules.values() for p in m.parameters())
    say(
        f"{len(data)} samples, {len(validation_data)} for validation;"
        f" {parameters / 1e6:.2f} M parameters; {accelerator.num_processes} process(es) on"
        f" {accelerator.device.type}"
    )

    for batches in _steps(stage, data, size, state.step, accelerator):
        playing = stage.active(state.step)
        for player in playing:
            for group in optimizers[player].param_groups:
                group["lr"] = learning_rate_at(config, state.step, group["base_lr"])
        figures = _gradients(stage, playing, batches, state.step, accelerator)
        for player in playing:
            weights = stage.players[player].parameters()
            norm = accelerator.clip_grad_norm_(weights, config.max_grad_norm)
            figures[_prefix(player, playing) + "grad_norm"] = torch.as_tensor(norm)
            optimizers[player].step()
            optimizers[player].zero_grad()
            if player in state.averages:
                state.averages[player].update(state.step)
        state.step += 1
        log.step(state.step, figures, learning_rate_at(config, state.step - 1))

        last = state.step == config.max_train_steps
        if last or state.step % config.validation_steps == 0:
            log.flush()
            log.validation(state.step, *_validate(stage, validation_data, state, accelerator))
        if last or state.step % config.checkpointing_steps == 0:
            log.flush()
            if accelerator.is_main_process:
                newest = state.save()
            accelerator.wait_for_everyone()
            log.since = time.perf_counter()
    log.close()
    if accelerator.is_main_process and newest:
        publish(newest, config.output_dir)
        say(f"finished: the model is {config.output_dir}")
    accelerator.end_training()
    return config.output_dir


def _gradients(
    stage: Stage, playing: list[str], batches: list[Batch], step: int, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Backward through every piece of a step; the figures are means over the pieces."""
    total: dict[str, Tensor] = {}
    for piece, batch in enumerate(batches):
        for name in playing:
            silent = piece < len(batches) - 1  # gradients are averaged over processes once
            module = stage.players[name]
            own = [p for p in module.parameters() if p.requires_grad]
            with accelerator.no_sync(module) if silent else nullcontext(), accelerator.autocast():
                figures = stage.loss(name, batch, step)
            # A turn of one player leaves no gradient in another.
            accelerator.backward(figures["loss"] / len(batches), inputs=own)
            for key, value in figures.items():
                key = _prefix(name, playing) + key
                total[key] = total.get(key, 0) + value.detach() / len(batches)
    return total


def _prefix(player: str, playing: list[str]) -> str:
    """The first player's figures have plain names, the others' begin with who it is."""
    return "" if player == playing[0] else f"{player}_"


def _piece_size(config: TrainingConfig, world: int) -> int:
    """Samples in one piece of one process's share of a batch."""
    share, rest = divmod(config.train_batch_size, world)
    if rest or share % config.gradient_accumulation_steps:
        raise ConfigError(
            f"train_batch_size {config.train_batch_size} cannot be split over {world} process(es)"
            f" and gradient_accumulation_steps {config.gradient_accumulation_steps}"
        )
    return share // config.gradient_accumulation_steps


def _steps(
    stage: Stage, data: DataSource, size: int, start: int, accelerator: Accelerator
) -> Iterator[list[Batch]]:
    """The pieces of every step from `start` on, `size` samples each, on the device."""
    config, pieces = stage.config, stage.config.gradient_accumulation_steps
    slots = rank_slots(
        config.train_batch_size, accelerator.num_processes, accelerator.process_index
    )

    def visits() -> Iterator[list[Any]]:
        for step in range(start, config.max_train_steps):
            mine = positions(config.seed, step, config.train_batch_size, len(data))[slots]
            for piece in range(pieces):
                yield mine[piece * size : (piece + 1) * size]

    loader = iter(
        DataLoader(
            stage.dataset(data, validation=False),
            batch_sampler=_Once(visits()),
            num_workers=config.dataloader_num_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
    )
    for _ in range(start, config.max_train_steps):
        try:
            batches = [next(loader) for _ in range(pieces)]
        except DataError as error:  # from a loader's worker it comes with its whole traceback
            last = str(error).strip().split("\n")[-1]
            raise DataError(last.removeprefix("ldm.errors.DataError: ")) from None
        yield [_move(batch, accelerator.device) for batch in batches]


@torch.no_grad()
def _validate(
    stage: Stage, source: DataSource, state: TrainingState, accelerator: Accelerator
) -> tuple[dict[str, float], Any]:
    """Mean figures over the validation samples, and a preview, both of the average."""
    # Equal batches: a contrastive loss depends on how many captions a picture is compared with.
    number, count = len(source), ceil(len(source) / VALIDATION_BATCH)
    ends = [number * i // count for i in range(count + 1)]
    chunks = [[(i, 0) for i in range(start, end)] for start, end in pairwise(ends)]
    mine = chunks[accelerator.process_index :: accelerator.num_processes]
    loader = DataLoader(stage.dataset(source, validation=True), batch_sampler=mine)
    sums: dict[str, float] = {}
    with state.averaged():
        for batch in loader:
            batch = _move(batch, accelerator.device)
            with accelerator.autocast():
                for key, value in stage.validate(batch).items():
                    sums[key] = sums.get(key, 0) + float(value.sum())
        preview = stage.preview() if accelerator.is_main_process else None
    parts = gather_object([sums])  # a process may have had no share
    means = {k: sum(p.get(k, 0) for p in parts) / len(source) for k in sorted(parts[0])}
    return means, preview


class _Once:
    """A batch sampler that is run through once."""

    def __init__(self, batches: Iterator[list[Any]]):
        self._batches = batches

    def __iter__(self) -> Iterator[list[Any]]:
        return self._batches


class _Log:
    """Progress bar, metrics.jsonl, sample grids and trackers; on the main process only.

    Figures stay on the device until the next write, so that a GPU need not be waited for.
    """

    def __init__(
        self, accelerator: Accelerator, config: TrainingConfig, step: int, tracker: str | None
    ):
        self.accelerator, self.config, self.tracker = accelerator, config, tracker
        self.pending: list[tuple[int, dict[str, Tensor], float]] = []
        self.file = config.output_dir / "metrics.jsonl"
        self.since = time.perf_counter()
        self.last: dict[str, str] = {}
        if accelerator.is_main_process:
            config.output_dir.mkdir(parents=True, exist_ok=True)
            _truncate(self.file, step)
            if tracker:
                accelerator.init_trackers("logs", config=_flat(asdict(config)))
        self.bar = tqdm(
            total=config.max_train_steps,
            initial=step,
            disable=not accelerator.is_local_main_process,
            unit="step",
            mininterval=1.0,
        )

    def step(self, step: int, figures: dict[str, Tensor], learning_rate: float) -> None:
        self.pending.append((step, figures, learning_rate))
        self.bar.update()
        if step % self.config.logging_steps == 0:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        names = sorted({name for _, figures, _ in self.pending for name in figures})
        device = self.accelerator.device
        nan = torch.tensor(float("nan"), device=device)
        table = torch.stack(
            [torch.stack([f.get(n, nan).float() for n in names]) for _, f, _ in self.pending]
        )
        reduced: Any = self.accelerator.reduce(table, "mean")
        table = reduced.tolist()
        seconds = time.perf_counter() - self.since
        rate = len(self.pending) * self.config.train_batch_size / seconds
        rows = []
        for (step, figures, lr), values in zip(self.pending, table, strict=True):
            kept = {n: v for n, v in zip(names, values, strict=True) if n in figures}
            rows.append({"step": step, "learning_rate": lr, **kept})
        rows[-1]["images_per_second"] = rate
        self._write(rows)
        self._show(loss=f"{rows[-1]['loss']:.4f}", images_per_s=f"{rate:.1f}")
        for row in rows:  # before a checkpoint is written that holds nothing but this
            figures = dict(row)
            if self.accelerator.scaler is not None:  # fp16 skips a step whose gradients overflow
                figures = {k: v for k, v in row.items() if not k.endswith("grad_norm")}
            if bad := [name for name, value in figures.items() if not isfinite(value)]:
                raise ConfigError(
                    f"{bad[0]} is {row[bad[0]]} at step {row['step']}: the training diverges; lower"
                    " learning_rate or raise lr_warmup_steps, and start anew in another output_dir"
                )
        self.pending.clear()
        self.since = time.perf_counter()

    def validation(self, step: int, figures: dict[str, float], preview: Any) -> None:
        self.flush()
        if figures:
            self._write([{"step": step, **{f"validation_{k}": v for k, v in figures.items()}}])
            self._show(validation=f"{figures['loss']:.4f}")
        if preview is not None:
            folder = self.config.output_dir / "samples"
            folder.mkdir(exist_ok=True)
            preview.save(folder / f"step-{step:07d}.png")
        self.since = time.perf_counter()

    def close(self) -> None:
        self.flush()
        self.bar.close()

    def _show(self, **values: str) -> None:
        self.last |= values
        self.bar.set_postfix(self.last, refresh=False)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not self.accelerator.is_main_process:
            return
        with self.file.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        if self.tracker:
            for row in rows:
                values = {key: value for key, value in row.items() if key != "step"}
                self.accelerator.log(values, step=row["step"])


def _truncate(file: Path, step: int) -> None:
    """Drop what was logged after `step`: the run resumes there and will log it again."""
    if not file.exists():
        return
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except ValueError:  # a line torn by a kill
            break
    temporary = file.with_suffix(".tmp")  # a kill must not cost the log
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(file)


def _tracker(config: TrainingConfig) -> str | None:
    name = config.report_to
    if name in (None, "none"):
        return None
    if name not in LoggerType.list():
        raise ConfigError(f"no tracker '{name}'; {suggest(name, ['none', *LoggerType.list()])}")
    if LoggerType(name) not in get_available_trackers():
        print(f"{name} is not installed: metrics go to metrics.jsonl only")
        return None
    return name


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options as trackers take them: numbers and strings."""
    return {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in options.items()}


def _move(batch: Batch, device: torch.device) -> Batch:
    """Pictures and noises go to the device; timesteps stay, since the CPU has the schedule."""
    return {
        key: value.to(device, non_blocking=True)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in batch.items()
    }
