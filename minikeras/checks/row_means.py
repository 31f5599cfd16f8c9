"""Finds functions of metrics_dict that are no means over rows, in the first batches, and warns of each once.

in the first batches of a pass, for each function that is not yet known:
    its value on the whole batch
    for a few orders of the rows: its values on the two halves, whose mean is the first value if it is a mean over rows
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minikeras.checks.twin import twin_of
from minikeras.data import UnknownRows, cloned, count_rows, join, leaves, map_leaves, parts
from minikeras.distributed import World
from minikeras.errors import is_number
from minikeras.randomness import Randomness

LEAST = 4  # rows that are looked at: two halves of two
BATCHES = 4  # of a pass that are looked at, at most: as many as it takes to have the rows
PASSES = 5  # that are looked at, where earlier ones gave no answer
RELATIVE = 1e-3  # by which a mean may differ, as sums do that are taken in another order
DIGITS = (1, 2, 3, 4)  # to which a metric may round its answer
UNKNOWN, MEAN, OTHER = 0, 1, 2  # what has been found of a function
ENOUGH = 2  # batches that show a mean: in a small one another function may look like it


class RowMeanCheck:
    """Finds functions that are no means over rows, and warns of each once.

    A mean over the rows of a batch is also the mean of the means of its halves, whichever rows
    each half has. Each function is called on the halves of a few orders of the batch's rows: sorted
    by error, by label and by output, so that the halves differ.

    Args:
        looks: name -> batches that have shown a mean; training and validation share it.
        world: the processes that train together. They look at the same time, and call as often.
    """

    def __init__(
        self, looks: Counter[str], device: torch.device, world: World | None = None
    ) -> None:
        self.looks = looks
        self.world = world
        self.randomness = Randomness(device, [])
        self.passes = 0
        self.batches = 0  # of this pass
        self.rows = 0  # of the batch that was looked at
        self.small: list[Any] = []  # batches of too few rows, to be joined
        self.active = False

    def begin(self) -> None:
        """Begin a pass."""
        self.small = []
        self.batches = 0
        self.active = self.passes < PASSES
        self.passes += 1

    def look(
        self, functions: Mapping[str, Any], outputs: Any, labels: Any, counts: bool = True
    ) -> dict[str, int]:
        """Look at the functions on a batch, before they are called on it; what was found, by name.

        `counts` is False for a filler batch.
        """
        pending = {name: metric for name, metric in functions.items() if self.looks[name] < ENOUGH}
        if not pending:
            self.active = False
            return {}
        batch, self.rows = self._batch(outputs, labels) if counts else ((outputs, labels), 0)
        fewest = self.rows
        if self.world is not None:
            fewest = int(-self.world.agree(-self.rows)[0])
        self.batches += 1
        self.active = self.batches < BATCHES
        if fewest < LEAST:
            return {}
        self.small = []
        found = self._judge(pending, *batch)
        if self.world is not None:
            found = [int(kind) for kind in self.world.agree(*found)]
        return dict(zip(pending, found, strict=True))

    def tell(self, found: Mapping[str, int]) -> None:
        """Warn of what was found, once the functions have been called and are not at fault."""
        for name, kind in found.items():
            if kind == MEAN:
                self.looks[name] += 1
            elif kind == OTHER:
                self.looks[name] = ENOUGH
                if self.world is None or self.world.rank == 0:
                    _warn_of_other(name, self.rows)

    def _batch(self, outputs: Any, labels: Any) -> tuple[Any, int]:
        """The batch and its rows, 0 if they cannot be told; a small one joined to the small ones before it."""
        batch = (outputs, labels)
        try:
            rows = count_rows(outputs, labels)
            if isinstance(rows, UnknownRows):
                return batch, 0
            if rows >= LEAST:
                return batch, rows
            self.small.append((map_leaves(cloned, batch), rows))
            pieces, sizes = zip(*self.small, strict=True)
            return join(list(pieces), list(sizes)), sum(sizes)
        except Exception:  # not to be joined, as sequences of different lengths
            return batch, 0

    def _judge(self, functions: Mapping[str, Any], outputs: Any, labels: Any) -> list[int]:
        before = self.randomness.states()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as of a half without positives
                return [
                    _kind_of(metric, outputs, labels, self.rows) for metric in functions.values()
                ]
        finally:
            self.randomness.restore(before)


def _warn_of_other(name: str, rows: int) -> None:
    warnings.warn(
        f"metric {name!r} is no mean over rows: on a batch of {rows} rows its value is not the "
        "mean of its values on two halves of them, so the value of an epoch, the mean over the "
        "batches, depends on batch_size. For the value on all rows pass "
        "minikeras.OnAllRows(function), whose function gets NumPy arrays, or a torchmetrics "
        "object. If the value is a total divided by a count, such as a mean over tokens or a "
        "recall, return minikeras.Average(total, count).",
        stacklevel=2,
    )


def _kind_of(metric: Any, outputs: Any, labels: Any, rows: int) -> int:
    """Whether a function is a mean over rows, or another, or cannot be told from this batch."""
    try:
        function = twin_of(metric)
        whole = _value(function, outputs, labels)
    except Exception:
        return UNKNOWN
    if isinstance(whole, tuple):  # an Average is exact
        return MEAN
    if whole is None or not math.isfinite(whole):
        return UNKNOWN
    tolerance = _tolerance(outputs, labels)
    kind = UNKNOWN
    for order in _orders(outputs, labels, rows):
        middle = rows // 2
        try:
            first = _value(function, *_rows_of((outputs, labels), order[:middle], rows))
            second = _value(function, *_rows_of((outputs, labels), order[middle:], rows))
        except Exception:  # such as of a score that needs both classes
            continue
        if not isinstance(first, float) or not isinstance(second, float):
            continue
        mean = (first * middle + second * (rows - middle)) / rows
        scale = max(abs(whole), abs(first), abs(second))
        near = max(tolerance, _rounding(whole, first, second)) + max(RELATIVE, tolerance) * scale
        if not abs(mean - whole) <= near:  # or one is NaN
            try:
                again = _value(function, outputs, labels)
            except Exception:
                return UNKNOWN
            alike = isinstance(again, float) and abs(again - whole) <= near
            return OTHER if alike else UNKNOWN
        if max(abs(first - whole), abs(second - whole)) > near:
            kind = MEAN
    return kind


def _value(function: Callable[..., Any], outputs: Any, labels: Any) -> Any:
    """A function's answer on copies, as it may edit in place: a float, a tuple or None."""
    outputs, labels = map_leaves(cloned, (outputs, labels))
    with torch.no_grad():
        answer = function(outputs, labels)
    if isinstance(answer, tuple):
        return answer
    return float(answer) if is_number(answer) else None


def _tolerance(outputs: Any, labels: Any) -> float:
    """What rounding may do, by the narrowest dtype in the batch."""
    dtypes = {leaf.dtype for leaf in leaves((outputs, labels)) if isinstance(leaf, Tensor)}
    return max((10 * torch.finfo(one).eps for one in dtypes if one.is_floating_point), default=1e-6)


def _rounding(*values: float) -> float:
    """What rounding has done to values that are all rounded; 0 where they are not."""
    for digits in DIGITS:
        if digits == 1 and max(map(abs, values)) <= 1:
            continue  # a share of few rows may look so; a percentage does not
        if all(math.isclose(round(value, digits), value, rel_tol=1e-7) for value in values):
            return float(10**-digits)
    return 0.0


# --- rows of a batch ---


def _rows_of(nest: Any, index: Tensor, rows: int) -> Any:
    """Some rows of outputs and labels.

    Raises:
        ValueError: there is no row in the outputs, or in the labels where there are labels.
    """
    parts_of_both = []
    for part in nest:
        taken: list[bool] = []
        parts_of_both.append(_taken(part, index, rows, taken))
        if part is not None and not any(taken):
            raise ValueError("the rows are not known")
    return tuple(parts_of_both)


def _taken(nest: Any, index: Tensor, rows: int, taken: list[bool]) -> Any:
    if isinstance(nest, Tensor):
        if nest.ndim == 0 or len(nest) != rows:
            return nest
        taken.append(True)
        return nest.index_select(0, index.to(nest.device))
    if isinstance(nest, list) and len(nest) == rows and not _has_columns(nest, rows):
        taken.append(True)
        return [nest[row] for row in index.tolist()]
    found = parts(nest)
    if found is None:
        return nest
    inner, build = found
    return build([_taken(part, index, rows, taken) for part in inner])


def _has_columns(nest: list[Any], rows: int) -> bool:
    """Whether the items of a list are tensors of all rows, and not an item for each row."""
    return all(isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,) for leaf in leaves(nest))


def _orders(outputs: Any, labels: Any, rows: int) -> Iterator[Tensor]:
    """Orders of the rows, for whose halves a function that is no mean over rows differs."""
    seen: list[Tensor] = []
    for key in _keys(outputs, labels, rows):
        order = key.argsort(stable=True).cpu()
        if not any(torch.equal(order, other) for other in seen):
            seen.append(order)
            yield order


def _keys(outputs: Any, labels: Any, rows: int) -> Iterator[Tensor]:
    """Numbers to sort the rows by: how wrong a row is, its label, its output."""
    prediction, label = _first(outputs, rows), _first(labels, rows)
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
        several = prediction.ndim > 1 and prediction.shape[1] > 1
        key = prediction.argmax(1) if several else prediction
        yield key.reshape(rows, -1).float().mean(1)
    yield torch.arange(rows)


def _first(nest: Any, rows: int) -> Tensor | None:
    """The first tensor that has the rows."""
    for leaf in leaves(nest):
        if (
            isinstance(leaf, Tensor)
            and leaf.ndim
            and len(leaf) == rows
            and leaf.numel()
            and not leaf.is_complex()
        ):
            return leaf.detach()
    return None
