"""Write the split_batch that batches of another form than (features, labels) need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from minikeras.nests import names_in

LABELS = ("labels", "label", "targets", "target")


def name_parts(batch: Any) -> list[Any]:
    """Return the names of a batch's parts, the labels last if they are known by their name.

    >>> name_parts({"labels": 0, "x": 1})
    ['x', 'labels']
    """
    if isinstance(batch, tuple | list):
        return []
    return put_labels_last(names_in(batch) or [])


def put_labels_last(names: Iterable[Any]) -> list[Any]:
    """Return the names in their order, but those of labels last."""
    return sorted(names, key=lambda name: name in LABELS)


def write_split(batch: Any, names: list[Any]) -> str:
    """Write a function that splits a batch with parts of these names, of which labels are last.

    One feature is passed by itself: a forward of one argument gets a dict whole.

    >>> write_split({}, ["x", "y"])
    "lambda batch: (batch['x'], batch['y'])"
    """
    *features, labels = names
    if not isinstance(batch, Mapping):
        inputs = ", ".join(f"batch.{name}" for name in features)
        if len(features) > 1:
            inputs = f"({inputs})"
        return f"lambda batch: ({inputs}, batch.{labels})"
    if len(features) == 1:
        return f"lambda batch: (batch[{features[0]!r}], batch[{labels!r}])"
    kept = f"{{name: batch[name] for name in batch if name != {labels!r}}}"
    return f"lambda batch: ({kept}, batch[{labels!r}])"
