"""Whether a picture can be made again: what its record says, against what is here now."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldm.drawing import INPUTS, call_inputs, draw, open_model, prepare, record_of
from ldm.errors import ConfigError, DataError
from ldm.images import read_image
from ldm.metadata import file_hash, read_record, read_settings
from ldm.options import DTYPES, Picture, input_files, split_weight

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline

_INPUT_TYPES = dict.fromkeys(INPUTS, str) | dict.fromkeys(("vae_tiling", "cpu_offload"), bool)
_INPUT_TYPES |= dict.fromkeys(("lora", "textual_inversion", "outpaint"), list)
TOLERANCE = 2  # levels of 255: what another processor or version may round otherwise


def verify(file: Path, moved: Mapping[str, str | None] | None = None) -> tuple[bool, str]:
    """Make a picture again from its record.

    Args:
        file: a PNG that ldm has written.
        moved: options of the drawing scripts that are others now: where files have moved to (the
            weight of a LoRA is that of the record), and `device`.

    Returns:
        Whether it is the same, to `TOLERANCE` levels; and one line that says so, or what differs.

    Raises:
        ConfigError: the picture has no record, or `moved` names what it was drawn without.
        LdmError: the picture or the model cannot be read.
    """
    record = read_record(file)
    if record is None:
        raise ConfigError(f"{file} has no record of how ldm made it; there is nothing to verify")
    if odd := _odd(record) + read_settings(file).not_understood:
        raise DataError(f"{file}: its record is damaged ({'; '.join(odd)}); draw it again")
    options = _options(record, {name: value for name, value in (moved or {}).items() if value})
    changed = _changed_files(record, options)
    if not changed:
        pipeline = open_model(options)
        now = record_of(pipeline, options)
        changed = _changed_model(record, now)
    if changed:
        return False, f"differs: {file}: {'; '.join(changed)}"
    prepare(pipeline, options).set_progress_bar_config(disable=True)
    levels = _difference(read_image(file), _redraw(record, options, pipeline))
    if levels == 0:
        return True, f"identical: {file}"
    machine = _changed_machine(record, now) or ["every recorded input is the same"]
    verdict = "within tolerance" if levels <= TOLERANCE else "differs"
    return levels <= TOLERANCE, f"{verdict}: {file}: {levels} of 255 levels; {'; '.join(machine)}"


def _odd(record: Mapping[str, Any]) -> list[str]:
    """What no drawing script would have written."""
    odd = []
    match record["batch"]:
        case [int(index), int(size)] if 0 <= index < size:
            pass
        case other:
            odd.append(f"batch: {other}")
    for name, value in record["inputs"].items():
        kind = int if name == "outpaint" else str
        items = value if isinstance(value, list) else []
        fits = isinstance(value, _INPUT_TYPES.get(name, ()))
        if not fits or not all(isinstance(item, kind) for item in items):
            odd.append(f"{name}: {value}")
    odd += [] if record["dtype"] in DTYPES else [f"dtype: {record['dtype']}"]
    for entry in record["files"]:
        if not isinstance(entry, dict) or "sha256" not in entry:
            odd.append(f"files: {entry}")
    return odd


def _options(record: Mapping[str, Any], moved: Mapping[str, Any]) -> Namespace:
    """The options of a drawing script that open what a picture was drawn with."""
    none = dict.fromkeys(INPUTS) | {"lora": [], "textual_inversion": [], "engine": "plain"}
    inputs = none | record["inputs"]
    for name, value in moved.items():
        then = inputs.get(name, value)
        if not then or (isinstance(value, list) and len(value) != len(then)):
            raise ConfigError(f"it was drawn with {then or 'no'} {name}; give as many, or none")
    weights = [split_weight(lora)[1] for lora in inputs["lora"]]
    inputs |= moved
    files = [split_weight(lora)[0] for lora in inputs["lora"]]
    inputs["lora"] = [f"{file}:{weight}" for file, weight in zip(files, weights, strict=True)]
    device = "cpu" if record["device"] == "cpu" else None  # a GPU of another name will do
    return Namespace(**{"dtype": record["dtype"], "device": device} | inputs)


def _changed_files(record: Mapping[str, Any], options: Namespace) -> list[str]:
    """Which adapters and pictures are missing, or are others than in the record."""
    changed = []
    if len(record["files"]) != len(files := input_files(options)):
        return [f"the record has {len(record['files'])} files, and {len(files)} are named"]
    for then, now in zip(record["files"], files, strict=True):
        if not Path(now).exists():
            changed.append(f"{now} is missing")
        elif file_hash(now) != then["sha256"]:
            changed.append(f"{now} is another file now")
    return changed


def _changed_model(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which parts of the model are others than in the record, by name."""
    then, here = (made["components"] | made["configurations"] for made in (record, now))
    return [
        f"another {name} ({str(then.get(name))[:10]} then, {digest[:10]} now)"
        for name, digest in here.items()
        if then.get(name) != digest
    ]


def _changed_machine(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which versions and processor are others than in the record."""
    then, here = (made["versions"] | {"processor": made["processor"]} for made in (record, now))
    return [f"{k} {then.get(k)} then, {here[k]} now" for k in here if then.get(k) != here[k]]


def _redraw(
    record: Mapping[str, Any], options: Namespace, pipeline: LatentDiffusionPipeline
) -> Image.Image:
    """The picture again, at its place in a batch of as many as it was drawn in.

    A library may add up a batch of another size in another order.
    """
    index, size = record["batch"]
    settings = dict(record["settings"])
    variation = settings.pop("variation_seed", None)
    what = (record["prompt"], record["negative_prompt"], record["seed"], variation, settings)
    batch = [Picture(*what)] * size
    return draw(pipeline, batch, call_inputs(pipeline, options)).images[index]


def _difference(image: Image.Image, other: Image.Image) -> int:
    """The largest difference of any channel of any pixel, in levels; 255 for another size."""
    if image.size != other.size:
        return 255
    a, b = (np.asarray(one).astype(int) for one in (image, other))
    return int(np.abs(a - b).max())
