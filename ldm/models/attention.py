"""Attention between pixels, and from pixels to text.

Shapes: b pictures, c channels, h w height and width, n = h*w pixels in a row, m tokens of context,
d width of the context.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.models.layers import GroupNorm


class Attention(nn.Module):
    """Multi-head attention: from the pixels to themselves, or to a context.

    Args:
        width: c, in and out; `heads` must divide it.
        heads: number of heads.
        context_width: d, the width of what is attended to; None for self-attention.
        qkv_bias: whether the three projections have a bias.

    Attributes:
        attend: softmax(q k^T / sqrt(c)) v, of queries `b heads n c` and keys and values
            `b heads m c`, with c of one head.

    Source: Vaswani et al. 2017, equation 1; Rombach et al. 2022, section 3.3.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(
        F.scaled_dot_product_attention
    )

    def __init__(
        self, width: int, heads: int, context_width: int | None = None, *, qkv_bias: bool = False
    ):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k = nn.Linear(context_width or width, width, bias=qkv_bias)
        self.to_v = nn.Linear(context_width or width, width, bias=qkv_bias)
        # a list of one, because the files call this layer `to_out.0`
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Pixels `b n c`, attending to context `b m d` or, without it, to themselves."""
        context = x if context is None else context
        q, k, v = (
            rearrange(rows, "b n (heads c) -> b heads n c", heads=self.heads)
            for rows in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = self.attend(q, k, v)  # b heads n c/heads
        return self.to_out(rearrange(out, "b heads n c -> b n (heads c)"))  # b n c


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020, equation 6)."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        """`b n c` to `b n out`."""
        x, gate = self.proj(x).chunk(2, dim=-1)  # b n out, b n out
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers with a GEGLU between them, four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        # the identity stands where the files count a dropout
        self.net = nn.Sequential(
            GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`b n c` to `b n c`."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pixels look at each other, then at the text, then each thinks for itself.

    Source: Rombach et al. 2022, appendix E.2.1.
    """

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Pixels `b n c` and context `b m d` to pixels `b n c`."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, plus the input.

    Args:
        width: c, in and out.
        heads: attention heads.
        context_width: d.
        depth: number of transformer blocks.
        groups: groups of the group normalisation.
        linear: linear layers around the blocks (SD 2.x), else 1x1 convolutions (SD 1.x). The same
            mathematics; the files differ in the shape of the weights.

    Source: Rombach et al. 2022, appendix E.2.1.
    """

    def __init__(
        self, width: int, heads: int, context_width: int, depth: int, groups: int, *, linear: bool
    ):
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, width, 1e-6)
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, context_width) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Features `b c h w` and context `b m d` to features `b c h w`."""
        hw = x.shape[-2:]
        h = self.norm(x)  # b c h w
        h = self.proj_in(to_rows(h)) if self.linear else to_rows(self.proj_in(h))  # b n c
        for block in self.transformer_blocks:
            h = block(h, context)
        h = to_map(self.proj_out(h), hw) if self.linear else self.proj_out(to_map(h, hw))
        return x + h  # b c h w


class PixelAttention(Attention):
    """One head of self-attention over the pixels of a feature map, plus the input.

    Source: Esser et al. 2021, appendix A: the attention of the VQGAN's lowest resolution.
    """

    def __init__(self, width: int, groups: int):
        super().__init__(width, heads=1, qkv_bias=True)
        self.group_norm = GroupNorm(groups, width, 1e-6)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`b c h w` to `b c h w`."""
        h = super().forward(to_rows(self.group_norm(x)), context)  # b n c
        return x + to_map(h, x.shape[-2:])  # b c h w


def to_rows(x: Tensor) -> Tensor:
    """Feature map `b c h w` to pixels in a row `b h*w c`; no copy where x is channels-last."""
    return x.flatten(2).transpose(1, 2)  # b h*w c


def to_map(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Pixels in a row `b h*w c` to a feature map `b c h w`, `size` being h and w."""
    return x.transpose(1, 2).unflatten(2, size)  # b c h w
