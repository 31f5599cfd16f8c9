"""Callbacks that end a fit before its last epoch."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch import Tensor

from minikeras.callback import Callback
from minikeras.callbacks.monitor import Monitor, Watching
from minikeras.errors import real, whole_number
from minikeras.support.sharded_tensors import load_whole


class EarlyStopping(Watching):
    """Stops the fit when a logged value has not become better for `patience` epochs.

    Args:
        monitor: the name as logged, default "val_loss"; one with val_ is looked at in the epochs with a validation.
        min_delta: a value is better only when better by more than this, in units of the value; default 0.
        patience: epochs without a better value after which to stop; 0, the default, behaves as 1.
        mode: "min" or "max" for what is better; "auto", the default, goes by the name.
        baseline: a value to beat: until one is better than it, the epochs count towards patience, better or not.
            Default none.
        restore_best_weights: give the model the weights of the best epoch when the fit ends, also after an error.
            They are held on the CPU. Parameters of the loss are not among them. Default False.
        start_from_epoch: epochs of this fit before the first one that counts; default 0.

    Attributes:
        best: the best value of this fit; an infinity before there is one. `model.stop_training` tells if it stopped.

    Each fit starts afresh. NaN is never better. Epochs without a validation do not count.

    Raises:
        ValueError: a bad argument; at the fit's beginning, a name with val_ without dl_val; at an epoch's end, one that
            is not logged.

    >>> import minikeras, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.0))  # it learns nothing
    >>> stop = minikeras.EarlyStopping("loss", patience=2)
    >>> len(model.fit(100, (torch.zeros(8, 1), torch.ones(8, 1)), callbacks=[stop], verbose=0))
    3
    """

    keeps_weights = True  # its state may hold those of the best epoch

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0.0,
        patience: int = 0,
        *,
        mode: str = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
    ) -> None:
        self.monitor: Monitor = Monitor("EarlyStopping", monitor, mode, min_delta)
        self.patience: int = max(whole_number("patience", patience, least=0), 1)
        self.baseline: float | None = (
            baseline if baseline is None else real("baseline", baseline, "or None")
        )
        self.restore_best_weights = restore_best_weights
        self.start_from_epoch: int = whole_number("start_from_epoch", start_from_epoch, least=0)
        self.on_fit_begin()

    def on_fit_begin(self) -> None:
        self.best: float = self.monitor.worst
        self.epochs: int = 0  # of this fit
        self.wait: int = 0  # epochs since the last that was better
        self.weights: dict[str, Any] = {}  # of the best epoch

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.epochs += 1
        value = self.monitor.read(logs, self.validates)
        if value is None or self.epochs <= self.start_from_epoch:
            return
        self.wait += 1
        if self.monitor.better(value, self.best):
            self.best = value
            if self.restore_best_weights:
                self.weights = _on_cpu(self.model.state_dict())
            if self.baseline is None or self.monitor.better(value, self.baseline):
                self.wait = 0
        if self.wait >= self.patience:
            self.model.stop_training = True

    def on_fit_end(self) -> None:
        if self.weights:
            load_whole(self.model, self.weights)

    def watched(self) -> list[tuple[str, str, str]]:
        return self.monitor.watched()

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "epochs": self.epochs,
            "wait": self.wait,
            "weights": self.weights,
            "monitor": self.monitor.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = state["epochs"]
        if (
            state.get("monitor", self.monitor.state()) == self.monitor.state()
        ):  # the best of another says nothing
            self.best, self.wait, self.weights = state["best"], state["wait"], state["weights"]


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a module's state on the CPU."""
    state = copy.copy(state)  # with the version numbers that torch keeps beside the items
    for name, value in state.items():
        state[name] = (
            value.detach().to("cpu", copy=True)
            if isinstance(value, Tensor)
            else copy.deepcopy(value)
        )
    return state


class Timer(Callback):
    """Stops the fit after the batch in which its time is over; the epoch so far is validated and recorded.

    Args:
        max_seconds: seconds from the fit's beginning, more than 0; or a datetime.timedelta.

    Each fit starts afresh; a fit that is carried on counts the time that it had spent when it was saved.

    Raises:
        ValueError: no time above 0.

    >>> import minikeras, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> model.compile(nn.MSELoss())
    >>> dfhistory = model.fit(10**9, (torch.zeros(8, 1), torch.ones(8, 1)), callbacks=[minikeras.Timer(0.1)], verbose=0)
    >>> 0 < len(dfhistory) < 10**9
    True
    """

    def __init__(self, max_seconds: float | timedelta) -> None:
        if isinstance(max_seconds, timedelta):
            max_seconds = max_seconds.total_seconds()
        self.max_seconds: float = real(
            "max_seconds", max_seconds, "of seconds above 0, or a timedelta", lambda s: s > 0
        )
        self.on_fit_begin()

    def on_fit_begin(self) -> None:
        self.begin: float = time.monotonic()

    def seconds(self) -> float:
        """Seconds since the fit's beginning."""
        return time.monotonic() - self.begin

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        if (
            self.seconds() >= self.max_seconds and self.model.is_main_process
        ):  # one clock, of several processes
            self.model.stop_training = True

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin = time.monotonic() - state["seconds"]
