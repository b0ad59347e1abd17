"""Draw pictures from prompts: `python scripts/txt2img.py "a red flower"`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import _ours  # noqa: F401

from ldm.cli import Parser, run
from ldm.drawing import draw_pictures, make_folder, next_number, open_model, prepare
from ldm.options import add_options, numbers, plan, read_options, within


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
    pictures, folder = plan(options), make_folder(options.outdir)
    pipeline = prepare(open_model(options), options)
    from ldm.tasks import denoising_strip, step_strip

    for picture in pictures:
        shared = {"negative_prompt": picture.negative_prompt, "seed": picture.seed}
        shared |= picture.settings
        if options.step_strip:
            shared.pop("num_inference_steps", None)
            image = step_strip(pipeline, picture.prompt, options.step_strip, **shared)
        else:
            image = denoising_strip(pipeline, picture.prompt, options.denoising_strip, **shared)
        file = folder / f"strip-{next_number(folder, 'strip-'):04}.png"
        image.save(file)
        print(f"{file}  seed {picture.seed}  {picture.prompt}", flush=True)


if __name__ == "__main__":
    run(main)
