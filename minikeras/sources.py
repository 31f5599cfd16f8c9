"""From what the user has to batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from minikeras.arrays import FetchedRows, TensorRows, array_to_tensor, is_array
from minikeras.errors import check_positive_int
from minikeras.nests import clone_tensor, leaves, map_leaves

ONLY_ONCE = (
    "which can be iterated only once. Pass a list of batches or an object whose __iter__ starts "
    "again"
)


class Fetch:
    """How rows in memory become batches, plainly; `data.in_memory` is faster."""

    def loader(self, loader: Any, device: torch.device | None) -> Any:
        """Return what gives the batches of the user's loader."""
        return loader

    def check(self, data: Any, name: str) -> None:
        """Refuse what cannot be data, such as a path."""

    def as_rows(self, array: Any, name: str) -> TensorRows | FetchedRows:
        """Return the rows of a tensor, a NumPy array or a DataFrame of numbers."""
        if isinstance(array, Tensor):
            return TensorRows(array)
        if not isinstance(array, np.ndarray):
            array = np.asarray(array)
        return TensorRows(array_to_tensor(array, name))

    def unequal_lengths(self, name: str, arrays: Any, lengths: list[int]) -> ValueError:
        """Return the error for arrays that have not the same number of rows."""
        return ValueError(f"{name} holds arrays of {lengths} rows; expected as many rows in each.")

    def rows(
        self,
        tensors: list[Tensor],
        order: Tensor | None,
        batch_size: int,
        device: torch.device | None,
    ) -> Iterator[list[Tensor]]:
        """Yield the rows of tensors in batches, in memory of their own: a layer may work in place.

        Args:
            order: row numbers, (rows,) int64 on the CPU; None for each row once, in order.
        """
        numbers = torch.arange(len(tensors[0])) if order is None else order
        for rows in numbers.split(batch_size) if len(numbers) else ():
            batch = []
            for tensor in tensors:
                picked = tensor[rows.to(tensor.device)].contiguous()
                batch.append(picked if device is None else picked.to(device))
            yield batch


PLAIN_FETCH = Fetch()


def as_batches(
    data: Any,
    name: str,
    batch_size: int | None = None,
    shuffle: bool = False,
    device: Any = None,
    passes: int = 1,
    fetch: Fetch = PLAIN_FETCH,
) -> Iterable[Any]:
    """An iterable of batches from anything `fit`, `evaluate` and `predict` accept.

    Args:
        data: a DataLoader, a Dataset, a re-iterable of batches, or arrays: X, (X, y) or (X, y,
            sample_weight).
        name: what the user calls it, for error messages.
        batch_size: rows a batch of data that is not batched yet, default 32.
        shuffle: whether a Dataset's or the arrays' rows come in a new random order each epoch.
        device: where the batches are wanted; what is in memory is fetched there, the rest is
            moved later.
        passes: how often it is to be iterated.
        fetch: how rows in memory become batches.

    Raises:
        TypeError: data of another kind, such as a path, or arrays of something other than numbers.
        ValueError: arrays of different lengths, a batch_size for data that is batched already,
            or a generator for more than one pass.
    """
    fetch.check(data, name)
    # a zip or a generator is used up by one; an iterator of the user's may start again
    if (
        passes > 1
        and isinstance(data, Iterator)
        and type(data).__module__ in ("builtins", "itertools")
    ):
        arguments = {"dl_train": "steps_per_epoch", "dl_val": "validation_steps"}
        steps = f", or give {arguments[name]}" if name in arguments else ""
        raise ValueError(
            f"{name} is a {type(data).__name__}, {ONLY_ONCE}{steps}. It was to last for {passes} "
            f"epochs."
        )
    size = 32 if batch_size is None else check_positive_int("batch_size", batch_size)
    if isinstance(data, Dataset):
        if find_length(data) == 0:
            raise make_empty_error(data, name)
        shuffle = shuffle and not isinstance(data, IterableDataset)
        return cast(Iterable[Any], fetch.loader(DataLoader(data, size, shuffle=shuffle), device))
    if not is_batched(data):
        return ArrayBatches(data, name, size, shuffle, device, fetch)
    if batch_size is not None:
        raise ValueError(
            f"batch_size={batch_size} is for data that is not batched yet, and {name} is a "
            f"{type(data).__name__}, which makes its own batches. Leave batch_size out, or set it "
            f"where {name} is made."
        )
    if not hasattr(data, "__iter__"):
        remedy = ""
        if hasattr(data, "__getitem__"):
            # Python would index it on and on: batches past the end never stop
            remedy = (
                " Give it an __iter__, or derive it from torch.utils.data.Dataset if its items are "
                "rows."
            )
        raise TypeError(
            f"{name} must be a DataLoader, a Dataset, an iterable of (features, labels) batches or "
            f"arrays (X, y), got {type(data).__name__}.{remedy}"
        )
    return cast(Iterable[Any], fetch.loader(data, device))


def is_batched(data: Any) -> bool:
    """Tell whether data comes in batches, as a DataLoader does; a tuple is (X, y)."""
    return not (isinstance(data, (Dataset, Mapping, tuple)) or is_array(data))


class ArrayBatches:
    """Batches cut from arrays in memory; shuffled again at each iteration if asked for."""

    is_exact = True  # reading again from the same random state gives the same batches

    def __init__(
        self,
        data: Any,
        name: str,
        batch_size: int,
        shuffle: bool,
        device: torch.device | None = None,
        fetch: Fetch = PLAIN_FETCH,
    ) -> None:
        if isinstance(data, tuple) and not data:
            raise ValueError(
                f"{name} is an empty tuple; expected arrays. Pass (X, y) or (X, y, sample_weight)."
            )
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.device = device
        self.fetch = fetch
        if type(data) is tuple:
            # (X, y, None), as code with optional weights gives it
            while len(data) > 1 and data[-1] is None:
                data = data[:-1]
        self.arrays = map_leaves(lambda leaf: fetch.as_rows(leaf, name), data)
        lengths = [len(rows) for rows in leaves(self.arrays)]
        if len(set(lengths)) != 1:
            raise fetch.unequal_lengths(name, self.arrays, lengths)
        self.rows = lengths[0]

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        return self.gathered(torch.randperm(self.rows) if self.shuffle else None, self.batch_size)

    def first(self) -> Any:
        """Return a copy of the first batch, None if the order is drawn."""
        size = min(self.batch_size, self.rows)
        if self.shuffle or size == 0:
            return None
        return map_leaves(clone_tensor, next(self.gathered(torch.arange(size), size)))

    def order(self) -> Tensor:
        """The row numbers of an epoch, (rows,) int64."""
        return torch.randperm(self.rows) if self.shuffle else torch.arange(self.rows)

    def of(self, shares: list[Tensor]) -> Iterator[Any]:
        """The batches of these row numbers; all but the last have as many."""
        for order in (shares[:-1], shares[-1:]):
            if order:
                yield from self.gathered(torch.cat(order), max(len(order[0]), 1))

    def gathered(self, order: Tensor | None, batch_size: int) -> Iterator[Any]:
        """The batches of rows in this order, or of all rows."""
        sources = leaves(self.arrays)
        tensors = [rows.tensor for rows in sources if isinstance(rows, TensorRows)]
        if len(tensors) == len(sources):
            batches = self.fetch.rows(tensors, order, batch_size, self.device)
        else:
            batches = self._fetched(sources, tensors, order, batch_size)
        dtypes = [rows.dtype for rows in sources]
        made_wide = any(
            isinstance(rows, TensorRows) and rows.dtype != rows.tensor.dtype for rows in sources
        )

        def widen(batch: list[Any]) -> list[Any]:
            return [tensor.to(dtype) for tensor, dtype in zip(batch, dtypes, strict=True)]

        def nest(batch: list[Any]) -> Any:
            remaining = iter(batch)
            return map_leaves(lambda _: next(remaining), self.arrays)

        if made_wide:
            batches = map(widen, batches)
        if isinstance(self.arrays, (TensorRows, FetchedRows)):  # X alone
            return map(itemgetter(0), batches)
        if type(self.arrays) is tuple and all(
            isinstance(part, (TensorRows, FetchedRows)) for part in self.arrays
        ):  # (X, y), the usual case
            return map(tuple, batches)
        return map(nest, batches)

    def _fetched(
        self, sources: list[Any], tensors: list[Tensor], order: Tensor | None, batch_size: int
    ) -> Iterator[list[Any]]:
        """Yield batches: some parts are fetched by row number, others cut from tensors."""
        numbers = torch.arange(self.rows) if order is None else order
        cut: Iterator[list[Tensor]] | None = None
        if tensors:
            cut = self.fetch.rows(tensors, order, batch_size, self.device)
        for rows in numbers.split(batch_size) if len(numbers) else ():
            from_tensors = iter(next(cut) if cut is not None else ())
            batch: list[Any] = []
            for source in sources:
                if isinstance(source, FetchedRows):
                    part = source.fetch(rows)
                    batch.append(part if self.device is None else part.to(self.device))
                else:
                    batch.append(next(from_tensors))
            yield batch


class ContinuedBatches:
    """`steps` batches per iteration; the next continues where the last one stopped."""

    def __init__(self, batches: Iterable[Any], steps: int, name: str) -> None:
        self.batches = batches
        self.steps = steps
        self.name = name
        self.iterator: Iterator[Any] | None = None
        self.given = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        return self.after(0)

    def after(self, done: int) -> Iterator[Any]:
        """The batches of an epoch of which so many are done, in another process."""
        for _ in range(done, self.steps):
            yield self._next()

    def _next(self) -> Any:
        nothing = object()
        for _ in range(2):  # where the iteration under way has come to its end, a new one
            self.iterator = iter(self.batches) if self.iterator is None else self.iterator
            batch = next(self.iterator, nothing)
            if batch is not nothing:
                self.given += 1
                return batch
            self.iterator = None
        if self.given:
            given = getattr(self.batches, "loader", self.batches)
            why = f"it is a {type(given).__name__}, {ONLY_ONCE}"
            raise ValueError(
                f"{self.name} ended after {self.given} batches, and steps_per_epoch={self.steps} "
                f"needs more: {why}."
            )
        raise make_empty_error(self.batches, self.name)


def find_length(batches: Any) -> int | None:
    """How many batches there are, or None where that is not known ahead."""
    try:
        return len(batches)
    # a DataLoader over an IterableDataset has a len that raises
    except (TypeError, NotImplementedError):
        return None


def make_empty_error(batches: Any, name: str) -> ValueError:
    """The error for data that gave no batch, with the reason."""
    processes, batches = processes_of(batches), getattr(batches, "loader", batches)
    dataset = batches if isinstance(batches, Dataset) else getattr(batches, "dataset", None)
    rows, size = (
        None if dataset is None else find_length(dataset),
        getattr(batches, "batch_size", None),
    )
    reason = "iterating it ended at once"
    if rows == 0 or getattr(batches, "rows", None) == 0:
        reason = "its dataset has no rows" if rows == 0 else "its arrays have no rows"
    elif (
        rows is not None
        and size is not None
        and rows < size * processes
        and getattr(batches, "drop_last", False)
    ):
        each = ""
        if processes > 1:
            each = f" on each of {processes} processes"
        reason = (
            f"drop_last=True drops the only batch, {rows} rows of batch_size={size}{each}. Set "
            "drop_last=False"
        )
    elif isinstance(batches, Iterator):
        reason = f"it is a {type(batches).__name__}, {ONLY_ONCE}"
    return ValueError(f"{name} gave no batch: {reason}.")


def processes_of(batches: Any) -> int:
    """How many processes share these batches."""
    while not hasattr(batches, "world") and hasattr(batches, "batches"):
        batches = batches.batches
    return getattr(getattr(batches, "world", None), "size", 1)
