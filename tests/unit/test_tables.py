"""Parquet and data sets of the hub, against what was written; classes in every layout."""

import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from layouts import check, error, metadata, parquet, pixels, png, tar, write

from ldm.data import tables
from ldm.data.sample import DataSource
from ldm.data.sources import open_source
from ldm.data.stored import Reading
from ldm.data.tables import Table, open_hub
from ldm.training.config import TrainingConfig, UNetTraining
from ldm.training.data import open_data

HERE = Reading()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def _rows(*numbers: int) -> dict[str, list]:
    return {
        "image": [{"bytes": png(n), "path": f"{n}.png"} for n in numbers],
        "text": [f"words {n}" for n in numbers],
        "kind": list(numbers),
    }


def test_the_hubs_layout(tmp_path: Path) -> None:
    root = tmp_path / "set"
    parquet(root / "data/train-00000-of-00002.parquet", _rows(1, 2))
    parquet(root / "data/train-00001-of-00002.parquet", _rows(3))
    parquet(root / "data/validation-00000-of-00001.parquet", _rows(4))
    source = open_source(root, Reading(class_column="kind"))
    assert isinstance(source, Table)
    names = ["train-00000-of-00002/000000", "train-00000-of-00002/000001"]
    names.append("train-00001-of-00002/000000")
    check(source, [(name, f"words {n}", n) for n, name in enumerate(names, 1)])
    assert [source.label(i) for i in range(3)] == [1, 2, 3]
    hub = open_hub(str(root), None, HERE)
    assert [hub.caption(i) for i in range(3)] == ["words 1", "words 2", "words 3"]
    (root / "data/train-00000-of-00002.parquet").unlink()
    (root / "data/train-00001-of-00002.parquet").unlink()
    error(lambda: open_source(root), "validation-00000-of-00001", "no parquet file of the split")


def test_img2dataset(tmp_path: Path) -> None:
    """Its three outputs hold the same; what failed to download is in none of them."""
    caption, bad = {"caption": "words 1"}, {"caption": "x", "status": "failed_to_download"}
    tar(tmp_path / "tar/00000.tar", [
        ("000000001.jpg", png(1)), ("000000001.txt", "words 1"),
        ("000000001.json", json.dumps(caption)), ("000000002.json", json.dumps(bad)),
    ])  # fmt: skip
    write(tmp_path / "files/00000/000000001.jpg", png(1))
    write(tmp_path / "files/00000/000000001.txt", "words 1")
    write(tmp_path / "files/00000/000000001.json", json.dumps(caption))
    write(tmp_path / "files/00000/000000002.json", json.dumps(bad))
    columns = {"key": ["000000001", "000000002"], "caption": ["words 1", "x"]}
    for layout in ("tar", "files"):
        parquet(tmp_path / layout / "00000.parquet", columns)
    parquet(tmp_path / "parquet/00000.parquet", columns | {"jpg": [png(1), None]})
    for layout in ("tar", "files", "parquet"):
        write(tmp_path / layout / "00000_stats.json", '{"successes": 1}')
    keys = {"tar": "00000/000000001", "files": "00000/000000001.jpg", "parquet": "00000/000000"}
    for layout, key in keys.items():
        check(open_source(tmp_path / layout), [(key, "words 1", 1)])


def test_ways_to_name_parquet(tmp_path: Path) -> None:
    for number in range(3):
        parquet(tmp_path / f"{number:02d}.parquet", _rows(number))
    assert len(open_source(tmp_path / "01.parquet")) == 1
    assert open_source(str(tmp_path / "{01..02}.parquet")).key(1) == "02/000000"
    whole = open_source(str(tmp_path / "*.parquet"))
    assert len(whole) == 3 and whole.fingerprint == open_source(tmp_path).fingerprint
    parquet(tmp_path / "02.parquet", _rows(2) | {"text": ["other words"]})
    assert whole.fingerprint != open_source(tmp_path).fingerprint
    error(lambda: open_source(str(tmp_path / "{02..03}.parquet")), "03.parquet", "no such parquet")


def test_parquet_of_one_name_in_two_folders(tmp_path: Path) -> None:
    for number, folder in enumerate("ab"):
        parquet(tmp_path / folder / "0.parquet", _rows(number))
    check(open_source(tmp_path), [(f"{f}/0/000000", f"words {n}", n) for n, f in enumerate("ab")])


def _sum(source: DataSource, index: int) -> int:
    return int(np.asarray(source[index].image).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(tmp_path: Path, method: str) -> None:
    parquet(tmp_path / "0.parquet", _rows(1, 2, 3))
    source = open_source(tmp_path)
    with multiprocessing.get_context(method).Pool(1) as pool:
        jobs = [(source, index) for index in range(3)]
        assert pool.starmap(_sum, jobs) == [int(pixels(n).sum()) for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"image_column": "photo"}, ["'photo'", "image, text, kind", "image_column"]),
        ({"caption_column": "title"}, ["'title'", "image, text, kind", "caption_column"]),
        ({"class_column": "label"}, ["'label'", "image, text, kind", "class_column"]),
        ({"image_column": "text"}, ["'text'", "no pictures but string"]),
        ({"caption_column": "kind"}, ["'kind'", "no text but int64"]),
        ({"class_column": "folder"}, ["no folders", "class_column"]),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, options: dict, parts: list[str]) -> None:
    parquet(tmp_path / "0.parquet", _rows(1))
    error(lambda: open_source(tmp_path, Reading(**options)), *parts)


def _paths_only(path: Path, name: str) -> None:
    """A row that names a picture in place of holding it."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = {"image": [{"bytes": None, "path": name}], "text": ["words"], "kind": [0]}
    parquet(path, cells, image=kind)


def test_bad_parquet(tmp_path: Path) -> None:
    good = parquet(tmp_path / "0.parquet", _rows(1)).read_bytes()
    for data in (b"", good[:-9], b"PAR1" + bytes(100), b"no parquet"):
        write(tmp_path / "1.parquet", data)
        error(lambda: open_source(tmp_path), "1.parquet", "damaged")
    parquet(tmp_path / "1.parquet", {"image": ["/etc/passwd"], "text": ["a"]})
    error(lambda: open_source(tmp_path), "cannot be loaded")
    _paths_only(tmp_path / "1.parquet", "/etc/passwd")
    assert len(open_source(tmp_path)) == 1  # a path is nobody's picture
    (tmp_path / "0.parquet").unlink()
    error(lambda: open_source(tmp_path), "no pictures in the column 'image'")


def test_hub_sets_of_files(tmp_path: Path) -> None:
    """A folder that `datasets` knows as an imagefolder; rows name files, but only its own."""
    root = tmp_path / "set"
    write(root / "train/a.png", png(1))
    write(tmp_path / "secret.png", png(2))
    metadata(root / "train", {"file_name": "a.png", "text": "a"})
    check(open_hub(str(root), None, HERE), [(f"{root}/000000", "a", 1)])
    _paths_only(tmp_path / "other/0.parquet", str(tmp_path / "secret.png"))
    error(lambda: open_hub(str(tmp_path / "other"), None, HERE), "secret.png is no file of the")
    for name in ("a" * 300, "\0"):
        _paths_only(tmp_path / "odd/0.parquet", name)
        error(lambda: open_hub(str(tmp_path / "odd"), None, HERE), "is no file of the")


def test_hub_sets_name_files_of_the_caches(tmp_path: Path, monkeypatch) -> None:
    for name, folder in (
        ("datasets.config.HF_CACHE_HOME", "home"),
        ("datasets.config.HF_DATASETS_CACHE", "datasets"),
        ("huggingface_hub.constants.HF_HUB_CACHE", "hub"),
    ):
        monkeypatch.setattr(name, str(tmp_path / folder))
    load = tables._load_dataset()
    for number, folder in enumerate(("home", "datasets", "hub", "elsewhere")):
        picture, table = tmp_path / folder / "a.png", tmp_path / f"{number}.parquet"
        write(picture, png(number))
        _paths_only(table, str(picture))
        rows = load("parquet", data_files=[str(table)], split="train")
        monkeypatch.setattr(tables, "_load_dataset", lambda rows=rows: lambda *_, **__: rows)
        if folder == "elsewhere":
            error(lambda: open_hub("some/name", None, HERE), "a.png is no file of the data set")
        else:
            check(open_hub("some/name", None, HERE), [("some/name/000000", "words", number)])


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    error(lambda: open_data(TrainingConfig(dataset_name="nobody/nothing")), "nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    error(lambda: open_hub("nobody/nothing", None, HERE), 'pip install "ldm-kit[train]"')


def test_a_data_set_by_name_is_split(tmp_path: Path) -> None:
    parquet(tmp_path / "set/train.parquet", _rows(*range(20)))
    options = {"dataset_name": str(tmp_path / "set"), "validation_split": 0.3}
    train, validation = open_data(TrainingConfig(**options, train_batch_size=2))
    keys = [{part.key(i) for i in range(len(part))} for part in (train, validation)]
    assert len(keys[0] | keys[1]) == 20 and not keys[0] & keys[1]


# --- classes ----------------------------------------------------------------------------------


def test_classes(tmp_path: Path) -> None:
    """One number a sample, from its folder or from a column."""
    for folder, number in (("rose", 7), ("tulip", 3), ("aster", 5)):
        write(tmp_path / f"folder/{folder}/1.png", png(1))
        write(tmp_path / f"folder/{folder}/1.txt", folder)
        write(tmp_path / f"folder/{folder}/1.json", json.dumps({"kind": number}))
        write(tmp_path / f"jsonl/{folder}/1.png", png(1))
    names = ("rose", "tulip", "aster")
    rows = [{"file_name": f"{name}/1.png", "text": name} for name in names]
    numbers = {"rose": 7, "tulip": 3, "aster": 5}
    metadata(tmp_path / "jsonl", *({**row, "kind": numbers[row["text"]]} for row in rows))
    tar(tmp_path / "tar/0.tar", [
        (f"{name}/1.{ending}", data) for name in names for ending, data in (
            ("png", png(1)), ("txt", name), ("json", json.dumps({"kind": numbers[name]})))
    ])  # fmt: skip
    for layout in ("folder", "jsonl", "tar"):
        for column, expected in (
            ("folder", {"aster": 0, "rose": 1, "tulip": 2}),
            ("kind", numbers),
            (None, dict.fromkeys(names)),
        ):
            source = open_source(tmp_path / layout, Reading(class_column=column))
            assert {source.caption(i): source.label(i) for i in range(3)} == expected


@pytest.mark.parametrize("value", ["3", 2.0, -1, None, True])
def test_classes_that_are_none(tmp_path: Path, value: object) -> None:
    reading = Reading(class_column="kind")
    write(tmp_path / "a.png", png(1))
    metadata(tmp_path, {"file_name": "a.png", "text": "a", "kind": value})
    error(lambda: open_source(tmp_path, reading), "line 1", "'kind'", "whole number")
    row = json.dumps({"text": "", "kind": value})
    source = open_source(tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.json", row)]), reading)
    error(lambda: source.label(0), "0/a", "'kind'", "whole number")


def test_classes_of_training_and_validation(tmp_path: Path) -> None:
    for name in ("train/rose", "train/tulip", "validation/rose"):
        write(tmp_path / f"{name}/1.png", png(1))
    config = UNetTraining(train_data_dir=str(tmp_path), class_column="folder", train_batch_size=2)
    error(lambda: open_data(config), "train and validation have other folders")
    write(tmp_path / "validation/tulip/1.png", png(1))
    train, validation = open_data(config)
    assert [part.label(1) for part in (train, validation)] == [1, 1]


def test_the_run_decides_on_bad_samples(tmp_path: Path) -> None:
    for name in "abcd":
        write(tmp_path / f"{name}.png", png(1))
        write(tmp_path / f"{name}.txt", name)
    (tmp_path / "c.txt").unlink()
    options = {"train_data_dir": str(tmp_path), "train_batch_size": 1, "validation_split": 0}
    error(lambda: open_data(TrainingConfig(**options)), "1 of 4", "c.png")
    train, _ = open_data(TrainingConfig(**options, on_bad_sample="skip"))
    assert [train.caption(i) for i in range(len(train))] == ["a", "b", "d"]
