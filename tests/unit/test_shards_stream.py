"""Shards behind addresses, served by this process: the samples of local ones, on little disk."""

import importlib
import json
import multiprocessing
import pickle
import socket
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from layouts import error, png, tar, write

from ldm.data import streams
from ldm.data.shards import TarShards
from ldm.data.sources import first, open_source, split_source
from ldm.data.stored import Reading
from ldm.data.streams import StreamedShards
from ldm.errors import ConfigError
from ldm.training.config import TrainingConfig
from ldm.training.data import open_data

ROOT = Path(__file__).parents[2]
COUNTS = (3, 2, 4, 1)


class _Server(ThreadingHTTPServer):
    """Serves a folder; the first requests for the names in `failing` get a 503."""

    def __init__(self, folder: Path):
        self.asked: list[str] = []
        self.failing: dict[str, int] = {}
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *arguments):
                super().__init__(*arguments, directory=str(folder))

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                server.asked.append(name)
                if server.failing.get(name, 0):
                    server.failing[name] -= 1
                    self.send_error(503)
                else:
                    super().do_GET()

            def log_message(self, *_) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server of four shards, their folder, and no waiting between attempts."""
    folder = tmp_path / "shards"
    number = 0
    for shard, count in enumerate(COUNTS):
        members = []
        for _ in range(count):
            number += 1
            members += [(f"{number}.png", png(number, 40)), (f"{number}.txt", f"words {number}")]
            members += [(f"{number}.json", json.dumps({"kind": number}))]
        tar(folder / f"{shard:05d}.tar", members)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(streams, "BACKOFF", (0.0, 0.0, 0.0))
    server = _Server(folder)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server, folder
    server.shutdown()
    server.server_close()


def _told(folder: Path, **changes: dict) -> None:
    """The index that `prepare_data.py` writes, with some changes."""
    rows = {
        f"{n:05d}.tar": {"samples": count, "size": (folder / f"{n:05d}.tar").stat().st_size}
        for n, count in enumerate(COUNTS)
    }
    write(folder / "index.json", json.dumps({"shards": rows | changes}))


def _cached(source: StreamedShards) -> list[Path]:
    return sorted(source._cache.folder.glob("*.tar"))


def test_same_samples_as_local_shards(served, monkeypatch: pytest.MonkeyPatch) -> None:
    server, folder = served
    monkeypatch.syspath_prepend(ROOT / "scripts")
    importlib.import_module("prepare_data").main([str(folder)])
    reading = Reading(class_column="kind")
    here = TarShards(folder, reading)
    there = open_source(f"{server.address}/{{00000..00003}}.tar", reading)
    assert isinstance(there, StreamedShards)
    assert there.shard_lengths == list(COUNTS)
    assert server.asked == ["index.json"]
    assert len({there.key(i) for i in range(10)}) == len(there) == len(here) == 10
    for index in (9, 0, 4, 1, 8, 2, 3, 5, 6, 7):
        one, other = here[index], there[index]
        assert (one.caption, here.label(index)) == (other.caption, there.label(index))
        assert here.size(index) == there.size(index) == (40, 40)
        np.testing.assert_array_equal(np.asarray(one.image), np.asarray(other.image))
    assert sorted(server.asked[1:]) == [f"{n:05d}.tar" for n in range(4)]  # each of them once


def test_counts_of_img2dataset(served) -> None:
    server, folder = served
    address = f"{server.address}/{{00000..00003}}.tar"
    error(lambda: open_source(address), server.address, "prepare_data.py FOLDER")
    for number, count in enumerate(COUNTS):
        stats = {"count": count + 3, "successes": count, "failed_to_download": 3}
        write(folder / f"{number:05d}_stats.json", json.dumps(stats))
    source = open_source(address)
    assert isinstance(source, StreamedShards) and source.shard_lengths == list(COUNTS)
    assert source[4].caption == "words 5"


@pytest.mark.parametrize("room", [1, 2, 3])
def test_the_least_recently_used_make_way(served, room: int) -> None:
    server, folder = served
    _told(folder)
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    reading = Reading(shard_cache_gb=(room * size + 500) / 1e9)
    source = StreamedShards(f"{server.address}/{{00000..00003}}.tar", reading)
    used: list[int] = []
    for index in np.random.default_rng(0).integers(0, 10, 60).tolist():
        shard = np.searchsorted(np.cumsum(COUNTS), index, side="right")
        used = [n for n in used if n != shard] + [int(shard)]
        assert source.caption(index) == f"words {index + 1}"
        assert sum(path.stat().st_size for path in _cached(source)) <= reading.shard_cache_gb * 1e9
        held = {int(path.stem) for path in _cached(source)}
        assert held == set(used[-len(held) :])  # the last used ones are there
    small = StreamedShards(f"{server.address}/00002.tar", Reading(shard_cache_gb=1e-6))
    error(lambda: small[0], "00002.tar", "over shard_cache_gb")


def test_what_fails_is_tried_again(served) -> None:
    server, folder = served
    _told(folder)
    server.failing = {"00001.tar": 2, "00002.tar": 99, "index.json": 1}
    source = open_source(f"{server.address}/{{00000..00003}}.tar")
    assert source[3].caption == "words 4"
    assert server.asked.count("00001.tar") == 3
    error(lambda: source[6], f"{server.address}/00002.tar", "503")
    assert server.asked.count("00002.tar") == 4
    (folder / "00003.tar").unlink()
    error(lambda: source[9], f"{server.address}/00003.tar", "there is no such shard")
    assert server.asked.count("00003.tar") == 1
    server.failing = {}
    error(lambda: source.caption(7), "00002.tar", "503")  # not every sample of a shard asks again
    error(lambda: pickle.loads(pickle.dumps(source))[9], "there is no such shard")
    assert [server.asked.count(f"{n:05d}.tar") for n in (2, 3)] == [4, 1]
    assert open_source(f"{server.address}/{{00000..00002}}.tar")[6].caption == "words 7"


def test_shards_that_are_not_what_the_index_says(served, monkeypatch) -> None:
    server, folder = served
    write(folder / "00002.tar", (folder / "00002.tar").read_bytes()[:5000])
    tar(folder / "00003.tar", [("a.png", png(1))])
    rows = [{"samples": 2}, {"samples": 2, "size": 7}, {"samples": 4}, {"samples": 1}]
    _told(folder, **{f"{number:05d}.tar": row for number, row in enumerate(rows)})
    source = open_source(f"{server.address}/{{00000..00003}}.tar")
    error(lambda: source[0], "00000.tar", "holds 3 pictures, but 2")
    error(lambda: source[2], "00001.tar", "7 by index.json")
    error(lambda: source[4], "00002.tar", "cut short")
    error(lambda: source[8], "00003.tar", ", a: neither a .txt nor a .json")
    monkeypatch.setattr(streams, "index_tar", lambda _: pytest.fail("read again"))
    error(lambda: source[5], "00002.tar", "cut short")
    assert _cached(source) and "00001.tar" not in [path.name for path in _cached(source)]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"shards": {"00000.tar": {}}}',
    '{"shards": {"00000.tar": 3}}', '{"shards": {"00000.tar": {"samples": "x"}}}'])  # fmt: skip
def test_an_index_that_is_damaged(served, text: str) -> None:
    server, folder = served
    write(folder / "index.json", text)
    error(lambda: open_source(f"{server.address}/00000.tar"), "index.json")


def _caption(source: StreamedShards, index: int) -> str:
    return source[index].caption


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_what_was_fetched(served, method: str) -> None:
    server, folder = served
    _told(folder)
    source = open_source(f"{server.address}/{{00000..00003}}.tar")
    assert source[0].caption == "words 1"
    with multiprocessing.get_context(method).Pool(2) as pool:
        jobs = [(source, index % 10) for index in range(20)]
        assert pool.starmap(_caption, jobs, 1) == [f"words {n % 10 + 1}" for n in range(20)]
    assert sorted(server.asked[1:]) == [f"{n:05d}.tar" for n in range(4)]
    assert source[9].caption == "words 10"  # a worker's end clears nothing away


def test_validation_has_shards_of_its_own(served) -> None:
    server, folder = served
    _told(folder)
    config = TrainingConfig(
        train_data_dir=f"{server.address}/{{00000..00003}}.tar",
        validation_split=0.3,
        train_batch_size=2,
        validation_samples=2,
        max_train_samples=4,
    )
    train, validation = open_data(config)
    assert isinstance(train, StreamedShards) and isinstance(validation, StreamedShards)
    assert sum(train.shard_lengths) == len(train) == 4
    assert len(validation) == min(2, validation.shards[0].samples)
    names = [{shard.name for shard in part.shards} for part in (train, validation)]
    assert not names[0] & names[1]
    whole = open_source(config.train_data_dir)
    other = open_source(config.train_data_dir, Reading(caption_column="long"))
    assert whole.fingerprint != other.fingerprint
    parts = split_source(whole, 0.3, config.seed)
    said = [[part.caption(i) for i in range(len(part))] for part in parts]
    assert sorted(sum(said, [])) == sorted(f"words {n}" for n in range(1, 11))
    assert [train.caption(i) for i in range(4)] == said[0][:4]
    assert len({source.fingerprint for source in (whole, *parts, first(whole, 9))}) == 4


def test_the_cache_goes_with_its_process(served, tmp_path: Path) -> None:
    """Also that of a process that was killed, when the next one begins."""
    server, folder = served
    _told(folder)
    program = (
        "import os, sys; from ldm.data.streams import StreamedShards\n"
        f"s = StreamedShards('{server.address}/00000.tar'); s[0]; print(s._cache.folder)\n"
        "sys.stdout.flush(); os.kill(os.getpid(), 9) if sys.argv[1:] else None"
    )
    places = []
    for arguments in ([], ["kill"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT
        )
        places.append(Path(done.stdout.strip()))
    assert [place.is_dir() for place in places] == [False, True]
    StreamedShards(f"{server.address}/00000.tar")
    assert not places[1].exists()


def test_only_what_was_left_here_is_removed(served, tmp_path: Path) -> None:
    """Not the cache of another machine with a like name, nor one that somebody uses."""
    server, folder = served
    _told(folder)
    home, host, nobody = tmp_path / "cache/ldm/shards", socket.gethostname(), 999_999_999
    names = ("{}-{}-left", "{}-{}-used", "{}-1-{}-other", "{}-x-{}", "{0}-x-y-z", "notes")
    folders = [home / name.format(host, nobody) for name in names]
    for path in folders:
        path.mkdir(parents=True)
    with FileLock(folders[1] / streams.IN_USE):
        own = StreamedShards(f"{server.address}/00000.tar")._cache.folder
    assert [path.is_dir() for path in folders] == [False, True, True, True, True, True]
    with pytest.raises(TimeoutError), FileLock(own / streams.IN_USE, timeout=0):
        pass


def test_a_cache_that_is_too_small_is_told(served) -> None:
    server, folder = served
    _told(folder)
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    address = f"{server.address}/{{00000..00003}}.tar"
    source = StreamedShards(address, Reading(shard_cache_gb=(2 * size + 1) / 1e9))
    source.check_cache(2)
    with pytest.raises(ConfigError, match=r"the 4 shards .* at once; set it to 0\.01 or more"):
        source.check_cache(9)
    StreamedShards(address, Reading(shard_cache_gb=(4 * size + 1) / 1e9)).check_cache(9)


def test_what_cannot_be_streamed(served, monkeypatch: pytest.MonkeyPatch) -> None:
    server, folder = served
    _told(folder)
    with pytest.raises(ConfigError, match="class_column folder"):
        StreamedShards(f"{server.address}/00000.tar", Reading(class_column="folder"))
    monkeypatch.setitem(sys.modules, "s3fs", None)
    error(lambda: StreamedShards("s3://bucket/00000.tar"), "s3://bucket", "s3fs")
