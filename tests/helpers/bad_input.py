"""Data, models and messages of the tests of wrong input."""

import contextlib
import copy
import re

import pytest
import torch
from torch import nn

from helpers.compare import copy_weights
from minikeras import Model

random = torch.Generator().manual_seed(0)
X = torch.randn(8, 4, generator=random)
Y = torch.randn(8, 1, generator=random)
S = X[:, :3]  # raw scores of 3 classes
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
# 8 numbers between 0 and 1 each
COLUMN = torch.rand(8, 1, generator=random)
ROW = torch.rand(8, generator=random)
OTHER_ROW = torch.rand(8, generator=random)
ONES = torch.ones(8, 1)
MAPS = torch.rand(8, 1, 5, 5, generator=random)
CE = nn.CrossEntropyLoss()


class Scale(nn.Module):
    """A network whose outputs are the features, with a weight to train."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.weight


def compiled(net=None, loss=None, optimizer=None, metrics=None, kind=Model):
    """Return a compiled model on the CPU; `optimizer` is a function of it."""
    torch.manual_seed(0)
    model = kind(nn.Linear(4, 1) if net is None else copy.deepcopy(net))
    model.compile(loss or nn.MSELoss(), optimizer and optimizer(model), metrics, device="cpu")
    return model


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@contextlib.contextmanager
def refused(message, model=None):
    """Check that the block ends in exactly this error, before a weight has moved.

    `message` begins with the error's class, "ValueError: ". If it ends with "...", it is the first
    clause alone: another case pins the message whole.
    """
    before = {} if model is None else copy_weights(model)
    with pytest.raises(Exception) as error:  # noqa: PT011
        yield error
    raised = f"{error.type.__name__}: {error.value}"
    if message.endswith("..."):
        assert raised.startswith(message.removesuffix("..."))
    else:
        assert raised == message
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def cases(table, messages):
    """Pair the cases of a table with their messages.

    `messages` has a "name | message" per case, or "name | name | message".
    """
    told = {}
    for entry in re.split(r"\n(?! )", messages.strip()):
        *names, message = " ".join(entry.split()).split(" | ")
        told |= dict.fromkeys(names, message)
    assert list(told) == list(table)
    return [pytest.param(table[name], told[name], id=name) for name in table]


IT_BROADCASTS = "predictions (8, 1) and labels (8,) would broadcast to (8, 8). "
IT_BROADCASTS += (
    "Pass labels.unsqueeze(-1), in NumPy labels[:, None], in pandas labels.to_frame(), "
)
IT_BROADCASTS += "or squeeze the predictions."


def fits_badly(message, data=(X, Y), epochs=1, model=None, **arguments):
    model = compiled(**(model or {}))
    with refused(message, model):
        model.fit(epochs, data, **{"verbose": 0, **arguments})
