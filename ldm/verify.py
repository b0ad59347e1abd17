"""Whether a picture can be made again: what its record says, against what is here now."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldm.drawing import INPUTS, call_inputs, draw, open_model, prepare, record_of
from ldm.errors import ConfigError
from ldm.images import read_image
from ldm.metadata import file_hash, read_record
from ldm.options import Picture, input_files

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline

TOLERANCE = 2  # levels of 255: what another processor or version may round otherwise


def verify(file: Path, moved: Mapping[str, str | None] | None = None) -> tuple[bool, str]:
    """Make a picture again from its record.

    Args:
        file: a PNG that ldm has written.
        moved: options of the drawing scripts that are others now: `model`, `image`, `mask_image`
            where they have moved, `device`.

    Returns:
        Whether it is the same, to `TOLERANCE` levels; and one line that says so, or what differs.

    Raises:
        ConfigError: the picture has no record.
        LdmError: the picture or the model cannot be read.
    """
    record = read_record(file)
    if record is None:
        raise ConfigError(f"{file} has no record of how ldm made it; there is nothing to verify")
    options = _options(record)
    vars(options).update({name: value for name, value in (moved or {}).items() if value})
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


def _options(record: Mapping[str, Any]) -> Namespace:
    """The options of a drawing script that open what a picture was drawn with."""
    none = dict.fromkeys(INPUTS) | {"lora": [], "textual_inversion": []}
    device = "cpu" if record["device"] == "cpu" else None  # a GPU of another name will do
    return Namespace(**none | record["inputs"] | {"dtype": record["dtype"], "device": device})


def _changed_files(record: Mapping[str, Any], options: Namespace) -> list[str]:
    """Which adapters and pictures are missing, or are others than in the record."""
    changed = []
    for then, now in zip(record["files"], input_files(options), strict=True):
        if not Path(now).exists():
            changed.append(f"{now} is missing")
        elif file_hash(now) != then["sha256"]:
            changed.append(f"{now} is another file now")
    return changed


def _changed_model(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which parts of the model are others than in the record, by name."""
    then, here = (made["components"] | {"schedule": made["schedule"]} for made in (record, now))
    return [
        f"another {name} ({then[name][:10]} then, {here[name][:10]} now)"
        for name in then
        if then[name] != here[name]
    ]


def _changed_machine(record: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Which versions and processor are others than in the record."""
    then, here = (made["versions"] | {"processor": made["processor"]} for made in (record, now))
    return [f"{k} {then[k]} then, {here[k]} now" for k in then if then[k] != here[k]]


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
