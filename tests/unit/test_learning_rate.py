import pytest
import torch
from diffusers.optimization import get_scheduler as diffusers_scheduler
from transformers import get_scheduler as transformers_scheduler

from ldm.training.config import TrainingConfig, learning_rate_at

STEPS, WARMUP, BASE = 50, 8, 3e-4


def config(name, warmup=WARMUP, steps=STEPS):
    return TrainingConfig(
        learning_rate=BASE, lr_scheduler=name, lr_warmup_steps=warmup, max_train_steps=steps
    )


@pytest.mark.parametrize("library", [diffusers_scheduler, transformers_scheduler])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_as_the_libraries(library, name):
    """After warm-up the libraries' own; in warm-up one step ahead, since theirs begins with a step
    at a rate of zero, which learns nothing."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=BASE)
    kind = "constant_with_warmup" if name == "constant" else name
    scheduler = library(kind, optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS)
    theirs = []
    for _ in range(STEPS):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    mine = [learning_rate_at(config(name), step) for step in range(STEPS)]
    assert mine[WARMUP:] == pytest.approx(theirs[WARMUP:], rel=1e-9)
    assert mine[: WARMUP - 1] == pytest.approx(theirs[1:WARMUP], rel=1e-9)
    assert mine[WARMUP - 1] == BASE


def test_closed_forms():
    assert learning_rate_at(config("linear"), 0) == pytest.approx(BASE / WARMUP)
    assert learning_rate_at(config("linear"), WARMUP) == BASE
    middle = (STEPS + WARMUP) // 2
    for name in ("linear", "cosine"):
        assert learning_rate_at(config(name), middle) == pytest.approx(BASE / 2)
        assert learning_rate_at(config(name), STEPS) == pytest.approx(0, abs=1e-12)
    assert learning_rate_at(config("constant"), STEPS - 1) == BASE
    assert learning_rate_at(config("cosine"), middle, base=1.0) == pytest.approx(0.5)
    assert learning_rate_at(config("linear", warmup=0), 0) == BASE


def test_a_run_shorter_than_its_warm_up_ends_at_the_full_rate():
    short = config("cosine", warmup=500, steps=10)
    rates = [learning_rate_at(short, step) for step in range(10)]
    assert rates == pytest.approx([BASE * (step + 1) / 10 for step in range(10)])
