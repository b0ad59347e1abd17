"""The U-Net and the autoencoder on a CPU: the fused forms, of weights packed for oneDNN.

oneDNN adds residuals, gates and activations while a product is in cache. What depends on the text
alone is computed once a prompt, and what on the time alone once a step.

Shapes: b pictures, k contexts a picture, c o channels in and out, h w height and width, m d tokens
and width of the context, e time embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.engine.fused import FastResnet, FastUNet, Kit, fast, repeated
from ldm.engine.native import attend, group_norm
from ldm.engine.onednn import Conv2d, GatedLinear, Linear, Packed
from ldm.memory import keep_large_blocks, put_aside
from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.models.layers import ResnetBlock, Upsample, normalisation_of
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
    """As `nn.GroupNorm`, of channels-last pictures, but more exact of large ones.

    torch sums up the squares of a large one in float32, of which the digits after the fourth are
    lost at 512x512. Here each row of pixels is summed up alone, and the rows in float64. What is
    bfloat16 goes by group_norm.c.
    """

    LARGE = 64 * 64  # pixels; up to here torch's is exact enough, and faster

    def __init__(self, norm: nn.GroupNorm, *, silu: bool = False):
        super().__init__()
        self.norm, self.silu = norm, silu

    def forward(self, x: Tensor, *, inplace: bool = False) -> Tensor:
        """`b c h w` to `b c h w`; with `inplace`, the result may be written over `x`."""
        if x.dtype != torch.float32 or x.shape[2] * x.shape[3] <= self.LARGE:
            return group_norm(x, self.norm, silu=self.silu, inplace=inplace)
        rows = x.permute(0, 2, 3, 1)  # b h w c
        mean = rows.mean(2).double().mean(1)  # b c
        square = torch.linalg.vector_norm(rows, dim=2).double().square().mean(1) / x.shape[3]
        scale, shift = normalisation_of(self.norm, mean, square)
        out = torch.addcmul(shift, x, scale, out=x if inplace else None)
        return F.silu(out, inplace=True) if self.silu else out


class CpuResnet(FastResnet):
    """As `ResnetBlock`."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """`b c h w` and `b e`, or `1 e` for all pictures, to `b o h w`.

        Without `emb` the result may be written over `x`.
        """
        carried = self.carried(x)  # before anything is written over x
        fresh = carried is not x
        last = emb is None  # in an autoencoder nobody reads x again; the U-Net keeps some as skips
        h = self.norm1(x, inplace=last and fresh)
        if emb is None:
            h = self.conv1(h)
        elif len(emb) == 1:  # the time takes the place of the convolution's bias, which it contains
            h = self.conv1(h, bias=emb[0, self.times])
        else:
            rows = repeated(emb[:, self.times], len(x))
            h = self.conv1(h, bias=torch.zeros_like(rows[0])).add_(rows[:, :, None, None])
        h = self.norm2(h, inplace=True)
        return self.conv2(h, other=carried, inplace=last or fresh)


class FastUpsample(nn.Module):
    """Nearest neighbours and a 3x3 convolution, as four 2x2 convolutions of the small picture.

    Of the nine pixels that the convolution sees after doubling, those from the same small pixel
    meet sums of its weights: 4/9 of the products. The four are one convolution of four times the
    outputs, of which each takes its own window.
    """

    def __init__(self, upsample: Upsample, kit: Kit):
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
        self.conv = kit.conv(small)
        self.conv.take()
        put_aside(weight)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """`b c h w` to `b o 2h 2w`, or to `b o *size`."""
        b, _, h, w = x.shape
        if size is not None and tuple(size) != (2 * h, 2 * w):
            return self.plain(x, size)
        windows = self.conv(x).permute(0, 2, 3, 1).unflatten(-1, (2, 2, -1))  # b h+1 w+1 2 2 o
        picture, row, column, p, q, channel = windows.stride()
        parts = (b, h, 2, w, 2, windows.shape[-1])
        # Pixel (2i + p, 2j + q) is phase (p, q) of window (i + p, j + q).
        out = windows.as_strided(parts, (picture, row, row + p, column, column + q, channel))
        return out.reshape(b, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)  # b o 2h 2w


class CpuUNet(Prepared):
    """As `UNet`. For threads that draw at the same time, it keeps a text and its texts in one."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.fast = FastUNet(unet, KIT)
        # Of the time's projections and the convolutions whose bias's place they take.
        blocks: Any = [part for part in unet.modules() if isinstance(part, ResnetBlock)]
        sums = [b.time_emb_proj.bias.double() + b.conv1.bias.double() for b in blocks]
        self.fast.time.bias = torch.cat(sums).detach().to(blocks[0].conv1.bias.dtype)
        self._kept: tuple[Tensor, Tensor] | None = None

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """Arguments and result as `UNet.forward`."""
        return without_gradients(self._forward, x, t, context, class_labels)

    def _forward(
        self, x: Tensor, t: Tensor, context: Tensor, class_labels: Tensor | None
    ) -> Tensor:
        t = t.to(x.device).expand(len(x))
        if class_labels is not None:
            x, t = repeated(x, len(context)), repeated(t, len(context))
        elif (t == t[0]).all():
            t = t[:1]
        return self.fast.predict(x, t, self._texts(context), class_labels)

    def _texts(self, context: Tensor) -> Tensor:
        kept = self._kept
        if kept is None or kept[0].shape != context.shape or not torch.equal(kept[0], context):
            kept = self._kept = (context.clone(), self.fast.text(context))
        return kept[1]


class CpuAutoencoder(Prepared):
    """As `AutoencoderKL`, which it runs, made of the fast parts."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae: Any = fast(vae, KIT)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """As `AutoencoderKL.encode`."""
        return DiagonalGaussian.from_moments(without_gradients(self._moments, images))

    def _moments(self, images: Tensor) -> Tensor:
        return self.vae.quant_conv(self.vae.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """As `AutoencoderKL.decode`."""
        return without_gradients(self.vae.decode, latents)


KIT = Kit(Linear, GatedLinear, Conv2d, FastGroupNorm, CpuResnet, FastUpsample, attend)


def prepare(network: nn.Module) -> Prepared:
    """The fast form of a U-Net or an autoencoder, whose weights stay where they are until `take`.

    Nothing in it has gradients: call it where they are off.
    """
    # At 512 px an autoencoder's finest features have 64 MiB in half precision. In float32 they have
    # more, and gain nothing by being kept; what is kept of the coarser ones is of no use to them.
    half = next(network.parameters()).element_size() == 2
    keep_large_blocks(2**27 if half else 2**26)
    if isinstance(network, AutoencoderKL):
        return CpuAutoencoder(network)
    return CpuUNet(network)  # type: ignore[arg-type]


def without_gradients(network: Callable[..., Tensor], *args: Any) -> Tensor:
    """A call of which torch keeps no record: of the small model's time, a sixth.

    It computes in the network's own dtype under autocast as well, which oneDNN's operators ignore.
    """
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        out = network(*args)
    return out.clone()  # as any other tensor, which whoever gets it may change
