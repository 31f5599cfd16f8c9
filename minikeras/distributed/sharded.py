"""One process's share of the batches of several processes. You may skip this file.

A step is one batch for each process. The order of an epoch is drawn as rank 0 draws it: its random
state is broadcast at the start of each iteration, each process draws from it, and then the other
ranks put their own state back. A custom sampler may still draw differently, as from a generator
without a seed: its order is compared, in a message of its own in the first iteration, and later in
that of the next one.

rows known by number       batch_size rows for each process; the last ones are divided into parts
                           that differ by one row at most
torch's DistributedSampler  the same, in its order, without the rows that it repeats
a custom batch sampler,    as many batches as there are processes make one step
a list of batches
anything else              each process reads its own (in_step.py)

A process that has no batch in a step repeats one that it has already seen, as a `FillerBatch`: its
rows, loss and gradients count as zero.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset
from tqdm import tqdm

from minikeras.distributed.in_step import InStep
from minikeras.distributed.same_data import (
    NO_ORDER,
    OrderSummary,
    check_same_data,
    raise_other_order,
    sample_of,
)
from minikeras.distributed.world import World
from minikeras.phase import FillerBatch
from minikeras.sources import ArrayBatches, find_length
from minikeras.support.checksums import checksum
from minikeras.support.loaders import (
    DRAWN_AT_ONCE,
    asked,
    draw_seed,
    drawn,
    draws_at_once,
    persistent_loader,
    with_sampler,
)
from minikeras.support.randomness import Randomness

# what a subclass of DataLoader may define and be read as a DataLoader is
ALLOWED = ("__init__", "__len__", "__doc__", "__module__", "__orig_bases__", "__parameters__")


def sharded(batches: Iterable[Any], world: World, name: str) -> Iterable[Any]:
    """Return this process's share of the batches."""
    bar = batches if isinstance(batches, tqdm) else None
    given: Any = batches if bar is None else bar.iterable
    if not is_divisible(given, world):
        return InStep(batches, world, name)
    return Sharded(given, world, name, bar)


def is_divisible(batches: Any, world: World) -> bool:
    """Tell whether the rows or the batches are known by number, and not divided yet."""
    if reads_rows(batches):
        return not is_sharded_by_user(getattr(batches, "loader", None), world)
    return type(batches) is list or is_known_by_number(batches, world)


def reads_rows(batches: Any) -> bool:
    """Tell whether a source gives the batches of row numbers: `ArrayBatches`, `InMemoryBatches`."""
    return getattr(batches, "is_exact", False) is True and hasattr(batches, "of")


def is_known_by_number(batches: Any, world: World) -> bool:
    """Tell whether a loader's rows are known by number before they are read."""
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return False
    return reads_by_number(batches) and not is_sharded_by_user(batches, world)


def reads_by_number(loader: DataLoader[Any]) -> bool:
    """Tell whether a loader does nothing but read the rows that its samplers tell it.

    A DataLoader does, a subclass that overrides nothing of it, and torchdata's StatefulDataLoader
    unless it is to begin at a position of its own.
    """
    torchdata = sys.modules.get("torchdata.stateful_dataloader")
    if torchdata is not None and type(loader) is torchdata.StatefulDataLoader:
        return loader.next_iter_state is None  # type: ignore[attr-defined]
    if hasattr(loader, "state_dict"):
        return False
    for kind in type(loader).__mro__:
        if kind is DataLoader:
            return True
        overridden = vars(kind).keys() & vars(DataLoader).keys()
        if not overridden <= set(ALLOWED):
            return False
    return True


def is_sharded_by_user(loader: Any, world: World) -> bool:
    """Tell whether a sampler of the loader already gives each process its share.

    torch's own DistributedSampler over all processes does not count: its order is known, and so all
    of its rows are divided here, without those that it repeats.
    """
    if is_distributed(order_of(loader), world):
        return False
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    return any(getattr(sampler, "num_replicas", 1) > 1 for sampler in samplers)


def order_of(loader: Any) -> Any:
    """Return the sampler that decides the order of a loader's rows; a custom batch sampler may."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    if batch_sampler is None:
        return getattr(loader, "sampler", None)
    return batch_sampler.sampler if type(batch_sampler) is BatchSampler else batch_sampler


def is_distributed(sampler: Any, world: World) -> bool:
    """Tell whether a sampler is torch's own that gives each of these processes a share."""
    if type(sampler) is not DistributedSampler:
        return False
    return (sampler.num_replicas, sampler.rank) == (world.size, world.rank)


def has_custom_order(loader: Any) -> bool:
    """Tell whether a sampler decides the order that is none of torch's own, or a list."""
    sampler = order_of(loader)
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return sampler is not None and type(sampler) not in DRAWN_AT_ONCE


def count_rows(sampler: Any) -> int:
    """Return how many rows the samplers of all processes give together, each row once."""
    if type(sampler) is not DistributedSampler:
        return len(sampler)
    return sampler.total_size if sampler.drop_last else len(sampler.dataset)  # type: ignore[arg-type]


def rows_of_all(sampler: DistributedSampler[Any]) -> Tensor:
    """Return the rows that the samplers of all processes give together, in their order."""
    whole: DistributedSampler[Any] = DistributedSampler(
        sampler.dataset, num_replicas=1, rank=0, shuffle=sampler.shuffle, seed=sampler.seed
    )
    whole.set_epoch(sampler.epoch)
    return drawn(whole)[: count_rows(sampler)]


def draw_first_seed(loader: DataLoader[Any], world: World) -> None:
    """Draw what a loader drew for its persistent workers in its first iteration, now over."""
    if is_known_by_number(loader, world):
        draw_seed(loader)
        iter(persistent_loader(loader, [], loader.generator if world.rank == 0 else None))
    else:
        iter(loader)


class Sharded:
    """One process's share of batches, if the rows or the batches are known by number.

    Args:
        name: what the user calls them, for messages.
        bar: the user's bar around the batches, which shows this process's share.
    """

    is_exact = True  # reading again from the same random state gives the same batches
    draws_ahead = True  # the whole order, as an iteration begins

    def __init__(self, batches: Any, world: World, name: str, bar: tqdm[Any] | None = None) -> None:
        self.batches = batches
        self.world = world
        self.name = name
        self.bar = bar
        self.loader: Any = getattr(batches, "loader", batches)  # what the user passed
        self.randomness = Randomness(torch.device("cpu"), [self.loader])
        self.order = NO_ORDER  # of the last iteration, if a custom sampler has drawn it
        self.is_first_pass = True

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
            loader = self.loader
            order = order_of(loader)
            batches = count_rows(order) if type(order) is DistributedSampler else len(loader)
            return math.ceil(batches / self.world.size)
        if isinstance(self.batches, ArrayBatches):
            rows = self.batches.rows
        else:
            rows = count_rows(self.sampler.sampler)
        if self.drop_last:
            return int(rows // self.batch_size)
        return math.ceil(rows / self.batch_size)

    def check_same(self, name: str) -> None:
        """Check that all processes were given the same data.

        Raises:
            ValueError: they were not.
        """
        size = self.size()
        self.check_sizes(*self.world.agree(size, -size))
        check_same_data(self.batches, self.world, name)

    def code(self) -> int:
        """Compute a checksum that differs if `check_same` has something to say."""
        return checksum([self.size(), *sample_of(self.batches)])

    def size(self) -> int:
        """Return how many rows there are, or batches of a loader."""
        if isinstance(self.batches, ArrayBatches):
            return self.batches.rows
        return find_length(self.loader) or 0

    def check_sizes(self, most: float, negative_least: float) -> None:
        """Check that all processes got the same amount of data.

        Raises:
            ValueError: they were not.
        """
        if most != -negative_least:
            unit = "rows" if isinstance(self.batches, ArrayBatches) else "batches"
            raise ValueError(
                f"the processes have from {-negative_least:g} to {most:g} {unit}. Give all "
                "processes the same data: each uses its share of it."
            )

    def check_order(self, most: float, negative_least: float) -> None:
        """Check that all processes have drawn the same order.

        Raises:
            ValueError: they have not.
        """
        if most != -negative_least:
            raise_other_order(self.order, order_of(self.loader), self.world, self.name)

    def __iter__(self) -> Iterator[Any]:
        return self.after(0)

    def after(self, count: int) -> Iterator[Any]:
        """Iterate without the first `count` batches.

        They are not read, unless workers draw for them.
        """
        rank = self.world.rank
        own = self.randomness.states()
        size = self.size()
        code = self.order.code
        before, found = self.world.broadcast_and_agree(own, size, -size, code, -code)
        self.check_sizes(*found[:2])
        self.check_order(*found[2:])
        self.randomness.restore(before)
        shares, is_filler = self.shares()
        if self.is_first_pass and has_custom_order(self.loader):
            code = self.order.code
            self.check_order(*self.world.agree(code, -code, about="the order of the rows"))
        self.is_first_pass = False
        after = self.randomness.states()
        # A loader's iterator draws a seed for its workers: on rank 0 as in one process, on the
        # others each its own.
        self.randomness.restore(before if rank == 0 else own)
        batches = self.read(shares, count)
        if rank and self.world.draws_apart:
            # in a fit the global generators differ, but not those that decide the order
            after = self.randomness.states() | {"generators": after["generators"]}
        self.randomness.restore(after)
        batches = with_filler(batches, max(len(shares) - count, 0), is_filler)
        batches = together_at_the_end(batches, self.world, self.randomness)
        return batches if self.bar is None else shown(self.bar, batches, len(self))

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
        if type(sampler) is DistributedSampler:
            return rows_of_all(sampler)
        if draws_at_once(self.sampler):
            return drawn(sampler)
        return self.compared(list(sampler))

    def all_batches(self) -> list[Any]:
        """Return the row numbers of each batch of an epoch; of a list, the batches."""
        if type(self.loader) is list:
            return self.loader
        if self.sampler is None:
            draw_seed(self.loader)
            sampler = self.loader.sampler
            if type(sampler) is DistributedSampler:
                return rows_of_all(sampler).tolist()
            return self.compared(list(sampler))
        return self.compared(list(map(list, asked(self.loader))))

    def compared(self, order: list[Any]) -> list[Any]:
        """Return an order; note it, to be compared, if a custom sampler has drawn it."""
        if has_custom_order(self.loader):
            self.order = OrderSummary.of(order)
        return order

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
        if self.loader.persistent_workers:
            batches = iter(persistent_loader(self.loader, wanted, generator))
        else:
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


def together_at_the_end(
    batches: Iterator[Any], world: World, randomness: Randomness
) -> Iterator[Any]:
    """Yield batches; then give all processes the random state of rank 0, except within a fit.

    Reading different rows may have drawn differently.
    """
    yield from batches
    if not world.draws_apart:
        randomness.restore(world.broadcast(randomness.states()))


def shown(bar: tqdm[Any], batches: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield batches, of which there are `count`, as the bar goes on."""
    given, bar.iterable = bar.iterable, batches
    bar.total = count
    try:
        yield from bar
    finally:
        bar.iterable = given
