"""Measure what `fit(checkpoint=...)` costs: `python benchmarks/checkpoint.py` prints a table.

For each work, fits with and without a checkpoint take turns in one process on one thread; the
medians are compared. A save writes the file, waits for the disk and renames two files. The table is
in Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.optim import Adam
from works import Work, make_work

import minikeras


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
WORKS = {"ring": (ring, 20), "784-2048-2048-10 on 20,000 rows": (wide, 1)}


def measure_fit(name: str, path: Path | None, every: int | None = None) -> float:
    """Return the seconds of one fit of a new model."""
    create, epochs = WORKS[name]
    model, loss, work = create()
    model.compile(loss, Adam(model.parameters(), lr=work.lr), device="cpu")
    loader = work.loader()
    model.fit(1, loader, verbose=0)
    begin = time.perf_counter()
    model.fit(epochs, loader, verbose=0, checkpoint=path, checkpoint_every=every)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| work | file | a save | an epoch without | of it, one save an epoch |")
    print("|---|---|---|---|---|")
    for name, (_, epochs) in WORKS.items():
        without = []
        differences = []
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "run.pt"
                seconds = measure_fit(name, None)
                without.append(seconds)
                differences.append(measure_fit(name, path) - seconds)
                size = path.stat().st_size / 2**20
        save = median(differences) / epochs
        epoch = median(without) / epochs
        print(
            f"| {name} | {size:.2f} MB | {save * 1e3:.1f} ms | {epoch * 1e3:.0f} ms | "
            f"{save / epoch:.1%} |"
        )


if __name__ == "__main__":
    main()
