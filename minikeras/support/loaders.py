"""Draw as a DataLoader does: its row numbers, the seed of its workers, the epoch's number.

base_of                the dataset inside Subsets
draws_at_once          whether an epoch's order may be drawn before its first batch
drawn, asked           the numbers of an epoch's rows: all at once, or batch by batch
draw_seed              the seed for the workers
with_sampler           the same loader with another sampler
persistent_loader      the same, with workers that stay
set_epoch, epochs_of   the epoch's number, for samplers and datasets that shuffle by it

The random draws, and their order, are those of iterating the loader itself.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from minikeras.sources import ContinuedBatches

# torch's own samplers, which draw an epoch's order when the iteration begins
DRAWN_AT_ONCE = (
    SequentialSampler,
    RandomSampler,
    WeightedRandomSampler,
    SubsetRandomSampler,
    DistributedSampler,
)
# loaders with persistent workers, which keep the seed that was drawn for them
DRAWN_FOR: weakref.WeakSet[DataLoader[Any]] = weakref.WeakSet()
# ... and the loaders with such workers that read a part of their batches
READERS: weakref.WeakKeyDictionary[DataLoader[Any], tuple[DataLoader[Any], list[Any]]] = (
    weakref.WeakKeyDictionary()
)


def base_of(dataset: Any) -> Any:
    """Return the dataset that a Subset is cut from; a dataset of another kind itself."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


# --- rows -----------------------------------------------------------------------------------------


def draws_at_once(batch_sampler: Any) -> bool:
    """Tell whether nothing else can draw between this sampler's draws.

    An epoch's order may be drawn at once then.
    """
    if type(batch_sampler) is not BatchSampler or type(batch_sampler.sampler) not in DRAWN_AT_ONCE:
        return False
    # the user's own generator may be drawn from in the middle of an epoch
    return getattr(batch_sampler.sampler, "generator", None) is None


def drawn(sampler: Any) -> Tensor:
    """Draw the row numbers of an epoch, (rows,) int64, as iterating the sampler would."""
    if type(sampler) is SequentialSampler:
        return torch.arange(len(sampler))
    if type(sampler) is RandomSampler and not sampler.replacement:
        rows = len(sampler.data_source)
        if sampler.num_samples == rows and _shuffles_as_we_do():
            return _shuffled(rows)
    return torch.from_numpy(np.fromiter(map(index, sampler), np.int64))


def _shuffled(rows: int) -> Tensor:
    """Draw what RandomSampler draws, without a Python number for each row.

    Those numbers are half the cost of a small batch.
    """
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=1)
def _shuffles_as_we_do() -> bool:
    """Tell whether the installed torch's RandomSampler draws as `_shuffled` does, by trying it."""
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        order_of_torch = list(RandomSampler(range(100)))
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        is_same_order = _shuffled(100).tolist() == order_of_torch
        return is_same_order and torch.equal(torch.get_rng_state(), after)


def draw_seed(loader: DataLoader[Any]) -> None:
    """Draw what a loader draws for its workers at each `iter()`; once if its workers persist."""
    if loader not in DRAWN_FOR:
        # drawn by torch itself, for a loader of nothing
        iter(DataLoader((), batch_size=None, generator=loader.generator))  # type: ignore[arg-type]
    if loader.persistent_workers:
        DRAWN_FOR.add(loader)


def asked(loader: DataLoader[Any], iterate: Callable[[Any], Iterator[Any]] = iter) -> Iterator[Any]:
    """Yield the row numbers of each batch, from a sampler asked as early as the loader asks it.

    A custom sampler may draw whenever it is asked.

    Args:
        loader: whose batch sampler is asked.
        iterate: gives an iterator of the batch sampler.
    """
    sampler: Any = loader.batch_sampler
    rows: Iterator[Any] = iterate(sampler)
    draw_seed(loader)
    if not loader.num_workers:
        return _each(rows)
    # A loader with workers begins a second iteration of the sampler, and hands out the first tasks
    # before the first batch.
    rows = iterate(sampler)
    waiting: deque[Any] = deque()
    for _ in range(loader.num_workers * (loader.prefetch_factor or 0)):
        _ask_once(rows, waiting)  # asked again even after its end, as the loader does
    return _one_behind(rows, waiting)


def _each(rows: Iterator[Any]) -> Iterator[Any]:
    # `for` would ask for an iterator once more, and that may draw
    while (batch := next(rows, None)) is not None:
        yield batch


def _ask_once(rows: Iterator[Any], waiting: deque[Any]) -> None:
    batch = next(rows, None)
    if batch is not None:
        waiting.append(list(batch))  # a copy: some samplers fill one list again and again


def _one_behind(rows: Iterator[Any], waiting: deque[Any]) -> Iterator[Any]:
    while waiting:
        batch = waiting.popleft()
        _ask_once(rows, waiting)
        yield batch


def with_sampler(
    loader: DataLoader[Any],
    sampler: Any,
    generator: torch.Generator | None,
    persistent_workers: bool = False,
) -> DataLoader[Any]:
    """Return a loader like this one, with another (batch) sampler and generator."""
    kwargs: dict[str, Any] = {"batch_sampler": sampler}
    if loader.batch_sampler is None:
        kwargs = {"batch_size": None, "sampler": sampler}
    if loader.num_workers > 0:
        kwargs["multiprocessing_context"] = loader.multiprocessing_context
        kwargs["prefetch_factor"] = loader.prefetch_factor
    if hasattr(loader, "in_order"):  # newer versions of torch
        kwargs["in_order"] = loader.in_order
    return DataLoader(
        loader.dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        generator=generator,
        persistent_workers=persistent_workers,
        **kwargs,
    )


def persistent_loader(
    loader: DataLoader[Any], batches: list[Any], generator: torch.Generator | None
) -> DataLoader[Any]:
    """Return a loader like this one that reads these batches, by the same workers each time.

    Args:
        loader: the user's, with persistent workers.
        batches: the row numbers of each batch of the next iteration.
        generator: gives the workers' seed when they start.
    """
    if loader not in READERS:
        numbers: list[Any] = []
        READERS[loader] = with_sampler(loader, numbers, generator, True), numbers
    reader, numbers = READERS[loader]
    numbers[:] = batches
    return reader


# --- epochs ---------------------------------------------------------------------------------------


def shuffled_by_epoch(batches: Iterable[Any] | None) -> list[Any]:
    """Return the parts of a loader that have a `set_epoch` method.

    Such as torch's DistributedSampler.
    """
    parts: list[Any] = []
    loader: Any = batches
    while loader is not None:  # from our wrappers, and the user's, to the loader inside
        batch_sampler = getattr(loader, "batch_sampler", None)
        dataset = getattr(loader, "dataset", None)
        parts += [loader, getattr(loader, "sampler", None)]
        parts += [batch_sampler, getattr(batch_sampler, "sampler", None)]
        parts += [dataset, base_of(dataset)]
        inner = loader.batches if isinstance(loader, ContinuedBatches) else None
        loader = getattr(loader, "loader", inner)
    found: list[Any] = []
    for part in parts:
        if callable(getattr(part, "set_epoch", None)) and all(part is not other for other in found):
            found.append(part)
    return found


def set_epoch(batches: Iterable[Any] | None, epoch: int) -> None:
    """Give the epoch's number, from 0, to the parts of a loader that shuffle by it.

    >>> sampler = DistributedSampler(range(4), num_replicas=2, rank=0)
    >>> set_epoch(DataLoader(range(4), sampler=sampler), 3)
    >>> sampler.epoch
    3
    """
    for part in shuffled_by_epoch(batches):
        part.set_epoch(epoch)


def epochs_of(loader: Any) -> list[int | None]:
    """Return the epoch's number that each of those parts has now; None if it does not tell."""
    epochs = []
    for part in shuffled_by_epoch(loader):
        epoch = getattr(part, "epoch", None)
        epochs.append(epoch if type(epoch) is int else None)
    return epochs


def put_epochs_back(loader: Any, epochs: Iterable[int | None]) -> None:
    """Set the numbers that `epochs_of` returned."""
    for part, epoch in zip(shuffled_by_epoch(loader), epochs, strict=False):
        if epoch is not None:
            part.set_epoch(epoch)
