"""An exponential moving average of the weights: the model that a run saves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA:
    """avg <- decay * avg + (1 - decay) * weights, after every optimizer step.

    The decay warms up as (1 + step) / (10 + step), so that a short run does not average in its
    random start.

    Args:
        module: whose parameters to average; the average starts at their values.
        decay: in [0, 1).

    Attributes:
        average: one tensor a parameter, by name.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._module = module
        self.average = {k: p.detach().clone() for k, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """Take in the weights after optimizer step `step` (0 the first).

        Args:
            step: decides the decay.
            skipped: 1.0 leaves the average as it is, 0.0 changes nothing; a tensor of no
                dimensions, so that nobody waits for the GPU.
        """
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        average, weights = _local(self.average.values()), _local(self._module.parameters())
        move = _lerp if weights[0].is_cpu else _fused
        move(average, weights, share, skipped)

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Go on from a saved average."""
        for name, tensor in self.average.items():
            tensor.copy_(average[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the module's weights and the average; a second call undoes the first."""
        # Numbers change places, not tensors: FSDP computes with the memory that it knows.
        pairs = zip(_local(self._module.parameters()), _local(self.average.values()), strict=True)
        for weights, average in pairs:
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module's weights are the average; afterwards they are themselves again."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors, or this process's slices of sharded ones."""
    return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]


def _lerp(average: list[Tensor], weights: list[Tensor], share: float, skip: Tensor | None) -> None:
    """average <- average + share * (weights - average), unless `skip` is 1; on a GPU, a kernel for
    each tensor."""
    shares = share if skip is None else [(1 - skip) * share] * len(weights)
    torch._foreach_lerp_(average, weights, shares)  # type: ignore[call-overload]


def _fused(average: list[Tensor], weights: list[Tensor], share: float, skip: Tensor | None) -> None:
    """The same in one kernel, on a CPU half as fast: a step of SGD whose gradient is -weights, and
    whose decay adds the average to it."""
    torch._fused_sgd_(
        average, weights, [], lr=share, weight_decay=1.0, maximize=True, found_inf=skip,
        momentum=0.0, dampening=0.0, nesterov=False, is_first_step=False,
    )  # fmt: skip
