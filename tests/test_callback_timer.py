"""Timer: ends a fit after a time, and logs the seconds of each epoch."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
from helpers.callbacks import BATCHES, Loader, fit, log, saved_now
from helpers.interruptions import Killed
from helpers.models import compiled

from minikeras import (
    CSVLogger,
    EarlyStopping,
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


def test_timer_with_log_adds_the_seconds_of_each_epoch_and_its_validation(monkeypatch):
    now = [1000.0]

    def wait():
        now[0] += 60

    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now[0]))
    minute_each = LambdaCallback(on_batch_end=lambda batch, logs: wait(), on_evaluate_end=wait)
    between = LambdaCallback(on_epoch_end=lambda epoch, logs: wait())  # after the timer
    timer = Timer(log=True)
    _, dfhistory = fit(2, [minute_each, timer, between], val=BATCHES)
    assert list(dfhistory) == ["loss", "seconds", "val_loss"]
    assert list(dfhistory["seconds"]) == [60.0 * len(BATCHES) + 60] * 2


def test_timer_with_a_time_and_log_does_both(monkeypatch):
    now = [0.0]

    def wait(batch, logs):
        now[0] += 60

    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now[0]))
    _, dfhistory = fit(100, [LambdaCallback(on_batch_end=wait), Timer(4 * 60, log=True)])
    assert list(dfhistory["seconds"]) == [180.0, 60.0]
    _, dfhistory = fit(2, [LambdaCallback(on_batch_end=wait), Timer(10 * 60)])
    assert "seconds" not in dfhistory


def test_timer_adds_the_seconds_of_an_epoch_before_and_after_a_resume(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def train(stop):
        def wait(batch, logs):
            now[0] += 60
            batches.append(batch)
            if len(batches) == stop:
                raise Killed

        options = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 1}
        return fit(3, [LambdaCallback(on_batch_end=wait), Timer(log=True)], **options)[1]

    batches = []
    with pytest.raises(Killed):
        train(stop=5)  # the file has the first of the three batches of epoch 2
    now[0] += 10_000
    dfhistory = train(stop=None)
    assert list(dfhistory["seconds"]) == [180.0, 180.0, 180.0]


def test_timer_keeps_its_arguments_as_attributes_as_a_clone_needs_them():
    for timer in (Timer(60), Timer(log=True), Timer(9, log=True)):
        again = Timer(timer.max_seconds, log=timer.log)
        assert (again.max_seconds, again.log) == (timer.max_seconds, timer.log)
    assert Timer(log=True).max_seconds is None


def test_timer_takes_a_state_without_the_seconds_of_an_epoch():
    timer = Timer(60)
    timer.load_state_dict({"seconds": 30.0})
    assert timer.seconds() >= 30
    assert timer.epoch_seconds() == 0


def test_timer_column_may_be_monitored_and_written_to_a_file(tmp_path):
    stop = EarlyStopping("seconds", mode="min", patience=99)
    fit(2, [Timer(log=True), stop, CSVLogger(tmp_path / "log.csv")])
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == "epoch,loss,seconds"
    with pytest.raises(ValueError, match="monitors 'seconds'"):
        fit(1, [Timer(60), EarlyStopping("seconds", mode="min")])


def test_timer_refuses_to_replace_another_column_of_seconds():
    with pytest.raises(ValueError, match="'seconds'") as caught:
        fit(1, [log("seconds", [1.0]), Timer(log=True)])
    assert str(caught.value) == (
        "Timer(log=True) logs the column 'seconds', and expected no other of this name, but a "
        "metric or callback has logged one. Give that one another name."
    )
    _, dfhistory = fit(1, [log("my_seconds", [1.0]), Timer(log=True)])
    assert list(dfhistory) == ["loss", "my_seconds", "seconds"]


def test_timer_logs_the_seconds_of_rank_0(monkeypatch):
    model = compiled()
    monkeypatch.setattr(type(model._run.world), "broadcast", lambda self, value: 7.0)
    _, dfhistory = fit(1, [Timer(log=True)], model)
    assert list(dfhistory["seconds"]) == [7.0]
