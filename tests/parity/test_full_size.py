"""Round trips of whole Stable Diffusion models with random weights, every tensor bit for bit.

Takes some three minutes, 11 GB of memory and 16 GB of disk: `pytest -m full_size`.
"""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.checkpoint.folder import ModelParts, load_folder, save_folder
from ldm.checkpoint.io import read_tensors
from ldm.checkpoint.names import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, unet_to_theirs
from ldm.checkpoint.single_file import load_single_file, save_single_file
from ldm.checkpoint.tokenizer import END, clip_tokenizer
from ldm.config import PRESETS
from ldm.diffusion.schedule import NoiseSchedule
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import ClipTextConfig, ClipTextModel
from ldm.models.text_encoder import ClipTower, TextEncoder
from ldm.models.unet import UNet

TEXT = {
    "sd15": ClipTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ),
    "sd21-v": ClipTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
    ),
}


def filled(build, dtype):
    """A module of random weights, whose initialization takes no time."""
    with torch.device("meta"):
        module = build()
    weights = {k: torch.randn(v.shape, dtype=dtype) for k, v in module.state_dict().items()}
    module.load_state_dict(weights, assign=True)
    return module


def make(name, dtype):
    """A model, with all that files of its kind hold beside it."""
    preset = PRESETS[name]
    unet = filled(lambda: UNet(preset.unet), dtype)
    schedule = NoiseSchedule(preset.schedule)
    left = {"betas": schedule.betas.float()}
    if name == "sd15":  # with position_ids, and raw weights beside their average
        left |= {CLIP_PREFIX + "embeddings.position_ids": torch.arange(77)[None]}
        left |= {"model_ema.decay": torch.tensor(0.9999)}
        for ours, theirs in unet_to_theirs(unet.state_dict()).items():
            left[UNET_PREFIX + theirs] = torch.randn(unet.get_parameter(ours).shape, dtype=dtype)
    else:
        left[OPEN_CLIP_PREFIX + "text_projection"] = torch.randn(1024, 1024)
        left[OPEN_CLIP_PREFIX + "logit_scale"] = torch.tensor(4.6)
    tower = filled(lambda: ClipTextModel(TEXT[name]), dtype)
    words = clip_tokenizer(pad_token=END if name == "sd15" else "!")
    text_encoder = TextEncoder(ClipTower(tower, words))
    vae = filled(lambda: AutoencoderKL(preset.vae), dtype)
    return ModelParts(unet, vae, text_encoder, schedule, {}, left)


def assert_same(file, other):
    """Bit for bit, one tensor in memory at a time."""
    with safe_open(file, "pt") as a, safe_open(other, "pt") as b:
        names = sorted(a.keys())
        assert names == sorted(b.keys())
        for name in names:
            one, two = a.get_tensor(name), b.get_tensor(name)
            assert one.dtype == two.dtype and torch.equal(one, two), name


@pytest.mark.full_size
@pytest.mark.parametrize(
    ("name", "dtype", "prediction"),
    [("sd15", torch.float16, "epsilon"), ("sd21-v", torch.float32, "v_prediction")],
)
def test_round_trips(tmp_path, name, dtype, prediction):
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    save_single_file(make(name, dtype), files[0])
    save_file(read_tensors(files[0]), files[1])  # as another tool's: without our metadata
    files[0].unlink()

    parts = load_single_file(files[1], prediction_type=prediction)
    preset, heads = PRESETS[name], {"num_attention_heads": 1, "attention_head_dim": None}
    assert parts.unet.config.heads == preset.unet.heads
    assert replace(parts.unet.config, **heads) == replace(preset.unet, **heads)
    assert (parts.vae.config, parts.schedule.config) == (preset.vae, preset.schedule)
    save_folder(parts, tmp_path / "a")
    del parts
    save_single_file(load_folder(tmp_path / "a", ema=None), files[2])
    assert_same(files[1], files[2])
    files[1].unlink()

    save_folder(load_single_file(files[2]), tmp_path / "b")
    names = [f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*.safetensors")]
    assert len(names) >= 4
    for file in names:
        assert_same(tmp_path / "a" / file, tmp_path / "b" / file)
