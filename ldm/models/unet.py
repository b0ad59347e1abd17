"""The cross-attention U-Net that predicts the noise, the velocity or x0 of a noisy latent.

    noisy latents --> down levels --> middle --> up levels --> prediction
                        \\________ skips ________/

Parameter names and shapes are those of diffusers' UNet2DConditionModel, for SD 1.x and 2.x.

Shapes: b pictures, c channels, h w height and width of the latents, e time embedding width,
n tokens of context, d width of the context.

Source: Rombach et al. 2022, section 3.3, on the U-Net of Dhariwal and Nichol 2021.
"""

from __future__ import annotations

from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import UNetConfig
from ldm.models.attention import SpatialTransformer
from ldm.models.layers import (
    Downsample,
    GroupNorm,
    Recomputing,
    ResnetBlock,
    TimestepMLP,
    Upsample,
    timestep_embedding,
    zero_,
)


class UNet(Recomputing):
    """The network: (noisy latents, timesteps, text context) -> prediction.

    In a new one the last layer of every residual branch, and of the network, is zero (Ho et al.
    2020; Dhariwal and Nichol 2021): at first the branches add nothing and the prediction is zero.

    Attributes:
        config: its shape.
        gradient_checkpointing: recompute activations in training; see `Recomputing`.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepMLP(widths[0], 4 * widths[0])
        classes = config.num_class_embeds
        self.class_embedding = nn.Embedding(classes, 4 * widths[0]) if classes else None
        self.down_blocks = nn.ModuleList(
            DownLevel(config, level, widths[max(level - 1, 0)], down=level < last)
            for level in range(len(widths))
        )
        self.mid_block = Middle(config)
        # what a level puts on the stack of skips is what its twin on the way up takes off
        skips = [widths[0]]
        for level, width in enumerate(widths):
            skips += [width] * (config.layers_per_block + (level < last))
        self.up_blocks = nn.ModuleList(
            UpLevel(
                config,
                level,
                widths[min(level + 1, last)],
                [skips.pop() for _ in range(config.layers_per_block + 1)],
                up=level > 0,
            )
            for level in reversed(range(len(widths)))
        )
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

        zero_(self.conv_out)
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                zero_(module.conv2)
            elif isinstance(module, SpatialTransformer):
                zero_(module.proj_out)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, class_labels: Tensor | None = None
    ) -> Tensor:
        """What the network predicts of noisy latents.

        Args:
            x: scaled noisy latents `b c h w`, of any height and width.
            t: timesteps in [0, T), integers or floats: `b`, or one without a dimension for all.
            context: text embeddings `b n d`; or `k*b n d`, k for each picture, first the first of
                each: guidance compares two.
            class_labels: rows of the table of classes, one a context, integers; the last, no class,
                for None.

        Returns:
            `k*b out_channels h w`: epsilon, v or x0, as the model was trained.
        """
        t = t.to(x.device).expand(len(x))
        if (k := len(context) // len(x)) > 1:
            x, t = x.repeat(k, 1, 1, 1), t.repeat(k)
        emb = timestep_embedding(t, self.conv_in.out_channels)  # b c
        emb = self.time_embedding(emb.to(x.dtype))  # b e
        if self.class_embedding is not None:
            table, labels = self.class_embedding, class_labels
            emb = emb + (table.weight[-1] if labels is None else table(labels.to(x.device)))
        x = self.conv_in(x)  # b c h w
        skips = [x]
        for level in self.down_blocks:
            x = level(x, emb, context, skips)  # b 2c h/2 w/2
        x = self.mid_block(x, emb, context)
        for level in self.up_blocks:
            x = level(x, emb, context, skips)  # b c/2 2h 2w
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # b out h w


class DownLevel(Recomputing):
    """One resolution on the way down; pushes each of its results on the stack of skips.

    Args:
        config: of the whole U-Net.
        level: which resolution, 0 the finest.
        in_channels: c of what comes in.
        down: whether it ends by halving the resolution.
    """

    def __init__(self, config: UNetConfig, level: int, in_channels: int, *, down: bool):
        super().__init__()
        width = config.block_out_channels[level]
        inputs = [in_channels] + [width] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(_resnet(config, c, width) for c in inputs)
        attentions = len(inputs) if config.cross_attention[level] else 0
        self.attentions = nn.ModuleList(_transformer(config, level) for _ in range(attentions))
        self.downsamplers = nn.ModuleList([Downsample(width)] if down else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """`b c h w` to `b 2c h/2 w/2`."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = self.run(resnet, x, emb)  # b 2c h w
            if attention is not None:
                x = self.run(attention, x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)  # b 2c h/2 w/2
            skips.append(x)
        return x


class Middle(Recomputing):
    """The lowest resolution: a residual block, a transformer, a residual block."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([_transformer(config, -1)])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """`b c h w` to `b c h w`."""
        x = self.run(self.resnets[0], x, emb)
        x = self.run(self.attentions[0], x, context)
        return self.run(self.resnets[1], x, emb)


class UpLevel(Recomputing):
    """One resolution on the way up; each layer takes a skip off the stack.

    Args:
        config: of the whole U-Net.
        level: which resolution, 0 the finest.
        in_channels: c of what comes in.
        skip_channels: c of each skip, in the order in which they come off the stack.
        up: whether it ends by doubling the resolution.
    """

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        in_channels: int,
        skip_channels: list[int],
        *,
        up: bool,
    ):
        super().__init__()
        width = config.block_out_channels[level]
        inputs = [in_channels] + [width] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            _resnet(config, c + skip, width) for c, skip in zip(inputs, skip_channels, strict=True)
        )
        attentions = len(inputs) if config.cross_attention[level] else 0
        self.attentions = nn.ModuleList(_transformer(config, level) for _ in range(attentions))
        self.upsamplers = nn.ModuleList([Upsample(width)] if up else [])

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        """`b 2c h w` to `b c 2h 2w`, or to the size of the next skip where that was odd."""
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = torch.cat([x, skips.pop()], dim=1)  # b 2c+skip h w
            x = self.run(resnet, x, emb)  # b c h w
            if attention is not None:
                x = self.run(attention, x, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[-2:])  # b c 2h 2w
        return x


def _resnet(config: UNetConfig, in_channels: int, out_channels: int) -> ResnetBlock:
    embedding = 4 * config.block_out_channels[0]
    return ResnetBlock(
        in_channels, out_channels, embedding, config.norm_num_groups, config.norm_eps
    )


def _transformer(config: UNetConfig, level: int) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[level],
        config.heads[level],
        config.cross_attention_dim,
        config.transformer_layers_per_block,
        config.norm_num_groups,
        linear=config.use_linear_projection,
    )
