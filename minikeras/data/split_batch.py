"""Batches of another form than (features, labels), taken apart by the user's function."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

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
        TypeError: the function is none, or does not take one batch.

    >>> split = SplitBatch(lambda batch: (batch["x"], batch["y"]))
    >>> split({"x": 1, "y": 2})
    (1, 2, None, None)
    """

    def __init__(self, function: Callable[[Any], Any], steps_per_execution: int = 1) -> None:
        check_function(function)
        self.function = function
        self.steps_per_execution = steps_per_execution

    def __call__(self, batch: Any) -> Parts:
        """Return features, labels, sample_weight and the rows that the batch states, or None.

        Raises:
            TypeError, ValueError: the function has returned something else.
        """
        try:
            parts = self.function(copy_container(batch))
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
        if is_row_of(features, batch):
            raise ValueError(
                f"split_batch returned features {describe(features)}, which is one row of the "
                f"batch {describe(batch)}: the batch is a single tensor, and batch[0] its first "
                "row. If batches of features alone have no labels, let split_batch begin with "
                "`if isinstance(batch, torch.Tensor): return batch, None`."
            )
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


def check_function(function: Any) -> None:
    """Refuse what cannot be called with one batch.

    Raises:
        TypeError: it is no function of one argument.
    """
    remedy = 'Pass for instance lambda batch: (batch["x"], batch["y"])'
    got = ""
    if isinstance(function, type):
        got = f"the class {function.__name__}"
        remedy = f"Pass an instance whose __call__ takes the batch, {function.__name__}()"
    elif not callable(function):
        got = describe(function)
    else:
        try:
            inspect.signature(function).bind("batch")
        except TypeError as error:
            name = getattr(function, "__name__", type(function).__name__)
            got = f"{name}, which cannot be called with one argument, the batch: {error}"
        except ValueError:  # some functions of C have no signature
            return
    if got:
        raise TypeError(
            f"split_batch must be a function from a batch to (features, labels), got {got}. "
            f"{remedy}."
        )


def copy_container(batch: Any) -> Any:
    """Return a shallow copy of a dict or list, and anything else as it is.

    A list of batches is read again in the next epoch: after batch.pop("labels") the batch itself
    still has its labels.
    """
    if isinstance(batch, (dict, UserDict, list)):
        return copy.copy(batch)
    return batch


def is_row_of(features: Any, batch: Any) -> bool:
    """Tell whether the features are one row of a batch that is a single table of rows.

    A batch of two or three rows may be features, labels and weights of one number for each row,
    stacked by a collate_fn.
    """
    if not isinstance(features, Tensor) or not isinstance(batch, Tensor):
        return False
    return batch.ndim == 2 and len(batch) > 3 and features.shape == batch.shape[1:]


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
