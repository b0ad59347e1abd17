"""Buckets against an exhaustive search, and against what is known of the usual options."""

from collections import Counter
from itertools import product
from typing import Any
from weakref import ref

import numpy as np
import pytest

from ldm.data.buckets import Buckets, assign_buckets
from ldm.data.order import Bucketed, Shuffled, Streamed
from ldm.data.streams import StreamedShards
from ldm.errors import ConfigError, DataError
from ldm.training.config import TrainingConfig
from ldm.training.data import make_order

SD = Buckets(512, 256, 1024, 64)
GRIDS = [SD, Buckets(64, 32, 128, 16), Buckets(500, 256, 1024, 64), Buckets(64, 60, 70, 8)]


def test_the_buckets_of_stable_diffusion():
    """As kohya's scripts list them for 512 x 512 and their default options."""
    tall = [(1024, 256), (960, 256), (896, 256), (832, 256), (768, 320), (704, 320), (640, 384)]
    tall.append((576, 448))
    assert SD.sizes() == [*tall, (512, 512), *[(w, h) for h, w in reversed(tall)]]


@pytest.mark.parametrize("grid", GRIDS)
def test_no_bucket_can_grow(grid: Buckets):
    """Of all sizes that are allowed, those that no longer side fits into; and the square."""
    sides = [s for s in range(grid.minimum, grid.maximum + 1) if s % grid.step == 0]
    allowed = {(h, w) for h, w in product(sides, sides) if h * w <= grid.resolution**2}
    square = max(h for h, w in allowed if h == w)
    full = {
        (h, w)
        for h, w in allowed
        if (h, w + grid.step) not in allowed or (h + grid.step, w) not in allowed
    }
    assert set(grid.sizes()) == full | {(square, square)}
    ratios = [w / h for h, w in grid.sizes()]
    assert ratios == sorted(set(ratios))


@pytest.mark.parametrize("grid", GRIDS)
def test_pictures_go_where_least_is_cut_off(grid: Buckets):
    """Scaled to cover, a picture loses 1 - exp(-|difference of the log ratios|) of its area."""
    pictures = np.random.default_rng(0).integers(20, 3000, (300, 2)).tolist()
    sizes, bucket_of = assign_buckets(pictures, grid, batch_size=1)
    assert sorted(set(bucket_of)) == list(range(len(sizes)))

    def lost(picture, size):
        scale = max(size[1] / picture[0], size[0] / picture[1])
        return 1 - size[0] * size[1] / (scale**2 * picture[0] * picture[1])

    for picture, bucket in zip(pictures, bucket_of, strict=True):
        least = min(lost(picture, size) for size in grid.sizes())
        assert lost(picture, sizes[bucket]) == pytest.approx(least)


def test_small_pictures_are_not_enlarged():
    grid = Buckets(512, 256, 1024, 64, no_upscale=True)
    pictures = np.random.default_rng(0).integers(64, 1500, (500, 2)).tolist()
    sizes, bucket_of = assign_buckets(pictures, grid, batch_size=1)
    usual, usual_of = assign_buckets(pictures, SD, batch_size=1)
    kept = 0
    for (width, height), bucket, other in zip(pictures, bucket_of, usual_of, strict=True):
        assert sizes[bucket][0] <= height and sizes[bucket][1] <= width
        assert sizes[bucket][0] * sizes[bucket][1] <= 512**2
        if usual[other][0] <= height and usual[other][1] <= width:
            assert sizes[bucket] == usual[other]
        elif (height // 64) * (width // 64) <= 64:
            assert sizes[bucket] == (min(height // 64, 16) * 64, min(width // 64, 16) * 64)
            kept += 1
    assert kept > 50
    assert grid.own(30, 5000) == (1024, 64)  # but to one step, and no longer than the longest


def test_small_buckets_join_the_nearest_smallest_first():
    """Batches of 4; log ratios -1.39, -0.25, 0.51, 1.39: the one joins the two, these the four."""
    shapes = {(256, 1024): 5, (448, 576): 1, (640, 384): 2, (1024, 256): 4}
    pictures = [shape for shape, count in shapes.items() for _ in range(count)]
    sizes, bucket_of = assign_buckets(pictures, SD, batch_size=4)
    assert sizes == [(256, 1024), (1024, 256)]
    assert bucket_of == [1] * 5 + [0] * 7
    everything, one = assign_buckets(pictures, SD, batch_size=8)
    assert everything == [(256, 1024)] and one == [0] * 12


def test_no_bucket_is_smaller_than_a_batch_unless_all_are():
    random = np.random.default_rng(1)
    for batch_size in (2, 5, 11, 40):
        pictures = np.exp(random.normal(6, 0.5, (60, 2))).astype(int).tolist()
        sizes, bucket_of = assign_buckets(pictures, SD, batch_size)
        counts = Counter(bucket_of)
        assert len(counts) == len(sizes) and min(counts.values()) >= batch_size
    sizes, bucket_of = assign_buckets([(1, 9), (9, 1), (5, 5)], SD, 4)
    assert len(sizes) == 1 and bucket_of == [0, 0, 0]


class Headers:
    """A source whose pictures need not exist; a size of 0 stands for a bad header."""

    def __init__(self, sizes: list[tuple[int, int]]):
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def size(self, index: int) -> tuple[int, int]:
        if not self.sizes[index][0]:
            raise DataError(f"{index}.jpg: is no picture")
        return self.sizes[index]


class Streams(StreamedShards):
    """Shards that need not exist."""

    def __init__(self, *lengths: int):
        self.shard_lengths = list(lengths)


def order_of(source: Any, **options: Any) -> Any:
    options = {"seed": 3, "train_batch_size": 2, "resolution": 512} | options
    return make_order(source, TrainingConfig(**options))


def test_the_order_is_by_the_source_and_the_options():
    source: Any = Headers([(100, 200), (300, 310), (100, 200), (50, 50)])
    assert order_of(source) == Shuffled(3, 2, 4)
    smaller = order_of(source, enable_bucket=True, bucket_no_upscale=True, train_batch_size=1)
    assert smaller.sizes == [(64, 64), (192, 64), (256, 256)]
    order = order_of(source, enable_bucket=True)
    assert order == Bucketed(3, 2, [1, 0, 1, 0], [(512, 512), (704, 320)])
    assert order is order_of(source, enable_bucket=True)  # headers are read once
    data = ref(source)
    del source
    assert data() is None  # and the data set is not kept for it
    assert order_of(Streams(3, 1)) == Streamed(3, 2, (3, 1))
    with pytest.raises(ConfigError, match="streamed shards come one after the other"):
        order_of(Streams(3, 1), enable_bucket=True)


def test_a_bad_header_waits_in_the_square_bucket_to_be_skipped():
    source = Headers([(100, 200), (300, 310), (0, 0), (100, 200), (50, 50)])
    order = order_of(source, enable_bucket=True, on_bad_sample="skip")
    assert [order.sizes[bucket] for bucket in order.bucket_of] == [
        (704, 320), (512, 512), (512, 512), (704, 320), (512, 512)
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"^2\.jpg: is no picture"):
        order_of(source, enable_bucket=True)
    with pytest.raises(DataError, match="5 samples, fewer than a batch of 6"):
        order_of(source, enable_bucket=True, on_bad_sample="skip", train_batch_size=6)


@pytest.mark.parametrize(
    ("options", "side"),
    [((64, 256, 1024, 64), 64), ((512, 64, 448, 64), 512), ((40, 1, 99, 64), 0)],
)
def test_a_grid_without_a_square_is_refused(options, side):
    with pytest.raises(ConfigError, match=f"has side {side}, which min_bucket_reso") as error:
        Buckets(*options)
    assert "\n" not in str(error.value)
