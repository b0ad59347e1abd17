"""The whole command: there and back, every bit the same; and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dialects import DIALECTS, EXTRAS, networks, single_file
from safetensors.torch import load_file, save_file

from ldm.checkpoint.folder import load_folder
from ldm.errors import CheckpointError, ConfigError

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert.py"


@pytest.fixture
def convert(script):
    return lambda *words: script("convert", *words, model=None)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A file of SD 1.x with everything that one can have."""
    file = tmp_path_factory.mktemp("files") / "sd1.safetensors"
    save_file(single_file(DIALECTS["sd1"], torch.float16, ema=True) | EXTRAS, file)
    return file


def assert_same(file, other):
    a, b = load_file(file), load_file(other)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(a[k].dtype == b[k].dtype for k in a)


def test_there_and_back(convert, original, tmp_path, capsys):
    convert(original, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert_same(original, tmp_path / "again.safetensors")
    names = ("folder", "again.safetensors")
    assert capsys.readouterr().out == "".join(f"{tmp_path / name}  epsilon\n" for name in names)


@pytest.mark.parametrize("via_folder", [False, True])
@pytest.mark.parametrize("which", ["ema", "non_ema"])
def test_one_set_of_weights(convert, original, tmp_path, which, via_folder):
    source = original
    if via_folder:
        source = tmp_path / "both"
        convert(original, source)
    convert(source, tmp_path / "one.safetensors", f"--{which}", "--dtype", "bf16")
    tensors = load_file(tmp_path / "one.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not any(name.startswith("model_ema.") for name in tensors)
    network = networks(DIALECTS["sd1"])
    weight = (network.average if which == "ema" else network.unet).conv_out.weight
    stored = tensors["model.diffusion_model.out.2.weight"]
    assert torch.equal(stored, weight.half().bfloat16())


def test_a_variant_becomes_a_folder(convert, tmp_path, tiny_model_folder):
    import shutil

    half = tmp_path / "half"
    shutil.copytree(tiny_model_folder, half)
    for file in half.rglob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(file).items()}, file)
        file.rename(file.with_suffix(".fp16.safetensors"))
    convert(half, tmp_path / "out", "--variant", "fp16")
    parts, whole = load_folder(tmp_path / "out"), load_folder(tiny_model_folder)
    for part in ("unet", "vae", "text_encoder"):
        for name, tensor in getattr(whole, part).state_dict().items():
            assert torch.equal(getattr(parts, part).state_dict()[name], tensor.half())


def test_prediction_type_of_a_pickle(convert, tmp_path):
    """As `prediction_type`, or from a YAML; and the file that comes of it says it by itself."""
    source = tmp_path / "sd2.ckpt"
    torch.save({"state_dict": single_file(DIALECTS["sd2 v"], torch.float16)}, source)
    with pytest.raises(CheckpointError, match="--prediction_type"):
        convert(source, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    convert(source, tmp_path / "a.safetensors", "--prediction_type", "v_prediction")
    (tmp_path / "v.yaml").write_text("model: {params: {parameterization: v}}")
    convert(source, tmp_path / "b", "--config", tmp_path / "v.yaml")
    convert(tmp_path / "a.safetensors", tmp_path / "a")
    for folder in ("a", "b"):
        config = load_folder(tmp_path / folder).schedule.config
        assert config.prediction_type == "v_prediction"


def test_what_stands_there_is_kept(convert, original, tmp_path):
    for out in (tmp_path / "a.safetensors", tmp_path / "a"):
        convert(original, out, "--ema")
        with pytest.raises(ConfigError, match="exists; choose another name, or give --overwrite"):
            convert(original, out)
        convert(original, out, "--overwrite")
    assert_same(original, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "a.safetensors", "--overwrite")  # onto itself
    assert_same(original, tmp_path / "a.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.safetensors"]


def test_overwrite_keeps_what_is_not_the_models(convert, original, tmp_path):
    for name in ("out/letter.txt", "out/checkpoint-10/state.json", "out/unet/old.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("dear friend")
    (tmp_path / "out" / "model_index.json").write_text("{}")
    convert(original, tmp_path / "out", "--overwrite")
    assert (tmp_path / "out/letter.txt").read_text() == "dear friend"
    assert (tmp_path / "out/checkpoint-10/state.json").read_text() == "dear friend"
    assert not (tmp_path / "out/unet/old.txt").exists()  # of the model that stood there
    convert(tmp_path / "out", tmp_path / "out", "--overwrite")  # onto itself
    convert(tmp_path / "out", tmp_path / "again.safetensors")
    assert_same(original, tmp_path / "again.safetensors")


@pytest.mark.parametrize("out", ["mine", "mine.safetensors"])
def test_overwrite_replaces_only_models(convert, original, tmp_path, out):
    (tmp_path / out).mkdir()
    (tmp_path / out / "letter.txt").write_text("dear friend")
    with pytest.raises(ConfigError, match="exists and is no model of that kind"):
        convert(original, tmp_path / out, "--overwrite")
    assert (tmp_path / out / "letter.txt").read_text() == "dear friend"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write .*below.*; choose another place"):
        convert(original, tmp_path / "file" / "below", "--ema")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{file}", "out.ckpt"], "a pickle, which ldm does not write; use .safetensors"),
        (["{folder}", "out", "--prediction_type", "epsilon"], "is a folder, which says it"),
        (["nowhere.safetensors", "out"], "no model 'nowhere.safetensors'"),
        (["{file}", "out", "--prediction_type", "v"], "no prediction_type 'v'.*v_prediction"),
        (["{file}", "out", "--ema", "--non_ema"], "not allowed with"),
    ],
)
def test_refusals(convert, original, tiny_model_folder, words, message):
    given = [word.format(file=original, folder=tiny_model_folder) for word in words]
    with pytest.raises(ConfigError, match=message) as error:
        convert(*given)
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_one_line_on_stderr(tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"1234567890")
    process = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "torn.safetensors", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2 and not process.stdout
    assert process.stderr.count("\n") == 1 and "torn.safetensors is damaged" in process.stderr
    assert not (tmp_path / "out").exists()
