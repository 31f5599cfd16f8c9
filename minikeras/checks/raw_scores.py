"""Warn of torchmetrics objects that take some batches of raw scores for probabilities."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

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


def warn_of_raw_scores(name: str, metric: Any, outputs: Any) -> bool:
    """Warn of a torchmetrics object that takes some batches of raw scores for probabilities.

    torchmetrics applies a sigmoid (a softmax, for several classes) to a batch in which a score is
    below 0 or above 1, and takes a batch without such a score for probabilities.

    Returns:
        Whether it warned.
    """
    kind = _find_class(metric)
    if kind is None or not isinstance(outputs, Tensor):
        return False
    if not outputs.is_floating_point() or not outputs.numel():
        return False
    lowest = outputs.min().item()
    highest = outputs.max().item()
    if not (lowest < 0 or highest > 1):
        return False
    layer = "sigmoid"
    activated = "y_pred.sigmoid()"
    if kind.startswith("Multiclass"):
        layer = "softmax"
        activated = "y_pred.softmax(1)"
    warnings.warn(
        f"metric {name!r}: the outputs are raw scores, from {lowest:.4g} to {highest:.4g}. {kind} "
        f"applies a {layer} to a batch only if a score in it is below 0 or above 1, and takes any "
        "other batch for probabilities, so the value may depend on batch_size. Give it "
        "probabilities in each batch: a subclass whose update(self, y_pred, y_true) calls "
        f"super().update({activated}, y_true), or a model that ends in a {layer}; or pass "
        "minikeras.OnAllRows(function).",
        stacklevel=2,
    )
    return True


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
