"""From one picture to another: `python scripts/interpolate.py "a red flower" "a blue flower"`.

Prompts, seeds or both are the key frames. Writes a PNG a frame, and an animated WebP of them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import _ours  # noqa: F401

from ldm.cli import Parser, run
from ldm.drawing import at_a_time, make_folder, next_number, open_model, prepare
from ldm.errors import ConfigError
from ldm.metadata import save_picture
from ldm.options import add_options, numbers, plan, read_options, within


def main(arguments: Sequence[str]) -> None:
    parser = Parser("interpolate.py", description=__doc__)
    add_options(parser, "outputs/interpolations")
    add = parser.add_argument_group("how to go").add_argument
    add("--seeds", type=numbers(within(0)), metavar="1,2,3", help="of the key frames; --seed for"
        " all of them if not given")  # fmt: skip
    add("--frames", type=within(2), default=48, help="in all, the key frames among them")
    add("--fps", type=within(1), default=12, help="frames a second")
    add("--loop", action="store_true", help="go back to the first key frame at the end")
    options = read_options(parser, arguments)
    keys, seeds = plan(options), options.seeds or [options.seed]
    if {len(keys), len(seeds)} - {1} != {max(len(keys), len(seeds))}:
        raise ConfigError(
            f"{len(keys)} prompts and {len(seeds)} seeds; give two or more of one of them, and of"
            " the other one as many, or one"
        )
    number = next_number(make_folder(options.outdir), "frames-")
    pipeline = prepare(open_model(options), options)
    from ldm.tasks import interpolate

    frames = interpolate(
        pipeline,
        [key.prompt for key in keys],
        seeds,
        options.frames,
        loop=options.loop,
        negative_prompt=keys[0].negative_prompt,
        batch_size=at_a_time(options, pipeline, keys[0].settings),
        **keys[0].settings,
    )
    for i, frame in enumerate(frames):
        save_picture(frame, options.outdir / f"frames-{number:04}" / f"{i:05}.png")
    file = options.outdir / f"frames-{number:04}.webp"
    animation = {"save_all": True, "append_images": frames[1:], "duration": 1000 // options.fps}
    frames[0].save(file, **animation, loop=0, quality=90)
    print(f"{file}  {len(frames)} frames  seeds {', '.join(map(str, seeds))}")


if __name__ == "__main__":
    run(main)
