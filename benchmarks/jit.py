"""Measure when `compile(jit=True)` pays: `python benchmarks/jit.py` prints two tables in Markdown.

Each row of the first table is a fresh process on one thread that fits one epoch of the ring
example, with validation. `cold` has an empty cache of compiled code, `warm` the one that `cold` has
filled. CPU seconds are those of the process and of the C++ compilers that it starts; other work on
the machine disturbs them less than the seconds on the clock.

The second table has the time of a later step, and after how many steps the first fit is won back.
Eager and jit take turns in one process; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

EPOCHS = 5  # in a round


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has started and that have ended."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def make_model(jit: bool, steps: int = 1) -> tuple[Any, Any, Any]:
    """Return a compiled model of the ring example, and its loaders for training and validation."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from works import make_work

    import minikeras

    torch.set_num_threads(1)
    work = make_work("ring")
    model = work.make_net(minikeras.Model)
    loss_func = minikeras.Regularized(minikeras.FocalLoss(), model, l1=0.001, l2=0.001)
    optimizer = torch.optim.Adam(model.parameters(), lr=work.lr)
    together = {"steps_per_execution": steps} if jit and steps > 1 else {}
    model.compile(loss_func, optimizer, {"accuracy": work.metric}, "cpu", jit=jit, **together)
    rows = len(work.X) * 3 // 10
    held_out = TensorDataset(work.X[:rows], work.y[:rows])
    return model, work.loader(), DataLoader(held_out, work.batch_size, num_workers=work.workers)


def measure_first_fit(jit: bool, steps: int) -> dict[str, float]:
    """Measure the first fit of this process, of one epoch."""
    model, dl_train, dl_val = make_model(jit, steps)
    begun, cpu_begun = time.perf_counter(), cpu_seconds()
    model.fit(1, dl_train, dl_val, verbose=0)
    return {
        "seconds": time.perf_counter() - begun,
        "CPU seconds": cpu_seconds() - cpu_begun,
        "C++ files": count_cpp_files(),
    }


def count_cpp_files() -> int:
    """Return how many C++ files the compiler's cache holds."""
    return len(list(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.cpp")))


def measure_steps(steps: int, rounds: int) -> dict[str, float]:
    """Return the CPU microseconds of a later step in eager mode and with jit."""
    fits: dict[str, tuple[Any, Any]] = {}
    for name, jit in (("eager", False), ("jit", True)):
        model, dl_train, _ = make_model(jit, steps)
        model.fit(1, dl_train, verbose=0)
        fits[name] = model, dl_train
    times: dict[str, list[float]] = {"eager": [], "jit": []}
    for _ in range(rounds):
        for name, (model, dl_train) in fits.items():
            begun = time.process_time()
            model.fit(EPOCHS, dl_train, verbose=0)
            seconds = time.process_time() - begun
            times[name].append(seconds / (EPOCHS * len(dl_train)) * 1e6)
    ratios = [jit / eager for jit, eager in zip(times["jit"], times["eager"], strict=True)]
    return {
        "eager": median(times["eager"]),
        "jit": median(times["jit"]),
        "ratio": median(ratios),
    }


def run_apart(args: Mapping[str, Any], cache: str) -> dict[str, float]:
    """Run this script in a fresh process, and return what it measures."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--apart", json.dumps(dict(args))]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(output.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="fits of each kind")
    parser.add_argument("--steps-per-execution", type=int, default=1)
    parser.add_argument("--apart", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.apart is not None:
        kind = options.apart.pop("kind")
        if kind == "first":
            print(json.dumps(measure_first_fit(**options.apart)))
        else:
            print(json.dumps(measure_steps(**options.apart)))
        return
    steps = options.steps_per_execution
    with tempfile.TemporaryDirectory() as cache:
        first = {}
        for name, jit in (("eager", False), ("jit, cold", True), ("jit, warm", True)):
            first[name] = run_apart({"kind": "first", "jit": jit, "steps": steps}, cache)
        later = run_apart({"kind": "steps", "steps": steps, "rounds": options.rounds}, cache)
    print("| first fit, one epoch | seconds | CPU seconds | C++ files in the cache |")
    print("|---|---|---|---|")
    for name, found in first.items():
        seconds, cpu, files = found["seconds"], found["CPU seconds"], found["C++ files"]
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {files:.0f} |")
    print()
    print("| a later step | eager | jit | jit / eager | pays from, cold | pays from, warm |")
    print("|---|---|---|---|---|---|")
    won = (later["eager"] - later["jit"]) / 1e6
    eager = first["eager"]["CPU seconds"]
    pays = []
    for name in ("jit, cold", "jit, warm"):
        spent = first[name]["CPU seconds"] - eager
        pays.append(f"{spent / won:,.0f} steps" if won > 0 else "never")
    print(
        f"| CPU time | {later['eager']:.0f} us | {later['jit']:.0f} us | {later['ratio']:.2f} "
        f"| {pays[0]} | {pays[1]} |"
    )


if __name__ == "__main__":
    main()
