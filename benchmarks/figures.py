"""Draw two figures that must be flat: `python benchmarks/figures.py` writes rows.png, epochs.png.

rows      microseconds a step of one epoch over 1e3 to 1e7 rows, from a DataLoader and from (X, y)
epochs    microseconds a step against the epochs already run: in one fit, and in as many fits of one
          epoch each

The files are written next to this one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import minikeras

HERE = Path(__file__).parent
BATCH = 1000  # rows


def make_model() -> minikeras.Model:
    torch.manual_seed(0)
    model = minikeras.Model(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)))
    model.compile(nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=0.01), device="cpu")
    return model


def make_data(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    X = torch.randn(rows, 2)
    return X, X.sum(1, keepdim=True)


def epoch_from_loader(X: torch.Tensor, y: torch.Tensor) -> float:
    return fit_seconds(DataLoader(TensorDataset(X, y), batch_size=BATCH, shuffle=True), None)


def epoch_from_arrays(X: torch.Tensor, y: torch.Tensor) -> float:
    return fit_seconds((X, y), BATCH)


def fit_seconds(data: object, batch_size: int | None) -> float:
    model = make_model()
    model.fit(1, make_data(20 * BATCH), batch_size=BATCH, verbose=0)
    start = time.perf_counter()
    model.fit(1, data, batch_size=batch_size, verbose=0)
    return time.perf_counter() - start


def epoch_by_hand(X: torch.Tensor, y: torch.Tensor) -> float:
    """Time the tuned loop: rows permuted once, batches are slices, the total stays a tensor."""
    model = make_model().net
    loss_func = nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def epoch(X: torch.Tensor, y: torch.Tensor) -> None:
        order = torch.randperm(len(X))
        total = torch.zeros(())
        X = X[order]
        y = y[order]
        for start in range(0, len(X), BATCH):
            features = X[start : start + BATCH]
            labels = y[start : start + BATCH]
            loss = loss_func(model(features), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total.add_(loss.detach(), alpha=len(features))
        total.item()

    epoch(*make_data(20 * BATCH))
    start = time.perf_counter()
    epoch(X, y)
    return time.perf_counter() - start


def rows_figure(largest: int) -> None:
    ways: dict[str, Callable[..., float]] = {
        "fit, DataLoader": epoch_from_loader,
        "fit, (X, y)": epoch_from_arrays,
        "tuned loop": epoch_by_hand,
    }
    counts = [10**power for power in range(3, 8) if 10**power <= largest]
    _, axis = plt.subplots(figsize=(6, 4))
    for name, epoch in ways.items():
        costs = []
        for rows in counts:
            X, y = make_data(rows)
            # Small sets run several times: the minimum is the cost, the rest is noise.
            repeats = 10 if rows < 10**6 else 2
            seconds = min(epoch(X, y) for _ in range(repeats))
            costs.append(seconds / (rows / BATCH) * 1e6)
            print(f"{name}, {rows} rows: {costs[-1]:.0f} us a step", flush=True)
        axis.plot(counts, costs, marker="o", label=name)
    axis.set(xscale="log", ylim=0, xlabel="rows", ylabel=f"us a step of {BATCH} rows")
    axis.legend()
    axis.figure.savefig(HERE / "rows.png", dpi=120, bbox_inches="tight")


class EpochTimes(minikeras.Callback):
    def on_fit_begin(self) -> None:
        self.seconds: list[float] = []
        self.last = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def epochs_figure(epochs: int) -> None:
    steps = 10
    data = make_data(steps * BATCH)
    times = EpochTimes()
    make_model().fit(epochs, data, batch_size=BATCH, callbacks=[times], verbose=0)
    model = make_model()
    fits = []
    for _ in range(epochs):
        start = time.perf_counter()
        model.fit(1, data, batch_size=BATCH, verbose=0)
        fits.append(time.perf_counter() - start)
    _, axis = plt.subplots(figsize=(6, 4))
    for name, seconds in {"one fit": times.seconds, "fit(1) again and again": fits}.items():
        costs = medians(seconds, epochs // 20)
        print(
            f"{name}: {costs[0] / steps * 1e6:.0f} us a step at first, "
            f"{costs[-1] / steps * 1e6:.0f} in the end"
        )
        middles = [(i + 0.5) * epochs / len(costs) for i in range(len(costs))]
        axis.plot(middles, [cost / steps * 1e6 for cost in costs], marker="o", label=name)
    axis.set(ylim=0, xlabel="epochs already run", ylabel="us a step")
    axis.legend()
    axis.figure.savefig(HERE / "epochs.png", dpi=120, bbox_inches="tight")


def medians(values: list[float], size: int) -> list[float]:
    """Return the median of each group of `size` values."""
    result = []
    for start in range(0, len(values) - size + 1, size):
        group = sorted(values[start : start + size])
        result.append(group[size // 2])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=10**7, help="the largest number of rows, default %(default)s"
    )
    parser.add_argument("--epochs", type=int, default=2000, help="default %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows_figure(args.rows)
    epochs_figure(args.epochs)


if __name__ == "__main__":
    main()
