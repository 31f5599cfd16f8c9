"""Checks of the features: missing values, constant columns, scales."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_missing_features(evidence: Evidence) -> Iterator[Finding]:
    """Find NaN and infinite features."""
    yield from ()


def check_constant_features(evidence: Evidence) -> Iterator[Finding]:
    """Find columns and channels that have one value."""
    yield from ()


def check_feature_scales(evidence: Evidence) -> Iterator[Finding]:
    """Find features far from unit scale, or far from each other; images of 0 to 255."""
    yield from ()
