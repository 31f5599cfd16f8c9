"""Metrics by name, and metric objects: those with update, compute and reset, as torchmetrics has.

You may skip this file at a first reading.

name_metrics           metrics_dict -> bare metrics, and what some of them see of a batch
get_state, set_state   what an object has counted, for a checkpoint
find_syncing_parts     the parts of torchmetrics that speak with other processes
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# of (outputs, labels): what a metric gets as (y_pred, y_true)
View = Callable[[Any, Any], tuple[Any, Any]]


def is_metric(metric: Any) -> bool:
    """Whether this can be a metric: a function, an object, or one of them with a view."""
    return callable(metric) or is_stateful(metric) or _has_view(metric)


def is_stateful(metric: Any) -> bool:
    """Whether a metric is an object with update, compute and reset, as torchmetrics has them."""
    return all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset"))


def needs_all_rows(metric: Any) -> bool:
    """Whether a metric is computed once, from all rows, as `OnAllRows` is."""
    return bool(getattr(type(metric), "needs_all_rows", False))


def source_of(metric: Any) -> str:
    """What gives a metric object's answer, for messages."""
    return "its function" if needs_all_rows(metric) else "compute()"


def name_metrics(metrics_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, View]]:
    """Give each metric a name; a torchmetrics.MetricCollection becomes its members, by their names.

    Returns:
        name -> bare metric; and name -> view, of those that do not see outputs and labels whole.

    Raises:
        ValueError: two of them have the same name.
    """
    metrics: dict[str, Any] = {}
    views: dict[str, View] = {}
    for name, given in metrics_dict.items():
        metric, view = find_view(given)
        members = {name: metric}
        if isinstance(metric, nn.ModuleDict) and is_stateful(metric):
            members = dict(metric.items())
        twice = sorted(metrics.keys() & members.keys())
        if twice:
            raise ValueError(
                f"metrics_dict gives two metrics the name {twice[0]!r}: a MetricCollection has a "
                "column for each of its members, under their own names. Give it a prefix: "
                "MetricCollection(..., "
                f'prefix="{name}_").'
            )
        metrics |= members
        if view is not None:
            views |= dict.fromkeys(members, view)
    return metrics, views


def find_view(metric: Any) -> tuple[Any, View | None]:
    """Take a metric apart: the bare metric, and its view or None if it has none.

    A metric has a view if its class has `has_view = True`; its `metric` may have one as well, which
    is called after it.
    """
    views: list[View] = []
    while _has_view(metric):
        views.append(metric.view)
        metric = metric.metric
    if len(views) < 2:
        return metric, views[0] if views else None

    def view(outputs: Any, labels: Any) -> tuple[Any, Any]:
        for each in views:
            outputs, labels = each(outputs, labels)
        return outputs, labels

    return metric, view


def _has_view(metric: Any) -> bool:
    return bool(getattr(type(metric), "has_view", False))


def with_view(function: Callable[[Any, Any], Any], view: View | None) -> Callable[[Any, Any], Any]:
    """Return a function of (outputs, labels) that passes on what the view gives."""
    if view is None:
        return function

    def see_and_call(outputs: Any, labels: Any) -> Any:
        y_pred, y_true = view(outputs, labels)
        return function(y_pred, y_true)

    return see_and_call


def get_state(metric: Any, name: str) -> dict[str, Any]:
    """Return what a metric object has counted: its state_dict, or its and its parts' attributes."""
    if isinstance(metric, nn.Module):
        return {path: collect_attributes(module, name) for path, module in metric.named_modules()}
    return (
        metric.state_dict() if hasattr(metric, "state_dict") else collect_attributes(metric, name)
    )


def set_state(metric: Any, state: Mapping[str, Any]) -> None:
    """Give a metric object what `get_state` returned."""
    if isinstance(metric, nn.Module):
        for path, module in metric.named_modules():
            buffers = dict(module.named_buffers(recurse=False))
            for key, value in state[path].items():
                vars(module)[key] = value if key not in buffers else buffers[key].copy_(value)
    elif hasattr(metric, "load_state_dict"):
        metric.load_state_dict(state)
    else:
        vars(metric).update(copy.deepcopy(dict(state)))


def collect_attributes(holder: Any, name: str) -> dict[str, Any]:
    """Return the attributes that may change: tensors, arrays, numbers, strings, containers of them.

    Raises:
        TypeError: one is of another kind, and not plainly a constant as functions and settings are.
    """
    is_module = isinstance(holder, nn.Module)
    kept = {}
    for key, value in vars(holder).items():
        if is_countable(value):
            kept[key] = value
        elif not (is_constant(value) or (is_module and key.startswith("_"))):
            raise TypeError(
                f"{name} holds a {type(value).__name__} in .{key}, which a checkpoint cannot "
                "hold. Give the metric state_dict() and load_state_dict(state) of tensors, "
                "numbers, lists and dicts."
            )
    if is_module:
        kept |= dict(holder.named_buffers(recurse=False))
    return kept


def is_constant(value: Any) -> bool:
    """Tell whether a value is plainly none that a metric counts with."""
    kinds = (Enum, nn.Module, torch.device, torch.dtype, nn.Parameter)
    return callable(value) or isinstance(value, kinds)


def is_countable(value: Any) -> bool:
    """Tell whether a metric may count with a value, and a checkpoint can hold it."""
    if type(value) in (list, tuple, set):
        return all(map(is_countable, value))
    if type(value) is dict:
        return all(map(is_countable, (*value, *value.values())))
    if isinstance(value, (np.ndarray, np.generic)):
        return True
    return type(value) in (Tensor, bool, int, float, str, type(None))


def find_syncing_parts(metric: Any) -> list[Any]:
    """Those parts of a metric that are torchmetrics objects."""
    modules = metric.modules() if isinstance(metric, nn.Module) else ()
    return [part for part in modules if hasattr(part, "distributed_available_fn")]
