"""Look at the first batch of data in memory without reading or drawing anything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minikeras.nests import clone_tensor, map_leaves


def first_rows(batches: Iterable[Any]) -> Any:
    """Return a copy of the first batch of a list, or of a source that can tell it; else None.

    >>> first_rows([(1, 2), (3, 4)]), first_rows(iter([(1, 2)]))
    ((1, 2), None)
    """
    if type(batches) is list:
        if batches and batches[0] is None:
            raise TypeError("the first batch is None; expected (features, labels).")
        return map_leaves(clone_tensor, batches[0]) if batches else None
    first = getattr(batches, "first", None)
    return first() if callable(first) else None
