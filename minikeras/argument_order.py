"""Find losses and metrics that take the labels first, as in Keras and scikit-learn.

minikeras calls them with (y_pred, y_true), so such a function would compute another number.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

LABELS = (
    "y",
    "y_true",
    "y_test",
    "y_val",
    "y_valid",
    "ytrue",
    "true",
    "trues",
    "truth",
    "ground_truth",
    "gt",
    "target",
    "targets",
    "label",
    "labels",
    "labels_true",
    "actual",
    "actuals",
    "reference",
    "references",
)
PREDICTIONS = (
    "y_pred",
    "y_hat",
    "y_prob",
    "y_proba",
    "y_score",
    "y_scores",
    "y_logits",
    "ypred",
    "yhat",
    "pred",
    "preds",
    "pred_decision",
    "prediction",
    "predictions",
    "predicted",
    "labels_pred",
    "input",
    "inputs",
    "output",
    "outputs",
    "logit",
    "logits",
    "score",
    "scores",
    "prob",
    "probs",
    "proba",
)


def find_labels_first(function: Callable[..., Any]) -> str | None:
    """Return the name of a function's first argument if it takes labels first, predictions second.

    Both names must say so, or the first is y_true: of a function with other names nothing is known.

    >>> find_labels_first(lambda y_true, y_pred: 0)
    'y_true'
    >>> find_labels_first(nn.MSELoss())  # (input, target)
    """
    try:
        parameters = inspect.signature(_find_called(function)).parameters.values()
    except (TypeError, ValueError):  # a builtin may have no signature
        return None
    names = []
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if len(names) < 2:
        return None
    first, second = (name.lower().strip("_") for name in names[:2])
    if first == "y_true" or (first in LABELS and second in PREDICTIONS):
        return names[0]
    return None


def write_swapped(function: Callable[..., Any], wrapper: str = "") -> str:
    """Write what to do with a function that takes the labels first.

    Args:
        wrapper: what the function goes into, such as OnAllRows.

    >>> def mape(y_true, y_pred):
    ...     return ((y_true - y_pred) / y_true).abs().mean()
    >>> write_swapped(mape)
    'Pass lambda y_pred, y_true: mape(y_true, y_pred).'
    """
    called = _find_called(function)
    if called is not function:
        return f"Swap the two arguments of its {called.__name__}."
    name = name_function(function)
    if name == "<lambda>":
        return "Swap its two arguments: lambda y_pred, y_true: ..."
    extra = ""
    if isinstance(function, functools.partial):
        for key, value in function.keywords.items():
            is_plain = value is None or isinstance(value, bool | int | float | str)
            extra += f", {key}={value!r}" if is_plain else f", {key}=..."
    line = f"lambda y_pred, y_true: {name}(y_true, y_pred{extra})"
    if wrapper:
        line = f"{wrapper}({line})"
    return f"Pass {line}."


def name_function(function: Any) -> str:
    """Name a function, the one in a `functools.partial`, or the class of an object."""
    function = _unwrap_partial(function)
    return str(getattr(function, "__name__", type(function).__name__))


def is_of_sklearn(function: Any) -> bool:
    """Tell whether a function, or the one in a `functools.partial`, is one of scikit-learn's."""
    module = getattr(_unwrap_partial(function), "__module__", None) or ""
    return str(module).partition(".")[0] == "sklearn"


def _unwrap_partial(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _find_called(function: Any) -> Any:
    """Return the method that gets outputs and labels, or the function itself."""
    update = getattr(function, "update", None)
    if callable(update) and callable(getattr(function, "compute", None)):
        return update
    if isinstance(function, nn.Module):
        return getattr(function, "_orig_mod", function).forward  # torch.compile wraps a module
    is_object = not hasattr(_unwrap_partial(function), "__name__")
    return function.__call__ if is_object else function
