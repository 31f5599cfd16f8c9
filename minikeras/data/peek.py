"""The first batch of data that is in memory, without reading a file or drawing random numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import BatchSampler, SequentialSampler, default_collate

from minikeras.data.endless import FirstBatches
from minikeras.data.in_memory import InMemoryBatches
from minikeras.data.nests import cloned, map_leaves
from minikeras.data.sources import ArrayBatches


def first_rows(batches: Iterable[Any]) -> Any:
    """Copy the first batch of a list, of arrays or of a loader over tensors; else return None.

    >>> first_rows([(1, 2), (3, 4)]), first_rows(iter([(1, 2)]))
    ((1, 2), None)
    """
    if isinstance(batches, FirstBatches):
        batches = batches.batches
    if type(batches) is list:
        if not batches:
            return None
        if batches[0] is None:
            raise TypeError("the first batch is None; expected (features, labels).")
        return map_leaves(cloned, batches[0])
    if isinstance(batches, ArrayBatches) and not batches.shuffle:
        size = min(batches.batch_size, batches.rows)
        if size == 0:
            return None
        first = next(batches.gathered(torch.arange(size), size))
        return map_leaves(cloned, first)
    if isinstance(batches, InMemoryBatches):
        sampler: Any = batches.loader.batch_sampler
        if type(sampler) is BatchSampler and type(sampler.sampler) is SequentialSampler:
            dataset: Any = batches.loader.dataset
            size = min(sampler.batch_size, len(dataset))
            if size == 0:
                return None
            return default_collate([dataset[row] for row in range(size)])
    return None
