"""The default steps for the loop, each as one graph where that can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.batch import call_as, manner
from minikeras.engine import WAITING
from minikeras.jit.graphs import Batch, ByParts, CompileError, Graphs, Kept, Verify, reason
from minikeras.jit.looking import put_back
from minikeras.jit.optimizer import (
    Double,
    gradients_in_graph,
    has_hooks,
    is_lost_in_a_graph,
    numbers,
)
from minikeras.nests import detached
from minikeras.phase import Phase
from minikeras.results import (
    Average,
    count_bad,
    count_bad_gradient,
    counted_total,
    mean_of,
    scalar_loss,
)
from minikeras.rows import UnknownRows
from minikeras.stepper import parameters_of

if TYPE_CHECKING:
    from minikeras.jit.engine import Jit
    from minikeras.model import Model
    from minikeras.run import Run


IN_GRAPH = ("one graph", "metrics outside")  # the best ways
RENEWALS = 8  # of a fit's graph for other parameters or state, after which a graph is not worth its compiling


class EvaluateStep:
    """evaluate_step for the loop: forward, loss and metrics as one graph, where that can be."""

    name = "evaluate_step"
    ways: tuple[str, ...] = (*IN_GRAPH, "eager")
    together = 1  # steps in one call of the graph

    def __init__(self, model: Model, run: Run, phase: Phase, jit: Jit) -> None:
        self.__name__ = self.name  # as the method that it stands for
        self.model = model
        self.run = run
        self.phase = phase
        self.totals = phase.totals
        self.jit = jit
        self.way = "one graph"
        self.graphs: Graphs | None = None
        self.others_in_eager = (
            False  # batches of other shapes than the graph's, where no graph can be made for them
        )
        self.waiting: list[Batch] = []

    def __call__(self, features: Any, labels: Any, sample_weight: Tensor | None = None) -> Any:
        """The results of this batch and of those that waited for it; WAITING while it waits for others."""
        batch = (features, labels, sample_weight)
        was_expected = self.name in self.jit.expected
        if self.phase.checks.is_first and not was_expected:
            self.waiting.clear()
            return self.first(batch)
        if was_expected:  # in the run before, this batch went through the graph
            self.jit.expected.remove(self.name)
            with put_back(self.model, self.run, self.totals):
                results = self.first(batch)
            self.phase.look_by(self.phase.checks.after_batch(self, results))
            self.ready()
        self.waiting.append(batch)
        if len(self.waiting) < self.together:
            return WAITING
        return self.flush()

    def ready(self) -> None:
        """What the graph changes has been put back to where it was."""

    def flush(self) -> dict[str, Any] | None:
        """Take the steps of the batches that wait, if there are any."""
        batches, self.waiting = self.waiting, []
        if len(batches) == self.together and (self.graphs is None or self.graphs.fits(batches)):
            return self.take(batches, other=False)
        return (
            combined(
                [self.take([batch], other=True) for batch in batches],
                batches,
                self.phase.count_rows,
            )
            if batches
            else None
        )

    def take(self, batches: list[Batch], other: bool) -> dict[str, Any]:
        """The steps of these batches, in the best way that is left."""
        failed: CompileError | None = None
        while True:
            try:
                results = self.taken(batches, other)
                break
            except CompileError as error:
                failed = failed or error
                self.descend()
        if failed is not None:
            self.warn(failed)
        return results

    def taken(self, batches: list[Batch], other: bool) -> dict[str, Any]:
        if self.way in IN_GRAPH:
            return self.through_the_graph(batches, other)
        return combined([self.eager(batch) for batch in batches], batches, self.phase.count_rows)

    def descend(self, to: str = "") -> None:
        """Go on in the next way down, or in the one named."""
        self.graphs = None
        below = self.ways[self.ways.index(self.way) + 1 :]
        without_metrics = below[0] == "metrics outside" and not self.totals.functions
        self.way = to or below[without_metrics]

    def warn(self, error: CompileError | str) -> None:
        why = error if isinstance(error, str) else reason(error)
        warnings.warn(f"jit: {self.name} is not one graph: {self.way}, since {why}", stacklevel=2)

    def through_the_graph(self, batches: list[Batch], other: bool) -> dict[str, Any]:
        """`other`: the batches are not of the graph's own shapes, or fewer than it takes together."""
        if self.graphs is None:
            function = self.function(manner(self.model, batches[0][0]))
            options, say = self.jit.options, self.jit.say
            self.graphs = Graphs(
                function, options, say, self.changed(), self.run.device, self.verify()
            )
        if other and self.others_in_eager:
            return combined(
                [self.first(batch) for batch in batches], batches, self.phase.count_rows
            )
        try:
            results, outputs = self.graphs(*batches, other=other)
        except CompileError as error:
            if not self.graphs.compiled:
                raise
            return self.around_the_graph(batches, other, error)
        results = combined(results, batches, self.phase.count_rows)
        self.count(batches, results["loss"])
        if outputs is None:
            return dict(results)
        outside = [
            self.outside(output, batch[1]) for output, batch in zip(outputs, batches, strict=True)
        ]
        return {**results, **combined(outside, batches, self.phase.count_rows)}

    def around_the_graph(
        self, batches: list[Batch], other: bool, error: CompileError
    ) -> dict[str, Any]:
        """The steps of batches that take another graph, which could not be made; the best way on from there."""
        graphs = self.graphs
        results = combined(
            [self.first(batch) for batch in batches], batches, self.phase.count_rows
        )  # raises if the batch is at fault
        if (
            self.graphs is not graphs or graphs is None
        ):  # the loss reaches other parameters: a new graph is due
            return results
        if other in graphs.compiled:
            self.descend(self.ways[len(IN_GRAPH)])
            self.warn(error)
        else:
            self.others_in_eager = True
            warnings.warn(
                f"jit: {self.name} runs other batch sizes in eager, since {reason(error)}",
                stacklevel=2,
            )
        return results

    def verify(self) -> Verify | None:
        """What looks at the first step of a graph; None for nothing."""
        return None

    def count(self, batches: list[Batch], loss: Any) -> None:
        """The steps of these batches were taken in the graph, with this loss."""

    def outside(self, outputs: Any, labels: Any) -> dict[str, Any]:
        """Objects, and functions that leave torch."""
        with_functions = self.way == "metrics outside"
        return self.phase.checks.metrics(outputs, labels, with_functions)

    def function(self, how: str) -> Callable[..., Any]:
        """What is traced: the steps of some batches, giving their results and the outputs that are still wanted."""
        one, wants_outputs = self.one(how), bool(self.totals.objects) or self.way != "one graph"

        def step(*batches: Batch) -> tuple[list[dict[str, Any]], list[Any] | None]:
            done = [one(*batch) for batch in batches]
            outputs = [output for _, output in done] if wants_outputs else None
            results: Any = [results for results, _ in done]
            if all(has_plain_rows(batch) for batch in batches):
                results = [combined(results, batches, first_size_of_labels)]
            return results, outputs

        step.__name__ = self.name
        return step

    def one(self, how: str) -> Callable[..., tuple[dict[str, Any], Any]]:
        """One batch's step as plain torch."""
        forward_and_loss, functions = self.forward_and_loss(how), self.functions()

        def one(
            features: Any, labels: Any, sample_weight: Tensor | None
        ) -> tuple[dict[str, Any], Any]:
            outputs, loss = forward_and_loss(features, labels, sample_weight)
            return {
                "loss": loss,
                **{name: metric(outputs, labels) for name, metric in functions.items()},
            }, outputs

        return one

    def forward_and_loss(self, how: str) -> Callable[..., tuple[Any, Any]]:
        """Outputs, in float32, and loss of a batch as plain torch."""
        model, loss_func, stepper = self.model, self.run.loss_func, self.run.stepper
        per_row = not self.phase.is_training

        def forward_and_loss(
            features: Any, labels: Any, sample_weight: Tensor | None
        ) -> tuple[Any, Any]:
            outputs = call_as(how, model, features)
            return outputs, scalar_loss(loss_func(outputs, labels), sample_weight, per_row)

        decorated = stepper.decorated("around_step", forward_and_loss)
        if decorated is forward_and_loss:
            return forward_and_loss

        def in_full_precision(
            features: Any, labels: Any, sample_weight: Tensor | None
        ) -> tuple[Any, Any]:
            outputs, loss = decorated(features, labels, sample_weight)
            return stepper.outputs_for_user(outputs), loss

        return in_full_precision

    def functions(self) -> dict[str, Any]:
        """The metrics that are in the graph."""
        return self.totals.functions if self.way == "one graph" else {}

    def first(self, batch: Batch) -> dict[str, Any]:
        """A step in eager, after which the graph goes on."""
        results = self.eager(batch)
        self.leave_numbers_to_eager()
        return results

    def leave_numbers_to_eager(self) -> None:
        """Compile nothing where a buffer is such that its changes would be lost."""
        modules: list[nn.Module] = [self.model]
        if isinstance(self.run.loss_func, nn.Module):
            modules.append(self.run.loss_func)
        names = []
        for module in modules:
            names += [name for name, buffer in module.named_buffers() if is_lost_in_a_graph(buffer)]
        if names and self.way != "eager":
            self.descend("eager")
            self.warn(
                f"the buffer {names[0]} is one number in float64, to which torch.compile loses changes on the CPU. "
                f"With shape (1,) it would be in the graph"
            )

    def eager(self, batch: Batch) -> dict[str, Any]:
        self.take_current(batch)
        step = self.run.stepper.decorated("around_step", getattr(self.model, self.name))
        return dict(step(*batch[: 2 if batch[2] is None else 3]))

    def take_current(self, batch: Batch) -> None:
        """Make a batch that may have waited the current one."""
        current = self.phase.batch
        self.phase.take(current.number, *batch, current.is_filler)

    def changed(self) -> list[Tensor]:
        """The tensors that a step changes."""
        return list(self.model.buffers())


class TrainStep(EvaluateStep):
    """train_step for the loop: forward, loss, metrics, backward and optimizer as one graph, where that can be."""

    name = "train_step"
    ways = (*IN_GRAPH, "forward and loss", "eager")

    def __init__(self, model: Model, run: Run, phase: Phase, jit: Jit, together: int) -> None:
        super().__init__(model, run, phase, jit)
        self.together = together
        self.doubles: list[Double] = []
        self.reached: list[nn.Parameter] = []  # by the loss, in an eager step
        self.gradients: list[Tensor] = []  # their buffers, for the graph to write into
        self.renewed = 0  # graphs of this fit that had to be given up for another
        self.parts: ByParts | None = None
        self.bad = torch.zeros(
            (), device=run.device
        )  # steps since the first loss that was not finite
        self.of_gradient = torch.zeros(
            (), device=run.device
        )  # 1 where it was the gradient of such a loss
        self.holds = torch.zeros(
            (), dtype=torch.bool, device=run.device
        )  # whether that holds back the steps

    def taken(self, batches: list[Batch], other: bool) -> dict[str, Any]:
        if self.way in IN_GRAPH and not all(double.current() for double in self.doubles):
            return combined(
                [self.first(batch) for batch in batches], batches, self.phase.count_rows
            )
        if self.way in IN_GRAPH and not all(double.follow() for double in self.doubles):
            self.descend("forward and loss")
            self.warn("a setting of the optimizer other than lr has changed")
        if self.way == "forward and loss":
            return combined(
                [self.by_parts(batch) for batch in batches], batches, self.phase.count_rows
            )
        return super().taken(batches, other)

    def count(self, batches: list[Batch], loss: Any) -> None:
        for double in self.doubles:
            double.taken += len(batches)
        try:
            self.run.stepper.on_graph_steps(mean_of(loss), len(batches))
        except Exception as error:
            ago = getattr(error, "ago", None)  # of a loss that was bad in one of these steps
            if ago is not None and ago < len(batches):
                features, labels, _ = batches[-1 - ago]
                error.culprit = features, labels  # type: ignore[attr-defined]
            raise

    def is_in_graph(self) -> bool:
        """Whether the optimizers step in the graph, which holds them back by itself."""
        return self.way in IN_GRAPH and self.graphs is not None

    def descend(self, to: str = "") -> None:
        super().descend(to)
        if self.way not in IN_GRAPH:
            self.end()
            self.doubles, self.reached = [], []

    def one(self, how: str) -> Callable[..., tuple[dict[str, Any], Any]]:
        forward_and_loss, functions, clip = (
            self.forward_and_loss(how),
            self.functions(),
            self.clip(),
        )
        parameters, steps = self.reached, [(double.step, double.twin) for double in self.doubles]
        gradients_of, others = gradients_in_graph(len(parameters)), self.others()
        kept = Kept([self.bad, self.of_gradient, self.holds, *self.states()])

        def one(
            features: Any, labels: Any, sample_weight: Tensor | None
        ) -> tuple[dict[str, Any], Any]:
            outputs, loss = forward_and_loss(features, labels, sample_weight)
            gradients = gradients_of(mean_of(loss), *parameters, *others)
            with torch.no_grad():
                bad, of_gradient, holds, *states = kept()
                moved = [*parameters, *states]
                before = [tensor.clone() for tensor in moved]
                count_bad(bad, mean_of(loss))
                for parameter, gradient in zip(parameters, gradients):  # noqa: B905 - strict does not trace
                    parameter.grad.copy_(gradient)  # type: ignore[union-attr] # to set it would break the graph
                clip(bad, of_gradient)
                for step, twin in steps:
                    step(twin)
                held = (bad > 0) & holds
                for tensor, old in zip(moved, before):  # noqa: B905 - the compiler makes no copies of this
                    tensor.copy_(torch.where(held, old, tensor))
                outputs = detached(outputs)
                results = {name: metric(outputs, labels) for name, metric in functions.items()}
            return {"loss": detached(loss), **results}, outputs

        return one

    def others(self) -> list[Tensor]:
        """The parameters of the optimizers that the loss does not reach, as it is now."""
        reached = {id(parameter) for parameter in self.reached}
        return [
            p
            for double in self.doubles
            for p in parameters_of(double.optimizer)
            if id(p) not in reached
        ]

    def clip(self) -> Callable[[Tensor, Tensor], None]:
        """Clips the gradients of each optimizer, where compile was asked for it; a norm that is not finite counts."""
        reached = {id(parameter) for parameter in self.reached}
        changes = self.run.stepper.moments("on_gradients_in_graph")
        parameters_by_optimizer = []
        for double in self.doubles:
            own = [p for p in parameters_of(double.optimizer) if id(p) in reached]
            parameters_by_optimizer.append(own)

        def clip(bad: Tensor, of_gradient: Tensor) -> None:
            def tell_norm(total: Tensor, parameters: list[Tensor]) -> None:
                count_bad_gradient(bad, of_gradient, total)

            for parameters in parameters_by_optimizer:
                for change in changes:
                    change(parameters, tell_norm)

        return clip

    def first(self, batch: Batch) -> dict[str, Any]:
        """The model's own step, with the graph's buffers out of its way; the graph goes on from there."""
        self.end()
        self.renewed *= not self.phase.checks.is_first
        reached: list[nn.Parameter] = []

        def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            reached.extend(
                p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            )

        optimizers = list(self.run.optimizers.values())
        before = [(optimizer, numbers(optimizer)) for optimizer in optimizers]
        handles = [optimizer.register_step_pre_hook(note) for optimizer in optimizers]
        try:
            results = self.eager(batch)
        finally:
            for handle in handles:
                handle.remove()
        self.holds.fill_(self.run.stepper.holds_graphs)
        counts = sorted(
            key for one, old in before for (key, _), _ in numbers(one).items() - old.items()
        )
        self.leave_numbers_to_eager()
        why = self.why_outside(counts)
        if self.way in IN_GRAPH and why:
            self.descend("forward and loss")
            self.warn(why)
        if self.way in IN_GRAPH and has_hooks(reached, optimizers):
            self.descend("forward and loss")
        if self.way in IN_GRAPH:
            self.begin(reached, optimizers)
        return results

    def why_outside(self, counts: list[str]) -> str:
        """Why backward and step cannot be in the graph, as far as the user must be told; `counts`: see `numbers`."""
        outside = self.run.stepper.outside_graph
        if outside:
            return f"{outside} needs backward and step outside it"
        if counts:
            return f"a step of the optimizer changes a Python number, {counts[0]!r}. A tensor would be in the graph"
        optimizers = list(self.run.optimizers.values())
        if any(isinstance(optimizer, torch.optim.ASGD) for optimizer in optimizers):
            return "ASGD decides by numbers in its state, which a graph would hold as they were"
        tensors = [parameter for optimizer in optimizers for parameter in parameters_of(optimizer)]
        if any(map(is_lost_in_a_graph, tensors)):
            return "a parameter is one number in float64, to which torch.compile loses changes on the CPU"
        return ""

    def ready(self) -> None:
        for parameter, gradient in zip(self.reached, self.gradients, strict=False):
            parameter.grad = gradient
        for double in self.doubles:
            double.read()

    def verify(self) -> Verify | None:
        def before() -> Callable[[], None]:
            checks = [double.before_a_graph() for double in self.doubles]

            def after() -> None:
                for check in checks:
                    check()

            return after

        return before

    def begin(self, reached: list[nn.Parameter], optimizers: list[Optimizer]) -> None:
        """Set up for the graph, after an eager step whose loss reached these parameters."""
        same = [id(parameter) for parameter in reached] == [
            id(parameter) for parameter in self.reached
        ]
        kept = [double.current() and double.read() for double in self.doubles]
        if not same or not all(kept):
            self.renewed += self.graphs is not None
            if self.renewed > RENEWALS:
                self.descend("forward and loss")
                self.warn(
                    "the parameters that the loss reaches, or the optimizer's state, are others again and again"
                )
                return
            self.graphs, self.reached = None, reached
            self.gradients = [torch.zeros_like(parameter) for parameter in reached]
            self.doubles = [Double(optimizer) for optimizer in optimizers]
        for parameter, gradient in zip(self.reached, self.gradients, strict=True):
            parameter.grad = gradient
        for double in self.doubles:
            double.attach()

    def end(self) -> None:
        """Leave optimizers and gradients as an eager loop would."""
        held = int(self.bad) if self.doubles and self.holds else 0
        for double in self.doubles:
            double.taken = max(0, double.taken - held)
            double.detach()
        for parameter in self.reached:
            parameter.grad = None

    def by_parts(self, batch: Batch) -> dict[str, Any]:
        """Forward and loss compiled, backward and step in eager: hooks fire there."""
        if self.parts is None:
            function = self.forward_and_loss(manner(self.model, batch[0]))
            self.parts = ByParts(
                function, self.jit.options, list(self.model.buffers()), self.run.device
            )
        self.take_current(batch)
        outputs, loss = self.parts(*batch)
        self.model.backward(loss)
        metrics = self.model.compute_metrics(outputs, batch[1])
        self.model.optimizer_step()
        return {"loss": loss, **metrics}

    def states(self) -> list[Tensor]:
        """The tensors in the optimizers' state."""
        states = [
            value
            for double in self.doubles
            for state in double.twin.state.values()
            for value in state.values()
        ]
        return [value for value in states if isinstance(value, Tensor)]

    def changed(self) -> list[Tensor]:
        return [
            *self.reached,
            *self.states(),
            *super().changed(),
            *self.gradients,
            self.bad,
            self.of_gradient,
        ]


def combined(
    results: Sequence[Mapping[str, Any]], batches: Sequence[Batch], count: Callable[..., Any]
) -> dict[str, Any]:
    """The results of several steps as one: totals and counts over their rows, which `count` tells of a batch."""
    if len(results) == 1:
        return dict(results[0])
    totals: dict[str, Any] = dict.fromkeys(results[0], 0)
    counts: dict[str, Any] = dict.fromkeys(results[0], 0)
    for result, batch in zip(results, batches):  # noqa: B905 - strict does not trace
        rows = count(*batch)
        for name, value in result.items():
            if isinstance(value, Average):
                totals[name] = totals[name] + counted_total(value)
                counts[name] = counts[name] + value.count
                continue
            if isinstance(rows, UnknownRows):
                rows.refuse()
            totals[name] = totals[name] + value * rows
            counts[name] = counts[name] + rows
    return {name: Average(totals[name], counts[name]) for name in totals}


def first_size_of_labels(features: Any, labels: Any, sample_weight: Any) -> int:
    """The rows of a batch whose labels are a tensor and whose features state nothing else, for a graph."""
    return len(labels)


def has_plain_rows(batch: Batch) -> bool:
    """Whether a graph can count the rows of such a batch by itself."""
    features, labels, _ = batch
    if not (isinstance(features, Tensor) and isinstance(labels, Tensor)):
        return False
    return features.ndim > 0 and labels.ndim > 0 and features.shape[0] == labels.shape[0]
