"""Rows that batches are cut from, and NumPy arrays as tensors. You may skip this file.

Other kinds of arrays, and what is wrong with one, are in data/arrays.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


class TensorRows:
    """The rows of a tensor, which may share the memory of an array; batches come in `dtype`."""

    def __init__(self, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
        self.tensor = tensor
        self.dtype = tensor.dtype if dtype is None else dtype

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all rows together."""
        return tuple(self.tensor.shape)


class FetchedRows:
    """Rows that are fetched by number.

    `fetch` takes the row numbers of a batch, (batch,) int64, and returns its tensor.
    """

    def __init__(
        self, fetch: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.fetch = fetch
        self.shape = shape
        self.dtype = dtype

    def __len__(self) -> int:
        return self.shape[0]


def is_array(data: Any) -> bool:
    """Tell whether data is one array or frame, of any library, whose first dimension is rows."""
    if isinstance(data, (Tensor, np.ndarray, pd.DataFrame, pd.Series)) or is_sparse_matrix(data):
        return True
    # The type is asked, since an object may have a `__getattr__` that answers to any name.
    kind = type(data)
    return hasattr(kind, "__array__") or is_other_frame(data)


def is_sparse_matrix(data: Any) -> bool:
    """Tell whether data is a matrix or an array of scipy.sparse."""
    return type(data).__module__.startswith("scipy.sparse") and hasattr(data, "tocsr")


def is_other_frame(array: Any) -> bool:
    """Tell whether this is a frame with named columns, of another library than pandas."""
    kind = type(array)
    if hasattr(kind, "__dataframe__"):
        return True
    return hasattr(kind, "to_numpy") and hasattr(kind, "columns") and hasattr(kind, "__getitem__")


def array_to_tensor(array: Array, name: str = "data") -> Tensor:
    """Convert a NumPy array of numbers to a tensor that may be written into.

    Floats become torch's default dtype and integers int64 (uint8 stays).

    >>> array_to_tensor(np.array([1.0, 2.0])).dtype
    torch.float32

    Raises:
        ValueError: values are masked, or int64 cannot hold a number.
    """
    if array.ndim == 0:  # a batch's label may be one number
        return array_to_tensor(array.reshape(1), name).reshape(())
    if np.ma.isMaskedArray(array):
        array = unmask(array, name)
    check_fits_int64(array, name)
    dtype = choose_batch_dtype(array.dtype)
    if not can_be_viewed(array):
        size = min(array.dtype.itemsize, get_largest_itemsize(array.dtype))
        array = array.astype(f"={array.dtype.kind}{size}", order="C")
    view = view_as_tensor(array)
    tensor = view.to(dtype)
    is_read_only = tensor is view and not array.flags.writeable
    if is_read_only or not tensor.is_contiguous():
        tensor = tensor.clone(memory_format=torch.contiguous_format)  # a forward may write into it
    return tensor


def get_largest_itemsize(dtype: np.dtype[Any]) -> int:
    """Return the bytes of the largest number of this kind that torch has."""
    return 16 if dtype.kind == "c" else 8


def choose_batch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """Return the dtype in which values of a NumPy dtype reach the model."""
    if dtype.kind == "f":
        return torch.get_default_dtype()
    if dtype.kind == "b":
        return torch.bool
    if dtype.kind == "c":
        return torch.complex64 if dtype.itemsize == 8 else torch.complex128
    return torch.uint8 if dtype == np.uint8 else torch.int64


def can_be_viewed(array: Array) -> bool:
    """Tell whether a tensor can share the memory of an array."""
    itemsize = array.dtype.itemsize
    if not array.dtype.isnative or itemsize > get_largest_itemsize(array.dtype):
        return False
    return all(stride >= 0 and stride % itemsize == 0 for stride in array.strides)


def view_as_tensor(array: Array) -> Tensor:
    """Return a tensor that shares the memory of an array; nothing may be written into it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(array)


def check_fits_int64(array: Array, name: str) -> None:
    """Refuse numbers that int64 cannot hold."""
    if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
        raise ValueError(
            f"{name} holds {array.max()}; expected whole numbers below 2**63, int64's. Pass floats."
        )


def unmask(array: Any, name: str) -> Array:
    """Return the values of a masked array, none of which may be masked."""
    hidden = int(np.count_nonzero(np.ma.getmaskarray(array)))
    if hidden:
        raise ValueError(
            f"{name} holds a masked array with {hidden} of {array.size} values masked; expected an "
            "array without a mask. Pass array.filled(0), or another number in place of 0, or "
            "leave those rows out."
        )
    return np.ma.getdata(array)
