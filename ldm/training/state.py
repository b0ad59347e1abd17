"""Checkpoints of a training run: written whole or not at all, verified, and never pickled.

    OUTPUT/checkpoint-<step>/
        unet/ vae/ ...              the model in the layout of any model; the average, if any
        training_state/             what resuming needs besides:
            state.json                  step, configuration, fingerprint of the data
            <player>.safetensors        the weights being trained, float32
            <player>.average.safetensors    their moving average
            <player>.optimizer.safetensors  AdamW's moments, by parameter name
        manifest.json               SHA-256 of every file

Random numbers and the order of the data are pure functions of the step, so nothing is kept of them.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.io import (
    MANIFEST,
    atomic_folder,
    load_weights,
    read_json,
    read_tensors,
    verify,
    write_json,
    write_manifest,
    write_tensors,
)
from ldm.errors import CheckpointError
from ldm.training.config import TrainingConfig, learning_rate_at
from ldm.training.ema import EMA
from ldm.training.stage import Stage

# Options that may change between a run and its resumption without changing what is learnt.
FREE = {
    "output_dir", "train_data_dir", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "validation_steps", "validation_samples", "validation_prompts",
    "num_validation_images", "logging_steps", "report_to", "dataloader_num_workers",
    "gradient_accumulation_steps", "gradient_checkpointing", "guidance_scale",
    "num_inference_steps",
}  # fmt: skip
LEARNING_RATE = {"lr_scheduler", "lr_warmup_steps", "lr_decay_steps", "max_train_steps"}


class TrainingState:
    """All that changes during a run.

    Args:
        stage: whose players are trained; not yet wrapped by Accelerate.
        config: the run's options.
        fingerprint: names the training data.

    Attributes:
        step: optimizer steps done.
        optimizers: AdamW for each player.
        averages: EMA of each player; empty without `use_ema`.
        scaler: Accelerate's gradient scaler, for fp16.
    """

    def __init__(self, stage: Stage, config: TrainingConfig, fingerprint: str):
        self.stage, self.config, self.fingerprint = stage, config, fingerprint
        self.step = 0
        self.scaler: Any = None
        self.modules = dict(stage.players)
        self.optimizers = {
            name: torch.optim.AdamW(
                stage.parameter_groups(name),
                betas=(config.adam_beta1, config.adam_beta2),
                weight_decay=config.adam_weight_decay,
                eps=config.adam_epsilon,
                fused=True,
            )
            for name in self.modules
        }
        self.averages = {
            name: EMA(module, config.ema_decay)
            for name, module in self.modules.items()
            if config.use_ema and name in stage.averaged
        }

    def save(self) -> Path:
        """Write `checkpoint-<step>`, then prune the oldest beyond the limit."""
        folder = self.config.output_dir / f"checkpoint-{self.step}"
        with atomic_folder(folder) as temporary:
            self.save_model(temporary)
            state = temporary / "training_state"
            for name, module in self.modules.items():
                write_tensors(state / f"{name}.safetensors", module.state_dict())
                write_tensors(state / f"{name}.optimizer.safetensors", self._moments(name))
                if name in self.averages:
                    average = self.averages[name].average
                    write_tensors(state / f"{name}.average.safetensors", average)
            write_json(
                state / "state.json",
                {
                    "step": self.step,
                    "data": self.fingerprint,
                    "scaler": self.scaler.state_dict() if self.scaler else None,
                    "config": _plain(asdict(self.config)),
                },
            )
            write_manifest(temporary)
        if limit := self.config.checkpoints_total_limit:
            others = [other for other in checkpoints(self.config.output_dir) if other != folder]
            for old in others[: max(len(others) + 1 - limit, 0)]:
                # Renamed first, so that a kill here leaves no half a checkpoint.
                shutil.rmtree(old.rename(old.with_name(f".{old.name}.{os.getpid()}-pruned.tmp")))
        return folder

    def save_model(self, folder: Path) -> None:
        """Write the model that this run has made so far: the average, if there is one."""
        with self.averaged():
            self.stage.save(folder)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the players' weights are their averages, if there are any."""
        with ExitStack() as stack:
            for average in self.averages.values():
                stack.enter_context(average.applied())
            yield

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Args:
            folder: a whole one, as `find_checkpoint` gives it.

        Raises:
            CheckpointError: it belongs to other data or another configuration.
        """
        state = folder / "training_state"
        stored = read_json(state / "state.json")
        self._refuse_changes(stored, folder)
        for name, module in self.modules.items():
            file = state / f"{name}.safetensors"
            # Optimizer and average hold on to the parameters: change the numbers, not the objects.
            load_weights(module, read_tensors(file), file, assign=False)
            self._load_moments(name, read_tensors(state / f"{name}.optimizer.safetensors"))
            if name in self.averages:
                self.averages[name].load(read_tensors(state / f"{name}.average.safetensors"))
        if self.scaler and stored["scaler"]:
            self.scaler.load_state_dict(stored["scaler"])
        self.step = stored["step"]

    def _moments(self, player: str) -> dict[str, Tensor]:
        optimizer, module = self.optimizers[player], self.modules[player]
        return {
            f"{name}.{key}": value
            for name, parameter in module.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }

    def _load_moments(self, player: str, tensors: dict[str, Tensor]) -> None:
        state = self.optimizers[player].state
        for name, parameter in self.modules[player].named_parameters():
            if f"{name}.step" not in tensors:  # a player that has not yet played has no moments
                continue
            # The fused AdamW goes through memory: moments must lie there as the weights do, which
            # may be channels-last, while files are always row by row.
            moments = {
                key: torch.empty_like(parameter).copy_(tensors[f"{name}.{key}"])
                for key in ("exp_avg", "exp_avg_sq")
            }
            state[parameter] = moments | {"step": tensors[f"{name}.step"].to(parameter.device)}

    def _refuse_changes(self, stored: dict[str, Any], folder: Path) -> None:
        if stored["data"] != self.fingerprint:
            raise CheckpointError(
                f"{folder} was trained on other data ({stored['data']}, now {self.fingerprint});"
                " restore the data, or start anew in another output_dir"
            )
        now, then = _plain(asdict(self.config)), stored["config"]
        # A run may be prolonged if the steps that are done would have been the same.
        before = replace(self.config, **{k: then[k] for k in LEARNING_RATE if k in then})
        same = all(
            learning_rate_at(before, step, 1.0) == learning_rate_at(self.config, step, 1.0)
            for step in range(stored["step"])
        )
        free = FREE | (LEARNING_RATE if same else set())
        changed = [k for k in now if k not in free and now[k] != then.get(k)]
        if changed:
            shown = "; ".join(f"{k} was {then.get(k)}, is {now[k]}" for k in changed[:4])
            raise CheckpointError(
                f"{folder} was trained with other options: {shown}; restore them, or start anew in"
                " another output_dir"
            )


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = {}
    for folder in output_dir.glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):
            found[int(match[1])] = folder
    return [found[step] for step in sorted(found)]


def find_checkpoint(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint to resume from.

    Args:
        resume: `latest` for the newest that verifies, or a checkpoint's folder.
        output_dir: of the run.

    Returns:
        The folder; None where `latest` finds nothing to go on from.

    Raises:
        CheckpointError: the folder named is not a whole checkpoint or not the newest of its run,
            or `latest` finds only damage.
    """
    found = checkpoints(output_dir)
    if resume != "latest":
        if not Path(resume).is_dir():
            raise CheckpointError(f"no checkpoint '{resume}'; give its folder, or latest")
        verify(Path(resume))
        if found and Path(resume).resolve() != found[-1].resolve():
            raise CheckpointError(
                f"{output_dir} holds other checkpoints than {resume}, up to {found[-1].name};"
                " resume from latest, or choose an output_dir without any"
            )
        return Path(resume)
    for folder in reversed(found):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            print(f"passing over {folder.name}: {error}")
    if found:
        raise CheckpointError(f"no checkpoint in {output_dir} is whole; start anew elsewhere")
    return None


def publish(checkpoint: Path, output_dir: Path) -> None:
    """Copy the model of a finished run from its last checkpoint to the output folder itself."""
    for part in sorted(checkpoint.iterdir(), key=lambda path: path.is_file()):  # the index last
        if part.name in ("training_state", MANIFEST):
            continue
        if part.is_dir():
            with atomic_folder(output_dir / part.name) as temporary:
                shutil.copytree(part, temporary, dirs_exist_ok=True)
        else:
            shutil.copy2(part, output_dir / part.name)


def _plain(value: Any) -> Any:
    """A configuration as JSON would give it back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
