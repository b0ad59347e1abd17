"""What the engines share that prepare a network anew for each shape of its arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussian

Network = Callable[..., Tensor]


class PerShape(ABC):
    """A network in a form made for the shapes, dtypes and device of its arguments.

    Args:
        network: plain or prepared, called with tensors and None by position.
        keep: of how many shapes the forms are kept; the one not used for longest goes first.
    """

    def __init__(self, network: Network, keep: int = 4):
        self.network, self.keep = network, keep
        self._made: OrderedDict[object, Network] = OrderedDict()
        self._lock = Lock()

    @abstractmethod
    def make(self, args: tuple[Tensor | None, ...]) -> Network:
        """The form for arguments such as these."""

    @torch.no_grad()
    def __call__(self, *args: Tensor | None) -> Tensor:
        """As the network, in its own dtype under autocast as well; one thread after the other."""
        key = tuple(None if arg is None else (arg.shape, arg.dtype, arg.device) for arg in args)
        device = next(arg.device.type for arg in args if arg is not None)
        with self._lock, torch.autocast(device, enabled=False):
            if key not in self._made:
                while len(self._made) >= self.keep:
                    self._made.popitem(last=False)
                self._made[key] = self.make(args)
            self._made.move_to_end(key)
            return self._made[key](*args)

    def give_back(self) -> None:
        """Forget all forms; the network is as it was."""
        self._made.clear()


class TwoWays:
    """An autoencoder, each of whose two ways is a prepared network.

    Args:
        vae: the plain one.
        make: prepares a network.
    """

    def __init__(self, vae: AutoencoderKL, make: Callable[[nn.Module], PerShape]):
        self._encoder = make(nn.Sequential(vae.encoder, vae.quant_conv))
        self._decoder = make(nn.Sequential(vae.post_quant_conv, vae.decoder))

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """As `AutoencoderKL.encode`."""
        return DiagonalGaussian.from_moments(self._encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """As `AutoencoderKL.decode`."""
        return self._decoder(latents)

    def give_back(self) -> None:
        """As `PerShape.give_back`."""
        self._encoder.give_back()
        self._decoder.give_back()
