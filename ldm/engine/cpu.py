"""The U-Net and the autoencoder on a CPU: the plain mathematics, in fewer and larger operations.

Features are channels-last, so that pixels in a row are a view of them. Weights are packed for
oneDNN, which adds residuals, gates and activations while a product is in cache. What depends on
the text alone is computed once a prompt, what on the time alone once a step, and what both halves
of guidance share once for both.

Shapes: b pictures, k contexts a picture, c channels, h w height and width, n pixels in a row,
m d tokens and width of the context, e time embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.engine.onednn import Conv2d, GatedLinear, Linear, Packed
from ldm.memory import free_blocks, keep_large_blocks, put_aside
from ldm.models.attention import (
    Attention,
    PixelAttention,
    SpatialTransformer,
    TransformerBlock,
    to_map,
    to_rows,
)
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.models.layers import ResnetBlock, Upsample, normalisation_of, timestep_embedding
from ldm.models.unet import UNet


class Prepared(nn.Module):
    """A fast form, which may take the plain network's weights."""

    def take(self) -> None:
        """Leave the plain network without the weights that this form computes with."""
        for part in self.modules():
            if isinstance(part, Packed | GatedLinear):
                part.take()

    def give_back(self) -> None:
        """Return the weights that were taken; this form cannot compute any more."""
        for part in self.modules():
            if isinstance(part, Packed | GatedLinear):
                part.give_back()


class FastGroupNorm(nn.Module):
    """As `nn.GroupNorm`, of large channels-last pictures as exact as of others.

    torch sums up the squares of such a picture in float32, of which the digits after the fourth
    are lost at 512x512. Here each row of pixels is summed up alone, and the rows in float64.
    """

    LARGE = 64 * 64  # pixels; up to here torch's is exact enough, and faster

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w` to `b c h w`."""
        h, w = x.shape[2:]
        if x.dtype != torch.float32 or h * w <= self.LARGE:
            return self.norm(x)
        rows = x.permute(0, 2, 3, 1)  # b h w c
        mean = rows.mean(2).double().mean(1)  # b c
        square = torch.linalg.vector_norm(rows, dim=2).double().square().mean(1) / w
        scale, shift = normalisation_of(self.norm, mean, square)
        return torch.addcmul(shift, x, scale)


class FastResnet(nn.Module):
    """As `ResnetBlock`; its `emb` are the time projections of all blocks, `times` its own part."""

    def __init__(self, block: ResnetBlock):
        super().__init__()
        self.norm1, self.norm2 = FastGroupNorm(block.norm1), FastGroupNorm(block.norm2)
        self.times = slice(0)
        self.conv1 = Conv2d(block.conv1)
        self.conv2 = Conv2d(block.conv2)
        shortcut = block.conv_shortcut
        self.shortcut = None if shortcut is None else Linear(shortcut)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """`b c h w` and `b e`, or `1 e` for all pictures, to `b o h w`."""
        h = F.silu(self.norm1(x), inplace=True)
        if emb is None:
            h = self.conv1(h)
        elif len(emb) == 1:  # the time takes the place of the convolution's bias, which it contains
            h = self.conv1(h, bias=emb[0, self.times])
        else:
            rows = repeated(emb[:, self.times], len(x))
            h = self.conv1(h, bias=torch.zeros_like(rows[0])).add_(rows[:, :, None, None])
        if self.shortcut is not None:
            x = self.shortcut(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        h = F.silu(self.norm2(h), inplace=True)  # in h again, which frees the map it was
        return self.conv2(h, other=x)


class FastUpsample(nn.Module):
    """Nearest neighbours and a 3x3 convolution, as four 2x2 convolutions of the small picture.

    Of the nine pixels that the convolution sees after doubling, those from the same small pixel
    meet sums of its weights: 4/9 of the products. The four are one convolution of four times the
    outputs, of which each takes its own window.
    """

    def __init__(self, upsample: Upsample):
        super().__init__()
        self.plain = upsample  # for odd sizes, and as the keeper of the weights
        weight = upsample.conv.weight.detach()  # o c 3 3
        o, c = weight.shape[:2]
        # Even rows see the small row above, and their own twice; odd rows their own, and below.
        even = torch.tensor([[1.0, 0, 0], [0, 1, 1]], dtype=torch.float64)
        odd = torch.tensor([[1.0, 1, 0], [0, 0, 1]], dtype=torch.float64)
        sums = torch.stack([even, odd])  # phase, small, large
        phases = torch.einsum("pis,qjt,ocst->pqocij", sums, sums, weight.double())
        with torch.device("meta"):
            small = nn.Conv2d(c, 4 * o, 2, padding=1)
        small.weight = nn.Parameter(phases.reshape(4 * o, c, 2, 2).to(weight), requires_grad=False)
        bias: Any = upsample.conv.bias
        small.bias = nn.Parameter(bias.detach().repeat(4), requires_grad=False)
        self.conv = Conv2d(small)
        self.conv.take()
        put_aside(weight)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """`b c h w` to `b o 2h 2w`, or to `b o *size`."""
        b, _, h, w = x.shape
        if size is not None and tuple(size) != (2 * h, 2 * w):
            return self.plain(x, size)
        windows = self.conv(x).permute(0, 2, 3, 1).unflatten(-1, (2, 2, -1))  # b h+1 w+1 2 2 o
        out = windows.new_empty(b, h, 2, w, 2, windows.shape[-1])
        for p in (0, 1):
            for q in (0, 1):
                out[:, :, p, :, q] = windows[:, p : p + h, q : q + w, p, q]
        return out.view(b, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)  # b o 2h 2w


class FastAttention(nn.Module):
    """As `Attention`, plus what comes in; the text's keys and values are kept for its next call."""

    def __init__(self, attention: Attention, *, text: bool = False):
        super().__init__()
        self.heads = attention.heads
        q, k, v = attention.to_q, attention.to_k, attention.to_v
        self.to_q = Linear(q) if text else Linear(q, k, v)
        self.to_kv = Linear(k, v) if text else None
        self.to_out = Linear(attention.to_out[0])  # type: ignore[arg-type]
        # (context, its keys, its values): in one, for threads that draw at the same time
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Tensor, other: Tensor, context: Tensor | None = None) -> Tensor:
        """Rows `b n c`, which attend to themselves or to `b m d`; plus `other`, `b n c`."""
        if self.to_kv is None or context is None:
            q, k, v = self._split(self.to_q(x), 3)
        else:
            kept = self._kept
            if kept is None or kept[0] is not context:
                k, v = self._split(self.to_kv(context), 2)
                kept = self._kept = (context, k, v)
            (q,), (_, k, v) = self._split(self.to_q(x), 1), kept
        out = F.scaled_dot_product_attention(q, k, v)  # b heads n c/heads
        return self.to_out(out.transpose(1, 2).flatten(2), other=other)  # b n c

    def _split(self, rows: Tensor, parts: int) -> tuple[Tensor, ...]:
        """`b n parts*c` to `b heads n c/heads` each."""
        b, n, _ = rows.shape
        return rows.view(b, n, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()


class FastBlock(nn.Module):
    """As `TransformerBlock`."""

    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn1 = FastAttention(block.attn1)
        self.attn2 = FastAttention(block.attn2, text=True)
        gated: Any = block.ff.net[0]
        self.gated = GatedLinear(gated.proj)
        self.out = Linear(block.ff.net[2])  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Pixels `b n c` and contexts `k*b m d` to pixels `k*b n c`."""
        x = self.attn1(self.norm1(x), x)
        x = repeated(x, len(context))
        x = self.attn2(self.norm2(x), x, context)
        return self.out(self.gated(self.norm3(x)), other=x)


class FastTransformer(nn.Module):
    """As `SpatialTransformer`, whose 1x1 convolutions are linear layers here."""

    def __init__(self, transformer: SpatialTransformer):
        super().__init__()
        self.norm = FastGroupNorm(transformer.norm)
        self.proj_in = Linear(transformer.proj_in)
        blocks: Any = transformer.transformer_blocks
        self.blocks = nn.ModuleList(FastBlock(block) for block in blocks)
        self.proj_out = Linear(transformer.proj_out)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Features `b c h w` and contexts `k*b m d` to features `k*b c h w`."""
        rows = self.proj_in(to_rows(self.norm(x)))  # b n c
        for block in self.blocks:
            rows = block(rows, context)
        out = self.proj_out(rows, other=repeated(to_rows(x), len(context)))
        return to_map(out, x.shape[-2:])  # k*b c h w


class FastPixelAttention(nn.Module):
    """As `PixelAttention`."""

    def __init__(self, attention: PixelAttention):
        super().__init__()
        self.norm = FastGroupNorm(attention.group_norm)
        self.attention = FastAttention(attention)

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w` to `b c h w`."""
        return to_map(self.attention(to_rows(self.norm(x)), to_rows(x)), x.shape[-2:])


class FastUNet(Prepared):
    """As `UNet`, whose levels it runs, made of the fast parts."""

    def __init__(self, unet: UNet):
        super().__init__()
        blocks: Any = [m for m in unet.modules() if isinstance(m, ResnetBlock)]
        self.time = Linear(*(block.time_emb_proj for block in blocks))
        # with the biases of the convolutions, whose place the time takes
        sums = [b.time_emb_proj.bias.double() + b.conv1.bias.double() for b in blocks]
        self.time.bias = torch.cat(sums).detach().to(blocks[0].conv1.bias.dtype)
        self.unet: Any = fast(unet)
        start = 0
        for part in (m for m in self.unet.modules() if isinstance(m, FastResnet)):
            part.times = slice(start, start := start + part.conv1.outputs)
        self._context: Tensor | None = None

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Arguments and result as `UNet.forward`."""
        return without_gradients(self._forward, x, t, context, class_labels)

    def _forward(
        self, x: Tensor, t: Tensor, context: Tensor, class_labels: Tensor | None
    ) -> Tensor:
        unet, rows = self.unet, len(context)
        t = t.to(x.device).expand(len(x))
        if class_labels is not None:
            x, t = repeated(x, rows), repeated(t, rows)
        elif (t == t[0]).all():
            t = t[:1]
        emb = timestep_embedding(t, unet.conv_in.shapes[0][0])  # b c
        emb = unet.time_embedding(emb.to(x.dtype))  # b e
        if unet.class_embedding is not None:
            table = unet.class_embedding
            emb = emb + (table.weight[-1] if class_labels is None else table(class_labels))
        emb = self.time(F.silu(emb))  # b, the channels of all blocks
        context = self._known(context)

        x = unet.conv_in(x)  # b c h w
        skips = [x]
        for level in unet.down_blocks:
            x = level(x, emb, context, skips)  # k*b 2c h/2 w/2
        x = unet.mid_block(x, emb, context)
        skips = [repeated(skip, rows) for skip in skips]
        for level in unet.up_blocks:
            x = level(x, emb, context, skips)  # k*b c/2 2h 2w
        return unet.conv_out(F.silu(unet.conv_norm_out(x), inplace=True))  # k*b out h w

    def _known(self, context: Tensor) -> Tensor:
        """The same tensor for the same numbers, by which the layers know what they have kept."""
        known = self._context
        if known is None or known.shape != context.shape or not torch.equal(known, context):
            known = self._context = context.clone()
        return known


class FastAutoencoder(Prepared):
    """As `AutoencoderKL`, which it runs, made of the fast parts."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae: Any = fast(vae)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """As `AutoencoderKL.encode`."""
        return DiagonalGaussian.from_moments(without_gradients(self._moments, images))

    def _moments(self, images: Tensor) -> Tensor:
        return self.vae.quant_conv(self.vae.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """As `AutoencoderKL.decode`."""
        free_blocks()  # the U-Net's, before the largest moment of a picture
        return without_gradients(self.vae.decode, latents)


def prepare(network: nn.Module) -> Prepared:
    """The fast form of a U-Net or an autoencoder, whose weights stay where they are until `take`.

    Nothing in it has gradients: call it where they are off.
    """
    keep_large_blocks()
    if isinstance(network, AutoencoderKL):
        return FastAutoencoder(network)
    return FastUNet(network)  # type: ignore[arg-type]


def fast(module: nn.Module) -> nn.Module:
    """A copy of a network, or of a part of one, in which what is slow is its fast twin."""
    match module:
        case ResnetBlock():
            return FastResnet(module)
        case SpatialTransformer():
            return FastTransformer(module)
        case PixelAttention():
            return FastPixelAttention(module)
        case Upsample():
            return FastUpsample(module)
        case nn.GroupNorm():
            return FastGroupNorm(module)
        case nn.Conv2d():
            return Conv2d(module)
        case nn.Linear():
            return Linear(module)
    twin = copy(module)
    twin._modules = {
        name: None if part is None else fast(part) for name, part in module._modules.items()
    }
    return twin


def without_gradients(network: Callable[..., Tensor], *args: Any) -> Tensor:
    """A call of which torch keeps no record: of the small model's time, a sixth.

    It computes in the network's own dtype under autocast as well, which oneDNN's operators ignore.
    """
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        out = network(*args)
    return out.clone()  # as any other tensor, which whoever gets it may change


def repeated(x: Tensor, rows: int) -> Tensor:
    """A batch as often as makes so many rows: the pictures, once for each of their contexts."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))  # keeps channels last
