"""Checks whether the network can memorize one small batch."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_memorized(evidence: Evidence) -> Iterator[Finding]:
    """Find a network that cannot memorize one small batch."""
    yield from ()
