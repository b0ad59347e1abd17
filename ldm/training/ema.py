"""An exponential moving average of the weights: the model that a run saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """avg <- decay * avg + (1 - decay) * weights, after every optimizer step.

    The decay warms up as (1 + step) / (10 + step), so that a short run does not average in its
    random start.

    Args:
        module: whose parameters to average; the average starts at their values.
        decay: in [0, 1).

    Attributes:
        average: one float32 tensor a parameter, by name.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._module = module
        self.average = {k: p.detach().float().clone() for k, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0 the first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach() for p in self._module.parameters()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Go on from a saved average."""
        for name, tensor in self.average.items():
            tensor.copy_(average[name])

    def swap(self) -> None:
        """Exchange the module's weights and the average; a second call undoes the first."""
        for name, parameter in self._module.named_parameters():
            parameter.data, self.average[name] = self.average[name], parameter.data

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module's weights are the average; afterwards they are themselves again."""
        self.swap()
        try:
            yield
        finally:
            self.swap()
