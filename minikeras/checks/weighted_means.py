"""Warn of a loss whose mean is not over rows, where batches are weighted by their rows."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from minikeras.results import unwrap_loss

FUNCTIONS = {nn.CrossEntropyLoss: "cross_entropy", nn.NLLLoss: "nll_loss"}


def warn_of_weighted_mean(loss: Any, y_true: Any, what: str, is_main: bool) -> None:
    """Warn of class weights and ignored labels: the steps are not those of one whole batch.

    Args:
        loss: the loss of one output.
        y_true: its labels.
        what: what weights the batches by their rows.
        is_main: whether this process tells what all know; ignored labels are told by who has them.
    """
    loss = unwrap_loss(loss)
    if type(loss) not in FUNCTIONS or loss.reduction != "mean":
        return
    if not isinstance(y_true, Tensor) or y_true.is_floating_point():
        return
    ignored = bool((y_true == loss.ignore_index).any())
    if not ignored and (loss.weight is None or not is_main):
        return
    labels = f"y_true[y_true != {loss.ignore_index}]" if ignored else "y_true"
    arguments = "y_pred, y_true"
    if loss.weight is not None:
        arguments += ", weight"
        count = f"weight[{labels}].sum()"
        over = "the class weights of its labels"
    else:
        count = f"(y_true != {loss.ignore_index}).sum()"
        over = "the labels that are not ignored"
    if getattr(loss, "label_smoothing", 0):
        arguments += f", label_smoothing={loss.label_smoothing}"
    if ignored:
        arguments += f", ignore_index={loss.ignore_index}"
    warnings.warn(
        f"loss_func is a {type(loss).__name__} whose mean is over {over}; expected a mean over "
        f"rows, since {what} weights each batch by its rows: the steps are not those of the whole "
        "batch. Let the loss return its total and what it is divided by: lambda y_pred, y_true: "
        f'minikeras.Average(nn.functional.{FUNCTIONS[type(loss)]}({arguments}, reduction="sum"), '
        f"{count}).",
        stacklevel=2,
    )
