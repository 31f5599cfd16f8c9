"""Save the position in an iteration of batches, and resume from it in another process.

The random draws are repeated: the random state at the start of the iteration is restored, the
batches already seen are skipped, and then the random state of the run is restored.

a source that is_exact           read again, which costs next to nothing, or started later
a DataLoader without workers     skipped by number: the sampler draws, no row is read
a DataLoader with workers        read again, since its workers hold random states of their own
one with state_dict              resumes by itself
a custom iterable                read again; a warning says if its first batch differs then
anything else                    the same, and a warning says so as the fit begins

A source of batches has `__iter__`, `__len__` if that is known, and if it can:

is_exact         True if reading again from the same random state gives the same batches
after(n)         iterates without its first n batches
along(iterate)   iterates in the order of its sampler's iterator, which `iterate(sampler)` returns

A sampler or an iterable may draw as it is read, from a generator that others draw from in between.
If it is not known to draw all at once, it is watched: the states that its generators had when it
drew are kept, and put back as it draws again.

Several processes draw a whole order as an iteration begins, one process draws as it reads. Within
an iteration the generators of the order have other states then. If the one resumes from a file of
the other, they keep the states of the repeated draws: see drawn_order.py.
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

from minikeras.checkpoint.drawn_order import DrawnOrder, draws_ahead
from minikeras.errors import CheckpointError
from minikeras.sources import find_length
from minikeras.support.checksums import batch_checksum
from minikeras.support.loaders import (
    DRAWN_AT_ONCE,
    base_of,
    epochs_of,
    put_epochs_back,
    with_sampler,
)
from minikeras.support.randomness import Randomness, pack, same_state
from minikeras.support.reachable import is_users, reachable

PLAIN = (TensorDataset, StackDataset)  # their rows draw nothing
# packages whose objects do not change as they are read
KNOWN = ("torch", "numpy", "pandas", "minikeras")
MOST_DRAWS = 1_000  # states of generators that are kept of one iteration


class Positioned:
    """Batches that record their position and its random state, and can resume from there.

    >>> import torch
    >>> data = list(range(5))
    >>> first = Positioned(data, "dl_train", Randomness(torch.device("cpu"), [data]))
    >>> batches = iter(first)
    >>> next(batches), next(batches), first.position()["seen"]
    (0, 1, 2)
    >>> second = Positioned(data, "dl_train", Randomness(torch.device("cpu"), [data]))
    >>> second.resume_at(first.position())
    >>> list(second), list(second)
    ([2, 3, 4], [0, 1, 2, 3, 4])
    """

    def __init__(
        self, batches: Iterable[Any], name: str, randomness: Randomness, remedy: str = ""
    ) -> None:
        self.batches = batches
        self.remedy = remedy  # the end of messages about a file of other data
        self.loader: Any = getattr(batches, "loader", batches)  # what the user passed
        self.name = name
        self.randomness = randomness
        self.start: Any = None  # the random state at which the current iteration began
        self.seen = 0
        self.iterations = 0  # iterations started in this call of fit
        self.pending: dict[str, Any] | None = None  # where the next iteration starts
        self.epochs: list[int | None] = []  # by which samplers shuffled the current iteration
        self.first: int | None = None  # a checksum of the first batch of the current iteration
        self.order: WatchedOrder | None = None  # of a sampler that may draw as it is read
        self.draws: WatchedDraws | None = None  # of an iterable
        if may_draw_as_it_is_read(batches):
            self.order = WatchedOrder(self.loader, randomness)
        # a loader whose batches several processes divide does not know how far they are
        self.keeps_state = keeps_state(self.loader) and not is_exact(batches)
        is_known = self.keeps_state or reads_the_same(batches, self.loader)
        self.is_stream = self.order is None and not is_known  # read again, and watched

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type] # raises as theirs does

    def __iter__(self) -> Iterator[Any]:
        if self.pending is None:
            self.start = self.randomness.states()
            self.seen = 0
            self.iterations += 1
            self.epochs = epochs_of(self.loader)
            iterator = self._new_iterator()
        else:
            iterator = self._resumed_iterator(self.pending)
        for batch in iterator:
            if self.is_stream and self.seen == 0:
                self.first = batch_checksum(batch)
            self.seen += 1
            yield batch
        self.start = None

    def after(self, count: int) -> Iterator[Any]:
        """Return the rest of the current iteration, from the position that `resume_at` has set."""
        return iter(self)

    def _new_iterator(self) -> Iterator[Any]:
        """Return a new iterator, watched as it draws if that is needed."""
        if self.order is not None:
            return self.order.batches(self.batches)
        if not self.is_stream:
            return iter(self.batches)
        self.draws = WatchedDraws(iter(self.batches), self.randomness, None)
        return self.draws

    def position(self) -> dict[str, Any] | None:
        """Return the position of the current iteration as plain values; None between two."""
        if self.pending is not None or self.start is None:
            return self.pending
        state = self.loader.state_dict() if self.keeps_state else None
        return {
            "start": pack(self.start),
            "seen": self.seen,
            "loader": state,
            "steps": find_length(self.batches),
            "epochs": self.epochs,
            "ahead": draws_ahead(self.batches),
            "draws": self._position_of_draws(),
            "first": self.first,
            "iterations": self.iterations,
        }

    def _position_of_draws(self) -> dict[str, Any] | None:
        if self.order is not None:
            return self.order.position()
        if self.draws is not None:
            return self.draws.position()
        return None

    def check(self, position: Mapping[str, Any]) -> None:
        """Check that these batches can be resumed at a position; nothing is changed.

        Raises:
            CheckpointError: they end before it, or their generators are others.
        """
        self.randomness.check(position["start"])
        if position["loader"] is not None and not self.keeps_state:
            raise CheckpointError(
                f"the checkpoint holds the position of a loader with state_dict, and {self.name} "
                f"is a {type(self.loader).__name__} {self._without_state()}. Give the same data as "
                f"before. {self.remedy}".rstrip()
            )
        now = find_length(self.batches)
        if position["loader"] is None and now is not None and position["seen"] > now:
            raise build_end_error(position["seen"], self.name, now, self.remedy)

    def _without_state(self) -> str:
        if keeps_state(self.loader):
            return "whose rows several processes divide, now"
        return "without one"

    def resume_at(self, position: dict[str, Any] | None) -> None:
        """Let the next iteration begin at a position; None for a new one."""
        self.pending = position

    def _resumed_iterator(self, position: Mapping[str, Any]) -> Iterator[Any]:
        self.pending = None
        now = self.randomness.states()
        self.start = position["start"]
        self.seen = position["seen"]
        warn_of_another_epoch(
            position.get("steps"), find_length(self.batches), self.seen, self.name
        )
        self.randomness.restore(self.start)
        epochs = epochs_of(self.loader)
        # with steps_per_epoch the iteration may have begun in an earlier epoch
        self.epochs = position.get("epochs", epochs)
        put_epochs_back(self.loader, self.epochs)
        order = None
        is_ahead = draws_ahead(self.batches)
        if position.get("ahead", is_ahead) != is_ahead:  # older files do not say
            order = DrawnOrder(self.loader, self.randomness)
            order.find_late_draws()
            self.randomness.restore(self.start)
            put_epochs_back(self.loader, self.epochs)
            if is_ahead and position.get("draws"):
                warn_of_shared_draws(self.name)
        if position["loader"] is not None:
            self.loader.load_state_dict(position["loader"])
            iterator = iter(self.batches)
        elif self.order is not None:
            draws = position.get("draws") or {}
            iterator = self.order.batches(self.batches, self.seen, draws)
            self._pass_over(iterator)
            self.order.read()
        elif self.is_stream:
            self.first = position.get("first")
            draws = position.get("draws") or {}
            self.draws = WatchedDraws(iter(self.batches), self.randomness, draws)
            iterator = self.draws
            self._pass_over(iterator, self.first)
        else:
            iterator = iterate_after(self.batches, self.loader, self.seen, self.name, self.remedy)
        put_epochs_back(self.loader, epochs)
        if order is None:
            self.randomness.restore(now)
        else:
            order.keep(lambda: self.randomness.restore(now))
        return iterator

    def _pass_over(self, iterator: Iterator[Any], first: int | None = None) -> None:
        """Skip the batches already seen by reading them.

        Args:
            first: a checksum of the first one; None if it is not known.
        """
        passed = 0
        for batch in islice(iterator, self.seen):
            if passed == 0 and first is not None and batch_checksum(batch) != first:
                warn_of_other_batches(self.name)
            passed += 1
        if passed < self.seen:
            raise build_end_error(self.seen, self.name, passed, self.remedy)


# --- what a source can do -------------------------------------------------------------------------


def is_exact(batches: Any) -> bool:
    """Tell whether a source says that reading it again gives the same batches."""
    return getattr(batches, "is_exact", False) is True


def takes_order(batches: Any) -> bool:
    """Tell whether a source iterates along an iterator of its sampler."""
    return is_exact(batches) and hasattr(batches, "along")


def keeps_state(loader: Any) -> bool:
    """Tell whether a loader saves its own position and can resume from it.

    Such as torchdata's StatefulDataLoader.
    """
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def is_plain_list(batches: Any) -> bool:
    """Tell whether data is a list or a tuple, and no subclass with an `__iter__` of its own."""
    return type(batches).__iter__ in (list.__iter__, tuple.__iter__)


def reads_the_same(batches: Iterable[Any], loader: Any) -> bool:
    """Tell whether reading again from the same random state surely gives the same batches."""
    if is_exact(batches) or is_plain_list(batches):
        return True
    if type(loader).__iter__ is not DataLoader.__iter__:
        return False
    return not isinstance(loader.dataset, IterableDataset)


def may_read_the_same(loader: Any) -> bool:
    """Tell whether reading the user's data again gives the same batches, as far as can be seen.

    Of a custom iterable the generators and counters are kept, and put back before it is read again.
    What is in objects of installed packages cannot be known.
    """
    if is_exact(loader) or is_plain_list(loader):
        return True
    source = loader
    if type(loader).__iter__ is DataLoader.__iter__:
        source = loader.dataset
        if not isinstance(source, IterableDataset):
            return True
    if not is_users(type(source)):
        return False
    return all(is_of_known_kind(value) for _, value in reachable({"": source}))


def is_of_known_kind(value: Any) -> bool:
    """Tell whether an object is the user's own, or of Python, torch or NumPy."""
    root = type(value).__module__.partition(".")[0]
    return root in KNOWN or root in sys.stdlib_module_names or is_users(type(value))


def has_hidden_position(value: Any) -> bool:
    """Tell whether an object advances when it is read, and cannot say how far it is."""
    if isinstance(value, random.SystemRandom):
        return True
    if isinstance(value, io.IOBase):
        return not value.closed and value.readable() and not value.isatty()
    if isinstance(value, (types.GeneratorType, zip, map, filter, enumerate, reversed)):
        return True
    kind = type(value)
    is_iterator = kind.__module__ in ("itertools", "_csv") or kind.__name__.endswith("_iterator")
    return is_iterator and hasattr(value, "__next__")


def may_draw_as_it_is_read(batches: Any) -> bool:
    """Tell whether a loader's sampler may draw after an iteration's start, judged by its class."""
    loader = getattr(batches, "loader", batches)
    if type(loader) is not DataLoader:
        return False
    if not isinstance(batches, DataLoader) and not takes_order(batches):
        return False
    if isinstance(loader.dataset, IterableDataset) or loader.persistent_workers:
        return False
    sampler = sampler_of(loader)
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    if type(sampler) not in DRAWN_AT_ONCE:
        return type(sampler) not in (list, tuple, range)
    if type(sampler) is RandomSampler and sampler.generator is not None:
        return bool(sampler.replacement) or sampler.num_samples > len(sampler.data_source)
    return False


def sampler_of(loader: DataLoader[Any]) -> Any:
    """Return the loader's batch sampler, or its sampler if it makes no batches."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


# --- the rest of an iteration ---------------------------------------------------------------------


def iterate_after(
    batches: Any, loader: Any, count: int, name: str, remedy: str = ""
) -> Iterator[Any]:
    """Return an iterator of the batches after the first `count`."""
    if is_exact(batches) and hasattr(batches, "after"):
        rest: Iterator[Any] = batches.after(count)
        return rest
    rows = None
    if can_skip_by_number(batches, loader):
        rows = _RowsOnDemand(loader)
    iterator = iter(batches if rows is None else rows.batches())
    passed = sum(1 for _ in islice(iterator, count))
    if passed < count:
        raise build_end_error(count, name, passed, remedy)
    if rows is not None:
        rows.reads = True
    return iterator


def can_skip_by_number(batches: Iterable[Any], loader: Any) -> bool:
    """Tell whether skipping a batch of this loader needs only the numbers of its rows."""
    if not isinstance(batches, DataLoader) or batches.num_workers > 0:
        return False
    return reads_the_same(batches, loader)


# --- errors and warnings --------------------------------------------------------------------------


def build_end_error(count: int, name: str, passed: int, remedy: str) -> CheckpointError:
    """Return the error for data that has fewer batches than have been seen."""
    return CheckpointError(
        f"the checkpoint was written after batch {count} and {name} ended after {passed}. Give "
        f"the same data as before. {remedy}".rstrip()
    )


def warn_of_shared_draws(name: str) -> None:
    """Warn that several processes cannot repeat the draws of a sampler of one process."""
    warnings.warn(
        f"{name} has a sampler that draws from a random generator during the epoch, and other code "
        "has drawn from it in between. The checkpoint was written by one process, and is resumed "
        "by several, which draw the whole order at once: it is another one from here. Give the "
        "sampler a separate generator, or resume on one process.",
        stacklevel=2,
    )


def warn_of_other_batches(name: str) -> None:
    """Warn of data that gives other batches when it is read again."""
    warnings.warn(
        f"{name} gives different batches when it is read again: the checkpoint was written in the "
        "middle of an epoch, and the first batch of that epoch is different now. The batches that "
        "are skipped are not those that were trained on. Draw from a generator that is an "
        f"attribute, seeded where the script creates it; or give {name} the methods state_dict "
        "and load_state_dict.",
        stacklevel=2,
    )


def warn_of_another_epoch(then: int | None, now: int | None, seen: int, name: str) -> None:
    """Warn of other data, or another batch_size, in the middle of an epoch."""
    if then is not None and now is not None and then != now and seen <= now:
        warnings.warn(
            f"the checkpoint was written in an epoch of {then} batches, and {name} has {now} now: "
            f"its rows or its batch_size differ. The first {seen} are skipped, but they are not "
            "those that were trained on. Give the same data and batch_size as before; a "
            "checkpoint written at the end of an epoch resumes with any data.",
            stacklevel=2,
        )


def warn_of_hidden_draws(loader: Any, name: str) -> None:
    """Warn at the start of a fit about positions and random states that a checkpoint cannot save.

    Args:
        loader: what the user passed.
        name: dl_train or dl_val.
    """
    if loader is None or keeps_state(loader):
        return
    if name == "dl_train" and not may_read_the_same(loader):
        kind = type(getattr(loader, "dataset", loader)).__name__
        warnings.warn(
            f"{name} is a {kind}, which has no state_dict: a checkpoint cannot save its position. "
            "A run that resumes in the middle of an epoch reads the batches already seen again "
            "and skips them; it is exact only if they are the same as before. Give it the methods "
            "state_dict and load_state_dict, or use a Dataset with __getitem__.",
            stacklevel=2,
        )
    positions = []
    for path, value in reachable({name: loader}):
        if has_hidden_position(value):
            positions.append(path)
    if positions:
        warnings.warn(
            f"{', '.join(positions[:3])} has a position or a random state that a checkpoint "
            "cannot save: a resumed run may read or draw something else. Store an index or a seed "
            "instead, and open it again where it is read.",
            stacklevel=2,
        )
    dataset = base_of(getattr(loader, "dataset", None))
    if dataset is None or type(dataset) in PLAIN or isinstance(dataset, IterableDataset):
        return
    if getattr(loader, "persistent_workers", False):
        warnings.warn(
            f"{name} has persistent_workers, whose random states a checkpoint cannot save: if the "
            "dataset draws random numbers, a resumed run draws others. Set "
            "persistent_workers=False for an exact resume.",
            stacklevel=2,
        )


# --- what is watched as it draws ------------------------------------------------------------------


class WatchedOrder:
    """The batches of a loader whose sampler is watched as it draws."""

    def __init__(self, loader: DataLoader[Any], randomness: Randomness) -> None:
        self.loader = loader
        self.randomness = randomness
        self.rows: _RowsOnDemand | None = None
        self.draws: WatchedDraws | None = None

    def batches(
        self, batches: Any, seen: int = 0, draws: Mapping[str, Any] | None = None
    ) -> Iterator[Any]:
        """Return an iterator of the loader's batches.

        Of those that were `seen` no row is read, until `read` is called.
        """
        loader = self.loader

        def iterate(sampler: Any) -> WatchedDraws:
            self.draws = WatchedDraws(iter(sampler), self.randomness, draws)
            return self.draws

        if takes_order(batches):
            iterator: Iterator[Any] = batches.along(iterate)
            return iterator
        sampler = _WatchedSampler(sampler_of(loader), iterate)
        if loader.num_workers:
            return iter(with_sampler(loader, sampler, loader.generator))
        self.rows = _RowsOnDemand(loader)
        self.rows.reads = not seen
        return iter(self.rows.batches(sampler))

    def read(self) -> None:
        """Read rows from the next batch on."""
        if self.rows is not None:
            self.rows.reads = True

    def position(self) -> dict[str, Any] | None:
        """Return the states that the generators had when the sampler drew, as plain values."""
        return None if self.draws is None else self.draws.position()


class _WatchedSampler:
    """A sampler whose iterators are watched."""

    def __init__(self, sampler: Any, iterate: Any) -> None:
        self.sampler = sampler
        self.iterate = iterate  # returns a watched iterator of a sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        iterator: Iterator[Any] = self.iterate(self.sampler)
        return iterator


class WatchedDraws:
    """An iterator that remembers what others had drawn from its generators before each draw.

    If it draws in a step, and no one else has drawn since its last draw, nothing is remembered.
    """

    def __init__(
        self, iterator: Iterator[Any], randomness: Randomness, draws: Mapping[str, Any] | None
    ) -> None:
        self.iterator = iterator
        self.randomness = randomness
        self.number = 0  # of the next step
        self.replayed: dict[int, dict[str, Any]] = {}
        for number, states in (draws or {}).items():
            self.replayed[int(number)] = states
        self.draws: dict[int, dict[str, Any]] = dict(self.replayed)
        self.last = randomness.draws()  # the generators' states as the last step left them

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
            others = {}
            for name, state in drawn.items():
                if not same_state(state, self.last[name]):
                    others[name] = state
            if others and number not in self.draws and len(self.draws) < MOST_DRAWS:
                self.draws[number] = others
                self._warn_of_too_many()
            if drawn:
                self.last = self.randomness.draws()

    def _warn_of_too_many(self) -> None:
        if len(self.draws) == MOST_DRAWS:
            warnings.warn(
                f"dl_train, or its sampler, has drawn {MOST_DRAWS} times in one epoch from a "
                "random generator that other code also draws from, and a checkpoint saves no more "
                "draws: a run that resumes later in an epoch is not exact. Give it a separate "
                "generator.",
                stacklevel=2,
            )

    def position(self) -> dict[str, Any]:
        """Return the remembered states by the number of the step, as plain values."""
        return {str(number): states for number, states in self.draws.items()}


class _RowsOnDemand(Dataset[Any]):
    """A loader's batches by the numbers of their rows; None until `reads` is set."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.reads = False

    def __getitem__(self, rows: Any) -> Any:
        if not self.reads:
            return None
        dataset: Any = self.loader.dataset
        if self.loader.batch_sampler is None:
            return self.loader.collate_fn(dataset[rows])
        if getattr(dataset, "__getitems__", None):
            fetched = dataset.__getitems__(rows)
        else:
            fetched = [dataset[row] for row in rows]
        return self.loader.collate_fn(fetched)

    def batches(self, sampler: Any = None) -> DataLoader[Any]:
        """Return a loader that draws the same as the other one, at the same time.

        Args:
            sampler: in place of the loader's own.
        """
        loader = self.loader
        return DataLoader(
            self,
            batch_size=None,
            sampler=sampler_of(loader) if sampler is None else sampler,
            collate_fn=_unchanged,
            generator=loader.generator,
            pin_memory=loader.pin_memory,
        )


def _unchanged(batch: Any) -> Any:
    return batch
