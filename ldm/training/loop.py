"""The training loop: one for every stage.

for each step:  for each piece of this process's share:  for each player:  loss -> backward
                for each player:  clip -> AdamW -> average
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ldm.checkpoint.io import recover
from ldm.data.buckets import make_order
from ldm.data.order import Place, rank_slots
from ldm.data.sample import DataSource
from ldm.errors import ConfigError, LdmError, suggest
from ldm.models.unet import UNet
from ldm.training.capsule import PATIENCE, write_capsule
from ldm.training.config import STAGES, TrainingConfig, learning_rate_at
from ldm.training.data import open_data
from ldm.training.log import Log, Row, find_tracker
from ldm.training.samples import Batch, Loader
from ldm.training.sharding import shard, whole
from ldm.training.stage import Stage
from ldm.training.state import (
    TrainingState,
    checkpoints,
    exclusive,
    find_checkpoint,
    full_disk_is_an_error,
    publish,
)
from ldm.training.stop import Stop, stop_with_launcher

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
    """Train a stage to its last step, or until SIGTERM or SIGINT asks it to save and end.

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
        CheckpointError: the checkpoint to resume from cannot be used, or none can be written.
        SystemExit: a signal has ended the run, after a checkpoint.
    """
    if not config.resume_from_checkpoint and checkpoints(config.output_dir):
        raise ConfigError(
            f"{config.output_dir} holds checkpoints already; add --resume_from_checkpoint latest to"
            " go on, or choose another --output_dir"
        )
    stop_with_launcher()
    with ExitStack() as stack:
        stack.enter_context(full_disk_is_an_error(config.output_dir))
        if os.environ.get("RANK", "0") == "0":
            stack.enter_context(exclusive(config.output_dir))
        stack.enter_context(_lost_processes_are_an_error())
        run = Run(name, config, *(sources or open_data(config)))
        run.resume()
        run.train(stack.enter_context(Stop()))
    return config.output_dir


class Run:
    """A stage, its data and its state on the processes that Accelerate has started.

    Args:
        name: the stage.
        config: its options.
        data: training samples.
        validation_data: validation samples.

    Attributes:
        order: which samples at which step.
        slots: the part of each global batch that is this process's.
    """

    def __init__(
        self, name: str, config: TrainingConfig, data: DataSource, validation_data: DataSource
    ):
        self.name, self.config = name, config
        self.data, self.validation_data = data, validation_data
        self.order = make_order(data, config)
        self.stage = make_stage(name, config)
        self.tracker = find_tracker(config)
        try:
            self.accelerator = Accelerator(
                mixed_precision=config.mixed_precision,
                log_with=self.tracker,
                project_dir=config.output_dir,
                cpu=not torch.accelerator.is_available(),  # else it overlooks the other processes
            )
        except ValueError as error:  # a precision that this machine does not have
            raise ConfigError(str(error)) from None
        world, started = self.accelerator.num_processes, os.environ.get("WORLD_SIZE", "1")
        if world != int(started):
            raise ConfigError(
                f"{started} processes were started and each takes itself for {world}; start them"
                " with accelerate launch or torchrun"
            )
        self.piece = _piece_size(config, world)
        self.slots = rank_slots(config.train_batch_size, world, self.accelerator.process_index)
        device = self.accelerator.device
        for module in self.stage.players.values():
            if getattr(config, "fsdp", False) and world > 1:
                shard(cast(UNet, module), device)
            else:
                module.to(device=device).to(memory_format=torch.channels_last)  # type: ignore
            module.train()
        self.state = TrainingState(self.stage, config, data)
        self.state.scaler = self.accelerator.scaler
        self.newest: Path | None = None

    def resume(self) -> None:
        """Load the checkpoint that the options ask for, and make ready for the first step."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            recover(config.output_dir)
            self.state.check_space()
        accelerator.wait_for_everyone()
        if resume := config.resume_from_checkpoint:
            main = accelerator.is_main_process  # finds it for all: they must not differ
            found = [find_checkpoint(resume, config.output_dir) if main else None]
            if newest := broadcast_object_list(found)[0]:
                self.load(newest)
                accelerator.print(f"resumed from {newest}")
            else:
                accelerator.print(f"nothing to resume in {config.output_dir}: starting at step 0")
        self.prepare()

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, instead of from the beginning."""
        self.state.load(checkpoint)
        self.newest = checkpoint

    def prepare(self) -> None:
        """Build caches, and spread the players over the processes."""
        self.stage.setup(self.data, self.validation_data, self.accelerator.device)
        for player, module in self.stage.players.items():
            if self.config.torch_compile:
                module.compile()
            if not self.state.sharded:
                self.stage.players[player] = self.accelerator.prepare(module)

    def train(self, stop: Stop) -> None:
        """Every step from the state's own to the last; then the finished model."""
        config, state, accelerator = self.config, self.state, self.accelerator
        log = Log(accelerator, config, state.step, self.tracker)
        log.say(self.summary())
        skipped_in_a_row = 0
        with log.bar, self.loader() as loader:
            while state.step < config.max_train_steps:
                began = time.perf_counter()
                batches = stop.attempt(lambda: [next(loader) for _ in range(self.pieces)])
                log.waited += time.perf_counter() - began
                if stop.agreed() or batches is None:
                    break
                bad = [error for batch in batches for error in batch.pop("bad") if error]
                figures = self.update([_move(batch, accelerator.device) for batch in batches])
                log.step(state.step, figures, learning_rate_at(config, state.step - 1), bad)
                last = state.step == config.max_train_steps
                validate = last or state.step % config.validation_steps == 0
                save = last or state.step % config.checkpointing_steps == 0
                if validate or save or state.step % config.logging_steps == 0:
                    rows = log.flush()
                    skipped_in_a_row = self.account(rows, skipped_in_a_row, log)
                if validate:
                    result = self.validate(stop)
                    if result is not None:
                        log.validation(state.step, *result)
                if save:
                    self.save()
                log.since = time.perf_counter()
        self.account(log.flush(), skipped_in_a_row, log)
        if state.step < config.max_train_steps:
            self.save()
            accelerator.print(
                f"stopped after step {state.step}, saved {self.newest};"
                " go on with --resume_from_checkpoint latest",
                file=sys.stderr,
            )
            accelerator.end_training()
            sys.exit(stop.exit_code)
        if accelerator.is_main_process and self.newest:
            publish(self.newest, config.output_dir)
            accelerator.print(f"finished: the model is {config.output_dir}")
        accelerator.end_training()

    def update(self, batches: list[Batch]) -> dict[str, Tensor]:
        """One optimizer step from the pieces of this process's share.

        A step whose loss or gradient is not finite on any process leaves everything as it was;
        which, the device knows and the host does not wait to hear.

        Returns:
            Figures of this process; `skipped` is 1 where the step was left out.
        """
        state, step = self.state, self.state.step
        playing = self.stage.active(step)
        figures = self._gradients(playing, batches)
        for player in playing:
            prefix, optimizer = _prefix(player, playing), state.optimizers[player]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(self.config, step, group["base_lr"])
            if state.scaler:
                state.scaler.unscale_(optimizer)
            weights = self.stage.players[player].parameters()
            norm = whole(torch.nn.utils.clip_grad_norm_(weights, self.config.max_grad_norm))
            skipped = 1 - (norm.isfinite() & figures[f"{prefix}loss"].isfinite()).float()
            if dist.is_initialized():  # losses are each process's own
                dist.all_reduce(skipped, dist.ReduceOp.MAX)
            figures |= {f"{prefix}grad_norm": norm, f"{prefix}skipped": skipped}
            if state.scaler:
                state.scaler.step(optimizer)
                state.scaler.update()
            else:
                optimizer.found_inf = skipped  # type: ignore[attr-defined]
                optimizer.step()
            optimizer.zero_grad()
            if player in state.averages:
                state.averages[player].update(step, skipped)
        state.step += 1
        return figures

    def _gradients(self, playing: list[str], batches: list[Batch]) -> dict[str, Tensor]:
        """Backward through every piece of a step; the figures are means over the pieces."""
        total: dict[str, Tensor] = {}
        for piece, batch in enumerate(batches):
            silent = piece < len(batches) - 1  # gradients are averaged over processes once
            for name in playing:
                module = self.stage.players[name]
                own = [p for p in module.parameters() if p.requires_grad]
                quiet = self.accelerator.no_sync(module) if silent else nullcontext()
                with quiet, self.accelerator.autocast():
                    figures = self.stage.loss(name, batch, self.state.step)
                # A turn of one player leaves no gradient in another.
                inputs = own if len(self.stage.players) > 1 else None
                self.accelerator.backward(figures["loss"] / len(batches), inputs=inputs)
                for key, value in figures.items():
                    key = _prefix(name, playing) + key
                    total[key] = total.get(key, 0) + value.detach() / len(batches)
        return total

    def account(self, rows: list[Row], in_a_row: int, log: Log) -> int:
        """Count the steps that were left out, with a capsule of each, and end a hopeless run.

        Args:
            rows: of `Log.flush`.
            in_a_row: how many steps before them were left out.
            log: where to say so.

        Returns:
            How many steps have been left out up to the last one, without one between them.

        Raises:
            ConfigError: `on_non_finite` says so, or there were too many in a row.
        """
        for row in rows:
            if not any(value for key, value in row.items() if key.endswith("skipped")):
                in_a_row = 0
                continue
            in_a_row += 1
            self.state.skipped += 1
            what = f"step {row['step']} has loss {row['loss']}, gradient norm {row['grad_norm']}"
            # fp16 finds its scale by overflowing now and then.
            tolerated = self.config.on_non_finite == "skip" or self.state.scaler
            capsule = self.config.output_dir / "capsules" / f"step-{row['step']:07d}.json"
            if self.accelerator.is_main_process:
                places = self.order.batch(row["step"] - 1)
                write_capsule(capsule, self.name, self.config, row, places, self.data)
            if not tolerated or in_a_row == PATIENCE:
                raise ConfigError(
                    f"{what}: the training diverges. Ask scripts/replay.py {capsule} where; lower"
                    " learning_rate or raise lr_warmup_steps, or leave such steps out with"
                    " --on_non_finite skip"
                )
            log.say(f"{what}: it is left out ({self.state.skipped} so far), see {capsule}")
        return in_a_row

    def save(self) -> None:
        """Write a checkpoint, unless the newest is of this very step."""
        folder = self.config.output_dir / f"checkpoint-{self.state.step}"
        if self.newest != folder:
            if self.accelerator.is_main_process or self.state.sharded:
                self.state.save()
            self.newest = folder
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def validate(self, stop: Stop) -> tuple[dict[str, float], Any] | None:
        """Mean figures over the validation samples and a preview, both of the average.

        Returns:
            None where a signal came in between.
        """
        number = len(self.validation_data)
        count = ceil(number / VALIDATION_BATCH)
        # Equal batches: a contrastive loss depends on how many captions a picture is compared with.
        ends = [number * i // count for i in range(count + 1)]
        chunks = [[Place(i) for i in range(start, end)] for start, end in pairwise(ends)]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = chunks[rank::world]
        sharded = self.state.sharded  # then a forward pass takes all, and cannot be left by one
        attempt = (lambda work: work()) if sharded else stop.attempt
        idle = chunks[: ceil(count / world) - len(mine)] if sharded else []
        with self.state.averaged():
            sums = attempt(lambda: self._validation_sums(mine))
            attempt(lambda: self._validation_sums(idle))
            draws = self.accelerator.is_main_process or sharded
            preview = attempt(self._preview) if draws else None
        if stop.agreed():
            return None
        parts = gather_object([sums])  # a process may have had no share
        return {k: sum(p.get(k, 0) for p in parts) / number for k in sorted(parts[0])}, preview

    def _preview(self) -> Any:
        try:
            return self.stage.preview()
        except LdmError as error:  # of a model that puts out NaN, say: more training may mend it
            self.accelerator.print(f"no sample grid: {error}")
            return None

    def _validation_sums(self, chunks: list[list[Place]]) -> dict[str, float]:
        sums: dict[str, float] = {}
        samples = self.stage.samples(self.validation_data, validation=True)
        with Loader(samples, chunks, workers=0) as loader:
            for batch in loader:
                batch = _move(batch, self.accelerator.device)
                with self.accelerator.autocast():
                    for key, value in self.stage.validate(batch).items():
                        sums[key] = sums.get(key, 0) + float(value.sum())
        return sums

    @property
    def pieces(self) -> int:
        """Pieces in which a process works through its share of a batch."""
        return self.config.gradient_accumulation_steps

    def loader(self, steps: Iterable[int] | None = None) -> Loader:
        """This process's pieces of some steps: of all from the state's own on, by default."""

        def places() -> Iterator[list[Place]]:
            for step in steps or range(self.state.step, self.config.max_train_steps):
                mine = self.order.batch(step)[self.slots]
                for piece in range(self.pieces):
                    yield mine[piece * self.piece : (piece + 1) * self.piece]

        samples = self.stage.samples(self.data, validation=False)
        pin = self.accelerator.device.type == "cuda"
        workers = self.config.dataloader_num_workers
        return Loader(samples, places(), workers=workers, pin_memory=pin)

    def parameters(self) -> int:
        """How many numbers are trained, or could be."""
        return sum(p.numel() for m in self.state.modules.values() for p in m.parameters())

    def summary(self) -> str:
        """What is trained, on what, by whom."""
        return (
            f"{len(self.data)} samples, {len(self.validation_data)} for validation;"
            f" {self.parameters() / 1e6:.2f} M parameters;"
            f" {self.accelerator.num_processes} process(es) on {self.accelerator.device.type}"
        )


@contextmanager
def _lost_processes_are_an_error() -> Iterator[None]:
    """Inside, what a process says when another one has died is one line."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
        if not lost or not dist.is_initialized():
            raise
        raise LdmError(
            "another process of this run has ended, see what it said;"
            " go on with --resume_from_checkpoint latest"
        ) from None


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


def _move(batch: Batch, device: torch.device) -> Batch:
    """Pictures and noises go to the device; timesteps stay, since the CPU has the schedule."""
    return {
        key: value.to(device, non_blocking=True)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in batch.items()
    }
