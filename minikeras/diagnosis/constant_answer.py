"""The loss of the best constant answer: what a network reaches that never looks at its features.

class frequencies for classes and for 0 or 1; for any other loss a constant that is found by
minimizing the loss itself
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minikeras.diagnosis.tasks import (
    BINARY,
    CLASSES,
    LOG_PROBABILITIES,
    PROBABILITIES,
    REGRESSION,
    Task,
)

STEPS = 40  # iterations of LBFGS
SMALLEST = 1e-6  # a probability; its logarithm is finite in float32


def loss_of(task: Task, outputs: Tensor) -> float | None:
    """Return the mean loss of a task for these outputs; None if it is not a finite number."""
    try:
        with torch.no_grad():
            number = as_number(task.loss_func(outputs, task.labels))
    except Exception:  # a custom loss may not take what is not of its model
        return None
    if number is None:
        return None
    value = float(number)
    return value if math.isfinite(value) else None


def as_number(loss: Any) -> Tensor | None:
    """Return a loss as a 0-d tensor: the mean of a loss per row or of an `Average`."""
    if isinstance(loss, Tensor):
        return loss.float().mean()
    if isinstance(loss, tuple) and len(loss) == 2:
        return torch.as_tensor(loss[0]).float() / max(float(loss[1]), 1.0)
    return None


def best_constant_loss(task: Task) -> float | None:
    """Return the loss of the best answer that is the same for all rows; None if it is not known.

    >>> from torch import nn
    >>> from minikeras.diagnosis.tasks import SCORES
    >>> labels = torch.tensor([0, 0, 0, 1])
    >>> task = Task("", CLASSES, SCORES, nn.CrossEntropyLoss(), torch.zeros(4, 2), labels)
    >>> round(best_constant_loss(task), 3)  # the entropy of 3/4 and 1/4
    0.562
    """
    start = first_guess(task)
    if start is None:
        return None
    candidates = [loss_of(task, expand(to_outputs(task, start), task))]
    constant = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([constant], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        outputs = expand(to_outputs(task, constant), task)
        loss = as_number(task.loss_func(outputs, task.labels))
        if loss is None:
            raise TypeError("the loss is no number")
        loss.backward()
        return loss

    try:
        with torch.enable_grad():
            optimizer.step(closure)
        found = expand(to_outputs(task, constant.detach()), task)
        candidates.append(loss_of(task, found))
    except Exception:  # the loss has no gradient, or needs more than outputs and labels
        pass
    known = [loss for loss in candidates if loss is not None]
    return min(known, default=None)


def first_guess(task: Task) -> Tensor | None:
    """Return a constant to begin with, in the shape of a row: scores, or values."""
    labels = task.labels
    outputs = task.outputs
    if not outputs.is_floating_point():
        return None
    if task.kind == REGRESSION and labels.shape == outputs.shape:
        return labels.to(outputs.dtype).mean(0)
    if task.kind == BINARY and labels.shape == outputs.shape:
        shares = labels.to(outputs.dtype).mean(0).clamp(SMALLEST, 1 - SMALLEST)
        return torch.logit(shares)
    if task.kind == CLASSES and task.class_numbers is not None and outputs.ndim > 1:
        numbers = task.class_numbers
        classes = outputs.shape[1]
        inside = numbers[(numbers >= 0) & (numbers < classes)]
        counts = torch.bincount(inside, minlength=classes).to(outputs.dtype)
        shares = (counts / counts.sum().clamp(min=1)).clamp(min=SMALLEST)
        row = shares.log().reshape(-1, *[1] * (outputs.ndim - 2))
        return row.expand(outputs.shape[1:]).clone()
    return outputs.detach().mean(0)


def to_outputs(task: Task, constant: Tensor) -> Tensor:
    """Return the outputs that stand for scores: as what the loss takes.

    Args:
        constant: the scores of a row, or of all rows.
    """
    if task.takes == PROBABILITIES:
        return torch.sigmoid(constant)
    if task.takes == LOG_PROBABILITIES:
        return torch.log_softmax(constant, constant.ndim + 1 - task.outputs.ndim)
    return constant


def expand(row: Tensor, task: Task) -> Tensor:
    """Return the same output for all rows."""
    return row.unsqueeze(0).expand(task.outputs.shape)
