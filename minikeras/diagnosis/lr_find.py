"""The learning-rate range test (Smith 2017): raise the rate step by step, and watch the loss.

lr_find
    leave_no_trace, on a copy of the model, compiled as the user's
        set the rate of a step        min_lr * (max_lr / min_lr) ** (step / (steps - 1))
        one optimizer step            `accumulate` batches
        note rate and loss            the loss before the step
        stop if the smoothed loss has risen far above its lowest value
    suggestion: where the loss falls most steeply
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from minikeras.callback import BatchLogs, Callback
from minikeras.diagnosis.copies import compiled_copy, leave_no_trace, silenced
from minikeras.errors import check_number_in_range, check_whole_number
from minikeras.results import Average, settle_parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from minikeras.model import Model
    from minikeras.run import Run

BETA = 0.8  # a smoothed loss is mostly of the last five points
LAG = round(BETA / (1 - BETA))  # points by which it is behind a loss that falls evenly
# the fall at a rate is that of the mean of so many losses before it to that of as many after it:
# parts of all steps
NARROW = (24, 12)  # these tell the rate
WIDE = (6, 3)  # these tell a fall from noise
# standard deviations of such a fall, if the losses were noise
LEAST_FALL = 4.0  # a chance of 1 %
CLEAR_FALL = 6.0  # its place is known too
MARGIN = 5.0  # times below the rate at which the loss is lowest: from there on it is unstable
# the test stops when the smoothed loss is this many times the larger of its lowest value and its
# fall above the lowest: a loss that has not fallen may become four times as large
RISE = 3.0
# the same for a loss below 0, which may have a bound above: it has lost most of its fall
RISE_BELOW_0 = 0.8
LEAST_RISE = 3.0  # times the mean step from loss to loss, which is its noise
TINY = 1e-300  # losses without noise
LEAST_POINTS = 5  # a loss jumps in the first batches too; with fewer points nothing is judged


@dataclass(frozen=True, repr=False)
class LearningRates:
    """The curve of a learning-rate range test.

    Args:
        rates: the learning rate of each step, of the first group of the first optimizer.
        losses: the training loss of each step, before it was taken.
        smoothed: `smooth(losses)`.
        suggestion: the rate at which the loss falls most steeply, and at most a fifth of that at
            which it is lowest; None if the loss does not fall by more than its noise.
        diverges_at: the rate at which the test stopped, since the loss had risen too far or was not
            finite; None if it reached max_lr.
        steps: how many steps were asked for.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None
    diverges_at: float | None
    steps: int

    def to_dataframe(self) -> pd.DataFrame:
        """Return a DataFrame with a row for each step: lr, loss, smoothed_loss."""
        return pd.DataFrame({"lr": self.rates, "loss": self.losses, "smoothed_loss": self.smoothed})

    def plot(self) -> Axes:
        """Draw loss and smoothed loss over the learning rate, in a new figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from minikeras.diagnosis.figure import draw_learning_rates
        from minikeras.support.pyplot import import_pyplot

        _, axis = import_pyplot().subplots(figsize=(5.2, 3.6), layout="constrained")
        draw_learning_rates(axis, self)
        axes: Axes = axis
        return axes

    def __str__(self) -> str:
        if self.suggestion is None:
            first = (
                "no suggestion, since the loss does not fall by more than its noise (a larger "
                "batch_size or more steps may show a fall)"
            )
        else:
            first = f"try {self.suggestion:.1e} (steepest fall of the loss)"
        last = "it does not diverge"
        if self.diverges_at is not None:
            last = f"it diverges at {self.diverges_at:.1e}"
        return f"lr_find: {first}; {last}; {len(self.rates)} of {self.steps} steps"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def lr_find(
    model: Model,
    dl_train: Any,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    steps: int = 100,
    batch_size: int | None = None,
) -> LearningRates:
    """Find a learning rate; see `Model.lr_find`."""
    check_rates(min_lr, max_lr)
    check_whole_number("steps", steps, 2)
    run = model._compiled("lr_find")
    model._check_not_fitting("lr_find", "It may be called inside a fit of another model.")
    check_optimizers(run)
    with leave_no_trace(model, "lr_find", {"dl_train": dl_train}):
        twin = compiled_copy(model, "lr_find", steps_per_execution=1)
        return find_learning_rates(twin, dl_train, min_lr, max_lr, steps, batch_size)


def check_rates(min_lr: Any, max_lr: Any) -> None:
    """Check the limits of the learning rate.

    Raises:
        TypeError, ValueError: a limit is no number above 0, or min_lr is not below max_lr.
    """
    for name, value in (("min_lr", min_lr), ("max_lr", max_lr)):
        check_number_in_range(
            name, value, "above 0, and finite", lambda number: 0 < number < math.inf
        )
    if not min_lr < max_lr:
        raise ValueError(
            f"min_lr must be below max_lr, got min_lr={min_lr} and max_lr={max_lr}. Pass for "
            "instance min_lr=1e-7, max_lr=10.0."
        )


def check_optimizers(run: Run) -> None:
    """Check that the learning rates of all groups are known.

    Raises:
        ValueError: there is no optimizer, a group has no learning rate, or the first has 0.
    """
    rates = []
    for name, optimizer in run.optimizers.items():
        for number, group in enumerate(optimizer.param_groups):
            if "lr" not in group:
                called = f" of optimizer {name!r}" if name else ""
                raise ValueError(
                    f'lr_find raises the learning rate of each group, "lr", and group {number}'
                    f"{called}, a {type(optimizer).__name__}, has none. Compile with an optimizer "
                    "that has a learning rate."
                )
            rates.append(float(group["lr"]))
    if not rates:
        raise ValueError(
            "lr_find needs an optimizer, and the model has no parameter to train. Set "
            "requires_grad to True for some, or call minikeras.unfreeze(model), and compile again."
        )
    if not rates[0] > 0:
        raise ValueError(
            "lr_find keeps the ratios of the groups to the first one, and the learning rate of "
            f"that is {rates[0]:g}; expected one above 0. Compile with an optimizer whose first "
            "group has a learning rate above 0."
        )


def find_learning_rates(
    twin: Model,
    dl_train: Any,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    steps: int = 100,
    batch_size: int | None = None,
) -> LearningRates:
    """Raise the learning rate of a copy from min_lr to max_lr, training on dl_train.

    Args:
        twin: a compiled copy, whose weights change.
    """
    run = twin._compiled("lr_find")
    batches = run.options["accumulate"]
    sweep = Sweep(run, min_lr, max_lr, steps, batches)
    with silenced():
        twin.fit(
            1,
            dl_train,
            steps_per_epoch=steps * batches,
            batch_size=batch_size,
            callbacks=[sweep],
            verbose=0,
            on_nan="ignore",
        )
    smoothed = smooth(sweep.losses)
    suggestion = find_steepest_fall(sweep.rates, sweep.losses, smoothed)
    return LearningRates(sweep.rates, sweep.losses, smoothed, suggestion, sweep.diverges_at, steps)


class Sweep(Callback):
    """Sets the learning rate of each step, and stops the fit when the loss diverges.

    Args:
        run: of the copy that is trained.
        min_lr, max_lr, steps: as for `lr_find`.
        batches: batches per optimizer step.
    """

    def __init__(self, run: Run, min_lr: float, max_lr: float, steps: int, batches: int) -> None:
        self.run = run
        self.min_lr = min_lr
        self.max_lr = max_lr
        self.steps = steps
        self.batches = batches
        self.groups: list[tuple[dict[str, Any], float]] = []  # each with its ratio to the first
        for optimizer in run.optimizers.values():
            for group in optimizer.param_groups:
                self.groups.append((group, float(group["lr"])))
        first = self.groups[0][1]
        self.groups = [(group, rate / first) for group, rate in self.groups]
        self.sums = [0.0, 0.0]  # loss times rows, and rows, of the batches of this step
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.diverges_at: float | None = None

    def on_batch_begin(self, batch: int) -> None:
        step, place = divmod(batch - 1, self.batches)
        if place:
            return
        rate = self.min_lr * (self.max_lr / self.min_lr) ** (step / (self.steps - 1))
        for group, ratio in self.groups:
            set_rate(group, rate * ratio)
        self.rates.append(rate)

    def on_batch_end(self, batch: int, logs: BatchLogs) -> None:
        total, count = self._loss_of_batch(logs)
        self.sums[0] += total
        self.sums[1] += count
        if batch % self.batches:
            return
        device = self.run.device
        sums = torch.tensor(self.sums, dtype=torch.float64 if device.type != "mps" else None)
        total, count = self.run.world.add_up(sums.to(device)).tolist()
        self.sums = [0.0, 0.0]
        self.losses.append(total / count if count else math.nan)
        if has_diverged(self.losses):
            self.diverges_at = self.rates[-1]
            self.model.stop_training = True

    def _loss_of_batch(self, logs: BatchLogs) -> tuple[float, float]:
        """Return the sum and the number of what the loss of the last batch is the mean of."""
        results, is_filler = self.run.train.totals.last
        if is_filler:
            return 0.0, 0.0
        loss = settle_parts(results["loss"]) if "loss" in results else None
        if isinstance(loss, Average):
            return float(loss.total), float(loss.count)
        rows = self.run.train.batch.rows
        count = rows if isinstance(rows, int) else 1
        return logs.batch["loss"] * count, count


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a group; a tensor is filled, since a graph may read it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def smooth(losses: list[float]) -> list[float]:
    """Return the running mean of the losses, whose weights fall with the distance.

    s_i = sum_j BETA^(i - j) * loss_j / sum_j BETA^(i - j) over the losses up to i: the moving
    average of Kingma and Ba 2015 ("Adam", section 3) with their correction of the bias. It is NaN
    from the first loss that is not finite.

    >>> [round(value, 2) for value in smooth([2.0, 2.0, 1.0, 1.0])]
    [2.0, 2.0, 1.59, 1.39]
    """
    smoothed = []
    total = 0.0
    weight = 0.0
    for loss in losses:
        total = BETA * total + loss
        weight = BETA * weight + 1
        smoothed.append(total / weight if math.isfinite(total) else math.nan)
    return smoothed


def has_diverged(losses: list[float]) -> bool:
    """Tell whether the last loss is not finite, or has risen far above the lowest.

    Both are smoothed, and a rise that may be noise does not count. A loss may be negative, so that
    their ratio alone would not do.
    """
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) < LEAST_POINTS:
        return False
    smoothed = smooth(losses)
    if not math.isfinite(smoothed[-1]):
        return True
    lowest = min(smoothed)
    rise = smoothed[-1] - lowest
    if rise <= LEAST_RISE * np.abs(np.diff(losses)).mean():
        return False
    fall = smoothed[0] - lowest
    if lowest < 0:
        return rise > RISE_BELOW_0 * max(abs(lowest) / 2, fall)
    return rise > RISE * max(lowest, fall)


def find_steepest_fall(
    rates: list[float], losses: list[float], smoothed: list[float]
) -> float | None:
    """Return the rate at which the loss falls most steeply, over the logarithm of the rates.

    The fall at a rate is the mean of the losses before it less the mean of those after it, up to
    where the smoothed loss is lowest. If the noise hides where it is steepest, the rate is that at
    which the smoothed loss has fallen by half. It is below the rate at which the loss is lowest by
    `MARGIN` at least. Return None if all of the fall may be noise.
    """
    finite = [value for value in smoothed if math.isfinite(value)]
    if len(finite) < LEAST_POINTS:
        return None
    lowest = int(np.argmin(finite))
    values = np.array(losses[: lowest + 1])
    if len(values) < LEAST_POINTS:  # the first smoothed losses are means of few
        return None
    furthest = 0.0
    for part in (*NARROW, *WIDE):
        width = max(2, round(len(losses) / part))
        steepest, deviations = find_fall(values, width)
        if part in NARROW and deviations > CLEAR_FALL:
            return min(rates[steepest], rates[lowest] / MARGIN)
        furthest = max(furthest, deviations)
    if furthest < LEAST_FALL:
        return None
    middle = (values[: max(LAG, len(values) // 3)].mean() + finite[lowest]) / 2
    place = lowest
    while place > LAG and finite[place] < middle:
        place -= 1
    return min(rates[place - LAG], rates[lowest] / MARGIN)


def find_fall(values: Any, width: int) -> tuple[int, float]:
    """Return the place of the largest fall from so many losses to as many after them.

    Returns:
        The number of the first loss after it; and the fall in standard deviations of what it would
        be if the losses were noise: 0 if there are too few.
    """
    places = np.arange(width, len(values) - width + 1)
    if not len(places):
        return 0, 0.0
    sums = np.concatenate([[0.0], np.cumsum(values)])
    before = sums[places] - sums[places - width]
    after = sums[places + width] - sums[places]
    falls = (before - after) / width
    steepest = int(falls.argmax())
    # of neighbors, so that the fall itself hardly counts; with outliers it is large
    noise = math.sqrt(np.square(np.diff(values)).mean() / 2)
    return int(places[steepest]), float(falls[steepest] / max(noise * math.sqrt(2 / width), TINY))
