"""Nests: what a batch may be made of. You may skip this file.

A nest is a leaf, such as a tensor, or a tuple, named tuple, list, mapping or dataclass of nests.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def take_apart(
    nest: Any, inside: bool = False
) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """Return a container's parts, and the function that rebuilds it from other parts.

    Return None for a leaf. A container with a method `to` is a leaf too, unless `inside` is True.
    """
    if isinstance(nest, (Tensor, PackedSequence)) or (not inside and can_move(nest)):
        return None
    if isinstance(nest, Mapping):
        return list(nest.values()), lambda values: _rebuild_mapping(nest, values)
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


def names_in(nest: Any) -> list[Any] | None:
    """List the names of a container's parts: keys, fields or positions; None for a leaf.

    >>> names_in({"a": 1, "b": 2}), names_in((1, 2)), names_in(1)
    (['a', 'b'], [0, 1], None)
    """
    if isinstance(nest, Mapping):
        return list(nest.keys())
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return list(nest._fields)
    if isinstance(nest, (tuple, list)):
        return list(range(len(nest)))
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        return [field.name for field in dataclasses.fields(nest)]
    return None


# have no method `to`; a graph cannot ask a number for it
PLAIN = (tuple, list, dict, bool, int, float, str)


def can_move(value: Any) -> bool:
    """Tell whether a value has a method `to`, as tensors and a tokenizer's batches have.

    The type is asked first: a dict with attributes for its keys may answer to any name.
    """
    kind = type(value)
    if kind in PLAIN:
        return False
    if callable(getattr(kind, "to", None)):
        return True
    if isinstance(value, Mapping):
        return False
    try:
        return callable(getattr(value, "to", None))
    except Exception:  # an object's own __getattr__ may raise anything
        return False


def _rebuild_mapping(nest: Mapping[Any, Any], values: list[Any]) -> Mapping[Any, Any]:
    """Build a mapping of the same type with other values."""
    pairs = dict(zip(nest.keys(), values, strict=True))  # iterating a TensorDict gives its rows
    if type(nest) is dict or not isinstance(nest, MutableMapping):
        return pairs
    if dataclasses.is_dataclass(nest):
        # An output class of transformers has no key for what is None.
        for key, value in pairs.items():
            if value is None and nest[key] is not None:
                return type(nest)(**pairs)
    # A defaultdict or a model's output class has more to it than its items, so it is copied.
    twin: MutableMapping[Any, Any]
    if isinstance(nest, (dict, UserDict)):
        twin = copy.copy(nest)
    else:
        # A shallow copy might share its inner dict with the original. A deep copy that already
        # knows the values by their ids leaves them as they are.
        twin = copy.deepcopy(nest, {id(value): value for value in nest.values()})
    for key, value in pairs.items():
        twin[key] = value
    return twin


def map_leaves(function: Callable[[Any], Any], nest: Any) -> Any:
    """Apply `function` to every leaf of a nest and return a nest of the results.

    >>> map_leaves(lambda leaf: leaf + 1, {"a": (1, 2), "b": [3]})
    {'a': (2, 3), 'b': [4]}
    """
    container = None if isinstance(nest, Tensor) else take_apart(nest)
    if container is None:
        return function(nest)
    inner, build = container
    return build([map_leaves(function, part) for part in inner])


def clone_tensor(leaf: Any) -> Any:
    """Clone a tensor, since a layer or a metric may work in place; return anything else."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def leaves(nest: Any, inside: bool = False) -> list[Any]:
    """List the leaves of a nest in order; with `inside`, also those of containers that have `to`.

    >>> leaves({"a": (1, 2), "b": [3]})
    [1, 2, 3]
    """
    container = take_apart(nest, inside)
    if container is None:
        return [nest]
    found = []
    for part in container[0]:
        found += leaves(part, inside)
    return found


def widen(leaf: Any) -> Any:
    """Return a half-precision tensor or packed sequence in float32, anything else as it is."""
    values = leaf.data if isinstance(leaf, PackedSequence) else leaf
    if isinstance(values, Tensor) and values.dtype in (torch.bfloat16, torch.float16):
        return leaf.float()
    return leaf


def to_float32(nest: Any) -> Any:
    """Return a nest with its half-precision tensors in float32."""
    if isinstance(nest, Tensor):
        return widen(nest)
    return map_leaves(widen, nest)


def detach_nest(nest: Any) -> Any:
    """Return a nest whose tensors are cut off from what they were computed from."""
    if isinstance(nest, Tensor):
        return nest.detach()
    return map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, nest)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is in parts, one part in each process.

    It is asked without loading torch's DTensor, which one process has no use for.
    """
    return hasattr(tensor, "full_tensor")
