"""The epoch's number for the user's samplers and datasets that shuffle by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minikeras.data.in_memory import base_of
from minikeras.hooks import Fit, Hook
from minikeras.sources import ContinuedBatches


def shuffled_by_epoch(batches: Iterable[Any] | None) -> list[Any]:
    """The parts of a loader that have a `set_epoch` method, such as torch's DistributedSampler."""
    parts: list[Any] = []
    loader: Any = batches
    while loader is not None:  # from our wrappers, and the user's, to the loader inside
        batch_sampler = getattr(loader, "batch_sampler", None)
        dataset = getattr(loader, "dataset", None)
        parts += [loader, getattr(loader, "sampler", None)]
        parts += [batch_sampler, getattr(batch_sampler, "sampler", None)]
        parts += [dataset, base_of(dataset)]
        inner = loader.batches if isinstance(loader, ContinuedBatches) else None
        loader = getattr(loader, "loader", inner)
    found: list[Any] = []
    for part in parts:
        if callable(getattr(part, "set_epoch", None)) and all(part is not other for other in found):
            found.append(part)
    return found


def set_epoch(batches: Iterable[Any] | None, epoch: int) -> None:
    """Give the parts of a loader that shuffle by it the epoch's number, from 0.

    >>> from torch.utils.data import DataLoader, DistributedSampler
    >>> sampler = DistributedSampler(range(4), num_replicas=2, rank=0)
    >>> set_epoch(DataLoader(range(4), sampler=sampler), 3)
    >>> sampler.epoch
    3
    """
    for part in shuffled_by_epoch(batches):
        part.set_epoch(epoch)


def epochs_of(loader: Any) -> list[int | None]:
    """The epoch's number that each of those parts has now; None where it does not tell."""
    epochs = []
    for part in shuffled_by_epoch(loader):
        epoch = getattr(part, "epoch", None)
        epochs.append(epoch if type(epoch) is int else None)
    return epochs


def put_epochs_back(loader: Any, epochs: Iterable[int | None]) -> None:
    """Set the numbers that `epochs_of` gave."""
    for part, epoch in zip(shuffled_by_epoch(loader), epochs, strict=False):
        if epoch is not None:
            part.set_epoch(epoch)


class SamplerEpochs(Hook):
    """Gives samplers that shuffle by it the number of each epoch of a fit."""

    def before_epoch(self, fit: Fit) -> None:
        """Give them the number, from 0."""
        for batches in (fit.train, fit.val):
            set_epoch(batches, fit.at.epoch - 1)
