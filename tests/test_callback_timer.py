"""Timer: ends a fit after a time."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from helpers.callbacks import BATCHES, Loader, fit, saved_now

from minikeras import (
    LambdaCallback,
    Timer,
)
from minikeras.callbacks import stopping


@pytest.mark.parametrize("limit", [4 * 60, timedelta(minutes=4)])
def test_timer_stops_after_the_batch_in_which_the_time_is_over(limit, monkeypatch):
    batches = []
    minute_each = LambdaCallback(on_batch_end=lambda batch, logs: batches.append(batch))
    monkeypatch.setattr(
        stopping, "time", SimpleNamespace(monotonic=lambda: 1000.0 + 60 * len(batches))
    )
    _, dfhistory = fit(100, [minute_each, Timer(limit)])
    assert batches == [1, 2, 3, 1]
    assert len(dfhistory) == 2


def test_timer_counts_the_time_before_a_resume_and_starts_again_otherwise():
    before = Timer(3600)
    after = Timer(3600)
    before.begin -= 3600
    batches = []
    count = LambdaCallback(on_batch_end=lambda batch, logs: batches.append(batch))
    fit(2, [count, after, Loader([after], saved_now(before))])
    assert batches == [1]
    fit(2, [count, after])
    assert len(batches) == 1 + 2 * len(BATCHES)
