"""Cases in which the processes differ: in their rows, errors, files and random numbers."""

import os
import random
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

import minikeras
from helpers.compare import copy_weights
from helpers.models import Net
from helpers.ranks.common import (
    RANK,
    Noisy,
    Uneven,
    apart,
    compiled,
    doubles,
    found,
    row_by_row,
    uneven_batches,
)
from helpers.seeds import seed


class Spoiled(Net):
    """A buffer that becomes infinite by the rows of the last process, while each loss is finite."""

    def __init__(self):
        super().__init__()
        self.register_buffer("most", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        if self.training and bool((x[:, 0] == 7).any()):
            self.most.fill_(torch.inf)
        return super().forward(x)


def is_finite(model):
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def spoiled_on_one(size):
    """A buffer that is infinite in one process alone ends the fit in all, and reaches no file."""
    folder = Path(os.environ["FOLDER"], f"spoiled in {size}")
    X, y = doubles(36)
    X = X.clone()
    X[35] = 7
    results = {}
    for on_nan in ("raise", "stop", "ignore"):
        seed()
        model = compiled(Spoiled())
        path = folder / f"{on_nan}.pt"
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
            "finite": all(is_finite(other) for other in read),
        }
    return results


def one_file(size):
    """All processes agree whose checkpoint a file is, although their random states differ."""
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


def uneven(size):
    """Steps of 8, 8, 4, 4 and 3 rows."""
    seed()
    model = compiled()
    if size > 1:
        dfhistory = model.fit(2, DataLoader(Uneven(), 4), DataLoader(Uneven(), 4), verbose=0)
        return found(model, dfhistory)
    batches = uneven_batches()
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
    """All stop after the batch in which one sets stop_training."""
    seed()
    model = compiled()
    seen = []

    def stop(batch, logs):
        seen.append(batch)
        model.stop_training = batch == 3 and size - 1 == RANK

    callback = minikeras.LambdaCallback(on_batch_end=stop)
    dfhistory = model.fit(5, doubles(60), batch_size=12 // size, callbacks=[callback], verbose=0)
    return found(model, dfhistory, seen=seen)


def timer(size):
    """The clock of rank 0 ends the fit."""
    seed()
    model = compiled()
    stop = minikeras.Timer(0.2 if RANK == 0 else 10**9)
    dfhistory = model.fit(10**9, doubles(60), batch_size=12 // size, callbacks=[stop], verbose=0)
    return {"epochs": len(dfhistory) > 0, "equal": apart(size, len(dfhistory))}


def nan_on_one(size):
    """All processes raise before a weight moves."""
    seed()
    X, y = doubles(48)
    y = y.clone()
    y[24 + 17] = torch.nan  # in the part of the second process
    model = compiled(loss_func=nn.MSELoss())
    model.fit(1, doubles(24), batch_size=12 // size, verbose=0)
    before = copy_weights(model)
    loader = [(X[24:], y[24:])] if size == 1 else DataLoader(TensorDataset(X[24:], y[24:]), 12)
    try:
        model.fit(1, loader, verbose=0)
    except FloatingPointError as error:
        said = str(error)
    same = all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    mine = "another process" not in said
    return {"same": same, "mine": mine if size > 1 else RANK, "epochs": len(model.history)}


def dropout(size):
    """Each rank draws its own dropout masks."""
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
    """gather="main" and files are for rank 0 alone."""
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
    """A tracker's run, which rank 0 alone writes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from minikeras.integrations.tensorboard import TensorBoard

    seed()
    model = compiled()
    folder = Path(os.environ["FOLDER"], f"board of {size}")
    board = TensorBoard(folder, histograms=True)
    dfhistory = model.fit(2, doubles(24), batch_size=12 // size, callbacks=[board], verbose=0)
    files = len(list(folder.glob("events.*"))) if RANK == 0 else 1
    events = EventAccumulator(str(folder)).Reload() if RANK == 0 else None
    losses = (
        [point.value for point in events.Scalars("loss")] if events else list(dfhistory["loss"])
    )
    return {"files": files, "losses": torch.tensor(losses, dtype=torch.float32)}


def refused(size):
    """Return the errors of what several processes cannot do."""
    model = Net()
    said = []
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
    """Its first layer runs twice, and is recomputed in backward each time."""

    def forward(self, x):
        again = [checkpoint(self.fc1, x.requires_grad_(), use_reentrant=True) for _ in range(2)]
        return torch.sigmoid(self.fc2(torch.relu(sum(again))))


def told(size):
    """Return the warnings of what is different with several processes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(jit=True, steps_per_execution=4)
    said = [str(warning.message) for warning in caught]
    try:
        compiled(minikeras.Model(Noisy()), sync_batchnorm=True)
    except ValueError as error:
        said.append(str(error))
    for model, data in (
        (Noisy(), DataLoader(row_by_row(8), 1)),
        (nn.Linear(2, 1), DataLoader(row_by_row(5), 3, drop_last=True)),
    ):
        try:
            compiled(minikeras.Model(model)).fit(1, data, verbose=0)
        except ValueError as error:
            said.append(str(error))
    return said


class Mean:
    """A custom metric object."""

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
        "needs backward and step outside it" in str(warning.message) for warning in caught
    )
    return found(model, dfhistory)
