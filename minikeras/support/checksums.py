"""Checksums of nested values, from a sample of the elements of each tensor.

checksum        of numbers, strings, tensors and arrays
batch_checksum  of such values in a batch
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from minikeras.nests import is_sharded
from minikeras.support.reachable import SCALARS, reachable

SAMPLE = 64  # elements of a tensor that are compared


def batch_checksum(batch: Any) -> int:
    """Compute the CRC-32 of the numbers, strings, tensors and arrays of a batch.

    >>> first, second = (torch.tensor([1, 2]), 0), (torch.tensor([1, 3]), 0)
    >>> batch_checksum(first) == batch_checksum((torch.tensor([1, 2]), 0))
    True
    >>> batch_checksum(first) == batch_checksum(second)
    False
    """
    values = []
    for _, value in reachable({"": batch}):
        if isinstance(value, (*SCALARS, Tensor, np.ndarray)):
            values.append(value)
    return checksum(values)


def checksum(values: Iterable[Any]) -> int:
    """Compute the CRC-32 of nested values; of a tensor, its shape and a sample of its elements."""
    number = 0
    for value in values:
        if isinstance(value, (list, tuple)):
            number = zlib.crc32(str(checksum(value)).encode(), number)
        elif isinstance(value, dict):
            number = zlib.crc32(str(checksum(value.items())).encode(), number)
        elif isinstance(value, Tensor):
            shape = () if is_lazy(value) else tuple(value.shape)
            text = str((shape, value.dtype, _sample_tensor(value)))
            number = zlib.crc32(text.encode(), number)
        elif isinstance(value, np.ndarray):
            text = str((value.shape, value.dtype, _sample_array(value)))
            number = zlib.crc32(text.encode(), number)
        elif isinstance(value, bytes):
            number = zlib.crc32(value, number)
        else:
            number = zlib.crc32(repr(value).encode(), number)
    return number


def _sample_tensor(tensor: Tensor) -> list[Any]:
    """Return some elements of a tensor, evenly spread."""
    if (
        is_lazy(tensor)
        or is_sharded(tensor)
        or tensor.layout != torch.strided
        or tensor.numel() == 0
    ):
        return []
    flat = tensor.detach().reshape(-1)
    if tensor.is_quantized:
        flat = flat.int_repr()
    chosen: list[Any] = flat[:: max(1, len(flat) // SAMPLE)].cpu().tolist()
    return chosen


def _sample_array(array: np.ndarray[Any, Any]) -> list[Any]:
    """Return some elements of an array, evenly spread; the first ones if it is not contiguous."""
    if not array.size:
        return []
    flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel()[:SAMPLE]
    chosen: list[Any] = flat[:: max(1, flat.size // SAMPLE)].tolist()
    return chosen
