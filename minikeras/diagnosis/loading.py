"""Checks of the time that a step waits for the data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from torch.utils.data import DataLoader

from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.layers import copy_to_train

SHARE = 0.6  # of a step that waits for the data
SECONDS = 0.005  # of waiting for a batch, at least
BATCHES = 4
STEPS = 5
LIMIT = 1.0  # seconds for measuring


def check_loading_time(evidence: Evidence) -> Iterator[Finding]:
    """Find a loader that is slower than the network."""
    waits = evidence.train.seconds[1:]  # the first batch starts the workers
    if evidence.train.is_batched_here and not isinstance(evidence.dl_train, DataLoader):
        if isinstance(evidence.dl_train, tuple):
            return  # arrays are in memory
    if len(waits) < BATCHES:
        return
    wait = statistics.median(waits)
    if wait < SECONDS:
        return
    step = measure_step(evidence)
    share = wait / (wait + step)
    if share < SHARE:
        return
    workers = getattr(evidence.dl_train, "num_workers", 0)
    yield Finding(
        "warning",
        "the time of a step",
        f"{share:.0%} waits for dl_train: {wait * 1000:.0f} ms for a batch, {step * 1000:.0f} ms "
        "for the step",
        "the data is there when the step begins",
        choose_remedy(workers),
    )


def choose_remedy(workers: int) -> str:
    """Return what makes a loader faster."""
    memory = (
        "If the data fits into memory, read it once and pass arrays: model.fit(epochs, (X, y))."
    )
    if workers:
        return (
            f"The loader has num_workers={workers}: try more, with persistent_workers=True; do the "
            f"slow part of __getitem__ once and keep the result. {memory}"
        )
    return (
        "Read in other processes: DataLoader(..., num_workers=4, persistent_workers=True). "
        f"{memory}"
    )


def measure_step(evidence: Evidence) -> float:
    """Return the median seconds of a training step on data that has been read."""
    model, batches = copy_to_train(evidence)
    seconds: list[float] = []
    begin = time.perf_counter()
    with silenced():
        while len(seconds) < STEPS + 1 and time.perf_counter() - begin < LIMIT:
            batch = next(batches)
            start = time.perf_counter()
            model.fit(1, [batch], verbose=0, on_nan="ignore")
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:] or seconds)
