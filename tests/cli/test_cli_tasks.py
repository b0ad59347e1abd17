"""img2img, inpaint and interpolate on a tiny model: the pictures are the pipeline's own."""

import numpy as np
import pytest
from PIL import Image

from ldm import tasks
from ldm.metadata import read_record, read_settings


@pytest.fixture
def photo(tmp_path):
    """A picture of 44x33 pixels, which is no multiple of 4; and a mask of its right half."""
    levels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(levels).resize((44, 33), Image.Resampling.BICUBIC)
    mask = Image.new("L", (44, 33))
    mask.paste(255, (24, 0, 44, 33))
    image.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    return image, mask


def assert_same(file, image):
    with Image.open(file) as drawn:
        difference = np.asarray(drawn.convert("RGB")).astype(int) - np.asarray(image)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("words", [["--image"], ["--init-img"]])
def test_img2img(script, tmp_path, photo, tiny_pipeline, words):
    options = ["--seed", 7, "--steps", 4, "--n_samples", 3, "--batch_size", 2]
    script("img2img", "a", *words, tmp_path / "photo.png", *options, "--outdir", tmp_path)
    files = sorted((tmp_path / "samples").iterdir())
    expected = tiny_pipeline("a", image=photo[0], seed=[7, 8, 9], num_images_per_prompt=3)
    for file, image in zip(files, expected.images, strict=True):
        assert_same(file, image)
    assert files[2].name == "00002.png" and read_settings(files[2]).settings["strength"] == 0.8
    assert Image.open(files[0]).size == (44, 32)


def test_img2img_strength_and_size(script, tmp_path, photo, tiny_pipeline):
    words = ["--image", tmp_path / "photo.png", "--strength", 0.5, "--W", 48, "--H", 16]
    script("img2img", "a", "--seed", 7, *words, "--outdir", tmp_path)
    expected = tiny_pipeline("a", image=photo[0], seed=7, strength=0.5, width=48, height=16)
    assert_same(tmp_path / "samples" / "00000.png", expected.images[0])


def test_inpaint(script, tmp_path, photo, tiny_pipeline):
    words = ["--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png"]
    script("inpaint", "a", "--seed", 7, *words, "--outdir", tmp_path)
    expected = tiny_pipeline("a", image=photo[0], mask_image=photo[1], seed=7)
    assert_same(tmp_path / "samples" / "00000.png", expected.images[0])
    record = read_record(tmp_path / "samples" / "00000.png") or {}
    names = [entry["file"] for entry in record["files"]]
    assert names == [str(tmp_path / "photo.png"), str(tmp_path / "mask.png")]


def test_outpaint(script, tmp_path, photo, tiny_pipeline):
    words = ["--image", tmp_path / "photo.png", "--outpaint", 8, 0, 4, 12]
    script("inpaint", "a", "--seed", 7, *words, "--outdir", tmp_path)
    image, mask = tasks.outpainting(photo[0], left=8, top=4, bottom=12, factor=4)
    expected = tiny_pipeline("a", image=image, mask_image=mask, seed=7).images[0]
    assert expected.size == (52, 52)
    assert_same(tmp_path / "samples" / "00000.png", expected)


KEYS = {
    "prompts": (["a", "b"], [], [42]),
    "seeds": (["a"], ["--seeds", "3,4,5"], [3, 4, 5]),
    "both": (["a", "b"], ["--seeds", "3,4", "--loop"], [3, 4]),
}


@pytest.mark.parametrize(("prompts", "words", "seeds"), KEYS.values(), ids=KEYS.keys())
def test_interpolate(script, tmp_path, tiny_pipeline, prompts, words, seeds):
    options = ["--frames", 4, "--steps", 2, "--fps", 8, "--batch_size", 3, "--outdir", tmp_path]
    script("interpolate", *prompts, *words, *options, "--negative_prompt", "grey")
    expected = tasks.interpolate(
        tiny_pipeline,
        prompts,
        seeds,
        4,
        loop="--loop" in words,
        negative_prompts=["grey"],
        num_inference_steps=2,
    )
    for i, image in enumerate(expected):
        assert_same(tmp_path / "frames-0000" / f"{i:05}.png", image)
    with Image.open(tmp_path / "frames-0000.webp") as film:
        assert film.n_frames == 4 and film.info["loop"] == 0  # type: ignore
        film.seek(1)
        film.load()
        assert film.info["duration"] == 125 and film.size == (32, 32)
    script("interpolate", *prompts, *words, *options)
    assert (tmp_path / "frames-0001.webp").is_file()


def test_keys_of_a_prompt_file(script, tmp_path, tiny_pipeline):
    (tmp_path / "keys.txt").write_text("a --d 3 --n grey\nb\nc --d 4\n")
    words = ["--from-file", tmp_path / "keys.txt", "--frames", 3, "--steps", 2, "--seed", 9]
    script("interpolate", *words, "--outdir", tmp_path)
    keys = (("a", "grey", 3), ("b", "", 9), ("c", "", 4))
    for i, (prompt, negative, seed) in enumerate(keys):
        options = {"negative_prompt": negative, "seed": seed, "num_inference_steps": 2}
        image = tiny_pipeline(prompt, **options).images[0]
        assert_same(tmp_path / "frames-0000" / f"{i:05}.png", image)


def test_an_interruption_keeps_the_frames(script, tmp_path, monkeypatch):
    def interpolate(*_, **__):
        yield Image.new("RGB", (8, 8))
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "interpolate", interpolate)
    with pytest.raises(KeyboardInterrupt):
        script("interpolate", "a", "b", "--outdir", tmp_path)
    assert [file.name for file in tmp_path.rglob("*.*")] == ["00000.png"]
