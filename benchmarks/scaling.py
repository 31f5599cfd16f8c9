"""Two processes of minikeras beside DistributedDataParallel: `python benchmarks/scaling.py`.

    python benchmarks/scaling.py --rounds 12 --works mlp conv transformer tiny

Within one launch of two processes (gloo, one thread each) the variants take turns, in an order that
rotates from round to round: minikeras, a bare loop round DistributedDataParallel, the same with
gradient_as_bucket_view, and the bare loop in one process alone. Each row of the tables is the
median over the rounds of a ratio within a round, with its quartiles. A turn is one fit, of 3 to 5
seconds. CPU time is that of both processes. Peak memory is measured in a launch of its own for each
variant.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

WORKS = ["mlp", "conv", "transformer", "tiny"]
VARIANTS = ["minikeras", "ddp", "ddp, views"]
MEMORY = "memory"  # a work: 64 million parameters


# --- in each process ------------------------------------------------------------------------------


def make_work(name: str) -> tuple[Any, int, int, Any, Any]:
    """Return a network, the rows of a process and step, the epochs of a turn, X and y."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "mlp":  # 1.9 million parameters
        layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(1024, 10))
        return net, 256, 1, torch.randn(40960, 784), torch.randint(10, (40960,))
    if name == "conv":  # 15 thousand parameters
        layers = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        layers.insert(4, nn.MaxPool2d(2))
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
        return net, 32, 1, torch.randn(7680, 3, 32, 32), torch.randint(10, (7680,))
    if name == "transformer":  # 10.7 million parameters
        return make_transformer(), 8, 1, torch.randn(320, 32, 64), torch.randint(10, (320,))
    if name == "tiny":  # the ring example's network
        net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        return net, 50, 12, torch.randn(10000, 2), torch.randint(2, (10000,))
    net = nn.Sequential(*(nn.Linear(2000, 2000, bias=False) for _ in range(16)))
    return net, 4, 1, torch.randn(24, 2000), torch.randint(2000, (24,))


def make_transformer() -> Any:
    """Return six encoder layers over sequences of 32 steps."""
    import torch
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(64, 384)
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(384, 6, 1536, 0.0, batch_first=True, norm_first=True)
                for _ in range(6)
            )
            self.head = nn.Linear(384, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            logits: torch.Tensor = self.head(x.mean(1))
            return logits

    return Transformer()


def make_turn(variant: str, work: str) -> tuple[Callable[[], None], int]:
    """Return a function that trains for one turn, and the rows that it takes in all processes."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    net, rows, epochs, X, y = make_work(work)
    loss_func = nn.CrossEntropyLoss()
    rate = 1e-6 if work == MEMORY else 1e-3
    if variant == "minikeras":
        import minikeras

        model = minikeras.Model(net)
        model.compile(loss_func, torch.optim.SGD(model.parameters(), lr=rate), device="cpu")
        return lambda: model.fit(epochs, (X, y), batch_size=rows, verbose=0), len(X) * epochs
    size, rank = (1, 0) if variant == "alone" else (dist.get_world_size(), dist.get_rank())
    called = net
    if variant != "alone":
        called = DistributedDataParallel(net, gradient_as_bucket_view=variant == "ddp, views")
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)

    def train() -> None:
        for _ in range(epochs):
            order = torch.randperm(len(X))
            for start in range(0, len(X), rows * size):
                mine = order[start : start + rows * size][rank * rows :][:rows]
                loss = loss_func(called(X[mine]), y[mine])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()

    return train, len(X) * epochs


def measure_times(work: str, rounds: int) -> None:
    """Let the variants take turns; rank 0 prints [wall, CPU] seconds a row of each, by round."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    turns = {variant: make_turn(variant, work) for variant in VARIANTS}
    if rank == 0:
        turns["alone"] = make_turn("alone", work)
    found: dict[str, list[list[float]]] = {name: [] for name in [*VARIANTS, "alone"]}
    for number in range(rounds + 1):
        shift = number % len(VARIANTS)
        for variant in [*VARIANTS[shift:], *VARIANTS[:shift], "alone"]:
            dist.barrier()
            if variant not in turns:
                continue
            train, rows = turns[variant]
            begin = time.perf_counter(), time.process_time()
            train()
            spent = torch.tensor(
                [time.perf_counter() - begin[0], time.process_time() - begin[1]],
                dtype=torch.float64,
            )
            if variant != "alone":
                cpu = spent[1:].clone()
                dist.all_reduce(cpu)
                spent[1] = cpu
            if number:  # the first round warms up
                found[variant].append((spent / rows).tolist())
    if rank == 0:
        print("FOUND", json.dumps(found))


def measure_memory(variant: str) -> None:
    """Print by how many MB the peak of rank 0 is above what there was before training."""
    import torch.distributed as dist

    train, _ = make_turn(variant, MEMORY)
    before = read_status("VmRSS")
    train()
    if dist.get_rank() == 0:
        print("FOUND", json.dumps(read_status("VmHWM") - before))


def read_status(name: str) -> float:
    """Return a line of /proc/self/status in MB."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) / 1024


# --- outside --------------------------------------------------------------------------------------


def launch(*arguments: str) -> Any:
    """Run this script in two processes; return what rank 0 found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if "returning" in arguments:
        env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back at once
    finished = subprocess.run(
        [*command, __file__, *arguments], env=env, capture_output=True, text=True, check=False
    )
    for line in finished.stdout.splitlines():
        if line.startswith("FOUND "):
            return json.loads(line.removeprefix("FOUND "))
    raise RuntimeError(finished.stderr)


def describe_ratios(above: list[float], below: list[float]) -> str:
    """Return the median of the ratios within rounds, and the quartiles."""
    ratios = sorted(one / other for one, other in zip(above, below, strict=True))
    quarter = len(ratios) // 4
    return f"{median(ratios):.3f} ({ratios[quarter]:.3f} - {ratios[-1 - quarter]:.3f})"


def show_times(work: str, found: dict[str, list[list[float]]]) -> None:
    """Print the table of one work."""
    wall = {name: [turn[0] for turn in turns] for name, turns in found.items()}
    cpu = {name: [turn[1] for turn in turns] for name, turns in found.items()}
    print(f"{work}, {len(wall['ddp'])} rounds, load {os.getloadavg()[0]:.1f}")
    for other in ("ddp", "ddp, views"):
        print(f"  minikeras / {other}")
        print(f"    rows a second   {describe_ratios(wall[other], wall['minikeras'])}")
        print(f"    CPU time a row  {describe_ratios(cpu['minikeras'], cpu[other])}")
    print("  two processes / one alone, rows a second")
    for name in VARIANTS:
        print(f"    {name:15} {describe_ratios(wall['alone'], wall[name])}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--works", nargs="*", choices=WORKS, default=WORKS)
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    for work in options.works:
        show_times(work, launch("times", work, str(options.rounds)))
    if options.no_memory:
        return
    print("peak memory of a process above its start, 64 million parameters (gradients: 244 MB)")
    for title, how in (("as glibc keeps it", "keeping"), ("freed memory given back", "returning")):
        print(f"  {title}")
        for variant in VARIANTS:
            peaks = sorted(launch("memory", variant, how) for _ in range(5))
            print(f"    {variant:15} {median(peaks):.0f} MB ({peaks[0]:.0f} - {peaks[-1]:.0f})")


def run_in_process() -> None:
    """Do what `launch` asks for."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if sys.argv[1] == "times":
        measure_times(sys.argv[2], int(sys.argv[3]))
    else:
        measure_memory(sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        run_in_process()
    else:
        main()
