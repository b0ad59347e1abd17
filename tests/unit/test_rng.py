"""Counter-based randomness: pinned numbers, computed again here from the definition."""

import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from ldm.rng import Draws, image_generator, image_noise


def raw(seed, purpose, index, visit, count):
    """The definition: Philox 4x64 keyed by BLAKE2b of the address, counted from 1."""
    key = hashlib.blake2b(f"{seed}/{purpose}/{index}/{visit}".encode(), digest_size=16).digest()
    return philox([int.from_bytes(key[i : i + 8], "little") for i in (0, 8)], count)


def philox(key, count):
    """Philox4x64-10 of Salmon et al. 2011, section 3.3, in Python's own integers."""
    mask, numbers = 2**64 - 1, []
    for block in range(1, -(-count // 4) + 1):
        x, k = [block, 0, 0, 0], list(key)
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(b >> 64) ^ x[1] ^ k[0], b & mask, (a >> 64) ^ x[3] ^ k[1], a & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        numbers += x
    return numbers[:count]


ADDRESSES = [(0, "noise", 0, 0), (42, "unet/noise", 17, 3), (-1, "꽃", 10**12, 1)]


@pytest.mark.parametrize("address", ADDRESSES)
def test_uniform_and_normal_by_their_definition(address):
    expected = [((r >> 12) + 0.5) * 2.0**-52 for r in raw(*address, 22)]
    assert Draws(*address).uniform(22).tolist() == expected
    pairs = list(zip(expected[:11], expected[11:], strict=True))
    radii = [math.sqrt(-2 * math.log(u)) for u, _ in pairs]
    normals = [r * math.cos(2 * math.pi * v) for r, (_, v) in zip(radii, pairs, strict=True)]
    normals += [r * math.sin(2 * math.pi * v) for r, (_, v) in zip(radii, pairs, strict=True)]
    drawn = Draws(*address).normal(3, 7)
    assert drawn.dtype == np.float32 and drawn.shape == (3, 7)
    np.testing.assert_allclose(drawn.ravel(), normals[:21], rtol=1e-6, atol=1e-7)
    assert Draws(*address).integer(1000) == int(expected[0] * 1000)


def test_pinned_numbers():
    """Golden: a model trained today must be trained alike in ten years."""
    assert Draws(42, "noise", 17, 3).uniform(3).tolist() == PINNED_UNIFORM
    assert Draws(42, "noise", 17, 3).permutation(8).tolist() == PINNED_ORDER
    np.testing.assert_allclose(Draws(42, "noise", 17, 3).normal(3), PINNED_NORMAL, rtol=1e-6)


PINNED_UNIFORM = [0.29270433602742496, 0.7413151102845762, 0.2593284711155216]
PINNED_ORDER = [4, 2, 0, 3, 5, 1, 6, 7]
PINNED_NORMAL = [-0.09182491153478622, -0.7335516810417175, 1.5648491382598877]


def test_a_stream_goes_on_where_it_was():
    draws = Draws(1, "a")
    parts = np.concatenate([draws.uniform(3), draws.uniform(1), draws.uniform(6)])
    assert parts.tolist() == Draws(1, "a").uniform(10).tolist()


def test_uniform_moments_and_range():
    numbers = Draws(5, "uniform").uniform(200_000)
    assert numbers.min() > 0 and numbers.max() < 1
    distance = kolmogorov(numbers, lambda x: x)
    assert distance < 1.63 / math.sqrt(len(numbers))  # the 1% point of Kolmogorov's distribution


def test_normal_moments_and_distribution():
    numbers = Draws(5, "normal").normal(200_001).astype(np.float64)
    n = len(numbers)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((numbers**power).mean() - moment) < 4 * math.sqrt(variance / n)
    erf = np.vectorize(math.erf)
    assert kolmogorov(numbers, lambda x: (1 + erf(x / math.sqrt(2))) / 2) < 1.63 / math.sqrt(n)
    half = n // 2  # the two halves of Box and Muller are independent
    assert abs(np.corrcoef(numbers[:half], numbers[half + 1 :])[0, 1]) < 4 / math.sqrt(half)


def kolmogorov(numbers, distribution):
    """Largest distance between the empirical distribution and a given one."""
    expected = distribution(np.sort(numbers))
    steps = np.arange(len(numbers) + 1) / len(numbers)
    return max(np.abs(expected - steps[:-1]).max(), np.abs(expected - steps[1:]).max())


def test_addresses_are_independent():
    base = (1, "noise", 2, 3)
    others = [(2, "noise", 2, 3), (1, "time", 2, 3), (1, "noise", 3, 3), (1, "noise", 2, 4)]
    others += [(1, "noise", 23, 0), (12, "noise", 2, 3), (1, "noise", 3, 2)]
    first = Draws(*base).normal(20_000)
    for other in others:
        second = Draws(*other).normal(20_000)
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(20_000)
    heads = [Draws(0, "noise", i).uniform(1)[0] for i in range(5_000)]  # first draws of samples
    assert kolmogorov(np.array(heads), lambda x: x) < 1.63 / math.sqrt(5_000)
    assert abs(np.corrcoef(heads[1:], heads[:-1])[0, 1]) < 4 / math.sqrt(5_000)


def test_integer_is_uniform():
    draws = Draws(3, "integer")
    counts = np.bincount([draws.integer(10) for _ in range(20_000)], minlength=10)
    assert len(counts) == 10
    assert ((counts - 2000) ** 2 / 2000).sum() < 21.67  # chi-squared, 9 degrees, 1% point


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_permutation_is_one(count):
    order = Draws(3, "order").permutation(count)
    assert sorted(order.tolist()) == list(range(count)) and order.dtype == np.int64
    if count == 1000:
        assert (order != np.arange(1000)).mean() > 0.98
        places = [Draws(i, "order").permutation(5).tolist() for i in range(5_000)]
        table = np.stack([np.bincount(column, minlength=5) for column in np.transpose(places)])
        assert ((table - 1000) ** 2 / 1000).sum() < 39.3  # chi-squared, 16 degrees, 0.1% point


def test_image_noise_is_torchs_own():
    """What a user of diffusers gets from the same seed; float32 on the CPU."""
    generator = image_generator(7)
    noise = image_noise(generator, (4, 8, 8))
    reference = torch.Generator().manual_seed(7)
    assert torch.equal(noise, torch.randn(4, 8, 8, generator=reference))
    assert torch.equal(image_noise(generator, (3,)), torch.randn(3, generator=reference))
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"


def test_draws_need_no_torch():
    code = "import sys; from ldm.rng import Draws; Draws(1, 'a').normal(3); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
