"""What is written is what is read back; what is damaged or of another run is refused."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.checkpoint.io import write_tensors
from ldm.errors import CheckpointError
from ldm.training.config import TrainingConfig
from ldm.training.state import TrainingState, checkpoints, find_checkpoint, publish


class Players:
    """As much of a stage as a state looks at."""

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        # Convolutions, channels last as in the loop: memory does not lie there as in files.
        first = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.players, self.averaged = {"first": first, "second": nn.Linear(4, 2)}, ("first",)

    def parameter_groups(self, player: str) -> list:
        return [{"params": self.players[player].parameters(), "base_lr": 1e-3}]

    def frozen(self) -> dict[str, nn.Module]:
        return {}

    def settings(self) -> dict[str, str]:
        return {"schedule": "linear"}

    def save(self, folder: Path) -> None:
        write_tensors(folder / "model" / "weights.safetensors", self.players["first"].state_dict())


class Data:
    """And as much of a data set."""

    fingerprint = "data"

    def __len__(self) -> int:
        return 8


def make(tmp_path, seed=0, **options):
    config = TrainingConfig(output_dir=tmp_path, ema_decay=0.5, **options)
    return TrainingState(Players(seed), config, Data())  # type: ignore[arg-type]


def step(state, names=("first",)):
    """One deterministic optimizer step."""
    for name in names:
        generator = torch.Generator().manual_seed(state.step)
        for parameter in state.modules[name].parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        state.optimizers[name].step()
        if name in state.averages:
            state.averages[name].update(state.step)
    state.step += 1


def tensors(state):
    found = {}
    for name, module in state.modules.items():
        found |= {f"{name} {k}": v for k, v in module.state_dict().items()}
        average = state.averages[name].average if name in state.averages else {}
        found |= {f"{name} average {k}": v for k, v in average.items()}
        found |= {f"{name} moments {k}": v for k, v in state._moments(name).items()}
    return found


def test_training_goes_on_bit_for_bit(tmp_path):
    """Also in the memory order of channels-last weights, which the fused AdamW walks through."""
    whole, first, other = make(tmp_path / "a"), make(tmp_path), make(tmp_path, seed=1)
    for _ in range(3):
        step(whole)
        step(first)
    folder = first.save()
    assert folder == tmp_path / "checkpoint-3" and not list(tmp_path.glob(".*"))
    other.load(find_checkpoint("latest", tmp_path))  # type: ignore[arg-type]
    assert other.step == 3
    assert not other.optimizers["second"].state  # it has not played yet
    for _ in range(2):
        step(whole, ("first", "second"))
        step(other, ("first", "second"))
    mine, expected = tensors(other), tensors(whole)
    assert sorted(mine) == sorted(expected)
    assert [name for name in mine if not torch.equal(mine[name], expected[name])] == []


def test_the_saved_model_is_the_average(tmp_path):
    from safetensors.torch import load_file

    state = make(tmp_path)
    for _ in range(3):
        step(state)
    weights = state.modules["first"].weight.detach().clone()
    saved = load_file(state.save() / "model" / "weights.safetensors")["weight"]
    assert torch.equal(saved, state.averages["first"].average["weight"])
    assert not torch.equal(saved, weights)
    assert torch.equal(state.modules["first"].weight, weights)  # which training goes on with


def test_no_pickle(tmp_path):
    state = make(tmp_path)
    step(state)
    folder = state.save()
    assert {f.suffix for f in folder.rglob("*") if f.is_file()} == {".json", ".safetensors"}


def test_pruning_waits_for_the_new_checkpoint(tmp_path, monkeypatch):
    """When writing fails, all the old ones are there."""
    state = make(tmp_path, checkpoints_total_limit=2)
    for _ in range(12):  # by number, not by name: 10 comes after 9
        step(state)
        state.save()
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-12"]
    step(state)

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(state.stage, "save", full)
    with pytest.raises(CheckpointError, match="cannot be written .no space left"):
        state.save()
    assert [f.name for f in checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-12"]
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys):
    state = make(tmp_path)
    for _ in range(3):
        step(state)
        state.save()
    file = tmp_path / "checkpoint-3" / "training_state" / "first.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-1"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "passing over checkpoint-3", "passing over checkpoint-2",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="first.safetensors has changed or is torn"):
        find_checkpoint(str(tmp_path / "checkpoint-3"), tmp_path)
    (tmp_path / "checkpoint-1" / "training_state" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint .* is whole"):
        find_checkpoint("latest", tmp_path)
    assert find_checkpoint("latest", tmp_path / "empty") is None


def test_other_options_and_other_data_are_refused(tmp_path):
    state = make(tmp_path)
    step(state)
    folder = state.save()
    state.config = replace(state.config, train_batch_size=8, learning_rate=2e-4)
    words = "train_batch_size was 16, is 8; learning_rate was 0.0001, is 0.0002"
    with pytest.raises(CheckpointError, match=words):
        state.load(folder)
    state.config = replace(make(tmp_path).config, validation_steps=7, dataloader_num_workers=3)
    state.load(folder)  # these change nothing of what is learnt
    state.identity["data"] = "9 samples, other"
    with pytest.raises(
        CheckpointError, match="data was 8 samples, data, is 9 samples, other; restore it"
    ) as error:
        state.load(folder)
    assert "\n" not in str(error.value)


def test_an_older_checkpoint_is_refused_while_later_ones_stand_beside_it(tmp_path):
    state = make(tmp_path)
    for _ in range(2):
        step(state)
        state.save()
    older, newer = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    with pytest.raises(CheckpointError, match="other checkpoints than .*, up to checkpoint-2"):
        find_checkpoint(str(older), tmp_path)
    assert find_checkpoint(str(newer), tmp_path) == newer


def test_another_runs_checkpoint_goes_on_in_an_empty_folder_only(tmp_path):
    """Among later ones of an old run, each new checkpoint would be the first to be pruned."""
    old, other = make(tmp_path / "old"), make(tmp_path / "other")
    step(old)
    folder = old.save()
    for _ in range(3):
        step(other)
    other.save()
    assert find_checkpoint(str(folder), tmp_path / "empty") == folder
    with pytest.raises(CheckpointError, match="holds other checkpoints than .*checkpoint-1, up to"):
        find_checkpoint(str(folder), tmp_path / "other")
    with pytest.raises(CheckpointError, match="no checkpoint 'lates'; give its folder, or latest"):
        find_checkpoint("lates", tmp_path / "other")


def test_pruning_never_takes_the_new_checkpoint(tmp_path):
    """A damaged later one that was passed over goes first."""
    state = make(tmp_path, checkpoints_total_limit=1)
    (tmp_path / "checkpoint-9").mkdir()
    step(state)
    assert state.save() == tmp_path / "checkpoint-1"
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]


def test_a_run_is_prolonged_only_if_its_steps_stay_what_they_were(tmp_path):
    """A warm-up that the first end cut short would have been another one."""
    for warmup, allowed in ((100, True), (500, False)):
        state = make(tmp_path / str(warmup), max_train_steps=100, lr_warmup_steps=warmup)
        step(state)
        folder = state.save()
        state.config = replace(state.config, max_train_steps=1000)
        if allowed:
            state.load(folder)
        else:
            with pytest.raises(CheckpointError, match="max_train_steps was 100, is 1000"):
                state.load(folder)


def test_a_run_may_be_prolonged_until_its_rate_decays(tmp_path):
    state = make(tmp_path, max_train_steps=6, lr_warmup_steps=1, lr_decay_steps=3)
    folders = []
    for _ in range(5):
        step(state)
        folders.append(state.save())
    state.config = replace(state.config, max_train_steps=9, lr_decay_steps=2)
    state.load(folders[3])  # steps 0 to 3 had the full rate
    with pytest.raises(CheckpointError, match="max_train_steps was 6, is 9; lr_decay_steps was 3"):
        state.load(folders[4])
    state.config = replace(state.config, lr_scheduler="cosine", lr_decay_steps=0)
    with pytest.raises(CheckpointError, match="lr_scheduler was constant, is cosine"):
        state.load(folders[3])


def test_publish_copies_the_model_only(tmp_path):
    state = make(tmp_path)
    step(state)
    folder = state.save()
    (folder / "model_index.json").write_text("{}")
    publish(folder, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"checkpoint-1", "model", "model_index.json"}
    file = "model/weights.safetensors"
    assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
