"""Clip gradients by their norm, by their values, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.errors import check_number_in_range
from minikeras.stepper import Part, optimizer_parameters


class ClipGradients(Part):
    """Clip the gradients of each optimizer before it steps.

    Args:
        norm: maximum total norm per optimizer, above 0; None for no limit.
        value: maximum absolute value of each element, above 0; None for no limit.
    """

    def __init__(self, norm: float | None = None, value: float | None = None) -> None:
        self.norm = norm
        self.value = value
        if norm is not None:
            self.bypassed = f"clip_grad_norm={norm:g}"
        elif value is not None:
            self.bypassed = f"clip_grad_value={value:g}"

    def on_gradients(self, optimizer: Optimizer) -> None:
        """Clip the gradients of an optimizer that steps now."""
        self._clip(optimizer_parameters(optimizer), self.stepper.tell_norm)

    def on_gradients_in_graph(
        self, parameters: list[Tensor], tell_norm: Callable[..., None]
    ) -> None:
        """Clip the gradients of these parameters in a compiled graph."""
        # one norm for all gradients together would be a call out of the compiled code
        self._clip(parameters, tell_norm, foreach=False)

    def settings(self) -> dict[str, Any]:
        """Return the two limits."""
        return {"clip_grad_norm": self.norm, "clip_grad_value": self.value}

    def _clip(
        self,
        parameters: list[Tensor],
        tell_norm: Callable[..., None],
        foreach: bool | None = None,
    ) -> None:
        """Clip each value, then the norm of all.

        Args:
            tell_norm: shows the norm, before it is clipped, to the parts that look at it.
            foreach: whether torch computes the norms of all gradients in one call; None lets it
                choose.
        """
        with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
        if self.value is not None and with_gradient:
            nn.utils.clip_grad_value_(with_gradient, self.value)
        if self.norm is None:
            return
        gradients = [parameter.grad for parameter in with_gradient]
        total: Any = nn.utils.get_total_norm(gradients, foreach=foreach)  # type: ignore[arg-type]
        tell_norm(total, with_gradient)
        nn.utils.clip_grads_with_norm_(with_gradient, self.norm, total)


def check_clip(clip_grad_norm: Any, clip_grad_value: Any) -> tuple[float | None, float | None]:
    """Return compile's two limits, checked.

    Raises:
        TypeError, ValueError: one is no number above 0.
    """
    limits: dict[str, Any] = {"clip_grad_norm": clip_grad_norm, "clip_grad_value": clip_grad_value}
    for name, limit in limits.items():
        if limit is not None:
            limits[name] = check_number_in_range(
                name, limit, "above 0, or None", lambda number: number > 0
            )
    return limits["clip_grad_norm"], limits["clip_grad_value"]
