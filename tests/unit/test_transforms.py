"""Decoding and cropping against NumPy and closed forms."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.transforms import is_mirrored, prepare
from ldm.errors import ConfigError, DataError
from ldm.images import to_rgb
from ldm.rng import Draws

RNG = np.random.default_rng(0)


def _random(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Back to h w c in 0 ... 255."""
    return ((tensor + 1) * 127.5).round().numpy().astype(np.uint8).transpose(1, 2, 0)


def _stored(image: Image.Image, kind: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


# What undoes each EXIF orientation, by the table of the standard (EXIF 2.32, tag 0x0112).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation: int) -> None:
    pixels = _random(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = _stored(Image.fromarray(pixels), "png", exif=exif)
    np.testing.assert_array_equal(np.asarray(to_rgb(stored)), UPRIGHT[orientation](pixels))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode: str) -> None:
    pixels = _random(16, 16, len(mode))
    pixels[:4, :, -1] = 0
    pixels[4:8, :, -1] = 255
    found = np.asarray(to_rgb(_stored(Image.fromarray(pixels, mode), "png")), dtype=float)
    alpha = pixels[..., -1:] / 255
    expected = np.broadcast_to(pixels[..., :-1] * alpha + 255 * (1 - alpha), (16, 16, 3))
    assert np.abs(found - expected).max() <= 1
    assert (found[:4] == 255).all()
    np.testing.assert_array_equal(
        found[4:8],
        np.broadcast_to(pixels, (16, 16, len(mode)))[4:8, :, :-1]
        if mode == "RGBA"
        else pixels[4:8, :, :1].repeat(3, 2),
    )


def test_palette_with_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    opaque = np.asarray(to_rgb(_stored(image, "png")))
    np.testing.assert_array_equal(opaque, [[[10, 20, 30], [40, 50, 60]]])
    clear = np.asarray(to_rgb(_stored(image, "png", transparency=1)))
    np.testing.assert_array_equal(clear, [[[10, 20, 30], [255, 255, 255]]])


def test_rgb_with_a_transparent_color() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    found = np.asarray(to_rgb(_stored(image, "png", transparency=(4, 5, 6))))
    np.testing.assert_array_equal(found, [[[1, 2, 3], [255, 255, 255]]])


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_deep_grey(kind: str) -> None:
    pixels = _random(8, 8, dtype=np.uint16)
    pixels[0, :4] = (0, 257, 128 * 257, 65535)
    expected = np.round(pixels / 257).astype(np.uint8)[..., None].repeat(3, 2)
    stored = _stored(Image.fromarray(pixels), kind)
    np.testing.assert_array_equal(np.asarray(to_rgb(stored)), expected)
    wide = Image.fromarray(pixels.astype(np.int32))
    assert wide.mode == "I"
    np.testing.assert_array_equal(np.asarray(to_rgb(wide)), expected)


def test_grey_and_bilevel() -> None:
    grey = _random(5, 7)
    found = np.asarray(to_rgb(Image.fromarray(grey)))
    np.testing.assert_array_equal(found, grey[..., None].repeat(3, 2))
    bits = np.asarray(to_rgb(Image.fromarray(grey > 99)))
    np.testing.assert_array_equal(bits, np.where(grey > 99, 255, 0)[..., None].repeat(3, 2))


def test_cmyk() -> None:
    """Uniform inks, as JPEG has no exact ones: rgb = (255 - ink)(255 - black) / 255."""
    for ink in ((0, 0, 0, 0), (200, 0, 30, 0), (10, 90, 170, 60)):
        stored = _stored(Image.new("CMYK", (8, 8), ink), "jpeg", quality=100, subsampling=0)
        assert stored.mode == "CMYK"
        expected = [(255 - value) * (255 - ink[3]) / 255 for value in ink[:3]]
        found = np.asarray(to_rgb(stored), dtype=float)
        assert np.abs(found - expected).max() <= 3


def test_center_crop_without_scaling() -> None:
    pixels = _random(8, 13, 3)
    found = _array(prepare(Image.fromarray(pixels), 8))
    np.testing.assert_array_equal(found, pixels[:, 2:10])


def test_random_crop_and_flip() -> None:
    """The draws' own numbers, applied with slices."""
    pixels = _random(11, 8, 3)
    seen = set()
    for index in range(60):
        _, down, mirror = Draws(0, "augment", index).uniform(3)
        top = int(down * 4)
        expected = pixels[top : top + 8]
        expected = expected[:, ::-1] if mirror < 0.5 else expected
        draws = Draws(0, "augment", index)
        found = prepare(
            Image.fromarray(pixels), 8, center_crop=False, random_flip=True, draws=draws
        )
        np.testing.assert_array_equal(_array(found), expected)
        assert is_mirrored(Draws(0, "augment", index)) == (mirror < 0.5)
        seen.add((top, mirror < 0.5))
    assert seen == {(top, mirrored) for top in range(4) for mirrored in (False, True)}


def test_center_crop_takes_the_middle_whatever_the_draws() -> None:
    image = Image.fromarray(_random(8, 20, 3))
    plain = prepare(image, 8)
    assert torch.equal(prepare(image, 8, draws=Draws(1, "augment")), plain)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("height", "width"), [(40, 30), (9, 12)], ids=["smaller", "larger"])
def test_resize_against_pil(interpolation, height: int, width: int) -> None:
    image = Image.fromarray(_random(height, width, 3))
    side = 16
    size = (side, round(height * side / width)) if width < height else (21, side)
    resized = np.asarray(image.resize(size, Image.Resampling[interpolation.upper()]))
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    expected = resized[top : top + side, left : left + side]
    found = prepare(image, side, interpolation=interpolation)
    np.testing.assert_array_equal(_array(found), expected)


@pytest.mark.parametrize(
    ("stored", "size", "scaled"),
    [
        ((40, 60), (20, 24), (20, 30)),  # too wide: cut left and right
        ((40, 60), (24, 20), (24, 36)),
        ((60, 40), (20, 24), (36, 24)),  # too high: cut above and below
        ((7, 9), (14, 18), (14, 18)),  # its own shape, enlarged
        ((14, 18), (14, 18), (14, 18)),
    ],
)
def test_rectangles_against_pil(stored, size, scaled) -> None:
    """All sizes are height and width."""
    image = Image.fromarray(_random(*stored, 3))
    resized = np.asarray(image.resize(scaled[::-1], Image.Resampling.LANCZOS))
    top, left = ((full - side) // 2 for full, side in zip(scaled, size, strict=True))
    expected = resized[top : top + size[0], left : left + size[1]]
    np.testing.assert_array_equal(_array(prepare(image, size)), expected)
    across, down, _ = Draws(0, "augment").uniform(3)
    top, left = int(down * (scaled[0] - size[0] + 1)), int(across * (scaled[1] - size[1] + 1))
    expected = resized[top : top + size[0], left : left + size[1]]
    found = prepare(image, size, center_crop=False, draws=Draws(0, "augment"))
    np.testing.assert_array_equal(_array(found), expected)


def test_range_and_type() -> None:
    tensor = prepare(Image.fromarray(np.array([[[0, 255, 51]]], dtype=np.uint8)), 1)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_transparent_figure_keeps_clean_edges() -> None:
    """White under full alpha, black hidden where clear: no dark fringe may appear on scaling."""
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[16:48, 16:48] = 255
    assert prepare(Image.fromarray(pixels), 16).min() == 1.0


def test_errors() -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ConfigError, match="did you mean 'lanczos'"):
        prepare(image, 4, interpolation="lanczoz")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="need draws"):
        prepare(image, 4, random_flip=True)
    long = Image.new("RGB", (1, 2000))  # 512 x 1,024,000 before it is cropped
    with pytest.raises(DataError, match=r"^a\.png: 1 x 2000 pixels are too long and thin to fill"):
        prepare(long, 512, key="a.png")
    buffer = io.BytesIO()
    Image.fromarray(_random(32, 32, 3)).save(buffer, "png")
    with pytest.raises(DataError, match=r"^rose\.png: .*cut short"):
        prepare(Image.open(io.BytesIO(buffer.getvalue()[:-400])), 4, key="rose.png")
