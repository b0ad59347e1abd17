"""The fast way: a plain network in, a callable of the same signature and result out.

An engine is made for the device and the dtype that the network has at that time. What it computes
is the plain mathematics to rounding.
"""

from __future__ import annotations

from functools import partial
from threading import RLock
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ldm.config import EngineName
from ldm.errors import ConfigError, suggest


class Engine:
    """A network and what was made of it, which computes in its place.

    On a CPU the fast form has a layout of its own. While nobody else has the plain network, its
    weights move there and back, and memory holds them once; when it has been lent, they are
    copied, and looked at before each use.

    Args:
        network: the plain U-Net or autoencoder.
        name: which engine; see `EngineName`.
        own: whether nobody else has the network.

    Raises:
        ConfigError: there is no such engine.
    """

    def __init__(self, network: nn.Module, name: EngineName, *, own: bool = False):
        if name not in get_args(EngineName):
            raise ConfigError(f"there is no engine '{name}'; {suggest(name, get_args(EngineName))}")
        self.network, self.name, self.own = network, name, own
        self._working: Any = None
        self._state: list[int] = []
        self._leaving = False
        self._lock = RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has the network, and makes its own form of it."""
        self.release()
        return partial(Engine, own=self.own), (self.network, self.name)

    def lend(self) -> nn.Module:
        """The plain network with its weights, for somebody who may keep and change it."""
        with self._lock:
            if self.own:
                self.release()
                self.own = False
            return self.network

    def release(self) -> None:
        """Let the plain network have its weights again, and forget what was made of them."""
        with self._lock:
            if self._working not in (None, self.network):
                self._leaving = True  # until done: who is interrupted goes on from there
                self._working.give_back()
            self._working, self._leaving = None, False

    def ready(self) -> Any:
        """What computes instead of the network, after a look at whether it is still the same.

        For a U-Net it is called as that; an autoencoder has `encode` and `decode`.
        """
        if self.name == "plain":
            return self.network
        with self._lock:
            made = self._working is not None
            if self._leaving or (made and not self.own and self._state != self._seen()):
                self.release()
            if self._working is None:
                self._working = self._make()
                if not self.own:
                    self._state = self._seen()  # as `_make` has left it
                elif take := getattr(self._working, "take", None):
                    take()
            return self._working

    def __call__(self, *args: Any) -> Any:
        """The network's own call, by what the last `ready` has made, whatever changed since."""
        return (self._working or self.ready())(*args)

    def _seen(self) -> list[int]:
        # A GPU's own kernels compute with the network's weights, wherever these come from.
        on_gpu = next(self.network.parameters()).is_cuda
        return state_of(self.network, places_only=on_gpu and self.name != "compiled")

    def _make(self) -> Any:
        network, device = self.network, next(self.network.parameters()).device.type
        if device not in ("cpu", "cuda") or (not self.own and is_altered(network)):
            return network
        if is_quantized(network) and self.name != "compiled":
            return network
        if self.name == "compiled":
            from ldm.engine.compiled import prepare

            return prepare(network)
        if device == "cuda":
            from ldm.engine.gpu import prepare

            return prepare(network)
        from ldm.engine.cpu import prepare

        return prepare(network)


def is_altered(network: nn.Module) -> bool:
    """Whether somebody has put hooks, methods, layers or another padding into a network."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or vars(module).keys() & {"forward", "encode", "decode"}
        or getattr(module, "padding_mode", "zeros") != "zeros"
        or not type(module).__module__.startswith(("ldm.models.", "torch.nn.modules."))
        for module in network.modules()
    )


def is_quantized(network: nn.Module) -> bool:
    """Whether weights are other than plain tensors."""
    return any(type(parameter.data) is not Tensor for parameter in network.parameters())


def state_of(network: nn.Module, *, places_only: bool) -> list[int]:
    """Numbers by which changed weights are noticed: where each lies, and sums of its bits.

    Each row, and each column, counts as often as its number says, so that weights which change
    places are noticed as well.
    """
    if is_altered(network) or is_quantized(network):
        return []
    weights = [p.detach() for p in network.parameters()]
    places = [weight.data_ptr() for weight in weights]
    if places_only:
        return places
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for weight in weights:
        bits = weight.view(integers[weight.element_size()]).reshape(len(weight), -1)
        for line in (bits.sum(0), bits.sum(1)):
            sums.append((line * torch.arange(1, len(line) + 1, device=line.device)).sum())
    return places + torch.stack(sums).tolist()
