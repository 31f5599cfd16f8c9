"""Fits with callbacks, and a callback that resumes the others."""

import copy
import math

from torch import nn

from helpers.compare import copy_weights
from helpers.models import compiled, points
from minikeras import (
    Callback,
    LambdaCallback,
    Model,
)

NAN = math.nan
X, Y = points(40)
BATCHES = [(X[:16], Y[:16]), (X[16:32], Y[16:32]), (X[32:], Y[32:])]  # the same order in each epoch


def log(name, values, skip=()):
    """Return a callback that logs these values, one an epoch; None logs nothing."""
    values = iter(values)

    def add(epoch, logs):
        value = next(values)
        if value is not None:
            logs[name] = value

    return LambdaCallback(on_epoch_end=add)


def fit(epochs, callbacks, model=None, val=None, **kwargs):
    model = compiled() if model is None else model
    return model, model.fit(epochs, BATCHES, val, callbacks=callbacks, **{"verbose": 0, **kwargs})


class Loader(Callback):
    """Load the saved state of a run, after on_fit_begin of the other callbacks."""

    def __init__(self, others, saved):
        self.others = others
        self.saved = saved

    def on_fit_begin(self):
        self.model.load_state_dict(self.saved["model"])
        self.model.optimizer.load_state_dict(self.saved["optimizer"])
        for callback, state in zip(self.others, self.saved["callbacks"], strict=True):
            callback.load_state_dict(state)


def nn_with_batch_norm():
    return Model(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Sigmoid()))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def saved_now(*callbacks):
    model = compiled()
    states = copy.deepcopy([callback.state_dict() for callback in callbacks])
    return {
        "model": copy_weights(model),
        "optimizer": model.optimizer.state_dict(),
        "callbacks": states,
    }
