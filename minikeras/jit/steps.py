"""The default steps for the loop, each as one graph if possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.batch import call_as, choose_call
from minikeras.engine import WAITING
from minikeras.jit.graphs import (
    Batch,
    ByParts,
    ChangedTensors,
    CompileError,
    Graphs,
    Verify,
    reason,
    shapes_of,
)
from minikeras.jit.looking import put_back
from minikeras.jit.optimizer import (
    OTHER_PARAMETERS,
    OptimizerTwin,
    gradients_in_graph,
    has_hooks,
    is_lost_in_a_graph,
    numbers,
)
from minikeras.nests import detach_nest
from minikeras.phase import Phase
from minikeras.results import (
    Average,
    LossParts,
    count_bad,
    count_bad_gradient,
    get_mean,
    get_total,
    reduce_loss,
    settle_parts,
    spread_loss,
)
from minikeras.rows import UnknownRows
from minikeras.stepper import optimizer_parameters

if TYPE_CHECKING:
    from minikeras.jit.engine import Jit
    from minikeras.model import Model
    from minikeras.run import Run


IN_GRAPH = ("one graph", "metrics outside")  # the best ways
# new graphs of a fit for other parameters or state, after which compiling is not worth it
RENEWALS = 8
# batches in eager mode before the graph for them is compiled: at some 1 ms won for each batch, they
# have cost by then about as much as compiling does. Never seconds: a fit that resumes must compile
# at the same batch.
BATCHES_BEFORE_A_GRAPH = 2000


class EvaluateStep:
    """evaluate_step for the loop: forward, loss and metrics as one graph if possible."""

    name = "evaluate_step"
    ways: tuple[str, ...] = (*IN_GRAPH, "eager")
    together = 1  # steps in one call of the graph
    # whether it is for other shapes -> its graph is compiled at the first batch
    at_once: Mapping[bool, bool] = {False: False, True: False}

    def __init__(self, model: Model, run: Run, phase: Phase, jit: Jit) -> None:
        self.__name__ = self.name  # the name of the method that it replaces
        self.model = model
        self.run = run
        self.phase = phase
        self.totals = phase.totals
        self.jit = jit
        self.way = "one graph"
        self.graphs: Graphs | None = None
        # batches of other shapes than the graph's run in eager mode
        self.others_in_eager = False
        self.shapes: list[Any] = []  # the graph's own: of the batches that came first
        # whether it is for other shapes -> batches that ran in eager mode, as there was no graph
        self.without_graph = {False: 0, True: 0}
        self.waiting: list[Batch] = []

    def __call__(self, features: Any, labels: Any, sample_weight: Tensor | None = None) -> Any:
        """Take the step of this batch, and of those that waited for it.

        Returns:
            Their results; WAITING if this batch waits for others.
        """
        batch = (features, labels, sample_weight)
        was_expected = self.name in self.jit.expected
        if self.phase.checks.is_first and not was_expected:
            self.waiting.clear()
            return self.first(batch)
        if was_expected:  # in the interrupted run this batch went through the graph
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
        """Act after everything that a graph changes has been put back."""

    def flush(self) -> dict[str, Any] | None:
        """Take the steps of the batches that wait, if there are any."""
        batches = self.waiting
        self.waiting = []
        if len(batches) == self.together and self.fits(batches):
            return self.take(batches, other=False)
        if not batches:
            return None
        results = [self.take([batch], other=True) for batch in batches]
        return self.combined(results, batches)

    def fits(self, batches: Sequence[Batch]) -> bool:
        """Tell whether the batches have the shapes of the first ones, as the graph has."""
        shapes = [shapes_of(batch) for batch in batches]
        if not self.shapes:
            self.shapes = shapes
        return shapes == self.shapes

    def pays(self, batches: Sequence[Batch], other: bool) -> bool:
        """Tell whether so many batches have run without this graph that it pays; count them."""
        if self.at_once[other] or self.without_graph[other] >= BATCHES_BEFORE_A_GRAPH:
            return True
        self.without_graph[other] += len(batches)
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what decides when a graph is compiled, and for which shapes."""
        own, others = self.without_graph[False], self.without_graph[True]
        return {"shapes": self.shapes, "own": own, "others": others}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.shapes = state["shapes"]
        self.without_graph = {False: state["own"], True: state["others"]}

    def combined(
        self, results: Sequence[Mapping[str, Any]], batches: Sequence[Batch]
    ) -> dict[str, Any]:
        """Return the results of several steps as one."""
        if len(results) == 1:
            return dict(results[0])
        together = combined(results, batches, self.phase.count_rows)
        return ResultsTogether(together, results[-1])

    def take(self, batches: list[Batch], other: bool) -> dict[str, Any]:
        """Take the steps of these batches in the best way that is left."""
        failed: CompileError | None = None
        while True:
            try:
                results = self.take_in_current_way(batches, other)
                break
            except CompileError as error:
                failed = failed or error
                self.descend()
        if failed is not None:
            self.warn(failed)
        return results

    def take_in_current_way(self, batches: list[Batch], other: bool) -> dict[str, Any]:
        """Take the steps of these batches in the current way.

        Raises:
            CompileError: it does not work; nothing has changed.
        """
        if self.way in IN_GRAPH:
            return self.through_the_graph(batches, other)
        return self.combined([self.eager(batch) for batch in batches], batches)

    def descend(self, to: str = "") -> None:
        """Switch to the next slower way, or to the one named `to`."""
        self.graphs = None
        below = self.ways[self.ways.index(self.way) + 1 :]
        way = below[0]
        if way == "metrics outside" and not self.totals.functions:
            way = below[1]
        self.way = to or way

    def warn(self, error: CompileError | str) -> None:
        """Warn of the way that is taken now, and why."""
        why = error if isinstance(error, str) else reason(error)
        warnings.warn(f"jit: {self.name} is not one graph: {self.way}, because {why}", stacklevel=2)

    def through_the_graph(self, batches: list[Batch], other: bool) -> dict[str, Any]:
        """Take the steps of these batches in the graph.

        Args:
            other: the batches are not of the graph's own shapes, or fewer than it takes together.
        """
        if self.graphs is None:
            self.graphs = Graphs(
                self.function(choose_call(self.model, batches[0][0])),
                self.jit.options,
                self.jit.say,
                self.changed(),
                self.run.device,
                self.verify(),
            )
        if (other and self.others_in_eager) or not self.pays(batches, other):
            return self.combined([self.first(batch) for batch in batches], batches)
        try:
            results, last, outputs = self.graphs(*batches, other=other)
        except CompileError as error:
            has_changed = OTHER_PARAMETERS in str(error)  # since the last step in eager mode
            if not other and not self.graphs.compiled and not has_changed:
                raise
            return self.around_the_graph(batches, other, error)
        if last is None:
            last = results[-1]
        results = self.combined(results, batches)
        self.count(batches, results["loss"])
        if outputs is not None:
            outside = []
            for output, batch in zip(outputs, batches, strict=True):
                outside.append(self.outside(output, batch[1]))
            results = {**results, **self.combined(outside, batches)}
            last = {**last, **outside[-1]}
        return dict(results) if len(batches) == 1 else ResultsTogether(results, last)

    def around_the_graph(
        self, batches: list[Batch], other: bool, error: CompileError
    ) -> dict[str, Any]:
        """Take the steps of batches that need another graph, which could not be compiled.

        Choose the best way for the batches after them.
        """
        graphs = self.graphs
        # raises an error if the batch is the cause
        results = self.combined([self.first(batch) for batch in batches], batches)
        if self.graphs is not graphs or graphs is None:
            return results  # the loss reaches other parameters: a new graph is due
        if other and other not in graphs.compiled:
            self.others_in_eager = True
            warnings.warn(
                f"jit: {self.name} runs other batch sizes in eager mode, because {reason(error)}",
                stacklevel=2,
            )
        else:
            self.descend(self.ways[len(IN_GRAPH)])
            self.warn(error)
        return results

    def verify(self) -> Verify | None:
        """Return what checks the first step of a graph; None for nothing."""
        return None

    def count(self, batches: list[Batch], loss: Any) -> None:
        """Count the steps of these batches, which the graph has taken with this loss."""

    def outside(self, outputs: Any, labels: Any) -> dict[str, Any]:
        """Return metrics outside the graph: objects, and functions that leave torch."""
        with_functions = self.way == "metrics outside"
        return self.phase.checks.metrics(outputs, labels, with_functions)

    def function(self, how: str) -> Callable[..., Any]:
        """Return what is traced: the steps of some batches.

        It returns their results, those of the last of them if they have been added up, and the
        outputs that are still needed.
        """
        step_of_batch = self.step_of_batch(how)
        wants_outputs = bool(self.totals.objects) or self.way != "one graph"

        def step(
            *batches: Batch,
        ) -> tuple[list[dict[str, Any]], dict[str, Any] | None, list[Any] | None]:
            taken = [step_of_batch(*batch) for batch in batches]
            outputs = [output for _, output in taken] if wants_outputs else None
            results: Any = [results for results, _ in taken]
            last = None
            if len(batches) > 1 and all(has_plain_rows(batch) for batch in batches):
                last = results[-1]
                results = [combined(results, batches, first_size_of_labels)]
            return results, last, outputs

        step.__name__ = self.name
        return step

    def step_of_batch(self, how: str) -> Callable[..., tuple[dict[str, Any], Any]]:
        """Return the step of one batch as plain torch."""
        forward_and_loss = self.forward_and_loss(how)
        functions = self.functions()

        def step_of_batch(
            features: Any, labels: Any, sample_weight: Tensor | None
        ) -> tuple[dict[str, Any], Any]:
            outputs, loss = forward_and_loss(features, labels, sample_weight)
            results = {name: metric(outputs, labels) for name, metric in functions.items()}
            return {**spread_loss(loss), **results}, outputs

        return step_of_batch

    def forward_and_loss(self, how: str) -> Callable[..., tuple[Any, Any]]:
        """Return a function that computes outputs, in float32, and loss, as plain torch."""
        model = self.model
        loss_func = self.run.loss_func
        stepper = self.run.stepper
        per_row = not self.phase.is_training

        def forward_and_loss(
            features: Any, labels: Any, sample_weight: Tensor | None
        ) -> tuple[Any, Any]:
            outputs = call_as(how, model, features)
            return outputs, reduce_loss(loss_func(outputs, labels), sample_weight, per_row)

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
        """Return the metrics that are in the graph."""
        return self.totals.calls if self.way == "one graph" else {}

    def first(self, batch: Batch) -> dict[str, Any]:
        """Take a step in eager mode, after which the graph continues."""
        results = self.eager(batch)
        self.leave_numbers_to_eager()
        return results

    def leave_numbers_to_eager(self) -> None:
        """Compile nothing if changes to a buffer would be lost."""
        modules: list[nn.Module] = [self.model]
        if isinstance(self.run.loss_func, nn.Module):
            modules.append(self.run.loss_func)
        names = []
        for module in modules:
            names += [name for name, buffer in module.named_buffers() if is_lost_in_a_graph(buffer)]
        if names and self.way != "eager":
            self.descend("eager")
            self.warn(
                f"the buffer {names[0]} is a 0-d float64 tensor, and torch.compile loses changes "
                "to it on the CPU. With shape (1,) it would be in the graph"
            )

    def eager(self, batch: Batch) -> dict[str, Any]:
        """Take a step in eager mode."""
        self.take_current(batch)
        step = self.run.stepper.decorated("around_step", getattr(self.model, self.name))
        features, labels, sample_weight = batch
        if sample_weight is None:
            return dict(step(features, labels))
        return dict(step(features, labels, sample_weight))

    def take_current(self, batch: Batch) -> None:
        """Make a batch that may have waited the current one."""
        current = self.phase.batch
        if current.features is batch[0] and current.labels is batch[1]:
            return  # it has not waited
        self.phase.take(current.number, *batch, current.is_filler)

    def changed(self) -> list[Tensor]:
        """Return the tensors that a step changes."""
        return list(self.model.buffers())


class TrainStep(EvaluateStep):
    """train_step for the loop: forward, loss, metrics, backward and optimizer as one graph."""

    name = "train_step"
    ways = (*IN_GRAPH, "forward and loss", "eager")
    at_once = {False: True, True: False}  # noqa: RUF012

    def __init__(self, model: Model, run: Run, phase: Phase, jit: Jit, together: int) -> None:
        super().__init__(model, run, phase, jit)
        self.together = together
        if together > 1:  # for a long run; the batches that are left over come in every epoch
            self.at_once = {False: True, True: True}
        self.twins: list[OptimizerTwin] = []
        self.reached: list[nn.Parameter] = []  # by the loss, in an eager step
        self.gradients: list[Tensor] = []  # their buffers, for the graph to write into
        self.renewed = 0  # graphs of this fit that had to be replaced
        self.parts: ByParts | None = None
        # steps since the first loss that was not finite
        self.bad = torch.zeros((), device=run.device)
        # 1 if it was the gradient of such a loss
        self.of_gradient = torch.zeros((), device=run.device)
        # whether that holds back the steps
        self.holds = torch.zeros((), dtype=torch.bool, device=run.device)

    def take_in_current_way(self, batches: list[Batch], other: bool) -> dict[str, Any]:
        """Take the steps of these batches in the current way.

        Raises:
            CompileError: it does not work; nothing has changed.
        """
        if self.way in IN_GRAPH and not all(twin.is_current() for twin in self.twins):
            return self.combined([self.first(batch) for batch in batches], batches)
        if self.way in IN_GRAPH and not all(twin.follow() for twin in self.twins):
            self.descend("forward and loss")
            self.warn("a setting of the optimizer other than lr has changed")
        if self.way == "forward and loss":
            return self.combined([self.by_parts(batch) for batch in batches], batches)
        return super().take_in_current_way(batches, other)

    def count(self, batches: list[Batch], loss: Any) -> None:
        """Count the steps of these batches, which the graph has taken with this loss."""
        for twin in self.twins:
            twin.taken += len(batches)
        try:
            self.run.stepper.on_graph_steps(get_mean(loss), len(batches))
        except Exception as error:
            ago = getattr(error, "ago", None)  # of a loss that was bad in one of these steps
            if ago is not None and ago < len(batches):
                features, labels, _ = batches[-1 - ago]
                error.culprit = features, labels  # type: ignore[attr-defined]
            raise

    def is_in_graph(self) -> bool:
        """Tell whether the optimizers step in the graph, which holds them back by itself."""
        return self.way in IN_GRAPH and self.graphs is not None

    def descend(self, to: str = "") -> None:
        """Switch to the next slower way, or to the one named `to`."""
        super().descend(to)
        if self.way not in IN_GRAPH:
            self.end()
            self.twins = []
            self.reached = []

    def step_of_batch(self, how: str) -> Callable[..., tuple[dict[str, Any], Any]]:
        """Return the step of one batch as plain torch."""
        forward_and_loss = self.forward_and_loss(how)
        functions = self.functions()
        clip = self.clip()
        parameters = self.reached
        steps = [(twin.step, twin.copy) for twin in self.twins]
        others = self.others()
        changed = ChangedTensors([self.bad, self.of_gradient, self.holds, *self.states()])

        def step_of_batch(
            features: Any, labels: Any, sample_weight: Tensor | None
        ) -> tuple[dict[str, Any], Any]:
            outputs, loss = forward_and_loss(features, labels, sample_weight)
            reached = len(parameters)
            gradients = gradients_in_graph(reached, get_mean(loss), *parameters, *others)
            with torch.no_grad():
                bad, of_gradient, holds, *states = changed()
                moved = [*parameters, *states]
                before = [tensor.clone() for tensor in moved]
                count_bad(bad, get_mean(loss))
                # without strict, which does not trace
                for parameter, gradient in zip(parameters, gradients):  # noqa: B905
                    # to assign it would break the graph
                    parameter.grad.copy_(gradient)  # type: ignore[union-attr]
                clip(bad, of_gradient)
                for step, copy in steps:
                    step(copy)
                is_held_back = (bad > 0) & holds
                # the compiler makes no copies of this
                for tensor, old in zip(moved, before):  # noqa: B905
                    tensor.copy_(torch.where(is_held_back, old, tensor))
                outputs = detach_nest(outputs)
                results = {name: metric(outputs, labels) for name, metric in functions.items()}
            return {**spread_loss(loss), **results}, outputs

        return step_of_batch

    def others(self) -> list[Tensor]:
        """Return the parameters of the optimizers that the loss does not reach, as it is now."""
        reached = {id(parameter) for parameter in self.reached}
        others = []
        for twin in self.twins:
            for parameter in optimizer_parameters(twin.optimizer):
                if id(parameter) not in reached:
                    others.append(parameter)
        return others

    def clip(self) -> Callable[[Tensor, Tensor], None]:
        """Return a function that clips the gradients of each optimizer, as compile asked for.

        It counts a norm that is not finite.
        """
        reached = {id(parameter) for parameter in self.reached}
        changes = self.run.stepper.moments("on_gradients_in_graph")
        parameters_by_optimizer = []
        for twin in self.twins:
            own = []
            for parameter in optimizer_parameters(twin.optimizer):
                if id(parameter) in reached:
                    own.append(parameter)
            parameters_by_optimizer.append(own)

        def clip(bad: Tensor, of_gradient: Tensor) -> None:
            def tell_norm(total: Tensor, parameters: list[Tensor]) -> None:
                count_bad_gradient(bad, of_gradient, total)

            for parameters in parameters_by_optimizer:
                for change in changes:
                    change(parameters, tell_norm)

        return clip

    def first(self, batch: Batch) -> dict[str, Any]:
        """Take the model's own step without the graph's buffers; then prepare a graph."""
        self.end()
        if self.phase.checks.is_first:  # a fit begins
            self.renewed = 0
        reached: list[nn.Parameter] = []

        def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        reached.append(parameter)

        optimizers = list(self.run.optimizers.values())
        before = [(optimizer, numbers(optimizer)) for optimizer in optimizers]
        handles = [optimizer.register_step_pre_hook(note) for optimizer in optimizers]
        try:
            results = self.eager(batch)
        finally:
            for handle in handles:
                handle.remove()
        self.holds.fill_(self.run.stepper.holds_graphs)
        counts = []  # names of Python numbers that the step has changed
        for optimizer, old in before:
            for (key, _), _ in numbers(optimizer).items() - old.items():
                counts.append(key)
        counts.sort()
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
        """Return why backward and step cannot be in the graph, if the user must be told.

        Args:
            counts: names of Python numbers that a step of the optimizer changes.
        """
        outside = self.run.stepper.outside_graph
        if outside:
            return f"{outside} needs backward and step outside it"
        if counts:
            return (
                f"a step of the optimizer changes a Python number, {counts[0]!r}. If it were a "
                "tensor, it would be in the graph"
            )
        optimizers = list(self.run.optimizers.values())
        if any(isinstance(optimizer, torch.optim.ASGD) for optimizer in optimizers):
            return "ASGD branches on numbers in its state, which would be constants in a graph"
        for optimizer in optimizers:
            if any(map(is_lost_in_a_graph, optimizer_parameters(optimizer))):
                return (
                    "a parameter is a 0-d float64 tensor, and torch.compile loses changes to it "
                    "on the CPU"
                )
        return ""

    def ready(self) -> None:
        """Give the graph its gradients, and the optimizers' state as it is now."""
        for parameter, gradient in zip(self.reached, self.gradients, strict=False):
            parameter.grad = gradient
        for twin in self.twins:
            twin.read()

    def verify(self) -> Verify | None:
        """Return what checks the first step of a graph."""

        def before() -> Callable[[], None]:
            checks = [twin.before_a_graph() for twin in self.twins]

            def after() -> None:
                for check in checks:
                    check()

            return after

        return before

    def begin(self, reached: list[nn.Parameter], optimizers: list[Optimizer]) -> None:
        """Prepare a graph, after an eager step whose loss reached these parameters."""
        ids = [id(parameter) for parameter in reached]
        is_same = ids == [id(parameter) for parameter in self.reached]
        for twin in self.twins:
            if not twin.is_current() or not twin.read():
                is_same = False
        if not is_same:
            self.renewed += self.graphs is not None
            if self.renewed > RENEWALS:
                self.descend("forward and loss")
                self.warn(
                    "the parameters that the loss uses, or the optimizer's state, keep changing"
                )
                return
            self.graphs = None
            self.reached = reached
            self.gradients = [torch.zeros_like(parameter) for parameter in reached]
            self.twins = [OptimizerTwin(optimizer) for optimizer in optimizers]
        for parameter, gradient in zip(self.reached, self.gradients, strict=True):
            parameter.grad = gradient
        for twin in self.twins:
            twin.attach()

    def end(self) -> None:
        """Leave optimizers and gradients as an eager loop would."""
        held_back = 0  # steps
        if self.twins and self.holds:
            held_back = int(self.bad)
        for twin in self.twins:
            twin.taken = max(0, twin.taken - held_back)
            twin.detach()
        for parameter in self.reached:
            parameter.grad = None

    def by_parts(self, batch: Batch) -> dict[str, Any]:
        """Take a step with forward and loss compiled, backward and step in eager mode."""
        if self.parts is None:
            function = self.forward_and_loss(choose_call(self.model, batch[0]))
            self.parts = ByParts(
                function, self.jit.options, list(self.model.buffers()), self.run.device
            )
        self.take_current(batch)
        outputs, loss = self.parts(*batch)
        self.model.backward(settle_parts(loss))
        metrics = self.model.compute_metrics(outputs, batch[1])
        self.model.optimizer_step()
        return {**spread_loss(loss), **metrics}

    def states(self) -> list[Tensor]:
        """Return the tensors in the optimizers' state."""
        tensors = []
        for twin in self.twins:
            for state in twin.copy.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        tensors.append(value)
        return tensors

    def changed(self) -> list[Tensor]:
        """Return the tensors that a step changes."""
        return [
            *self.reached,
            *self.states(),
            *super().changed(),
            *self.gradients,
            self.bad,
            self.of_gradient,
        ]


class ResultsTogether(dict[str, Any]):
    """The results of several steps as one; `last_batch` are those of the last step alone."""

    def __init__(self, results: Mapping[str, Any], last_batch: Mapping[str, Any]) -> None:
        super().__init__(results)
        self.last_batch = last_batch


def combined(
    results: Sequence[Mapping[str, Any]], batches: Sequence[Batch], count: Callable[..., Any]
) -> dict[str, Any]:
    """Return the results of several steps as one: totals and counts over their rows.

    Args:
        count: returns the number of rows of a batch.
    """
    totals: dict[str, Any] = dict.fromkeys(results[0], 0)
    counts: dict[str, Any] = dict.fromkeys(results[0], 0)
    # without strict, which does not trace
    for result, batch in zip(results, batches):  # noqa: B905
        rows = count(*batch)
        for name, value in result.items():
            if isinstance(value, LossParts):
                value = value.added
            if isinstance(value, Average):
                totals[name] = totals[name] + get_total(value)
                counts[name] = counts[name] + value.count
                continue
            if isinstance(rows, UnknownRows):
                rows.refuse()
            totals[name] = totals[name] + value * rows
            counts[name] = counts[name] + rows
    averages = {name: Average(totals[name], counts[name]) for name in totals}
    combined: dict[str, Any] = dict(averages)
    for name, value in results[0].items():
        if isinstance(value, LossParts):
            parts = {part: averages[part] for part in value.parts}
            combined[name] = LossParts(parts, value.weights, averages[name])
    return combined


def first_size_of_labels(features: Any, labels: Any, sample_weight: Any) -> int:
    """Return the rows of a batch with plain rows, for a graph."""
    return len(labels)


def has_plain_rows(batch: Batch) -> bool:
    """Tell whether a graph can count the rows of a batch without Python."""
    features, labels, _ = batch
    if not (isinstance(features, Tensor) and isinstance(labels, Tensor)):
        return False
    return features.ndim > 0 and labels.ndim > 0 and features.shape[0] == labels.shape[0]
