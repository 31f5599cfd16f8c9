"""`OnAllRows`: a function that is called once, on the outputs and labels of all rows of a pass.

each batch            update: outputs and labels are copied to the CPU
the end of the pass   compute: the batches are joined, turned into NumPy arrays, and given to the function
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from minikeras.data import leaves, map_leaves, parts
from minikeras.distributed import World
from minikeras.errors import described


class OnAllRows:
    """A metric of `metrics_dict` that is computed once, from all rows, at the end of each pass.

    For a value that is no mean over rows: R2, RMSE, F1, the area under a curve, and any other score
    of scikit-learn. The value does not depend on the batch size.

    The outputs and labels of all batches stay in CPU memory until the pass ends (with several
    processes, those of all processes are then brought to the first, which calls the function), and
    `fit(checkpoint=...)` writes them within an epoch. On an accelerator the copy of each batch waits
    for the device.

    Args:
        function: takes `(y_pred, y_true)`, in this order, the outputs and labels of all rows as
            NumPy arrays (float32 if they were of half precision) in the structure that the model
            and the data have. It gives a number; a dict, list or array of numbers is a column for
            each.

    Raises:
        TypeError: `function` is something else, or takes the labels first as those of scikit-learn.

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

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        _check_function(function)
        self.function = function
        self._template: Any = None  # of (outputs, labels), as they came in last
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        self._batches: list[Any] = []  # (outputs, labels) of each batch in plain containers

    def update(self, y_pred: Any, y_true: Any) -> None:
        """Keep a batch: copy the outputs `y_pred` and the labels `y_true` to the CPU."""
        batch = (y_pred, y_true)
        kept = _plain_nest(batch)
        if self._batches:
            _check_like(kept, self._batches[0])
        self._template = map_leaves(lambda leaf: None, batch)
        self._batches.append(kept)

    def compute(self) -> Any:
        """Give the function's answer on all rows."""
        return self._call(self._batches)

    def _call(self, batches: list[Any]) -> Any:
        if not batches:
            raise ValueError("OnAllRows has seen no rows. Call update before compute.")
        joined = _joined(batches)
        if self._template is None:  # resumed after an epoch's last batch
            y_pred, y_true = _named(joined)
        else:
            y_pred, y_true = _rebuilt(self._template, joined)
        try:
            return self.function(y_pred, y_true)
        except Exception as error:
            shown = f"y_pred {described(y_pred)}, y_true {described(y_true)}"
            error.add_note(f"OnAllRows gave the function all rows as NumPy arrays: {shown}")
            raise

    def state_dict(self) -> dict[str, Any]:
        """Give the rows kept so far, for a checkpoint."""
        return {"batches": list(self._batches)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the rows in a `state` of `state_dict`."""
        self._batches = [_plain_nest(batch) for batch in state["batches"]]

    def __deepcopy__(self, memo: dict[int, Any]) -> OnAllRows:
        """Copy the rows and share the function, which may hold a model or a table."""
        other = OnAllRows(self.function)
        other.load_state_dict(self.state_dict())
        other._template = self._template
        return other


def compute_on_all_processes(
    metric: OnAllRows, world: World, read: Callable[[Any], dict[str, float]]
) -> dict[str, float]:
    """Give `read(answer)` of the answer of `metric` on the rows of all processes.

    All processes of `world` call it at the same place. The rows are in the order of the steps
    and, within a step, of the processes: for data that is not shuffled the order of one process.
    """
    gathered = world.gather(metric._batches, everywhere=False)
    columns: dict[str, float] | None = None
    problem: str | None = None
    failure: Exception | None = None
    if gathered is not None:
        try:
            steps = zip_longest(*gathered)  # the last step may have no rows for some
            batches = [batch for step in steps for batch in step if batch is not None]
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
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin may have no signature
        return
    if names[:1] == ["y_true"]:
        name = getattr(function, "__name__", "function")
        raise TypeError(
            f"{name} takes y_true first, as functions of scikit-learn do, and minikeras calls a "
            f"metric with (y_pred, y_true). Pass OnAllRows(lambda y_pred, y_true: {name}(y_true, "
            "y_pred))."
        )


# --- batches ---


def _plain_nest(nest: Any) -> Any:
    """A nest in dicts, lists and tuples, which a file can hold; its tensors in CPU memory of their own."""
    if isinstance(nest, Tensor):
        # NumPy has no bfloat16
        dtype = torch.float32 if nest.dtype in (torch.bfloat16, torch.float16) else nest.dtype
        return nest.detach().to("cpu", dtype, copy=True)
    found = parts(nest, inside=True)
    if found is None:
        return nest
    inner = [_plain_nest(part) for part in found[0]]
    if isinstance(nest, Mapping):
        return dict(zip(nest, inner, strict=True))
    if hasattr(nest, "_fields"):
        return dict(zip(nest._fields, inner, strict=True))
    if dataclasses.is_dataclass(nest):
        names = [field.name for field in dataclasses.fields(nest) if field.init]
        return dict(zip(names, inner, strict=True))
    return tuple(inner) if isinstance(nest, tuple) else inner


def _check_like(batch: Any, first: Any) -> None:
    """Refuse, when it comes, a batch whose rows cannot be joined to those of the first."""
    if _row_shapes(batch) != _row_shapes(first):
        raise ValueError(
            f"OnAllRows joins the rows of all batches, and this batch is {described(batch)}, but "
            f"the first was {described(first)}. Pad the rows of outputs and labels to one shape."
        )


def _row_shapes(nest: Any) -> Any:
    if isinstance(nest, Tensor):
        return tuple(nest.shape[1:])
    if isinstance(nest, Mapping):
        return {key: _row_shapes(part) for key, part in nest.items()}
    if isinstance(nest, tuple):
        return [_row_shapes(part) for part in nest]
    return None  # a list may hold the rows themselves


class _Rows(list[Any]):
    """A list with an item for each row."""


def _joined(pieces: list[Any]) -> Any:
    """The same part of each batch as one, with arrays in place of tensors."""
    first = pieces[0]
    if isinstance(first, Tensor):
        return (torch.cat(pieces) if first.ndim else torch.stack(pieces)).numpy()
    if isinstance(first, Mapping):
        return {key: _joined([piece[key] for piece in pieces]) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined(list(same)) for same in zip(*pieces, strict=True))
    if isinstance(first, list):
        if _is_row_list(pieces):
            return _Rows(map_leaves(_array, item) for piece in pieces for item in piece)
        return [_joined(list(same)) for same in zip(*pieces, strict=True)]
    return None if first is None else pieces


def _is_row_list(pieces: list[Any]) -> bool:
    """Whether lists have an item for each row, and not a column of all rows as each item."""
    if len({len(piece) for piece in pieces}) > 1:
        return True
    for piece in pieces:
        tensors = [leaf for item in piece for leaf in leaves(item) if isinstance(leaf, Tensor)]
        columns = [tensor for tensor in tensors if tensor.ndim]
        if not columns or any(isinstance(item, Mapping) for item in piece):
            return True
        if len({len(column) for column in columns}) > 1:
            return True
    for same in zip(*pieces, strict=True):
        if len({item.shape[1:] for item in same if isinstance(item, Tensor)}) > 1:
            return True
    return False


def _array(leaf: Any) -> Any:
    return leaf.numpy() if isinstance(leaf, Tensor) else leaf


def _rebuilt(template: Any, joined: Any) -> Any:
    """What was joined in the containers that the batches had."""
    found = parts(template, inside=True)
    if found is None or isinstance(joined, _Rows):
        return joined
    inner, build = found
    values = list(joined.values()) if isinstance(joined, Mapping) else joined
    return build([_rebuilt(part, value) for part, value in zip(inner, values, strict=True)])


class _Named(dict[Any, Any]):
    """A dict whose items are attributes too, in place of a class that a file cannot hold."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _named(nest: Any) -> Any:
    if isinstance(nest, Mapping):
        return _Named((key, _named(part)) for key, part in nest.items())
    if type(nest) in (tuple, list):
        return type(nest)(map(_named, nest))
    return nest
