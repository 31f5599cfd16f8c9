"""Two processes of minikeras beside DistributedDataParallel: `python benchmarks/scaling.py`.

    python benchmarks/scaling.py --rounds 12 --works mlp conv transformer tiny

The variants are minikeras, a bare loop round DistributedDataParallel, the same with
gradient_as_bucket_view, and the bare loop in one process alone. Each has processes of its own
(gloo, one thread each), since they would share the settings of the C library's memory. They take
turns, in an order that rotates from round to round; the others wait meanwhile. Each row of the
tables is the median over the rounds of a ratio within a round, with its quartiles. A turn is one
fit, of 3 to 5 seconds. CPU time is that of both processes. Peak memory is measured in new processes
for each variant.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
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


def run_in_process(variant: str, work: str) -> None:
    """Train for one turn at each line of stdin; print [wall, CPU] seconds a row and peak MB."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train, rows = make_turn(variant, work)
    before = read_status("VmRSS")
    for _ in sys.stdin:
        begin = time.perf_counter(), time.process_time()
        train()
        spent = time.perf_counter() - begin[0], time.process_time() - begin[1]
        peak = read_status("VmHWM") - before
        print(json.dumps([spent[0] / rows, spent[1] / rows, peak]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def read_status(name: str) -> float:
    """Return a line of /proc/self/status in MB."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) / 1024


# --- outside --------------------------------------------------------------------------------------


class Processes:
    """The processes of one variant, which take a turn when they are told to.

    Args:
        env: environment variables of theirs alone.
    """

    def __init__(self, variant: str, work: str, **env: str) -> None:
        size = 1 if variant == "alone" else 2
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        env |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.all = [
            subprocess.Popen(
                [sys.executable, __file__, variant, work],
                env=os.environ | env | {"RANK": str(rank), "WORLD_SIZE": str(size)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]

    def take_turn(self) -> tuple[float, float, float]:
        """Return seconds a row, CPU seconds a row of all, and the peak of memory in MB."""
        for process in self.all:
            assert process.stdin is not None
            process.stdin.write("turn\n")
            process.stdin.flush()
        found = []
        for process in self.all:
            assert process.stdout is not None
            found.append(json.loads(process.stdout.readline()))
        return found[0][0], sum(cpu for _, cpu, _ in found), found[0][2]

    def end(self) -> None:
        """End the processes, which wait for each other."""
        for process in self.all:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.all:
            process.wait()


def measure_times(work: str, rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    """Return what the variants have found in their turns, by round."""
    running = {variant: Processes(variant, work) for variant in [*VARIANTS, "alone"]}
    found: dict[str, list[tuple[float, float, float]]] = {variant: [] for variant in running}
    for number in range(rounds + 1):
        shift = number % len(VARIANTS)
        for variant in [*VARIANTS[shift:], *VARIANTS[:shift], "alone"]:
            turn = running[variant].take_turn()
            if number:  # the first round warms up
                found[variant].append(turn)
    for processes in running.values():
        processes.end()
    return found


def measure_memory(variant: str, **env: str) -> float:
    """Return by how many MB the peak of rank 0 is above what there was before training.

    That is after several turns: what lies between freed blocks grows for a while.
    """
    processes = Processes(variant, MEMORY, **env)
    for _ in range(6):
        peak = processes.take_turn()[2]
    processes.end()
    return peak


def describe_ratios(above: list[float], below: list[float]) -> str:
    """Return the median of the ratios within rounds, and the quartiles."""
    ratios = sorted(one / other for one, other in zip(above, below, strict=True))
    quarter = len(ratios) // 4
    return f"{median(ratios):.3f} ({ratios[quarter]:.3f} - {ratios[-1 - quarter]:.3f})"


def show_times(work: str, found: dict[str, list[tuple[float, float, float]]]) -> None:
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
        show_times(work, measure_times(work, options.rounds))
    if options.no_memory:
        return
    print("peak memory of a process above its start, 64 million parameters (gradients: 244 MB)")
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # at once
    for title, env in (("as glibc keeps it", {}), ("freed memory given back", given_back)):
        print(f"  {title}")
        for variant in VARIANTS:
            peaks = sorted(measure_memory(variant, **env) for _ in range(5))
            print(f"    {variant:15} {median(peaks):.0f} MB ({peaks[0]:.0f} - {peaks[-1]:.0f})")


if __name__ == "__main__":
    if "RANK" in os.environ:
        run_in_process(*sys.argv[1:])
    else:
        main()
