"""One name in the logs that a callback monitors, and which of its values is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from minikeras.callback import Callback
from minikeras.columns import infer_mode
from minikeras.errors import check_number_in_range, did_you_mean


class MonitoringCallback(Callback):
    """Base class of callbacks that read values from the logs under names known before the fit."""

    validates: bool = True  # whether the fit has dl_val

    def watched_names(self) -> list[tuple[str, str, str]]:
        """Return triples: a name, what the callback does with it, and how to do without it."""
        raise NotImplementedError

    def _read_monitored(self, monitor: Monitor, logs: Mapping[str, float]) -> float | None:
        """Return the monitored value in an epoch's logs; None if its validation was skipped.

        With several processes it is that of rank 0, so that all decide alike: a column that a
        callback logs may differ between them.
        """
        value = monitor.read(logs, self.validates)
        if value is None:
            return None
        return self.model._compiled(monitor.owner).world.follow(value)


class Monitor:
    """Read one name from the logs and compare its values.

    A value is better only if it is better by more than `min_delta`. NaN is never better.

    Args:
        owner: the class of the callback, for messages.
        name: the name as logged, such as "val_loss".
        mode: "min" or "max"; "auto" infers the direction from the words in the name.
        min_delta: how much better a value must be, in units of the value; 0 or more.

    >>> accuracy = Monitor("EarlyStopping", "val_accuracy", min_delta=0.01)
    >>> accuracy.better(0.92, 0.9), accuracy.better(0.905, 0.9)
    (True, False)
    """

    def __init__(self, owner: str, name: str, mode: str = "auto", min_delta: float = 0.0) -> None:
        if not isinstance(name, str):
            hint = ' Pass a name as logged, such as "val_loss".'
            if owner == "EarlyStopping" and type(name) is int:
                hint = f" Did you mean patience={name}?"
            raise ValueError(f"monitor must be a name, got {name!r}.{hint}")
        self.owner = owner
        self.name = name
        self.min_delta: float = check_number_in_range(
            "min_delta", min_delta, "of 0 or more", lambda delta: 0 <= delta < math.inf
        )
        if mode not in ("auto", "min", "max"):
            hint = did_you_mean(mode, ["auto", "min", "max"]) if isinstance(mode, str) else ""
            raise ValueError(f'mode must be "auto", "min" or "max", got {mode!r}.{hint}')
        if mode == "auto":
            mode = self._infer_mode()
        self.sign: int = -1 if mode == "min" else 1
        self.worst: float = -self.sign * math.inf

    def _infer_mode(self) -> str:
        mode = infer_mode(self.name)
        if mode is None:
            raise ValueError(
                f"{self.owner} cannot tell from the name {self.name!r} whether more or less "
                f'is better. Pass mode="max" or mode="min".'
            )
        return mode

    def read(self, logs: Mapping[str, float], validates: bool = True) -> float | None:
        """Return the value in an epoch's logs; None if its validation was skipped."""
        if validates and is_skipped(self.name, logs):
            return None
        if self.name not in logs:
            raise unknown_name(f"{self.owner} monitors {self.name!r}", self.name, logs)
        return float(logs[self.name])

    def watched_names(self) -> list[tuple[str, str, str]]:
        """Return the triple that `MonitoringCallback.watched_names` asks for."""
        return [(self.name, "monitors", f"monitor={self.name.removeprefix('val_')!r}")]

    def state(self) -> list[Any]:
        """Return plain values that differ from those of a monitor of another value."""
        return [self.name, self.sign]

    def better(self, value: float, than: float) -> bool:
        """Tell whether a value is better than another by more than min_delta."""
        return self.sign * (value - than) > self.min_delta


def is_skipped(name: str, logs: Iterable[str]) -> bool:
    """Tell whether a name has val_ and these logs are of an epoch without validation."""
    return name.startswith("val_") and not any(logged.startswith("val_") for logged in logs)


def unknown_name(what: str, name: str, logs: Iterable[str]) -> ValueError:
    """Return the error for a name that is not in the logs."""
    known = list(logs)
    logged = ", ".join(map(repr, known))
    return ValueError(
        f"{what}, which is not logged. Logged are {logged}.{did_you_mean(name, known)}"
    )
