"""Every layout, made small and read back; every mistake a user can make in one."""

import io
import json
import multiprocessing
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from layouts import check, error, metadata, parquet, png, tar, write
from PIL import Image

from ldm.data.folders import CaptionFolder, MetadataFolder
from ldm.data.shards import TarShards
from ldm.data.sources import Subset, open_source, split_source
from ldm.data.stored import Reading
from ldm.errors import ConfigError, DataError

# --- folders with caption files ---------------------------------------------------------------


def test_caption_folder(tmp_path: Path) -> None:
    write(tmp_path / "b.PNG", png(1))
    write(tmp_path / "b.txt", "\ufeffa rose\n")
    write(tmp_path / "deep/er/a.png", png(2))
    write(tmp_path / "deep/er/a.txt", "eine Blüte")
    write(tmp_path / ".hidden.png", b"")
    source = open_source(tmp_path)
    assert isinstance(source, CaptionFolder)
    check(source, [("b.PNG", "a rose", 1), ("deep/er/a.png", "eine Blüte", 2)])
    check(
        pickle.loads(pickle.dumps(source)),
        [(source.key(i), source[i].caption, i + 1) for i in (0, 1)],
    )


def test_caption_extension(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(1))
    write(tmp_path / "a.txt", "tags")
    write(tmp_path / "a.caption", "words")
    assert open_source(tmp_path, Reading(caption_extension="caption"))[0].caption == "words"
    assert open_source(tmp_path)[0].caption == "tags"


def test_class_folders(tmp_path: Path) -> None:
    write(tmp_path / "blue_rose/1.png", png(1))
    write(tmp_path / "tulip/1.png", png(2))
    check(open_source(tmp_path), [("blue_rose/1.png", "blue rose", 1), ("tulip/1.png", "tulip", 2)])


def test_split_folders(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "validation")):
        write(tmp_path / split / "rose/1.png", png(number))
    check(open_source(tmp_path), [("rose/1.png", "rose", 0)])
    check(open_source(tmp_path, split="validation"), [("rose/1.png", "rose", 1)])
    error(lambda: open_source(tmp_path, split="test"), "no split 'test'", "train, validation")


def test_caption_folder_errors(tmp_path: Path) -> None:
    error(lambda: open_source(tmp_path / "nowhere"), "nowhere", "no such file or folder")
    error(lambda: open_source(tmp_path), str(tmp_path), "no pictures")
    write(tmp_path / "a.png", png(1))
    error(lambda: open_source(tmp_path), "1 of 1", ".txt", "a.png")
    error(lambda: open_source(write(tmp_path / "list.csv", "")), "list.csv", "no .tar or .parquet")


def test_the_limit_of_pixels_is_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.png", png(1))
    write(tmp_path / "a.txt", "a")
    source = open_source(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    with pytest.warns(Image.DecompressionBombWarning):
        error(lambda: source[0], "a.png", "8 x 8")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    error(lambda: source[0], "a.png")


# --- metadata.jsonl ---------------------------------------------------------------------------


def test_metadata_folder(tmp_path: Path) -> None:
    write(tmp_path / "in/b.png", png(1))
    write(tmp_path / "a.png", png(2))
    write(tmp_path / "unnamed.png", png(3))
    metadata(
        tmp_path,
        {"file_name": "in/b.png", "text": "line\u2028separator", "label": "x"},
        "",
        {"file_name": "a.png", "text": "a", "label": "y"},
    )
    source = open_source(tmp_path)
    assert isinstance(source, MetadataFolder)
    check(source, [("in/b.png", "line\u2028separator", 1), ("a.png", "a", 2)])
    assert open_source(tmp_path, Reading(caption_column="label"))[1].caption == "y"


def test_metadata_in_subfolders(tmp_path: Path) -> None:
    for number, folder in enumerate(("one", "two")):
        write(tmp_path / folder / "x.png", png(number))
        metadata(tmp_path / folder, {"file_name": "x.png", "text": folder})
    check(open_source(tmp_path), [("one/x.png", "one", 0), ("two/x.png", "two", 1)])


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"file_name": "gone.png", "text": "t"}, ["line 2", "no file gone.png"]),
        ({"file_name": "a.png", "caption": "t"}, ["line 2", "'text'", "file_name, caption"]),
        ({"image": "a.png", "text": "t"}, ["line 2", "no file_name", "image, text"]),
        ({"file_name": "../outside.png", "text": "t"}, ["line 2", "outside"]),
    ],
)
def test_metadata_errors(tmp_path: Path, row: dict, parts: list[str]) -> None:
    write(tmp_path / "outside.png", png(0))
    root = tmp_path / "root"
    write(root / "a.png", png(1))
    metadata(root, {"file_name": "a.png", "text": "fine"}, row)
    error(lambda: open_source(root), "metadata.jsonl", *parts)


def test_metadata_empty(tmp_path: Path) -> None:
    metadata(tmp_path, "")
    error(lambda: open_source(tmp_path), "names no pictures")


# --- tar shards -------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of uneven length: one of .txt captions, one as img2dataset writes them."""
    members = [
        (f"d/{n:03d}.{end}", data)
        for n in range(3)
        for end, data in (("txt", f"caption {n}"), ("png", png(n)), ("json", json.dumps({"n": n})))
    ]
    tar(tmp_path / "08.tar", members)
    tar(
        tmp_path / "10.tar",
        [
            ("900.JPG.json", "{}"),  # not this key's: WebDataset cuts at the first dot
            ("901.json", '{"caption": "from json", "status": "ok"}'),
            ("901.png", png(3)),
            ("902.json", '{"caption": null, "status": "failed"}'),
        ],
    )
    return tmp_path


def test_random_access_equals_sequential_reading(shards: Path) -> None:
    expected: dict[str, dict[str, bytes]] = {}
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                expected.setdefault(f"{shard.stem}/{key}", {})[ending] = file.read()
    expected = {key: members for key, members in expected.items() if "png" in members}
    source = open_source(shards)
    assert isinstance(source, TarShards)
    assert [source.key(index) for index in range(len(source))] == list(expected)
    for index in (3, 0, 2, 1, 0):
        sample = source[index]
        members = expected[sample.key]
        with Image.open(io.BytesIO(members["png"])) as image:
            assert image.tobytes() == sample.image.tobytes()
        caption = (
            json.loads(members["json"]).get("caption") if index == 3 else members["txt"].decode()
        )
        assert sample.caption == caption


def test_ways_to_name_shards(shards: Path) -> None:
    whole = open_source(shards)
    assert open_source(str(shards / "*.tar")).fingerprint == whole.fingerprint
    assert len(open_source(shards / "08.tar")) == 3
    assert open_source(shards / "08.tar").fingerprint != whole.fingerprint
    (shards / "09.tar").write_bytes((shards / "08.tar").read_bytes())
    assert len(open_source(str(shards / "{08..10}.tar"))) == 3 + 3 + 1
    error(lambda: open_source(str(shards / "{08..11}.tar")), "11.tar", "no such tar")
    error(lambda: open_source(str(shards / "x*.tar")), "x*.tar", "no such tar")


def _caption_and_sum(source: TarShards, index: int) -> tuple[str, int]:
    sample = source[index]
    return sample.caption, int(np.asarray(sample.image).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(shards: Path, method: str) -> None:
    source = TarShards(shards)
    here = [_caption_and_sum(source, index) for index in range(4)]
    with multiprocessing.get_context(method).Pool(2) as pool:
        jobs = [(source, index % 4) for index in range(40 if method == "fork" else 8)]
        assert pool.starmap(_caption_and_sum, jobs) == [here[index] for _, index in jobs]


def test_shard_errors(tmp_path: Path) -> None:
    packed = tar(tmp_path / "packed.tar", [("a.png", png(0))], "w:gz")
    error(lambda: TarShards(packed), "packed.tar", "uncompressed tar")
    bare = tar(tmp_path / "bare.tar", [("a.txt", "a"), ("b.txt", "b")])
    error(lambda: TarShards(bare), "bare.tar", "no pictures")
    other = tar(tmp_path / "other.tar", [("a.png", png(0)), ("a.json", '{"title": "t"}')])
    error(lambda: TarShards(other), "'text'", "title")
    assert TarShards(other, Reading(caption_column="title"))[0].caption == "t"
    short = tar(tmp_path / "short.tar", [("a.txt", "a"), ("a.png", png(0))])
    source = TarShards(short)
    short.write_bytes(short.read_bytes()[:1100])
    error(lambda: source[0], "short.tar", "ends too soon")


# --- fingerprints and splits ------------------------------------------------------------------


def test_fingerprint_names_the_data(tmp_path: Path) -> None:
    for root in (tmp_path / "here", tmp_path / "there"):
        for number in range(3):
            write(root / f"{number}.png", png(number))
            write(root / f"{number}.txt", "words")
    here = open_source(tmp_path / "here").fingerprint
    assert here == open_source(tmp_path / "there").fingerprint
    write(tmp_path / "there/1.txt", "more words")
    assert here != open_source(tmp_path / "there").fingerprint


def test_fingerprint_names_the_captions(tmp_path: Path) -> None:
    """Another column or ending is other data, even of equal length, where it is looked at."""
    write(tmp_path / "files/a.png", png(0))
    for ending in ("txt", "caption"):
        write(tmp_path / f"files/a.{ending}", "words")
    row = json.dumps({"text": "words", "long": "other"})
    tar(tmp_path / "json.tar", [("a.png", png(0)), ("a.json", row)])
    tar(tmp_path / "txt.tar", [("a.png", png(0)), ("a.txt", "words"), ("a.json", row)])
    write(tmp_path / "class/rose/a.png", png(0))
    parquet(tmp_path / "a.parquet", {"text": ["words"], "long": ["other"], "image": [png(0)]})
    for name, option, found in (
        ("files", {"caption_extension": "caption"}, 2),
        ("class", {"caption_extension": "caption"}, 1),
        ("json.tar", {"caption_column": "long"}, 2),
        ("txt.tar", {"caption_column": "long"}, 1),
        ("a.parquet", {"caption_column": "long"}, 2),
    ):
        readings = Reading(), Reading(**option)
        prints = {open_source(tmp_path / name, reading).fingerprint for reading in readings}
        assert len(prints) == found, name


class _Names:
    """A source of keys alone."""

    fingerprint = "names"

    def __init__(self, names: list[str]):
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def key(self, index: int) -> str:
        return self.names[index]

    def __getitem__(self, index: int):
        raise AssertionError("splitting must not read pictures")


def test_split_is_by_key() -> None:
    names = [f"flower {n}" for n in range(2000)]

    def sides(order: list[str], seed: int = 0) -> tuple[set[str], set[str]]:
        parts = split_source(_Names(order), 0.2, seed)
        first, second = ({part.key(i) for i in range(len(part))} for part in parts)
        return first, second

    train, validation = sides(names)
    assert train | validation == set(names) and not train & validation
    assert abs(len(validation) - 400) < 4.5 * np.sqrt(2000 * 0.2 * 0.8)
    assert sides(names[::-1]) == (train, validation)
    assert sides(names[:1000])[1] == validation & set(names[:1000])
    assert sides(names, seed=1)[1] != validation
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            split_source(_Names(names), share)
    for share in (1e-9, 1 - 1e-9):  # each side has a sample at least
        few, many = sorted(map(len, split_source(_Names(names[:20]), share)))
        assert (few, many) == (1, 19)
    with pytest.raises(DataError, match="1 samples cannot be split"):
        split_source(_Names(["a"]), 0.01)


def test_hidden_folders_are_nobodys_pictures(tmp_path: Path) -> None:
    """`hf download` leaves .cache, Jupyter .ipynb_checkpoints, macOS __MACOSX."""
    for split in ("train", "test"):
        for folder in ("", ".ipynb_checkpoints/", "__MACOSX/"):
            path = tmp_path / split / f"{folder}{split}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(0))
        (tmp_path / split / f"{split}.txt").write_text("a flower")
    (tmp_path / ".cache").mkdir()
    assert [s.key for s in open_source(tmp_path)] == ["train.png"]


def test_hidden_metadata_is_nobodys(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(0))
    write(tmp_path / "a.txt", "a rose")
    hidden = tmp_path / ".ipynb_checkpoints"
    write(hidden / "b.png", png(1))
    metadata(hidden, {"file_name": "b.png", "text": "b"})
    check(open_source(tmp_path), [("a.png", "a rose", 0)])
    metadata(tmp_path, {"file_name": "a.png", "text": "a lily"})
    check(open_source(tmp_path), [("a.png", "a lily", 0)])


def test_links_show_no_folder_twice(tmp_path: Path) -> None:
    write(tmp_path / "roses/1.png", png(0))
    (tmp_path / "roses/loop").symlink_to("..")
    (tmp_path / "tulips").symlink_to("roses")
    elsewhere = tmp_path.with_name("elsewhere")
    write(elsewhere / "1.png", png(1))
    (tmp_path / "lilies").symlink_to(elsewhere)
    check(open_source(tmp_path), [("lilies/1.png", "lilies", 1), ("roses/1.png", "roses", 0)])


def test_a_folder_called_flowers(tmp_path: Path, monkeypatch, caplog) -> None:
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers" / "a.png").write_bytes(png(0))
    (tmp_path / "flowers" / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert open_source("./flowers")[0].caption == "mine"
    assert not caplog.records
    assert len(open_source("flowers")) > 1000
    assert "write ./flowers for the folder" in caplog.text


def test_a_tar_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    shard = tar(tmp_path / "photos [2024]/0.tar", [("a.png", png(0)), ("a.txt", "a flower")])
    assert [s.caption for s in open_source(shard)] == ["a flower"]


def test_a_picture_that_has_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "a.txt").write_text("a flower")
    source = open_source(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="a.png: cannot be read"):
        source[0]


def test_subset() -> None:
    source = open_source("flowers")
    part = Subset(source, [4, 2])
    assert [part[i].key for i in range(2)] == [source.key(4), source.key(2)]
    assert len({s.fingerprint for s in (source, part, Subset(source, [2, 4]))}) == 3
    assert open_source("flowers", split="held_out").key(0) == "held_out/000000"
    for index in range(2):
        sample = part[index]
        assert part.caption(index) == sample.caption and part.size(index) == sample.image.size
        assert part.label(index) is None
