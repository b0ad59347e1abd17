"""The model that comes with the package: complete, small, and able to draw what it is asked for."""

from pathlib import Path

import pytest

import ldm
from ldm.checkpoint.io import read_tensors
from ldm.evaluation.flowers import judge
from ldm.pipeline import LatentDiffusionPipeline

FOLDER = Path(ldm.__file__).parent / "pretrained" / "flowers"


def test_it_is_small_and_float16():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 24_000_000
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 3
    kinds = {str(t.dtype) for file in weights for t in read_tensors(file).values()}
    assert kinds <= {"torch.float16", "torch.int64"}


@pytest.fixture(scope="module")
def pipeline():
    return LatentDiffusionPipeline.from_pretrained("flowers")


def test_it_draws_what_it_is_asked_for(pipeline):
    """At its own defaults; a few pictures whose seeds are good with room to spare."""
    prompts = ["a red flower", "two blue daisies", "three yellow tulips", "a pink rose"]
    wanted = [("red", 1, None), ("blue", 2, "daisy"), ("yellow", 3, "tulip"), ("pink", 1, "rose")]
    for image, (color, count, kind) in zip(pipeline(prompts, seed=0).images, wanted, strict=True):
        seen = judge(image)
        assert (seen.color, seen.count) == (color, count)
        assert kind is None or seen.kind == kind
