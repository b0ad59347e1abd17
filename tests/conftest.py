"""The tiny model as fixtures, and no network for any test."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiny import make_pipeline

from ldm.pipeline import LatentDiffusionPipeline


@pytest.fixture(scope="session")
def tiny_pipeline() -> LatentDiffusionPipeline:
    """Shared by the whole session: draw with it, do not change it."""
    return make_pipeline()


@pytest.fixture(scope="session")
def tiny_model_folder(
    tiny_pipeline: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`tiny_pipeline` saved as a model folder: read it, do not write to it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return folder
