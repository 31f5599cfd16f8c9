"""The history's columns, which grow by an epoch without reading the earlier ones again."""

import math
import random

import pandas as pd
import pytest
from helpers.models import compiled, points

from minikeras.columns import sort_columns
from minikeras.history import HistoryColumns


def frame_of(epochs, scheduled):
    """Build the history from all rows at once."""
    names = {}
    for logs, _ in epochs:
        names.update(dict.fromkeys(logs))
    for name in epochs[0][1] if epochs else ():
        if name in scheduled or len({rates.get(name) for _, rates in epochs}) > 1:
            names[name] = None
    rows = [rates | logs for logs, rates in epochs]
    columns = {}
    for name in sort_columns(names):
        columns[name] = [row.get(name, math.nan) for row in rows]
    return pd.DataFrame(columns, pd.RangeIndex(len(rows)))


def row(draw):
    """Draw an epoch whose names, kinds of numbers and rates come and go."""
    logs = {"loss": draw.random()}
    for name in ("val_loss", "accuracy", "lr", "seconds", "val_f1"):
        if draw.random() < 0.4:
            logs[name] = draw.choice([draw.random(), draw.randrange(5), math.nan, True])
    rates = {"lr": draw.choice([0.1, 0.1, 0.01])}
    if draw.random() < 0.8:
        rates["lr_d"] = 0.2
    return logs, rates


@pytest.mark.parametrize("number", range(30))
def test_history_that_grows_is_that_of_all_rows_at_once(number):
    draw = random.Random(number)
    scheduled = draw.choice([[], ["lr_d"]])
    epochs = []
    columns = HistoryColumns(epochs)
    for _ in range(6):
        for _ in range(draw.randrange(3)):
            epochs.append(row(draw))
        changed = columns.changed_rates()
        columns.extend()
        assert columns.changed_rates() == changed
        shown = [name for name, moved in changed.items() if moved or name in scheduled]
        pd.testing.assert_frame_equal(columns.frame(shown), frame_of(epochs, scheduled))


class Unreadable(dict):
    """The logs or learning rates of an epoch that nobody should read again."""

    def refuse(self, *args):
        raise AssertionError("an earlier epoch was read again")

    __iter__ = __or__ = __ror__ = get = items = keys = refuse


def test_fit_of_one_epoch_does_not_read_the_earlier_epochs_again():
    model = compiled()
    first = model.fit(3, points(), verbose=0)
    model._run.epochs[:] = [(Unreadable(), Unreadable())] * 3
    dfhistory = model.fit(1, points(), verbose=0)
    pd.testing.assert_frame_equal(dfhistory[:3], first)
    assert len(dfhistory) == 4
    pd.testing.assert_frame_equal(model.history, dfhistory)


def test_history_that_fit_returned_is_not_changed_by_later_fits():
    model = compiled()
    first = model.fit(1, points(), verbose=0)
    before = first.copy()
    first.loc[0, "loss"] = -1.0
    second = model.fit(1, points(), verbose=0)
    assert second["loss"][0] == before["loss"][0]
    assert len(first) == 1
