"""The patch discriminator that the autoencoder is trained against.

Shapes: b pictures, c channels, h w height and width.

Source: Isola et al. 2017, appendix 6.1.2 (the 70x70 PatchGAN); Esser et al. 2021, section 3.1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Tells real from decoded, once for every patch: 70x70 pixels with three layers.

    Where pix2pix and VQGAN normalise over the batch, this normalises over groups of channels of
    each picture: batch statistics would make a picture's verdict depend on its neighbours in the
    batch, hence on the batch size and the number of processes, and they train badly at the batch
    of a few pictures that an autoencoder allows.

    Args:
        in_channels: channels of a picture.
        width: channels of the first layer; doubled by each later layer, up to eight times.
        layers: layers of stride 2, at least one.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [width * min(2**layer, 8) for layer in range(layers + 1)]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            PatchBlock(widths[layer - 1], widths[layer], stride=2 if layer < layers else 1)
            for layer in range(1, layers + 1)
        )
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures `b c h w` in [-1, 1] to a logit a patch, `b 1 h' w'`, positive for real."""
        x = F.leaky_relu(self.conv_in(images), 0.2)  # b c h/2 w/2
        for block in self.blocks:
            x = block(x)  # b 2c h/2 w/2
        return self.conv_out(x)  # b 1 h' w'


class PatchBlock(nn.Module):
    """Convolution, normalisation within the picture, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1)
        self.norm = nn.GroupNorm(_groups(out_channels), out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """`b c h w` to `b c' h/stride w/stride`."""
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


def _groups(channels: int) -> int:
    """The usual 32 groups, or the most below it that divide the channels."""
    return next(groups for groups in range(32, 0, -1) if channels % groups == 0)


def _initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02), normalisation from N(1, 0.02) (Isola et al. 2017, appendix 6.2)."""
    if isinstance(module, nn.Conv2d | nn.GroupNorm):
        nn.init.normal_(module.weight, float(isinstance(module, nn.GroupNorm)), 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
