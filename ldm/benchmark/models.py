"""Models to measure with: in the shape of well-known ones, their weights random; and their FLOP.

Speed does not depend on the weights, and both sides open the same folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.benchmark.cases import Job, Point
from ldm.checkpoint.folder import ModelParts, save_folder
from ldm.checkpoint.locate import PRETRAINED
from ldm.checkpoint.tokenizer import clip_tokenizer
from ldm.config import PRESETS, AutoencoderConfig, ModelPreset, ScheduleConfig, UNetConfig
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import ClipTextConfig, ClipTextModel
from ldm.models.text_encoder import ClipTower, TextEncoder
from ldm.models.unet import UNet
from ldm.training.cost import flop_counter

TOKENS = 77


def _text(width: int, layers: int, heads: int, **options: Any) -> ClipTextConfig:
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads}
    vocab_size = options.setdefault("vocab_size", 49408)
    options |= {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
    return ClipTextConfig(
        hidden_size=width, intermediate_size=4 * width, projection_dim=width, **shape, **options
    )


_SD15, _TEXT = PRESETS["sd15"], _text(768, 12, 12)
SHAPES: dict[str, tuple[ModelPreset, ClipTextConfig]] = {
    "flowers": (PRESETS["flowers"], _text(128, 3, 4, vocab_size=6144)),
    "sd15": (_SD15, _TEXT),
    "sd21": (PRESETS["sd21"], _text(1024, 23, 16, hidden_act="gelu")),
    "unet128": (
        replace(
            _SD15,
            unet=replace(_SD15.unet, sample_size=32, block_out_channels=(128, 256, 512, 512)),
        ),
        _TEXT,
    ),
    "tiny": (
        ModelPreset(
            UNetConfig(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                cross_attention=(True, False),
                cross_attention_dim=32,
                num_attention_heads=2,
                norm_num_groups=8,
            ),
            AutoencoderConfig(
                block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, sample_size=16
            ),
            ScheduleConfig(),
        ),
        _text(32, 2, 4, vocab_size=1000),
    ),
}


def model_folder(size: str, work_dir: Path) -> Path:
    """The model of this size: a folder that ldm and diffusers open, made if it is not there."""
    if size == "flowers":
        return PRETRAINED / size
    folder = work_dir / size
    if not (folder / "model_index.json").exists():  # which is written last
        preset, text = SHAPES[size]
        torch.manual_seed(0)
        unet, vae = UNet(preset.unet), AutoencoderKL(preset.vae)
        _fill(unet)
        tower = ClipTower(ClipTextModel(text), clip_tokenizer(text.vocab_size, TOKENS))
        schedule = NoiseSchedule(preset.schedule)
        save_folder(ModelParts(unet, vae, TextEncoder(tower), schedule, {}), folder)
    return folder


def latent_shape(job: Job, point: Point) -> tuple[int, int, int, int]:
    """Of the latents of a point, b l h w."""
    vae = SHAPES[job.size][0].vae
    h, w = (side // vae.downsample_factor for side in (point.height, point.width))
    return point.batch, vae.latent_channels, h, w


def flop(job: Job, point: Point) -> int:
    """Floating-point operations of the work by the plain networks; a multiply-add is two.

    Matrix products, convolutions and attention are counted, on tensors without contents. 0 for
    work that consists of other things.
    """
    preset, text = SHAPES[job.size]
    b, *latents = latent_shape(job, point)
    height, width = point.height, point.width

    def unet(b: int) -> Tensor:
        context = torch.empty(b, TOKENS, preset.unet.cross_attention_dim)
        return UNet(preset.unet)(torch.empty(b, *latents), torch.zeros(b), context)

    works: dict[str, Callable[[], Any]] = {
        "unet": lambda: unet(2 * b),
        "vae_decode": lambda: AutoencoderKL(preset.vae).decode(torch.empty(b, *latents)),
        "text": lambda: ClipTextModel(text)(torch.zeros(2, TOKENS, dtype=torch.long)),
        "train_unet": lambda: unet(b).sum().backward(),
        "train_vae": lambda: (
            AutoencoderKL(preset.vae)(torch.empty(b, 3, height, width))[0].sum().backward()
        ),
    }
    parts = {"txt2img": {"unet": point.steps or 0, "vae_decode": 1, "text": 1}, "startup": {}}
    return sum(
        times * _count(works[name]) for name, times in parts.get(job.work, {job.work: 1}).items()
    )


def _count(work: Callable[[], Any]) -> int:
    with FakeTensorMode(), flop_counter() as counter:
        work()
    return counter.get_total_flops()


def _fill(network: nn.Module) -> None:
    """Layers that begin at zero get weights, or what comes before them would not show."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and not module.weight.any():
            module.reset_parameters()
