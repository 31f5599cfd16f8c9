"""What a fit prints: on a terminal a bar for each epoch, which is replaced by a row of a table.

on a terminal        the bar, refreshed by time and at least every log_step_freq steps
in a pipe or file    the rows, and a line every log_step_freq steps; no control characters
in a notebook        see notebook.py
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from minikeras.callback import Callback
from minikeras.columns import is_rate, sort_columns
from minikeras.report.layer_summary import notebook_cell

REFRESH = 0.1  # seconds between two refreshes of the bar
KNOWN_LENGTH = "{desc} |{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
UNKNOWN_LENGTH = "{desc} {n_fmt} [{elapsed}]{postfix}"
SHARE = 0.01  # of the time, at most, is spent on refreshing the bar
NUMBER_WIDTH = "1.234e-05"  # the widest number in the table


def wants_bar(verbose: str | int) -> bool:
    """Tell whether to draw a bar.

    1 asks for a bar and 2 for lines; "auto" draws a bar on a terminal and in a notebook.
    """
    if verbose != "auto":
        return verbose == 1
    isatty = getattr(sys.stdout, "isatty", None)  # a custom stdout may have none
    on_terminal = isatty is not None and isatty()
    return bool(on_terminal or notebook_cell() is not None)


class Progress(Callback):
    """The bar and the table of one fit.

    Args:
        bar: draw the bar; otherwise print lines only.
        epochs: number of the last epoch of this fit.
        steps: batches per epoch, None if not known in advance.
        log_step_freq: print a line every this many steps; with a bar, refresh it at least this
            often.
        validates: there will be val_ columns, though not in every row.
        best: the lowest val_loss of earlier fits, so that only lower values are marked.
    """

    def __init__(
        self,
        bar: bool,
        epochs: int,
        steps: int | None,
        log_step_freq: int | None,
        validates: bool,
        best: float,
    ) -> None:
        self.epochs = epochs
        self.steps = steps
        self.log_step_freq = log_step_freq
        self.draws_bar = bar
        self.validates = validates
        self.best = best
        self.bar: tqdm[Any] | None = None
        self.columns: list[str] = []  # of the table
        self.epoch: int | None = None
        self.next_refresh = 0.0  # a time; it also spans epochs that are shorter than REFRESH

    def say(self, line: str) -> None:
        """Print a line, such as where a fit resumes; above the bar if there is one."""
        tqdm.write(line, file=sys.stdout)

    def on_epoch_begin(self, epoch: int) -> None:
        self.epoch = epoch
        label = f"epoch {epoch}/{self.epochs}"
        if self.draws_bar and self.bar is None:
            self.bar = tqdm(
                total=self.steps,
                desc=label,
                bar_format=KNOWN_LENGTH if self.steps else UNKNOWN_LENGTH,
                leave=False,
                file=sys.stdout,
                dynamic_ncols=True,
            )
        elif self.bar is not None:
            self.bar.desc = label
            self.bar.postfix = None
            self.bar.n = 0
            self.bar.start_t = time.time()

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        is_logged = self.log_step_freq is not None and batch % self.log_step_freq == 0
        if self.bar is not None:
            now = time.perf_counter()
            if now >= self.next_refresh or is_logged:
                self._refresh(self.bar, batch, logs)
                spent = time.perf_counter() - now
                self.next_refresh = now + max(REFRESH, spent / SHARE)
        elif is_logged:
            print(f"epoch {self.epoch}  step {batch}  {format_logs(logs)}", flush=True)

    def _refresh(self, bar: tqdm[Any], batch: int, logs: Mapping[str, float]) -> None:
        bar.n = batch
        bar.postfix = None
        terminal_width = bar.format_dict["ncols"]  # None if stdout is not a terminal
        width = math.inf
        if terminal_width is not None:
            width = terminal_width - len(str(bar)) - 2
        bar.set_postfix_str(format_logs(logs, width), refresh=False)
        bar.refresh()

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if self.bar is not None:
            self.bar.clear()
        if self.add_columns(logs):
            print(self._head())
        is_best = logs.get("val_loss", math.nan) < self.best
        if is_best:
            self.best = logs["val_loss"]
        cells = [str(epoch)]
        for name in self.columns:
            cells.append(f"{logs[name]:#.4g}" if name in logs else "")
            if name == "val_loss":  # a narrow column marks the best value so far
                cells.append("*" if is_best else "")
        print("  ".join(map(str.rjust, cells, self.widths)).rstrip(), flush=True)

    def add_columns(self, logs: Mapping[str, float]) -> bool:
        """Add a column for each new name in the logs; tell whether there was one."""
        names = list(logs)
        if self.validates and not any(name.startswith("val_") for name in names):
            names += [f"val_{name}" for name in names if not is_rate(name)]
        if set(names) <= set(self.columns):
            return False
        # a column that these logs lack may be needed again
        self.columns = sort_columns(dict.fromkeys([*self.columns, *names]))
        return True

    def _head(self) -> str:
        """Return the head of the table, and set the widths of its columns.

        Every column fits any number, so that the rows of all epochs line up.
        """
        head = ["epoch"]
        widest = [""]
        for name in self.columns:
            head.append(name)
            widest.append(NUMBER_WIDTH)
            if name == "val_loss":
                head.append("")
                widest.append("*")
        # as a row, not as headers: tabulate pads headers by two, too much for 80 columns
        lines = tabulate(
            [head, widest], tablefmt="simple", disable_numparse=True, stralign="right"
        ).splitlines()
        self.widths = [len(dashes) for dashes in lines[0].split()]
        return f"{lines[1]}\n{lines[0]}"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def on_fit_end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def format_logs(logs: Mapping[str, float], width: float = math.inf) -> str:
    """Format running means as one line, with as many as fit into the width.

    A number is never cut, since half of it would read as another number.

    >>> format_logs({"loss": 0.25, "accuracy": 0.96875})
    'loss 0.2500  accuracy 0.9688'
    >>> format_logs({"loss": 0.25, "accuracy": 0.96875}, 22)
    'loss 0.2500'
    """
    line = ""
    for name, value in logs.items():
        longer = f"{name} {value:#.4g}"
        if line:
            longer = f"{line}  {longer}"
        if len(longer) > width:
            break
        line = longer
    return line
