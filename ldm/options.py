"""The options of the drawing scripts, and of a line in a prompt file; what they ask for.

An option is called as the argument of the pipeline's call that it becomes. Imports no torch:
whatever is wrong with the options is said before a model is opened.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from argparse import Action, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ldm.checkpoint.locate import downsample_factor, locate_model
from ldm.cli import Parser
from ldm.config import (
    EngineName,
    LongPrompts,
    Prediction,
    SamplerName,
    Spacing,
    Variance,
    check_size,
)
from ldm.errors import ConfigError, suggest
from ldm.metadata import read_settings
from ldm.prompts import parse_weights
from ldm.settings import MAX_SEED, READERS, real, within

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Arguments of the call that are the same for all pictures of a prompt.
SETTINGS = ("height", "width", "num_inference_steps", "timesteps", "sigmas", "guidance_scale")
SETTINGS += ("guidance_rescale", "guidance_interval", "dynamic_threshold", "variation_strength")
SETTINGS += ("sampler", "timestep_spacing", "eta", "variance", "clip_skip", "long_prompts")
SETTINGS += ("prompt_weights", "strength", "class_labels")


class Picture(NamedTuple):
    """One picture to draw: its prompts, its seeds, and the rest of the call's arguments."""

    prompt: str
    negative_prompt: str
    seed: int
    variation_seed: int | None
    settings: dict[str, Any]
    where: str = ""  # "FILE, line N: " of a prompt file, for messages


# The options of a line in a prompt file, by kohya's names.
LINE_OPTIONS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "num_inference_steps",
    "l": "guidance_scale",
    "ss": "sampler",
}


def add_options(parser: Parser, outdir: str) -> None:
    """The options of every drawing script, in the words of diffusers and of CompVis."""
    own = "the model's own if not given"

    add = parser.add_argument_group("what to draw").add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw")
    add("--prompt", action="append", default=[], help="the same")
    add("--from-file", "--from_file", type=Path, help="a file with a prompt a line; a line may end"
        " in --n NEGATIVE --w 512 --h 512 --d SEED --s STEPS --l SCALE --ss SAMPLER; started again,"
        " only the pictures that are missing are drawn")  # fmt: skip
    add("--settings_from", type=Path, metavar="PICTURE", help="settings of a picture by ldm or a"
        " web UI; the command line wins")  # fmt: skip
    add("--negative_prompt", default="", help="what guidance leads away from")
    add("--class_labels", "--class_label", type=within(0), help="of a model that has classes")
    add("--num_images_per_prompt", "--n_samples", type=within(1), default=1,
        help="pictures of each prompt; 1 if not given")  # fmt: skip
    add("--n_iter", type=within(1), default=1, help="times --num_images_per_prompt")
    add("--batch_size", type=within(1), help="pictures at a time, about a megapixel if not given;"
        " changes no picture but by rounding")  # fmt: skip
    add("--seed", type=within(-1, MAX_SEED), default=42, help="of the first picture, then one"
        " more each; 42 if not given; -1: random")  # fmt: skip
    add("--fixed_code", action="store_true", help="the same seed for all pictures")
    add("--variation_seed", type=READERS["seed"], help="noise to lead towards, then one more each")
    add("--variation_strength", type=within(0, 1, float), help="how far to lead there, 0 to 1")

    add = parser.add_argument_group("how to draw it").add_argument
    add("--num_inference_steps", "--steps", "--ddim_steps", type=within(1), help=own)
    add("--guidance_scale", "--scale", "--cfg_scale", type=real, help=own)
    add("--guidance_rescale", type=within(0, 1, float), help="of Lin et al. 2024, 0 to 1")
    add("--guidance_interval", type=real, nargs=2, metavar=("LOW", "HIGH"), help="guide only"
        " at noise levels (sigmas) between these two")  # fmt: skip
    add("--dynamic_threshold", type=real, nargs=2, metavar=("PERCENTILE", "LIMIT"), help="of"
        " Imagen; 0.995 3 for example")  # fmt: skip
    add("--height", "--H", type=within(0), help=f"in pixels; {own}")
    add("--width", "--W", type=within(0), help=f"in pixels; {own}")
    add("--sampler", choices=get_args(SamplerName), default="ddim", help="ddim if not given")
    for flag, name in (("plms", "plms"), ("dpm_solver", "dpmpp_2m"), ("dpm", "dpmpp_2m")):
        add(
            f"--{flag}",
            dest="sampler",
            action="store_const",
            const=name,
            help=f"same as --sampler {name}",
        )
    add("--timestep_spacing", choices=get_args(Spacing), help=own)
    add("--timesteps", type=READERS["timesteps"], help="to visit, instead of a spacing: 999,500,1")
    add("--sigmas", type=READERS["sigmas"], help="to visit, likewise: 14.6,3,0.5,0")
    add(
        "--eta",
        "--ddim_eta",
        type=within(0, 1, float),
        help="of DDIM: 0 draws no noise, 1 as much as DDPM",
    )
    add(
        "--variance",
        choices=get_args(Variance),
        help=f"of the noise that ddpm adds in a step: beta tilde, beta, or as predicted; {own}",
    )
    add("--clip_skip", type=within(0), help="layers of the text encoder to leave out")
    add("--long_prompts", choices=get_args(LongPrompts), help="cut at 77 tokens, or encode all")
    add("--literal_prompts", dest="prompt_weights", action="store_false",
        help="read (word:1.3) and [word] as text")  # fmt: skip

    add = parser.add_argument_group("what to draw with").add_argument
    add("--model", "--ckpt", default="flowers", help="bundled, a folder, a single file, or a name"
        " on the hub")  # fmt: skip
    add("--config", type=Path, help="the YAML that belongs to a single file")
    add("--prediction_type", choices=get_args(Prediction), help="of a single file that is silent")
    add("--variant", help="such as fp16: which weight files of a folder")
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="may be repeated")
    add("--textual_inversion", action="append", default=[], metavar="FILE", help="may be repeated")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="computed in; auto: bf16 on a"
        " CPU that is faster at it than at fp32, else fp32")  # fmt: skip
    add("--engine", choices=get_args(EngineName), default="fast", help="what computes: the plain"
        " modules, the same prepared for the device, or compiled for it")  # fmt: skip
    add("--precision", dest="dtype", action=_Precision, choices=["full", "autocast"],
        help="CompVis's word: fp32, or fp16 (on a CPU bf16)")  # fmt: skip
    add("--device", help="cuda if there is one, else cpu")
    add("--vae_tiling", action="store_true", help="encode and decode in bands, in less memory")
    add("--cpu_offload", action="store_true", help="keep on the GPU only what is at work")

    add = parser.add_argument_group("where to").add_argument
    add("--outdir", type=Path, default=Path(outdir), help=f"{outdir} if not given")
    add("--format", choices=["png", "jpg", "webp"], default="png", help="of the pictures")
    add("--skip_save", action="store_true", help="write only the grid")
    add("--skip_grid", action="store_true", help="write no grid")
    add("--n_rows", type=within(1), help="pictures a row of the grid")
    add("--no_metadata", action="store_true", help="do not say in the files how they were made")


class _Precision(Action):
    def __call__(self, parser: Any, namespace: Namespace, values: Any, option: Any = None) -> None:
        namespace.dtype = "fp32" if values == "full" else "half"


def read_options(parser: Parser, arguments: Sequence[str]) -> Namespace:
    """The options, those of `--settings_from` being the defaults; everything in them checked.

    Raises:
        ConfigError: an option that cannot be used.
        DataError: a picture that cannot be read.
    """
    options = parser.parse_args(arguments)
    if options.settings_from:
        made = read_settings(options.settings_from)
        values = {"negative_prompt": made.negative_prompt, **made.settings}
        values |= {} if made.seed is None else {"seed": made.seed}
        parser.set_defaults(**{k: v for k, v in values.items() if k in vars(options)})
        options = parser.parse_args(arguments)
        if not (options.prompts or options.prompt or options.from_file):
            options.prompts = [made.prompt]
        odd = [f"{k}: {v}" for k, v in values.items() if k not in vars(options)]
        if odd := odd + made.not_understood:
            print(f"not used of {options.settings_from}: {'; '.join(odd)}")
    for name in ("guidance_interval", "dynamic_threshold"):
        try:
            if pair := getattr(options, name):
                READERS[name](json.dumps(pair))
        except ArgumentTypeError as error:
            raise ConfigError(f"{name} is {error}") from None
    if options.timesteps and options.sigmas:
        raise ConfigError("give --timesteps or --sigmas, one of the two")
    for file in input_files(options):
        if not Path(file).exists():
            raise ConfigError(f"no file {file}; give one that is there")
    if process()[1] > 1:
        _check_shared(options)
    if options.seed == -1:
        options.seed = secrets.randbelow(2**31)
    if options.variation_strength and options.variation_seed is None:
        options.variation_seed = secrets.randbelow(2**31)
    if options.variation_seed is not None and not options.variation_strength:
        raise ConfigError("variation_seed needs --variation_strength, from 0 to 1; give both")
    return options


def process() -> tuple[int, int]:
    """The rank of this process and their number, as `accelerate launch` and torchrun tell it.

    Raises:
        ConfigError: they have told something else.
    """
    told = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if not all(word.isdecimal() for word in told) or not 0 <= int(told[0]) < int(told[1]):
        raise ConfigError(f"RANK {told[0]} of WORLD_SIZE {told[1]} is no process; unset them")
    return int(told[0]), int(told[1])


def _check_shared(options: Namespace) -> None:
    """Refuse what processes that do not speak to each other cannot share."""
    strength, variation = options.variation_strength, options.variation_seed
    if options.seed == -1 or (strength and variation is None):
        raise ConfigError("several processes would each choose a random seed; give it")
    for name in ("no_metadata", "skip_save", "step_strip", "denoising_strip"):
        if getattr(options, name, None):
            raise ConfigError(f"several processes cannot share {name}; leave it out, or start one")


def plan(options: Namespace) -> list[Picture]:
    """Every picture that the options and their prompt file ask for, in the order of the prompts.

    Raises:
        ConfigError: there is no prompt, a line cannot be read, or a size does not fit the model.
    """
    lines = [(prompt, {}, "") for prompt in options.prompts + options.prompt]
    if options.from_file:
        lines += read_prompts(options.from_file)
    if not lines:
        raise ConfigError('nothing to draw; say what, such as: txt2img.py "a red flower"')
    model = locate_model(options.model, variant=options.variant)
    if model.is_dir() and (options.config or options.prediction_type):
        raise ConfigError(f"{model} is a folder; config and prediction_type are for single files")
    factor = downsample_factor(model)
    if _paints_in(model) and not hasattr(options, "outpaint"):
        raise ConfigError(f"{options.model} is an inpainting model; use inpaint.py, or another one")
    one_seed = options.fixed_code or options.variation_strength
    shared = {name: getattr(options, name, None) for name in SETTINGS}
    pictures = []
    for prompt, own, where in lines:
        settings = {k: v for k, v in (shared | own).items() if v is not None and k in SETTINGS}
        negative = own.get("negative_prompt", options.negative_prompt)
        try:
            check_size(settings.get("height", factor), settings.get("width", factor), factor)
            for text in (prompt, negative):
                _check_prompt(text, settings)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from None
        for i in range(options.num_images_per_prompt * options.n_iter):
            step = 0 if one_seed else i if "seed" in own else len(pictures)
            variation = options.variation_seed
            pictures.append(
                Picture(
                    prompt,
                    negative,
                    own.get("seed", options.seed) + step,
                    None if variation is None else variation + len(pictures),
                    settings,
                    where,
                )
            )
    return pictures


def _paints_in(model: Path) -> bool:
    """Whether a folder's U-Net is shown a picture and a mask beside the noise."""
    file = model / "unet" / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return config["in_channels"] > config["out_channels"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # a single file; and opening a damaged folder says what is wrong with it


def _check_prompt(text: str, settings: dict[str, Any]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"prompt {text!a} is not UTF-8 text; write it as such") from None
    sections = parse_weights(text) if settings["prompt_weights"] else []
    if sum(map(bool, sections)) > 1 and settings.get("long_prompts") != "chunk":
        raise ConfigError("prompt: BREAK needs --long_prompts chunk; give it, or leave out BREAK")


def read_prompts(file: Path) -> list[tuple[str, dict[str, Any], str]]:
    """The prompts of a file: one a line, `#` for comments, kohya's options at a line's end.

    Returns:
        of each line the prompt, its options by our names, and "FILE, line N: " for messages.

    Raises:
        ConfigError: the file is missing, is no text, or has an option that does not exist.
    """
    if not file.is_file():
        raise ConfigError(f"no file {file}; --from-file wants a prompt a line")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text; save it as such") from None
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{file}, line {number}: "
        prompt, *parts = re.split(r"(?:^|\s)--(?=\w)", line)
        options = {}
        for part in parts:
            key, _, value = part.strip().partition(" ")
            if key not in LINE_OPTIONS:
                raise ConfigError(f"{where}no option --{key}; {suggest(key, LINE_OPTIONS)}")
            name = LINE_OPTIONS[key]
            try:
                options[name] = READERS.get(name, str)(value.strip())
            except ArgumentTypeError as error:
                raise ConfigError(f"{where}--{key}: {error}") from None
        lines.append((prompt.strip(), options, where))
    return lines


def input_files(options: Namespace) -> list[str]:
    """The files beside the model that a picture is drawn with: adapters and pictures."""
    files = [split_weight(lora)[0] for lora in options.lora] + options.textual_inversion
    pictures = (getattr(options, name, None) for name in ("image", "mask_image"))
    return files + [str(file) for file in pictures if file]


def split_weight(lora: str) -> tuple[str, float]:
    """FILE[:WEIGHT] to the file and its weight, 1 where there is none."""
    file, _, weight = lora.rpartition(":")
    try:
        return (file, float(weight)) if file else (lora, 1.0)
    except ValueError:
        return lora, 1.0
