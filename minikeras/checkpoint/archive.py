"""Validate a file of torch.save before it is loaded: it may ask only for what it contains.

check_entries   the zip file: no compressed entry, no byte in two entries, every checksum
check_program   the pickle, parsed and never run: no call that takes memory, each storage within its
                bytes, each tensor within its storage, no small file that unfolds into a huge nest
check_values    what torch.load returned: no cycle, no deep nest, no tensor without data
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FOLDER = 0x10  # the bit of a zip entry's attributes that marks a folder
DEEPEST = 100  # levels of a nest
MOST_PLACES = 100_000  # values in a nest, plus one for each byte of the file
# bytes that copies of all tensors may take beyond the file's size: views may repeat their elements
MOST_BYTES = 2**26
LONGEST_NUMBER = 128  # bytes of a whole number
# bytes of an element, by the name of the storage's class
ITEM_SIZES = {
    "Double": 8,
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Long": 8,
    "Int": 4,
    "Short": 2,
    "Char": 1,
    "Byte": 1,
    "Bool": 1,
    "ComplexDouble": 16,
    "ComplexFloat": 8,
    "Untyped": 1,
    "QInt8": 1,
    "QUInt8": 1,
    "QInt32": 4,
    "QUInt4x2": 1,
    "QUInt2x4": 1,
}


class ArchiveError(Exception):
    """What is wrong with a file: the end of a sentence that starts with its path."""


# --- the zip file ---


def check_entries(archive: zipfile.ZipFile, size: int) -> None:
    """Check that a zip file of `size` bytes contains what it lists, with every checksum.

    Raises:
        ArchiveError: it does not.
    """
    entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ArchiveError(
                f"is damaged in {entry.filename}: it is compressed, which torch.save does not do"
            )
        # torch.load would return uninitialized memory as the content of a folder.
        if entry.external_attr & FOLDER:
            raise ArchiveError(f"is damaged in {entry.filename}")
    names = {entry.filename for entry in entries}
    folders = {name.partition("/")[0] for name in names}
    if len(names) < len(entries) or len(folders) > 1:
        raise ArchiveError("is damaged: its entries must have distinct names in one folder")
    if sum(entry.file_size for entry in entries) > size:
        raise ArchiveError("is damaged: its entries have more bytes than the file")
    damaged = archive.testzip()  # torch.load does not notice a flipped bit in a tensor
    if damaged is not None:
        raise ArchiveError(f"is damaged in {damaged}")


# --- the pickle ---


@dataclass(frozen=True)
class Name:
    """A global that the pickle names: module and name."""

    text: str


@dataclass(frozen=True)
class Storage:
    """A storage that the pickle asks for: the bytes of one entry."""

    numel: int
    item_size: int


@dataclass(frozen=True)
class CallResult:
    """What a call returns: all that is known is the name of what is called."""

    function: str


@dataclass(frozen=True)
class Items:
    """A tuple, with the number of values in it and below it. As the key of a dict it is hashed."""

    items: tuple[Any, ...]
    places: int
    depth: int


CONTAINER = CallResult("a container")  # any list, dict or set
MARK = object()  # the pickle's mark on the stack


def check_program(archive: zipfile.ZipFile) -> None:
    """Check the pickle of a file of torch.save without running it.

    Raises:
        ArchiveError: it asks for more than the file contains, or for what no state needs.
    """
    entries = {entry.filename: entry.file_size for entry in archive.infolist()}
    root = next(iter(entries), "").partition("/")[0]
    program = archive.read(f"{root}/data.pkl")
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
            _follow(opcode.name, argument, stack, memo, entries, root, len(program))
    except (IndexError, KeyError, ValueError, TypeError, OverflowError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise ArchiveError(f"is damaged in {root}/data.pkl: {first}") from error


# names of the pickle's instructions
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET")
LITERALS = ("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1")
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
POPPED = {"APPEND": 1, "SETITEM": 2}


def _follow(
    name: str,
    argument: Any,
    stack: list[Any],
    memo: dict[int, Any],
    entries: dict[str, int],
    root: str,
    size: int,
) -> None:
    """Follow one instruction on the stack, without calling anything.

    For an instruction that torch.load does not know, torch.load raises the error.
    """
    if name in CONSTANTS:
        stack.append(CONSTANTS[name])
    elif name in EMPTY:
        stack.append(CONTAINER)
    elif name in LITERALS:
        if name == "LONG1" and argument.bit_length() > 8 * LONGEST_NUMBER:
            raise ArchiveError(f"contains an integer of more than {LONGEST_NUMBER} bytes")
        stack.append(argument)
    elif name == "GLOBAL":
        stack.append(Name(".".join(argument.split(" ", 1))))
    elif name == "MARK":
        stack.append(MARK)
    elif name == "EMPTY_TUPLE":
        stack.append(_build_tuple((), size))
    elif name in TUPLES:
        items = _pop(stack, TUPLES[name])
        stack.append(_build_tuple(items, size))
    elif name == "TUPLE":
        stack.append(_build_tuple(_pop_to_mark(stack), size))
    elif name in POPPED:
        _pop(stack, POPPED[name])
    elif name in ("APPENDS", "SETITEMS"):
        _pop_to_mark(stack)
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "BINPERSID":
        stack.append(_check_storage(stack.pop(), entries, root))
    elif name in ("REDUCE", "NEWOBJ"):
        function, arguments = _pop(stack, 2)
        stack.append(_check_call(function, arguments))
    elif name == "BUILD":
        stack.pop()
        _check_build(stack[-1])


def _pop(stack: list[Any], count: int) -> tuple[Any, ...]:
    """Remove and return the last values of the stack."""
    if count > len(stack) or any(item is MARK for item in stack[-count:]):
        raise ValueError("an instruction without its values")
    items = tuple(stack[-count:])
    del stack[-count:]
    return items


def _pop_to_mark(stack: list[Any]) -> tuple[Any, ...]:
    """Remove and return the values after the last mark, and remove the mark."""
    items = []
    while (item := stack.pop()) is not MARK:
        items.append(item)
    return tuple(reversed(items))


def _build_tuple(items: tuple[Any, ...], size: int) -> Items:
    """Build a tuple and check its size and depth.

    Hashing a tuple visits each value in it again, and takes a C stack frame for each level.
    """
    places = 1
    depth = 1
    for item in items:
        if isinstance(item, Items):
            places += item.places
            depth = max(depth, item.depth + 1)
        else:
            places += 1
    if depth > DEEPEST or places > MOST_PLACES + size:
        raise ArchiveError(
            "contains nested containers that expand to more values than its size allows"
        )
    return Items(items, places, depth)


def _check_storage(identity: Any, entries: dict[str, int], root: str) -> Storage:
    """Check that a storage that the pickle asks for is in the file, and return it."""
    if not isinstance(identity, Items) or len(identity.items) < 5:
        raise ValueError("a storage without a name")
    _, kind, key, _, numel = identity.items[:5]
    name = ""
    if isinstance(kind, Name):
        name = kind.text.rpartition(".")[2].removesuffix("Storage")
    if name not in ITEM_SIZES or type(key) is not str or type(numel) is not int:
        raise ValueError("a storage of no kind that is known")
    entry = f"{root}/data/{key}"
    if entry not in entries:
        raise ArchiveError(f"is damaged: {entry} is missing")
    if not 0 <= numel * ITEM_SIZES[name] <= entries[entry]:
        raise ArchiveError(
            f"is damaged: it claims {numel} elements of {entry}, which has {entries[entry]} bytes"
        )
    return Storage(numel, ITEM_SIZES[name])


def _check_call(function: Any, arguments: Any) -> CallResult:
    """Check a call by the name of its function.

    torch.load itself refuses names that it does not know.
    """
    if not isinstance(function, Name) or not isinstance(arguments, Items):
        raise ValueError("a call of something without a name")
    module, _, name = function.text.rpartition(".")
    given = arguments.items
    is_torch = module.partition(".")[0] == "torch"
    allocates = name in ("bytearray", "xrange", "range") or name.endswith("nested_tensor")
    if is_torch and name.endswith(("Tensor", "Storage")):
        allocates = True
    if allocates:
        raise ArchiveError(
            f"calls {function.text}, which no model state needs, so it was not loaded"
        )
    if module == "_codecs" and (len(given) != 2 or given[1] not in ("latin1", "latin-1")):
        raise ArchiveError(
            f"calls {function.text} for something other than bytes, so it was not loaded"
        )
    if name.endswith("from_type_v2"):
        # It rebuilds a tensor with attributes by calling its first argument.
        rebuild = given[0]
        if not isinstance(rebuild, Name) or "rebuild" not in rebuild.text:
            raise ArchiveError(
                f"calls something other than a tensor through {function.text}, so it was not loaded"
            )
    if given and isinstance(given[0], Storage):
        _check_view(name, given)
    return CallResult(function.text)


def _check_view(name: str, given: tuple[Any, ...]) -> None:
    """Check that a tensor lies within its storage; otherwise torch would enlarge the storage."""
    storage = given[0]
    offset = given[1]
    shape = given[2]
    if len(given) > 3 and isinstance(given[3], Items):
        stride = given[3]
    else:
        stride = _build_tuple((0,) * len(shape.items), 0)
    if len(shape.items) != len(stride.items):
        raise ValueError("a tensor of no shape")
    for number in (offset, *shape.items, *stride.items):
        if type(number) is not int or number < 0:
            raise ValueError("a tensor of no shape")
    numel = math.prod(shape.items)
    elements = storage.numel * storage.item_size // _find_item_size(given[6:], storage.item_size)
    last = offset
    for size, step in zip(shape.items, stride.items, strict=True):
        last += (size - 1) * step
    is_outside = numel and last >= elements
    if is_outside or (name.endswith("qtensor") and numel > elements):
        raise ArchiveError(
            f"is damaged: a tensor {shape.items} in it is larger than its {elements} elements"
        )


def _find_item_size(arguments: tuple[Any, ...], default: int) -> int:
    """Return the bytes of an element of the first dtype among these arguments, or the default."""
    for argument in arguments:
        if not isinstance(argument, Name):
            continue
        dtype = getattr(torch, argument.text.rpartition(".")[2], None)
        if isinstance(dtype, torch.dtype):
            return dtype.itemsize
    return default


def _check_build(target: Any) -> None:
    """Check that no tensor gets a state: it would replace the tensor's storage."""
    if not isinstance(target, CallResult) or target.function.startswith("torch"):
        raise ArchiveError(
            "sets the state of a tensor, which torch.save does not do, so it was not loaded"
        )


# --- the values ---


def check_values(value: Any, size: int) -> None:
    """Check what torch.load returned for a file of `size` bytes.

    Raises:
        ArchiveError: a container contains itself, a nest is larger than such a file could hold, or
            a tensor has no data.
    """
    measured: dict[int, tuple[int, int, int]] = {}  # by id: places, depth and bytes
    opened: set[int] = set()  # ids of containers whose parts are on the stack
    stack = [value]
    while stack:
        current = stack[-1]
        key = id(current)
        if key in measured:
            stack.pop()
            continue
        parts = _list_parts(current)
        if not parts:
            tensor_bytes = _check_tensor(current) if isinstance(current, Tensor) else 0
            measured[key] = (1, 1, tensor_bytes)
            stack.pop()
        elif key not in opened:
            opened.add(key)
            for part in parts:
                if id(part) in measured:
                    continue
                if id(part) in opened:
                    raise ArchiveError("contains a container that contains itself")
                stack.append(part)
        else:
            places = 1
            depth = 1
            tensor_bytes = 0
            for part in parts:
                part_places, part_depth, part_bytes = measured[id(part)]
                places += part_places
                depth = max(depth, part_depth + 1)
                tensor_bytes += part_bytes
            too_large = places > MOST_PLACES + size or tensor_bytes > MOST_BYTES + 8 * size
            if depth > DEEPEST or too_large:
                raise ArchiveError(
                    "contains nested containers that expand to more values than its size allows"
                )
            measured[key] = (places, depth, tensor_bytes)
            stack.pop()


def _list_parts(value: Any) -> list[Any]:
    """List what is in a container; anything else has no parts."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set)):
        return list(value)
    return []


def _check_tensor(tensor: Tensor) -> int:
    """Check that a tensor has data, and return how many bytes a copy of it takes."""
    if tensor.device.type != "cpu":
        raise ArchiveError(f"contains a tensor {tuple(tensor.shape)} without data")
    return tensor.numel() * tensor.element_size()
