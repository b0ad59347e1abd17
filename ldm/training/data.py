"""The samples of a run and their order, before anything heavy loads: wrong data shows at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from weakref import WeakKeyDictionary

from ldm.data.buckets import Buckets, read_buckets
from ldm.data.order import Bucketed, Order, Shuffled, Streamed, check_length
from ldm.data.sample import DataSource
from ldm.data.sources import first, open_source, split_source
from ldm.data.stored import Reading, Stored
from ldm.data.streams import StreamedShards
from ldm.data.tables import open_hub
from ldm.errors import ConfigError, DataError
from ldm.training.config import TrainingConfig

# Goes with the data sets: a stage that caches its latents asks again, and headers take their time.
_orders: WeakKeyDictionary[DataSource, tuple[TrainingConfig, Order]] = WeakKeyDictionary()


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


def make_order(source: DataSource, config: TrainingConfig) -> Order:
    """The order of a run's training samples.

    Args:
        source: streamed shards come one after the other.
        config: the run's options.

    Raises:
        ConfigError: the options do not allow a square bucket, or want buckets of streamed shards.
        DataError: fewer samples than a batch; or, in buckets, a header that cannot be read, unless
            bad samples are skipped.
    """
    options, order = _orders.get(source, (None, None))
    if order is None or options != config:
        order = _order(source, config)
        _orders[source] = config, order
    return order


def _order(source: DataSource, config: TrainingConfig) -> Order:
    seed, batch_size = config.seed, config.train_batch_size
    if isinstance(source, StreamedShards):
        if config.enable_bucket:
            raise ConfigError(
                "enable_bucket needs every picture's size before the first step, and streamed"
                " shards come one after the other; turn it off, or train from shards on a disk"
            )
        return Streamed(seed, batch_size, tuple(source.shard_lengths))
    if not config.enable_bucket:
        return Shuffled(seed, batch_size, len(source))
    sides = config.min_bucket_reso, config.max_bucket_reso, config.bucket_reso_steps
    buckets = Buckets(config.resolution, *sides, config.bucket_no_upscale)
    skip = config.on_bad_sample == "skip"
    sizes, bucket_of = read_buckets(source, buckets, batch_size, skip=skip)
    return Bucketed(seed, batch_size, bucket_of, sizes)
