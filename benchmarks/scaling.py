"""Compare rows a second of one process and of two: `python benchmarks/scaling.py` prints the ratio.

A compute-bound network (784-1024-1024-10, 256 rows a process and step, one thread each) on the CPU;
runs of one and of two processes take turns. Twice the rows a second would be 2.00; what is missing
is the sum over the gradients.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from statistics import median

ROUNDS = 5
ROWS = 10240
EPOCHS = 3


def train() -> None:
    """Train in each process; print the rows a second of all together, after a first epoch."""
    import torch
    from torch import nn

    import minikeras

    torch.set_num_threads(1)
    torch.manual_seed(0)
    X = torch.randn(ROWS, 784)
    y = torch.randint(10, (ROWS,))
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
    finished = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return float(finished.stdout)


def main() -> None:
    by_one = []
    by_two = []
    ratios = []
    for _ in range(ROUNDS):
        by_one.append(rows_a_second(1))
        by_two.append(rows_a_second(2))
        ratios.append(by_two[-1] / by_one[-1])
    print(
        f"1 process {median(by_one):.0f} rows a second, 2 processes {median(by_two):.0f}: "
        f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) times as many"
    )


if __name__ == "__main__":
    if "RANK" in os.environ:
        train()
    else:
        main()
