"""Batches without per-row Python: what a DataLoader over tensors yields, each batch fetched whole.

    is_in_memory(loader)?    exactly torch's own DataLoader, collate and datasets, all plain tensors; else left as it is
    iter(InMemoryBatches(loader)):
        what the loader draws at its start: an iterator of its sampler, a seed for its workers
        torch's own samplers    the epoch's row numbers drawn at once; batches cut from gathered blocks
        any other sampler       asked batch by batch, as early and as often as the loader asks it; one gather a batch

A DataLoader fetches and collates row by row, and starts its workers anew each epoch. Here no worker is started. The
batches, their order and the state of every random generator afterwards are those of iterating the loader itself.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain
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
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from minikeras.arrays import FetchedRows, TensorRows
from minikeras.data.arrays import as_rows, check_no_path, unequal_lengths
from minikeras.sources import Fetch

BLOCK = (
    2**18
)  # bytes gathered at once: from 64 KiB on no faster, and small beside any data worth a thought
ALIGNED = 64  # bytes; where torch's own memory begins
DRAWN_AT_ONCE = (
    SequentialSampler,
    RandomSampler,
    WeightedRandomSampler,
    SubsetRandomSampler,
    DistributedSampler,
)
# index_select has no kernel for these: rows are picked as numbers of the same size, whose bits stay
PICKED_AS = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
DRAWN_FOR: weakref.WeakSet[DataLoader[Any]] = (
    weakref.WeakSet()
)  # persistent workers, which keep their seed

# --- what can be served -----------------------------------------------------------------------------------------------


def is_in_memory(loader: Any) -> bool:
    """Whether `InMemoryBatches` yields what this loader yields; anything it cannot be sure of is left to the loader.

    timeout, multiprocessing_context and pin_memory do not matter: no worker is started that could be late, and pinning
    is decided by the device.

    >>> X, y = torch.zeros(10, 2), torch.zeros(10, 1)
    >>> is_in_memory(DataLoader(TensorDataset(X, y), batch_size=4, shuffle=True, num_workers=2))
    True
    >>> is_in_memory(DataLoader(list(zip(X, y)), batch_size=4))
    False
    """
    return (
        type(loader) is DataLoader
        and loader.batch_sampler is not None
        and loader.collate_fn is default_collate
        and not (
            loader.worker_init_fn or loader.persistent_workers
        )  # whose seed is drawn once, unseen from outside
        and getattr(loader, "in_order", True)
        and (
            loader.prefetch_factor != 0 if loader.num_workers else loader.timeout == 0
        )  # the loader refuses these
        and _plain_rows(loader.dataset, loader.num_workers)
    )


def _plain_rows(dataset: Any, num_workers: int) -> bool:
    tensors = _tensors(dataset)
    if (
        not tensors
        or not all(map(_is_plain, tensors))
        or len({len(tensor) for tensor in tensors}) > 1
    ):
        return False
    if num_workers and any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    try:
        _rows(dataset, {})
    except (TypeError, IndexError):  # raised where and when the loader raises it
        return False
    return True


def base_of(dataset: Any) -> Any:
    """What a dataset is a Subset of, or itself."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def _tensors(dataset: Any) -> list[Any]:
    """The tensors, or whatever a StackDataset is made of; none for a dataset of another kind."""
    base = base_of(dataset)
    if type(base) is TensorDataset:
        return list(base.tensors)
    if type(base) is StackDataset:
        return list(base.datasets.values() if type(base.datasets) is dict else base.datasets)
    return []


def _is_plain(tensor: Any) -> bool:
    return (
        type(tensor) is Tensor  # neither a Parameter nor a subclass, which may index in its own way
        and tensor.layout is torch.strided
        and tensor.ndim > 0
        and not (tensor.is_nested or tensor.requires_grad or tensor.is_quantized)
    )


# --- which rows -------------------------------------------------------------------------------------------------------


def _rows(dataset: Any, converted: dict[int, tuple[Any, Tensor]]) -> Tensor:
    """The tensors' row for each row of a dataset, (rows,) int64, none negative; `converted` keeps lists as tensors."""
    if type(dataset) is not Subset:
        return torch.arange(len(dataset))
    inner: Any = dataset.dataset
    indices, key = dataset.indices, id(dataset.indices)
    if type(indices) is not list:
        rows = torch.arange(len(inner))[_as_rows(indices)]
    elif (
        key in converted and converted[key][0] == indices
    ):  # comparing takes a fortieth of converting
        rows = converted[key][1]
    else:
        rows = torch.arange(len(inner))[_as_rows(indices)]
        converted[key] = indices.copy(), rows
    return _rows(inner, converted)[rows] if type(inner) is Subset else rows


def _as_rows(indices: Any) -> Tensor:
    """A Subset's indices, (rows,) int64; a TypeError where they may mean something else, as a mask or a Series does."""
    if type(indices) not in (list, tuple, range, np.ndarray, Tensor) or getattr(
        indices, "is_cuda", False
    ):
        raise TypeError
    array = np.asarray(indices)
    if array.dtype.kind != "i" or array.ndim != 1:
        raise TypeError
    return torch.from_numpy(array.astype(np.int64))


def draw_seed(loader: DataLoader[Any]) -> None:
    """The draw that a loader makes for its workers at each `iter()`, made by torch itself on a loader of nothing.

    Where its workers persist it is made once.
    """
    if loader not in DRAWN_FOR:
        iter(DataLoader((), batch_size=None, generator=loader.generator))  # type: ignore[arg-type]
    if loader.persistent_workers:
        DRAWN_FOR.add(loader)


def draws_at_once(batch_sampler: Any) -> bool:
    """Whether nothing else can draw between this sampler's draws, so that an epoch's order may be drawn in one go."""
    if type(batch_sampler) is not BatchSampler or type(batch_sampler.sampler) not in DRAWN_AT_ONCE:
        return False
    return (
        getattr(batch_sampler.sampler, "generator", None) is None
    )  # the user's own may be drawn from in mid-epoch


def drawn(sampler: Any) -> Tensor:
    """The row numbers of an epoch, (rows,) int64, with the random draws of iterating the sampler."""
    if type(sampler) is SequentialSampler:
        return torch.arange(len(sampler))
    if type(sampler) is RandomSampler and not sampler.replacement:
        rows = len(sampler.data_source)
        if sampler.num_samples == rows and _shuffles_as_we_do():
            return _shuffled(rows)
    return torch.from_numpy(np.fromiter(map(index, sampler), np.int64))


def _shuffled(rows: int) -> Tensor:
    """What RandomSampler draws, without handing each number through Python: that is half the cost of a small batch."""
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=1)
def _shuffles_as_we_do() -> bool:
    """Whether the installed torch's RandomSampler draws as `_shuffled` does: seen by trying, not by its version."""
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        theirs, after = list(RandomSampler(range(100))), torch.get_rng_state()
        torch.set_rng_state(before)
        return _shuffled(100).tolist() == theirs and torch.equal(torch.get_rng_state(), after)


def asked(loader: DataLoader[Any], iterate: Callable[[Any], Iterator[Any]] = iter) -> Iterator[Any]:
    """The row numbers of each batch, from a sampler asked as the loader asks it: it may draw whenever it is asked.

    Args:
        loader: whose batch sampler is asked.
        iterate: gives an iterator of the batch sampler.
    """
    sampler: Any = loader.batch_sampler
    rows: Iterator[Any] = iterate(sampler)
    draw_seed(loader)
    if not loader.num_workers:
        return _each(rows)
    rows = iterate(
        sampler
    )  # a loader with workers asks anew, and has their first tasks handed out before the first batch
    waiting: deque[Any] = deque()
    for _ in range(loader.num_workers * (loader.prefetch_factor or 0)):
        _ask_once(rows, waiting)  # asked again even after its end, as the loader does
    return _one_behind(rows, waiting)


def _each(rows: Iterator[Any]) -> Iterator[Any]:
    while (
        batch := next(rows, None)
    ) is not None:  # `for` would ask for an iterator once more, and that may draw
        yield batch


def _ask_once(rows: Iterator[Any], waiting: deque[Any]) -> None:
    if (batch := next(rows, None)) is not None:
        waiting.append(list(batch))  # a copy: some samplers fill one list anew each time


def _one_behind(rows: Iterator[Any], waiting: deque[Any]) -> Iterator[Any]:
    while waiting:
        batch = waiting.popleft()
        _ask_once(rows, waiting)
        yield batch


# --- their tensors ----------------------------------------------------------------------------------------------------


def gathered(
    tensors: list[Tensor], order: Tensor | None, batch_size: int, device: torch.device | None = None
) -> Iterator[list[Tensor]]:
    """The rows of tensors in batches, in memory that is not the tensors' own: a layer may work in place.

    Args:
        tensors: of as many rows each.
        order: row numbers, (rows,) int64 on the CPU, none negative; default: each row once, in order.
        batch_size: rows a batch; the last one may be shorter.
        device: where the batches are wanted; default: where the tensors are.

    >>> list(gathered([torch.tensor([10, 11, 12])], torch.tensor([2, 0, 1]), batch_size=2))
    [[tensor([12, 10])], [tensor([11])]]
    """
    if order is None:
        tensors = resident(tensors, tensors[0].size(0), device)
        for start in range(0, tensors[0].size(0), batch_size):
            yield [_slice(tensor, start, start + batch_size, device) for tensor in tensors]
        return
    tensors = resident(tensors, len(order), device)
    order = order.to(tensors[0].device)
    alone = order
    if len(order) >= 2 * batch_size and all(map(_is_plain, tensors)):
        spaced, alone, sizes = _spaced(tensors, order, batch_size)
        for part in spaced:
            # Two batches share a block but no byte of it. Not `split`: its pieces are views that autograd follows, and
            # `batch *= parameter` on one is an error. The price: a batch that is kept keeps its block, BLOCK bytes.
            blocks = [
                torch.unsafe_split_with_sizes(
                    _take(tensor, part.flatten(), device), sizes * len(part)
                )[::2]
                for tensor in tensors
            ]
            yield from map(list, zip(*blocks, strict=True))
    for rows in alone.split(batch_size) if len(alone) else ():
        yield [_take(tensor, rows, device) for tensor in tensors]


def _spaced(
    tensors: list[Tensor], order: Tensor, batch_size: int
) -> tuple[tuple[Tensor, ...], Tensor, list[int]]:
    """The order as blocks of (batches, rows), the rest of it for batches alone, and a batch's rows and filler rows.

    Filler (row 0) lets each batch begin at a multiple of 64 bytes, as memory of its own would: matrix products of the
    same numbers differ in the last bit from one alignment to another.
    """
    widths = [
        math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in tensors
    ]  # bytes a row
    step = max(ALIGNED // math.gcd(ALIGNED, width) for width in widths)
    filler = -batch_size % step
    batches = BLOCK // max(1, (batch_size + filler) * sum(widths))
    if (
        batches < 2 or filler > batch_size
    ):  # large batches gain nothing from a block, tiny ones would be mostly filler
        return (), order, []
    full = len(order) // batch_size * batch_size
    table = torch.nn.functional.pad(order[:full].view(-1, batch_size), (0, filler))
    return table.split(batches), order[full:], [batch_size, filler]


def _slice(tensor: Tensor, start: int, stop: int, device: torch.device | None) -> Tensor:
    """Rows from start to stop on the device, contiguous and in memory of their own."""
    rows = tensor[start:stop] if device is None else tensor[start:stop].to(device)
    return (
        rows.clone(memory_format=torch.contiguous_format)
        if rows.device == tensor.device
        else rows.contiguous()
    )


def _take(tensor: Tensor, rows: Tensor, device: torch.device | None) -> Tensor:
    """Rows of a tensor on the device, contiguous as stacked rows are: `tensor[rows]` keeps channels_last strides."""
    dtype = tensor.dtype
    if dtype in PICKED_AS:
        tensor = tensor.view(PICKED_AS[dtype])
    if device is None or device.type != "cuda" or tensor.device.type != "cpu":
        picked = tensor.index_select(0, rows.to(tensor.device))
        picked = picked if device is None else picked.to(device)
    else:
        pinned = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
        picked = torch.index_select(tensor, 0, rows, out=pinned).to(device, non_blocking=True)
    return picked.view(dtype) if dtype in PICKED_AS else picked


def resident(tensors: list[Tensor], rows: int, device: torch.device | None) -> list[Tensor]:
    """The tensors on the device where that is worth it: they fit well, and at least half of their rows are wanted.

    Copied anew each epoch, which takes no longer than moving its batches: the user may have changed them in between.
    """
    if (
        device is None
        or device.type != "cuda"
        or any(tensor.device.type != "cpu" for tensor in tensors)
    ):
        return tensors
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    free, _ = torch.cuda.mem_get_info(device)
    wanted = 2 * rows >= tensors[0].size(0)
    return [tensor.to(device) for tensor in tensors] if wanted and 4 * size <= free else tensors


class InMemoryBatches:
    """The batches of a loader for which `is_in_memory` holds, on the device; default: where its tensors are.

    >>> loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=2)
    >>> list(InMemoryBatches(loader))
    [[tensor([0, 1])], [tensor([2, 3])], [tensor([4])]]
    """

    def __init__(self, loader: DataLoader[Any], device: torch.device | None = None) -> None:
        self.loader = loader
        self.device = device
        self.converted: dict[
            int, tuple[Any, Tensor]
        ] = {}  # Subsets' lists of indices, each with its tensor

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        loader = self.loader
        sampler: Any = loader.batch_sampler
        if draws_at_once(sampler):
            draw_seed(loader)
            # without workers, torch draws the order when the first batch is asked for
            return self._named(
                self._at_once(sampler, drawn(sampler.sampler) if loader.num_workers else None)
            )
        return self._named(self._one_by_one(asked(loader)))

    def first(self) -> Any:
        """Return a copy of the first batch, None if the order is drawn."""
        sampler: Any = self.loader.batch_sampler
        if type(sampler) is not BatchSampler or type(sampler.sampler) is not SequentialSampler:
            return None
        dataset: Any = self.loader.dataset
        rows = range(min(sampler.batch_size, len(dataset)))
        return default_collate([dataset[row] for row in rows]) if rows else None

    def along(self, order: Iterator[Any]) -> Iterator[Any]:
        """The batches of these row numbers, asked for one by one."""
        return self._named(self._one_by_one(order))

    def of(self, shares: list[Any]) -> Iterator[Any]:
        """The batches of these row numbers, one tensor or list for each."""
        whole = all(
            isinstance(share, Tensor) and len(share) == len(shares[0]) for share in shares[:-1]
        )
        if not shares or not whole or not isinstance(shares[-1], Tensor):
            return self._named(self._one_by_one(iter(shares)))
        rows, tensors = _rows(self.loader.dataset, self.converted), _tensors(self.loader.dataset)
        orders = [torch.cat(order) for order in (shares[:-1], shares[-1:]) if order]
        size = max(len(shares[0]), 1)
        return self._named(
            chain(*(gathered(tensors, rows[order], size, self.device) for order in orders))
        )

    def _named(self, batches: Iterator[list[Tensor]]) -> Iterator[Any]:
        names = getattr(base_of(self.loader.dataset), "datasets", None)
        return (
            (dict(zip(names, batch, strict=True)) for batch in batches)
            if type(names) is dict
            else batches
        )

    def _at_once(self, sampler: BatchSampler, order: Tensor | None) -> Iterator[list[Tensor]]:
        dataset, size = self.loader.dataset, sampler.batch_size
        rows = len(sampler.sampler)  # type: ignore[arg-type]
        in_order = type(sampler.sampler) is SequentialSampler and type(dataset) is not Subset
        if in_order and rows <= len(_tensors(dataset)[0]):
            rows -= rows % size if sampler.drop_last else 0
            yield from gathered(
                [tensor[:rows] for tensor in _tensors(dataset)], None, size, self.device
            )
            return
        order = drawn(sampler.sampler) if order is None else order
        if sampler.drop_last:
            order = order[: len(order) // size * size]
        yield from gathered(
            _tensors(dataset), _rows(dataset, self.converted)[order], size, self.device
        )

    def _one_by_one(self, numbers: Iterator[Any]) -> Iterator[list[Tensor]]:
        rows = _rows(self.loader.dataset, self.converted)
        tensors = resident(_tensors(self.loader.dataset), len(rows), self.device)
        for asked_for in map(list, numbers):
            try:
                picked = rows[
                    torch.from_numpy(np.fromiter(map(index, asked_for or [None]), np.int64))
                ]
            except (
                TypeError
            ):  # no row numbers: slices, lists of rows; or none at all, which is the loader's error
                batch = default_collate([self.loader.dataset[row] for row in asked_for])
                yield list(batch.values()) if type(batch) is dict else batch
            else:
                yield [_take(tensor, picked, self.device) for tensor in tensors]


class FastFetch(Fetch):
    """Rows in memory as batches, whole tensors at a time."""

    def loader(self, loader: Any, device: torch.device | None) -> Any:
        """Return `InMemoryBatches` if it yields what the loader yields, else the loader."""
        return InMemoryBatches(loader, device) if is_in_memory(loader) else loader

    def check(self, data: Any, name: str) -> None:
        """Refuse a path or a text."""
        check_no_path(data, name)

    def as_rows(self, array: Any, name: str) -> TensorRows | FetchedRows:
        """Return the rows of an array of any library; read-only, and copied only if needed."""
        return as_rows(array, name)

    def unequal_lengths(self, name: str, arrays: Any, lengths: list[int]) -> ValueError:
        """Return the error for arrays that have not the same number of rows, with the reason."""
        return unequal_lengths(name, arrays, lengths)

    def rows(
        self,
        tensors: list[Tensor],
        order: Tensor | None,
        batch_size: int,
        device: torch.device | None,
    ) -> Iterator[list[Tensor]]:
        """Yield the rows of tensors in batches."""
        return gathered(tensors, order, batch_size, device)
