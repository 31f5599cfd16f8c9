"""What a person sees while it trains: on a terminal a bar per epoch that gives way to one row of a growing table.

on a terminal        the bar, refreshed by time, and every log_step_freq steps at the latest
in a pipe or file    the rows, and a line every log_step_freq steps; no control characters
in a notebook        what notebook.py makes of it
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
from minikeras.columns import column_order, is_rate
from minikeras.report.layer_summary import notebook_cell

REFRESH = 0.1  # seconds between two refreshes of the bar
KNOWN_LENGTH = "{desc} |{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
UNKNOWN_LENGTH = "{desc} {n_fmt} [{elapsed}]{postfix}"
SHARE = 0.01  # of the time may go into refreshing it


def show(verbose: str | int) -> bool:
    """Whether to show anything, and there is where to; a `verbose` that means nothing is refused."""
    if verbose not in ("auto", 0, 1, 2):
        raise ValueError(
            f'verbose must be "auto", 0 (nothing), 1 (bar) or 2 (lines), got {verbose!r}.'
        )
    return verbose != 0 and sys.stdout is not None  # it is None under pythonw


def wants_bar(verbose: str | int) -> bool:
    """Whether to draw a bar: 1 asks for it, 2 for lines only, "auto" takes the bar on a terminal or in a notebook."""
    on_terminal = getattr(
        sys.stdout, "isatty", lambda: False
    )  # an object of the user's may have none
    return bool(
        verbose == 1 or (verbose == "auto" and (on_terminal() or notebook_cell() is not None))
    )


def say_nothing(line: str) -> None:
    """Drop a line that a fit has for the user: nothing is shown."""


class Progress(Callback):
    """The bar and the table of one fit.

    Args:
        bar: draw the bar; else print lines only.
        epochs: number of the last epoch of this fit.
        steps: batches an epoch, None where not known ahead.
        log_step_freq: steps between two lines, or refreshes of the bar at the latest.
        validates: there will be val_ columns, though not in each row.
        best: the lowest val_loss of earlier fits, so that the mark goes on.
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
        self.draws = bar
        self.validates = validates
        self.best = best
        self.bar: tqdm[Any] | None = None
        self.columns: list[str] = []  # of the table
        self.epoch: int | None = None
        self.next_refresh = 0.0  # by the clock, also over epochs shorter than REFRESH

    def say(self, line: str) -> None:
        """Print a line, such as where a fit resumes; above the bar if there is one."""
        tqdm.write(line, file=sys.stdout)

    def on_epoch_begin(self, epoch: int) -> None:
        self.epoch = epoch
        label = f"epoch {epoch}/{self.epochs}"
        if self.draws and self.bar is None:
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
            self.bar.n, self.bar.start_t = 0, time.time()

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        logged = self.log_step_freq is not None and batch % self.log_step_freq == 0
        if self.bar is not None:
            now = time.perf_counter()
            if now >= self.next_refresh or logged:
                self._refresh(self.bar, batch, logs)
                spent = time.perf_counter() - now
                self.next_refresh = now + max(REFRESH, spent / SHARE)
        elif logged:
            print(f"epoch {self.epoch}  step {batch}  {shown(logs)}", flush=True)

    def _refresh(self, bar: tqdm[Any], batch: int, logs: Mapping[str, float]) -> None:
        bar.n, bar.postfix = batch, None
        columns = bar.format_dict["ncols"]  # None where it is not a terminal
        bar.set_postfix_str(
            shown(logs, math.inf if columns is None else columns - len(str(bar)) - 2), refresh=False
        )
        bar.refresh()

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if self.bar is not None:
            self.bar.clear()
        if self.arrange(logs):
            print(self._head())
        better = logs.get("val_loss", math.nan) < self.best
        self.best = logs["val_loss"] if better else self.best
        cells = [str(epoch)]
        for name in self.columns:
            cells.append(f"{logs[name]:#.4g}" if name in logs else "")
            if name == "val_loss":  # the mark of the best one so far has a narrow column of its own
                cells.append("*" if better else "")
        print("  ".join(map(str.rjust, cells, self.widths)).rstrip(), flush=True)

    def arrange(self, logs: Mapping[str, float]) -> bool:
        """Bring the columns up to date; True where a name is new."""
        names = list(logs)
        if self.validates and not any(name.startswith("val_") for name in names):
            names += [f"val_{name}" for name in names if not is_rate(name)]
        if set(names) <= set(self.columns):
            return False
        self.columns = column_order(
            dict.fromkeys([*self.columns, *names])
        )  # one that is not there now may come again
        return True

    def _head(self) -> str:
        """The table's head; its columns are as wide as any number, so that rows line up from epoch to epoch."""
        head, widest = ["epoch"], [""]
        for name in self.columns:
            head += [name, ""] if name == "val_loss" else [name]
            widest += ["1.234e-05", "*"] if name == "val_loss" else ["1.234e-05"]
        # it goes in as a row: as a head it would get two columns of padding, too much for 80 columns
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


def shown(logs: Mapping[str, float], width: float = math.inf) -> str:
    """Running means in one line: as many as fit into it whole, since half a number is another one.

    >>> shown({"loss": 0.25, "accuracy": 0.96875}), shown({"loss": 0.25, "accuracy": 0.96875}, 22)
    ('loss 0.2500  accuracy 0.9688', 'loss 0.2500')
    """
    line = ""
    for name, value in logs.items():
        longer = f"{line}{'  ' * bool(line)}{name} {value:#.4g}"
        if len(longer) > width:
            break
        line = longer
    return line
