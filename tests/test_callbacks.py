"""When callbacks are called, and with which logs."""

import numpy as np
import pytest
import torch
from helpers.models import accuracy, compiled, points
from helpers.pages import without_times

from minikeras import Callback, LambdaCallback


class Diary(Callback):
    def __init__(self, name=""):
        self.name = name
        self.lines = []

    def on_fit_begin(self):
        self.lines.append(f"fit begins with {type(self.model).__name__}")

    def on_epoch_begin(self, epoch):
        self.lines.append(f"epoch {epoch} begins, training={self.model.training}")

    def on_batch_begin(self, batch):
        self.lines.append(f"batch {batch} begins")

    def on_batch_end(self, batch, logs):
        self.lines.append(f"batch {batch}: {', '.join(logs)}")

    def on_evaluate_begin(self):
        self.lines.append("validation begins")

    def on_evaluate_end(self):
        self.lines.append("validation ends")

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
        "batch 1 begins",
        "batch 1: loss, accuracy",
        "batch 2 begins",
        "batch 2: loss, accuracy",
        "epoch 1: loss, accuracy",
        "epoch 2 begins, training=True",
        "batch 1 begins",
        "batch 1: loss, accuracy",
        "batch 2 begins",
        "batch 2: loss, accuracy",
        "validation begins",
        "validation ends",
        "epoch 2: loss, accuracy, val_loss, val_accuracy",
        "fit ends",
    ]


def test_callbacks_get_epoch_numbers_that_continue_over_several_fits():
    diary = Diary()
    model = compiled()
    model.fit(1, points(8), verbose=0)
    model.fit(1, points(8), callbacks=[diary], verbose=0)
    assert "epoch 2: loss" in diary.lines


def test_callbacks_get_running_means_as_logs_at_batch_end():
    seen = []
    keep = LambdaCallback(on_batch_end=lambda batch, logs: seen.append(logs["rows"]))
    values = iter([1.0, 4.0])
    model = compiled(metrics_dict={"rows": lambda y_pred, y_true: next(values)})
    model.fit(1, points(48), callbacks=[keep], verbose=0)
    assert seen == [1.0, (32 * 1.0 + 16 * 4.0) / 48]


def test_lambda_callback_has_a_function_for_each_moment():
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


def test_callbacks_are_ended_only_if_they_began():
    class Broken(Diary):
        def on_fit_begin(self):
            raise RuntimeError("cannot begin")

    first = Diary()
    last = Diary()
    with pytest.raises(RuntimeError, match="cannot begin"):
        compiled().fit(1, points(8), callbacks=[first, Broken(), last], verbose=0)
    assert first.lines == ["fit begins with Net", "fit ends"]
    assert last.lines == []


def test_stop_training_acts_after_the_batch_and_the_epoch_so_far_is_recorded():
    batches = []

    def stop(batch, logs):
        batches.append(batch)
        model.stop_training = len(batches) == 3

    model = compiled()
    dfhistory = model.fit(
        5, points(64), points(8), callbacks=[LambdaCallback(on_batch_end=stop)], verbose=0
    )
    assert batches == [1, 2, 1]
    assert list(dfhistory.index) == [0, 1]
    assert dfhistory["val_loss"].notna().all()


def test_stop_training_at_an_epochs_end_does_not_stop_the_next_fit():
    model = compiled()
    stop = LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True))
    assert len(model.fit(5, points(8), callbacks=[stop], verbose=0)) == 1
    assert len(model.fit(2, points(8), verbose=0)) == 3


@pytest.mark.parametrize(
    "moment", ["on_fit_begin", "on_epoch_begin", "on_evaluate_begin", "on_epoch_end"]
)
def test_callback_error_names_the_callback_and_the_others_are_ended(moment):
    class Faulty(Callback):
        pass

    def fail(self, *args):
        raise RuntimeError("no luck")

    setattr(Faulty, moment, fail)
    diary = Diary()
    model = compiled()
    with pytest.raises(RuntimeError, match="no luck") as raised:
        model.fit(1, points(8), points(8), callbacks=[diary, Faulty()], verbose=0)
    assert raised.value.__notes__ == [f"Faulty.{moment}"] + ["epoch 1"] * (moment != "on_fit_begin")
    assert diary.lines[-1] == "fit ends"
    assert model.training


def test_callback_error_at_batch_end_names_the_batch_and_the_callback():
    class Faulty(Callback):
        def on_batch_end(self, batch, logs):
            raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck") as raised:
        compiled().fit(1, points(8), callbacks=[Faulty()], verbose=0)
    assert raised.value.__notes__ == ["Faulty.on_batch_end", "dl_train, batch 1", "epoch 1"]


class Keras(Callback):
    def on_train_begin(self):
        pass

    def on_epoch_ends(self, epoch, logs):
        pass


def test_callback_methods_that_fit_never_calls_are_warned_of():
    with pytest.warns(UserWarning, match="never calls") as told:
        compiled().fit(1, points(8), callbacks=[Keras()], verbose=0)
    assert [str(warning.message) for warning in told] == [
        "fit never calls Keras.on_epoch_ends, Keras.on_train_begin. What it calls is on_fit_begin, "
        "on_epoch_begin, on_batch_begin, on_batch_end, on_evaluate_begin, on_evaluate_end, "
        "on_epoch_end, on_fit_end."
    ]
    assert told[0].filename == __file__


class OfAnotherLibrary:
    def on_train_start(self, trainer):
        pass


class OfBoth(Callback, OfAnotherLibrary):
    def on_train_start(self, trainer):
        pass


def test_callback_methods_of_another_library_are_not_warned_of():
    compiled().fit(1, points(8), callbacks=[OfBoth()], verbose=0)  # a warning is an error here


@pytest.mark.parametrize("verbose", [0, 2])
@pytest.mark.parametrize("value", ["good", None, torch.ones(2)])
def test_callback_logs_that_are_no_number_are_refused_and_not_kept_in_the_history(value, verbose):
    model = compiled()
    note = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(note=value))
    with pytest.raises(TypeError) as caught:
        model.fit(2, points(8), callbacks=[note], verbose=verbose)
    assert str(caught.value) == (
        f"logs['note'] is {value!r}, and a column of the history holds numbers. Log a number."
    )
    assert caught.value.__notes__ == ["LambdaCallback.on_epoch_end", "epoch 1"]
    assert list(model.history) == ["loss"]


@pytest.mark.parametrize("value", [1, True, np.float32(1), torch.tensor(1.0), float("nan")])
def test_callback_logs_may_be_numbers_of_any_kind(value):
    log = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(note=value))
    assert "note" in compiled().fit(1, points(8), callbacks=[log], verbose=2)


def test_fit_that_ends_early_prints_a_line_unless_verbose_is_0(capsys):
    stop = LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(stop.model, "stop_training", epoch == 2)
    )
    compiled().fit(9, points(8), callbacks=[stop], verbose=2)
    printed = without_times(capsys.readouterr().out)
    assert printed.splitlines()[-1] == "stopped after epoch 2 of 9"
    compiled().fit(9, points(8), callbacks=[stop], verbose=0)
    assert capsys.readouterr().out == ""
