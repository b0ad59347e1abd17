"""From options to files: open the model, draw, and write pictures that say how they were made.

Imports no torch until a model is opened.
"""

from __future__ import annotations

import os
import platform
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ldm import __version__
from ldm.checkpoint.locate import locate_model
from ldm.errors import ConfigError
from ldm.images import image_grid, read_image
from ldm.metadata import file_hash, json_sha256, parameters_text, save_picture
from ldm.options import DTYPES, Picture, input_files, plan, process, split_weight
from ldm.outputs import first_number, make_folder, new_file, remove_unfinished

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline, PipelineOutput

# What a picture depends on beside the arguments of the call.
INPUTS = ("model", "config", "variant", "prediction_type", "lora", "textual_inversion")
INPUTS += ("vae_tiling", "cpu_offload", "engine", "image", "mask_image", "outpaint")


def read_inputs(options: Namespace) -> dict[str, Image.Image]:
    """The pictures that a task starts from: `image` and `mask_image` of the call.

    Raises:
        ConfigError: the mask has another size than the picture.
        DataError: one cannot be read.
    """
    names = [name for name in ("image", "mask_image") if getattr(options, name, None)]
    inputs = {name: read_image(getattr(options, name)) for name in names}
    if len({image.size for image in inputs.values()}) > 1:
        (w, h), (width, height) = inputs["mask_image"].size, inputs["image"].size
        raise ConfigError(f"mask_image is {w}x{h} and image {width}x{height}; make them equal")
    return inputs


def open_model(options: Namespace) -> LatentDiffusionPipeline:
    """The model as its files have it, on the CPU, in the dtype that the options ask for.

    Raises:
        LdmError: it cannot be read.
    """
    import torch

    from ldm.pipeline import LatentDiffusionPipeline

    find_device(options.device)
    dtype = _dtype(options)
    load: dict[str, Any] = {"torch_dtype": getattr(torch, DTYPES[dtype]), "engine": options.engine}
    if options.dtype == "auto":
        print(f"computing in {dtype}; --dtype decides otherwise", file=sys.stderr)
    model = locate_model(options.model, variant=options.variant)
    if model.is_file():
        load |= {"prediction_type": options.prediction_type, "config": options.config}
        return LatentDiffusionPipeline.from_single_file(model, **load)
    return LatentDiffusionPipeline.from_pretrained(model, **load, variant=options.variant)


def prepare(pipeline: LatentDiffusionPipeline, options: Namespace) -> LatentDiffusionPipeline:
    """Add the adapters, and move the model to where it draws; returns the pipeline.

    Raises:
        LdmError: an adapter cannot be read or does not fit, or there is no such device.
    """
    for file, weight in map(split_weight, options.lora):
        pipeline.load_lora_weights(file, weight, name=file)  # two may be called the same elsewhere
    for file in options.textual_inversion:
        pipeline.load_textual_inversion(file)
    if options.vae_tiling:
        pipeline.enable_vae_tiling()
    if options.cpu_offload:
        pipeline.enable_model_cpu_offload(find_device(options.device))
    else:
        pipeline.to(find_device(options.device))
    return pipeline


def record_of(pipeline: LatentDiffusionPipeline, options: Namespace) -> dict[str, Any]:
    """What pictures are drawn with: the part of their records that they share.

    Args:
        pipeline: of `open_model`, before adapters change it.
        options: of the script.
    """
    import tokenizers
    import torch

    inputs = {name: value for name in INPUTS if (value := getattr(options, name, None))}
    return {
        "inputs": {k: str(v) if isinstance(v, Path) else v for k, v in inputs.items()},
        "files": [{"file": f, "sha256": file_hash(f)} for f in input_files(options)],
        "components": pipeline.component_hashes(),
        "configurations": _configurations(pipeline),
        "versions": {
            "ldm": __version__,
            "torch": torch.__version__,
            "tokenizers": tokenizers.__version__,
            "python": platform.python_version(),
        },
        "device": find_device(options.device).partition(":")[0],  # whichever of several
        "processor": _processor(find_device(options.device)),
        "dtype": _dtype(options),
    }


def _configurations(pipeline: LatentDiffusionPipeline) -> dict[str, str]:
    """SHA-256 of what decides beside the tensors."""
    text = pipeline.text_encoder.settings()
    parts = {
        "schedule": asdict(pipeline.schedule.config),
        "unet configuration": asdict(pipeline.unet_config),
        "vae configuration": asdict(pipeline.vae_config),
        "tokenizer": text.pop("tokenizer"),
        "text_encoder configuration": text,
    }
    return {name: json_sha256(part) for name, part in parts.items()}


def call_inputs(pipeline: LatentDiffusionPipeline, options: Namespace) -> dict[str, Image.Image]:
    """What `read_inputs` gives, as the call takes it: padded for outpainting."""
    inputs = read_inputs(options)
    if not getattr(options, "outpaint", None):
        return inputs
    from ldm.tasks import outpainting

    margins = dict(zip(("left", "right", "top", "bottom"), options.outpaint, strict=True))
    factor = pipeline.vae_config.downsample_factor
    image, mask = outpainting(inputs["image"], **margins, factor=factor)
    return {"image": image, "mask_image": mask}


def draw(
    pipeline: LatentDiffusionPipeline, batch: Sequence[Picture], inputs: Mapping[str, Image.Image]
) -> PipelineOutput:
    """Draw pictures of the same settings, together.

    Args:
        pipeline: ready to draw.
        batch: of `plan`.
        inputs: of `call_inputs`.
    """
    arguments: dict[str, Any] = {**batch[0].settings, **inputs}
    if batch[0].variation_seed is not None:
        arguments["variation_seed"] = [picture.variation_seed for picture in batch]
    return pipeline(
        [picture.prompt for picture in batch],
        negative_prompt=[picture.negative_prompt for picture in batch],
        seed=[picture.seed for picture in batch],
        **arguments,
    )


def draw_pictures(options: Namespace) -> None:
    """Draw what the options ask for, write each batch as it is done, and say each file's seed.

    A file has the next free number. In a run from a prompt file, or of several processes, its
    number follows from the picture's place in the plan, and pictures that are there are left out.
    A batch of another size would round otherwise, so processes share the batches of one process,
    and one that lacks a picture is drawn again whole.

    Raises:
        LdmError: whatever is wrong with the options, before the model is opened.
    """
    (rank, world), ending = process(), f".{options.format}"
    pictures, samples = plan(options), make_folder(options.outdir / "samples")
    read_inputs(options)
    pipeline = open_model(options)
    record = None if options.no_metadata else record_of(pipeline, options)
    identities = [_identity(pipeline, p, record) for p in pictures] if record else []
    first, there = None, set[int]()
    if record and not options.skip_save and (options.from_file or world > 1):
        first, there = first_number(samples, ending, identities)
    if rank == 0 and (there or world > 1):
        note = "" if options.skip_grid else "; no grid, which wants one process that draws all"
        print(f"{len(there)} of {len(pictures)} pictures are there already{note}", flush=True)
    prepare(pipeline, options)
    if rank:  # one progress bar is enough
        pipeline.set_progress_bar_config(disable=True)
    inputs = call_inputs(pipeline, options)
    batches = list(_batches(pictures, options, pipeline, inputs))
    if rank == 0 and len(batches) < world:
        print(f"{len(batches)} batches for {world} processes; choose a smaller --batch_size")
    batches = batches[rank::world]
    if first is not None:
        remove_unfinished(samples, {first + place for batch in batches for place, _ in batch})
    drawn: list[Image.Image] = []
    for batch in batches:
        if there.issuperset(place for place, _ in batch):
            continue
        result = draw(pipeline, [picture for _, picture in batch], inputs)
        if not (options.skip_grid or there or world > 1):
            drawn += result.images
        for i, (place, picture) in enumerate(batch):
            if options.skip_save or place in there:
                continue
            own = None
            if record:
                own = _own_record(pipeline, picture, result, i) | record
                own["identity"] = identities[place]
            number = None if first is None else first + place
            file = _save(result.images[i], own, samples, number, ending)
            print(f"{file}  seed {picture.seed}  {picture.prompt}", flush=True)
    _save_grids(drawn, options)


def _save(
    image: Image.Image, record: dict[str, Any] | None, folder: Path, number: int | None, ending: str
) -> Path:
    """Write a picture with its record, by its number or, without one, the next that is free."""
    text = _parameters(record) if record else None
    known = None if number is None else folder / f"{number:05}{ending}"
    with nullcontext(known) if known else new_file(folder, "", 5, ending) as file:
        save_picture(image, file, text, record, new=known is not None)
    return file


def _save_grids(images: Sequence[Image.Image], options: Namespace) -> None:
    """Write a grid of the pictures of each size that has several."""
    for size in dict.fromkeys(image.size for image in images):
        alike = [image for image in images if image.size == size]
        if len(alike) > 1:
            with new_file(options.outdir, "grid-") as file:
                save_picture(image_grid(alike, options.n_rows), file)
            print(file)


def find_device(name: str | None) -> str:
    """The device of this name; cuda if there is one, else cpu, for None.

    Each of several processes on a machine has a GPU of its own, as far as there are enough.

    Raises:
        ConfigError: it is not there.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=name).cpu()  # fails on the meta device, which holds no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"no device '{name}' to draw on ({reason}); try --device cpu") from None
    return name


def at_a_time(
    options: Namespace,
    pipeline: LatentDiffusionPipeline,
    settings: Mapping[str, Any],
    image: Image.Image | None = None,
) -> int:
    """How many pictures to draw together: what the user says, or about a megapixel."""
    side = pipeline.unet_config.sample_size * pipeline.vae_config.downsample_factor
    width, height = (side, side) if image is None else image.size
    area = settings.get("width", width) * settings.get("height", height)
    return options.batch_size or max(1, min(64, 2**20 // area))


def _batches(
    pictures: Sequence[Picture],
    options: Namespace,
    pipeline: LatentDiffusionPipeline,
    inputs: Mapping[str, Image.Image],
) -> Iterator[list[tuple[int, Picture]]]:
    """Pictures in a row that have the same settings, a few at a time, with their places."""
    for settings, group in groupby(enumerate(pictures), lambda item: item[1].settings):
        row, size = list(group), at_a_time(options, pipeline, settings, inputs.get("image"))
        yield from (row[start : start + size] for start in range(0, len(row), size))


def _identity(
    pipeline: LatentDiffusionPipeline, picture: Picture, record: Mapping[str, Any]
) -> str:
    """What decides how a picture looks but for rounding, as 32 hexadecimal digits."""
    what = picture._replace(settings=pipeline.defaults | picture.settings, where="")
    shared = [record[k] for k in ("inputs", "files", "components", "configurations", "dtype")]
    return json_sha256([what, *shared])[:32]


def _own_record(
    pipeline: LatentDiffusionPipeline, picture: Picture, result: PipelineOutput, i: int
) -> dict[str, Any]:
    settings = result.settings_of(i)
    record = {
        "prompt": picture.prompt,
        "negative_prompt": picture.negative_prompt,
        "seed": settings.pop("seed"),
        "settings": settings,
        "batch": result.batches[i],
    }
    if settings.get("long_prompts") != "chunk":
        weights = settings.get("prompt_weights", True)
        dropped = pipeline.text_encoder.dropped(picture.prompt, prompt_weights=weights)
        record |= {"dropped": dropped} if dropped else {}
    return record


def _parameters(record: dict[str, Any]) -> str:
    what = (record[key] for key in ("prompt", "negative_prompt", "seed", "settings"))
    model, unet = Path(record["inputs"]["model"]).stem, record["components"]["unet"]
    return parameters_text(*what, model=model, model_hash=unet)


def _dtype(options: Namespace) -> str:
    from ldm.processor import half_pays

    cpu = find_device(options.device) == "cpu"
    match options.dtype:
        case "half":
            return "bf16" if cpu else "fp16"
        case "auto":
            return "bf16" if cpu and half_pays() else "fp32"
        case dtype:
            return dtype


def _processor(device: str) -> str:
    """What decides, beside the versions, in which order numbers are added."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()}, threads {torch.get_num_threads()}"
