"""How good a model of the procedural flowers is, by the pixels of what it draws.

Four figures, each with the prompts that it is measured on:
    color       100 prompts over all colours, kinds named and not: the petals have that colour
    count       100 prompts, a third each for one, two and three flowers: so many are there
    held_out    100 prompts over the colour-kind pairs that training never saw: both are right
    psnr        reconstruction by the VAE of flowers that training never saw, in dB
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from PIL.Image import Image

from ldm.data.flowers import COLORS, HELD_OUT, KINDS, Flowers, prompt
from ldm.data.transforms import prepare
from ldm.evaluation.flowers import Verdict, judge
from ldm.images import to_pil
from ldm.models.autoencoder import AutoencoderKL
from ldm.pipeline import LatentDiffusionPipeline


@dataclass(frozen=True)
class Question:
    """One prompt and what must be seen in its picture; None is not asked for."""

    prompt: str
    color: str | None = None
    count: int | None = None
    kind: str | None = None

    def answered(self, seen: Verdict) -> bool:
        """Whether all that was asked for is there."""
        return all(
            wanted is None or wanted == got
            for wanted, got in (
                (self.color, seen.color),
                (self.count, seen.count),
                (self.kind, seen.kind),
            )
        )


@dataclass(frozen=True)
class Result:
    """Pictures that answer a list of questions.

    Attributes:
        questions: what was asked.
        images: what was drawn.
        seen: what the judge sees in it.
    """

    questions: list[Question]
    images: list[Image]
    seen: list[Verdict]

    @property
    def right(self) -> int:
        """How many pictures show all that was asked for."""
        return sum(q.answered(v) for q, v in zip(self.questions, self.seen, strict=True))


def color_questions(number: int = 100) -> list[Question]:
    """All colours in turn, first as `flower` and then as each of the kinds seen in that colour."""
    questions = []
    for i, color in enumerate(islice(cycle(COLORS), number)):
        turn = i // len(COLORS)
        kinds = [None, *(kind for kind in KINDS if (color, kind) not in HELD_OUT)]
        questions.append(Question(prompt(color, kinds[turn % len(kinds)]), color=color))
    return questions


def count_questions(number: int = 100) -> list[Question]:
    """One, two and three flowers of the same pair in turn; the pairs change colour and kind."""
    pairs = [(c, k) for k in (None, *KINDS) for c in COLORS if (c, k) not in HELD_OUT]
    return [
        Question(prompt(*pairs[i // 3 * 7 % len(pairs)], count=i % 3 + 1), count=i % 3 + 1)
        for i in range(number)
    ]


def held_out_questions(number: int = 100) -> list[Question]:
    """The pairs that training never saw, in turn; colour and kind must both be right."""
    pairs = sorted(HELD_OUT)
    return [
        Question(prompt(color, kind), color=color, kind=kind)
        for color, kind in islice(cycle(pairs), number)
    ]


QUESTIONS: dict[str, Callable[[int], list[Question]]] = {
    "color": color_questions,
    "count": count_questions,
    "held_out": held_out_questions,
}


def ask(
    pipeline: LatentDiffusionPipeline,
    questions: list[Question],
    *,
    seed: int = 0,
    batch_size: int = 25,
    **options: object,
) -> Result:
    """Draw one picture a question and judge it.

    Args:
        pipeline: the model.
        questions: what to draw.
        seed: of the first picture; the next has seed + 1.
        batch_size: pictures drawn at a time.
        options: of the pipeline's call; the model's defaults otherwise.
    """
    prompts = [question.prompt for question in questions]
    images = pipeline(prompts, seed=seed, batch_size=batch_size, **options).images  # type: ignore
    return Result(questions, images, [judge(image) for image in images])


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, number: int = 200, size: int = 64) -> float:
    """Mean PSNR in dB of 8-bit reconstructions (from the mode) of unseen procedural flowers."""
    source = Flowers(length=number, size=size, split="validation")
    weight = next(vae.parameters())
    values = []
    for i in range(number):
        image = source[i].image
        pixels = prepare(image, size)[None].to(weight)  # 1 3 h w
        again = to_pil(vae.decode(vae.encode(pixels).mode()))[0]
        error = np.asarray(image, dtype=np.float64) - np.asarray(again, dtype=np.float64)
        values.append(10 * np.log10(255**2 / max(float(np.mean(error**2)), 1e-6)))
    return float(np.mean(values))
