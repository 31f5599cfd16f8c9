"""Callbacks that end a fit before its last epoch, and a clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch import Tensor

from minikeras.callback import Callback
from minikeras.callbacks.monitor import Monitor, MonitoringCallback
from minikeras.errors import check_number_in_range, check_whole_number
from minikeras.support.sharded_tensors import load_whole


class EarlyStopping(MonitoringCallback):
    """Stop training when a monitored value has not improved for `patience` epochs.

    Args:
        monitor: the name as logged, default "val_loss". A val_ name is read only in epochs with
            validation.
        min_delta: an improvement must be larger than this, in units of the value; default 0.
        patience: epochs without improvement after which to stop; 0, the default, behaves as 1.
        mode: "min" or "max"; "auto", the default, infers the direction from the name.
        baseline: a value to beat: until the monitored value is better than it, every epoch counts
            towards patience, improved or not. Default none.
        restore_best_weights: load the weights of the best epoch when the fit ends, also after an
            error. They are kept on the CPU, without the parameters of the loss. Default False.
        start_from_epoch: ignore this many epochs at the beginning of the fit: they never set the
            best value and use up no patience. Default 0.

    Attributes:
        best: the best value of this fit; infinite before there is one. `model.stop_training` tells
            whether the fit was stopped.
        best_epoch: the epoch of the best value, from 1; None before there is one.

    If the callback has stopped the fit or restored weights, the printed table ends with a line that
    names both.

    Each fit starts again. NaN is never better. Epochs without validation do not count.

    Raises:
        ValueError: a bad argument; when the fit begins, a name with val_ without dl_val; at the end
            of an epoch, a name that is not logged.

    >>> import minikeras, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.0))  # learns nothing
    >>> stop = minikeras.EarlyStopping("loss", patience=2)
    >>> data = torch.zeros(8, 1), torch.ones(8, 1)
    >>> len(model.fit(100, data, callbacks=[stop], verbose=0))
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
        self.monitor = monitor
        self.mode = mode
        self.min_delta = min_delta
        self.patience: int = max(check_whole_number("patience", patience, least=0), 1)
        self.baseline: float | None = None
        if baseline is not None:
            self.baseline = check_number_in_range("baseline", baseline, "or None")
        self.restore_best_weights = restore_best_weights
        self.start_from_epoch: int = check_whole_number(
            "start_from_epoch", start_from_epoch, least=0
        )
        self.on_fit_begin()

    @property
    def _watch(self) -> Monitor:
        """What reads and compares the monitored value."""
        return Monitor("EarlyStopping", self.monitor, self.mode, self.min_delta)

    def on_fit_begin(self) -> None:
        self.best: float = self._watch.worst
        self.best_epoch: int | None = None
        self.epochs: int = 0  # of this fit
        self.wait: int = 0  # epochs since the last improvement
        self.weights: dict[str, Any] = {}  # of the best epoch

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.epochs += 1
        watch = self._watch
        value = self._read_monitored(watch, logs)
        if value is None or self.epochs <= self.start_from_epoch:
            return
        self.wait += 1
        if watch.better(value, self.best):
            self.best = value
            self.best_epoch = epoch
            if self.restore_best_weights:
                self.weights = _copy_to_cpu(self.model.state_dict())
            if self.baseline is None or watch.better(value, self.baseline):
                self.wait = 0
        if self.wait >= self.patience:
            self.model.stop_training = True

    def on_fit_end(self) -> None:
        if self.weights:
            load_whole(self.model, self.weights)
        fit = self.model._compiled("EarlyStopping").fit
        has_stopped = self.wait >= self.patience
        if fit is None or self.best_epoch is None or not (has_stopped or self.weights):
            return
        line = f"EarlyStopping: best {self.monitor} {self.best:#.4g} in epoch {self.best_epoch}"
        if self.weights:
            line += ", restored"
        fit.say(line)

    def watched_names(self) -> list[tuple[str, str, str]]:
        return self._watch.watched_names()

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "epochs": self.epochs,
            "wait": self.wait,
            "weights": self.weights,
            "monitor": self._watch.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = state["epochs"]
        own = self._watch.state()
        # the best of another value cannot be compared
        if state.get("monitor", own) == own:
            self.best = state["best"]
            self.best_epoch = state.get("best_epoch")  # a file of an earlier version has none
            self.wait = state["wait"]
            self.weights = state["weights"]


def _copy_to_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """Copy a module's state to the CPU."""
    state = copy.copy(state)  # keeps the version numbers that torch stores next to the items
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.detach().to("cpu", copy=True)
        else:
            state[name] = copy.deepcopy(value)
    return state


class Timer(Callback):
    """Stop training when the time is up, log the seconds of each epoch, or both.

    The fit stops after the batch in which the time is up; the epoch so far is validated and
    recorded.

    Args:
        max_seconds: seconds from the beginning of the fit, more than 0; or a datetime.timedelta.
            Default None: the fit is not stopped.
        log: log the seconds of each epoch, with its validation, as the column "seconds". With
            several processes they are those of rank 0. List this callback before those that read
            the column, such as CSVLogger. Default False.

    Each fit starts again from 0. A fit resumed from a checkpoint adds the time spent before the
    save. Times differ from run to run, and so does the column: with it, the history of a resumed
    fit is bit-for-bit identical except for "seconds".

    Raises:
        ValueError: the time is not above 0, or neither argument is given; at the end of an epoch, a
            column "seconds" that is not this callback's.

    >>> import minikeras, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> model.compile(nn.MSELoss())
    >>> data = torch.zeros(8, 1), torch.ones(8, 1)
    >>> dfhistory = model.fit(10**9, data, callbacks=[minikeras.Timer(0.1)], verbose=0)
    >>> 0 < len(dfhistory) < 10**9
    True
    >>> list(model.fit(1, data, callbacks=[minikeras.Timer(log=True)], verbose=0))
    ['loss', 'seconds']
    """

    def __init__(self, max_seconds: float | timedelta | None = None, *, log: bool = False) -> None:
        if max_seconds is None and not log:
            raise ValueError(
                "Timer() needs something to do: expected `max_seconds` or `log=True`, got neither. "
                "Pass Timer(60) to stop after a minute, or Timer(log=True) to log the seconds of "
                "each epoch."
            )
        if isinstance(max_seconds, timedelta):
            max_seconds = max_seconds.total_seconds()
        self.max_seconds: float | None = None
        if max_seconds is not None:
            self.max_seconds = check_number_in_range(
                "max_seconds", max_seconds, "of seconds above 0, or a timedelta", lambda s: s > 0
            )
        self.log = log
        self.on_fit_begin()

    def on_fit_begin(self) -> None:
        self.begin: float = time.monotonic()
        self.epoch_begin: float | None = None  # None between two epochs

    def seconds(self) -> float:
        """Return the seconds since the beginning of the fit."""
        return time.monotonic() - self.begin

    def epoch_seconds(self) -> float:
        """Return the seconds since the beginning of the epoch, 0 between two epochs."""
        return 0.0 if self.epoch_begin is None else time.monotonic() - self.epoch_begin

    def on_epoch_begin(self, epoch: int) -> None:
        self.epoch_begin = time.monotonic()

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        if self.max_seconds is None or self.seconds() < self.max_seconds:
            return
        if self.model.is_main_process:  # with several processes only the clock of rank 0 counts
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if self.log:
            if "seconds" in logs:
                raise ValueError(
                    "Timer(log=True) logs the column 'seconds', and expected no other of this "
                    "name, but a metric or callback has logged one. Give that one another name."
                )
            world = self.model._compiled("Timer").world
            logs["seconds"] = world.broadcast(self.epoch_seconds())
        self.epoch_begin = None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds(), "epoch_seconds": self.epoch_seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin = time.monotonic() - state["seconds"]
        seconds = state.get("epoch_seconds", 0.0)  # older files lack it
        # in the middle of an epoch the state is loaded once more, after on_epoch_begin
        self.epoch_begin = time.monotonic() - seconds if seconds else None
