"""Classifier-free guidance: wraps a denoiser and its two contexts into one DenoiseFn.

Legend: b batch, c channels, h w height and width of the latents, n d length and width of the
context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.denoiser import DenoiseFn, Denoiser


def guided(
    denoiser: Denoiser,
    context: Tensor,
    negative: Tensor | None,
    scale: float,
    *,
    rescale: float = 0.0,
) -> DenoiseFn:
    """uncond + scale * (cond - uncond), both halves in one call of the network.

    The halves meet at the network's own output and not at x0. For fixed (x, sigma) the two are
    the same, x0 being affine in the output, but `rescale` is not affine and is defined there.

    Args:
        denoiser: the network's D(x; sigma).
        context: embeddings of the prompts, b n d.
        negative: embeddings of the negative prompts, b n d; None for no guidance.
        scale: w; at 1 only the conditional half is computed.
        rescale: how far to bring the result's spread back to the conditional half's, in [0, 1].

    Source: Ho & Salimans 2022, eq. 6, with scale = 1 + w.
    """
    if negative is None or scale == 1:
        return lambda x, sigma: denoiser(x, sigma, context)
    both = torch.cat([negative, context])  # 2b n d

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        output = denoiser.network_output(torch.cat([x, x]), sigma.repeat(2), both)  # 2b c h w
        uncond, cond = output.chunk(2)  # b c h w
        output = uncond + scale * (cond - uncond)
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
