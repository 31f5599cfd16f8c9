"""Keep NaN and infinities out of weights and files: a part of the stepper, and a hook of the fit.

It looks at

each loss               before the weights are updated: see loss.py
a norm of gradients     if another part computes one, before the step
weights, and the state  at the end of an epoch, and before a file is written: see weights.py
of the optimizers
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minikeras.faults.loss import FiniteLoss, NonFiniteGradient, NonFiniteLoss, explained
from minikeras.faults.weights import (
    FiniteWeights,
    NonFiniteWeights,
    explain_gradient,
    explain_weights,
)
from minikeras.hooks import Fit, Hook
from minikeras.phase import NO_BATCH
from minikeras.stepper import Part, Restore, StepLoss

if TYPE_CHECKING:
    from minikeras.model import Model
    from minikeras.run import Run


class NaNGuard(Part, Hook):
    """Watch the losses, gradients and weights of one fit.

    Args:
        on_nan: "raise" an error, "stop" the fit with a warning, or "ignore": then this is no part
            of the stepper, and only keeps such weights out of files.
        scales: another part scales the loss, and skips steps whose gradients are infinite.
    """

    def __init__(self, model: Model, run: Run, on_nan: str, scales: bool) -> None:
        self.model = model
        self.run = run
        self.on_nan = on_nan
        self.scales = scales
        self.holds_graphs = True
        self.losses = FiniteLoss(run.device, run.optimizers.values())
        self.losses.alone = run.world.size == 1
        self.losses.skipped_elsewhere = scales
        self.weights: Any = None  # a FiniteWeights, during the fit

    @property
    def watches(self) -> bool:
        """Whether losses are looked at."""
        return self.on_nan != "ignore"

    # --- the part ---------------------------------------------------------------------------------

    def on_loss(self, loss: StepLoss) -> None:
        """Raise an error for a loss that is not finite, before the weights are updated."""
        if loss.batch.is_filler:
            return
        self.losses.look(loss.total)
        if self.scales and not self.losses.reads_each:
            # the scaler skips the steps from the first bad loss on
            loss.total = loss.total * torch.where(self.losses.found > 0, torch.nan, 1.0)

    def on_gradient_norm(self, norm: Tensor, parameters: list[Tensor]) -> None:
        """Check a norm that another part has computed."""
        if not self.scales:  # else such a step is skipped
            self.losses.look_at_norm(norm, parameters)

    def numbers(self, optimizers: list[Any]) -> list[Any]:
        """Tell the other processes whether a loss of this one was not finite."""
        return [self.losses.own()]

    def take_numbers(self, optimizers: list[Any], sums: list[Any]) -> None:
        """Read how many processes had such a loss, before any of them updates a weight."""
        self.losses.heard(sums[0])

    def on_graph_steps(self, loss: Tensor, steps: int) -> None:
        """Check steps that a graph has taken; it counts bad losses and holds steps back itself."""
        self.losses.look_back(loss, steps)

    def on_last_batch(self) -> None:
        """Read the losses that have not been read, before the last steps of a pass."""
        self.losses.ended()

    def on_pass_end(self) -> None:
        """Read the norm of the last step, and check the weights."""
        self.losses.ended()
        if self.weights is not None:
            self.weights.check()

    def way_back(self) -> Restore:
        """Return a function that restores what has been read until now."""
        return self.losses.way_back()

    # --- the hook ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def around_fit(self, fit: Fit) -> Iterator[None]:
        """Watch the weights during a fit, and hold fused optimizers back."""
        run = self.run
        if self.watches:
            self.losses.begin(run.engine.bad_steps)
        self.weights = FiniteWeights(
            self.model,
            run.loss_func,
            run.optimizers,
            run.world,
            self.losses if self.watches else None,
            run.stepper.delays and not self.scales,
        )
        try:
            with self.losses if self.watches else contextlib.nullcontext():
                yield
        finally:
            self.weights = None

    @contextlib.contextmanager
    def around_epoch(self, fit: Fit) -> Iterator[None]:
        """End the fit at a loss that is not finite: with an error, or with a warning."""
        try:
            yield
        except NonFiniteLoss as error:
            message = self._explain(error, fit.at.epoch)
            if self.on_nan == "raise":
                error.args = (message,)
                error.culprit = None
                raise
            warnings.warn(message, stacklevel=2)
            self.model.stop_training = True

    def allows_writing(self, path: Any, with_state: bool) -> bool:
        """Tell whether weights may be written to a file; raise an error if they are not finite."""
        averages: list[Any] = []
        if with_state and self.run.fit is not None:
            for callback in self.run.fit.callbacks:
                averages += getattr(callback, "tensors", list)()
        allowed: bool = self.weights.allow(path, averages)
        return allowed

    def _explain(self, error: NonFiniteLoss, epoch: int) -> str:
        """Return the message for a loss, a gradient or weights that are not finite."""
        run = self.run
        if run.engine.holds_back_steps:
            self.losses.skipped_elsewhere = True
        batch = run.train.batch
        run.train.batch = NO_BATCH
        error.batch = (batch.features, batch.labels, batch.number)
        rates = run.learning_rates()
        try:
            if isinstance(error, NonFiniteWeights):
                return explain_weights(error, self.model, epoch, rates, self.losses)
            if isinstance(error, NonFiniteGradient):
                return explain_gradient(error, self.model, epoch, rates, self.losses)
            suspects = self.weights.suspects()
            parts = run.train.take_parts()
            return explained(
                error, self.model, run.loss_func, epoch, rates, self.losses, suspects, parts
            )
        finally:
            error.batch = None
