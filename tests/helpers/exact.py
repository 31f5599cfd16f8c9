"""A script that fits with a checkpoint, is killed, and is started again."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    TensorDataset,
)

import minikeras
from helpers.compare import copy_weights
from helpers.interruptions import Killed, killed_after
from helpers.runs import differences
from helpers.seeds import seed

X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
Y = X.sum(dim=1, keepdim=True)


def start(make, path=None, kill=None, epochs=3, every=1):
    """Run a script from its first line; `make` returns its parts."""
    seed()
    parts = {
        "loss": nn.MSELoss,
        "net": lambda: nn.Linear(2, 1),
        "data": lambda: (X, Y),
        "callbacks": list,
    }
    parts |= make()
    net = parts["net"]()
    model = net if isinstance(net, minikeras.Model) else minikeras.Model(net)
    loss = parts["loss"]()
    trained = [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]
    optimizer = parts.get(
        "optimizer", lambda trained: torch.optim.SGD(trained, lr=0.02, momentum=0.9)
    )(trained)
    model.compile(loss, optimizer, device="cpu", **parts.get("compile", {}))
    data = parts["data"]()
    callbacks = [*parts["callbacks"](), *([] if kill is None else [killed_after(kill)])]
    kwargs = {"batch_size": 20} if isinstance(data, (tuple, Dataset)) else {}
    if path is not None:
        kwargs |= {"checkpoint": path, "checkpoint_every": every}
    model.fit(epochs, data, callbacks=callbacks, verbose=0, **parts.get("fit", {}), **kwargs)
    state = copy_weights(model)
    drawn = torch.rand(()).item(), np.random.rand(), random.random()
    return model.history, state, drawn, model


def assert_exact(make, tmp_path, kills=(4, 7), epochs=3):
    whole = start(make, epochs=epochs)
    for kill in kills:
        path = tmp_path / f"{kill}.pt"
        with pytest.raises(Killed):
            start(make, path, kill, epochs)
        assert differences(whole, start(make, path, epochs=epochs)) == []


GENERATORS = {
    "numpy": lambda: np.random.default_rng(0),
    "numpy, old": lambda: np.random.RandomState(0),
    "python": lambda: random.Random(0),
    "torch": lambda: torch.Generator().manual_seed(0),
}


def draw(generator):
    if isinstance(generator, torch.Generator):
        return torch.randn((), generator=generator).item()
    return generator.normal() if hasattr(generator, "normal") else generator.gauss(0, 1)


class Jitter:
    def __init__(self, kind="numpy"):
        self.rng = GENERATORS[kind]()

    def __call__(self, x):
        return x + 0.1 * draw(self.rng)


class Transformed(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 60

    def __getitem__(self, row):
        return self.transform(X[row]), Y[row]


def loader(dataset=None, **kwargs):
    kwargs = (
        {"shuffle": True} | kwargs if not {"sampler", "batch_sampler"} & kwargs.keys() else kwargs
    )
    if "batch_sampler" not in kwargs:
        kwargs["batch_size"] = 20
    return DataLoader(dataset or TensorDataset(X, Y), **kwargs)


def dropped_out():
    return nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
