"""A network as native code for its device.

On a CPU by torch.export and AOTInductor, weights frozen into it. Building takes from half a minute
to many; the result is kept as a file in the user's cache folder, and read from there in a tenth of
a second. It is code and will be executed: the folder must be the user's own. It pays for small
networks, where much of the time is spent between operations.

On a GPU by torch.compile, which has a cache of its own, and recorded as a CUDA graph. The engine
`fast` is faster there, and needs no build; this one is for networks in 8 bits.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ldm.models
from ldm.checkpoint.io import atomic_file, tensors_sha256
from ldm.engine import gpu
from ldm.engine.cache import default_cache, is_private, make_private
from ldm.engine.shapes import Network, PerShape, TwoWays
from ldm.errors import ConfigError
from ldm.models.autoencoder import AutoencoderKL
from ldm.processor import cpuinfo

logger = logging.getLogger(__name__)


def prepare(network: nn.Module) -> Any:
    """A U-Net or an autoencoder, ready to be called as it is."""
    if next(network.parameters()).is_cuda:
        return gpu.prepare(network, jitted)
    return TwoWays(network, Compiled) if isinstance(network, AutoencoderKL) else Compiled(network)


def jitted(network: nn.Module) -> Network:
    """A network compiled for each shape of its arguments, of which there may be any number."""
    build = torch.compile(network, fullgraph=True, dynamic=False)

    def run(*args: Tensor | None) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=sys.maxsize):
            return build(*args)

    return run


class Compiled(PerShape):
    """A network on a CPU compiled for each shape of its arguments, or found so in the cache folder.

    Args:
        network: plain, and in evaluation mode; it keeps its weights, the file has them as well.
        cache: the folder; `$XDG_CACHE_HOME/ldm/compiled` or `~/.cache/ldm/compiled` by default.

    Attributes:
        build_seconds: what all building took; 0 while everything was found.

    Raises:
        ConfigError: in a call: it cannot be built here, or others can write to the folder.
    """

    network: nn.Module

    def __init__(self, network: nn.Module, cache: Path | None = None):
        super().__init__(network)
        self.cache, self.build_seconds = cache or default_cache(), 0.0

    def make(self, args: tuple[Tensor | None, ...]) -> Network:
        """See `PerShape`."""
        make_private(self.cache)
        args = _contiguous(args)
        file = self.cache / f"{self.key(args)}.pt2"
        if file.exists() and is_private(file):
            try:
                return _load(file)
            except RuntimeError:
                logger.warning("%s cannot be loaded; it is made again", file)
        return self._build(file, args)

    def key(self, args: tuple[Tensor | None, ...]) -> str:
        """What the code depends on, hashed: network, shapes, versions, processor and threads."""
        shapes = [
            None if arg is None else (tuple(arg.shape), arg.dtype, arg.device) for arg in args
        ]
        parts = (self._identity, shapes, torch.__version__, torch.version.git_version)
        # inductor compiles for the very processor, and for this number of threads
        processor = cpuinfo("flags", "Features") or platform.processor()
        parts = (*parts, processor, torch.get_num_threads())
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    @cached_property
    def _identity(self) -> tuple[object, ...]:
        """The weights, the settings of every layer, and the source text of what uses them."""
        settings = [
            (name, type(module).__name__, key, value)
            for name, module in self.network.named_modules()
            for key, value in sorted(vars(module).items())
            if isinstance(value, int | float | str | tuple)
        ]
        sources = sorted(Path(str(ldm.models.__file__)).parent.glob("*.py"))
        source = hashlib.sha256(b"".join(file.read_bytes() for file in (*sources, Path(__file__))))
        weights = dict(_numbers(self.network.state_dict()))
        return tensors_sha256(weights), settings, source.hexdigest()

    def _build(self, file: Path, args: tuple[Tensor | None, ...]) -> Network:
        from torch._inductor import aoti_compile_and_package
        from torch._inductor.utils import fresh_cache

        compiler = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++")
        if shutil.which(compiler) is None:
            raise ConfigError(
                f"engine compiled needs the C++ compiler '{compiler}', which is not installed;"
                " install it (apt install g++), or take the engine fast"
            )
        sizes = ", ".join("x".join(map(str, arg.shape)) for arg in args if arg is not None)
        logger.warning("compiling for inputs of %s: half a minute or more, once", sizes)
        begun = time.perf_counter()
        try:
            program = torch.export.export(self.network, args, strict=False)
            # Inductor's own cache would keep the weights once more. It wants a name that ends in
            # .pt2, but takes a stream.
            with fresh_cache(), atomic_file(file) as temporary, temporary.open("wb") as stream:
                aoti_compile_and_package(
                    program, package_path=stream, inductor_configs={"freezing": True}
                )
        except RuntimeError as error:
            said = " ".join(str(error).split())[:200]
            raise ConfigError(f"cannot compile; take the engine fast: {said}") from error
        seconds = time.perf_counter() - begun
        self.build_seconds += seconds
        run = _load(file)
        native, plain = _seconds(run, args), _seconds(self.network, args)
        gain = (
            f"pays after {seconds / (plain - native):,.0f} calls" if native < plain else "no gain"
        )
        logger.warning(
            "compiled in %.0f s: a call takes %.1f ms, of the plain network %.1f; %s; kept as %s",
            *(seconds, native * 1e3, plain * 1e3, gain, file),
        )
        return run


def _numbers(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names; a quantized one is its parts."""
    for name, tensor in state.items():
        if hasattr(tensor, "__tensor_flatten__"):
            parts, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            yield from _numbers({f"{name}.{part}": getattr(tensor, part) for part in parts})
        else:
            yield name, tensor


def _load(file: Path) -> Network:
    from torch._inductor import aoti_load_package

    # of which `PerShape` sees to it that there is one
    run: Any = aoti_load_package(str(file), run_single_threaded=True)
    return lambda *args: run(*_contiguous(args))


def _contiguous(args: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Code expects the strides that it was compiled with, and does not look."""
    return tuple(None if arg is None else arg.contiguous() for arg in args)


def _seconds(network: Network, args: tuple[Tensor | None, ...]) -> float:
    """Of the faster of two calls, after one that does not count."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        network(*args)
        times.append(time.perf_counter() - begun)
    return min(times[1:])
