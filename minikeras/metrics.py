"""Running totals of loss and metrics, added up on the device and read only when asked.

each batch:
    metrics(outputs, labels)       functions are called, update/compute/reset objects are updated
    add(results, rows)             sum += value * rows, count += rows; an Average is added as it is
when asked:
    totals["loss"], means()        sum / count; this waits for the device
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minikeras.checks.inputs import is_stateful
from minikeras.data import UnknownRows, map_leaves
from minikeras.distributed import World
from minikeras.results import Average, Result, check_average, check_number


class Totals(Mapping[str, float]):
    """The running totals of one phase, training or validation; reads as a mapping of name -> mean so far."""

    def __init__(self, metrics_dict: Mapping[str, Any], device: torch.device, world: World | None = None) -> None:
        self.device = device
        self.world = world
        self.idle = False  # the batch at hand counts for nothing
        self.syncs = False  # torchmetrics objects go through their own sync: at the end of a pass alone
        self.names = ["loss", *metrics_dict]  # the order of columns; what else a step returns follows
        self.functions = {name: metric for name, metric in metrics_dict.items() if not is_stateful(metric)}
        self.objects = {
            name: _on(device, copy.deepcopy(metric)) for name, metric in metrics_dict.items() if is_stateful(metric)
        }
        if world is not None:
            for name, metric in self.objects.items():
                hold_back(metric, name, lambda: self.syncs)
        self.unseen = True  # the next batch is the first of a fit or evaluate: it is looked at closely
        self.reset()

    def reset(self) -> None:
        """Nothing counted yet."""
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Any] = {}
        self.updated = False
        for metric in self.objects.values():
            metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """Where the totals stand."""
        objects = {name: state_of(metric, f"metric {name!r}") for name, metric in self.objects.items()}
        own = {"sums": self.sums, "counts": self.counts, "names": self.names, "updated": self.updated}
        return own | {"objects": objects}

    def load_state_dict(self, state: Mapping[str, Any], counted: bool = True) -> None:
        """Go on from where `state_dict` stood; unless `counted` with its names alone, another process has the rest."""
        if not counted:
            self._start(state["sums"])
            return
        self.sums, self.counts = map_leaves(self._placed, state["sums"]), map_leaves(self._placed, state["counts"])
        self.updated = state["updated"]
        for name, metric in self.objects.items():
            set_state(metric, map_leaves(self._placed, state["objects"][name]))

    def _placed(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    @torch.no_grad()
    def metrics(
        self, outputs: Any, labels: Any, call: Callable[..., Any] | None = None, functions: bool = True
    ) -> dict[str, Result]:
        """Each function's answer for a batch; the objects take it in and answer when they are read.

        `call(name, function, outputs, labels)` may take a closer look at them.
        """
        call = call or _plain_call
        for name, metric in () if self.idle else self.objects.items():
            call(f"metric {name!r}", metric.update, outputs, labels, scalar=False)
            if self.unseen:
                self._computed(name, early=True)  # one that is not a number is refused now, before a weight moves
        self.updated = self.updated or not self.idle
        asked = self.functions if functions else {}
        return {name: call(f"metric {name!r}", metric, outputs, labels) for name, metric in asked.items()}

    def add(self, results: Mapping[str, Result], rows: int | UnknownRows) -> None:
        """Add what a step returned for a batch of so many rows."""
        if results.keys() != self.sums.keys():
            self._start(results)
        for name, value in () if self.idle else results.items():
            if isinstance(value, Average):
                self._add_average(name, value)
            elif isinstance(rows, UnknownRows):
                rows.refuse()
            elif isinstance(value, Tensor):
                value = value.detach()
                self.sums[name].add_(value.reshape(()) if value.ndim else value, alpha=rows)
                self.counts[name] += rows
            else:
                if not isinstance(value, float):
                    check_number(f"{name!r}", value)
                self.sums[name] += float(value) * rows
                self.counts[name] += rows

    def _add_average(self, name: str, average: Average) -> None:
        check_average(f"{name!r}", average)
        total, count = detached(average)
        total = total.reshape(()) if isinstance(total, Tensor) else float(total)
        if not isinstance(count, Tensor):
            if count != 0:  # a total over nothing may be NaN
                self.sums[name] += total
                self.counts[name] += count
            return
        count = count.reshape(())
        if not isinstance(self.counts[name], Tensor):
            self.counts[name] = _zero(self.device) + self.counts[name]
        nothing = count.to(self.device) == 0
        self.sums[name] = torch.where(nothing, self.sums[name], self.sums[name] + total)
        self.counts[name] += count

    def _start(self, results: Mapping[str, Result]) -> None:
        if self.sums:
            raise ValueError(
                f"a step returned {', '.join(results) or 'nothing'} and the one before it {', '.join(self.sums)}; "
                f"expected the same names at each step, since the history has a column for each."
            )
        self.sums = {name: _zero(self.device) for name in results}
        self.counts = dict.fromkeys(results, 0)

    def means(self) -> dict[str, float]:
        """Every mean so far, of all processes, read from the device together."""
        names, sums, counts = list(self.sums), list(self.sums.values()), self.counts
        if self.world is not None and names:
            sums, counts = self.summed()
        numbers = torch.stack(sums).tolist() if names else []  # waits for the device, once
        read = {name: _mean(total, counts[name]) for name, total in zip(names, numbers, strict=True)}
        if self.objects and self.everywhere_updated():
            self.syncs = self.world is not None
            read |= {name: self._computed(name) for name in self.objects}
            self.syncs = False
        return {name: read[name] for name in self}

    def summed(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Sums and counts of all processes."""
        assert self.world is not None
        counts = [_zero(self.device) + self.counts[name] for name in self.sums]
        together = self.world.add_up(torch.stack([*self.sums.values(), *counts]))
        sums, counted = together.split(len(self.sums))
        return list(sums), dict(zip(self.sums, counted, strict=True))

    def everywhere_updated(self) -> bool:
        """Whether the objects have seen rows: in each process, as torchmetrics needs it, or in none."""
        if self.world is None:
            return self.updated
        some, none = self.world.agree(self.updated, not self.updated)
        if some and none:
            raise ValueError(
                f"there are fewer rows than processes, {self.world.size}, and the metric objects of one have seen "
                f"none. Give more rows, or start fewer processes."
            )
        return self.updated

    def _computed(self, name: str, early: bool = False) -> float:
        """What an object answers; NaN where it cannot yet, in the middle of a pass, as R^2 cannot of one row."""
        try:
            value = self.objects[name].compute()
        except ValueError:
            if not early:
                raise
            return math.nan
        check_number(f"metric {name!r}", value)
        return _mean(*value) if isinstance(value, Average) else float(value)

    def __getitem__(self, name: str) -> float:
        if name in self.objects and self.updated:
            return self._computed(name, early=True)
        return _mean(self.sums[name], self.counts[name])

    def __iter__(self) -> Iterator[str]:
        known = [*self.sums, *(self.objects if self.updated else ())]
        return iter([name for name in self.names if name in known] + [name for name in known if name not in self.names])

    def __len__(self) -> int:
        return len(list(iter(self)))


def by_column(metrics_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A metric for each column of the history: a torchmetrics.MetricCollection is its members, under their own names.

    Raises:
        ValueError: two of them have the same name.
    """
    columns: dict[str, Any] = {}
    for name, metric in metrics_dict.items():
        members = dict(metric.items()) if isinstance(metric, nn.ModuleDict) and is_stateful(metric) else {name: metric}
        twice = sorted(columns.keys() & members.keys())
        if twice:
            raise ValueError(
                f"metrics_dict gives two metrics the name {twice[0]!r}: a MetricCollection has a column for each of "
                f'its members, under their own names. Give it a prefix: MetricCollection(..., prefix="{name}_").'
            )
        columns |= members
    return columns


def state_of(metric: Any, name: str) -> dict[str, Any]:
    """What a metric object has counted: its own state_dict, or its attributes; those of a module's parts as well."""
    if isinstance(metric, nn.Module):
        return {path: attributes(module, name) for path, module in metric.named_modules()}
    return metric.state_dict() if hasattr(metric, "state_dict") else attributes(metric, name)


def set_state(metric: Any, state: Mapping[str, Any]) -> None:
    """... and back."""
    if isinstance(metric, nn.Module):
        for path, module in metric.named_modules():
            buffers = dict(module.named_buffers(recurse=False))
            for key, value in state[path].items():
                vars(module)[key] = value if key not in buffers else buffers[key].copy_(value)
    elif hasattr(metric, "load_state_dict"):
        metric.load_state_dict(state)
    else:
        vars(metric).update(copy.deepcopy(dict(state)))


def attributes(holder: Any, name: str) -> dict[str, Any]:
    """The attributes that may change from batch to batch: tensors, arrays, numbers, strings and containers of them.

    Raises:
        TypeError: one is of another kind, and not plainly a constant as functions and settings are.
    """
    kept = {key: value for key, value in vars(holder).items() if is_countable(value)}
    for key, value in vars(holder).items():
        constant = callable(value) or isinstance(value, (Enum, nn.Module, torch.device, torch.dtype, nn.Parameter))
        if key not in kept and not constant and not (isinstance(holder, nn.Module) and key.startswith("_")):
            raise TypeError(
                f"{name} holds a {type(value).__name__} in .{key}, which a checkpoint cannot hold. Give the metric "
                f"state_dict() and load_state_dict(state) of tensors, numbers, lists and dicts."
            )
    return kept | dict(holder.named_buffers(recurse=False) if isinstance(holder, nn.Module) else {})


def is_countable(value: Any) -> bool:
    if type(value) in (list, tuple, set):
        return all(map(is_countable, value))
    if type(value) is dict:
        return all(map(is_countable, (*value, *value.values())))
    return type(value) in (Tensor, bool, int, float, str, type(None)) or isinstance(value, (np.ndarray, np.generic))


def hold_back(metric: Any, name: str, syncs: Callable[[], bool]) -> None:
    """A torchmetrics object speaks with other processes when `syncs` says so, and not whenever it is read.

    Raises:
        TypeError: it is another object, whose counts cannot be put together.
    """
    modules = metric.modules() if isinstance(metric, nn.Module) else ()
    parts: list[Any] = [part for part in modules if hasattr(part, "distributed_available_fn")]
    if not parts:
        raise TypeError(
            f"metric {name!r} is a {type(metric).__name__}, an object whose counts in several processes cannot be put "
            f"together. Give a function that returns a mean or an Average(total, count), or a torchmetrics object."
        )
    for part in parts:
        part.distributed_available_fn = syncs
        part.compute_with_cache = False  # what was read before was of this process alone


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
