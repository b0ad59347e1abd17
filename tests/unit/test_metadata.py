"""What pictures say of themselves: written and read back, and as other people's tools wrote it."""

import hashlib
import inspect
import json
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from ldm.config import SamplerName, Spacing
from ldm.errors import DataError
from ldm.metadata import (
    SAMPLERS,
    SPACINGS,
    file_hash,
    json_sha256,
    parameters_text,
    parse_parameters,
    read_parameters,
    read_record,
    read_settings,
    save_picture,
)
from ldm.pipeline import LatentDiffusionPipeline

SETTINGS = {
    "num_inference_steps": 30,
    "sampler": "euler_a",
    "timestep_spacing": "karras",
    "guidance_scale": 3.5,
    "width": 64,
    "height": 32,
}
OTHERS = {
    "strength": 0.55,
    "timesteps": [999, 500.5, 1],
    "sigmas": [14.6, 3, 0.5, 0],
    "guidance_rescale": 0.7,
    "guidance_interval": [0.1, 8.25],
    "dynamic_threshold": [0.995, 3.0],
    "variation_seed": 12,
    "variation_strength": 0.25,
    "eta": 0.3,
    "variance": "fixed_large",
    "class_labels": 3,
    "clip_skip": 1,
    "long_prompts": "chunk",
    "prompt_weights": False,
}
RECORD = {
    "prompt": "a",
    "negative_prompt": "",
    "seed": 1,
    "settings": {},
    "batch": [0, 1],
    "inputs": {},
    "files": [],
    "paths": {},
    "components": {},
    "configurations": {},
    "versions": {},
    "device": "cpu",
    "processor": "",
    "dtype": "fp32",
}
PROMPTS = [
    "a red flower",
    "빨간 꽃 한 송이",
    "naïve — “quoted”, 100%: Steps: 3\n\n  second paragraph",
    'a (red:1.3) [flower], "said" C:\\flowers',
    "",
]


def image(seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def test_grammar():
    """The web UI's own order, names and quotes."""
    settings = SETTINGS | {"guidance_scale": 7.0, "strength": 0.5, "clip_skip": 1}
    text = parameters_text("a", "b", 7, settings, model="v1, pruned", model_hash="0123456789abcdef")
    assert text.startswith(
        "a\nNegative prompt: b\nSteps: 30, Sampler: Euler a, Schedule type: Karras, CFG scale: 7,"
        ' Seed: 7, Size: 64x32, Model hash: 0123456789, Model: "v1, pruned", Clip skip: 2,'
        " Denoising strength: 0.5, RNG: CPU, Version: ldm "
    )


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", ["", "흐릿한", "grey, dull\nand: small"])
def test_prompts_come_back(prompt, negative):
    made = parse_parameters(parameters_text(prompt, negative, 7, SETTINGS))
    assert made == (prompt, negative, 7, SETTINGS, [])


@pytest.mark.parametrize("sampler", get_args(SamplerName))
@pytest.mark.parametrize("spacing", get_args(Spacing))
def test_samplers_and_spacings_come_back(sampler, spacing):
    settings = SETTINGS | {"sampler": sampler, "timestep_spacing": spacing}
    assert parse_parameters(parameters_text("a", "", 1, settings)).settings == settings
    assert sampler in SAMPLERS and spacing in SPACINGS


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_each_setting_comes_back(name, sampler):
    settings = SETTINGS | {"sampler": sampler, name: OTHERS[name]}
    odd = {"eta": ["Eta: 0.3"]}.get(name, []) if sampler == "euler_a" else []
    if name == "variation_seed":
        odd = ["Variation seed: 12"]  # how far to lead there is not said
    made = parse_parameters(parameters_text("a", "", 1, settings))
    assert made.not_understood == odd
    assert made.settings == {k: v for k, v in settings.items() if not (odd and k == name)}


def test_all_settings_come_back_and_the_call_has_no_others():
    settings = SETTINGS | OTHERS | {"sampler": "ddim"}
    made = parse_parameters(parameters_text("a", "", 1, settings))
    steps = {"timesteps": settings["timesteps"]}
    assert made.settings | steps == settings  # a call takes timesteps or sigmas
    assert made.not_understood == ["Timesteps: [999.0, 500.5, 1.0]"]
    call = inspect.signature(LatentDiffusionPipeline.__call__).parameters
    not_settings = {"self", "prompt", "negative_prompt", "image", "mask_image", "seed", "generator"}
    not_settings |= {"num_images_per_prompt", "latents", "prompt_embeds", "negative_prompt_embeds"}
    not_settings |= {"batch_size", "output_type", "return_dict", "callback_on_step_end"}
    assert settings.keys() == call.keys() - not_settings


WEB_UI = {
    "2022": (
        "girl with an artist's beret, ((eyeshadow))\nNegative prompt: ugly, [blurry]\nSteps: 20,"
        " Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b",
        {"num_inference_steps": 20, "sampler": "euler_a", "timestep_spacing": "linspace"},
        ["RNG"],
    ),
    "name with its schedule": (
        "a\nSteps: 25, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 1, Size: 512x768, Model"
        " hash: 6ce0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, RNG: CPU, Version: v1.6.0",
        {"sampler": "dpmpp_2m", "timestep_spacing": "karras", "guidance_scale": 6.5, "clip_skip": 1,
         "width": 512, "height": 768},
        [],
    ),
    "exponential": (
        "a\nSteps: 25, Sampler: DPM++ 2M SDE Exponential, CFG scale: 6.5, Seed: 1, RNG: CPU",
        {"sampler": "dpmpp_2m_sde", "timestep_spacing": "exponential"},
        [],
    ),
    "schedule apart": (
        "a\nSteps: 25, Sampler: DPM++ SDE, Schedule type: SGM Uniform, CFG scale: 6, Seed: 1,"
        " RNG: CPU, Version: v1.10.1",
        {"sampler": "dpmpp_sde", "timestep_spacing": "trailing"},
        [],
    ),
    "automatic": (
        "a\nSteps: 25, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 6, Seed: 1,"
        " RNG: CPU, Version: v1.9.4",
        {"sampler": "dpmpp_2m", "timestep_spacing": "karras"},
        [],
    ),
    "before there was automatic": (
        "a\nSteps: 25, Sampler: DPM++ 2M, CFG scale: 6, Seed: 1, RNG: CPU, Version: v1.6.0",
        {"sampler": "dpmpp_2m", "timestep_spacing": "linspace"},
        [],
    ),
    "ddim": (
        "a\nSteps: 25, Sampler: DDIM, CFG scale: 6, Seed: 1, Eta DDIM: 0.4, RNG: CPU",
        {"sampler": "ddim", "timestep_spacing": "leading", "eta": 0.4},
        [],
    ),
    "img2img": (
        "a\nSteps: 25, Sampler: PLMS, CFG scale: 6, Seed: 1, Size: 512x512, Variation seed: 5,"
        " Variation seed strength: 0.1, Denoising strength: 0.75, RNG: CPU, Emphasis: None",
        {"sampler": "plms", "strength": 0.75, "variation_seed": 5, "variation_strength": 0.1,
         "prompt_weights": False},
        [],
    ),
    "of no use here": (
        "a <lora:add detail:0.8>\nSteps: 25, Sampler: DPM adaptive, Schedule type: KL Optimal, CFG"
        ' scale: 6, Seed: 1, Size: 512x512, ENSD: 31337, Lora hashes: "add detail: 7c6bad76eb54",'
        ' Hires upscale: 2, Template: "a, b", Steps per: x, RNG: NV',
        {"num_inference_steps": 25, "guidance_scale": 6},
        ["RNG: NV", "<lora:add detail:0.8>", "Sampler: DPM adaptive", "Schedule type: KL Optimal",
         "ENSD: 31337", "Hires upscale: 2", "Template: a, b", "Steps per: x"],
    ),
    "what is no number": (
        "a\nSteps: many, Sampler: Euler, CFG scale: 6, Seed: ?, RNG: CPU",
        {"sampler": "euler", "guidance_scale": 6},
        ["Steps: many", "Seed: ?"],
    ),
    "what is out of range": (
        "a\nSteps: 0, Sampler: Euler, CFG scale: nan, Seed: 99999999999999999999, Size: 64x0, Eta:"
        " 0.5, Variation seed: 3, Denoising strength: 2, Clip skip: 0, Emphasis: No norm, RNG: CPU,"
        ' Sigmas: "1, 2", Guidance interval: "3, 1", Dynamic threshold: "[0.9]", Variance: x',
        {"sampler": "euler", "width": 64},
        ["Emphasis: No norm", "Steps: 0", "CFG scale: nan", "Seed: 9", "Denoising strength: 2",
         "Guidance interval: 3, 1", "Dynamic threshold: [0.9]", "Variance: x", "Sigmas: 1, 2",
         "clip_skip: -1", "height: 0", "Variation seed: 3", "Eta: 0.5"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "settings", "odd"), WEB_UI.values(), ids=WEB_UI.keys())
def test_the_web_ui_wrote(text, settings, odd):
    made = parse_parameters(text)
    assert made.prompt == text.split("\n")[0].split(" <")[0]
    assert made.settings.items() >= settings.items()
    assert made.settings["long_prompts"] == "chunk"
    assert len(made.not_understood) == len(odd)
    assert all(said.startswith(what) for said, what in zip(made.not_understood, odd, strict=True))


def test_2022_in_full():
    made = parse_parameters(WEB_UI["2022"][0])
    assert made[:3] == ("girl with an artist's beret, ((eyeshadow))", "ugly, [blurry]", 965400086)
    size = {"width": 512, "height": 512, "guidance_scale": 7.0, "long_prompts": "chunk"}
    assert made.settings == WEB_UI["2022"][1] | size


@pytest.mark.parametrize("text", ["", "only a prompt", "a: b, c\nof two lines"])
def test_text_without_settings_is_a_prompt(text):
    assert parse_parameters(text) == (text, "", None, {}, [])


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_parameters_survive_in_a_file(tmp_path, ending):
    text = parameters_text(PROMPTS[2], "흐릿한", 7, SETTINGS)
    file = tmp_path / "deep" / f"a.{ending}"
    save_picture(image(), file, text, RECORD)
    assert read_parameters(file) == text
    if ending == "png":
        with Image.open(file) as again:
            np.testing.assert_array_equal(np.asarray(again), np.asarray(image()))
        assert b"iTXtparameters\0" in file.read_bytes() and b"iTXtldm\0" in file.read_bytes()


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_file_that_says_nothing(tmp_path, ending):
    file = tmp_path / f"a.{ending}"
    save_picture(image(), file)
    assert read_parameters(file) is None and read_record(file) is None
    with pytest.raises(DataError, match="does not say how it was made"):
        read_settings(file)


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "꽃 a, Steps: 1".encode("utf-16-be"),
        b"UNICODE\0" + "꽃 a, Steps: 1".encode("utf-16-le"),
        b"\0" * 8 + "꽃 a, Steps: 1".encode(),
        b"ASCII\0\0\0" + "꽃 a, Steps: 1".encode(),
    ],
)
def test_user_comments_of_other_tools(tmp_path, comment):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    image().save(tmp_path / "a.jpg", exif=exif)
    assert read_parameters(tmp_path / "a.jpg") == "꽃 a, Steps: 1"


def test_a_record_goes_before_parameters(tmp_path):
    own = {"prompt": "꽃\n", "negative_prompt": "x", "seed": 3, "settings": {"sigmas": [1, 0.5]}}
    record = RECORD | own
    save_picture(image(), tmp_path / "a.png", "b\nSteps: 1, Sampler: Euler, Seed: 1", record)
    assert read_record(tmp_path / "a.png") == record
    assert read_settings(tmp_path / "a.png") == ("꽃\n", "x", 3, {"sigmas": [1, 0.5]}, [])
    save_picture(image(), tmp_path / "b.png", "b\nSteps: 1, Sampler: Euler, Seed: 4")
    assert read_settings(tmp_path / "b.png").seed == 4


def test_a_record_is_checked_like_text(tmp_path):
    settings = {"sigmas": [1, 2], "height": 32, "width": "big", "clip_skip": None, "new": 1}
    save_picture(image(), tmp_path / "a.png", None, RECORD | {"seed": -3, "settings": settings})
    made = read_settings(tmp_path / "a.png")
    assert made.seed is None and made.settings == {"height": 32}
    odd = ["Seed: -3", "Sigmas: [1, 2]", "width: big", "clip_skip: null", "new: 1"]
    assert made.not_understood == odd


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    save_picture(image(), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(self, file, **options):
        file.write_bytes(before[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    for name in ("a", "b"):
        with pytest.raises(DataError, match=rf"cannot write .*{name}\.png \(No space left"):
            save_picture(image(1), tmp_path / f"{name}.png")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize(("letters", "kept"), [(32_000, True), (33_000, False)])
def test_text_too_long_for_a_jpeg(tmp_path, caplog, letters, kept):
    save_picture(image(), tmp_path / "a.jpg", "a" * letters)
    assert read_parameters(tmp_path / "a.jpg") == ("a" * letters if kept else None)
    assert [r.getMessage().split(" does")[1][:11] for r in caplog.records] == (
        [] if kept else [" not say ho"]
    )


BAD_RECORDS = [
    {"prompt": "a"},
    RECORD | {"files": {}},
    RECORD | {"seed": "1"},
    RECORD | {"settings": []},
]


@pytest.mark.parametrize("text", ["{", "[]", *map(json.dumps, BAD_RECORDS)])
def test_damaged_records(tmp_path, text):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("ldm", text)
    image().save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(DataError, match=r"a\.png: its record .* is damaged"):
        read_record(tmp_path / "a.png")


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "a.png").write_text("text")
    save_picture(image(), tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    for name, message in (("a", "cannot be read"), ("b", "cannot be read"), ("c", "no file")):
        with pytest.raises(DataError, match=message):
            read_settings(tmp_path / f"{name}.png")


def test_file_hash(tmp_path):
    for name, content in (("b", b"second"), ("a", b"first")):
        (tmp_path / name).write_bytes(content)
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"first").hexdigest()
    assert file_hash(tmp_path) == hashlib.sha256(b"firstsecond").hexdigest()


def test_the_hash_of_json_is_of_its_content():
    text = b'{"a": [1, null], "b": {"c": 2.5}}'
    assert json_sha256({"b": {"c": 2.5}, "a": (1, None)}) == hashlib.sha256(text).hexdigest()
