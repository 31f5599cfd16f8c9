"""What a loss, a metric or a step returns: a mean over the batch's rows, or an `Average`.

loss_func(y_pred, y_true)
    reduce_loss      a 0-d tensor, an Average, or LossParts of them; anything else is refused
    get_mean         the number to differentiate
    check_gradient   ... which must have a gradient
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minikeras.errors import describe, is_number
from minikeras.nests import detach_nest


class Average(NamedTuple):
    """A total and the count it is divided by, for a loss or a metric whose unit is not the row.

    minikeras adds up the totals and the counts of all batches and divides once, so the mean over
    an epoch is exact however the data falls into batches.

    Attributes:
        total: sum over the units that count, a number or a 0-d tensor. The total of a loss needs
            a gradient.
        count: how many units there are, 0 or more: a number or a 0-d tensor. It may be a float,
            such as a sum of class weights. A batch with count 0 adds nothing.

    >>> import minikeras, torch
    >>> losses = torch.tensor([2.0, 4.0, 9.0])
    >>> mask = torch.tensor([1.0, 1.0, 0.0])  # one token is padding
    >>> average = minikeras.Average((losses * mask).sum(), mask.sum())
    >>> average, float(average)
    (Average(total=tensor(6.), count=tensor(2.)), 3.0)
    """

    total: Tensor | float
    count: Tensor | float  # type: ignore[assignment] # tuple has a method of this name

    def __float__(self) -> float:
        """Return total / count, NaN if the count is 0; this waits for the device."""
        total, count = detach_nest(tuple(self))
        return float(total) / float(count) if count else math.nan


class LossParts(NamedTuple):
    """A loss that is a weighted sum of parts, each with a column of its own.

    Over an epoch each part is averaged by itself, and the sum is taken of the averages: a part may
    be a mean over rows and another an `Average`.
    """

    parts: dict[str, Any]  # column -> what its loss gave
    weights: dict[str, float]  # column -> its weight in the sum; a part of weight 0 is left out
    added: Any = 0.0  # to the sum, such as a penalty: a mean over rows or an Average

    def __float__(self) -> float:
        """Return the weighted sum, of this batch alone."""
        return float(get_mean(detach_nest(self)))


Loss = Tensor | Average
Result = Tensor | float | Average  # a mean over the batch's rows, or a total and a count


# --- what is refused ------------------------------------------------------------------------------


def check_number(name: str, value: Any, wait: bool = False) -> None:
    """Raise an error unless `value` is one number or an `Average`.

    The count of an Average is read where that waits for no device, and everywhere with `wait`.
    """
    if isinstance(value, Average):
        check_average(name, value, wait)
    elif isinstance(value, LossParts):
        for column, part in value.parts.items():
            check_number(repr(column), part, wait)
    elif not is_number(value):
        refuse_several(name, value)
        raise ValueError(
            f"{name} gave {describe(value)}; expected one number: a float, a NumPy scalar, a 0-d "
            "tensor, or minikeras.Average(total, count). Take the mean over the rows."
        )


def refuse_several(name: str, value: Any) -> None:
    """Raise an error for a tuple, a list or a dict where one number is expected.

    A tuple of two is not read as a total and a count: losses and metrics from elsewhere return
    (loss, part of it), (loss, number of pairs) or (precision, recall) as well.
    """
    if isinstance(value, Mapping):
        keys = list(value)
        shown = f"[{keys[0]!r}]" if keys else "[...]"
        raise ValueError(
            f"{name} gave a dict, {describe(dict(value))}; expected one number. Return one of "
            f"its values, such as {shown}, or their sum. The others can be metrics under names of "
            "their own."
        )
    if isinstance(value, (tuple, list)):
        # a named tuple shows its parts too
        parts = value if isinstance(value, list) else tuple(value)
        raise ValueError(
            f"{name} gave a {type(value).__name__}, {describe(parts)}; expected one number. "
            "Return one part, such as [0], or the sum of several; or minikeras.Average(total, "
            "count), if they are a total and the count to divide it by."
        )


def check_average(name: str, average: Average, wait: bool = False) -> None:
    """Raise an error unless total and count are numbers, and the count is finite and 0 or more."""
    total, count = average
    if not is_number(total) or not is_number(count):
        raise ValueError(
            f"{name} gave Average(total={describe(total)}, count={describe(count)}); expected a "
            "number for each: a float or a 0-d tensor. Add up what counts with .sum()."
        )
    if isinstance(count, Tensor) and count.requires_grad:
        raise ValueError(
            f"{name} gave an Average whose count has a gradient, and a count is a constant. Pass "
            f"count.detach(); if the second part is another loss, add the two up and return one "
            f"number."
        )
    if not (wait or is_readable(count)):
        return
    number = float(count)
    if not 0 <= number < math.inf:
        raise ValueError(
            f"{name} gave an Average with count {number:g}; expected a finite number, 0 or more. "
            "The count is how many units the total is a sum of. If it is something else, return "
            "the number [0] alone."
        )


_may_wait = False


@contextlib.contextmanager
def allow_waiting() -> Iterator[None]:
    """Let `is_readable` allow waiting for a device meanwhile, as in a first batch."""
    global _may_wait
    before, _may_wait = _may_wait, True
    try:
        yield
    finally:
        _may_wait = before


def is_readable(number: Any) -> bool:
    """Whether a number can be read now, without waiting for a device or ending a graph."""
    if not isinstance(number, Tensor):
        return True
    if torch.compiler.is_compiling():
        return False
    return number.device.type == "cpu" or _may_wait


# --- the loss -------------------------------------------------------------------------------------


def reduce_loss(
    result: Any,
    sample_weight: Tensor | None = None,
    per_row: bool = False,
    wait: bool = False,
    name: str = "the loss",
) -> Any:
    """Make what `backward` takes, a 0-d tensor or an `Average`, of what a loss_func gives.

    With `sample_weight` (batch,) the result must have a value per row, (batch, ...), and the mean
    over the rows of value * weight is taken. Without it a value per row is refused, unless
    `per_row`. For `wait` see `check_number`; `name` is for messages. Each part of `LossParts` is
    reduced by itself.

    >>> reduce_loss(torch.tensor([1.0, 3.0]), sample_weight=torch.tensor([1.0, 0.0]))
    tensor(0.5000)
    """
    if not isinstance(result, Tensor):
        if isinstance(result, LossParts):
            return reduce_parts(result, sample_weight, per_row, wait)
        result = getattr(result, "loss", result)  # AdaptiveLogSoftmaxWithLoss gives (output, loss)
    elif result.ndim == 0 and sample_weight is None:
        return result
    if per_row and sample_weight is None and isinstance(result, Tensor):
        return result.mean()  # as with weights of 1
    if sample_weight is not None:
        return weigh_loss(result, sample_weight, name)
    if isinstance(result, Average):
        check_average(name, result, wait)
        return Average(flatten(result.total), flatten(result.count))
    if not is_number(result):
        refuse_several(name, result)
        raise ValueError(
            f"{name} gave {describe(result)}; expected one number, a 0-d tensor. "
            f'Build it with reduction="mean", or end it with .mean().'
        )
    loss: Tensor = flatten(result)
    return loss


def reduce_parts(
    loss: LossParts, sample_weight: Tensor | None, per_row: bool, wait: bool
) -> LossParts:
    """Reduce each part of a loss as `reduce_loss` does."""
    parts = {}
    for column, part in loss.parts.items():
        parts[column] = reduce_loss(part, sample_weight, per_row, wait, f"loss {column!r}")
    added = loss.added
    if sample_weight is not None:  # as if it were added to each row's loss
        added = added * sample_weight.mean()
    return LossParts(parts, loss.weights, added)


def settle_parts(loss: Any) -> Any:
    """Return the sum of `LossParts` as one tensor or `Average`, if both are as exact.

    It is if all parts that count are means over rows, or if only one counts. Any other loss is
    returned as it is.
    """
    if not isinstance(loss, LossParts):
        return loss
    counted = [column for column in loss.parts if loss.weights[column]]
    averages = [column for column in counted if isinstance(loss.parts[column], Average)]
    if not averages:
        return get_mean(loss)
    if len(counted) > 1 or isinstance(loss.added, Average):
        return loss
    total, count = loss.parts[counted[0]]
    return Average(loss.weights[counted[0]] * total + loss.added * count, count)


def spread_loss(loss: Any) -> dict[str, Any]:
    """Return the columns of a loss, detached: "loss", and one for each of its parts."""
    if not isinstance(loss, LossParts):
        return {"loss": detach_nest(loss)}
    detached = detach_nest(loss)
    return {"loss": settle_parts(detached), **detached.parts}


def weigh_loss(result: Any, sample_weight: Tensor, name: str = "the loss") -> Tensor:
    """The mean over the rows of a loss per row times its weight."""
    rows = len(sample_weight)
    if not isinstance(result, Tensor) or result.ndim == 0 or len(result) != rows:
        raise ValueError(
            f"the batches carry a sample_weight, their third part, so {name} must have a value "
            f"per row: expected "
            f'shape ({rows},), got {describe(result)}. Build it with reduction="none"; two '
            f"inputs are ((a, b), y); to leave out a third part that is no weight pass "
            f"compile(split_batch=lambda batch: (batch[0], batch[1]))."
        )
    return (result.reshape(rows, -1).mean(1) * sample_weight.reshape(rows)).mean()


def unwrap_loss(loss_func: Any) -> Any:
    """Return the loss that `Regularized` wraps, or the loss itself."""
    return loss_func.loss_func if getattr(type(loss_func), "wraps_loss", False) else loss_func


def losses_in(loss_func: Any) -> dict[Any, Any]:
    """Return name -> loss of a loss_func with several parts; of any other "" -> the loss itself.

    If there is a penalty, it is the loss inside.
    """
    loss = unwrap_loss(loss_func)
    if not has_parts(loss):
        return {"": loss}
    losses: dict[Any, Any] = loss.losses
    return losses


def has_parts(loss_func: Any) -> bool:
    """Whether a loss, and not one that it wraps, has a part for each of several outputs."""
    return bool(getattr(type(loss_func), "has_parts", False))


def flatten(number: Any) -> Any:
    """A tensor of one element without dimensions; another number as it is."""
    if isinstance(number, Tensor) and number.ndim:
        return number.reshape(())
    return number


def get_mean(loss: Any) -> Any:
    """The number to differentiate: of an `Average` its mean, and 0 where nothing was counted.

    Of `LossParts` it is the weighted sum.
    """
    if isinstance(loss, LossParts):
        return _sum_parts(loss)
    if not isinstance(loss, Average):
        return loss
    count = loss.count
    if isinstance(count, Tensor):
        return get_total(loss) / torch.where(count == 0, 1, count)
    return get_total(loss) / (count or 1)


def _sum_parts(loss: LossParts) -> Any:
    """The sum of each part's mean times its weight, and of what is added."""
    terms = []
    for column, part in loss.parts.items():
        weight = loss.weights[column]
        if weight == 1:
            terms.append(get_mean(part))
        elif weight:  # 0 * NaN would be NaN
            terms.append(weight * get_mean(part))
    added = get_mean(loss.added)
    if isinstance(added, Tensor) or added:
        terms.append(added)
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def get_total(average: Average) -> Any:
    """The total, or 0 where the count is 0, even if the total is NaN then."""
    total, count = average
    if is_readable(count):
        if count != 0:
            return total
        return torch.nan_to_num(total) * 0 if isinstance(total, Tensor) else 0.0
    if isinstance(total, Tensor):
        return torch.where(count.to(total.device) == 0, 0, total)  # type: ignore[union-attr]
    return total


def check_gradient(loss: Any) -> Tensor:
    """The loss as backward takes it."""
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        refuse_several("backward was given a loss that", loss)
        raise ValueError(
            f"the loss is {describe(loss)} without a gradient: it does not depend on any "
            "trainable parameter. Compute it from the model's outputs in torch, without detach, "
            ".item() or NumPy."
        )
    return loss


# --- counts of bad losses, on a device or in a graph ----------------------------------------------


def count_bad(bad: Tensor, loss: Tensor) -> None:
    """Count a step if its loss is not finite, or the loss of an earlier one was not."""
    bad.copy_(torch.where((bad > 0) | ~loss.detach().isfinite(), bad + 1, bad))


def count_bad_gradient(bad: Tensor, of_gradient: Tensor, norm: Tensor) -> None:
    """Begin the count if the norm of a gradient is the first thing that is not finite.

    The loss of the step has been counted before.
    """
    begins = (bad == 0) & ~norm.detach().isfinite()
    of_gradient.copy_(torch.where(begins, 1.0, of_gradient))
    bad.copy_(torch.where(begins, 1.0, bad))
