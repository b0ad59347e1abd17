"""What every data set gives: a `Sample` at each index of a `DataSource`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """One picture with its caption.

    Attributes:
        image: the picture in the mode it is stored in; `ldm.images.to_rgb` makes it RGB.
        caption: what is said of it.
        key: its name in the data set; unique.
    """

    image: Image.Image
    caption: str
    key: str


class DataSource(Protocol):
    """An indexed data set: `source[i]` is always the same sample."""

    @property
    def fingerprint(self) -> str:
        """A hash that names the data and the column of captions; sizes stand for contents."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def key(self, index: int) -> str:
        """The sample's name, without reading its picture."""
        ...

    def caption(self, index: int) -> str:
        """What is said of the sample, without reading its picture."""
        ...

    def label(self, index: int) -> int | None:
        """The sample's class, a number from 0, where the data set is read with classes."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Width and height in pixels of the upright picture, without decoding it."""
        ...
