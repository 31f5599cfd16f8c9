"""`Finding`, one line of a diagnosis, and `Diagnosis`, the table of them."""

from __future__ import annotations

import html
import shutil
import textwrap
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

from minikeras.diagnosis.figure import Curves, draw
from minikeras.errors import check_one_of
from minikeras.support.shown import Shown, is_on_terminal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = ("error", "warning", "note")  # the worst first
HEADINGS = {
    "error": "Errors: the network cannot learn like this",
    "warning": "Warnings: it learns badly, or its numbers mislead",
    "note": "Notes: nothing is wrong, but worth knowing",
}
WIDTH = 80  # columns if stdout is no terminal
NARROWEST = 40  # columns; a narrower terminal wraps the lines itself
WIDEST = 100  # longer lines are hard to read
# In HTML each level has a sign besides its color, which is of Okabe and Ito's palette: it can be
# told apart by colour-blind people, and seen on a light page and on a dark one.
COLORS = {"error": "#D55E00", "warning": "#E69F00", "note": "#0072B2"}
STYLE = "font-family: sans-serif; font-size: 13px"
CELL = "text-align: left; vertical-align: top; padding: 3px 8px; white-space: pre-wrap"


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    Args:
        level: "error": the network cannot learn like this; "warning": it learns badly, or its
            numbers mislead; "note": nothing is wrong, but worth knowing.
        looked_at: what was looked at, such as 'feature "income"' or "layer net.2 (ReLU)".
        found: the number that was found, in words: "NaN in 12 of 2,000 rows".
        usual: what is usual: "no NaN".
        remedy: what to do, in a sentence or two. A line that begins with a blank is code.
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
class Diagnosis(Shown):
    """What `diagnose` found, the worst first.

    `diagnose` has shown it already, so the same cell of a notebook or the same statement at a
    prompt does not show it again.

    Args:
        model: the name of the model's class.
        findings: one for each fault or note.
        steps: as for `diagnose`.
        seconds: how long it took.
        rows: the number of rows that were looked at, by the name of the argument.
        curves: the numbers of the figure.

    >>> finding = Finding("warning", 'feature "age"', "always 7", "it varies", "Leave it out.")
    >>> Diagnosis("Net", [finding], steps=100, seconds=1.5, rows={"dl_train": 2000})
    Diagnosis of Net: 1 warning
    <BLANKLINE>
    Warnings: it learns badly, or its numbers mislead
    <BLANKLINE>
    1. feature "age": always 7 (usual: it varies)
       Leave it out.
    <BLANKLINE>
    Looked at 2,000 rows of dl_train; steps=100; 1.5 s.
    """

    model: str
    findings: list[Finding]
    steps: int
    seconds: float
    rows: dict[str, int] = field(default_factory=dict)
    curves: Curves = field(default_factory=Curves)

    @property
    def warnings(self) -> list[Finding]:
        """The findings that are errors or warnings."""
        return [finding for finding in self.findings if finding.level != "note"]

    def to_dataframe(self) -> pd.DataFrame:
        """Return a DataFrame with one row per finding and the fields of `Finding` as columns."""
        names = list(Finding.__dataclass_fields__)
        return pd.DataFrame([asdict(finding) for finding in self.findings], columns=names)

    def plot(self) -> Figure:
        """Draw what the copies of the model did in training, as one figure of four panels.

        The learning-rate curve; the loss on one small batch; the gradient and the update of one
        step relative to the weights, by layer; and the dead units, by layer. A panel that was not
        measured says so.

        Returns:
            matplotlib's Figure. Nothing is shown or saved: call plt.show() or figure.savefig(...);
            a notebook shows the figure by itself.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.

        >>> diagnosis = Diagnosis("Net", [], steps=100, seconds=1.5)
        >>> [axis.get_title() for axis in diagnosis.plot().axes][:2]
        ['learning rate', 'one small batch']
        """
        return draw(self.curves, f"Diagnosis of {self.model}")

    def __str__(self) -> str:
        width = shutil.get_terminal_size().columns if is_on_terminal() else WIDTH
        return self.text(min(max(width, NARROWEST), WIDEST))

    def text(self, width: int) -> str:
        """Return the table as plain text, in lines of at most `width` columns."""
        blocks = [textwrap.fill(self.title(), width)]
        margin = len(f"{len(self.findings)}. ")
        level = ""
        for number, finding in enumerate(self.findings, start=1):
            if finding.level != level:
                level = finding.level
                blocks.append(textwrap.fill(HEADINGS[level], width))
            label = f"{number}. ".rjust(margin)
            first = wrap(f"{label}{headline(finding)}", width, margin)
            blocks.append("\n".join([*first, *remedy_lines(finding.remedy, width, margin)]))
        if not self.findings:
            blocks.append(textwrap.fill(self.nothing(), width))
        blocks.append(textwrap.fill(self.ending(), width))
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        parts = [f"<div><b>{html.escape(self.title())}</b></div>"]
        if self.findings:
            head = ["", "level", "looked at", "found", "usual", "what to do"]
            cells = "".join(f'<th style="{CELL}">{name}</th>' for name in head)
            rows = [f"<tr>{cells}</tr>"]
            rows += [
                row_html(number, finding) for number, finding in enumerate(self.findings, start=1)
            ]
            table = "".join(rows)
            parts.append(f'<table style="border-collapse: collapse">{table}</table>')
        else:
            parts.append(f"<div>{html.escape(self.nothing())}</div>")
        parts.append(f"<div>{html.escape(self.ending())}</div>")
        return f'<div style="{STYLE}">{"".join(parts)}</div>'

    def title(self) -> str:
        """Return the first line: of which model, and how many findings of each level."""
        counts = []
        for level in LEVELS:
            count = sum(finding.level == level for finding in self.findings)
            if count:
                counts.append(f"{count} {level}{'' if count == 1 else 's'}")
        return f"Diagnosis of {self.model}: {', '.join(counts) or 'nothing found'}"

    def nothing(self) -> str:
        """Return what is said if nothing was found."""
        return (
            "Nothing wrong was found in the data, the network, its training or its history. That "
            "does not prove that the model is right: what it learns shows on data that it has not "
            "seen."
        )

    def ending(self) -> str:
        """Return the last line: what was looked at, and how long it took."""
        rows = [f"{count:,} rows of {name}" for name, count in self.rows.items()]
        looked_at = " and ".join(rows) or "the model"
        return f"Looked at {looked_at}; steps={self.steps}; {self.seconds:.1f} s."


def headline(finding: Finding) -> str:
    """Return what was looked at, what was found and what is usual, in one line.

    >>> headline(Finding("note", "the labels", "3 classes", "", "Nothing to do."))
    'the labels: 3 classes'
    """
    line = f"{finding.looked_at}: {finding.found}"
    if finding.usual:
        line += f" (usual: {finding.usual})"
    return line


def wrap(line: str, width: int, margin: int) -> list[str]:
    """Wrap a line between words; further lines begin with `margin` blanks.

    A name is never broken, so that code can be copied: a longer one goes beyond the width.
    """
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=" " * margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def remedy_lines(remedy: str, width: int, margin: int) -> list[str]:
    """Return the lines of a remedy. Those that begin with a blank are code, kept as they are."""
    lines = []
    for line in remedy.splitlines():
        if line.startswith(" ") or not line.strip():
            lines.append((" " * margin + line).rstrip())
        else:
            lines += wrap(" " * margin + line, width, margin)
    return lines


def row_html(number: int, finding: Finding) -> str:
    """Return a finding as a row of the HTML table."""
    # the text has the page's own color, since no other can be read on light and on dark
    mark = f'<span style="color: {COLORS[finding.level]}">&#9679;</span> {finding.level}'
    texts = [finding.looked_at, finding.found, finding.usual, finding.remedy]
    cells = [str(number), mark, *map(html.escape, texts)]
    return "<tr>" + "".join(f'<td style="{CELL}">{cell}</td>' for cell in cells) + "</tr>"
