"""Batches of another form than (features, labels), taken apart by the user's function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from minikeras.batch import Parts
from minikeras.errors import describe
from minikeras.rows import get_batch_size

EXPECTED = "expected a tuple (features, labels) or (features, labels, sample_weight)"
MISSING = (KeyError, IndexError, AttributeError)  # what batches without labels raise


class SplitBatch:
    """Split each batch by the function that compile was given, and check what it returns.

    Args:
        function: from a batch to (features, labels) or (features, labels, sample_weight).
        steps_per_execution: steps in one call of a compiled graph. If there are several, the graph
            counts the rows by the labels, and no batch may state another number.

    Raises:
        TypeError: the function is none.

    >>> split = SplitBatch(lambda batch: (batch["x"], batch["y"]))
    >>> split({"x": 1, "y": 2})
    (1, 2, None, None)
    """

    def __init__(self, function: Callable[[Any], Any], steps_per_execution: int = 1) -> None:
        if not callable(function):
            raise TypeError(
                "split_batch must be a function from a batch to (features, labels), got "
                f'{describe(function)}. Pass for instance lambda batch: (batch["x"], batch["y"]).'
            )
        self.function = function
        self.steps_per_execution = steps_per_execution

    def __call__(self, batch: Any) -> Parts:
        """Return features, labels, sample_weight and the rows that the batch states, or None.

        Raises:
            TypeError, ValueError: the function has returned something else.
        """
        try:
            parts = self.function(batch)
        except Exception as error:
            error.add_note(f"raised by split_batch, called with {describe_batch(batch)}")
            if isinstance(error, MISSING):
                error.add_note(
                    "If the batches have no labels, as in predict, let split_batch return "
                    "(features, None); of a dict batch.get(name) is None if it has no such name."
                )
            raise
        if not isinstance(parts, tuple):
            raise TypeError(self.explain_result(parts, batch))
        if len(parts) not in (2, 3):
            raise ValueError(self.explain_result(parts, batch))
        features, labels, sample_weight = (*parts, None)[:3]
        return features, labels, sample_weight, self.find_stated_rows(batch)

    def explain_result(self, parts: Any, batch: Any) -> str:
        """Say what the function has returned for which batch, and what to return."""
        remedy = "Return two parts or three; without labels (features, None)"
        if parts is None:
            remedy = "Let it end in `return features, labels`"
        elif isinstance(parts, tuple) and len(parts) > 3:
            remedy = "Put several inputs into a tuple of their own: ((a, b), labels)"
        return (
            f"split_batch returned {describe(parts)} for a batch {describe_batch(batch)}; "
            f"{EXPECTED}. {remedy}."
        )

    def find_stated_rows(self, batch: Any) -> int | None:
        """Return the int `batch_size` of a batch, which its parts may not have."""
        rows = get_batch_size(batch)
        if rows is not None and self.steps_per_execution > 1:
            raise ValueError(
                f"a batch states its rows, batch_size={rows}, and with split_batch and "
                f"steps_per_execution={self.steps_per_execution} they are counted by the labels. "
                "Leave steps_per_execution out."
            )
        return rows


def describe_batch(batch: Any) -> str:
    """Describe a batch by the names of its parts too, if it has some.

    >>> from collections import UserDict
    >>> describe_batch(UserDict({"x": 1}))
    "UserDict {'x': int}"
    """
    parts: dict[Any, Any] = {}
    if isinstance(batch, Mapping) and type(batch) is not dict:
        parts = dict(batch)
    elif isinstance(batch, tuple):
        parts = dict(zip(getattr(batch, "_fields", ()), batch, strict=False))
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            parts[field.name] = getattr(batch, field.name)
    if not parts:
        return describe(batch)
    return f"{type(batch).__name__} {describe(parts)}"
