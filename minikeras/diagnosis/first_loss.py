"""Checks of the loss at the start, against that of the best constant answer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minikeras.diagnosis.constant_answer import best_constant_loss, loss_of, to_outputs
from minikeras.diagnosis.evidence import Evidence, named_tensors
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.tasks import BINARY, CLASSES, REGRESSION, Task

# times the loss of the best constant answer, or of zeros, if that is larger; networks with
# PyTorch's initialization begin near zeros, and stay below 1.5
FAR_ABOVE = 3.0
NATS = 3.0  # above it, at least: of two classes the best constant answer has 0.7 or less
FAR_ABOVE_OF_REGRESSION = 10.0  # a mean of squares: outputs about three times too large
FAR_BELOW = 0.5  # the same, for a network that has not been trained
EXACT = 0.9999  # correlation of a column with the labels: it is the label
ROWS = 50  # fewer are separated by chance
MOST_COLUMNS = 2000


def check_first_loss(evidence: Evidence) -> Iterator[Finding]:
    """Compare the first loss with that of the best constant answer."""
    for task in evidence.tasks:
        leaking = find_leaking_column(evidence, task)
        if leaking is not None:
            yield explain_leak(leaking, task)
        loss = loss_of(task, task.outputs)
        constant = best_constant_loss(task)
        if loss is None or constant is None or not constant > 0:
            continue
        ratio = loss / constant
        found = f"{loss:.3g}, {ratio:.2g} times that of the best constant answer ({constant:.3g})"
        zeros = loss_of(task, to_outputs(task, torch.zeros_like(task.outputs)))
        if is_far_above(loss, max(constant, zeros or 0.0), task):
            yield Finding(
                "warning",
                f"the loss at the start{task.called}",
                found,
                "about the same",
                "The outputs are badly scaled, and the first steps only shrink them. Give the last "
                "layer smaller weights: with torch.no_grad(): model.LAYER.weight.mul_(0.01) and "
                "model.LAYER.bias.zero_(); or put a norm layer before it, and standardize features "
                "and targets.",
                is_symptom=evidence.history.empty,
            )
        elif ratio < FAR_BELOW and evidence.history.empty and leaking is None:
            yield Finding(
                "note",
                f"the loss at the start{task.called}",
                found,
                "about the same, for new weights",
                "Right for weights that have been trained. New weights that are so good can read "
                "the labels: check that they do not reach the features.",
            )


def is_far_above(loss: float, constant: float, task: Task) -> bool:
    """Tell whether a loss is far above that of a constant answer."""
    if task.kind == REGRESSION:
        return loss > FAR_ABOVE_OF_REGRESSION * constant
    if task.kind in (CLASSES, BINARY) and loss < constant + NATS:
        return False
    return loss > FAR_ABOVE * constant


def find_leaking_column(evidence: Evidence, task: Task) -> str | None:
    """Return the name of a column of features that is the label; None if there is none."""
    features = evidence.train.features
    labels = evidence.train.labels
    if features is None or not isinstance(labels, Tensor) or len(labels) < ROWS:
        return None
    if task.kind not in (CLASSES, BINARY, REGRESSION) or labels.numel() != len(labels):
        return None
    targets = labels.reshape(-1).double()
    if targets.unique().numel() < 2:
        return None
    for name, tensor in named_tensors(features, "features"):
        if tensor.ndim != 2 or len(tensor) != len(labels) or tensor.shape[1] > MOST_COLUMNS:
            continue
        if not tensor.is_floating_point() and tensor.shape[1] > 1 and not evidence.train.columns:
            continue  # tokens
        for number, column in enumerate(tensor.double().T):
            if is_label(column, targets, task):
                columns = evidence.train.columns
                if columns is not None and len(columns) == tensor.shape[1]:
                    return f'feature "{columns[number]}"'
                return f"column {number} of {name}"
    return None


def is_label(column: Tensor, targets: Tensor, task: Task) -> bool:
    """Tell whether a column determines the labels as a code for them would.

    Of classes it has one value for each class, and another for each; of numbers it is the target,
    scaled and shifted.
    """
    if not bool(column.isfinite().all()) or column.min() == column.max():
        return False
    if task.kind == REGRESSION:
        if targets.unique().numel() < ROWS:
            return False
        together = torch.corrcoef(torch.stack([column, targets]))
        return abs(float(together[0, 1])) > EXACT
    pairs = torch.stack([column, targets], 1).unique(dim=0)
    classes = targets.unique().numel()
    values: int = int(column.unique().numel())
    return bool(len(pairs) == classes and values == classes)


def explain_leak(column: str, task: Task) -> Finding:
    """Say that a column is the label."""
    return Finding(
        "error",
        column,
        f"it is the label{task.called} itself, or a code for it",
        "no feature that equals the label",
        "The labels leak into the features: the network will read this column and be useless on "
        "rows whose label is not known. Drop the column.",
    )
