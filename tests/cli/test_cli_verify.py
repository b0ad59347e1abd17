"""A picture is made again, or what stands in the way is named."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import UNET, make_pipeline, randomize

from ldm.config import ScheduleConfig
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import ConfigError, DataError
from ldm.metadata import read_parameters, read_record, save_picture
from ldm.models.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline

DRAW = {
    "alone": ("txt2img", "a red flower"),
    "a batch": ("txt2img", "a", "빨간 꽃", "c", "--n_samples", 2, "--batch_size", 4),
    "noisy": ("txt2img", "a", "b", "--sampler", "euler_a", "--timestep_spacing", "karras"),
    "settings": (
        "txt2img", "a (red:1.3) [x]", "--eta", 0.5, "--guidance_interval", 0.2, 9, "--clip_skip", 1,
        "--guidance_rescale", 0.4, "--width", 48, "--negative_prompt", "grey",
    ),
    "variations": ("txt2img", "a", "--n_samples", 2, "--variation_strength", 0.3),
    "long": ("txt2img", "flower, " * 60, "b", "--long_prompts", "chunk"),
    "half": ("txt2img", "a", "b", "--dtype", "bf16"),
    "img2img": ("img2img", "a", "--image", "photo.png", "--strength", 0.7, "--n_samples", 2),
    "inpaint": ("inpaint", "a", "--image", "photo.png", "--mask_image", "mask.png"),
    "outpaint": ("inpaint", "a", "--image", "photo.png", "--outpaint", 8, 0, 0, 4),
}  # fmt: skip


@pytest.fixture
def verify(script, capsys):
    """The exit code and the line of the script."""

    def check(file, *words, model=None):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            script("verify", file, *words, model=model)
        (line,) = capsys.readouterr().out.splitlines()
        return int(exit.value.code or 0), line

    return check


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_model_folder):
    """A working directory with a picture, a mask, and a copy of the model to change."""
    monkeypatch.chdir(tmp_path)
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(levels).save("photo.png")
    Image.fromarray((levels[..., 0] > 99).astype(np.uint8) * 255).save("mask.png")
    shutil.copytree(tiny_model_folder, "model")
    return tmp_path


@pytest.fixture
def drawn(script, place):
    """One picture of the model's copy."""
    script("txt2img", "a", "--steps", 2, "--outdir", "out", model="model")
    return place / "out" / "samples" / "00000.png"


@pytest.mark.parametrize("words", DRAW.values(), ids=DRAW.keys())
def test_every_picture_is_identical(script, place, verify, words):
    script(*words, "--steps", 3, "--outdir", "out")
    files = sorted((place / "out" / "samples").iterdir())
    for file in files:
        assert verify(file) == (0, f"identical: {file}")


def test_a_class_is_drawn_again(script, place, verify):
    """A model with classes and a learned variance, by the sampler that uses both."""
    tiny = make_pipeline()
    unet = UNet(replace(UNET, num_class_embeds=4, out_channels=8)).eval()
    randomize(unet)
    schedule = NoiseSchedule(ScheduleConfig(variance_type="learned_range"))
    parts = tiny.components | {"unet": unet, "schedule": schedule}
    LatentDiffusionPipeline(**parts).save_pretrained("classes")
    draw = ("txt2img", "a", "b", "--sampler", "ddpm", "--steps", 3, "--outdir", "out")
    for label in (2, 0):
        script(*draw, "--class_label", label, model="classes")
    for number, label in enumerate((2, 2, 0, 0)):
        file = place / "out" / "samples" / f"{number:05}.png"
        made = read_record(file)["settings"]
        assert (made["class_labels"], made["variance"]) == (label, "learned_range")
        assert f"Class labels: {label}" in read_parameters(file)
        assert verify(file) == (0, f"identical: {file}")
    with pytest.raises(ConfigError, match="class_labels is 3; this model has classes 0 to 2"):
        script(*draw, "--class_label", 3, model="classes")


def test_a_changed_byte_names_the_unet(drawn, place, verify):
    weights = place / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, line = verify(drawn)
    assert code == 1
    assert re.fullmatch(rf"differs: {drawn}: another unet \(\w{{10}} then, \w{{10}} now\)", line), (
        line
    )


@pytest.mark.parametrize("key", ["beta_end", "prediction_type"])
def test_a_changed_schedule_is_named(drawn, place, verify, key):
    file = place / "model" / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    config |= {"beta_end": 0.013} if key == "beta_end" else {"prediction_type": "v_prediction"}
    file.write_text(json.dumps(config))
    code, line = verify(drawn)
    assert code == 1 and line.startswith(f"differs: {drawn}: another schedule (")


def change(file, **changes):
    """Sets keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


CHANGES = {
    "scaling_factor": ("vae/config.json", {"scaling_factor": 0.5}, "vae configuration"),
    "heads": ("unet/config.json", {"attention_head_dim": 4}, "unet configuration"),
    "text heads": (
        "text_encoder/config.json", {"num_attention_heads": 2}, "text_encoder configuration",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("file", "changes", "part"), CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_configuration_is_named(drawn, place, verify, file, changes, part):
    change(place / "model" / file, **changes)
    code, line = verify(drawn)
    assert code == 1 and line.startswith(f"differs: {drawn}: another {part} ("), line
    assert line.count("another") == 1


def test_a_changed_tokenizer_is_named(drawn, place, verify):
    folder = place / "model" / "tokenizer"
    vocab = json.loads((folder / "vocab.json").read_text())
    a, b = list(vocab)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "tokenizer.json").unlink(missing_ok=True)
    code, line = verify(drawn)
    assert code == 1 and line.startswith(f"differs: {drawn}: another tokenizer ("), line


DAMAGE = {
    "batch": {"batch": [2, 2]},
    "batch of words": {"batch": ["a", "b"]},
    "model": {"inputs": {"model": 3}},
    "files": {"files": ["a"]},
    "settings": {"settings": {"sampler": "new"}},
    "a key": {"dtype": None},
    "dtype": {"dtype": "fp9"},
    "lora": {"inputs": {"model": "model", "lora": [1]}},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_record(drawn, script, damage):
    with Image.open(drawn) as image:
        save_picture(image, drawn, None, (read_record(drawn) or {}) | damage)
    with pytest.raises(DataError, match=r"00000\.png: its record .* damaged"):
        script("verify", drawn, model=None)


@pytest.mark.parametrize("name", ["image", "lora", "config"])
def test_what_it_was_drawn_without(drawn, script, name):
    with pytest.raises(ConfigError, match=f"it was drawn with no {name}"):
        script("verify", drawn, f"--{name}", "photo.png", model=None)


@pytest.mark.parametrize(
    ("levels", "code", "word"), [(2, 0, "within tolerance"), (3, 1, "differs")]
)
def test_the_tolerance(drawn, verify, levels, code, word):
    record = read_record(drawn) or {}
    record["versions"]["torch"] = "1.0"
    with Image.open(drawn) as image:
        pixels = np.asarray(image).copy()
    pixels[3, 4, 1] += levels if pixels[3, 4, 1] < 128 else -levels
    save_picture(Image.fromarray(pixels), drawn, read_parameters(drawn), record)
    found = verify(drawn)
    assert found[0] == code
    assert found[1].startswith(f"{word}: {drawn}: {levels} of 255 levels; torch 1.0 then, ")


def test_changed_missing_and_moved_inputs(script, place, verify):
    words = ["--image", "photo.png", "--mask_image", "mask.png", "--steps", 2]
    script("inpaint", "a", *words, "--outdir", "out")
    file = "out/samples/00000.png"
    (place / "photo.png").rename(place / "moved.png")
    assert verify(file) == (1, f"differs: {file}: photo.png is missing")
    assert verify(file, "--image", "moved.png") == (0, f"identical: {file}")
    Image.open("moved.png").transpose(Image.Transpose.ROTATE_180).save("photo.png")
    assert verify(file) == (1, f"differs: {file}: photo.png is another file now")


def test_a_changed_adapter(script, place, verify):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    parts = {"lora_up": torch.ones(32, 1), "lora_down": torch.ones(1, 32)}
    for scale, said in (
        (1, "identical: {}"),
        (2, "differs: {}: a.safetensors is another file now"),
    ):
        tensors = {f"{name}.{part}.weight": scale * tensor for part, tensor in parts.items()}
        save_file(tensors, "a.safetensors")
        if scale == 1:
            script("txt2img", "a", "--lora", "a.safetensors:0.5", "--steps", 2, "--outdir", "out")
        assert verify("out/samples/00000.png")[1] == said.format("out/samples/00000.png")


def test_a_moved_model(drawn, place, verify):
    (place / "model").rename(place / "elsewhere")
    with pytest.raises(ConfigError, match="no model 'model'"):
        verify(drawn)
    assert verify(drawn, model="elsewhere") == (0, f"identical: {drawn}")


def test_a_picture_of_another_size(drawn, verify):
    with Image.open(drawn) as image:
        save_picture(image.resize((16, 16)), drawn, None, read_record(drawn))
    assert verify(drawn)[0] == 1


def test_a_picture_that_says_nothing(place, script):
    with pytest.raises(ConfigError, match=r"photo\.png has no record of how ldm made it"):
        script("verify", "photo.png", model=None)


def test_two_loras_of_one_name_and_where_they_have_moved_to(script, place, verify):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
    for folder, value in (("a", 0.3), ("b", -0.2)):
        (place / folder).mkdir()
        tensors = {"lora_up": torch.full((32, 1), value), "lora_down": torch.ones(1, 32)}
        tensors = {f"{name}.{part}.weight": tensor for part, tensor in tensors.items()}
        save_file(tensors, place / folder / "w.safetensors")
    words = ["--lora", "a/w.safetensors:0.5", "--lora", "b/w.safetensors", "--image", "photo.png"]
    script("img2img", "a", *words, "--steps", 2, "--outdir", "out", model="model")
    drawn = place / "out" / "samples" / "00000.png"
    assert verify(drawn) == (0, f"identical: {drawn}")
    (place / "a").rename(place / "c")
    assert verify(drawn)[1].endswith("a/w.safetensors is missing")
    moved = ["--lora", "c/w.safetensors", "--lora", "b/w.safetensors"]
    assert verify(drawn, *moved) == (0, f"identical: {drawn}")
