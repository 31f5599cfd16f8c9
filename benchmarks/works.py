"""The works that are timed: data, network, loss and metric of each, the same for every variant.

Everything is fixed by a seed: the data by DATA_SEED, the first weights by NET_SEED. Only the order
of the rows changes from round to round.

mlp, conv, loader and transformer have more rows or larger networks on a GPU: what takes a core
some milliseconds takes a GPU less time than Python needs to launch it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

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
    by_row: bool = False  # rows come from __getitem__ in the workers, batches in pinned memory
    bf16: bool = False  # forward and loss under torch.autocast
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
        if self.by_row:
            return DataLoader(
                Rows(self.X, self.y),
                batch_size=self.batch_size,
                shuffle=True,
                num_workers=self.workers,
                pin_memory=self.device != "cpu",  # without a GPU it only warns
                persistent_workers=True,  # the clock is for steps, not for starting workers
            )
        dataset = TensorDataset(self.X, self.y)
        return DataLoader(
            dataset, batch_size=self.batch_size, shuffle=True, num_workers=self.workers
        )

    def loader_on_device(self) -> DataLoader[Any]:
        """Return a loader of data that the user has moved to the device, before the clock starts.

        Workers cannot read it there.
        """
        dataset = TensorDataset(self.X.to(self.device), self.y.to(self.device))
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=True)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for forward and loss of a loop written by hand."""
        if self.bf16:
            return torch.autocast(torch.device(self.device).type, torch.bfloat16)
        return contextlib.nullcontext()


class Rows(Dataset[Any]):
    """A data set as users write one: a row at a time."""

    def __init__(self, X: Tensor, y: Tensor):
        self.X = X
        self.y = y

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.X[row], self.y[row]


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


# --- mlp, conv and loader: ten classes ---


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


def conv_net(channels: int) -> Callable[[type], type]:
    def net(base: type) -> type:
        class ConvNet(base):
            def __init__(self):
                super().__init__()
                self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
                self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
                self.fc = nn.Linear(2 * channels * 7 * 7, 10)

            def forward(self, x):
                x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
                x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
                return self.fc(x.flatten(1))

        return ConvNet

    return net


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
    return X, redrawn(y)


def redrawn(y: Tensor) -> Tensor:
    """Draw three labels in ten again."""
    is_redrawn = torch.rand(len(y)) < 0.3
    return torch.where(is_redrawn, torch.randint(10, y.shape), y)


def mlp(on_gpu: bool) -> Work:
    X, y = templates(100_000 if on_gpu else 20_000)
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


def conv(on_gpu: bool, by_row: bool = False) -> Work:
    X, y = templates(20_000 if on_gpu else 4_000)
    return Work(
        X,
        y,
        conv_net(256 if on_gpu else 8),
        cross_entropy,
        class_accuracy,
        lr=1e-4 if on_gpu else 1e-3,
        batch_size=256 if on_gpu else 64,
        workers=2 if by_row else 0,
        warm=1,
        epochs=5,
        tolerance=0.06,
        by_row=by_row,
    )


# --- transformer: one block on tokens, in bf16 ---

VOCABULARY = 1000


def transformer_net(tokens: int, width: int, heads: int) -> Callable[[type], type]:
    def net(base: type) -> type:
        class Transformer(base):
            def __init__(self):
                super().__init__()
                self.tokens = nn.Embedding(VOCABULARY, width)
                self.places = nn.Parameter(0.02 * torch.randn(tokens, width))
                self.block = nn.TransformerEncoderLayer(
                    width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
                )
                self.fc = nn.Linear(width, 10)

            def forward(self, x):
                return self.fc(self.block(self.tokens(x) + self.places).mean(1))

        return Transformer

    return net


def transformer(on_gpu: bool) -> Work:
    """One token in ten, on average, tells the class by its last digit."""
    rows, tokens, width, heads = (6_400, 512, 512, 8) if on_gpu else (1_024, 32, 64, 4)
    y = torch.randint(10, (rows,))
    X = torch.randint(VOCABULARY, (rows, tokens))
    tells = torch.rand(rows, tokens) < 0.1
    X = torch.where(tells, X // 10 * 10 + y.unsqueeze(1), X)
    return Work(
        X,
        redrawn(y),
        transformer_net(tokens, width, heads),
        cross_entropy,
        class_accuracy,
        lr=1e-4 if on_gpu else 1e-3,
        batch_size=64 if on_gpu else 32,
        workers=0,
        warm=1,
        epochs=3 if on_gpu else 5,
        tolerance=0.08,
        bf16=True,
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


def predict(on_gpu: bool) -> Work:
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
        epochs=10 if on_gpu else 2,
        tolerance=1e-5,
    )


WORKS: dict[str, Callable[[bool], Work]] = {
    "ring": lambda on_gpu: ring(),
    "ring0": lambda on_gpu: ring(workers=0),
    "mlp": mlp,
    "conv": conv,
    "loader": lambda on_gpu: conv(on_gpu, by_row=True),
    "transformer": transformer,
    "predict": predict,
}


def make_work(name: str, quick: bool = False, device: str = "cpu") -> Work:
    torch.manual_seed(DATA_SEED)
    work = WORKS[name](device != "cpu")
    work.device = device
    if quick:
        work.epochs = max(1, work.epochs // 5)
    return work
