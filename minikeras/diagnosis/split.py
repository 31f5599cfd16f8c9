"""Checks of dl_train against dl_val: the same rows in both, and what differs."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_leaks(evidence: Evidence) -> Iterator[Finding]:
    """Find rows that are in dl_train and in dl_val."""
    yield from ()


def check_split(evidence: Evidence) -> Iterator[Finding]:
    """Find classes and scales that differ between dl_train and dl_val."""
    yield from ()
