"""One process, alone: the null object in the place of several that train together.

Whoever has to do something with other processes calls a method of `Run.world`. `OneProcess` answers
for itself; `distributed.World` asks the others. So nobody asks whether there are any.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class OneProcess:
    """A process that trains alone.

    Every method is right for one process; `World` overrides them all, and there each must be called
    by all processes at the same place.
    """

    rank = 0
    size = 1

    def device(self, chosen: torch.device) -> torch.device:
        """Return this process's device of the chosen kind."""
        return chosen

    def verb(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Return a context of one call of fit, evaluate, ...; an error in it is told to others."""
        return contextlib.nullcontext()

    def meet(self, model: nn.Module, run: Any = None, **given: Any) -> None:
        """Compare what all processes are about to do: the model, and what is `given`."""

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Fill tensors with those of rank 0."""

    def broadcast(self, value: Any) -> Any:
        """Return the plain value that rank 0 has."""
        return value

    def gather(self, value: Any, everywhere: bool = True) -> list[Any] | None:
        """Return the plain values of all, by rank; None on ranks above 0 unless `everywhere`."""
        return [value]

    def agree(self, *numbers: float, about: str = "") -> list[float]:
        """Return the largest of each number, of all processes; say what it is about."""
        return list(numbers)

    def follow(self, value: float) -> float:
        """Return a value that rank 0 has read, for a decision that all must make alike."""
        return value

    def by_main(self, act: Callable[[], None]) -> None:
        """Let rank 0 do something that is done when the others go on."""
        act()

    def add_up(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes."""
        return tensor

    def tell_with_totals(self, here: bool, then: Callable[[bool], None]) -> None:
        """Call `then` with whether it is so in any process, when the totals are added up next."""
        then(here)

    def add_up_totals(
        self, sums: list[Tensor], counts: Mapping[str, Any]
    ) -> tuple[list[Tensor], Mapping[str, Any]]:
        """Return the sums and counts of a pass over all processes."""
        return sums, counts

    def share_weights(self, model: nn.Module, loss_func: Any) -> None:
        """Give all processes the weights and buffers of rank 0, once."""

    def settle(self, model: nn.Module) -> None:
        """Put a model into a known state after a forward or backward that an error has ended."""

    def part_of(self, batches: Iterable[Any], name: str) -> Iterable[Any]:
        """Return this process's part of `batches`, which the user calls `name`."""
        return batches

    def draw_first_seed(self, loader: Any) -> None:
        """Draw what a loader draws for persistent workers in its first iteration, which is over."""
        iter(loader)

    def prepare_metric(self, metric: Any, name: str, syncs: Callable[[], bool]) -> None:
        """Let a metric object speak with those of the other processes when `syncs()` says so."""

    def compute_metric(
        self, metric: Any, read: Callable[[Any], dict[str, float]]
    ) -> dict[str, float]:
        """Return the columns that `read` finds in a metric object's answer, over all processes."""
        return read(metric.compute())

    def have_updated(self, metrics: Iterable[Any], updated: bool) -> bool:
        """Tell whether the metric objects have seen rows, in any process."""
        return updated

    def join_outputs(self, outputs: Any, everywhere: bool) -> Any:
        """Return the outputs of all processes, in the order of the rows; None where not wanted."""
        return outputs

    def describe_part(self) -> str:
        """Return the words that call a batch this process's part of it; empty for one process."""
        return ""


def is_main() -> bool:
    """Tell whether this process is alone, or the first of its group or of a launcher's."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
