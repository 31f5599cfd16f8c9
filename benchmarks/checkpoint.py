"""Measure what `fit(checkpoint=...)` costs: `python benchmarks/checkpoint.py` prints a table.

For each work, three fits take turns in one process on one thread: without a checkpoint, with one
whose saves the fit waits for, and with one that a thread writes while the fit goes on, as `fit`
does. The table is in Markdown and has medians:

the fit stands still   the time from the end of an epoch until the next one begins, and that of the
                       wait before the epoch's callbacks; the fit's last save is left out
CPU time               of all threads, for each save: what the fits with a checkpoint take more. It
                       has a share of what a fit does once: to look for random generators, read the
                       file, and write the last state
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Adam
from works import Work, make_work

import minikeras
from minikeras.checkpoint.state import Checkpoint


def ring() -> tuple[minikeras.Model, nn.Module, Work]:
    work = make_work("ring")
    model = work.make_net(minikeras.Model)
    return model, work.make_loss(model), work


def wide() -> tuple[minikeras.Model, nn.Module, Work]:
    work = make_work("mlp")
    layers = [
        nn.Linear(784, 2048),
        nn.ReLU(),
        nn.Linear(2048, 2048),
        nn.ReLU(),
        nn.Linear(2048, 10),
    ]
    return minikeras.Model(nn.Sequential(*layers)), nn.CrossEntropyLoss(), work


# name -> function that creates the work, and the epochs of a fit
WORKS = {"ring": (ring, 60), "784-2048-2048-10 on 20,000 rows": (wide, 2)}


@dataclass
class Measured:
    """Seconds: of CPU time for each fit, of wall-clock time for each save and epoch."""

    cpu: list[float] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)
    size: int = 0  # of the file, in bytes


@contextlib.contextmanager
def timed_saves(seconds: list[float], waits: bool) -> Iterator[None]:
    """Record how long each save of a fit keeps the fit waiting.

    Args:
        waits: the fit waits for each save.
    """
    save = Checkpoint.save
    finish = Checkpoint.on_train_end

    def timed_save(self: Checkpoint, at: Any, last: bool = False, wait: bool = False) -> None:
        begin = time.perf_counter()
        save(self, at, last, wait or waits)
        if not last:
            seconds.append(time.perf_counter() - begin)

    def timed_finish(self: Checkpoint, fit: Any) -> None:
        begin = time.perf_counter()
        finish(self, fit)
        if seconds and fit.at.epoch > self.first:
            seconds[-1] += time.perf_counter() - begin

    Checkpoint.save = timed_save
    Checkpoint.on_train_end = timed_finish
    try:
        yield
    finally:
        Checkpoint.save = save
        Checkpoint.on_train_end = finish


def measure_fit(name: str, measured: Measured, path: Path | None, waits: bool) -> None:
    """Add one fit of a new model."""
    create, epochs = WORKS[name]
    model, loss, work = create()
    model.compile(loss, Adam(model.parameters(), lr=work.lr), device="cpu")
    loader = work.loader()
    model.fit(1, loader, verbose=0)
    with timed_saves(measured.saves, waits):
        begin = time.perf_counter()
        cpu_begin = time.process_time()
        model.fit(epochs, loader, verbose=0, checkpoint=path)
        measured.cpu.append(time.process_time() - cpu_begin)
        measured.epochs.append((time.perf_counter() - begin) / epochs)
    if path is not None:
        measured.size = path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--work", choices=WORKS, default=None, help="default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| work | file | an epoch without | save | the fit stands still | CPU time |")
    print("|---|---|---|---|---|---|")
    for name in WORKS if args.work is None else [args.work]:
        measure_work(name, args.repeats)


def measure_work(name: str, repeats: int) -> None:
    """Print the lines of one work."""
    epochs = WORKS[name][1]
    without = Measured()
    waiting = Measured()
    in_thread = Measured()
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            measure_fit(name, without, None, waits=False)
            measure_fit(name, waiting, Path(folder, "waiting.pt"), waits=True)
            measure_fit(name, in_thread, Path(folder, "thread.pt"), waits=False)
    epoch = median(without.epochs)
    cpu_epoch = median(without.cpu) / epochs
    for title, measured in (("waited for", waiting), ("in a thread", in_thread)):
        still = median(measured.saves)
        differences = [own - base for own, base in zip(measured.cpu, without.cpu, strict=True)]
        cpu = median(differences) / epochs
        cells = [
            name,
            f"{measured.size / 2**20:.2f} MB",
            f"{epoch * 1e3:.0f} ms",
            title,
            f"{still * 1e3:.1f} ms, {still / epoch:.1%}",
            f"{cpu * 1e3:.1f} ms, {cpu / cpu_epoch:.1%}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
