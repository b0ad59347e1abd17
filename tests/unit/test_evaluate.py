"""The figures of the model card: what is asked, and that a known answer gets its known mark."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from ldm.data.flowers import COLORS, HELD_OUT, KINDS, parse, render, scene
from ldm.evaluation.evaluate import (
    QUESTIONS,
    Question,
    Result,
    ask,
    color_questions,
    count_questions,
    held_out_questions,
    reconstruction_psnr,
)
from ldm.evaluation.flowers import Verdict


def test_questions_are_spread_evenly_and_say_what_they_ask():
    colors = color_questions(100)
    assert set(Counter(q.color for q in colors).values()) == {100 // len(COLORS)}
    counts = count_questions(100)
    assert Counter(q.count for q in counts) == {1: 34, 2: 33, 3: 33}
    assert len({q.prompt for q in counts}) == 100
    asked = Counter((parse(q.prompt)["color"], q.count) for q in counts)
    assert asked.keys() == {(color, count) for color in COLORS for count in (1, 2, 3)}
    held_out = held_out_questions(100)
    asked = Counter((q.color, q.kind) for q in held_out)
    assert asked.keys() == set(HELD_OUT) and max(asked.values()) - min(asked.values()) <= 1
    for question in (*colors, *counts, *held_out):
        said = parse(question.prompt)
        for name in ("color", "count", "kind"):
            assert getattr(question, name) in (None, said[name])
    for question in (*colors, *counts):  # these two do not mix in the unseen pairs
        said = parse(question.prompt)
        assert (said["color"], said["kind"]) not in HELD_OUT


def test_the_judges_answer_is_marked():
    seen = Verdict("red", 2, "rose")
    assert Question("", color="red", count=2, kind="rose").answered(seen)
    assert Question("", kind="rose").answered(seen) and Question("").answered(seen)
    for wrong in ({"color": "blue"}, {"count": 1}, {"kind": "lily"}, {"color": "red", "count": 3}):
        assert not Question("", **wrong).answered(seen)
    questions = [Question("", color="red"), Question("", color="blue"), Question("", count=2)]
    assert Result(questions, [], [seen] * 3).right == 2


class Painter:
    """Stands in for a pipeline: draws what a prompt says, or always one red rose."""

    def __init__(self, listens):
        self.listens, self.calls = listens, []

    def __call__(self, prompts, *, seed, batch_size, **options):
        self.calls.append((seed, options))
        return SimpleNamespace(images=[self.draw(p, i) for i, p in enumerate(prompts)])

    def draw(self, prompt, index):
        said = parse(prompt) if self.listens else {"color": "red", "kind": "rose", "count": 1}
        named = {k: said[k] for k in ("color", "kind", "count") if said[k] is not None}
        plain = replace(scene(index), background="night")
        return render(replace(plain, **named | {"split": "validation"}), 64)


@pytest.mark.parametrize("name", QUESTIONS)
def test_who_draws_what_is_said_gets_full_marks(name):
    questions = QUESTIONS[name](30)
    painter = Painter(listens=True)
    result = ask(painter, questions, seed=5, num_inference_steps=3)
    assert painter.calls == [(5, {"num_inference_steps": 3})]
    assert result.right >= 29
    deaf = ask(Painter(listens=False), questions)
    red = sum(
        q.color in (None, "red") and q.count in (None, 1) and q.kind in (None, "rose")
        for q in questions
    )
    assert deaf.right == red < 15
    assert isinstance(result.images[0], Image.Image) and set(KINDS) >= {v.kind for v in deaf.seen}


class Copier(nn.Module):
    """An autoencoder whose reconstruction is off by so many levels of 255, up or down."""

    def __init__(self, levels):
        super().__init__()
        self.off = nn.Parameter(torch.tensor(2 * levels / 255))

    def encode(self, images):
        assert images.shape == (1, 3, 64, 64) and images.min() >= -1 and images.max() <= 1
        return SimpleNamespace(mode=lambda: images)

    def decode(self, latents):
        return latents + torch.where(latents > 0, -self.off, self.off)


@pytest.mark.parametrize(("levels", "decibels"), [(1, 48.130803608679), (5, 34.151403521959)])
def test_psnr_closed_form(levels, decibels):
    """20 log10(255 / levels)."""
    assert reconstruction_psnr(Copier(levels), number=4) == pytest.approx(decibels, abs=1e-9)
