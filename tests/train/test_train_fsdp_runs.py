"""`--fsdp` through the whole loop: two processes against one, in float64, whoever resumes whom."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from train_helpers import metrics, run_all, weights

from ldm.checkpoint.io import verify
from ldm.pipeline import LatentDiffusionPipeline

TOLERANCE = 1e-12  # relative, of every tensor
SHARDED = {"world": 2, "double": True}
ALONE = {"double": True}


@pytest.fixture(scope="module")
def runs(pictures: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole runs of either kind, and their second halves from each other's middle."""
    folder = tmp_path_factory.mktemp("fsdp")
    options = {
        "train_data_dir": pictures, "pretrained_model_name_or_path": tiny_model_folder,
        "checkpointing_steps": 2, "validation_steps": 2, "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
    }  # fmt: skip
    kinds = {"one": ({"fsdp": True}, ALONE), "two": ({"fsdp": True}, SHARDED)}
    run_all([
        ("unet", options | own | {"output_dir": folder / name}, how)
        for name, (own, how) in kinds.items()
    ])  # fmt: skip
    plan = []
    for before, after in (("two", "one"), ("one", "two")):
        own, how = kinds[after]
        output = folder / f"{before}-{after}"
        shutil.copytree(folder / before, output, ignore=shutil.ignore_patterns("checkpoint-4"))
        resume = {"resume_from_checkpoint": "latest", "output_dir": output}
        plan.append(("unet", options | own | resume, how))
    run_all(plan)
    return folder


@pytest.mark.parametrize("name", ["two", "two-one", "one-two"])
def test_the_model_is_that_of_one_process(runs: Path, name: str) -> None:
    ours, theirs = (weights(runs / run / "checkpoint-4/unet") for run in (name, "one"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (ours[key] - tensor).norm() <= TOLERANCE * tensor.norm(), key
    for row, expected in zip(metrics(runs / name), metrics(runs / "one"), strict=True):
        assert row == pytest.approx(expected, rel=1e-6)  # logged in float32
    for grid in sorted((runs / "one/samples").iterdir()):
        assert (
            Image.open(grid).tobytes() == Image.open(runs / name / "samples" / grid.name).tobytes()
        )


def test_its_checkpoint_verifies_and_is_a_model(runs: Path) -> None:
    folder = runs / "two/checkpoint-4"
    verify(folder)
    assert len(list((folder / "training_state/unet.optimizer").iterdir())) == 2
    assert {f.suffix for f in (folder / "training_state").rglob("*") if f.is_file()} == {
        ".json",
        ".safetensors",
    }
    LatentDiffusionPipeline.from_pretrained(folder)
