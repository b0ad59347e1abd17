"""Folders are written whole or not at all; what is damaged is named in one line."""

import hashlib
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.checkpoint.io import (
    atomic_file,
    atomic_folder,
    load_weights,
    read_json,
    read_tensors,
    recover,
    to_dtype,
    verify,
    write_json,
    write_manifest,
    write_tensors,
)
from ldm.errors import CheckpointError


def contents(folder):
    """Every file below a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_atomic_folder_appears_at_its_end(tmp_path):
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_text("1")
        assert not target.exists() and part.parent == target.parent
    assert contents(tmp_path) == {"deep/model/sub/a": b"1"}
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_atomic_folder_replaces_an_older_one_whole(tmp_path):
    target = tmp_path / "model"
    for name in ("old", "new"):
        with atomic_folder(target) as part:
            (part / name).write_text(name)
    assert contents(tmp_path) == {"model/new": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("old", [False, True])
def test_an_exception_leaves_things_as_they_were(tmp_path, old):
    target = tmp_path / "model"
    if old:
        target.mkdir()
        (target / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as part:
        (part / "a").write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == ({"model/a": b"old"} if old else {})
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if old else [])


@pytest.mark.parametrize("moment", ["filling", "flushing", "renaming"])
def test_a_kill_leaves_the_old_folder_whole(tmp_path, moment):
    """The process ends without cleaning up, as with SIGKILL, at three moments of a save."""
    target = tmp_path / "model"
    with atomic_folder(target) as part:
        (part / "a").write_text("old")
        write_manifest(part)
    script = f"""
        import os, pathlib
        from ldm.checkpoint import io
        die = lambda *_: os._exit(9)
        if {moment!r} == "flushing":
            io._flush = die
        with io.atomic_folder(pathlib.Path({str(target)!r})) as part:
            (part / "a").write_text("new and torn")
            if {moment!r} == "filling":
                die()
            if {moment!r} == "renaming":
                pathlib.Path.rename = die
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
    assert process.returncode == 9
    verify(target)
    assert (target / "a").read_text() == "old"
    (left,) = (path for path in tmp_path.iterdir() if path != target)
    assert left.name.startswith(".model.") and left.name.endswith(".tmp")
    with atomic_folder(target) as part:  # what lies about does not stop the next one
        (part / "a").write_text("newer")
    assert (target / "a").read_text() == "newer"
    assert list(tmp_path.iterdir()) == [target]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    target = tmp_path / "model"
    with atomic_folder(target) as part:
        (part / "a").write_text("old")
    script = f"""
        import os, pathlib
        from ldm.checkpoint import io
        rename = pathlib.Path.rename
        def once(self, other):
            rename(self, other)
            os._exit(9)
        with io.atomic_folder(pathlib.Path({str(target)!r})) as part:
            (part / "a").write_text("new")
            pathlib.Path.rename = once
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
    assert process.returncode == 9 and not target.exists()
    (tmp_path / ".mine.tmp").mkdir()
    recover(tmp_path)
    assert (target / "a").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "model"]


@pytest.mark.parametrize("old", [False, True])
def test_atomic_file_is_whole_or_not_there(tmp_path, old):
    file = tmp_path / "weights"
    if old:
        file.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(file) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == ({"weights": b"old"} if old else {})
    (tmp_path / ".weights.999999999-0123abcd.tmp").write_text("of a process that was killed")
    with atomic_file(file) as temporary:
        temporary.write_text("new")
    assert contents(tmp_path) == {"weights": b"new"}


def test_recover_touches_only_what_was_left_behind(tmp_path):
    """Of processes that are gone, by the names that this module gives."""
    mine = (
        ".notes.2019-backup.old", ".draft.999999-x.tmp", ".model.1abc-2.tmp",
        ".model.0123abcd.tmp", "model.999999999-0123abcd.tmp", ".a.9999999999999-0123abcd.tmp",
    )  # fmt: skip
    for name in mine:
        (tmp_path / name).write_text("mine")
    recover(tmp_path)
    assert contents(tmp_path) == dict.fromkeys(mine, b"mine")
    (tmp_path / ".file.999999999-0123abcd.old").write_text("whole")
    (tmp_path / "there").mkdir()
    (tmp_path / ".there.999999999-0123abcd.old").write_text("older")
    (tmp_path / ".link.999999999-0123abcd.tmp").symlink_to(tmp_path / "there")
    recover(tmp_path, "other")
    assert len(list(tmp_path.iterdir())) == len(mine) + 4
    recover(tmp_path)
    assert contents(tmp_path) == dict.fromkeys(mine, b"mine") | {"file": b"whole"}
    assert (tmp_path / "there").is_dir()
    recover(tmp_path / "nowhere")


def test_a_link_stays_a_link(tmp_path):
    with atomic_folder(tmp_path / "big" / "model") as part:
        (part / "a").write_text("old")
    (link := tmp_path / "model").symlink_to(tmp_path / "big" / "model")
    with atomic_folder(link) as part:
        (part / "a").write_text("new")
    assert link.is_symlink() and contents(tmp_path / "big") == {"model/a": b"new"}


def test_another_process_may_be_writing(tmp_path):
    """Its temporary folder is left alone as long as it lives."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        folder = tmp_path / f".model.{other.pid}-0123abcd.tmp"
        folder.mkdir()
        recover(tmp_path)
        assert folder.exists()
        other.communicate(b"\n")
    recover(tmp_path)
    assert not folder.exists()


def test_manifest_names_what_changed(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(b"1234")
    (tmp_path / "index").write_text("{}")
    write_manifest(tmp_path)
    sums = json.loads((tmp_path / "manifest.json").read_text())
    assert sums == {
        "index": hashlib.sha256(b"{}").hexdigest(),
        "unet/weights": hashlib.sha256(b"1234").hexdigest(),
    }
    verify(tmp_path)
    (tmp_path / "unet" / "weights").write_bytes(b"1235")
    with pytest.raises(CheckpointError, match=r"unet/weights has changed or is torn; use an older"):
        verify(tmp_path)
    (tmp_path / "unet" / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"lacks unet/weights; use an older"):
        verify(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no file .*manifest.json"):
        verify(tmp_path)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.norm = nn.LayerNorm(3)


def test_load_weights_takes_exactly_its_own():
    source = Net()
    with torch.device("meta"):
        target = Net()
    load_weights(target, source.state_dict(), "file")
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)
    copied = Net()
    load_weights(copied, source.state_dict(), "file", assign=False)
    assert torch.equal(copied.linear.weight, source.linear.weight)
    assert copied.linear.weight.data_ptr() != source.linear.weight.data_ptr()


def test_load_weights_lists_all_that_is_wrong():
    tensors = Net().state_dict()
    del tensors["norm.weight"]
    tensors["linear.weight"] = torch.zeros(3, 5)
    tensors["lora.up"] = torch.zeros(1)
    net = Net()
    before = net.linear.bias.detach().clone()
    with pytest.raises(CheckpointError) as error:
        load_weights(net, {k: v + 1 for k, v in tensors.items()}, "w.safetensors")
    assert str(error.value) == (
        "w.safetensors does not fit its configuration: missing norm.weight; unexpected lora.up;"
        " linear.weight is (3, 5), not (3, 2)"
    )
    assert torch.equal(net.linear.bias, before)  # nothing was loaded of it
    with pytest.raises(CheckpointError, match="missing norm.bias; .* and 12 more$"):
        load_weights(net, {f"x{i}": torch.zeros(1) for i in range(16)}, "w")


def test_load_weights_compares_before_it_converts():
    """Numbers of another kind are a mistake; what does not fit is never converted."""
    tensors = Net().state_dict()
    tensors |= {
        "linear.weight": torch.zeros(3, 2, dtype=torch.int8),
        "norm.bias": torch.ones(3) > 0,
    }
    with pytest.raises(
        CheckpointError, match="weight is of torch.int8; norm.bias is of torch.bool"
    ):
        load_weights(Net(), tensors, "w")
    huge = torch.zeros(1).expand(10**6, 10**6)
    with pytest.raises(CheckpointError, match=r"linear.weight is \(1000000, 1000000\), not"):
        load_weights(Net(), Net().state_dict() | {"linear.weight": huge}, "w", dtype=torch.float64)
    load_weights(net := Net(), Net().state_dict(), "w", dtype=torch.float64)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}


def test_two_names_of_one_storage(tmp_path):
    table = torch.randn(4)
    write_tensors(tmp_path / "w.safetensors", {"a": table, "b": table, "c": table[1:]})
    for name, tensor in load_file(tmp_path / "w.safetensors").items():
        assert torch.equal(tensor, table[1:] if name == "c" else table)


def test_a_full_disk_is_one_line(tmp_path):
    script = f"""
        import pathlib, resource, signal, torch
        from ldm.checkpoint.io import atomic_file, write_tensors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with atomic_file(pathlib.Path({str(tmp_path)!r}) / "w") as file:
            write_tensors(file, {{"a": torch.zeros(1000)}})
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    last = process.stderr.splitlines()[-1]
    assert "CheckpointError: cannot write into" in last and "is the disk full?" in last
    assert not list(tmp_path.iterdir())


def test_tensors_and_dtypes_travel(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).bfloat16(),
        "b": torch.arange(5),
        "transposed": torch.randn(2, 3).T,
    }
    write_tensors(tmp_path / "deep" / "w.safetensors", tensors)
    for read in (read_tensors, load_file):
        back = read(tmp_path / "deep" / "w.safetensors")
        assert back.keys() == tensors.keys()
        for name, value in tensors.items():
            assert back[name].dtype == value.dtype and torch.equal(back[name], value)
    half = to_dtype(tensors, torch.float16)
    assert [half[name].dtype for name in tensors] == [torch.float16, torch.int64, torch.float16]
    assert to_dtype(tensors, None)["a"].dtype == torch.bfloat16


def test_casting_what_a_file_holds_loses_nothing_of_either(tmp_path):
    tensors = {"w": torch.randn(512, 1024)}  # many pages, which leave memory and come back
    write_tensors(tmp_path / "w.safetensors", tensors)
    read = read_tensors(tmp_path / "w.safetensors")
    half = to_dtype(read, torch.float16)
    assert torch.equal(half["w"], tensors["w"].half()) and torch.equal(read["w"], tensors["w"])


@pytest.mark.parametrize(
    "damage", [b"", b"not tensors", (1 << 60).to_bytes(8, "little"), None], ids=str
)
def test_damaged_tensors_are_one_line(tmp_path, damage):
    file = tmp_path / "w.safetensors"
    write_tensors(file, {"a": torch.zeros(100)})
    file.write_bytes(file.read_bytes()[:-40] if damage is None else damage)
    with pytest.raises(
        CheckpointError, match=r"w.safetensors is damaged .*fetch it again"
    ) as error:
        read_tensors(file)
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files_are_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"no file .*w.safetensors; the folder is incomplete"):
        read_tensors(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"no file .*config.json; is .* a model folder"):
        read_json(tmp_path / "config.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="folder is not readable as JSON"):
        read_json(tmp_path / "folder")
    for text in (b'{"a": 1', b"\xff\xfe", b"", b"[1, 2]", b"7", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(CheckpointError, match=r"config.json is not readable as JSON") as error:
            read_json(tmp_path / "config.json")
        assert "\n" not in str(error.value)


def test_json_is_readable_by_people(tmp_path):
    write_json(tmp_path / "deep" / "a.json", {"word": "꽃", "list": (1, 2)})
    assert (tmp_path / "deep" / "a.json").read_text(encoding="utf-8") == (
        '{\n  "word": "꽃",\n  "list": [\n    1,\n    2\n  ]\n}\n'
    )
    assert read_json(tmp_path / "deep" / "a.json") == {"word": "꽃", "list": [1, 2]}
