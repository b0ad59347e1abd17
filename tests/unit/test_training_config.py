import subprocess
import sys
from pathlib import Path

import pytest

from ldm.config import AutoencoderConfig, ClipConfig, ScheduleConfig
from ldm.errors import ConfigError
from ldm.training.config import (
    STAGES,
    ClipTraining,
    TrainingConfig,
    UNetTraining,
    VaeTraining,
)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrainingConfig(train_batch_size=0), "train_batch_size is 0"),
        (lambda: TrainingConfig(learning_rate=-1.0), "learning_rate is -1.0"),
        (lambda: TrainingConfig(max_grad_norm=0.0), "max_grad_norm is 0.0"),
        (lambda: TrainingConfig(checkpoints_total_limit=0), "checkpoints_total_limit is 0"),
        (lambda: TrainingConfig(max_train_samples=-1), "max_train_samples is -1"),
        (lambda: TrainingConfig(ema_decay=1.0), "ema_decay is 1.0"),
        (lambda: TrainingConfig(validation_split=1.5), "validation_split is 1.5"),
        (
            lambda: TrainingConfig(train_batch_size=6, gradient_accumulation_steps=4),
            "train_batch_size 6 cannot be split into gradient_accumulation_steps 4",
        ),
        (
            lambda: VaeTraining(
                resolution=30, vae=AutoencoderConfig(block_out_channels=(32, 64, 64))
            ),
            "resolution 30 is not a multiple of 4",
        ),
        (
            lambda: VaeTraining(mixed_precision="fp16", disc_start=10),
            "two optimizers cannot share one fp16 loss scale",
        ),
        (
            lambda: VaeTraining(disc_start=10, gradient_accumulation_steps=2),
            "cannot be accumulated",
        ),
        (
            lambda: ClipTraining(resolution=32, clip=ClipConfig(image_size=64)),
            "resolution 32 and clip.image_size 64 differ",
        ),
        (
            lambda: ClipTraining(train_batch_size=4, gradient_accumulation_steps=2),
            "cannot be accumulated",
        ),
        (lambda: UNetTraining(proportion_empty_prompts=1.1), "proportion_empty_prompts is 1.1"),
        (
            lambda: UNetTraining(schedule=ScheduleConfig(prediction_type="v_prediction")),
            "schedule belongs to a U-Net trained from scratch",
        ),
        (lambda: UNetTraining(cache_latents=True, center_crop=False), "one crop of a picture"),
        (lambda: UNetTraining(fsdp=True, mixed_precision="fp16"), "fsdp cannot share out"),
        (lambda: UNetTraining(noise_offset=-0.1), "noise_offset is -0.1; it must be 0 or more"),
        (lambda: ClipTraining(enable_bucket=True), "turn enable_bucket off"),
        (lambda: VaeTraining(resolution=66), "resolution 66 is not a multiple of 8"),
        (
            lambda: VaeTraining(enable_bucket=True, bucket_reso_steps=62),
            "bucket_reso_steps 62 is not a multiple of 8",
        ),
    ],
)
def test_one_line_says_what_is_wrong(make, words):
    with pytest.raises(ConfigError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_trained_autoencoder_brings_its_own_factor():
    config = VaeTraining(resolution=36, pretrained_model_name_or_path="anywhere")
    assert config.resolution % config.vae.downsample_factor  # of a model that is not used


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_recipes_are_read_and_every_option_is_explained(stage):
    from ldm.cli import parse_config

    recipe = Path(__file__).parents[2] / "configs" / "flowers" / f"{stage}.yaml"
    config = parse_config(STAGES[stage], ["--seed", "7"], "train.py", recipe)
    assert type(config) is STAGES[stage] and config.seed == 7 and config.max_train_steps >= 1000
    documented = "".join(str(kind.__doc__) for kind in (TrainingConfig, STAGES[stage]))
    assert [name for name in vars(config) if f"\n        {name}: " not in documented] == []


def test_it_loads_nothing_heavy():
    code = "import sys, ldm.training.config; print({'torch', 'accelerate'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout.strip() == "set()"
