"""Keep processes in lockstep during a fit.

After a batch or an epoch all processes agree whether to stop, which signals have been received, and
that learning rates and frozen layers are the same everywhere; after an epoch that the weights are.

after each batch    if a process has a callback for batches, or a custom step, which may decide by
                    numbers of its own
when one calls      otherwise, on the CPU: a call for an agreement travels with the gradients
about every 0.5 s   otherwise, as in validation or while gradients wait for a step: after as many
                    batches as rank 0 has counted in that time, a number that all receive with the
                    agreement before. Nobody waits for it: it is sent after one batch, and all read
                    it after the next
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from minikeras.callback import Callback, with_method
from minikeras.distributed.channel import OPTIMIZER_STEP, VERBS, Exchange, by_value
from minikeras.distributed.handshake import (
    check_settings,
    check_weights,
    code_of_settings,
    code_of_weights,
)
from minikeras.distributed.world import World
from minikeras.hooks import Fit, Hook
from minikeras.overrides import overrides
from minikeras.run import buffers_of
from minikeras.sources import ContinuedBatches
from minikeras.stepper import Part
from minikeras.support.randomness import Randomness, reseed

INTERVAL = 0.5  # seconds between two agreements, where no process may decide after each batch
# where callbacks are that do the same after a batch in all processes
ALIKE = ("minikeras.callbacks.averaging", "minikeras.callbacks.rates")


class KeepTogether(Part, Hook):
    """Give each process its own random state, share the buffers of rank 0, and stop together.

    Args:
        callbacks: the user's; rank 0 has others to show the fit.
        signals: what has been received from the operating system; None if nothing listens.
    """

    def __init__(self, world: World, callbacks: Iterable[Callback], signals: Any = None) -> None:
        self.world = world
        self.signals = signals
        self.model: Any = None  # during a fit
        self.callbacks = list(callbacks)
        self.wants_stop = False  # in this process, which the others have not heard of yet
        self.all_stop = False  # as all have agreed
        self.after_each = True  # batch
        self.calls = False  # an agreement is called for with the gradients
        self.is_called = False  # all agree after this batch
        self.has_heard = False  # gradients of this batch have told whether one calls
        self.waiting = 0  # batches since the last agreement
        self.interval = 1  # batches from one agreement to the next
        self.agreed_at = 0.0  # by this process's clock
        self.asked: Exchange | None = None  # an agreement that is on its way

    @contextlib.contextmanager
    def around_fit(self, fit: Fit) -> Iterator[None]:
        """Let each process draw its own numbers, for dropout.

        Afterwards all have the random state of rank 0, unless this fit is within another one.
        """
        world = self.world
        seed = self._begin(fit)
        is_within_another = world.draws_apart
        if world.rank and not is_within_another:
            reseed(seed + world.rank)
        VERBS[-1].draws_apart = True
        try:
            yield
        finally:
            VERBS[-1].draws_apart = False
            world.follows_main = False
        if not is_within_another:
            state = Randomness(torch.device("cpu"), [])
            state.restore(world.broadcast(state.states()))

    def _begin(self, fit: Fit) -> int:
        """Ask once whether a process may stop after any batch, and whether all monitor alike.

        Returns:
            a seed, which rank 0 makes from its random state.
        """
        self.model = fit.model
        seed = torch.get_rng_state().long().sum().item() + torch.initial_seed()
        seed = 0 if self.world.rank else seed % 2**53  # a float holds it
        own_step = overrides(fit.model, "train_step", "evaluate_step", "backward", "optimizer_step")
        decides = own_step or any(map(decides_after_batches, self.callbacks))
        code = float(code_of_monitors(self.callbacks))
        about = "beginning of a fit"
        some_decide, most, negative_least, seed = self.world.agree(
            decides, code, -code, seed, about=about
        )
        self.after_each = bool(some_decide)
        # from a device the numbers that come with gradients are not read
        self.calls = not self.after_each and fit.run.device.type == "cpu"
        self.world.follows_main = most == -negative_least
        self.agreed_at = time.monotonic()
        return int(seed)

    def on_epoch_begin(self, fit: Fit) -> None:
        """Check that callbacks have left settings alike, before a gradient is sent."""
        code = code_of_settings(fit.model, fit.run)

        def hear(found: list[float]) -> None:
            try:
                check_settings(self.world, fit.model, fit.run, *found[1:])
            except ValueError as error:
                error.says_where = True  # type: ignore[attr-defined] # not in reading a batch
                raise
            self.is_called = bool(found[0])  # all stop after the first batch

        numbers = fit.model.stop_training, code, -code
        about = "beginning of an epoch"
        if isinstance(fit.train, ContinuedBatches) and fit.train.iterator is not None:
            hear(self.world.agree(*numbers, about=about))
        else:  # the data begins with a message
            self.world.agree_with_next(*numbers, about=about, then=hear)

    def on_train_end(self, fit: Fit) -> None:
        """Give all processes the buffers of rank 0: each has counted its own rows."""
        self.has_heard = False  # of the last batch, as the epoch ended
        self.world.share(buffers_of(fit.model, fit.run.loss_func))

    def numbers(self, optimizers: list[Optimizer]) -> list[Any]:
        """Call for an agreement if this process wants to stop, or has received a signal."""
        if not self.calls:
            return []
        return [float(self.wants_stop or self.model.stop_training or self._received() > 0)]

    def take_numbers(self, optimizers: list[Optimizer], sums: list[Any]) -> None:
        """Hear whether a process has called."""
        self.has_heard = True
        if sums[0] > 0:
            self.is_called = True

    def on_batch_end(self, fit: Fit, number: int) -> None:
        """Let all processes stop after the same batch."""
        self.waiting += 1
        has_heard = self.has_heard
        self.has_heard = False
        if not self.all_stop:  # else it ends the pass of all
            self.wants_stop |= fit.model.stop_training
            fit.model.stop_training = False
        if self.asked is not None:
            self._hear(fit, self.asked)
        if self.after_each or self.is_called:
            self._hear(fit, self._ask(fit, "end of a batch"))
        elif self.waiting >= self.interval and not (has_heard or self.all_stop):
            self.asked = self._ask(fit, "end of a batch")

    def on_epoch_end(self, fit: Fit) -> None:
        """Let all processes stop after the same epoch, with the same weights."""
        code = code_of_weights(fit.model, fit.run)
        if self.asked is not None:
            self.wants_stop |= fit.model.stop_training
            self._hear(fit, self.asked)
        most = self._hear(fit, self._ask(fit, "end of an epoch", code, -code))
        check_weights(self.world, fit.model, fit.run, *most)

    def _ask(self, fit: Fit, about: str, *numbers: float) -> Exchange:
        """Send what is to be agreed on: to stop, signals, settings, and more numbers."""
        received = self._received()
        stops = fit.model.stop_training or self.wants_stop
        self.wants_stop = False
        self.is_called = False
        code = code_of_settings(fit.model, fit.run)
        interval = self._next_interval()
        self.waiting = 0
        return self.world.begin_to_agree(
            stops, received, interval, code, -code, *numbers, about=about
        )

    def _hear(self, fit: Fit, asked: Exchange) -> list[float]:
        """Do what all have agreed on; return the largest of the other numbers."""
        self.asked = None
        stops, received, interval, *found = asked.largest()
        check_settings(self.world, fit.model, fit.run, *found[:2])
        self.interval = int(interval)
        self.all_stop = bool(stops)
        fit.model.stop_training = self.all_stop
        if self.signals is not None:
            self.signals.agreed = int(received) or None
        return found[2:]

    def _received(self) -> int:
        """Return the number of the signal that this process has received; 0 if there is none."""
        return 0 if self.signals is None else self.signals.received or 0

    def _next_interval(self) -> int:
        """Count the batches of rank 0 in `INTERVAL`: at most twice as many as the last time."""
        now = time.monotonic()
        seconds = (now - self.agreed_at) / max(self.waiting, 1)  # per batch
        self.agreed_at = now
        if self.world.rank:
            return 0  # the largest counts
        return max(1, min(2 * self.interval, int(INTERVAL / max(seconds, 1e-6))))


class SameSteps(Part):
    """Check that all processes step the same optimizers, before gradients are added up.

    For a custom step, which may choose an optimizer by random numbers: those differ.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def before_steps(self, optimizers: list[Optimizer]) -> None:
        """Compare which optimizers step.

        Raises:
            ValueError: they differ, in all processes.
        """
        names = [name for name, own in self.stepper.optimizers.items() if own in optimizers]
        code = zlib.crc32(repr(names).encode())
        most, negative_least = self.world.agree(code, -code, about=OPTIMIZER_STEP)
        if most == -negative_least:
            return
        steps = [", ".join(map(repr, other)) for other in self.world.gather(names) or []]
        raise ValueError(
            "train_step steps different optimizers in the processes, and their gradients would be "
            f"added up: {by_value(steps)}. Random numbers differ between processes in a fit, and "
            "so do the rows: choose the optimizer by a number that all have, such as one from a "
            "generator of your own with the same seed in every process."
        )


def decides_after_batches(callback: Callback) -> bool:
    """Tell whether a callback may do after a batch what the processes must agree on."""
    for moment in ("on_batch_begin", "on_batch_end"):
        if with_method([callback], moment):
            module = getattr(getattr(callback, moment), "__module__", "")
            if module not in ALIKE:
                return True
    return False


def code_of_monitors(callbacks: list[Callback]) -> int:
    """Compute a number from the classes of callbacks that monitor a value, in their order."""
    names = []
    for callback in callbacks:
        if hasattr(callback, "watched_names"):
            names.append(type(callback).__name__)
    return zlib.crc32(" ".join(names).encode())
