"""Copy plain values into memory, and write the copy later as a file of torch.save's format.

copy    at the save: pickle the value; its tensors go one after another into memory that is kept
        from save to save, so the system need not give new pages to each copy
write   in a thread: the pickle and the bytes of each tensor become the entries of a zip file

torch.save does both at once, and runs more Python for each value. The file has the same format:
torch.load reads it. Each row of the history is pickled once; a later save joins their bytes.
"""

from __future__ import annotations

import io
import struct
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from itertools import islice
from pickle import Pickler, dumps
from typing import Any, BinaryIO
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor

from minikeras.checkpoint.plain import is_flat, plain
from minikeras.history import Row

PROTOCOL = 2  # of torch.save's pickles
# dtype -> the class by which a pickle of torch.save names a storage of it
STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
REBUILD: Any = torch.zeros(1).__reduce_ex__(PROTOCOL)[0]  # torch's function for loading a tensor
# classes whose objects torch.load rebuilds from plain values, by their own `__reduce__`
KINDS = (OrderedDict, Counter, torch.Size, torch.dtype, torch.device)
NAMED = (REBUILD, OrderedDict, Counter, torch.Size, torch.device, *STORAGES.values())
# how a pickle names classes of Python such as `set` and `frozenset`; some are not plain
OF_PYTHON = b"c__builtin__\n"

ALIGNMENT = 64  # bytes; torch.save aligns tensors to this as well
HEADER = 30  # bytes of an entry before its name
PADDING = struct.Struct("<2sH")  # what an extra field begins with: its name and length
FIRST_DAY = (1980, 1, 1, 0, 0, 0)  # that a zip file knows, as torch.save writes it


class UnusualError(Exception):
    """A value that is not copied here; torch.save may be able to write it."""


class Storage:
    """Stands for a tensor's bytes in the pickle."""

    def __init__(self, identity: tuple[Any, ...]) -> None:
        self.identity = identity


class StatePickler(Pickler):
    """Pickle a value as torch.save does, and collect its tensors."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, PROTOCOL)
        self.tensors: list[Tensor] = []
        self.storages: dict[tuple[int, torch.dtype, int], Storage] = {}

    def persistent_id(self, value: Any) -> Any:
        """Return what torch.load looks a tensor's bytes up by."""
        return value.identity if type(value) is Storage else None

    def reducer_override(self, value: Any) -> Any:
        """Return how a value that is none of Python's own types is rebuilt."""
        if type(value) is not Tensor:
            if type(value) in KINDS or any(value is named for named in NAMED):
                return NotImplemented
            raise UnusualError(f"a {type(value).__name__}")
        if value.dtype not in STORAGES or value.is_nested or value.is_meta:
            raise UnusualError("a tensor of another kind")
        if value.layout is not torch.strided or not value.is_contiguous():
            raise UnusualError("a tensor that is not contiguous")
        storage = self._find_storage(value)
        return REBUILD, (storage, 0, tuple(value.shape), value.stride(), False, None)

    def _find_storage(self, tensor: Tensor) -> Storage:
        """Return what stands for a tensor's bytes; the same for tied tensors."""
        numel = tensor.numel()
        place = (tensor.data_ptr(), tensor.dtype, numel)
        storage = self.storages.get(place)
        if storage is None:
            key = str(len(self.tensors))
            storage = Storage(("storage", STORAGES[tensor.dtype], key, "cpu", numel))
            self.tensors.append(tensor)
            if numel:
                self.storages[place] = storage
        return storage


class PickledRows:
    """The rows of a history, each of which is pickled once.

    Args:
        epochs: the rows, to which others append.
    """

    def __init__(self, epochs: list[Row]) -> None:
        self.epochs = epochs
        self.rows = 0  # that are pickled
        self.program = bytearray()

    def is_of(self, epochs: list[Row]) -> bool:
        """Tell whether these are the rows, and none has been taken away."""
        return self.epochs is epochs and self.rows <= len(epochs)

    def extend(self) -> None:
        """Pickle the rows that are not pickled yet.

        Raises:
            UnusualError: a row holds something else than numbers and strings.
        """
        for row in islice(self.epochs, self.rows, None):
            logs, rates = plain(row, "the history")
            if not (is_flat(logs.values()) and is_flat(rates.values())):
                raise UnusualError("a row of the history")
            self.program += program_of((logs, rates))
            self.rows += 1


def program_of(value: Any) -> bytes:
    """Return a value's pickle without its first instruction, PROTO, and its last one, STOP.

    Such programs may follow one another: each one stores what it repeats before it repeats it.
    """
    return dumps(value, PROTOCOL)[2:-1]


class Snapshot:
    """A copy of a value, ready to be written.

    Args:
        program: the pickle.
        parts: the bytes of each tensor.
    """

    def __init__(self, program: bytes, parts: list[memoryview]) -> None:
        self.program = program
        self.parts = parts

    def write(self, file: BinaryIO) -> None:
        """Write the copy to a file, as a zip file that torch.load reads."""
        with ZipFile(file, "w") as archive:
            for name, data in self._records():
                info = ZipInfo(name, FIRST_DAY)
                header = HEADER + len(name) + PADDING.size
                padding = -(file.tell() + header) % ALIGNMENT
                info.extra = PADDING.pack(b"FB", padding) + bytes(padding)
                archive.writestr(info, data)

    def _records(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and the bytes of each entry."""
        yield "archive/data.pkl", self.program
        yield "archive/byteorder", sys.byteorder.encode()
        for number, part in enumerate(self.parts):
            yield f"archive/data/{number}", part
        yield "archive/version", b"3\n"


class Memory:
    """Memory for one copy, which is kept for the next one. A new copy overwrites it."""

    def __init__(self) -> None:
        self.flat: dict[torch.dtype, Tensor] = {}
        self.rows = PickledRows([])

    def copy(self, state: Mapping[str, Any], epochs: list[Row]) -> Snapshot:
        """Copy the state of a run.

        Args:
            state: all of it but its history.
            epochs: the rows of its history; they become "history" in the file.

        Raises:
            UnusualError: it holds something that is not copied here.
            RuntimeError, MemoryError: there is no memory for it.
        """
        if not self.rows.is_of(epochs):
            self.rows = PickledRows(epochs)
        self.rows.extend()
        file = io.BytesIO()
        pickler = StatePickler(file)
        pickler.dump(state)
        program = file.getvalue()
        if OF_PYTHON in program:
            raise UnusualError("an object of a Python class")
        parts = self._copy_tensors(pickler.tensors)
        # the dict is on the stack: add the list of rows to it as "history", and stop
        rows = b"(" + program_of("history") + b"](" + self.rows.program + b"eu."
        program = program[:-1] + rows
        return Snapshot(program, parts)

    @torch.no_grad()
    def _copy_tensors(self, tensors: list[Tensor]) -> list[memoryview]:
        """Copy tensors, all of a dtype at once, and return the bytes of each copy."""
        numbers: dict[torch.dtype, list[int]] = {}
        for number, tensor in enumerate(tensors):
            numbers.setdefault(tensor.dtype, []).append(number)
        parts = [memoryview(b"")] * len(tensors)
        for dtype, of_dtype in numbers.items():
            flat = [tensors[number].reshape(-1).cpu() for number in of_dtype]
            total = sum(tensor.numel() for tensor in flat)
            memory = self.flat.get(dtype)
            if memory is None or memory.numel() < total:
                memory = self.flat[dtype] = torch.empty(total, dtype=dtype)
            torch.cat(flat, out=memory[:total])
            content = memory.view(torch.uint8).numpy().data
            begin = 0
            for number in of_dtype:
                end = begin + tensors[number].numel() * dtype.itemsize
                parts[number] = content[begin:end]
                begin = end
        return parts
