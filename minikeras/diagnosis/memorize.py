"""Train a copy on one small batch: a network that can learn can memorize it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minikeras.diagnosis.evidence import Evidence


@dataclass
class Memorized:
    """The losses of the training on one small batch."""

    rows: int
    losses: list[float] = field(default_factory=list)  # one for each step, user's optimizer


def memorize(evidence: Evidence) -> Memorized:
    """Train a copy on the first rows of dl_train, `evidence.steps` steps."""
    raise NotImplementedError
