"""A small network, its data and its metric, which many tests share."""

import torch
from torch import nn

import minikeras


class Net(minikeras.Model):
    """A network of two inputs and one probability."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(2, 8)
        self.fc2 = nn.Linear(8, 1)

    def forward(self, x):
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(x))))


def accuracy(y_pred, y_true):
    return ((y_pred > 0.5) == (y_true > 0.5)).float().mean()


def points(rows=100):
    """Return points in the plane, (rows, 2), and whether each is outside the circle, (rows, 1)."""
    X = torch.randn(rows, 2, generator=torch.Generator().manual_seed(rows))
    return X, (X.norm(dim=1, keepdim=True) > 1).float()


def compiled(model=None, loss_func=None, metrics_dict=None, lr=0.1, **kwargs):
    """Return a model compiled with SGD on the CPU."""
    model = Net() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model.compile(loss_func or nn.BCELoss(), optimizer, metrics_dict, device="cpu", **kwargs)
    return model
