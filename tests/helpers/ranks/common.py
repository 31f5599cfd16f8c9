"""What the cases of several processes share: data, models, and what each process returns."""

import os

import torch
from torch import nn
from torch.utils.data import (
    IterableDataset,
)

import minikeras
from helpers.datasets import Rows
from helpers.models import Net, accuracy, points
from helpers.seeds import seed
from minikeras.distributed import gradients

RANK = int(os.environ.get("RANK", "0"))


def own_step(model, features, labels):
    """Call the parts of the default step, as a custom train_step does."""
    outputs = model(features)
    loss = model.compute_loss(outputs, labels)
    model.backward(loss)
    metrics = model.compute_metrics(outputs, labels)
    model.optimizer_step()
    return {"loss": loss, **metrics}


if "BUCKET" in os.environ:
    gradients.SMALL_BUCKET = gradients.BUCKET = int(os.environ["BUCKET"])
if os.environ.get("STEP") == "own":
    Net.train_step = own_step


def doubles(rows):
    X, y = points(rows)
    return X.double(), y.double()


def row_by_row(rows):
    """Return a dataset that is not in memory."""
    return Rows(*doubles(rows))


def share(X, y):  # a metric over elements
    return minikeras.Average((X > 0.5).sum(), torch.tensor(X.numel()))


METRICS = {"accuracy": accuracy, "share": share}


def compiled(model=None, loss_func=None, optimizer=None, metrics_dict=METRICS, **kwargs):
    model = (Net() if model is None else model).double()
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.05)
    model.compile(loss_func or nn.BCELoss(), optimizer, metrics_dict, device="cpu", **kwargs)
    return model


def found(model, dfhistory, dl=None, **more):
    """Return what must be the same for any number of processes."""
    outputs = None if dl is None else model.predict(dl)
    return {
        "history": dfhistory.to_dict("list"),
        "weights": model.state_dict(),
        "outputs": outputs,
        **more,
    }


def fitted(train, val=None, epochs=2, **kwargs):
    # weights and orders are those of rank 0
    seed(os.getpid() % 1000 if os.environ.get("RANK", "0") != "0" else 0)
    model = compiled(**kwargs)
    return found(
        model,
        model.fit(epochs, train, val, verbose=0),
        val,
        evaluated=None if val is None else model.evaluate(val),
    )


class Two(minikeras.Model):
    """Two optimizers, and a step that calls parts of the model."""

    def __init__(self):
        super().__init__()
        self.g = nn.Linear(2, 2)
        self.d = nn.Linear(2, 1)

    def forward(self, x):
        return torch.sigmoid(self.d(self.g(x)))

    def train_step(self, features, labels):
        d_loss = self.compute_loss(torch.sigmoid(self.d(self.g(features).detach())), labels)
        self.backward(d_loss, "d")
        self.optimizer_step("d")
        g_loss = self.compute_loss(torch.sigmoid(self.d(self.g(features))), 1 - labels)
        self.backward(g_loss, "g")
        self.optimizer_step("g")
        return {"loss": d_loss, "g_loss": g_loss}


class Noisy(nn.Sequential):
    """A network whose noise and running means differ between ranks."""

    def __init__(self):
        super().__init__(
            nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1), nn.Sigmoid()
        )


class Uneven(IterableDataset):
    """A dataset with other rows in each rank, and different numbers of them."""

    parts = (0, 8), (8, 27)  # of 27 rows, in 2 and in 5 batches of 4

    def __iter__(self):
        X, y = doubles(27)
        rows = range(*self.parts[RANK])
        return iter([(X[row], y[row]) for row in rows])


def uneven_batches():
    """Return the same rows for one process, step by step."""
    steps = [
        [*range(4), *range(8, 12)],
        [*range(4, 8), *range(12, 16)],
        range(16, 20),
        range(20, 24),
        range(24, 27),
    ]
    X, y = doubles(27)
    return [(X[list(rows)], y[list(rows)]) for rows in steps]


def apart(size, number):
    """Return whether a number differs between ranks."""
    if size == 1:
        return False
    numbers = [None] * size
    torch.distributed.all_gather_object(numbers, number)
    return len(set(numbers)) > 1
