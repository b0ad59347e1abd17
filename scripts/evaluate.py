"""Repeat the figures of a flower model's card: `python scripts/evaluate.py [--model flowers]`.

Draws the prompts, judges the pixels, and writes each set of pictures as a grid to look at.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import _ours  # noqa: F401

from ldm.checkpoint.locate import locate_model
from ldm.cli import Parser, run
from ldm.config import SamplerName
from ldm.drawing import find_device
from ldm.outputs import make_folder
from ldm.settings import READERS, real, within


def main(arguments: Sequence[str]) -> None:
    parser = Parser("evaluate.py", description=__doc__)
    parser.add_argument("--model", default="flowers", help="bundled, a folder, a single file, or a"
        " name on the hub")  # fmt: skip
    parser.add_argument("--number", type=within(1), default=100, help="pictures for each figure")
    parser.add_argument("--seed", type=READERS["seed"], default=0, help="of the first picture")
    parser.add_argument(
        "--num_inference_steps", "--steps", type=within(1), help="the model's own if not given"
    )
    parser.add_argument(
        "--guidance_scale", "--scale", type=real, help="the model's own if not given"
    )
    parser.add_argument("--sampler", default="ddim", choices=get_args(SamplerName))
    parser.add_argument("--device", help="cuda if there is one, else cpu")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/evaluate"))
    options = parser.parse_args(arguments)
    model = locate_model(options.model)
    make_folder(options.outdir)
    device = find_device(options.device)

    from ldm.evaluation.evaluate import QUESTIONS, ask, reconstruction_psnr
    from ldm.images import image_grid
    from ldm.pipeline import LatentDiffusionPipeline

    pipeline = LatentDiffusionPipeline.from_pretrained(model).to(device)
    figures: dict[str, float] = {"number": options.number}
    for name, make in QUESTIONS.items():
        result = ask(
            pipeline,
            make(options.number),
            seed=options.seed,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            sampler=options.sampler,
        )
        image_grid(result.images, columns=10).save(options.outdir / f"{name}.png")
        figures[name] = result.right
        print(f"{name}: {result.right} of {options.number} right", flush=True)
        for question, seen in zip(result.questions, result.seen, strict=True):
            if not question.answered(seen):
                print(f"    '{question.prompt}' shows {seen.count} {seen.color} {seen.kind}")
    figures["psnr"] = round(reconstruction_psnr(pipeline.vae), 2)
    print(f"psnr: {figures['psnr']:.2f} dB")
    (options.outdir / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
