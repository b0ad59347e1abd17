"""Files that ldm writes, opened by diffusers' own single-file loaders and by open_clip."""

from dataclasses import replace

import diffusers
import pytest
import torch
from clips import their_tower
from dialects import DIALECTS, OPEN_CLIP_EXTRAS, TOWER, networks, single_file
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_open_clip_checkpoint,
)
from open_clip.transformer import TextTransformer
from safetensors.torch import load_file, save_file

from ldm.checkpoint.folder import ModelParts, save_folder
from ldm.checkpoint.names import OPEN_CLIP_PREFIX
from ldm.checkpoint.single_file import load_single_file, open_clip_weights, save_single_file
from ldm.diffusion.schedule import NoiseSchedule


def equal(ours, theirs):
    theirs = {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_diffusers_opens_our_files(tmp_path, dialect):
    """Offline, with our folder for the configurations: among them the prediction type."""
    dialect = DIALECTS[dialect]
    save_file(single_file(dialect), tmp_path / "theirs.safetensors")
    ours = load_single_file(tmp_path / "theirs.safetensors", prediction_type=dialect.prediction)
    save_single_file(ours, tmp_path / "ours.safetensors")
    save_folder(ours, tmp_path / "folder")
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        tmp_path / "ours.safetensors", config=str(tmp_path / "folder"), local_files_only=True
    )
    assert theirs.scheduler.config.prediction_type == dialect.prediction
    equal(ours.unet.state_dict(), theirs.unet.state_dict())
    equal(ours.vae.state_dict(), theirs.vae.state_dict())
    equal(ours.text_encoder.tower.model.state_dict(), theirs.text_encoder.state_dict())
    words = ["a red flower", "two blue tulips at night"]
    ids = theirs.tokenizer(words, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ours.text_encoder.token_ids(words), ids)


def test_a_tiny_models_file_has_the_names_that_diffusers_looks_for(tmp_path, tiny_pipeline):
    save_single_file(ModelParts(**tiny_pipeline.components), tmp_path / "tiny.safetensors")
    tensors = load_file(tmp_path / "tiny.safetensors")
    text = tiny_pipeline.text_encoder.tower.model
    equal(text.state_dict(), convert_ldm_clip_checkpoint(tensors))


def test_the_fused_tower_is_the_same_to_diffusers_transformers_and_open_clip(tmp_path):
    """All layers to open_clip, and all but the last to the others, who need no more."""
    dialect = DIALECTS["sd2 base"]
    save_file(single_file(dialect) | OPEN_CLIP_EXTRAS, tmp_path / "theirs.safetensors")
    ours = load_single_file(tmp_path / "theirs.safetensors", prediction_type="epsilon")
    save_single_file(ours, tmp_path / "ours.safetensors")
    tensors = load_file(tmp_path / "ours.safetensors")
    mine = ours.text_encoder.tower.model.state_dict()
    seen = {k: v for k, v in tensors.items() if ".resblocks.1." not in k and "projection" not in k}
    equal(mine, convert_open_clip_checkpoint(their_tower(ours.text_encoder.tower.model), seen))

    tower = networks(dialect).text
    fresh = TextTransformer(**TOWER)
    fresh.load_state_dict(open_clip_weights(tmp_path / "ours.safetensors"))
    ids = ours.text_encoder.token_ids(["a red flower"])
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids), tower(ids))


def test_a_file_of_sd_2_from_a_folder_without_the_last_layer(tmp_path):
    """Nobody computes with the tower's last layer, but tools look for one: it is repeated."""
    dialect = DIALECTS["sd2 v"]
    save_file(single_file(dialect), tmp_path / "theirs.safetensors")
    ours = load_single_file(tmp_path / "theirs.safetensors", prediction_type="v_prediction")
    schedule = NoiseSchedule(replace(ours.schedule.config, prediction_type="epsilon"))
    save_single_file(ours._replace(left_over={}, schedule=schedule), tmp_path / "ours.safetensors")
    tensors = load_file(tmp_path / "ours.safetensors")
    for name, tensor in tensors.items():
        if name.startswith(f"{OPEN_CLIP_PREFIX}transformer.resblocks.1."):
            assert torch.equal(tensor, tensors[name.replace("resblocks.1", "resblocks.0")])
    back = load_single_file(tmp_path / "ours.safetensors")
    assert back.schedule.config.prediction_type == "epsilon"
    equal(ours.text_encoder.tower.model.state_dict(), back.text_encoder.tower.model.state_dict())
