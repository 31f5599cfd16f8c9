"""Gradients averaged over all processes, before an optimizer steps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from minikeras.distributed.gradients import Bucket, GradientSums, make_buckets
from minikeras.distributed.handshake import checksum_of, raise_difference
from minikeras.distributed.world import World
from minikeras.hooks import Fit, Hook
from minikeras.overrides import overrides
from minikeras.stepper import Part, Restore, StepLoss, gradients_of, trainable_parameters_of


class AllReduce(Part, Hook):
    """Average the gradients of all optimizers that step, and add up the numbers of other parts.

    In a default step backward does it: the first gradients are sent while it still fills the
    others, and metrics see the means. A custom train_step may call backward several times, and not
    as often in each process, so there the optimizer's step does it.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.outside_graph = f"training on {world.size} processes"
        self.has_default_step = False  # in a fit: each step calls backward once
        self.order: Mapping[Tensor, int] = {}  # in which gradients arrive
        self.trained: set[Tensor] = set()  # the parameters that were, as they arrived
        self.arrivals: list[Tensor] | None = None  # in the first step: gradients as they arrive
        # ids of the parameters of each optimizer -> buckets
        self.kept: dict[tuple[tuple[int, ...], ...], list[Bucket]] = {}
        self.compared: set[tuple[tuple[int, ...], ...]] = set()  # keys that processes have compared
        self.named: dict[str, Tensor] = {}  # the model's parameters, during a fit
        # for each optimizer what it trained in batches that wait for a step, frozen since or not
        self.waiting: dict[Optimizer, dict[Tensor, None]] = {}
        self.heard: list[Bucket] | None = None  # whose gradients are listened to
        self.last_hook = 0  # torch's count of hooks after those of `heard`
        self.handles: list[Any] = []
        self.means: GradientSums | None = None  # which backward feeds
        self.averaged: list[Bucket] = []  # that hold the gradients that are there
        self.is_averaged = False  # so are the gradients that are there

    @contextlib.contextmanager
    def around_fit(self, fit: Fit) -> Iterator[None]:
        """Listen to the gradients as they are filled."""
        self.has_default_step = not overrides(fit.model, "train_step", "backward", "optimizer_step")
        self.named = dict(fit.model.named_parameters())
        trained = self._owners_of(self.stepper.all)
        # until they have arrived once; rare ones may arrive with the others now
        if self.trained != set(trained) or not self.order.keys() >= trained.keys():
            self.order = places(reversed([*fit.model.parameters(), *trained]))
            self.arrivals = []
        try:
            yield
        finally:
            self.has_default_step = False
            self.named = {}
            self.kept = {}
            self.compared = set()
            self.waiting = {}
            self._listen_to(None)

    # --- a default step ---------------------------------------------------------------------------

    def on_loss(self, loss: StepLoss) -> None:
        """Prepare to send, if this is the last backward before a step of all optimizers."""
        if self.has_default_step and self.stepper.all_due():
            buckets = self._buckets_of(self.stepper.all)
            self._listen_to(buckets)
            self.means = GradientSums(self.world, buckets)
            return
        for optimizer in loss.optimizers:
            waiting = self.waiting.setdefault(optimizer, {})
            waiting.update(dict.fromkeys(trainable_parameters_of(optimizer)))

    def backward(self, loss: StepLoss) -> bool:
        """Fill the gradients, and average them on the way."""
        if self.means is None:
            return False
        loss.total.backward(inputs=loss.inputs)
        self._finish(self.means, self.stepper.all)
        self.is_averaged = True
        return True

    def _listen_to(self, buckets: list[Bucket] | None) -> None:
        """Be told of the gradients of these buckets, and of no others, after other hooks of them.

        A hook that the user has registered since would otherwise find its gradient sent away.
        """
        if buckets is self.heard and RemovableHandle.next_id == self.last_hook:
            return
        self.heard = buckets
        for handle in self.handles:
            handle.remove()
        self.handles = []
        listened = [bucket for bucket in buckets or () if not bucket.is_rare]
        if self.arrivals is None:
            listened = listened[:-1]  # the last one is sent at the end anyway
        for number, bucket in enumerate(listened):
            for parameter in bucket.parameters:
                if not parameter.requires_grad:  # frozen since: its bucket is sent at the end
                    continue
                hook = functools.partial(self._note_gradient, number)
                self.handles.append(parameter.register_post_accumulate_grad_hook(hook))
        self.last_hook = RemovableHandle.next_id

    def _note_gradient(self, number: int, parameter: Tensor) -> None:
        if self.means is None:
            return
        if self.arrivals is not None:
            self.arrivals.append(parameter)
        self.means.arrived(number)

    def _follow_arrivals(self, arrivals: list[Tensor]) -> None:
        """Order the buckets from now on as the gradients have arrived on rank 0."""
        parameters = list(self.order)
        numbers = [self.order[parameter] for parameter in arrivals if parameter in self.order]
        order = places(parameters[number] for number in self.world.broadcast(numbers))
        if order != self.order:
            self.order = order
            self._forget_buckets()
        self.trained = set(self._owners_of(self.stepper.all))
        self.arrivals = None
        self._listen_to(None)  # the last bucket is not listened to any more

    def _forget_buckets(self) -> None:
        """Make new buckets for the next gradients; those that are there keep their memory."""
        for bucket in self.averaged:
            bucket.memory.free()
        self.kept = {}

    # --- any step ---------------------------------------------------------------------------------

    def before_steps(self, optimizers: list[Optimizer]) -> None:
        """Average the gradients, unless backward has done it."""
        if self.is_averaged:
            self.is_averaged = False
            return
        # those of sharded parameters are filled by another part, beside some that are sent here
        means = self.means or GradientSums(self.world, self._buckets_of(optimizers))
        self._finish(means, optimizers)

    def _finish(self, means: GradientSums, optimizers: list[Optimizer]) -> None:
        """Send what is left; gradients become their means, and other parts get their sums."""
        arrivals = None if self.means is None else self.arrivals
        self.means = None
        counts = []
        numbers = []
        for part in self.stepper.counting:
            own = part.numbers(optimizers)
            counts.append(len(own))
            numbers += own
        sums = means.finish(*numbers)
        self.averaged = means.all
        if arrivals is not None:
            self._follow_arrivals(arrivals)
        for part, count in zip(self.stepper.counting, counts, strict=True):
            if count:
                part.take_numbers(optimizers, sums[:count])
                sums = sums[count:]

    def _buckets_of(self, optimizers: Sequence[Optimizer]) -> list[Bucket]:
        """Return the buckets of what these optimizers train now; parameters may be frozen."""
        key = tuple(tuple(map(id, self._trained_by(optimizer))) for optimizer in optimizers)
        if key not in self.kept:
            owners = self._owners_of(optimizers)
            if key not in self.compared:
                self._compare_trained(owners)
                self.compared.add(key)
            self.kept[key] = make_buckets(owners, self.order, self.trained)
        buckets = self.kept[key]
        if buckets is not self.averaged:
            self._free_others(buckets)
        return buckets

    def _free_others(self, buckets: list[Bucket]) -> None:
        """Keep no memory for other layers of these optimizers, which have been frozen by turns."""
        optimizers = {bucket.optimizer for bucket in buckets}
        for others in self.kept.values():
            if others is buckets:
                continue
            for bucket in others:
                if bucket.optimizer in optimizers:
                    bucket.memory.free()

    def _trained_by(self, optimizer: Optimizer) -> list[Tensor]:
        """Return what an optimizer steps, frozen since or not; some may be in it twice."""
        return [*self.waiting.get(optimizer, ()), *trainable_parameters_of(optimizer)]

    def _owners_of(self, optimizers: Sequence[Optimizer]) -> dict[Tensor, Optimizer]:
        """Return the parameters that these optimizers step, each with its optimizer.

        If several train one, the first steps with its gradient.
        """
        owners: dict[Tensor, Optimizer] = {}
        for optimizer in optimizers:
            for parameter in self._trained_by(optimizer):
                owners.setdefault(parameter, optimizer)
        return owners

    def _compare_trained(self, owners: Mapping[Tensor, Optimizer]) -> None:
        """Check that all processes train the same parameters, if others than before.

        Raises:
            ValueError: they do not, in all processes.
        """
        if not self.compared:  # as a fit begins
            return
        facts = {}
        for name, parameter in self.named.items():
            facts[f"training of {name}"] = str(parameter in owners)
        code = checksum_of(facts)
        most, negative_least = self.world.agree(code, -code, about="what is trained")
        if most != -negative_least:
            raise_difference(self.world, facts, during=True)

    def gradient_memory(self, optimizer: Optimizer) -> list[Tensor] | None:
        """Return the buckets' memory, in which the optimizer's gradients lie."""
        memory = []
        count = 0
        for bucket in self.averaged:
            numbers = bucket.gradient_memory() if bucket.optimizer is optimizer else None
            if numbers is not None:
                memory.append(numbers)
                count += sum(gradient is not None for gradient in bucket.gradients)
        return memory if count == len(gradients_of(optimizer)) else None

    def on_stepped(self, optimizer: Optimizer) -> None:
        """Let go of the memory of gradients that have been cleared."""
        self.waiting.pop(optimizer, None)
        for bucket in self.averaged:
            if bucket.optimizer is optimizer:
                bucket.let_go()

    def reset(self) -> None:
        """Forget the messages being sent."""
        self.means = None
        self.waiting = {}
        self.is_averaged = False
        for bucket in self.averaged:
            bucket.let_go()
        self.averaged = []

    def way_back(self) -> Restore:
        """Return a function that forgets the messages being sent."""
        return self.reset


def places(parameters: Iterable[Tensor]) -> dict[Tensor, int]:
    """Return the place of each parameter; the first counts for one that comes again."""
    return {parameter: number for number, parameter in enumerate(dict.fromkeys(parameters))}
