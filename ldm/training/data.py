"""The samples of a run, opened before anything heavy loads: a wrong folder is refused at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from ldm.data.order import check_length
from ldm.data.sample import DataSource
from ldm.data.sources import first, open_source, split_source
from ldm.data.stored import Reading, Stored
from ldm.data.tables import open_hub
from ldm.errors import DataError
from ldm.training.config import TrainingConfig


def open_data(config: TrainingConfig) -> tuple[DataSource, DataSource]:
    """The training and the validation samples of a run.

    Raises:
        ConfigError: an address that cannot be streamed from.
        DataError: there are none, or fewer than a batch; or some cannot be used, and
            `on_bad_sample` is `stop`.
    """
    known = {field.name for field in fields(Reading)}
    reading = Reading(**{name: value for name, value in vars(config).items() if name in known})
    root = Path(config.train_data_dir)
    if config.dataset_name:
        train = validation = open_hub(config.dataset_name, config.dataset_config_name, reading)
    elif config.train_data_dir == "flowers":
        train, validation = (open_source("flowers", split=s) for s in ("train", "validation"))
    elif all((root / split).is_dir() for split in ("train", "validation")):
        train, validation = (open_source(root / s, reading) for s in ("train", "validation"))
        stored = [source for source in (train, validation) if isinstance(source, Stored)]
        if reading.class_column == "folder" and stored[0].classes != stored[-1].classes:
            raise DataError(f"{root}: train and validation have other folders; make them the same")
    else:
        train = validation = open_source(config.train_data_dir, reading)
    if train is validation and config.validation_split:
        train, validation = split_source(train, config.validation_split, config.seed)
    if config.max_train_samples:
        train = first(train, config.max_train_samples)
    check_length(len(train), config.train_batch_size)
    return train, first(validation, config.validation_samples)
