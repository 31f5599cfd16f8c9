"""Refuse calls in a custom train_step that would bypass the other parts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from minikeras.hooks import Fit, Hook
from minikeras.stepper import Part, optimizer_parameters


class RefuseBareCalls(Part, Hook):
    """Raise an error for `loss.backward()` and `optimizer.step()` in a custom train_step."""

    def __init__(self) -> None:
        self.is_moving = False  # the stepper itself fills gradients or moves weights

    def around_moves(self, move: Callable[..., Any]) -> Callable[..., Any]:
        """Mark the stepper's own backward and step."""

        @functools.wraps(move)
        def marked(*args: Any) -> Any:
            self.is_moving = True
            try:
                return move(*args)
            finally:
                self.is_moving = False

        return marked

    @contextlib.contextmanager
    def around_fit(self, fit: Fit) -> Iterator[None]:
        """Watch the optimizers and the parameters during a fit."""
        handles: list[Any] = []
        parameters = set()
        for optimizer in self.stepper.optimizers.values():
            handles.append(optimizer.register_step_pre_hook(self._before_step))
            parameters.update(optimizer_parameters(optimizer))
        for parameter in parameters:
            if parameter.requires_grad and not is_lazy(parameter):
                handles.append(parameter.register_post_accumulate_grad_hook(self._after_gradient))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.is_moving:
            raise describe_bare_call(
                "optimizer.step()", "self.optimizer_step()", self.stepper.bypassed
            )

    def _after_gradient(self, parameter: Tensor) -> None:
        if not self.is_moving:
            raise describe_bare_call(
                "loss.backward()", "self.backward(loss)", self.stepper.bypassed
            )


def describe_bare_call(called: str, instead: str, bypassed: str) -> RuntimeError:
    """Return the error for a call that bypasses something."""
    return RuntimeError(f"{called} bypasses {bypassed}. Call {instead} in train_step.")
