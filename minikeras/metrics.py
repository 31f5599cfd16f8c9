"""Metrics that torch lacks: accuracy over classes, and accuracy of yes-or-no questions.

accuracy            scores over classes against class numbers or one-hot labels
binary_accuracy     one probability or raw score per label, as for one class or several labels

Both are plain functions of (y_pred, y_true) for `metrics_dict`. Labels and outputs are looked at
where that waits for no device: on the CPU in each batch, elsewhere in the first batch of a fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minikeras.errors import describe, dtype_name, is_number
from minikeras.results import Average, is_readable

ADDS_UP = 0.02  # how far from 1 a row of one-hot labels may add up: bfloat16 has 3 digits
PREDICTED_NUMBERS = " For predicted class numbers write (y_pred == y_true).float().mean()."


# --- several classes ------------------------------------------------------------------------------


def accuracy(y_pred: Tensor, y_true: Tensor, ignore_index: int = -100) -> Average:
    """Return how many labels the highest score predicts, as an `Average` over the labels.

    minikeras divides once, at the end of the epoch, so the value is exact with a short last batch
    and with padding. For the number of one batch call `float(...)`.

    Args:
        y_pred: scores or probabilities over the classes: (batch, classes); per token or pixel
            (batch, classes, ...), as `nn.CrossEntropyLoss` takes them, or with the classes last,
            (batch, ..., classes). The shape of `y_true` tells which.
        y_true: class numbers from 0, of an integer dtype: the shape of `y_pred` without the
            classes, or that with a last dimension of 1. Or one-hot labels, (batch, classes); of
            soft labels, as after mixup, the highest counts.
        ignore_index: class numbers equal to this do not count, as in `nn.CrossEntropyLoss`.

    Raises:
        TypeError: y_pred or y_true is no tensor, or ignore_index no integer.
        ValueError: shapes that do not fit; shapes that leave open which dimension has the classes,
            as (batch, 5, 5) with (batch, 5); class numbers of a float dtype, or above the classes;
            one score per label, for which there is `binary_accuracy`.

    >>> import minikeras, torch
    >>> scores = torch.tensor([[2.0, 1.0, 0.0], [0.1, 0.2, 0.9], [3.0, 1.0, 1.0]])
    >>> minikeras.accuracy(scores, torch.tensor([0, 2, 1]))
    Average(total=tensor(2), count=3)
    >>> float(minikeras.accuracy(scores, torch.tensor([0, 2, -100])))
    1.0
    """
    _check_tensors("accuracy", y_pred, y_true)
    if not isinstance(ignore_index, int):
        raise TypeError(
            f"accuracy: ignore_index must be an integer, got {describe(ignore_index)}. If all "
            "labels count, leave it out."
        )
    if y_pred.ndim < 2 or y_pred.shape[1:].numel() == 1 or y_true.ndim > y_pred.ndim:
        raise _explain_shapes(y_pred, y_true)
    if y_true.shape == y_pred.shape:
        return _compare_one_hot(y_pred, y_true)
    if y_true.ndim == y_pred.ndim and y_true.shape == (*y_pred.shape[:-1], 1):
        y_true = y_true.squeeze(-1)
    class_dim = _find_class_dim(y_pred, y_true)
    classes = y_pred.shape[class_dim]
    if classes == 1:
        raise _explain_shapes(y_pred, y_true)
    if y_true.is_floating_point() or y_true.is_complex():
        raise ValueError(
            f"accuracy: class numbers must be integers, got y_true of {dtype_name(y_true.dtype)}. "
            "Pass y_true.long()."
        )
    hits = y_pred.argmax(class_dim) == y_true
    if is_readable(y_true) and y_true.numel():
        lowest, highest = (int(number) for number in y_true.aminmax())
        if lowest < 0 or highest >= classes:
            _check_class_numbers(y_true, classes, ignore_index)
        if not lowest <= ignore_index <= highest:
            return Average(hits.count_nonzero(), y_true.numel())
    is_counted = y_true != ignore_index
    if 0 <= ignore_index < classes:  # else no score predicts it
        hits = hits & is_counted
    return Average(hits.count_nonzero(), is_counted.count_nonzero())


def _check_tensors(name: str, y_pred: Any, y_true: Any) -> None:
    """Raise an error unless both are tensors."""
    if isinstance(y_pred, Tensor) and isinstance(y_true, Tensor):
        return
    argument = "y_true" if isinstance(y_pred, Tensor) else "y_pred"
    value = y_true if isinstance(y_pred, Tensor) else y_pred
    is_row_of_numbers = isinstance(value, list | tuple) and all(map(is_number, value))
    if hasattr(value, "__array__") or is_row_of_numbers:
        remedy = f"Pass torch.as_tensor({argument})"
    else:
        key = "0"
        if isinstance(value, Mapping) and value:
            key = repr(next(iter(value)))
        part = f"{argument}.logits" if hasattr(value, "logits") else f"{argument}[{key}]"
        parts = f"{part}, y_true" if argument == "y_pred" else f"y_pred, {part}"
        remedy = (
            f"Pass the tensor that it is about: lambda y_pred, y_true: minikeras.{name}({parts})"
        )
    raise TypeError(f"{name}: {argument} must be one tensor, got {describe(value)}. {remedy}.")


def _find_class_dim(y_pred: Tensor, y_true: Tensor) -> int:
    """Return which dimension of the scores has the classes: 1 as in torch, or the last, -1."""
    shape = y_pred.shape
    is_in_1 = y_true.shape == (shape[0], *shape[2:])
    is_last = y_true.shape == shape[:-1]
    if is_in_1 and is_last and y_pred.ndim > 2:
        raise ValueError(
            f"accuracy: y_pred {tuple(shape)} may have its classes in dimension 1 or in the last, "
            f"since y_true {tuple(y_true.shape)} fits both. Pass rows of scores; with the classes "
            "last: lambda y_pred, y_true: "
            "minikeras.accuracy(y_pred.flatten(0, -2), y_true.flatten()); with the classes in "
            "dimension 1, y_pred.movedim(1, -1).flatten(0, -2) there."
        )
    if not is_in_1 and not is_last:
        raise _explain_shapes(y_pred, y_true)
    return 1 if is_in_1 else -1


def _compare_one_hot(y_pred: Tensor, y_true: Tensor) -> Average:
    """Return the accuracy against labels with a number for each class."""
    if y_pred.ndim > 2:
        raise _explain_shapes(y_pred, y_true)
    if y_true.dtype == torch.bool:  # torch has no argmax of it
        y_true = y_true.int()
    if is_readable(y_true) and len(y_true):
        sums = y_true.sum(1, dtype=torch.float32)
        worst = float(sums[(sums - 1).abs().argmax()])
        if not abs(worst - 1) <= ADDS_UP:  # also if it is NaN
            message = (
                f"accuracy: one-hot labels add up to 1 in each row, and a row of y_true "
                f"{tuple(y_true.shape)} adds up to {worst:.4g}. If each label is a yes-or-no "
                "question, pass minikeras.binary_accuracy."
            )
            if not y_pred.is_floating_point():
                message += PREDICTED_NUMBERS
            raise ValueError(message)
    return Average((y_pred.argmax(1) == y_true.argmax(1)).sum(), len(y_true))


def _check_class_numbers(y_true: Tensor, classes: int, ignore_index: int) -> None:
    """Raise an error for a class number that is not among the classes, nor `ignore_index`."""
    is_outside = (y_true < 0) | (y_true >= classes)
    outside = y_true[is_outside & (y_true != ignore_index)]
    if outside.numel():
        raise ValueError(
            f"accuracy: y_true has the class number {int(outside[0])}, and y_pred has scores of "
            f"{classes} classes, 0 to {classes - 1}. Number the classes from 0; labels that do "
            f"not count must equal ignore_index, {ignore_index}."
        )


def _explain_shapes(y_pred: Tensor, y_true: Tensor) -> ValueError:
    """Return the error for scores and labels whose shapes do not fit."""
    shape = tuple(y_pred.shape)
    shown = f"accuracy: got y_pred {shape} and y_true {tuple(y_true.shape)}"
    if y_true.ndim > y_pred.ndim:
        return ValueError(f"{shown}; expected the scores first: accuracy(y_pred, y_true).")
    rows = shape[:1] or ("batch",)
    is_one_score = len(shape) < 2 or 1 in (shape[1], shape[-1])
    if is_one_score and y_pred.numel() == y_true.numel():
        scores = str((*rows, "classes")).replace("'", "")
        message = (
            f"{shown}: one score per label; expected a score per class, {scores}. For yes-or-no "
            "questions pass minikeras.binary_accuracy, or functools.partial("
            "minikeras.binary_accuracy, threshold=0.0) for raw scores."
        )
        if not y_pred.is_floating_point():
            message += PREDICTED_NUMBERS
        return ValueError(message)
    if len(shape) > 2 and y_pred.shape == y_true.shape:
        return ValueError(
            f"{shown}: labels of the scores' shape may have their classes in dimension 1 or in the "
            "last. Pass class numbers: lambda y_pred, y_true: "
            "minikeras.accuracy(y_pred, y_true.argmax(1)), or .argmax(-1) with the classes last. "
            "For yes-or-no questions pass minikeras.binary_accuracy."
        )
    if len(shape) < 2:
        expected = "scores of shape (batch, classes)"
    elif len(shape) == 2:
        expected = f"class numbers of shape {rows}, or one-hot labels of shape {shape}"
    else:
        expected = (
            f"class numbers of shape {(*rows, *shape[2:])}, with the classes in dimension 1, or "
            f"{shape[:-1]}, with the classes last"
        )
    return ValueError(f"{shown}; expected {expected}. Reshape one of them.")


# --- yes-or-no questions --------------------------------------------------------------------------


def binary_accuracy(y_pred: Tensor, y_true: Tensor, threshold: float = 0.5) -> Tensor:
    """Return the share of labels on whose side of the threshold the prediction is, a 0-d tensor.

    It is the mean over all elements: over rows, and over labels where a row has several.

    Args:
        y_pred: probabilities, (batch,), (batch, 1) or (batch, labels); raw scores with
            `threshold=0.0`.
        y_true: of the same shape and any dtype, 0 or 1; between them, as after label smoothing,
            above 0.5 is a yes. (batch,) and (batch, 1) fit each other, as in Keras.
        threshold: above it a prediction is a yes. For raw scores
            `functools.partial(minikeras.binary_accuracy, threshold=0.0)`.

    Raises:
        TypeError: y_pred or y_true is no tensor.
        ValueError: other shapes, labels below 0, above 1 or NaN, or raw scores with a threshold for
            probabilities: some y_pred is below 0 or above 1.

    >>> import minikeras, torch
    >>> y_true = torch.tensor([1.0, 0.0, 1.0, 1.0])
    >>> minikeras.binary_accuracy(torch.tensor([0.9, 0.2, 0.6, 0.4]), y_true)
    tensor(0.7500)
    >>> minikeras.binary_accuracy(torch.tensor([2.0, -1.0, 0.3, -0.2]), y_true, threshold=0.0)
    tensor(0.7500)
    """
    _check_tensors("binary_accuracy", y_pred, y_true)
    if y_pred.shape != y_true.shape:
        y_true = _reshape_labels(y_pred, y_true)
    if is_readable(y_pred) and is_readable(y_true):
        _check_ranges(y_pred, y_true, threshold)
    return ((y_pred > threshold) == (y_true > 0.5)).float().mean()


def _reshape_labels(y_pred: Tensor, y_true: Tensor) -> Tensor:
    """Return labels (batch,) for predictions (batch, 1) as (batch, 1), and the other way round."""
    if y_pred.shape == (*y_true.shape, 1) or (*y_pred.shape, 1) == y_true.shape:
        return y_true.reshape(y_pred.shape)
    remedy = "Reshape one of them."
    if y_true.ndim < y_pred.ndim or y_true.shape[1:].numel() == 1:
        remedy = "For class numbers and a score per class pass minikeras.accuracy."
    raise ValueError(
        f"binary_accuracy: got y_pred {tuple(y_pred.shape)} and y_true {tuple(y_true.shape)}; "
        f"expected a label per prediction, y_true of shape {tuple(y_pred.shape)}. {remedy}"
    )


def _check_ranges(y_pred: Tensor, y_true: Tensor, threshold: float) -> None:
    """Raise an error for labels that are no 0 or 1, and raw scores taken for probabilities."""
    if not y_pred.numel():
        return
    if y_true.dtype != torch.bool:
        lowest, highest = (float(number) for number in y_true.aminmax())
        if math.isnan(lowest):
            raise ValueError(
                "binary_accuracy: labels must be 0 or 1, got NaN in y_true. If labels are missing, "
                "pass a function that counts the others and returns minikeras.Average(right, "
                "counted)."
            )
        if lowest < 0 or highest > 1:
            raise ValueError(
                f"binary_accuracy: labels must be 0 or 1, got y_true from {lowest:.4g} to "
                f"{highest:.4g}. For class numbers pass minikeras.accuracy; for labels -1 and 1 "
                "lambda y_pred, y_true: minikeras.binary_accuracy(y_pred, y_true > 0)."
            )
    if 0 < threshold < 1 and y_pred.dtype != torch.bool:
        lowest, highest = (float(number) for number in y_pred.aminmax())
        if lowest < 0 or highest > 1:
            raise ValueError(
                f"binary_accuracy: threshold={threshold:g} is for probabilities, got y_pred from "
                f"{lowest:.4g} to {highest:.4g}. For raw scores pass "
                "functools.partial(minikeras.binary_accuracy, threshold=0.0), or pass "
                "probabilities, y_pred.sigmoid()."
            )
