"""What training costs, before any of it is paid: operations, memory, days.

Networks run on tensors that have shapes but no numbers, so a large one takes seconds and no memory.
A FLOP is one operation: a multiplication and an addition are two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from ldm.config import UNetConfig
from ldm.models.unet import UNet

# Of a trained parameter, in float32: itself, its gradient, AdamW's two moments, its average.
WEIGHT, GRADIENT, MOMENTS, AVERAGE = 4, 4, 8, 4


@dataclass(frozen=True)
class Cost:
    """What a network costs in training.

    Attributes:
        parameters: of the network.
        forward: FLOP of the forward pass, a sample.
        total: FLOP of the forward and the backward pass, a sample.
        activations: bytes that the forward pass keeps for the backward pass, a sample.
        copies: bytes that it keeps however many samples there are: weights in half precision.
    """

    parameters: int
    forward: int
    total: int
    activations: int
    copies: int

    def memory(self, samples: int, *, shared_by: int = 1, ema: bool = True) -> int:
        """Bytes on a device in training, less what single operations need for a moment.

        Args:
            samples: that the device takes at a time.
            shared_by: devices over which weights, gradients and optimizer are shared out (FSDP2).
            ema: whether there is an average of the weights.
        """
        state = self.parameters * (WEIGHT + GRADIENT + MOMENTS + AVERAGE * ema)
        return state // shared_by + self.copies + samples * self.activations


def measure(
    make: Callable[[], nn.Module],
    inputs: Callable[[int], tuple[Tensor, ...]],
    *,
    half: bool = False,
) -> Cost:
    """The cost of training a network, of which `forward` is that of using it.

    Args:
        make: the network.
        inputs: what it is called with for so many samples.
        half: compute in 16 bits as `mixed_precision` does, by a CPU's rules; a GPU keeps some more
            in float32.
    """
    with FakeTensorMode():
        module = make()
        forward, total, one = _run(module, inputs(1), half)
        two = _run(module, inputs(2), half)[2]
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Cost(parameters, forward, total, two - one, 2 * one - two)


def unet_cost(
    config: UNetConfig,
    height: int,
    width: int,
    *,
    tokens: int = 77,
    half: bool = False,
    gradient_checkpointing: bool = False,
) -> Cost:
    """The cost of training a U-Net.

    Args:
        config: of the U-Net.
        height: of the latents.
        width: likewise.
        tokens: of a prompt.
        half: as of `measure`.
        gradient_checkpointing: recompute activations instead of keeping them.
    """

    def make() -> UNet:
        unet = UNet(config)
        unet.gradient_checkpointing = gradient_checkpointing
        return unet.train()

    def inputs(b: int) -> tuple[Tensor, ...]:
        context = torch.empty(b, tokens, config.cross_attention_dim)
        return torch.empty(b, config.in_channels, height, width), torch.zeros(b), context

    return measure(make, inputs, half=half)


def days(samples: float, flop: float, devices: int, peak: float, utilisation: float) -> float:
    """How long training takes: samples x FLOP / (devices x peak x utilisation).

    Args:
        samples: seen in all: steps x batch.
        flop: a sample, of everything that is computed for it.
        devices: that share the work.
        peak: FLOP a second that a device is said to reach in the precision used.
        utilisation: how much of it training does reach, in (0, 1]; 0.3 is usual.
    """
    return samples * flop / (devices * peak * utilisation) / 86400


def flop_counter() -> FlopCounterMode:
    """Counts matrix products, convolutions and attention, a multiplication and an addition as two.

    Attention on a CPU is named here because torch counts it from 2.15 on.
    """

    def forward(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    aten: Any = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=attention)


def _run(module: nn.Module, inputs: tuple[Tensor, ...], half: bool) -> tuple[int, int, int]:
    """FLOP of the forward pass, of both passes, and bytes kept between them."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}  # by storage: several operations may keep the same one

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in own:
            kept[storage] = tensor
        return tensor

    with flop_counter() as counter:
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = module(*inputs)
        forward = counter.get_total_flops()
        output.sum().backward()
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return forward, counter.get_total_flops(), size
