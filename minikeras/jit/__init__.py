"""The steps as compiled graphs: forward, loss, metrics, backward and optimizer in one.

a fit's first batch    in eager, as without jit: it is looked at closely, and the optimizers make their state
the next one           traced and compiled in the first of these ways that works; a lesser one comes with a warning
    "one graph"        everything
    "metrics outside"  metrics that leave torch run on the graph's outputs
    "forward and loss" backward and step in eager: also where hooks of parameters or optimizers must fire
    "eager"
every other            that graph for batches of its shape, one more graph for all other shapes
a batch for which the loss reaches other parameters, or the optimizer has other groups or another state
                       in eager, as the first; then a new graph

On CUDA the graph for the first shape is captured as a CUDA graph too, unless the user gives a mode or backend, or the
option "triton.cudagraphs"; its results are copied, for the next replay writes over them. One for all other shapes would
be captured anew for each of them.

Gradients are those of the real parameters: a loss that holds on to them, as a penalty does, keeps its share.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from minikeras.data import call_as, manner
from minikeras.jit.graphs import OrEager, Say, chosen
from minikeras.jit.optimizer import is_lost_in_a_graph
from minikeras.jit.steps import EvaluateStep, TrainStep
from minikeras.overrides import overrides

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


class Jit:
    """The compiled parts of one model: its steps where nothing of them is overridden, else forward and loss."""

    def __init__(self, model: Model, run: Run, options: Mapping[str, Any], together: int) -> None:
        self.model, self.run = model, run
        self.options = chosen(options)
        self.say: Say = lambda message: None
        self.train = TrainStep(model, run, run.train, self, together)
        self.evaluate = EvaluateStep(model, run, run.val, self)

        def loss(outputs: Any, labels: Any) -> Any:
            return run.loss_func(outputs, labels)

        self.loss_func = OrEager(loss, self.options, [], run.device)
        buffers = run.loss_func.buffers() if isinstance(run.loss_func, nn.Module) else ()
        if any(map(is_lost_in_a_graph, buffers)):
            self.loss_func.compiled, self.loss_func.worked = loss, True
        self.forwards: dict[str, OrEager] = {}

    def step(self, name: str) -> Any:
        """The step of that name for the loop."""
        if self.overrides(name):
            return self.run.under_autocast(getattr(self.model, name))
        return self.train if name == "train_step" else self.evaluate

    def overrides(self, name: str) -> bool:
        """Tell whether the user wrote that step, or a part of it."""
        return overrides(self.model, *PARTS[name])

    def forward(self, features: Any) -> Any:
        """The model's outputs, compiled."""
        how, model = manner(self.model, features), self.model

        def forward(features: Any) -> Any:
            return call_as(how, model, features)

        if how not in self.forwards:
            buffers = list(model.buffers())
            self.forwards[how] = OrEager(forward, self.options, buffers, self.run.device)
            if any(map(is_lost_in_a_graph, buffers)):
                self.forwards[how].give_up(
                    "a buffer is one number in float64, to which torch.compile loses changes"
                )
        return self.forwards[how](features)

    @contextlib.contextmanager
    def fitting(self, say: Say) -> Iterator[None]:
        """Tells the user of what is compiled meanwhile, and leaves optimizers as without jit at the end."""
        self.say = say
        try:
            with warnings.catch_warnings():
                # said by Dynamo of outputs that reach a loss compiled by itself; nothing reads their .grad
                warnings.filterwarnings(
                    "ignore", "The .grad attribute of a Tensor that is not a leaf"
                )
                yield
        finally:
            self.say = lambda message: None
            self.train.waiting.clear()
            self.train.end()
