"""Checks of the outputs: whether they differ, saturate, or fit the loss."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_outputs_differ(evidence: Evidence) -> Iterator[Finding]:
    """Find outputs that are the same for all rows."""
    yield from ()


def check_saturated_outputs(evidence: Evidence) -> Iterator[Finding]:
    """Find probabilities that are all near 0 or 1."""
    yield from ()


def check_activation_before_loss(evidence: Evidence) -> Iterator[Finding]:
    """Find a softmax or sigmoid before a loss that applies it, or none where it is needed."""
    yield from ()
