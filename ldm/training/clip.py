"""The `clip` stage: a small CLIP from scratch, whose text tower then conditions the U-Net.

Source: Radford et al. 2021, section 2.3 and figure 3.

Legend: b batch, n tokens of a caption, d width of the shared space, g global batch.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint.folder import make_text_encoder, read_config, save_text_encoder
from ldm.checkpoint.tokenizer import clip_tokenizer, write_tokenizer
from ldm.config import ClipConfig, TowerConfig
from ldm.data.sample import DataSource
from ldm.models.clip import ClipTextConfig
from ldm.training.config import ClipTraining
from ldm.training.samples import Batch
from ldm.training.stage import Captioned, Stage

if TYPE_CHECKING:
    from transformers import CLIPModel

# What CLIP normalises pictures by (Radford et al. 2021): saved in the vision tower's preprocessor.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MAX_TEMPERATURE = 100.0  # the logits' scale is clipped here, as in the paper


class ClipStage(Stage):
    """Trains both towers of a transformers CLIPModel."""

    config: ClipTraining

    def __init__(self, config: ClipTraining):
        super().__init__(config)
        torch.manual_seed(config.seed)
        clip = config.clip
        self.tokenizer = clip_tokenizer(clip.vocab_size, clip.max_position_embeddings)
        self.clip = build_clip(clip)
        if config.gradient_checkpointing:
            self.clip.gradient_checkpointing_enable()
        self.players, self.averaged = {"clip": self.clip}, ("clip",)

    def parameter_groups(self, player: str) -> list[dict[str, Any]]:
        text = list(self.clip.text_model.parameters())
        of_text = {id(parameter) for parameter in text}
        rest = [p for p in self.clip.parameters() if id(p) not in of_text]
        base, slow = self.config.learning_rate, self.config.text_encoder_lr
        return [
            {"params": text, "base_lr": base if slow is None else slow},
            {"params": rest, "base_lr": base},
        ]

    def setup(self, train: DataSource, validation: DataSource, device: torch.device) -> None:
        self.mean = torch.tensor(MEAN, device=device).reshape(1, 3, 1, 1)
        self.std = torch.tensor(STD, device=device).reshape(1, 3, 1, 1)

    def dataset(self, source: DataSource, *, validation: bool) -> Captioned:
        return Captioned(source, self.config, validation)

    def loss(self, player: str, batch: Batch, step: int) -> dict[str, Tensor]:
        images, texts, scale = self._embed(self.players["clip"], batch)  # b d, b d
        images, texts = _gather(images), _gather(texts)  # g d
        logits = _logits(images, texts, scale)  # g g
        own = torch.arange(len(logits), device=logits.device)
        loss = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
        accuracy = (logits.argmax(1) == own).float().mean()
        return {"loss": loss, "accuracy": accuracy}

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """The contrastive loss and the share of pictures that find their caption, in this batch."""
        images, texts, scale = self._embed(self.clip, batch)
        logits = _logits(images, texts, scale)  # b b
        own = torch.arange(len(logits), device=logits.device)
        both = F.cross_entropy(logits, own, reduction="none")
        both = both + F.cross_entropy(logits.T, own, reduction="none")
        return {"loss": both / 2, "accuracy": (logits.argmax(1) == own).float()}

    def save(self, folder: Path) -> None:
        """Write `clip/` (both towers), and `text_encoder/` and `tokenizer/` for the U-Net stage."""
        from transformers import CLIPImageProcessor

        text, where = self.clip.text_model, folder / "text_encoder"
        config = read_config(ClipTextConfig, text.config.to_dict(), where)
        encoder = make_text_encoder(config, text.state_dict(), self.tokenizer, where)
        save_text_encoder(encoder, where, folder / "tokenizer")
        self.clip.save_pretrained(folder / "clip")
        write_tokenizer(self.tokenizer, folder / "clip")
        size = self.config.clip.image_size
        CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size=size, image_mean=list(MEAN), image_std=list(STD)
        ).save_pretrained(folder / "clip")

    def _embed(self, clip: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of pictures and of captions, b d each, and the scale of their logits."""
        pixels = ((batch["pixels"] + 1) / 2 - self.mean) / self.std  # b 3 h w
        # padded to the longest, for what follows the end token changes nothing before it
        tokens = self.tokenizer.rows(batch["caption"]).to(pixels.device)  # b n
        output = clip(input_ids=tokens, pixel_values=pixels)
        scale = self.clip.logit_scale.exp()
        return output.image_embeds.to(pixels.dtype), output.text_embeds.to(pixels.dtype), scale


def build_clip(config: ClipConfig) -> CLIPModel:
    """A transformers CLIPModel with random weights."""
    from transformers import CLIPConfig, CLIPModel

    start, end = config.vocab_size - 2, config.vocab_size - 1
    text = _tower(config.text, config.projection_dim) | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = _tower(config.vision, config.projection_dim) | {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    clip = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.projection_dim)
    )
    # Words start far apart and stay so (CLIP's own deviation of 0.02 suits large data): a U-Net can
    # then tell a rose from a tulip also in a colour that it never saw it in.
    embeddings = clip.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=1.0)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.1)
    return clip


def _tower(config: TowerConfig, projection_dim: int) -> dict[str, Any]:
    return asdict(config) | {
        "intermediate_size": 4 * config.hidden_size,
        "projection_dim": projection_dim,
    }


def _logits(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """How well each picture fits each caption, g d and g d -> g g; in float32, being up to 100."""
    with torch.autocast(images.device.type, enabled=False):
        return scale.clamp(max=MAX_TEMPERATURE) * images @ texts.T


def _gather(vectors: Tensor) -> Tensor:
    """The rows of all processes, in order, with their gradients: b d -> g d."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return vectors
    return torch.cat(dist_nn.all_gather(vectors))
