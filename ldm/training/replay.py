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
from ldm.training.samples import Batch, move
from ldm.training.state import checkpoints


def replay(capsule: Path) -> Iterator[str]:
    """Train up to a capsule's step, do the step itself in float32, and say what is not finite.

    Args:
        capsule: a file of `Log.capsule`; its run's output folder and data are still there.

    Yields:
        Lines for a reader: the step, the first bad module, and the bad samples by name.

    Raises:
        ConfigError: the file is no capsule.
        CheckpointError: it cannot be read, or the run's checkpoints no longer fit its options.
    """
    content = read_json(capsule)
    if not {"stage", "step", "samples", "world", "config"} <= content.keys():
        raise ConfigError(f"{capsule} is no capsule; they lie in OUTPUT_DIR/capsules")
    config = _config(content)
    step = content["step"] - 1
    run = Run(content["stage"], config, *open_data(config))
    checkpoint = _checkpoint_before(config.output_dir, step)
    if checkpoint is None and content["config"]["resume_from_checkpoint"] not in (None, "latest"):
        checkpoint = Path(content["config"]["resume_from_checkpoint"])
        verify(checkpoint)
    if checkpoint:
        run.load(checkpoint)
    run.prepare()
    yield (
        f"from {checkpoint.name if checkpoint else 'the beginning'}:"
        f" {step - run.state.step} steps are trained again before step {step + 1}"
    )
    with run.loader() as loader:
        while run.state.step < step:
            run.update(run.read(loader)[0])
    for name, module in run.stage.players.items():  # without the run's own precision
        run.stage.players[name] = run.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
    samples = run.stage.samples(run.data, validation=False, order=run.order)
    items = [samples.read(place) for place in run.order.batch(step)]
    loss, norm, module = _examine(run, [items[slots] for slots in run.micro_batches])
    yield f"step {step + 1} in float32: loss {loss:.4g}, gradient norm {norm:.4g}"
    if module is None:
        precision = f"what overflowed is the precision of the run, {config.mixed_precision}"
        gone = "the cause is gone, or lies outside of the model"
        yield f"all of it is finite: {gone if config.mixed_precision == 'no' else precision}"
        return
    yield f"the first that is not finite is {module}"
    for item, sample in zip(items, content["samples"], strict=True):
        loss, norm, module = _examine(run, [[item]])
        if module:
            yield (
                f"sample {sample['key']} (index {sample['index']}, visit {sample['visit']}) alone:"
                f" loss {loss:.4g}, gradient norm {norm:.4g}, first in {module}"
            )


def _config(content: dict[str, Any]) -> TrainingConfig:
    """The run's options for one process, which takes the processes' shares one after the other."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(STAGES[content["stage"]], "config")
    values = parser.parse_object({"config": content["config"]})
    config = parser.instantiate(values)["config"]
    whole_batch = content["stage"] == "clip" or getattr(config, "disc_start", None) is not None
    return replace(
        config,
        gradient_accumulation_steps=1
        if whole_batch
        else content["world"] * config.gradient_accumulation_steps,
        dataloader_num_workers=0,
        torch_compile=False,  # whose modules cannot be watched
        report_to=None,
        resume_from_checkpoint=None,
    )


def _checkpoint_before(output_dir: Path, step: int) -> Path | None:
    for folder in reversed(checkpoints(output_dir)):
        if int(folder.name.split("-")[1]) <= step:
            try:
                verify(folder)
                return folder
            except CheckpointError:
                continue
    return None


def _examine(run: Run, micro_batches: list[list[Batch]]) -> tuple[float, float, str | None]:
    """The loss and gradient norm of a step in float32, and the first module that is not finite."""
    modules = run.state.modules | run.stage.frozen()
    for module in modules.values():
        module.zero_grad()
    total = torch.zeros(())
    with _watched(modules) as (seen, bad):
        for items in micro_batches:
            batch = move(default_collate(items), run.accelerator.device)
            for player in run.stage.active(run.state.step):
                own = [p for p in run.state.modules[player].parameters() if p.requires_grad]
                loss = run.stage.loss(player, batch, run.state.step)["loss"] / len(micro_batches)
                loss.backward(inputs=own)
                total += loss.detach().cpu()
    gradients = {
        f"{root}.{name}": parameter.grad
        for root, module in run.state.modules.items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    norm = torch.stack([gradient.norm().cpu() for gradient in gradients.values()]).norm()
    if bad:
        return float(total), float(norm), f"the output of {bad[0]}"
    # The gradient comes from the end: the last module that has computed is where it began.
    place = {name: number for number, name in enumerate(seen)}
    wrong = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if wrong:
        first = max(wrong, key=lambda name: place.get(name.rpartition(".")[0], -1))
        return float(total), float(norm), f"the gradient of {first}"
    return float(total), float(norm), None if total.isfinite() else "the loss itself"


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
