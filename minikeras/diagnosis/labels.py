"""Checks of the labels: missing values, classes and their shares, the scale of targets."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_missing_labels(evidence: Evidence) -> Iterator[Finding]:
    """Find NaN and infinite labels."""
    yield from ()


def check_class_range(evidence: Evidence) -> Iterator[Finding]:
    """Find classes that the outputs do not have."""
    yield from ()


def check_class_shares(evidence: Evidence) -> Iterator[Finding]:
    """Find classes that never come, and one that is nearly all there is."""
    yield from ()


def check_target_scale(evidence: Evidence) -> Iterator[Finding]:
    """Find regression targets far from unit scale."""
    yield from ()
