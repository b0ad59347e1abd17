"""Bad input: exit code 2, exactly one line on stderr, and nothing heavy loaded to find out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm import cli
from ldm.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("[a-z]*.py"))
# Runs a script as `python scripts/x.py` does, and says at its end what it has imported.
WATCHED = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    heavy = {"torch", "transformers", "diffusers", "open_clip", "accelerate", "gradio"}
    print("heavy:", *sorted(heavy & set(sys.modules)))
"""


def run(script, *arguments, watched=True, cwd=None, **environment):
    """Exit code, stdout and stderr of a script, run as a user runs it."""
    command = [sys.executable, *(["-c", WATCHED] if watched else [])]
    return subprocess.run(
        [*command, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"} | environment,
    )


def assert_one_line(process, message):
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ") and re.search(message, line), line
    assert process.stdout.splitlines()[-1] == "heavy:"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Prompt files, configurations and data sets that are wrong in one way each."""
    place = tmp_path_factory.mktemp("wrong")
    (place / "latin1.txt").write_bytes("fleur fanée".encode("latin-1"))
    (place / "keys.txt").write_text("b\nc --s 9\n")
    (place / "blank.txt").write_text("\n \n")
    (place / "misspelt.yaml").write_text("learning_rat: 1.0e-3\n")
    (place / "nested.yaml").write_text("unet:\n  layers_per_blok: 1\n")
    (place / "broken.yaml").write_text("unet: [1\n")
    (place / "value.yaml").write_text("train_batch_size: many\n")
    (place / "empty").mkdir()
    (place / "few").mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8)).save(place / "few" / f"{i}.png")
        (place / "few" / f"{i}.txt").write_text("a flower")
    Image.new("RGB", (8, 8)).save(place / "photo.png")
    Image.new("L", (8, 4)).save(place / "mask.png")
    for name, line in {
        "option": "--x 3",
        "number": "--w big",
        "size": "--w 30",
        "steps": "--s 0",
        "prompt": "[a|b]",
        "negative": "--n <lora:x:1>",
        "seed": f"--d {'9' * 23}",
        "scale": "--l nan",
    }.items():
        (place / f"{name}.txt").write_text(f"# comment\n\na flower {line}\n")
    for part, config in (
        ("vae", {"block_out_channels": [8]}),
        ("unet", {"in_channels": 9, "out_channels": 4}),
    ):
        (place / "nine" / part).mkdir(parents=True)
        (place / "nine" / part / "config.json").write_text(json.dumps(config))
    (place / "sampler.txt").write_text("a flower --ss eulr\n")
    (place / "bare").mkdir()
    Image.new("RGB", (8, 8)).save(place / "bare" / "0.png")
    return place


TXT2IMG = {
    "unknown sampler": ("--sampler eulr", "no sampler 'eulr'; did you mean 'euler'"),
    "unknown spacing": ("--timestep_spacing kerras", "did you mean 'karras'"),
    "unknown dtype": ("--dtype bf61", "no dtype 'bf61'; did you mean 'bf16'"),
    "unknown model": ("--model ./flowrs", "no model './flowrs'"),
    "model is a file": ("--model {place}/blank.txt", "blank.txt is a file, but no .safetensors"),
    "not a model": ("--model {place}/empty", "no file .*vae/config.json"),
    "width": ("--model {model} --width 30", "width is 30; it must be .* multiple of 4, such as 32"),
    "height": ("--model {model} --H 0", "height is 0; it must be a positive multiple of 4"),
    "steps": ("--steps 0", "--num_inference_steps.*: 0 is out of range; it must be 1 or more"),
    "seed": ("--seed -2", "--seed: -2 is out of range; it must be -1 to 9223372036854775807"),
    "eta": ("--eta 1.5", "--eta.*: 1.5 is out of range; it must be 0 to 1"),
    "pictures": ("--n_samples 0", "--n_samples: 0 is out of range"),
    "interval": ("--guidance_interval 3 1", "guidance_interval is 3 1; give the lower one"),
    "interval below 0": ("--guidance_interval -1 3", "guidance_interval is -1 3; give"),
    "threshold": ("--dynamic_threshold 2 1", "dynamic_threshold is 2 1; the percentile must be in"),
    "no number": ("--scale nan", "--guidance_scale.*: nan is out of range; it must be finite"),
    "infinite": ("--sigmas inf,1,0", "--sigmas: inf is out of range; it must be 0 or more"),
    "rising": ("--sigmas 1,2", "--sigmas: 1,2 does not descend; give the highest first"),
    "two grids": ("--sigmas 2,1 --timesteps 9,1", "give --timesteps or --sigmas, one of the two"),
    "large seed": (
        "--seed 9223372036854775808",
        "--seed: 9[0-9]+ is out of range; it must be -1 to",
    ),
    "alternation": ("[red|blue]", r"prompt: \[red\|blue\] is prompt editing"),
    "negative network": ("--negative_prompt <lora:x:1>", "prompt: <lora:x:1> asks for an extra"),
    "break": ("--prompt a\u00a0BREAK\u00a0b", "prompt: BREAK needs --long_prompts chunk"),
    "inpainting model": ("--model {place}/nine", "nine is an inpainting model; use inpaint.py"),
    "two strips": ("--step_strip 1,2 --denoising_strip 2", "give --step_strip or --denoising_str"),
    "strip of sigmas": ("--step_strip 1,2 --sigmas 2,1", "step_strip chooses the steps; leave out"),
    "varied strip": ("--step_strip 1,2 --variation_strength 0.5", "a strip has no variations"),
    "prompt in a file": ("--from-file {place}/prompt.txt", r"prompt.txt, line 3: prompt: \[a\|b\]"),
    "negative in a file": ("--from-file {place}/negative.txt", "line 3: prompt: <lora:x:1> asks"),
    "seed in a file": ("--from-file {place}/seed.txt", "line 3: --d: 9+ is out of range"),
    "scale in a file": ("--from-file {place}/scale.txt", "line 3: --l: nan is out of range"),
    "variation": ("--variation_seed 3", "variation_seed needs --variation_strength"),
    "sigmas": ("--sigmas 9,x", "--sigmas: 'x' is not a number of type float"),
    "prediction": ("--prediction_type v", "no prediction_type 'v'; .*v_prediction"),
    "prediction of a folder": ("--model {model} --prediction_type epsilon", "is a folder; config "),
    "no lora": ("--lora {place}/no.safetensors:0.5", "no file .*no.safetensors; give one"),
    "no embedding": ("--textual_inversion {place}/no.pt", "no file .*no.pt; give one"),
    "settings of nothing": ("--settings_from {place}/no.png", "no file .*no.png"),
    "settings of text": ("--settings_from {place}/blank.txt", "blank.txt cannot be read as a pict"),
    "settings not said": ("--settings_from {place}/photo.png", "photo.png does not say how it was"),
    "option in a file": ("--from-file {place}/option.txt", "option.txt, line 3: no option --x"),
    "steps in a file": ("--from-file {place}/steps.txt", "line 3: --s: 0 is out of range"),
    "number in a file": ("--from-file {place}/number.txt", "line 3: --w: 'big' is not a number"),
    "size in a file": ("--model {model} --from-file {place}/size.txt", "line 3: width is 30; it"),
    "sampler in a file": (
        "--from-file {place}/sampler.txt",
        "line 1: --ss: there is no sampler 'eulr'",
    ),
    "prompt file": ("--from-file {place}/no.txt", "no file .*no.txt; --from-file wants a prompt"),
    "prompt encoding": ("--from-file {place}/latin1.txt", "latin1.txt is not UTF-8"),
    "misspelt option": ("--sampelr ddim", "--sampelr ddim; did you mean '--sampler'"),
    "value": ("--steps ten", "--num_inference_steps.*'ten' is not a number of type int"),
    "outdir": ("--model {model} --outdir {place}/blank.txt", "cannot write to .*choose --outdir"),
}


@pytest.mark.parametrize(("arguments", "message"), TXT2IMG.values(), ids=TXT2IMG.keys())
def test_txt2img(place, tiny_model_folder, arguments, message):
    words = [word.format(place=place, model=tiny_model_folder) for word in arguments.split(" ")]
    assert_one_line(run("txt2img", "a flower", *words, cwd=place), message)


def test_nothing_to_draw(place):
    for words in ([], ["--from-file", place / "blank.txt"]):
        assert_one_line(run("txt2img", *words), 'nothing to draw; say what, such as: .*"a red')


TASKS = {
    "no image": ("img2img", "required: --image"),
    "image is missing": ("img2img --image {place}/no.png", "no file .*no.png"),
    "image is text": ("img2img --image {place}/blank.txt", "blank.txt cannot be read as a picture"),
    "strength": ("img2img --image {place}/photo.png --strength 1.5", "--strength: 1.5 is out of r"),
    "strength is a word": ("img2img --image x --strength half", "'half' is not a number of"),
    "no mask": ("inpaint --image {place}/photo.png", "give --mask_image or --outpaint, one of"),
    "mask and margin": (
        "inpaint --image {place}/photo.png --mask {place}/mask.png --outpaint 4 4 4 4",
        "give --mask_image or --outpaint, one of the two",
    ),
    "no margin": ("inpaint --image {place}/photo.png --outpaint 0 0 0 0", "outpaint is 0 on every"),
    "margin": ("inpaint --image {place}/photo.png --outpaint 4 4 4", "--outpaint: expected 4 arg"),
    "mask is text": (
        "inpaint --image {place}/photo.png --mask {place}/blank.txt", "blank.txt cannot be read",
    ),
    "mask of another size": (
        "inpaint --image {place}/photo.png --mask {place}/mask.png",
        "mask_image is 8x4 and image 8x8; make them equal",
    ),
    "one key": ("interpolate", "1 prompts and 1 seeds; give two or more"),
    "keys that do not fit": ("interpolate --prompt b --seeds 1,2,3", "2 prompts and 3 seeds"),
    "keys of two sizes": (
        "interpolate --from-file {place}/keys.txt", "keys.txt, line 2: only --n and --d may be"
    ),
    "keys of several": ("interpolate --prompt b --n_samples 2", "a prompt is one key frame; leave"),
    "varied keys": ("interpolate --prompt b --variation_strength 0.1", "has no variations; leave"),
    "large seeds": ("interpolate --seeds 1,9999999999999999999", "--seeds: 9+ is out of range"),
    "inpainting model": ("interpolate --prompt b --model {place}/nine", "is an inpainting model"),
    "inpainting model over a picture": (
        "img2img --image {place}/photo.png --model {place}/nine", "is an inpainting model",
    ),
    "frames": ("interpolate --prompt b --frames 1", "--frames: 1 is out of range"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "message"), TASKS.values(), ids=TASKS.keys())
def test_tasks(place, words, message):
    script, *words = words.format(place=place).split()
    assert_one_line(run(script, "a flower", *words, cwd=place), message)


def test_verify(place):
    assert_one_line(run("verify"), "required: PICTURE")
    assert_one_line(run("verify", place / "no.png"), "no file .*no.png")
    assert_one_line(run("verify", place / "photo.png"), "photo.png has no record of how ldm made")


TRAIN = {
    "unknown stage": ("unett", "no stage 'unett'; did you mean 'unet'"),
    "key": ("unet --learning_rat 1", "unknown option 'learning_rat'; did you mean 'learning_rate'"),
    "nested key": ("--unet.layers_per_blok 1", "'unet.layers_per_blok'.*'unet.layers_per_block'"),
    "key in yaml": ("--config {place}/misspelt.yaml", "'learning_rat'; .*'learning_rate'"),
    "nested key in yaml": ("--config {place}/nested.yaml", "did you mean 'unet.layers_per_block'"),
    "key of another stage": ("vae --snr_gamma 5", "unknown option 'snr_gamma'"),
    "no config": ("--config {place}/no.yaml", "no file .*no.yaml; --config wants a YAML file"),
    "broken config": ("--config {place}/broken.yaml", "parsing config"),
    "value": ("vae --resolution big", "resolution is big; it must be int"),
    "value in yaml": ("vae --config {place}/value.yaml", "batch_size is many; it must be int"),
    "choice": ("--mixed_precision bf61", "mixed_precision is bf61; .*'no', 'bf16', 'fp16'"),
    "stray word": ("unet now", "unrecognized arguments: now"),
    "resolution": ("vae --resolution 66", "resolution 66 is not a multiple of 4"),
    "widths": ("vae --vae.norm_num_groups 7", "must be multiples of norm_num_groups 7"),
    "no data": ("--train_data_dir {place}/no", "wrong.*/no: no such file or folder"),
    "empty data": ("--train_data_dir {place}/empty", "empty: .*no pictures"),
    "no captions": ("--train_data_dir {place}/bare", "1 of 1 samples cannot be used.*no .txt"),
    "less than a batch": (
        "--train_data_dir {place}/few --train_batch_size 8 --validation_split 0.4",
        "the data set has . samples, fewer than a batch of 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), TRAIN.values(), ids=TRAIN.keys())
def test_train(place, arguments, message):
    words = [word.format(place=place) for word in arguments.split()]
    words += ["--output_dir", str(place / "out")] if "unett" not in words else []
    assert_one_line(run("train", *words), message)
    assert not (place / "out").exists()


@pytest.mark.parametrize("script", ["evaluate", "web"])
def test_other_scripts(script):
    assert_one_line(run(script, "--model", "./nowhere"), "no model './nowhere'")
    assert_one_line(run(script, "--modle", "x"), "did you mean '--model'")


def test_limits_of_the_other_scripts(place):
    for words, message in {
        ("evaluate", "--number", -1): "--number: -1 is out of range; it must be 1 or more",
        ("evaluate", "--outdir", place / "blank.txt" / "x"): "cannot write to .*choose --outdir",
        ("web", "--port", 99999): "--port: 99999 is out of range; it must be 0 to 65535",
    }.items():
        assert_one_line(run(*words), message)


def test_a_command_line_that_is_not_utf8(place):
    """PYTHONUTF8=1 hands such bytes on as lone surrogates."""
    process = run("txt2img", os.fsdecode(b"fleur fan\xe9e"), cwd=place)
    assert_one_line(process, "prompt 'fleur .*' is not UTF-8 text; write it as such")


def test_a_device_that_is_not_there(script):
    """Before the model is opened; torch must be loaded to tell."""
    for name, words in {"txt2img": ["a"], "evaluate": [], "web": []}.items():
        for device in ("foo", "meta"):
            with pytest.raises(ConfigError, match=f"no device '{device}' to draw on"):
                script(name, *words, "--device", device, model=None)


def test_a_full_gpu(capsys, monkeypatch):
    class OutOfMemoryError(RuntimeError):
        pass

    def main(arguments):
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee")

    with pytest.raises(SystemExit) as exit:
        cli.run(main)
    assert exit.value.code == 2
    assert re.fullmatch("error: .*--cpu_offload.*--vae_tiling.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_nothing_heavy(script):
    process = run(script, "--help")
    assert process.returncode == 0 and process.stderr == ""
    assert process.stdout.splitlines()[-1] == "heavy:"
    assert "--" in process.stdout and "usage:" in process.stdout.lower()
    assert set(SCRIPTS) >= {"evaluate", "img2img", "inpaint", "interpolate", "train", "txt2img"}


def test_help_of_each_stage_lists_its_own_options():
    shown = {stage: run("train", stage, "--help").stdout for stage in ("vae", "clip", "unet")}
    for stage, option in (("vae", "--kl_scale"), ("clip", "--clip.patch_size"), ("unet", "--unet")):
        assert [s for s, text in shown.items() if f"{option} " in text] == [stage]
        assert (
            "--train_batch_size" in shown[stage] and "pictures in an optimizer step" in shown[stage]
        )


def test_another_package_called_ldm(tmp_path):
    """CompVis's repositories use this import name too."""
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm" / "__init__.py").touch()
    process = run("txt2img", "a flower", watched=False, PYTHONPATH=str(tmp_path))
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert "another package called ldm" in line and "pip install -e" in line
