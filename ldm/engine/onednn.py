"""Layers on a CPU: each product by the library that is faster at its size, and what follows it
done while it is in cache.

oneDNN packs a weight once, for a shape of the input, and adds a residual or a gate as it writes
the result. In float32 it is behind torch's plain product where a product is small. Its operators
are private to torch, which made them for its own compiler: this module alone knows them, and does
without where they are missing.

Shapes: b pictures, c o channels in and out, h w height and width, n rows.
"""

from __future__ import annotations

from functools import cache
from threading import Lock
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.memory import drop_pages, free_blocks

_ops: Any = torch.ops.mkldnn
_OPERATORS = (
    "_reorder_linear_weight",
    "_linear_pointwise",
    "_reorder_convolution_weight",
    "_convolution_pointwise",
    "_convolution_pointwise_",
)
# Multiplications from which oneDNN pays in a linear layer of float32, measured on AVX-512.
_LARGE = 2**26


@cache
def available(dtype: torch.dtype) -> bool:
    """Whether this torch has the operators, and this CPU the dtype."""
    if not torch.backends.mkldnn.is_available() or not all(hasattr(_ops, n) for n in _OPERATORS):
        return False
    half = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype == torch.float32 or (dtype in half and getattr(_ops, half[dtype])())


class Packed(nn.Module):
    """The weights of plain layers, one below the other, packed when they are first used.

    Args:
        layers: `nn.Linear` or `nn.Conv2d`, of the same inputs.
    """

    def __init__(self, *layers: nn.Linear | nn.Conv2d):
        super().__init__()
        self._layers, self._taken = layers, False  # in a tuple, which torch does not look into
        self._unread = [layer.weight.detach() for layer in layers]  # until `fit` reads them
        self.shapes = [weight.shape for weight in self._unread]
        self.packs = available(self._unread[0].dtype)
        self.outputs = sum(shape[0] for shape in self.shapes)
        # What the weight is packed for, and the weight: in one, for threads at the same time.
        self._fit: tuple[object, Tensor] = ("nothing", self._unread[0])
        self._lock = Lock()
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None

    def take(self) -> None:
        """Leave the layers without weights until `give_back`: memory then holds them once."""
        self._taken = True
        for layer in self._layers:
            layer.weight.data = layer.weight.new_empty(0)

    def arrange(self, weight: Tensor) -> Tensor:
        """A plain weight, contiguous as the products read it."""
        raise NotImplementedError

    def fit(self, shape: object) -> Tensor:
        """The weight packed for a shape ("any" for a linear layer), or plain for None."""
        found, weight = self._fit
        return weight if found == shape else self._refit(shape)

    def _refit(self, shape: object) -> Tensor:
        with self._lock:
            found, weight = self._fit
            if found == shape:
                return weight
            if unread := self._unread:
                weight = self.arrange(torch.cat(unread) if len(unread) > 1 else unread[0])
                if weight.data_ptr() % 64:  # as files have them: MKL adds up in another order then
                    weight = weight.clone()
            plain = weight.to_dense() if weight.is_mkldnn else weight
            weight = plain if shape is None else self.pack(plain, shape)
            self._fit = (shape, weight)
            self._unread = []  # only now: what is interrupted before has lost nothing
            for each in unread if self._taken else ():
                if weight.is_mkldnn or weight.data_ptr() != each.data_ptr():
                    drop_pages(each)
            if not unread:
                free_blocks()  # where the weight has been, before the next one moves
            return weight

    def pack(self, weight: Tensor, shape: Any) -> Tensor:
        """An arranged weight in oneDNN's layout for a shape."""
        raise NotImplementedError

    def give_back(self) -> None:
        """Return the weights that were taken, to the bit; this module cannot compute any more."""
        if self._taken:
            weight, first = self.fit(None), self.shapes[0]
            if weight.ndim < len(first):  # a 1x1 convolution as a linear layer
                weight = weight[:, :, None, None]
            parts = weight.split([shape[0] for shape in self.shapes])
            for layer, part in zip(self._layers, parts, strict=True):
                layer.weight.data = part.clone(memory_format=torch.contiguous_format)
            self._taken, self._fit = False, (None, weight.new_empty(0))


class Linear(Packed):
    """`x @ weight.T + bias`, of linear layers or of 1x1 convolutions."""

    def arrange(self, weight: Tensor) -> Tensor:
        return weight.flatten(1).contiguous()

    def pack(self, weight: Tensor, shape: Any) -> Tensor:
        return _ops._reorder_linear_weight(weight)

    def forward(
        self,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        gelu: bool = False,
        other: Tensor | None = None,
        binary: Literal["add", "mul"] = "add",
    ) -> Tensor:
        """Rows `... c` to `... o`; then GELU, or added to or multiplied by `other`.

        `bias` stands in for the layer's own.
        """
        bias = self.bias if bias is None else bias
        small = x.dtype == torch.float32 and x.numel() * self.outputs < _LARGE
        if small or not self.packs:
            out = F.linear(x, self.fit(None), bias)
            out = F.gelu(out) if gelu else out
            return out if other is None else getattr(torch, binary)(out, other)
        weight = self.fit("any")
        if other is not None:
            return _ops._linear_pointwise.binary(x, other, weight, bias, binary)
        kind, how = ("gelu", "none") if gelu else ("none", "")
        return _ops._linear_pointwise(x, weight, bias, kind, [], how)


class GatedLinear(nn.Module):
    """The first half of a linear layer's outputs, times GELU of the second."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        halves = [nn.Linear(1, 1, device="meta") for _ in range(2)]
        weights, biases = layer.weight.detach().chunk(2), layer.bias.detach().chunk(2)
        for half, weight, bias in zip(halves, weights, biases, strict=True):
            half.weight, half.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
        self.value, self.gate = (Linear(half) for half in halves)
        self._layers, self._taken = (layer, *halves), False

    def forward(self, x: Tensor) -> Tensor:
        """Rows `... c` to `... o/2`."""
        return self.value(x, other=self.gate(x, gelu=True), binary="mul")

    def take(self) -> None:
        """As `Packed.take`."""
        self._taken = True
        self.value.take()
        self.gate.take()
        layer, *_ = self._layers
        layer.weight.data = layer.weight.new_empty(0)

    def give_back(self) -> None:
        """As `Packed.give_back`."""
        if self._taken:
            self.value.give_back()
            self.gate.give_back()
            layer, *halves = self._layers
            layer.weight.data = torch.cat([half.weight.detach() for half in halves])
            self._taken = False


class Conv2d(Packed):
    """A convolution, channels last."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(conv)
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)

    def arrange(self, weight: Tensor) -> Tensor:
        return weight.contiguous(memory_format=torch.channels_last)

    def pack(self, weight: Tensor, shape: Any) -> Tensor:
        # for this very shape: a weight packed for another one takes oneDNN 40 times as long
        return _ops._reorder_convolution_weight(weight, *self.geometry, shape)

    def forward(
        self,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        other: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """`b c h w` to `b o h w`; plus `other`, of the result's shape.

        With `inplace` the sum may be written over `other`. `bias` as `Linear`'s.
        """
        bias = self.bias if bias is None else bias
        x = x.contiguous(memory_format=torch.channels_last)
        padding, stride, dilation, groups = self.geometry
        if not self.packs:
            out = F.conv2d(x, self.fit(None), bias, stride, padding, dilation, groups)
            return out if other is None else out.add_(other)
        given = (self.fit(x.shape), bias, padding, stride, dilation, groups)
        if other is None:
            return _ops._convolution_pointwise(x, *given, "none", [], "")
        how = ("add", None, None, [], None)
        if inplace:
            return _ops._convolution_pointwise_.binary(other, x, *given, *how)
        return _ops._convolution_pointwise.binary(x, other, *given, *how)
