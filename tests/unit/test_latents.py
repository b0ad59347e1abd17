"""The cache of latents: what it holds, what it goes on with, and what it refuses."""

import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers.normalizers import Lowercase
from torch import Tensor

from ldm.data import latents
from ldm.data.flowers import Flowers
from ldm.data.latents import LatentCache, Team, cache_key, write_cache
from ldm.data.order import Place
from ldm.data.streams import StreamedShards
from ldm.errors import CheckpointError, DataError

KEY = {"format": "1", "VAE": "ab12", "text encoder": "ef56", "preprocessing": "8 pixels"}
SIZES = [(8, 8), (4, 12)]
PLACES = [Place(i, size=SIZES[i % 3 == 0]) for i in range(14)]
CAPTIONS = ["a rose", "", "a lily", "a rose"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 4 samples, the last of 2; two pictures of 8 x 8 at a time; two captions."""
    monkeypatch.setattr(latents, "SHARD", 4)
    monkeypatch.setattr(latents, "PIXELS", 3 * 2 * 64 // 3)
    monkeypatch.setattr(latents, "CAPTIONS", 2)


def picture(place: Place) -> Tensor:
    height, width = place.size or (0, 0)
    return torch.arange(3.0 * height * width).reshape(3, height, width).sin() + place.index


def encode(pixels: Tensor) -> Tensor:
    """What stands in for a VAE: pictures of 2 x 2 latents for 4 x 4 pixels, unlike if mirrored."""
    return torch.cat([pixels[..., ::4, ::4], pixels[..., 1::4, 1::4].cos()], dim=1)


def embed(words: list[str]) -> Tensor:
    return torch.tensor([[[len(w) + 0.5, w.count("r")]] * 3 for w in words])  # b n d


class Run:
    """`write_cache` with the above, which counts what it reads and can be killed."""

    def __init__(self, kill_at: int | None = None, bad: tuple[int, ...] = ()):
        self.read: list[int] = []
        self.kill_at, self.bad = kill_at, bad

    def load(self, places: list[Place]) -> AbstractContextManager[Iterator[Any]]:
        return closing(self._batch(place) for place in places)

    def _batch(self, place: Place) -> dict[str, Any]:
        if place.index == self.kill_at:
            raise KeyboardInterrupt
        self.read.append(place.index)
        bad = f"{place.index}.png: the picture is damaged" if place.index in self.bad else ""
        caption = CAPTIONS[place.index % 4]
        return {"pixels": picture(place)[None], "caption": [caption], "bad": [bad]}

    def __call__(self, folder: Path, key: dict[str, str] = KEY, **options: Any) -> LatentCache:
        options = {"flips": True} | options
        return write_cache(folder, key, PLACES, self.load, encode, embed, **options)


def files(folder: Path) -> dict[str, Any]:
    """All there is, but for the order of a header's entries, which safetensors leaves open."""
    found: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        with safe_open(file, "pt") as shard:
            tensors = {name: shard.get_tensor(name).tolist() for name in shard.keys()}  # noqa: SIM118
            found[file.name] = (tensors, shard.metadata())
    return found


def test_each_sample_is_what_it_is_alone(tmp_path):
    cache = pickle.loads(pickle.dumps(Run()(tmp_path)))
    for place in PLACES:
        pixels = picture(place)[None]
        for flipped, view in ((False, pixels), (True, pixels.flip(-1))):
            for empty, words in ((False, CAPTIONS[place.index % 4]), (True, "")):
                moments, context = cache.read(place.index, flipped=flipped, empty=empty)
                assert torch.equal(moments, encode(view)[0])
                assert torch.equal(context, embed([words])[0])
    with safe_open(tmp_path / "latents-00000.safetensors", "pt") as shard:
        assert len(shard.get_tensor("contexts")) == 3  # "", a rose, a lily
        assert shard.get_tensor("captions").tolist() == [1, 0, 2, 1]


def test_without_flips_none_are_kept(tmp_path):
    Run()(tmp_path, flips=False)
    with safe_open(tmp_path / "latents-00003.safetensors", "pt") as shard:
        assert sorted(shard.keys()) == ["12.moments", "13.moments", "captions", "contexts"]


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Run(kill_at=9)(tmp_path / "killed")
    assert sorted(files(tmp_path / "killed")) == [f"latents-0000{i}.safetensors" for i in (0, 1)]
    again = Run()
    again(tmp_path / "killed")
    assert again.read == [8, 9, 10, 11, 12, 13]
    Run()(tmp_path / "whole")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    nothing = Run()
    nothing(tmp_path / "whole")
    assert nothing.read == []


def test_two_processes_write_the_files_of_one(tmp_path):
    """One after the other, the second one first."""
    Run()(tmp_path / "one")
    second, first = Run(), Run()
    second(tmp_path / "two", team=Team(1, 2))
    assert second.read == [4, 5, 6, 7, 12, 13]
    seen = []
    first(tmp_path / "two", team=Team(0, 2, lambda: seen.append(files(tmp_path / "two"))))
    assert first.read == [0, 1, 2, 3, 8, 9, 10, 11]
    assert seen == [files(tmp_path / "one")]


@pytest.mark.parametrize("part", KEY)
@pytest.mark.parametrize("killed", [False, True])
def test_what_something_else_made_is_refused(tmp_path, part, killed):
    if killed:
        with pytest.raises(KeyboardInterrupt):
            Run(kill_at=6)(tmp_path)
    else:
        Run()(tmp_path)
    before = files(tmp_path)
    words = rf"with another {part} \({KEY[part]} then, cd34 now\); delete it or choose another lat"
    run = Run()
    with pytest.raises(CheckpointError, match=words) as error:
        run(tmp_path, KEY | {part: "cd34"}, team=Team(1, 2))  # whose shards may not be there yet
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert run.read == [] and files(tmp_path) == before


@pytest.mark.parametrize("harm", ["a bit", "its end", "its head", "all of it", "gone"])
def test_only_a_damaged_shard_is_written_again(tmp_path, harm, caplog):
    Run()(tmp_path)
    before, file = files(tmp_path), tmp_path / "latents-00002.safetensors"
    content = bytearray(file.read_bytes())
    if harm == "a bit":
        content[-5] ^= 4
    elif harm == "its end":
        del content[-5:]
    elif harm == "its head":
        content[3] = 255
    elif harm == "all of it":
        content.clear()
    file.write_bytes(content)
    if harm == "gone":
        file.unlink()
    run = Run()
    cache = run(tmp_path)
    assert run.read == [8, 9, 10, 11]
    assert files(tmp_path) == before
    assert ("is damaged; it is written again" in caplog.text) == (harm != "gone")
    assert torch.equal(cache.read(11)[0], encode(picture(PLACES[11])[None])[0])


def test_a_bad_sample_is_told_of_when_it_is_asked_for(tmp_path):
    cache = Run(bad=(2, 12, 13))(tmp_path)
    for index in range(14):
        if index in (2, 12, 13):
            for options in ({}, {"flipped": True}, {"empty": True}):
                with pytest.raises(DataError, match=rf"^{index}\.png: the picture is damaged$"):
                    cache.read(index, **options)
        else:
            assert torch.equal(cache.read(index)[0], encode(picture(PLACES[index])[None])[0])


def test_bad_samples_that_can_be_read_now(tmp_path):
    Run(bad=(2, 12, 13))(tmp_path / "mended")
    before, still = files(tmp_path / "mended"), Run(bad=(2, 12, 13))
    still(tmp_path / "mended")
    assert still.read == [2, 12, 13] and files(tmp_path / "mended") == before
    again = Run(bad=(2,))
    again(tmp_path / "mended")
    assert again.read == [2, 12, 13, 12, 13]
    Run(bad=(2,))(tmp_path / "whole")
    assert files(tmp_path / "mended") == files(tmp_path / "whole")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_of_something_else_stays(tmp_path, metadata):
    file = tmp_path / "latents-00001.safetensors"
    save_file({"a": torch.zeros(2)}, file, metadata)
    content = file.read_bytes()
    with pytest.raises(CheckpointError, match="00001.safetensors is of no cache") as error:
        Run()(tmp_path)
    assert "\n" not in str(error.value) and file.read_bytes() == content


class Reworded(Flowers):
    """The flowers, with one caption that cannot be read."""

    def caption(self, index: int) -> str:
        if index == 3:
            raise DataError("the caption is not UTF-8 text")
        return super().caption(index)


def test_the_captions_of_streams_are_not_read(tiny_pipeline):
    """For this every shard would have to be fetched; the column is in the fingerprint."""
    stream = MagicMock(spec=StreamedShards, fingerprint="a" * 32)
    stream.__len__.return_value = 5
    cache_key(tiny_pipeline.vae, tiny_pipeline.text_encoder, stream, "32 pixels")
    stream.caption.assert_not_called()


def test_the_key_names_what_has_changed(tiny_pipeline):
    """One number of the weights, one word of the configuration, one sample of the data."""
    vae, text, data = tiny_pipeline.vae, tiny_pipeline.text_encoder, Flowers(8)
    key = cache_key(vae, text, data, "32 pixels")
    assert cache_key(deepcopy(vae), deepcopy(text), Flowers(8), "32 pixels") == key

    def changed(*parts: Any) -> list[str]:
        now = cache_key(*parts)
        return [name for name in key if now[name] != key[name]]

    other: Any = deepcopy(vae)
    other.encoder.conv_in.bias.data[0] += 1e-7
    assert changed(other, text, data, "32 pixels") == ["VAE"]
    other = deepcopy(vae)
    other.config = replace(vae.config, norm_num_groups=4)
    assert changed(other, text, data, "32 pixels") == ["VAE"]
    other = deepcopy(text)
    other.tower.table.weight.data[7, 3] += 1e-6
    assert changed(vae, other, data, "32 pixels") == ["text encoder"]
    for change in (
        lambda text: setattr(text, "skip", 1),
        lambda text: setattr(text.tower, "padding", 0),
        lambda text: setattr(
            text.tower.model, "config", replace(text.tower.model.config, hidden_act="gelu")
        ),
        lambda text: setattr(text.tower.tokenizer.bpe, "normalizer", Lowercase()),
    ):
        other = deepcopy(text)
        change(other)
        assert changed(vae, other, data, "32 pixels") == ["text encoder"]
    assert changed(vae, text, Flowers(9), "32 pixels") == ["data set", "set of captions"]
    assert changed(vae, text, Reworded(8), "32 pixels") == ["set of captions"]
    assert changed(vae, text, data, "64 pixels") == ["preprocessing"]
