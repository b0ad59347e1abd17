"""The order of samples: arithmetic that never repeats, skips or depends on the processes."""

import numpy as np
import pytest

from ldm.data.order import Visit, check_length, positions, rank_slots
from ldm.errors import ConfigError, DataError
from ldm.rng import Draws


@pytest.mark.parametrize(("length", "batch_size"), [(10, 3), (12, 4), (7, 7), (5, 1)])
def test_each_epoch_visits_each_sample_once(length: int, batch_size: int) -> None:
    line = [v for step in range(4 * length) for v in positions(3, step, batch_size, length)]
    for epoch in range(3):
        visits = line[epoch * length : (epoch + 1) * length]
        assert sorted(visits) == [Visit(index, epoch) for index in range(length)]
        expected = Draws(3, "order", epoch).permutation(length)
        assert [visit.index for visit in visits] == expected.tolist()


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(v.index for v in positions(s, e, 20, 20)) for s in (0, 1) for e in (0, 1)}
    assert len(orders) == 4


def test_resumption_is_arithmetic() -> None:
    forward = [positions(1, step, 4, 9) for step in range(20)]
    assert [positions(1, step, 4, 9) for step in reversed(range(20))] == forward[::-1]
    # Twice the batch is two of the smaller steps: accumulation does not change the order.
    assert positions(1, 3, 8, 9) == forward[6] + forward[7]


def test_larger_step_count() -> None:
    """A billionth step costs no more than the first."""
    index, visit = positions(0, 10**9, 2, 10)[1]
    assert visit == (2 * 10**9 + 1) // 10
    assert index == Draws(0, "order", visit).permutation(10)[1]


def test_union_of_ranks_is_the_global_batch() -> None:
    batch = positions(5, 7, 12, 100)
    for world_size in (1, 2, 3, 4, 6, 12):
        parts = [batch[rank_slots(12, world_size, rank)] for rank in range(world_size)]
        assert sum(parts, []) == batch
        assert {len(part) for part in parts} == {12 // world_size}


def test_errors() -> None:
    with pytest.raises(ConfigError, match="a global batch of 10 cannot be shared by 4"):
        rank_slots(10, 4, 0)
    with pytest.raises(DataError, match="3 samples, fewer than a batch of 4"):
        positions(0, 0, 4, 3)
    check_length(4, 4)


def test_permutation_is_uniform() -> None:
    """First places of 3,000 epochs: chi-squared with 9 degrees of freedom, 0.1 % bound."""
    first = [positions(0, epoch, 10, 10)[0].index for epoch in range(3000)]
    counts = np.bincount(first, minlength=10)
    assert ((counts - 300) ** 2 / 300).sum() < 27.9
