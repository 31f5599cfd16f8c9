"""Checks of the order of the training rows."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_order(evidence: Evidence) -> Iterator[Finding]:
    """Find batches of one class, or labels that are sorted."""
    yield from ()
