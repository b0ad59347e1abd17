"""The order of samples: arithmetic that never repeats, skips or depends on the processes."""

import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from ldm.data.order import Bucketed, Order, Place, Shuffled, Streamed, check_length, micro_batches
from ldm.errors import ConfigError, DataError
from ldm.rng import Draws

SHARDS = [(5, 7, 3, 9, 1, 6), (8, 8, 8, 8), (40,), (1,) * 23, (0, 11, 0, 5)]


def line(order: Order, steps: int) -> list[Place]:
    return [place for step in range(steps) for place in order.batch(step)]


@pytest.mark.parametrize(("length", "batch_size"), [(10, 3), (12, 4), (7, 7), (5, 1)])
def test_each_epoch_visits_each_sample_once(length: int, batch_size: int) -> None:
    places = line(Shuffled(3, batch_size, length), 4 * length)
    for epoch in range(3):
        expected = Draws(3, "order", epoch).permutation(length)
        for number, index in enumerate(expected.tolist(), epoch * length):
            assert places[number] == Place(index, epoch, *divmod(number, batch_size))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8])
@pytest.mark.parametrize("lengths", SHARDS)
def test_each_epoch_streams_each_sample_once(lengths: tuple[int, ...], batch_size: int) -> None:
    """Also where neither the shards nor the data set divide by the batch."""
    length = sum(lengths)
    places = line(Streamed(3, batch_size, lengths), 4 * length // batch_size + 1)
    assert [place.slot for place in places[:batch_size]] == list(range(batch_size))
    for epoch in range(4):
        now = places[epoch * length : (epoch + 1) * length]
        assert {place.visit for place in now} == {epoch}
        assert sorted(place.index for place in now) == list(range(length))


@pytest.mark.parametrize("counts", [(9, 4, 17), (4, 4), (5, 23, 4, 4, 8), (11,)])
def test_buckets_neither_mix_nor_drop(counts: tuple[int, ...]) -> None:
    """Each bucket's own batches, put together, are whole permutations one after the other."""
    bucket_of = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    sizes = [(8 * bucket, 64) for bucket in range(len(counts))]
    order = Bucketed(3, 4, bucket_of.tolist(), sizes)
    epochs = 6
    batches = [order.batch(step) for step in range(sum(epochs * n // 4 for n in counts))]
    lines: list[list[Place]] = [[] for _ in counts]
    for step, batch in enumerate(batches):
        bucket = int(bucket_of[batch[0].index])
        assert {bucket_of[place.index] for place in batch} == {bucket}
        assert [place[2:] for place in batch] == [(step, slot, sizes[bucket]) for slot in range(4)]
        lines[bucket] += batch
    for bucket, places in enumerate(lines):
        n = counts[bucket]
        assert len(places) == epochs * n // 4 * 4  # in its share, whatever the other buckets
        for epoch in range(epochs):
            now = places[epoch * n : (epoch + 1) * n]
            assert {place.visit for place in now} == {epoch}
            assert max(Counter(place.index for place in now).values()) == 1


def test_turns_of_buckets_are_shuffled_over_each_epoch() -> None:
    order = Bucketed(0, 2, [0] * 20 + [1] * 20, [(8, 8), (8, 16)])
    turns = [[order.batch(e * 20 + i)[0].size == (8, 8) for i in range(20)] for e in range(50)]
    assert all(sum(epoch) == 10 for epoch in turns)
    assert len({tuple(epoch) for epoch in turns}) == 50
    assert np.mean(turns, axis=0) == pytest.approx(0.5, abs=4 * 0.5 / 50**0.5)


def test_one_bucket_is_shuffled() -> None:
    plain = line(Shuffled(7, 4, 11), 30)
    assert line(Bucketed(7, 4, [0] * 11, [(64, 64)]), 30) == [
        place._replace(size=(64, 64)) for place in plain
    ]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_stream_their_own_shards(world_size: int) -> None:
    """Over an epoch that divides; a shard may lie across the border of two neighbours' lanes."""
    lengths = tuple(np.random.default_rng(1).integers(5, 20, 40).tolist())
    lengths = (*lengths[:-1], lengths[-1] + -sum(lengths) % 8)
    order, shard_of = Streamed(5, 8, lengths), np.repeat(np.arange(40), lengths)
    steps = sum(lengths) // 8
    read = [set[int]() for _ in range(world_size)]
    for step in range(steps):
        for rank, mine in enumerate(read):
            places = order.batch(steps + step)[micro_batches(8, world_size, rank, 1)[0]]
            mine |= {int(shard_of[place.index]) for place in places}
    assert set().union(*read) == set(range(40))
    assert sum(map(len, read)) < 40 + world_size
    # A slot takes shard after shard and never comes back to one.
    for slot in range(8):
        own = [int(shard_of[order.batch(step)[slot].index]) for step in range(steps)]
        changes = [b for a, b in pairwise(own) if a != b]
        assert len(changes) == len(set(changes))


ORDERS = (
    Shuffled(1, 4, 20),
    Bucketed(1, 4, [0, 1] * 10, [(8, 8), (8, 16)]),
    Streamed(1, 4, (6, 1, 9, 4)),
)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: type(order).__name__)
def test_resumption_is_arithmetic(order) -> None:
    forward = [order.batch(step) for step in range(20)]
    resumed = pickle.loads(pickle.dumps(order))
    assert [resumed.batch(step) for step in reversed(range(20))] == forward[::-1]
    other = type(order)(2, *(getattr(order, name) for name in order.__match_args__[1:]))
    assert [other.batch(step) for step in range(20)] != forward
    epochs = [[place.index for batch in forward[i : i + 5] for place in batch] for i in (0, 5, 10)]
    assert epochs[0] != epochs[1] != epochs[2]
    late = order.batch(10**9)  # costs no more than the first
    assert [place[2:4] for place in late] == [(10**9, slot) for slot in range(4)]
    assert {place.visit for place in late} == {10**9 * 4 // 20}


def test_accumulation_does_not_change_the_order() -> None:
    small = line(Shuffled(1, 4, 9), 8)
    large = line(Shuffled(1, 8, 9), 4)
    assert [place[:2] for place in small] == [place[:2] for place in large]


def test_union_of_ranks_is_the_global_batch() -> None:
    batch = Shuffled(5, 12, 100).batch(7)
    for world_size, accumulation in ((1, 1), (2, 1), (3, 2), (4, 3), (6, 2), (12, 1), (1, 12)):
        slots = [micro_batches(12, world_size, rank, accumulation) for rank in range(world_size)]
        parts = [batch[own] for rank in slots for own in rank]
        assert sum(parts, []) == batch
        assert {len(part) for part in parts} == {12 // world_size // accumulation}


def test_errors() -> None:
    for world_size, accumulation in ((4, 1), (1, 4), (2, 2), (20, 1)):
        with pytest.raises(ConfigError, match="train_batch_size 10 cannot be split over"):
            micro_batches(10, world_size, 0, accumulation)
    for make in (
        lambda: Shuffled(0, 4, 3),
        lambda: Bucketed(0, 4, [0, 0, 0, 0, 1, 1, 1], [(8, 8), (8, 16)]),
        lambda: Streamed(0, 4, (2, 1)),
    ):
        with pytest.raises(DataError, match="3 samples, fewer than a batch of 4"):
            make()
    check_length(4, 4)


def test_permutation_is_uniform() -> None:
    """First places of 3,000 epochs: chi-squared with 9 degrees of freedom, 0.1 % bound."""
    order = Shuffled(0, 10, 10)
    counts = np.bincount([order.batch(epoch)[0].index for epoch in range(3000)], minlength=10)
    assert ((counts - 300) ** 2 / 300).sum() < 27.9
