"""Passes over data that may never end: limit the batches, raise an error or warn."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from minikeras.nests import clone_tensor, map_leaves
from minikeras.sources import find_length

SURELY_ENDLESS = (itertools.count, itertools.cycle, itertools.repeat)
LEAST = 1000  # batches of a pass of unknown length before it is called long
LEAST_OF_STEPS = 100  # the same with steps_per_epoch: the training data may be endless
TIMES = 10  # warn after this many times the batches of a training epoch
OUTSIDE_A_FIT = 10_000


class FirstBatches:
    """At most `steps` batches of each pass. Every pass begins with a new `iter()`.

    >>> list(FirstBatches([1, 2, 3], steps=2)), list(FirstBatches([1, 2, 3], steps=5))
    ([1, 2], [1, 2, 3])
    """

    def __init__(self, batches: Iterable[Any], steps: int) -> None:
        self.batches = batches
        self.loader: Any = getattr(batches, "loader", batches)  # what the user passed
        self.steps = steps

    def __len__(self) -> int:
        known = find_length(self.batches)
        return self.steps if known is None else min(self.steps, known)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.batches, self.steps)

    def first(self) -> Any:
        """Return a copy of the first batch if that needs no reading; else None."""
        if type(self.batches) is list:
            return map_leaves(clone_tensor, self.batches[0]) if self.batches else None
        first = getattr(self.batches, "first", None)
        return first() if callable(first) else None


class Watched:
    """Batches of unknown number. A long pass warns, since it may never end."""

    def __init__(self, batches: Iterable[Any], name: str, argument: str, limit: int) -> None:
        self.batches = batches
        self.loader: Any = getattr(batches, "loader", batches)  # what the user passed
        self.name = name
        self.argument = argument
        self.limit = limit

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches, start=1):
            if number == self.limit:
                warnings.warn(
                    f"{self.name} has no length and has already given {number} batches in this "
                    f"pass. If it never ends, pass {self.argument}=..., the number of batches in "
                    "a pass.",
                    stacklevel=2,
                )
            yield batch


def limit_batches(
    batches: Iterable[Any],
    steps: int | None,
    name: str,
    argument: str,
    limit: int = OUTSIDE_A_FIT,
) -> Iterable[Any]:
    """Return the batches of a pass: the first `steps`, or all, with a warning after many.

    Args:
        batches: what a pass iterates.
        steps: how many batches; None for all.
        name: what the user calls the data, for messages.
        argument: what the user calls `steps`.
        limit: batches of a pass of unknown length after which to warn.
    """
    if steps is not None:
        return FirstBatches(batches, steps)
    if find_length(batches) is None:
        return Watched(batches, name, argument, limit)
    return batches


def check_ends(data: Any, name: str, steps: int | None, argument: str) -> None:
    """Refuse data that surely never ends if no number of batches is given.

    Raises:
        ValueError: it is an itertools.count, cycle or repeat without an end.
    """
    endless = isinstance(data, SURELY_ENDLESS) and operator.length_hint(data, -1) < 0
    if endless and steps is None:
        raise ValueError(
            f"{name} is an itertools.{type(data).__name__}, which never ends: expected data that "
            f"ends, or the number of batches in a pass. Pass {argument}=..., for instance "
            f"{argument}=100."
        )


def long_pass(training: Iterable[Any], steps_per_epoch: int | None) -> int:
    """Return after how many batches a pass of validation is longer than the training suggests."""
    if steps_per_epoch is not None:
        return max(LEAST_OF_STEPS, TIMES * steps_per_epoch)
    return max(LEAST, TIMES * (find_length(training) or 0))
