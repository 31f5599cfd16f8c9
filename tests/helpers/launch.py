"""Scripts under torchrun, and what their processes found."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from helpers.paths import ROOT, TESTS

# so that a process finds the package and these helpers
PYTHONPATH = os.pathsep.join([str(ROOT), str(TESTS)])


def torchrun(arguments, processes=2, env=(), **kwargs):
    """Run a script under torchrun; return the finished process, its output as text."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, **dict(env)}
    command += map(str, arguments)
    for last in (False, True):
        with subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
        ) as run:
            try:
                out, err = run.communicate(timeout=200)
                return subprocess.CompletedProcess(command, run.returncode, out, err)
            # a DataLoader's worker, forked beside the group's threads, may hang
            except subprocess.TimeoutExpired:
                run.terminate()  # torchrun ends its processes
                if last:
                    raise
    return None


def launch_cases(module, folder, cases, processes=2, **env):
    """Run cases of a module under torchrun; return the finished process."""
    arguments = ["-m", module, folder, *cases]
    return torchrun(arguments, processes, {"FOLDER": str(folder)} | env)


def results_of(module, folder, cases, processes=2, **env):
    """Run cases of a module under torchrun; return the result of each rank for each case."""
    done = launch_cases(module, folder, cases, processes, **env)
    assert done.returncode == 0, done.stderr
    results = {}
    for case in cases:
        files = [folder / f"{case}.{rank}.pt" for rank in range(processes)]
        results[case] = [torch.load(file) for file in files]
    return results


def cases_of(*modules):
    """Return the functions that modules define, by name."""
    cases = {}
    for module in modules:
        for name, case in vars(module).items():
            if callable(case) and case.__module__ == module.__name__:
                cases[name] = case
    return cases


def save_results(cases, folder, names):
    """Run cases in a process of torchrun; write a file for each result."""
    size = int(os.environ["WORLD_SIZE"])
    rank = os.environ["RANK"]
    for name in names:
        torch.save(cases[name](size), Path(folder, f"{name}.{rank}.pt"))


def run_python(arguments, **kwargs):
    """Run Python with these arguments; return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
