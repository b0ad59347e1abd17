"""The U-Net in fewer and larger operations: the plain mathematics, of the layers of one device.

Features are channels-last, so that pixels in a row are a view of them. Products of the same inputs
are one: queries, keys and values; the keys and values of all layers, of the text; the time's
projections of all blocks. What both halves of guidance share is computed once for both.

Shapes: b pictures, k contexts a picture, c channels, h w height and width, n pixels in a row,
m d tokens and width of the context, e time embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import (
    Attention,
    PixelAttention,
    SpatialTransformer,
    TransformerBlock,
    to_map,
    to_rows,
)
from ldm.models.layers import ResnetBlock, Upsample, timestep_embedding
from ldm.models.unet import UNet

Make = Callable[..., Any]


@dataclass(frozen=True)
class Kit:
    """The layers that a device is fast with; each is made of plain ones, whose weights it uses.

    Attributes:
        linear: of linear layers or 1x1 convolutions of the same inputs, their outputs one after the
            other; called with rows, and optionally `other`, which it adds.
        gated: of the linear layer of a GEGLU: its first half times GELU of the second.
        conv: of a convolution; `other` likewise.
        norm: of a group normalisation; with `silu`, SiLU follows.
        resnet: of a `ResnetBlock`, and the kit; a `FastResnet`.
        upsample: of an `Upsample`, and the kit.
        attend: attention of queries, keys and values, `b heads n c` each.
    """

    linear: Make
    gated: Make
    conv: Make
    norm: Make
    resnet: Make
    upsample: Make
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention


class FastAttention(nn.Module):
    """As `Attention`, plus what comes in; the text's keys and values are all layers', of which
    `part` are its own."""

    def __init__(self, attention: Attention, kit: Kit, *, text: bool = False):
        super().__init__()
        self.heads, self.attend = attention.heads, kit.attend
        q, k, v = attention.to_q, attention.to_k, attention.to_v
        self.to_q = kit.linear(q) if text else kit.linear(q, k, v)
        self.text = (k, v) if text else ()  # a tuple, which torch does not look into
        self.part = slice(0)
        self.to_out = kit.linear(attention.to_out[0])

    def forward(self, x: Tensor, other: Tensor, texts: Tensor | None = None) -> Tensor:
        """Rows `b n c`, which attend to themselves or to `b m ...`; plus `other`, `b n c`."""
        if texts is None:
            q, k, v = self._split(self.to_q(x), 3)
        else:
            (q,), (k, v) = self._split(self.to_q(x), 1), self._split(texts[..., self.part], 2)
        out = self.attend(q, k, v)  # b heads n c/heads
        return self.to_out(out.transpose(1, 2).flatten(2), other=other)  # b n c

    def _split(self, rows: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`b n parts*c` to `b heads n c/heads` each."""
        b, n, _ = rows.shape
        return rows.view(b, n, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()


class FastBlock(nn.Module):
    """As `TransformerBlock`."""

    def __init__(self, block: TransformerBlock, kit: Kit):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn1 = FastAttention(block.attn1, kit)
        self.attn2 = FastAttention(block.attn2, kit, text=True)
        gated: Any = block.ff.net[0]
        self.gated = kit.gated(gated.proj)
        self.out = kit.linear(block.ff.net[2])

    def forward(self, x: Tensor, texts: Tensor) -> Tensor:
        """Pixels `b n c` and texts `k*b m ...` to pixels `k*b n c`."""
        x = self.attn1(self.norm1(x), x)
        x = repeated(x, len(texts))
        x = self.attn2(self.norm2(x), x, texts)
        return self.out(self.gated(self.norm3(x)), other=x)


class FastTransformer(nn.Module):
    """As `SpatialTransformer`, whose 1x1 convolutions are linear layers here."""

    def __init__(self, transformer: SpatialTransformer, kit: Kit):
        super().__init__()
        self.norm = kit.norm(transformer.norm)
        self.proj_in = kit.linear(transformer.proj_in)
        blocks: Any = transformer.transformer_blocks
        self.blocks = nn.ModuleList(FastBlock(block, kit) for block in blocks)
        self.proj_out = kit.linear(transformer.proj_out)

    def forward(self, x: Tensor, texts: Tensor) -> Tensor:
        """Features `b c h w` and texts `k*b m ...` to features `k*b c h w`."""
        rows = self.proj_in(to_rows(self.norm(x)))  # b n c
        for block in self.blocks:
            rows = block(rows, texts)
        out = self.proj_out(rows, other=repeated(to_rows(x), len(texts)))
        return to_map(out, x.shape[-2:])  # k*b c h w


class FastPixelAttention(nn.Module):
    """As `PixelAttention`."""

    def __init__(self, attention: PixelAttention, kit: Kit):
        super().__init__()
        self.norm = kit.norm(attention.group_norm)
        self.attention = FastAttention(attention, kit)

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w` to `b c h w`."""
        return to_map(self.attention(to_rows(self.norm(x)), to_rows(x)), x.shape[-2:])


class FastResnet(nn.Module):
    """The parts of a `ResnetBlock`, for a device to compute with.

    Its `emb` are the time projections of all blocks, `times` its own part of them.
    """

    def __init__(self, block: ResnetBlock, kit: Kit):
        super().__init__()
        self.norm1, self.norm2 = (kit.norm(norm, silu=True) for norm in (block.norm1, block.norm2))
        self.times = slice(0)
        self.conv1, self.conv2 = kit.conv(block.conv1), kit.conv(block.conv2)
        shortcut = block.conv_shortcut
        self.shortcut = None if shortcut is None else kit.linear(shortcut)

    def carried(self, x: Tensor) -> Tensor:
        """The input as it is added to what the block makes of it, `b o h w`."""
        if self.shortcut is None:
            return x
        return self.shortcut(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FastUNet(nn.Module):
    """As `UNet`, whose levels it runs, made of the fast parts."""

    def __init__(self, unet: UNet, kit: Kit):
        super().__init__()
        self.width = unet.conv_in.out_channels
        blocks = [part for part in unet.modules() if isinstance(part, ResnetBlock)]
        self.time = kit.linear(*(block.time_emb_proj for block in blocks))
        self.unet: Any = fast(unet, kit)
        parts: Any = list(self.unet.modules())
        # in the order in which `blocks` are, which is that of both networks' modules
        resnets = [part for part in parts if isinstance(part, FastResnet)]
        place(resnets, "times", [block.conv1.out_channels for block in blocks])
        readers = [part for part in parts if isinstance(part, FastAttention) and part.text]
        self.text = kit.linear(*(layer for part in readers for layer in part.text))
        place(readers, "part", [sum(layer.out_features for layer in p.text) for p in readers])

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Arguments and result as `UNet.forward`."""
        rows, t = len(context), t.to(x.device).expand(len(x))
        if class_labels is not None:
            x, t = repeated(x, rows), repeated(t, rows)
        return self.predict(x, t, self.text(context), class_labels)

    def predict(
        self, x: Tensor, t: Tensor, texts: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """What it predicts.

        Args:
            x: noisy latents `b c h w`.
            t: timesteps `b`, or one for all.
            texts: keys and values of all layers, `k*b m ...`.
            class_labels: none, or `b`, and k is 1.
        """
        unet, rows = self.unet, len(texts)
        emb = unet.time_embedding(timestep_embedding(t, self.width).to(x.dtype))  # b e
        if unet.class_embedding is not None:
            table = unet.class_embedding
            emb = emb + (table.weight[-1] if class_labels is None else table(class_labels))
        emb = self.time(F.silu(emb))  # b, the channels of all blocks
        x = unet.conv_in(x)  # b c h w
        skips = [x]
        for level in unet.down_blocks:
            x = level(x, emb, texts, skips)  # k*b 2c h/2 w/2
        x = unet.mid_block(x, emb, texts)
        skips = [repeated(skip, rows) for skip in skips]
        for level in unet.up_blocks:
            x = level(x, emb, texts, skips)  # k*b c/2 2h 2w
        return unet.conv_out(F.silu(unet.conv_norm_out(x), inplace=True))  # k*b out h w


def fast(module: nn.Module, kit: Kit) -> nn.Module:
    """A copy of a network, or of a part of one, in which what is slow is its fast twin."""
    match module:
        case ResnetBlock():
            return kit.resnet(module, kit)
        case SpatialTransformer():
            return FastTransformer(module, kit)
        case PixelAttention():
            return FastPixelAttention(module, kit)
        case Upsample():
            return kit.upsample(module, kit)
        case nn.GroupNorm():
            return kit.norm(module)
        case nn.Conv2d():
            return kit.conv(module)
        case nn.Linear():
            return kit.linear(module)
    twin = copy(module)
    twin._modules = {
        name: None if part is None else fast(part, kit) for name, part in module._modules.items()
    }
    return twin


def place(parts: list[Any], name: str, widths: list[int]) -> None:
    """Tell each part where in a row its own outputs are, one after the other."""
    start = 0
    for part, width in zip(parts, widths, strict=True):
        setattr(part, name, slice(start, start := start + width))


def repeated(x: Tensor, rows: int) -> Tensor:
    """A batch as often as makes so many rows: the pictures, once for each of their contexts."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))  # keeps channels last
