"""Names of weights: those of single files (CompVis, Stability) and ours, which are diffusers'.

Each model has one table of modules, (our name, their name), for any number of levels and layers.
What stands below a module of the table keeps its name: the parameters, and all inside a U-Net's
transformer. Pure strings; names are without the prefixes that a single file gives its models.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

Table = list[tuple[str, str]]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."  # SD 1.x, by transformers' names
OPEN_CLIP_PREFIX = "cond_stage_model.model."  # SD 2.x

RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
]
VAE_ATTENTION = [
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
]
# what single files call its parts that were converted with diffusers of another year
VAE_ATTENTION_DIFFUSERS = [
    (spelling, ours)
    for ours, old in [
        ("group_norm", "group_norm"), ("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ]
    for spelling in (ours, old)
]  # fmt: skip
CLIP_LAYER = [
    ("layer_norm1", "ln_1"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
]


def unet_to_theirs(names: Iterable[str]) -> dict[str, str]:
    """Our name -> CompVis's name of every weight of a U-Net."""
    names = list(names)
    attention = set(_numbers(r"up_blocks\.(\d+)\.attentions\.", names))
    levels = count(r"down_blocks\.(\d+)\.", names)
    return _rename(
        names, unet_table(levels, count(r"down_blocks\.0\.resnets\.(\d+)\.", names), attention)
    )


def unet_to_ours(names: Iterable[str]) -> dict[str, str]:
    """CompVis's name -> our name of every weight of a U-Net; unknown names stay as they are."""
    names = list(names)
    downsamplers = _numbers(r"input_blocks\.(\d+)\.0\.op\.", names)
    # the first downsampler follows conv_in and the residual blocks of one level
    layers = min(downsamplers, default=count(r"input_blocks\.(\d+)\.", names)) - 1
    upsamplers = _numbers(r"output_blocks\.(\d+)\.2\.conv\.", names)  # 1 would be an attention
    attention = {n // (layers + 1) for n in upsamplers}
    return _rename(names, _swapped(unet_table(len(set(downsamplers)) + 1, layers, attention)))


def unet_table(levels: int, layers: int, attention: Container[int]) -> Table:
    """Modules of a U-Net.

    Args:
        levels: resolutions.
        layers: residual blocks a level of the encoder.
        attention: which levels of the decoder, coarsest first, have transformers.
    """
    table = [
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("mid_block.attentions.0", "middle_block.1"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ]
    resnets = [("mid_block.resnets.0", "middle_block.0"), ("mid_block.resnets.1", "middle_block.2")]
    blocks = layers + 1  # a level: the encoder's last is a downsampler, the decoder has one more
    for level in range(levels):
        for i in range(layers):
            block = f"input_blocks.{1 + level * blocks + i}"
            resnets.append((f"down_blocks.{level}.resnets.{i}", f"{block}.0"))
            table.append((f"down_blocks.{level}.attentions.{i}", f"{block}.1"))
        down = f"input_blocks.{(level + 1) * blocks}.0.op"
        table.append((f"down_blocks.{level}.downsamplers.0.conv", down))
        for i in range(blocks):
            block = f"output_blocks.{level * blocks + i}"
            resnets.append((f"up_blocks.{level}.resnets.{i}", f"{block}.0"))
            table.append((f"up_blocks.{level}.attentions.{i}", f"{block}.1"))
        up = f"output_blocks.{level * blocks + layers}.{2 if level in attention else 1}.conv"
        table.append((f"up_blocks.{level}.upsamplers.0.conv", up))
    return table + _product(resnets, RESNET)


def vae_to_theirs(names: Iterable[str]) -> dict[str, str]:
    """Our name -> CompVis's name of every weight of an autoencoder."""
    names = list(names)
    levels = count(r"encoder\.down_blocks\.(\d+)\.", names)
    layers = count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", names)
    return _rename(names, vae_table(levels, layers))


def vae_to_ours(names: Iterable[str]) -> dict[str, str]:
    """CompVis's name -> our name of every weight of an autoencoder; unknown names stay."""
    names = list(names)
    levels = count(r"encoder\.down\.(\d+)\.", names)
    layers = count(r"encoder\.down\.0\.block\.(\d+)\.", names)
    middles = [(f"{s}.mid.attn_1", f"{s}.mid_block.attentions.0") for s in ("encoder", "decoder")]
    others = _product(middles, VAE_ATTENTION_DIFFUSERS)
    return _rename(names, others + _swapped(vae_table(levels, layers)))


def vae_table(levels: int, layers: int) -> Table:
    """Modules of an autoencoder with so many levels, and residual blocks a level of the encoder."""
    table, resnets = [], []
    for side in ("encoder", "decoder"):
        middle = f"{side}.mid_block.attentions.0"
        table += _product([(middle, f"{side}.mid.attn_1")], VAE_ATTENTION)
        table.append((f"{side}.conv_norm_out", f"{side}.norm_out"))
        resnets += [(f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}") for i in (0, 1)]
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        their_down = f"encoder.down.{level}"
        their_up = f"decoder.up.{levels - 1 - level}"  # theirs are counted from the finest
        resnets += [(f"{down}.resnets.{i}", f"{their_down}.block.{i}") for i in range(layers)]
        resnets += [(f"{up}.resnets.{i}", f"{their_up}.block.{i}") for i in range(layers + 1)]
        table.append((f"{down}.downsamplers.0.conv", f"{their_down}.downsample.conv"))
        table.append((f"{up}.upsamplers.0.conv", f"{their_up}.upsample.conv"))
    return table + resnets + _product(resnets, [("conv_shortcut", "nin_shortcut")])


def open_clip_to_theirs(names: Iterable[str]) -> dict[str, str]:
    """transformers' name -> open_clip's name of every weight of a CLIP text tower.

    A third of a fused weight gets a name of its own, `attn.in_proj_weight.0` to `.2` (and
    `in_proj_bias`): the rows of q, of k and of v, in this order.
    """
    names = list(names)
    return _rename(names, open_clip_table(count(r"encoder\.layers\.(\d+)\.", names)))


def open_clip_to_ours(names: Iterable[str]) -> dict[str, str]:
    """The reverse of `open_clip_to_theirs`; unknown names stay as they are."""
    names = list(names)
    layers = count(r"transformer\.resblocks\.(\d+)\.", names)
    return _rename(names, _swapped(open_clip_table(layers)))


def open_clip_table(layers: int) -> Table:
    """Modules of a CLIP text tower with so many layers."""
    thirds = [
        (f"self_attn.{third}_proj.{kind}", f"attn.in_proj_{kind}.{i}")
        for i, third in enumerate("qkv")
        for kind in ("weight", "bias")
    ]
    return [
        ("embeddings.token_embedding", "token_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("final_layer_norm", "ln_final"),
        *_product(
            [(f"encoder.layers.{i}", f"transformer.resblocks.{i}") for i in range(layers)],
            CLIP_LAYER + thirds,
        ),
    ]


def below(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What stands below a prefix, by its names without the prefix."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def ema_name(name: str) -> str:
    """CompVis's name, with its prefix, of the moving average of a U-Net's weight, by its own."""
    return "model_ema." + f"diffusion_model.{name}".replace(".", "")


def _product(outer: Table, inner: Table) -> Table:
    return [(f"{a}.{x}", f"{b}.{y}") for a, b in outer for x, y in inner]


def _swapped(table: Table) -> Table:
    return [(theirs, ours) for ours, theirs in table]


def _rename(names: Iterable[str], table: Table) -> dict[str, str]:
    modules = dict(table)
    return {name: _renamed(name, modules) for name in names}


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    """With the longest module of the table that the name begins with replaced."""
    head, tail = name, ""
    while head not in modules:
        head, dot, last = head.rpartition(".")
        if not dot:
            return name
        tail = f".{last}{tail}"
    return modules[head] + tail


def _numbers(pattern: str, names: Iterable[str]) -> list[int]:
    """The number, below 100, in every name that begins with a pattern."""
    found = (match[1] for name in names if (match := re.match(pattern, name)))
    # no network has a hundred blocks in a row; larger numbers would only make long tables
    return [int(number) for number in found if len(number) <= 2]


def count(pattern: str, names: Iterable[str]) -> int:
    """One more than the highest number in the names that begin with a pattern."""
    return 1 + max(_numbers(pattern, names), default=-1)
