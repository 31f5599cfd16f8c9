"""SIGKILL at any moment, in real processes; helpers/kills.py does it."""

import subprocess
import sys

import pytest
from helpers.paths import TESTS

KILLS = TESTS / "helpers" / "kills.py"


def stress(kills, seed):
    command = [sys.executable, str(KILLS), "--kills", str(kills), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith(" 0 differences")


def test_runs_killed_again_and_again_end_as_runs_never_stopped():
    stress(kills=10, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_runs_killed_hundreds_of_times_end_as_runs_never_stopped(seed):
    stress(kills=100, seed=seed)
