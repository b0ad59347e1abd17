"""Whatever is wrong with a data set: right pixels, or one line that names the file and the member.

Every bad picture and caption goes into every layout between two good ones, which must come out
unharmed; once the run is to stop at it, and once to leave it out.
"""

import io
import json
import struct
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from layouts import error, member, metadata, parquet, pixels, png, tar, write
from PIL import Image

from ldm.data.sample import DataSource
from ldm.data.shards import TarShards
from ldm.data.sources import open_source, split_source
from ldm.data.stored import Reading
from ldm.errors import ConfigError, DataError
from ldm.images import to_rgb

SKIP = Reading(on_bad_sample="skip")


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RGB = Image.fromarray(pixels(7, 16))
SMOOTH = np.repeat(np.arange(16, dtype=np.uint8)[:, None] * 15, 16, axis=1)


def _turned(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded(RGB.crop((0, 0, 16, 8)), kind, exif=exif)


def _see_through() -> tuple[bytes, np.ndarray]:
    alpha = np.where(np.arange(16) < 8, 0, 255).astype(np.uint8)[None].repeat(16, 0)
    expected = pixels(7, 16).copy()
    expected[:, :8] = 255
    return _encoded(Image.fromarray(np.dstack([pixels(7, 16), alpha])), "png"), expected


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _bomb() -> bytes:
    """A PNG of a hundred bytes, whose header says that it has 900 million pixels."""
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    data = _chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + data + _chunk(b"IEND", b"")


GREY = (SMOOTH[..., None] * np.ones(3)).astype(np.uint8)
ODD_PICTURES: dict[str, tuple[bytes, np.ndarray]] = {
    "palette": (_encoded(RGB.quantize(256), "png"), np.asarray(RGB.quantize(256).convert("RGB"))),
    "cmyk": (_encoded(RGB.convert("CMYK"), "tiff"), np.asarray(RGB.convert("CMYK").convert("RGB"))),
    "16 bit": (_encoded(Image.fromarray(SMOOTH.astype(np.uint16) * 257), "png"), GREY),
    "1 bit": (_encoded(Image.fromarray(SMOOTH > 99), "png"), np.where(GREY > 99, 255, 0)),
    "alpha": _see_through(),
    "turned": (_turned("png"), np.rot90(pixels(7, 16)[:8], -1)),
    "turned tiff": (_turned("tiff"), np.rot90(pixels(7, 16)[:8], -1)),
    "animated": (
        _encoded(RGB, "webp", save_all=True, append_images=[RGB.rotate(90)], lossless=True),
        pixels(7, 16),
    ),
    "two in one": (_encoded(RGB, "tiff", save_all=True, append_images=[RGB]), pixels(7, 16)),
    "misnamed": (_encoded(RGB, "bmp"), pixels(7, 16)),
}
BAD_PICTURES: dict[str, bytes] = {
    "cut jpeg": _encoded(RGB, "jpeg")[:-100],
    "cut png": png(1)[:-60],
    "cut webp": _encoded(RGB, "webp")[:-40],
    "cut gif": _encoded(RGB, "gif")[:-300],
    "cut tiff": _encoded(RGB, "tiff")[:100],
    "header only": png(1)[:33],
    "empty": b"",
    "zeros": bytes(500),
    "bomb": _bomb(),
    "text": b"this is no picture",
    "html": b"<html><body>404 Not Found</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
}
BAD_WORDS: dict[str, bytes] = {
    "latin-1": "eine Blüte".encode("latin-1"),
    "utf-16": "flower".encode("utf-16"),
    "nul": b"a\0flower",
}


GOOD = (png(1), b"one"), (png(2), b"two")


def _folder(root: Path, picture: bytes, words: bytes) -> str:
    for name, (data, text) in zip("abc", (GOOD[0], (picture, words), GOOD[1]), strict=True):
        write(root / f"{name}.png", data)
        write(root / f"{name}.txt", text)
    return "b."


def _json(words: bytes, **columns: str) -> bytes:
    """A row whose words are no UTF-8 if they are none; NUL stands there as JSON writes it."""
    row = json.dumps(columns | {"text": "WORDS"}).encode()
    return row.replace(b"WORDS", words.replace(b"\0", b"\\u0000"))


def _jsonl(root: Path, picture: bytes, words: bytes) -> str:
    rows = []
    for name, (data, text) in zip("abc", (GOOD[0], (picture, words), GOOD[1]), strict=True):
        write(root / f"{name}.png", data)
        rows.append(_json(text, file_name=f"{name}.png"))
    metadata(root, *rows)
    return "line 2" if words in BAD_WORDS.values() else "b.png"


def _tar(root: Path, picture: bytes, words: bytes, ending: str = "txt") -> str:
    members = []
    for name, (data, text) in zip("abc", (GOOD[0], (picture, words), GOOD[1]), strict=True):
        text = _json(text) if ending == "json" else text
        members += [(f"{name}.jpg", data), (f"{name}.{ending}", text)]
    tar(root / "00.tar", members)
    return "00/b"


def _parquet(root: Path, picture: bytes, words: bytes) -> str:
    images = [{"bytes": data, "path": "x.jpg"} for data in (png(1), picture, png(2))]
    text = pa.array([b"one", words, b"two"]).view(pa.string())  # parquet takes anything for UTF-8
    parquet(root / "00.parquet", {"image": images, "text": text})
    return "00/000001"


LAYOUTS = (_folder, _jsonl, _tar, partial(_tar, ending="json"), _parquet)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def _read_all(source: DataSource) -> list[str]:
    """What the samples are, or what is said of them."""
    told = []
    for index in range(len(source)):
        try:
            sample = source[index]
        except DataError as bad:
            told.append(str(bad))
        else:
            told.append(sample.caption)
    return told


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ODD_PICTURES)
def test_odd_pictures_are_right(tmp_path: Path, layout, what: str) -> None:
    data, expected = ODD_PICTURES[what]
    layout(tmp_path, data, b"")  # an empty caption is one
    source = open_source(tmp_path)
    picture = to_rgb(source[1].image)
    np.testing.assert_array_equal(np.asarray(picture), expected)
    assert source.size(1) == picture.size
    assert [source[i].caption for i in range(3)] == ["one", "", "two"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", BAD_PICTURES)
def test_bad_pictures_are_named(tmp_path: Path, layout, what: str) -> None:
    name = layout(tmp_path, BAD_PICTURES[what], b"words")
    source = open_source(tmp_path, SKIP)
    first, bad, last = _read_all(source)
    assert (first, last) == ("one", "two")
    assert name in bad and "\n" not in bad
    assert source.caption(1) == "words"


@pytest.mark.filterwarnings("error")
def test_a_bomb_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path, _bomb(), b"")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    error(lambda: open_source(tmp_path)[1], "b.png", "900000000 pixels")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", BAD_WORDS)
def test_bad_captions_are_named(tmp_path: Path, layout, what: str, caplog) -> None:
    name = layout(tmp_path, png(3), BAD_WORDS[what])
    source = open_source(tmp_path, SKIP)
    told = _read_all(source)
    if layout is _jsonl:  # which is read when it is opened
        assert told == ["one", "two"]
        assert len(source.missing) == 1 and name in source.missing[0]
        assert "1 of 3" in caplog.text and name in caplog.text
        error(lambda: open_source(tmp_path), "metadata.jsonl", name, "1 of 3", "on_bad_sample")
    else:
        assert (told[0], told[2]) == ("one", "two")
        assert name in told[1] and "\n" not in told[1]


DEEP = "[" * 100_000 + "]" * 100_000
BAD_JSON = {
    "deep": f'{{"text": {DEEP}}}',
    "cut": '{"text": "a',
    "number": '{"text": 3}',
    "null": '{"text": null}',
    "list": '["text"]',
    "half a character": '{"text": "\\ud800"}',
    "other": '{"title": "a"}',
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_bad_json_is_named(tmp_path: Path, what: str) -> None:
    text = BAD_JSON[what]
    tar(
        tmp_path / "0.tar",
        [("a.png", png(1)), ("a.json", '{"text": "a"}'), ("b.png", png(2)), ("b.json", text)],
    )
    error(lambda: open_source(tmp_path)[1], "0/b")
    root = tmp_path / "jsonl"
    write(root / "a.png", png(1))
    bad = text if text[0] == "[" else text.replace("{", '{"file_name": "a.png", ', 1)
    metadata(root, {"file_name": "a.png", "text": "a"}, bad)
    error(lambda: open_source(root), "metadata.jsonl", "line 2")
    assert len(open_source(root, SKIP)) == 1


def test_missing_captions(tmp_path: Path, caplog) -> None:
    """Named and counted at once: one way to stop, one way to go on, in every layout."""
    for name in "abc":
        write(tmp_path / f"folder/{name}.png", png(1))
        write(tmp_path / f"jsonl/{name}.png", png(1))
    write(tmp_path / "folder/b.txt", "b")
    metadata(
        tmp_path / "jsonl",
        {"file_name": "a.png"},
        {"file_name": "b.png", "text": "b"},
        {"file_name": "c.png"},
    )
    tar(tmp_path / "tar/0.tar", [(f"{n}.png", png(1)) for n in "abc"] + [("b.txt", "b")])
    parquet(tmp_path / "parquet/0.parquet", {"image": [png(1)] * 3, "text": [None, "b", None]})
    firsts = {"folder": "a.png", "jsonl": "line 1", "tar": "a in", "parquet": "0/000000"}
    for layout, name in firsts.items():
        root = tmp_path / layout
        error(partial(open_source, root), "2 of 3", "the first is", name)
        caplog.clear()
        source = open_source(root, SKIP)
        assert [source[i].caption for i in range(len(source))] == ["b"]
        assert len(source.missing) == 2
        assert "2 of 3" in caplog.text and name in caplog.text
        assert source.fingerprint == open_source(root, SKIP).fingerprint
    (tmp_path / "folder/b.txt").unlink()
    error(lambda: open_source(tmp_path / "folder", SKIP), "3 of 3")  # nothing is left


# --- tars -------------------------------------------------------------------------------------


def _pairs(names: str) -> list:
    return [
        (f"{name}.{ending}", data)
        for name in names
        for ending, data in (("png", png(ord(name))), ("txt", name))
    ]


@pytest.mark.parametrize("length", range(3, 4096, 511))
def test_a_tar_that_is_cut_short(tmp_path: Path, length: int, caplog) -> None:
    """Wherever the cut falls: what stands before it is kept, and it is said that there was more."""
    shard = tar(tmp_path / "0.tar", _pairs("abc"))
    with tarfile.open(shard) as whole:
        ends = {m.name: m.offset_data + m.size for m in whole}
    shard.write_bytes(shard.read_bytes()[:length])
    complete = [name for name in "abc" if ends[f"{name}.txt"] < length]
    error(lambda: TarShards(shard), "0.tar", "cut short")
    if not complete:
        error(lambda: TarShards(shard, SKIP), "0.tar", "cut short")
        return
    source = TarShards(shard, SKIP)
    assert [source[i].caption for i in range(len(source))] == complete
    assert "0.tar" in caplog.text and "cut short" in caplog.text


BAD_MEMBERS = {
    "hard link": [(member("b.png", type=tarfile.LNKTYPE, linkname="a.png"), ""), ("b.txt", "b")],
    "symbolic link": [
        (member("b.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), ""),
        ("b.txt", "b"),
    ],
    "caption by link": [
        ("b.png", png(2)),
        (member("b.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), ""),
    ],
    "device": [(member("b.png", type=tarfile.CHRTYPE), ""), ("b.txt", "b")],
    "twice": [*_pairs("b"), ("b.png", png(1))],
    "two pictures": [*_pairs("b"), ("b.jpg", png(1))],
    "no caption": [("b.png", png(2))],
    "second dot": [("b.v1.txt", "b"), ("b.v1.png", png(2)), ("b.v2.png", png(2))],
    "other members": [("b.png", png(2)), ("b.cls", "3"), ("b.pyd", BAD_PICTURES["pickle"])],
}


@pytest.mark.parametrize("what", BAD_MEMBERS)
def test_bad_members(tmp_path: Path, what: str) -> None:
    shard = tar(tmp_path / "0.tar", [*_pairs("a"), *BAD_MEMBERS[what], *_pairs("c")])
    error(lambda: TarShards(shard), "0.tar", "b in ", "1 of 3")
    source = TarShards(shard, SKIP)
    assert [source[i].caption for i in range(len(source))] == ["a", "c"]
    assert len(source.missing) == 1


def test_a_second_dot_is_named_or_beside_the_picture(tmp_path: Path) -> None:
    shard = tar(tmp_path / "0.tar", [*_pairs("a"), ("a.mask.png", png(2)), ("a.mask.png", png(2))])
    assert [sample.caption for sample in open_source(shard)] == ["a"]
    tar(shard, [*_pairs("a"), ("b.v2.png", png(2)), ("b.v2.txt", "b")])
    error(lambda: open_source(shard), "b in ", "its ending is .v2.png; a key may hold no dot")


def test_names_that_point_elsewhere(tmp_path: Path) -> None:
    """Nothing is ever unpacked, so that names do no harm."""
    names = ("../../up", "/etc/root", "C:\\disk", "line\nbreak", "ü", "a" * 300, "\udcfcx")
    members = [
        (f"{name}.{ending}", data)
        for name in names
        for ending, data in (("png", png(len(name))), ("txt", ascii(name)))
    ]
    tar(tmp_path / "in/0.tar", members)
    source = open_source(tmp_path / "in")
    for index, name in enumerate(names):
        assert source[index].caption == ascii(name)
        np.testing.assert_array_equal(np.asarray(source[index].image), pixels(len(name)))
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "0.tar"]
    assert sum(map(len, split_source(source, 0.3))) == len(names)


@pytest.mark.parametrize("size", [10**12, 2**62, -512, -(2**40)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_sizes_that_cannot_be(tmp_path: Path, size: int, kind: bytes) -> None:
    bad = member("b.png", type=kind)
    header = bytearray(bad.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (b"\x80" if size > 0 else b"\xff") + size.to_bytes(11, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header[:512]):06o}\0 ".encode()
    shard = tar(tmp_path / "0.tar", _pairs("a"))
    shard.write_bytes(shard.read_bytes()[:2048] + bytes(header) + bytes(10240))
    error(lambda: TarShards(shard), "0.tar", "damaged")
    source = TarShards(shard, SKIP)
    assert [source[i].caption for i in range(len(source))] == ["a"]


def test_junk_in_a_tar(tmp_path: Path) -> None:
    shard = tar(tmp_path / "0.tar", _pairs("ab"))
    data = bytearray(shard.read_bytes())
    data[2048:2560] = b"\xa5" * 512
    shard.write_bytes(data)
    error(lambda: TarShards(shard), "0.tar", "1 of 2")
    assert len(TarShards(shard, SKIP)) == 1
    shard.write_bytes(b"")
    write(tmp_path / "1.tar", tar(tmp_path / "x", _pairs("a")).read_bytes())
    error(lambda: open_source(tmp_path), "0.tar", "empty file")
    assert len(open_source(tmp_path, SKIP)) == 1


# --- the rest ---------------------------------------------------------------------------------


def test_one_name_with_two_endings(tmp_path: Path) -> None:
    """In a folder, each is a picture, with the one caption."""
    write(tmp_path / "a.jpg", png(1))
    write(tmp_path / "a.png", png(2))
    write(tmp_path / "a.txt", "a")
    source = open_source(tmp_path)
    assert [(source.key(i), source[i].caption) for i in range(2)] == [
        ("a.jpg", "a"),
        ("a.png", "a"),
    ]
    np.testing.assert_array_equal(np.asarray(source[1].image), pixels(2))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(1))
    write(tmp_path / "a.txt", "a")
    (tmp_path / "b.png").symlink_to("nowhere.png")
    write(tmp_path / "b.txt", "b")
    error(lambda: open_source(tmp_path), "b.png", "cannot be read")
    assert len(open_source(tmp_path, SKIP)) == 1
    metadata(tmp_path, {"file_name": "a.png", "text": "a"}, {"file_name": "a\0.png", "text": "b"})
    error(lambda: open_source(tmp_path), "line 2", "no file")


def test_names_that_are_too_long(tmp_path: Path) -> None:
    long, reading = "a" * 250 + ".png", {"caption_extension": ".caption"}
    for name in (long, "b.png"):
        write(tmp_path / "rose" / name, png(1))
    write(tmp_path / "rose/b.caption", "b")
    error(lambda: open_source(tmp_path, Reading(**reading)), "1 of 2", long)
    assert len(open_source(tmp_path, Reading(**reading, on_bad_sample="skip"))) == 1
    metadata(tmp_path, {"file_name": "a" * 300, "text": "a"})
    error(lambda: open_source(tmp_path), "line 1", "there is no file aaa")


@pytest.mark.parametrize("address", ["pipe:cat 0.tar", "file:///data/0.tar", "zip://a::x.tar",
    "simplecache::https://host/0.tar", "https://host/0.zip", "ftp://host/0.tar"])  # fmt: skip
def test_addresses_that_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(ConfigError, match="shards are streamed from") as caught:
        open_source(address)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "tiff", "bmp"])
def test_damage_anywhere_is_one_line(tmp_path: Path, kind: str) -> None:
    """Bytes changed at random: a picture or a DataError, and nothing else."""
    whole = np.frombuffer(_encoded(RGB, kind), np.uint8)
    random = np.random.default_rng(0)
    write(tmp_path / "a.txt", "a")
    path = write(tmp_path / "a.png", b"")
    source = open_source(tmp_path)
    for _ in range(150):
        data = whole.copy()
        data[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
        path.write_bytes(data.tobytes())
        for read in (lambda: to_rgb(source[0].image), lambda: source.size(0)):
            try:
                read()
            except DataError as bad:
                assert "\n" not in str(bad)
