"""Paint a part of a picture anew, or what lies around it.

python scripts/inpaint.py "a blue flower" --image red.png --mask_image where.png
python scripts/inpaint.py "a meadow" --image red.png --outpaint 64 64 0 0
"""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import _ours  # noqa: F401

from ldm.cli import Parser, run
from ldm.drawing import draw_pictures
from ldm.errors import ConfigError
from ldm.options import add_options, read_options
from ldm.settings import within


def main(arguments: Sequence[str]) -> None:
    parser = Parser("inpaint.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_options(parser, "outputs/inpaint-samples")
    add = parser.add_argument_group("what to paint anew").add_argument
    add("--image", "--init-img", "--init_img", type=Path, required=True, metavar="PICTURE")
    add("--mask_image", "--mask", type=Path, metavar="PICTURE", help="white is painted anew")
    add("--outpaint", type=within(0), nargs=4, metavar=("LEFT", "RIGHT", "TOP", "BOTTOM"),
        help="instead of a mask: pixels to add at each side")  # fmt: skip
    add("--strength", type=within(0, 1, float), help="how much of what is masked to give up, from"
        " 0 to 1; all of it if not given")  # fmt: skip
    options = read_options(parser, arguments)
    if (options.mask_image is None) == (options.outpaint is None):
        raise ConfigError("give --mask_image or --outpaint, one of the two")
    if options.outpaint is not None and not any(options.outpaint):
        raise ConfigError("outpaint is 0 on every side; give pixels to add")
    draw_pictures(options)


if __name__ == "__main__":
    run(main)
