"""The autoencoder between pictures and latents, with its KL-regularised bottleneck.

    images --> encoder --> quant_conv --> DiagonalGaussian over raw latents
    raw latents --> post_quant_conv --> decoder --> images

Raw latents are what the encoder returns; scaled latents have unit variance and are what the U-Net
sees. `scale` and `unscale` are the only way between them. Parameter names and shapes are those of
diffusers' AutoencoderKL.

Shapes: b pictures, c channels, h w height and width, l channels of the latents, f picture pixels
to one latent pixel along a side.

Source: Rombach et al. 2022, section 3.1, on the VQGAN of Esser et al. 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import AutoencoderConfig
from ldm.models.attention import PixelAttention
from ldm.models.layers import Downsample, GroupNorm, Recomputing, ResnetBlock, Upsample

_EPS = 1e-6  # of every group normalisation here; the U-Net's has another


@dataclass(frozen=True)
class DiagonalGaussian:
    """A normal distribution with independent components, one at each place of the latents.

    Attributes:
        mean: `b l h w`, raw latents.
        logvar: `b l h w`, the logarithm of the variance, in [-30, 20].

    Source: Kingma and Welling 2014, appendix B.
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """The distribution whose means and log-variances are stacked as `b 2*l h w`."""
        mean, logvar = moments.chunk(2, dim=1)  # b l h w, b l h w
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def mode(self) -> Tensor:
        """The likeliest raw latents `b l h w`."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Raw latents `b l h w`, drawn with the caller's standard normal noise `b l h w`."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, in nats, summed over each picture: float32 `b`."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)  # b


class AutoencoderKL(Recomputing):
    """Pictures to latents and back.

    Attributes:
        config: its shape.
        gradient_checkpointing: recompute activations in training; see `Recomputing`.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, to balance losses by their gradients.

        Source: Esser et al. 2021, equation 7.
        """
        return self.decoder.conv_out.weight

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Pictures `b 3 h w` in [-1, 1] to a distribution over raw latents `b l h/f w/f`."""
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(images)))

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents `b l h w` to pictures `b 3 h*f w*f`, in [-1, 1] but not clamped to it."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(
        self, images: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, DiagonalGaussian]:
        """Pictures there and back: one call for training, as data parallelism wants it.

        Args:
            images: `b 3 h w` in [-1, 1].
            noise: standard normal `b l h/f w/f`; without it the latents are the mode.

        Returns:
            The pictures again, `b 3 h w`, and the distribution that they went through.
        """
        posterior = self.encode(images)
        latents = posterior.mode() if noise is None else posterior.sample(noise)
        return self.decode(latents), posterior

    def scale(self, raw: Tensor) -> Tensor:
        """Raw latents to scaled latents, which have about unit variance."""
        return (raw - self.config.shift_factor) * self.config.scaling_factor

    def unscale(self, scaled: Tensor) -> Tensor:
        """Scaled latents to raw latents."""
        return scaled / self.config.scaling_factor + self.config.shift_factor


class Encoder(Recomputing):
    """Pictures `b 3 h w` to the moments of raw latents, `b 2*l h/f w/f`."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderLevel(config, level, down=level < len(widths) - 1)
            for level in range(len(widths))
        )
        self.mid_block = Middle(config)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`b 3 h w` to `b 2*l h/f w/f`."""
        x = self.conv_in(x)  # b c h w
        for level in self.down_blocks:
            x = level(x)  # b 2c h/2 w/2
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # b 2*l h/f w/f


class Decoder(Recomputing):
    """Raw latents `b l h w` to pictures `b 3 h*f w*f`."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid_block = Middle(config)
        self.up_blocks = nn.ModuleList(
            DecoderLevel(config, level, up=level > 0) for level in reversed(range(len(widths)))
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], _EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`b l h w` to `b 3 h*f w*f`."""
        x = self.conv_in(x)  # b c h w
        x = self.mid_block(x)
        for level in self.up_blocks:
            x = level(x)  # b c/2 2h 2w
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # b 3 h*f w*f


class EncoderLevel(Recomputing):
    """Residual blocks at one resolution (0 the finest), which `down` halves at the end."""

    def __init__(self, config: AutoencoderConfig, level: int, *, down: bool):
        super().__init__()
        width = config.block_out_channels[level]
        inputs = [config.block_out_channels[max(level - 1, 0)]]
        inputs += [width] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(_resnet(config, c, width) for c in inputs)
        # padding only right and bottom is what the first VQGAN did, and its weights expect it
        self.downsamplers = nn.ModuleList([Downsample(width, padding=0)] if down else [])

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w` to `b 2c h/2 w/2`."""
        for resnet in self.resnets:
            x = self.run(resnet, x)  # b 2c h w
        for downsample in self.downsamplers:
            x = downsample(x)  # b 2c h/2 w/2
        return x


class DecoderLevel(Recomputing):
    """Residual blocks at one resolution (0 the finest), which `up` doubles at the end."""

    def __init__(self, config: AutoencoderConfig, level: int, *, up: bool):
        super().__init__()
        widths = config.block_out_channels
        width = widths[level]
        inputs = [widths[min(level + 1, len(widths) - 1)]] + [width] * config.layers_per_block
        self.resnets = nn.ModuleList(_resnet(config, c, width) for c in inputs)
        self.upsamplers = nn.ModuleList([Upsample(width)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        """`b 2c h w` to `b c 2h 2w`."""
        for resnet in self.resnets:
            x = self.run(resnet, x)  # b c h w
        for upsample in self.upsamplers:
            x = upsample(x)  # b c 2h 2w
        return x


class Middle(Recomputing):
    """The lowest resolution: a residual block, an attention if there is one, a residual block."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        attentions = 1 if config.mid_block_add_attention else 0
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList(
            PixelAttention(width, config.norm_num_groups) for _ in range(attentions)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w` to `b c h w`."""
        x = self.run(self.resnets[0], x)
        for attention in self.attentions:
            x = self.run(attention, x)
        return self.run(self.resnets[1], x)


def _resnet(config: AutoencoderConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, None, config.norm_num_groups, _EPS)
