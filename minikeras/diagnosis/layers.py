"""What happens in each layer: what it returns, its gradient, and its update in one step.

take_step       one training step of a copy, on the first batch of dl_train
watch_layers    what each layer returns for the first rows of dl_train, in eval mode
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from minikeras.diagnosis.evidence import Evidence


@dataclass
class ParameterStep:
    """What one step did to a parameter."""

    name: str  # dotted, as in model.named_parameters(); those of the loss begin with loss_func.
    weight_norm: float  # before the step
    gradient_norm: float | None  # None if the loss does not use the parameter
    update_norm: float  # of the change that the optimizer made
    is_finite: bool  # the gradient has neither NaN nor infinity


@dataclass
class Step:
    """One training step of a copy."""

    loss: float
    parameters: list[ParameterStep]  # those that are trained


@dataclass
class LayerStatistics:
    """What a layer without layers inside returns, over the rows that were looked at."""

    name: str  # dotted, as in model.named_modules()
    type: str  # its class
    outputs: Tensor  # (rows, units): a value for each element of a row's output, flattened


def take_step(evidence: Evidence) -> Step:
    """Take one training step of a copy on the first batch."""
    raise NotImplementedError


def watch_layers(evidence: Evidence) -> list[LayerStatistics]:
    """Call the model with the first rows and keep what each layer returns."""
    raise NotImplementedError
