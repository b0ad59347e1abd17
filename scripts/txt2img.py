"""Draw pictures from prompts: `python scripts/txt2img.py "a red flower"`."""

from __future__ import annotations

import secrets
from argparse import ArgumentDefaultsHelpFormatter, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import _ours  # noqa: F401

from ldm.checkpoint.locate import downsample_factor, locate_model
from ldm.cli import Parser, run
from ldm.config import SamplerName, Spacing, check_size
from ldm.errors import ConfigError


def parse(arguments: Sequence[str]) -> Namespace:
    parser = Parser(
        "txt2img.py", description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw")
    add("--prompt", action="append", default=[], help="the same")
    add("--from-file", "--from_file", type=Path, help="a file with a prompt a line")
    add("--model", default="flowers", help="a bundled model, a model folder, or a hub name")
    add("--negative_prompt", default="", help="what guidance leads away from")
    own = "the model's own if not given"
    add("--num_inference_steps", "--steps", "--ddim_steps", type=int, help=own)
    add("--guidance_scale", "--scale", "--cfg_scale", type=float, help=own)
    add("--height", "--H", type=int, help=f"in pixels; {own}")
    add("--width", "--W", type=int, help=f"in pixels; {own}")
    add("--num_images_per_prompt", "--n_samples", type=int, default=1, help="pictures a prompt")
    add("--batch_size", type=int, help="pictures at a time; never changes a picture")
    add("--seed", type=int, default=42, help="of the first picture, then one more each; -1: random")
    add("--sampler", default="ddim", choices=get_args(SamplerName))
    add("--timestep_spacing", choices=get_args(Spacing), help=own)
    add("--eta", "--ddim_eta", type=float, default=0.0, help="of DDIM")
    add("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="computed in")
    add("--device", help="cuda if there is one, else cpu")
    add("--outdir", type=Path, default=Path("outputs/txt2img-samples"))
    add("--skip_grid", action="store_true", help="write no grid")
    return parser.parse_args(arguments)


def next_number(folder: Path, prefix: str) -> int:
    """One more than the highest number of the pictures `<prefix><number>.png` of a folder."""
    numbers = (path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.png"))
    return max((int(n) for n in numbers if n.isdecimal()), default=-1) + 1


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    prompts = options.prompts + options.prompt
    if options.from_file:
        if not options.from_file.is_file():
            raise ConfigError(f"no file {options.from_file}; --from-file wants a prompt a line")
        try:
            lines = options.from_file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ConfigError(f"{options.from_file} is not UTF-8 text; save it as such") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError('nothing to draw; say what, such as: txt2img.py "a red flower"')
    model = locate_model(options.model)
    factor = downsample_factor(model)
    height, width = (factor if n is None else n for n in (options.height, options.width))
    check_size(height, width, factor)
    seed = secrets.randbelow(2**31) if options.seed == -1 else options.seed
    samples = options.outdir / "samples"
    try:
        samples.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write to {samples} ({error.strerror}); choose --outdir"
        ) from None

    import torch

    from ldm.images import image_grid, parameters_text, save_png
    from ldm.pipeline import LatentDiffusionPipeline

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    pipeline = LatentDiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    pipeline.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    result = pipeline(
        prompts,
        negative_prompt=options.negative_prompt,
        height=options.height,
        width=options.width,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        num_images_per_prompt=options.num_images_per_prompt,
        seed=seed,
        sampler=options.sampler,
        timestep_spacing=options.timestep_spacing,
        eta=options.eta,
        batch_size=options.batch_size,
    )
    first = next_number(samples, "")
    for i, image in enumerate(result.images):
        file = samples / f"{first + i:05}.png"
        prompt = prompts[i // options.num_images_per_prompt]
        made = parameters_text(prompt, options.negative_prompt, result.seeds[i], result.settings)
        save_png(image, file, made)
        print(f"{file}  seed {result.seeds[i]}  {prompt}")
    if len(result.images) > 1 and not options.skip_grid:
        grid = options.outdir / f"grid-{next_number(options.outdir, 'grid-'):04}.png"
        image_grid(result.images).save(grid)
        print(grid)


if __name__ == "__main__":
    run(main)
