"""`OnAllRows`: a metric whose function is called once, on the outputs and labels of a whole pass.

each batch            update: outputs and labels are copied to the CPU
the end of the pass   compute: the batches are joined, converted to NumPy arrays, and passed to the
                      function
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from minikeras.argument_order import find_labels_first, name_function, write_swapped
from minikeras.errors import describe
from minikeras.nests import leaves, map_leaves, take_apart
from minikeras.processes import OneProcess


class OnAllRows:
    """A metric of `metrics_dict` that is computed once, from all rows, at the end of each pass.

    Use it for a value that is not a mean over rows: R2, RMSE, F1, the area under a curve, or any
    other score of scikit-learn. The value does not depend on the batch size.

    The outputs and labels of all batches stay in CPU memory until the pass ends. With several
    processes, those of all processes are then sent to process 0, which calls the function.
    `fit(checkpoint=...)` saves them within an epoch. On an accelerator, the copy of each batch
    waits for the device.

    Args:
        function: takes `(y_pred, y_true)`, in this order: the outputs and labels of all rows, as
            NumPy arrays (float32 if they had half precision) in the same structure as those of the
            model and the data. It returns a number; or a dict, list or array of numbers, which
            become one column each.

    Raises:
        TypeError: `function` is no function, takes the labels first like those of scikit-learn, or
            cannot be called with two arguments.

    >>> import minikeras, torch
    >>> from torch import nn
    >>> def rmse(y_pred, y_true):
    ...     return ((y_pred - y_true) ** 2).mean() ** 0.5
    >>> model = minikeras.Model(nn.Identity())
    >>> model.compile(nn.MSELoss(), metrics_dict={"rmse": minikeras.OnAllRows(rmse)}, device="cpu")
    >>> X, y = torch.zeros(100, 1), torch.arange(100.0).reshape(-1, 1)
    >>> values = [model.evaluate((X, y), batch_size=size)["val_rmse"] for size in (7, 32, 100)]
    >>> [round(value, 1) for value in values]
    [57.3, 57.3, 57.3]
    """

    needs_all_rows = True  # computed once, at the end of a pass

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        _check_function(function)
        self.function = function
        self._template: Any = None  # the structure of (outputs, labels) in the last batch
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self._batches: list[Any] = []  # (outputs, labels) of each batch, in plain containers

    def update(self, y_pred: Any, y_true: Any) -> None:
        """Keep a batch: copy the outputs `y_pred` and the labels `y_true` to the CPU."""
        batch = (y_pred, y_true)
        plain_batch = _to_plain(batch)
        if self._batches:
            _check_like(plain_batch, self._batches[0])
        self._template = map_leaves(lambda leaf: None, batch)
        self._batches.append(plain_batch)

    def compute(self) -> Any:
        """Return the function's value on all rows."""
        return self._call(self._batches)

    def _call(self, batches: list[Any]) -> Any:
        """Call the function on the rows of these batches."""
        if not batches:
            raise ValueError("OnAllRows has seen no rows. Call update before compute.")
        joined = _join(batches)
        if self._template is None:  # resumed after the last batch of an epoch
            y_pred, y_true = _add_attributes(joined)
        else:
            y_pred, y_true = _rebuild(self._template, joined)
        try:
            return self.function(y_pred, y_true)
        except Exception as error:
            shown = f"y_pred {describe(y_pred)}, y_true {describe(y_true)}"
            error.add_note(f"OnAllRows gave the function all rows as NumPy arrays: {shown}")
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the rows collected so far, for a checkpoint."""
        return {"batches": list(self._batches)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the rows in a `state` of `state_dict`."""
        self._batches = [_to_plain(batch) for batch in state["batches"]]

    def __deepcopy__(self, memo: dict[int, Any]) -> OnAllRows:
        """Copy the rows and share the function, which may contain a model or a table."""
        other = OnAllRows(self.function)
        other.load_state_dict(self.state_dict())
        other._template = self._template
        return other


def compute_on_all_processes(
    metric: OnAllRows, world: OneProcess, read: Callable[[Any], dict[str, float]]
) -> dict[str, float]:
    """Compute `metric` on the rows of all processes, and return its value as `read` converts it.

    All processes of `world` call it at the same point. Rows are ordered by step and, within a step,
    by process: for data that is not shuffled, as on one process.
    """
    gathered = world.gather(metric._batches, everywhere=False)
    columns: dict[str, float] | None = None
    problem: str | None = None
    failure: Exception | None = None
    if gathered is not None:
        try:
            batches = []
            for step in zip_longest(*gathered):
                for batch in step:
                    if batch is not None:  # some processes may have no rows in the last step
                        batches.append(batch)
            columns = read(metric._call(batches))
        except Exception as error:
            failure = error
            problem = f"{type(error).__name__}: {error}"
    columns, problem = world.broadcast([columns, problem])
    if failure is not None:
        raise failure
    if columns is None:
        raise RuntimeError(
            f"process 0 of {world.size}, which calls the function, failed: {problem}"
        )
    return columns


def _check_function(function: Any) -> None:
    """Check that this is a function that takes the outputs first."""
    if getattr(type(function), "has_view", False):
        name = type(function).__name__
        raise TypeError(
            f"OnAllRows takes a function of (y_pred, y_true), got a {name}. Write it the other "
            f"way round: {name}(OnAllRows(function), y_pred=...)."
        )
    if isinstance(function, type) or not callable(function):
        got = repr(function)
        if isinstance(function, type):
            got = f"the class {function.__name__}"
        raise TypeError(
            f"OnAllRows takes a function of (y_pred, y_true), got {got}. Pass for instance "
            f"OnAllRows(lambda y_pred, y_true: r2_score(y_true, y_pred))."
        )
    if callable(getattr(function, "update", None)) and callable(getattr(function, "compute", None)):
        raise TypeError(
            f"OnAllRows takes a function, got a {type(function).__name__}, an object with update "
            "and compute, which sees all rows by itself. Put it into metrics_dict as it is."
        )
    first = find_labels_first(function)
    if first is not None:
        name = name_function(function)
        subject = "the function" if name == "<lambda>" else name
        raise TypeError(
            f"{subject} takes {first} first, as functions of scikit-learn do, and minikeras calls "
            f"a metric with (y_pred, y_true). {write_swapped(function, 'OnAllRows')}"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin may have no signature
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise TypeError(
            "OnAllRows calls its function with two arguments, (y_pred, y_true), got "
            f"{name_function(function)}{signature}. Pass for instance OnAllRows(lambda y_pred, "
            "y_true: r2_score(y_true, y_pred))."
        ) from None


# --- batches ---


def _to_plain(nest: Any) -> Any:
    """Copy a nest into dicts, lists and tuples, which a file can hold, and tensors to the CPU."""
    if isinstance(nest, Tensor):
        dtype = nest.dtype
        if dtype in (torch.bfloat16, torch.float16):  # NumPy has no bfloat16
            dtype = torch.float32
        return nest.detach().to("cpu", dtype, copy=True)
    container = take_apart(nest, inside=True)
    if container is None:
        return nest
    inner = [_to_plain(part) for part in container[0]]
    if isinstance(nest, Mapping):
        return dict(zip(nest, inner, strict=True))
    if hasattr(nest, "_fields"):
        return dict(zip(nest._fields, inner, strict=True))
    if dataclasses.is_dataclass(nest):
        names = [field.name for field in dataclasses.fields(nest) if field.init]
        return dict(zip(names, inner, strict=True))
    return tuple(inner) if isinstance(nest, tuple) else inner


def _check_like(batch: Any, first: Any) -> None:
    """Refuse a batch whose rows cannot be joined to those of the first batch."""
    if _get_row_shapes(batch) != _get_row_shapes(first):
        raise ValueError(
            f"OnAllRows joins the rows of all batches, and this batch is {describe(batch)}, but "
            f"the first was {describe(first)}. Pad the rows of outputs and labels to one shape; "
            "or, to count each token as a row, flatten them: minikeras.Transformed("
            "minikeras.OnAllRows(function), y_pred=lambda p: p.flatten(0, 1), y_true=lambda t: "
            "t.flatten(0, 1))."
        )


def _get_row_shapes(nest: Any) -> Any:
    """Return the shape of a row of each tensor, in the structure of the nest."""
    if isinstance(nest, Tensor):
        return tuple(nest.shape[1:])
    if isinstance(nest, Mapping):
        return {key: _get_row_shapes(part) for key, part in nest.items()}
    if isinstance(nest, tuple):
        return [_get_row_shapes(part) for part in nest]
    return None  # the items of a list may be the rows themselves


class _Rows(list[Any]):
    """A list with an item for each row."""


def _join(pieces: list[Any]) -> Any:
    """Join the same part of each batch along the rows, with arrays in place of tensors."""
    first = pieces[0]
    if isinstance(first, Tensor):
        joined = torch.cat(pieces) if first.ndim else torch.stack(pieces)
        return joined.numpy()
    if isinstance(first, Mapping):
        joined_parts = {}
        for key in first:
            joined_parts[key] = _join([piece[key] for piece in pieces])
        return joined_parts
    if isinstance(first, tuple):
        return tuple(_join(list(same)) for same in zip(*pieces, strict=True))
    if isinstance(first, list):
        if _has_items_by_row(pieces):
            rows = _Rows()
            for piece in pieces:
                for item in piece:
                    rows.append(map_leaves(_to_array, item))
            return rows
        return [_join(list(same)) for same in zip(*pieces, strict=True)]
    return None if first is None else pieces


def _has_items_by_row(pieces: list[Any]) -> bool:
    """Tell whether lists have an item for each row, and not a column of all rows as each item."""
    if len({len(piece) for piece in pieces}) > 1:
        return True
    for piece in pieces:
        if any(isinstance(item, Mapping) for item in piece):
            return True
        lengths = []
        for item in piece:
            for leaf in leaves(item):
                if isinstance(leaf, Tensor) and leaf.ndim:
                    lengths.append(len(leaf))
        if len(set(lengths)) != 1:
            return True
    for same in zip(*pieces, strict=True):
        if len({item.shape[1:] for item in same if isinstance(item, Tensor)}) > 1:
            return True
    return False


def _to_array(leaf: Any) -> Any:
    """Convert a tensor to a NumPy array; return anything else as it is."""
    return leaf.numpy() if isinstance(leaf, Tensor) else leaf


def _rebuild(template: Any, joined: Any) -> Any:
    """Put what was joined into the containers that the batches had."""
    container = take_apart(template, inside=True)
    if container is None or isinstance(joined, _Rows):
        return joined
    inner, build = container
    values = list(joined.values()) if isinstance(joined, Mapping) else joined
    return build([_rebuild(part, value) for part, value in zip(inner, values, strict=True)])


class _AttributeDict(dict[Any, Any]):
    """A dict whose items are attributes too, in place of a class that a file cannot hold."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _add_attributes(nest: Any) -> Any:
    """Let the items of dicts in a nest be read as attributes."""
    if isinstance(nest, Mapping):
        return _AttributeDict({key: _add_attributes(part) for key, part in nest.items()})
    if type(nest) in (tuple, list):
        return type(nest)(_add_attributes(part) for part in nest)
    return nest
