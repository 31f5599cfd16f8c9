"""`Finding`, one line of a diagnosis, and `Diagnosis`, the table of them."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from tabulate import tabulate

from minikeras.errors import check_one_of

LEVELS = ("error", "warning", "note")  # the worst first
WIDTH = 80  # columns of a terminal


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    Args:
        level: "error": the network cannot learn like this; "warning": it learns badly, or its
            numbers mislead; "note": nothing is wrong, but worth knowing.
        looked_at: what was looked at, such as 'feature "income"' or "layer net.2 (ReLU)".
        found: the number that was found, in words: "NaN in 12 of 2,000 rows".
        usual: what is usual: "no NaN".
        remedy: what to do, in a sentence or two.
        is_symptom: it follows from something else, which is listed first if it was found: a loss
            that does not fall, and not the column that keeps it from falling.
        check: the name of the check; set by `diagnose`.

    Raises:
        ValueError: another level.

    >>> Finding("note", "the labels", "3 classes", "2 or more", "Nothing to do.").found
    '3 classes'
    """

    level: str
    looked_at: str
    found: str
    usual: str
    remedy: str
    is_symptom: bool = False
    check: str = ""

    def __post_init__(self) -> None:
        check_one_of("level", self.level, LEVELS)


def rank(finding: Finding) -> tuple[int, bool]:
    """Return the key by which findings are sorted: the worst first, causes before symptoms."""
    return LEVELS.index(finding.level), finding.is_symptom


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What `diagnose` found: a table, the worst first.

    Args:
        model: the name of the model's class.
        findings: one for each line.
        steps: as for `diagnose`.
        seconds: how long it took.
    """

    model: str
    findings: list[Finding]
    steps: int
    seconds: float

    @property
    def warnings(self) -> list[Finding]:
        """The findings that are errors or warnings."""
        return [finding for finding in self.findings if finding.level != "note"]

    def to_dataframe(self) -> pd.DataFrame:
        """Return a DataFrame with one row per finding and the fields of `Finding` as columns."""
        names = list(Finding.__dataclass_fields__)
        return pd.DataFrame([vars(finding) for finding in self.findings], columns=names)

    def __str__(self) -> str:
        rows = []
        for finding in self.findings:
            rows.append(
                [finding.level, finding.looked_at, finding.found, finding.usual, finding.remedy]
            )
        head = ["level", "looked at", "found", "usual", "what to do"]
        return tabulate(rows, head, disable_numparse=True, maxcolwidths=[8, 16, 16, 10, 28])

    def __repr__(self) -> str:
        return str(self)
