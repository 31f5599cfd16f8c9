"""Between a loss and moved weights: the one place where a capability can come in.

    Model.backward         Stepper.backward     loss, from the first part to the last
    Model.optimizer_step   Stepper.due, close   gradients, from the last part to the first

Parts lie round `backward` like the layers of an onion. A loss goes in through them, gradients come
out, and each part undoes to the gradients what it did to the loss:

    ClipGradients                                          clips
    NaNGuard            may raise
    Accumulate          times a share of the window's rows  divides by the rows there were
    MixedPrecision      times the loss scale               divides by the scale, may skip the step
    AllReduce                                              averages the gradients of all processes
    ShardedBackward     ---------- backward ----------

A part overrides the moments that it needs; the others cost nothing. No part knows another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.errors import did_you_mean
from minikeras.phase import Batch
from minikeras.results import check_gradient, get_mean

Restore = Callable[[], None]


@dataclass(slots=True)
class StepLoss:
    """The loss of one call of `backward`, on its way through the parts."""

    result: Any  # a mean over rows, or an Average
    total: Tensor  # what is differentiated: at first the mean
    batch: Batch
    optimizers: list[Optimizer]  # whose gradients are filled
    inputs: list[Tensor] | None  # the parameters to fill; None for all that the loss reaches


class Part:
    """One capability between a loss and moved weights. Each moment does nothing until overridden.

    in   from the first part to the last
    out  from the last part to the first
    """

    stepper: Stepper  # that this part is in

    # Why backward and step cannot be in a compiled graph, such as "accumulate=4"; else empty.
    # A bare loss.backward() or optimizer.step() would pass it by, too.
    outside_graph = ""
    # What else a bare call would pass by, of a part that can be in a graph.
    bypassed = ""
    holds_graphs = False  # a graph takes no step from the first bad loss on
    delays = False  # a batch may be no step

    def around_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate forward and loss; applied once, the first part innermost."""
        return step

    def around_metrics(self, metrics: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate the metrics, a function of (outputs, labels)."""
        return metrics

    def around_moves(self, move: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate backward and the optimizer's step."""
        return move

    def outputs_for_user(self, outputs: Any) -> Any:
        """Return outputs as metrics and `predict` get them."""
        return outputs

    def on_loss(self, loss: StepLoss) -> None:
        """Look at a loss before it is differentiated, or change `loss.total` (in)."""

    def backward(self, loss: StepLoss) -> bool:
        """Fill the gradients and return True; at most one part does (out)."""
        return False

    def on_step(self, optimizers: list[Optimizer]) -> None:
        """Learn that the step of these optimizers was called for, due or not (in)."""

    def is_due(self, optimizer: Optimizer) -> bool:
        """Tell whether the current batch completes a step; changes nothing."""
        return True

    def on_waiting(self, optimizer: Optimizer) -> None:
        """Count a batch that does not complete a step (in)."""

    def before_steps(self, optimizers: list[Optimizer]) -> None:
        """Act once for all optimizers that step now (out)."""

    def on_gradients(self, optimizer: Optimizer) -> None:
        """Change the gradients of an optimizer that steps now (out)."""

    def gradient_memory(self, optimizer: Optimizer) -> list[Tensor] | None:
        """Return tensors that hold all numbers of its gradients; None where no other does."""
        return None

    def on_gradient_norm(self, norm: Tensor, parameters: list[Tensor]) -> None:
        """Look at the norm of gradients that another part has computed."""

    def step(self, optimizer: Optimizer) -> bool:
        """Take the step, or skip it, and return True; at most one part does (out)."""
        return False

    def on_stepped(self, optimizer: Optimizer) -> None:
        """Begin again for an optimizer whose gradients have been cleared (out)."""

    def after_steps(self) -> None:
        """Act once after the steps of all optimizers (out)."""

    def on_last_batch(self) -> None:
        """Take what is left of a pass over the training data (in)."""

    def on_pass_end(self) -> None:
        """Look at a pass whose last step has been taken (in)."""

    def numbers(self, optimizers: list[Optimizer]) -> list[Any]:
        """Return numbers that are added up over the processes with the gradients."""
        return []

    def take_numbers(self, optimizers: list[Optimizer], sums: list[Any]) -> None:
        """Take the sums of these numbers, before any weight moves (in).

        Each is a plain number, or a 0-d tensor on a device that is not to be waited for.
        """

    def on_gradients_in_graph(
        self, parameters: list[Tensor], tell_norm: Callable[..., None]
    ) -> None:
        """Do in a compiled graph what `on_gradients` does."""

    def on_graph_steps(self, loss: Tensor, steps: int) -> None:
        """Look at the mean loss of steps that a compiled graph has taken."""

    def reset(self) -> None:
        """Forget what was gathered: a fit begins or has ended."""

    def settings(self) -> dict[str, Any]:
        """Return what compile was asked for, as a checkpoint compares it."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this part, under keys of its own."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` of all parts returned."""

    def way_back(self) -> Restore:
        """Return a function that puts back what this part has counted until now.

        With jit, a resumed fit takes one step only to look at it, and it must leave no trace.
        """
        return lambda: None


class Stepper:
    """All that `Model.backward` and `Model.optimizer_step` do.

    `backward` is `_backward_through_parts`, and `close` is `_close`, inside what the parts put
    around them (`around_moves`): `use` sets both.

    Args:
        optimizers: name -> optimizer; one alone goes by the name "".
        parts: from the outermost to the innermost.
    """

    backward: Callable[..., None]  # of (loss, batch, name of an optimizer): fill the gradients
    close: Callable[[list[Optimizer]], None]  # step these optimizers, and clear their gradients

    def __init__(self, optimizers: Mapping[str, Optimizer], parts: Iterable[Part] = ()) -> None:
        self.optimizers = optimizers
        self.all = list(optimizers.values())
        self.steps_taken = dict.fromkeys(optimizers.values(), 0)  # in this fit
        self.spent: list[Tensor] = []  # gradients of the last step, whose memory is kept
        self.compiled_parts = list(parts)  # those that compile asked for
        self.use(self.compiled_parts)

    def use(self, parts: Sequence[Part]) -> None:
        """Take these parts from now on: a fit adds some to those of compile."""
        self.parts = list(parts)
        self.counting = []  # the parts whose numbers are added up over the processes
        for part in self.parts:
            part.stepper = self
            if type(part).numbers is not Part.numbers:
                self.counting.append(part)
        self._on_loss = self.moments("on_loss")
        self._backward = self.moments("backward")[::-1]
        self._on_step = self.moments("on_step")
        self._is_due = self.moments("is_due")
        self._on_waiting = self.moments("on_waiting")
        self._before_steps = self.moments("before_steps")[::-1]
        self._on_gradients = self.moments("on_gradients")[::-1]
        self._gradient_memory = self.moments("gradient_memory")
        self._on_gradient_norm = self.moments("on_gradient_norm")
        self._step = self.moments("step")[::-1]
        self._on_stepped = self.moments("on_stepped")[::-1]
        self._after_steps = self.moments("after_steps")[::-1]
        self.backward = self.decorated("around_moves", self._backward_through_parts)
        self.close = self.decorated("around_moves", self._close)

    def moments(self, name: str) -> list[Callable[..., Any]]:
        """Return the parts' methods for a moment that override it, from first to last."""
        methods = []
        for part in self.parts:
            if getattr(type(part), name) is not getattr(Part, name):
                methods.append(getattr(part, name))
        return methods

    def decorated(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate a function by a moment of the parts: "around_step", "around_metrics", ..."""
        for decorate in self.moments(name):
            function = decorate(function)
        return function

    def outputs_for_user(self, outputs: Any) -> Any:
        """Return outputs as metrics and `predict` get them."""
        for convert in self.moments("outputs_for_user")[::-1]:
            outputs = convert(outputs)
        return outputs

    # --- backward ---------------------------------------------------------------------------------

    def _backward_through_parts(self, result: Any, batch: Batch, name: str | None = None) -> None:
        """Fill the gradients of a loss: of every parameter, or of those of the optimizer `name`."""
        self.spent = []
        total = check_gradient(result if isinstance(result, Tensor) else get_mean(result))
        optimizers = self.all
        inputs = None
        if name is not None:
            optimizers = self.named(name)
            inputs = trainable_parameters_of(optimizers[0])
        loss = StepLoss(result, total, batch, optimizers, inputs)
        for change in self._on_loss:
            change(loss)
        for backward in self._backward:
            if backward(loss):
                return
        loss.total.backward(inputs=inputs)

    # --- step -------------------------------------------------------------------------------------

    def due(self, name: str | None = None) -> list[Optimizer]:
        """Count a batch, and return the optimizers that step now, of all or of that `name`."""
        optimizers = self.all if name is None else self.named(name)
        for learn in self._on_step:
            learn(optimizers)
        if not self._is_due:
            return optimizers
        due = []
        for optimizer in optimizers:
            if self._completes_step(optimizer):
                due.append(optimizer)
                continue
            for count in self._on_waiting:
                count(optimizer)
        return due

    def _completes_step(self, optimizer: Optimizer) -> bool:
        return all(is_due(optimizer) for is_due in self._is_due)

    def all_due(self) -> bool:
        """Tell whether the current batch completes a step of every optimizer; changes nothing."""
        return all(self._completes_step(optimizer) for optimizer in self.optimizers.values())

    def _close(self, optimizers: list[Optimizer]) -> None:
        """Step these optimizers with the gradients that are there, and clear them."""
        if not optimizers:
            return
        for act in self._before_steps:
            act(optimizers)
        for optimizer in optimizers:  # one after the other: two may share a parameter
            for change in self._on_gradients:
                change(optimizer)
            for step in self._step:
                if step(optimizer):
                    break
            else:
                optimizer.step()
            self._keep_memory(optimizer)
            optimizer.zero_grad()
            self.steps_taken[optimizer] += 1
            for begin in self._on_stepped:
                begin(optimizer)
        for act in self._after_steps:
            act()

    def _keep_memory(self, optimizer: Optimizer) -> None:
        """Keep the gradients' memory until the next backward, on the CPU.

        What is freed before forward goes back to the system, and backward gets it page by page
        again: up to 5 % of a step. On other devices torch keeps it itself.
        """
        gradients = gradients_of(optimizer)
        if gradients and gradients[0].device.type == "cpu":
            self.spent += gradients

    @contextlib.contextmanager
    def counting_bare_steps(self) -> Iterator[None]:
        """Also count the steps of a custom train_step that calls `optimizer.step()` by itself."""
        close = self.close
        is_closing = False

        def marked(optimizers: list[Optimizer]) -> None:
            nonlocal is_closing
            is_closing = True
            try:
                close(optimizers)
            finally:
                is_closing = False

        def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if not is_closing:
                self.steps_taken[optimizer] += 1

        handles = [optimizer.register_step_post_hook(count) for optimizer in self.all]
        self.close = marked
        try:
            yield
        finally:
            self.close = close
            for handle in handles:
                handle.remove()

    def gradient_memory(self, optimizer: Optimizer) -> list[Tensor]:
        """Return tensors whose numbers are those of its gradients: these, or few that hold them."""
        for find in self._gradient_memory:
            memory: list[Tensor] | None = find(optimizer)
            if memory is not None:
                return memory
        return gradients_of(optimizer)

    def tell_norm(self, norm: Tensor, parameters: list[Tensor]) -> None:
        """Show the norm of gradients to the parts that look at it."""
        for look in self._on_gradient_norm:
            look(norm, parameters)

    def end_pass(self) -> None:
        """Take the steps that a pass over the training data has left, and look at the result."""
        for part in self.parts:
            part.on_last_batch()
        self.spent = []
        for part in self.parts:
            part.on_pass_end()

    # --- what others ask --------------------------------------------------------------------------

    def named(self, name: str) -> list[Optimizer]:
        """The optimizer of that name."""
        if name not in self.optimizers:
            known = ", ".join(map(repr, self.optimizers))
            hint = f"{known}."
            if known == "''":
                hint = "one without a name. Leave the name out."
            hint += did_you_mean(name, self.optimizers)
            raise ValueError(f"there is no optimizer {name!r}; compile was given {hint}")
        return [self.optimizers[name]]

    @property
    def delays(self) -> bool:
        """Whether a batch may be no step, so that its gradients wait."""
        return any(part.delays for part in self.parts)

    @property
    def outside_graph(self) -> str:
        """Why backward and step cannot be in a compiled graph; empty if they can."""
        return first_text(part.outside_graph for part in self.parts)

    @property
    def bypassed(self) -> str:
        """What a bare loss.backward() or optimizer.step() would pass by; empty if nothing."""
        return self.outside_graph or first_text(part.bypassed for part in self.parts)

    @property
    def holds_graphs(self) -> bool:
        """Whether a compiled graph takes no step from the first bad loss on."""
        return any(part.holds_graphs for part in self.parts)

    def on_graph_steps(self, loss: Tensor, steps: int) -> None:
        """Count steps that a compiled graph has taken, and show the parts their mean loss."""
        for optimizer in self.steps_taken:
            self.steps_taken[optimizer] += steps
        for part in self.parts:
            part.on_graph_steps(loss, steps)

    def begin(self, parts: Sequence[Part]) -> None:
        """Begin a fit with these parts: nothing has been gathered, and no step taken."""
        self.use(parts)
        self.steps_taken = dict.fromkeys(self.optimizers.values(), 0)
        for part in self.parts:
            part.reset()

    def end(self) -> None:
        """End a fit: the parts of compile remain, and hold nothing."""
        self.spent = []
        for part in self.parts:
            part.reset()
        self.use(self.compiled_parts)

    # --- for a checkpoint -------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any] | None:
        """Return what the parts hold, and gradients that may wait; None without parts."""
        if not self.compiled_parts:  # those that only a fit has hold nothing for another process
            return None
        state: dict[str, Any] = {}
        for part in self.parts:
            own = part.state_dict()
            taken = sorted(own.keys() & state.keys())
            if taken:
                raise ValueError(f"{type(part).__name__} has the key {taken[0]!r} of another part.")
            state |= own
        gradients = {}
        for name, optimizer in self.optimizers.items():
            gradients[name] = [parameter.grad for parameter in optimizer_parameters(optimizer)]
        return state | {"gradients": gradients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        for part in self.parts:
            part.load_state_dict(state)
        for name, optimizer in self.optimizers.items():
            parameters = optimizer_parameters(optimizer)
            gradients = state["gradients"][name]
            if len(gradients) < len(parameters):
                raise ValueError(f"{len(gradients)} gradients for {len(parameters)} parameters")
            # There are more if on_epoch_begin, still to come, adds a group: they are taken then.
            for parameter, gradient in zip(parameters, gradients, strict=False):
                parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def settings(self) -> dict[str, Any]:
        """Return what compile was asked for, as a checkpoint compares it."""
        settings: dict[str, Any] = {}
        for part in self.compiled_parts:
            settings |= part.settings()
        return settings

    def named_steps(self) -> dict[str, int]:
        """Return name of each optimizer -> the steps that it has taken in this fit."""
        return {name: self.steps_taken[given] for name, given in self.optimizers.items()}

    def load_steps(self, steps: Mapping[str, int]) -> None:
        """Take what `named_steps` returned; older checkpoints have none."""
        for name, optimizer in self.optimizers.items():
            self.steps_taken[optimizer] = steps.get(name, self.steps_taken[optimizer])

    def way_back(self) -> Restore:
        """Return a function that puts back what the parts have counted until now."""
        steps_taken = dict(self.steps_taken)
        ways_back = [part.way_back() for part in self.parts]

        def restore() -> None:
            self.steps_taken = dict(steps_taken)
            for put_back in ways_back:
                put_back()

        return restore


def first_text(texts: Iterable[str]) -> str:
    """The first text that is not empty."""
    return next((text for text in texts if text), "")


def optimizer_parameters(optimizer: Optimizer) -> list[Any]:
    """The parameters of all groups of an optimizer."""
    found: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        found += group["params"]
    return found


def trainable_parameters_of(optimizer: Optimizer) -> list[Any]:
    """The parameters of an optimizer that need a gradient."""
    return [parameter for parameter in optimizer_parameters(optimizer) if parameter.requires_grad]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients that an optimizer would step with."""
    return [
        parameter.grad
        for parameter in optimizer_parameters(optimizer)
        if parameter.grad is not None
    ]
