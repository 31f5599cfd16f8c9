"""The callbacks that come with minikeras, beside plain references and stopped runs that were carried on."""

import copy
import io
import math
import random
from datetime import timedelta
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers.models import Net, compiled, points
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from minikeras import (
    EMA,
    Callback,
    CheckpointError,
    CSVLogger,
    EarlyStopping,
    LambdaCallback,
    LRScheduler,
    Model,
    ModelCheckpoint,
    Timer,
)
from minikeras.callbacks import stopping

NAN = math.nan
X, Y = points(40)
BATCHES = [(X[:16], Y[:16]), (X[16:32], Y[16:32]), (X[32:], Y[32:])]  # the same order in each epoch


def log(name, values, skip=()):
    """A callback that adds a column with these values, one an epoch; None adds nothing."""
    values = iter(values)

    def add(epoch, logs):
        value = next(values)
        if value is not None:
            logs[name] = value

    return LambdaCallback(on_epoch_end=add)


def fit(epochs, callbacks, model=None, val=None, **kwargs):
    model = compiled() if model is None else model
    return model, model.fit(epochs, BATCHES, val, callbacks=callbacks, **{"verbose": 0, **kwargs})


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- a run that is killed and carried on ------------------------------------------------------------------------------


class Killed(RuntimeError):
    pass


class Saver(Callback):
    """Writes down the run at an epoch's end, or after a batch, and dies some batches later."""

    def __init__(self, others, after_epoch):
        self.others, self.after_epoch, self.saved, self.dies_in = others, after_epoch, None, None

    def on_epoch_end(self, epoch, logs):
        if epoch == self.after_epoch:
            run = self.model._run
            saved = {
                "model": self.model.state_dict(),
                "optimizer": run.optimizers[""].state_dict(),
                "callbacks": [callback.state_dict() for callback in self.others],
                "epochs": [[dict(logs), dict(rates)] for logs, rates in run.epochs],
            }
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            self.saved = torch.load(file, weights_only=True)
        elif self.saved:
            raise Killed


class Loader(Callback):
    """Takes a run up again; on_fit_begin of all the others was called before."""

    def __init__(self, others, saved):
        self.others, self.saved = others, saved

    def on_fit_begin(self):
        self.model.load_state_dict(self.saved["model"])
        self.model.optimizer.load_state_dict(self.saved["optimizer"])
        for callback, state in zip(self.others, self.saved["callbacks"], strict=True):
            callback.load_state_dict(state)


def carried_on(make, after, epochs=6, **kwargs):
    """Two results of fit, (model, history): never stopped; and saved after so many epochs, killed, carried on.

    `make(model)` gives the callbacks, new ones in each process.
    """

    def fresh():
        torch.manual_seed(1)
        return compiled(nn_with_batch_norm())

    model = fresh()
    whole = fit(epochs, make(model), model, **kwargs)
    model = fresh()
    callbacks = make(model)
    saver = Saver(callbacks, after)
    with pytest.raises(Killed):
        fit(epochs, [*callbacks, saver], model, **kwargs)
    model = fresh()
    model._run.epochs = [tuple(row) for row in saver.saved["epochs"]]
    callbacks = make(model)
    return whole, fit(epochs - after, [*callbacks, Loader(callbacks, saver.saved)], model, **kwargs)


def nn_with_batch_norm():
    return Model(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Sigmoid()))


CARRIED = {
    "EarlyStopping": lambda model: [
        log("note", [0.5] * 9),
        EarlyStopping("loss", min_delta=0.02, patience=4, restore_best_weights=True),
    ],
    "a best epoch before the stop": lambda model: [
        LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(score=float(-epoch))),
        EarlyStopping(
            "score", patience=4, mode="max", restore_best_weights=True, start_from_epoch=1
        ),
    ],
    "LRScheduler": lambda model: [LRScheduler(lr_scheduler.CosineAnnealingLR(model.optimizer, 6))],
    "LRScheduler by batch": lambda model: [
        LRScheduler(lr_scheduler.OneCycleLR(model.optimizer, 0.5, total_steps=18), step="batch")
    ],
    "LRScheduler of several": lambda model: [
        LRScheduler(
            lr_scheduler.SequentialLR(
                model.optimizer,
                [
                    lr_scheduler.ConstantLR(model.optimizer),
                    lr_scheduler.MultiStepLR(model.optimizer, [1, 3]),
                ],
                [2],
            )
        )
    ],
    "ReduceLROnPlateau": lambda model: [
        LRScheduler(
            lr_scheduler.ReduceLROnPlateau(model.optimizer, patience=0, threshold=1.0),
            monitor="val_loss",
        )
    ],
    "EMA": lambda model: [EMA(0.8)],
    "EMA that evaluates": lambda model: [EMA(0.8, evaluate=True)],
    "several EMAs": lambda model: [EMA(0.8), EMA(0.5, evaluate=True), EMA(0.9, evaluate=True)],
    "EMA and EarlyStopping": lambda model: [
        EMA(0.8, evaluate=True),
        EarlyStopping("val_loss", patience=3, min_delta=0.01, restore_best_weights=True),
    ],
}


@pytest.mark.parametrize("after", [2, 3])
@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR's own
def test_a_run_that_is_carried_on_ends_as_if_never_stopped(name, after):
    (whole, dfwhole), (resumed, dfresumed) = carried_on(
        CARRIED[name], after, val=BATCHES[:2], validation_freq=2
    )
    pd.testing.assert_frame_equal(dfresumed, dfwhole, check_exact=True)
    assert_same(weights(resumed), weights(whole))


# --- EarlyStopping ----------------------------------------------------------------------------------------------------


def stopped_by(stop, values, name="score"):
    """(epoch at which it stops or None, epoch whose weights the model has at the end)."""
    now = {"epoch": torch.tensor(0)}
    stop.model = SimpleNamespace(
        stop_training=False, state_dict=lambda: now, load_state_dict=now.update
    )
    stop.on_fit_begin()
    for epoch, value in enumerate(values, start=1):
        now["epoch"] = torch.tensor(epoch)
        stop.on_epoch_end(epoch, {"loss": 0.0} | ({} if value is None else {name: value}))
        if stop.model.stop_training:
            break
    stop.on_fit_end()
    return (epoch if stop.model.stop_training else None), int(now["epoch"])


def reference(values, min_delta, patience, mode, baseline, start_from_epoch):
    """The same from the definition, with values to be minimised."""
    sign = 1 if mode == "min" else -1
    limit = math.inf if baseline is None else sign * baseline
    best, best_epoch, since = math.inf, None, 0
    for epoch, value in enumerate(values, start=1):
        if value is None or epoch <= start_from_epoch:
            continue
        since += 1
        if sign * value + min_delta < best:  # False for NaN
            best, best_epoch = sign * value, epoch
            if best + min_delta < limit:
                since = 0
        if since and since >= patience:
            return epoch, best_epoch or epoch
    return None, best_epoch or len(values)


def test_early_stopping_stops_where_a_plain_reference_does():
    draw = random.Random(0)
    stops = 0
    for _ in range(3000):
        settings = {
            "min_delta": draw.choice([0.0, 0.0, 0.25, 0.5]),
            "patience": draw.randrange(5),
            "mode": draw.choice(["min", "max"]),
            "baseline": draw.choice([None, None, 0.5, 1.0]),
            "start_from_epoch": draw.choice([0, 0, 1, 3]),
        }
        # steps of a quarter: exact in floating point, and equal values turn up
        values = [draw.choice([NAN, None, *(n / 4 for n in range(8))]) for _ in range(12)]
        stop = EarlyStopping("val_score", restore_best_weights=True, **settings)
        found = stopped_by(stop, values, "val_score")
        assert found == reference(values, **settings), (values, settings)
        stops += found[0] is not None
    assert 1000 < stops < 3000


@pytest.mark.parametrize(
    ("values", "arguments", "stops"),
    [
        ([3, 2, 2, 1], {}, 3),  # patience 0 behaves as 1
        ([3, 2, 2, 1], {"patience": 1}, 3),
        ([3, 2, 2, 2, 1], {"patience": 2}, 4),
        ([3, 2.5, 2.25], {"min_delta": 0.5}, 2),  # better by as much as min_delta is not better
        ([9, 8, 7, 6, 5], {"baseline": 5, "patience": 3}, 3),  # never beaten, though it improves
        ([9, 4, 3, 3], {"baseline": 5, "patience": 2}, None),
        ([1, 9, 9, 9], {"start_from_epoch": 2}, 4),
        ([NAN, NAN], {"patience": 2}, 2),
        ([math.inf, 1, NAN], {}, 1),
    ],
)
def test_early_stopping_by_hand(values, arguments, stops):
    assert stopped_by(EarlyStopping("score", mode="min", **arguments), values)[0] == stops


def test_early_stopping_restores_the_best_weights_and_ends_the_fit():
    seen = []
    keep = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(weights(model)))
    model = compiled()
    stop = EarlyStopping("score", patience=2, mode="min", restore_best_weights=True)
    _, dfhistory = fit(9, [log("score", [3.0, 1.0, 2.0, 2.0]), keep, stop], model)
    assert len(dfhistory) == 4
    assert_same(weights(model), seen[1])
    assert all(value.device.type == "cpu" for value in stop.state_dict()["weights"].values())


def test_the_best_weights_come_back_after_an_error_too():
    def fail(batch, logs):
        if model._run.epochs:
            raise RuntimeError("no luck")

    seen = []
    model = compiled()
    keep = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(weights(model)))
    with pytest.raises(RuntimeError, match="no luck"):
        fit(
            5,
            [
                EarlyStopping("loss", restore_best_weights=True),
                keep,
                LambdaCallback(on_batch_end=fail),
            ],
            model,
        )
    assert_same(weights(model), seen[0])


def test_a_reused_early_stopping_starts_afresh():
    stop = EarlyStopping("score", patience=2, mode="min", restore_best_weights=True)
    model, _ = fit(3, [log("score", [1.0, 2.0, 2.0]), stop])
    assert (
        len(model.fit(5, BATCHES, callbacks=[log("score", [5.0, 4.0, 4.0, 4.0]), stop], verbose=0))
        == 3 + 4
    )


def test_early_stopping_waits_for_the_epochs_with_a_validation():
    _, dfhistory = fit(
        8, [EarlyStopping(patience=1)], compiled(lr=0.0), val=BATCHES, validation_freq=2
    )
    assert len(dfhistory) == 4


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
def test_mode_auto_goes_by_the_name(name, better):
    monitor = EarlyStopping(name).monitor
    assert monitor.better(1.0, 2.0) == (better == "less")
    assert monitor.better(2.0, 1.0) == (better == "more")


# --- names that are not logged ----------------------------------------------------------------------------------------


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
            "ModelCheckpoint monitors 'accuracy', which is not logged. Logged are 'loss', 'val_loss'.",
        ),
        (
            lambda path: ModelCheckpoint("{epoch}-{los}.pt"),
            "ModelCheckpoint names its files by 'los', which is not logged. Logged are 'loss', 'val_loss'. "
            "Did you mean 'loss'?",
        ),
    ],
)
def test_a_name_that_is_not_logged_is_refused_with_those_that_are(make, message, tmp_path):
    model = compiled()
    before = weights(model)
    with pytest.raises(ValueError, match="not logged") as raised:
        fit(2, [make(tmp_path)], model, val=BATCHES)
    assert str(raised.value) == message
    assert_same(weights(model), before)  # said before anything trains


class OwnValidation(Callback):
    """Adds a value of its own, whether or not there is dl_val."""

    def on_epoch_end(self, epoch, logs):
        logs["val_score"] = float(epoch)


@pytest.mark.parametrize("val", [None, BATCHES])
def test_a_value_that_a_callback_adds_can_be_monitored(val, tmp_path):
    stop = EarlyStopping("val_score", mode="min", patience=2)
    save = ModelCheckpoint(
        tmp_path / "{val_score:.0f}.pt", "val_score", mode="max", save_best_only=True
    )
    _, dfhistory = fit(9, [OwnValidation(), stop, save], val=val)
    assert len(dfhistory) == 3
    assert names_in(tmp_path) == ["1.pt", "2.pt", "3.pt"]


def test_a_value_that_no_callback_adds_is_refused_after_the_epoch():
    with pytest.raises(ValueError, match="monitors 'val_scor', which is not logged"):
        fit(9, [OwnValidation(), EarlyStopping("val_scor", mode="min")])


class OwnNames(Net):
    def train_step(self, features, labels):
        return super().train_step(features, labels) | {"extra": 1.0}


def test_a_name_that_a_step_of_the_users_returns_can_be_monitored():
    _, dfhistory = fit(9, [EarlyStopping("extra", mode="min", patience=2)], compiled(OwnNames()))
    assert len(dfhistory) == 3


def test_a_rate_is_a_known_name_where_a_scheduler_logs_it():
    model = compiled()
    halve = LRScheduler(lr_scheduler.ExponentialLR(model.optimizer, 0.5))
    _, dfhistory = fit(9, [halve, EarlyStopping("lr", mode="max", patience=2)], model)
    assert len(dfhistory) == 3
    with pytest.raises(ValueError, match="monitors 'lr', which is not logged"):
        fit(9, [EarlyStopping("lr", mode="max")])


def test_an_unknown_name_for_the_plateau_is_refused():
    model = compiled()
    plateau = LRScheduler(lr_scheduler.ReduceLROnPlateau(model.optimizer), monitor="lss_of_it")
    with pytest.raises(ValueError, match="monitors 'lss_of_it', which is not logged"):
        fit(1, [plateau], model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: EarlyStopping(),
            "EarlyStopping monitors 'val_loss' and fit has no dl_val. Pass dl_val, or monitor='loss'.",
        ),
        (
            lambda model: ModelCheckpoint("w.pt", "val_acc", save_best_only=True),
            "ModelCheckpoint monitors 'val_acc' and fit has no dl_val. Pass dl_val, or monitor='acc'.",
        ),
        (
            lambda model: ModelCheckpoint("{val_loss:.3f}.pt"),
            "ModelCheckpoint names its files by 'val_loss' and fit has no dl_val. Pass dl_val, or a path without it.",
        ),
        (
            lambda model: LRScheduler(
                lr_scheduler.ReduceLROnPlateau(model.optimizer), monitor="val_loss"
            ),
            "LRScheduler monitors 'val_loss' and fit has no dl_val. Pass dl_val, or monitor='loss'.",
        ),
    ],
)
def test_a_name_of_validation_without_dl_val_is_refused_before_anything_trains(make, message):
    model = compiled()
    before = weights(model)
    with pytest.raises(ValueError, match="no dl_val") as raised:
        fit(1, [make(model)], model)
    assert str(raised.value) == message
    assert_same(weights(model), before)


# --- ModelCheckpoint --------------------------------------------------------------------------------------------------


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_model_checkpoint_fills_in_the_path_and_makes_folders(tmp_path):
    save = ModelCheckpoint(tmp_path / "a" / "b" / "{epoch:02d}-{score:.2f}-{val_score}.pt")
    planned = [log("score", [0.5, 0.25]), log("val_score", [None, 2.0])]
    model, _ = fit(2, [*planned, save], val=BATCHES, validation_freq=2)
    assert names_in(tmp_path / "a" / "b") == ["01-0.50-nan.pt", "02-0.25-2.0.pt"]
    assert_same(
        torch.load(tmp_path / "a" / "b" / "02-0.25-2.0.pt", weights_only=True), weights(model)
    )


@pytest.mark.parametrize("name", ["file/weights.pt", "file/{epoch}/weights.pt", "folder"])
def test_a_path_that_cannot_be_written_is_refused_before_anything_trains(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / name
    first = tmp_path / "file" / "_" if "{" in name else path
    for kind in (ModelCheckpoint, CSVLogger, None):
        model = compiled()
        before = model.fc1.weight.clone()
        more = {"checkpoint": path} if kind is None else {"callbacks": [kind(path)]}
        with pytest.raises((OSError, CheckpointError)) as caught:
            model.fit(1, points(8), verbose=0, **more)
        name = "fit(checkpoint=...)" if kind is None else kind.__name__
        told = str(caught.value)
        if kind is None and path.is_dir():
            assert told.startswith(f"{path} is a folder, and not a file or a folder of a run.")
        else:
            shown = first if kind is ModelCheckpoint else path
            assert told.startswith(f"{name} cannot write {shown}: ")
            assert told.endswith(". Give the path of a file that can be.")
        assert torch.equal(model.fc1.weight, before)


def test_model_checkpoint_saves_the_best_epochs_alone_when_asked(tmp_path):
    save = ModelCheckpoint(tmp_path / "{epoch}.pt", "acc", save_best_only=True)
    fit(6, [log("acc", [NAN, 0.5, 0.5, 0.75, 0.25, NAN]), save])
    assert names_in(tmp_path) == ["2.pt", "4.pt"]


def test_model_checkpoint_looks_at_its_monitor_only_when_it_saves_the_best(tmp_path):
    fit(1, [ModelCheckpoint(tmp_path / "w.pt", "anything")])
    assert names_in(tmp_path) == ["w.pt"]


def test_model_checkpoint_keeps_its_best_value_over_a_resume(tmp_path):
    before, after = (
        ModelCheckpoint(tmp_path / "{epoch}.pt", "score", save_best_only=True, mode="min")
        for _ in "12"
    )
    fit(1, [log("score", [1.0]), before])
    fit(2, [log("score", [2.0, 0.5]), after, Loader([after], saved_now(before))])
    assert names_in(tmp_path) == ["1.pt", "2.pt"]
    fit(1, [log("score", [9.0]), after])  # a fit of its own: 9 is its best
    assert names_in(tmp_path) == ["1.pt", "2.pt"]
    assert after.best == 9.0


def saved_now(*callbacks):
    model = compiled()
    states = copy.deepcopy([callback.state_dict() for callback in callbacks])
    return {"model": weights(model), "optimizer": model.optimizer.state_dict(), "callbacks": states}


# --- LRScheduler ------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (1 + n)),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=15, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum=False),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2)]
    ),
    "SWALR": lambda o: SWALR(o, 0.01),
}


BY_BATCH = ("OneCycleLR", "CyclicLR")  # refused at step="epoch"
STEPPED = [
    (name, step)
    for name in SCHEDULERS
    for step in ("epoch", "batch")
    if (name, step) not in {(name, "epoch") for name in BY_BATCH}
]


class OwnCycle(lr_scheduler.OneCycleLR):
    """A subclass of the user's."""


@pytest.mark.parametrize("make", [OwnCycle, *map(SCHEDULERS.get, BY_BATCH)])
def test_a_cycle_over_batches_is_refused_by_the_epoch_and_the_remedy_works(make):
    model = compiled()
    cycle = (
        make(model.optimizer, 0.5, total_steps=15) if make is OwnCycle else make(model.optimizer)
    )
    with pytest.raises(ValueError, match=r'Pass LRScheduler\(scheduler, step="batch"\)\.$'):
        LRScheduler(cycle)
    _, dfhistory = fit(2, [LRScheduler(cycle, step="batch")], model)
    assert "lr" in dfhistory


@pytest.mark.parametrize(("name", "step"), STEPPED)
def test_rates_and_weights_are_those_of_a_bare_torch_loop(name, step):
    net, model = Net(), compiled(lr=0.1)
    net.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler, rates = SCHEDULERS[name](optimizer), []
    for _ in range(5):
        for features, labels in BATCHES:
            optimizer.zero_grad()
            nn.BCELoss()(net(features), labels).backward()
            optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            if step == "batch":
                scheduler.step()
        if step == "epoch":
            scheduler.step()
        rates.append(rate)
    _, dfhistory = fit(5, [LRScheduler(SCHEDULERS[name](model.optimizer), step)], model)
    assert list(dfhistory["lr"]) == rates
    assert model.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert_same(weights(model), weights(net))


@pytest.mark.parametrize(
    "arguments",
    [
        {"patience": 0},
        {"patience": 1, "factor": 0.5},
        {"patience": 0, "cooldown": 2},
        {"patience": 0, "min_lr": 0.005, "mode": "max"},
        {
            "patience": 0,
            "cooldown": 1,
            "min_lr": 0.02,
            "factor": 0.5,
            "threshold": 0.3,
            "threshold_mode": "abs",
        },
    ],
    ids=str,
)
def test_the_plateau_is_that_of_a_bare_torch_loop(arguments):
    values = [3.0, 2.0, 2.0, 1.9, None, NAN, 2.5, None, 1.0, 1.0, 1.0, 0.9]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    plateau, rates = lr_scheduler.ReduceLROnPlateau(optimizer, **arguments), []
    for value in values:
        rates.append(optimizer.param_groups[0]["lr"])
        if value is not None:
            plateau.step(value)
    model = compiled(lr=0.1)
    plateau = LRScheduler(
        lr_scheduler.ReduceLROnPlateau(model.optimizer, **arguments), monitor="val_score"
    )
    _, dfhistory = fit(
        len(values), [log("val_score", values), plateau], model, val=BATCHES, validation_freq=99
    )
    assert list(dfhistory["lr"]) == rates


def test_the_rate_is_the_last_column_and_earlier_fits_have_theirs():
    model, _ = fit(1, [])
    halve = LRScheduler(lr_scheduler.ExponentialLR(model.optimizer, 0.5))
    dfhistory = model.fit(2, BATCHES, BATCHES, callbacks=[halve], verbose=0)
    assert list(dfhistory) == ["loss", "val_loss", "lr"]
    assert list(dfhistory["lr"]) == [0.1, 0.1, 0.05]


def test_the_table_has_the_rate_last_and_none_of_validation(capsys):
    model = compiled()
    halve = LRScheduler(lr_scheduler.ExponentialLR(model.optimizer, 0.5))
    fit(2, [halve], model, val=BATCHES, validation_freq=2, verbose=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["epoch", "loss", "val_loss", "lr"]
    assert [line.split()[-1] for line in lines[2:]] == ["0.1000", "0.05000"]


def test_each_of_several_optimizers_has_a_column_under_its_name():
    model = Net()
    optimizers = {
        name: torch.optim.SGD(layer.parameters(), lr=0.1)
        for name, layer in [("a", model.fc1), ("b", model.fc2)]
    }
    model.compile(nn.BCELoss(), optimizers, device="cpu")
    halve = LRScheduler(lr_scheduler.ExponentialLR(optimizers["b"], 0.5))
    third = LRScheduler(lr_scheduler.ExponentialLR(optimizers["b"], 1 / 3))
    _, dfhistory = fit(2, [halve, third], model)
    assert list(dfhistory) == ["loss", "lr_b"]
    assert list(dfhistory["lr_b"]) == pytest.approx([0.1, 0.1 / 6])


def test_a_scheduler_of_another_optimizer_is_refused_before_anything_trains():
    model = compiled()
    before = weights(model)
    other = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="not compiled with") as raised:
        fit(1, [LRScheduler(lr_scheduler.StepLR(other, 1))], model)
    assert str(raised.value) == (
        "LRScheduler has a StepLR of an optimizer that the model was not compiled with. "
        "Make it with model.optimizer, or compile the model with its optimizer."
    )
    assert_same(weights(model), before)


def test_a_bare_scheduler_among_the_callbacks_is_told_how_to_come_in():
    model = compiled()
    with pytest.raises(TypeError) as raised:
        fit(1, [lr_scheduler.StepLR(model.optimizer, 1)], model)
    assert str(raised.value) == (
        "callbacks must be instances of minikeras.Callback, got a torch StepLR. Pass LRScheduler(scheduler)."
    )


def test_a_scheduler_makes_up_for_the_batches_that_one_call_of_the_graph_took():
    model = compiled()
    schedule = LRScheduler(lr_scheduler.LambdaLR(model.optimizer, lambda n: float(n)), step="batch")
    schedule.model = model
    schedule.on_fit_begin()
    model.optimizer.step()  # or torch warns that none came before the scheduler's
    rates = []
    for batch in [4, 8, 10, None, 4, 8]:  # steps_per_execution=4, epochs of ten batches
        if batch is None:
            schedule.on_epoch_end(1, {})
        else:
            schedule.on_batch_end(batch, {})
        rates.append(model.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.4, 0.8, 1.0, 1.0, 1.4, 1.8])


# --- CSVLogger --------------------------------------------------------------------------------------------------------


def lines_of(path):
    return path.read_text().splitlines()


def test_the_csv_file_is_the_history(tmp_path):
    path = tmp_path / "logs" / "log.csv"
    model = compiled()
    halve = LRScheduler(lr_scheduler.ExponentialLR(model.optimizer, 0.5))
    _, dfhistory = fit(4, [halve, CSVLogger(path)], model, val=BATCHES, validation_freq=2)
    table = pd.read_csv(path)
    assert list(table.pop("epoch")) == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(table, dfhistory, check_exact=True)
    assert lines_of(path)[0] == "epoch,loss,val_loss,lr"
    assert lines_of(path)[1].split(",")[2] == ""
    assert names_in(path.parent) == ["log.csv"]


def test_each_row_is_in_the_file_when_its_epoch_ends(tmp_path):
    sizes = []
    count = LambdaCallback(
        on_epoch_end=lambda epoch, logs: sizes.append(len(lines_of(tmp_path / "log.csv")))
    )
    fit(3, [CSVLogger(tmp_path / "log.csv"), count])
    assert sizes == [2, 3, 4]


@pytest.mark.parametrize("append", [False, True])
def test_a_file_that_is_there_is_written_over_or_gone_on_with(append, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('epoch,loss,note\n7,0.5,"a, b"\n')
    fit(2, [log("lr", [1.0, 1.0]), log("loss", [0.25, 0.125]), CSVLogger(path, append=append)])
    old = ["epoch,loss,note,lr", '7,0.5,"a, b",', "1,0.25,,1.0", "2,0.125,,1.0"]
    assert lines_of(path) == (old if append else ["epoch,loss,lr", "1,0.25,1.0", "2,0.125,1.0"])


def test_appending_keeps_the_header_that_is_there(tmp_path):
    path = tmp_path / "log.csv"
    for _ in range(2):
        fit(1, [log("val_x", [1.0]), log("loss", [0.5]), CSVLogger(path, append=True)])
    assert lines_of(path) == ["epoch,loss,val_x", "1,0.5,1.0", "1,0.5,1.0"]


@pytest.mark.parametrize("append", [False, True])
def test_a_csv_file_that_is_carried_on_loses_the_rows_after_the_last_save_alone(append, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("epoch,loss\n1,9.0\n5,9.0\n")
    first, second = CSVLogger(path, append), CSVLogger(path, append)
    saved = {}
    save = LambdaCallback(
        on_epoch_end=lambda epoch, logs: epoch == 2 and saved.update(saved_now(first))
    )
    fit(3, [log("loss", [1.0, 2.0, 3.0]), first, save])
    with path.open("a") as file:
        file.write("4,0.")  # killed in the middle of a row
    model = compiled()
    model._run.epochs = [({"loss": 1.0}, {"lr": 0.1})] * 2
    fit(2, [log("loss", [4.0, 5.0]), second, Loader([second], saved)], model)
    assert lines_of(path)[1 + 2 * append :] == ["1,1.0", "2,2.0", "3,4.0", "4,5.0"]
    assert lines_of(path)[: 1 + 2 * append] == ["epoch,loss", "1,9.0", "5,9.0"][: 1 + 2 * append]


# --- EMA --------------------------------------------------------------------------------------------------------------


def averages_of_a_plain_loop(net, epochs, decay):
    """The averaged and the raw weights at each epoch's end."""
    optimizer, average, ends = torch.optim.SGD(net.parameters(), lr=0.1), None, []
    for _ in range(epochs):
        for features, labels in BATCHES:
            optimizer.zero_grad()
            nn.BCELoss()(net(features), labels).backward()
            optimizer.step()
            now = [parameter.detach().clone() for parameter in net.parameters()]
            if average is None:
                average = now
            else:
                average = [decay * a + (1 - decay) * w for a, w in zip(average, now, strict=True)]
        ends.append((average, now))
    return ends


class Peek(Callback):
    """The model's parameters at each moment."""

    def __init__(self):
        self.seen = {"on_epoch_begin": [], "on_evaluate_begin": [], "on_epoch_end": []}

    def _look(self, moment):
        self.seen[moment].append(
            [parameter.detach().clone() for parameter in self.model.parameters()]
        )

    def on_epoch_begin(self, epoch):
        self._look("on_epoch_begin")

    def on_evaluate_begin(self):
        self._look("on_evaluate_begin")

    def on_epoch_end(self, epoch, logs):
        self._look("on_epoch_end")


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("validation_freq", [1, 2])
def test_the_average_is_that_of_a_plain_loop(evaluate, validation_freq):
    model = compiled(nn_with_batch_norm())
    net = copy.deepcopy(model)
    net.train()
    ends = averages_of_a_plain_loop(net, 4, 0.7)
    peek = Peek()
    identities = [id(parameter) for parameter in model.parameters()]
    _, dfhistory = fit(
        4, [EMA(0.7, evaluate), peek], model, val=BATCHES, validation_freq=validation_freq
    )
    held = [average if evaluate else raw for average, raw in ends]
    torch.testing.assert_close(peek.seen["on_epoch_end"], held)
    torch.testing.assert_close(
        peek.seen["on_evaluate_begin"], held[validation_freq - 1 :: validation_freq]
    )
    torch.testing.assert_close(peek.seen["on_epoch_begin"][1:], [raw for _, raw in ends[:-1]])
    torch.testing.assert_close(
        [parameter.detach() for parameter in model.parameters()], ends[-1][0]
    )
    assert [id(parameter) for parameter in model.parameters()] == identities
    buffers = dict(net.named_buffers())  # those of the training, whatever is averaged
    assert_same(dict(model.named_buffers()), buffers)
    if evaluate:
        assert dfhistory["val_loss"].iloc[-1] == model.evaluate(BATCHES)["val_loss"]


@pytest.mark.parametrize("evaluate", [False, True])
def test_under_accumulate_the_average_follows_the_steps(evaluate):
    model = compiled(accumulate=2)  # of 3 batches an epoch: the second step closes a window of one
    net, average, ends = copy.deepcopy(model), None, []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        for batches in (BATCHES[:2], BATCHES[2:]):
            features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            optimizer.zero_grad()
            nn.BCELoss()(net(features), labels).backward()
            optimizer.step()
            now = [parameter.detach().clone() for parameter in net.parameters()]
            average = (
                now
                if average is None
                else [0.7 * a + 0.3 * w for a, w in zip(average, now, strict=True)]
            )
        ends.append((average, now))
    peek = Peek()
    fit(3, [EMA(0.7, evaluate), peek], model, val=BATCHES)
    held = [average if evaluate else raw for average, raw in ends]
    torch.testing.assert_close(peek.seen["on_evaluate_begin"], held)
    torch.testing.assert_close(peek.seen["on_epoch_end"], held)
    torch.testing.assert_close(
        [parameter.detach() for parameter in model.parameters()], ends[-1][0]
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "kinds",
    [
        [(0.9, True), (0.5, True)],
        [(0.9, False), (0.5, True)],
        [(0.5, True), (0.9, False)],
        [(0.9, False), (0.5, False)],
    ],
)
def test_several_emas_follow_the_training_and_leave_it_alone(kinds, accumulate):
    def fitted(*emas):
        torch.manual_seed(0)
        model, raw, seen = compiled(accumulate=accumulate), [], []
        look = LambdaCallback(
            on_batch_end=lambda batch, logs: raw.append(weights(model)),
            on_evaluate_end=lambda: seen.append(weights(model)),
        )
        model, dfhistory = fit(3, [*emas, look], model, val=BATCHES)
        return model, raw, seen, dfhistory["loss"].tolist()

    _, expected_raw, _, expected_loss = fitted()
    alone = []
    for decay, evaluate in kinds:
        ema = EMA(decay, evaluate)
        _, _, seen_alone, _ = fitted(ema)
        alone.append((ema.averaged, seen_alone))
    emas = [EMA(decay, evaluate) for decay, evaluate in kinds]
    model, raw, seen, loss = fitted(*emas)
    torch.testing.assert_close(raw, expected_raw, rtol=0, atol=0)
    assert loss == expected_loss
    for ema, (averaged, _) in zip(emas, alone, strict=True):
        torch.testing.assert_close(ema.averaged, averaged, rtol=0, atol=0)
    lender = next((number for number, (_, evaluate) in enumerate(kinds) if evaluate), 0)
    torch.testing.assert_close(
        seen, alone[lender][1], rtol=0, atol=0
    )  # validation sees the first that evaluates
    torch.testing.assert_close(list(weights(model).values()), emas[0].averaged, rtol=0, atol=0)


def test_callbacks_after_an_ema_that_evaluates_save_and_restore_the_average(tmp_path):
    model, peek = compiled(), Peek()
    stop = EarlyStopping("score", patience=2, mode="min", restore_best_weights=True)
    save = ModelCheckpoint(tmp_path / "{epoch}.pt")
    fit(4, [log("score", [2.0, 1.0, 3.0, 3.0]), EMA(0.5, evaluate=True), peek, save, stop], model)
    best = peek.seen["on_epoch_end"][1]
    torch.testing.assert_close(list(weights(model).values()), best, rtol=0, atol=0)
    saved = torch.load(tmp_path / "2.pt", weights_only=True)
    torch.testing.assert_close(list(saved.values()), best, rtol=0, atol=0)


def test_an_average_may_begin_before_the_layers_know_their_sizes():
    model = compiled(Model(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1), nn.Sigmoid())))
    ema = EMA(0.5, evaluate=True)
    ema.model = model
    assert ema.state_dict() == {"taken": 0, "averaged": {}, "raw": {}}
    fit(2, [ema], model)
    assert_same(ema.state_dict()["averaged"], weights(model))


def test_a_reused_ema_starts_afresh():
    ema = EMA(1.0)  # stays at the weights after the first batch
    peek, model = Peek(), compiled()
    fit(1, [ema], model)
    firsts = []
    keep = LambdaCallback(on_batch_end=lambda batch, logs: firsts.append(weights(model)))
    fit(2, [ema, keep, peek], model)
    assert_same(weights(model), firsts[0])


def test_the_average_is_there_after_an_error_in_validation():
    model = compiled()
    fail = LambdaCallback(on_evaluate_begin=lambda: 1 / 0)
    peek, ema = Peek(), EMA(0.5, evaluate=True)
    with pytest.raises(ZeroDivisionError):
        fit(1, [ema, peek, fail], model, val=BATCHES)
    torch.testing.assert_close(
        list(weights(model).values()), peek.seen["on_evaluate_begin"][0], rtol=0, atol=0
    )
    assert ema.state_dict()["raw"] == {}


# --- Timer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [4 * 60, timedelta(minutes=4)])
def test_the_timer_stops_after_the_batch_in_which_the_time_is_over(limit, monkeypatch):
    batches = []
    minute_each = LambdaCallback(on_batch_end=lambda batch, logs: batches.append(batch))
    monkeypatch.setattr(
        stopping, "time", SimpleNamespace(monotonic=lambda: 1000.0 + 60 * len(batches))
    )
    _, dfhistory = fit(100, [minute_each, Timer(limit)])
    assert batches == [1, 2, 3, 1]
    assert len(dfhistory) == 2


def test_the_timer_counts_the_time_spent_before_a_resume_and_starts_afresh_otherwise():
    before, after = Timer(3600), Timer(3600)
    before.begin -= 3600
    batches = []
    count = LambdaCallback(on_batch_end=lambda batch, logs: batches.append(batch))
    fit(2, [count, after, Loader([after], saved_now(before))])
    assert batches == [1]
    fit(2, [count, after])
    assert len(batches) == 1 + 2 * len(BATCHES)


# --- bad arguments ----------------------------------------------------------------------------------------------------


def scheduler(kind=lr_scheduler.StepLR, *arguments):
    return kind(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), *arguments)


BAD = [
    (lambda: EarlyStopping(patience=-1), "patience must be a whole number of 0 or more, got -1."),
    (lambda: EarlyStopping(patience=1.5), "patience must be a whole number of 0 or more, got 1.5."),
    (
        lambda: EarlyStopping(start_from_epoch=True),
        "start_from_epoch must be a whole number of 0 or more, got True.",
    ),
    (lambda: EarlyStopping(min_delta=-0.1), "min_delta must be a number of 0 or more, got -0.1."),
    (
        lambda: EarlyStopping(min_delta=math.inf),
        "min_delta must be a number of 0 or more, got inf.",
    ),
    (lambda: EarlyStopping(baseline="low"), "baseline must be a number or None, got 'low'."),
    (
        lambda: EarlyStopping(mode="mx"),
        'mode must be "auto", "min" or "max", got \'mx\'. Did you mean \'max\'?',
    ),
    (
        lambda: EarlyStopping("val_score"),
        "EarlyStopping cannot tell from the name 'val_score' whether more or less is better. "
        'Pass mode="max" or mode="min".',
    ),
    (
        lambda: ModelCheckpoint("w.pt", "error_recall", save_best_only=True),
        "ModelCheckpoint cannot tell from the name 'error_recall' whether more or less is better. "
        'Pass mode="max" or mode="min".',
    ),
    (
        lambda: ModelCheckpoint("w/{epoch.pt"),
        "path 'w/{epoch.pt' cannot be filled in: expected '}' before end of string. Write names in braces, "
        "{epoch:02d} or {val_loss:.3f}, and a brace that stands for itself twice.",
    ),
    (
        lambda: ModelCheckpoint("{loss:02d}.pt"),
        "path '{loss:02d}.pt' cannot be filled in: Unknown format code 'd' for object of type 'float'. Write names in "
        "braces, {epoch:02d} or {val_loss:.3f}, and a brace that stands for itself twice.",
    ),
    (lambda: EMA(1.5), "decay must be a number between 0 and 1, got 1.5."),
    (lambda: EMA(decay=NAN), "decay must be a number between 0 and 1, got nan."),
    (lambda: Timer(0), "max_seconds must be a number of seconds above 0, or a timedelta, got 0."),
    (
        lambda: Timer(timedelta(0)),
        "max_seconds must be a number of seconds above 0, or a timedelta, got 0.0.",
    ),
    (
        lambda: LRScheduler(lr_scheduler.StepLR),
        "scheduler must be a torch.optim.lr_scheduler.LRScheduler, got the class StepLR. "
        "Pass for instance torch.optim.lr_scheduler.StepLR(optimizer, step_size=10).",
    ),
    (
        lambda: LRScheduler(scheduler(lr_scheduler.StepLR, 1), step="epochs"),
        "step must be \"epoch\" or \"batch\", got 'epochs'. Did you mean 'epoch'?",
    ),
    (
        lambda: LRScheduler(scheduler(lr_scheduler.StepLR, 1), monitor="loss"),
        "monitor='loss' is for ReduceLROnPlateau, and StepLR watches nothing. Leave monitor out.",
    ),
    (
        lambda: LRScheduler(scheduler(lr_scheduler.ReduceLROnPlateau)),
        "ReduceLROnPlateau needs the name of a value to watch, once an epoch. "
        'Pass LRScheduler(scheduler, monitor="val_loss").',
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_arguments_are_refused_when_the_callback_is_made(make, message):
    with pytest.raises((ValueError, TypeError)) as raised:
        make()
    assert str(raised.value) == message
