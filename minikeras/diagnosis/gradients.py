"""Checks of the gradients and updates of one training step, by layer."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_gradients(evidence: Evidence) -> Iterator[Finding]:
    """Find gradients that are NaN, zero, vanishing or exploding."""
    yield from ()


def check_updates(evidence: Evidence) -> Iterator[Finding]:
    """Find updates of the optimizer far from a thousandth of the weights."""
    yield from ()
