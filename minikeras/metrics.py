"""Running totals of loss and metrics, added up on the device and read only when asked.

each batch:
    metrics(outputs, labels)       functions are called, update/compute/reset objects are updated
    add(results, rows)             sum += value * rows, count += rows; a pair (sum, count) is added as it is
when asked:
    totals["loss"], means()        sum / count; this waits for the device
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minikeras.checks import check_number, is_stateful
from minikeras.data import map_leaves

Result = Tensor | float | tuple[Any, Any]  # a mean over the batch's rows, or a pair (sum, count)


class Totals(Mapping[str, float]):
    """The running totals of one phase, training or validation; reads as a mapping of name -> mean so far."""

    def __init__(self, metrics_dict: Mapping[str, Any], device: torch.device) -> None:
        self.device = device
        self.names = ["loss", *metrics_dict]  # the order of columns; what else a step returns follows
        self.functions = {name: metric for name, metric in metrics_dict.items() if not is_stateful(metric)}
        self.objects = {
            name: _on(device, copy.deepcopy(metric)) for name, metric in metrics_dict.items() if is_stateful(metric)
        }
        self.unseen = True  # the next batch is the first of a fit or evaluate: it is looked at closely
        self.reset()

    def reset(self) -> None:
        """Nothing counted yet."""
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Any] = {}
        self.updated = False
        for metric in self.objects.values():
            metric.reset()

    @torch.no_grad()
    def metrics(
        self, outputs: Any, labels: Any, call: Callable[..., Any] | None = None, functions: bool = True
    ) -> dict[str, Result]:
        """Each function's answer for a batch; the objects take it in and answer when they are read.

        `call(name, function, outputs, labels)` may take a closer look at them.
        """
        call = call or _plain_call
        for name, metric in self.objects.items():
            call(f"metric {name!r}", metric.update, outputs, labels, scalar=False)
            if self.unseen:
                self._computed(name)  # one that is not a number is refused now, before a weight moves
        self.updated = True
        asked = self.functions if functions else {}
        return {name: call(f"metric {name!r}", metric, outputs, labels) for name, metric in asked.items()}

    def add(self, results: Mapping[str, Result], rows: int) -> None:
        """Add what a step returned for a batch of so many rows."""
        if results.keys() != self.sums.keys():
            self._start(results)
        for name, value in results.items():
            if isinstance(value, tuple):
                self._add_pair(name, *value)
            elif isinstance(value, Tensor):
                value = value.detach()
                self.sums[name].add_(value.reshape(()) if value.ndim else value, alpha=rows)
                self.counts[name] += rows
            else:
                self.sums[name] += float(value) * rows
                self.counts[name] += rows

    def _add_pair(self, name: str, total: Any, count: Any) -> None:
        if isinstance(count, Tensor) and not isinstance(self.counts[name], Tensor):
            self.counts[name] = _zero(self.device) + self.counts[name]
        self.sums[name] += total.detach().reshape(()) if isinstance(total, Tensor) else float(total)
        self.counts[name] += count.detach().reshape(()) if isinstance(count, Tensor) else count

    def _start(self, results: Mapping[str, Result]) -> None:
        if self.sums:
            raise ValueError(
                f"a step returned {', '.join(results) or 'nothing'} and the one before it {', '.join(self.sums)}; "
                f"expected the same names at each step, since the history has a column for each."
            )
        self.sums = {name: _zero(self.device) for name in results}
        self.counts = dict.fromkeys(results, 0)

    def means(self) -> dict[str, float]:
        """Every mean so far, read from the device together."""
        names = list(self.sums)
        sums = torch.stack(list(self.sums.values())).tolist() if names else []  # waits for the device, once
        read = {name: _mean(total, self.counts[name]) for name, total in zip(names, sums, strict=True)}
        if self.updated:
            read |= {name: self._computed(name) for name in self.objects}
        return {name: read[name] for name in self}

    def _computed(self, name: str) -> float:
        value = self.objects[name].compute()
        check_number(f"metric {name!r}", value)
        return _mean(*value) if isinstance(value, tuple) else float(value)

    def __getitem__(self, name: str) -> float:
        if name in self.objects and self.updated:
            return self._computed(name)
        return _mean(self.sums[name], self.counts[name])

    def __iter__(self) -> Iterator[str]:
        known = [*self.sums, *(self.objects if self.updated else ())]
        return iter([name for name in self.names if name in known] + [name for name in known if name not in self.names])

    def __len__(self) -> int:
        return len(list(iter(self)))


def detached(nest: Any) -> Any:
    """A nest whose tensors are cut off from what they were computed from."""
    if isinstance(nest, Tensor):
        return nest.detach()
    return map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, nest)


def _plain_call(name: str, function: Callable[..., Any], outputs: Any, labels: Any, scalar: bool = True) -> Any:
    return function(outputs, labels)


def _on(device: torch.device, metric: Any) -> Any:
    return metric.to(device) if hasattr(metric, "to") else metric


def _mean(total: Tensor | float, count: Tensor | float) -> float:
    return float(total) / float(count) if count else math.nan  # nothing counted, as when every token is padding


def _zero(device: torch.device) -> Tensor:
    try:
        return torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # MPS has no float64
        return torch.zeros((), dtype=torch.float32, device=device)
