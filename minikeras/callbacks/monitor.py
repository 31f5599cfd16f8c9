"""One name in the logs that a callback watches, and when it is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from minikeras.callback import Callback
from minikeras.columns import mode_of
from minikeras.errors import did_you_mean, real


class Watching(Callback):
    """A callback that reads names in the logs of an epoch, known ahead."""

    validates: bool = True  # whether the fit has dl_val

    def watched(self) -> list[tuple[str, str, str]]:
        """Triples: a name, what the callback does with it, and how to do without."""
        raise NotImplementedError


class Monitor:
    """Reads one name from the logs; NaN is never better, and better is only what is so by more than `min_delta`.

    Args:
        owner: the class of the callback, for messages.
        name: the name as logged, such as "val_loss".
        mode: "min" or "max" for what is better; "auto" goes by the words in the name.
        min_delta: how much better a value must be, in units of the value; 0 or more.

    >>> accuracy = Monitor("EarlyStopping", "val_accuracy", min_delta=0.01)
    >>> accuracy.better(0.92, 0.9), accuracy.better(0.905, 0.9)
    (True, False)
    """

    def __init__(self, owner: str, name: str, mode: str = "auto", min_delta: float = 0.0) -> None:
        self.owner = owner
        self.name = name
        self.min_delta: float = real(
            "min_delta", min_delta, "of 0 or more", lambda delta: 0 <= delta < math.inf
        )
        if mode not in ("auto", "min", "max"):
            hint = did_you_mean(mode, ["auto", "min", "max"]) if isinstance(mode, str) else ""
            raise ValueError(f'mode must be "auto", "min" or "max", got {mode!r}.{hint}')
        self.sign: int = {"min": -1, "max": 1}[self._mode_of_name() if mode == "auto" else mode]
        self.worst: float = -self.sign * math.inf

    def _mode_of_name(self) -> str:
        mode = mode_of(self.name)
        if mode is None:
            raise ValueError(
                f"{self.owner} cannot tell from the name {self.name!r} whether more or less is better. "
                f'Pass mode="max" or mode="min".'
            )
        return mode

    def read(self, logs: Mapping[str, float], validates: bool = True) -> float | None:
        """The value in an epoch's logs; None where it is of validation and none was due."""
        if validates and skipped(self.name, logs):
            return None
        if self.name not in logs:
            raise unknown(f"{self.owner} monitors {self.name!r}", self.name, logs)
        return float(logs[self.name])

    def watched(self) -> list[tuple[str, str, str]]:
        """What `Watching` asks for."""
        return [(self.name, "monitors", f"monitor={self.name.removeprefix('val_')!r}")]

    def state(self) -> list[Any]:
        """What tells it from the monitor of another value, as plain values."""
        return [self.name, self.sign]

    def better(self, value: float, than: float) -> bool:
        """Whether a value is better than another by more than min_delta."""
        return self.sign * (value - than) > self.min_delta


def skipped(name: str, logs: Iterable[str]) -> bool:
    """Whether a name is of validation, and these logs are of an epoch where none was due."""
    return name.startswith("val_") and not any(logged.startswith("val_") for logged in logs)


def unknown(what: str, name: str, logs: Iterable[str]) -> ValueError:
    """The error for a name that is not in the logs."""
    known = list(logs)
    logged = ", ".join(map(repr, known))
    return ValueError(
        f"{what}, which is not logged. Logged are {logged}.{did_you_mean(name, known)}"
    )
