"""How many rows a batch has: the number that weighs its means.

a batch's own int `batch_size`      wins
labels                              the first size on which all of them agree; 1 for a single number;
                                    the items of a list of dicts, numbers or tensors of unequal shapes
features                            settle what labels leave open, in the same way

Where labels and features contradict each other the rows are unknown, which is an error as soon as
they are needed: an `Average` needs none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NoReturn

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from minikeras.data.nests import leaves, parts
from minikeras.errors import described, is_number


class UnknownRows:
    """Stands for the rows of a batch that cannot be counted, and says why."""

    def __init__(self, why: str) -> None:
        self.why = why

    def refuse(self) -> NoReturn:
        """Raise the error: somebody needs the number."""
        raise ValueError(
            f"the rows of a batch, over which the means are taken, cannot be told: {self.why}. "
            "Give labels whose first size is the number of rows; or set an int `batch_size` on "
            "the batch, as an attribute of an object or a dict subclass of your own; or return "
            "minikeras.Average(total, count) from the loss and the metrics."
        )


@dataclass
class Reading:
    """The numbers of rows that a nest may have."""

    sizes: set[int] = field(default_factory=set)  # a first size on which all tensors agree
    items: set[int] = field(default_factory=set)  # the length of a list, if its items may be rows
    single: bool = False  # one number, or several that are not in a list
    is_list: bool = False
    by_item_likely: bool = False  # dicts, or images of unequal shapes

    @property
    def all(self) -> set[int]:
        return self.sizes | self.items


class RowCounter:
    """Counts the rows of the batches of one pass, by one rule for all of them.

    What one batch leaves open, such as a list of one image, the batches before it may tell.
    `takes_several` says whether the model's forward takes such features as several arguments.
    """

    def __init__(self, takes_several: Callable[[Any], bool] = lambda features: False) -> None:
        self.takes_several = takes_several
        self.ratio: float | None = (
            None  # labels per row of the features, where that is a whole number
        )
        self.by_segments = False  # the features hold the number of each row, as a graph's nodes do
        self.by_item: bool | None = None  # whether the items of lists are the rows
        self.guess: tuple[int, int] | None = (
            None  # items and first size of a list that may be either
        )

    def count(self, features: Any, labels: Any = None) -> int | UnknownRows:
        """The rows of a batch."""
        if (
            isinstance(labels, Tensor)
            and isinstance(features, Tensor)
            and labels.ndim
            and features.ndim
        ):
            rows = labels.shape[0]
            if features.shape[0] == rows:
                self.ratio = 1.0
                return rows
        rows_stated = stated(labels)
        if rows_stated is None:
            rows_stated = stated(features)
        if rows_stated is not None:
            return rows_stated
        wanted, given = read(labels), read(features)
        if given is not None and given.items and self.are_arguments(features):
            given.items = set()
        if wanted is not None and wanted.single:
            return 1
        if wanted is None:
            return self._from_features(features, labels, given)
        if given is None or given.single:
            return self._among(wanted.all, wanted, wanted, features, labels)
        common = wanted.all & given.all
        if common:
            self.ratio = 1.0
            return self._among(common, wanted, given, features, labels)
        return self._apart(features, labels, wanted, given)

    def are_arguments(self, features: Any) -> bool:
        """Whether a list of features has the arguments of forward, and not rows: images may be rows all the same."""
        arrays = isinstance(features, (list, tuple)) and all(
            is_array(part) and part.ndim < 3 for part in features
        )
        return arrays and self.takes_several(features)

    def _from_features(
        self, features: Any, labels: Any, given: Reading | None
    ) -> int | UnknownRows:
        if given is None and features is None:
            return 1
        if given is None:
            return UnknownRows(
                f"there is no tensor in features {described(features)}, labels {described(labels)}"
            )
        if given.single:
            return 1
        return self._among(given.all, given, given, features, labels)

    def _among(
        self, candidates: set[int], wanted: Reading, given: Reading, features: Any, labels: Any
    ) -> int | UnknownRows:
        """One of the numbers that are left: at most the items of a list, and the first size in it."""
        if not candidates:
            return UnknownRows(
                f"first sizes differ in features {described(features)}, labels {described(labels)}"
            )
        is_list = wanted.is_list or given.is_list
        if len(candidates) == 1:
            (rows,) = candidates
            by_item = rows in wanted.items and rows not in wanted.sizes
            by_size = rows in wanted.sizes and rows not in wanted.items
            if is_list and by_item != by_size and wanted.items:
                return self._learned(by_item, rows, features, labels)
            return rows
        (items,) = candidates & wanted.items or {0}
        size = next(iter(candidates - {items}))
        if not items or len(candidates) > 2:
            return UnknownRows(f"it may be {' or '.join(map(str, sorted(candidates)))}")
        return self._guessed(items, size, wanted, given, features, labels)

    def _guessed(
        self, items: int, size: int, wanted: Reading, given: Reading, features: Any, labels: Any
    ) -> int | UnknownRows:
        """Items or first size of a list that may be either; other batches must not contradict the choice."""
        if self.by_item is None:
            likely = wanted.by_item_likely or (
                given.by_item_likely and not self.takes_several(features)
            )
            self.by_item = likely
        elif self.guess is not None and self.guess != (items, size):
            items_changed, size_changed = items != self.guess[0], size != self.guess[1]
            if items_changed != size_changed and items_changed != self.by_item:
                return self._contradiction(features, labels)
        self.guess = (items, size)
        return items if self.by_item else size

    def _learned(self, by_item: bool, rows: int, features: Any, labels: Any) -> int | UnknownRows:
        """A batch that leaves nothing open tells for those that do."""
        if self.guess is not None and self.by_item != by_item:
            return self._contradiction(features, labels)
        self.by_item = by_item
        return rows

    def _contradiction(self, features: Any, labels: Any) -> UnknownRows:
        was, now = "first size of its tensors", "number of its items"
        if self.by_item:
            was, now = now, was
        return UnknownRows(
            f"so far the rows of a list were taken to be the {was}, and this batch has the {now} "
            f"for it, with features {described(features)}, labels {described(labels)}"
        )

    def _apart(
        self, features: Any, labels: Any, wanted: Reading, given: Reading
    ) -> int | UnknownRows:
        """Labels and features with no number in common."""
        if not wanted.sizes:
            return self._list_apart(features, labels, wanted, given)
        rows = next(iter(wanted.sizes))
        shapes = shapes_of(features)
        inside = any(
            rows in shape[:2] for shape in shapes
        )  # time first, or tokens and their offsets
        if rows == 1 or inside or not given.sizes or rows in flattened(shapes):
            return rows
        (size,) = given.sizes
        if rows and (rows % size == 0 or size % rows == 0) and self.ratio in (None, rows / size):
            self.ratio = rows / size
            return rows
        self.by_segments = self.by_segments or (rows < size and holds_segments(features, rows))
        return rows if self.by_segments else self._disagreement(features, labels)

    def _list_apart(
        self, features: Any, labels: Any, wanted: Reading, given: Reading
    ) -> int | UnknownRows:
        """Labels without a first size in common, and features that have another number.

        They are a label for each row, or the labels of all rows in one tensor, next to their
        lengths: the features must show which.
        """
        agreed = first_sizes(labels) & given.sizes
        if len(agreed) == 1:
            return agreed.pop()
        if not wanted.items or first_sizes(labels) & first_sizes(features):
            return self._disagreement(features, labels)
        (rows,) = wanted.items
        if rows == 1 or any(rows in shape[1:2] for shape in shapes_of(features)):  # time first
            return rows
        if not given.sizes and (wanted.by_item_likely or holds_segments(features, rows)):
            return rows
        return self._disagreement(features, labels)

    def _disagreement(self, features: Any, labels: Any) -> UnknownRows:
        return UnknownRows(
            f"features {described(features)} and labels {described(labels)} do not agree on them"
        )


def count_rows(features: Any, labels: Any = None) -> int | UnknownRows:
    """The rows of one batch by itself.

    >>> import torch
    >>> count_rows((torch.zeros(30), torch.zeros(8)), labels={"y": torch.zeros(8, 1)})
    8
    >>> boxes = [{"boxes": torch.zeros(5, 4)}, {"boxes": torch.zeros(1, 4)}]
    >>> count_rows([torch.zeros(3, 8, 9), torch.zeros(3, 6, 9)], boxes)
    2
    """
    return RowCounter().count(features, labels)


def first_size(nest: Any, unknown: int | None = None) -> int:
    """The first size of the first tensor in a nest; an error or `unknown` where it has none.

    >>> import torch
    >>> first_size({"a": torch.zeros(3, 2)})
    3
    """
    rows = stated(nest)
    if rows is not None:
        return rows
    found = leaves(nest, inside=True)
    for leaf in found:
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])
        if is_array(leaf) and leaf.ndim:
            return len(leaf)
    if unknown is None and not all(leaf is None or is_number(leaf) for leaf in found):
        UnknownRows(f"there is no tensor in {described(nest)}").refuse()
    return 1 if unknown is None else unknown


def stated(nest: Any) -> int | None:
    """The int that the batch, or an object in it, has as its `batch_size`."""
    if nest is None or isinstance(nest, (Tensor, np.ndarray, PackedSequence, str, int, float)):
        return None
    try:
        rows = getattr(nest, "batch_size", None)
    except Exception:  # a dict with a __getattr__ of its own, which knows its keys alone
        rows = None
    if isinstance(rows, int) and not isinstance(rows, bool):
        return rows
    found = parts(nest, inside=True)
    for part in () if found is None else found[0]:
        rows = stated(part)
        if rows is not None:
            return rows
    return None


def is_array(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, np.ndarray))


def read(nest: Any) -> Reading | None:
    """The numbers of rows that a nest may have; None where there is nothing to count."""
    if isinstance(nest, PackedSequence):
        return Reading({int(nest.batch_sizes[0])})
    if is_array(nest):
        return Reading({int(nest.shape[0])}) if nest.ndim else Reading(single=True)
    if is_number(nest) or isinstance(nest, (str, bytes)):
        return Reading(single=True)
    found = parts(nest, inside=True)
    if found is None:
        return None
    inner = found[0]
    children = [reading for reading in map(read, inner) if reading is not None]
    is_list = isinstance(nest, (list, tuple)) and not hasattr(nest, "_fields")
    if not children:
        return None
    sized = [child for child in children if not child.single]
    if not sized:
        return Reading(items={len(inner)}, is_list=True) if is_list else Reading(single=True)
    sizes = set.intersection(*(child.all for child in sized))
    if not is_list or not alike(inner):
        return Reading(sizes, is_list=any(child.is_list for child in sized))
    unequal = all(map(is_array, inner)) and len({tuple(part.shape) for part in inner}) > 1
    images = unequal and inner[0].ndim == 3
    return Reading(
        sizes, {len(inner)}, is_list=True, by_item_likely=images or not is_array(inner[0])
    )


def alike(items: list[Any]) -> bool:
    """Whether the items of a list may be rows: tensors of one dtype and number of dimensions, or containers."""
    if all(map(is_array, items)):
        return len({(leaf.dtype, leaf.ndim) for leaf in items}) == 1
    return all(
        parts(item, inside=True) is not None and type(item) is type(items[0]) for item in items
    )


def first_sizes(nest: Any) -> set[int]:
    """The first size of each tensor in a nest."""
    return {
        int(leaf.shape[0]) for leaf in leaves(nest, inside=True) if is_array(leaf) and leaf.ndim
    }


def shapes_of(nest: Any) -> list[tuple[int, ...]]:
    """The shape of each tensor in a nest."""
    return [tuple(leaf.shape) for leaf in leaves(nest, inside=True) if is_array(leaf)]


def flattened(shapes: list[tuple[int, ...]]) -> Iterator[int]:
    """What the rows may be when they are flattened with other dimensions, as tokens or pixels are."""
    for shape in shapes:
        for number in range(1, len(shape)):
            for others in combinations(shape[1:], number):
                yield shape[0] * math.prod(others)


def holds_segments(features: Any, rows: int) -> bool:
    """Whether a tensor of integers among the features goes up to the last row: each unit's number of its row."""
    for leaf in leaves(features, inside=True):
        whole = isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.is_complex())
        if (
            whole and leaf.ndim and leaf.numel() and int(leaf.max()) == rows - 1
        ):  # waits, in the first batch alone
            return True
    return False
