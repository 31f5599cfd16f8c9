"""The timetable of the loop, as callbacks see it."""

import pytest
from conftest import accuracy, compiled, points

from minikeras import Callback, LambdaCallback


class Diary(Callback):
    def __init__(self, name=""):
        self.name, self.lines = name, []

    def on_fit_begin(self):
        self.lines.append(f"fit begins with {type(self.model).__name__}")

    def on_epoch_begin(self, epoch):
        self.lines.append(f"epoch {epoch} begins, training={self.model.training}")

    def on_batch_end(self, batch, logs):
        self.lines.append(f"batch {batch}: {', '.join(logs)}")

    def on_epoch_end(self, epoch, logs):
        self.lines.append(f"epoch {epoch}: {', '.join(logs)}")

    def on_fit_end(self):
        self.lines.append("fit ends")


def test_callbacks_are_called_in_calendar_order():
    diary = Diary()
    model = compiled(metrics_dict={"accuracy": accuracy})
    model.fit(2, points(40), points(40), callbacks=[diary], validation_freq=2, verbose=0)
    assert diary.lines == [
        "fit begins with Net",
        "epoch 1 begins, training=True",
        "batch 1: loss, accuracy",
        "batch 2: loss, accuracy",
        "epoch 1: loss, accuracy",
        "epoch 2 begins, training=True",
        "batch 1: loss, accuracy",
        "batch 2: loss, accuracy",
        "epoch 2: loss, accuracy, val_loss, val_accuracy",
        "fit ends",
    ]


def test_epochs_go_on_counting_over_several_fits():
    diary = Diary()
    model = compiled()
    model.fit(1, points(8), verbose=0)
    model.fit(1, points(8), callbacks=[diary], verbose=0)
    assert "epoch 2: loss" in diary.lines


def test_logs_at_batch_end_are_running_means():
    seen = []
    keep = LambdaCallback(on_batch_end=lambda batch, logs: seen.append(logs["rows"]))
    values = iter([1.0, 4.0])
    model = compiled(metrics_dict={"rows": lambda y_pred, y_true: next(values)})
    model.fit(1, points(48), callbacks=[keep], verbose=0)
    assert seen == [1.0, (32 * 1.0 + 16 * 4.0) / 48]


def test_a_lambda_callback_has_a_function_for_each_moment():
    lines = []
    every = LambdaCallback(
        on_fit_begin=lambda: lines.append("begin"),
        on_epoch_begin=lambda epoch: lines.append(epoch),
        on_batch_end=lambda batch, logs: lines.append(batch),
        on_epoch_end=lambda epoch, logs: lines.append(list(logs)),
        on_fit_end=lambda: lines.append("end"),
    )
    compiled().fit(1, points(8), callbacks=every, verbose=0)
    assert lines == ["begin", 1, 1, ["loss"], "end"]


def test_only_those_callbacks_that_began_are_ended():
    class Broken(Diary):
        def on_fit_begin(self):
            raise RuntimeError("cannot begin")

    first, last = Diary(), Diary()
    with pytest.raises(RuntimeError, match="cannot begin"):
        compiled().fit(1, points(8), callbacks=[first, Broken(), last], verbose=0)
    assert first.lines == ["fit begins with Net", "fit ends"]
    assert last.lines == []
