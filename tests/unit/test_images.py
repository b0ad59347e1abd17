from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import DataError
from ldm.images import image_grid, read_image, to_pil, to_rgb, upright_size


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


def test_read_image_as_a_viewer_shows_it(tmp_path):
    """Upright, on white, 8 bits; the modes themselves are tested with the data's transforms."""
    colors = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    colors.putpixel((0, 0), (0, 0, 255, 255))
    colors.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x112] = 6  # turn clockwise to see it
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.png")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (0, 0, 255)
    assert image.getpixel((1, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "a.jpg").size == (2, 3)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("kept", [8, 10, 14, 20, 99])
def test_damaged_exif_is_no_damage(kind, kept):
    exif = Image.Exif()
    exif[0x112] = 6
    file = BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, kind, exif=exif.tobytes()[:kept])
    image = to_rgb(Image.open(file))
    assert image.size == to_rgb(image).size == ((2, 3) if kept == 99 else (3, 2))


@pytest.mark.parametrize(("tag", "kind"), [(b"\x01\x1a\x00\x05", 2), (b"\x01\x32\x00\x02", 5)])
def test_exif_that_cannot_be_written_again(kind, tag):
    """A resolution that is text, a date that is a fraction: the orientation beside it holds."""
    exif = Image.Exif()
    exif[0x112], exif[0x11A], exif[0x132] = 6, 72.0, "2020:01:01 00:00:00"
    data = bytearray(exif.tobytes())
    data[data.index(tag) + 3] = kind
    file = BytesIO()
    Image.new("RGB", (3, 2), "red").save(file, "png", exif=bytes(data))
    image = to_rgb(Image.open(file))
    assert image.size == to_rgb(image).size == upright_size(Image.open(file)) == (2, 3)


def test_orientation_of_xmp_is_applied_once():
    file = BytesIO()
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    Image.new("RGB", (3, 2), "red").save(file, "webp", xmp=xmp)
    image = to_rgb(Image.open(file))
    assert image.size == to_rgb(image).size == upright_size(Image.open(file)) == (2, 3)


def test_floating_point_pixels_are_refused():
    with pytest.raises(DataError, match="no agreed white; save the picture with 8 or 16 bits"):
        to_rgb(Image.fromarray(np.ones((2, 2), np.float32)))


def test_read_image_refuses_in_one_line(tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(DataError, match=r"a\.png cannot be read as a picture"):
        read_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no file .*b\.png"):
        read_image(tmp_path / "b.png")
