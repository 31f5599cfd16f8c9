"""Little networks with data, as people write them, for the tests of `model.diagnose`."""

import numpy as np
import torch
from sklearn import datasets
from torch import nn

import minikeras


def to_tensor(array, dtype=torch.float32):
    return torch.tensor(np.asarray(array), dtype=dtype)


_digits = datasets.load_digits()
DIGITS = to_tensor(_digits.data / 16)  # (1797, 64)
DIGIT_CLASSES = to_tensor(_digits.target, torch.long)
CANCER = datasets.load_breast_cancer(as_frame=True)


def adam(parameters):
    return torch.optim.Adam(parameters, 1e-3)


def mlp(inputs, outputs, width=64, activation=nn.ReLU, *between):
    return nn.Sequential(
        nn.Linear(inputs, width),
        *between,
        activation(),
        nn.Linear(width, width),
        activation(),
        nn.Linear(width, outputs),
    )


def compiled(net, loss_func, make_optimizer=adam, **options):
    """Return a compiled model; without `make_optimizer` with the default optimizer."""
    model = net if isinstance(net, minikeras.Model) else minikeras.Model(net)
    optimizer = make_optimizer(model.parameters()) if make_optimizer else None
    model.compile(loss_func, optimizer, device="cpu", **options)
    return model


def split(X, y, rows):
    """Return data of training and validation."""
    return (X[:rows], y[:rows]), (X[rows:], y[rows:])


def digits(net, make_optimizer=adam, loss_func=None, X=DIGITS, y=DIGIT_CLASSES, **options):
    """Return a model of digits, and its data."""
    model = compiled(net, loss_func or nn.CrossEntropyLoss(), make_optimizer, **options)
    return model, *split(X, y, 1400)


def standardized(frame):
    return (frame - frame.mean()) / frame.std()


def train_quietly(model, *data, epochs):
    model.fit(epochs, *data, verbose=0, on_nan="ignore")
    return model
