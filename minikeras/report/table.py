"""The printed table of a fit: which columns there are, and how a row is written.

In a pipe or file the table may have any width. On a terminal the first of these that fits is used,
so that no row wraps:

1  all columns, numbers of up to 9 characters
2  numbers of up to 7 characters
3  two lines for each epoch, training above validation
4  long names shortened in the middle
5  the last columns left out; a line names them
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from minikeras.support.shown import is_on_terminal

WIDE = 9  # characters of a number: 1.234e-05
NARROW = 7  # 1.2e-05
EPOCH_WIDTH = 5
LABEL_WIDTH = 5  # of train and val, if there are two lines for each epoch
TIME_WIDTH = 6  # 59.9 s
LONG_TIME_WIDTH = 11  # 59 min 59 s
GAP = "  "


def terminal_width() -> int | None:
    """Return the columns of the terminal to which stdout goes; None if it is none."""
    return shutil.get_terminal_size().columns if is_on_terminal() else None


@dataclass(frozen=True)
class Layout:
    """The columns of a table, and their widths.

    Args:
        names: the columns, without val_ if the table is stacked.
        left_out: the columns for which there is no space.
        is_stacked: each epoch has a line for training and one for validation.
        number_width: characters of a number.
        name_width: characters of a name, None for any.
        time_width: characters of the time.
    """

    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    is_stacked: bool = False
    number_width: int = WIDE
    name_width: int | None = None
    time_width: int = TIME_WIDTH

    def columns(self) -> list[tuple[str, int]]:
        """Return the head and the width of each column."""
        columns = [("epoch", EPOCH_WIDTH)]
        if self.is_stacked:
            columns.append(("", LABEL_WIDTH))
        for name in self.names:
            head = shorten_name(name, self.name_width)
            columns.append((head, max(len(head), self.number_width)))
            if self._has_mark(name):
                columns.append(("", 1))
        columns.append(("time", self.time_width))
        return columns

    def width(self) -> int:
        """Return the characters of a line."""
        widths = [width for _, width in self.columns()]
        return sum(widths) + len(GAP) * (len(widths) - 1)

    def head(self, width: int | None = None) -> str:
        """Return the head of the table, and which columns it lacks, in lines of `width`."""
        head = []
        dashes = []
        for name, column_width in self.columns():
            head.append(name.rjust(column_width))
            dashes.append("-" * column_width)
        lines = [GAP.join(head), GAP.join(dashes)]
        if self.left_out:
            note = f"no space for {', '.join(self.left_out)}; the history has them"
            lines = [*textwrap.wrap(note, width or 100, break_long_words=False), *lines]
        return "\n".join(lines)

    def rows(self, epoch: int, logs: Mapping[str, float], time: str, is_best: bool) -> str:
        """Return the lines of an epoch.

        Args:
            time: what the epoch took.
            is_best: mark the validation loss.
        """
        if not self.is_stacked:
            return self._line([str(epoch), *self._numbers(logs, "", is_best), time])
        training = self._numbers(logs, "", False)
        lines = [self._line([str(epoch), "train", *training, time])]
        validation = self._numbers(logs, "val_", is_best)
        if any(validation):
            lines.append(self._line(["", "val".ljust(LABEL_WIDTH), *validation, ""]))
        return "\n".join(lines)

    def _numbers(self, logs: Mapping[str, float], prefix: str, is_best: bool) -> list[str]:
        cells = []
        for name in self.names:
            column = prefix + name
            cells.append(format_number(logs[column], self.number_width) if column in logs else "")
            if self._has_mark(name):
                cells.append("*" if is_best else "")
        return cells

    def _has_mark(self, name: str) -> bool:
        """Tell whether a narrow column after this one marks the best validation loss."""
        return name == ("loss" if self.is_stacked else "val_loss")

    def _line(self, cells: Sequence[str]) -> str:
        aligned = []
        for cell, (_, width) in zip(cells, self.columns(), strict=True):
            aligned.append(cell.rjust(width))
        return GAP.join(aligned).rstrip()


def choose_layout(columns: Sequence[str], width: int | None, time_width: int) -> Layout:
    """Choose the first layout that fits into the width; None is any width.

    >>> names = ["loss", "accuracy", "recall", "val_loss", "val_accuracy", "val_recall"]
    >>> print(choose_layout(names, 80, TIME_WIDTH).head())
    epoch              loss      accuracy     recall    time
    -----  -----  ---------  -  ---------  ---------  ------
    """
    widest = Layout(tuple(columns), time_width=time_width)
    if width is None:
        return widest
    for layout in _layouts(widest):
        # a line that fills the last column too would wrap on some terminals
        if layout.width() < width:
            break
    return layout


def _layouts(layout: Layout) -> Iterator[Layout]:
    """Yield the layouts from the widest to the narrowest."""
    yield layout
    yield replace(layout, number_width=NARROW)
    if any(name.startswith("val_") for name in layout.names):
        names = dict.fromkeys(name.removeprefix("val_") for name in layout.names)
        layout = replace(layout, names=tuple(names), is_stacked=True)
        yield layout
    layout = replace(layout, number_width=NARROW)
    yield layout
    for name_width in range(max(map(len, layout.names), default=0) - 1, NARROW - 1, -1):
        layout = replace(layout, name_width=name_width)
        yield layout
    names_of_all = layout.names
    for shown in range(len(names_of_all) - 1, 0, -1):
        yield replace(layout, names=names_of_all[:shown], left_out=names_of_all[shown:])


def shorten_name(name: str, width: int | None) -> str:
    """Shorten a name in the middle, since names often begin alike or end alike.

    >>> shorten_name("sensitivity", 7), shorten_name("recall", 7)
    ('sen~ity', 'recall')
    """
    if width is None or len(name) <= width:
        return name
    kept = width - 1
    end = kept // 2
    return f"{name[: kept - end]}~{name[len(name) - end :]}"


def format_number(value: float, width: int) -> str:
    """Format a number with 4 digits, or with as many as fit into the width.

    >>> format_number(0.25, NARROW), format_number(1.234e-5, WIDE), format_number(1.234e-5, NARROW)
    ('0.2500', '1.234e-05', '1.2e-05')
    """
    text = f"{value:#.4g}"
    for digits in (3, 2, 1):
        if len(text) <= width:
            break
        text = f"{value:#.{digits}g}"
    return text
