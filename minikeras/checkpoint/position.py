"""How far an iteration of batches has come, and an iteration carried on from there in another process.

What was drawn before is drawn again: the random state of the iteration's start is put back, the batches already seen
are passed over, and the random state goes on from where the run stood.

a list, or in memory             read again, which costs next to nothing
a DataLoader without workers     passed over by number: the sampler draws, no row is read
a DataLoader with workers        read again, since its workers hold random states of their own
one with state_dict              asked to carry on by itself
an iterable of the user's own    read again; a warning says if its first batch is another one then
anything else                    the same, and a warning says so as the fit begins

A sampler or an iterable may draw as it goes, from a generator that others draw from in between. Where it is not known
to draw all at once, it is watched: the states that its generators had when it drew are held, and put back as it draws
again.
"""

from __future__ import annotations

import io
import random
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    StackDataset,
    TensorDataset,
)

from minikeras.checkpoint.checksums import batch_checksum
from minikeras.data.epochs import epochs_of, put_epochs_back
from minikeras.data.in_memory import DRAWN_AT_ONCE, InMemoryBatches, asked, base_of
from minikeras.distributed.sharded import Sharded, with_sampler
from minikeras.errors import CheckpointError
from minikeras.sources import ArrayBatches, length
from minikeras.support.randomness import Randomness, same_state
from minikeras.support.reachable import is_users, reachable

PLAIN = (TensorDataset, StackDataset)  # their rows draw nothing
KNOWN = (
    "torch",
    "numpy",
    "pandas",
    "minikeras",
)  # packages whose objects do not move on as they are read
MOST_DRAWS = 1_000  # states of generators that are held of one iteration


class Positioned:
    """Batches that know how many were given since which random state, and can carry on from there.

    >>> import torch
    >>> data = list(range(5))
    >>> first = Positioned(data, "dl_train", Randomness(torch.device("cpu"), [data]))
    >>> batches = iter(first)
    >>> next(batches), next(batches), first.position()["seen"]
    (0, 1, 2)
    >>> second = Positioned(data, "dl_train", Randomness(torch.device("cpu"), [data]))
    >>> second.carry_on(first.position())
    >>> list(second), list(second)
    ([2, 3, 4], [0, 1, 2, 3, 4])
    """

    def __init__(self, batches: Iterable[Any], name: str, randomness: Randomness) -> None:
        self.batches = batches
        self.loader: Any = getattr(batches, "loader", batches)  # what the user handed over
        self.name = name
        self.randomness = randomness
        self.start: Any = None  # the random state at which the iteration under way began
        self.seen = 0
        self.iterations = 0  # that have begun in this call of fit
        self.pending: dict[str, Any] | None = None
        self.epochs: list[int | None] = []  # by which samplers shuffled the iteration under way
        self.first: int | None = None  # a checksum of the first batch of the iteration under way
        self.order: WatchedOrder | None = None  # of a sampler that may draw as it goes
        self.draws: WatchedDraws | None = None  # of an iterable
        if may_draw_as_it_goes(batches):
            self.order = WatchedOrder(self.loader, randomness)
        known = (
            isinstance(batches, Sharded)
            or keeps_state(self.loader)
            or surely_the_same(batches, self.loader)
        )
        self.is_stream = self.order is None and not known  # read again, and watched

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type] # raises as theirs does

    def __iter__(self) -> Iterator[Any]:
        if self.pending is None:
            self.start, self.seen = self.randomness.states(), 0
            self.iterations += 1
            self.epochs = epochs_of(self.loader)
            iterator = self._batches()
        else:
            iterator = self._carried_on()
        for batch in iterator:
            if self.is_stream and self.seen == 0:
                self.first = batch_checksum(batch)
            self.seen += 1
            yield batch
        self.start = None

    def after(self, count: int) -> Iterator[Any]:
        """The batches of the iteration under way; `carry_on` has said where it stands."""
        return iter(self)

    def _batches(self) -> Iterator[Any]:
        """A new iteration, watched as it draws where that is needed."""
        if self.order is not None:
            return self.order.batches(self.batches)
        if not self.is_stream:
            return iter(self.batches)
        self.draws = WatchedDraws(iter(self.batches), self.randomness, None)
        return self.draws

    def position(self) -> dict[str, Any] | None:
        """Where the iteration under way stands, as plain values; None between two iterations."""
        if self.pending is not None or self.start is None:
            return self.pending
        state = self.loader.state_dict() if keeps_state(self.loader) else None
        return {
            "start": self.start,
            "seen": self.seen,
            "loader": state,
            "steps": length(self.batches),
            "epochs": self.epochs,
            "draws": self._drawn(),
            "first": self.first,
            "iterations": self.iterations,
        }

    def _drawn(self) -> dict[str, Any] | None:
        if self.order is not None:
            return self.order.position()
        return None if self.draws is None else self.draws.position()

    def check(self, position: Mapping[str, Any]) -> None:
        """Whether these batches can be carried on at that position; nothing is changed.

        Raises:
            CheckpointError: they end before it, or their generators are others.
        """
        self.randomness.check(position["start"])
        if position["loader"] is not None and not keeps_state(self.loader):
            raise CheckpointError(
                f"the checkpoint holds the position of a loader with state_dict, and {self.name} is a "
                f"{type(self.loader).__name__} without one. Give the same data as before."
            )
        now = length(self.batches)
        if position["loader"] is None and now is not None and position["seen"] > now:
            raise ended_before(position["seen"], self.name, now)

    def carry_on(self, position: dict[str, Any] | None) -> None:
        """The next iteration begins at that position."""
        self.pending = position

    def _carried_on(self) -> Iterator[Any]:
        position, self.pending = self.pending or {}, None
        now = self.randomness.states()
        self.start, self.seen = position["start"], position["seen"]
        warn_of_another_epoch(position.get("steps"), length(self.batches), self.seen, self.name)
        self.randomness.restore(self.start)
        epochs = epochs_of(self.loader)
        self.epochs = position.get(
            "epochs", epochs
        )  # steps_per_epoch: it may have begun in an earlier epoch
        put_epochs_back(self.loader, self.epochs)
        if position["loader"] is not None:
            self.loader.load_state_dict(position["loader"])
            iterator = iter(self.batches)
        elif self.order is not None:
            iterator = self.order.batches(self.batches, self.seen, position.get("draws") or {})
            self._pass(iterator)
            self.order.read()
        elif self.is_stream:
            self.first = position.get("first")
            self.draws = WatchedDraws(
                iter(self.batches), self.randomness, position.get("draws") or {}
            )
            iterator = self.draws
            self._pass(iterator, self.first)
        else:
            iterator = passed_over(self.batches, self.loader, self.seen, self.name)
        put_epochs_back(self.loader, epochs)
        self.randomness.restore(now)
        return iterator

    def _pass(self, iterator: Iterator[Any], first: int | None = None) -> None:
        """Read the batches that have been seen; `first` is a checksum of the first one, where that is known."""
        passed = 0
        for batch in islice(iterator, self.seen):
            if passed == 0 and first is not None and batch_checksum(batch) != first:
                warn_of_other_batches(self.name)
            passed += 1
        if passed < self.seen:
            raise ended_before(self.seen, self.name, passed)


def keeps_state(loader: Any) -> bool:
    """Whether a loader can tell where it stands and carry on by itself, as torchdata's StatefulDataLoader can."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def passed_over(batches: Iterable[Any], loader: Any, count: int, name: str) -> Iterator[Any]:
    """An iterator of the batches after the first `count`."""
    if isinstance(batches, Sharded):
        return batches.after(count)
    by_number = skips_by_number(batches, loader)
    fetch = _Fetch(loader) if by_number else None
    iterator = iter(fetch.batches() if fetch else batches)
    passed = sum(1 for _ in islice(iterator, count))
    if passed < count:
        raise ended_before(count, name, passed)
    if fetch:
        fetch.reads = True
    return iterator


def ended_before(count: int, name: str, passed: int) -> CheckpointError:
    """The error for data that has fewer batches than have been seen."""
    return CheckpointError(
        f"the checkpoint stands after batch {count} and {name} ended after {passed}. Give the same data as before."
    )


def warn_of_other_batches(name: str) -> None:
    """Data that are read again, and are others than they were."""
    warnings.warn(
        f"{name} gives other batches when it is read again: the checkpoint stands in the middle of an epoch, and the "
        f"first batch of that epoch is another one here. The batches that are left out are not those that were trained "
        f"on. Draw from a generator that is an attribute, seeded where the script makes it; or give {name} state_dict "
        f"and load_state_dict.",
        stacklevel=2,
    )


def warn_of_another_epoch(then: int | None, now: int | None, seen: int, name: str) -> None:
    """Other data, or another batch_size, in the middle of an epoch."""
    if then is not None and now is not None and then != now and seen <= now:
        warnings.warn(
            f"the checkpoint stands in an epoch of {then} batches, and {name} has {now} here: it has other rows, or "
            f"another batch_size. The first {seen} are left out, and others than those that were trained on. Give the "
            f"same data and batch_size as before; from an epoch's end on any will do.",
            stacklevel=2,
        )


def skips_by_number(batches: Iterable[Any], loader: Any) -> bool:
    """Whether passing over a batch of this loader needs nothing but its rows' numbers."""
    return (
        isinstance(batches, DataLoader)
        and batches.num_workers == 0
        and surely_the_same(batches, loader)
    )


def surely_the_same(batches: Iterable[Any], loader: Any) -> bool:
    """Whether reading again from the same random state gives the same batches."""
    if isinstance(batches, (InMemoryBatches, ArrayBatches)) or is_plain_list(batches):
        return True
    return type(loader).__iter__ is DataLoader.__iter__ and not isinstance(
        loader.dataset, IterableDataset
    )


def warn_of_hidden_draws(loader: Any, name: str) -> None:
    """Say as a fit with a checkpoint begins which positions and random states the file does not hold.

    Args:
        loader: what the user handed over.
        name: dl_train or dl_val.
    """
    if loader is None or keeps_state(loader):
        return
    if name == "dl_train" and not reads_the_same(loader):
        warnings.warn(
            f"{name} is a {type(getattr(loader, 'dataset', loader)).__name__}, which has no state_dict: a checkpoint "
            f"does not hold its position. When a run is resumed in the middle of an epoch, the batches already seen "
            f"are read again and left out; the run is exact only if they come as before. Give it state_dict and "
            f"load_state_dict, or use a Dataset with __getitem__.",
            stacklevel=2,
        )
    positions = [
        path for path, value in reachable({name: loader}) if has_hidden_position(value, path)
    ]
    if positions:
        warnings.warn(
            f"{', '.join(positions[:3])} has a position or a random state that a checkpoint cannot hold: a resumed run "
            f"may read or draw something else. Keep an index or a seed instead, and open it anew where it is read.",
            stacklevel=2,
        )
    dataset = base_of(getattr(loader, "dataset", None))
    if dataset is None or type(dataset) in PLAIN or isinstance(dataset, IterableDataset):
        return
    if getattr(loader, "persistent_workers", False):
        warnings.warn(
            f"{name} has persistent_workers, whose random states a checkpoint does not hold: if the dataset draws "
            f"random numbers, a resumed run draws others. Set persistent_workers=False for an exact resume.",
            stacklevel=2,
        )


def reads_the_same(loader: Any) -> bool:
    """Whether reading what the user handed over again gives the same batches, as far as its code and parts tell.

    Of an iterable in the user's own code, the generators and counters are held, and are put back before it is read
    again. What is in objects of installed packages cannot be known.
    """
    if isinstance(loader, (InMemoryBatches, ArrayBatches)) or is_plain_list(loader):
        return True
    source = loader
    if type(loader).__iter__ is DataLoader.__iter__:
        source = loader.dataset
        if not isinstance(source, IterableDataset):
            return True
    if not is_users(type(source)):
        return False
    return all(is_of_known_kind(value) for _, value in reachable({"": source}))


def is_plain_list(batches: Any) -> bool:
    """Whether data are a list or a tuple, and no subclass that is read in a way of its own."""
    return type(batches).__iter__ in (list.__iter__, tuple.__iter__)


def is_of_known_kind(value: Any) -> bool:
    """Whether an object is the user's own, or of Python, torch or NumPy."""
    root = type(value).__module__.partition(".")[0]
    return root in KNOWN or root in sys.stdlib_module_names or is_users(type(value))


def has_hidden_position(value: Any, path: str) -> bool:
    """Whether an object moves on when it is read, and cannot tell how far it is."""
    if isinstance(value, random.SystemRandom):
        return True
    if isinstance(value, io.IOBase):
        return not value.closed and value.readable() and not value.isatty()
    if isinstance(value, (types.GeneratorType, zip, map, filter, enumerate, reversed)):
        return True
    kind = type(value)
    iterator = kind.__module__ in ("itertools", "_csv") or kind.__name__.endswith("_iterator")
    return iterator and hasattr(value, "__next__")


def may_draw_as_it_goes(batches: Any) -> bool:
    """Whether a loader's sampler may draw later than at an iteration's start, as far as its class tells."""
    loader = getattr(batches, "loader", batches)
    if not isinstance(batches, (InMemoryBatches, DataLoader)) or type(loader) is not DataLoader:
        return False
    if isinstance(loader.dataset, IterableDataset) or loader.persistent_workers:
        return False
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    if type(sampler) not in DRAWN_AT_ONCE:
        return type(sampler) not in (list, tuple, range)
    if type(sampler) is RandomSampler and sampler.generator is not None:
        return bool(sampler.replacement) or sampler.num_samples > len(sampler.data_source)
    return False


class WatchedOrder:
    """The batches of a loader, whose sampler is watched as it draws."""

    def __init__(self, loader: DataLoader[Any], randomness: Randomness) -> None:
        self.loader = loader
        self.randomness = randomness
        self.fetch: _Fetch | None = None
        self.draws: WatchedDraws | None = None

    def batches(
        self, batches: Any, seen: int = 0, draws: Mapping[str, Any] | None = None
    ) -> Iterator[Any]:
        """An iterator over the loader's batches; of those that were `seen` no row is read, before `read`."""
        loader = self.loader
        if isinstance(batches, InMemoryBatches):
            order = asked(loader, lambda sampler: self._watched(sampler, draws))
            return batches.along(order)
        sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        watched = _Watched(sampler, lambda given: self._watched(given, draws))
        if loader.num_workers:
            return iter(with_sampler(loader, watched, loader.generator))
        self.fetch = _Fetch(loader)
        self.fetch.reads = not seen
        return iter(self.fetch.batches(watched))

    def _watched(self, sampler: Any, draws: Mapping[str, Any] | None) -> WatchedDraws:
        self.draws = WatchedDraws(iter(sampler), self.randomness, draws)
        return self.draws

    def read(self) -> None:
        """From the next batch on rows are read."""
        if self.fetch is not None:
            self.fetch.reads = True

    def position(self) -> dict[str, Any] | None:
        """Which states the generators had when the sampler drew, as plain values."""
        return None if self.draws is None else self.draws.position()


class _Watched:
    """A sampler whose iterators are watched."""

    def __init__(self, sampler: Any, watched: Any) -> None:
        self.sampler = sampler
        self.watched = watched

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        iterator: Iterator[Any] = self.watched(self.sampler)
        return iterator


class WatchedDraws:
    """A sampler's iterator: it remembers, for each draw, what others had drawn from its generators before it.

    Where it draws in its `number`-th step and no one else has drawn since its last draw, nothing is remembered.
    """

    def __init__(
        self, iterator: Iterator[Any], randomness: Randomness, draws: Mapping[str, Any] | None
    ) -> None:
        self.iterator = iterator
        self.randomness = randomness
        self.number = 0
        self.replayed = (
            {} if draws is None else {int(number): states for number, states in draws.items()}
        )
        self.draws: dict[int, dict[str, Any]] = dict(self.replayed)
        self.left = randomness.draws()  # the generators' states as the last step left them

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        number = self.number
        self.number += 1
        if number in self.replayed:
            self.randomness.put_draws(self.replayed[number])
        before = self.randomness.draws()
        try:
            return next(self.iterator)
        finally:
            drawn = self.randomness.moved(before)
            others = {
                name: state
                for name, state in drawn.items()
                if not same_state(state, self.left[name])
            }
            if others and number not in self.draws and len(self.draws) < MOST_DRAWS:
                self.draws[number] = others
                self._warn_of_too_many()
            if drawn:
                self.left = self.randomness.draws()

    def _warn_of_too_many(self) -> None:
        if len(self.draws) == MOST_DRAWS:
            warnings.warn(
                f"dl_train, or its sampler, has drawn {MOST_DRAWS} times in one epoch from a random generator that "
                f"others draw from in between, and a checkpoint does not hold more: a run resumed later in an epoch is "
                f"not exact. Give it a generator of its own.",
                stacklevel=2,
            )

    def position(self) -> dict[str, Any]:
        return {str(number): states for number, states in self.draws.items()}


class _Fetch(Dataset[Any]):
    """A loader's batches by their rows' numbers: None while nothing is to be read."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.reads = False

    def __getitem__(self, rows: Any) -> Any:
        if not self.reads:
            return None
        dataset: Any = self.loader.dataset
        if self.loader.batch_sampler is None:
            return self.loader.collate_fn(dataset[rows])
        fetched = (
            dataset.__getitems__(rows)
            if getattr(dataset, "__getitems__", None)
            else [dataset[r] for r in rows]
        )
        return self.loader.collate_fn(fetched)

    def batches(self, sampler: Any = None) -> DataLoader[Any]:
        """A loader that draws what the other draws, when it draws it; with a `sampler` in place of its own."""
        loader = self.loader
        if sampler is None:
            sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        return DataLoader(
            self,
            batch_size=None,
            sampler=sampler,
            collate_fn=_same,
            generator=loader.generator,
            pin_memory=loader.pin_memory,
        )


def _same(batch: Any) -> Any:
    return batch
