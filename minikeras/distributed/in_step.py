"""Batches that each process reads for itself, since they cannot be divided.

The processes keep in step for as long as one of them has a batch. If all of them read the same
rows, each row counts several times, and rank 0 warns in the first pass:

the first batch is the same    a checksum goes with the first agreement
the rows of the pass are       sums over them are compared at its end: their orders may differ
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from minikeras.distributed.world import World
from minikeras.nests import leaves
from minikeras.phase import FillerBatch
from minikeras.support.checksums import batch_checksum

NOTHING = object()


class InStep:
    """Batches that each process reads for itself, for as long as one of them has one."""

    def __init__(self, batches: Iterable[Any], world: World, name: str) -> None:
        self.batches = batches
        self.world = world
        self.name = name
        self.loader: Any = getattr(batches, "loader", batches)  # what the user passed
        self.is_first_pass = True

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type] # raises as theirs does

    def __iter__(self) -> Iterator[Any]:
        last: Any = NOTHING
        seen = RowsSeen(self) if self.is_first_pass else None
        self.is_first_pass = False
        iterator = iter(self.batches)
        while True:
            batch = next(iterator, NOTHING)
            if seen is None:
                goes_on = bool(self.world.agree(batch is not NOTHING)[0])
            else:
                goes_on = seen.agree(batch)
            if not goes_on:
                return
            if batch is not NOTHING:
                last = batch
                yield batch
                continue
            if last is NOTHING:
                raise ValueError(
                    f"{self.name} gave process {self.world.rank} no batch, but other processes "
                    "got some. Give each process at least one."
                )
            yield FillerBatch(last)

    def warn_of_same_rows(self) -> None:
        """Warn on rank 0 that all processes read the same rows."""
        if self.world.rank:
            return
        size = self.world.size
        # a custom iterable may have an attribute `loader` as well
        is_ours = getattr(self.batches, "is_exact", False) is True
        source: Any = self.loader if is_ours else self.batches
        if isinstance(getattr(source, "dataset", None), IterableDataset):
            source = source.dataset
        warnings.warn(
            f"{self.name} gave all {size} processes the same rows; expected other rows in each. "
            f"Every row counts {size} times: each process reads {type(source).__name__} itself, "
            "since its rows are not known by number. Pass a Dataset with __getitem__, or a "
            "DataLoader over one, which are divided; or yield a part in __iter__: "
            f"itertools.islice(rows, rank, None, {size}), with rank = "
            "torch.distributed.get_rank().",
            stacklevel=2,
        )


class RowsSeen:
    """What one process has read in the first pass, to be compared with the others."""

    def __init__(self, source: InStep) -> None:
        self.source = source
        self.is_watching = True
        self.batches = 0
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def agree(self, batch: Any) -> bool:
        """Tell whether any process has a batch; compare the first one, and at the end all rows."""
        world = self.source.world
        has_batch = batch is not NOTHING
        if self.batches == 0:
            # without anything to compare each process has a number of its own
            checksum = (batch_checksum(batch) if has_batch else 0) or -world.rank - 1
            goes_on, most, negative_least = world.agree(has_batch, checksum, -checksum)
            if goes_on and most == -negative_least:
                self._warn()
        else:
            goes_on = world.agree(has_batch)[0]
            if not goes_on and self.is_watching and self._are_same_everywhere():
                self._warn()
        self.batches += 1
        if has_batch and self.is_watching:
            self._add(batch)
        return bool(goes_on)

    def _warn(self) -> None:
        self.is_watching = False
        self.source.warn_of_same_rows()

    def _add(self, batch: Any) -> None:
        for leaf in leaves(batch):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_nested:
                numbers = leaf.detach()
                if numbers.is_complex():
                    numbers = torch.view_as_real(numbers)
                numbers = numbers.double()
                self.total = self.total + numbers.sum()
                self.squares = self.squares + numbers.square().sum()

    def _are_same_everywhere(self) -> bool:
        total, squares = float(self.total), float(self.squares)
        most = self.source.world.agree(total, -total, squares, -squares)
        tolerance = 1e-9 * (abs(total) + squares)  # they are added up in different orders
        is_same = most[0] + most[1] <= tolerance and most[2] + most[3] <= tolerance
        return squares > 0 and is_same
