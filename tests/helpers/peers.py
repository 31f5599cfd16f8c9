"""Processes that make their group themselves, without a launcher's variables.

python -m helpers.peers FOLDER RANK     each of two writes FOLDER/RANK.pt; rank 1 stops at the end
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

import minikeras
from helpers.models import compiled, points
from helpers.ranks import common
from minikeras.checkpoint import weights

TIMEOUT = 8  # seconds: a busy machine may take some of them between two calls


def met(folder, rank):
    """Wait until both processes run: the time to import must not count as their silence."""
    (folder / f"{rank}.here").touch()
    while not (folder / f"{1 - rank}.here").exists():
        time.sleep(0.01)


def trained():
    """Return a model after a fit."""
    model = compiled()
    model.summary(input_shape=(2,))
    model.fit(2, points(30), batch_size=5, verbose=0)
    return model


def saved(model, folder):
    """Return what each process loads after a slow save by rank 0, and its error if rank 0 fails."""
    write = weights.write
    weights.write = lambda *args, **kwargs: (time.sleep(0.5), write(*args, **kwargs))
    path = folder / "new" / "weights.pt"
    model.save(path)
    same = compiled()
    same.load(path)
    try:
        model.save(path / "in a file.pt")
    except (OSError, RuntimeError) as error:
        failed = f"{type(error).__name__}: {error}"
    return common.found(same, model.history), failed


def left_alone(model, rank):
    """Return the error that rank 0 gets when the other stops, and after how many seconds."""

    def stand_still(batch, logs):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    begin = time.monotonic()
    try:
        callback = minikeras.LambdaCallback(on_batch_end=stand_still)
        model.fit(1, points(30), batch_size=5, callbacks=[callback], verbose=0)
    except RuntimeError as error:
        return str(error), time.monotonic() - begin


def main(folder, rank):
    torch.manual_seed(0)
    met(folder, rank)
    rendezvous = {"init_method": f"file://{folder}/group", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT), **rendezvous)
    model = trained()
    results = saved(model, folder)
    torch.save(results, folder / f"{rank}.pt")
    torch.save(left_alone(model, rank), folder / "left alone.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
