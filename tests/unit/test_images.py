import numpy as np
import pytest
import torch
from PIL import Image

from ldm.images import image_grid, parameters_text, read_parameters, save_png, to_pil


def test_to_pil_rounds_to_the_nearest_level():
    """Level k stands for 2 k / 255 - 1: all of them come back, and so does what is near."""
    levels = np.arange(256)
    exact = 2 * levels / 255 - 1
    for offset in (0, 0.49, -0.49):
        values = torch.tensor(exact + 2 * offset / 255, dtype=torch.float64)
        (image,) = to_pil(values.reshape(1, 1, 16, 16).expand(1, 3, 16, 16))
        np.testing.assert_array_equal(np.asarray(image)[..., 1].ravel(), levels)
    assert image.mode == "RGB"
    wide = torch.tensor([-9.0, 9.0, float("inf"), -float("inf")]).reshape(1, 1, 1, 4)
    (image,) = to_pil(wide.expand(1, 3, 1, 4))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 255, 255, 0]


def test_to_pil_keeps_channels_rows_and_order():
    images = torch.full((2, 3, 2, 5), -1.0)
    images[0, 0, 0, 4] = 1  # red, first row, last column
    images[1, 2, 1, 0] = 1  # blue, second row, first column
    first, second = to_pil(images.bfloat16().requires_grad_())
    assert first.size == (5, 2)
    assert first.getpixel((4, 0)) == (255, 0, 0) and first.getpixel((0, 1)) == (0, 0, 0)
    assert second.getpixel((0, 1)) == (0, 0, 255) and second.getpixel((4, 0)) == (0, 0, 0)


def test_grid_pixels():
    tones = [(10 * i, 0, 255 - 10 * i) for i in range(5)]
    images = [Image.new("RGB", (4, 3), tone) for tone in tones]
    pixels = np.asarray(image_grid(images, columns=3, gap=2))
    expected = np.full((3 + 2 + 3, 4 + 2 + 4 + 2 + 4, 3), 255, dtype=np.uint8)
    for i, tone in enumerate(tones):
        top, left = i // 3 * 5, i % 3 * 6
        expected[top : top + 3, left : left + 4] = tone
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3), (10, 4)])
def test_grid_is_as_square_as_can_be(count, columns):
    grid = image_grid([Image.new("RGB", (2, 2))] * count, gap=0)
    assert grid.size == (2 * columns, 2 * -(-count // columns))


SETTINGS = {
    "num_inference_steps": 30,
    "sampler": "euler_a",
    "timestep_spacing": "karras",
    "guidance_scale": 3.5,
    "width": 64,
    "height": 32,
}


@pytest.mark.parametrize(
    "prompt", ["a red flower", "빨간 꽃 한 송이", "naïve — “quoted”, 100%\nrow"]
)
@pytest.mark.parametrize("negative", ["", "흐릿한"])
def test_parameters_survive_in_a_png(tmp_path, prompt, negative):
    text = parameters_text(prompt, negative, 7, SETTINGS)
    lines = [prompt] + ([f"Negative prompt: {negative}"] if negative else [])
    lines.append(
        "Steps: 30, Sampler: euler_a, Schedule type: karras, CFG scale: 3.5, Seed: 7, Size: 64x32"
    )
    assert text == "\n".join(lines)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8))
    save_png(image, tmp_path / "deep" / "a.png", text)
    assert read_parameters(tmp_path / "deep" / "a.png") == text
    with Image.open(tmp_path / "deep" / "a.png") as again:
        np.testing.assert_array_equal(np.asarray(again), np.asarray(image))
    assert b"iTXtparameters\0" in (tmp_path / "deep" / "a.png").read_bytes()


def test_a_png_without_parameters(tmp_path):
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png")
    assert read_parameters(tmp_path / "a.png") is None
