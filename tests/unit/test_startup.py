"""Drawing starts without what it does not need."""

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
HEAVY = {
    "transformers", "diffusers", "open_clip", "torchvision", "scipy", "sympy", "jsonargparse",
    "accelerate", "torch._dynamo", "torch._inductor",
}  # fmt: skip
PROGRAM = """
import runpy, sys
runpy.run_path(sys.argv[1], run_name="__main__")
print("\\nloaded", *sys.modules)
"""


def test_a_picture_needs_torch_and_little_else(tmp_path):
    """Each of these takes longer to import than the bundled model takes to open."""
    arguments = ["a red flower", "--ddim_steps", "1", "--outdir", str(tmp_path)]
    command = [sys.executable, "-c", PROGRAM, str(SCRIPTS / "txt2img.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPTS, check=True)
    loaded = set(done.stdout.split("loaded ")[1].split())
    assert (tmp_path / "samples" / "00000.png").is_file() and "torch" in loaded
    assert not loaded & HEAVY
