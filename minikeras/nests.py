"""Nests: what a batch may be made of, a tensor, or tuples, named tuples, lists, mappings and dataclasses of nests."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def parts(nest: Any, inside: bool = False) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """A container's parts, and the function that builds the like of it from other parts; None for a leaf.

    What moves as one is a leaf, unless one looks `inside`.
    """
    if isinstance(nest, (Tensor, PackedSequence)) or (not inside and can_move(nest)):
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


PLAIN = (tuple, list, dict)  # have no method `to`: most batches are made of them


def can_move(value: Any) -> bool:
    """Whether a value has a method `to`, as tensors and a tokenizer's batches have.

    It is looked for in the type: a dict with attributes for its keys answers to any name.
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


def _like_mapping(nest: Mapping[Any, Any], values: list[Any]) -> Mapping[Any, Any]:
    pairs = dict(zip(nest.keys(), values, strict=True))  # iterating a TensorDict gives its rows
    if type(nest) is dict or not isinstance(nest, MutableMapping):
        return pairs
    if dataclasses.is_dataclass(nest) and any(
        value is None and nest[key] is not None for key, value in pairs.items()
    ):
        return type(nest)(**pairs)  # a model's own output class, which has no key for what is None
    # A defaultdict or a model's own output class has more to it than its items. A copy of another kind may have the
    # very dict inside that this one has; of a deep one the values, known by their ids, are left as they are.
    own = isinstance(nest, (dict, UserDict))
    twin = (
        copy.copy(nest)
        if own
        else copy.deepcopy(nest, {id(value): value for value in nest.values()})
    )
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


def cloned(leaf: Any) -> Any:
    """A tensor in memory of its own, since a layer or a metric may work in place; anything else as it is."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def leaves(nest: Any, inside: bool = False) -> list[Any]:
    """Everything in a nest that is not a container, in order; `inside` containers that move as one as well.

    >>> leaves({"a": (1, 2), "b": [3]})
    [1, 2, 3]
    """
    found = parts(nest, inside)
    return [nest] if found is None else [leaf for part in found[0] for leaf in leaves(part, inside)]


def widen(leaf: Any) -> Any:
    """Return a half-precision tensor or packed sequence in float32, anything else as it is."""
    values = leaf.data if isinstance(leaf, PackedSequence) else leaf
    if isinstance(values, Tensor) and values.dtype in (torch.bfloat16, torch.float16):
        return leaf.float()
    return leaf


def in_float32(nest: Any) -> Any:
    """Return a nest with its half-precision tensors in float32."""
    if isinstance(nest, Tensor):
        return widen(nest)
    return map_leaves(widen, nest)


def detached(nest: Any) -> Any:
    """Return a nest whose tensors are cut off from what they were computed from."""
    if isinstance(nest, Tensor):
        return nest.detach()
    return map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, nest)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is in parts, one part in each process.

    It is asked without loading torch's DTensor, which one process has no use for.
    """
    return hasattr(tensor, "full_tensor")
