"""One process's part of the batches that several processes have together.

A step is one batch for each process. The order of an epoch is drawn as rank 0 draws it: its random state is passed on
at the start of each iteration, each process draws from it, and other ranks go back to their own state.

rows known by number       batch_size rows for each process, the last ones in parts that differ by one row at most
a custom batch sampler,    as many batches as there are processes make one step
a list of batches
anything else              each process reads its own, for as long as one of them has a batch

A process that has nothing to do in a step gets a batch that is seen already, a `FillerBatch`: it counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from minikeras.data.in_memory import InMemoryBatches, asked, draw_seed, drawn, draws_at_once
from minikeras.distributed.world import World
from minikeras.phase import FillerBatch
from minikeras.sources import ArrayBatches, length
from minikeras.support.randomness import Randomness


def sharded(batches: Iterable[Any], world: World, name: str) -> Iterable[Any]:
    """Return this process's part of the batches."""
    if isinstance(batches, (ArrayBatches, InMemoryBatches)) and not by_user(
        getattr(batches, "loader", None)
    ):
        return Sharded(batches, world)
    if type(batches) is list or by_number(batches):
        return Sharded(batches, world)
    return InStep(batches, world, name)


def by_number(batches: Any) -> bool:
    """Whether a loader's rows are known by number before they are read."""
    return (
        isinstance(batches, DataLoader)
        and type(batches).__iter__ is DataLoader.__iter__
        and not (
            hasattr(batches, "state_dict")
            or isinstance(batches.dataset, IterableDataset)
            or by_user(batches)
        )
    )


def draw_first_seed(loader: DataLoader[Any]) -> None:
    """Draw what a loader draws for its persistent workers in its first iteration, which is over."""
    if by_number(loader):
        draw_seed(loader)
    else:
        iter(loader)


def by_user(loader: Any) -> bool:
    """Whether the user has sharded it already."""
    batches = getattr(loader, "batch_sampler", None)
    samplers = getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)
    return any(getattr(sampler, "num_replicas", 1) > 1 for sampler in samplers)


class Sharded:
    """One process's part of batches whose rows, or which themselves, are known by number."""

    def __init__(self, batches: Any, world: World) -> None:
        self.batches, self.world = batches, world
        self.loader: Any = getattr(batches, "loader", batches)  # what the user handed over
        self.randomness = Randomness(torch.device("cpu"), [self.loader])

    @property
    def by_rows(self) -> bool:
        return isinstance(self.batches, ArrayBatches) or type(self.sampler) is BatchSampler

    @property
    def sampler(self) -> Any:
        return getattr(self.loader, "batch_sampler", None)

    @property
    def batch_size(self) -> int:
        """Rows of a step, of all processes together."""
        sized = (
            self.batches if self.sampler is None else self.sampler
        )  # which is false where it has no batch
        return int(sized.batch_size) * self.world.size

    @property
    def drop_last(self) -> bool:
        return bool(getattr(self.sampler, "drop_last", False))

    def __len__(self) -> int:
        if not self.by_rows:
            return math.ceil(len(self.loader) / self.world.size)
        rows = (
            self.batches.rows
            if isinstance(self.batches, ArrayBatches)
            else len(self.sampler.sampler)
        )
        return int(rows // self.batch_size if self.drop_last else math.ceil(rows / self.batch_size))

    def check_sizes(self) -> None:
        """All processes must be given the same data, of which each takes its part."""
        of_arrays = isinstance(self.batches, ArrayBatches)
        size = self.batches.rows if of_arrays else length(self.loader) or 0
        most, least = self.world.agree(size, -size)
        if most != -least:
            found = f"from {-least:g} to {most:g} {'rows' if of_arrays else 'batches'}"
            raise ValueError(
                f"the processes have {found}. Give all the same data: each takes its part of it."
            )

    def __iter__(self) -> Iterator[Any]:
        return self.after(0)

    def after(self, count: int) -> Iterator[Any]:
        """The iteration without its first `count` batches, which are not read unless workers draw for them."""
        rank, own = self.world.rank, self.randomness.states()
        self.check_sizes()
        before = self.world.broadcast(own)
        self.randomness.restore(before)
        shares, idle = self.shares()
        after = self.randomness.states()
        # a loader's iterator draws a seed for its workers: on rank 0 as with one process, on others one of their own
        self.randomness.restore(before if rank == 0 else own)
        batches = self.read(shares, count)
        if rank == 0 or not self.world.draws_apart:
            self.randomness.restore(after)
        return marked(batches, max(len(shares) - count, 0), idle)

    def shares(self) -> tuple[list[Any], bool]:
        """What this process reads in each step, and whether it is idle in the last."""
        rank, size = self.world.rank, self.world.size
        if not self.by_rows:
            chosen = self.chosen()
            groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
            return [group[min(rank, len(group) - 1)] for group in groups], bool(
                groups
            ) and rank >= len(groups[-1])
        rows = self.rows()
        if self.drop_last:
            rows = rows[: len(rows) // self.batch_size * self.batch_size]
        steps = [
            rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)
        ]
        parts = [part(step, rank, size) for step in steps]
        idle = bool(parts) and not len(parts[-1])
        return [*parts[:-1], steps[-1][:1]] if idle else parts, idle

    def rows(self) -> Any:
        """The numbers of an epoch's rows, drawn as the loader draws them."""
        if isinstance(self.batches, ArrayBatches):
            return self.batches.order()
        draw_seed(self.loader)
        sampler = self.sampler.sampler
        return drawn(sampler) if draws_at_once(self.sampler) else list(sampler)

    def chosen(self) -> list[Any]:
        """The numbers of an epoch's batches or, of a list, the batches."""
        if type(self.loader) is list:
            return self.loader
        if self.sampler is None:
            draw_seed(self.loader)
            return list(self.loader.sampler)
        return list(map(list, asked(self.loader)))

    def read(self, shares: list[Any], count: int) -> Iterator[Any]:
        """The batches of these shares but for the first `count`."""
        if type(self.loader) is list:
            return iter(shares[count:])
        if isinstance(self.batches, (ArrayBatches, InMemoryBatches)):
            return self.batches.of(shares[count:])
        skip = 0 if self.loader.num_workers else count
        wanted = [share.tolist() if isinstance(share, Tensor) else share for share in shares[skip:]]
        # which differs by rank, as workers draw for their rows
        generator = self.loader.generator if self.world.rank == 0 else None
        batches = iter(with_sampler(self.loader, wanted, generator))
        return islice(batches, count - skip, None)


def part(rows: Any, rank: int, size: int) -> Any:
    """The rank's part of a step's rows; sizes differ by one at most."""
    least, more = divmod(len(rows), size)
    start = rank * least + min(rank, more)
    return rows[start : start + least + (rank < more)]


def marked(batches: Iterator[Any], count: int, idle: bool) -> Iterator[Any]:
    """The batches, of which there are so many, the last one marked where it is idle."""
    for number, batch in enumerate(batches, start=1):
        yield FillerBatch(batch) if idle and number == count else batch


def with_sampler(
    loader: DataLoader[Any], sampler: Any, generator: torch.Generator | None
) -> DataLoader[Any]:
    """A loader like this one, with another (batch) sampler and generator."""
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
        **kwargs,
    )


class InStep:
    """Batches that each process reads for itself, for as long as one of them has one."""

    def __init__(self, batches: Iterable[Any], world: World, name: str) -> None:
        self.batches, self.world, self.name = batches, world, name
        self.loader: Any = getattr(batches, "loader", batches)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type] # raises as theirs does

    def __iter__(self) -> Iterator[Any]:
        nothing = last = object()
        iterator = iter(self.batches)
        while True:
            batch = next(iterator, nothing)
            if not self.world.agree(batch is not nothing)[0]:
                return
            if batch is nothing is last:
                raise ValueError(
                    f"{self.name} gave no batch to process {self.world.rank}, and others have some. Give each process "
                    f"at least one."
                )
            yield FillerBatch(last) if batch is nothing else batch
            last = last if batch is nothing else batch
