"""Rows a second of one process and of two: `python benchmarks/scaling.py` prints their ratio.

A compute-bound network (784-1024-1024-10, 256 rows a process and step, one thread each) on the CPU; runs of one and of
two processes take turns. Twice the rows a second would be 2.00; what is missing is the sum over the gradients.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from statistics import median

ROUNDS, ROWS, EPOCHS = 5, 10240, 3


def train() -> None:
    """In each process: prints the rows a second of all, after a first epoch."""
    import torch
    from torch import nn

    import minikeras

    torch.set_num_threads(1)
    torch.manual_seed(0)
    X, y = torch.randn(ROWS, 784), torch.randint(10, (ROWS,))
    layers = [
        nn.Linear(784, 1024),
        nn.ReLU(),
        nn.Linear(1024, 1024),
        nn.ReLU(),
        nn.Linear(1024, 10),
    ]
    model = minikeras.Model(nn.Sequential(*layers))
    model.compile(nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.01), device="cpu")
    model.fit(1, (X, y), batch_size=256, verbose=0)
    begin = time.perf_counter()
    model.fit(EPOCHS, (X, y), batch_size=256, verbose=0)
    if os.environ["RANK"] == "0":
        print(ROWS * EPOCHS / (time.perf_counter() - begin))


def rows_a_second(processes: int) -> float:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        __file__,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return float(
        subprocess.run([*command], env=env, capture_output=True, text=True, check=True).stdout
    )


if __name__ == "__main__":
    if "RANK" in os.environ:
        train()
    else:
        ones, twos = zip(
            *[(rows_a_second(1), rows_a_second(2)) for _ in range(ROUNDS)], strict=True
        )
        ratios = sorted(two / one for one, two in zip(ones, twos, strict=True))
        print(f"1 process {median(ones):.0f} rows a second, 2 processes {median(twos):.0f}: "
              f"{median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f}) times as many")  # fmt: skip
