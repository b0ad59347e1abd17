"""What a training stage has to say for itself; everything else is the loop's business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.data.order import Order, Place
from ldm.data.sample import DataSource
from ldm.data.transforms import prepare
from ldm.rng import Draws
from ldm.training.config import TrainingConfig
from ldm.training.samples import Batch, Samples

if TYPE_CHECKING:
    from PIL.Image import Image


class Stage(ABC):
    """One stage of training: what one step does, nothing more.

    A stage draws no random numbers of its own. Every draw is made by its data set, for one sample,
    at the address (seed, purpose, sample, visit), and travels in the batch; so a step is the same
    however its batch is spread over processes and accumulation.

    Attributes:
        players: the trained modules by name, each with an optimizer of its own. In every step they
            take turns in this order (a GAN has two).
        averaged: the players whose weights are averaged: those that the model is made of.
        tokenizer: the text tower's, where captions are read.
    """

    players: dict[str, nn.Module]
    averaged: tuple[str, ...]
    tokenizer: Any = None

    def __init__(self, config: TrainingConfig):
        self.config = config

    @abstractmethod
    def setup(self, train: DataSource, validation: DataSource, device: Any) -> None:
        """Build what needs the data or the device: frozen models, caches."""

    def frozen(self) -> dict[str, nn.Module]:
        """The models that are used and not trained, by the name of their folder."""
        return {}

    def settings(self) -> dict[str, str]:
        """What else the run depends on and its options do not say, by name."""
        return {}

    @abstractmethod
    def dataset(self, source: DataSource, *, validation: bool) -> Dataset[Batch]:
        """The items of a source; that of a `Place` carries all that a step needs of its sample.

        It is sent to loader workers, so it must pickle. A validation item depends on its index
        alone: the same noise every time, so that the losses of a run compare.
        """

    def samples(
        self, source: DataSource, *, validation: bool, order: Order | None = None
    ) -> Samples:
        """The same items, with what the run says of bad ones."""
        items = self.dataset(source, validation=validation)
        return Samples(items, len(source), self.config.on_bad_sample == "skip", order)

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
    source: DataSource, place: Place, config: TrainingConfig, *, augment: bool
) -> tuple[Tensor, str]:
    """A sample as the run wants it: its picture, float32 in [-1, 1], 3 h w, and its caption.

    Args:
        source: where from.
        place: which sample, at which visit, which decides its crop and flip, and of what size.
        config: resolution, crop, flip.
        augment: whether crop and flip may be random; a validation picture is always the same.

    Raises:
        DataError: the picture cannot be read; the line names it.
    """
    sample = source[place.index]
    pixels = prepare(
        sample.image,
        place.size or (config.resolution, config.resolution),
        center_crop=config.center_crop or not augment,
        random_flip=config.random_flip and augment,
        draws=Draws(config.seed, "augment", place.index, place.visit),
        interpolation=config.image_interpolation_mode,
        key=sample.key,
    )
    return pixels, sample.caption


@dataclass(frozen=True)
class Captioned(Dataset[Batch]):
    """Pixels and their caption, of samples that need no draws besides."""

    source: DataSource
    config: TrainingConfig
    validation: bool

    def __getitem__(self, place: Place) -> Batch:
        augment = not self.validation
        pixels, caption = load_sample(self.source, place, self.config, augment=augment)
        return {"pixels": pixels, "caption": caption}
