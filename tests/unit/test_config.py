"""The configurations check themselves, and say in one line what is wrong."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from ldm.config import (
    PRESETS,
    AutoencoderConfig,
    ClipConfig,
    SamplerName,
    ScheduleConfig,
    TowerConfig,
    UNetConfig,
    check_size,
)
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import ConfigError, suggest
from ldm.training.config import (
    STAGES,
    ClipTraining,
    UNetTraining,
    VaeTraining,
    learning_rate_at,
)


def test_the_samplers_are_those_of_their_name():
    assert set(SAMPLERS) == set(get_args(SamplerName))


@pytest.mark.parametrize(
    ("name", "heads", "factor", "pixels"),
    [
        ("sd15", (8, 8, 8, 8), 8, 512),
        ("sd21", (5, 10, 20, 20), 8, 512),
        ("sd21-v", (5, 10, 20, 20), 8, 768),
        ("flowers", (2, 4, 6), 4, 64),
    ],
)
def test_presets(name, heads, factor, pixels):
    preset = PRESETS[name]
    assert preset.unet.heads == heads
    assert preset.vae.downsample_factor == factor
    assert preset.vae.sample_size == pixels == preset.unet.sample_size * factor
    assert preset.unet.in_channels == preset.unet.out_channels == preset.vae.latent_channels == 4
    expected = "v_prediction" if name == "sd21-v" else "epsilon"
    assert preset.schedule.prediction_type == expected


def test_presets_are_the_recipes():
    """`flowers` is what the three files of configs/flowers train, together."""
    import yaml

    folder = Path(__file__).parents[2] / "configs" / "flowers"
    vae, clip, unet = (
        yaml.safe_load((folder / f"{stage}.yaml").read_text()) for stage in ("vae", "clip", "unet")
    )

    def tuples(values):
        return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

    assert PRESETS["flowers"].vae.block_out_channels == tuple(vae["vae"]["block_out_channels"])
    assert PRESETS["flowers"].unet == UNetConfig(**tuples(unet["unet"]))
    assert clip["clip"]["text"]["hidden_size"] == PRESETS["flowers"].unet.cross_attention_dim


WRONG = [
    (UNetConfig, {}, "num_attention_heads or attention_head_dim"),
    (
        UNetConfig,
        {"num_attention_heads": 8, "attention_head_dim": 8},
        "num_attention_heads or attention_head_dim",
    ),
    (
        UNetConfig,
        {"num_attention_heads": 8, "cross_attention": (True,)},
        "cross_attention has 1 entries and block_out_channels 4",
    ),
    (UNetConfig, {"num_attention_heads": 7}, "320 cannot be split into 7 heads"),
    (UNetConfig, {"attention_head_dim": 640}, "320 cannot be split into heads of width 640"),
    (UNetConfig, {"attention_head_dim": 48}, "320 cannot be split into heads of width 48"),
    (UNetConfig, {"attention_head_dim": 0}, "attention_head_dim is 0"),
    (UNetConfig, {"num_attention_heads": 0}, "320 cannot be split into 0 heads"),
    (UNetConfig, {"num_attention_heads": (8, 8)}, "num_attention_heads has 2 entries"),
    (UNetConfig, {"num_attention_heads": 8, "norm_num_groups": 33}, "norm_num_groups 33"),
    (UNetConfig, {"num_attention_heads": 8, "norm_num_groups": 0}, "norm_num_groups is 0"),
    (UNetConfig, {"num_attention_heads": 8, "layers_per_block": 0}, "layers_per_block is 0"),
    (
        UNetConfig,
        {"num_attention_heads": 8, "block_out_channels": (), "cross_attention": ()},
        "block_out_channels",
    ),
    (AutoencoderConfig, {"block_out_channels": (30, 64)}, r"vae: block_out_channels \(30, 64\)"),
    (AutoencoderConfig, {"scaling_factor": 0.0}, "scaling_factor is 0.0"),
    (AutoencoderConfig, {"layers_per_block": 0}, "layers_per_block is 0"),
    (ScheduleConfig, {"num_train_timesteps": 1}, "num_train_timesteps is 1"),
    (ScheduleConfig, {"beta_start": 0.5}, "beta_start <= beta_end"),
    (ScheduleConfig, {"min_signal_rate": 0.96}, "min_signal_rate < max_signal_rate"),
    (ScheduleConfig, {"beta_schedule": "linaer"}, "beta_schedule 'linaer'; did you mean 'linear'"),
    (ScheduleConfig, {"prediction_type": "eps"}, "prediction_type 'eps'"),
    (ScheduleConfig, {"timestep_spacing": "traling"}, "did you mean 'trailing'"),
    (TowerConfig, {"hidden_size": 30}, "30 cannot be split into 4"),
    (ClipConfig, {"image_size": 60}, "image_size 60 is not a multiple of patch_size 8"),
    (ClipConfig, {"vocab_size": 500}, "vocab_size is 500"),
    (ClipConfig, {"vocab_size": 50000}, "vocab_size is 50000"),
    (VaeTraining, {"resolution": 60}, "resolution 60 is not a multiple of 8"),
    (VaeTraining, {"learning_rate": 0.0}, "learning_rate is 0.0; it must be positive"),
    (VaeTraining, {"lr_decay_steps": -1}, "lr_decay_steps is -1; it must be 0 or more"),
    (VaeTraining, {"lr_decay_steps": 9, "lr_scheduler": "cosine"}, "cosine decays anyway"),
    (VaeTraining, {"validation_split": 1.0}, "validation_split is 1.0"),
    (
        VaeTraining,
        {"train_batch_size": 6, "gradient_accumulation_steps": 4},
        "train_batch_size 6 cannot be split",
    ),
    (VaeTraining, {"mixed_precision": "fp16", "disc_start": 5}, "bf16"),
    (ClipTraining, {"text_encoder_lr": -1e-4}, "text_encoder_lr is -0.0001"),
    (ClipTraining, {"resolution": 32}, "resolution 32 and clip.image_size 64 differ"),
    (
        ClipTraining,
        {"gradient_accumulation_steps": 2},
        "set gradient_accumulation_steps to 1",
    ),
    (UNetTraining, {"proportion_empty_prompts": 1.5}, "proportion_empty_prompts is 1.5"),
    (UNetTraining, {"cache_latents": True, "center_crop": False}, "cache_latents keeps one crop"),
]


@pytest.mark.parametrize(("config", "options", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_every_mistake_is_one_line(config, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        config(**options)
    assert "\n" not in str(error.value)


def test_heads_by_count_level_and_width():
    widths = {"block_out_channels": (64, 128), "cross_attention": (True, True)}
    assert UNetConfig(**widths, num_attention_heads=4).heads == (4, 4)
    assert UNetConfig(**widths, num_attention_heads=(2, 8)).heads == (2, 8)
    assert UNetConfig(**widths, attention_head_dim=32).heads == (2, 4)
    below = {"block_out_channels": (32, 128), "cross_attention": (False, True)}
    assert UNetConfig(**below, attention_head_dim=64).heads == (1, 2)  # the first is not used


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((64, 60), "width is 60; it must be a positive multiple of 8, such as 64"),
        ((70, 64), "height is 70; it must be a positive multiple of 8, such as 72"),
        ((0, 64), "height is 0; it must be a positive multiple of 8, such as 8"),
        ((64, -8), "width is -8; it must be a positive multiple of 8, such as 8"),
    ],
)
def test_check_size(size, said):
    check_size(64, 72, 8)
    with pytest.raises(ConfigError) as error:
        check_size(*size, 8)
    assert str(error.value) == said


def test_suggest():
    assert suggest("eulr", ["euler", "ddim"]) == "did you mean 'euler'? Choose from: ddim, euler"
    assert suggest("zzz", ["euler", "ddim"]) == "Choose from: ddim, euler"


def test_learning_rate_closed_form():
    options = {"learning_rate": 0.1, "lr_warmup_steps": 4, "max_train_steps": 14}
    for schedule, expected in (
        ("constant", [0.1, 0.1, 0.1]),
        ("linear", [0.1, 0.05, 0.01]),
        ("cosine", [0.1, 0.05, 0.1 * 0.5 * (1 - 0.9510565162951535)]),
    ):
        config = VaeTraining(lr_scheduler=schedule, **options)
        warm = [learning_rate_at(config, step) for step in range(4)]
        assert warm == pytest.approx([0.025, 0.05, 0.075, 0.1])
        assert [learning_rate_at(config, step) for step in (4, 9, 13)] == pytest.approx(expected)
        assert learning_rate_at(config, 0, base=1.0) == pytest.approx(0.25)
    config = VaeTraining(lr_decay_steps=4, **options)
    rates = [learning_rate_at(config, step) for step in range(4, 14)]
    assert rates == pytest.approx([0.1] * 7 + [0.075, 0.05, 0.025])


def test_no_torch():
    code = "import sys, ldm, ldm.training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert set(STAGES) == {"vae", "clip", "unet"}
