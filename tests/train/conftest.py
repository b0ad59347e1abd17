"""Pictures to train on."""

from pathlib import Path

import pytest

from ldm.data.flowers import render, scene


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 procedural flowers with their captions, 32 px."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(24):
        what = scene(i, "train")
        render(what, 32).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(what.caption)
    return folder
