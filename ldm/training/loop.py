"""The training loop: one for every stage.

for each step:  for each micro-batch of this process:  for each player:  loss -> backward
                for each player:  clip -> AdamW -> average
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from math import isfinite
from pathlib import Path
from platform import machine
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor

from ldm.checkpoint.io import recover
from ldm.data.order import Place, micro_batches
from ldm.data.sample import DataSource
from ldm.data.streams import StreamedShards
from ldm.errors import ConfigError, LdmError, suggest
from ldm.memory import keep_large_blocks
from ldm.models.unet import UNet
from ldm.processor import half_pays
from ldm.training.attention import hasten_attention
from ldm.training.config import STAGES, TrainingConfig, UNetTraining, learning_rate_at
from ldm.training.data import make_order, open_data
from ldm.training.log import Log, find_tracker
from ldm.training.samples import Batch, Loader, move
from ldm.training.sharding import shard, whole
from ldm.training.stage import Stage
from ldm.training.state import (
    TrainingState,
    checkpoints,
    exclusive,
    find_checkpoint,
    full_disk_is_an_error,
    is_main_process,
    publish,
)
from ldm.training.stop import Stop, stop_with_launcher
from ldm.training.validation import run_validation

PATIENT = timedelta(hours=2)  # the main process saves, verifies and draws while others wait
PATIENCE = 10  # steps in a row that are not finite: what comes after will not be either


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
        if is_main_process():
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
        micro_batches: the slots of each global batch that are this process's, in turn.
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
                kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENT)],
            )
        except ValueError as error:  # a precision that this machine does not have
            raise ConfigError(str(error)) from None
        world, started = self.accelerator.num_processes, os.environ.get("WORLD_SIZE", "1")
        if world != int(started):
            raise ConfigError(
                f"{started} processes were started and each takes itself for {world}; start them"
                " with accelerate launch or torchrun"
            )
        rank, accumulation = self.accelerator.process_index, config.gradient_accumulation_steps
        self.micro_batches = micro_batches(config.train_batch_size, world, rank, accumulation)
        if isinstance(data, StreamedShards):  # each slot of the batch reads a shard of its own
            data.check_cache(config.train_batch_size // world)
        device = self.accelerator.device
        if device.type == "cpu":
            keep_large_blocks()
        for module in self.stage.players.values():
            if isinstance(config, UNetTraining) and config.fsdp and world > 1:
                shard(cast(UNet, module), device)
            else:
                module.to(device=device).to(memory_format=torch.channels_last)  # type: ignore
            module.train()
            half = config.mixed_precision == "bf16"
            if device.type == "cpu" and half and not config.torch_compile:
                hasten_attention(module)
        self.state = TrainingState(self.stage, config, data)
        self.state.scaler = self.accelerator.scaler
        self.newest: Path | None = None
        self.skipped_in_a_row = 0

    def resume(self) -> None:
        """Load the checkpoint that the options ask for, and make ready for the first step."""
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            recover(config.output_dir, alone=True)  # as `exclusive` has seen to
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
        x86 = accelerator.device.type == "cpu" and machine() in ("x86_64", "AMD64")
        if x86 and config.mixed_precision == "bf16" and not half_pays():
            log.say("on this CPU float32 may well be faster than bf16: try --mixed_precision no")
        with log.bar, self.loader() as loader:
            while state.step < config.max_train_steps:
                began = time.perf_counter()
                read = stop.attempt(lambda: self.read(loader))
                log.waited += time.perf_counter() - began
                if stop.agreed() or read is None:
                    break
                batches, bad = read
                figures = self.update(batches)
                log.step(state.step, figures, learning_rate_at(config, state.step - 1), bad)
                last = state.step == config.max_train_steps
                validate = last or state.step % config.validation_steps == 0
                save = last or state.step % config.checkpointing_steps == 0
                if validate or save or state.step % config.logging_steps == 0:
                    self.note_skipped(log)
                if validate and (
                    result := run_validation(accelerator, state, self.validation_data, stop)
                ):
                    figures, preview, bad = result
                    log.validation(state.step, figures, preview)
                    log.bad += [(state.step, error) for error in bad]
                if save:
                    self.save()
                if validate or save:
                    log.since = time.perf_counter()
            self.note_skipped(log)
            log.report_bad()
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
        """One optimizer step from the micro-batches of this process.

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
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            norm = whole(torch.nn.utils.get_total_norm(gradients))
            skipped = 1 - (norm.isfinite() & figures[f"{prefix}loss"].isfinite()).float()
            if dist.is_initialized():  # losses are each process's own
                dist.all_reduce(skipped, dist.ReduceOp.MAX)
            figures |= {f"{prefix}grad_norm": norm, f"{prefix}skipped": skipped}
            # Of the fused AdamW: it divides gradients by the one, which clips them to their norm
            # without a pass of its own, and does nothing where the other is 1.
            optimizer.grad_scale = (norm / self.config.max_grad_norm).clamp(min=1).float()  # type: ignore[attr-defined]
            optimizer.found_inf = skipped  # type: ignore[attr-defined]
            optimizer.step()
            if state.scaler:
                state.scaler.update()
            optimizer.zero_grad()
            if player in state.averages:
                state.averages[player].update(step, skipped)
        state.step += 1
        return figures

    def _gradients(self, playing: list[str], batches: list[Batch]) -> dict[str, Tensor]:
        """Backward through every micro-batch of a step; the figures are means over them."""
        total: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            silent = number < len(batches) - 1  # gradients are averaged over processes once
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

    def note_skipped(self, log: Log) -> None:
        """Flush the log, count its steps that were left out, and end a hopeless run.

        Raises:
            ConfigError: `on_non_finite` says so, or there were too many in a row.
        """
        for row in log.flush():
            if not any(value for key, value in row.items() if key.endswith("skipped")):
                self.skipped_in_a_row = 0
                continue
            self.skipped_in_a_row += 1
            self.state.skipped += 1
            scaler = self.state.scaler  # of fp16, which finds its scale by overflowing now and then
            stop = self.config.on_non_finite == "stop" and not scaler
            hopeless = self.skipped_in_a_row == PATIENCE * (2 if scaler else 1)
            if scaler and not hopeless and isfinite(row["loss"]):
                continue
            capsule = log.capsule(self.name, row, self.order.batch(row["step"] - 1), self.data)
            what = f"step {row['step']} has loss {row['loss']}, gradient norm {row['grad_norm']}"
            if stop or hopeless:
                or_else = "; or leave such steps out with --on_non_finite skip" if stop else ""
                raise ConfigError(
                    f"{what}: the training diverges. Ask scripts/replay.py {capsule} where; lower"
                    f" learning_rate or raise lr_warmup_steps{or_else}"
                )
            log.say(f"{what}: it is left out ({self.state.skipped} so far), see {capsule}")

    def save(self) -> None:
        """Write a checkpoint, unless the newest is of this very step."""
        folder = self.config.output_dir / f"checkpoint-{self.state.step}"
        if self.newest != folder:
            if self.accelerator.is_main_process or self.state.sharded:
                self.state.save()
            self.newest = folder
        self.accelerator.wait_for_everyone()

    def read(self, loader: Loader) -> tuple[list[Batch], list[str]]:
        """The micro-batches of the next step, on the device, and what was wrong with samples."""
        batches = [next(loader) for _ in self.micro_batches]
        bad = [error for batch in batches for error in batch.pop("bad") if error]
        return [move(batch, self.accelerator.device) for batch in batches], bad

    def loader(self, steps: Iterable[int] | None = None) -> Loader:
        """This process's micro-batches of some steps; by default of all from the state's own on."""

        def places() -> Iterator[list[Place]]:
            for step in steps or range(self.state.step, self.config.max_train_steps):
                batch = self.order.batch(step)
                yield from (batch[slots] for slots in self.micro_batches)

        samples = self.stage.samples(self.data, validation=False, order=self.order)
        pin = self.accelerator.device.type == "cuda"
        workers = self.config.dataloader_num_workers
        return Loader(samples, places(), workers=workers, pin_memory=pin)

    def parameter_count(self) -> int:
        """How many numbers are trained, or could be."""
        return sum(p.numel() for m in self.state.modules.values() for p in m.parameters())

    def summary(self) -> str:
        """What is trained, on what, by whom."""
        return (
            f"{len(self.data)} samples, {len(self.validation_data)} for validation;"
            f" {self.parameter_count() / 1e6:.2f} M parameters;"
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
