"""Weights of a folder in several files, in half precision, or only as pickle."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoint.folder import load_folder
from ldm.errors import CheckpointError

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def shard(folder, variant=""):
    """Write each component's weights as three files and an index, as diffusers and transformers."""
    for part, stem in STEMS.items():
        whole = folder / part / f"{stem}.safetensors"
        tensors = load_file(whole)
        if variant:
            tensors = {name: tensor.half() for name, tensor in tensors.items()}
        files = [f"{stem}{variant}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        weight_map = {name: files[i % 3] for i, name in enumerate(tensors)}
        for file in files:
            own = {name: tensors[name] for name in tensors if weight_map[name] == file}
            save_file(own, folder / part / file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / part / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))
        whole.unlink()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_the_same_model(folder, tiny_pipeline, variant):
    shard(folder, f".{variant}" if variant else "")
    parts = load_folder(folder, variant=variant)
    dtype = torch.float16 if variant else torch.float32
    for part in STEMS:
        for name, tensor in getattr(tiny_pipeline, part).state_dict().items():
            assert torch.equal(getattr(parts, part).state_dict()[name], tensor.to(dtype))


def test_a_shard_that_is_missing(folder):
    shard(folder)
    (folder / "unet/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no file .*00002-of-00003.safetensors"):
        load_folder(folder)


def test_only_a_variant(folder):
    for part, stem in STEMS.items():
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
    with pytest.raises(CheckpointError, match="unet has .* only as a variant; give --variant fp16"):
        load_folder(folder)
    load_folder(folder, variant="fp16")


@pytest.mark.parametrize("weight_map", [None, [], {"a": "../../secret.safetensors"}, {"a": 3}])
def test_an_index_that_points_elsewhere(folder, weight_map):
    shard(folder)
    index = folder / "vae/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="index.json is damaged") as error:
        load_folder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", STEMS)
def test_only_pickle(folder, part):
    weights = folder / part / f"{STEMS[part]}.safetensors"
    weights.unlink()
    (folder / part / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{part} has its weights only as .bin") as error:
        load_folder(folder)
    assert "\n" not in str(error.value)
