"""The learning-rate range test (Smith 2017): raise the rate step by step, and watch the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minikeras.model import Model


@dataclass(frozen=True, repr=False)
class LearningRates:
    """The curve of a learning-rate range test."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None  # where the smoothed loss falls most steeply
    diverges_at: float | None  # None if it never does


def lr_find(
    model: Model,
    dl_train: Any,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    steps: int = 100,
    batch_size: int | None = None,
) -> LearningRates:
    """Find a learning rate; see `Model.lr_find`."""
    raise NotImplementedError


def find_learning_rates(
    twin: Model,
    dl_train: Any,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    steps: int = 100,
    batch_size: int | None = None,
) -> LearningRates:
    """Raise the learning rate of a copy from min_lr to max_lr, training on dl_train."""
    raise NotImplementedError
