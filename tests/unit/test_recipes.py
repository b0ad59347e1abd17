"""The recipes in configs/ are whole, open with their command, and agree with the presets."""

import subprocess
import sys
from pathlib import Path

import pytest

from ldm.cli import parse_config
from ldm.config import PRESETS
from ldm.training.config import STAGES

CONFIGS = Path(__file__).parents[2] / "configs"
LAUNCHES = sorted(CONFIGS.glob("accelerate/*.yaml"))
RECIPES = sorted(set(CONFIGS.glob("*/*.yaml")) - set(LAUNCHES))


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


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_takes_its_configuration_as_the_first_line_says(launch):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    _, *words = launch.read_text().splitlines()[0].removeprefix("# accelerate ").split()
    given = launch_command_parser().parse_args(words)
    assert given.config_file == str(launch.relative_to(CONFIGS.parent))
    script, stage, _, recipe = given.training_script, *given.training_script_args
    assert (CONFIGS.parent / script).is_file() and CONFIGS.parent / recipe in RECIPES
    assert Path(recipe).stem == stage
    given.config_file = str(launch)
    load_config_from_file(given.config_file)  # refuses unknown keys
    found = _validate_launch_command(given)[0]
    machines, processes, torchrun = {
        "one_gpu": (1, 1, False),
        "multi_gpu": (1, 8, True),
        "multi_node": (2, 16, True),
        "cpu_two_processes": (1, 2, True),
    }[launch.stem]
    assert (found.num_machines, found.num_processes) == (machines, processes)
    assert found.multi_gpu == torchrun
    assert found.use_cpu == (launch.stem == "cpu_two_processes")
    if machines > 1:
        assert (found.machine_rank, found.main_process_ip) == (0, "10.0.0.1")


def test_two_processes_on_a_cpu_are_two(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from accelerate import PartialState\n"
        "state = PartialState(cpu=True)\n"
        "said = f'{state.process_index} {state.num_processes} {state.device.type}\\n'\n"
        "print(said, end='', flush=True)\n"  # in one piece: the other process writes here, too
    )
    launch = ["accelerate.commands.launch", "--config_file"]
    launch += [str(CONFIGS / "accelerate" / "cpu_two_processes.yaml"), str(script)]
    said = subprocess.run(
        [sys.executable, "-m", *launch], capture_output=True, text=True, check=True
    ).stdout
    assert sorted(said.splitlines()) == ["0 2 cpu", "1 2 cpu"]
