"""How steps are run: eagerly, as Python calls them. `jit` overrides it with compiled graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minikeras.batch import call_with
from minikeras.hooks import Hook
from minikeras.phase import Phase
from minikeras.results import Result

if TYPE_CHECKING:
    from minikeras.model import Model
    from minikeras.run import Run

WAITING: Any = object()  # what a step returns while its batch waits for others


class Eager(Hook):
    """Runs the steps of a model as they are written: the null object in the place of `jit.Jit`."""

    bad_steps: tuple[Tensor, Tensor] | None = None  # counts of bad losses that a graph keeps
    compiles_parts = False  # forward and loss are compiled each by itself
    holds_back_steps = False  # a graph skips the steps from the first bad loss on

    def __init__(self, model: Model, run: Run) -> None:
        self.model = model
        self.run = run

    def step(self, phase: Phase) -> Callable[..., Any]:
        """Return the step for the batches of a phase: of (features, labels[, sample_weight])."""
        step = self.model.train_step if phase.is_training else self.model.evaluate_step
        return self.run.stepper.decorated("around_step", step)

    def flush(self, phase: Phase) -> Mapping[str, Result] | None:
        """Take the steps of the batches that wait; None if there are none."""
        return None

    forward = staticmethod(call_with)  # of (model, features): the outputs

    def predicting(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which outputs are computed for `predict`."""
        return contextlib.nullcontext()

    def probing(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which outputs are computed for a few rows of another number."""
        return contextlib.nullcontext()

    def expect_steps(self, names: list[str]) -> None:
        """Learn of the steps that the fit had taken before it was resumed in another process."""

    def state_dict(self) -> dict[str, Any]:
        """Return what decides, in a fit that resumes, when its next graph is compiled."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
