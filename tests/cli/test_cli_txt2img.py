"""The whole command, on a tiny model: pictures, what their files say, grids and strips."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import tasks
from ldm.cli import Parser
from ldm.errors import ConfigError, DataError
from ldm.metadata import read_parameters, read_record, read_settings, save_picture
from ldm.options import add_options, read_prompts
from ldm.outputs import claim, new_file

SCRIPT = Path(__file__).parents[2] / "scripts" / "txt2img.py"
PROMPTS = ["a red flower", "빨간 꽃"]
OPTIONS = ["--n_samples", "2", "--seed", "7", "--negative_prompt", "grey", "--steps", "3"]


@pytest.fixture
def txt2img(script, tmp_path):
    """Runs the script, and returns the pictures that it has written by now."""

    def draw(*words, outdir=tmp_path):
        script("txt2img", *words, "--outdir", outdir)
        return sorted((outdir / "samples").iterdir())

    return draw


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def assert_same(file, image):
    assert np.abs(pixels(file) - np.asarray(image)).max() <= 1


def test_pictures_parameters_and_grid(tiny_pipeline, tiny_model_folder, txt2img, tmp_path):
    command = [sys.executable, SCRIPT, *PROMPTS, *OPTIONS, "--model", tiny_model_folder]
    command += ["--dtype", "fp32"]
    process = subprocess.run(
        [*map(str, command), "--outdir", str(tmp_path / "all")],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "PYTHONUTF8": "1"},
    )
    assert process.returncode == 0, process.stderr
    files = [tmp_path / "all" / "samples" / f"{i:05}.png" for i in range(4)]
    assert sorted((tmp_path / "all").rglob("*.png")) == [tmp_path / "all" / "grid-0000.png", *files]
    expected = tiny_pipeline(
        PROMPTS, negative_prompt="grey", seed=7, num_images_per_prompt=2, num_inference_steps=3
    ).images
    lines = process.stdout.splitlines()
    unet = tiny_pipeline.component_hashes()["unet"]
    for i, file in enumerate(files):
        assert_same(file, expected[i])
        assert (read_parameters(file) or "").startswith(
            f"{PROMPTS[i // 2]}\nNegative prompt: grey\nSteps: 3, Sampler: DDIM, Schedule type:"
            f" DDIM, CFG scale: 3, Seed: {7 + i}, Size: 32x32, Model hash: {unet[:10]}, Model: tiny"
        )
        assert lines[i] == f"{file}  seed {7 + i}  {PROMPTS[i // 2]}"
    assert lines[4] == str(tmp_path / "all" / "grid-0000.png")
    grid = pixels(tmp_path / "all" / "grid-0000.png")
    assert grid.shape == (66, 66, 3)
    np.testing.assert_array_equal(grid[34:, 34:], pixels(files[3]))
    assert "|" not in process.stdout  # the progress bar goes to stderr

    for size in ("1", "3"):
        for file in txt2img(*PROMPTS, *OPTIONS, "--batch_size", size, outdir=tmp_path / size):
            assert_same(file, Image.open(tmp_path / "all" / "samples" / file.name))


def test_files_are_never_overwritten(txt2img, tmp_path):
    samples = tmp_path / "samples"
    for _ in range(2):
        txt2img("a", "b", "--steps", "1")
    assert sorted(path.name for path in samples.iterdir()) == [f"{i:05}.png" for i in range(4)]
    assert (tmp_path / "grid-0001.png").is_file()
    (samples / "00001.png").unlink()  # a gap is not filled, what comes after it is kept
    before = (samples / "00003.png").read_bytes()
    txt2img("c", "--steps", "1", "--skip_grid")
    assert (samples / "00003.png").read_bytes() == before
    assert (read_parameters(samples / "00004.png") or "").startswith("c\nSteps: 1,")
    assert len(list(tmp_path.glob("grid-*.png"))) == 2


def test_a_name_is_taken_between_a_look_and_a_claim(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.outputs.next_number", lambda *_: 0)
    (tmp_path / "00000.png").write_text("theirs")
    (tmp_path / "frames-0000").mkdir()
    with new_file(tmp_path, "", 5) as file:
        file.write_text("ours")
    assert file.name == "00001.png" and (tmp_path / "00000.png").read_text() == "theirs"
    assert claim(tmp_path, "frames-").name == "frames-0001"


def test_a_file_that_cannot_be_written_is_gone(tmp_path):
    with pytest.raises(DataError), new_file(tmp_path, "") as file:
        assert file.exists()
        raise DataError("the disk is full")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write .*0000 .Not a directory"):
        claim(tmp_path / "file", "")


def test_lines_end_only_at_line_feeds(tmp_path):
    (tmp_path / "a.txt").write_bytes("a\u2028b\x0cc --n d\r\ne\r\n".encode())
    assert read_prompts(tmp_path / "a.txt") == [
        ("a\u2028b\x0cc", {"negative_prompt": "d"}, f"{tmp_path / 'a.txt'}, line 1: "),
        ("e", {}, f"{tmp_path / 'a.txt'}, line 2: "),
    ]


def test_brackets_in_literal_prompts(txt2img):
    (file,) = txt2img("[a|b] BREAK c", "--literal_prompts", "--steps", 1)
    assert read_settings(file).prompt == "[a|b] BREAK c"


def test_settings_that_do_not_fit(txt2img, tmp_path, capsys):
    text = "a\nSteps: 1, Sampler: Euler, CFG scale: nan, Seed: 9, Size: 32x32, Variation seed: 3"
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", text + ", RNG: CPU")
    (file,) = txt2img("--settings_from", tmp_path / "a.png")
    said = capsys.readouterr().out.splitlines()[0]
    assert said.endswith("a.png: CFG scale: nan; Variation seed: 3")
    assert read_settings(file).settings["guidance_scale"] == 3


def test_prompts_from_everywhere_and_a_random_seed(txt2img, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\ufeffthree\n\n  four \n", encoding="utf-8")
    words = ["one", "--prompt", "two", "--from-file", tmp_path / "prompts.txt"]
    options = ["--steps", 1, "--seed", -1, "--sampler", "euler_a", "--scale", 1, "--width", 48]
    files = txt2img(*words, *options)
    made = [read_settings(file) for file in files]
    assert [m.prompt for m in made] == ["one", "two", "three", "four"]
    seeds = [
        int(line.split("seed ")[1].split()[0]) for line in capsys.readouterr().out.split("\n")[:4]
    ]
    assert seeds == list(range(seeds[0], seeds[0] + 4)) == [m.seed for m in made]
    assert made[2].settings.items() >= {"guidance_scale": 1, "width": 48, "height": 32}.items()
    assert pixels(files[0]).shape == (32, 48, 3)


def test_a_prompt_file_with_options(txt2img, tmp_path, tiny_pipeline):
    (tmp_path / "prompts.txt").write_text(
        "# a comment\n"
        "a red flower --n dull grey --d 3 --s 2\n"
        "\n"
        "a blue flower --w 48 --h 16 --l 2.5 --ss euler\n"
        "well-known -- dashes\n"
        "the last --s 2 --n none of it\n",
        encoding="utf-8",
    )
    words = ["--from-file", tmp_path / "prompts.txt", "--n_samples", 2, "--seed", 10, "--steps", 1]
    files = txt2img(*words, "--negative_prompt", "ugly", "--batch_size", 3)
    made = [read_settings(file) for file in files]
    prompts = ["a red flower", "a blue flower", "well-known -- dashes", "the last"]
    assert [m.prompt for m in made] == [prompt for prompt in prompts for _ in range(2)]
    assert [m.seed for m in made] == [3, 4, 12, 13, 14, 15, 16, 17]
    negatives = ["dull grey", "ugly", "ugly", "none of it"]
    assert [m.negative_prompt for m in made] == [n for n in negatives for _ in range(2)]
    assert [m.settings["num_inference_steps"] for m in made] == [2, 2, 1, 1, 1, 1, 2, 2]
    for file, m in zip(files, made, strict=True):
        again = tiny_pipeline(
            m.prompt, negative_prompt=m.negative_prompt, seed=m.seed, **m.settings
        )
        assert_same(file, again.images[0])
    assert pixels(files[2]).shape == (16, 48, 3) and made[2].settings["sampler"] == "euler"
    grids = [pixels(tmp_path / f"grid-000{i}.png").shape for i in range(2)]
    assert grids == [(66, 100, 3), (16, 98, 3)]  # six of one size, two of the other


COMPVIS = {
    "--ddim_steps 20 --scale 9.0 --H 64 --W 32": (
        "--num_inference_steps 20 --guidance_scale 9 --height 64 --width 32"
    ),
    "--n_samples 3 --ddim_eta 0.5 --ckpt x": "--num_images_per_prompt 3 --eta 0.5 --model x",
    "--plms": "--sampler plms",
    "--dpm_solver": "--sampler dpmpp_2m",
    "--dpm": "--sampler dpmpp_2m",
    "--precision full --from_file x": "--dtype fp32 --from-file x",
    "--cfg_scale 3 --steps 2": "--guidance_scale 3 --num_inference_steps 2",
}


@pytest.mark.parametrize(("theirs", "ours"), COMPVIS.items())
def test_both_vocabularies(theirs, ours):
    parser = Parser("txt2img.py")
    add_options(parser, "out")
    assert parser.parse_args(theirs.split()) == parser.parse_args(ours.split())


def test_one_noise_for_all_and_repeats(txt2img, tiny_pipeline):
    words = ["a", "--n_samples", 2, "--n_iter", 2, "--steps", 1, "--skip_grid"]
    assert [read_settings(file).seed for file in txt2img(*words)] == [42, 43, 44, 45]
    files = txt2img("a", "b", "--steps", 2, "--fixed_code", "--seed", 3)[4:]
    assert [read_settings(file).seed for file in files] == [3, 3]
    assert_same(files[1], tiny_pipeline("b", seed=3, num_inference_steps=2).images[0])


def test_variations_of_one_noise(txt2img, tiny_pipeline):
    words = ["a", "--steps", 2, "--seed", 3, "--variation_seed", 8, "--variation_strength", 0.4]
    files = txt2img(*words, "--n_samples", 3, "--batch_size", 2)
    for i, file in enumerate(files):
        made = read_settings(file)
        varied = {"variation_seed": 8 + i, "variation_strength": 0.4}
        assert made.seed == 3 and made.settings.items() >= varied.items()
        image = tiny_pipeline("a", seed=3, num_inference_steps=2, **varied).images[0]
        assert_same(file, image)


def test_the_record_says_what_drew_it(txt2img, tiny_pipeline, tmp_path):
    long = "flower " * 90
    files = txt2img("a", long, "b", "--steps", 1, "--batch_size", 2, "--dtype", "bf16")
    records = [read_record(file) or {} for file in files]
    assert [record["batch"] for record in records] == [[0, 2], [1, 2], [0, 1]]
    hashes = tiny_pipeline.component_hashes()
    assert records[0]["components"].keys() == hashes.keys()  # in bf16, so of other numbers
    assert records[0]["components"] != hashes and records[0]["dtype"] == "bf16"
    assert records[0]["device"] in ("cpu", "cuda") and "torch" in records[0]["versions"]
    assert records[1]["dropped"] == tiny_pipeline.text_encoder.dropped(long)
    assert "dropped" not in records[0]
    records = [read_record(f) for f in txt2img(long, "--steps", 1, "--long_prompts", "chunk")[3:]]
    assert "dropped" not in (records[0] or {})


@pytest.mark.parametrize(("pays", "dtype"), [(False, "fp32"), (True, "bf16")])
def test_the_dtype_is_the_faster_one_of_the_processor(txt2img, monkeypatch, capsys, pays, dtype):
    monkeypatch.setattr("ldm.processor.half_pays", lambda: pays)
    chosen, asked = (
        read_record(txt2img("a", "--steps", 1, "--device", "cpu", *words)[-1])["dtype"]
        for words in ((), ("--dtype", "fp16"))
    )
    assert (chosen, asked) == (dtype, "fp16")
    assert f"computing in {dtype}; --dtype decides otherwise" in capsys.readouterr().err


def test_the_engine_is_recorded(txt2img):
    words = ("a", "--steps", 2, "--seed", 3)
    records = [read_record(txt2img(*words, "--engine", e)[-1]) for e in ("plain", "fast")]
    assert [record["inputs"]["engine"] for record in records] == ["plain", "fast"]


def test_settings_from_our_picture(txt2img, tmp_path, capsys):
    words = ["a (red:1.3) flower", "--negative_prompt", "grey", "--steps", 2, "--sampler", "ddim"]
    words += ["--eta", 0.5, "--scale", 2, "--guidance_interval", 0.2, 9, "--guidance_rescale", 0.3]
    words += ["--clip_skip", 1, "--literal_prompts", "--sigmas", "9,2,0.5", "--width", 48]
    (file,) = txt2img(*words, "--seed", 5)
    again = txt2img("--settings_from", file)[1]
    other = txt2img("b", "--settings_from", file, "--steps", 1, "--seed", 6)[2]
    np.testing.assert_array_equal(pixels(again), pixels(file))
    assert read_settings(again) == read_settings(file)
    made = read_settings(other)
    assert (made.prompt, made.negative_prompt, made.seed) == ("b", "grey", 6)
    assert made.settings == read_settings(file).settings | {"num_inference_steps": 1}
    assert "not used" not in capsys.readouterr().out


def test_settings_from_a_web_ui(txt2img, tmp_path, capsys, tiny_pipeline):
    save_picture(
        Image.new("RGB", (8, 8)),
        tmp_path / "theirs.jpg",
        "a <lora:x:1>\nNegative prompt: b\nSteps: 2, Sampler: DPM++ 2M Karras, CFG scale: 2, Seed:"
        " 9, Size: 48x32, Denoising strength: 0.5, ENSD: 31337",
    )
    (file,) = txt2img("--settings_from", tmp_path / "theirs.jpg")
    said = capsys.readouterr().out.splitlines()[0]
    assert said == (
        f"not used of {tmp_path / 'theirs.jpg'}: strength: 0.5; RNG: GPU (the same seed draws other"
        " noise here); <lora:x:1>; ENSD: 31337"
    )
    image = tiny_pipeline(
        "a", negative_prompt="b", num_inference_steps=2, sampler="dpmpp_2m", width=48, height=32,
        timestep_spacing="karras", guidance_scale=2, seed=9,
    ).images[0]  # fmt: skip
    assert_same(file, image)


def test_metadata_is_left_out(txt2img):
    (file,) = txt2img("a", "--steps", 1, "--no_metadata")
    with Image.open(file) as image:
        image.load()
        assert image.info == {}


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_other_formats(txt2img, ending):
    files = txt2img("빨간 꽃", "b", "--steps", 1, "--format", ending)
    assert [file.name for file in files] == [f"0000{i}.{ending}" for i in range(2)]
    assert [read_settings(file).prompt for file in files] == ["빨간 꽃", "b"]


def test_only_a_grid(txt2img, tmp_path):
    words = ["a", "b", "c", "--steps", 1, "--skip_save", "--n_rows", 3]
    assert txt2img(*words) == []
    assert pixels(tmp_path / "grid-0000.png").shape == (32, 32 * 3 + 4, 3)


@pytest.mark.parametrize("kind", ["lora", "textual_inversion"])
def test_adapters(txt2img, tmp_path, tiny_model_folder, kind):
    """A LoRA's weight is its own, and a textual inversion's word is the file's."""
    import torch
    from safetensors.torch import save_file

    from ldm.pipeline import LatentDiffusionPipeline

    pipeline = LatentDiffusionPipeline.from_pretrained(tiny_model_folder)
    generator = torch.Generator().manual_seed(0)
    if kind == "lora":
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q"
        up, down = (torch.randn(shape, generator=generator) for shape in ((32, 2), (2, 32)))
        tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(2.0)}
        save_file({f"{name}.{key}": t for key, t in tensors.items()}, tmp_path / "a.safetensors")
        words = ["--lora", f"{tmp_path / 'a.safetensors'}:0.5"]
        plain = pipeline("<cat> b", seed=1, num_inference_steps=2).images[0]
        pipeline.load_lora_weights(tmp_path / "a.safetensors", 0.5)
    else:
        save_file({"<cat>": torch.randn(2, 32, generator=generator)}, tmp_path / "a.safetensors")
        words = ["--textual_inversion", tmp_path / "a.safetensors"]
        plain = pipeline("<cat> b", seed=1, num_inference_steps=2).images[0]
        pipeline.load_textual_inversion(tmp_path / "a.safetensors")
    (file,) = txt2img("<cat> b", "--seed", 1, "--steps", 2, *words)
    assert_same(file, pipeline("<cat> b", seed=1, num_inference_steps=2).images[0])
    assert np.abs(pixels(file) - np.asarray(plain)).max() > 10
    record = read_record(file) or {}
    assert record["components"] == read_record(txt2img("b", "--steps", 1)[-1])["components"]  # type: ignore


def test_strips(script, tmp_path, tiny_pipeline):
    words = ["a", "--seed", 3, "--steps", 5, "--scale", 2, "--outdir", tmp_path]
    script("txt2img", *words, "--step_strip", "1,3")
    expected = tasks.step_strip(tiny_pipeline, "a", [1, 3], seed=3, guidance_scale=2)
    assert_same(tmp_path / "strip-0000.png", expected)
    script("txt2img", *words, "--denoising_strip", 3)
    expected = tasks.denoising_strip(
        tiny_pipeline, "a", 3, seed=3, num_inference_steps=5, guidance_scale=2
    )
    assert_same(tmp_path / "strip-0001.png", expected)
    assert not (tmp_path / "samples").exists()
    for words in (["--steps", 2], ["--sigmas", "9,2,0"]):
        with pytest.raises(ConfigError, match="3 columns of 2 steps; ask for fewer"):
            script("txt2img", "a", "--outdir", tmp_path, "--denoising_strip", 3, *words)
