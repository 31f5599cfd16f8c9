"""What the callbacks of experiment trackers share: when a run is opened and closed, what is logged.

on_epoch_begin, the first of a fit    open the run: a new one, or the one that this callback has
                                      logged to already
on_epoch_end                          log the epoch's row of the history, and the learning rates,
                                      under the columns' names
on_fit_end                            close the run: finished, or failed with the error that ended
                                      the fit
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

import minikeras
from minikeras.errors import describe


class Tracker(minikeras.Callback):
    """Log each epoch of a fit to a run; a subclass opens, writes and closes the run.

    With several processes rank 0 logs. Fits that continue the numbering of the epochs continue the
    same run, and so does a fit resumed from its checkpoint; an epoch that the run already has is
    not logged again. A fit that begins with epoch 1, as after `compile`, is a new run.
    """

    opened: tuple[str, ...] = ()  # attributes that `open` sets and no copy can hold

    def __init__(self) -> None:
        self.run_id: str | None = None  # None until there is a run
        self.last_epoch = 0  # the last epoch that was logged
        self.logged_before = 0  # the last epoch that the run had when it was opened
        self.is_open = False  # the run must be closed
        self.is_resumed = False  # from a checkpoint
        self.outer_error: BaseException | None = None  # being handled when the fit began

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and deepcopy, without what was opened for a run."""
        return {name: value for name, value in vars(self).items() if name not in self.opened}

    def open(self, epoch: int) -> None:
        """Open the run `self.run_id`, or a new run, from this epoch on."""
        raise NotImplementedError

    def write(self, epoch: int, values: dict[str, float]) -> None:
        """Log the values of one epoch."""
        raise NotImplementedError

    def close(self, error: BaseException | None) -> None:
        """Close the run; with the error that ended the fit, if there was one."""
        raise NotImplementedError

    def start_new_run(self) -> None:
        """Forget the run that was logged to so far."""
        self.run_id = None
        self.last_epoch = 0
        self.logged_before = 0

    def on_fit_begin(self) -> None:
        self.is_resumed = False
        self.outer_error = sys.exception()

    def on_epoch_begin(self, epoch: int) -> None:
        if self.is_open or not self.model.is_main_process:
            return
        if epoch <= self.last_epoch or (epoch == 1 and not self.is_resumed):
            self.start_new_run()
        self.open(epoch)
        self.is_open = True

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if self.is_open and epoch > self.logged_before:
            self.write(epoch, self.values(logs))
        self.last_epoch = epoch

    def on_fit_end(self) -> None:
        error = sys.exception()
        if error is self.outer_error:
            error = None
        self.outer_error = None
        if self.is_open:
            self.is_open = False
            self.close(error)

    def values(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Return the logs, and the learning rates that no callback has logged."""
        values = dict(logs)
        for name, rate in learning_rates(getattr(self.model, "optimizer", None)).items():
            values.setdefault(name, rate)
        return {name: float(value) for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.run_id = state["run_id"]
        self.last_epoch = state["epoch"]
        self.is_resumed = True


def learning_rates(optimizer: Any) -> dict[str, float]:
    """Return the learning rate of each optimizer's first group, under its column's name.

    >>> import torch
    >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    >>> learning_rates(sgd), learning_rates({"g": sgd, "d": sgd})
    ({'lr': 0.5}, {'lr_g': 0.5, 'lr_d': 0.5})
    """
    optimizers = optimizer if isinstance(optimizer, Mapping) else {"": optimizer}
    rates = {}
    for name, named_optimizer in optimizers.items():
        if not isinstance(named_optimizer, Optimizer):
            continue
        rate = named_optimizer.param_groups[0].get("lr")
        if rate is not None:
            rates[f"lr_{name}" if name else "lr"] = float(rate)
    return rates


def as_dict(name: str, value: Any) -> dict[str, Any]:
    """Return the settings of a run as a dict; refuse anything but a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a dict of name -> value, got {describe(value)}. "
            f'Pass such as {{"lr": 0.1}}.'
        )
    return dict(value)


def import_optional(module: str, who: str, packages: str) -> Any:
    """Import a module of an optional package; if missing, the error names the `packages`."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{who} needs a package: pip install {packages}") from error
