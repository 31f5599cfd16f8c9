"""Gradients added up over all processes, before an optimizer steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.optim import Optimizer

from minikeras.distributed.gradients import GradientSums
from minikeras.distributed.world import World
from minikeras.hooks import Fit, Hook
from minikeras.nests import is_sharded
from minikeras.overrides import overrides
from minikeras.stepper import Part, Restore, StepLoss, trainable_parameters_of


class AllReduce(Part, Hook):
    """Add up the gradients of all optimizers that step, and the numbers of other parts.

    They go in one message. In a default step the first gradients are sent while backward still
    fills the others.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.outside_graph = f"training on {world.size} processes"
        self.sums: GradientSums | None = None  # which backward feeds
        self.sends_early = False  # during a fit whose steps call backward once
        self.order: dict[Tensor, int] = {}  # of the parameters, by layer, during a fit

    @contextlib.contextmanager
    def around_fit(self, fit: Fit) -> Iterator[None]:
        """Listen to the gradients as they are filled."""
        self.order = {}
        for number, parameter in enumerate(fit.model.parameters()):
            self.order[parameter] = number
        self.sends_early = not overrides(fit.model, "train_step", "backward", "optimizer_step")
        handles = []
        if self.sends_early:
            for tensor in self._collect_gradients(self.stepper.optimizers.values()).bucket_of:
                handles.append(tensor.register_post_accumulate_grad_hook(self._note_gradient))
        try:
            yield
        finally:
            self.order = {}
            self.sends_early = False
            for handle in handles:
                handle.remove()

    def _note_gradient(self, parameter: Tensor) -> None:
        if self.sums is not None:
            self.sums.arrived(parameter)

    def _collect_gradients(self, optimizers: Iterable[Optimizer]) -> GradientSums:
        """Return the gradients to add up, in the order of the layers; those of the loss last.

        Those of sharded parameters have been added up in backward.
        """
        trained: dict[Tensor, None] = {}
        for optimizer in optimizers:
            for parameter in trainable_parameters_of(optimizer):
                if not is_sharded(parameter):
                    trained[parameter] = None
        last = len(self.order)
        in_order = sorted(trained, key=lambda parameter: self.order.get(parameter, last))
        return GradientSums(self.world, in_order)

    def on_loss(self, loss: StepLoss) -> None:
        """Prepare to send, if this is the last backward before a step of all optimizers."""
        if self.sends_early and self.stepper.all_due():
            self.sums = self._collect_gradients(self.stepper.optimizers.values())

    def before_steps(self, optimizers: list[Optimizer]) -> None:
        """Send what is left; gradients become their sums, and other parts get theirs."""
        sums = self.sums or self._collect_gradients(optimizers)
        self.sums = None
        counts = []
        numbers = []
        for part in self.stepper.parts:
            own = part.numbers(optimizers)
            counts.append(len(own))
            numbers += own
        totals = sums.finish(*numbers)
        for part, count in zip(self.stepper.parts, counts, strict=True):
            if count:
                part.take_numbers(optimizers, totals[:count])
                totals = totals[count:]

    def reset(self) -> None:
        """Forget the messages being sent."""
        self.sums = None

    def way_back(self) -> Restore:
        """Return a function that forgets the messages being sent."""
        return self.reset
