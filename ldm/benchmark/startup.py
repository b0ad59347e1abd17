"""The two sides of starting: a new Python each time, from its first line to a PNG."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ldm.benchmark.cases import Job
from ldm.benchmark.pace import Pace
from ldm.options import DTYPES

SCRIPT = Path(__file__).parents[2] / "scripts" / "txt2img.py"
PROMPT = "a red flower"
STEPS = "20"  # which divides the timesteps: otherwise diffusers' DDIM steps past those it visits
IMPORT = "from diffusers import StableDiffusionPipeline"
DRAW = """
import sys, torch
from diffusers import StableDiffusionPipeline
model, dtype, device, prompt, steps, scale, file = sys.argv[1:]
dtype = {} if dtype == "float32" else {"torch_dtype": getattr(torch, dtype)}
pipe = StableDiffusionPipeline.from_pretrained(model, **dtype).to(device)
side, generator = pipe.unet.config.sample_size, torch.Generator().manual_seed(42)
latents = torch.randn(1, 4, side, side, generator=generator).to(device, pipe.unet.dtype)
result = pipe(prompt, num_inference_steps=int(steps), guidance_scale=float(scale), latents=latents)
result.images[0].save(file)
"""


def side(job: Job, variant: str) -> Callable[[Pace], None]:
    """The command of a variant, run anew in every turn."""
    folder = job.scratch / variant
    dtype = "fp32" if variant == "diffusers fp32" else job.dtype
    place = ["--dtype", dtype, "--device", job.device]
    png = folder / "picture.png"
    if variant == "ldm":
        model = ["--model", job.size if job.size == "flowers" else str(job.folder)]
        command = [str(SCRIPT), PROMPT, *model, *place, "--steps", STEPS]
        command += ["--outdir", str(folder)]
        png = folder / "samples" / "00000.png"
    elif variant == "diffusers import":
        command = ["-c", IMPORT]
    else:
        own = json.loads((job.folder / "model_index.json").read_text())["_ldm"]["defaults"]
        scale = str(own["guidance_scale"])
        command = ["-c", DRAW, str(job.folder), DTYPES[dtype], job.device, PROMPT, STEPS, scale]
        command.append(str(png))

    def turns(pace: Pace) -> None:
        folder.mkdir()
        for _ in pace:
            png.unlink(missing_ok=True)
            subprocess.run([sys.executable, *command], check=True)
            if png.exists():
                pace.output = [Image.open(png)]

    return turns
