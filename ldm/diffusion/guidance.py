"""What stands between a denoiser and a sampler: guidance, dynamic thresholding, inpainting.

`guided` makes a DenoiseFn of a denoiser and its two contexts; the others wrap one DenoiseFn into
another.

Legend: b batch, c channels, h w height and width of the latents, n d length and width of the
context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.denoiser import DenoiseFn, Denoiser
from ldm.diffusion.schedule import per_sample
from ldm.errors import ConfigError


def guided(
    denoiser: Denoiser,
    context: Tensor,
    negative: Tensor | None,
    scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> DenoiseFn:
    """Guidance: uncond + scale * (cond - uncond), both halves in one call of the network.

    The halves meet at the network's own output and not at x0. For fixed (x, sigma) the two are
    the same, x0 being affine in the output, but `rescale` is not affine and is defined there.

    Args:
        denoiser: the network's D(x; sigma).
        context: embeddings of the prompts, b n d.
        negative: embeddings of the negative prompts, b n d; None for no guidance.
        scale: w; at 1 only the conditional half is computed.
        rescale: how far to bring the result's spread back to the conditional half's, in [0, 1].
        interval: guide only where low < sigma <= high; elsewhere the scale is 1.

    Raises:
        ConfigError: no sigma can lie in the interval.

    Source: Ho & Salimans 2022, eq. 6, with scale = 1 + w; Kynkäänniemi et al. 2024, "Applying
    guidance in a limited interval improves sample and distribution quality".
    """
    low, high = interval or (0.0, float("inf"))
    if not 0 <= low < high:
        raise ConfigError(f"guidance: interval is ({low}, {high}]; it must run from 0 or more up")
    if negative is None or scale == 1:
        return lambda x, sigma: denoiser(x, sigma, context)
    both = torch.cat([negative, context])  # 2b n d

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        inside = (low < sigma) & (sigma <= high)  # b
        if not inside.any():
            return denoiser(x, sigma, context)
        scales = per_sample(torch.where(inside, scale, 1.0), x)  # b 1 1 1
        output = denoiser.network_output(x, sigma, both)  # 2b c h w
        uncond, cond = output.chunk(2)  # b c h w
        output = uncond + scales * (cond - uncond)
        if rescale:
            output = rescale_guidance(output, cond, rescale)
        return denoiser.to_x0(output, x, sigma)

    return denoise


def rescale_guidance(output: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """Bring the standard deviation of each sample back towards that of the conditional output.

    Args:
        output: the guided network output, b c h w.
        cond: its conditional half, b c h w.
        rescale: 0 leaves `output` as it is, 1 gives it the standard deviation of `cond`.

    Source: Lin et al. 2024, eq. 15 and 16.
    """
    over = tuple(range(1, output.ndim))
    ratio = cond.std(over, keepdim=True) / output.std(over, keepdim=True)  # b 1 1 1
    return output * (rescale * ratio + 1 - rescale)


def thresholded(denoise: DenoiseFn, percentile: float, limit: float = 1.0) -> DenoiseFn:
    """Dynamic thresholding: keeps x0 within the range of data where strong guidance leaves it.

    Each sample is clipped to [-s, s] and scaled by limit / s, where s is the percentile of its
    |x0|, but at least `limit`.

    Args:
        denoise: (x: b c h w, sigma: b) -> x0: b c h w.
        percentile: share of the values that are not clipped, in (0, 1]; 0.995 in the paper.
        limit: what |x0| does not exceed in the data: 1 for pixels; more for scaled latents, which
            have unit variance.

    Raises:
        ConfigError: the percentile is outside (0, 1], or the limit is not positive.

    Source: Saharia et al. 2022, "Photorealistic text-to-image diffusion models", section 2.3.
    """
    if not 0 < percentile <= 1:
        raise ConfigError(
            f"dynamic threshold: percentile is {percentile}; it must be above 0 and at most 1"
        )
    if limit <= 0:
        raise ConfigError(f"dynamic threshold: limit is {limit}; it must be positive")

    def inner(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = denoise(x, sigma)
        s = torch.quantile(x0.abs().flatten(1), percentile, dim=1).clamp(min=limit)  # b
        s = per_sample(s, x0)  # b 1 1 1
        return x0.clamp(-s, s) * (limit / s)

    return inner


def masked(denoise: DenoiseFn, mask: Tensor, known: Tensor) -> DenoiseFn:
    """Inpainting by any model: x0 is the network's where the mask is 1, and known where it is 0.

    Args:
        denoise: (x: b c h w, sigma: b) -> x0: b c h w.
        mask: what to repaint, in [0, 1], b 1 h w.
        known: scaled latents of the picture, b c h w.

    Source: Lugmayr et al. 2022, "RePaint", eq. 8c, on x0 instead of x.
    """
    return lambda x, sigma: torch.lerp(known, denoise(x, sigma), mask)
