"""Draw pictures from prompts: `python scripts/txt2img.py "a red flower"`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import _ours  # noqa: F401

from ldm.cli import Parser, run
from ldm.drawing import draw_pictures, open_model, prepare
from ldm.errors import ConfigError
from ldm.metadata import save_picture
from ldm.options import add_options, plan, read_options
from ldm.outputs import make_folder, new_file
from ldm.settings import numbers, within


def main(arguments: Sequence[str]) -> None:
    parser = Parser("txt2img.py", description=__doc__)
    add_options(parser, "outputs/txt2img-samples")
    add = parser.add_argument_group("instead of pictures").add_argument
    add("--step_strip", type=numbers(within(1)), metavar="1,2,5,20",
        help="a prompt's picture after so many steps each, from one noise, in a row")  # fmt: skip
    add("--denoising_strip", type=within(2), metavar="COLUMNS",
        help="how a prompt's picture comes about: noisy above, predicted below")  # fmt: skip
    options = read_options(parser, arguments)
    if options.step_strip or options.denoising_strip:
        draw_strips(options)
    else:
        draw_pictures(options)


def draw_strips(options: Namespace) -> None:
    """One strip a picture that the options ask for."""
    columns = options.denoising_strip
    if options.step_strip and columns:
        raise ConfigError("give --step_strip or --denoising_strip, one of the two")
    if options.step_strip and (options.sigmas or options.timesteps):
        raise ConfigError("step_strip chooses the steps; leave out --sigmas and --timesteps")
    if options.variation_strength:
        raise ConfigError("a strip has no variations; leave out --variation_strength")
    pictures, folder = plan(options), make_folder(options.outdir)
    pipeline = prepare(open_model(options), options)
    from ldm.tasks import denoising_strip, step_strip

    for picture in pictures if columns else []:
        steps = pipeline.defaults | picture.settings
        grid = steps.get("timesteps") or [s for s in steps.get("sigmas", []) if s]
        if columns > (most := len(grid) or steps["num_inference_steps"]):
            raise ConfigError(f"{picture.where}{columns} columns of {most} steps; ask for fewer")
    for picture in pictures:
        shared = {"negative_prompt": picture.negative_prompt, "seed": picture.seed}
        shared |= picture.settings
        if options.step_strip:
            shared.pop("num_inference_steps", None)
            image = step_strip(pipeline, picture.prompt, options.step_strip, **shared)
        else:
            image = denoising_strip(pipeline, picture.prompt, columns, **shared)
        with new_file(folder, "strip-") as file:
            save_picture(image, file)
        print(f"{file}  seed {picture.seed}  {picture.prompt}", flush=True)


if __name__ == "__main__":
    run(main)
