"""What a capability does at the moments of a fit. Internal: users write callbacks.

A hook is no callback, because its contexts lie outside on_fit_begin and on_fit_end, it may end a
pass, it comes after all callbacks at each moment, and users do not see it in a list. Hooks are
called in the order of `Fit.hooks`; of the contexts the first is the outermost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from minikeras.callback import Callback
    from minikeras.model import Model
    from minikeras.run import Run
    from minikeras.stepper import Part


@dataclass
class Position:
    """Where a fit stands: in an epoch, after so many of its steps.

    `logs` are the training means of the epoch, once its steps have been taken.
    """

    epoch: int
    step: int = 0
    logs: dict[str, float] | None = None


@dataclass
class Fit:
    """One call of `Model.fit`: what it is to do, and where it stands."""

    model: Model
    run: Run
    last_epoch: int
    train: Iterable[Any]
    val: Iterable[Any] | None
    validation_freq: int
    callbacks: list[Callback]
    parts: list[Part]  # that the stepper uses during this fit: those of compile, and some more
    hooks: list[Hook]
    say: Callable[[str], None]  # shows a line to the user
    take_history: Callable[[pd.DataFrame], None]  # sees the history before fit returns it
    at: Position = field(default_factory=lambda: Position(1))


class Hook:
    """Moments of a fit. Each does nothing until overridden."""

    def around_fit(self, fit: Fit) -> contextlib.AbstractContextManager[None]:
        """Return a context of the whole fit, on_fit_begin and on_fit_end included."""
        return contextlib.nullcontext()

    def resume(self, fit: Fit) -> None:
        """Set `fit.at`, after on_fit_begin of the callbacks."""

    def around_epoch(self, fit: Fit) -> contextlib.AbstractContextManager[None]:
        """Return a context of one epoch, callbacks included."""
        return contextlib.nullcontext()

    def before_epoch(self, fit: Fit) -> None:
        """Act before on_epoch_begin of the callbacks."""

    def on_epoch_begin(self, fit: Fit) -> None:
        """Act after on_epoch_begin of the callbacks."""

    def on_batch_end(self, fit: Fit, number: int) -> None:
        """Act after a batch of training or validation, and after on_batch_end of the callbacks."""

    def on_train_end(self, fit: Fit) -> None:
        """Act between the training of an epoch and its validation."""

    def on_validation_begin(self, fit: Fit) -> None:
        """Act before the validation of an epoch."""

    def on_epoch_end(self, fit: Fit) -> None:
        """Act after on_epoch_end of the callbacks; `fit.at` is where the next epoch begins."""

    def allows_writing(self, path: Any, with_state: bool) -> bool:
        """Tell whether weights, or the state of the fit too, may be written; may raise an error."""
        return True
