"""torchmetrics objects that are given raw scores, and take some batches of them for probabilities."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

# of these the order of a row's scores alone counts
BY_ORDER = ("Ranking", "Coverage")
# of several classes those that look at more than the class with the highest score
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
    """Warn of a torchmetrics object that takes some batches of raw scores for probabilities; whether it did.

    torchmetrics applies a sigmoid (a softmax, for several classes) to a batch where a score is below 0 or above 1, and
    takes a batch without such a score for probabilities.
    """
    kind = _decides_by_batch(metric)
    if (
        kind is None
        or not isinstance(outputs, Tensor)
        or not outputs.is_floating_point()
        or not outputs.numel()
    ):
        return False
    lowest, highest = outputs.min().item(), outputs.max().item()
    if not (lowest < 0 or highest > 1):
        return False
    layer = "sigmoid"
    if kind.startswith("Multiclass"):
        layer = "softmax"
    activated = "y_pred.sigmoid()" if layer == "sigmoid" else "y_pred.softmax(1)"
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


def _decides_by_batch(metric: Any) -> str | None:
    """The class of torchmetrics, in an object or its wrapper, that decides batch by batch what its scores are."""
    if not isinstance(metric, nn.Module) or not _is_torchmetrics(metric):
        return None  # a subclass of the user's may give it probabilities
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
    return type(module).__module__.split(".")[0] == "torchmetrics"
