"""Plain values: tensors, numbers, strings and containers of them. A file of them holds no code."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

AS_THEY_ARE = (
    type(None),
    str,
    bool,
    int,
    float,
    complex,
    bytes,
    torch.Size,
    torch.dtype,
    torch.device,
)
TYPES_AS_THEY_ARE = frozenset(AS_THEY_ARE)
ARRAY = "a NumPy array"  # the key of a dict that stands for one


def plain(value: Any, where: str) -> Any:
    """Convert a value to plain values; NumPy's arrays and numbers become torch's and Python's.

    Args:
        where: what an error calls the value.

    Raises:
        TypeError: it contains something that is not plain.

    >>> plain({"best": np.float64(0.5)}, "the state")
    {'best': 0.5}
    """
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiubc":
        return {ARRAY: torch.from_numpy(value.copy())}
    if type(value) in TYPES_AS_THEY_ARE:
        return value
    if type(value) in (list, tuple, set):
        if is_flat(value):  # quick for the hundreds of numbers in a random state
            return type(value)(value)
        items = []
        for number, part in enumerate(value):
            items.append(plain(part, f"{where}[{number}]"))
        return type(value)(items)
    if type(value) is dict and is_flat(value) and is_flat(value.values()):
        return dict(value)
    if type(value) in (dict, OrderedDict, Counter):
        pairs = []
        for key, part in value.items():
            pairs.append((plain(key, where), plain(part, f"{where}[{key!r}]")))
        return like(value, pairs)
    # subclasses, such as a member of an enum, a named tuple or a defaultdict
    kinds: tuple[Any, ...] = (bool, int, float, str, dict, list, tuple)
    for kind in kinds:
        if isinstance(value, kind):
            return plain(kind(value), where)
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: expected tensors, "
        "numbers, strings, lists and dicts. Turn it into these in state_dict, and back in "
        "load_state_dict."
    )


def is_flat(values: Iterable[Any]) -> bool:
    """Tell whether all of these values can be saved as they are: none is a tensor or a container.

    >>> is_flat([1, "two"]), is_flat([1, [2]])
    (True, False)
    """
    return TYPES_AS_THEY_ARE.issuperset(map(type, values))


def find_tensors(value: Any) -> list[Tensor]:
    """List the tensors in a plain value.

    >>> find_tensors({"a": [torch.tensor(1), 2]})
    [tensor(1)]
    """
    tensors: list[Tensor] = []
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if isinstance(current, Tensor):
            tensors.append(current)
            continue
        if isinstance(current, dict):
            current = current.values()
        elif not isinstance(current, (list, tuple, set)):
            continue
        if not is_flat(current):
            waiting.extend(current)
    return tensors


def restored(value: Any) -> Any:
    """Convert plain values back: NumPy's arrays become what they were."""
    if type(value) is dict and value.keys() == {ARRAY}:
        return value[ARRAY].numpy()
    if type(value) in (list, tuple, set):
        return type(value)(restored(part) for part in value)
    if type(value) in (dict, OrderedDict):
        return like(value, [(key, restored(part)) for key, part in value.items()])
    return value


def like(value: Any, items: Iterable[tuple[Any, Any]]) -> Any:
    """Build a dict of the same class as `value` with other items.

    A state_dict keeps the version numbers that torch stores next to its items.

    >>> like(Counter("aab"), [("a", 1)])
    Counter({'a': 1})
    """
    other = copy.copy(value)
    other.clear()
    for key, item in items:
        other[key] = item
    return other
