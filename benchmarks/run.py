"""Time minikeras against hand-written loops and other libraries: `python benchmarks/run.py`.

See README.md.

for each work:
    for each round:
        for each variant, in an order that turns from round to round:
            a fresh process on one thread: variants.py WORK VARIANT
        each variant's seconds / the tuned loop's seconds of the same round
    a table of medians, lowest and highest
import cost: fresh processes in the same way
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
# No torch here: on Linux a child's peak memory starts from its parent's.
ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "KERAS_BACKEND": "torch",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])),
}
WORKS = {
    "ring": "61 parameters, 4340 rows, batch 100, DataLoader with num_workers=2",
    "ring0": "the same with num_workers=0",
    "mlp": "784-256-128-10, 20,000 rows, batch 128",
    "conv": "two convolutions (8, 16 channels) on 1 x 28 x 28, 4,000 rows, batch 64",
    "loader": "conv with rows from a Dataset with __getitem__, num_workers=2",
    "transformer": "a block of width 64 on 32 tokens, bf16, 1,024 rows, batch 32",
    "predict": "20-64-1, 1,000,000 rows, batch 1000",
}
WORKS_ON_A_GPU = WORKS | {
    "mlp": "784-256-128-10, 100,000 rows, batch 128",
    "conv": "two convolutions (256, 512 channels) on 1 x 28 x 28, 20,000 rows, batch 256",
    "loader": "conv with rows from a Dataset with __getitem__, num_workers=2, pin_memory=True",
    "transformer": "a block of width 512 on 512 tokens, bf16, 6,400 rows, batch 64",
}
# on a GPU: the median ratio that is wanted, and that of peak GPU memory
GOALS = {
    ("ring", "minikeras"): 1.02,
    ("ring", "minikeras-jit"): 0.35,
    ("mlp", "minikeras"): 1.02,
    ("mlp", "minikeras-on-device"): 1.02,
    ("conv", "minikeras"): 1.01,
    ("conv", "minikeras-on-device"): 1.01,
    ("transformer", "minikeras"): 1.01,
    ("transformer", "minikeras-on-device"): 1.01,
    ("predict", "minikeras"): 1.05,
    ("predict", "minikeras-loader"): 1.05,
}
MEMORY_GOAL = 1.02
SAME_BATCHES = 1e-3  # relative: rounding leads to 1e-4 on ring, another order of the rows to 1e-2
PACKAGES = [
    "torch",
    "numpy",
    "pandas",
    "torchkeras",
    "keras",
    "lightning",
    "pytorch-ignite",
    "skorch",
    "poutyne",
    "accelerate",
]
IMPORTS = {"torch, pandas": "import torch, pandas", "minikeras": "import minikeras"}
TIMED_IMPORT = """
import time, resource
start = time.perf_counter()
{}
seconds = time.perf_counter() - start
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

Result = dict[str, Any]


def variant_names(work: str, device: str) -> list[str]:
    """List the variants of a work, asked in a separate process, since variants.py imports torch."""
    code = f"import variants; print(variants.names({work!r}, {device!r}))"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, env=ENV, capture_output=True, text=True, check=True
    )
    return list(ast.literal_eval(answer.stdout))


def run_once(work: str, variant: str, seed: int, device: str, quick: bool) -> Result:
    """Run one variant in a process, with its output in files: bars are drawn, but not displayed."""
    command = [
        sys.executable,
        str(HERE / "variants.py"),
        work,
        variant,
        "--seed",
        str(seed),
        "--device",
        device,
    ]
    if quick:
        command.append("--quick")
    with (
        tempfile.TemporaryFile("w+", errors="replace") as out,
        tempfile.TemporaryFile("w+", errors="replace") as err,
    ):
        status = subprocess.run(
            command, env=ENV, stdout=out, stderr=err, cwd=tempfile.gettempdir()
        ).returncode
        out.seek(0)
        err.seek(0)
        if status:
            last = (err.read().strip().splitlines() or [f"exit status {status}"])[-1]
            return {"missing": f"failed: {last}"}
        return dict(json.loads(out.read().strip().splitlines()[-1]))


def run_work(
    work: str, wanted: list[str] | None, repeats: int, device: str, quick: bool
) -> dict[str, list[Result]]:
    """Return variant -> its results, one a round; a missing variant has one that says why."""
    known = variant_names(work, device)
    names = [name for name in known if not wanted or name in wanted or name == "tuned"]
    if wanted and len(names) == 1 and wanted != ["tuned"]:
        raise SystemExit(f"{work} has none of {', '.join(wanted)}; it has {', '.join(known)}.")
    results: dict[str, list[Result]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if results[name] and "missing" in results[name][-1]:
                continue
            result = run_once(work, name, seed=turn, device=device, quick=quick)
            results[name].append(result)
            spent = result.get("missing")
            if not spent:
                spent = f"{result['seconds'] / result['steps'] * 1e6:.1f} us a step"
            print(f"{work} {turn + 1}/{repeats} {name}: {spent}", file=sys.stderr, flush=True)
    return results


def table(work: str, results: dict[str, list[Result]]) -> str:
    tuned = results["tuned"]
    if "missing" in tuned[-1]:
        return f"The tuned loop did not run: {tuned[-1]['missing']}"
    tuned_peak = median(result["peak_mb"] for result in tuned)
    naive = results.get("naive", [])
    has_gpu = tuned[-1]["gpu_mb"] is not None
    header = [
        "variant",
        "ratio to tuned: median (lowest - highest)",
        "of CPU time",
        "us a step",
        "peak MB",
        "over tuned",
        "warming up, s",
        "same work",
    ]
    if has_gpu:
        header += ["peak MB of the GPU", "goal"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, rounds in results.items():
        if "missing" in rounds[-1]:
            why = rounds[-1]["missing"].replace("|", "/")
            lines.append(f"| {name} | {why}{' |' * (len(header) - 1)}")
            continue
        peak = median(result["peak_mb"] for result in rounds)
        cells = [
            name,
            spread(ratios("seconds", rounds, tuned), digits=3 if has_gpu else 2),
            f"{median(ratios('cpu_seconds', rounds, tuned)):.2f}",
            f"{median(result['seconds'] / result['steps'] for result in rounds) * 1e6:.1f}",
            f"{peak:.0f}",
            f"{peak - tuned_peak:+.0f}",
            span([result["compile_seconds"] for result in rounds]),
            same_work(rounds, tuned, naive),
        ]
        if has_gpu:
            cells += [gpu_memory(rounds, tuned), goal(work, name, rounds, tuned)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(key: str, rounds: list[Result], tuned: list[Result]) -> list[float]:
    """Return the ratio of each round, since a machine's speed changes between rounds."""
    return [result[key] / base[key] for result, base in zip(rounds, tuned, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    middle, low, high = (f"{of(values):.{digits}f}" for of in (median, min, max))
    return f"{middle} ({low} - {high})"


def gpu_memory(rounds: list[Result], tuned: list[Result]) -> str:
    """Return the peak, and its ratio to the tuned loop's; for predict also that of 20 batches."""
    peak = median(result["gpu_mb"] for result in rounds)
    text = f"{peak:.1f} ({median(ratios('gpu_mb', rounds, tuned)):.3f})"
    if "gpu_mb_before" in rounds[-1]:
        before = median(result["gpu_mb_before"] for result in rounds)
        text += f", after 20 batches {before:.1f}"
    return text


def goal(work: str, name: str, rounds: list[Result], tuned: list[Result]) -> str:
    """Say whether the median ratio and the peak of GPU memory are as wanted.

    The memory of predict is to be flat: a million rows take no more than 20 batches.
    """
    verdicts = []
    if (work, name) in GOALS:
        wanted = GOALS[work, name]
        verdicts.append(verdict("time", median(ratios("seconds", rounds, tuned)), wanted))
    if name.startswith("minikeras") and "jit" not in name:
        memory = ratios("gpu_mb", rounds, tuned)
        if work == "predict":
            memory = [result["gpu_mb"] / result["gpu_mb_before"] for result in rounds]
        verdicts.append(verdict("memory", median(memory), MEMORY_GOAL))
    return ", ".join(verdicts)


def verdict(what: str, ratio: float, wanted: float) -> str:
    return f"{what} <= {wanted}: {'yes' if ratio <= wanted else 'NO'}"


def span(seconds: list[float]) -> str:
    low = f"{min(seconds):.1f}"
    high = f"{max(seconds):.1f}"
    return low if low == high else f"{low} - {high}"


def same_work(rounds: list[Result], tuned: list[Result], naive: list[Result]) -> str:
    """Say whether the optimizer steps and the final loss are what they must be, in each round."""
    for result in rounds:
        if result["steps_taken"] != result["steps_expected"]:
            return f"NO: {result['steps_taken']} steps of {result['steps_expected']}"
    if naive and "missing" not in naive[-1] and all(map(equals_naive, rounds, naive)):
        return "yes, the naive loop's batches"
    worst = max(abs(ratio - 1) for ratio in ratios("final_loss", rounds, tuned))
    answer = "yes" if worst <= rounds[0]["tolerance"] else "NO"
    return f"{answer}, loss within {worst:.1%}"


def equals_naive(result: Result, naive: Result) -> bool:
    allowed = min(SAME_BATCHES, result["tolerance"]) * abs(naive["final_loss"])
    return bool(abs(result["final_loss"] - naive["final_loss"]) <= allowed)


def import_table(repeats: int) -> str:
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in IMPORTS}
    for turn in range(repeats + 1):
        for name, line in IMPORTS.items():
            command = [sys.executable, "-c", TIMED_IMPORT.format(line)]
            out = subprocess.run(
                command, env=ENV, capture_output=True, text=True, check=True
            ).stdout
            if turn:  # the first round only fills the disk's cache
                seconds, peak = out.split()
                results[name].append((float(seconds), float(peak)))
    lines = ["| import | seconds: median (lowest - highest) | peak MB |", "|---|---|---|"]
    for name, pairs in results.items():
        seconds, peaks = zip(*pairs, strict=True)
        lines.append(f"| {name} | {spread(seconds)} | {median(peaks):.0f} |")
    return "\n".join(lines)


def circumstances(device: str, repeats: int) -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    older = next((HERE / "torchkeras2").glob("torchkeras-*.dist-info"), None)
    if older:
        found.append(
            "torchkeras " + older.name.removeprefix("torchkeras-").removesuffix(".dist-info")
        )
    return (
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores of which one is used, "
        f"{gpu(device)}{platform.system()}, Python {platform.python_version()}, "
        f"{', '.join(found)}; {repeats} rounds."
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def gpu(device: str) -> str:
    if device == "cpu":
        return ""
    code = f"import torch; print(torch.get_device_module({device!r}).get_device_name())"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return f"{answer.stdout.strip()}, "


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--works", nargs="+", choices=[*WORKS, "import"], default=[*WORKS, "import"]
    )
    parser.add_argument("--variants", nargs="+", help="default all; the tuned loop always runs")
    parser.add_argument("--repeats", type=int, help="rounds; default 5, or 2 with --quick")
    parser.add_argument("--quick", action="store_true", help="a fifth of the epochs")
    parser.add_argument(
        "--device", default="cpu", help="default %(default)s; elsewhere the rivals are fewer"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results.md",
        help="the Markdown file, default %(default)s",
    )
    args = parser.parse_args()
    repeats = args.repeats or (2 if args.quick else 5)
    parts = [circumstances(args.device, repeats)]
    for work in args.works:
        if work == "import":
            parts += ["### import", import_table(repeats)]
        else:
            results = run_work(work, args.variants, repeats, args.device, args.quick)
            about = WORKS if args.device == "cpu" else WORKS_ON_A_GPU
            parts += [f"### {work}: {about[work]}", table(work, results)]
        # After each work, so that an interrupted run leaves what it has.
        args.out.write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
