"""`Transformed`: a metric on a part or a function of the outputs and labels.

metric_objects.find_view takes it apart: the bare metric is named, copied, moved and saved, and its
`view` gives it what it sees of each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minikeras.errors import describe, write_instance
from minikeras.metric_objects import is_metric, is_stateful


class Transformed:
    """A metric of `metrics_dict` that sees a function of the outputs and labels.

    Use it for a metric of one of several outputs, for a metric that takes probabilities if the
    model returns raw scores, or for labels of another dtype.

    Args:
        metric: any metric of `metrics_dict`: a function of (y_pred, y_true); an object with
            update, compute and reset, such as `minikeras.OnAllRows` or one of torchmetrics, also a
            MetricCollection; or another `Transformed`, which gets what this one returns.
        y_pred: a function of the outputs of a batch, which returns what the metric gets as
            y_pred. Default: the outputs themselves.
        y_true: a function of the labels of a batch, which returns what the metric gets as
            y_true. Default: the labels themselves.

    The metric is called in every other way as without it: checks, checkpoints, several processes
    and the names of the columns are the same.

    Raises:
        TypeError: `metric` is no metric, or `y_pred` or `y_true` is no function.

    >>> import minikeras, torch
    >>> from torch import nn
    >>> def accuracy(y_pred, y_true):
    ...     return ((y_pred > 0.5) == y_true.bool()).float().mean()
    >>> model = minikeras.Model(nn.Identity())  # raw scores: above 0 is a yes
    >>> metrics_dict = {
    ...     "wrong": accuracy,
    ...     "accuracy": minikeras.Transformed(accuracy, y_pred=torch.sigmoid),
    ... }
    >>> model.compile(nn.BCEWithLogitsLoss(), metrics_dict=metrics_dict, device="cpu")
    >>> values = model.evaluate((torch.tensor([[-1.0], [0.2], [2.0]]), torch.ones(3, 1)))
    >>> round(values["val_wrong"], 4), round(values["val_accuracy"], 4)
    (0.3333, 0.6667)
    """

    has_view = True  # for metric_objects.find_view

    def __init__(
        self,
        metric: Any,
        y_pred: Callable[[Any], Any] | None = None,
        y_true: Callable[[Any], Any] | None = None,
    ) -> None:
        _check_metric(metric)
        for name, function in (("y_pred", y_pred), ("y_true", y_true)):
            _check_function(name, function)
        self.metric = metric
        self.y_pred = y_pred
        self.y_true = y_true
        self.view: Callable[[Any, Any], tuple[Any, Any]] = _make_view(y_pred, y_true)

    def __repr__(self) -> str:
        shown = [repr(self.metric)]
        for name, function in (("y_pred", self.y_pred), ("y_true", self.y_true)):
            if function is not None:
                shown.append(f"{name}={getattr(function, '__name__', repr(function))}")
        return f"Transformed({', '.join(shown)})"


def _make_view(
    y_pred: Callable[[Any], Any] | None, y_true: Callable[[Any], Any] | None
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return a function of (outputs, labels) that gives both as the metric sees them.

    It is a plain function, which a compiled graph can contain and a check can copy.
    """

    def view(outputs: Any, labels: Any) -> tuple[Any, Any]:
        if y_pred is not None:
            outputs = y_pred(outputs)
        if y_true is not None:
            labels = y_true(labels)
        return outputs, labels

    return view


def _check_metric(metric: Any) -> None:
    """Check that this is a metric, and an instance."""
    if isinstance(metric, type):
        raise TypeError(
            f"`metric` is the class {metric.__name__}; expected an instance. Pass "
            f"Transformed({write_instance(metric)}, ...)."
        )
    if not is_metric(metric):
        raise TypeError(
            "`metric` must be a function of (y_pred, y_true) or an object with update, compute and "
            f"reset, got {describe(metric)}. Pass for instance "
            "Transformed(accuracy, y_pred=torch.sigmoid); with several metrics, wrap each."
        )


def _check_function(name: str, function: Any) -> None:
    """Check that `y_pred` or `y_true` is None or a function, and neither a class nor data."""
    if function is None:
        return
    if is_stateful(function) or (is_metric(function) and not callable(function)):
        raise TypeError(
            f"`{name}` must be a function, got the metric {type(function).__name__}. The metric "
            "comes first: Transformed(metric, y_pred=function)."
        )
    if isinstance(function, type) or not callable(function):
        got = f"the class {function.__name__}" if isinstance(function, type) else repr(function)
        if hasattr(function, "shape"):
            got = describe(function)
        what = "outputs" if name == "y_pred" else "labels"
        raise TypeError(
            f"`{name}` must be a function of the {what} of a batch, got {got}. Pass for instance "
            f"{name}=lambda {what}: {what}[0], which gives the first of several."
        )
