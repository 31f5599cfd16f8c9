"""Check that all processes were given the same data, of which each uses its share.

A split or a shuffle without a seed gives each process other rows, and then one process validates
on rows that another trains on. Once for each call of fit, evaluate and predict are compared:

row numbers                of Subsets and samplers, exactly: an error
settings                   of DistributedSamplers, which draw the order: an error
arrays and TensorDatasets  a sample of their numbers, but for rounding: a warning
what a Dataset holds       lists and arrays with an item for each row: a warning

The order that a custom sampler has drawn is compared when it is there: an error.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from operator import index
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DistributedSampler,
    StackDataset,
    Subset,
    TensorDataset,
)

from minikeras.arrays import FetchedRows, TensorRows
from minikeras.distributed.world import World
from minikeras.nests import is_sharded, leaves
from minikeras.sources import ArrayBatches, find_length
from minikeras.support.checksums import batch_checksum, checksum

ROWS = 64  # of an array that are compared
COLUMNS = 16  # numbers of such a row
ITEMS = 1_000  # of a list that are compared
SHOWN = 6  # rows, or batches, of an order in a message
LONGEST = 60  # characters of them
ROUNDING = 1e-4  # relative: arrays that were computed on different machines may differ by less


def check_same_data(batches: Any, world: World, name: str) -> None:
    """Check that all processes have the same rows, in the same order; warn of other numbers.

    How many there are is not compared.

    Raises:
        ValueError: they have other row numbers, or a DistributedSampler with other settings.
    """
    found = world.gather(sample_of(batches)) or []
    for rank, other in enumerate(found):
        if found[0][2] != other[2]:
            raise ValueError(
                f"the sampler of {name} is {found[0][2]} in process 0, and {other[2]} in process "
                f"{rank}; expected the same settings in all processes, since each uses its share "
                "of one order. Pass the same shuffle, seed and drop_last, and the same number to "
                "set_epoch."
            )
        if not are_alike(found[0][0], other[0]):
            raise ValueError(describe_difference(name, rank))
    for rank, other in enumerate(found):
        if world.rank == 0 and not are_alike(found[0][1], other[1]):
            warnings.warn(describe_difference(name, rank), stacklevel=2)
            return


def sample_of(batches: Any) -> list[Any]:
    """Return plain values of what must be the same in all processes.

    Row numbers, numbers that may be rounded, and a sampler's settings.
    """
    certain, possible = Sample(), Sample()
    if isinstance(batches, ArrayBatches):
        for rows in leaves(batches.arrays):
            possible.add_rows(rows)
    loader = getattr(batches, "loader", batches)
    add_samplers(loader, certain)
    add_dataset(getattr(loader, "dataset", None), certain, possible)
    return [certain.values(), possible.values(), describe_sampler(loader)]


def describe_sampler(loader: Any) -> str:
    """Return the settings by which a loader's DistributedSampler draws, or that it is another."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)):
        if type(sampler) is DistributedSampler:
            return (
                f"DistributedSampler(shuffle={sampler.shuffle}, seed={sampler.seed}, "
                f"drop_last={sampler.drop_last}) at epoch {sampler.epoch}"
            )
    return "no DistributedSampler"


def describe_difference(name: str, rank: int) -> str:
    """Return the message that one process has other rows than the first."""
    return (
        f"{name} has other rows in process {rank} than in process 0; expected the same rows in the "
        "same order in all processes, since each uses its share of them. Otherwise some rows are "
        "used twice, and others by no process. A split or a shuffle without a seed differs from "
        "process to process. Give it one: random_split(..., "
        "generator=torch.Generator().manual_seed(0)), train_test_split(..., random_state=0), "
        "np.random.default_rng(0). If each process is to read rows of its own, pass an "
        "IterableDataset."
    )


@dataclass(frozen=True)
class OrderSummary:
    """What is compared of an order that a custom sampler has drawn."""

    code: int  # a checksum of all of it
    begin: str  # the first rows, for a message

    @classmethod
    def of(cls, order: list[Any]) -> OrderSummary:
        """Return the summary of a list of row numbers, or of those of each batch."""
        try:
            rows = order
            if order and isinstance(order[0], list):
                rows = [len(batch) for batch in order] + list(chain(*order))
            code = zlib.crc32(np.fromiter(map(index, rows), np.int64).tobytes())
        except (TypeError, OverflowError):  # names of rows, or other objects
            code = batch_checksum(order)
        return cls(code, repr(order[:SHOWN])[1:-1][:LONGEST])


NO_ORDER = OrderSummary(0, "")


def raise_other_order(order: OrderSummary, sampler: Any, world: World, name: str) -> NoReturn:
    """Raise the error that a sampler has drawn different orders in the processes."""
    found = world.gather([order.code, order.begin]) or []
    first_code, first_rows = found[0]
    rank = next(rank for rank, (code, _) in enumerate(found) if code != first_code)
    rows = found[rank][1]
    raise ValueError(
        f"the sampler of {name}, {type(sampler).__name__}, gives other rows in process {rank} than "
        "in process 0; expected all rows, in the same order in all processes, since each uses its "
        f"share of them. They begin with {first_rows} ... in process 0, and with {rows} ... in "
        f"process {rank}. Draw the order from a generator with a seed, the same in all processes, "
        "such as np.random.default_rng(0). If the sampler gives each process its own rows, set its "
        f"attribute num_replicas to {world.size}: they are not divided again then."
    )


def are_alike(first: list[Any], other: list[Any]) -> bool:
    """Tell whether what two processes have sampled are the same rows."""
    if first[0] != other[0] or len(first[1]) != len(other[1]):
        return False
    for (total, size), (other_total, other_size) in zip(first[1], other[1], strict=True):
        if abs(total - other_total) > ROUNDING * max(size, other_size):
            return False
    return True


class Sample:
    """A sample of row numbers, and of the numbers in arrays."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.totals: list[tuple[float, float]] = []

    def values(self) -> list[Any]:
        """Return plain values: row numbers as a checksum, and weighted sums with their size."""
        return [checksum(self.numbers), self.totals]

    def add_items(self, items: Any) -> None:
        """Add a list or an array of row numbers or names."""
        step = max(1, len(items) // ITEMS)
        chosen = items[::step]
        if isinstance(chosen, (Tensor, np.ndarray)):
            chosen = chosen.tolist()
        self.numbers.append(checksum([len(items), *map(str, chosen)]))

    def add_rows(self, rows: Any) -> None:
        """Add rows of an array: the sum of some numbers, each with its weight."""
        if len(rows) == 0:
            return
        numbers = torch.arange(0, len(rows), max(1, len(rows) // ROWS))
        if isinstance(rows, FetchedRows):
            picked = rows.fetch(numbers)
        elif isinstance(rows, np.ndarray):
            picked = torch.from_numpy(rows[numbers.numpy()].astype(np.float64))
        else:
            tensor = rows.tensor if isinstance(rows, TensorRows) else rows
            if tensor.layout is not torch.strided or tensor.is_quantized or is_sharded(tensor):
                return
            picked = tensor.detach()[numbers.to(tensor.device)]
        if picked.is_complex():
            picked = torch.view_as_real(picked)
        table = picked.reshape(len(numbers), -1)
        table = table[:, :: max(1, table.shape[1] // COLUMNS)].cpu().double().nan_to_num()
        if not table.numel():
            return
        weights = torch.arange(1, table.numel() + 1, dtype=torch.float64).reshape(table.shape)
        total = float((weights * table).sum())
        size = float((weights * table.abs()).sum())
        if math.isfinite(size):
            self.totals.append((total, size))


def add_samplers(loader: Any, sample: Sample) -> None:
    """Add the row numbers that the loader's samplers hold."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)):
        for name in ("indices", "weights"):  # of SubsetRandomSampler and WeightedRandomSampler
            items = getattr(sampler, name, None)
            if isinstance(items, (list, tuple, range, Tensor, np.ndarray)):
                sample.add_items(items)


def add_dataset(dataset: Any, certain: Sample, possible: Sample) -> None:
    """Add the row numbers and arrays of a Dataset, and of those inside it."""
    if isinstance(dataset, Subset):
        if isinstance(dataset.indices, (list, tuple, range, Tensor, np.ndarray)):
            certain.add_items(dataset.indices)
        add_dataset(dataset.dataset, certain, possible)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            add_dataset(part, certain, possible)
    elif type(dataset) is TensorDataset:
        for tensor in dataset.tensors:
            possible.add_rows(tensor)
    elif isinstance(dataset, StackDataset):
        parts = dataset.datasets
        for part in parts.values() if isinstance(parts, Mapping) else parts:
            add_dataset(part, certain, possible)
    elif isinstance(dataset, Tensor):
        possible.add_rows(dataset)
    else:
        add_attributes(dataset, possible)


def add_attributes(dataset: Any, sample: Sample) -> None:
    """Add what a custom Dataset holds for its rows: arrays, and lists of numbers or names."""
    length = find_length(dataset)
    for value in getattr(dataset, "__dict__", {}).values():
        if not isinstance(value, (list, tuple, Tensor, np.ndarray)):
            continue
        if find_length(value) != length or not length:
            continue
        if isinstance(value, Tensor) or is_numeric(value):
            sample.add_rows(value)
        elif isinstance(value[0], (int, str)):
            sample.add_items(value)


def is_numeric(value: Any) -> bool:
    """Tell whether this is an array of real numbers."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
