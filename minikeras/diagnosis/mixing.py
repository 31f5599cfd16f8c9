"""Checks that the rows of a batch do not see each other."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding


def check_rows_are_separate(evidence: Evidence) -> Iterator[Finding]:
    """Find outputs of a row that depend on the input of another row."""
    yield from ()
