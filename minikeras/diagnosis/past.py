"""Checks of the history of earlier fits."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_history(evidence: Evidence) -> Iterator[Finding]:
    """Find a fit that diverged, was cut short, overfits, or stands at the majority class."""
    yield from ()
