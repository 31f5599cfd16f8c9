"""Whatever the user has -> batches of (features, labels, sample_weight) on the device.

    DataLoader, or any re-iterable of batches    iterated as it is
    Dataset                                      a DataLoader round it
    (X, y), (X, y, sample_weight) or X           of tensors, NumPy arrays, DataFrames, Series: rows cut into batches

A nest is what a batch may be made of: a tensor, or tuples, named tuples, lists, mappings and dataclasses of nests.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from pandas.api.types import is_bool_dtype, is_integer_dtype, is_numeric_dtype
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from minikeras.errors import described, positive_int

ONLY_ONCE = "which can be iterated only once. Pass a list of batches or an object whose __iter__ starts anew"

# --- nests ------------------------------------------------------------------------------------------------------------


def parts(nest: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """A container's parts, and the function that builds the like of it from other parts; None for a leaf."""
    if isinstance(nest, Tensor) or hasattr(nest, "to"):  # a PackedSequence is a tuple, but moves as one
        return None
    if isinstance(nest, Mapping):
        return list(nest.values()), lambda values: _like_mapping(nest, values)
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return list(nest), lambda values: type(nest)(*values)
    if isinstance(nest, (tuple, list)):
        return list(nest), type(nest)
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        names = [field.name for field in dataclasses.fields(nest) if field.init]
        return (
            [getattr(nest, name) for name in names],
            lambda values: dataclasses.replace(nest, **dict(zip(names, values, strict=True))),
        )
    return None


def _like_mapping(nest: Mapping[Any, Any], values: list[Any]) -> Mapping[Any, Any]:
    pairs = dict(zip(nest, values, strict=True))
    if type(nest) is dict or not isinstance(nest, MutableMapping):
        return pairs
    twin = copy.copy(nest)  # a defaultdict or a model's own output class has more to it than its items
    for key, value in pairs.items():
        twin[key] = value
    return twin


def map_leaves(function: Callable[[Any], Any], nest: Any) -> Any:
    """The same nest with `function` applied to everything in it that is not a container.

    >>> map_leaves(lambda leaf: leaf + 1, {"a": (1, 2), "b": [3]})
    {'a': (2, 3), 'b': [4]}
    """
    found = parts(nest)
    if found is None:
        return function(nest)
    inner, build = found
    return build([map_leaves(function, part) for part in inner])


def leaves(nest: Any) -> list[Any]:
    """Everything in a nest that is not a container, in order.

    >>> leaves({"a": (1, 2), "b": [3]})
    [1, 2, 3]
    """
    found = parts(nest)
    return [nest] if found is None else [leaf for part in found[0] for leaf in leaves(part)]


# --- from what the user has to batches --------------------------------------------------------------------------------


def as_batches(data: Any, name: str, batch_size: int | None = None, *, shuffle: bool = False) -> Iterable[Any]:
    """An iterable of batches from anything `fit`, `evaluate` and `predict` accept.

    Args:
        data: a DataLoader, a Dataset, a re-iterable of batches, or arrays: X, (X, y) or (X, y, sample_weight).
        name: what the user calls it, for error messages.
        batch_size: rows a batch of data that is not batched yet, default 32.
        shuffle: whether a Dataset's or the arrays' rows come in a new random order each epoch.

    Raises:
        TypeError: data of another kind, or arrays of something other than numbers.
        ValueError: arrays of different lengths, or a batch_size for data that is batched already.
    """
    size = 32 if batch_size is None else positive_int("batch_size", batch_size)
    if isinstance(data, Dataset):
        if length(data) == 0:
            raise empty(data, name)
        return DataLoader(data, size, shuffle=shuffle and not isinstance(data, IterableDataset))
    if not is_batched(data):
        return ArrayBatches(data, name, size, shuffle)
    if batch_size is not None:
        raise ValueError(
            f"batch_size={batch_size} is for data that is not batched yet, and {name} is a {type(data).__name__}, "
            f"which makes its own batches. Leave batch_size out, or set it where {name} is made."
        )
    if not hasattr(data, "__iter__"):
        remedy = ""
        if hasattr(data, "__getitem__"):  # Python would index it on and on: batches sliced past the end never stop
            remedy = " Give it an __iter__, or derive it from torch.utils.data.Dataset if its items are rows."
        raise TypeError(
            f"{name} must be a DataLoader, a Dataset, an iterable of (features, labels) batches or arrays (X, y), "
            f"got {type(data).__name__}.{remedy}"
        )
    return cast(Iterable[Any], data)


def is_batched(data: Any) -> bool:
    """Whether data comes in batches already, as a DataLoader or a list of batches does: a tuple is (X, y)."""
    return not isinstance(data, (Dataset, Tensor, np.ndarray, pd.DataFrame, pd.Series, Mapping, tuple))


class ArrayBatches:
    """Batches cut from arrays that are whole in memory, in a new random order at each iteration when shuffled."""

    def __init__(self, data: Any, name: str, batch_size: int, shuffle: bool) -> None:
        if isinstance(data, tuple) and not 1 <= len(data) <= 3:
            raise ValueError(
                f"{name} is a tuple of {len(data)}; expected (X, y) or (X, y, sample_weight). "
                f"Put several inputs into a tuple of their own: ((X1, X2), y)."
            )
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.arrays = map_leaves(lambda leaf: as_tensor(leaf, name), data)
        lengths = [len(tensor) if tensor.ndim else 1 for tensor in leaves(self.arrays)]
        if len(set(lengths)) != 1:
            raise ValueError(
                f"{name} holds arrays of {' and '.join(map(str, lengths))} rows; expected as many rows in each. "
                f"Got {described(self.arrays)}."
            )
        self.rows = lengths[0]

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(self.rows) if self.shuffle else torch.arange(self.rows)
        for rows in order.split(self.batch_size) if self.rows else ():
            # copied, as a DataLoader does: a layer or metric that works in place must not reach the user's data
            yield map_leaves(partial(torch.index_select, dim=0, index=rows), self.arrays)


def as_tensor(array: Any, name: str = "data") -> Tensor:
    """A tensor of an array: floats in torch's default dtype, integers in int64 (uint8 stays); a tensor as it is.

    >>> as_tensor(np.array([1.0, 2.0])).dtype
    torch.float32
    """
    if isinstance(array, Tensor):
        return array
    if isinstance(array, pd.Series):
        return as_tensor(array.to_frame(), name)[:, 0]
    array = _frame_values(array, name) if isinstance(array, pd.DataFrame) else np.asarray(array)
    if array.dtype.kind not in "fiubc":
        raise TypeError(f"{name} holds {array.dtype} values; expected numbers. Encode them as numbers first.")
    if array.dtype.kind == "f":
        array = array.astype(str(torch.get_default_dtype()).removeprefix("torch."), copy=False)
    elif array.dtype.kind in "iu" and array.dtype != np.uint8:
        array = array.astype(np.int64, copy=False)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # pandas hands out read-only arrays


def _frame_values(frame: pd.DataFrame, name: str) -> np.ndarray[Any, Any]:
    odd = [str(column) for column, dtype in frame.dtypes.items() if not is_numeric_dtype(dtype)]
    if odd:
        raise TypeError(
            f"{name} has columns that are not numbers: {', '.join(odd)}. Encode them first, "
            f"for instance with pandas.get_dummies or column.astype('category').cat.codes."
        )
    for is_kind, dtype in ((is_bool_dtype, np.bool_), (is_integer_dtype, np.int64)):
        if all(is_kind(column) for column in frame.dtypes):
            return frame.to_numpy(dtype)
    return frame.to_numpy(np.float64)


class ContinuedBatches:
    """`steps` batches at each iteration: the next goes on where the last one stopped, and starts anew at the end."""

    def __init__(self, batches: Iterable[Any], steps: int, name: str) -> None:
        self.batches = batches
        self.steps = steps
        self.name = name
        self.iterator: Iterator[Any] | None = None
        self.given = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.steps):
            yield self._next()

    def _next(self) -> Any:
        nothing = object()
        batch = nothing if self.iterator is None else next(self.iterator, nothing)
        if batch is nothing:
            self.iterator = iter(self.batches)
            batch = next(self.iterator, nothing)
        if batch is nothing and self.given:
            why = f"it is a {type(self.batches).__name__}, {ONLY_ONCE}"
            raise ValueError(
                f"{self.name} ended after {self.given} batches, and steps_per_epoch={self.steps} needs more: {why}."
            )
        if batch is nothing:
            raise empty(self.batches, self.name)
        self.given += 1
        return batch


def length(batches: Any) -> int | None:
    """How many batches there are, or None where that is not known ahead."""
    try:
        return len(batches)
    except (TypeError, NotImplementedError):  # a DataLoader over an IterableDataset has a len that raises
        return None


def empty(batches: Any, name: str) -> ValueError:
    """The error for data that gave no batch, with the reason."""
    dataset = batches if isinstance(batches, Dataset) else getattr(batches, "dataset", None)
    rows, size = None if dataset is None else length(dataset), getattr(batches, "batch_size", None)
    reason = "iterating it ended at once"
    if rows == 0 or getattr(batches, "rows", None) == 0:
        reason = "its dataset has no rows" if rows == 0 else "its arrays have no rows"
    elif rows is not None and size is not None and rows < size and getattr(batches, "drop_last", False):
        reason = f"drop_last=True drops the only batch, {rows} rows of batch_size={size}. Set drop_last=False"
    elif iter(batches) is batches:
        steps = ", or give steps_per_epoch" * (name == "dl_train")
        reason = f"it is a {type(batches).__name__}, {ONLY_ONCE}{steps}"
    return ValueError(f"{name} gave no batch: {reason}.")


# --- from a batch to what the step takes ------------------------------------------------------------------------------


def unpack(batch: Any) -> tuple[Any, Any, Any]:
    """(features, labels, sample_weight) of a batch; what it does not have is None."""
    if not isinstance(batch, (tuple, list)) or hasattr(batch, "to"):
        return batch, None, None
    if not 1 <= len(batch) <= 3:
        raise ValueError(
            f"a batch has {len(batch)} parts: {described(batch)}; expected (features, labels) or "
            f"(features, labels, sample_weight). Put several inputs into a tuple of their own: ((a, b), labels)."
        )
    features, labels, sample_weight = (*batch, None, None)[:3]
    return features, labels, sample_weight


def to_device(nest: Any, device: torch.device) -> Any:
    """A nest with everything that can move on the device; NumPy arrays in it become tensors."""

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fiubc":
            leaf = as_tensor(leaf)
        return leaf.to(device) if hasattr(leaf, "to") else leaf

    return map_leaves(moved, nest)


def count_rows(features: Any, labels: Any = None) -> int:
    """Rows of a batch: the first size of its labels, where they are one tensor; else of the first tensor in it.

    Features may come time first, or as tokens in a row with their offsets; labels hardly ever do.

    >>> count_rows((torch.zeros(30), torch.zeros(8)), labels=torch.zeros(8))
    8
    """
    if isinstance(labels, Tensor) and labels.ndim:
        return labels.size(0)
    for leaf in (*leaves(features), *leaves(labels)):
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.size(0)
    return 1


def call_with(module: nn.Module, features: Any) -> Any:
    """`module` called with a batch's features.

    Whole when its forward takes one argument; unpacked when it takes several, by name when they are a mapping.
    """
    return call_as(manner(module, features), module, features)


def manner(module: nn.Module, features: Any) -> str:
    """How a module is to be called with features such as these: "whole", "unpacked" or "by name"."""
    if isinstance(features, Mapping):
        return "by name" if _takes(module, tuple(features)) else "whole"
    if isinstance(features, (tuple, list)) and not hasattr(features, "to") and _takes(module, None):
        return "unpacked"
    return "whole"


def call_as(how: str, module: nn.Module, features: Any) -> Any:
    """`module` called with features whole, unpacked or by name."""
    if how == "whole":
        return module(features)
    return module(**features) if how == "by name" else module(*features)


def _takes(module: nn.Module, names: tuple[str, ...] | None) -> bool:
    """Whether forward takes several arguments, those of these `names` where given.

    A wrapper's forward(*args, **kwargs) is judged by what it wraps.
    """
    function = getattr(module.forward, "__func__", module.forward)
    bound = function is not module.forward
    several, passes_on = _arguments(function, bound, names)
    inner = list(module.children())
    return _takes(inner[0], names) if passes_on and len(inner) == 1 else several


@lru_cache(maxsize=256)
def _arguments(function: Callable[..., Any], bound: bool, names: tuple[str, ...] | None) -> tuple[bool, bool]:
    """Whether a function takes several arguments (of these names), and whether it names none itself."""
    signature = inspect.signature(function)
    kinds = [parameter.kind for parameter in signature.parameters.values()][int(bound) :]
    named = sum(kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD) for kind in kinds)
    star = inspect.Parameter.VAR_POSITIONAL in kinds
    if names is None:
        return star or named > 1, star and not named
    try:
        signature.bind(*[None] * bound, **dict.fromkeys(names))
    except TypeError:
        return False, star and not named
    return named != 1 or len(kinds) > 1, star and not named


def join(pieces: list[Any]) -> Any:
    """The outputs of many batches as one: tensors concatenated along the rows, in any structure.

    >>> join([(torch.zeros(2, 1), {"a": torch.ones(2)}), (torch.zeros(1, 1), {"a": torch.ones(1)})])[1]
    {'a': tensor([1., 1., 1.])}
    """
    first = pieces[0]
    found = parts(first)
    if found is not None:
        return found[1]([join(list(part)) for part in zip(*(parts(piece)[0] for piece in pieces), strict=True)])  # type: ignore[index]
    if not isinstance(first, Tensor):
        return None if first is None else pieces
    try:
        return torch.cat(pieces) if first.ndim else torch.stack(pieces)
    except RuntimeError as error:
        shapes = sorted({tuple(piece.shape[1:]) for piece in pieces})
        raise ValueError(
            f"the outputs of the batches have rows of different shapes, {shapes[0]} and {shapes[-1]}, and cannot be "
            f"joined. Pad them to one shape in forward, or predict batch by batch."
        ) from error


# --- devices ----------------------------------------------------------------------------------------------------------


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the best there is: the accelerator (CUDA, XPU, MPS, ...) where one works, else the CPU.

    Raises:
        ValueError: the device is not there; the message names the ones that are.
    """
    # current_accelerator() alone answers "cuda" on a CUDA build of torch even where there is no GPU
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return best or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        there = ["cpu"] + [f"{best.type}:{i}" for i in range(torch.accelerator.device_count() if best else 0) if best]
        raise ValueError(f"device {str(device)!r} is not there; expected one of {', '.join(there)}.") from error
    return chosen
