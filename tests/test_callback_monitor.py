"""The values that callbacks monitor: by which name, and which direction is better."""

import pytest
from helpers.callbacks import BATCHES, fit, names_in
from helpers.compare import assert_equal_tensors, copy_weights
from helpers.models import Net, compiled
from torch.optim import lr_scheduler

from minikeras import (
    Callback,
    EarlyStopping,
    LRScheduler,
    ModelCheckpoint,
)
from minikeras.callbacks.monitor import Monitor


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("val_loss", "less"),
        ("val_accuracy", "more"),
        ("top5_acc", "more"),
        ("MulticlassF1Score", "more"),
        ("mIoU", "more"),
        ("val_MSELoss", "less"),
        ("mean_absolute_error", "less"),
        ("roc-auc", "more"),
        ("mAP50", "more"),
        ("loss_g", "less"),
    ],
)
def test_monitor_mode_auto_infers_the_direction_from_the_name(name, better):
    monitor = Monitor("EarlyStopping", name)
    assert monitor.better(1.0, 2.0) == (better == "less")
    assert monitor.better(2.0, 1.0) == (better == "more")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: EarlyStopping("val_los", mode="min"),
            "EarlyStopping monitors 'val_los', which is not logged. Logged are 'loss', 'val_loss'. "
            "Did you mean 'val_loss'?",
        ),
        (
            lambda path: ModelCheckpoint(path / "w.pt", "accuracy", save_best_only=True),
            "ModelCheckpoint monitors 'accuracy', which is not logged. Logged are 'loss', "
            "'val_loss'.",
        ),
        (
            lambda path: ModelCheckpoint("{epoch}-{los}.pt"),
            "ModelCheckpoint names its files by 'los', which is not logged. Logged are 'loss', "
            "'val_loss'. Did you mean 'loss'?",
        ),
    ],
)
def test_monitor_that_is_not_logged_is_refused_with_the_names_that_are(make, message, tmp_path):
    model = compiled()
    before = copy_weights(model)
    with pytest.raises(ValueError, match="not logged") as raised:
        fit(2, [make(tmp_path)], model, val=BATCHES)
    assert str(raised.value) == message
    assert_equal_tensors(copy_weights(model), before)  # said before anything trains


class OwnValidation(Callback):
    """Adds a value of its own, whether or not there is dl_val."""

    def on_epoch_end(self, epoch, logs):
        logs["val_score"] = float(epoch)


@pytest.mark.parametrize("val", [None, BATCHES])
def test_monitor_may_be_a_value_that_a_callback_adds(val, tmp_path):
    stop = EarlyStopping("val_score", mode="min", patience=2)
    save = ModelCheckpoint(
        tmp_path / "{val_score:.0f}.pt", "val_score", mode="max", save_best_only=True
    )
    _, dfhistory = fit(9, [OwnValidation(), stop, save], val=val)
    assert len(dfhistory) == 3
    assert names_in(tmp_path) == ["1.pt", "2.pt", "3.pt"]


def test_monitor_that_no_callback_adds_is_refused_after_the_epoch():
    with pytest.raises(ValueError, match="monitors 'val_scor', which is not logged"):
        fit(9, [OwnValidation(), EarlyStopping("val_scor", mode="min")])


class OwnNames(Net):
    def train_step(self, features, labels):
        return super().train_step(features, labels) | {"extra": 1.0}


def test_monitor_may_be_a_value_that_a_custom_train_step_returns():
    _, dfhistory = fit(9, [EarlyStopping("extra", mode="min", patience=2)], compiled(OwnNames()))
    assert len(dfhistory) == 3


def test_monitor_may_be_lr_if_a_scheduler_logs_it():
    model = compiled()
    halve = LRScheduler(lr_scheduler.ExponentialLR(model.optimizer, 0.5))
    _, dfhistory = fit(9, [halve, EarlyStopping("lr", mode="max", patience=2)], model)
    assert len(dfhistory) == 3
    with pytest.raises(ValueError, match="monitors 'lr', which is not logged"):
        fit(9, [EarlyStopping("lr", mode="max")])


def test_monitor_of_reduce_lr_on_plateau_that_is_not_logged_is_refused():
    model = compiled()
    plateau = LRScheduler(lr_scheduler.ReduceLROnPlateau(model.optimizer), monitor="lss_of_it")
    with pytest.raises(ValueError, match="monitors 'lss_of_it', which is not logged"):
        fit(1, [plateau], model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: EarlyStopping(),
            "EarlyStopping monitors 'val_loss' and fit has no dl_val. Pass dl_val, or "
            "monitor='loss'.",
        ),
        (
            lambda model: ModelCheckpoint("w.pt", "val_acc", save_best_only=True),
            "ModelCheckpoint monitors 'val_acc' and fit has no dl_val. Pass dl_val, or "
            "monitor='acc'.",
        ),
        (
            lambda model: ModelCheckpoint("{val_loss:.3f}.pt"),
            "ModelCheckpoint names its files by 'val_loss' and fit has no dl_val. Pass dl_val, or "
            "a path without it.",
        ),
        (
            lambda model: LRScheduler(
                lr_scheduler.ReduceLROnPlateau(model.optimizer), monitor="val_loss"
            ),
            "LRScheduler monitors 'val_loss' and fit has no dl_val. Pass dl_val, or "
            "monitor='loss'.",
        ),
    ],
)
def test_monitor_of_validation_without_dl_val_is_refused_before_anything_trains(make, message):
    model = compiled()
    before = copy_weights(model)
    with pytest.raises(ValueError, match="no dl_val") as raised:
        fit(1, [make(model)], model)
    assert str(raised.value) == message
    assert_equal_tensors(copy_weights(model), before)
