"""Fixtures and settings of all tests."""

import getpass
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from minikeras.checkpoint import fits

# Inductor caches graphs whose C++ is for one instruction set, and does not look at which. A suite
# that runs with another ATEN_CPU_CAPABILITY must not find them: they do not compile there.
CAPABILITY = torch.backends.cpu.get_cpu_capability().replace(" ", "_")
GRAPHS = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{CAPABILITY}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(GRAPHS))

pytest.register_assert_rewrite("helpers")  # so that a failure there shows the values

collect_ignore = ["typed"]  # for type checkers to read, not to run


# No test may depend on how busy the machine is.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def each_fit_in_a_process_of_its_own(monkeypatch):
    """Treat each fit as one of a process of its own, as if the script was started again."""
    monkeypatch.setattr(fits, "may_be_the_same", lambda before, now: True)


@pytest.fixture(autouse=True)
def _gpu_tests_need_one(request):
    if request.node.get_closest_marker("gpu") and not torch.accelerator.is_available():
        pytest.skip("needs an accelerator")


@pytest.fixture
def quick_disk(monkeypatch):
    """Waiting for the disk is what test_kills.py is for."""
    monkeypatch.setattr("minikeras.support.atomic.flush", lambda path: None)


@pytest.fixture
def one_thread():
    """The networks are small, and other work may share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
