"""LRScheduler gives the learning rates of bare torch loops."""

import pytest
import torch
from helpers.callbacks import BATCHES, NAN, fit, log
from helpers.compare import assert_equal_tensors, copy_weights
from helpers.models import Net, compiled
from helpers.pages import without_times
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

import minikeras
from minikeras import (
    LambdaCallback,
    LRScheduler,
)

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
STEPPED = [(name, "batch") for name in SCHEDULERS]
STEPPED += [(name, "epoch") for name in SCHEDULERS if name not in BY_BATCH]


class OwnCycle(lr_scheduler.OneCycleLR):
    """A subclass of the user's."""


@pytest.mark.parametrize("make", [OwnCycle, *map(SCHEDULERS.get, BY_BATCH)])
def test_lr_scheduler_refuses_a_cycle_over_batches_that_is_stepped_by_epoch(make):
    model = compiled()
    cycle = (
        make(model.optimizer, 0.5, total_steps=15) if make is OwnCycle else make(model.optimizer)
    )
    with pytest.raises(ValueError, match=r'Pass LRScheduler\(scheduler, step="batch"\)\.$'):
        LRScheduler(cycle)
    _, dfhistory = fit(2, [LRScheduler(cycle, step="batch")], model)
    assert "lr" in dfhistory


@pytest.mark.parametrize(("name", "step"), STEPPED)
def test_lr_scheduler_gives_the_rates_and_weights_of_a_bare_torch_loop(name, step):
    net = Net()
    model = compiled(lr=0.1)
    net.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
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
    assert_equal_tensors(copy_weights(model), copy_weights(net))


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
def test_lr_scheduler_on_a_plateau_gives_the_rates_of_a_bare_torch_loop(arguments):
    values = [3.0, 2.0, 2.0, 1.9, None, NAN, 2.5, None, 1.0, 1.0, 1.0, 0.9]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, **arguments)
    rates = []
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


def test_lr_scheduler_adds_the_last_column_to_the_history_and_fills_in_earlier_fits():
    model, _ = fit(1, [])
    halve = LRScheduler(lr_scheduler.ExponentialLR(model.optimizer, 0.5))
    dfhistory = model.fit(2, BATCHES, BATCHES, callbacks=[halve], verbose=0)
    assert list(dfhistory) == ["loss", "val_loss", "lr"]
    assert list(dfhistory["lr"]) == [0.1, 0.1, 0.05]


def test_lr_scheduler_adds_the_last_column_to_the_printed_table(capsys):
    model = compiled()
    halve = LRScheduler(lr_scheduler.ExponentialLR(model.optimizer, 0.5))
    fit(2, [halve], model, val=BATCHES, validation_freq=2, verbose=2)
    lines = without_times(capsys.readouterr().out).splitlines()
    assert lines[0].split() == ["epoch", "loss", "val_loss", "lr"]
    assert [line.split()[-1] for line in lines[2:]] == ["0.1000", "0.05000"]


class SteppedByBatch(Net):
    """Steps a torch scheduler itself, after each batch."""

    def train_step(self, features, labels):
        logs = super().train_step(features, labels)
        self.schedule.step()
        return logs


@pytest.mark.parametrize("epochs", [1, 3])
def test_schedule_by_batch_is_a_column_though_each_epoch_ends_with_the_same_rate(epochs, capsys):
    model = compiled(SteppedByBatch())
    # up in two steps and down in two, twice in each epoch of eight batches
    model.schedule = lr_scheduler.CyclicLR(
        model.optimizer, 0.01, 0.1, step_size_up=2, cycle_momentum=False
    )
    dfhistory = model.fit(epochs, [BATCHES[0]] * 8)
    assert list(dfhistory) == ["loss", "lr"]
    assert list(dfhistory["lr"]) == pytest.approx([0.01] * epochs)
    lines = without_times(capsys.readouterr().out).splitlines()
    assert lines[0].split() == ["epoch", "loss", "lr"]
    assert [line.split()[-1] for line in lines[2:]] == ["0.01000"] * epochs
    pytest.importorskip("matplotlib")
    axes = minikeras.plot_history(dfhistory)
    assert [axis.get_title() for axis in axes] == ["loss", "lr"]


def test_rate_that_a_callback_changes_is_printed_as_the_history_has_it(capsys):
    def change(epoch):
        model.optimizer.param_groups[0]["lr"] = [0.1, 0.1, 0.05, 0.05][epoch - 1]

    model = compiled()
    _, dfhistory = fit(4, [LambdaCallback(on_epoch_begin=change)], model, verbose=2)
    assert list(dfhistory["lr"]) == [0.1, 0.1, 0.05, 0.05]
    rows = [line.split() for line in without_times(capsys.readouterr().out).splitlines()]
    assert [row[2:] for row in rows if row[0].isdigit()] == [[], [], ["0.05000"], ["0.05000"]]
    fit(1, [], model, verbose=2)
    assert "lr" in capsys.readouterr().out.splitlines()[0]  # an earlier fit changed it


def test_rate_that_never_changes_is_no_column():
    assert list(fit(2, [])[1]) == ["loss"]


def test_lr_scheduler_adds_a_column_for_each_of_several_optimizers():
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


def test_lr_scheduler_of_another_optimizer_is_refused_before_anything_trains():
    model = compiled()
    before = copy_weights(model)
    other = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="not compiled with") as raised:
        fit(1, [LRScheduler(lr_scheduler.StepLR(other, 1))], model)
    assert str(raised.value) == (
        "LRScheduler has a StepLR of an optimizer that the model was not compiled with. "
        "Make it with model.optimizer, or compile the model with its optimizer."
    )
    assert_equal_tensors(copy_weights(model), before)


def test_lr_scheduler_of_torch_among_the_callbacks_raises_an_error_that_says_how_to_wrap_it():
    model = compiled()
    with pytest.raises(TypeError) as raised:
        fit(1, [lr_scheduler.StepLR(model.optimizer, 1)], model)
    assert str(raised.value) == (
        "callbacks must be instances of minikeras.Callback, got a torch StepLR. Pass "
        "LRScheduler(scheduler)."
    )


def test_lr_scheduler_steps_once_for_each_batch_of_a_graph_of_several_steps():
    model = compiled()
    schedule = LRScheduler(lr_scheduler.LambdaLR(model.optimizer, lambda n: float(n)), step="batch")
    schedule.model = model
    schedule.on_fit_begin()
    model.optimizer.step()  # or torch warns that none came before the scheduler's
    rates = []
    # steps_per_execution=4, epochs of ten batches; None: the epoch ends
    for batch, steps in [(4, 4), (8, 8), (10, 10), (None, 10), (4, 14), (8, 18)]:
        model._run.stepper.steps_taken[model.optimizer] = steps
        if batch is None:
            schedule.on_epoch_end(1, {})
        else:
            schedule.on_batch_end(batch, {})
        rates.append(model.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.4, 0.8, 1.0, 1.0, 1.4, 1.8])
