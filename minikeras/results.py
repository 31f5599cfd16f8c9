"""`Average`: what a loss or a metric returns when its mean is not one over the batch's rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Average(NamedTuple):
    """A total and the count it is divided by, for a loss or a metric whose unit is not the row.

    minikeras adds up the totals and the counts of all batches and divides once, so the mean over
    an epoch is exact however the data falls into batches.

    Attributes:
        total: sum over the units that count, a number or a 0-d tensor. The total of a loss needs
            a gradient.
        count: how many units there are, 0 or more: a number or a 0-d tensor. It may be a float,
            such as a sum of class weights. A batch with count 0 adds nothing.

    >>> import minikeras, torch
    >>> losses, mask = torch.tensor([2.0, 4.0, 9.0]), torch.tensor([1.0, 1.0, 0.0])  # one token is padding
    >>> minikeras.Average((losses * mask).sum(), mask.sum())
    Average(total=tensor(6.), count=tensor(2.))
    """

    total: Tensor | float
    count: Tensor | float
