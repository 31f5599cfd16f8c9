"""Calls of fit of many kinds, to be run whole, or interrupted and resumed."""

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import minikeras
from helpers.compare import copy_weights
from helpers.datasets import AsItGoes, ShuffledPairs
from helpers.metrics import Scaled
from helpers.models import accuracy, points
from helpers.samplers import Buckets, Pool
from helpers.seeds import seeded

X, Y = points(90)
EPOCHS = 3


class Noisy(Dataset):
    """Draw noise for a row at each reading, from all three generators."""

    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        noise = torch.rand(()).item() + np.random.rand() + random.random()
        return X[row] + 0.1 * noise, Y[row]


class Shuffled(IterableDataset):
    def __iter__(self):
        for row in torch.randperm(len(X)):
            yield X[row], Y[row]


class Batches:
    """A custom iterable with its own generator."""

    def __init__(self):
        self.generator = np.random.default_rng(3)

    def __iter__(self):
        order = torch.from_numpy(self.generator.permutation(len(X)))
        for rows in order.split(20):
            yield X[rows], Y[rows]


class Mean:
    """A custom metric object, which keeps what it has seen."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.seen = []
        self.total = 0.0

    def update(self, outputs, labels):
        self.seen.append(outputs.cpu().numpy())
        self.total += float(labels.sum())

    def compute(self):
        return float(np.concatenate(self.seen).mean()) + self.total


class Stepping(nn.Module):
    """A buffer that state_dict leaves out, and one that it holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("hidden", torch.zeros(()), persistent=False)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        if self.training:
            self.hidden += 0.01
        return self.norm(x) + self.hidden


class Net(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 8), Stepping(), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1), nn.Sigmoid()
        )

    def forward(self, x):
        return self.layers(x)


class Scores(Net):
    """Raw scores, as a loss in half precision takes them."""

    def forward(self, x):
        return self.layers[:-1](x)


class Centered(Scaled):
    """A loss with a parameter, and with buffers, one of which no state_dict holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(()))
        self.register_buffer("hidden", torch.ones(()), persistent=False)

    def forward(self, y_pred, y_true):
        self.center.mul_(0.9).add_(0.1 * y_pred.detach().mean())
        self.hidden = self.hidden * 0.9 + 0.05
        return super().forward(y_pred, y_true) * (1 + self.center) * self.hidden


class Pair(minikeras.Model):
    """Two optimizers, each with its own loss."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 1)
        self.b = nn.Linear(2, 1)

    def forward(self, x):
        return torch.sigmoid(self.a(x) + self.b(x))

    def train_step(self, features, labels):
        losses = {}
        for name in ("a", "b"):
            losses[name] = self.compute_loss(self(features), labels)
            self.backward(losses[name], name)
            self.optimizer_step(name)
        return {"loss": losses["b"], "first": losses["a"]}


class Jittered(Dataset):
    """Draw noise for each row from generators that only attributes and containers reach."""

    def __init__(self):
        self.transforms = [{"rng": np.random.default_rng(0)}, random.Random(0)]

    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        return X[row] + 0.1 * (self.transforms[0]["rng"].random() + self.transforms[1].random()), Y[
            row
        ]


class ByEpoch(Sampler):
    """Shuffle by the epoch's number alone."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(X)

    def __iter__(self):
        return iter(
            torch.randperm(len(X), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        )


def noisy_collate():
    """Return a collate function that closes over a generator."""
    rng = random.Random(0)

    def collate(rows):
        features, labels = default_collate(rows)
        return features + 0.1 * rng.random(), labels

    return collate


def memory(**kwargs):
    return DataLoader(TensorDataset(X, Y), batch_size=20, **kwargs)


def noisy(**kwargs):
    return DataLoader(Noisy(), batch_size=20, **kwargs)


def stateful():
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(Noisy(), batch_size=20, shuffle=True)


LOADERS = {
    "arrays": lambda: (X, Y),
    "list of batches": lambda: list(zip(X.split(20), Y.split(20), strict=True)),
    "in memory": lambda: memory(shuffle=True),
    "in memory, own generator": lambda: memory(shuffle=True, generator=seeded()),
    "in memory, 2 workers": lambda: memory(shuffle=True, num_workers=2),
    "in memory, replacement": lambda: memory(
        sampler=RandomSampler(X, replacement=True, generator=seeded())
    ),
    "persistent workers": lambda: memory(shuffle=True, num_workers=1, persistent_workers=True),
    "noisy": lambda: noisy(shuffle=True),
    "noisy, own generator": lambda: noisy(shuffle=True, generator=seeded()),
    "noisy, 2 workers": lambda: noisy(shuffle=True, num_workers=2),
    "noisy, weighted": lambda: noisy(sampler=WeightedRandomSampler(torch.arange(1.0, 91.0), 90)),
    "noisy, replacement": lambda: noisy(
        sampler=RandomSampler(X, replacement=True, generator=seeded())
    ),
    "noisy, batch sampler": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(X), 20, True)
    ),
    "noisy, whole batches": lambda: DataLoader(
        Noisy(),
        batch_size=None,
        sampler=BatchSampler(RandomSampler(X), 20, False),
        collate_fn=lambda rows: rows,
    ),
    "counting sampler": lambda: noisy(sampler=DistributedSampler(Noisy(), num_replicas=1, rank=0)),
    "generators of its own": lambda: DataLoader(Jittered(), batch_size=20, shuffle=True),
    "noisy, drawn row by row": lambda: noisy(sampler=Pool(len(X))),
    "in memory, drawn row by row": lambda: memory(sampler=Pool(len(X))),
    "noisy, buckets": lambda: DataLoader(Noisy(), batch_sampler=Buckets(len(X), 15)),
    "sampler by the epoch": lambda: noisy(sampler=ByEpoch()),
    "collate, a closure": lambda: memory(shuffle=True, collate_fn=noisy_collate()),
    "iterable, own generator": Batches,
    "iterable, drawn as it goes": lambda: AsItGoes(X, Y, 5, 18),
    "iterable, shuffled in place": lambda: ShuffledPairs(X, Y),
    "iterable dataset": lambda: DataLoader(Shuffled(), batch_size=20),
    "stateful": stateful,
}


def call_of(loader="in memory", **changes):
    """Return the model and the arguments of a call of fit."""
    # new ones each time
    changes = {key: value() if callable(value) else value for key, value in changes.items()}
    kind = changes.pop("model", "net")
    model, loss = (Pair(), nn.BCELoss()) if kind == "pair" else (Net(), Scaled())
    if kind == "scores":
        model = Scores()
        loss = nn.BCEWithLogitsLoss()
    if kind == "centered":
        loss = Centered()
    if kind == "growing":  # a callback thaws its first layer
        model.layers[0].requires_grad_(False)
    if kind == "pair":
        optimizer = {
            "a": torch.optim.Adam(model.a.parameters(), lr=0.01),
            "b": torch.optim.SGD(model.b.parameters(), lr=0.1, momentum=0.9),
        }
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW([*trained, *loss.parameters()], lr=0.01)
    metrics = {"accuracy": accuracy, "mean": Mean()} if kind != "pair" else {}
    options = {"device": "cpu"} | changes.pop("compile", {})
    model.compile(loss, optimizer, metrics | changes.pop("metrics", {}), **options)
    arguments = {
        "epochs": EPOCHS,
        "dl_train": LOADERS[loader](),
        "dl_val": noisy(shuffle=True),
        "verbose": 0,
    }
    return model, arguments | changes


def result_of(model, dfhistory):
    """Return what must be the same: history, weights, and what is drawn next."""
    drawn = torch.rand(()).item(), np.random.rand(), random.random()
    return dfhistory, copy_weights(model), drawn


def differences(a, b):
    """List what differs between two results, bit for bit."""
    found = (
        []
        if a[0].equals(b[0])
        else [f"history:\n{a[0].compare(b[0]) if a[0].shape == b[0].shape else b[0]}"]
    )
    found += [key for key in a[1] if not torch.equal(a[1][key], b[1][key])]
    return found + ["what is drawn next"] * (a[2] != b[2])
