"""What the callbacks of experiment trackers share: when a run begins, goes on and ends, and what is logged under which
name.

on_epoch_begin, the first of a fit    the run is opened: a new one, or the one that this callback has logged to already
on_epoch_end                          the epoch's row of the history, and the learning rates, under the columns' names
on_fit_end                            the run is closed: finished, or failed with the error that ended the fit
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

import minikeras
from minikeras.errors import described


class Tracker(minikeras.Callback):
    """Logs each epoch of a fit to a run; of several processes rank 0 does. A subclass opens, writes and closes it.

    Fits whose epochs go on counting go on in the same run, as does a fit carried on from its checkpoint; an epoch that
    the run has already is not logged again. A fit that begins with epoch 1, as after `compile`, is a new run.
    """

    def __init__(self) -> None:
        self.run_id: str | None = None  # None until a run is there
        self.epoch = 0  # the last one logged
        self.logged = 0  # the last one that the run held already as it was opened
        self.opened = False  # there is something to close
        self.carried_on = False  # from a checkpoint

    def open(self, epoch: int) -> None:
        """The run of `self.run_id`, or a new one, from this epoch on."""
        raise NotImplementedError

    def write(self, epoch: int, values: dict[str, float]) -> None:
        """One epoch's values."""
        raise NotImplementedError

    def close(self, error: BaseException | None) -> None:
        """The run has ended, with that error if there was one."""
        raise NotImplementedError

    def anew(self) -> None:
        """What was logged so far is of another run."""
        self.run_id, self.epoch, self.logged = None, 0, 0

    def on_fit_begin(self) -> None:
        self.carried_on = False
        self.outer = sys.exception()  # fit may have been called where an error is being handled

    def on_epoch_begin(self, epoch: int) -> None:
        if self.opened or not self.model.is_main_process:
            return
        if epoch <= self.epoch or (epoch == 1 and not self.carried_on):
            self.anew()
        self.open(epoch)
        self.opened = True

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if self.opened and epoch > self.logged:
            self.write(epoch, self.values(logs))
        self.epoch = epoch

    def on_fit_end(self) -> None:
        error = sys.exception()
        if self.opened:
            self.opened = False
            self.close(None if error is self.outer else error)

    def values(self, logs: Mapping[str, float]) -> dict[str, float]:
        """The logs, and the learning rates that no callback has logged, under the columns' names."""
        found = dict(logs)
        for name, rate in rates(getattr(self.model, "optimizer", None)).items():
            found.setdefault(name, rate)
        return {name: float(value) for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.run_id, self.epoch = state["run_id"], state["epoch"]
        self.carried_on = True


def rates(optimizer: Any) -> dict[str, float]:
    """The learning rate of each optimizer's first group, under the history's name for it.

    >>> import torch
    >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    >>> rates(sgd), rates({"g": sgd, "d": sgd})
    ({'lr': 0.5}, {'lr_g': 0.5, 'lr_d': 0.5})
    """
    named = optimizer if isinstance(optimizer, Mapping) else {"": optimizer}
    found = [
        (f"lr_{name}" if name else "lr", one)
        for name, one in named.items()
        if isinstance(one, Optimizer)
    ]
    first = {name: one.param_groups[0].get("lr") for name, one in found}
    return {name: float(rate) for name, rate in first.items() if rate is not None}


def as_dict(name: str, value: Any) -> dict[str, Any]:
    """What a run was made with, under its names."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f'{name} must be a dict of name -> value, got {described(value)}. Pass such as {{"lr": 0.1}}.'
        )
    return dict(value)


def imported(module: str, who: str, packages: str) -> Any:
    """Import a module of an optional package; if it is missing, the error names the `packages` to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{who} needs a package: pip install {packages}") from error
