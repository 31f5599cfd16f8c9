"""A script that was changed before it resumes: what is taken from it, what is refused."""

import warnings

import pytest
import torch
from helpers.compare import assert_equal_tensors, copy_weights
from helpers.exact import Jitter, Transformed, X, Y, loader, start
from helpers.interruptions import Killed
from helpers.models import compiled, points
from torch import nn

import minikeras
from minikeras import CheckpointError, LRScheduler
from minikeras.checkpoint import fits
from minikeras.support.atomic import previous

pytestmark = pytest.mark.usefixtures("quick_disk")

SCHEDULES = torch.optim.lr_scheduler


def rates_after_change(path, first, second, step, before=3, epochs=6):
    """Run a script with another scheduler after three epochs; return its model and warnings."""
    for count, make in ((before, first), (epochs, second)):
        fits.USES.clear()  # each start is a process
        torch.manual_seed(0)
        model = minikeras.Model(nn.Linear(2, 1))
        model.compile(
            nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), device="cpu"
        )
        callback = LRScheduler(make(model.optimizer), step=step)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model.fit(
                count, (X, Y), batch_size=15, callbacks=[callback], checkpoint=path, verbose=0
            )
    return model, [str(warning.message) for warning in told]


def plain_loop(first, second, step, before=3, epochs=6):
    """Train by a bare loop that changes to the second schedule, replayed to the current step."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # has the second schedule from the beginning
    other = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    schedulers = first(optimizer), second(other)
    rates = []
    for epoch in range(epochs):
        if epoch == before:
            optimizer.param_groups[0]["lr"] = other.param_groups[0]["lr"]
            optimizer.param_groups[0]["momentum"] = other.param_groups[0]["momentum"]
        for rows in torch.randperm(60).split(15):
            used = optimizer.param_groups[0]["lr"]
            optimizer.zero_grad()
            nn.functional.mse_loss(model(X[rows]), Y[rows]).backward()
            optimizer.step()
            other.step()
            if step == "batch":
                step_both(schedulers, optimizer, other, epoch >= before)
        if step == "epoch":
            step_both(schedulers, optimizer, other, epoch >= before)
        rates.append(used)
    return model, rates


def step_both(schedulers, optimizer, other, changed):
    schedulers[1].step()
    if changed:
        for name in ("lr", "momentum"):
            optimizer.param_groups[0][name] = other.param_groups[0][name]
    else:
        schedulers[0].step()


CHANGES = {
    "OneCycleLR, longer": (
        lambda o: SCHEDULES.OneCycleLR(o, 0.1, total_steps=13),
        lambda o: SCHEDULES.OneCycleLR(o, 0.1, total_steps=25),
        "batch",
        "total_steps 13 and not 25",
    ),
    "CosineAnnealingLR, longer": (
        lambda o: SCHEDULES.CosineAnnealingLR(o, 3),
        lambda o: SCHEDULES.CosineAnnealingLR(o, 6),
        "epoch",
        "T_max 3 and not 6",
    ),
    "StepLR, quicker": (
        lambda o: SCHEDULES.StepLR(o, 2),
        lambda o: SCHEDULES.StepLR(o, 1),
        "epoch",
        "step_size 2 and not 1",
    ),
    "another class": (
        lambda o: SCHEDULES.ExponentialLR(o, 0.5),
        lambda o: SCHEDULES.CosineAnnealingLR(o, 6),
        "epoch",
        "class ExponentialLR and not CosineAnnealingLR",
    ),
    "one after another": (
        lambda o: SCHEDULES.SequentialLR(
            o, [SCHEDULES.ConstantLR(o, 0.1, 2), SCHEDULES.CosineAnnealingLR(o, 3)], milestones=[2]
        ),
        lambda o: SCHEDULES.SequentialLR(
            o, [SCHEDULES.ConstantLR(o, 0.1, 2), SCHEDULES.CosineAnnealingLR(o, 5)], milestones=[2]
        ),
        "epoch",
        "T_max 3 and not 5",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resumed_script_with_a_changed_schedule_takes_it_and_warns(change, tmp_path):
    first, second, step, words = CHANGES[change]
    expected, rates = plain_loop(first, second, step)
    model, told = rates_after_change(tmp_path / "run.pt", first, second, step)
    assert model.history["lr"].tolist() == pytest.approx(rates, rel=1e-12)
    assert torch.equal(model.net.weight, expected.weight)
    assert len(told) == 1
    assert words in told[0]
    assert "This script's schedule is used" in told[0]


def test_resumed_script_with_the_same_schedule_does_not_warn(tmp_path):
    def cosine(optimizer):
        return SCHEDULES.CosineAnnealingLR(optimizer, 6)

    model, told = rates_after_change(tmp_path / "run.pt", cosine, cosine, "epoch")
    assert told == []
    assert model.history["lr"].tolist() == pytest.approx(plain_loop(cosine, cosine, "epoch")[1])


def test_resumed_script_with_other_betas_warns_and_keeps_those_of_the_file(tmp_path):
    def adam(betas):
        return lambda: {
            "optimizer": lambda trained: torch.optim.Adam(trained, lr=0.01, betas=betas)
        }

    start(adam((0.9, 0.999)), tmp_path / "run.pt", epochs=1)
    fits.USES.clear()
    with pytest.warns(UserWarning, match=r"betas\[0\] 0\.9 and not 0\.5") as told:
        model = start(adam((0.5, 0.999)), tmp_path / "run.pt", epochs=2)[3]
    assert "The file's settings are used" in str(told[0].message)
    assert model.optimizer.param_groups[0]["betas"][0] == 0.9


@pytest.mark.parametrize("change", ["loss", "frozen"])
def test_resumed_script_with_another_loss_or_other_frozen_layers_takes_them_and_warns(
    change, tmp_path
):
    start(dict, tmp_path / "run.pt", epochs=1)
    fits.USES.clear()
    changed = {"loss": lambda: {"loss": nn.L1Loss}, "frozen": lambda: {"net": half_frozen}}[change]
    words = {
        "loss": "loss_func MSELoss and not L1Loss",
        "frozen": "net.bias trained, and frozen here",
    }[change]
    with pytest.warns(UserWarning, match=words):
        start(changed, tmp_path / "run.pt", epochs=2)


def half_frozen():
    layer = nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    return layer


def best_of(monitor, path, epochs):
    fits.USES.clear()
    torch.manual_seed(0)
    model = compiled(
        metrics_dict={
            "accuracy": lambda y_pred, y_true: ((y_pred > 0.5) == (y_true > 0.5)).float().mean()
        }
    )
    stop = minikeras.EarlyStopping(monitor, patience=50, restore_best_weights=True)
    save = minikeras.ModelCheckpoint(path.parent / "best.pt", monitor, save_best_only=True)
    model.fit(epochs, points(60), points(60), callbacks=[stop, save], checkpoint=path, verbose=0)
    return model, stop, save


def test_resumed_script_with_another_monitor_does_not_take_the_best_value(tmp_path):
    best_of("val_loss", tmp_path / "run.pt", 2)
    with pytest.warns(UserWarning, match="that monitored") as told:
        model, stop, save = best_of("val_accuracy", tmp_path / "run.pt", 5)
    assert stop.best == save.best == model.history["val_accuracy"].iloc[2:].max()
    assert [str(warning.message) for warning in told] == [
        f"{tmp_path / 'run.pt'} was written with {name} that monitored 'val_loss' (min), and this "
        "script's monitors 'val_accuracy' (max). This script's is used, and its best value starts "
        "over."
        for name in ("an EarlyStopping", "a ModelCheckpoint")
    ]


@pytest.mark.parametrize("finished", [True, False])
def test_resumed_script_with_other_data_of_as_many_rows_warns(finished, tmp_path):
    path = tmp_path / "run.pt"
    if finished:
        start(dict, path, epochs=1)
    else:
        with pytest.raises(Killed):
            start(dict, path, kill=1, epochs=1)
    fits.USES.clear()
    with pytest.warns(
        UserWarning,
        match="nothing is trained on it" if finished else "the skipped batches",
    ):
        start(lambda: {"data": lambda: (X * 3, Y)}, path, epochs=1)


class Keeps(minikeras.Callback):
    def __init__(self, key):
        self.key = key
        self.value = 0

    def state_dict(self):
        return {self.key: self.value}

    def load_state_dict(self, state):
        self.value = state[self.key]


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x):
        return x + self.table


class Identity(nn.Module):
    def forward(self, x):
        return x


REFUSED = {
    "a generator in the loader": (
        {"data": loader},
        {"data": lambda: loader(generator=torch.Generator())},
        "other random generators",
    ),
    "another kind of generator": (
        {"data": lambda: loader(Transformed(Jitter("numpy")))},
        {"data": lambda: loader(Transformed(Jitter("python")))},
        "another kind of random generator at dl_train.dataset.transform.rng",
    ),
    "fewer rows": ({"data": loader}, {"data": lambda: (X[:10], Y[:10])}, "ended after 1"),
    "a layer with a hidden buffer": (
        {"net": lambda: nn.Sequential(nn.Sequential(Hidden()), nn.Linear(2, 1))},
        {"net": lambda: nn.Sequential(nn.Sequential(), nn.Linear(2, 1))},
        "holds the buffer net.0.0.table",
    ),
    "another key of a callback": (
        {"callbacks": lambda: [Keeps("a")]},
        {"callbacks": lambda: [Keeps("b")]},
        "callback Keeps cannot load: KeyError",
    ),
    "parameters in another order": (
        {"optimizer": lambda trained: torch.optim.SGD(trained, lr=0.1, momentum=0.9)},
        {"optimizer": lambda trained: torch.optim.SGD(trained[::-1], lr=0.1, momentum=0.9)},
        "in another order",
    ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_resumed_script_that_does_not_fit_is_refused_before_a_weight_changes(change, tmp_path):
    first, second, words = REFUSED[change]
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        start(lambda: first, path, kill=2)
    before = {}

    def remember(model):
        before.update(copy_weights(model))

    models = []
    net = second.get("net", lambda: nn.Linear(2, 1))

    def remembered():
        model = minikeras.Model(net())
        models.append(model)
        remember(model)
        return model

    with pytest.raises(CheckpointError, match=words) as raised:
        start(lambda: second | {"net": remembered}, path)
    files = [file for file in (path, previous(path)) if file.exists()]
    way_out = (
        f"To start from scratch, delete {' and '.join(map(str, files))}, or pass another path."
    )
    assert str(raised.value).endswith(f" {way_out}")
    (model,) = models
    assert_equal_tensors(model.state_dict(), before)
    assert not model.optimizer.state
    assert model.history.empty
    start(lambda: first, path)  # one remedy: as it was then
    for file in files:  # the other
        file.unlink()
    fits.USES.clear()
    history, *_ = start(lambda: second, path)
    assert len(history) == 3
