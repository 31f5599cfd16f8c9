"""Several outputs: losses and metrics by the names of the outputs.

compile({"digit": loss, "parity": (loss, 0.5)}, metrics_dict={"digit": {"accuracy": accuracy}})
    LossesByName     a loss_func whose parts are added up by their weights: `results.LossParts`
    name_by_output   metrics_dict with a dict for an output -> one with a metric for each column

The outputs and labels are dicts (the names are their keys), named tuples or dataclasses (their
fields), or tuples and lists (their positions 0, 1, ...).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from minikeras.columns import check_name
from minikeras.errors import check_number_in_range, describe, did_you_mean
from minikeras.metric_objects import find_view, name_metrics
from minikeras.nests import names_in
from minikeras.results import LossParts

Name = str | int  # of an output
NAME_OUTPUTS = "Name losses and metrics after the outputs that forward returns."
NAME_LABELS = "Give each output with a loss or a metric a label of the same name."


def call_loss(name: Name, loss: Callable[..., Any], y_pred: Any, y_true: Any) -> Any:
    """Call the loss of an output."""
    return loss(y_pred, y_true)


class LossesByName(nn.Module):
    """A loss for each of several outputs; the sum of loss * weight is trained.

    Args:
        losses: name of an output -> its loss, or (loss, weight).

    Raises:
        TypeError: a name or a value is of another kind.
        ValueError: a weight that is negative, NaN or infinite, or no weight above 0; two outputs
            with the same column.
    """

    has_parts = True  # for results.losses_in

    def __init__(self, losses: Mapping[Any, Any]) -> None:
        super().__init__()
        self.losses: dict[Name, Any] = {}
        self.columns: dict[Name, str] = {}
        self.weights: dict[str, float] = {}  # of columns
        for name, given in losses.items():
            check_output_name("loss_func", name)
            column = f"{name}_loss"
            check_name("loss_func gives a column", column, ("loss", "lr", "epoch"))
            if column in self.weights:
                raise ValueError(
                    f"loss_func has two outputs whose column is {column!r}; expected a column for "
                    "each. Name one of them otherwise."
                )
            loss, weight = split_weight(name, given)
            self.losses[name] = loss
            self.columns[name] = column
            self.weights[column] = weight
            if isinstance(loss, nn.Module):
                self.add_module(column.replace(".", "/"), loss)
        if not any(self.weights.values()):
            what = "is an empty dict"
            if self.weights:
                what = "gives every output the weight 0, so that nothing would be trained"
            raise ValueError(
                f"loss_func {what}; expected at least one loss with a weight above 0. Pass for "
                'instance {"digit": nn.CrossEntropyLoss(), "parity": (nn.BCEWithLogitsLoss(), '
                "0.5)}."
            )
        self.call: Callable[..., Any] = call_loss
        # a checkpoint compares this text
        self.__qualname__ = self.text()

    def forward(self, outputs: Any, labels: Any) -> LossParts:
        parts = {}
        for name, loss in self.losses.items():
            y_pred = pick(outputs, name, f"loss {name!r}: the outputs", NAME_OUTPUTS)
            y_true = pick(labels, name, f"loss {name!r}: the labels", NAME_LABELS)
            parts[self.columns[name]] = self.call(name, loss, y_pred, y_true)
        return LossParts(parts, self.weights)

    def text(self) -> str:
        """Return losses and weights in a line."""
        shown = []
        for name, loss in self.losses.items():
            weight = self.weights[self.columns[name]]
            kind = getattr(loss, "__qualname__", type(loss).__qualname__)
            shown.append(f"{name!r}: {kind if weight == 1 else f'({kind}, {weight:g})'}")
        return "{" + ", ".join(shown) + "}"

    @contextlib.contextmanager
    def call_losses_by(self, call: Callable[..., Any]) -> Iterator[None]:
        """Call each loss through a function of (name, loss, y_pred, y_true) meanwhile."""
        self.call = call
        try:
            yield
        finally:
            self.call = call_loss


def check_output_name(argument: str, name: Any) -> None:
    """Check the name of an output: a string, or a position.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise TypeError(
            f"{argument} has the name {name!r} for an output; expected a string, or a position 0, "
            "1, ... if forward returns a tuple."
        )


def split_weight(name: Name, given: Any) -> tuple[Any, float]:
    """Return a loss and its weight, 1.0 if it has none.

    Raises:
        TypeError, ValueError: this is no loss or pair, or its weight is no constant of 0 or more.
    """
    if given is None:
        raise TypeError(
            f"loss {name!r} is None; expected a loss or a pair (loss, weight). Leave {name!r} out, "
            "and its label too: an output needs no loss."
        )
    if not isinstance(given, tuple | list):
        if isinstance(given, Mapping):
            raise TypeError(
                f"loss {name!r} must be a loss or a pair (loss, weight), got {describe(given)}. "
                "For several losses of one output pass a function that adds them up."
            )
        return given, 1.0
    if len(given) != 2:
        raise TypeError(
            f"loss {name!r} must be a loss or a pair (loss, weight), got {describe(given)}. Pass "
            "for instance (nn.MSELoss(), 0.5)."
        )
    loss, weight = given
    if callable(weight):
        raise TypeError(
            f"loss {name!r} must be a pair (loss, weight), got {describe(given)}. Pass the loss "
            "first, for instance (nn.MSELoss(), 0.5)."
        )
    if getattr(weight, "requires_grad", False):
        raise TypeError(
            f"the weight of loss {name!r} must be a constant, got {describe(weight)} with a "
            "gradient, which would not be trained. For a weight that is learned write a loss "
            "module that has it as a parameter."
        )
    number = check_number_in_range(
        f"the weight of loss {name!r}",
        weight,
        "of 0 or more, and finite",
        lambda number: 0 <= number < math.inf,
    )
    return loss, number


def pick(nest: Any, name: Name, what: str, remedy: str) -> Any:
    """Return the part of outputs or labels that has this name.

    Args:
        what, remedy: the first and last words of the error.

    Raises:
        ValueError: there is no such part.
    """
    if isinstance(nest, Mapping):
        if name in nest.keys():  # noqa: SIM118 - a TensorDict has rows, and no `in`
            return nest[name]
    elif isinstance(nest, tuple | list) and not hasattr(nest, "_fields"):
        if isinstance(name, int) and 0 <= name < len(nest):
            return nest[name]
    elif hasattr(nest, "_fields") or dataclasses.is_dataclass(nest):
        if isinstance(name, str) and name in (names_in(nest) or ()):
            return getattr(nest, name)
    raise missing_part(nest, name, what, remedy)


def missing_part(nest: Any, name: Name, what: str, remedy: str) -> ValueError:
    """Return the error for outputs or labels that have no part of this name."""
    names = names_in(nest)
    if names is None:
        return ValueError(
            f"{what} are {describe(nest)}; expected a dict, a named tuple or a tuple with a part "
            f"{name!r}. {remedy}"
        )
    shown = ", ".join(map(repr, names)) or "no parts"
    hint = did_you_mean(name, map(str, names)) if isinstance(name, str) else ""
    return ValueError(f"{what} have no part {name!r}; there are {shown}.{hint} {remedy}")


# --- metrics --------------------------------------------------------------------------------------


class MetricOfOutput:
    """A metric of one output.

    Args:
        metric: a metric, which may have a view itself.
        output: the name of the output and its label.
        key: the column, for messages.
    """

    has_view = True  # for metric_objects.find_view

    def __init__(self, metric: Any, output: Name, key: str) -> None:
        self.metric = metric

        def view(outputs: Any, labels: Any) -> tuple[Any, Any]:
            y_pred = pick(outputs, output, f"metric {key!r}: the outputs", NAME_OUTPUTS)
            y_true = pick(labels, output, f"metric {key!r}: the labels", NAME_LABELS)
            return y_pred, y_true

        view.output = output  # type: ignore[attr-defined] # the checks ask which labels are used
        self.view = view


def name_by_output(metrics_dict: Mapping[Any, Any]) -> dict[str, Any]:
    """Give each metric of an output a name of its own: {"digit": {"a": f}} becomes "digit_a".

    Raises:
        TypeError: an output has a name of another kind.
        ValueError: two metrics have the same name.
    """
    flat: dict[str, Any] = {}
    for name, given in metrics_dict.items():
        members = {name: given}
        if isinstance(given, Mapping):
            check_output_name("metrics_dict", name)
            members = {}
            for own_name, metric in expand(given).items():
                key = f"{name}_{own_name}"
                members[key] = MetricOfOutput(metric, name, key)
        twice = sorted(flat.keys() & members.keys())
        if twice:
            raise ValueError(
                f"metrics_dict gives two metrics the name {twice[0]!r}; expected a column for "
                "each. Give one of them another name."
            )
        flat |= members
    return flat


def expand(metrics: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the metrics of an output, with the members of a MetricCollection by their names."""
    expanded: dict[Any, Any] = {}
    for name, metric in metrics.items():
        bare, view = find_view(metric)
        members, _ = name_metrics({name: bare})
        for key, member in members.items():
            expanded[key] = member if view is None else MetricWithView(member, view)
    return expanded


class MetricWithView:
    """A metric with a view."""

    has_view = True  # for metric_objects.find_view

    def __init__(self, metric: Any, view: Callable[[Any, Any], tuple[Any, Any]]) -> None:
        self.metric = metric
        self.view = view
