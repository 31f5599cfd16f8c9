"""Cases of a fit that is interrupted and resumed."""

import contextlib
import os
import warnings
from pathlib import Path

from torch.utils.data import (
    DataLoader,
)

import minikeras
from helpers.models import Net
from helpers.ranks.common import (
    RANK,
    Noisy,
    compiled,
    doubles,
    found,
    row_by_row,
)
from helpers.seeds import seed


def persistent(size, epochs=3, **kwargs):
    """A fit with persistent workers."""
    train = DataLoader(
        row_by_row(40), 12 // size, shuffle=True, num_workers=2, persistent_workers=True
    )
    seed()
    model = compiled()
    with warnings.catch_warnings():
        # whose own draws are not in the file
        warnings.filterwarnings("ignore", "dl_train has persistent_workers")
        model.fit(epochs, train, verbose=0, **kwargs)
        # their seed is not drawn in a second fit either
        return found(model, model.fit(1, train, verbose=0))


def persistent_carried_on(size):
    """The same fit, interrupted as its third epoch begins and resumed."""
    file = Path(os.environ["FOLDER"], f"run of {size}.pt")

    def fail(epoch):
        if epoch == 3:
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        persistent(size, checkpoint=file, callbacks=[minikeras.LambdaCallback(on_epoch_begin=fail)])
    return persistent(size, checkpoint=file)


def carried_on(size, file=True, workers=None):
    """Fit with a checkpoint in FOLDER.

    KILL is "RANK SIGNAL EPOCH BATCH", for the first of several starts by torchrun.
    """
    seed(RANK)
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    rank, number, epoch, batch = map(int, os.environ.get("KILL", "-1 0 0 0").split())
    model = compiled(Net() if "PLAIN" in os.environ else minikeras.Model(Noisy()))
    at = [0]

    def kill(done, logs):
        if rank == RANK and (at[0], done) == (epoch, batch) and not again:
            os.kill(os.getpid(), number)

    callback = minikeras.LambdaCallback(
        on_epoch_begin=lambda epoch: at.__setitem__(0, epoch), on_batch_end=kill
    )
    workers = int(os.environ.get("WORKERS", "0")) if workers is None else workers
    train = DataLoader(row_by_row(64), 12 // size, shuffle=True, num_workers=workers)
    more = (
        {"checkpoint": Path(os.environ["FOLDER"], "run.pt"), "checkpoint_every": 2} if file else {}
    )
    return found(model, model.fit(3, train, doubles(20), callbacks=[callback], verbose=0, **more))


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
