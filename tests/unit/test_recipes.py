"""The recipes in configs/ are whole, open with their command, and agree with the presets."""

from pathlib import Path

import pytest

from ldm.cli import parse_config
from ldm.config import PRESETS
from ldm.training.config import STAGES

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*/*.yaml"))


def read(recipe: Path):
    stage = recipe.stem.split("_")[0]
    return parse_config(STAGES[stage], ["--config", str(recipe)], "train.py")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_opens_with_its_own_command_and_parses(recipe):
    config = read(recipe)
    first = recipe.read_text().splitlines()[0]
    stage = recipe.stem.split("_")[0]
    name = recipe.relative_to(CONFIGS.parent)
    assert first.startswith(f"# accelerate launch scripts/train.py {stage} --config {name}")
    assert config.output_dir == Path("outputs") / recipe.parent.name / recipe.stem


def test_flower_recipes_are_the_flowers_preset():
    preset = PRESETS["flowers"]
    unet = read(CONFIGS / "flowers" / "unet.yaml")
    assert unet.unet == preset.unet
    assert unet.schedule == preset.schedule
    assert read(CONFIGS / "flowers" / "vae.yaml").vae == preset.vae


@pytest.mark.parametrize("folder", ["flowers", "flowers102", "small"])
def test_the_three_stages_fit_each_other(folder):
    vae, clip, unet = (read(CONFIGS / folder / f"{s}.yaml") for s in ("vae", "clip", "unet"))
    assert unet.unet.in_channels == unet.unet.out_channels == vae.vae.latent_channels
    assert unet.unet.cross_attention_dim == clip.clip.text.hidden_size
    assert unet.unet.sample_size * vae.vae.downsample_factor == vae.resolution == unet.resolution
