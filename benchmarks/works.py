"""The works that are timed: data, network, loss and metric of each, the same for every variant.

Everything is fixed by a seed: the data by DATA_SEED, the first weights by NET_SEED. Only the order
of the rows changes from round to round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

DATA_SEED = 0
NET_SEED = 1


@dataclass
class Work:
    """A work to be timed.

    `make_net(base)` creates a network of a base class: nn.Module, or a library's own Model.
    """

    X: Tensor  # (rows, ...)
    y: Tensor  # (rows, 1) of 0. and 1., or (rows,) of classes; empty for predict
    net_class: Callable[[type], type]
    make_loss: Callable[[nn.Module], nn.Module]  # of a network, since penalties need its weights
    metric: Callable[[Tensor, Tensor], Tensor]
    lr: float
    batch_size: int
    workers: int  # of the DataLoader
    warm: int  # epochs before the clock starts
    epochs: int  # epochs on the clock
    tolerance: float  # of the final loss, relative: see README.md
    device: str = "cpu"

    @property
    def steps(self) -> int:
        """The number of batches in an epoch; the last may be short."""
        return -(-len(self.X) // self.batch_size)

    def make_net(self, base: type = nn.Module) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(NET_SEED)
            return self.net_class(base)().to(self.device)

    def loader(self) -> DataLoader[Any]:
        dataset = TensorDataset(self.X, self.y)
        return DataLoader(
            dataset, batch_size=self.batch_size, shuffle=True, num_workers=self.workers
        )


# --- ring: rare positives, 61 parameters ---


def ring_net(base: type) -> type:
    class DNNModel(base):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(2, 4)
            self.fc2 = nn.Linear(4, 8)
            self.fc3 = nn.Linear(8, 1)

        def forward(self, x):
            return torch.sigmoid(self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x))))))

    return DNNModel


def focal(y_pred: Tensor, y_true: Tensor, gamma: float = 2.0, alpha: float = 0.75) -> Tensor:
    bce = F.binary_cross_entropy(y_pred, y_true, reduction="none")
    p_t = y_true * y_pred + (1 - y_true) * (1 - y_pred)
    alpha_factor = y_true * alpha + (1 - y_true) * (1 - alpha)
    return (alpha_factor * (1.0 - p_t) ** gamma * bce).mean()


class RingLoss(nn.Module):
    """Focal loss and penalties 0.001 each over a ready list of weights: the fastest plain way."""

    def __init__(self, net: nn.Module):
        super().__init__()
        # A tuple is no part of parameters().
        self.weights = tuple(p for name, p in net.named_parameters() if "bias" not in name)

    def forward(self, y_pred, y_true):
        loss = focal(y_pred, y_true)
        for weight in self.weights:
            loss = loss + 0.001 * weight.abs().sum() + 0.0005 * weight.square().sum()
        return loss


class RingLossAsPrinted(nn.Module):
    """The same sum as in tutorials: each penalty walks over all parameters at each step."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = (net,)

    def forward(self, y_pred, y_true):
        return focal(y_pred, y_true) + self.l2(0.001) + self.l1(0.001)

    def l2(self, alpha):
        loss = torch.tensor(0.0, requires_grad=True)
        for name, param in self.net[0].named_parameters():
            if "bias" not in name:
                loss = loss + 0.5 * alpha * torch.sum(torch.pow(param, 2))
        return loss

    def l1(self, beta):
        loss = torch.tensor(0.0, requires_grad=True)
        for name, param in self.net[0].named_parameters():
            if "bias" not in name:
                loss = loss + beta * torch.sum(torch.abs(param))
        return loss


def binary_accuracy(y_pred: Tensor, y_true: Tensor) -> Tensor:
    return ((y_pred > 0.5) == (y_true > 0.5)).float().mean()


def ring(workers: int = 2) -> Work:
    radius = torch.cat([5 + torch.randn(200, 1), 8 + torch.randn(6000, 1)])
    angle = 2 * torch.pi * torch.rand(6200, 1)
    X = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    y = torch.cat([torch.ones(200, 1), torch.zeros(6000, 1)])
    rows = torch.randperm(6200)[:4340]
    return Work(
        X[rows],
        y[rows],
        ring_net,
        RingLoss,
        binary_accuracy,
        lr=0.01,
        batch_size=100,
        workers=workers,
        warm=5,
        epochs=100,
        tolerance=0.08,
    )


# --- mlp and conv: ten classes ---


def mlp_net(base: type) -> type:
    class MLP(base):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(784, 256)
            self.fc2 = nn.Linear(256, 128)
            self.fc3 = nn.Linear(128, 10)

        def forward(self, x):
            return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))

    return MLP


def conv_net(base: type) -> type:
    class ConvNet(base):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
            self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
            self.fc = nn.Linear(16 * 7 * 7, 10)

        def forward(self, x):
            x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
            x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
            return self.fc(x.flatten(1))

    return ConvNet


def cross_entropy(net: nn.Module) -> nn.Module:
    return nn.CrossEntropyLoss()


def class_accuracy(y_pred: Tensor, y_true: Tensor) -> Tensor:
    return (y_pred.argmax(1) == y_true).float().mean()


def templates(rows: int) -> tuple[Tensor, Tensor]:
    """Draw noise (rows, 1, 28, 28) with a faint template of one of ten classes, and the classes.

    Three labels in ten are drawn again, so that the loss falls to a plateau and not to zero, where
    the order of the rows alone would change it by half.
    """
    y = torch.randint(10, (rows,))
    blocks = F.interpolate(torch.randn(10, 1, 7, 7), size=28)
    X = torch.randn(rows, 1, 28, 28) + 0.15 * blocks[y]
    is_redrawn = torch.rand(rows) < 0.3
    return X, torch.where(is_redrawn, torch.randint(10, (rows,)), y)


def mlp() -> Work:
    X, y = templates(20_000)
    return Work(
        X.flatten(1),
        y,
        mlp_net,
        cross_entropy,
        class_accuracy,
        lr=1e-3,
        batch_size=128,
        workers=0,
        warm=1,
        epochs=3,
        tolerance=0.14,
    )


def conv() -> Work:
    X, y = templates(4_000)
    return Work(
        X,
        y,
        conv_net,
        cross_entropy,
        class_accuracy,
        lr=1e-3,
        batch_size=64,
        workers=0,
        warm=1,
        epochs=5,
        tolerance=0.06,
    )


# --- predict ---


def predict_net(base: type) -> type:
    class Scores(base):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(20, 64)
            self.fc2 = nn.Linear(64, 1)

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x)))

    return Scores


def predict() -> Work:
    X = torch.randn(1_000_000, 20)
    return Work(
        X,
        torch.empty(0),
        predict_net,
        cross_entropy,
        class_accuracy,
        lr=0.0,
        batch_size=1000,
        workers=0,
        warm=1,
        epochs=2,
        tolerance=1e-5,
    )


WORKS = {
    "ring": ring,
    "ring0": lambda: ring(workers=0),
    "mlp": mlp,
    "conv": conv,
    "predict": predict,
}


def make_work(name: str, quick: bool = False, device: str = "cpu") -> Work:
    torch.manual_seed(DATA_SEED)
    work = WORKS[name]()
    work.device = device
    if quick:
        work.epochs = max(1, work.epochs // 5)
    return work
