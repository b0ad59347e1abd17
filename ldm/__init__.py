"""Text-conditioned latent diffusion: train every stage on your own pictures, then draw with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LatentDiffusionPipeline", "__version__"]

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline


def __getattr__(name: str) -> Any:
    # The pipeline imports torch, which takes over a second: only those who ask for it pay.
    if name == "LatentDiffusionPipeline":
        from ldm.pipeline import LatentDiffusionPipeline

        return LatentDiffusionPipeline
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
