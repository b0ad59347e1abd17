"""Every name has one counterpart, for models of any depth; diffusers' converters agree."""

from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from tiny import UNET, VAE

from ldm.checkpoint.names import (
    UNET_PREFIX,
    VAE_PREFIX,
    ema_name,
    open_clip_to_ours,
    open_clip_to_theirs,
    unet_to_ours,
    unet_to_theirs,
    vae_to_ours,
    vae_to_theirs,
)
from ldm.config import PRESETS, AutoencoderConfig, UNetConfig
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet

UNETS = {
    "sd15": (PRESETS["sd15"].unet, 686),
    "sd21": (PRESETS["sd21-v"].unet, 686),
    "flowers": (PRESETS["flowers"].unet, None),
    "tiny": (UNET, None),
    "three layers": (replace(UNET, layers_per_block=3, transformer_layers_per_block=2), None),
    "attention in the middle": (
        replace(UNET, block_out_channels=(8,) * 5, cross_attention=(False, True) * 2 + (False,)),
        None,
    ),
    "one level": (replace(UNET, block_out_channels=(16,), cross_attention=(True,)), None),
}
VAES = {
    "sd": (PRESETS["sd15"].vae, 248),
    "flowers": (PRESETS["flowers"].vae, None),
    "tiny": (VAE, None),
    "three layers, f2": (replace(VAE, block_out_channels=(8, 8), layers_per_block=3), None),
    "no attention": (replace(VAE, mid_block_add_attention=False), None),
}


def ours_of(model_class: type, config: UNetConfig | AutoencoderConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return model_class(config).state_dict()


@pytest.mark.parametrize(("config", "count"), UNETS.values(), ids=UNETS)
def test_unet_names_as_diffusers_reads_them(config, count):
    ours = ours_of(UNet, config)
    theirs = unet_to_theirs(ours)
    assert count in (None, len(theirs))
    assert unet_to_ours(theirs.values()) == {new: old for old, new in theirs.items()}
    # diffusers' converter moves values about: here the values are our names
    file = {UNET_PREFIX + new: old for old, new in theirs.items()}
    read = convert_ldm_unet_checkpoint(file, {"layers_per_block": config.layers_per_block})
    assert read == {name: name for name in ours}


@pytest.mark.parametrize(("config", "count"), VAES.values(), ids=VAES)
def test_vae_names_as_diffusers_reads_them(config, count):
    ours = ours_of(AutoencoderKL, config)
    theirs = vae_to_theirs(ours)
    assert count in (None, len(theirs))
    assert vae_to_ours(theirs.values()) == {new: old for old, new in theirs.items()}
    blocks = dict.fromkeys(("down_block_types", "up_block_types"), config.block_out_channels)
    file = {VAE_PREFIX + new: ours[old] for old, new in theirs.items()}
    read = convert_ldm_vae_checkpoint(file, blocks)
    assert all(read[name] is tensor for name, tensor in ours.items()) and read.keys() == ours.keys()


def test_open_clip_names_and_their_thirds():
    ours = [f"encoder.layers.11.self_attn.{part}_proj.bias" for part in ("q", "k", "v", "out")]
    ours += ["embeddings.position_embedding.weight", "final_layer_norm.bias"]
    theirs = open_clip_to_theirs(ours)
    layer = "transformer.resblocks.11.attn"
    assert list(theirs.values()) == [
        f"{layer}.in_proj_bias.0", f"{layer}.in_proj_bias.1", f"{layer}.in_proj_bias.2",
        f"{layer}.out_proj.bias", "positional_embedding", "ln_final.bias",
    ]  # fmt: skip
    assert open_clip_to_ours(theirs.values()) == {new: old for old, new in theirs.items()}


def test_names_of_nobody_stay():
    names = ["label_emb.0.0.weight", "input_blocks.99.0.weight", "x"]
    assert unet_to_ours(names) == {name: name for name in names}


def test_ema_names_have_lost_their_dots():
    expected = "model_ema.diffusion_modelinput_blocks10transformer_blocks0norm1bias"
    assert ema_name("input_blocks.1.0.transformer_blocks.0.norm1.bias") == expected
