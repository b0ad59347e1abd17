"""A step that was not finite, done again in float32 under observation.

Everything of a step but its weights is a pure function of what its capsule says, and the weights
are trained again from the checkpoint before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ldm.checkpoint.io import read_json, verify
from ldm.errors import CheckpointError, ConfigError
from ldm.training.config import STAGES, TrainingConfig
from ldm.training.data import open_data
from ldm.training.loop import Run
from ldm.training.samples import Batch
from ldm.training.state import checkpoints


def replay(capsule: Path) -> list[str]:
    """Train up to a capsule's step, do the step itself in float32, and say what is not finite.

    Args:
        capsule: a file of `write_capsule`; its run's output folder and data are still there.

    Returns:
        Lines for a reader: the step, the first bad module, and the bad samples by name.

    Raises:
        ConfigError: the file is no capsule.
        CheckpointError: it cannot be read, or the run's checkpoints no longer fit its options.
    """
    content = read_json(capsule)
    if not {"stage", "step", "samples", "config"} <= content.keys():
        raise ConfigError(f"{capsule} is no capsule; they lie in OUTPUT_DIR/capsules")
    config = _config(content)
    step = content["step"] - 1
    run = Run(content["stage"], config, *open_data(config))
    checkpoint = _checkpoint_before(config.output_dir, step)
    if checkpoint:
        run.load(checkpoint)
    run.prepare()
    lines = [
        f"from {checkpoint.name if checkpoint else 'the beginning'}:"
        f" {step - run.state.step} steps are trained again before step {step + 1}"
    ]
    with run.loader() as loader:
        while run.state.step < step:
            run.update([{**next(loader)} for _ in range(run.pieces)])
    samples = run.stage.samples(run.data, validation=False)
    items = [samples.read(place) for place in run.order.batch(step)]
    loss, norm, module = _examine(run, items)
    lines.append(f"step {step + 1} in float32: loss {loss:.4g}, gradient norm {norm:.4g}")
    if module is None:
        lines.append(
            "all of it is finite: what overflowed is the precision of the run,"
            f" {config.mixed_precision}"
            if config.mixed_precision != "no"
            else "all of it is finite: the cause is gone, or lies outside of the model"
        )
        return lines
    lines.append(f"the first that is not finite is {module}")
    for item, sample in zip(items, content["samples"], strict=True):
        alone, norm, module = _examine(run, [item])
        if module:
            lines.append(
                f"sample {sample['key']} (index {sample['index']}, visit {sample['visit']}) alone:"
                f" loss {alone:.4g}, gradient norm {norm:.4g}, first in {module}"
            )
    return lines


def _config(content: dict[str, Any]) -> TrainingConfig:
    """The run's options as a run of one process, without workers, that reports to nobody."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(STAGES[content["stage"]], "config")
    values = parser.parse_object({"config": content["config"]})
    config = parser.instantiate(values)["config"]
    return replace(config, dataloader_num_workers=0, report_to=None, resume_from_checkpoint=None)


def _checkpoint_before(output_dir: Path, step: int) -> Path | None:
    for folder in reversed(checkpoints(output_dir)):
        if int(folder.name.split("-")[1]) <= step:
            try:
                verify(folder)
                return folder
            except CheckpointError:
                continue
    return None


def _examine(run: Run, items: list[Batch]) -> tuple[float, float, str | None]:
    """The loss and gradient norm of a batch in float32, and the first module that is not finite."""
    batch = default_collate(items)
    modules = run.state.modules | run.stage.frozen()
    for module in modules.values():
        module.zero_grad()
    with _watched(modules) as (seen, bad):
        total = torch.zeros(())
        for player in run.stage.active(run.state.step):
            loss = run.stage.loss(player, batch, run.state.step)["loss"]
            loss.backward()
            total = total + loss.detach().cpu()
    named = [
        (name, parameter.grad)
        for name in reversed(seen)  # the gradient comes from the end
        for parameter in _submodule(modules, name).parameters(recurse=False)
        if parameter.grad is not None
    ]
    norm = torch.stack([grad.norm().cpu() for _, grad in named]).norm()
    first = f"the output of {bad[0]}" if bad else None
    if first is None:
        names = (name for name, grad in named if not grad.isfinite().all())
        first = next((f"the gradient of {name}" for name in names), None)
    if first is None and not total.isfinite():
        first = "the loss itself"
    return float(total), float(norm), first


@contextmanager
def _watched(modules: dict[str, nn.Module]) -> Iterator[tuple[list[str], list[str]]]:
    """The innermost modules in the order in which they compute, and those that put out NaN."""
    seen: list[str] = []
    bad: list[str] = []

    def watch(name: str, output: Any) -> None:
        seen.append(name)
        if isinstance(output, Tensor) and not output.isfinite().all():
            bad.append(name)

    with ExitStack() as stack:
        for root, module in modules.items():
            for name, part in module.named_modules():
                if not list(part.children()):
                    hook = part.register_forward_hook(
                        lambda _m, _i, output, name=f"{root}.{name}": watch(name, output)
                    )
                    stack.callback(hook.remove)
        yield seen, bad


def _submodule(modules: dict[str, nn.Module], name: str) -> nn.Module:
    root, _, rest = name.partition(".")
    return modules[root].get_submodule(rest)
