"""Cases of rows, steps and modes."""

import contextlib

import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    TensorDataset,
)

import minikeras
from helpers.compare import copy_weights
from helpers.models import Net
from helpers.ranks.common import RANK, Noisy, compiled, doubles, found, row_by_row
from helpers.seeds import seed


def samplers_by_epoch(size):
    """A DistributedSampler of the user gets each epoch's number and is not split once more."""
    seed()
    model = compiled()
    rank = 0 if size == 1 else RANK
    for dataset in (row_by_row(48), TensorDataset(*doubles(48))):
        sampler = DistributedSampler(dataset, size, rank, seed=5)
        val = DistributedSampler(dataset, size, rank, shuffle=False)
        loaders = [DataLoader(dataset, 12 // size, sampler=part) for part in (sampler, val)]
        dfhistory = model.fit(2, *loaders, verbose=0)
        assert sampler.epoch == val.epoch == len(dfhistory) - 1
    return found(model, dfhistory)


def some_steps(size):
    """validation_steps and steps count the steps of all processes; later rows are not used."""
    seed()
    model = compiled()
    train = DataLoader(row_by_row(50), 12 // size, shuffle=True)
    for val in (
        DataLoader(row_by_row(37), 12 // size),
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
    """Layers in eval mode when the fit begins stay there in each process, with their statistics."""
    seed()
    model = compiled(minikeras.Model(Noisy()))
    model.net[1].eval()
    model.net[2].eval()
    dfhistory = model.fit(2, doubles(45), doubles(13), batch_size=12 // size, verbose=0)
    assert not model.net[1].training
    assert model.net[0].training
    return found(model, dfhistory, doubles(13))


def frozen(size):
    """A frozen part has no gradient in any process, and one that a callback unfreezes has one.

    Momentum and weight decay do not move what is frozen.
    """
    seed()
    block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    net = nn.Sequential(nn.Linear(2, 8), block, nn.Linear(8, 1), nn.Sigmoid())
    block[1].running_mean.fill_(0.1)
    minikeras.freeze(block)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model = compiled(minikeras.Model(net), optimizer=optimizer)
    model.fit(1, doubles(45), batch_size=12 // size, verbose=0)
    minikeras.freeze(net[0])
    before = copy_weights(net)

    def unfreeze(epoch):
        if epoch == 3:
            minikeras.unfreeze(block[0])

    callbacks = [minikeras.LambdaCallback(on_epoch_begin=unfreeze)]
    dfhistory = model.fit(
        2, doubles(45), doubles(13), batch_size=12 // size, callbacks=callbacks, verbose=0
    )
    moved = [name for name, value in net.state_dict().items() if not value.equal(before[name])]
    assert moved == ["1.0.weight", "1.0.bias", "2.weight", "2.bias"]
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
    """Rows are counted by the labels in a dict, and not by time or a table."""
    seed()
    model = compiled(TimeFirst(), score_loss, metrics_dict={"again": score_loss})
    train, val = (
        DataLoader(row_by_row(rows), 12 // size, collate_fn=time_first) for rows in (41, 29)
    )
    return found(model, model.fit(2, train, val, verbose=0), val, evaluated=model.evaluate(val))


def learning_rates(size):
    """The range test, over batches whose last has fewer rows for some; nothing of it stays."""
    X, y = doubles(27)
    seed()
    model = compiled(accumulate=2)
    found = model.lr_find((X, y), 1e-3, 1e3, 40, batch_size=12 // size)
    with contextlib.redirect_stdout(None):
        model.diagnose((X, y), steps=5, batch_size=12 // size)
    dfhistory = model.fit(1, (X, y), batch_size=12 // size, verbose=0)
    return {
        "curve": found.to_dataframe().to_dict("list"),
        "suggestion": found.suggestion,
        "diverges_at": found.diverges_at,
        "history": dfhistory.to_dict("list"),
    }


def split_batches(size):
    """Dicts with the labels inside, of which the last step has fewer than there are processes."""
    X, y = doubles(27)
    pairs = zip(X.split(12 // size), y.split(12 // size), strict=True)
    batches = [{"x": x, "labels": labels} for x, labels in pairs]

    def split(batch):
        return batch["x"], batch["labels"]

    seed()
    model = compiled(split_batch=split, accumulate=2)
    dfhistory = model.fit(2, batches, batches, verbose=0)
    outputs, labels = model.predict(batches, return_labels=True)
    assert torch.equal(labels, y)
    pieces, labels_of_each = model.predict(batches, join=False, return_labels=True)
    assert [len(piece) for piece in pieces] == [len(batch["x"]) for batch in batches]
    assert torch.equal(torch.cat(pieces), outputs)
    assert torch.equal(torch.cat(labels_of_each), y)
    nothing = model.predict(batches, gather="main", return_labels=True)
    assert RANK == 0 or nothing == (None, None)
    shuffled = DataLoader(row_by_row(27), 12 // size, shuffle=True)
    same = minikeras.Model(nn.Identity())
    same.compile(nn.MSELoss(), device="cpu")
    rows, labels = same.predict(shuffled, return_labels=True)
    assert torch.equal(labels, (rows.norm(dim=1, keepdim=True) > 1).double())
    assert not torch.equal(rows, X)
    return found(model, dfhistory, batches, evaluated=model.evaluate(batches), labels=labels)


def fetched_rows(size):
    """Features read by batch: a DataFrame of two dtypes, a sparse matrix, a reversed array."""
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
    """The last process cannot count its rows: an Average needs none; predict raises on all."""
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
