"""How often processes agree in a fit, and what stops all of them after the same batch."""

import os
import signal
import threading
import time
import warnings
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import minikeras
from helpers.compare import copy_weights
from helpers.datasets import Rows
from helpers.models import Net, points
from helpers.ranks.common import RANK
from helpers.seeds import seed
from minikeras.distributed import channel, gradients, together

X, Y = points(400)
STEPS = 50  # of an epoch


def compiled(**kwargs):
    seed()
    model = minikeras.Model(Net())
    model.compile(nn.BCELoss(), torch.optim.Adam(model.parameters()), device="cpu", **kwargs)
    return model


def fit(model, epochs=2, **kwargs):
    model.fit(epochs, (X, Y), batch_size=4, verbose=0, **kwargs)


def count_messages(size, **kwargs):
    """Return the small messages of a fit of 2 epochs."""
    model = compiled()
    fit(model)
    channel = model._run.world.channel
    before = channel.messages
    fit(model, **kwargs)
    return channel.messages - before


def agreements(size):
    """Messages of a fit: with a callback for batches, without one, and with slow validation."""
    each = minikeras.LambdaCallback(on_batch_end=lambda batch, logs: None)
    on_one = [each] if RANK else []
    counts = {"each": count_messages(size, callbacks=[each])}
    counts["each on one"] = count_messages(size, callbacks=on_one)
    counts["none"] = count_messages(size)
    together.INTERVAL = 1e9  # every batch is fast
    counts["validation"] = count_messages(size, dl_val=(X, Y))
    together.INTERVAL = 1e-9
    counts["slow validation"] = count_messages(size, dl_val=(X, Y))
    together.INTERVAL = 0.5
    return counts


def stopped_by_a_layer(size, **kwargs):
    """A layer of one process sets stop_training: all stop after the same batch."""
    model = compiled(**kwargs)
    batches = []

    def stop(layer, inputs, output):
        batches.append(len(inputs))
        if RANK and len(batches) == 3:
            model.stop_training = True

    model.net.register_forward_hook(stop)
    together.INTERVAL = 1e-9  # every batch is slow
    fit(model, 1000)
    together.INTERVAL = 0.5
    return [len(batches), len(model.history), model.stop_training, copy_weights(model)]


def stopped_before_a_step(size):
    """The same while gradients wait for the epoch's only step."""
    return stopped_by_a_layer(size, accumulate=1000)


def stopped_at_an_epoch_end(size):
    """One process sets stop_training as an epoch ends, with an agreement on its way."""
    model = compiled()
    waiting = []

    def look(layer, inputs, output):
        waiting.append(model._run.world.channel.begun is not None)

    def stop(epoch, logs):
        model.stop_training = bool(RANK) and epoch == 2

    model.net.register_forward_hook(look)
    together.INTERVAL = 1e-9  # every batch is slow: an agreement after each, in validation
    fit(model, 5, dl_val=(X, Y), callbacks=[minikeras.LambdaCallback(on_epoch_end=stop)])
    together.INTERVAL = 0.5
    return [len(model.history), sum(waiting), copy_weights(model)]


class Signalling(Rows):
    """Rows; reading one of them sends SIGTERM to the process that reads it, once."""

    def __init__(self, row):
        super().__init__(X, Y)
        self.row = row

    def __getitem__(self, row):
        time.sleep(1e-4)
        if row == self.row:
            self.row = None
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(row)


def signalled(size):
    """SIGTERM in one process, between two agreements: all save at one place and resume there."""
    results = {}
    for name, row in (("whole", None), ("resumed", 203)):
        model = compiled()
        loader = DataLoader(Signalling(row), 4, shuffle=True)
        path = Path(os.environ["FOLDER"], f"signalled {name}.pt")
        ended = []
        while True:
            try:
                model.fit(2, loader, checkpoint=path, verbose=0)
                break
            except SystemExit as error:
                ended.append(error.code)
            if len(model.history) == 2:  # the signal came when all was done
                break
        results[name] = [copy_weights(model), model.history.to_dict("list")]
        results[f"{name} ended"] = ended
    return results


def caught(size):
    """One process catches its own error: what the other says, which waits for gradients."""
    count = 0

    def loss_func(y_pred, y_true):
        nonlocal count
        count += 1
        if RANK and count == 3:
            raise ValueError("loss of mine")
        return (y_pred - y_true).square().mean()

    seed()
    model = minikeras.Model(Net())
    model.compile(loss_func, torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    said = []
    for _ in range(2):
        try:
            fit(model)
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def warned(call):
    """Return what a call warns of, where waiting for 2 s is long."""
    long_wait = channel.LONG_WAIT
    channel.LONG_WAIT = 2.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    channel.LONG_WAIT = long_wait
    return [str(warning.message) for warning in caught]


def late(size):
    """One process comes late to the first call of all: what each warns of."""
    model = compiled()
    if RANK:
        time.sleep(4)
    return warned(lambda: fit(model))


def slow(size):
    """One process works for long in a callback: what each warns of."""
    model = compiled()

    def work(epoch, logs):
        if RANK:
            time.sleep(4)

    return warned(lambda: fit(model, callbacks=[minikeras.LambdaCallback(on_epoch_end=work)]))


def freed(size):
    """How many of 500 small messages, sums and gradients another thread than this one frees."""
    threads = []

    def noted(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            weakref.finalize(made, lambda: threads.append(threading.get_ident())).atexit = False
            return made

        return call

    def count_others():
        count = sum(thread != threading.get_ident() for thread in threads)
        threads.clear()
        return count

    seed()
    wide = nn.Sequential(nn.Linear(2, 100), nn.Linear(100, 100), nn.Linear(100, 1), nn.Sigmoid())
    model = minikeras.Model(wide)  # its gradients are too many to be kept as a small message
    model.compile(nn.BCELoss(), torch.optim.Adam(model.parameters()), device="cpu")
    fit(model)
    world = model._run.world
    found = {}
    with mock.patch.object(np, "zeros", noted(np.zeros)):
        for _ in range(500):
            world.agree(1.0)
    found["small"] = count_others()
    for _ in range(500):
        world.add_up(noted(torch.ones)(4))
    found["sum"] = count_others()
    with mock.patch.object(gradients.Memory, "message_of", noted(gradients.Memory.message_of)):
        fit(model, 10)
    found["gradients"] = count_others()
    return found


def stuck(size):
    """One process alone evaluates while the other waits for its gradients."""
    model = compiled()

    def evaluate(batch):
        if RANK == 0 and batch == 3:
            model.evaluate((X, Y))

    said = ""
    try:
        fit(model, callbacks=[minikeras.LambdaCallback(on_batch_begin=evaluate)])
    except RuntimeError as error:
        said = str(error)
    return said


def failed_apart(size):
    """Backward fails at another layer in each process, after one of them has sent a bucket."""
    seed()
    net = nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 1), nn.Sigmoid())
    model = minikeras.Model(net)
    model.compile(nn.BCELoss(), torch.optim.Adam(model.parameters()), device="cpu")
    gradients.SMALL_BUCKET = gradients.BUCKET = 1
    layer = net[2 * RANK]
    batches = []

    def fail(gradient):
        batches.append(gradient)
        if len(batches) == 3:
            raise ZeroDivisionError

    layer.weight.register_hook(fail)
    said = []
    for _ in range(2):
        try:
            fit(model)
        except (ZeroDivisionError, RuntimeError) as error:
            said.append(str(error))
            if len(said) == 1:
                model.save(Path(os.environ["FOLDER"], "rescued.pt"))
    return said


class Stepping(minikeras.Model):
    """A model whose train_step skips or repeats optimizer_step in one process."""

    def __init__(self, steps, begin):
        super().__init__(Net())
        self.steps = steps  # in each batch of rank 1
        self.begin = begin  # from this batch on
        self.batches = 0

    def train_step(self, features, labels):
        self.batches += 1
        loss = self.compute_loss(self(features), labels)
        self.backward(loss)
        for _ in range(self.steps if RANK and self.batches >= self.begin else 1):
            self.optimizer_step()
        return {"loss": loss}


def stepped_differently(size):
    """A custom step calls optimizer_step more often in one process than in the other.

    In the first batch of a pass over the data, and in that of an epoch in the middle of a pass.
    """
    said = []
    for steps, begin in ((0, 1), (2, 1), (0, 6), (2, 6)):
        seed()
        model = Stepping(steps, begin)
        model.compile(nn.BCELoss(), torch.optim.SGD(model.parameters(), 0.1), device="cpu")
        try:
            fit(model, steps_per_epoch=5)
        except RuntimeError as error:
            said.append(str(error))
    return said


class Breaking(IterableDataset):
    """Other rows in each process; reading the third batch fails in one."""

    def __iter__(self):
        for number in range(5):
            if RANK and number == 2:
                raise OSError("disk of mine")
            yield X[40 * RANK + 8 * number :][:8], Y[40 * RANK + 8 * number :][:8]


def caught_and_called(size):
    """One process catches its own error and calls evaluate, while the other is in fit."""

    def fail(epoch, logs):
        if RANK:
            raise ValueError("epoch of mine")

    def interrupt(batch, logs):
        if RANK and batch == 2:
            raise KeyboardInterrupt

    said = []
    for data, callbacks in (
        ((X, Y), [minikeras.LambdaCallback(on_epoch_end=fail)]),
        ((X, Y), [minikeras.LambdaCallback(on_batch_end=interrupt)]),
        (DataLoader(Breaking(), batch_size=None), []),
    ):
        model = compiled()
        try:
            model.fit(1, data, callbacks=callbacks, verbose=0)
        except (ValueError, OSError, KeyboardInterrupt):
            try:
                model.evaluate((X, Y))
            except RuntimeError as error:
                said.append(str(error))
        except RuntimeError as error:
            said.append(str(error))
    return said


def followed(size):
    """Callbacks that monitor a column which differs between processes."""
    model = compiled()
    values = iter([3.0, 1, 2, 2, 2, 2] if RANK else [1.0, 3, 2, 2, 2, 2])
    column = minikeras.LambdaCallback(
        on_epoch_end=lambda epoch, logs: logs.__setitem__("gap", next(values))
    )
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(model.optimizer, patience=0)
    stop = minikeras.EarlyStopping("gap", mode="min", patience=3, restore_best_weights=True)
    path = Path(os.environ["FOLDER"], "followed.pt")
    save = minikeras.ModelCheckpoint(path, "gap", mode="min", save_best_only=True)
    callbacks = [column, minikeras.LRScheduler(plateau, monitor="gap"), stop, save]
    fit(model, 6, callbacks=callbacks)
    rate = model.optimizer.param_groups[0]["lr"]
    return [stop.best_epoch, save.best, rate, len(model.history), copy_weights(model)]


def local_files(size):
    """Each process has a path of its own: what they do if rank 0's file alone is there."""
    folder = Path(os.environ["FOLDER"], f"machine {RANK}")
    said = []

    def resumed(path, epochs=3):
        seed()
        model = compiled()
        try:
            model.fit(epochs, (X, Y), batch_size=4, verbose=0, checkpoint=path)
        except minikeras.CheckpointError as error:
            said.append(str(error))
        return [model.history.to_dict("list"), copy_weights(model)]

    whole = resumed(folder / "whole.pt")
    first = folder / "run.pt"
    resumed(first, 2)
    if RANK == 0:
        (folder / "older.pt").write_bytes(first.read_bytes())
    else:
        folder.mkdir(exist_ok=True)
        there = folder.parent / "machine 0"
        (folder / "only.pt").write_bytes((there / "run.pt").read_bytes())
        (folder / "older.pt").write_bytes((there / "run.pt.prev").read_bytes())
    again = resumed(first)
    resumed(folder / "only.pt")
    resumed(folder / "older.pt")
    return {"whole": whole, "again": again, "said": said}


def group_created_again(size):
    """The user destroys the group between two fits, and creates one again as the error says."""
    model = compiled()
    fit(model)
    torch.distributed.destroy_process_group()
    said = ""
    try:
        fit(model)
    except RuntimeError as error:
        said = str(error)
    store = torch.distributed.FileStore(os.path.join(os.environ["FOLDER"], "second group"), size)
    torch.distributed.init_process_group("gloo", store=store, rank=RANK, world_size=size)
    model.compile(nn.BCELoss(), torch.optim.Adam(model.parameters()), device="cpu")
    fit(model)
    sums = torch.stack([parameter.detach().sum() for parameter in model.parameters()])
    gathered = [torch.zeros_like(sums) for _ in range(size)]
    torch.distributed.all_gather(gathered, sums)
    return [said, all(torch.equal(sums, other) for other in gathered)]
