"""Small models with Stable Diffusion's widths of context, and their files as others write them.

The networks are those of diffusers, transformers and open_clip.
"""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
from open_clip.transformer import TextTransformer
from tiny import randomize
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoint.names import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    ema_name,
    unet_to_theirs,
    vae_to_theirs,
)

VOCABULARY = 600
PROMPTS = ["a red flower", "two blue tulips at night"]
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
EXTRAS = {  # what CompVis's trainer leaves in a file
    "betas": BETAS.float(),
    "alphas_cumprod": torch.cumprod(1 - BETAS, 0).float(),
    "sqrt_recipm1_alphas_cumprod": torch.rand(1000),
    "posterior_mean_coef1": torch.rand(1000),
    "logvar": torch.zeros(1000),
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    "first_stage_model.loss.logvar": torch.tensor(0.1),
}
CLIP_EXTRAS = {CLIP_PREFIX + "embeddings.position_ids": torch.arange(77)[None]}
# narrower than the context, since a tower as wide as SD 2.x's must have its depth too
TOWER: dict[str, Any] = dict(
    vocab_size=VOCABULARY, width=128, heads=2, layers=2, mlp_ratio=1 / 2, output_dim=8
)
OPEN_CLIP_EXTRAS = {OPEN_CLIP_PREFIX + "logit_scale": torch.tensor(4.6)}


@dataclass(frozen=True)
class Dialect:
    """A kind of model: SD 1.x (`version` 1) or 2.x, of so many channels."""

    version: int
    channels: int = 4
    prediction: str = "epsilon"


DIALECTS = {
    "sd1": Dialect(1),
    "sd1 inpainting": Dialect(1, 9),
    "sd2 base": Dialect(2),
    "sd2 v": Dialect(2, 4, "v_prediction"),
    "sd2 inpainting": Dialect(2, 9),
}


@dataclass(frozen=True)
class Networks:
    """diffusers' U-Net, twice, diffusers' autoencoder, and the text tower of either library."""

    unet: nn.Module
    average: nn.Module
    vae: nn.Module
    text: Any


@cache
def networks(dialect: Dialect) -> Networks:
    """Random ones, the same every time."""
    torch.manual_seed(dialect.version)
    first = dialect.version == 1
    unet, average = (
        diffusers.UNet2DConditionModel(
            in_channels=dialect.channels,
            block_out_channels=(32, 64) if first else (64, 128),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=768 if first else 1024,
            attention_head_dim=8 if first else (1, 2),  # their word for the number of heads
            use_linear_projection=not first,
        )
        for _ in range(2)
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, layers_per_block=1,
    )  # fmt: skip
    if first:
        text: nn.Module = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCABULARY, hidden_size=768, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=12, hidden_act="quick_gelu",
                bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1, pad_token_id=0,
            )
        )  # fmt: skip
    else:
        text = TextTransformer(**TOWER)
    for module in (unet, average, vae, text):
        randomize(module)
    return Networks(unet.eval(), average.eval(), vae.eval(), text.eval())


def single_file(dialect: Dialect, dtype: torch.dtype = torch.float32, *, ema: bool = False) -> dict:
    """The tensors of the networks by the names, and with the shapes, of CompVis and Stability."""
    parts = networks(dialect)
    weights = parts.unet.state_dict()
    tensors = {UNET_PREFIX + t: weights[o] for o, t in unet_to_theirs(weights).items()}
    if ema:
        average = parts.average.state_dict()
        tensors |= {ema_name(t): average[o] for o, t in unet_to_theirs(average).items()}
    weights = parts.vae.state_dict()
    for ours, theirs in vae_to_theirs(weights).items():
        convolution = "attn_1" in theirs and weights[ours].ndim == 2
        tensors[VAE_PREFIX + theirs] = weights[ours][(...,) + (None,) * 2 * convolution]
    prefix = CLIP_PREFIX if dialect.version == 1 else OPEN_CLIP_PREFIX
    tensors |= {prefix + name: tensor for name, tensor in parts.text.state_dict().items()}
    return {name: tensor.detach().to(dtype).clone() for name, tensor in tensors.items()}


@torch.no_grad()
def expected(dialect: Dialect, dtype: torch.dtype, *, average: bool = False) -> dict[str, Tensor]:
    """What the networks make of `inputs`, computed in float32 with weights rounded to a dtype."""
    parts = networks(dialect)
    unet, vae, text = (
        rounded(m, dtype) for m in (parts.average if average else parts.unet, parts.vae, parts.text)
    )
    given = inputs(dialect)
    if dialect.version == 1:
        states = text(given["ids"]).last_hidden_state
    else:
        states = text.forward_intermediates(
            given["ids"], indices=[0], stop_early=True, normalize_intermediates=True,
            intermediates_only=True, output_fmt="NLC",
        )["text_intermediates"][0]  # fmt: skip
    return {
        "unet": unet(given["x"], given["t"], given["context"]).sample,
        "encoded": vae.encode(given["images"]).latent_dist.mean,
        "decoded": vae.decode(given["x"][:, :4]).sample,
        "text": states,
    }


@torch.no_grad()
def computed(parts: Any, dialect: Dialect) -> dict[str, Tensor]:
    """The same of ldm's networks."""
    given = inputs(dialect)
    return {
        "unet": parts.unet(given["x"], given["t"], given["context"]),
        "encoded": parts.vae.encode(given["images"]).mean,
        "decoded": parts.vae.decode(given["x"][:, :4]),
        "text": parts.text_encoder.tower.states(given["ids"], 0),
    }


def inputs(dialect: Dialect) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY - 2, (2, 77), generator=generator)
    ids[:, 40:] = VOCABULARY - 1
    return {
        "x": torch.randn(2, dialect.channels, 4, 4, generator=generator),
        "t": torch.tensor([10, 700]),
        "context": torch.randn(2, 7, 768 if dialect.version == 1 else 1024, generator=generator),
        "images": torch.rand(1, 3, 16, 16, generator=generator) * 2 - 1,
        "ids": ids,
    }


def rounded(module: Any, dtype: torch.dtype) -> Any:
    """A copy in float32 of what a dtype has left of its weights."""
    return deepcopy(module).to(dtype).float()
