"""Keep processes in lockstep during a fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from minikeras.distributed.world import World
from minikeras.hooks import Fit, Hook
from minikeras.support.randomness import Randomness, reseed


class KeepTogether(Hook):
    """Give each process its own random state, share the buffers of rank 0, and stop together.

    Args:
        signals: what has been received from the operating system; None if nothing listens.
    """

    def __init__(self, world: World, signals: Any = None) -> None:
        self.world = world
        self.signals = signals

    @contextlib.contextmanager
    def around_fit(self, fit: Fit) -> Iterator[None]:
        """Let each process draw its own numbers, for dropout.

        Afterwards all have the random state of rank 0.
        """
        world = self.world
        state = Randomness(torch.device("cpu"), [])
        own = torch.get_rng_state().long().sum().item() + torch.initial_seed()
        seed = int(world.broadcast(own))
        if world.rank:
            reseed((seed + world.rank) % 2**63)
        world.draws_apart = True
        try:
            yield
        finally:
            world.draws_apart = False
        state.restore(world.broadcast(state.states()))

    def on_train_end(self, fit: Fit) -> None:
        """Give all processes the buffers of rank 0: each has counted its own rows."""
        self.world.share(fit.model.buffers())

    def on_batch_end(self, fit: Fit, number: int) -> None:
        """Let all processes stop after the same batch."""
        self._agree(fit)

    def on_epoch_end(self, fit: Fit) -> None:
        """Let all processes stop after the same epoch."""
        self._agree(fit)

    def _agree(self, fit: Fit) -> None:
        received = 0
        if self.signals is not None:
            received = self.signals.received or 0
        stops, signal = self.world.agree(fit.model.stop_training, received)
        fit.model.stop_training = bool(stops)
        if self.signals is not None:
            self.signals.agreed = int(signal) or None
