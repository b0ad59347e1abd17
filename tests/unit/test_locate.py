"""From what a user types to a folder, and never to the network without need."""

import json
import subprocess
import sys
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint import locate
from ldm.checkpoint.locate import (
    bundled_models,
    downsample_factor,
    locate_model,
    safetensors_header,
)
from ldm.errors import CheckpointError, ConfigError


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """Two models that come with the package."""
    for name in ("flowers", "portraits"):
        (tmp_path / "bundled" / name).mkdir(parents=True)
        (tmp_path / "bundled" / name / "model_index.json").write_text("{}")
    (tmp_path / "bundled" / "half-written").mkdir()
    monkeypatch.setattr(locate, "PRETRAINED", tmp_path / "bundled")
    return tmp_path / "bundled"


def test_folders_and_bundled_names(bundled, tmp_path, monkeypatch):
    assert bundled_models() == ["flowers", "portraits"]
    assert locate_model("flowers") == bundled / "flowers"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowers").mkdir()
    assert locate_model("flowers") == bundled / "flowers"  # what a name means is not up to the cwd
    assert locate_model("./flowers").resolve() == tmp_path / "flowers"
    assert locate_model(tmp_path / "bundled" / "flowers") == bundled / "flowers"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_model("~/flowers") == tmp_path / "flowers"


def test_a_wrong_name_gets_the_nearest(bundled, tmp_path):
    with pytest.raises(ConfigError) as error:
        locate_model("flower")
    assert str(error.value) == (
        "no model 'flower', neither a folder nor bundled; did you mean 'flowers'? Choose from:"
        " flowers, portraits"
    )
    names = ("/no/such/folder", "./no/such", "../no", "~/no", "a/b/c", "half-written")
    for name in (*names, "~nosuchuser/x", "a" * 5000, "x\0y"):
        with pytest.raises(ConfigError, match="no model"):
            locate_model(name)
    (tmp_path / "model.txt").touch()
    with pytest.raises(ConfigError, match="model.txt is a file, but no .safetensors or .ckpt"):
        locate_model(tmp_path / "model.txt")
    for name in ("model.safetensors", "model.ckpt"):
        (tmp_path / name).touch()
        assert locate_model(tmp_path / name) == tmp_path / name


def test_hub_name_from_the_cache(tmp_path, monkeypatch):
    commit = "0" * 39 + "1"
    repo = tmp_path / "models--some-owner--some-model"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert locate_model("some-owner/some-model", local_files_only=True) == snapshot
    assert locate_model("some-owner/some-model", revision=commit, local_files_only=True) == snapshot
    with pytest.raises(CheckpointError, match="no folder .*hub's cache does not hold") as error:
        locate_model("some-owner/some-model", revision="v2", local_files_only=True)
    assert "\n" not in str(error.value)


def test_hub_name_that_is_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for options in ({}, {"local_files_only": True}):
        with pytest.raises(CheckpointError, match="no folder 'outputs/model'") as error:
            locate_model("outputs/model", **options)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="no model 'my models/one two'"):
        locate_model("my models/one two")


@pytest.mark.parametrize(("levels", "factor"), [(1, 1), (3, 4), (4, 8)])
def test_downsample_factor(tmp_path, levels, factor):
    (tmp_path / "vae").mkdir()
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps({"block_out_channels": [8] * levels}))
    assert downsample_factor(tmp_path) == factor


@pytest.mark.parametrize(("levels", "factor"), [(1, 1), (3, 4), (4, 8)])
def test_downsample_factor_of_a_file(tmp_path, levels, factor):
    names = [f"first_stage_model.encoder.down.{i}.block.0.norm1.bias" for i in range(levels)]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "m.safetensors")
    assert downsample_factor(tmp_path / "m.safetensors") == factor
    far = {"first_stage_model.encoder.down.3000000000.x": torch.zeros(1)}  # which is no level
    save_file(far, tmp_path / "far.safetensors")
    assert downsample_factor(tmp_path / "far.safetensors") == 1
    (tmp_path / "m.ckpt").touch()
    assert downsample_factor(tmp_path / "m.ckpt") == 8


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff" * 20, b"\x02" + b"\0" * 7 + b"[]", b"\x08" + b"\0" * 7 + b'{"a": 1}',
        (100_006).to_bytes(8, "little") + b'{"a": ' + b"[" * 100_000,
        *(len(text := b'{"__metadata__": %b}' % m).to_bytes(8, "little") + text
          for m in (b"[1]", b"null", b'"x"', b'{"a": 5}', b'{"a": {}}')),
    ],
    ids=range(10),
)  # fmt: skip
def test_headers_that_are_none(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="m.safetensors is damaged") as error:
        safetensors_header(tmp_path / "m.safetensors")
    assert "\n" not in str(error.value)


def test_a_header_of_over_100_mb(tmp_path):
    """Is not read: the format allows none."""
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write((200 * 2**20).to_bytes(8, "little"))
        file.truncate(300 * 2**20)
    with pytest.raises(
        CheckpointError, match="m.safetensors is damaged .its header claims 209715200"
    ):
        safetensors_header(tmp_path / "m.safetensors")


def test_what_is_fetched(monkeypatch):
    """One set of weights, whole or in shards, of the variant that was asked for."""
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _, **o: asked.update(o) or ".")
    files = [
        f"{part}{middle}" for part in ("unet/diffusion_pytorch_model", "text_encoder/model")
        for middle in (
            ".safetensors", "-00001-of-00002.safetensors", ".safetensors.index.json",
            ".fp16.safetensors", ".fp16-00001-of-00002.safetensors",
            ".safetensors.index.fp16.json", ".non_ema.safetensors", ".bin",
        )
    ]  # fmt: skip
    files += ["single_file_extras.safetensors"]
    files += ["v1-5-pruned.safetensors", "unet/config.json", "safety_checker/model.safetensors"]
    for variant, ends in ((None, files[:3] + files[8:11]), ("fp16", files[3:6] + files[11:14])):
        locate_model("some-owner/some-model", variant=variant)
        fetched = [f for f in files if any(fnmatch(f, p) for p in asked["allow_patterns"])]
        assert fetched == [*ends, "single_file_extras.safetensors", "unet/config.json"]


def test_downsample_factor_errors(tmp_path):
    with pytest.raises(CheckpointError, match="no file .*vae/config.json"):
        downsample_factor(tmp_path)
    (tmp_path / "vae").mkdir()
    many = json.dumps({"block_out_channels": [8] * 17})
    for text in ("{", "{}", '{"block_out_channels": 3}', "[]", '{"block_out_channels": []}', many):
        (tmp_path / "vae" / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="config.json is damaged") as error:
            downsample_factor(tmp_path)
        assert "\n" not in str(error.value)


def test_imports_no_torch():
    code = (
        "import sys; from ldm.checkpoint.locate import locate_model\n"
        "from ldm.errors import ConfigError\n"
        "try: locate_model('flowrs')\n"
        "except ConfigError: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
