"""Plain values as bytes, for another process of the same job, and back; no code in them can run.

`torch.save` and `torch.load(weights_only=True)` do the same, and take 2 ms of Python for the states
of the random generators, which are sent in every pass over the data.
"""

from __future__ import annotations

import io
from collections import Counter, OrderedDict
from pickle import Pickler, Unpickler, UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROTOCOL = 5
ARRAYS = "biufcSU"  # kinds of NumPy's numbers and text that are nothing but their bytes


def pack(value: Any) -> bytes:
    """Return a plain value as bytes."""
    file = io.BytesIO()
    Packer(file, PROTOCOL).dump(value)
    return file.getvalue()


def unpack(packed: bytes) -> Any:
    """Return the value that was packed.

    Raises:
        UnpicklingError: it is not plain.
    """
    return Unpacker(io.BytesIO(packed)).load()


class Packer(Pickler):
    """Packs tensors and arrays as their bytes alone."""

    def reducer_override(self, value: Any) -> Any:
        """Return one of the functions below, and its arguments, that make a value again."""
        if isinstance(value, Tensor):
            if type(value) is not Tensor or not is_plain(value):
                file = io.BytesIO()
                torch.save(value, file)
                return make_other_tensor, (file.getvalue(),)
            # a copy, contiguous and without a lazy conjugate
            numbers = torch.empty(value.numel(), dtype=value.dtype)
            numbers.view(value.shape).copy_(value.detach())
            content = numbers.view(torch.uint8).numpy().tobytes()
            return make_tensor, (content, str(value.dtype), tuple(value.shape))
        if isinstance(value, np.ndarray) and value.dtype.kind in ARRAYS:
            return make_array, (value.tobytes(), value.dtype.str, value.shape)
        if isinstance(value, torch.dtype):
            return find_dtype, (str(value),)
        return NotImplemented


class Unpacker(Unpickler):
    """Calls the functions below, and makes objects of a few harmless classes."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what may be called by a packed value."""
        found = ALLOWED.get((module, name))
        if found is None:
            raise UnpicklingError(f"{module}.{name} is not a plain value.")
        return found


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is nothing but its numbers, on the CPU."""
    is_dense = tensor.layout is torch.strided and not tensor.is_quantized
    return is_dense and tensor.device.type == "cpu" and not tensor.is_nested


def make_tensor(content: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Make a tensor of its bytes."""
    if not content:
        return torch.empty(shape, dtype=find_dtype(dtype))
    return torch.frombuffer(bytearray(content), dtype=find_dtype(dtype)).view(shape)


def make_other_tensor(content: bytes) -> Any:
    """Make a tensor that is more than its numbers, such as a sparse one."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def make_array(content: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Make an array of its bytes."""
    return np.frombuffer(bytearray(content), np.dtype(dtype)).reshape(shape)


def find_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name such as "torch.float32"."""
    dtype = getattr(torch, name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise UnpicklingError(f"{name} is not a dtype.")
    return dtype


MAKERS = (make_tensor, make_other_tensor, make_array, find_dtype)
CLASSES = (OrderedDict, Counter, torch.Size, torch.device, set, frozenset, bytearray, complex)
ALLOWED = {(found.__module__, found.__qualname__): found for found in (*MAKERS, *CLASSES)}
