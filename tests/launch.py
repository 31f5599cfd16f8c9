"""Scripts under torchrun, and what their processes found."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def torchrun(arguments, processes=2, env=(), **kwargs):
    """A finished torchrun of a script, its output as text."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **dict(env)}
    command += map(str, arguments)
    for last in (False, True):
        with subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
        ) as run:
            try:
                out, err = run.communicate(timeout=200)
                return subprocess.CompletedProcess(command, run.returncode, out, err)
            except (
                subprocess.TimeoutExpired
            ):  # a DataLoader's worker, forked beside the group's threads, may hang
                run.terminate()  # torchrun ends its processes
                if last:
                    raise
    return None


def assert_same(found, expected, where=""):
    """Any nest of numbers and tensors."""

    def told(said):
        return f"{where}\n{said}"

    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True, msg=told)
