"""Checks of the parameters: frozen, unused, in which optimizer, symmetric."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_frozen(evidence: Evidence) -> Iterator[Finding]:
    """Find frozen parameters."""
    yield from ()


def check_optimizers(evidence: Evidence) -> Iterator[Finding]:
    """Find parameters that are in no optimizer, or in two."""
    yield from ()


def check_unused(evidence: Evidence) -> Iterator[Finding]:
    """Find parameters that the loss does not use."""
    yield from ()


def check_symmetry(evidence: Evidence) -> Iterator[Finding]:
    """Find layers whose units all begin with the same weights."""
    yield from ()
