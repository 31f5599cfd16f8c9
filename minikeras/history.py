"""The rows of the history as columns that grow, so that another epoch does not read all again."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd

from minikeras.columns import sort_columns

# logs and learning rates of an epoch
Row = tuple[dict[str, float], dict[str, float]]


class HistoryColumns:
    """The columns of the epochs so far.

    >>> epochs = [({"loss": 0.5}, {"lr": 0.1})]
    >>> columns = HistoryColumns(epochs)
    >>> columns.extend()
    >>> epochs.append(({"loss": 0.25}, {"lr": 0.1}))
    >>> columns.extend()
    >>> list(columns.frame(rates=[])["loss"])
    [0.5, 0.25]

    Args:
        epochs: the rows, to which others append.
    """

    def __init__(self, epochs: list[Row]) -> None:
        self.epochs = epochs
        self.rows = 0  # that are in the columns
        self.logged: dict[str, None] = {}  # the names in the logs, in order
        self.columns: dict[str, Any] = {}  # an array if all values are floats, else a list
        self.rates: dict[str, set[Any]] = {}  # different learning rates: two tell as much as all

    def is_of(self, epochs: Sequence[Row]) -> bool:
        """Tell whether these are the epochs, and none has been taken away."""
        return self.epochs is epochs and self.rows <= len(epochs)

    def extend(self) -> None:
        """Add the rows that are not in the columns yet."""
        for logs, rates in islice(self.epochs, self.rows, None):
            self.logged.update(dict.fromkeys(logs))
            row = rates | logs  # a rate that a callback logs stays
            for name in row:
                if name not in self.columns:
                    self.columns[name] = array("d", [math.nan]) * self.rows
            for name, column in self.columns.items():
                self._append(name, column, row.get(name, math.nan))
            self.rows += 1
            add_rates(self.rates, rates, is_first=self.rows == 1)

    def _append(self, name: str, column: Any, value: Any) -> None:
        if type(value) is not float and isinstance(column, array):
            column = self.columns[name] = column.tolist()  # an integer stays one
        column.append(value)

    def changed_rates(self) -> dict[str, bool]:
        """Tell of each learning rate whether it has changed, in rows that are not read yet too."""
        found = {name: set(values) for name, values in self.rates.items()}
        for number, (_, rates) in enumerate(islice(self.epochs, self.rows, None), self.rows):
            add_rates(found, rates, is_first=number == 0)
        return {name: len(values) > 1 for name, values in found.items()}

    def frame(self, rates: list[str]) -> pd.DataFrame:
        """Return training columns, then validation's, then the learning rates of these names."""
        names = dict(self.logged)
        names.update(dict.fromkeys(rates))
        columns = {}
        for name in sort_columns(names):
            column = self.columns[name]
            columns[name] = np.array(column) if isinstance(column, array) else list(column)
        return pd.DataFrame(columns, pd.RangeIndex(self.rows))  # the epoch's number is one more


def add_rates(found: dict[str, set[Any]], rates: dict[str, float], is_first: bool) -> None:
    """Add an epoch's learning rates; the first epoch tells which there are."""
    for name in rates if is_first else found:
        values = found.setdefault(name, set())
        if len(values) < 2:
            values.add(rates.get(name))
