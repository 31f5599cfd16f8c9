"""Resume within an epoch what another number of processes has begun.

One process draws the order of the rows as it reads them: RandomSampler with a generator draws once
more at its end, and a custom sampler may draw for each batch. Several processes draw the whole
order as the iteration begins, to know the share of each. So in the middle of an epoch the file of
one has other random states than the file of the other, and with them the next epoch would be
another one. What the order draws from then keeps the states of the draws that are repeated here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from minikeras.support.loaders import DRAWN_AT_ONCE
from minikeras.support.randomness import (
    Randomness,
    find_counters,
    find_generators,
    find_samplers,
)
from minikeras.support.reachable import PlainAttributes


def draws_ahead(batches: Any) -> bool:
    """Tell whether a source draws the whole order as an iteration begins, to share it out."""
    return getattr(batches, "draws_ahead", False) is True


class DrawnOrder:
    """The random generators and counters from which a loader's order is drawn.

    Args:
        loader: what the user passed.
        randomness: all generators, among them these.
    """

    def __init__(self, loader: Any, randomness: Randomness) -> None:
        self.loader = loader
        self.randomness = randomness
        samplers = find_samplers([loader])
        of_order = {id(generator) for generator in find_generators(samplers).values()}
        self.names = set()
        for name, generator in randomness.generators.items():
            if id(generator) in of_order:
                self.names.add(name)
        self.counters = PlainAttributes(find_counters(samplers, ()))

    def find_late_draws(self) -> None:
        """Find the global generators from which a custom sampler draws after the first batch.

        The sampler is read once, from the state at the iteration's start.
        """
        if not isinstance(self.loader, DataLoader):
            return
        sampler: Any = self.loader.batch_sampler
        if sampler is None:
            sampler = self.loader.sampler
        inner = sampler.sampler if type(sampler) is BatchSampler else sampler
        if type(inner) in DRAWN_AT_ONCE:
            return
        order = iter(sampler)
        next(order, None)
        before = self.randomness.draws()
        deque(order, maxlen=0)
        self.names.update(self.randomness.moved(before))

    def keep(self, change: Callable[[], None]) -> None:
        """Call a function that sets random states, and put back those of the order."""
        states = {}
        for name, state in self.randomness.draws().items():
            if name in self.names:
                states[name] = state
        counters = self.counters.states()
        change()
        self.randomness.put_draws(states)
        self.counters.restore(counters)
