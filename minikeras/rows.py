"""Count the rows of a batch: the weight of its means in the means over an epoch.

You may skip this file at a first reading.

an int `batch_size` of the batch    wins
labels                              the first size that all tensors share; 1 for a single number;
                                    the items of a list of dicts, of numbers or of tensors of
                                    unequal shapes
features                            settle what labels leave open, in the same way

If labels and features contradict each other the rows are unknown. That is an error as soon as the
number is needed; an `Average` does not need it.
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

from minikeras.errors import describe, is_number
from minikeras.nests import leaves, take_apart


class UnknownRows:
    """Stand in for the number of rows of a batch that cannot be counted, and say why."""

    def __init__(self, why: str) -> None:
        self.why = why

    def refuse(self) -> NoReturn:
        """Raise the error, since the number is needed."""
        raise ValueError(
            f"the rows of a batch, over which the means are taken, cannot be told: {self.why}. "
            "Give labels whose first size is the number of rows; or set an int `batch_size` on "
            "the batch, as an attribute of an object or a dict subclass of your own; or return "
            "minikeras.Average(total, count) from the loss and the metrics."
        )


@dataclass
class Reading:
    """The numbers of rows that a nest may have."""

    sizes: set[int] = field(default_factory=set)  # a first size that all tensors share
    items: set[int] = field(default_factory=set)  # the length of a list, if its items may be rows
    single: bool = False  # one number, or several that are not in a list
    is_list: bool = False
    by_item_likely: bool = False  # dicts, or images of unequal shapes

    @property
    def all(self) -> set[int]:
        """All numbers that may be the number of rows."""
        return self.sizes | self.items


class RowCounter:
    """Count the rows of the batches of one pass, by one rule for all of them.

    What one batch leaves open, such as a list of one image, earlier batches may have settled.
    `takes_several` tells whether the model's forward takes such features as several arguments.
    """

    def __init__(self, takes_several: Callable[[Any], bool] = lambda features: False) -> None:
        self.takes_several = takes_several
        # labels per row of the features, or the reverse: one of the two is a whole number
        self.ratio: float | None = None
        # whether a tensor of the features has the row number of each unit, as of a graph's nodes
        self.by_segments = False
        # whether the items of lists are the rows
        self.by_item: bool | None = None
        # items and first size of a list, either of which may be the rows
        self.guess: tuple[int, int] | None = None

    def count(self, features: Any, labels: Any = None) -> int | UnknownRows:
        """Count the rows of a batch."""
        if labels is None and isinstance(features, Tensor) and features.ndim:
            return features.shape[0]
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
        rows_stated = get_stated_rows(labels)
        if rows_stated is None:
            rows_stated = get_stated_rows(features)
        if rows_stated is not None:
            return rows_stated
        wanted = read_sizes(labels)
        given = read_sizes(features)
        if given is not None and given.items and self.are_arguments(features):
            given.items = set()
        if wanted is not None and wanted.single:
            return 1
        if wanted is None:
            return self._count_from_features(features, labels, given)
        if given is None or given.single:
            return self._choose(wanted.all, wanted, wanted, features, labels)
        common = wanted.all & given.all
        if common:
            self.ratio = 1.0
            return self._choose(common, wanted, given, features, labels)
        return self._count_apart(features, labels, wanted, given)

    def are_arguments(self, features: Any) -> bool:
        """Tell whether a list of features holds the arguments of forward, and not rows.

        Arrays of three and more dimensions may be images, and so rows, in spite of such a forward.
        """
        if not isinstance(features, (list, tuple)):
            return False
        if not all(is_array(part) and part.ndim < 3 for part in features):
            return False
        return self.takes_several(features)

    def _count_from_features(
        self, features: Any, labels: Any, given: Reading | None
    ) -> int | UnknownRows:
        """Count the rows of a batch whose labels say nothing."""
        if given is None and features is None:
            return 1
        if given is None:
            return UnknownRows(
                f"there is no tensor in features {describe(features)}, labels {describe(labels)}"
            )
        if given.single:
            return 1
        return self._choose(given.all, given, given, features, labels)

    def _choose(
        self, candidates: set[int], wanted: Reading, given: Reading, features: Any, labels: Any
    ) -> int | UnknownRows:
        """Choose one of the numbers left: at most the items of a list, and the first size in it."""
        if not candidates:
            return UnknownRows(
                f"first sizes differ in features {describe(features)}, labels {describe(labels)}"
            )
        is_list = wanted.is_list or given.is_list
        if len(candidates) == 1:
            (rows,) = candidates
            by_item = rows in wanted.items and rows not in wanted.sizes
            by_size = rows in wanted.sizes and rows not in wanted.items
            if is_list and by_item != by_size and wanted.items:
                return self._learn(by_item, rows, features, labels)
            return rows
        # A Reading has at most one number of items.
        (items,) = candidates & wanted.items or {0}
        size = next(iter(candidates - {items}))
        if not items or len(candidates) > 2:
            return UnknownRows(f"it may be {' or '.join(map(str, sorted(candidates)))}")
        return self._choose_by_guess(items, size, wanted, given, features, labels)

    def _choose_by_guess(
        self, items: int, size: int, wanted: Reading, given: Reading, features: Any, labels: Any
    ) -> int | UnknownRows:
        """Choose the items or the first size of a list; later batches must not contradict it."""
        if self.by_item is None:
            self.by_item = wanted.by_item_likely
            if given.by_item_likely and not self.takes_several(features):
                self.by_item = True
        elif self.guess is not None and self.guess != (items, size):
            items_changed = items != self.guess[0]
            size_changed = size != self.guess[1]
            if items_changed != size_changed and items_changed != self.by_item:
                return self._report_contradiction(features, labels)
        self.guess = (items, size)
        return items if self.by_item else size

    def _learn(self, by_item: bool, rows: int, features: Any, labels: Any) -> int | UnknownRows:
        """Take the rule from a batch that leaves nothing open, for batches that do."""
        if self.guess is not None and self.by_item != by_item:
            return self._report_contradiction(features, labels)
        self.by_item = by_item
        return rows

    def _report_contradiction(self, features: Any, labels: Any) -> UnknownRows:
        """Say that this batch contradicts the rule of earlier batches."""
        was = "first size of its tensors"
        now = "number of its items"
        if self.by_item:
            was, now = now, was
        return UnknownRows(
            f"so far the rows of a list were taken to be the {was}, and this batch has the {now} "
            f"for it, with features {describe(features)}, labels {describe(labels)}"
        )

    def _count_apart(
        self, features: Any, labels: Any, wanted: Reading, given: Reading
    ) -> int | UnknownRows:
        """Count the rows if labels and features have no number in common."""
        if not wanted.sizes:
            return self._count_list_apart(features, labels, wanted, given)
        rows = next(iter(wanted.sizes))
        shapes = shapes_of(features)
        # time first, or tokens and their offsets
        inside = any(rows in shape[:2] for shape in shapes)
        if rows == 1 or inside or not given.sizes or rows in flattened_rows(shapes):
            return rows
        (size,) = given.sizes
        if rows and (rows % size == 0 or size % rows == 0) and self.ratio in (None, rows / size):
            self.ratio = rows / size
            return rows
        if not self.by_segments:
            self.by_segments = rows < size and has_row_numbers(features, rows)
        if self.by_segments:
            return rows
        return self._report_disagreement(features, labels)

    def _count_list_apart(
        self, features: Any, labels: Any, wanted: Reading, given: Reading
    ) -> int | UnknownRows:
        """Count the rows if labels share no first size, and features have another number.

        Labels are a list with an item for each row, or one tensor with the labels of all rows next
        to their lengths: the features must show which.
        """
        agreed = first_sizes(labels) & given.sizes
        if len(agreed) == 1:
            return agreed.pop()
        if not wanted.items or first_sizes(labels) & first_sizes(features):
            return self._report_disagreement(features, labels)
        (rows,) = wanted.items
        if rows == 1 or any(rows in shape[1:2] for shape in shapes_of(features)):  # time first
            return rows
        if not given.sizes and (wanted.by_item_likely or has_row_numbers(features, rows)):
            return rows
        return self._report_disagreement(features, labels)

    def _report_disagreement(self, features: Any, labels: Any) -> UnknownRows:
        """Say that features and labels do not agree."""
        return UnknownRows(
            f"features {describe(features)} and labels {describe(labels)} do not agree on them"
        )


def count_rows(features: Any, labels: Any = None) -> int | UnknownRows:
    """Count the rows of one batch, without what other batches of a pass could add.

    >>> import torch
    >>> count_rows((torch.zeros(30), torch.zeros(8)), labels={"y": torch.zeros(8, 1)})
    8
    >>> boxes = [{"boxes": torch.zeros(5, 4)}, {"boxes": torch.zeros(1, 4)}]
    >>> count_rows([torch.zeros(3, 8, 9), torch.zeros(3, 6, 9)], boxes)
    2
    """
    return RowCounter().count(features, labels)


def settle_by_weight(
    rows: int | UnknownRows, features: Any, labels: Any, sample_weight: Any
) -> int | UnknownRows:
    """Let a weight for each row settle what labels and features leave open."""
    if isinstance(sample_weight, Tensor) and sample_weight.ndim:
        weights = len(sample_weight)
        if isinstance(rows, UnknownRows) or weights in first_sizes((features, labels)):
            return weights
    return rows


def first_size(nest: Any, unknown: int | None = None) -> int:
    """Return the first size of the first tensor in a nest; without a tensor raise, or `unknown`.

    >>> import torch
    >>> first_size({"a": torch.zeros(3, 2)})
    3
    """
    rows = get_stated_rows(nest)
    if rows is not None:
        return rows
    all_leaves = leaves(nest, inside=True)
    for leaf in all_leaves:
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])
        if is_array(leaf) and leaf.ndim:
            return len(leaf)
    if unknown is not None:
        return unknown
    if not all(leaf is None or is_number(leaf) for leaf in all_leaves):
        UnknownRows(f"there is no tensor in {describe(nest)}").refuse()
    return 1


def get_batch_size(batch: Any) -> int | None:
    """Return the `batch_size` of an object, if it is an int."""
    try:
        rows = getattr(batch, "batch_size", None)
    except Exception:  # a dict with a custom __getattr__ that knows only its keys
        return None
    if isinstance(rows, int) and not isinstance(rows, bool):
        return rows
    return None


def get_stated_rows(nest: Any) -> int | None:
    """Return the int `batch_size` of the batch, or of an object in it."""
    if nest is None or isinstance(nest, (Tensor, np.ndarray, PackedSequence, str, int, float)):
        return None
    rows = get_batch_size(nest)
    if rows is not None:
        return rows
    container = take_apart(nest, inside=True)
    if container is None:
        return None
    for part in container[0]:
        rows = get_stated_rows(part)
        if rows is not None:
            return rows
    return None


def is_array(leaf: Any) -> bool:
    """Tell whether a leaf is a tensor or a NumPy array."""
    return isinstance(leaf, (Tensor, np.ndarray))


def read_sizes(nest: Any) -> Reading | None:
    """Collect the numbers of rows that a nest may have; None if nothing in it can be counted."""
    if isinstance(nest, PackedSequence):
        return Reading({int(nest.batch_sizes[0])})
    if is_array(nest):
        return Reading({int(nest.shape[0])}) if nest.ndim else Reading(single=True)
    if is_number(nest) or isinstance(nest, (str, bytes)):
        return Reading(single=True)
    container = take_apart(nest, inside=True)
    if container is None:
        return None
    inner = container[0]
    children = []
    for part in inner:
        reading = read_sizes(part)
        if reading is not None:
            children.append(reading)
    is_list = isinstance(nest, (list, tuple)) and not hasattr(nest, "_fields")
    if not children:
        return None
    sized = [child for child in children if not child.single]
    if not sized:
        if is_list:
            return Reading(items={len(inner)}, is_list=True)
        return Reading(single=True)
    sizes = set.intersection(*(child.all for child in sized))
    if not is_list or not may_be_rows(inner):
        return Reading(sizes, is_list=any(child.is_list for child in sized))
    by_item_likely = not is_array(inner[0])
    if all(map(is_array, inner)):
        shapes = {tuple(part.shape) for part in inner}
        by_item_likely = len(shapes) > 1 and inner[0].ndim == 3  # images of unequal shapes
    return Reading(sizes, {len(inner)}, is_list=True, by_item_likely=by_item_likely)


def may_be_rows(items: list[Any]) -> bool:
    """Tell whether the items of a list may be rows.

    They may be tensors of one dtype and one number of dimensions, or containers of one type.
    """
    if all(map(is_array, items)):
        return len({(leaf.dtype, leaf.ndim) for leaf in items}) == 1
    for item in items:
        if take_apart(item, inside=True) is None or type(item) is not type(items[0]):
            return False
    return True


def first_sizes(nest: Any) -> set[int]:
    """Return the first size of each tensor in a nest."""
    if isinstance(nest, Tensor):  # most are
        return {nest.shape[0]} if nest.ndim else set()
    sizes = set()
    for leaf in leaves(nest, inside=True):
        if is_array(leaf) and leaf.ndim:
            sizes.add(int(leaf.shape[0]))
    return sizes


def shapes_of(nest: Any) -> list[tuple[int, ...]]:
    """Return the shape of each tensor in a nest."""
    return [tuple(leaf.shape) for leaf in leaves(nest, inside=True) if is_array(leaf)]


def flattened_rows(shapes: list[tuple[int, ...]]) -> Iterator[int]:
    """Yield the number of rows once other dimensions are flattened into them, as for tokens."""
    for shape in shapes:
        for number in range(1, len(shape)):
            for others in combinations(shape[1:], number):
                yield shape[0] * math.prod(others)


def has_row_numbers(features: Any, rows: int) -> bool:
    """Tell whether an integer tensor of the features has the row number of each unit.

    It is taken to have them if its largest number is that of the last row.
    """
    for leaf in leaves(features, inside=True):
        if not isinstance(leaf, Tensor) or leaf.is_floating_point() or leaf.is_complex():
            continue
        if not leaf.ndim or not leaf.numel():
            continue
        if int(leaf.max()) == rows - 1:  # waits for the GPU, in the first batch only
            return True
    return False
