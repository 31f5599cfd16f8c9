"""Check, before the first epoch, the names that callbacks read from an epoch's logs."""

from __future__ import annotations

from collections.abc import Iterable

from minikeras.callback import Callback
from minikeras.callbacks.averaging import EMA
from minikeras.callbacks.files import CSVLogger, ModelCheckpoint
from minikeras.callbacks.monitor import MonitoringCallback, unknown_name
from minikeras.callbacks.rates import LRScheduler
from minikeras.callbacks.stopping import EarlyStopping, Timer

# these add nothing to the logs except a learning rate, and Timer(log=True) seconds
ADD_NO_NAMES = (Callback, EMA, CSVLogger, ModelCheckpoint, LRScheduler, EarlyStopping, Timer)


def check_monitors(
    callbacks: Iterable[Callback],
    validates: bool,
    logged: Iterable[str] | None,
    rates: Iterable[str],
) -> None:
    """Refuse, before the first epoch, callbacks that wait for a name that no epoch will log.

    Args:
        callbacks: the callbacks of the fit.
        validates: whether the fit has dl_val.
        logged: the names that the steps log, with val_ for validation; None if not known yet.
        rates: the names under which an LRScheduler logs.

    Raises:
        ValueError: a name with val_ without dl_val, or a name that is certainly not logged.
    """
    callbacks = list(callbacks)
    can_be_added = any(may_add_names(callback) for callback in callbacks)
    known: list[str] | None = None
    if logged is not None and not can_be_added:
        known = list(logged)
        if any(isinstance(callback, LRScheduler) for callback in callbacks):
            known += rates
        if any(isinstance(callback, Timer) and callback.log for callback in callbacks):
            known.append("seconds")
    for callback in callbacks:
        if isinstance(callback, MonitoringCallback):
            callback.validates = validates
            check_names(callback, validates or can_be_added, known)


def check_names(callback: MonitoringCallback, takes_val: bool, known: list[str] | None) -> None:
    """Refuse a name that this callback would wait for in vain."""
    owner = type(callback).__name__
    for name, verb, remedy in callback.watched_names():
        if name.startswith("val_") and not takes_val:
            raise ValueError(
                f"{owner} {verb} {name!r} and fit has no dl_val. Pass dl_val, or {remedy}."
            )
        if known is not None and name not in (*known, "epoch"):
            raise unknown_name(f"{owner} {verb} {name!r}", name, known)


def may_add_names(callback: Callback) -> bool:
    """Tell whether a callback may add names to an epoch's logs, as a custom one may."""
    # a function that was set on the instance has no __func__
    method = getattr(callback.on_epoch_end, "__func__", None)
    return all(method is not kind.on_epoch_end for kind in ADD_NO_NAMES)
