"""Running totals of loss and metrics, added up on the device and read only when asked.

each batch:
    (phase.py)                     functions are called, update/compute/reset objects are updated
    add(results, rows)             sum += value * rows, count += rows; an Average is added as it is
when asked:
    totals["loss"], means()        sum / count; this waits for the device
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minikeras.callback import BatchLogs
from minikeras.columns import check_columns, find_columns
from minikeras.metric_objects import (
    View,
    find_syncing_parts,
    get_state,
    is_stateful,
    needs_all_rows,
    set_state,
    source_of,
    with_view,
)
from minikeras.nests import detach_nest, map_leaves
from minikeras.processes import OneProcess
from minikeras.results import (
    Average,
    LossParts,
    Result,
    check_average,
    check_number,
    is_readable,
)
from minikeras.rows import UnknownRows


class BatchValues(Mapping[str, float]):
    """What a step returned for one batch, read from the device when it is looked up.

    Of the results of several steps together it takes `last_batch`, those of the last step.
    """

    def __init__(self, results: Mapping[str, Result], is_filler: bool) -> None:
        results = getattr(results, "last_batch", results)
        self.results = detach_nest(dict(results))  # a mapping that is kept must keep no graph
        self.is_filler = is_filler

    def __getitem__(self, name: str) -> float:
        value = self.results[name]
        return math.nan if self.is_filler else float(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        return repr(dict(self))


class Totals(BatchLogs):
    """The running totals of training or validation; reads as a mapping of name -> mean so far."""

    def __init__(
        self,
        metrics_dict: Mapping[str, Any],
        device: torch.device,
        world: OneProcess,
        views: Mapping[str, View] | None = None,
        columns_of_loss: Iterable[str] = (),
    ) -> None:
        self.device = device
        self.world = world
        # the order of columns; other names follow
        self.names = ["loss", *columns_of_loss, *metrics_dict]
        self.functions: dict[str, Any] = {}
        self.objects: dict[str, Any] = {}
        self.views = dict(views or {})  # what some of them see of a batch
        # functions, and the update of objects, called with outputs and labels: they use the views
        self.calls: dict[str, Any] = {}
        self.updates: dict[str, Any] = {}
        for name, metric in metrics_dict.items():
            view = self.views.get(name)
            if is_stateful(metric):
                own = _on(device, copy.deepcopy(metric))
                self.objects[name] = own
                self.updates[name] = with_view(own.update, view)
            else:
                self.functions[name] = metric
                self.calls[name] = with_view(metric, view)
        # torchmetrics objects speak with other processes by themselves: at the end of a pass alone
        self.is_syncing = False
        for name, metric in self.objects.items():
            world.prepare_metric(metric, name, lambda: self.is_syncing)
        self.columns: dict[str, list[str]] = {}  # of each object, as its last answer had them
        # what the last step returned, and whether that counts for nothing; while callbacks listen
        self.last: tuple[Mapping[str, Result], bool] = ({}, False)
        self.reset()

    def reset(self) -> None:
        """Forget everything counted."""
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Any] = {}
        # columns that are a weighted sum of others: what is in `sums` under their name is added
        self.weights: dict[str, dict[str, float]] = {}
        self.updated = False
        # answers of the objects that were asked since their last update
        self.answers: dict[str, dict[str, float]] = {}
        for metric in self.objects.values():
            metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """Where the totals stand."""
        objects = {
            name: get_state(metric, f"metric {name!r}") for name, metric in self.objects.items()
        }
        own = {
            "sums": self.sums,
            "counts": self.counts,
            "weights": self.weights,
            "names": self.names,
            "updated": self.updated,
        }
        return own | {"objects": objects}

    def load_state_dict(self, state: Mapping[str, Any], counted: bool = True) -> None:
        """Count on from what `state_dict` returned; unless `counted` from its names alone.

        Another process has the rest then.
        """
        self.weights = dict(state.get("weights", {}))  # older files have none
        if not counted:
            self._begin(state["sums"])
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

    def mark_updated(self) -> None:
        """Note that the objects have taken in a batch."""
        self.updated = True
        if self.answers:
            self.answers = {}

    def add(
        self, results: Mapping[str, Result], rows: int | UnknownRows, is_filler: bool = False
    ) -> None:
        """Add what a step returned for a batch of so many rows; a filler adds nothing."""
        if results.keys() != self.sums.keys():
            results = self._start(results)
        if is_filler:
            return
        for name, value in results.items():
            if isinstance(value, Tensor) and type(rows) is int:
                value = value.detach()
                self.sums[name].add_(value.reshape(()) if value.ndim else value, alpha=rows)
                self.counts[name] += rows
            elif isinstance(value, Average):
                self._add_average(name, value)
            elif isinstance(value, LossParts):
                self._add_rest(name, value, rows)
            elif isinstance(rows, UnknownRows):
                rows.refuse()
            else:
                if not isinstance(value, float):
                    check_number(f"{name!r}", value)
                self.sums[name] += float(value) * rows
                self.counts[name] += rows

    def _add_rest(self, name: str, loss: LossParts, rows: int | UnknownRows) -> None:
        """Add what is added to the weighted sum of parts, which are columns of their own."""
        if isinstance(loss.added, Average):
            self._add_average(name, loss.added)
            return
        if isinstance(rows, UnknownRows):
            rows = 1  # a penalty does not depend on the rows
        self.sums[name] += detach_nest(loss.added) * rows
        self.counts[name] += rows

    def _add_average(self, name: str, average: Average) -> None:
        check_average(f"{name!r}", average)
        total, count = average
        total = total.detach().reshape(()) if isinstance(total, Tensor) else float(total)
        if isinstance(count, Tensor) and is_readable(count):
            count = count.item()
        if not isinstance(count, Tensor):
            if count != 0:  # a total over nothing may be NaN
                self.sums[name] += total
                self.counts[name] += count
            return
        count = count.detach().reshape(())
        if not isinstance(self.counts[name], Tensor):
            self.counts[name] = _zero(self.device) + self.counts[name]
        nothing = count.to(self.device) == 0
        self.sums[name] = torch.where(nothing, self.sums[name], self.sums[name] + total)
        self.counts[name] += count

    def _start(self, results: Mapping[str, Result]) -> Mapping[str, Result]:
        """Take the names of a step's results, with the parts of a loss that it left out."""
        complete = dict(results)
        for value in results.values():
            if isinstance(value, LossParts):
                complete = value.parts | complete
        if complete.keys() != self.sums.keys():
            self._begin(complete)
        return complete

    def _begin(self, results: Mapping[str, Any]) -> None:
        if self.sums:
            raise ValueError(
                f"a step returned {', '.join(results) or 'nothing'} and the one before it "
                f"{', '.join(self.sums)}; expected the same names at each step, since the history "
                "has a column for each."
            )
        self.sums = {name: _zero(self.device) for name in results}
        self.counts = dict.fromkeys(results, 0)
        for name, value in results.items():
            if isinstance(value, LossParts):
                self.weights[name] = value.weights

    @property
    def batch(self) -> Mapping[str, float]:
        """Return the values of the last batch alone."""
        return BatchValues(*self.last)

    def means(self, sums: list[Tensor], counts: Mapping[str, Any]) -> dict[str, float]:
        """Return every mean so far, read from the device together, from what `summed` returned."""
        read: dict[str, float] = {}
        if sums:
            numbers = torch.stack(sums).tolist()  # waits for the device, once
            for name, total in zip(self.sums, numbers, strict=True):
                read[name] = _mean(total, counts[name])
            for name, weights in self.weights.items():
                read[name] += _weighted_sum(weights, read)
        if self.objects and self.world.have_updated(self.objects.values(), self.updated):
            self.is_syncing = True
            for name in self.objects:
                self.answers[name] = self._computed(name)
                self.columns[name] = list(self.answers[name])
            self.is_syncing = False
            check_columns(self.columns, read)
            for columns in self.answers.values():
                read |= columns
        return {name: read[name] for name in self._ordered(read)}

    def summed(self) -> tuple[list[Tensor], Mapping[str, Any]]:
        """Return sums and counts of all processes."""
        return self.world.add_up_totals(list(self.sums.values()), self.counts)

    def _computed(self, name: str) -> dict[str, float]:
        """What an object answers at the end of a pass, by column."""
        metric = self.objects[name]

        def read(answer: Any) -> dict[str, float]:
            return find_columns(name, answer, source_of(metric))

        try:
            return self.world.compute_metric(metric, read)
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
            if not needs_all_rows(metric):
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of rows that are too few
                        asked = metric if find_syncing_parts(metric) else copy.deepcopy(metric)
                        columns = find_columns(name, asked.compute())
                except Exception:
                    columns = {}
            self.answers[name] = columns
        return self.answers[name]

    def __getitem__(self, name: str) -> float:
        if name in self.sums:
            mean = _mean(self.sums[name], self.counts[name])
            if name in self.weights:
                mean += _weighted_sum(self.weights[name], self)
            return mean
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


def _on(device: torch.device, metric: Any) -> Any:
    return metric.to(device) if hasattr(metric, "to") else metric


def _mean(total: Tensor | float, count: Tensor | float) -> float:
    if not count:  # as when every token is padding
        return math.nan
    return float(total) / float(count)


def _weighted_sum(weights: Mapping[str, float], means: Mapping[str, float]) -> float:
    """Add up means by their weights; one of weight 0 may be NaN."""
    return sum(weight * means[name] for name, weight in weights.items() if weight)


def _zero(device: torch.device) -> Tensor:
    try:
        return torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # MPS has no float64
        return torch.zeros((), dtype=torch.float32, device=device)
