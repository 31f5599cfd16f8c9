"""Checks of the time that a step waits for the data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import TensorDataset

from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.layers import copy_to_train

SHARE = 0.6  # of a step that waits for the data
SECONDS = 0.01  # for a batch, at least; a DataLoader of tensors takes 3 ms for 1,000 rows
BATCHES = 4
STEPS = 5
LIMIT = 1.0  # seconds for measuring


def check_loading_time(evidence: Evidence) -> Iterator[Finding]:
    """Find a loader that is slower than the network."""
    if isinstance(evidence.dl_train, tuple):
        return  # arrays are in memory
    reads = evidence.train.seconds[1:]  # the first batch starts the workers
    if len(reads) < BATCHES:
        return
    workers = getattr(evidence.dl_train, "num_workers", 0)
    # workers bring several batches at once, and then none
    read = statistics.mean(reads) if workers else statistics.median(reads)
    if read < SECONDS:
        return
    step = measure_step(evidence)
    wait = find_wait(read, step, workers)
    share = wait / (wait + step)
    if share < SHARE or wait < SECONDS:
        return
    yield Finding(
        "warning",
        "the time of a step",
        f"{share:.0%} waits for dl_train: {wait * 1000:.0f} ms for a batch, {step * 1000:.0f} ms "
        "for the step",
        "the data is there when the step begins",
        choose_remedy(evidence.dl_train, workers),
    )


def find_wait(read: float, step: float, workers: int) -> float:
    """Return the seconds that a step waits: workers read while the network computes.

    >>> find_wait(0.03, 0.01, workers=0), round(find_wait(0.03, 0.01, workers=2), 3)
    (0.03, 0.02)
    """
    return max(0.0, read - step) if workers else read


def choose_remedy(data: Any, workers: int) -> str:
    """Return what makes a loader faster."""
    if isinstance(getattr(data, "dataset", None), TensorDataset):
        return (
            "The DataLoader takes tensors in memory apart row by row. Pass them as they are: "
            "model.fit(epochs, (X, y), batch_size=...)."
        )
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
