"""One process's share of the batches of several processes. You may skip this file.

A step is one batch for each process. The order of an epoch is drawn as rank 0 draws it: its random
state is broadcast at the start of each iteration, each process draws from it, and then the other
ranks put their own state back.

rows known by number       batch_size rows for each process; the last ones are divided into parts
                           that differ by one row at most
a custom batch sampler,    as many batches as there are processes make one step
a list of batches
anything else              each process reads its own, for as long as one of them has a batch

A process that has no batch in a step repeats one that it has already seen, as a `FillerBatch`: its
rows, loss and gradients count as zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from minikeras.distributed.world import World
from minikeras.phase import FillerBatch
from minikeras.sources import ArrayBatches, find_length
from minikeras.support.loaders import asked, draw_seed, drawn, draws_at_once, with_sampler
from minikeras.support.randomness import Randomness


def sharded(batches: Iterable[Any], world: World, name: str) -> Iterable[Any]:
    """Return this process's share of the batches."""
    if reads_rows(batches) and not is_sharded_by_user(getattr(batches, "loader", None)):
        return Sharded(batches, world)
    if type(batches) is list or is_known_by_number(batches):
        return Sharded(batches, world)
    return InStep(batches, world, name)


def reads_rows(batches: Any) -> bool:
    """Tell whether a source gives the batches of row numbers: `ArrayBatches`, `InMemoryBatches`."""
    return getattr(batches, "is_exact", False) is True and hasattr(batches, "of")


def is_known_by_number(batches: Any) -> bool:
    """Tell whether a loader's rows are known by number before they are read."""
    if not isinstance(batches, DataLoader):
        return False
    if type(batches).__iter__ is not DataLoader.__iter__ or hasattr(batches, "state_dict"):
        return False
    return not (isinstance(batches.dataset, IterableDataset) or is_sharded_by_user(batches))


def is_sharded_by_user(loader: Any) -> bool:
    """Tell whether a sampler of the loader already gives each process its share."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    return any(getattr(sampler, "num_replicas", 1) > 1 for sampler in samplers)


def draw_first_seed(loader: DataLoader[Any]) -> None:
    """Draw what a loader drew for its persistent workers in its first iteration, now over."""
    if is_known_by_number(loader):
        draw_seed(loader)
    else:
        iter(loader)


class Sharded:
    """One process's share of batches, if the rows or the batches are known by number."""

    is_exact = True  # reading again from the same random state gives the same batches

    def __init__(self, batches: Any, world: World) -> None:
        self.batches = batches
        self.world = world
        self.loader: Any = getattr(batches, "loader", batches)  # what the user passed
        self.randomness = Randomness(torch.device("cpu"), [self.loader])

    @property
    def by_rows(self) -> bool:
        """Whether the rows of a step are divided; else each process takes whole batches."""
        return isinstance(self.batches, ArrayBatches) or type(self.sampler) is BatchSampler

    @property
    def sampler(self) -> Any:
        """The loader's batch sampler, None if there is none."""
        return getattr(self.loader, "batch_sampler", None)

    @property
    def batch_size(self) -> int:
        """Rows per step, of all processes together."""
        # compared with None: a sampler without a batch is false
        sized = self.batches if self.sampler is None else self.sampler
        return int(sized.batch_size) * self.world.size

    @property
    def drop_last(self) -> bool:
        """Whether a last step that is not full is left out."""
        return bool(getattr(self.sampler, "drop_last", False))

    def __len__(self) -> int:
        if not self.by_rows:
            return math.ceil(len(self.loader) / self.world.size)
        if isinstance(self.batches, ArrayBatches):
            rows = self.batches.rows
        else:
            rows = len(self.sampler.sampler)
        if self.drop_last:
            return int(rows // self.batch_size)
        return math.ceil(rows / self.batch_size)

    def check_sizes(self) -> None:
        """Check that all processes got the same amount of data.

        Raises:
            ValueError: they were not.
        """
        if isinstance(self.batches, ArrayBatches):
            size = self.batches.rows
            unit = "rows"
        else:
            size = find_length(self.loader) or 0
            unit = "batches"
        most, negative_least = self.world.agree(size, -size)
        if most != -negative_least:
            raise ValueError(
                f"the processes have from {-negative_least:g} to {most:g} {unit}. Give all "
                "processes the same data: each uses its share of it."
            )

    def __iter__(self) -> Iterator[Any]:
        return self.after(0)

    def after(self, count: int) -> Iterator[Any]:
        """Iterate without the first `count` batches.

        They are not read, unless workers draw for them.
        """
        rank = self.world.rank
        own = self.randomness.states()
        self.check_sizes()
        before = self.world.broadcast(own)
        self.randomness.restore(before)
        shares, is_filler = self.shares()
        after = self.randomness.states()
        # A loader's iterator draws a seed for its workers: on rank 0 as in one process, on the
        # others each its own.
        self.randomness.restore(before if rank == 0 else own)
        batches = self.read(shares, count)
        if rank == 0 or not self.world.draws_apart:
            self.randomness.restore(after)
        return with_filler(batches, max(len(shares) - count, 0), is_filler)

    def shares(self) -> tuple[list[Any], bool]:
        """Return what this process reads in each step, and whether the last one is a filler."""
        if self.by_rows:
            return self._shares_of_rows()
        return self._shares_of_batches()

    def _shares_of_batches(self) -> tuple[list[Any], bool]:
        rank = self.world.rank
        size = self.world.size
        batches = self.all_batches()
        steps = [batches[start : start + size] for start in range(0, len(batches), size)]
        shares = [step[min(rank, len(step) - 1)] for step in steps]
        is_filler = bool(steps) and rank >= len(steps[-1])
        return shares, is_filler

    def _shares_of_rows(self) -> tuple[list[Any], bool]:
        rows = self.rows()
        size = self.batch_size
        if self.drop_last:
            rows = rows[: len(rows) // size * size]
        steps = [rows[start : start + size] for start in range(0, len(rows), size)]
        shares = [part(step, self.world.rank, self.world.size) for step in steps]
        is_filler = bool(shares) and len(shares[-1]) == 0
        if is_filler:
            shares[-1] = steps[-1][:1]
        return shares, is_filler

    def rows(self) -> Any:
        """Return the numbers of an epoch's rows, drawn as the loader draws them."""
        if isinstance(self.batches, ArrayBatches):
            return self.batches.order()
        draw_seed(self.loader)
        sampler = self.sampler.sampler
        return drawn(sampler) if draws_at_once(self.sampler) else list(sampler)

    def all_batches(self) -> list[Any]:
        """Return the row numbers of each batch of an epoch; of a list, the batches."""
        if type(self.loader) is list:
            return self.loader
        if self.sampler is None:
            draw_seed(self.loader)
            return list(self.loader.sampler)
        return list(map(list, asked(self.loader)))

    def read(self, shares: list[Any], count: int) -> Iterator[Any]:
        """Return an iterator of the batches of these shares, but for the first `count`."""
        if type(self.loader) is list:
            return iter(shares[count:])
        if reads_rows(self.batches):
            batches: Iterator[Any] = self.batches.of(shares[count:])
            return batches
        skipped = 0 if self.loader.num_workers else count  # workers draw for the rows they read
        wanted = []
        for share in shares[skipped:]:
            wanted.append(share.tolist() if isinstance(share, Tensor) else share)
        # which differs by rank, as workers draw for their rows
        generator = self.loader.generator if self.world.rank == 0 else None
        batches = iter(with_sampler(self.loader, wanted, generator))
        return islice(batches, count - skipped, None)


def part(rows: Any, rank: int, size: int) -> Any:
    """Return the rank's part of a step's rows; sizes differ by one at most."""
    least, more = divmod(len(rows), size)
    start = rank * least + min(rank, more)
    return rows[start : start + least + (rank < more)]


def with_filler(batches: Iterator[Any], count: int, is_filler: bool) -> Iterator[Any]:
    """Yield batches, of which there are `count`; the last one is marked if it is a filler."""
    for number, batch in enumerate(batches, start=1):
        yield FillerBatch(batch) if is_filler and number == count else batch


class InStep:
    """Batches that each process reads for itself, for as long as one of them has one."""

    def __init__(self, batches: Iterable[Any], world: World, name: str) -> None:
        self.batches = batches
        self.world = world
        self.name = name
        self.loader: Any = getattr(batches, "loader", batches)  # what the user passed

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type] # raises as theirs does

    def __iter__(self) -> Iterator[Any]:
        nothing = object()
        last = nothing
        iterator = iter(self.batches)
        while True:
            batch = next(iterator, nothing)
            if not self.world.agree(batch is not nothing)[0]:
                return
            if batch is not nothing:
                last = batch
                yield batch
                continue
            if last is nothing:
                raise ValueError(
                    f"{self.name} gave process {self.world.rank} no batch, but other processes "
                    "got some. Give each process at least one."
                )
            yield FillerBatch(last)
