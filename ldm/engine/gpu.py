"""The U-Net and the autoencoder on a GPU: channels-last, and launched as one CUDA graph.

A network of this kind is hundreds of small kernels, which the CPU starts more slowly than a GPU
runs them. They are recorded at the first call with a shape and replayed at each further one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.engine.shapes import Network, PerShape, TwoWays
from ldm.models.autoencoder import AutoencoderKL

_WARM_UP = 3  # calls in which libraries choose their kernels, before the recorded one


class Graphed(PerShape):
    """A network recorded as one CUDA graph for each shape of its arguments.

    The graph computes with the weights where they lie: those that change in place count, those
    that move need a new `Graphed`. All recordings share their working memory, as never two of
    them run at a time.
    """

    _pool: Any = None  # the working memory of all recordings

    def make(self, args: tuple[Tensor | None, ...]) -> Network:
        """See `PerShape`."""
        device = next(arg.device for arg in args if arg is not None)
        # The graph reads its inputs where they are now; all of them on the device, or the copy
        # of one from the CPU would be recorded.
        inputs = [None if arg is None else _resident(arg, device) for arg in args]
        # Of a compiled network its form for these inputs, which lives as long as the graph.
        network: Any = self.network
        network = network.make(tuple(inputs)) if isinstance(network, PerShape) else network
        with torch.cuda.device(device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    network(*inputs)
            current.wait_stream(stream)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # other threads, such as a web page's, may go on using the GPU meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = network(*inputs)

        def replay(*args: Tensor | None) -> Tensor:
            for buffer, arg in zip(inputs, args, strict=True):
                if buffer is not None and arg is not None:
                    buffer.copy_(arg, non_blocking=True)
            graph.replay()
            return output.clone()  # the next replay writes to the same place

        replay.network = network  # type: ignore[attr-defined]
        return replay


def prepare(network: nn.Module, make: Callable[[nn.Module], Network] | None = None) -> Any:
    """A U-Net or an autoencoder on a GPU, ready to be called as it is; see `Graphed`.

    Args:
        network: its weights become channels-last, in place.
        make: what to do to it before it is recorded: `Compiled`, or nothing.
    """

    def graphed(part: nn.Module) -> Graphed:
        return Graphed(make(part) if make else part)

    network.to(memory_format=torch.channels_last)
    return TwoWays(network, graphed) if isinstance(network, AutoencoderKL) else graphed(network)


def _resident(arg: Tensor, device: torch.device) -> Tensor:
    layout = torch.channels_last if arg.ndim == 4 else torch.contiguous_format
    return arg.to(device, copy=True, memory_format=layout)
