"""Counter-based randomness: every draw is a pure function of what it is for.

Training draws are addressed by (seed, purpose, index, visit): the noise of sample 17 on its third
visit is the same on one process or eight, whatever the batch, the workers or the point of resuming.
The address keys a Philox counter generator (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3"), whose raw integers NumPy guarantees for ever; the step from integers to uniform and
normal numbers is spelt out here, because NumPy and torch both reserve the right to change theirs.

Pictures are addressed by a seed alone: `image_generator(seed)` is the generator that diffusers'
users pass, so a seed draws the same starting noise in both.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


class Draws:
    """A stream of random numbers that belongs to one address. Draw from it in a fixed order."""

    def __init__(self, seed: int, purpose: str, index: int = 0, visit: int = 0):
        address = f"{seed}/{purpose}/{index}/{visit}".encode()
        key = hashlib.blake2b(address, digest_size=16).digest()
        self._bits = np.random.Philox(key=np.frombuffer(key, dtype=np.uint64))

    def uniform(self, count: int) -> np.ndarray:
        """`count` float64 numbers, uniform in the open interval (0, 1)."""
        return ((self._bits.random_raw(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def integer(self, high: int) -> int:
        """One integer, uniform in [0, high)."""
        return int(self.uniform(1)[0] * high)

    def normal(self, *shape: int) -> np.ndarray:
        """A float32 array of standard normal numbers (Box and Muller 1958)."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(self.uniform(half)))
        angle = 2.0 * np.pi * self.uniform(half)
        numbers = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        return numbers.astype(np.float32).reshape(shape)

    def permutation(self, count: int) -> np.ndarray:
        """The numbers 0 ... count - 1 in random order, int64."""
        return np.argsort(self.uniform(count), kind="stable")


def image_generator(seed: int) -> torch.Generator:
    """The CPU generator of the picture with this seed; its first draw is the starting noise."""
    import torch

    return torch.Generator("cpu").manual_seed(seed)


def image_noise(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise for one picture, float32 on the CPU, whatever the model runs on."""
    import torch

    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def slerp(a: torch.Tensor, b: torch.Tensor, amount: float) -> torch.Tensor:
    """From noise a to noise b along the great circle, so that what lies between is noise as well.

    Args:
        a: noises, b c h w; each sample turns on a circle of its own.
        b: likewise.
        amount: 0 gives a, 1 gives b.

    Source: Shoemake 1985, section 3.3.
    """

    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()  # b n
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))  # b
    # The least angle stands for none: between equal noises the straight line is the circle.
    angle = cosine.clamp(-1, 1).acos().clamp(min=1e-8)[:, None]  # b 1
    share_a, share_b = ((1 - amount) * angle).sin(), (amount * angle).sin()
    mixed = (share_a * flat_a + share_b * flat_b) / angle.sin()
    return mixed.reshape(a.shape).to(a.dtype)
