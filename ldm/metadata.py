"""What a picture's file says of how it was made: A1111's `parameters`, and a record of our own.

AUTOMATIC1111's web UI keeps settings as text that every viewer shows and every site reads:

    a red flower
    Negative prompt: grey
    Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512

Ours is JSON in a chunk called `ldm`; it holds all that `scripts/verify.py` needs. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Mapping
from errno import EEXIST
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm import __version__
from ldm.errors import DataError
from ldm.settings import READERS

logger = logging.getLogger(__name__)

RECORD = "ldm"  # the key of our own chunk
SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "plms": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2s_a": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
}
"""Our samplers' names in the web UI. One that it does not have keeps its own."""
SPACINGS = {
    "leading": "DDIM",
    "trailing": "SGM Uniform",
    "linspace": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
}
"""Our timestep spacings as the web UI's schedule types."""
AUTOMATIC = {
    "ddim": "leading",
    "plms": "leading",
    "dpm2": "karras",
    "dpmpp_2m": "karras",
    "dpmpp_2m_sde": "exponential",
    "dpmpp_2s_a": "karras",
    "dpmpp_sde": "karras",
}
"""What the schedule type `Automatic` means there, where it is not `Uniform`."""
_KEYS = {
    "Steps": "num_inference_steps",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation_strength",
    "Denoising strength": "strength",
    "Eta DDIM": "eta",
    "Eta": "eta",
}
# Settings of ours that the web UI has not; their keys are our names with a capital.
_OURS = ("guidance_rescale", "guidance_interval", "dynamic_threshold", "long_prompts", "variance")
_OURS += ("timesteps", "sigmas", "class_labels")
_KEYS |= {name.capitalize().replace("_", " "): name for name in _OURS}
# They change no pixel, or belong to what the user chooses here: the model and its adapters.
_SILENT = {"Model", "Model hash", "VAE", "VAE hash", "Version", "User", "Batch size", "Batch pos"}
_SILENT |= {"Init image hash", "Lora hashes", "TI hashes", "Clip skip", "Sampler", "Schedule type"}
_SILENT |= {"Size", "RNG", "Emphasis"}
# What every record has.
_RECORD_TYPES = {"prompt": str, "negative_prompt": str, "seed": int, "settings": dict}
_RECORD_TYPES |= {"batch": list, "inputs": dict, "files": list, "components": dict}
_RECORD_TYPES |= {"configurations": dict, "versions": dict, "device": str, "processor": str}
_RECORD_TYPES |= {"dtype": str}
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]+>")
_EXIF, _USER_COMMENT, _UNIQUE_ID = 0x8769, 0x9286, 0xA420
_JPEG_LIMIT = 65533  # bytes of a segment, its length apart


class HowMade(NamedTuple):
    """How a picture was made, as far as its file says.

    Attributes:
        prompt: what was drawn.
        negative_prompt: what was not.
        seed: the picture's own; None where the file does not say.
        settings: further arguments of the pipeline's call.
        not_understood: what else it says that changes the picture and that ldm cannot follow.
    """

    prompt: str
    negative_prompt: str
    seed: int | None
    settings: dict[str, Any]
    not_understood: list[str]


def parameters_text(
    prompt: str,
    negative_prompt: str,
    seed: int,
    settings: Mapping[str, Any],
    *,
    model: str = "",
    model_hash: str = "",
) -> str:
    """How a picture was made, in the web UI's words and grammar; `parse_parameters` reads it.

    Args:
        prompt: what was drawn.
        negative_prompt: what was not.
        seed: the picture's own.
        settings: of `PipelineOutput`.
        model: its name.
        model_hash: SHA-256 of the U-Net; ten digits are shown.
    """
    rest = dict(settings)
    shown: dict[str, Any] = {"Steps": rest.pop("num_inference_steps", None)}
    sampler, spacing = rest.pop("sampler", None), rest.pop("timestep_spacing", None)
    shown["Sampler"] = SAMPLERS.get(sampler, sampler)
    shown["Schedule type"] = SPACINGS.get(spacing, spacing)
    shown["CFG scale"] = rest.pop("guidance_scale", None)
    shown["Seed"] = seed
    if "width" in rest and "height" in rest:
        shown["Size"] = f"{rest.pop('width')}x{rest.pop('height')}"
    shown |= {"Model hash": model_hash[:10] or None, "Model": model or None}
    if "eta" in rest:
        shown["Eta DDIM" if sampler == "ddim" else "Eta"] = rest.pop("eta")
    if (skip := rest.pop("clip_skip", None)) is not None:
        shown["Clip skip"] = skip + 1  # there, 1 is the last layer; in diffusers, 0
    if not rest.pop("prompt_weights", True):
        shown["Emphasis"] = "None"
    names = {name: key for key, name in _KEYS.items()}
    shown |= {names[name]: value for name, value in rest.items()}
    shown |= {"RNG": "CPU", "Version": f"ldm {__version__}"}
    pairs = ", ".join(
        f"{key}: {_quoted(value)}" for key, value in shown.items() if value is not None
    )
    negative = f"\nNegative prompt: {negative_prompt}" if negative_prompt else ""
    return f"{prompt}{negative}\n{pairs}".strip()


def parse_parameters(text: str) -> HowMade:
    """Read `parameters` as ldm and every version of the web UI write them.

    Args:
        text: of the chunk.

    Returns:
        the settings; a value that cannot be read is under `not_understood`, never an error.
    """
    *lines, last = text.strip().split("\n")
    if len(_PAIR.findall(last)) < 3:  # the web UI's own rule for text without settings
        lines, last = [*lines, last], ""
    start = next((i for i, s in enumerate(lines) if s.startswith("Negative prompt:")), len(lines))
    prompt, negative = "\n".join(lines[:start]), "\n".join(lines[start:])
    negative = negative.removeprefix("Negative prompt:")
    found = {key: _unquoted(value) for key, value in _PAIR.findall(last)}
    texts: dict[str, str] = {}
    odd: list[str] = []
    own = found.get("Version", "").startswith("ldm ")
    if not own and last:
        texts["long_prompts"] = "chunk"  # as the web UI always does
        if found.get("RNG") != "CPU":
            odd.append(f"RNG: {found.get('RNG', 'GPU')} (the same seed draws other noise here)")
        odd += _NETWORK.findall(prompt)
        prompt = _NETWORK.sub("", prompt)
    _take_sampler(found, texts, odd, own)
    texts |= {name: found[key] for key, name in _KEYS.items() if key in found}
    if skip := found.get("Clip skip"):
        texts["clip_skip"] = str(int(skip[:9]) - 1) if skip.isdecimal() else skip
    if size := re.fullmatch(r"(\d+)x(\d+)", found.get("Size", "")):
        texts |= {"width": size[1], "height": size[2]}
    if (emphasis := found.get("Emphasis", "Original")) == "None":
        texts["prompt_weights"] = "false"
    elif emphasis != "Original":
        odd.append(f"Emphasis: {emphasis}")
    settings = _read(texts, odd)
    odd += [f"{k}: {v}" for k, v in found.items() if k not in _SILENT | _KEYS.keys()]
    return HowMade(prompt.strip(), negative.strip(), settings.pop("seed", None), settings, odd)


def _read(texts: Mapping[str, str], odd: list[str]) -> dict[str, Any]:
    """The settings that can be used; to `odd` go the others, by the web UI's names."""
    settings: dict[str, Any] = {}
    shown = {name: key for key, name in _KEYS.items()}
    for name, text in texts.items():
        try:
            settings[name] = READERS[name](text)
        except (ArgumentTypeError, KeyError):
            odd.append(f"{shown.get(name, name)}: {text}")
    unused = [] if settings.get("variation_strength") else ["variation_seed"]
    unused += [] if settings.get("sampler", "ddim") == "ddim" else ["eta"]
    unused += ["timesteps"] if "sigmas" in settings else []
    for name in unused:
        if name in settings:
            odd.append(f"{shown[name]}: {settings.pop(name)}")
    return settings


def _take_sampler(
    found: Mapping[str, str], settings: dict[str, str], odd: list[str], own: bool
) -> None:
    """The sampler and its spacing, which before version 1.9 was a part of the sampler's name."""
    samplers = _by_any_name(SAMPLERS)
    spacings = _by_any_name(SPACINGS) | {"simple": "trailing", "normal": "linspace"}
    shown, kind = found.get("Sampler", ""), found.get("Schedule type", "").lower()
    name, spacing = shown.lower(), spacings.get(kind)
    for end in ("karras", "exponential"):
        if name.endswith(f" {end}"):
            name, spacing = name.removesuffix(f" {end}"), spacing or end
    sampler = samplers.get(name)
    if sampler:
        settings["sampler"] = sampler
        if not spacing and not own:
            usual = AUTOMATIC if kind else {"ddim": "leading", "plms": "leading"}
            spacing = usual.get(sampler, "linspace")
    elif shown:
        odd.append(f"Sampler: {shown}")
    if spacing:
        settings["timestep_spacing"] = spacing
    if kind not in ("", "automatic", *spacings):
        odd.append(f"Schedule type: {found['Schedule type']}")


def save_picture(
    image: Image.Image,
    file: Path,
    parameters: str | None = None,
    record: Mapping[str, Any] | None = None,
    *,
    new: bool = False,
    **animation: Any,
) -> None:
    """Write a picture, and in it how it was made.

    A PNG keeps both as iTXt, which is UTF-8, so that prompts in any script survive; JPEG and WebP
    keep `parameters` as the EXIF user comment, where the web UI looks for it.

    Args:
        image: 8-bit RGB.
        file: its ending says the format: .png, .jpg or .webp.
        parameters: of `parameters_text`.
        record: JSON of our own; only a PNG holds all of it, the others its `identity`.
        new: fail where the file is there already, instead of replacing it.
        animation: further options of Pillow's for several pictures in one WebP.

    Raises:
        DataError: it cannot be written; nothing is left of it.
    """
    options: dict[str, Any] = {"quality": 95, **animation}
    if file.suffix == ".png":
        options = {"pnginfo": (info := PngInfo())}
        if parameters:
            info.add_itxt("parameters", parameters)
        if record:
            info.add_itxt(RECORD, json.dumps(record, ensure_ascii=False))
    elif parameters:
        exif = Image.Exif()
        tags = exif.get_ifd(_EXIF)
        tags[_USER_COMMENT] = b"UNICODE\0" + parameters.encode("utf-16-be")
        if record and "identity" in record:
            tags[_UNIQUE_ID] = record["identity"]
        if file.suffix == ".jpg" and len(exif.tobytes()) > _JPEG_LIMIT:
            logger.warning("%s does not say how it was made: too long for a JPEG", file)
            del tags[_USER_COMMENT]
        options["exif"] = exif
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        image.save(temporary, **options)
        _link(temporary, file) if new else temporary.replace(file)
    except OSError as error:
        reason = f"cannot write {file} ({error.strerror or error})"
        raise DataError(f"{reason}; make room, or write elsewhere") from None
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, file: Path) -> None:
    """Give a file a name that nobody has taken."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if file.exists():
            raise FileExistsError(EEXIST, os.strerror(EEXIST)) from None
        temporary.replace(file)


def read_identity(file: Path) -> str | None:
    """The `identity` of the record that a picture was saved with; None for any other file."""
    try:
        with Image.open(file) as image:  # reads no pixels: our chunk stands before them
            if text := image.info.get(RECORD):
                return json.loads(text).get("identity")
            return image.getexif().get_ifd(_EXIF).get(_UNIQUE_ID)
    except (OSError, SyntaxError, ValueError, AttributeError, Image.DecompressionBombError):
        return None


def read_parameters(file: Path) -> str | None:
    """The `parameters` of a PNG, JPEG or WebP; None where it has none.

    Raises:
        DataError: there is no such picture.
    """
    with _opened(file) as image:
        if text := image.info.get("parameters"):
            return str(text)
        comment = image.getexif().get_ifd(_EXIF).get(_USER_COMMENT)
    if not isinstance(comment, bytes):
        return comment
    code, text = comment[:8], comment[8:]
    if code != b"UNICODE\0":
        return text.decode("utf-8", errors="replace").strip("\0 ") or None
    # EXIF leaves the byte order open; Latin letters, digits and commas have a zero byte first
    order = "be" if text[::2].count(0) >= text[1::2].count(0) else "le"
    return text.decode(f"utf-16-{order}", errors="replace")


def read_record(file: Path) -> dict[str, Any] | None:
    """Our own record of a picture; None where it has none.

    Raises:
        DataError: there is no such picture, or its record is damaged.
    """
    with _opened(file) as image:
        text = image.info.get(RECORD)
    if text is None:
        return None
    try:
        record = json.loads(text)
        if all(isinstance(record[name], kind) for name, kind in _RECORD_TYPES.items()):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{file}: its record of how it was made is damaged; draw it again")


def read_settings(file: Path) -> HowMade:
    """How a picture was made, from our own record or else from `parameters`.

    Raises:
        DataError: there is no such picture, or it says nothing.
    """
    if record := read_record(file):
        texts = {"seed": record["seed"]} | record["settings"]
        odd: list[str] = []
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in texts.items()}
        settings = _read(texts, odd)
        seed = settings.pop("seed", None)
        return HowMade(record["prompt"], record["negative_prompt"], seed, settings, odd)
    if text := read_parameters(file):
        return parse_parameters(text)
    raise DataError(f"{file} does not say how it was made; give a picture that has `parameters`")


def file_hash(file: str | Path) -> str:
    """SHA-256 of a file's bytes; of a folder's files, one after the other."""
    folder = Path(file)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return sha256(b"".join(path.read_bytes() for path in files or [folder])).hexdigest()


def json_sha256(content: Any) -> str:
    """SHA-256 of what JSON can hold, whatever the order of its keys."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _opened(file: Path) -> Image.Image:
    try:
        image = Image.open(file)
        image.load()  # chunks may stand behind the pixels
        return image
    except FileNotFoundError:
        raise DataError(f"no file {file}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as a picture ({error})") from None


def _by_any_name(names: Mapping[str, str]) -> dict[str, str]:
    """Our name by the web UI's and by ours, in small letters."""
    return {key.lower(): ours for ours, theirs in names.items() for key in (theirs, ours)}


def _quoted(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value if isinstance(value, str) else json.dumps(value)
    return json.dumps(text, ensure_ascii=False) if re.search("[,\n:]", text) else text


def _unquoted(text: str) -> str:
    try:
        return json.loads(text) if text.startswith('"') else text
    except ValueError:
        return text
