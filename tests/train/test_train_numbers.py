"""What is not finite never reaches the weights, a checkpoint or a picture, and is found again."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_helpers import metrics, own_processes, run, run_all, weights

from ldm.errors import CheckpointError, ConfigError
from ldm.pipeline import LatentDiffusionPipeline
from ldm.training.replay import replay
from ldm.training.state import checkpoints
from ldm.training.vae import VaeData, VaeStage

BAD = 3  # the step, from 0, that goes wrong


@pytest.fixture
def options(pictures, tmp_path):
    return {
        "train_data_dir": str(pictures), "output_dir": tmp_path / "run", "max_train_steps": 6,
        "checkpointing_steps": 1, "checkpoints_total_limit": None, "lr_warmup_steps": 1,
    }  # fmt: skip


def spoil(monkeypatch, where: str) -> None:
    """Make the gradient, or the loss alone, of step `BAD` infinite."""
    loss = VaeStage.loss

    def spoilt(self, player, batch, step):
        figures = loss(self, player, batch, step)
        if step != BAD:
            return figures
        if where == "loss":  # its gradient stays what it is
            return figures | {"loss": figures["loss"] + float("inf")}
        weight = next(self.players[player].parameters())
        return figures | {"loss": figures["loss"] + (weight * 0).sqrt().sum()}  # d sqrt(0) = inf

    monkeypatch.setattr(VaeStage, "loss", spoilt)


def all_finite(output: Path) -> bool:
    found = [weights(folder) for folder in checkpoints(output)]
    return all(tensor.isfinite().all() for folder in found for tensor in folder.values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("player", ["vae", "gan"])
def test_a_step_that_is_not_finite_changes_nothing(options, monkeypatch, where, player):
    options |= {"disc_start": 0} if player == "gan" else {}
    spoil(monkeypatch, where)
    output = run("vae", **options)
    before, after, later = (
        weights(output / f"checkpoint-{step}" / "training_state")
        for step in (BAD, BAD + 1, BAD + 2)
    )
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    moved = [name for name in after if not torch.equal(after[name], later[name])]
    assert len(moved) > len(after) / 2 and all_finite(output)
    rows = {row["step"]: row for row in metrics(output) if "loss" in row}
    assert [step for step, row in rows.items() if row["skipped"]] == [BAD + 1]
    shown = "loss" if where == "loss" else "grad_norm"
    assert rows[BAD + 1][shown] is None and rows[BAD][shown] is not None
    state = json.loads((output / "checkpoint-6/training_state/state.json").read_text())
    assert state["skipped"] == 1 and state["step"] == 6


def test_a_spike_on_one_process_is_left_out_by_all(options, tmp_path):
    """The last process's loss alone is infinite, its gradient is not."""
    plan = []
    for name, world in (("one", 1), ("two", 2)):
        own = options | {"output_dir": str(tmp_path / name), "adam_epsilon": 1e-4}
        plan.append(("vae", own, {"world": world, "infinite_at": BAD, "double": True}))
    run_all(plan)
    ours, one = (
        weights(tmp_path / name / "checkpoint-6/training_state") for name in ("two", "one")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
    skipped = [row["step"] for row in metrics(tmp_path / "two") if row.get("skipped")]
    assert skipped == [BAD + 1]


def test_the_run_may_stop_instead(options, monkeypatch):
    spoil(monkeypatch, "loss")
    with pytest.raises(ConfigError, match="step 4 has loss inf.*on_non_finite skip"):
        run("vae", **options, on_non_finite="stop", logging_steps=6)
    output = options["output_dir"]
    assert [f.name for f in checkpoints(output)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [f.name for f in (output / "capsules").iterdir()] == ["step-0000004.json"]
    resumed = options | {"resume_from_checkpoint": "latest", "on_non_finite": "skip"}
    run("vae", **resumed)
    assert all_finite(output) and len(checkpoints(output)) == 6


def test_a_hopeless_run_ends(options, monkeypatch):
    """Ten in a row; those before it do not count."""
    loss = VaeStage.loss
    monkeypatch.setattr(
        VaeStage, "loss", lambda self, p, b, s: {k: v * (torch.nan if s >= 2 else 1) for k, v in
                                                 loss(self, p, b, s).items()},
    )  # fmt: skip
    options |= {"max_train_steps": 20, "checkpointing_steps": 7}
    with pytest.raises(ConfigError, match="step 12 has loss nan.*the training diverges"):
        run("vae", **options)
    assert all_finite(options["output_dir"])
    assert [f.name for f in checkpoints(options["output_dir"])] == ["checkpoint-7"]


def test_weights_that_overflow_are_not_saved(options):
    options |= {"learning_rate": 1e38, "max_train_steps": 3, "adam_weight_decay": 0.0}
    with pytest.raises(CheckpointError, match="no longer finite after step .* so it is not saved"):
        run("vae", **options, max_grad_norm=1e30)
    assert all_finite(options["output_dir"])


def test_replay_names_the_module_and_the_sample(options, monkeypatch, pictures):
    """A picture that comes out of its decoder as infinity, as memory errors do."""
    get = VaeData.__getitem__

    def broken(self, place):
        item = get(self, place)
        if place.index == bad.index and not self.validation:
            item["pixels"] = item["pixels"] / 0
        return item

    from train_helpers import make_config

    from ldm.training.data import make_order, open_data

    config = make_config("vae", **options)
    data, _ = open_data(config)
    bad = make_order(data, config).batch(BAD)[2]
    monkeypatch.setattr(VaeData, "__getitem__", broken)
    output = run("vae", **options | {"checkpointing_steps": 2, "max_train_steps": BAD + 1})
    with own_processes():
        lines = list(replay(output / "capsules" / f"step-{BAD + 1:07d}.json"))
    assert lines[0] == "from checkpoint-2: 1 steps are trained again before step 4"
    assert "in float32: loss nan, gradient norm nan" in lines[1]
    assert lines[2] == "the first that is not finite is the output of vae.encoder.conv_in"
    [line] = lines[3:]
    assert line.startswith(f"sample {data.key(bad.index)} (index {bad.index}, visit 0) alone: loss")
    # The same step once the data is in order again.
    monkeypatch.setattr(VaeData, "__getitem__", get)
    with own_processes():
        lines = list(replay(output / "capsules" / f"step-{BAD + 1:07d}.json"))
    assert lines[2].startswith("all of it is finite: the cause is gone")


def test_replay_names_the_gradient(options, monkeypatch):
    """Of the weight that the loss went wrong by."""
    spoil(monkeypatch, "gradient")
    output = run("vae", **options)
    with own_processes():
        lines = list(replay(output / "capsules" / f"step-{BAD + 1:07d}.json"))
    assert lines[2] == "the first that is not finite is the gradient of vae.encoder.conv_in.weight"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_loaded_weights_that_are_not_finite(part, number, tiny_pipeline, pictures, tmp_path):
    """Neither trained on nor drawn with."""
    folder = tmp_path / "model"
    tiny_pipeline.save_pretrained(folder)
    [file] = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(k for k, v in tensors.items() if v.is_floating_point() and v.ndim > 1)
    tensors[name].view(-1)[-1] = number
    save_file(tensors, file, metadata={"format": "pt"})
    options = {"pretrained_model_name_or_path": str(folder), "train_data_dir": str(pictures)}
    with pytest.raises(CheckpointError, match=rf"{part}: \S+ holds NaN or infinity"):
        run("unet", **options, unet=None, output_dir=tmp_path / "run")
    assert not checkpoints(tmp_path / "run")
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises((CheckpointError, ConfigError), match="not finite|NaN|infinity"):
        pipeline("a red flower", num_inference_steps=2)
