"""Checksums of nested values, by a sample of the elements of each tensor.

checksum        of numbers, strings, tensors and arrays
batch_checksum  of what such values a batch holds
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
    """CRC-32 of the numbers, strings, tensors and arrays of a batch.

    >>> first, second = (torch.tensor([1, 2]), 0), (torch.tensor([1, 3]), 0)
    >>> batch_checksum(first) == batch_checksum((torch.tensor([1, 2]), 0))
    True
    >>> batch_checksum(first) == batch_checksum(second)
    False
    """
    found = [value for _, value in reachable({"": batch})]
    return checksum(value for value in found if isinstance(value, (*SCALARS, Tensor, np.ndarray)))


def checksum(values: Iterable[Any]) -> int:
    """CRC-32 of nested values; of a tensor its shape and a sample of its elements."""
    number = 0
    for value in values:
        if isinstance(value, (list, tuple)):
            number = zlib.crc32(str(checksum(value)).encode(), number)
        elif isinstance(value, dict):
            number = zlib.crc32(str(checksum(value.items())).encode(), number)
        elif isinstance(value, Tensor):
            shape = () if is_lazy(value) else tuple(value.shape)
            number = zlib.crc32(str((shape, value.dtype, sample_of(value))).encode(), number)
        elif isinstance(value, np.ndarray):
            number = zlib.crc32(
                str((value.shape, value.dtype, array_sample(value))).encode(), number
            )
        elif isinstance(value, bytes):
            number = zlib.crc32(value, number)
        else:
            number = zlib.crc32(repr(value).encode(), number)
    return number


def sample_of(tensor: Tensor) -> list[Any]:
    """Some elements of a tensor, evenly spread."""
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


def array_sample(array: np.ndarray[Any, Any]) -> list[Any]:
    flat = array.reshape(-1) if array.flags.c_contiguous else array.ravel()[:SAMPLE]
    chosen: list[Any] = flat[:: max(1, flat.size // SAMPLE)].tolist() if flat.size else []
    return chosen
