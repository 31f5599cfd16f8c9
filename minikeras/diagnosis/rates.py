"""Checks of the optimizer's learning rate."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_learning_rate(evidence: Evidence) -> Iterator[Finding]:
    """Compare the optimizer's learning rate with that of the range test."""
    yield from ()
