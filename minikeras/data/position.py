"""How far an iteration of batches has come, and an iteration carried on from there in another process.

What was drawn before is drawn again: the random state of the iteration's start is put back, the batches already seen
are passed over, and the random state goes on from where the run stood.

a list, or in memory             read again, which costs next to nothing
a DataLoader without workers     passed over by number: the sampler draws, no row is read
a DataLoader with workers        read again, since its workers hold random states of their own
one with state_dict              asked to carry on by itself
anything else                    read again, with a warning
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, StackDataset, TensorDataset

from minikeras.data.epochs import epochs_of, put_epochs_back
from minikeras.data.in_memory import InMemoryBatches, base_of
from minikeras.data.sharded import Sharded
from minikeras.data.sources import ArrayBatches, length
from minikeras.errors import CheckpointError
from minikeras.randomness import KINDS, Randomness

PLAIN = (TensorDataset, StackDataset)  # their rows draw nothing


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
        self.pending: dict[str, Any] | None = None
        self.epochs: list[int | None] = []  # by which samplers shuffled the iteration under way

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type] # raises as theirs does

    def __iter__(self) -> Iterator[Any]:
        if self.pending is None:
            self.start, self.seen = self.randomness.states(), 0
            self.epochs = epochs_of(self.loader)
            iterator = iter(self.batches)
        else:
            iterator = self._carried_on()
        for batch in iterator:
            self.seen += 1
            yield batch
        self.start = None

    def position(self) -> dict[str, Any] | None:
        """Where the iteration under way stands, as plain values; None between two iterations."""
        if self.pending is not None or self.start is None:
            return self.pending
        state = self.loader.state_dict() if keeps_state(self.loader) else None
        position = {"start": self.start, "seen": self.seen, "loader": state, "steps": length(self.batches)}
        return position | {"epochs": self.epochs}

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
        self.epochs = position.get("epochs", epochs)  # steps_per_epoch: it may have begun in an earlier epoch
        put_epochs_back(self.loader, self.epochs)
        if position["loader"] is not None:
            self.loader.load_state_dict(position["loader"])
            iterator = iter(self.batches)
        else:
            iterator = passed_over(self.batches, self.loader, self.seen, self.name)
        put_epochs_back(self.loader, epochs)
        self.randomness.restore(now)
        return iterator


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
    if not by_number and not surely_the_same(batches, loader):
        warnings.warn(
            f"{name} is a {type(getattr(loader, 'dataset', loader)).__name__}, which has no state_dict: the {count} "
            f"batches already seen are read again and left out. The run is exact only if they come as before. Give "
            f"it state_dict and load_state_dict, or use a Dataset with __getitem__.",
            stacklevel=2,
        )
    passed = sum(1 for _ in islice(iterator, count))
    if passed < count:
        raise CheckpointError(
            f"the checkpoint stands after batch {count} and {name} ended after {passed}. Give the same data as before."
        )
    if fetch:
        fetch.reads = True
    return iterator


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
    return isinstance(batches, DataLoader) and batches.num_workers == 0 and surely_the_same(batches, loader)


def surely_the_same(batches: Iterable[Any], loader: Any) -> bool:
    """Whether reading again from the same random state gives the same batches."""
    if isinstance(batches, (InMemoryBatches, ArrayBatches, list)):
        return True
    return type(loader).__iter__ is DataLoader.__iter__ and not isinstance(loader.dataset, IterableDataset)


def warn_of_hidden_draws(loader: Any, name: str) -> None:
    """What would not be drawn again after a resume: said as a fit with a checkpoint begins."""
    dataset = base_of(getattr(loader, "dataset", None))
    if dataset is None or type(dataset) in PLAIN or isinstance(dataset, IterableDataset) or keeps_state(loader):
        return
    hidden = [key for key, value in getattr(dataset, "__dict__", {}).items() if isinstance(value, KINDS)]
    if hidden and not loader.num_workers:
        warnings.warn(
            f"the dataset of {name} draws from a generator of its own ({', '.join(hidden)}), whose state a checkpoint "
            f"does not hold: a resumed run would draw other numbers. Draw from torch's, NumPy's or Python's global "
            f"generator, or set num_workers=1.",
            stacklevel=2,
        )
    if getattr(loader, "persistent_workers", False):
        warnings.warn(
            f"{name} has persistent_workers, whose random states a checkpoint does not hold: if the dataset draws "
            f"random numbers, a resumed run draws others. Set persistent_workers=False for an exact resume.",
            stacklevel=2,
        )


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
        fetched = dataset.__getitems__(rows) if getattr(dataset, "__getitems__", None) else [dataset[r] for r in rows]
        return self.loader.collate_fn(fetched)

    def batches(self) -> DataLoader[Any]:
        """A loader that draws what the other draws, when it draws it."""
        loader = self.loader
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        return DataLoader(self, batch_size=None, sampler=sampler, collate_fn=_same, generator=loader.generator,
                          pin_memory=loader.pin_memory)  # fmt: skip


def _same(batch: Any) -> Any:
    return batch
