"""A loss that is NaN or infinite, found before it moves a weight.

on the CPU      the loss is read at each step, where reading waits for nothing
on a device     a count on the device grows from the first bad loss on; it is read every few steps, without waiting, and
                holds back the steps of fused optimizers meanwhile
under jit       the graph holds back its own steps; see jit/steps.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from minikeras.nests import is_sharded, leaves
from minikeras.results import count_bad_gradient

READ_EVERY = 50  # steps, on a device
CAUSE = (
    "sqrt and log have none at 0, and NaN in the data passes torch.where, nan_to_num and nanmean"
)
REMEDY = "Add a small number inside, as in torch.sqrt(x + 1e-8), clean the data, or lower the learning rate."


class NonFiniteLoss(FloatingPointError):
    """The loss is NaN or infinite. What `fit` raises for it is a FloatingPointError."""

    says_where = True  # the message names epoch and batch

    def __init__(self, value: float, ago: int = 0) -> None:
        super().__init__(f"the loss is {value}; expected a finite number.")
        self.value = value
        self.ago = ago  # steps since the first such loss
        self.elsewhere = False  # it was in another process
        self.batch: Any = (
            None,
            None,
            0,
        )  # features, labels and number of the batch at which it was found
        self.culprit: Any = (
            None  # features and labels of the batch whose loss it was, where that is another
        )


class NonFiniteGradient(NonFiniteLoss):
    """The loss is finite, and the norm of its gradient is not.

    Args:
        value: the norm.
        parameter: the first whose gradient is not finite, None where that is not known.
        overflown: each gradient is finite.
    """

    def __init__(
        self, value: float, ago: int = 0, parameter: Any = None, overflown: bool = False
    ) -> None:
        super().__init__(value, ago)
        self.parameter = parameter
        self.overflown = overflown


class FiniteLoss:
    """The watch over a fit's losses. For use in `with`: what it hangs on optimizers is taken off at the end.

    `bad` counts, on the device, the steps since the first bad loss, itself included; a graph counts by itself. It is
    the gradient that was bad, and not the loss, where `of_gradient` is 1.
    """

    def __init__(self, device: torch.device, optimizers: Iterable[Optimizer]) -> None:
        self.alone = True  # else nothing is raised before all processes have heard of it
        self.value = 0.0  # the last loss that was read
        self.last = math.nan  # the last finite loss that was read
        self.looked = 0  # losses, those included that no one has read
        self.reads_each = device.type == "cpu"
        self.bad = torch.zeros((), device=device)
        self.of_gradient = torch.zeros((), device=device)
        self.found = torch.zeros((), device=device)  # 1 from the first bad loss on
        self.reading = DelayedRead(self.bad)
        self.steps = 0
        self.optimizers = list(optimizers)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.blocks = all(group.get("fused") for group in groups)
        self.skipped_elsewhere = (
            False  # a graph or a scaler skips the steps from the first bad loss on
        )

    def begin(self, counts: tuple[Tensor, Tensor] | None) -> None:
        """Begin a fit; `counts` are those that a graph keeps, `bad` and `of_gradient`."""
        if counts is not None:
            self.bad, self.of_gradient = counts
            self.bad.zero_()
            self.of_gradient.zero_()
            self.reading = DelayedRead(self.bad)

    def way_back(self) -> Callable[[], None]:
        """Return a function that puts back what has been read until now."""
        names = ("value", "last", "looked", "steps")
        numbers = {name: getattr(self, name) for name in names}
        counts = [self.bad, self.of_gradient, self.found]
        values = [count.clone() for count in counts]

        def restore() -> None:
            vars(self).update(numbers)
            for count, value in zip(counts, values, strict=True):
                count.copy_(value)

        return restore

    def __enter__(self) -> FiniteLoss:
        if self.blocks and not self.reads_each:
            for optimizer in self.optimizers:
                optimizer.found_inf = self.found  # type: ignore[attr-defined] # torch's own way to skip a step
        return self

    def __exit__(self, *error: object) -> None:
        for optimizer in self.optimizers:
            vars(optimizer).pop("found_inf", None)

    @property
    def holds_back(self) -> bool:
        """Whether no step is taken from the first bad loss on."""
        return self.reads_each or self.blocks or self.skipped_elsewhere

    def look(self, loss: Tensor) -> None:
        """Before a step moves a weight: raise NonFiniteLoss where the loss, 0-dim, is not finite."""
        self.looked += 1
        if self.reads_each:
            value = loss.item()
            if math.isfinite(value):
                self.last = value
            elif self.alone:
                raise NonFiniteLoss(value)
            else:
                self.value = value
            return
        with (
            torch.no_grad()
        ):  # in few operations: 0 times a number is 0, and NaN where that is not finite
            self.found.copy_(self.bad + loss * 0 != 0)
            self.bad += self.found
        if self.alone:
            self._read_now_and_then(1)

    def look_at_norm(self, norm: Tensor, parameters: Iterable[Tensor]) -> None:
        """Before a step: raise NonFiniteGradient where the norm of these parameters' gradients is not finite.

        It is the same in all processes, which have added up their gradients.
        """
        if is_sharded(norm):
            norm = norm.full_tensor()  # type: ignore[attr-defined]
        if self.reads_each:
            value = norm.item()
            if not math.isfinite(value):
                first = first_non_finite(parameters)
                raise NonFiniteGradient(value, parameter=first, overflown=first is None)
            return
        with torch.no_grad():
            count_bad_gradient(self.bad, self.of_gradient, norm)
            self.found.copy_(self.bad > 0)

    def own(self) -> Any:
        """1 where a loss of this process was not finite, else 0."""
        return float(not math.isfinite(self.value)) if self.reads_each else self.bad > 0

    def heard(self, bad: Tensor) -> None:
        """In how many processes it was so, before any of them moves a weight."""
        if not self.reads_each:
            self.bad.copy_(torch.where((bad > 0) & (self.bad == 0), 1.0, self.bad))
            self.found.copy_(self.bad > 0)
            self._read_now_and_then(1)
        elif float(bad):
            error = NonFiniteLoss(math.nan if math.isfinite(self.value) else self.value)
            error.elsewhere = math.isfinite(self.value)
            raise error

    def look_back(self, loss: Tensor, steps: int) -> None:
        """After so many steps of a graph that counts and blocks by itself; `loss` is their mean."""
        self.looked += steps
        if not self.reads_each:
            self._read_now_and_then(steps)
            return
        value = float(loss)
        if not math.isfinite(value) or self.bad.item():  # the gradient's norm counts too
            self.ended()
        self.last = value

    def _read_now_and_then(self, steps: int) -> None:
        self.steps += steps
        if self.steps >= READ_EVERY:
            bad = self.reading.result(wait=not self.alone)  # all must find it at the same step
            self.ended(bad and bad + self.steps)
            self.steps = 0
            self.reading.start()

    def ended(self, bad: float | None = None) -> None:
        """Raise NonFiniteLoss where the count is not 0; without one given it is read, which waits for the device."""
        bad = float(self.bad) if bad is None else bad
        if bad and float(self.of_gradient):
            raise NonFiniteGradient(math.nan, ago=int(bad) - 1)
        if bad:
            raise NonFiniteLoss(math.nan, ago=int(bad) - 1)


def first_non_finite(parameters: Iterable[Tensor]) -> Tensor | None:
    """The first parameter whose gradient holds NaN or inf."""
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if is_sharded(gradient):
            gradient = gradient.to_local()  # type: ignore[attr-defined]
        if not bool(gradient.isfinite().all()):
            return parameter
    return None


class DelayedRead:
    """A number on a device, read without waiting: copied when asked for, looked at when the copy has arrived."""

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.copy = torch.zeros((), pin_memory=source.device.type == "cuda")
        self.arrived: Any = None

    def start(self) -> None:
        self.copy.copy_(self.source, non_blocking=True)
        if self.source.device.type != "cpu":
            self.arrived = torch.Event(device=self.source.device)
            self.arrived.record()

    def result(self, wait: bool = False) -> float:
        """The number when it was copied last; 0 while the copy is under way, unless that is to be waited for."""
        if wait and self.arrived is not None:
            self.arrived.synchronize()
        return self.copy.item() if self.arrived is None or self.arrived.query() else 0.0


def explained(
    error: NonFiniteLoss,
    model: nn.Module,
    loss_func: Any,
    epoch: int,
    rates: Mapping[str, float],
    watch: FiniteLoss,
    suspects: tuple[list[str], list[str]],
) -> str:
    """What is known of the cause: where, the rates, the last finite loss, the data, the weights; and what to do.

    `suspects`: names of weights and buffers that are not finite and were as the fit began; and of those that were NaN
    as it began.
    """
    features, labels, number = error.batch
    is_at_hand = error.ago == 0 or error.culprit is not None
    if error.culprit is not None:
        features, labels = error.culprit
    spoiled: list[str] = []
    if is_at_hand:
        spoiled = [
            name
            for name, nest in (("features", features), ("labels", labels))
            if has_non_finite(nest)
        ]
    buffer_names = {name for name, _ in model.named_buffers()}
    since, before = suspects
    weights = [name for name in (*before, *since) if name not in buffer_names]
    buffers = [name for name in (*before, *since) if name in buffer_names]
    began = f" (it began {error.ago} steps before)" if error.ago else ""
    sentences = [
        f"the loss is {error.value} in epoch {epoch}, batch {number}{began}; expected a finite number.",
        f"{last_loss(error, watch)} at {shown_rates(rates)}.",
    ]
    if spoiled:
        sentences.append(
            f"The {' and '.join(spoiled)} of this batch held NaN or inf already: clean the data."
        )
    elif error.elsewhere:
        sentences.append("It was in the batch of another process: its message says more.")
    elif not is_at_hand:
        sentences.append(
            'The batch of that loss is not kept, so its data was not looked at: compile with device="cpu" to find it, '
            "where each loss is read at once, or look for NaN and inf in the data."
        )
    elif all_ignored(loss_func, labels):
        sentences.append(
            f"No label of this batch counts: all are {int(labels.flatten()[0])}, which the loss ignores, and its "
            f"mean over none is nan. Let the loss return minikeras.Average(total, count)."
        )
    elif not weights:
        sentences.append(
            "Features, labels and weights are finite: lower the rate, clip gradients, or look into the loss."
        )
    if weights:
        sentences.append(f"Weights are NaN or inf: {', '.join(weights[:3])}.")
        if is_at_hand and not before and watch.reads_each:
            sentences.append(
                "They were finite as the fit began: the loss of a step before was finite and its gradient was not, or "
                f"a step was too large. Possible causes: {CAUSE}. {REMEDY}"
            )
        sentences.append("Go back to a checkpoint.")
    elif watch.holds_back:
        sentences.append("The weights are those of before it.")
    else:
        sentences.append("The optimizer has taken steps since: go back to a checkpoint.")
    if buffers:
        sentences.append(
            f"The forward pass has spoiled {', '.join(buffers[:3])}: go back to a checkpoint before you go on."
        )
    return " ".join(sentences)


def shown_rates(rates: Mapping[str, float]) -> str:
    """The learning rates for a message."""
    return ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items()) or "an unknown rate"


def last_loss(error: NonFiniteLoss, watch: FiniteLoss | None) -> str:
    """The last finite loss, where it was read or there was none."""
    if watch is not None and math.isfinite(watch.last):
        return f"The last finite loss was {watch.last:.4g},"
    first = watch is not None and watch.looked == error.ago + 1
    return "There was no finite loss before it in this fit," if first else "It was"


def all_ignored(loss_func: Any, labels: Any) -> bool:
    """Whether every label is the one that the loss leaves out: its ignore_index, or torch's default."""
    parts = loss_func.modules() if isinstance(loss_func, nn.Module) else ()
    ignored = next((part.ignore_index for part in parts if hasattr(part, "ignore_index")), -100)
    whole = isinstance(labels, Tensor) and labels.numel() > 0 and not labels.is_floating_point()
    return whole and bool((labels.long() == ignored).all())


def has_non_finite(nest: Any) -> bool:
    """Whether any tensor in a nest holds NaN or inf."""
    tensors = [leaf for leaf in leaves(nest) if isinstance(leaf, Tensor) and not is_lazy(leaf)]
    return any(
        not bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point()
    )
