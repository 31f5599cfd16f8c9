"""The base class of callbacks. Its methods are the timetable of a fit:

on_fit_begin
for each epoch:
    on_epoch_begin
    for each batch: on_batch_begin, its training step, on_batch_end
    if validation is due: on_evaluate_begin, the batches of dl_val, on_evaluate_end
    on_epoch_end
on_fit_end              also after an error or Ctrl-C
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LRScheduler as TorchScheduler

from minikeras.errors import is_number

if TYPE_CHECKING:
    from minikeras.model import Model


class BatchLogs(Mapping[str, float]):
    """The logs of `on_batch_end`: name -> mean over the epoch so far.

    `batch` has the values of the last batch alone. Reading a value waits for the device.

    >>> import minikeras, torch
    >>> def show(batch, logs):
    ...     print(batch, logs["loss"], logs.batch["loss"])
    >>> model = minikeras.Model(torch.nn.Linear(1, 1, bias=False))
    >>> _ = torch.nn.init.ones_(model.net.weight)
    >>> model.compile(torch.nn.L1Loss(), torch.optim.SGD(model.parameters(), lr=0.0))
    >>> batches = [(torch.full((2, 1), size), torch.zeros(2, 1)) for size in (4.0, 2.0)]
    >>> shown = minikeras.LambdaCallback(on_batch_end=show)
    >>> _ = model.fit(1, batches, callbacks=[shown], verbose=0)
    1 4.0 4.0
    2 3.0 2.0
    """

    @property
    @abc.abstractmethod
    def batch(self) -> Mapping[str, float]:
        """Return the values of the last batch alone, name -> value.

        Its loss, the functions of metrics_dict and whatever else a custom step returns; of an
        `Average` the mean, NaN if nothing was counted. Metric objects are left out. With
        `steps_per_execution` it is the last batch of the call. With several processes the values
        are those of this process's rows; NaN for a batch that only keeps it in step with the
        others. Each value is read from the device when you look it up: read what you need, such as
        `logs.batch["loss"]`, within `on_batch_end`.
        """


class Callback:
    """Base class of callbacks: override the methods you need.

    `self.model` is the model, from `on_fit_begin` on. `self.model.history` is updated just before
    `on_fit_end`; until then, read `logs`.

    Epochs and batches are numbered from 1. Epochs keep counting over several fits, like the rows
    of the history. `self.model.stop_training = True` ends the fit after the current batch; the
    epoch so far is validated and recorded. An error in a method ends the fit, and the message
    names the callback.

    >>> import minikeras, torch
    >>> class Gap(minikeras.Callback):
    ...     def on_epoch_end(self, epoch, logs):
    ...         logs["gap"] = logs["val_loss"] - logs["loss"]  # a column of the history
    >>> data, model = (torch.zeros(8, 1), torch.ones(8, 1)), minikeras.Model(torch.nn.Linear(1, 1))
    >>> model.compile(torch.nn.MSELoss())
    >>> list(model.fit(1, data, data, callbacks=[Gap()], verbose=0))
    ['loss', 'gap', 'val_loss']
    """

    model: Model

    def on_fit_begin(self) -> None:
        """Called once, before the first epoch."""

    def on_epoch_begin(self, epoch: int) -> None:
        """Called before the first batch of `epoch`.

        The model is in train mode, except for submodules that you have put into eval mode.
        """

    def on_batch_begin(self, batch: int) -> None:
        """Called before the training step of `batch`, which has been read and is on the device.

        With `steps_per_execution` it is called once for each call of the graph, with the number of
        the call's first batch.
        """

    def on_batch_end(self, batch: int, logs: BatchLogs) -> None:
        """Called after the training step of `batch`.

        `logs` holds the running means of the epoch, and `logs.batch` the values of the last batch
        alone; with several processes, those of this process. Reading a value waits for the device.
        With `steps_per_execution` it is called once for each call of the graph, with the number of
        the call's last batch.
        """

    def on_evaluate_begin(self) -> None:
        """Called before the validation of a fit."""

    def on_evaluate_end(self) -> None:
        """Called after the validation of a fit, also after an error in it.

        The callbacks are called in reverse order.
        """

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Called after the validation of `epoch`.

        `logs` is the epoch's row of the history, with the `val_` names. All callbacks share it;
        a value that a callback adds becomes a column.
        """

    def on_fit_end(self) -> None:
        """Called once, however the fit ended.

        The callbacks are called in reverse order.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what `fit(checkpoint=...)` must save of this callback.

        Allowed are tensors, numbers and strings, and lists and dicts of them.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state` that `state_dict` returned in an earlier process.

        Called after `on_fit_begin`.
        """


class LambdaCallback(Callback):
    """A callback made of functions, each called with the arguments of the `Callback` method.

    Args:
        on_fit_begin, on_evaluate_begin, on_evaluate_end, on_fit_end: called without arguments.
        on_epoch_begin: called with the epoch's number.
        on_batch_begin: called with the batch's number.
        on_batch_end: called with the batch's number and the running means.
        on_epoch_end: called with the epoch's number and its row of the history, a dict to which
            values may be added.

    >>> from minikeras import LambdaCallback
    >>> shout = LambdaCallback(on_epoch_end=lambda epoch, logs: print(epoch, logs["loss"]))
    >>> shout.on_epoch_end(1, {"loss": 0.25})
    1 0.25
    """

    def __init__(
        self,
        on_fit_begin: Callable[[], Any] | None = None,
        on_epoch_begin: Callable[[int], Any] | None = None,
        on_batch_begin: Callable[[int], Any] | None = None,
        on_batch_end: Callable[[int, BatchLogs], Any] | None = None,
        on_evaluate_begin: Callable[[], Any] | None = None,
        on_evaluate_end: Callable[[], Any] | None = None,
        on_epoch_end: Callable[[int, dict[str, float]], Any] | None = None,
        on_fit_end: Callable[[], Any] | None = None,
    ) -> None:
        arguments = dict(locals())
        for name, function in arguments.items():
            if name.startswith("on_") and function is not None:
                setattr(self, name, function)


def check_callbacks(callbacks: Iterable[Any]) -> list[Callback]:
    """Return the callbacks as a list; refuse a class or another object among them."""
    listed = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for callback in listed:
        if not isinstance(callback, Callback):
            if isinstance(callback, TorchScheduler):
                got = f"a torch {type(callback).__name__}"
            elif isinstance(callback, type):
                got = f"the class {callback.__name__}"
            else:
                got = repr(callback)
            raise TypeError(
                f"callbacks must be instances of minikeras.Callback, got {got}. "
                f"Pass {_remedy(callback)}."
            )
        _warn_of_uncalled(callback)
    return listed


def _remedy(callback: Any) -> str:
    if isinstance(callback, TorchScheduler):
        return "LRScheduler(scheduler)"
    if isinstance(callback, type):
        return f"{callback.__name__}()"
    if callable(callback):
        return "LambdaCallback(on_epoch_end=...) for a function"
    return "a list of instances, or nothing"


def _warn_of_uncalled(callback: Callback) -> None:
    """Warn of methods named on_... that fit never calls.

    Methods that come from a class of another library are that library's own.
    """
    moments = [name for name in vars(Callback) if name.startswith("on_")]
    known = set(moments)
    for cls in type(callback).__mro__:
        if not issubclass(cls, Callback):
            known.update(vars(cls))
    uncalled = []
    for name in dir(type(callback)):
        if name.startswith("on_") and name not in known:
            uncalled.append(f"{type(callback).__name__}.{name}")
    if uncalled:
        warnings.warn(
            f"fit never calls {', '.join(uncalled)}. What it calls is {', '.join(moments)}.",
            stacklevel=6,
        )


def check_row(logs: dict[str, Any]) -> None:
    """Refuse a value in an epoch's row of the history that is not a number, and remove it."""
    for name, value in logs.items():
        if not is_number(value):
            del logs[name]
            raise TypeError(
                f"logs[{name!r}] is {value!r}, and a column of the history holds numbers. "
                f"Log a number."
            )


def with_method(callbacks: Iterable[Callback], name: str) -> list[Callback]:
    """Return the callbacks that override the method `name`; the others need not be called."""
    empty = getattr(Callback, name)
    found = []
    for callback in callbacks:
        if getattr(getattr(callback, name), "__func__", None) is not empty:
            found.append(callback)
    return found
