"""Cases of metrics: means, torchmetrics objects and functions on all rows."""

import contextlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

import minikeras
from helpers.models import points
from helpers.ranks.common import (
    compiled,
    doubles,
    found,
)
from helpers.seeds import seed


def auroc(size):
    import torchmetrics

    seed()
    model = compiled()
    read = []
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


def transformed(size):
    """Metrics of all kinds that see a function of the outputs and labels."""
    from torchmetrics.classification import BinaryF1Score

    seed()
    metrics_dict = {
        "f1": minikeras.Transformed(BinaryF1Score(), torch.sqrt, torch.Tensor.long),
        "in_order": minikeras.Transformed(minikeras.OnAllRows(in_order), torch.exp),
        "mae": minikeras.Transformed(nn.L1Loss(), torch.exp),
    }
    model = compiled(metrics_dict=metrics_dict)
    return found(model, model.fit(2, doubles(61), doubles(33), batch_size=12 // size, verbose=0))


def in_order(y_pred, y_true):
    """Return a value that changes with the order of the rows."""
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
    """The same fit, interrupted within the second epoch and resumed."""
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
    """All processes raise; the first raises its own error."""

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


def accuracies(size):
    """Labels that do not count, on one process more than on another, and a short last batch."""
    seed()
    X, y = doubles(61)
    labels = (X[:, 0] > 0).long() + y[:, 0].long()
    labels[::3] = -100
    labels[:6] = -100
    model = compiled(
        minikeras.Model(nn.Linear(2, 3)),
        nn.CrossEntropyLoss(),
        metrics_dict={"accuracy": minikeras.accuracy},
    )
    return model.evaluate((X, labels), batch_size=12 // size)["val_accuracy"]


def batch_values(size):
    """Return for each batch the metric's own value, what the logs have, and the running mean."""
    seed()
    own = []
    seen = []

    def mean_label(y_pred, y_true):
        own.append(y_true.mean().item())
        return y_true.mean()

    def note(batch, logs):
        seen.append((own[-1], logs.batch["mean_label"], logs["mean_label"]))

    model = compiled(metrics_dict={"mean_label": mean_label})
    note_batches = minikeras.LambdaCallback(on_batch_end=note)
    # 61 rows: of the last step only the first process has a row
    model.fit(1, doubles(61), batch_size=12 // size, verbose=0, callbacks=[note_batches])
    return seen


def no_means(size):
    """Return the warnings: those of the first process alone."""
    import torchmetrics

    seed()

    def rmse(y_pred, y_true):
        return ((y_pred - y_true) ** 2).mean().sqrt()

    metrics = {"rmse": rmse, "mae": nn.L1Loss(), "f1": torchmetrics.classification.BinaryF1Score()}
    model = compiled(minikeras.Model(nn.Linear(2, 1)), nn.MSELoss(), metrics_dict=metrics)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(2, doubles(61), doubles(33), batch_size=12 // size, verbose=0)
    return {"said": [str(warning.message)[:40] for warning in caught]}


class Floating(nn.BCELoss):
    def forward(self, y_pred, y_true):
        return super().forward(y_pred, y_true.to(y_pred.dtype))
