"""DDIM inversion: the noise that DDIM turns into given latents."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ldm.diffusion.denoiser import DenoiseFn
from ldm.diffusion.sampling_loop import batch_of
from ldm.errors import ConfigError


def invert_ddim(denoise: DenoiseFn, x: Tensor, sigmas: Tensor, *, iterations: int = 10) -> Tensor:
    """Undo `sample_ddim` with eta 0: find the latents that it leads from sigmas[0] to x.

    Each step is undone exactly, in the limit of many iterations, and not merely retraced with the
    slope of its wrong end. A step y = x + epsilon(x) (sigma_next - sigma) is solved for x by
    x <- x - omega (step(x) - y). The derivative of a step lies between r = sigma_next / sigma and 1
    where that of x0 lies between 0 and 1, as it does for log-concave data; omega = 2 / (1 + r)
    is then the best, and an iteration shrinks the error at least by (1 - r) / (1 + r).

    Args:
        denoise: (x: b c h w, sigma: b) -> x0: b c h w; weak guidance or none inverts best.
        x: latents in sigma space at sigmas[-1], b c h w.
        sigmas: the descending noise levels of the run to undo.
        iterations: network calls a step; with 1 the error is of first order in the steps' length.

    Returns:
        Latents in sigma space at sigmas[0], b c h w.

    Raises:
        ConfigError: fewer than 1 iteration, or the last sigma is 0, where a step forgets x.

    Source: Song et al. 2021, eq. 14; the fixed point is that of Pan et al. 2023, "Effective real
    image editing with accelerated iterative diffusion inversion".
    """
    if iterations < 1:
        raise ConfigError(f"inversion: {iterations} iterations; give at least 1")
    if sigmas[-1] <= 0:
        raise ConfigError(
            "inversion: the last sigma is 0, where a step forgets x; take a grid that ends above it"
        )
    for sigma_next, sigma in pairwise(sigmas.flip(0).tolist()):
        ratio, target = sigma_next / sigma, x
        for _ in range(iterations):
            x0 = denoise(x, batch_of(sigma, x))
            x = x - 2 / (1 + ratio) * (x0 + ratio * (x - x0) - target)
    return x
