"""The fast way: a plain network in, a callable of the same signature and result out.

An engine is made for the device and the dtype that the network has at that time. What it computes
is the plain mathematics to rounding.
"""

from __future__ import annotations

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

    def lend(self) -> nn.Module:
        """The plain network with its weights, for somebody who may keep and change it."""
        self.release()
        self.own = False
        return self.network

    def release(self) -> None:
        """Let the plain network have its weights again, and forget what was made of them."""
        if self._working not in (None, self.network):
            self._working.give_back()
        self._working = None

    def ready(self) -> Any:
        """What computes instead of the network, after a look at whether it is still the same.

        For a U-Net it is called as that; an autoencoder has `encode` and `decode`.
        """
        if self.name == "plain":
            return self.network
        if not self.own and self._working is not None and self._state != state_of(self.network):
            self.release()
        if self._working is None:
            self._working = self._make()
            self._state = [] if self.own else state_of(self.network)  # as `_make` has left it
        return self._working

    def __call__(self, *args: Any) -> Any:
        """As the network's own, by what the last `ready` has prepared."""
        return (self._working or self.ready())(*args)

    def _make(self) -> Any:
        network, device = self.network, next(self.network.parameters()).device.type
        if device not in ("cpu", "cuda") or (not self.own and is_altered(network)):
            return network
        if self.name == "compiled":
            from ldm.engine.compiled import prepare

            return prepare(network)
        if device == "cuda":
            from ldm.engine.gpu import prepare

            return prepare(network)
        from ldm.engine.cpu import prepare

        return prepare(network, take=self.own)


def is_altered(network: nn.Module) -> bool:
    """Whether somebody has put hooks, methods, layers or quantized weights into a network."""
    if any(type(parameter.data) is not Tensor for parameter in network.parameters()):
        return True
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or not type(module).__module__.startswith(("ldm.models.", "torch.nn.modules."))
        for module in network.modules()
    )


def state_of(network: nn.Module) -> list[int]:
    """Numbers that change with any weight of a network: where each lies, and what its bits sum to.

    On a GPU, where an engine computes with the network's own weights, only the places count.
    """
    if is_altered(network):
        return []
    weights = [p.detach() for p in network.parameters()]
    places = [weight.data_ptr() for weight in weights]
    if weights[0].device.type != "cpu":
        return places
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [weight.view(bits[weight.element_size()]).sum() for weight in weights]
    return places + torch.stack(sums).tolist()


def has_amx() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 many times as fast as those of float32.

    AVX512-BF16 alone does not: without AMX, products of bfloat16 took 1.7 times as long.
    """
    return torch.cpu._is_amx_tile_supported()
