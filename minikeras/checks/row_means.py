"""Warn once of each function in metrics_dict that is not a mean over rows.

in the first batches of a pass, for each function that is not yet known:
    compute its value on the whole batch
    for a few orders of the rows:
        compute its values on the two halves: their mean is the value on the whole batch if the
        function is a mean over rows

These are calls that the user does not expect, so they must change nothing: they get copies, and a
function that can reach the parameters of a network is not called.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from minikeras.errors import is_number
from minikeras.metric_objects import View
from minikeras.nests import leaves, map_leaves, names_in, take_apart
from minikeras.phase import Batch
from minikeras.processes import OneProcess
from minikeras.rows import UnknownRows, count_rows, first_sizes
from minikeras.support.randomness import Randomness
from minikeras.support.reachable import MOST, reachable
from minikeras.support.twin import LARGE, twin_of

LEAST = 4  # fewest rows that are looked at: two halves of two
BATCHES = 4  # most batches of a pass that are looked at, to collect enough rows
PASSES = 5  # most passes that are looked at, if earlier ones gave no answer
RELATIVE = 1e-3  # relative difference of means that may come from the order of a sum
DIGITS = (1, 2, 3, 4)  # decimal digits to which a metric may round its value
# what is known of a function
UNKNOWN = 0
MEAN = 1
OTHER = 2
LEFT_OUT = 3  # another call might change what is not copied
ENOUGH = 2  # batches that must show a mean: in a small one another function may look like a mean


class RowMeanCheck:
    """Find functions that are not means over rows, and warn of each once.

    A mean over the rows of a batch is also the mean over its two halves, whichever rows are in each
    half. Each function is called on the halves of a few orders of the batch's rows: sorted by
    error, by label and by output, so that the halves differ.

    Args:
        looks: name -> batches that have shown a mean; training and validation share it.
        world: the processes that train together. They look at the same batches and call each
            function as often.
    """

    def __init__(self, looks: Counter[str], device: torch.device, world: OneProcess) -> None:
        self.looks = looks
        self.world = world
        self.device = device
        self.passes = 0
        self.batches = 0  # looked at in this pass
        self.rows = 0  # of the batch that was looked at
        self.small: list[Any] = []  # batches of too few rows, to be joined
        self.active = False  # whether the next batch of this pass is looked at

    def begin(self) -> None:
        """Begin a pass."""
        self.small = []
        self.batches = 0
        self.active = self.passes < PASSES
        self.passes += 1

    def look(
        self,
        functions: Mapping[str, Any],
        outputs: Any,
        labels: Any,
        batch: Batch,
        views: Mapping[str, View],
    ) -> dict[str, int]:
        """Judge the functions by a batch, before they are called on it.

        Args:
            functions: name -> function of (outputs, labels).
            batch: of which the outputs are; a filler is not looked at.
            views: name -> what the function sees of a batch, by which the rows are sorted.

        Returns:
            name -> UNKNOWN, MEAN, OTHER or LEFT_OUT, for each function that was looked at.
        """
        pending = {name: metric for name, metric in functions.items() if self.looks[name] < ENOUGH}
        if not pending:
            self.active = False
            return {}
        pair: Any = (outputs, labels)
        self.rows = 0
        if not batch.is_filler:
            pair, self.rows = self._collect(outputs, labels, batch.rows)
        shares = [_shares_what_counts(metric) for metric in pending.values()]
        # one that uses all processes would wait for those in which it is left out
        negative_rows, *shares_anywhere = self.world.agree(-self.rows, *shares)
        fewest = int(-negative_rows)
        self.batches += 1
        self.active = self.batches < BATCHES
        if fewest < LEAST:
            return {}
        self.small = []
        judged = {}
        for (name, metric), is_shared in zip(pending.items(), shares_anywhere, strict=True):
            if not is_shared:
                judged[name] = metric
        found = dict.fromkeys(pending, LEFT_OUT)
        if judged:
            kinds = self.world.agree(*self._judge(judged, pair, views))
            for name, kind in zip(judged, kinds, strict=True):
                found[name] = int(kind)
        return found

    def tell(self, found: Mapping[str, int]) -> None:
        """Warn of functions that are not means, once they have been called without an error."""
        for name, kind in found.items():
            if kind == MEAN:
                self.looks[name] += 1
            elif kind == OTHER:
                self.looks[name] = ENOUGH
                if self.world.rank == 0:
                    _warn_of_other(name)
            elif kind == LEFT_OUT:
                self.looks[name] = ENOUGH

    def _collect(
        self, outputs: Any, labels: Any, rows_of_batch: int | UnknownRows
    ) -> tuple[Any, int]:
        """Return outputs and labels, and their rows, 0 if they are unknown.

        Those of a small batch are joined to the ones of small batches before it.
        """
        pair = (outputs, labels)
        try:
            rows = rows_of_batch
            if rows not in first_sizes(outputs):
                rows = count_rows(outputs, labels)
            if isinstance(rows, UnknownRows):
                return pair, 0
            if rows >= LEAST:
                return pair, rows
            self.small.append((map_leaves(_copy_leaf, pair), rows))
            pieces, sizes = zip(*self.small, strict=True)
            return _join_rows(list(pieces), list(sizes)), sum(sizes)
        except Exception:  # they cannot be joined, such as sequences of different lengths
            return pair, 0

    def _judge(
        self, functions: Mapping[str, Any], pair: tuple[Any, Any], views: Mapping[str, View]
    ) -> list[int]:
        """Judge each function, with random states as they were before."""
        randomness = Randomness(self.device, [], roots=functions)
        before = randomness.states()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as of a half without positives
                kinds = []
                for name, metric in functions.items():
                    kind = _judge_function(metric, views.get(name), *pair, self.rows)
                    kinds.append(kind)
                return kinds
        finally:
            randomness.restore(before)


def _warn_of_other(name: str) -> None:
    """Warn of a function that is not a mean over rows."""
    warnings.warn(
        f"metric {name!r} gives another number if a batch is split in two, so its value for an "
        "epoch depends on batch_size. For the value on all rows pass "
        "minikeras.OnAllRows(function), whose function gets NumPy arrays, or a torchmetrics "
        "object. If the value is a total divided by a count, such as a mean over tokens or a "
        "recall, return minikeras.Average(total, count).",
        stacklevel=2,
    )


def _shares_what_counts(metric: Any) -> bool:
    """Tell whether a function can reach values that a copy of it would share.

    They are the parameters of a network, with their gradients, and large tables. A method of the
    model reaches them, and so does a function that clips gradients or averages weights.
    """
    visited = 0
    try:
        for _, value in reachable({"metric": metric}):
            visited += 1
            if isinstance(value, nn.Module) and next(value.parameters(), None) is not None:
                return True
            if isinstance(value, nn.Parameter):
                return True
            if isinstance(value, Tensor) and value.numel() > LARGE:
                return True
            if isinstance(value, (np.ndarray, pd.DataFrame, pd.Series)) and value.size > LARGE:
                return True
    except Exception:  # an object's own attributes may raise anything
        return True
    return visited >= MOST  # there may be more


def _judge_function(metric: Any, view: View | None, outputs: Any, labels: Any, rows: int) -> int:
    """Tell whether a function is a mean over rows, is not, or cannot be judged by this batch."""
    y_pred, y_true = outputs, labels
    try:
        function = twin_of(metric)
        whole = _compute(function, outputs, labels)
        if view is not None:
            y_pred, y_true = twin_of(view)(*map_leaves(_copy_leaf, (outputs, labels)))
    except Exception:
        return UNKNOWN
    if isinstance(whole, tuple):  # an Average is exact
        return MEAN
    if whole is None or not math.isfinite(whole):
        return UNKNOWN
    tolerance = _find_tolerance(y_pred, y_true)
    kind = UNKNOWN
    for order in _sort_rows(y_pred, y_true, rows):
        middle = rows // 2
        try:
            first = _compute(function, *_select_rows((outputs, labels), order[:middle], rows))
            second = _compute(function, *_select_rows((outputs, labels), order[middle:], rows))
        except Exception:  # such as of a score that needs both classes
            continue
        if not isinstance(first, float) or not isinstance(second, float):
            continue
        mean = (first * middle + second * (rows - middle)) / rows
        scale = max(abs(whole), abs(first), abs(second))
        absolute = max(tolerance, _find_rounding(whole, first, second))
        allowed = absolute + max(RELATIVE, tolerance) * scale
        if not abs(mean - whole) <= allowed:  # also if one of them is NaN
            try:
                again = _compute(function, *_select_rows((outputs, labels), order, rows))
            except Exception:
                return UNKNOWN
            # not if it draws random numbers, or looks at the order of what are taken for rows
            is_repeatable = isinstance(again, float) and abs(again - whole) <= allowed
            return OTHER if is_repeatable else UNKNOWN
        if max(abs(first - whole), abs(second - whole)) > allowed:
            kind = MEAN
    return kind


def _compute(function: Callable[..., Any], outputs: Any, labels: Any) -> Any:
    """Call a function on copies, since it may work in place; return a float, a tuple or None."""
    outputs, labels = map_leaves(_copy_leaf, (outputs, labels))
    with torch.no_grad():
        value = function(outputs, labels)
    if isinstance(value, tuple):
        return value
    return float(value) if is_number(value) else None


def _copy_leaf(leaf: Any) -> Any:
    """Copy a leaf, since a metric may work in place."""
    return leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)


def _find_tolerance(outputs: Any, labels: Any) -> float:
    """Return the error that rounding may cause, from the narrowest dtype in the batch."""
    errors = []
    for leaf in leaves((outputs, labels)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            errors.append(10 * torch.finfo(leaf.dtype).eps)
    return max(errors, default=1e-6)


def _find_rounding(*values: float) -> float:
    """Return the unit to which all these values are rounded; 0 if they are not rounded."""
    for digits in DIGITS:
        if digits == 1 and max(map(abs, values)) <= 1:
            continue  # a fraction of few rows may look rounded; a percentage does not
        if all(math.isclose(round(value, digits), value, rel_tol=1e-7) for value in values):
            return float(10**-digits)
    return 0.0


# --- rows of a batch ---


def _select_rows(pair: tuple[Any, Any], index: Tensor, rows: int) -> tuple[Any, ...]:
    """Select some rows of outputs and labels.

    Raises:
        ValueError: the outputs have no rows, or labels are given and have none.
    """
    selected = []
    for nest in pair:
        part, has_rows = _select(nest, index, rows)
        selected.append(part)
        if nest is not None and not has_rows:
            raise ValueError("the rows are not known")
    return tuple(selected)


def _select(nest: Any, index: Tensor, rows: int) -> tuple[Any, bool]:
    """Select some rows of a nest; the second value tells whether anything in it has the rows."""
    if isinstance(nest, Tensor):
        if not _has_rows(nest, rows):
            return nest, False
        return nest.index_select(0, index.to(nest.device)), True
    if _has_items_by_row(nest, rows):
        return [nest[row] for row in index.tolist()], True
    container = take_apart(nest)
    if container is None:
        return nest, False
    inner, build = container
    selected = []
    any_has_rows = False
    for part in inner:
        selected_part, has_rows = _select(part, index, rows)
        selected.append(selected_part)
        any_has_rows = any_has_rows or has_rows
    return build(selected), any_has_rows


def _join_rows(pieces: list[Any], rows: list[int]) -> Any:
    """Join the same part of several batches along the rows.

    The structure stays: a tuple of two outputs is not a list of two rows, in a batch of two rows
    either.

    Raises:
        ValueError: the parts differ in structure, or in what has no rows.
    """
    first = pieces[0]
    if isinstance(first, Tensor):
        if all(_has_rows(piece, number) for piece, number in zip(pieces, rows, strict=True)):
            return torch.cat(pieces)
        if all(isinstance(piece, Tensor) and torch.equal(piece, first) for piece in pieces):
            return first
        raise ValueError("tensors without the rows, and with other numbers in each batch")
    by_row = set(map(_has_items_by_row, pieces, rows))
    if by_row == {True}:
        return list(chain.from_iterable(pieces))
    if by_row == {True, False}:
        raise ValueError("lists that have an item for each row in some of the batches")
    container = take_apart(first)
    if container is None:
        if all(piece == first for piece in pieces):
            return first
        raise ValueError("values that differ")
    _, build = container
    columns = []
    for piece in pieces:
        container = take_apart(piece)
        if container is None or type(piece) is not type(first):
            raise ValueError("containers of different types")
        if names_in(piece) != names_in(first):
            raise ValueError("containers with different names")
        columns.append(container[0])
    return build([_join_rows(list(parts), rows) for parts in zip(*columns, strict=True)])


def _has_rows(leaf: Any, rows: int) -> bool:
    """Tell whether a leaf is a tensor with the rows first."""
    return isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,)


def _has_items_by_row(nest: Any, rows: int) -> bool:
    """Tell whether the items of a list are the rows, and not parts such as several outputs.

    Raises:
        ValueError: they may be either.
    """
    if not isinstance(nest, list) or len(nest) != rows:
        return False
    kinds = []
    for item in nest:
        kind = _describe_kind(item)
        if kind not in kinds:
            kinds.append(kind)
    if len(kinds) != 1:
        return False
    with_rows = [[_has_rows(leaf, rows) for leaf in leaves(item)] for item in nest]
    if all(all(item) for item in with_rows):
        return False
    has_one_shape = all(isinstance(item, Tensor) and item.shape == nest[0].shape for item in nest)
    if has_one_shape or all(any(item) for item in with_rows):
        raise ValueError("a list of as many items as rows, which may be rows or parts")
    return True


def _describe_kind(item: Any) -> tuple[Any, ...]:
    """Return what the items of a list have in common if each is a row."""
    if isinstance(item, Tensor):
        return item.dtype, item.ndim
    if isinstance(item, Mapping):
        return type(item), list(item)
    return (type(item),)


def _sort_rows(outputs: Any, labels: Any, rows: int) -> Iterator[Tensor]:
    """Yield orders of the rows whose halves tell a mean over rows from other functions."""
    seen: list[Tensor] = []
    for key in _sort_keys(outputs, labels, rows):
        order = key.argsort(stable=True).cpu()
        if not any(torch.equal(order, other) for other in seen):
            seen.append(order)
            yield order


def _sort_keys(outputs: Any, labels: Any, rows: int) -> Iterator[Tensor]:
    """Yield numbers to sort the rows by: the error of a row, its label, its output."""
    prediction = _find_first(outputs, rows)
    label = _find_first(labels, rows)
    if prediction is not None and label is not None:
        if prediction.numel() == label.numel():
            difference = prediction.reshape(rows, -1).float() - label.reshape(rows, -1).float()
            yield difference.abs().mean(1)
        elif prediction.ndim > 1 and prediction[:, 0].numel() == label.numel():
            right = prediction.argmax(1).reshape(rows, -1) == label.reshape(rows, -1)
            yield right.float().mean(1)
    if label is not None:
        yield label.reshape(rows, -1).float().mean(1)
    if prediction is not None:
        has_classes = prediction.ndim > 1 and prediction.shape[1] > 1
        key = prediction.argmax(1) if has_classes else prediction
        yield key.reshape(rows, -1).float().mean(1)
    yield torch.arange(rows)


def _find_first(nest: Any, rows: int) -> Tensor | None:
    """Return the first tensor that has the rows, if it is not complex."""
    for leaf in leaves(nest):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.is_complex():
            continue
        if len(leaf) == rows and leaf.numel():
            return leaf.detach()
    return None
