"""What can be measured, of which size, against whom. Imports no torch."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ldm.cli import Parser
from ldm.config import EngineName
from ldm.errors import ConfigError, suggest
from ldm.options import DTYPES
from ldm.settings import numbers, within

SIZES = ("flowers", "sd15", "sd21", "unet128", "tiny")
ENGINES: dict[str, EngineName] = {"ldm": "fast", "ldm plain": "plain", "ldm compiled": "compiled"}
INFERENCE = (
    *ENGINES, "diffusers", "diffusers channels-last", "diffusers fp32", "diffusers compiled",
)  # fmt: skip
TRAINING = ("ldm", "ldm compiled", "diffusers", "diffusers fp32")


@dataclass(frozen=True)
class Case:
    """One kind of work.

    Attributes:
        what: it is, in words.
        size: of the model, unless told.
        work: the case whose work it does, where that is another's.
        steps: of the sampler, unless told; None for work that has none.
        side: of the pictures in pixels, unless told; 0 for the model's own.
        batch: pictures at a time, unless told.
        times: that a turn repeats it; the mean counts, as short work is not measured alone.
        variants: who can do it.
        tolerance: greatest difference in fp32, relative to the largest value.
        trains: whether it is a step of training, which has one shape.
    """

    what: str
    size: str = "sd15"
    work: str = ""
    steps: int | None = None
    side: int = 0
    batch: int = 1
    times: int = 1
    variants: tuple[str, ...] = INFERENCE
    tolerance: float = 1e-4
    trains: bool = False


CASES = {
    "txt2img": Case("prompt to picture", steps=20, tolerance=1e-3),
    "unet": Case("one guided step of the U-Net"),
    "vae_decode": Case("latents to pixels"),
    "text": Case("two prompts to context"),
    "small": Case(
        "prompt to picture", "flowers", work="txt2img", steps=20, times=5, tolerance=1e-3
    ),
    "startup": Case(  # a PNG has 255 levels: rounding may move a pixel by one
        "new process to PNG", "flowers", tolerance=1.5 / 255,
        variants=("ldm", "diffusers", "diffusers fp32", "diffusers import"),
    ),
    "train_unet": Case(
        "training step of the U-Net", "unet128", batch=8, tolerance=1e-3, trains=True,
        variants=(*TRAINING, "diffusers images"),
    ),
    "train_vae": Case(
        "training step of the VAE", side=128, batch=2, tolerance=1e-3, trains=True,
        variants=TRAINING,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One shape of the work.

    Attributes:
        height: of the pictures in pixels; 0 for the model's own, until `measure`.
        width: likewise.
        batch: pictures at a time.
        steps: of the sampler; None for work that has none.
        times: that a turn repeats it.
        check: hand back the numbers, unrounded, to compare them.
    """

    height: int
    width: int
    batch: int
    steps: int | None = None
    times: int = 1
    check: bool = False


@dataclass(frozen=True)
class Job:
    """What is measured in one go.

    Attributes:
        name: of the case.
        size: of the model.
        dtype: fp32, bf16 or fp16.
        device: torch's name of it; None until `measure` finds it: cuda if there is one, else cpu.
        variants: who is compared, the others with the first; none until `measure` knows the usual.
        points: the shapes, one after the other.
        rounds: in each of which everyone takes a turn.
        folder: the model, once it is there.
        scratch: a folder for files in between.
    """

    name: str
    size: str
    dtype: str
    device: Any
    variants: tuple[str, ...]
    points: tuple[Point, ...]
    rounds: int
    folder: Path = field(default=Path())
    scratch: Path = field(default=Path())

    @property
    def case(self) -> Case:
        """The case of this name."""
        return CASES[self.name]

    @property
    def work(self) -> str:
        """The case whose work it is."""
        return self.case.work or self.name

    def torch_dtype(self, variant: str) -> Any:
        """What a variant computes in."""
        import torch

        return getattr(torch, DTYPES["fp32" if variant == "diffusers fp32" else self.dtype])


def add_options(parser: Parser) -> None:
    """The options of scripts/benchmark.py."""
    add, ints = parser.add_argument, numbers(within(1))
    add("cases", nargs="+", metavar="CASE", help=f"{', '.join(CASES)}; or the FILE.json of an"
        " earlier run, to show it again")  # fmt: skip
    add("--size", choices=SIZES, help="flowers is the bundled model; the others have random weights"
        " in the shape of Stable Diffusion 1.5 and 2.1, of the former with a U-Net of 128 channels,"
        " and of a toy; if not given, what suits the case")  # fmt: skip
    add("--dtype", choices=list(DTYPES), default="fp32", help="fp32 if not given")
    add("--device", help="cuda if there is one, else cpu")
    known = dict.fromkeys(variant for case in CASES.values() for variant in case.variants)
    add("--variants", help="whom to compare, with commas between, the others with the first;"
        f" of {', '.join(known)}")  # fmt: skip
    add("--steps", type=ints, metavar="4,20", help="of the sampler; several are measured in turn")
    add("--height", type=ints, metavar="256,512", help="of the pictures, in pixels; likewise")
    add("--width", type=ints, help="the height if not given")
    add("--batch_size", type=ints, help="pictures at a time; likewise")
    add("--rounds", type=within(1), default=5, help="turns that each one takes; 5 if not given")
    add("--work_dir", type=Path, help="keep models of random weights here; if not given, in a"
        " temporary folder")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--markdown", action="store_true", help="print a table for a README, too")
    add("--plot", type=Path, metavar="FILE", help="draw time against steps, or against picture"
        " size, whichever has several values")  # fmt: skip


def jobs(options: Namespace) -> list[Job]:
    """What the options ask for; results of earlier runs apart.

    Raises:
        ConfigError: an option that the case cannot use, or a file that cannot be written.
    """
    if options.plot and options.plot.suffix not in (".png", ".webp"):
        raise ConfigError(f"--plot {options.plot} must end in .png or .webp")
    for file in filter(None, (options.json, options.plot)):
        try:
            file.touch()
        except OSError as error:
            raise ConfigError(f"cannot write {file} ({error.strerror})") from None
    return [_job(name, options) for name in options.cases if not name.endswith(".json")]


def _job(name: str, options: Namespace) -> Job:
    if name not in CASES:
        raise ConfigError(f"no case '{name}'; {suggest(name, CASES)}")
    case = CASES[name]
    if options.steps and case.steps is None:
        raise ConfigError(f"{name} has no steps; leave out --steps")
    heights = options.height or [case.side]
    widths = options.width or heights
    if len(widths) not in (1, len(heights)):
        raise ConfigError(f"{len(heights)} heights and {len(widths)} widths; give as many")
    sizes = list(zip(heights, widths * (len(heights) // len(widths)), strict=True))
    steps, batches = options.steps or [case.steps], options.batch_size or [case.batch]
    points = tuple(Point(*size, b, s, case.times) for s, size, b in product(steps, sizes, batches))
    if case.trains and (len(points) > 1 or sizes[0][0] != sizes[0][1]):
        raise ConfigError(f"{name} has one batch of squares; give one number each")
    variants = tuple(word.strip() for word in (options.variants or "").split(",") if word.strip())
    for variant in variants:
        if variant not in case.variants:
            raise ConfigError(f"{name}: no variant '{variant}'; {suggest(variant, case.variants)}")
    size = options.size or case.size
    return Job(name, size, options.dtype, options.device, variants, points, options.rounds)


def usual_variants(job: Job) -> tuple[str, ...]:
    """Whom to compare without being told; on a CPU nobody who compiles, for that takes minutes."""
    left_out = {"diffusers channels-last"} if job.name == "text" else set()
    if job.device == "cpu":
        left_out |= {variant for variant in job.case.variants if "compiled" in variant}
    if job.device != "cpu" or job.dtype == "fp32":  # where it is the same as "diffusers"
        left_out.add("diffusers fp32")
    return tuple(variant for variant in job.case.variants if variant not in left_out)


def as_dict(job: Job) -> dict[str, Any]:
    """What is measured, as JSON holds it."""
    names = ("name", "size", "dtype", "device", "variants", "points", "rounds")
    return {"what": job.case.what} | {n: v for n, v in asdict(job).items() if n in names}
