"""Checks of the loss at the start, against that of the best constant answer."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_first_loss(evidence: Evidence) -> Iterator[Finding]:
    """Compare the first loss with that of the best constant answer."""
    yield from ()
