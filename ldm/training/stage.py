"""What a training stage has to say for itself; everything else is the loop's business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.data.sample import DataSource
from ldm.data.transforms import prepare
from ldm.rng import Draws
from ldm.training.config import TrainingConfig

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = dict[str, Any]
"""Tensors whose first dimension is the sample, and lists of as many strings."""


class Stage(ABC):
    """One stage of training: what one step does, nothing more.

    A stage draws no random numbers of its own. Every draw is made by its data set, for one sample,
    at the address (seed, purpose, sample, visit), and travels in the batch; so a step is the same
    however its batch is spread over processes and accumulation.

    Attributes:
        players: the trained modules by name, each with an optimizer of its own. In every step they
            take turns in this order (a GAN has two).
        averaged: the players whose weights are averaged: those that the model is made of.
    """

    players: dict[str, nn.Module]
    averaged: tuple[str, ...]

    def __init__(self, config: TrainingConfig):
        self.config = config

    @abstractmethod
    def setup(self, train: DataSource, validation: DataSource, device: Any) -> None:
        """Build what needs the data or the device: frozen models, caches."""

    @abstractmethod
    def dataset(self, source: DataSource, *, validation: bool) -> Dataset[Batch]:
        """The items of a source; item (index, visit) carries all that a step needs of a sample.

        It is sent to loader workers, so it must pickle. A validation item depends on its index
        alone: the same noise every time, so that the losses of a run compare.
        """

    @abstractmethod
    def loss(self, player: str, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalars of this player's turn, each a mean over the batch; `loss` is descended."""

    @abstractmethod
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Figures of the samples of a validation batch, each of shape b; `loss` is one."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model, as its weights are now, into a folder that `from_pretrained` reads."""

    def preview(self) -> Image | None:
        """A picture of what the model can do now."""
        return None

    def active(self, step: int) -> list[str]:
        """The players that take their turn at this step."""
        return list(self.players)

    def parameter_groups(self, player: str) -> list[dict[str, Any]]:
        """What the player's AdamW is given: `params`, and `base_lr`, their rate after warm-up."""
        return [{"params": self.players[player].parameters(), "base_lr": self.config.learning_rate}]


def load_sample(
    source: DataSource, index: int, visit: int, config: TrainingConfig, *, augment: bool
) -> tuple[Tensor, str]:
    """A sample as the run wants it: its picture, float32 in [-1, 1], 3 h w, and its caption.

    Args:
        source: where from.
        index: which sample.
        visit: how often it has been seen, which decides its crop and flip.
        config: resolution, crop, flip.
        augment: whether crop and flip may be random; a validation picture is always the same.

    Raises:
        DataError: the picture cannot be read; the line names it.
    """
    sample = source[index]
    pixels = prepare(
        sample.image,
        config.resolution,
        center_crop=config.center_crop or not augment,
        random_flip=config.random_flip and augment,
        draws=Draws(config.seed, "augment", index, visit),
        interpolation=config.image_interpolation_mode,
        key=sample.key,
    )
    return pixels, sample.caption
