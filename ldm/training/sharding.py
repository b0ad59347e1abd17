"""FSDP2: a U-Net's weights, gradients, averages and moments shared out over the processes.

Each process keeps one slice of every tensor (a `DTensor`, cut along its first dimension). A block's
weights are whole only while it computes: they are gathered before it, and dropped after it; its
gradients are averaged over the processes and cut up again.

Every function here, and every forward pass of a sharded network, is for all processes together.

Source: Zhao et al. 2023, "PyTorch FSDP"; `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ldm.checkpoint.io import atomic_folder
from ldm.errors import CheckpointError
from ldm.models.attention import SpatialTransformer
from ldm.models.layers import Downsample, ResnetBlock, Upsample
from ldm.models.unet import UNet

# Not the levels: they push onto a list of skips that is handed to them, and FSDP hands on a copy.
UNITS = (ResnetBlock, SpatialTransformer, Downsample, Upsample)


def shard(unet: UNet, device: torch.device) -> None:
    """Keep only this process's slices of the weights, on the device; before any optimizer is made.

    Args:
        unet: the same weights in every process, best still on the CPU: a block at a time goes to
            the device, never all of them. Compile it only afterwards.
        device: where this process computes.
    """
    unet.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  FSDP wants rows
    unet.register_forward_pre_hook(_channels_last)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in [*(m for m in unet.modules() if isinstance(m, UNITS)), unet]:
        # The root, too, is cut up after its forward: outside, parameters are always the slices.
        slices = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        slices.set_force_sum_reduction_for_comms(True)  # and divide: not every gloo can average


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, in every process; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(unet: UNet) -> UNet | None:
    """A plain copy of a sharded U-Net in the main process's CPU memory; None in the others."""
    main, weights = dist.get_rank() == 0, {}
    for name, tensor in unet.state_dict().items():  # a tensor at a time: no device holds them all
        tensor = whole(tensor)
        if main:
            weights[name] = tensor.cpu()
    if not main:
        return None
    with torch.device("meta"):
        copy = UNet(unet.config)
    copy.load_state_dict(weights, assign=True)
    return copy


@contextmanager
def shared_folder(folder: Path) -> Iterator[Path]:
    """`atomic_folder` for all processes: the main one makes it and sets it in its place.

    Leave it after `save_sharded` or another collective: what the others write must be there.
    """
    main = dist.get_rank() == 0
    with atomic_folder(folder) if main else nullcontext(folder) as temporary:
        name = [temporary]
        dist.broadcast_object_list(name)
        yield name[0]
    dist.barrier()


def save_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, each process its own slices, flushed to disk.

    Args:
        folder: on a disk that all processes share; it is made.
        tensors: sharded, or the same in every process.

    Raises:
        CheckpointError: a process cannot write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    # What is not sharded the main process writes: else it falls to any, and no two runs are alike.
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    with _in_one_line(folder):
        dcp.save(dict(tensors), storage_writer=writer, planner=planner)


def load_sharded(place: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read into tensors, sharded or not, what any number of processes wrote.

    Args:
        place: a folder of `save_sharded`, or where there is none, `place.safetensors`.
        tensors: to be overwritten.

    Raises:
        CheckpointError: the files are damaged, or hold other names or shapes.
    """
    sharded = place.is_dir()
    place = place if sharded else place.with_name(f"{place.name}.safetensors")
    reader = HuggingFaceStorageReader(str(place))
    reader.fs = FileSystem() if sharded else _OneFile()
    with _in_one_line(place):
        found = reader.read_metadata().state_dict_metadata
        stored = {k: v.size for k, v in found.items() if isinstance(v, TensorStorageMetadata)}
        wanted = {name: tensor.shape for name, tensor in tensors.items()}
        if wrong := sorted(dict(stored.items() ^ wanted.items())):
            raise CheckpointError(f"{place} does not fit: other shapes or names: {wrong[:8]}")
        dcp.load(dict(tensors), storage_reader=reader)


class _OneFile(FileSystem):
    """A file that is read as a folder of one shard."""

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [str(path)]


@contextmanager
def _in_one_line(folder: Path) -> Iterator[None]:
    """The first failure of any process, in all of them."""
    try:
        with warnings.catch_warnings(action="ignore"):  # that there is only one process
            yield
    except (CheckpointException, SafetensorError, OSError) as error:
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        raise CheckpointError(f"{folder}: {' '.join(str(causes[0]).split())}") from None


def _channels_last(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Convolutions follow the layout of what they see, the slices having none."""
    return inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]
