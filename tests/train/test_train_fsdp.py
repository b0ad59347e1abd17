"""Two processes that share one U-Net out against one process that has it whole, in float64."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from train_helpers import UNET

from ldm.checkpoint.io import verify, write_manifest, write_tensors
from ldm.errors import CheckpointError
from ldm.models.unet import UNet
from ldm.training.ema import EMA
from ldm.training.sharding import (
    gathered,
    load_sharded,
    save_sharded,
    shard,
    shared_folder,
    whole,
)

SAVED, LAST, PIECES = 2, 4, 2
TOLERANCE = 1e-11  # relative, of every single tensor; of the weights it is about 1e-13


class Training:
    """What the loop does of a step, and no more."""

    def __init__(self, seed: int, *, sharded: bool):
        torch.manual_seed(seed)
        self.unet = UNet(UNET).double()
        for parameter in self.unet.parameters():
            nn.init.normal_(parameter, std=0.05)
        self.unet.gradient_checkpointing = True
        if sharded:
            shard(self.unet, torch.device("cpu"))
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-2, fused=True)
        self.average = EMA(self.unet, 0.5)

    def steps(self, start: int, stop: int, rank: int = 0, world: int = 1) -> list[float]:
        """Train; the gradient norms. Step 1 is left out."""
        norms = []
        for step in range(start, stop):
            x, y, t, context = batch(step)
            for own in torch.arange(len(x)).chunk(world)[rank].chunk(PIECES):
                error = self.unet(x[own], t[own], context[own]) - y[own]
                (error.square().mean() / PIECES).backward()
            norms.append(float(whole(nn.utils.clip_grad_norm_(self.unet.parameters(), 0.1))))
            self.optimizer.found_inf = torch.tensor(float(step == 1))  # type: ignore[attr-defined]
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update(step)
        return norms

    def state(self) -> dict[str, Tensor]:
        """Weights, average and moments; of zeros before the first step."""
        tensors = {f"average.{k}": v for k, v in self.average.average.items()}
        for name, parameter in self.unet.named_parameters():
            moments = self.optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                moments.setdefault(key, torch.zeros_like(parameter))
            moments.setdefault("step", torch.zeros(()))
            tensors |= {f"{key}.{name}": value for key, value in moments.items()}
            tensors[f"weight.{name}"] = parameter.detach()
        return tensors


def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A global batch: noisy latents, targets, timesteps, context."""
    g = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, 8, 4, 8, 8, generator=g, dtype=torch.float64)
    context = torch.randn(8, 3, 32, generator=g, dtype=torch.float64)
    return x, y, torch.randint(1000, (8,), generator=g), context


def process(rank: int, folder: Path) -> None:
    """One of two: train, save, go on; and go on once more from what was saved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    facts: dict[str, Any] = {}
    run = Training(0, sharded=True)
    facts["norms"] = run.steps(0, SAVED, rank, 2)
    state = run.state()
    with shared_folder(folder / "checkpoint") as temporary:
        save_sharded(temporary / "state", state)
        if rank == 0:
            write_manifest(temporary)
    assert (folder / "checkpoint").is_dir()  # in every process, as soon as it is out
    x, _, t, context = batch(0)
    run.unet(x, t, context).sum().backward()
    tensors = [*state.values(), *(p.grad for p in run.unet.parameters())]
    run.optimizer.zero_grad()
    shards = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    facts["sharded"] = len(shards) == 5 * len(list(run.unet.parameters()))
    facts["numbers"] = sum(tensor.to_local().numel() for tensor in shards)
    facts["all_numbers"] = sum(tensor.numel() for tensor in shards)
    facts["norms"] += run.steps(SAVED, LAST, rank, 2)

    again = Training(1, sharded=True)
    load_sharded(folder / "checkpoint/state", again.state())
    again.steps(SAVED, LAST, rank, 2)
    ends = run.state(), again.state()
    facts["same_bits"] = all(torch.equal(whole(v), whole(ends[1][k])) for k, v in ends[0].items())
    with run.average.applied(), torch.no_grad():
        output, plain = run.unet(x, t, context), gathered(run.unet)
    if plain is not None:
        write_tensors(folder / "averaged.safetensors", plain.state_dict())
        torch.testing.assert_close(output, plain(x, t, context), rtol=1e-12, atol=1e-12)
    final = {name: whole(tensor) for name, tensor in run.state().items()}
    if rank == 0:
        save_file(final, folder / "final.safetensors")
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes have left."""
    folder = tmp_path_factory.mktemp("fsdp")
    torch.multiprocessing.spawn(process, (folder,), nprocs=2)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Tensor], list[float]]:
    """The state after the last step, and the gradient norms, of one process."""
    run = Training(0, sharded=False)
    norms = run.steps(0, LAST)
    return run.state(), norms


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The greatest relative difference of any tensor."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / (b[k].norm() + 1e-30)) for k in a)


def facts(shared: Path) -> list[dict[str, Any]]:
    return [json.loads((shared / f"facts-{rank}.json").read_text()) for rank in range(2)]


def test_weights_gradients_averages_and_moments_are_shared_out(shared: Path) -> None:
    one, other = facts(shared)
    assert one["sharded"] and other["sharded"]
    assert one["numbers"] + other["numbers"] == one["all_numbers"]
    assert one["numbers"] == pytest.approx(other["numbers"], rel=0.01)


def test_two_processes_train_what_one_trains(
    shared: Path, alone: tuple[dict[str, Tensor], list[float]]
) -> None:
    state, norms = alone
    assert distance(load_file(shared / "final.safetensors"), state) < TOLERANCE
    assert facts(shared)[0]["norms"] == facts(shared)[1]["norms"]
    assert facts(shared)[0]["norms"] == pytest.approx(norms, rel=TOLERANCE)


def test_a_checkpoint_verifies_and_holds_no_pickle(shared: Path) -> None:
    verify(shared / "checkpoint")
    files = sorted(p for p in (shared / "checkpoint").rglob("*") if p.is_file())
    assert [file.suffix for file in files] == [".json", ".safetensors", ".safetensors"]
    for file in files[1:]:  # whole safetensors, of about half the numbers each
        size = sum(tensor.nbytes for tensor in load_file(file).values())
        assert size == pytest.approx(sum(os.path.getsize(f) for f in files[1:]) / 2, rel=0.05)


def test_two_processes_resume_bit_for_bit(shared: Path) -> None:
    assert [one["same_bits"] for one in facts(shared)] == [True, True]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_process_resumes_what_two_saved(
    shared: Path, alone: tuple[dict[str, Tensor], list[float]], layout: torch.memory_format
) -> None:
    run = Training(1, sharded=False)
    run.unet.to(memory_format=layout)  # type: ignore[call-overload]
    load_sharded(shared / "checkpoint/state", run.state())
    run.steps(SAVED, LAST)
    assert distance(run.state(), alone[0]) < TOLERANCE


def test_a_plain_file_is_read_like_shards(tmp_path: Path) -> None:
    stored = Training(0, sharded=False)
    stored.steps(0, 1)
    write_tensors(tmp_path / "state.safetensors", stored.state())
    run = Training(1, sharded=False)
    load_sharded(tmp_path / "state", run.state())
    assert distance(run.state(), stored.state()) == 0


def test_the_average_is_gathered_into_one_model(
    shared: Path, alone: tuple[dict[str, Tensor], list[float]]
) -> None:
    average = {k[8:]: v for k, v in alone[0].items() if k.startswith("average.")}
    assert distance(load_file(shared / "averaged.safetensors"), average) < TOLERANCE


def test_what_does_not_fit_is_refused_by_name(shared: Path, tmp_path: Path) -> None:
    state = Training(0, sharded=False).state()
    with pytest.raises(CheckpointError, match=r"'step.conv_in.bias'"):
        load_sharded(shared / "checkpoint/state", state | {"step.conv_in.bias": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="'unknown'"):
        load_sharded(shared / "checkpoint/state", state | {"unknown": torch.zeros(2)})
    (tmp_path / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/state.safetensors: .*too small$"):
        load_sharded(tmp_path / "state", state)
