"""Checks of what the layers return."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_dead_units(evidence: Evidence) -> Iterator[Finding]:
    """Find ReLU units that never fire."""
    yield from ()


def check_saturated_units(evidence: Evidence) -> Iterator[Finding]:
    """Find tanh and sigmoid layers that are saturated."""
    yield from ()


def check_activation_growth(evidence: Evidence) -> Iterator[Finding]:
    """Find activations whose scale explodes or vanishes through depth."""
    yield from ()
