"""A whole model that is small enough for every test: 32 px pictures, f4, random weights."""

import torch
from torch import nn

from ldm.config import AutoencoderConfig, ClipConfig, ScheduleConfig, TowerConfig, UNetConfig
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline

UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    cross_attention=(True, False),
    cross_attention_dim=32,
    attention_head_dim=8,
    norm_num_groups=8,
)
VAE = AutoencoderConfig(
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=32,
    scaling_factor=0.4,
)
CLIP = ClipConfig(
    text=TowerConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    vision=TowerConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
    vocab_size=1000,
    projection_dim=16,
    image_size=32,
)


def randomize(module: nn.Module) -> None:
    """Every part of a network shows in its output: no layer at zero, and words that matter."""
    for name, parameter in module.named_parameters():
        if parameter.detach().std(correction=0) == 0:
            nn.init.normal_(parameter, float(parameter.detach().flatten()[0]), 0.2)
        if ".attn2." in name:
            parameter.data *= 4


def make_pipeline(schedule: ScheduleConfig | None = None) -> LatentDiffusionPipeline:
    """A model of the same random weights every time, its progress bar off."""
    from clips import our_encoder
    from transformers import CLIPModel

    from ldm.checkpoint.tokenizer import clip_tokenizer
    from ldm.training.clip import build_clip

    clip_config = build_clip(CLIP).config
    state = torch.get_rng_state()
    torch.manual_seed(0)
    unet, vae, clip = UNet(UNET), AutoencoderKL(VAE), CLIPModel(clip_config)
    for module in (unet, vae, clip):
        randomize(module)
    torch.set_rng_state(state)
    pipeline = LatentDiffusionPipeline(
        unet.eval(),
        vae.eval(),
        our_encoder(clip.text_model, clip_tokenizer(CLIP.vocab_size)),
        NoiseSchedule(schedule or ScheduleConfig()),
        defaults={"num_inference_steps": 4, "guidance_scale": 3.0},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
