"""From one picture to another: `python scripts/interpolate.py "a red flower" "a blue flower"`.

Prompts, seeds or both are the key frames. Writes a PNG a frame, and an animated WebP of them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import _ours  # noqa: F401

from ldm.cli import Parser, run
from ldm.drawing import at_a_time, open_model, prepare
from ldm.errors import ConfigError
from ldm.metadata import save_picture
from ldm.options import add_options, plan, process, read_options
from ldm.outputs import claim, make_folder
from ldm.settings import READERS, numbers, within


def main(arguments: Sequence[str]) -> None:
    parser = Parser("interpolate.py", description=__doc__)
    add_options(parser, "outputs/interpolations")
    add = parser.add_argument_group("how to go").add_argument
    add("--seeds", type=numbers(READERS["seed"]), metavar="1,2,3", help="of the key frames;"
        " --seed for all of them if not given")  # fmt: skip
    add("--frames", type=within(2), default=48, help="in all, the key frames among them")
    add("--fps", type=within(1), default=12, help="frames a second")
    add("--loop", action="store_true", help="go back to the first key frame at the end")
    options = read_options(parser, arguments)
    if process()[1] > 1:
        raise ConfigError("an interpolation is drawn by one process; start one")
    if options.variation_strength:
        raise ConfigError("an interpolation has no variations; leave out --variation_strength")
    if options.num_images_per_prompt * options.n_iter != 1:
        raise ConfigError("a prompt is one key frame; leave out --num_images_per_prompt, --n_iter")
    options.fixed_code = True  # the seed of every key that names none
    keys = plan(options)
    seeds = options.seeds or [key.seed for key in keys]
    if {len(keys), len(seeds)} - {1} != {max(len(keys), len(seeds))}:
        raise ConfigError(
            f"{len(keys)} prompts and {len(seeds)} seeds; give two or more of one of them, and of"
            " the other one as many, or one"
        )
    for key in keys:
        if key.settings != keys[0].settings:
            raise ConfigError(
                f"{key.where}only --n and --d may be other than those of the first key frame"
            )
    make_folder(options.outdir)
    pipeline = prepare(open_model(options), options)
    from ldm.tasks import interpolate

    drawn = interpolate(
        pipeline,
        [key.prompt for key in keys],
        seeds,
        options.frames,
        loop=options.loop,
        negative_prompts=[key.negative_prompt for key in keys],
        batch_size=at_a_time(options, pipeline, keys[0].settings),
        **keys[0].settings,
    )
    folder, frames = claim(options.outdir, "frames-"), []
    for frame in drawn:
        save_picture(frame, folder / f"{len(frames):05}.png")
        frames.append(frame)
    file = folder.with_suffix(".webp")
    animation = {"save_all": True, "append_images": frames[1:], "duration": 1000 // options.fps}
    save_picture(frames[0], file, loop=0, **animation)
    print(f"{file}  {len(frames)} frames  seeds {', '.join(map(str, dict.fromkeys(seeds)))}")


if __name__ == "__main__":
    run(main)
