"""What a network may predict (epsilon, v, x0, and its variance), and how each becomes the others.

At the VP scale x_t = alpha x0 + sigma_rate epsilon, with alpha = sqrt(abar) and
sigma_rate = sqrt(1 - abar), so that alpha^2 + sigma_rate^2 = 1; and
v = alpha epsilon - sigma_rate x0 (Salimans & Ho 2022, appendix D).

Legend: b batch, c channels, h w height and width of the latents. `alpha` and `sigma_rate` are
b 1 1 1, or anything else that broadcasts against b c h w.
"""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from ldm.config import Prediction
from ldm.errors import ConfigError, suggest


def to_x0(
    output: Tensor,
    x_t: Tensor,
    alpha: Tensor,
    sigma_rate: Tensor,
    prediction: Prediction,
) -> Tensor:
    """The clean latents that a network's output means.

    Args:
        output: what the network returned, b c h w.
        x_t: noisy latents at the VP scale, b c h w.
        alpha: signal rate sqrt(abar).
        sigma_rate: noise rate sqrt(1 - abar).
        prediction: what `output` is.

    Raises:
        ConfigError: `prediction` is not one of the three.

    Source: Ho et al. 2020, eq. 15; Salimans & Ho 2022, appendix D.
    """
    match prediction:
        case "epsilon":
            return (x_t - sigma_rate * output) / alpha
        case "v_prediction":
            return alpha * x_t - sigma_rate * output
        case "sample":
            return output
    raise _unknown(prediction)


def from_x0(
    x0: Tensor, x_t: Tensor, alpha: Tensor, sigma_rate: Tensor, prediction: Prediction
) -> Tensor:
    """The network output that means `x0`: undoes `to_x0`. Arguments and Raises as there."""
    match prediction:
        case "epsilon":
            return (x_t - alpha * x0) / sigma_rate
        case "v_prediction":  # alpha epsilon - sigma_rate x0 with epsilon as above
            return (alpha * x_t - x0) / sigma_rate
        case "sample":
            return x0
    raise _unknown(prediction)


def training_target(
    x0: Tensor, noise: Tensor, alpha: Tensor, sigma_rate: Tensor, prediction: Prediction
) -> Tensor:
    """What the network should return for x_t = alpha x0 + sigma_rate noise, b c h w.

    Raises:
        ConfigError: `prediction` is not one of the three.

    Source: Ho et al. 2020, eq. 14 (epsilon); Salimans & Ho 2022, appendix D (v).
    """
    match prediction:
        case "epsilon":
            return noise
        case "v_prediction":
            return alpha * noise - sigma_rate * x0
        case "sample":
            return x0
    raise _unknown(prediction)


def interpolated_variance(output: Tensor, small: Tensor | float, large: Tensor | float) -> Tensor:
    """The variance of a step, of a network that predicts it: `small` at -1, `large` at 1.

    Args:
        output: the second half of what the network returned, b c h w.
        small: beta tilde, b 1 1 1.
        large: beta, likewise; on the way the variance's logarithm is linear in the output.

    Source: Nichol & Dhariwal 2021, eq. 15, whose v is (output + 1) / 2 in its authors' code.
    """
    return small * (large / small) ** ((output + 1) / 2)


def to_vp(x: Tensor, sigma: float) -> Tensor:
    """From sigma space to the VP scale: x / sqrt(1 + sigma^2). Nothing changes at sigma 0."""
    return x / (1 + sigma**2) ** 0.5


def from_vp(x_t: Tensor, sigma: float) -> Tensor:
    """From the VP scale to sigma space: x_t sqrt(1 + sigma^2)."""
    return x_t * (1 + sigma**2) ** 0.5


def _unknown(prediction: str) -> ConfigError:
    hint = suggest(prediction, get_args(Prediction))
    return ConfigError(f"schedule: there is no prediction_type '{prediction}'; {hint}")
