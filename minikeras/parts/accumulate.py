"""Accumulate the gradients of several batches into one step, by the mean over all rows.

backward   add the gradient of loss * rows / rows of a full window; of an Average its total / unit
step       count a batch in the window of its optimizer; divide a full window by its rows and step.
           Several processes divide as soon as the gradients have been averaged
pass end   step with windows that are partly filled
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from minikeras.nests import widen
from minikeras.processes import OneProcess
from minikeras.results import Average, LossParts, get_total, losses_in, unwrap_loss
from minikeras.stepper import Part, Restore, StepLoss, gradients_of


@dataclass
class Window:
    """What an optimizer's gradients have accumulated since its last step."""

    weight: Any = 0  # rows, or counts of Averages, so far: a number or a 0-d tensor
    current: Any = None  # those of the current batch, from its first backward on
    batches: int = 0

    def add(self, weight: Any) -> None:
        """Count a batch's weight once, however often backward is called for the batch."""
        if self.current is None:
            self.current = weight
            self.weight = self.weight + weight
        elif self.current is not weight and bool(self.current != weight):
            raise ValueError(
                f"backward was called for one batch with losses over {float(self.current):g} and "
                f"{float(weight):g} units, which accumulate cannot divide separately. Give each "
                "loss a separate optimizer, or make both means over the rows of the batch."
            )


class Accumulate(Part):
    """Gather the gradients of a window of `batches` batches; its mean is over all rows.

    Each optimizer has a window and counts its own calls of `optimizer_step`. With windows of one
    batch this only weights by rows, which several processes need.

    A batch counts by its rows as a share of `unit`, the rows of a full window in one process: so
    the gradients of full batches are means at every moment, over 1 / `batches` of the window, and
    only those of others have to be divided at the end.
    """

    def __init__(self, batches: int, world: OneProcess) -> None:
        self.batches = batches
        self.world = world
        self.unit = 0.0  # 0 until the first batch of a fit
        self.windows: dict[Optimizer, Window] = {}
        if batches > 1:
            self.delays = True
            self.outside_graph = f"accumulate={batches}"

    def _window(self, optimizer: Optimizer) -> Window:
        if optimizer not in self.windows:
            self.windows[optimizer] = Window()
        return self.windows[optimizer]

    def _settle_unit(self, weight: Any, is_count: bool = False) -> None:
        """Take the first batch for a full one, the same in all processes.

        Counts of Averages differ from batch to batch. They may be float32 tensors, which a power of
        2 divides without rounding.
        """
        unit = self.batches * float(weight)
        if is_count and unit:
            unit = 2.0 ** math.ceil(math.log2(unit))
        self.unit = self.world.agree(unit)[0] or 1.0

    def on_loss(self, loss: StepLoss) -> None:
        """Multiply the mean by the rows, or take the total of an Average; divide by the unit."""
        rows: Any = 0 if loss.batch.is_filler else loss.batch.rows
        is_average = isinstance(loss.result, Average)
        if not is_average and not isinstance(loss.result, Tensor):
            raise ValueError(describe_units(loss.result, self.batches))
        weight = loss.result.count if is_average and rows else rows
        if not self.unit:
            self._settle_unit(weight, is_average)
        if is_average:
            loss.total = widen(get_total(loss.result)) / self.unit
        else:
            loss.total = widen(loss.total)
            if weight != self.unit:
                loss.total = loss.total * (weight / self.unit)
        if not rows:  # a filler batch, which counts as zero
            loss.total = loss.total * 0
        for optimizer in loss.optimizers:
            self._window(optimizer).add(weight)

    def on_step(self, optimizers: list[Optimizer]) -> None:
        """Settle the unit with the other processes, if the first batch had no loss in this one."""
        if not self.unit:
            self._settle_unit(0)

    def is_due(self, optimizer: Optimizer) -> bool:
        """Tell whether the current batch fills the optimizer's window."""
        return self._window(optimizer).batches + 1 == self.batches

    def on_waiting(self, optimizer: Optimizer) -> None:
        """Count a batch in the optimizer's window."""
        window = self._window(optimizer)
        window.batches += 1
        window.current = None

    def on_gradients(self, optimizer: Optimizer) -> None:
        """Divide by the rows of the window, unless that has been done."""
        if self.world.size == 1:
            self._divide(optimizer)

    def _divide(self, optimizer: Optimizer, divided: Set[Tensor] = frozenset()) -> None:
        """Divide by the rows of the window, in units; without any rows gradients stay 0.

        Args:
            divided: gradients that have been, for another optimizer.
        """
        share = self._window(optimizer).weight / self.unit
        if isinstance(share, Tensor):
            share = torch.where(share == 0, 1, share)
        elif share in (0, 1):
            return
        memory = self.stepper.gradient_memory(optimizer)
        if divided:
            own = gradients_of(optimizer)
            if not divided.isdisjoint(own):
                memory = [gradient for gradient in own if gradient not in divided]
        for numbers in memory:
            numbers.div_(share)

    def on_stepped(self, optimizer: Optimizer) -> None:
        """Begin a new window."""
        self.windows[optimizer] = Window()

    def on_last_batch(self) -> None:
        """Step with the windows that are partly filled."""
        partly_filled = []
        for optimizer, window in self.windows.items():
            if window.batches:
                partly_filled.append(optimizer)
        self.stepper.close(partly_filled)

    def numbers(self, optimizers: list[Optimizer]) -> list[Any]:
        """Return the weight of each window, to be added up over the processes."""
        return [self._window(optimizer).weight for optimizer in optimizers]

    def take_numbers(self, optimizers: list[Optimizer], sums: list[Any]) -> None:
        """Divide by the mean weight over the processes, as gradients are means over them.

        If several optimizers train a parameter, the first one steps with its gradient and clears
        it: it is divided for that one alone.
        """
        divided: set[Tensor] = set()  # compared by identity
        for optimizer, weight in zip(optimizers, sums, strict=True):
            self._window(optimizer).weight = weight / self.world.size
            self._divide(optimizer, divided)
            if len(optimizers) > 1:
                divided.update(gradients_of(optimizer))

    def reset(self) -> None:
        """Forget the windows."""
        self.windows = {}
        self.unit = 0.0

    def settings(self) -> dict[str, Any]:
        """Return how many batches make a step."""
        return {"accumulate": self.batches}

    def state_dict(self) -> dict[str, Any]:
        """Return how full the windows are."""
        windows = {}
        for name, optimizer in self.stepper.optimizers.items():
            windows[name] = asdict(self._window(optimizer))
        return {"accumulate": self.batches, "windows": windows, "unit": self.unit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the windows of a checkpoint; those of older files hold sums, whose unit is 1."""
        self.unit = state.get("unit", 1.0)
        for name, optimizer in self.stepper.optimizers.items():
            window = state["windows"][name]
            self.windows[optimizer] = Window(window["weight"], window["current"], window["batches"])

    def way_back(self) -> Restore:
        """Return a function that restores the current windows."""
        unit = self.unit
        windows = {optimizer: replace(window) for optimizer, window in self.windows.items()}

        def restore() -> None:
            self.unit = unit
            self.windows = windows

        return restore


def check_mean(loss_func: Any, what: str) -> None:
    """Refuse a loss that is a sum over rows: batches are weighted by their rows.

    Raises:
        ValueError: the loss, the loss that `Regularized` wraps, or one of several has
            reduction="sum".
    """
    for name, loss in losses_in(loss_func).items():
        if getattr(unwrap_loss(loss), "reduction", None) == "sum":
            which = "loss_func" if name == "" else f"loss {name!r}"
            raise ValueError(
                f'{which} has reduction="sum", and {what} weights each batch by its rows, and a '
                'sum has already counted them. Build it with reduction="mean", or return '
                "minikeras.Average(total, count)."
            )


def describe_units(loss: LossParts, batches: int) -> str:
    """Return the error for parts that count different units."""
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for name, part in loss.parts.items():
        if loss.weights[name]:
            kinds[isinstance(part, Average)].append(name)
    counted = " and ".join(f"{name} an Average(total, count)" for name in kinds[True])
    means = " and ".join(f"{name} a mean over rows" for name in kinds[False])
    what = f"accumulate={batches}" if batches > 1 else "training on several processes"
    remedy = "accumulate=1" if batches > 1 else "distributed=None in one process"
    return (
        f"the losses count different units: {' and '.join(filter(None, [counted, means]))}. {what} "
        "adds up the gradients of several batches and divides them by one count, so expected means "
        "over rows from all, or one Average alone with a weight above 0. Return means over rows, "
        f"or compile with {remedy}."
    )
