"""Checks of the time that a step waits for the data."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_loading_time(evidence: Evidence) -> Iterator[Finding]:
    """Find a loader that is slower than the network."""
    yield from ()
