"""Make batches from a DataLoader over tensors without per-row Python. You may skip this file.

Without it the loader itself is iterated: the same batches, but slower.

    is_in_memory(loader)?    torch's own DataLoader, collate and datasets, all plain tensors;
                             any other loader stays as it is
    iter(InMemoryBatches(loader)):
        draw what the loader draws at its start: an iterator of its sampler, a seed for its workers
        torch's own samplers    draw the epoch's row numbers at once; cut batches from larger blocks
        any other sampler       ask it batch by batch, as early and as often as the loader does

A DataLoader fetches and collates row by row, and starts its workers again each epoch. Here no
worker is started. The batches, their order and the state of every random generator afterwards are
those of iterating the loader itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SequentialSampler,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from minikeras.arrays import FetchedRows, TensorRows
from minikeras.data.arrays import as_rows, check_no_path, unequal_lengths
from minikeras.sources import Fetch
from minikeras.support.loaders import asked, base_of, draw_seed, drawn, draws_at_once

# bytes gathered at once: from 64 KiB on no faster, and small next to data of any size
BLOCK = 2**18
ALIGNED = 64  # bytes; where torch's own memory begins
# index_select has no kernel for these: rows are picked as numbers of the same size, whose bits stay
PICKED_AS = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}

# --- which loaders --------------------------------------------------------------------------------


def is_in_memory(loader: Any) -> bool:
    """Tell whether `InMemoryBatches` surely yields what this loader yields.

    timeout, multiprocessing_context and pin_memory do not matter: no worker is started that could
    be late, and the device decides about pinning.

    >>> X, y = torch.zeros(10, 2), torch.zeros(10, 1)
    >>> is_in_memory(DataLoader(TensorDataset(X, y), batch_size=4, shuffle=True, num_workers=2))
    True
    >>> is_in_memory(DataLoader(list(zip(X, y)), batch_size=4))
    False
    """
    if type(loader) is not DataLoader or loader.batch_sampler is None:
        return False
    if loader.collate_fn is not default_collate:
        return False
    # the seed of persistent workers is drawn once, unseen from outside
    if loader.worker_init_fn or loader.persistent_workers:
        return False
    if not getattr(loader, "in_order", True):
        return False
    # these the loader refuses by itself
    if loader.num_workers and loader.prefetch_factor == 0:
        return False
    if not loader.num_workers and loader.timeout != 0:
        return False
    return _has_plain_rows(loader.dataset, loader.num_workers)


def _has_plain_rows(dataset: Any, num_workers: int) -> bool:
    tensors = _tensors(dataset)
    if not tensors or not all(map(_is_plain, tensors)):
        return False
    if len({len(tensor) for tensor in tensors}) > 1:
        return False
    if num_workers and any(tensor.device.type != "cpu" for tensor in tensors):
        return False
    try:
        _rows(dataset, {})
    except (TypeError, IndexError):  # raised where and when the loader raises it
        return False
    return True


def _tensors(dataset: Any) -> list[Any]:
    """Return the tensors, or whatever a StackDataset is made of; none for another dataset."""
    base = base_of(dataset)
    if type(base) is TensorDataset:
        return list(base.tensors)
    if type(base) is StackDataset:
        return list(base.datasets.values() if type(base.datasets) is dict else base.datasets)
    return []


def _is_plain(tensor: Any) -> bool:
    # neither a Parameter nor a subclass, which may index in its own way
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.ndim == 0:
        return False
    return not (tensor.is_nested or tensor.requires_grad or tensor.is_quantized)


# --- which rows -----------------------------------------------------------------------------------


def _rows(dataset: Any, converted: dict[int, tuple[Any, Tensor]]) -> Tensor:
    """Return the tensors' row for each row of a dataset, (rows,) int64, none negative.

    Args:
        converted: keeps the lists of Subsets, each with its tensor.
    """
    if type(dataset) is not Subset:
        return torch.arange(len(dataset))
    inner: Any = dataset.dataset
    indices = dataset.indices
    key = id(indices)
    if type(indices) is not list:
        rows = torch.arange(len(inner))[_as_rows(indices)]
    elif key in converted and converted[key][0] == indices:
        rows = converted[key][1]  # comparing takes a fortieth of converting
    else:
        rows = torch.arange(len(inner))[_as_rows(indices)]
        converted[key] = indices.copy(), rows
    return _rows(inner, converted)[rows] if type(inner) is Subset else rows


def _as_rows(indices: Any) -> Tensor:
    """Return a Subset's indices, (rows,) int64.

    Raises:
        TypeError: they may mean something else, as a mask or a Series does.
    """
    if type(indices) not in (list, tuple, range, np.ndarray, Tensor):
        raise TypeError
    if getattr(indices, "is_cuda", False):
        raise TypeError
    array = np.asarray(indices)
    if array.dtype.kind != "i" or array.ndim != 1:
        raise TypeError
    return torch.from_numpy(array.astype(np.int64))


# --- their tensors --------------------------------------------------------------------------------


def gathered(
    tensors: list[Tensor], order: Tensor | None, batch_size: int, device: torch.device | None = None
) -> Iterator[list[Tensor]]:
    """Yield the rows of tensors in batches, in memory of their own: a layer may work in place.

    Args:
        tensors: all with the same number of rows.
        order: row numbers, (rows,) int64 on the CPU, none negative; default: each row once, in
            order.
        batch_size: rows per batch; the last one may be shorter.
        device: where the batches are wanted; default: where the tensors are.

    >>> list(gathered([torch.tensor([10, 11, 12])], torch.tensor([2, 0, 1]), batch_size=2))
    [[tensor([12, 10])], [tensor([11])]]
    """
    if order is None:
        yield from _in_order(resident(tensors, tensors[0].size(0), device), batch_size, device)
        return
    tensors = resident(tensors, len(order), device)
    order = order.to(tensors[0].device)
    rest = order
    batches, filler = _choose_block(tensors, batch_size)
    if batches:
        full = len(order) // batch_size * batch_size
        table = torch.nn.functional.pad(order[:full].view(-1, batch_size), (0, filler))
        rest = order[full:]
        for block in table.split(batches) if full else ():
            rows = block.flatten()
            pieces = []
            for tensor in tensors:
                pieces.append(_cut(_take(tensor, rows, device), len(block), batch_size, filler))
            yield from map(list, zip(*pieces, strict=True))
    for rows in rest.split(batch_size) if len(rest) else ():
        yield [_take(tensor, rows, device) for tensor in tensors]


def _in_order(
    tensors: list[Tensor], batch_size: int, device: torch.device | None
) -> Iterator[list[Tensor]]:
    """Yield each row once, in order: blocks of several batches are copied at once, then cut."""
    total = tensors[0].size(0)
    start = 0
    batches, filler = _choose_block(tensors, batch_size)
    while batches and start + batch_size <= total:
        count = min(batches, (total - start) // batch_size)
        stop = start + count * batch_size
        pieces = []
        for tensor in tensors:
            block = _slice(tensor, start, stop, device)
            if filler:
                padded = block.new_empty((count, batch_size + filler, *block.shape[1:]))
                padded[:, :batch_size] = block.unflatten(0, (count, batch_size))
                block = padded.flatten(0, 1)
            pieces.append(_cut(block, count, batch_size, filler))
            del block  # its batches alone keep it, so that the next block may get its memory
        yield from map(list, zip(*pieces, strict=True))
        start = stop
    for begin in range(start, total, batch_size):
        yield [_slice(tensor, begin, begin + batch_size, device) for tensor in tensors]


def _choose_block(tensors: list[Tensor], batch_size: int) -> tuple[int, int]:
    """Return how many batches are copied at once, 0 for each by itself, and the rows of filler.

    Filler behind the rows of a batch lets the next begin at a multiple of 64 bytes, as memory of
    its own would: matrix products of the same numbers differ in the last bit from one alignment to
    another.
    """
    if not all(map(_is_plain, tensors)):
        return 0, 0
    bytes_of_row = []
    for tensor in tensors:
        bytes_of_row.append(math.prod(tensor.shape[1:]) * tensor.element_size())
    step = max(ALIGNED // math.gcd(ALIGNED, width) for width in bytes_of_row)
    filler = -batch_size % step
    batches = BLOCK // max(1, (batch_size + filler) * sum(bytes_of_row))
    # large batches gain nothing from a block, tiny ones would be mostly filler
    if batches < 2 or filler > batch_size:
        return 0, 0
    return batches, filler


def _cut(block: Tensor, count: int, batch_size: int, filler: int) -> tuple[Tensor, ...]:
    """Cut a block into its batches; two batches share the block but no byte of it.

    Not by `split`: its pieces are views that autograd follows, and `batch *= parameter` on one is
    an error. The price: a batch that is kept keeps its block, BLOCK bytes.
    """
    if not filler:
        return torch.unsafe_split(block, batch_size)
    return torch.unsafe_split_with_sizes(block, [batch_size, filler] * count)[::2]


def _slice(tensor: Tensor, start: int, stop: int, device: torch.device | None) -> Tensor:
    """Return rows from start to stop on the device, contiguous and in memory of their own."""
    wanted = tensor.device if device is None else device
    return tensor[start:stop].to(wanted, copy=True, memory_format=torch.contiguous_format)


def _take(tensor: Tensor, rows: Tensor, device: torch.device | None) -> Tensor:
    """Return rows of a tensor on the device, contiguous as stacked rows are.

    `tensor[rows]` would keep channels_last strides.
    """
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
    """Move tensors to the device if they fit well and at least half of their rows are wanted.

    They are copied in each epoch, which takes no longer than moving its batches: the user may have
    changed them in between.
    """
    if device is None or device.type != "cuda":
        return tensors
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return tensors
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    free, _ = torch.cuda.mem_get_info(device)
    is_half_wanted = 2 * rows >= tensors[0].size(0)
    if is_half_wanted and 4 * size <= free:
        return [tensor.to(device) for tensor in tensors]
    return tensors


class InMemoryBatches:
    """The batches of a loader for which `is_in_memory` is true.

    They are on the device; default: where the loader's tensors are.

    >>> loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=2)
    >>> list(InMemoryBatches(loader))
    [[tensor([0, 1])], [tensor([2, 3])], [tensor([4])]]
    """

    is_exact = True  # reading again from the same random state gives the same batches

    def __init__(self, loader: DataLoader[Any], device: torch.device | None = None) -> None:
        self.loader = loader
        self.device = device
        # Subsets' lists of indices, each with its tensor
        self.converted: dict[int, tuple[Any, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        loader = self.loader
        sampler: Any = loader.batch_sampler
        if not draws_at_once(sampler):
            return self.along(iter)
        draw_seed(loader)
        order = None  # without workers, torch draws the order when the first batch is asked for
        if loader.num_workers:
            order = drawn(sampler.sampler)
        return self._restore_names(self._at_once(sampler, order))

    def first(self) -> Any:
        """Return a copy of the first batch, None if the order is drawn."""
        sampler: Any = self.loader.batch_sampler
        if type(sampler) is not BatchSampler or type(sampler.sampler) is not SequentialSampler:
            return None
        dataset: Any = self.loader.dataset
        rows = range(min(sampler.batch_size, len(dataset)))
        return default_collate([dataset[row] for row in rows]) if rows else None

    def along(self, iterate: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
        """Return an iterator that asks the sampler batch by batch.

        Args:
            iterate: returns an iterator of the batch sampler.
        """
        return self._restore_names(self._one_by_one(asked(self.loader, iterate)))

    def of(self, shares: list[Any]) -> Iterator[Any]:
        """Return an iterator of the batches of these row numbers, a tensor or list for each."""
        if not _are_alike(shares):
            return self._restore_names(self._one_by_one(iter(shares)))
        rows = _rows(self.loader.dataset, self.converted)
        tensors = _tensors(self.loader.dataset)
        size = max(len(shares[0]), 1)
        parts = []
        for some in (shares[:-1], shares[-1:]):  # the last one may be shorter
            if some:
                parts.append(gathered(tensors, rows[torch.cat(some)], size, self.device))
        return self._restore_names(chain(*parts))

    def _restore_names(self, batches: Iterator[list[Tensor]]) -> Iterator[Any]:
        """Return batches as dicts if the dataset is a StackDataset with names."""
        names = getattr(base_of(self.loader.dataset), "datasets", None)
        if type(names) is dict:
            return (dict(zip(names, batch, strict=True)) for batch in batches)
        return batches

    def _at_once(self, sampler: BatchSampler, order: Tensor | None) -> Iterator[list[Tensor]]:
        dataset = self.loader.dataset
        size = sampler.batch_size
        tensors = _tensors(dataset)
        rows = len(sampler.sampler)  # type: ignore[arg-type]
        is_in_order = type(sampler.sampler) is SequentialSampler and type(dataset) is not Subset
        if is_in_order and rows <= len(tensors[0]):
            if sampler.drop_last:
                rows -= rows % size
            tensors = [tensor[:rows] for tensor in tensors]
            yield from gathered(tensors, None, size, self.device)
            return
        if order is None:
            order = drawn(sampler.sampler)
        if sampler.drop_last:
            order = order[: len(order) // size * size]
        order = _rows(dataset, self.converted)[order]
        yield from gathered(tensors, order, size, self.device)

    def _one_by_one(self, numbers: Iterator[Any]) -> Iterator[list[Tensor]]:
        rows = _rows(self.loader.dataset, self.converted)
        tensors = resident(_tensors(self.loader.dataset), len(rows), self.device)
        for batch_rows in map(list, numbers):
            try:
                picked = rows[
                    torch.from_numpy(np.fromiter(map(index, batch_rows or [None]), np.int64))
                ]
            except TypeError:
                # no row numbers: slices, lists of rows; or none at all, which is the loader's error
                batch = default_collate([self.loader.dataset[row] for row in batch_rows])
                yield list(batch.values()) if type(batch) is dict else batch
            else:
                yield [_take(tensor, picked, self.device) for tensor in tensors]


def _are_alike(shares: list[Any]) -> bool:
    """Tell whether shares are tensors of one length, but for the last, which may be shorter."""
    if not shares or not isinstance(shares[-1], Tensor):
        return False
    for share in shares[:-1]:
        if not isinstance(share, Tensor) or len(share) != len(shares[0]):
            return False
    return True


class FastFetch(Fetch):
    """Make batches from rows in memory, whole tensors at a time."""

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
