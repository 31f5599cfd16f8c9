"""What a fit prints: on a terminal a bar for each epoch, which is replaced by a row of a table.

on a terminal        the bar, refreshed by time and at least every log_step_freq steps
in a pipe or file    the rows, and a line every log_step_freq steps; no control characters
in a notebook        see notebook.py
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from minikeras.callback import Callback
from minikeras.columns import is_rate, sort_columns
from minikeras.report.table import (
    LONG_TIME_WIDTH,
    TIME_WIDTH,
    Layout,
    choose_layout,
    terminal_width,
)
from minikeras.support.shown import is_on_terminal, notebook_cell

if TYPE_CHECKING:
    import pandas as pd

REFRESH = 0.1  # seconds between two refreshes of the bar
KNOWN_LENGTH = "{desc} |{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}"
UNKNOWN_LENGTH = "{desc} {n_fmt} [{elapsed}"
SHARE = 0.01  # of the time, at most, is spent on refreshing the bar
LONG_EPOCH = 30  # seconds; after a first epoch as long as this the time gets a wider column
RECENT = 50  # epochs from which the time left is estimated


def wants_bar(verbose: str | int) -> bool:
    """Tell whether to draw a bar.

    1 asks for a bar and 2 for lines; "auto" draws a bar on a terminal and in a notebook.
    """
    if verbose != "auto":
        return verbose == 1
    return is_on_terminal() or notebook_cell() is not None


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
        self.layout: Layout | None = None  # of the table
        self.time_width = 0  # of the table's last column, 0 before the first row
        self.epoch: int | None = None
        self.batch = 0  # of the epoch
        self.next_refresh = 0.0  # a time; it also spans epochs that are shorter than REFRESH
        self.start_time = time.perf_counter()
        self.epoch_start = self.start_time
        self.seconds: dict[int, float] = {}  # of each epoch of this fit
        self.steps_before = 0  # of the epoch, if an earlier process took them
        self.previous_end = self.start_time  # of an epoch
        self.timed_epochs = 0
        self.recent: deque[float] = deque(maxlen=RECENT)  # seconds from an epoch's end to the next

    def say(self, line: str) -> None:
        """Print a line, such as where a fit resumes; above the bar if there is one."""
        tqdm.write(line, file=sys.stdout)

    def take_history(self, history: pd.DataFrame) -> None:
        """See the history that `fit` is about to return."""

    # --- time -------------------------------------------------------------------------------------

    def start_epoch(self, epoch: int) -> None:
        """Start the clock of an epoch."""
        fit = self.model._compiled("fit").fit
        self.epoch = epoch
        self.steps_before = 0 if fit is None else fit.at.step
        self.batch = self.steps_before
        self.epoch_start = time.perf_counter()
        if not self.seconds:
            self.previous_end = self.epoch_start

    def end_epoch(self, epoch: int, logs: Mapping[str, float]) -> dict[str, float]:
        """Stop the clock of an epoch; return its row of the table, and add the columns it needs."""
        now = time.perf_counter()
        self.seconds[epoch] = now - self.epoch_start
        if not self.steps_before:
            if self.timed_epochs == 1:
                self.recent.clear()  # the first epoch may have compiled the model
            self.recent.append(now - self.previous_end)
            self.timed_epochs += 1
        self.previous_end = now
        row = self._rates() | dict(logs)
        self.add_columns(row)
        return row

    def epoch_left(self) -> float | None:
        """Estimate the seconds that the rest of the epoch's steps take; None if that is unknown."""
        taken = self.batch - self.steps_before
        if not self.steps or taken <= 0:
            return None
        elapsed = time.perf_counter() - self.epoch_start
        return elapsed * (self.steps - self.batch) / taken

    def fit_left(self) -> float | None:
        """Estimate the seconds to the end of the last epoch, with validation and checkpoints.

        None until a whole epoch has been timed.
        """
        if not self.recent or self.epoch is None:
            return None
        mean = sum(self.recent) / len(self.recent)
        elapsed = time.perf_counter() - self.previous_end
        return mean * (self.epochs - self.epoch) + max(mean - elapsed, 0.0)

    def ending(self) -> str:
        """Return how the fit ended and how long it took; "" if it trained nothing."""
        if self.epoch is None:
            return ""
        duration = clock(time.perf_counter() - self.start_time)
        if self.epoch in self.seconds:
            count = len(self.seconds)
            first = self.epoch - count + 1
            if first == 1:
                return f"{count} epoch{'' if count == 1 else 's'} in {duration}"
            if count == 1:
                return f"epoch {first} in {duration}"
            return f"epochs {first} to {self.epoch} in {duration}"
        steps = f"{self.batch}/{self.steps}" if self.steps else str(self.batch)
        return f"ended in epoch {self.epoch} of {self.epochs}, at step {steps}, after {duration}"

    # --- columns ----------------------------------------------------------------------------------

    def _rates(self) -> dict[str, float]:
        """Return the learning rates of the last epoch that the history has as columns."""
        run = self.model._compiled("fit")
        _, rates = run.epochs[-1]
        if not self.columns:  # the first row of this fit: look at all epochs
            shown = run.rate_columns()
        else:
            _, before = run.epochs[-2]
            shown = run.scheduled_rates()
            for name in rates:
                if name in self.columns or rates[name] != before.get(name):
                    shown.append(name)
        return {name: rates[name] for name in shown if name in rates}

    def add_columns(self, row: Mapping[str, float]) -> None:
        """Add a column for each new name in a row."""
        names = list(row)
        if self.validates and not any(name.startswith("val_") for name in names):
            fit = self.model._compiled("fit").fit
            means = names if fit is None or fit.at.logs is None else fit.at.logs
            names += [f"val_{name}" for name in means if not is_rate(name)]
        # a column that this row lacks may be needed again
        self.columns = sort_columns(dict.fromkeys([*self.columns, *names]))

    # --- the moments of a fit ---------------------------------------------------------------------

    def on_fit_begin(self) -> None:
        self.start_time = time.perf_counter()

    def on_epoch_begin(self, epoch: int) -> None:
        self.start_epoch(epoch)
        label = f"epoch {epoch}/{self.epochs}"
        if self.draws_bar and self.bar is None:
            self.bar = tqdm(
                total=self.steps,
                desc=label,
                bar_format=self._bar_format(),
                leave=False,
                file=sys.stdout,
                dynamic_ncols=True,
                initial=self.steps_before,
            )
        elif self.bar is not None:
            self.bar.desc = label
            self.bar.postfix = None
            self.bar.n = self.bar.initial = self.steps_before
            self.bar.start_t = time.time()

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        self.batch = batch
        is_logged = self.log_step_freq is not None and batch % self.log_step_freq == 0
        if self.bar is not None:
            now = time.perf_counter()
            if now >= self.next_refresh or is_logged:
                self._refresh(self.bar, logs)
        elif is_logged:
            print(f"epoch {self.epoch}  step {batch}  {format_logs(logs)}", flush=True)

    def on_evaluate_begin(self) -> None:
        if self.bar is None:
            return
        now = time.perf_counter()
        # the bar stands still during validation: after a second of training, always say why
        if now >= self.next_refresh or now - self.epoch_start > 1:
            self._refresh(self.bar, None)

    def _bar_format(self, fit_left: str = "") -> str:
        start = KNOWN_LENGTH if self.steps else UNKNOWN_LENGTH
        return f"{start}{fit_left}]{{postfix}}"

    def _refresh(self, bar: tqdm[Any], logs: Mapping[str, float] | None) -> None:
        """Redraw the bar with the running means; without, with the word that it validates."""
        now = time.perf_counter()
        bar.n = self.batch
        left = self.fit_left()
        tails = [""]
        if left is not None and left >= 1:
            tails = [f", fit {tqdm.format_interval(left)} left", ""]
        columns = bar.format_dict["ncols"]  # None if stdout is not a terminal
        line = ""
        for tail in tails:  # the first running mean is worth more than the time left
            bar.postfix = None
            bar.bar_format = self._bar_format(tail)
            width = math.inf
            if columns is not None:
                width = columns - len(str(bar)) - 2
            if logs is not None:
                line = format_logs(logs, width)
            elif width >= len("validating"):
                line = "validating"
            if line:
                break
        bar.set_postfix_str(line, refresh=False)
        bar.refresh()
        spent = time.perf_counter() - now
        self.next_refresh = now + max(REFRESH, spent / SHARE)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        row = self.end_epoch(epoch, logs)
        duration = clock(self.seconds[epoch])
        if self.bar is not None:
            self.bar.clear()
        if not self.time_width:
            is_long = self.seconds[epoch] >= LONG_EPOCH
            self.time_width = LONG_TIME_WIDTH if is_long else TIME_WIDTH
        if len(duration) > self.time_width:
            self.time_width = max(LONG_TIME_WIDTH, len(duration))
        width = terminal_width()  # may have changed since the last row
        layout = choose_layout(self.columns, width, self.time_width)
        if layout != self.layout:
            self.layout = layout
            print(layout.head(width))
        is_best = row.get("val_loss", math.nan) < self.best
        if is_best:
            self.best = row["val_loss"]
        print(layout.rows(epoch, row, duration, is_best), flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def on_fit_end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.epoch in self.seconds:  # else an error says where the fit ended
            print(self.ending(), flush=True)


def clock(seconds: float) -> str:
    """Format a time for people.

    >>> clock(3.21), clock(75), clock(7384)
    ('3.2 s', '1 min 15 s', '2 h 3 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


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
