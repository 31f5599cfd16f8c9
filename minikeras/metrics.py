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
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minikeras.checks.inputs import is_stateful
from minikeras.checks.raw_scores import warn_of_raw_scores
from minikeras.checks.row_means import RowMeanCheck
from minikeras.columns import check_columns, columns_of
from minikeras.data import UnknownRows, map_leaves
from minikeras.distributed import World
from minikeras.on_all_rows import OnAllRows, compute_on_all_processes
from minikeras.results import Average, Result, check_average, check_number


class Totals(Mapping[str, float]):
    """The running totals of one phase, training or validation; reads as a mapping of name -> mean so far."""

    def __init__(
        self,
        metrics_dict: Mapping[str, Any],
        device: torch.device,
        world: World | None = None,
        looks: Counter[str] | None = None,  # at each metric; training and validation share them
    ) -> None:
        self.device = device
        self.world = world
        self.idle = False  # the batch at hand counts for nothing
        self.syncs = (
            False  # torchmetrics objects go through their own sync: at the end of a pass alone
        )
        self.names = [
            "loss",
            *metrics_dict,
        ]  # the order of columns; what else a step returns follows
        self.functions = {
            name: metric for name, metric in metrics_dict.items() if not is_stateful(metric)
        }
        self.objects = {
            name: _on(device, copy.deepcopy(metric))
            for name, metric in metrics_dict.items()
            if is_stateful(metric)
        }
        if world is not None:
            for name, metric in self.objects.items():
                hold_back(metric, name, lambda: self.syncs)
        self.columns: dict[str, list[str]] = {}  # of each object, as its last answer had them
        self.looks = Counter() if looks is None else looks
        self.row_means = RowMeanCheck(self.looks, device, world)
        self.unseen = (
            True  # the next batch is the first of a fit or evaluate: it is looked at closely
        )
        self.reset()

    def reset(self) -> None:
        """Nothing counted yet."""
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Any] = {}
        self.updated = False
        self.answers: dict[
            str, dict[str, float]
        ] = {}  # of objects that were asked since their last update
        self.row_means.begin()
        for metric in self.objects.values():
            metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """Where the totals stand."""
        objects = {
            name: state_of(metric, f"metric {name!r}") for name, metric in self.objects.items()
        }
        own = {
            "sums": self.sums,
            "counts": self.counts,
            "names": self.names,
            "updated": self.updated,
        }
        return own | {"objects": objects}

    def load_state_dict(self, state: Mapping[str, Any], counted: bool = True) -> None:
        """Go on from where `state_dict` stood; unless `counted` with its names alone, another process has the rest."""
        if not counted:
            self._start(state["sums"])
            return
        self.sums, self.counts = (
            map_leaves(self._placed, state["sums"]),
            map_leaves(self._placed, state["counts"]),
        )
        self.updated = state["updated"]
        self.answers.clear()
        for name, metric in self.objects.items():
            set_state(metric, map_leaves(self._placed, state["objects"][name]))

    def _placed(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    @torch.no_grad()
    def metrics(
        self,
        outputs: Any,
        labels: Any,
        call: Callable[..., Any] | None = None,
        functions: bool = True,
    ) -> dict[str, Result]:
        """Each function's answer for a batch; the objects take it in and answer when they are read.

        `call(name, function, outputs, labels)` may take a closer look at them.
        """
        call = call or _plain_call
        asked = self.functions if functions else {}
        if self.unseen and not self.idle and (self.world is None or self.world.rank == 0):
            self._look_at_scores(outputs)
        found: dict[str, int] = {}
        if asked and self.row_means.active:
            found = self.row_means.look(asked, outputs, labels, counts=not self.idle)
        for name, metric in () if self.idle else self.objects.items():
            call(f"metric {name!r}", metric.update, outputs, labels, scalar=False)
        if not self.idle:
            self.answers.clear()
            self.updated = True
        results = {
            name: call(f"metric {name!r}", metric, outputs, labels)
            for name, metric in asked.items()
        }
        if found:
            self.row_means.tell(found)
        return results

    def _look_at_scores(self, outputs: Any) -> None:
        for name, metric in self.objects.items():
            if not self.looks[name] and warn_of_raw_scores(name, metric, outputs):
                self.looks[name] += 1

    def add(self, results: Mapping[str, Result], rows: int | UnknownRows) -> None:
        """Add what a step returned for a batch of so many rows."""
        if results.keys() != self.sums.keys():
            self._start(results)
        for name, value in () if self.idle else results.items():
            if isinstance(value, Tensor) and type(rows) is int:
                value = value.detach()
                self.sums[name].add_(value.reshape(()) if value.ndim else value, alpha=rows)
                self.counts[name] += rows
            elif isinstance(value, Average):
                self._add_average(name, value)
            elif isinstance(rows, UnknownRows):
                rows.refuse()
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
        read = {
            name: _mean(total, counts[name]) for name, total in zip(names, numbers, strict=True)
        }
        if self.objects and self.everywhere_updated():
            self.syncs = self.world is not None
            for name in self.objects:
                self.answers[name] = self._computed(name)
                self.columns[name] = list(self.answers[name])
            self.syncs = False
            check_columns(self.columns, read)
            for columns in self.answers.values():
                read |= columns
        return {name: read[name] for name in self._ordered(read)}

    def summed(self) -> tuple[list[Tensor], dict[str, Any]]:
        """Sums and counts of all processes."""
        assert self.world is not None
        counts = [_zero(self.device) + self.counts[name] for name in self.sums]
        together = self.world.add_up(torch.stack([*self.sums.values(), *counts]))
        sums, counted = together.split(len(self.sums))
        return list(sums), dict(zip(self.sums, counted, strict=True))

    def everywhere_updated(self) -> bool:
        """Whether the objects have seen rows: torchmetrics needs that in each process, or in none."""
        if self.world is None:
            return self.updated
        some, none = self.world.agree(self.updated, not self.updated)
        in_each = not all(isinstance(metric, OnAllRows) for metric in self.objects.values())
        if some and none and in_each:
            raise ValueError(
                f"there are fewer rows than processes, {self.world.size}, and the metric objects of one have seen "
                f"none. Give more rows, or start fewer processes."
            )
        return bool(some)

    def _computed(self, name: str) -> dict[str, float]:
        """What an object answers at the end of a pass, by column."""
        metric = self.objects[name]

        def read(answer: Any) -> dict[str, float]:
            return columns_of(
                name, answer, "its function" if isinstance(metric, OnAllRows) else "compute()"
            )

        try:
            if isinstance(metric, OnAllRows) and self.world is not None:
                return compute_on_all_processes(metric, self.world, read)
            return read(metric.compute())
        except Exception as error:
            error.add_note(f"metric {name!r}, computed at the end of a pass")
            raise

    def _so_far(self, name: str) -> dict[str, float]:
        """What an object answers in the middle of a pass, by column; nothing where it cannot yet.

        An object that is none of torchmetrics may change as it computes: a copy is asked.
        """
        if not self.updated:
            return {}
        if name not in self.answers:
            metric = self.objects[name]
            columns: dict[str, float] = {}
            if not isinstance(metric, OnAllRows):
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of rows that are too few
                        asked = metric if _parts_that_sync(metric) else copy.deepcopy(metric)
                        columns = columns_of(name, asked.compute())
                except Exception:
                    columns = {}
            self.answers[name] = columns
        return self.answers[name]

    def __getitem__(self, name: str) -> float:
        if name in self.sums:
            return _mean(self.sums[name], self.counts[name])
        for owner in self.objects if self.updated else ():
            if name == owner or name.startswith(f"{owner}_"):
                columns = self._so_far(owner)
                if name in columns:
                    return columns[name]
                if name == owner or name in self.columns.get(owner, ()):
                    return math.nan  # not known yet
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        known = list(self.sums)
        for name in self.objects:
            known += self._so_far(name)
        return iter(self._ordered(known))

    def _ordered(self, known: Collection[str]) -> list[str]:
        """Names in the order of the columns; what else a step returns follows."""
        ordered: list[str] = []
        for name in self.names:
            ordered += self.answers.get(name, {}) if name in self.objects else [name]
        first = [name for name in ordered if name in known]
        return first + [name for name in known if name not in first]

    def __len__(self) -> int:
        return len(list(iter(self)))


def by_column(metrics_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A metric for each column of the history: a torchmetrics.MetricCollection is its members, under their own names.

    Raises:
        ValueError: two of them have the same name.
    """
    columns: dict[str, Any] = {}
    for name, metric in metrics_dict.items():
        members = (
            dict(metric.items())
            if isinstance(metric, nn.ModuleDict) and is_stateful(metric)
            else {name: metric}
        )
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
        constant = callable(value) or isinstance(
            value, (Enum, nn.Module, torch.device, torch.dtype, nn.Parameter)
        )
        if (
            key not in kept
            and not constant
            and not (isinstance(holder, nn.Module) and key.startswith("_"))
        ):
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
    return type(value) in (Tensor, bool, int, float, str, type(None)) or isinstance(
        value, (np.ndarray, np.generic)
    )


def hold_back(metric: Any, name: str, syncs: Callable[[], bool]) -> None:
    """A torchmetrics object speaks with other processes when `syncs` says so, and not whenever it is read.

    Raises:
        TypeError: it is another object, whose counts cannot be put together.
    """
    if isinstance(metric, OnAllRows):
        return
    parts = _parts_that_sync(metric)
    if not parts:
        raise TypeError(
            f"metric {name!r} is a {type(metric).__name__}, an object whose counts in several processes cannot be put "
            f"together. Give a function that returns a mean or an Average(total, count), "
            f"minikeras.OnAllRows(function), or a torchmetrics object."
        )
    for part in parts:
        part.distributed_available_fn = syncs
        part.compute_with_cache = False  # what was read before was of this process alone


def _parts_that_sync(metric: Any) -> list[Any]:
    """Those parts of a metric that are torchmetrics objects."""
    modules = metric.modules() if isinstance(metric, nn.Module) else ()
    return [part for part in modules if hasattr(part, "distributed_available_fn")]


def detached(nest: Any) -> Any:
    """A nest whose tensors are cut off from what they were computed from."""
    if isinstance(nest, Tensor):
        return nest.detach()
    return map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, nest)


def _plain_call(
    name: str, function: Callable[..., Any], outputs: Any, labels: Any, scalar: bool = True
) -> Any:
    return function(outputs, labels)


def _on(device: torch.device, metric: Any) -> Any:
    return metric.to(device) if hasattr(metric, "to") else metric


def _mean(total: Tensor | float, count: Tensor | float) -> float:
    return (
        float(total) / float(count) if count else math.nan
    )  # nothing counted, as when every token is padding


def _zero(device: torch.device) -> Tensor:
    try:
        return torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # MPS has no float64
        return torch.zeros((), dtype=torch.float32, device=device)
