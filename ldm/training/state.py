"""Checkpoints of a training run: written whole or not at all, verified, and never pickled.

    OUTPUT/checkpoint-<step>/
        unet/ vae/ ...              the model in the layout of any model; the average, if any
        training_state/             what resuming needs besides:
            state.json                  step, configuration, fingerprint of the data
            <player>.safetensors        the weights being trained, float32
            <player>.average.safetensors    their moving average
            <player>.optimizer.safetensors  AdamW's moments, by parameter name
            (of a sharded player folders of the same names, with a file from each process)
        manifest.json               SHA-256 of every file

Random numbers and the order of the data are pure functions of the step, so nothing is kept of them.
What is used but not trained (data, frozen models, noise schedule) is kept as fingerprints: a run
goes on with the same ones or not at all.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from errno import EACCES, EDQUOT, EFBIG, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ldm.checkpoint.io import (
    MANIFEST,
    atomic_file,
    atomic_folder,
    load_weights,
    read_json,
    read_tensors,
    remove_folder,
    tensors_sha256,
    verify,
    write_json,
    write_manifest,
    write_tensors,
)
from ldm.data.sample import DataSource
from ldm.errors import CheckpointError, ConfigError
from ldm.training.config import FREE, LEARNING_RATE, TrainingConfig, flat, learning_rate_at, plain
from ldm.training.ema import EMA
from ldm.training.sharding import is_sharded, load_sharded, save_sharded, shared_folder, whole
from ldm.training.stage import Stage

UNWRITABLE = {ENOSPC, EDQUOT, EFBIG, EROFS, EACCES, EPERM}


class TrainingState:
    """All that changes during a run.

    Args:
        stage: whose players are trained; not yet wrapped by Accelerate.
        config: the run's options.
        data: the training data, which only its fingerprint is taken of.

    Attributes:
        step: optimizer steps done.
        skipped: how many of them were left out, for their gradients were not finite.
        optimizers: AdamW for each player.
        averages: EMA of each player; empty without `use_ema`.
        scaler: Accelerate's gradient scaler, for fp16.
        sharded: each process holds a slice of the player, and all of them save and load together.

    Raises:
        CheckpointError: a model that the run begins with is not finite.
    """

    def __init__(self, stage: Stage, config: TrainingConfig, data: DataSource):
        self.stage, self.config = stage, config
        self.step = self.skipped = 0
        self.scaler: Any = None
        self.modules = dict(stage.players)
        self.sharded = any(is_sharded(module) for module in self.modules.values())
        for name, module in (self.modules | stage.frozen()).items():
            if bad := not_finite(module):
                raise CheckpointError(f"{name}: {bad} holds NaN or infinity; load another model")
        self.identity = {"data": f"{len(data)} samples, {data.fingerprint[:12]}"}
        for name, module in stage.frozen().items():
            self.identity[name] = tensors_sha256(module.state_dict())[:12]
        self.identity |= stage.settings()
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
        """Write `checkpoint-<step>`, then prune the oldest beyond the limit.

        Raises:
            CheckpointError: the weights are not finite, or the disk is full. The checkpoints that
                were there are as they were.
        """
        folder = self.config.output_dir / f"checkpoint-{self.step}"
        for name, module in self.modules.items():
            if bad := not_finite(module):
                raise CheckpointError(
                    f"{name}: {bad} is no longer finite after step {self.step}, so it is not"
                    " saved; lower learning_rate and resume from the checkpoint before"
                )
        self.check_space()
        whole_folder = shared_folder if self.sharded else atomic_folder
        with full_disk_is_an_error(folder), whole_folder(folder) as temporary:
            self._write(temporary)
            if is_main_process():
                write_manifest(temporary)
        if (limit := self.config.checkpoints_total_limit) and is_main_process():
            others = [other for other in checkpoints(self.config.output_dir) if other != folder]
            for old in others[: max(len(others) + 1 - limit, 0)]:
                remove_folder(old)
        return folder

    def _write(self, folder: Path) -> None:
        self.save_model(folder)
        state = folder / "training_state"
        for name, module in self.modules.items():
            parts = {name: module.state_dict(), f"{name}.optimizer": self._moments(name)}
            if name in self.averages:
                parts[f"{name}.average"] = self.averages[name].average
            for part, tensors in parts.items():
                if self.sharded:
                    save_sharded(state / part, tensors)
                else:
                    write_tensors(state / f"{part}.safetensors", tensors)
        if is_main_process():
            write_json(
                state / "state.json",
                {
                    "step": self.step,
                    "skipped": self.skipped,
                    "identity": self.identity,
                    "scaler": self.scaler.state_dict() if self.scaler else None,
                    "config": plain(asdict(self.config)),
                },
            )

    def check_space(self) -> None:
        """Refuse to go on where a checkpoint would not fit onto the disk.

        Raises:
            CheckpointError: it would not.
        """
        self.config.output_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.config.output_dir).free
        if (needed := self.checkpoint_bytes()) > free:
            raise CheckpointError(
                f"{self.config.output_dir}: the disk has {free / 1e9:.3g} GB left and a checkpoint"
                f" takes {needed / 1e9:.3g} GB; make room and resume"
            )

    def checkpoint_bytes(self) -> int:
        """What a checkpoint takes on the disk: weights twice, moments, average, frozen models."""
        size = sum(_bytes(module) for module in self.stage.frozen().values())
        for name, module in self.modules.items():
            size += (3 + (name in self.averages) + (name in self.stage.averaged)) * _bytes(module)
        return size + 2**20

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
            if self.sharded or (state / name).is_dir():
                self._load_sharded(name, state, moments=stored["step"] > 0)
                continue
            file = state / f"{name}.safetensors"
            # Optimizer and average hold on to the parameters: change the numbers, not the objects.
            load_weights(module, read_tensors(file), file, assign=False)
            self._load_moments(name, read_tensors(state / f"{name}.optimizer.safetensors"))
            if name in self.averages:
                self.averages[name].load(read_tensors(state / f"{name}.average.safetensors"))
        if self.scaler and stored["scaler"]:
            self.scaler.load_state_dict(stored["scaler"])
        self.step, self.skipped = stored["step"], stored["skipped"]

    def _load_sharded(self, name: str, state: Path, *, moments: bool) -> None:
        """Into slices or whole tensors, from the files of any number of processes."""
        module, optimizer = self.modules[name], self.optimizers[name]
        load_sharded(state / name, module.state_dict())
        for parameter in module.parameters() if moments else ():
            zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = zeros | {"step": torch.zeros((), device=parameter.device)}
        if moments:
            load_sharded(state / f"{name}.optimizer", self._moments(name))
        if name in self.averages:
            load_sharded(state / f"{name}.average", self.averages[name].average)

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
        now = flat(asdict(self.config))
        # Options that are younger than the checkpoint had their default values.
        then = flat(asdict(type(self.config)())) | flat(stored["config"])
        # A run may be prolonged if the steps that are done would have been the same.
        before = replace(self.config, **{k: then[k] for k in LEARNING_RATE})
        same = all(
            learning_rate_at(before, step, 1.0) == learning_rate_at(self.config, step, 1.0)
            for step in range(stored["step"])
        )
        free = FREE | (LEARNING_RATE if same else set())
        now, then = now | self.identity, then | stored["identity"]
        names = [name for name in now | then if name.split(".")[0] not in free]
        if changed := [name for name in names if now.get(name) != then.get(name)]:
            shown = "; ".join(f"{k} was {then.get(k)}, is {now.get(k)}" for k in changed[:4])
            raise CheckpointError(
                f"{folder} was trained with something else: {shown}; restore it, or start anew in"
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
            with atomic_file(output_dir / part.name) as temporary:
                shutil.copyfile(part, temporary)


def not_finite(module: nn.Module) -> str | None:
    """The first tensor of a module that holds NaN or infinity."""
    named = [(k, v) for k, v in module.state_dict().items() if v.is_floating_point()]
    finite = torch.stack([whole(v.isfinite().all()) for _, v in named])
    return None if finite.all() else named[int(finite.int().argmin())][0]


def is_main_process() -> bool:
    """Whether this process writes what is written once; before they know each other, too."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def exclusive(output_dir: Path) -> Iterator[None]:
    """Hold an output folder, so that no other run writes into it.

    Raises:
        ConfigError: another one does.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("a") as file:
        try:
            # Ends with this process, however; one of `flock` would end with its loader workers.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another training writes into {output_dir}; choose another --output_dir"
            ) from None
        yield


@contextmanager
def full_disk_is_an_error(place: Path) -> Iterator[None]:
    """Inside, a file that cannot be written is one line.

    Raises:
        CheckpointError: with that line.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, shutil.Error):  # a list of what it could not copy, and why
            error = error.args[0][0][-1]
        elif isinstance(error, OSError) and error.errno not in UNWRITABLE:
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CheckpointError(
            f"{place} cannot be written ({reason}); checkpoints that stand are whole: make room"
            " and resume from latest"
        ) from None


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
