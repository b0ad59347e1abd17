"""The scripts' main functions, in this process, with the tiny model."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """`script("txt2img", "a flower", "--steps", 2)` runs it on the tiny model."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr("ldm.processor.half_pays", lambda: False)  # wherever it runs

    def run(name: str, *words: object, model: Path | None = tiny_model_folder) -> None:
        main = runpy.run_path(str(SCRIPTS / f"{name}.py"))["main"]
        main([*map(str, words), *(["--model", str(model)] if model else [])])

    return run
