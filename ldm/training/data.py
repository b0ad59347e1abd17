"""The samples of a run, opened before anything heavy loads: a wrong folder is refused at once."""

from __future__ import annotations

from pathlib import Path

from ldm.data.order import check_length
from ldm.data.sample import DataSource
from ldm.data.sources import Subset, open_source, split_source
from ldm.training.config import TrainingConfig


def open_data(config: TrainingConfig) -> tuple[DataSource, DataSource]:
    """The training and the validation samples of a run.

    Raises:
        DataError: there are none, or fewer than a batch.
    """
    options = {
        "caption_column": config.caption_column,
        "caption_extension": config.caption_extension,
    }
    if config.train_data_dir == "flowers":
        train = open_source("flowers", split="train")
        validation = open_source("flowers", split="validation")
    elif all((Path(config.train_data_dir) / split).is_dir() for split in ("train", "validation")):
        train = open_source(Path(config.train_data_dir) / "train", **options)
        validation = open_source(Path(config.train_data_dir) / "validation", **options)
    elif config.validation_split == 0:
        train = validation = open_source(config.train_data_dir, **options)
    else:
        source = open_source(config.train_data_dir, **options)
        train, validation = split_source(source, config.validation_split, config.seed)
    if config.max_train_samples:
        train = Subset(train, range(min(config.max_train_samples, len(train))))
    check_length(len(train), config.train_batch_size)
    return train, Subset(validation, range(min(config.validation_samples, len(validation))))
