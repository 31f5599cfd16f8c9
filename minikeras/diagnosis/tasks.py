"""What a loss asks of an output: class scores, probabilities or numbers.

find_tasks    one `Task` for each loss, found by the class or the function of the loss; a custom
              loss by the shapes and types of outputs and labels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikeras.nests import leaves
from minikeras.results import has_parts, losses_in, unwrap_loss

CLASSES = "classes"  # one of several classes: labels are class numbers or probabilities
BINARY = "binary"  # 0 or 1, for each element of the output
REGRESSION = "regression"
UNKNOWN = "unknown"

SCORES = "scores"  # any number: a softmax or sigmoid is in the loss
LOG_PROBABILITIES = "log-probabilities"
PROBABILITIES = "probabilities"
VALUES = "values"

# kind of task, what the loss takes
OF_MODULES: dict[type, tuple[str, str]] = {
    nn.CrossEntropyLoss: (CLASSES, SCORES),
    nn.MultiMarginLoss: (CLASSES, SCORES),
    nn.NLLLoss: (CLASSES, LOG_PROBABILITIES),
    nn.BCEWithLogitsLoss: (BINARY, SCORES),
    nn.MultiLabelSoftMarginLoss: (BINARY, SCORES),
    nn.BCELoss: (BINARY, PROBABILITIES),
    nn.MSELoss: (REGRESSION, VALUES),
    nn.L1Loss: (REGRESSION, VALUES),
    nn.SmoothL1Loss: (REGRESSION, VALUES),
    nn.HuberLoss: (REGRESSION, VALUES),
}
OF_FUNCTIONS: dict[Any, tuple[str, str]] = {
    F.cross_entropy: (CLASSES, SCORES),
    F.multi_margin_loss: (CLASSES, SCORES),
    F.nll_loss: (CLASSES, LOG_PROBABILITIES),
    F.binary_cross_entropy_with_logits: (BINARY, SCORES),
    F.binary_cross_entropy: (BINARY, PROBABILITIES),
    F.mse_loss: (REGRESSION, VALUES),
    F.l1_loss: (REGRESSION, VALUES),
    F.smooth_l1_loss: (REGRESSION, VALUES),
    F.huber_loss: (REGRESSION, VALUES),
}


ROWS_TO_TRY = 64  # that a custom loss is called with
SAME = 1e-3  # relative; a penalty or float16 rounds


@dataclass
class Task:
    """One loss with its output and labels, over the rows that were looked at."""

    name: str  # of the output, if there are several losses; else ""
    kind: str  # CLASSES, BINARY, REGRESSION or UNKNOWN
    takes: str  # SCORES, LOG_PROBABILITIES, PROBABILITIES, VALUES or UNKNOWN
    loss_func: Any  # of this output alone
    outputs: Tensor  # (rows, ...), in eval mode
    labels: Tensor  # (rows, ...)

    @property
    def called(self) -> str:
        """The words that name this output's labels and outputs in a message; "" if it is alone."""
        return f" {self.name!r}" if self.name else ""

    @property
    def classes(self) -> int | None:
        """The number of classes of a task of kind CLASSES, dimension 1 of the outputs."""
        return self.outputs.shape[1] if self.kind == CLASSES and self.outputs.ndim > 1 else None

    @property
    def class_numbers(self) -> Tensor | None:
        """The labels as class numbers, 1-d; those of BINARY are 0 and 1. None if they are not.

        Labels that the loss ignores, such as padding with -100, are left out.
        """
        labels = self.labels
        if self.kind == BINARY:
            rounded = labels if labels.dtype == torch.bool else labels.round()
            is_hard = bool(((rounded == labels) & (labels >= 0) & (labels <= 1)).all())
            return rounded.long().reshape(-1) if is_hard else None
        if self.kind != CLASSES:
            return None
        if labels.is_floating_point():
            if labels.shape != self.outputs.shape:
                return None
            return labels.argmax(1).reshape(-1)
        ignored = getattr(self.loss_func, "ignore_index", -100)
        numbers = labels.reshape(-1)
        return numbers[numbers != ignored].long()


def find_tasks(loss_func: Any, outputs: Any, labels: Any) -> list[Task]:
    """Return a task for each loss whose output and labels are tensors of the same rows.

    Args:
        loss_func: what compile was given.
        outputs, labels: of the rows that are looked at, joined.
    """
    tasks = []
    has_names = has_parts(unwrap_loss(loss_func))
    for name, part in losses_in(loss_func).items():
        y_pred, y_true = outputs, labels
        if has_names:
            from minikeras.by_name import pick

            y_pred = pick(outputs, name, f"loss {name!r}: the outputs", "")
            y_true = pick(labels, name, f"loss {name!r}: the labels", "")
        if not isinstance(y_pred, Tensor) or not isinstance(y_true, Tensor):
            y_pred, y_true = only_tensor(y_pred), only_tensor(y_true)
        if y_pred is None or y_true is None or not y_pred.ndim or not y_true.ndim:
            continue
        if len(y_pred) != len(y_true):
            continue
        kind, takes = classify(part, y_pred, y_true)
        tasks.append(Task(str(name), kind, takes, part, y_pred, y_true))
    return tasks


def only_tensor(nest: Any) -> Tensor | None:
    """Return the tensor of a nest that has only one; `logits` of an output that has them."""
    tensors = [leaf for leaf in leaves(nest) if isinstance(leaf, Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    if isinstance(nest, Mapping) and isinstance(nest.get("logits"), Tensor):
        logits: Tensor = nest["logits"]
        return logits
    return None


def classify(loss_func: Any, outputs: Tensor, labels: Tensor) -> tuple[str, str]:
    """Return the kind of a task, and what its loss takes."""
    for kind, found in OF_MODULES.items():
        # by its forward: a subclass may do something else with the outputs
        if getattr(type(loss_func), "forward", None) is kind.forward:  # type: ignore[attr-defined]
            return found
    for function, found in OF_FUNCTIONS.items():
        if loss_func is function:
            return found
    takes_probabilities = getattr(loss_func, "takes_probabilities", None)  # as FocalLoss says
    if takes_probabilities is not None:
        return BINARY, PROBABILITIES if takes_probabilities else SCORES
    name = f"{getattr(loss_func, '__name__', '')} {type(loss_func).__name__}".lower()
    is_whole = not labels.is_floating_point()
    if is_whole and outputs.ndim > 1 and labels.shape == outputs.shape[:1] + outputs.shape[2:]:
        if outputs.shape[1] > 1 and labels.dtype != torch.bool:
            if is_cross_entropy(loss_func, outputs, labels):
                return CLASSES, SCORES
            return UNKNOWN, UNKNOWN
    if labels.shape == outputs.shape and any(
        word in name for word in ("mse", "l1", "mae", "huber")
    ):
        return REGRESSION, VALUES
    return UNKNOWN, UNKNOWN


def is_cross_entropy(loss_func: Any, outputs: Tensor, labels: Tensor) -> bool:
    """Tell whether a custom loss takes scores of classes, by trying it.

    A cross-entropy is the same if all scores of a row grow alike, and less if that of the right
    class grows.
    """
    classes = outputs.shape[1]
    scores = outputs[:ROWS_TO_TRY].detach().float()
    right = labels[:ROWS_TO_TRY]
    inside = right.clamp(0, classes - 1).long().unsqueeze(1)
    better = scores.scatter_add(1, inside, torch.ones_like(scores))
    losses = []
    for tried in (scores, scores + 1.0, better):
        try:
            with torch.no_grad():
                loss = loss_func(tried.to(outputs.dtype), right)
        except Exception:  # it needs more than outputs and labels
            return False
        total = loss[0] / loss[1] if isinstance(loss, tuple) and len(loss) == 2 else loss
        if not isinstance(total, Tensor):
            return False
        losses.append(total.float().mean().item())
    first, shifted, improved = losses
    return abs(shifted - first) <= SAME * max(abs(first), 1.0) and improved < first
