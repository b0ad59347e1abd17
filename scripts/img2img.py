"""Draw over a picture: `python scripts/img2img.py "a blue flower" --image red.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import _ours  # noqa: F401

from ldm.cli import Parser, run
from ldm.drawing import draw_pictures
from ldm.options import add_options, read_options
from ldm.settings import within


def main(arguments: Sequence[str]) -> None:
    parser = Parser("img2img.py", description=__doc__)
    add_options(parser, "outputs/img2img-samples")
    add = parser.add_argument_group("what to draw over").add_argument
    add("--image", "--init-img", "--init_img", type=Path, required=True, metavar="PICTURE")
    add("--strength", type=within(0, 1, float), help="how much of it to give up, from 0 to 1; 0.8"
        " if not given, as in diffusers (CompVis: 0.75)")  # fmt: skip
    draw_pictures(read_options(parser, arguments))


if __name__ == "__main__":
    run(main)
