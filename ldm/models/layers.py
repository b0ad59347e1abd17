"""The parts that the U-Net and the autoencoder share.

Parameter names are diffusers' names, so that a folder of weights opens in either.

Shapes: b pictures, c channels, h w height and width, e time embedding width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ldm.config import GradientCheckpointing

_aten: Any = torch.ops.aten
# What they give is nearly all of the time, and less than two thirds of what would be kept.
PRODUCTS = [
    _aten.convolution.default,
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


class Recomputing(nn.Module):
    """A module that can recompute its parts in the backward pass instead of keeping activations.

    Setting `gradient_checkpointing` sets it on every such module inside as well. It works in
    training mode only. True trades about a third more time for most of the memory; `selective`
    recomputes normalisations, activations and gates but keeps what products give, and trades hardly
    any time of a large network for more than a third of it.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost"; Korthikanti et al.
    2023, "Reducing activation recomputation in large transformer models", section 5.
    """

    _recompute: GradientCheckpointing = False

    @property
    def gradient_checkpointing(self) -> GradientCheckpointing:
        """Whether training recomputes activations instead of keeping them."""
        return self._recompute

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: GradientCheckpointing) -> None:
        for module in self.modules():
            if isinstance(module, Recomputing):
                module._recompute = value

    def run(self, module: nn.Module, *args: Tensor | None) -> Tensor:
        """`module(*args)`, with its activations kept or recomputed."""
        if self._recompute and self.training and torch.is_grad_enabled():
            # there is no dropout anywhere, so there is no random state to restore
            options: Any = {"use_reentrant": False, "preserve_rng_state": False}
            if self._recompute == "selective":
                options["context_fn"] = partial(create_selective_checkpoint_contexts, PRODUCTS)
            return checkpoint(module, *args, **options)
        return module(*args)


class GroupNorm(nn.GroupNorm):
    """As torch's; on a GPU as well, what comes in channels-last goes out so, and its gradient too.

    torch's gives another layout there, in which no convolution of channels-last weights computes:
    the features are copied before each, and once more in the backward pass.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`b c h w` to `b c h w`."""
        if not (input.is_cuda and input.is_contiguous(memory_format=torch.channels_last)):
            return super().forward(input)
        output = super().forward(_GradientChannelsLast.apply(input))
        return output.contiguous(memory_format=torch.channels_last)


class _GradientChannelsLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous(memory_format=torch.channels_last)


class ResnetBlock(nn.Module):
    """Two convolutions around a time embedding, plus the input.

    Args:
        in_channels: c of the input.
        out_channels: c of the output; where it differs, a 1x1 convolution carries the input over.
        embedding: e, the width of the time embedding; None for a block that knows no time.
        groups: groups of the group normalisation.
        eps: epsilon of the group normalisation.

    Source: Ho et al. 2020, appendix B.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding: int | None, groups: int, eps: float
    ):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding, out_channels) if embedding else None
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """Features `b c h w` and time embedding `b e` to features of the same height and width."""
        h = self.conv1(F.silu(self.norm1(x)))  # b c h w
        if self.time_emb_proj is not None and emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halves height and width by a convolution of stride 2.

    Args:
        channels: c, in and out.
        padding: 1 pads all four sides (U-Net); 0 pads only right and bottom (autoencoder).
    """

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w` to `b c h/2 w/2`, halves rounded up (padding 1) or down (padding 0)."""
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))  # b c h/2 w/2


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbours, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """`b c h w` to `b c 2h 2w`, or to `b c *size`."""
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # b c 2h 2w


def normalisation_of(norm: nn.GroupNorm, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """What a group normalisation comes to, `x * scale + shift`, float32 `b c 1 1` each.

    Args:
        norm: its groups and weights.
        mean: of each channel over its pixels, `b c` in float64.
        square: likewise, of the squares.
    """
    grouped = (len(mean), norm.num_groups, -1)
    mean = mean.reshape(grouped).mean(2, keepdim=True)  # b groups 1
    var = (square.reshape(grouped).mean(2, keepdim=True) - mean.square()).clamp(min=0)
    weight, bias = (p.to(mean).reshape(1, *grouped[1:]) for p in (norm.weight, norm.bias))
    scale = (var + norm.eps).rsqrt() * weight  # b groups c/groups
    shift = bias - mean * scale
    return tuple(each.float().reshape(*square.shape, 1, 1) for each in (scale, shift))  # type: ignore


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of the timestep, cosines first, in float32.

    Args:
        t: timesteps `b`, integers or any floats between them.
        width: channels out, an even number.
        max_period: of the slowest sinusoid, over 2 pi.

    Returns:
        `b width`, in [-1, 1].

    Source: Vaswani et al. 2017, section 3.5; Ho et al. 2020, appendix B.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponents)  # b width/2
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # b width


class TimestepMLP(nn.Module):
    """Two linear layers from the sinusoids `b c` to the time embedding `b e`."""

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, embedding)
        self.linear_2 = nn.Linear(embedding, embedding)

    def forward(self, x: Tensor) -> Tensor:
        """`b c` to `b e`."""
        return self.linear_2(F.silu(self.linear_1(x)))  # b e


def zero_(module: nn.Module) -> None:
    """Sets every parameter of `module` to zero, so that its residual branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
