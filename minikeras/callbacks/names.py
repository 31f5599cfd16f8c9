"""The names that an epoch's logs will have, and the callbacks that wait for others."""

from __future__ import annotations

from collections.abc import Iterable

from minikeras.callback import Callback
from minikeras.callbacks.averaging import EMA
from minikeras.callbacks.files import CSVLogger, ModelCheckpoint
from minikeras.callbacks.monitor import Watching, unknown
from minikeras.callbacks.rates import LRScheduler
from minikeras.callbacks.stopping import EarlyStopping, Timer

# they add nothing to the logs but a learning rate
ADD_NO_NAMES = (Callback, EMA, CSVLogger, ModelCheckpoint, LRScheduler, EarlyStopping, Timer)


def check_monitors(
    callbacks: Iterable[Callback],
    validates: bool,
    logged: Iterable[str] | None,
    rates: Iterable[str],
) -> None:
    """Refuse callbacks that wait for a name which no epoch will log, before the first one.

    Args:
        callbacks: those of the fit.
        validates: whether the fit has dl_val.
        logged: the names that the steps log, with val_ where they do; None where that is not known.
        rates: the names under which an LRScheduler logs.

    Raises:
        ValueError: a name with val_ without dl_val, or one that is surely not logged.
    """
    callbacks = list(callbacks)
    can_be_added = any(may_add_names(callback) for callback in callbacks)
    known: list[str] | None = None
    if logged is not None and not can_be_added:
        known = list(logged)
        if any(isinstance(callback, LRScheduler) for callback in callbacks):
            known += rates
    for callback in callbacks:
        if isinstance(callback, Watching):
            callback.validates = validates
            check_names(callback, validates or can_be_added, known)


def check_names(callback: Watching, takes_val: bool, known: list[str] | None) -> None:
    """Refuse a name that this callback waits for in vain."""
    owner = type(callback).__name__
    for name, verb, remedy in callback.watched():
        if name.startswith("val_") and not takes_val:
            raise ValueError(
                f"{owner} {verb} {name!r} and fit has no dl_val. Pass dl_val, or {remedy}."
            )
        if known is not None and name not in (*known, "epoch"):
            raise unknown(f"{owner} {verb} {name!r}", name, known)


def may_add_names(callback: Callback) -> bool:
    """Tell whether a callback may add names of its own to an epoch's logs, as a user's may."""
    method = getattr(
        callback.on_epoch_end, "__func__", None
    )  # none for a function set on the instance
    return all(method is not kind.on_epoch_end for kind in ADD_NO_NAMES)
