"""The U-Net and the autoencoder on a GPU: the fused forms, launched as one CUDA graph.

A network of this kind is hundreds of small kernels, which the CPU starts more slowly than a GPU
runs them. They are recorded at the first call with a shape and replayed at each further one.

Shapes: b pictures, k contexts a picture, c o channels in and out, h w height and width, n rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.engine.fused import FastResnet, FastUNet, Kit, fast
from ldm.engine.shapes import Network, PerShape, TwoWays
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.layers import Upsample
from ldm.models.unet import UNet

logger = logging.getLogger(__name__)

_WARM_UP = 3  # calls in which libraries choose their kernels, before the recorded one


class Graphed(PerShape):
    """A network recorded as one CUDA graph for each shape of its arguments.

    The graph computes with the weights where they lie: those that change in place count, those
    that move need a new `Graphed`. All recordings share their working memory, as never two of
    them run at a time.
    """

    _pool: Any = None  # the working memory of all recordings

    def make(self, args: tuple[Tensor | None, ...]) -> Network:
        """See `PerShape`."""
        device = next(arg.device for arg in args if arg is not None)
        # The graph reads its inputs where they are now; all of them on the device, or the copy
        # of one from the CPU would be recorded.
        inputs = [None if arg is None else _resident(arg, device) for arg in args]
        with torch.cuda.device(device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self.network(*inputs)
            current.wait_stream(stream)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # other threads, such as a web page's, may go on using the GPU meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = self.network(*inputs)

        def replay(*args: Tensor | None) -> Tensor:
            for buffer, arg in zip(inputs, args, strict=True):
                if buffer is not None and arg is not None:
                    buffer.copy_(arg, non_blocking=True)
            graph.replay()
            return output.clone()  # the next replay writes to the same place

        return replay


class Linear(nn.Module):
    """Linear layers or 1x1 convolutions of the same inputs as one product, plus `other`."""

    def __init__(self, *layers: nn.Linear | nn.Conv2d):
        super().__init__()
        self.layers = layers  # a tuple, which torch does not look into
        first, several = layers[0], len(layers) > 1
        self.weight = joined([layer.weight for layer in layers]) if several else first.weight
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.bias = joined(biases) if len(biases) > 1 else first.bias

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Rows `... c` to `... o`."""
        out = F.linear(x, self.weight.flatten(1), self.bias)
        return out if other is None else out.add_(other)


class GatedLinear(nn.Module):
    """The linear layer of a GEGLU, and its gate."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Rows `... c` to `... o/2`."""
        from ldm.engine.kernels import gated

        return gated(self.layer(x))


class Conv2d(nn.Module):
    """A convolution; plus `other`, together with its bias."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, other: Tensor | None = None, *, bias: bool = True) -> Tensor:
        """`b c h w` to `b o h w`; without its bias on demand."""
        conv = self.conv
        if other is None and bias:
            return conv(x)
        out = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
        if other is None or conv.bias is None:
            return out if other is None else out.add_(other)
        from ldm.engine.kernels import added

        return added(out, conv.bias, other)


class FastGroupNorm(nn.Module):
    """As `nn.GroupNorm` of `x + bias + shift`, and SiLU."""

    def __init__(self, norm: nn.GroupNorm, *, silu: bool = False):
        super().__init__()
        self.norm, self.silu = norm, silu

    def forward(self, x: Tensor, bias: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """`b c h w`, `c` and rows of `c` to `b c h w`."""
        from ldm.engine.kernels import group_norm

        return group_norm(x, self.norm, silu=self.silu, bias=bias, shift=shift)


class GpuResnet(FastResnet):
    """As `ResnetBlock`."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """`k*b c h w` and `b e` to `k*b o h w`."""
        h = self.conv1(self.norm1(x), bias=False)
        h = self.norm2(h, self.conv1.conv.bias, None if emb is None else emb[:, self.times])
        return self.conv2(h, self.carried(x))


def _upsample(upsample: Upsample, kit: Kit) -> Upsample:
    return upsample


KIT = Kit(Linear, GatedLinear, Conv2d, FastGroupNorm, GpuResnet, _upsample)


def prepare(network: nn.Module, make: Callable[[nn.Module], Network] | None = None) -> Any:
    """A U-Net or an autoencoder on a GPU, ready to be called as it is; see `Graphed`.

    Args:
        network: its weights become channels-last, in place, and some of them parts of larger ones.
        make: what to do to it before it is recorded; else it is fused, where Triton works.
    """
    network.to(memory_format=torch.channels_last)

    def graphed(part: nn.Module) -> Graphed:
        if make is None:
            return Graphed(fused(part) if triton_works() else part)
        return Graphed(make(part))

    return TwoWays(network, graphed) if isinstance(network, AutoencoderKL) else graphed(network)


@cache
def triton_works() -> bool:
    """Whether kernels can be built: it takes a C compiler, Python's headers and a GPU it knows."""
    try:
        from ldm.engine.kernels import gated

        gated(torch.zeros(1, 2, device="cuda"))
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        logger.info(
            "without Triton the GPU's networks are not fused, and take half as long again: %s", said
        )
        return False
    return True


def fused(network: nn.Module) -> nn.Module:
    """A U-Net, or a part of an autoencoder, of fused layers, which compute with its weights."""
    return FastUNet(network, KIT) if isinstance(network, UNet) else fast(network, KIT)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor of several, which become views of it: what changes them in place changes it."""
    whole = torch.cat([part.detach() for part in parts])
    for part, own in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = own
    return whole


def _resident(arg: Tensor, device: torch.device) -> Tensor:
    layout = torch.channels_last if arg.ndim == 4 else torch.contiguous_format
    return arg.to(device, copy=True, memory_format=layout)
