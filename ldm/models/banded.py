"""The autoencoder in bands of rows: the numbers of the whole in little device memory.

Features are kept in the CPU's memory; a band at a time goes to the device, through one
convolution, and back. The neighbouring rows that a convolution sees travel with its band, and a
group normalisation uses the moments of the whole picture, gathered while the bands were written: no
seams, nothing to blend. Only the lowest resolution, where attention sees everything, runs whole.

Shapes: b pictures, c channels, h w height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian
from ldm.models.layers import Downsample, ResnetBlock, Upsample, normalisation_of


@dataclass
class Features:
    """Features of whole pictures, `b c h w` on the CPU, and their moments `b c` in float64."""

    values: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def gather(cls, bands: Iterable[Tensor], height: int) -> Features:
        """Put bands `b c rows w` one below the other; `height` is that of all of them."""
        values, row = torch.empty(0), 0
        mean = square = torch.zeros((), dtype=torch.float64)
        for band in bands:
            if not row:
                b, c, _, width = band.shape
                values = torch.empty(b, c, height, width, dtype=band.dtype)
            values[:, :, row : row + band.shape[2]] = band.cpu()
            row += band.shape[2]
            var, of_band = torch.var_mean(band.float(), (2, 3), correction=0)  # b c, b c
            var, of_band = var.double().cpu(), of_band.double().cpu()
            mean = mean + of_band * band.shape[2] / height
            square = square + (var + of_band**2) * band.shape[2] / height
        return cls(values, mean, square)

    def normalisation(self, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        """`norm` of the whole pictures, for any of their rows."""
        moments = normalisation_of(norm, self.mean, self.square)
        scale, shift = (each.to(norm.weight.device) for each in moments)
        return lambda rows: torch.addcmul(shift, rows.float(), scale).to(rows.dtype)


class BandedAutoencoder:
    """`encode` and `decode` of an autoencoder, band by band.

    Args:
        vae: where it is to work.
        tile: a band has as many pixels as a square tile of this side, in latent pixels.
    """

    def __init__(self, vae: AutoencoderKL, tile: int = 32):
        self.vae = vae
        self.pixels = (tile * vae.config.downsample_factor) ** 2

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As `AutoencoderKL.decode`; the pictures are on the CPU."""
        decoder = self.vae.decoder
        x = decoder.mid_block(decoder.conv_in(self.vae.post_quant_conv(latents)))
        features = Features.gather([x], x.shape[2])
        levels: Any = decoder.up_blocks
        for level in levels:
            for resnet in level.resnets:
                features = self._resnet(resnet, features)
            for upsample in level.upsamplers:
                features = self._upsample(upsample, features)
        return self._convolution(features, decoder.conv_out, decoder.conv_norm_out).values

    @torch.no_grad()
    def encode(self, images: Tensor) -> DiagonalGaussian:
        """As `AutoencoderKL.encode`; the pictures may be on the CPU."""
        encoder = self.vae.encoder
        features = Features.gather([images], images.shape[2])
        features = self._convolution(features, encoder.conv_in)
        levels: Any = encoder.down_blocks
        for level in levels:
            for resnet in level.resnets:
                features = self._resnet(resnet, features)
            for downsample in level.downsamplers:
                features = self._downsample(downsample, features)
        x = encoder.mid_block(features.values.to(encoder.conv_in.weight.device))
        x = encoder.conv_out(F.silu(encoder.conv_norm_out(x)))
        return DiagonalGaussian.from_moments(self.vae.quant_conv(x))

    def _resnet(self, block: ResnetBlock, x: Features) -> Features:
        def shortcut(rows: Tensor) -> Tensor:
            return rows if block.conv_shortcut is None else block.conv_shortcut(rows)

        hidden = self._convolution(x, block.conv1, block.norm1)
        return self._convolution(
            hidden, block.conv2, block.norm2, lambda a, b: shortcut(self._rows(x, a, b))
        )

    def _convolution(
        self,
        x: Features,
        conv: nn.Conv2d,
        norm: nn.GroupNorm | None = None,
        plus: Callable[[int, int], Tensor] | None = None,
    ) -> Features:
        """conv(x), or conv(silu(norm(x))), and what is added to its rows a to b; conv is 3x3."""
        normalise = None if norm is None else x.normalisation(norm)
        height = x.values.shape[2]

        def band(a: int, b: int) -> Tensor:
            rows = self._rows(x, a - 1, b + 1)
            if normalise is not None:
                rows = F.silu(normalise(rows))
            out = _convolve(conv, F.pad(rows, (1, 1, int(a == 0), int(b == height))))
            return out if plus is None else out + plus(a, b)

        return self._gather(x, band, height)

    def _upsample(self, upsample: Upsample, x: Features) -> Features:
        height = x.values.shape[2]

        def band(a: int, b: int) -> Tensor:  # of the low resolution
            rows = F.interpolate(self._rows(x, a - 1, b + 1), scale_factor=2.0, mode="nearest")
            rows = rows[:, :, int(a > 0) : rows.shape[2] - int(b < height)]  # one row is seen
            return _convolve(upsample.conv, F.pad(rows, (1, 1, int(a == 0), int(b == height))))

        return self._gather(x, band, height, 2 * height)

    def _downsample(self, downsample: Downsample, x: Features) -> Features:
        height = x.values.shape[2]

        def band(a: int, b: int) -> Tensor:  # of the low resolution
            rows = self._rows(x, 2 * a, 2 * b + 1)
            return _convolve(downsample.conv, F.pad(rows, (0, 1, 0, int(2 * b == height))))

        return self._gather(x, band, height // 2)

    def _rows(self, x: Features, a: int, b: int) -> Tensor:
        """Rows a to b on the device, as far as there are any."""
        return x.values[:, :, max(a, 0) : b].to(self.vae.decoder.conv_in.weight.device)

    def _gather(
        self, x: Features, band: Callable[[int, int], Tensor], rows: int, height: int | None = None
    ) -> Features:
        """The bands (a, b) of `rows` rows, which give `height` rows, or as many."""
        step = max(self.pixels // x.values.shape[3], 1)  # whatever the number of pictures
        bands = (band(a, min(a + step, rows)) for a in range(0, rows, step))
        return Features.gather(bands, height or rows)


def _convolve(conv: nn.Conv2d, rows: Tensor) -> Tensor:
    return F.conv2d(rows, conv.weight, conv.bias, conv.stride)
