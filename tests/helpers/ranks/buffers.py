"""Buffers in which each process counts its own rows: whose are used, and when."""

import contextlib
import copy

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import minikeras
from helpers.ranks.common import RANK
from helpers.seeds import seed

X = torch.linspace(-1, 1, 96, dtype=torch.float64).sin().reshape(32, 3)
Y = X.square().sum(1, keepdim=True)


class Norm(nn.BatchNorm1d):
    """A BatchNorm with one more buffer, which forward assigns."""

    def __init__(self):
        super().__init__(3)
        self.register_buffer("sums", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.sums = self.sums + x.detach().sum(0)
        return super().forward(x)


class Centered(nn.Module):
    """A loss that depends on the labels it has seen in training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(1))

    def forward(self, y_pred, y_true):
        if self.training:
            self.center.mul_(0.5).add_(y_true.mean(0))
        return (y_pred - y_true + self.center).square().mean()


def compiled(kind=minikeras.Model, **kwargs):
    seed()
    model = kind(nn.Sequential(Norm(), nn.Linear(3, 1))).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.compile(Centered().double(), optimizer, device="cpu", **kwargs)
    return model


def buffers_of(model):
    """Return copies of the buffers of a model and its loss."""
    return copy.deepcopy([*model.buffers(), *model._run.loss_func.buffers()])


def look(model):
    """Return outputs and loss of copies of this process's own model and loss."""
    own = copy.deepcopy(model.net).eval()
    loss_func = copy.deepcopy(model._run.loss_func).eval()
    with torch.no_grad():
        outputs = own(X)
        return [outputs, loss_func(outputs, Y)]


def call(model):
    """Return outputs and loss by the verbs."""
    loss = model.evaluate((X, Y), batch_size=4)["val_loss"]
    return [model.predict(X, batch_size=4), torch.tensor(loss, dtype=torch.float64)]


def buffers_inside_a_fit(size):
    """A callback calls evaluate and predict after a batch, or does not."""
    results = {}
    for calls in (True, False):
        model = compiled()
        found = {"buffers": [], "own": [], "called": []}

        def after_batch(batch, logs, model=model, found=found, calls=calls):
            if calls:
                found["own"].append(look(model))
                found["called"].append(call(model))
            found["buffers"].append(buffers_of(model))

        callback = minikeras.LambdaCallback(on_batch_end=after_batch)
        model.fit(2, (X, Y), batch_size=4, callbacks=[callback], verbose=0)
        results["calls" if calls else "none"] = {
            **found,
            "weights": list(model.state_dict().values()),
            "after": buffers_of(model),
        }
    return results


class Looking(minikeras.Model):
    """A model whose train_step evaluates it between forward and backward."""

    def train_step(self, features, labels):
        loss = self.compute_loss(self(features), labels)
        self.found.append(look(self))
        self.called.append(call(self))
        self.backward(loss)
        self.optimizer_step()
        return {"loss": loss}


def buffers_inside_a_step(size):
    """A custom step calls evaluate and predict before its backward."""
    model = compiled(Looking)
    model.found, model.called = [], []
    model.fit(1, (X, Y), batch_size=4, verbose=0)
    return {"own": model.found, "called": model.called}


def buffers_after_a_failed_fit(size):
    """A callback raises in all processes in the middle of an epoch."""
    model = compiled()

    def fail(batch, logs):
        if batch == 2:
            raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        callback = minikeras.LambdaCallback(on_batch_end=fail)
        model.fit(1, (X, Y), batch_size=4, callbacks=[callback], verbose=0)
    before = buffers_of(model)
    own = look(model)
    return {"before": before, "own": own, "called": call(model), "after": buffers_of(model)}


class Parts(IterableDataset):
    """Two batches in one process, and four in the others."""

    def __init__(self, short):
        self.count = 2 if short == RANK else 4

    def __iter__(self):
        for number in range(self.count):
            rows = slice(16 * RANK + 4 * number, 16 * RANK + 4 * number + 4)
            yield X[rows], Y[rows]


def buffers_of_fillers(size):
    """A process repeats its last batch until the other has no more."""
    results = []
    for short in range(size):
        for jit in (False, {"backend": "eager"}):
            model = compiled(jit=jit)
            data = Parts(short)
            bare = copy.deepcopy(model.net)
            loss_func = copy.deepcopy(model._run.loss_func)
            for features, labels in data:
                loss_func(bare(features), labels)
            found = []

            def after_batch(batch, logs, model=model, found=found):
                found[:] = buffers_of(model)

            callback = minikeras.LambdaCallback(on_batch_end=after_batch)
            loader = DataLoader(data, batch_size=None)
            model.fit(1, loader, callbacks=[callback], verbose=0)
            results.append(
                {
                    "expected": [*bare.buffers(), *loss_func.buffers()],
                    "found": found,
                    "after": buffers_of(model),
                }
            )
    return results
