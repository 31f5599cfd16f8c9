"""Find a NaN or infinite loss before the weights are updated.

on the CPU      read the loss at each step; reading waits for nothing there
on a device     a count on the device grows from the first bad loss on; it is read every few steps,
                without waiting, and meanwhile holds back the steps of fused optimizers
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
from minikeras.results import count_bad_gradient, get_mean

READ_EVERY = 50  # steps, on a device
CAUSE = (
    "sqrt and log have no finite gradient at 0, and NaN in the data reaches the gradient through "
    "torch.where, nan_to_num and nanmean"
)
REMEDY = (
    "Add a small number inside, as in torch.sqrt(x + 1e-8), clean the data, or lower the learning "
    "rate."
)


class NonFiniteLoss(FloatingPointError):
    """The loss is NaN or infinite. What `fit` raises for it is a FloatingPointError."""

    says_where = True  # the message names epoch and batch

    def __init__(self, value: float, ago: int = 0) -> None:
        super().__init__(f"the loss is {value}; expected a finite number.")
        self.value = value
        self.ago = ago  # steps since the first such loss
        self.elsewhere = False  # it was in another process
        # features, labels and number of the batch at which it was found
        self.batch: Any = (None, None, 0)
        # features and labels of the batch whose loss it was, if that is another
        self.culprit: Any = None


class NonFiniteGradient(NonFiniteLoss):
    """The loss is finite, and the norm of its gradient is not.

    Args:
        value: the norm.
        parameter: the first whose gradient is not finite, None if that is not known.
        overflown: each gradient is finite, but not the norm of all.
    """

    def __init__(
        self, value: float, ago: int = 0, parameter: Any = None, overflown: bool = False
    ) -> None:
        super().__init__(value, ago)
        self.parameter = parameter
        self.overflown = overflown


class FiniteLoss:
    """Watch the losses of a fit. For use in `with`: at the end the optimizers are as before.

    `bad` counts, on the device, the steps since the first bad loss, which is included; a graph
    counts by itself. If `of_gradient` is 1, the gradient was bad, and not the loss.
    """

    def __init__(self, device: torch.device, optimizers: Iterable[Optimizer]) -> None:
        self.alone = True  # else nothing is raised before all processes know of it
        self.value = 0.0  # the last loss that was read
        self.last = math.nan  # the last finite loss that was read
        self.looked = 0  # losses so far, read or not
        self.reads_each = device.type == "cpu"
        self.bad = torch.zeros((), device=device)
        self.of_gradient = torch.zeros((), device=device)
        self.found = torch.zeros((), device=device)  # 1 from the first bad loss on
        self.reading = DelayedRead(self.bad)
        self.steps = 0
        self.optimizers = list(optimizers)
        self.blocks = True  # all optimizers are fused, and can be held back
        for optimizer in self.optimizers:
            if not all(group.get("fused") for group in optimizer.param_groups):
                self.blocks = False
        # a graph or a scaler skips the steps from the first bad loss onward
        self.skipped_elsewhere = False

    def begin(self, counts: tuple[Tensor, Tensor] | None) -> None:
        """Begin a fit; `counts` are those that a graph keeps, `bad` and `of_gradient`."""
        if counts is not None:
            self.bad, self.of_gradient = counts
            self.bad.zero_()
            self.of_gradient.zero_()
            self.reading = DelayedRead(self.bad)

    def way_back(self) -> Callable[[], None]:
        """Return a function that restores what has been read until now."""
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
                # torch's own way to skip a step
                optimizer.found_inf = self.found  # type: ignore[attr-defined]
        return self

    def __exit__(self, *error: object) -> None:
        for optimizer in self.optimizers:
            vars(optimizer).pop("found_inf", None)

    @property
    def holds_back(self) -> bool:
        """Whether no step is taken from the first bad loss on."""
        return self.reads_each or self.blocks or self.skipped_elsewhere

    def look(self, loss: Tensor) -> None:
        """Check a loss, a 0-d tensor, before a step updates the weights.

        Raises:
            NonFiniteLoss: it is not finite.
        """
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
        # in few operations: 0 times a number is 0, or NaN if the number is not finite
        with torch.no_grad():
            self.found.copy_(self.bad + loss * 0 != 0)
            self.bad += self.found
        if self.alone:
            self._read_now_and_then(1)

    def look_at_norm(self, norm: Tensor, parameters: Iterable[Tensor]) -> None:
        """Check the norm of these parameters' gradients before a step.

        It is the same in all processes, which have added up their gradients.

        Raises:
            NonFiniteGradient: it is not finite.
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
        """Return 1 if a loss of this process was not finite, else 0."""
        return float(not math.isfinite(self.value)) if self.reads_each else self.bad > 0

    def heard(self, bad: Tensor) -> None:
        """Read the number of processes with such a loss, before any of them updates a weight."""
        if not self.reads_each:
            self.bad.copy_(torch.where((bad > 0) & (self.bad == 0), 1.0, self.bad))
            self.found.copy_(self.bad > 0)
            self._read_now_and_then(1)
        elif float(bad):
            error = NonFiniteLoss(math.nan if math.isfinite(self.value) else self.value)
            error.elsewhere = math.isfinite(self.value)
            raise error

    def look_back(self, loss: Tensor, steps: int) -> None:
        """Check steps that a graph has run; the graph counts and holds back steps itself.

        Args:
            loss: the mean over these steps.
        """
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
        """Raise an error if the count of bad losses is not 0.

        Args:
            bad: the count; None to read it, which waits for the device.

        Raises:
            NonFiniteLoss, NonFiniteGradient: it is not 0.
        """
        bad = float(self.bad) if bad is None else bad
        if bad and float(self.of_gradient):
            raise NonFiniteGradient(math.nan, ago=int(bad) - 1)
        if bad:
            raise NonFiniteLoss(math.nan, ago=int(bad) - 1)


def first_non_finite(parameters: Iterable[Tensor]) -> Tensor | None:
    """Return the first parameter whose gradient holds NaN or inf."""
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
    """Read a number on a device without waiting: copy it, and look when the copy has arrived."""

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self.copy = torch.zeros((), pin_memory=source.device.type == "cuda")
        self.arrived: Any = None

    def start(self) -> None:
        """Start to copy the number."""
        self.copy.copy_(self.source, non_blocking=True)
        if self.source.device.type != "cpu":
            self.arrived = torch.Event(device=self.source.device)
            self.arrived.record()

    def result(self, wait: bool = False) -> float:
        """Return the number as it was last copied; 0 while the copy has not arrived.

        Args:
            wait: wait for the copy.
        """
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
    parts: Mapping[str, Any],
) -> str:
    """Return the message: where, rates, last finite loss, data, weights, and what to do.

    Args:
        suspects: names of weights and buffers that are not finite now and were as the fit began;
            and of those that were NaN as it began.
        parts: column -> loss, of the current batch if the loss is a sum of several.
    """
    features, labels, number = error.batch
    has_batch = error.ago == 0 or error.culprit is not None  # of the bad loss
    if error.culprit is not None:
        features, labels = error.culprit
    spoiled: list[str] = []
    if has_batch and has_non_finite(features):
        spoiled.append("features")
    if has_batch and has_non_finite(labels):
        spoiled.append("labels")
    buffer_names = {name for name, _ in model.named_buffers()}
    since, before = suspects
    weights = [name for name in (*before, *since) if name not in buffer_names]
    buffers = [name for name in (*before, *since) if name in buffer_names]
    began = ""
    if error.ago:
        began = f" (it started {error.ago} steps before)"
    sentences = [
        f"the loss is {error.value} in epoch {epoch}, batch {number}{began}; expected a finite "
        f"number.",
        f"{last_loss(error, watch)} at {shown_rates(rates)}.",
    ]
    if error.ago == 0 and not error.elsewhere:
        bad = [name for name, part in parts.items() if not is_finite(part)]
        if bad:
            sentences.append(f"It is a sum of losses, and {', '.join(bad)} is not finite.")
    if spoiled:
        sentences.append(
            f"The {' and '.join(spoiled)} of this batch contained NaN or inf: clean the data."
        )
    elif error.elsewhere:
        sentences.append(
            "It was in the batch of another process: see the error message of that process."
        )
    elif not has_batch:
        sentences.append(
            "The batch of that loss was not kept, so its data could not be checked: compile with "
            'device="cpu", where each loss is checked at once, or look for NaN and inf in the data.'
        )
    elif all_ignored(loss_func, labels):
        sentences.append(
            f"The loss ignores every label of this batch: all are {int(labels.flatten()[0])} "
            "(`ignore_index`), and the mean over no labels is nan. Let the loss return "
            "minikeras.Average(total, count)."
        )
    elif not weights:
        sentences.append(
            "Features, labels and weights are finite: lower the learning rate, clip gradients, or "
            "check the loss."
        )
    if weights:
        sentences.append(f"Weights are NaN or inf: {', '.join(weights[:3])}.")
        if has_batch and not before and watch.reads_each:
            sentences.append(
                "They were finite when the fit started: in an earlier step the loss was finite "
                f"and its gradient was not, or a step was too large. Possible causes: {CAUSE}. "
                f"{REMEDY}"
            )
        sentences.append("Restore a checkpoint.")
    elif watch.holds_back:
        sentences.append("The weights are those from before this step.")
    else:
        sentences.append("The optimizer has taken steps since: restore a checkpoint.")
    if buffers:
        sentences.append(
            f"The forward pass has made {', '.join(buffers[:3])} NaN or infinite: restore a "
            "checkpoint before you continue."
        )
    return " ".join(sentences)


def shown_rates(rates: Mapping[str, float]) -> str:
    """Return the learning rates for a message."""
    return (
        ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items())
        or "an unknown learning rate"
    )


def last_loss(error: NonFiniteLoss, watch: FiniteLoss | None) -> str:
    """Return the beginning of a sentence about the last finite loss, if it is known."""
    if watch is not None and math.isfinite(watch.last):
        return f"The last finite loss was {watch.last:.4g},"
    if watch is not None and watch.looked == error.ago + 1:
        return "There was no finite loss before it in this fit,"
    return "It was"


def all_ignored(loss_func: Any, labels: Any) -> bool:
    """Tell whether every label is one that the loss ignores: its ignore_index, default -100."""
    if not isinstance(labels, Tensor) or labels.numel() == 0 or labels.is_floating_point():
        return False
    parts = loss_func.modules() if isinstance(loss_func, nn.Module) else ()
    ignored: Any = -100
    for part in parts:
        if hasattr(part, "ignore_index"):
            ignored = part.ignore_index
            break
    return bool((labels.long() == ignored).all())


def is_finite(loss: Any) -> bool:
    """Tell whether a loss, or the mean of an Average, is finite."""
    return math.isfinite(float(get_mean(loss)))


def has_non_finite(nest: Any) -> bool:
    """Tell whether any tensor in a nest holds NaN or inf."""
    for leaf in leaves(nest):
        if not isinstance(leaf, Tensor) or is_lazy(leaf) or not leaf.is_floating_point():
            continue
        if not bool(leaf.isfinite().all()):
            return True
    return False
