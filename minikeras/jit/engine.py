"""Run compiled steps instead of eager ones."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from minikeras.batch import call_as, call_with, choose_call
from minikeras.engine import Eager
from minikeras.hooks import Fit
from minikeras.jit.graphs import OrEager, Say, chosen
from minikeras.jit.optimizer import is_lost_in_a_graph
from minikeras.jit.steps import EvaluateStep, TrainStep
from minikeras.overrides import overrides
from minikeras.phase import Phase

if TYPE_CHECKING:
    from minikeras.model import Model
    from minikeras.run import Run

PARTS = {
    "train_step": (
        "train_step",
        "compute_outputs",
        "compute_loss",
        "compute_metrics",
        "backward",
        "optimizer_step",
    ),
    "evaluate_step": ("evaluate_step", "compute_outputs", "compute_loss", "compute_metrics"),
}


class Jit(Eager):
    """Compile the steps of one model; if a part of them is overridden, forward and loss.

    Args:
        options: the user's arguments for torch.compile.
        together: steps in one call of the graph.
    """

    def __init__(self, model: Model, run: Run, options: Mapping[str, Any], together: int) -> None:
        super().__init__(model, run)
        self.options = chosen(options)
        self.say: Say = lambda message: None
        self.expected: set[str] = set()  # steps whose graph has seen batches before a resume
        self.train = TrainStep(model, run, run.train, self, together)
        self.evaluate = EvaluateStep(model, run, run.val, self)
        self.bad_steps = self.train.bad, self.train.of_gradient

        def loss(outputs: Any, labels: Any) -> Any:
            return run.loss_func(outputs, labels)

        self.loss_func = OrEager(loss, self.options, [], run.device)
        buffers = run.loss_func.buffers() if isinstance(run.loss_func, nn.Module) else ()
        if any(map(is_lost_in_a_graph, buffers)):
            self.loss_func.compiled = loss
            self.loss_func.has_worked = True
        self.forwards: dict[str, OrEager] = {}
        self.compiles_parts = self.overrides("train_step")
        if self.compiles_parts:
            for phase in (run.train, run.val):
                phase.loss_func = self.loss_func

    @property
    def holds_back_steps(self) -> bool:  # type: ignore[override]
        """Whether the optimizers step in the graph, which holds them back by itself."""
        return self.train.is_in_graph()

    def step(self, phase: Phase) -> Any:
        """Return the step for the batches of a phase."""
        name = "train_step" if phase.is_training else "evaluate_step"
        if self.overrides(name):
            return super().step(phase)
        return self.train if phase.is_training else self.evaluate

    def flush(self, phase: Phase) -> Mapping[str, Any] | None:
        """Run the steps of the waiting batches; None if there are none."""
        step = self.step(phase)
        return step.flush() if isinstance(step, EvaluateStep) else None

    def overrides(self, name: str) -> bool:
        """Tell whether the user wrote that step, or a part of it."""
        return overrides(self.model, *PARTS[name])

    def expect_steps(self, names: list[str]) -> None:
        """Let the next batch go through the graph, as in the interrupted run."""
        self.expected = set(names)

    def state_dict(self) -> dict[str, Any]:
        """Return what decides when each step's next graph is compiled."""
        return {step.name: step.state_dict() for step in (self.train, self.evaluate)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for step in (self.train, self.evaluate):
            if step.name in state:
                step.load_state_dict(state[step.name])

    def forward(self, module: nn.Module, features: Any) -> Any:
        """Return the model's outputs; forward may be compiled by itself."""
        if not self.compiles_parts:
            return call_with(module, features)
        model = self.model
        how = choose_call(model, features)

        def forward(features: Any) -> Any:
            return call_as(how, model, features)

        if how not in self.forwards:
            buffers = list(model.buffers())
            self.forwards[how] = OrEager(forward, self.options, buffers, self.run.device)
            if any(map(is_lost_in_a_graph, buffers)):
                self.forwards[how].give_up(
                    "a buffer is a 0-d float64 tensor, and torch.compile loses changes to it"
                )
        return self.forwards[how](features)

    @contextlib.contextmanager
    def predicting(self) -> Iterator[None]:
        """Compile forward by itself meanwhile."""
        yield from self._compiling_parts(True)

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """Compile nothing meanwhile: another size would be compiled again."""
        yield from self._compiling_parts(False)

    def _compiling_parts(self, value: bool) -> Iterator[None]:
        before = self.compiles_parts
        self.compiles_parts = value
        try:
            yield
        finally:
            self.compiles_parts = before

    @contextlib.contextmanager
    def around_fit(self, fit: Fit) -> Iterator[None]:
        """Tell the user what is compiled during a fit.

        At the end optimizers are as without jit.
        """
        self.say = fit.say
        self.expected = set()
        try:
            with warnings.catch_warnings():
                # by Dynamo, of outputs that reach a loss compiled by itself; nothing reads their
                # .grad
                warnings.filterwarnings(
                    "ignore", "The .grad attribute of a Tensor that is not a leaf"
                )
                yield
        finally:
            self.say = lambda message: None
            self.train.waiting.clear()
            self.train.end()
