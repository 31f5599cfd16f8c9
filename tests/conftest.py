"""Data and networks that many tests share."""

import getpass
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

import minikeras
from minikeras.checkpoint import fits

# Inductor caches graphs whose C++ is for one instruction set, and does not look at which. A suite
# that runs with another ATEN_CPU_CAPABILITY must not find them: they do not compile there.
CAPABILITY = torch.backends.cpu.get_cpu_capability().replace(" ", "_")
GRAPHS = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{CAPABILITY}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(GRAPHS))

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
    """For tests that start a changed script again in one process, which the library would take for another fit."""
    monkeypatch.setattr(fits, "may_be_the_same", lambda before, now: True)


@pytest.fixture(autouse=True)
def _gpu_tests_need_one(request):
    if request.node.get_closest_marker("gpu") and not torch.accelerator.is_available():
        pytest.skip("needs an accelerator")


class Net(minikeras.Model):
    """Two inputs, one probability."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(2, 8)
        self.fc2 = nn.Linear(8, 1)

    def forward(self, x):
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(x))))


def accuracy(y_pred, y_true):
    return ((y_pred > 0.5) == (y_true > 0.5)).float().mean()


def points(rows=100):
    """Points in the plane, and whether each is farther than 1 from the origin; (rows, 2) and (rows, 1)."""
    X = torch.randn(rows, 2, generator=torch.Generator().manual_seed(rows))
    return X, (X.norm(dim=1, keepdim=True) > 1).float()


def compiled(model=None, loss_func=None, metrics_dict=None, lr=0.1, **kwargs):
    """A model ready to fit by SGD on the CPU."""
    model = Net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model.compile(loss_func or nn.BCELoss(), optimizer, metrics_dict, device="cpu", **kwargs)
    return model
