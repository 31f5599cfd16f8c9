"""Warn of torchmetrics objects that take some batches of raw scores for probabilities."""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from minikeras.checks.classes import adds_up_to_one

# words in the names of metrics for which only the order of a row's scores counts
BY_ORDER = ("Ranking", "Coverage")
# words in the names of multiclass metrics that use more than the class with the highest score
BY_PROBABILITY = (
    "AUROC",
    "AveragePrecision",
    "ROC",
    "PrecisionRecallCurve",
    "CalibrationError",
    "HingeLoss",
    "AtFixed",
)
FUNCTIONS_OF_SCORES = (F.binary_cross_entropy_with_logits, F.cross_entropy)


def warn_of_raw_scores(name: str, metric: Any, y_pred: Any, loss_func: Any) -> bool:
    """Warn of a torchmetrics object that takes some batches of raw scores for probabilities.

    torchmetrics applies a sigmoid (a softmax, for several classes) to a batch in which a score is
    below 0 or above 1, and takes a batch without such a score for probabilities.

    Args:
        y_pred: what the metric gets.
        loss_func: the loss that gets the same tensor; None if that is not known. If it takes raw
            scores, this batch need not have one outside 0 to 1.

    Returns:
        Whether it warned.
    """
    kind = _find_class(metric)
    if kind is None or not isinstance(y_pred, Tensor):
        return False
    if not y_pred.is_floating_point() or not y_pred.numel():
        return False
    lowest = y_pred.min().item()
    highest = y_pred.max().item()
    reason = f"from {lowest:.4g} to {highest:.4g}"
    if not (lowest < 0 or highest > 1):  # also if they are NaN
        is_softmax = kind.startswith("Multiclass") and adds_up_to_one(y_pred, 1)
        if is_softmax or not takes_scores(loss_func):
            return False
        reason = f"as {getattr(loss_func, '__name__', type(loss_func).__name__)} takes them"
    layer = "sigmoid"
    function = "torch.sigmoid"
    if kind.startswith("Multiclass"):
        layer = "softmax"
        function = "lambda y_pred: y_pred.softmax(1)"
    warnings.warn(
        f"metric {name!r}: the outputs are raw scores, {reason}. {kind} applies a {layer} to a "
        "batch only if a score in it is below 0 or above 1, and takes any other batch for "
        "probabilities, so the value may depend on batch_size. Give it probabilities in each "
        f"batch: minikeras.Transformed({kind}(...), y_pred={function}).",
        stacklevel=2,
    )
    return True


def takes_scores(loss_func: Any) -> bool:
    """Tell whether a loss is known to take raw scores."""
    if any(loss_func is function for function in FUNCTIONS_OF_SCORES):
        return True
    if getattr(loss_func, "takes_probabilities", None) is False:  # as FocalLoss says
        return True
    # by its forward: a subclass may do something else with the outputs
    forward = getattr(type(loss_func), "forward", None)
    return forward in (nn.BCEWithLogitsLoss.forward, nn.CrossEntropyLoss.forward)


def _find_class(metric: Any) -> str | None:
    """Name the class of torchmetrics that judges its scores batch by batch, if it is one.

    It may be the class of the object or of a metric that the object wraps.
    """
    if not isinstance(metric, nn.Module) or not _is_torchmetrics(metric):
        return None  # a custom subclass may pass probabilities to it
    for module in metric.modules():
        name = type(module).__name__
        if not _is_torchmetrics(module) or any(word in name for word in BY_ORDER):
            continue
        if name.startswith(("Binary", "Multilabel")):
            return name
        if name.startswith("Multiclass") and any(word in name for word in BY_PROBABILITY):
            return name
    return None


def _is_torchmetrics(module: nn.Module) -> bool:
    """Tell whether the class of a module is torchmetrics's own."""
    return type(module).__module__.split(".")[0] == "torchmetrics"
