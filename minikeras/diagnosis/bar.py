"""The bar of a diagnosis that takes a while."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from minikeras.processes import is_main
from minikeras.support.shown import is_on_terminal, notebook_cell

DELAY = 1.0  # seconds; a quicker diagnosis shows no bar
FORMAT = "diagnose |{bar:12}| {n_fmt}/{total_fmt} {desc}"


class Bar:
    """Counts the checks that were made, and says what is being done.

    It shows itself a second after it was created. A timer does that, since a single part, such as
    a training, may take longer than all others.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.made = 0  # checks
        self.words = ""
        self.bar: tqdm[Any] | None = None  # until it appears
        self.timer = threading.Timer(DELAY, self.appear)
        self.timer.daemon = True
        self.timer.start()

    def appear(self) -> None:
        """Draw the bar from now on."""
        self.bar = tqdm(
            total=self.total,
            initial=self.made,
            desc=self.words,
            bar_format=FORMAT,
            leave=False,
            file=sys.stdout,
            dynamic_ncols=True,
        )

    def say(self, words: str) -> None:
        """Show what is being done."""
        self.words = words
        if self.bar is not None:
            self.bar.desc = words
            self.bar.n = self.made
            self.bar.refresh()

    def count(self) -> None:
        """Count a check."""
        self.made += 1

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self.timer.cancel()
        self.timer.join()
        if self.bar is not None:
            self.bar.close()


class NoBar:
    """What stands for the bar if stdout goes to a file or a pipe."""

    def say(self, words: str) -> None:
        """Show nothing."""

    def count(self) -> None:
        """Count nothing."""


@contextlib.contextmanager
def show_progress(total: int) -> Iterator[Bar | NoBar]:
    """Return a bar on a terminal and in a notebook; it is removed at the end of the block.

    Args:
        total: the number of checks.
    """
    if not is_main() or not (is_on_terminal() or notebook_cell() is not None):
        yield NoBar()
        return
    bar = Bar(total)
    try:
        yield bar
    finally:
        bar.close()
