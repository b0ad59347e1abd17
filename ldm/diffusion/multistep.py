"""Multistep samplers: they gain an order or more from what the steps before them saw.

`plms` and `lms` extend the slope epsilon = (x - x0) / sigma as a polynomial over sigma; the
DPM-Solver++ family extends x0 over lambda = -log sigma and solves the rest of the ODE exactly.

Legend: b batch, c channels, h w height and width of the latents.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import reduce
from math import log

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.denoiser import DenoiseFn
from ldm.diffusion.one_step import ancestral_step
from ldm.diffusion.sampling_loop import NoiseFn, Step, batch_of, sampler

ADAMS_BASHFORTH = (
    (1,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the slopes, newest first, for orders 1 to 4 on an even grid."""

Past = deque[tuple[float, Tensor]]
"""(sigma, x0) of the last two steps, newest first."""


@sampler
def sample_plms(denoise: DenoiseFn, sigmas: Tensor, noise: NoiseFn) -> Step:
    """Pseudo linear multistep: Euler with the slope extended over four steps as if evenly spaced.

    The first step of several is Heun's, with one network call more, as in CompVis's and diffusers'.
    (The Keras DDIM example's multistep sampling is the same without that.) The slope is always that
    of epsilon, where diffusers extends v for a model that predicts v. Arguments as Euler's.

    Source: Liu et al. 2022, "Pseudo numerical methods for diffusion models", eq. 9 and 12.
    """
    slopes: deque[Tensor] = deque(maxlen=4)  # newest first

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        slopes.appendleft((x - x0) / sigma)
        d = _weighted(ADAMS_BASHFORTH[len(slopes) - 1], slopes)
        if len(slopes) == 1 and len(sigmas) > 2:
            x_next = x + d * (sigma_next - sigma)
            d_next = (x_next - denoise(x_next, batch_of(sigma_next, x))) / sigma_next
            d = (d + d_next) / 2
        return x + d * (sigma_next - sigma)

    return step


@sampler
def sample_lms(denoise: DenoiseFn, sigmas: Tensor, noise: NoiseFn) -> Step:
    """Linear multistep: integrates the cubic through the last four slopes. Arguments as Euler's.

    Source: k-diffusion, `sample_lms` with order 4.
    """
    slopes: deque[Tensor] = deque(maxlen=4)  # newest first
    nodes: deque[float] = deque(maxlen=4)  # the sigmas they were seen at

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        slopes.appendleft((x - x0) / sigma)
        nodes.appendleft(sigma)
        # weights that integrate 1, u, u^2, u^3 exactly, with u from 0 at sigma to 1 at sigma_next
        u = (np.array(nodes) - sigma) / (sigma_next - sigma)
        moments = 1 / np.arange(1, len(u) + 1)
        weights = np.linalg.solve(np.vander(u, increasing=True).T, moments)
        return x + _weighted(weights.tolist(), slopes) * (sigma_next - sigma)

    return step


@sampler
def sample_dpmpp_2m(denoise: DenoiseFn, sigmas: Tensor, noise: NoiseFn) -> Step:
    """DPM-Solver++(2M): second order from the x0 of the step before. Arguments as Euler's.

    The first step and a step to sigma 0, where lambda is infinite, are of first order.

    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2, with lambda = -log sigma.
    """
    past: Past = deque(maxlen=2)

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        if sigma_next == 0:
            return x0
        past.appendleft((sigma, x0))
        D = _x0_halfway(past, sigma_next)
        return sigma_next / sigma * x + (1 - sigma_next / sigma) * D

    return step


@sampler
def sample_dpmpp_2m_sde(denoise: DenoiseFn, sigmas: Tensor, noise: NoiseFn) -> Step:
    """DPM-Solver++(2M) SDE: an ancestral step with the x0 of `sample_dpmpp_2m`.

    Source: k-diffusion, `sample_dpmpp_2m_sde` with its midpoint solver and eta 1.
    """
    past: Past = deque(maxlen=2)

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        if sigma_next == 0:
            return x0
        past.appendleft((sigma, x0))
        return ancestral_step(x, _x0_halfway(past, sigma_next), sigma, sigma_next, noise())

    return step


@sampler
def sample_unipc(denoise: DenoiseFn, sigmas: Tensor, noise: NoiseFn) -> Step:
    """UniPC of order 2 with B(h) = e^h - 1: `sample_dpmpp_2m`, each step corrected in the next one.

    The x0 that a step arrives at costs no call of its own: the next step needs it anyway. What a
    callback sees is not yet corrected. Arguments as Euler's.

    Source: Zhao et al. 2023, "UniPC", algorithms 1 (the corrector, UniC) and 2 (UniP) with B_2(h),
    predicting x0.
    """
    past: Past = deque(maxlen=2)

    def step(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
        if sigma_next == 0:
            return x0
        if past:
            x = x + _unic_correction(past, x0, sigma)
        past.appendleft((sigma, x0))
        D = _x0_halfway(past, sigma_next)
        return sigma_next / sigma * x + (1 - sigma_next / sigma) * D

    return step


def _weighted(weights: Iterable[float], slopes: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, (w * d for w, d in zip(weights, slopes, strict=True)))


def _x0_halfway(past: Past, sigma_next: float) -> Tensor:
    """x0 halfway to sigma_next in lambda, on the line through the last two, where there are two."""
    sigma, x0 = past[0]
    if len(past) == 1:
        return x0
    sigma_last, x0_last = past[1]
    return x0 + log(sigma / sigma_next) / log(sigma_last / sigma) / 2 * (x0 - x0_last)


def _unic_correction(past: Past, x0: Tensor, sigma: float) -> Tensor:
    """What the step that arrived at sigma would have added, had it known the x0 there."""
    sigma_last, x0_last = past[0]
    h = log(sigma_last / sigma)
    share = 1 - sigma / sigma_last
    if len(past) == 1:  # x0 is linear in lambda over the step
        return share / 2 * (x0 - x0_last)
    # x0 is quadratic in u, which is -q, 0 and 1 at the three; D1 is what the predictor took for
    # its change over the step. Means are over the step, where e^lambda is the weight.
    sigma_before, x0_before = past[1]
    q = log(sigma_before / sigma_last) / h
    D1 = (x0_last - x0_before) / q
    mean_u = 1 / share - 1 / h
    mean_u2 = 1 / share - 2 / h * mean_u
    rho = (mean_u - mean_u2) / (1 + q)
    return share * ((rho - 1 / 2) * D1 + (mean_u - rho) * (x0 - x0_last))
