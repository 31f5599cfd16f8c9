"""Checks of train mode against eval mode: BatchNorm and dropout."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_batch_norm(evidence: Evidence) -> Iterator[Finding]:
    """Find BatchNorm with tiny batches, or whose running statistics do not settle."""
    yield from ()


def check_dropout(evidence: Evidence) -> Iterator[Finding]:
    """Find dropout that takes nearly everything."""
    yield from ()
