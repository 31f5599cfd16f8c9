"""What a user may do at each moment of a fit. The methods of `Callback` are the timetable of the loop:

on_fit_begin
for each epoch:
    on_epoch_begin
    for each batch: on_batch_end
    where validation is due: on_evaluate_begin, the batches of dl_val, on_evaluate_end
    on_epoch_end
on_fit_end              also after an error or Ctrl-C
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LRScheduler as TorchScheduler

from minikeras.errors import is_number

if TYPE_CHECKING:
    from minikeras.model import Model


class Callback:
    """Base class: override the moments you need. `self.model` is the model from `on_fit_begin` on.

    `self.model.history` is brought up to date before `on_fit_end`; until then, look at `logs`.

    Epochs and batches are numbered from 1; epochs go on counting over several fits, as the history's rows do.
    `self.model.stop_training = True` ends the fit after the batch at hand; the epoch so far is validated and recorded.
    An error in a method ends the fit, and says whose it is.

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
        """Once, before the first epoch."""

    def on_epoch_begin(self, epoch: int) -> None:
        """Before the first batch of that `epoch`; the model is in train mode, but for what you put into eval mode."""

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        """After the step of that `batch`. `logs` are the epoch's running means, where there are several processes those
        of this one; reading one waits for the device."""

    def on_evaluate_begin(self) -> None:
        """Before a fit's validation."""

    def on_evaluate_end(self) -> None:
        """After a fit's validation, also after an error in it; the last callback comes first."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """After validation. `logs` are the row of that `epoch` in the history, `val_` names included; all callbacks
        share it, and what one adds is a column."""

    def on_fit_end(self) -> None:
        """Once, however the fit ended; the last callback comes first."""

    def state_dict(self) -> dict[str, Any]:
        """What a run must remember of this callback, for `fit(checkpoint=...)`: tensors, numbers, strings, lists and
        dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the `state` that `state_dict` gave in an earlier process; called after `on_fit_begin`."""


class LambdaCallback(Callback):
    """A callback from functions, each with the arguments of the method of `Callback` it stands for.

    Args:
        on_fit_begin, on_evaluate_begin, on_evaluate_end, on_fit_end: of nothing.
        on_epoch_begin: of the epoch's number.
        on_batch_end: of the batch's number and the running means.
        on_epoch_end: of the epoch's number and its row of the history, a dict that may be added to.

    >>> from minikeras import LambdaCallback
    >>> shout = LambdaCallback(on_epoch_end=lambda epoch, logs: print(epoch, logs["loss"]))
    >>> shout.on_epoch_end(1, {"loss": 0.25})
    1 0.25
    """

    def __init__(
        self,
        on_fit_begin: Callable[[], Any] | None = None,
        on_epoch_begin: Callable[[int], Any] | None = None,
        on_batch_end: Callable[[int, Mapping[str, float]], Any] | None = None,
        on_evaluate_begin: Callable[[], Any] | None = None,
        on_evaluate_end: Callable[[], Any] | None = None,
        on_epoch_end: Callable[[int, dict[str, float]], Any] | None = None,
        on_fit_end: Callable[[], Any] | None = None,
    ) -> None:
        given = {
            name: value
            for name, value in locals().items()
            if name.startswith("on_") and value is not None
        }
        for name, function in given.items():
            setattr(self, name, function)


def check_callbacks(callbacks: Iterable[Any]) -> list[Callback]:
    """The callbacks as a list; a class or another object is refused."""
    listed = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for callback in listed:
        if not isinstance(callback, Callback):
            got = f"the class {callback.__name__}" if isinstance(callback, type) else repr(callback)
            got = (
                f"a torch {type(callback).__name__}"
                if isinstance(callback, TorchScheduler)
                else got
            )
            raise TypeError(
                f"callbacks must be instances of minikeras.Callback, got {got}. Pass {_remedy(callback)}."
            )
        _warn_of_uncalled(callback)
    return listed


def _remedy(callback: Any) -> str:
    if isinstance(callback, TorchScheduler):
        return "LRScheduler(scheduler)"
    if isinstance(callback, type):
        return f"{callback.__name__}()"
    return (
        "LambdaCallback(on_epoch_end=...) for a function"
        if callable(callback)
        else "a list of instances, or nothing"
    )


def _warn_of_uncalled(callback: Callback) -> None:
    """A method that looks like a moment and is none; those that another library's class has are its own."""
    moments = [name for name in vars(Callback) if name.startswith("on_")]
    others = {
        name
        for cls in type(callback).__mro__
        if not issubclass(cls, Callback)
        for name in vars(cls)
    }
    unknown = [
        name
        for name in dir(type(callback))
        if name.startswith("on_") and name not in {*moments, *others}
    ]
    if unknown:
        calls, names = (
            ", ".join(f"{type(callback).__name__}.{name}" for name in unknown),
            ", ".join(moments),
        )
        warnings.warn(f"fit never calls {calls}. What it calls is {names}.", stacklevel=6)


def check_row(logs: dict[str, Any]) -> None:
    """What a callback has added to an epoch's row of the history must be numbers; what is not is taken out again."""
    for name in [name for name, value in logs.items() if not is_number(value)]:
        value = logs.pop(name)
        raise TypeError(
            f"logs[{name!r}] is {value!r}, and a column of the history holds numbers. Log a number."
        )


def with_method(callbacks: Iterable[Callback], name: str) -> list[Callback]:
    """Those callbacks that do something at that moment: the rest costs nothing."""
    empty = getattr(Callback, name)
    return [
        callback
        for callback in callbacks
        if getattr(getattr(callback, name), "__func__", None) is not empty
    ]
