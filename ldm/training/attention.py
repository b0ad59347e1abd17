"""Attention of bfloat16 on a CPU, whose backward pass takes torch long."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ldm.engine import native
from ldm.models.attention import Attention
from ldm.models.layers import PRODUCTS
from ldm.processor import maker

_LONG = 1024  # keys from which torch's backward pass is not slow on AMD's processors


def hasten_attention(network: nn.Module) -> None:
    """Let every attention in a network that trains in bfloat16 on a CPU go the shorter way."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.attend = attend


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v, of queries `b heads n c` and keys and values `b heads m c`.

    In bfloat16 by attention.c where that is built and pays. Else forward by torch's, and backward
    by torch's of float32 but where that takes longer. The gradients of either are nearer to the
    truth than torch's of bfloat16.
    """
    shared_out = len(q) * q.shape[1] >= torch.get_num_threads()  # backward, a thread takes a head
    if shared_out and native.fits(q, k, v):
        return _attention(q, k, v)[0]
    slow = q.requires_grad and q.dtype == torch.bfloat16
    if slow and not (k.shape[2] >= _LONG and maker() == "AuthenticAMD"):
        return _BackwardInFloat32.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


@torch.library.custom_op("ldm::attention", mutates_args=(), device_types="cpu")
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """An operator of torch's, so that selective checkpointing can keep what it gives."""
    return native.attend_forward(q, k, v)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


@once_differentiable
def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return native.attend_backward(grad, *ctx.saved_tensors)


_attention.register_autograd(_backward, setup_context=_keep)
PRODUCTS.append(torch.ops.ldm.attention.default)


class _BackwardInFloat32(torch.autograd.Function):
    """Attention of bfloat16, whose backward pass takes torch two to eight times as long as that of
    float32; but for long sequences on AMD's processors, where it takes two thirds of that."""

    @staticmethod
    def forward(ctx: Any, *qkv: Tensor) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv)
        ctx.save_for_backward(*qkv, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        saved = [tensor.float() for tensor in (*grads, *ctx.saved_tensors)]
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return tuple(grad.bfloat16() for grad in backward(*saved, 0.0, False))
