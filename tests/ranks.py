"""Fits that torchrun runs on several processes for test_distributed.py, and that one process runs with bigger batches.

    torchrun --nproc-per-node=2 ranks.py FOLDER CASE ...     each rank leaves FOLDER/CASE.RANK.pt

BUCKET=64 sends gradients in buckets of so many bytes, most while backward is at work; STEP=own makes a step of the
user's own of Net's, whose gradients are all sent when it calls optimizer_step.

A case is a function of the number of processes; what it returns, of plain values, is to be the same for all numbers.
"""

import contextlib
import json
import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from conftest import Net, accuracy, points
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
)

import minikeras
from minikeras.distributed import gradients


def own_step(model, features, labels):
    """The default step's parts, by the user."""
    outputs = model(features)
    loss = model.compute_loss(outputs, labels)
    model.backward(loss)
    metrics = model.compute_metrics(outputs, labels)
    model.optimizer_step()
    return {"loss": loss, **metrics}


gradients.BUCKET = int(os.environ.get("BUCKET", gradients.BUCKET))
if os.environ.get("STEP") == "own":
    Net.train_step = own_step


def seed(number=0):
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def doubles(rows):
    X, y = points(rows)
    return X.double(), y.double()


class Rows(Dataset):
    """Not in memory: read row by row."""

    def __init__(self, rows):
        self.X, self.y = doubles(rows)

    def __len__(self):
        return len(self.X)

    def __getitem__(self, row):
        return self.X[row], self.y[row]


def share(X, y):  # a metric over elements
    return minikeras.Average((X > 0.5).sum(), torch.tensor(X.numel()))


METRICS = {"accuracy": accuracy, "share": share}


def compiled(model=None, loss_func=None, optimizer=None, metrics_dict=METRICS, **kwargs):
    model = (Net() if model is None else model).double()
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.05)
    model.compile(loss_func or nn.BCELoss(), optimizer, metrics_dict, device="cpu", **kwargs)
    return model


def found(model, dfhistory, dl=None, **more):
    """What is to be the same."""
    outputs = None if dl is None else model.predict(dl)
    return {
        "history": dfhistory.to_dict("list"),
        "weights": model.state_dict(),
        "outputs": outputs,
        **more,
    }


def fitted(train, val=None, epochs=2, **kwargs):
    seed(
        os.getpid() % 1000 if os.environ.get("RANK", "0") != "0" else 0
    )  # weights and orders are those of rank 0
    model = compiled(**kwargs)
    return found(
        model,
        model.fit(epochs, train, val, verbose=0),
        val,
        evaluated=None if val is None else model.evaluate(val),
    )


# --- the same numbers -------------------------------------------------------------------------------------------------


def arrays(size):
    seed()
    model = compiled()
    dfhistory = model.fit(3, doubles(100), doubles(37), batch_size=12 // size, verbose=0)
    return found(model, dfhistory, doubles(37))


class Boxes(nn.Module):
    """Images of any size in a list; a dict for each in eval mode and not for the loss alone."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, images):
        return [
            {"score": self.fc(image.mean((1, 2))), "size": torch.tensor(image.shape)}
            for image in images
        ]


def box_loss(y_pred, y_true):
    scores = torch.stack([found["score"][0] for found in y_pred])
    return ((scores - torch.stack([found["value"] for found in y_true])) ** 2).mean()


def detection(size):
    """Lists of images and of dicts, and a list of dicts for the rows."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for row in range(29):
        image = torch.rand(3, 4 + row % 5, 5, generator=generator, dtype=torch.float64)
        rows.append((image, {"boxes": torch.zeros(1 + row % 4, 4), "value": image.sum() / 50}))
    data = DataLoader(
        rows, 12 // size, collate_fn=lambda found: tuple(map(list, zip(*found, strict=True)))
    )
    seed()
    model = compiled(minikeras.Model(Boxes()), box_loss, metrics_dict={"again": box_loss})
    return found(model, model.fit(2, data, data, verbose=0), data, evaluated=model.evaluate(data))


def loader_in_memory(size):
    train = DataLoader(TensorDataset(*doubles(100)), 12 // size, shuffle=True)
    return fitted(train, DataLoader(TensorDataset(*doubles(37)), 12 // size))


def loader_by_rows(size):
    return fitted(DataLoader(Rows(100), 12 // size, shuffle=True), DataLoader(Rows(37), 12 // size))


def loader_with_workers(size):
    train = DataLoader(Rows(100), 12 // size, shuffle=True, num_workers=2)
    return fitted(train, DataLoader(Rows(37), 12 // size, num_workers=1))


def persistent(size, epochs=3, **kwargs):
    """A fit whose workers live on from epoch to epoch."""
    train = DataLoader(Rows(40), 12 // size, shuffle=True, num_workers=2, persistent_workers=True)
    seed()
    model = compiled()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "dl_train has persistent_workers"
        )  # whose own draws are not in the file
        model.fit(epochs, train, verbose=0, **kwargs)
        return found(
            model, model.fit(1, train, verbose=0)
        )  # their seed is not drawn in a second fit either


def persistent_carried_on(size):
    """The same fit, broken off as its third epoch begins."""
    file = Path(os.environ["FOLDER"], f"run of {size}.pt")

    def fail(epoch):
        if epoch == 3:
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        persistent(size, checkpoint=file, callbacks=[minikeras.LambdaCallback(on_epoch_begin=fail)])
    return persistent(size, checkpoint=file)


def loader_with_a_generator(size):
    generator = torch.Generator().manual_seed(int(os.environ.get("RANK", "0")))
    return fitted(
        DataLoader(Rows(50), 12 // size, shuffle=True, generator=generator), drop(50, 12 // size)
    )


def drop(rows, batch):
    return DataLoader(Rows(rows), batch, drop_last=True)


def fewer_rows_than_processes(size):
    return fitted(DataLoader(Rows(5), 6 // size), DataLoader(TensorDataset(*doubles(1)), 6 // size))


def odd(size, world=None):
    """What hypothesis has drawn; one process is told of how many others it stands for."""
    return [odd_one(size, world or size, **case) for case in json.loads(os.environ["ODD"])]


def odd_one(size, world, kind, rows, val, batch, shuffle, drop_last):
    batch = batch * world // size
    try:
        if kind == "arrays":
            seed()
            model = compiled()
            return found(
                model,
                model.fit(2, doubles(rows), doubles(val), batch_size=batch, verbose=0),
                doubles(val),
            )
        data = Rows(rows) if kind == "rows" else TensorDataset(*doubles(rows))
        train = DataLoader(data, batch, shuffle, drop_last=drop_last)
        return fitted(train, DataLoader(Rows(val), batch))
    except ValueError as error:
        return {"error": str(error)}


def batch_sampler(size):
    seed()
    sampler = Pieces(60, 12 // size)
    model = compiled()
    return found(model, model.fit(2, DataLoader(Rows(60), batch_sampler=sampler), verbose=0))


def shared_out_by_the_user(size):
    """Samplers that know of the ranks, in a batch sampler or of a class of the user's."""
    seed()
    model, rank = compiled(), 0 if size == 1 else RANK
    by_batches = BatchSampler(
        DistributedSampler(range(48), size, rank, shuffle=False), 12 // size, False
    )
    model.fit(1, DataLoader(Rows(48), batch_sampler=by_batches), verbose=0)
    loader = DataLoader(Rows(48), 12 // size, sampler=Strided(48, size, rank))
    return found(model, model.fit(1, loader, verbose=0))


class Strided:
    def __init__(self, rows, size, rank):
        self.rows, self.num_replicas, self.rank = rows, size, rank

    def __len__(self):
        return self.rows // self.num_replicas

    def __iter__(self):
        return iter(range(self.rank, self.rows, self.num_replicas))


def odd_buffers(size):
    seed()
    model = Net()
    model.register_buffer("small", torch.tensor([1, 2, 3], dtype=torch.int16))
    model.register_buffer("one", torch.tensor(7, dtype=torch.uint16))
    model = compiled(model)
    return found(model, model.fit(1, doubles(24), batch_size=12 // size, verbose=0))


class Pieces:
    """A batch sampler of one's own."""

    def __init__(self, rows, batch):
        self.rows, self.batch = rows, batch

    def __len__(self):
        return self.rows // self.batch

    def __iter__(self):
        return iter([part.tolist() for part in torch.randperm(self.rows).split(self.batch)])


def list_of_batches(size):
    X, y = doubles(64)
    return fitted(list(zip(X.split(8 // size), y.split(8 // size), strict=True)), doubles(9))


def steps_per_epoch(size):
    seed()
    model = compiled()
    data = DataLoader(Rows(50), 12 // size, shuffle=True)
    return found(model, model.fit(4, data, steps_per_epoch=3, verbose=0))


class Two(minikeras.Model):
    """Two optimizers, and a step that calls parts of the model."""

    def __init__(self):
        super().__init__()
        self.g, self.d = nn.Linear(2, 2), nn.Linear(2, 1)

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


def two_optimizers(size):
    seed()
    model = Two().double()
    optimizers = {
        "g": torch.optim.Adam(model.g.parameters()),
        "d": torch.optim.SGD(model.d.parameters(), lr=0.1),
    }
    model = compiled(model, optimizer=optimizers, metrics_dict={})
    return found(model, model.fit(2, doubles(45), batch_size=12 // size, verbose=0))


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, y_pred, y_true):
        return nn.functional.binary_cross_entropy(y_pred, y_true) * self.scale.exp() + self.scale**2


def own_parameters(size):
    seed()
    model, loss = Net().double(), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    model = compiled(model, minikeras.Regularized(loss, model, l1=0.01, l2=0.01), optimizer)
    return found(
        model,
        model.fit(2, doubles(45), batch_size=12 // size, verbose=0),
        scale=loss.scale.detach(),
    )


class Sometimes(Net):
    """A layer that each process has in some batches only, and one that nobody has; penalties reach both."""

    def __init__(self):
        super().__init__()
        self.extra, self.unused = nn.Linear(2, 8), nn.Linear(8, 8)

    def forward(self, x):
        hidden = self.fc1(x) + (self.extra(x) if x.shape[0] % 2 else 0)
        return torch.sigmoid(self.fc2(torch.relu(hidden)))


def layers_that_come_and_go(size):
    """Weights are those of one process that takes the halves of each batch by themselves."""
    seed()
    model = Sometimes().double()
    model = compiled(
        model, minikeras.Regularized(nn.BCELoss(), model, l2=0.01), accumulate=2 // size
    )
    X, y = doubles(20)
    parts = [
        (X[start : start + rows], y[start : start + rows])
        for start, rows in ((0, 4), (4, 5), (9, 5), (14, 4))
    ]
    dfhistory = model.fit(2, parts, verbose=0)
    return found(model, dfhistory)


class Complex(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, dtype=torch.complex128) * (1 + 2j))

    def forward(self, x):
        return torch.sigmoid((x.to(self.weight.dtype) @ self.weight).abs())


def complex_weights(size):
    seed()
    model = Complex()
    model.compile(nn.BCELoss(), torch.optim.SGD(model.parameters(), lr=0.1), device="cpu")
    return found(model, model.fit(2, doubles(45), batch_size=12 // size, verbose=0))


def big_steps(size):
    seed()
    model = compiled(accumulate=2, clip_grad_norm=0.1)
    return found(model, model.fit(2, doubles(61), batch_size=12 // size, verbose=0))


def auroc(size):
    import torchmetrics

    seed()
    model, read = compiled(), []
    callback = minikeras.LambdaCallback(
        on_batch_end=lambda batch, logs: read.append(float(logs["auroc"]))
    )
    data, val = ((doubles(rows)[0], points(rows)[1].long()) for rows in (61, 33))
    model.compile(
        Floating(), model.optimizer, {"auroc": torchmetrics.AUROC("binary")}, device="cpu"
    )
    dfhistory = model.fit(2, data, val, batch_size=12 // size, verbose=0, callbacks=[callback])
    assert len(read) == 12, read
    return found(model, dfhistory)


def collection(size):
    import torchmetrics
    from torchmetrics.classification import BinaryF1Score, BinaryPrecision

    seed()
    model = compiled()
    data, val = ((doubles(rows)[0], points(rows)[1].long()) for rows in (61, 33))
    scores = torchmetrics.MetricCollection([BinaryF1Score(), BinaryPrecision()], prefix="of_")
    model.compile(Floating(), model.optimizer, {"scores": scores}, device="cpu")
    return found(model, model.fit(2, data, val, batch_size=12 // size, verbose=0))


def in_order(y_pred, y_true):
    """A value that changes with the order of the rows."""
    numbers = np.arange(1, len(y_pred) + 1)[:, None]
    return float((y_pred * numbers).sum() + (y_true * numbers).sum())


def several(y_pred, y_true):
    return {
        "rmse": ((y_pred - y_true) ** 2).mean() ** 0.5,
        "rows": len(y_pred),
        "vector": y_pred[:2, 0],
    }


def on_all_rows(size):
    seed()
    metrics = {"in_order": minikeras.OnAllRows(in_order), "of": minikeras.OnAllRows(several)}
    model = compiled(metrics_dict=metrics)
    dfhistory = model.fit(2, doubles(61), doubles(1), batch_size=12 // size, verbose=0)
    return found(model, dfhistory, evaluated=model.evaluate(doubles(5), batch_size=12 // size))


def on_all_rows_carried_on(size):
    """The same, broken off within the second epoch."""
    file = Path(os.environ["FOLDER"], f"all rows of {size}.pt")
    batches = []

    def fail(batch, logs):
        batches.append(batch)
        if len(batches) == 9:
            raise InterruptedError

    kwargs = {"batch_size": 12 // size, "checkpoint": file, "checkpoint_every": 1, "verbose": 0}
    for callbacks in ([minikeras.LambdaCallback(on_batch_end=fail)], []):
        seed()
        model = compiled(metrics_dict={"in_order": minikeras.OnAllRows(in_order)})
        with contextlib.suppress(InterruptedError):
            dfhistory = model.fit(3, doubles(61), callbacks=callbacks, **kwargs)
    return found(model, dfhistory)


def on_all_rows_fails(size):
    """All processes hear of it; the first has its own error."""

    def fail(y_pred, y_true):
        raise ZeroDivisionError("no rows of this kind")

    model = compiled(metrics_dict={"m": minikeras.OnAllRows(fail)})
    try:
        model.evaluate(doubles(20))
    except (RuntimeError, ZeroDivisionError) as error:
        return {"said": f"{type(error).__name__}: {error} {error.__notes__[-2]}"}


def per_class(size):
    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassF1Score

    seed()
    X, y = doubles(61)
    labels = (X[:, 0] > 0).long() + y[:, 0].long()
    metrics = {"f1": MulticlassF1Score(3, average=None), "cells": MulticlassConfusionMatrix(3)}
    model = compiled(minikeras.Model(nn.Linear(2, 3)), nn.CrossEntropyLoss(), metrics_dict=metrics)
    return found(
        model, model.fit(2, (X, labels), (X[:33], labels[:33]), batch_size=12 // size, verbose=0)
    )


def no_means(size):
    """What the processes warn of: the first alone."""
    import torchmetrics

    seed()

    def rmse(y_pred, y_true):
        return ((y_pred - y_true) ** 2).mean().sqrt()

    metrics = {"rmse": rmse, "mae": nn.L1Loss(), "f1": torchmetrics.classification.BinaryF1Score()}
    model = compiled(minikeras.Model(nn.Linear(2, 1)), nn.MSELoss(), metrics_dict=metrics)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(2, doubles(61), doubles(33), batch_size=12 // size, verbose=0)
    return {"said": [str(one.message)[:40] for one in caught]}


class Floating(nn.BCELoss):
    def forward(self, y_pred, y_true):
        return super().forward(y_pred, y_true.to(y_pred.dtype))


# --- rows, steps and modes --------------------------------------------------------------------------------------------


def samplers_by_epoch(size):
    """A DistributedSampler of the user's own gets each epoch's number, and its rows are not shared out once more."""
    seed()
    model, rank = compiled(), 0 if size == 1 else RANK
    for dataset in (Rows(48), TensorDataset(*doubles(48))):
        sampler = DistributedSampler(dataset, size, rank, seed=5)
        val = DistributedSampler(dataset, size, rank, shuffle=False)
        loaders = [DataLoader(dataset, 12 // size, sampler=part) for part in (sampler, val)]
        dfhistory = model.fit(2, *loaders, verbose=0)
        assert sampler.epoch == val.epoch == len(dfhistory) - 1
    return found(model, dfhistory)


def some_steps(size):
    """validation_steps and steps count the steps of all processes; rows after them are not looked at."""
    seed()
    model = compiled()
    train = DataLoader(Rows(50), 12 // size, shuffle=True)
    for val in (
        DataLoader(Rows(37), 12 // size),
        DataLoader(TensorDataset(*doubles(37)), 12 // size),
    ):
        model.fit(2, train, val, steps_per_epoch=3, validation_steps=2, verbose=0)
    beyond = doubles(30)
    beyond[0][24:] = torch.nan
    evaluated = model.evaluate(beyond, batch_size=12 // size, steps=2)
    assert evaluated["val_loss"] < 10
    predicted = [model.predict(beyond, batch_size=12 // size, steps=steps) for steps in (2, 9)]
    assert [len(outputs) for outputs in predicted] == [24, 30]
    return found(model, model.history, evaluated=evaluated, predicted=predicted)


def in_eval_mode(size):
    """Layers that are in eval mode as the fit begins stay there in each process, with their running means."""
    seed()
    model = compiled(minikeras.Model(Noisy()))
    model.net[1].eval()
    model.net[2].eval()
    dfhistory = model.fit(2, doubles(45), doubles(13), batch_size=12 // size, verbose=0)
    assert not model.net[1].training
    assert model.net[0].training
    return found(model, dfhistory, doubles(13))


class TimeFirst(minikeras.Model):
    """Features of shape (time, rows, 2), beside a table of 7 numbers for all rows."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, x):
        return {"score": torch.sigmoid(self.fc(x["steps"].mean(0) + x["table"].mean()))}


def score_loss(y_pred, y_true):
    return nn.functional.binary_cross_entropy(y_pred["score"], y_true["label"])


def time_first(rows):
    steps = [features * torch.arange(1, 4)[:, None] for features, _ in rows]
    labels = [label for _, label in rows]
    return {"steps": torch.stack(steps, 1), "table": torch.ones(7)}, {"label": torch.stack(labels)}


def nests(size):
    """Rows are counted from the labels in a dict, and neither time nor a table is taken for them."""
    seed()
    model = compiled(TimeFirst(), score_loss, metrics_dict={"again": score_loss})
    train, val = (DataLoader(Rows(rows), 12 // size, collate_fn=time_first) for rows in (41, 29))
    return found(model, model.fit(2, train, val, verbose=0), val, evaluated=model.evaluate(val))


def fetched_rows(size):
    """Features read batch by batch: a DataFrame of two dtypes, a sparse matrix, an array that goes backward."""
    import pandas as pd
    import scipy.sparse

    X, y = (part.numpy() for part in doubles(41))
    table = pd.DataFrame({"a": X[:, 0], "b": X[:, 1].astype("float32")})
    results = []
    for features in (table, scipy.sparse.csr_matrix(X), X[::-1]):
        seed()
        torch.set_default_dtype(torch.float64)
        model = compiled()
        dfhistory = model.fit(2, (features, y), (features, y), batch_size=12 // size, verbose=0)
        results.append(found(model, dfhistory))
        torch.set_default_dtype(torch.float32)
    return results


class Summed(Net):
    """Rows of the features become those of the labels."""

    def forward(self, x):
        return super().forward(x).mean().expand(6, 1)


def total_loss(y_pred, y_true):
    losses = nn.functional.binary_cross_entropy(y_pred, y_true, reduction="none")
    return minikeras.Average(losses.sum(), losses.numel())


class WithTable(Net):
    def forward(self, x):
        return super().forward(x["x"]), x["table"]


def rows_unknown_on_one(size):
    """The last process cannot count the rows of its batches: an Average needs none, and all hear it from predict."""
    seed()
    model = compiled(Summed(), total_loss, metrics_dict={}, accumulate=2 // size)
    X, y = doubles(24)
    batches = [(X[:6], y[:6]), (X[6:11], y[6:12]), (X[12:18], y[12:18]), (X[18:23], y[18:24])]
    dfhistory = model.fit(2, batches, verbose=0)
    other = compiled(WithTable(), metrics_dict={})
    tables = [{"x": X[:6], "table": X[:rows, 0]} for rows in (6, 6, 6, 5)]
    try:
        other.predict(tables)
    except ValueError as error:
        said = str(error)
    return found(model, dfhistory, said=said)


class Spoiled(Net):
    """A buffer that becomes infinite by the rows of the last process, while each loss is finite."""

    def __init__(self):
        super().__init__()
        self.register_buffer("most", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        if self.training and bool((x[:, 0] == 7).any()):
            self.most.fill_(torch.inf)
        return super().forward(x)


def spoiled_on_one(size):
    """A buffer that is infinite in one process alone ends the fit in all, and reaches no file."""
    folder = Path(os.environ["FOLDER"], f"spoiled in {size}")
    X, y = doubles(36)
    X = X.clone()
    X[35] = 7
    results = {}
    for on_nan in ("raise", "stop", "ignore"):
        seed()
        model, path = compiled(Spoiled()), folder / f"{on_nan}.pt"
        loader = DataLoader(TensorDataset(X, y), 12 // size)
        callbacks = [minikeras.ModelCheckpoint(folder / f"{on_nan}_weights.pt")]
        ended = ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                model.fit(1, loader, callbacks=callbacks, checkpoint=path, on_nan=on_nan, verbose=0)
            except FloatingPointError as error:
                ended = str(error)
        said = [str(warning.message) for warning in caught] + [ended]
        files = [path, folder / f"{on_nan}_weights.pt"]
        there = [file for file in files if file.exists()]
        read = [Spoiled().double() for _ in there]
        for other, file in zip(read, there, strict=True):
            other.load(file)
        results[on_nan] = {
            "epochs": len(model.history),
            "files": [file in there for file in files],
            "mine": any("most is NaN" in text or "most would be" in text for text in said),
            "told": any("another process" in text for text in said),
            "finite": all(
                bool(tensor.isfinite().all())
                for other in read
                for tensor in other.state_dict().values()
            ),
        }
    return results


def one_file(size):
    """All processes agree of whom a file is, although each has random states of its own."""
    said = []
    for number in (0, 0, 1):  # the second is the first one begun again
        seed(number)
        if RANK > 0:
            np.random.seed()
        model = compiled()
        file = Path(os.environ["FOLDER"], f"one file of {size}.pt")
        for path in (file, file / "below.pt"):
            try:
                model.fit(1, doubles(24), batch_size=12 // size, verbose=0, checkpoint=path)
                said.append("trained")
            except (minikeras.CheckpointError, OSError, RuntimeError) as error:
                said.append("another fit" if "another fit" in str(error) else "refused")
    return {"said": said}


# --- ranks that differ ------------------------------------------------------------------------------------------------

RANK = int(os.environ.get("RANK", "0"))


class Uneven(IterableDataset):
    """Each rank its own rows, of different numbers."""

    parts = (0, 8), (8, 27)  # of 27 rows, in 2 and in 5 batches of 4

    def __iter__(self):
        X, y = doubles(27)
        rows = range(*self.parts[RANK])
        return iter([(X[row], y[row]) for row in rows])


def uneven(size):
    """Steps of 8, 8, 4, 4 and 3 rows."""
    seed()
    model = compiled()
    if size > 1:
        dfhistory = model.fit(2, DataLoader(Uneven(), 4), DataLoader(Uneven(), 4), verbose=0)
        return found(model, dfhistory)
    steps = [
        [*range(4), *range(8, 12)],
        [*range(4, 8), *range(12, 16)],
        range(16, 20),
        range(20, 24),
        range(24, 27),
    ]
    X, y = doubles(27)
    batches = [(X[list(rows)], y[list(rows)]) for rows in steps]
    return found(model, model.fit(2, batches, batches, verbose=0))


def early_stopping(size):
    seed()
    model = compiled(optimizer=None)
    stop = minikeras.EarlyStopping(
        "val_loss", patience=2, min_delta=0.02, restore_best_weights=True
    )
    dfhistory = model.fit(
        50, doubles(60), doubles(30), batch_size=12 // size, callbacks=[stop], verbose=0
    )
    assert len(dfhistory) < 50
    return found(model, dfhistory)


def one_rank_stops(size):
    """After the batch in which one of them says so."""
    seed()
    model, seen = compiled(), []

    def stop(batch, logs):
        seen.append(batch)
        model.stop_training = batch == 3 and size - 1 == RANK

    callback = minikeras.LambdaCallback(on_batch_end=stop)
    dfhistory = model.fit(5, doubles(60), batch_size=12 // size, callbacks=[callback], verbose=0)
    return found(model, dfhistory, seen=seen)


def timer(size):
    """The clock of rank 0."""
    seed()
    model = compiled()
    stop = minikeras.Timer(0.2 if RANK == 0 else 10**9)
    dfhistory = model.fit(10**9, doubles(60), batch_size=12 // size, callbacks=[stop], verbose=0)
    return {"epochs": len(dfhistory) > 0, "equal": apart(size, len(dfhistory))}


def apart(size, number):
    """Whether a number differs between ranks."""
    if size == 1:
        return False
    numbers = [None] * size
    torch.distributed.all_gather_object(numbers, number)
    return len(set(numbers)) > 1


def nan_on_one(size):
    """All raise, before a weight moves."""
    seed()
    X, y = doubles(48)
    y = y.clone()
    y[24 + 17] = torch.nan  # in the part of the second process
    model = compiled(loss_func=nn.MSELoss())
    model.fit(1, doubles(24), batch_size=12 // size, verbose=0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    loader = [(X[24:], y[24:])] if size == 1 else DataLoader(TensorDataset(X[24:], y[24:]), 12)
    try:
        model.fit(1, loader, verbose=0)
    except FloatingPointError as error:
        said = str(error)
    same = all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    mine = "another process" not in said
    return {"same": same, "mine": mine if size > 1 else RANK, "epochs": len(model.history)}


def dropout(size):
    """Each rank draws its own."""
    seed()
    model = compiled(
        minikeras.Model(
            nn.Sequential(nn.Linear(2, 64), nn.Dropout(), nn.Linear(64, 1), nn.Sigmoid())
        )
    )
    masks = []
    model.net[1].register_forward_hook(
        lambda layer, inputs, output: masks.append(float((output == 0).sum()))
    )
    one = torch.ones(24, 2, dtype=torch.float64), torch.ones(24, 1, dtype=torch.float64)
    model.fit(1, one, batch_size=12 // size, verbose=0)
    drawn = torch.rand(()).item(), np.random.rand(), random.random()
    return {"masks": apart(size, sum(masks)) or size == 1, "drawn": apart(size, drawn)}


def main_alone(size):
    """gather="main" and files: rank 0's."""
    seed()
    model = compiled()
    folder = Path(os.environ["FOLDER"], str(size))
    log = minikeras.CSVLogger(folder / "log.csv")
    save = minikeras.ModelCheckpoint(folder / "{epoch}.pt")
    model.fit(2, doubles(24), batch_size=12 // size, callbacks=[log, save], verbose=0)
    outputs = model.predict(doubles(9), gather="main")
    assert RANK == 0 or outputs is None
    assert model.is_main_process == (RANK == 0)
    model.save(folder / "weights.pt")
    model.export(folder / f"{RANK}.pt2", doubles(2)[0])
    return {"outputs": outputs} if RANK == 0 else {}


def tracked(size):
    """A run that rank 0 alone writes; what is in it is all that is there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from minikeras.integrations.tensorboard import TensorBoard

    seed()
    model, folder = compiled(), Path(os.environ["FOLDER"], f"board of {size}")
    board = TensorBoard(folder, histograms=True)
    dfhistory = model.fit(2, doubles(24), batch_size=12 // size, callbacks=[board], verbose=0)
    files = len(list(folder.glob("events.*"))) if RANK == 0 else 1
    events = EventAccumulator(str(folder)).Reload() if RANK == 0 else None
    losses = (
        [point.value for point in events.Scalars("loss")] if events else list(dfhistory["loss"])
    )
    return {"files": files, "losses": torch.tensor(losses, dtype=torch.float32)}


def refused(size):
    """The messages of what cannot be had."""
    model, said = Net(), []
    for loss, metrics in ((nn.BCELoss(reduction="sum"), {}), (nn.BCELoss(), {"mean": Mean()})):
        try:
            model.compile(loss, metrics_dict=metrics)
        except (ValueError, TypeError) as error:
            said.append(str(error))
    model = compiled(Bare())
    try:
        model.fit(1, doubles(8), verbose=0)
    except RuntimeError as error:
        said.append(str(error))
    model = compiled(Again())
    try:
        model.fit(1, doubles(8), verbose=0)
    except RuntimeError as error:
        said.append(str(error))
    model = compiled()
    for data in (doubles(8 + RANK), [doubles(4)] * (1 + RANK)):
        try:
            model.fit(1, data, verbose=0)
        except ValueError as error:
            said.append(str(error))
    return {"said": said}


class Again(Net):
    """Its first layer is gone through twice, and computed anew in backward each time."""

    def forward(self, x):
        again = [checkpoint(self.fc1, x.requires_grad_(), use_reentrant=True) for _ in range(2)]
        return torch.sigmoid(self.fc2(torch.relu(sum(again))))


def told(size):
    """The messages of what is other with several processes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(jit=True, steps_per_execution=4)
    said = [str(one.message) for one in caught]
    try:
        compiled(minikeras.Model(Noisy()), sync_batchnorm=True)
    except ValueError as error:
        said.append(str(error))
    for model, data in (
        (Noisy(), DataLoader(Rows(8), 1)),
        (nn.Linear(2, 1), DataLoader(Rows(5), 3, drop_last=True)),
    ):
        try:
            compiled(minikeras.Model(model)).fit(1, data, verbose=0)
        except ValueError as error:
            said.append(str(error))
    return said


class Mean:
    """A metric object of one's own."""

    def update(self, outputs, labels): ...
    def compute(self): ...
    def reset(self): ...


class Bare(Net):
    def train_step(self, features, labels):
        self.compute_loss(self(features), labels).backward()


def jit(size):
    seed()
    model = compiled(jit={"backend": "eager"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dfhistory = model.fit(2, doubles(61), doubles(13), batch_size=12 // size, verbose=0)
    assert size == 1 or any(
        "needs backward and step outside it" in str(one.message) for one in caught
    )
    return found(model, dfhistory)


# --- broken off and carried on ----------------------------------------------------------------------------------------


def carried_on(size, file=True, workers=None):
    """A fit whose file is in FOLDER; KILL is "RANK SIGNAL EPOCH BATCH", for the first start of several by torchrun."""
    seed(RANK)
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    rank, number, epoch, batch = map(int, os.environ.get("KILL", "-1 0 0 0").split())
    model, at = compiled(Net() if "PLAIN" in os.environ else minikeras.Model(Noisy())), [0]

    def kill(done, logs):
        if rank == RANK and (at[0], done) == (epoch, batch) and not again:
            os.kill(os.getpid(), number)

    callback = minikeras.LambdaCallback(
        on_epoch_begin=lambda epoch: at.__setitem__(0, epoch), on_batch_end=kill
    )
    workers = int(os.environ.get("WORKERS", "0")) if workers is None else workers
    train = DataLoader(Rows(64), 12 // size, shuffle=True, num_workers=workers)
    more = (
        {"checkpoint": Path(os.environ["FOLDER"], "run.pt"), "checkpoint_every": 2} if file else {}
    )
    return found(model, model.fit(3, train, doubles(20), callbacks=[callback], verbose=0, **more))


class Noisy(nn.Sequential):
    """Each rank has its own noise and running means."""

    def __init__(self):
        super().__init__(
            nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1), nn.Sigmoid()
        )


def whole(size):
    return carried_on(size, file=False)


def whole_with_a_worker(size):
    return carried_on(size, file=False, workers=1)


def raising(size):
    """One rank fails in the middle of an epoch."""
    model = compiled()

    def fail(batch, logs):
        if RANK == 1 and batch == 2:
            raise ValueError("this is the cause")

    fails = minikeras.LambdaCallback(on_batch_end=fail)
    model.fit(5, doubles(60), batch_size=4, callbacks=[fails], verbose=0)


CASES = {
    name: case
    for name, case in list(globals().items())
    if callable(case) and case.__module__ == __name__
}


def main(folder, names):
    size, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    for name in names:
        torch.save(CASES[name](size), Path(folder, f"{name}.{rank}.pt"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
