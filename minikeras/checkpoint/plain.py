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


class _NotPlain(Exception):
    """A value that is not plain.

    Args:
        kind: the name of its class.
        place: where it is, such as "['a'][0]".
    """

    def __init__(self, kind: str, place: str = "") -> None:
        super().__init__(kind, place)
        self.kind = kind
        self.place = place


def plain(value: Any, where: str) -> Any:
    """Convert a value to plain values; NumPy's arrays and numbers become torch's and Python's.

    Args:
        where: what an error calls the value.

    Raises:
        TypeError: it contains something that is not plain.

    >>> plain({"best": np.float64(0.5)}, "the state")
    {'best': 0.5}
    """
    try:
        return _plain(value)
    except _NotPlain as error:
        raise TypeError(
            f"{where}{error.place} is a {error.kind}, which a checkpoint cannot hold: expected "
            "tensors, numbers, strings, lists and dicts. Turn it into these in state_dict, and "
            "back in load_state_dict."
        ) from None


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in TYPES_AS_THEY_ARE:
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if kind is dict or kind is OrderedDict or kind is Counter:
        return _plain_dict(value)
    if kind is list or kind is tuple or kind is set:
        return _plain_items(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiubc":
        return {ARRAY: torch.from_numpy(value.copy())}
    # subclasses, such as a member of an enum, a named tuple or a defaultdict
    bases: tuple[Any, ...] = (bool, int, float, str, dict, list, tuple)
    for base in bases:
        if isinstance(value, base):
            return _plain(base(value))
    raise _NotPlain(kind.__name__)


def _plain_dict(value: Any) -> Any:
    """Convert a dict, and keep its class."""
    if type(value) is dict and is_flat(value) and is_flat(value.values()):
        return dict(value)
    pairs = []
    for key, part in value.items():
        plain_key = _plain(key)
        try:
            pairs.append((plain_key, _plain(part)))
        except _NotPlain as error:
            raise _NotPlain(error.kind, f"[{key!r}]{error.place}") from None
    if type(value) is dict:
        return dict(pairs)
    return like(value, pairs)


def _plain_items(value: Any) -> Any:
    """Convert a list, tuple or set, and keep its class."""
    if is_flat(value):  # quick for the hundreds of numbers in a random state
        return type(value)(value)
    items: list[Any] = []
    for part in value:
        try:
            items.append(_plain(part))
        except _NotPlain as error:
            raise _NotPlain(error.kind, f"[{len(items)}]{error.place}") from None
    return type(value)(items)


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
