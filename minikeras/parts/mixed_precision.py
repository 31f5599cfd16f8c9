"""Compute forward and loss in half precision, by torch's autocast; the loss scale of float16.

step       forward and loss under autocast; metrics, backward and the optimizer outside it
backward   in float16, multiply the loss by a scale, so that small gradients do not vanish
gradients  divide by the scale; skip a step with infinite gradients
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from minikeras.errors import check_one_of, dtype_name
from minikeras.nests import to_float32, widen
from minikeras.stepper import Part, Restore, StepLoss, gradients_of, optimizer_parameters

DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class MixedPrecision(Part):
    """Compute forward and loss in `dtype`, as torch's autocast does; the rest stays float32."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.scaler: Any = None
        if dtype == torch.float16:
            self.scaler = torch.amp.GradScaler(device.type)
            self.outside_graph = 'precision="fp16"'
        self.has_stepped = False

    def around_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Run forward and loss under autocast."""
        device_type, dtype = self.device.type, self.dtype

        @functools.wraps(step)
        def under_autocast(*args: Any) -> Any:
            # No cache of cast weights: it would outlive a step in the middle of train_step.
            with torch.autocast(device_type, dtype, cache_enabled=False):
                return step(*args)

        return under_autocast

    def around_metrics(self, metrics: Callable[..., Any]) -> Callable[..., Any]:
        """Compute metrics in float32, outside autocast."""

        @functools.wraps(metrics)
        def in_full_precision(outputs: Any, *args: Any) -> Any:
            with torch.autocast(self.device.type, enabled=False):
                return metrics(to_float32(outputs), *args)

        return in_full_precision

    def around_moves(self, move: Callable[..., Any]) -> Callable[..., Any]:
        """Leave autocast for backward and step: it is for forward passes."""

        @functools.wraps(move)
        def outside_autocast(*args: Any) -> Any:
            with torch.autocast(self.device.type, enabled=False):
                return move(*args)

        return outside_autocast

    def outputs_for_user(self, outputs: Any) -> Any:
        """Return the outputs in float32."""
        return to_float32(outputs)

    def on_loss(self, loss: StepLoss) -> None:
        """Scale the loss up."""
        loss.total = widen(loss.total)
        if self.scaler is None:
            return
        loss.total = self.scaler.scale(loss.total)

    def on_gradients(self, optimizer: Optimizer) -> None:
        """Scale the gradients down again."""
        if self.scaler is not None and gradients_of(optimizer):
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Let the scaler step, or skip the step if a gradient is infinite.

        It does not step without a gradient.
        """
        if self.scaler is None or not gradients_of(optimizer):
            return False
        self.scaler.step(optimizer)
        self.has_stepped = True
        return True

    def after_steps(self) -> None:
        """Set the scale of the next batch; gradients that wait in other windows follow it."""
        if not self.has_stepped:
            return
        self.has_stepped = False
        waiting = set()
        for optimizer in self.stepper.optimizers.values():
            waiting.update(gradients_of(optimizer))
        before = {gradient: self.scaler.scale(gradient.new_ones(())) for gradient in waiting}
        self.scaler.update()
        for gradient, scale in before.items():
            gradient.mul_(self.scaler.scale(gradient.new_ones(())) / scale)  # a power of 2

    def settings(self) -> dict[str, Any]:
        """Return the dtype's name."""
        return {"precision": str(self.dtype).removeprefix("torch.")}

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale."""
        return {"scaler": None if self.scaler is None else self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the loss scale of a checkpoint."""
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])

    def way_back(self) -> Restore:
        """Return a function that restores the current scale."""
        scale = None if self.scaler is None else self.scaler.state_dict()

        def restore() -> None:
            if self.scaler is not None:
                self.scaler.load_state_dict(scale or {})

        return restore


def dtype_of(
    precision: str, device: torch.device, optimizers: Iterable[Optimizer]
) -> torch.dtype | None:
    """Return the dtype that compile(precision=...) asks for, None for float32.

    Raises:
        ValueError: another word, or the device lacks the dtype, or the parameters are narrower.
    """
    check_one_of("precision", precision, (*DTYPES, "auto"))
    dtype = best_dtype(device) if precision == "auto" else DTYPES[precision]
    if dtype is not None:
        check_dtype(device, dtype, precision, optimizers)
    return dtype


def best_dtype(device: torch.device) -> torch.dtype | None:
    """Return bfloat16 if CUDA has it, else float16 on CUDA; elsewhere None, float32 alone."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16


def check_dtype(
    device: torch.device, dtype: torch.dtype, precision: str, optimizers: Iterable[Optimizer]
) -> None:
    """Check that the device has a dtype, and that the parameters are wider than it.

    Raises:
        ValueError: the device lacks it, or the parameters are not.
    """
    try:
        if not torch.amp.is_autocast_available(device.type):
            raise RuntimeError("torch has no autocast there")
        torch.autocast(device.type, dtype)
    except RuntimeError as error:
        raise ValueError(
            f"precision={precision!r} is not supported on {device}: {error}. Pass "
            'precision="auto", or omit it.'
        ) from error
    for optimizer in optimizers:
        for parameter in optimizer_parameters(optimizer):
            if widen(parameter) is not parameter:
                raise ValueError(
                    f"precision={precision!r} needs parameters in float32, which it casts within "
                    f"the step, but they are {dtype_name(parameter)}. Call model.float() before "
                    "you create the optimizer."
                )
