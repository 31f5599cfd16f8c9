"""Look at a file of torch.save before anything in it is made: what it asks for must be in it.

check_entries   the zip file: no compressed entry, no byte in two entries, every checksum
check_program   the pickle, read as text and never run: no call that takes memory, each storage within its bytes, each
                tensor within its storage, no nest that a short file unfolds into a long one
check_values    what torch.load then made: no circle, no deep nest, no tensor without data
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

FOLDER = 0x10  # the bit of a zip entry's attributes
DEEPEST = 100  # levels of a nest
MOST_PLACES = 100_000  # of a nest, more in a larger file
MOST_BYTES = (
    2**26
)  # that tensors may take beyond the file's own size: views that repeat their elements
LONGEST_NUMBER = 128  # bytes of a whole number
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
    """What is wrong with a file, as the end of a sentence about it."""


# --- the zip file ---


def check_entries(archive: zipfile.ZipFile, size: int) -> None:
    """Check that a zip file of so many bytes holds what it lists, byte by byte.

    Raises:
        ArchiveError: it does not.
    """
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ArchiveError(
                f"is damaged in {entry.filename}: it is compressed, which torch.save does not do"
            )
        if (
            entry.external_attr & FOLDER
        ):  # torch.load takes what memory holds for a folder's content
            raise ArchiveError(f"is damaged in {entry.filename}")
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) > 1:
        raise ArchiveError("is damaged: its entries have not one name each in one folder")
    if sum(entry.file_size for entry in entries) > size:
        raise ArchiveError("is damaged: its entries have more bytes than the file")
    part = archive.testzip()  # torch.load takes a flipped bit in a tensor for a number
    if part is not None:
        raise ArchiveError(f"is damaged in {part}")


# --- the pickle ---


@dataclass(frozen=True)
class Name:
    """A global of the pickle: module and name."""

    text: str


@dataclass(frozen=True)
class Storage:
    """The bytes of one entry, as the pickle claims them."""

    numel: int
    item_size: int


@dataclass(frozen=True)
class Made:
    """What a call gives, by the name of what is called."""

    by: str


@dataclass(frozen=True)
class Items:
    """A tuple, with the number of places in it and below it; it may be a key of a dict, which is hashed."""

    items: tuple[Any, ...]
    places: int
    depth: int


OTHER = Made("a container")
MARK = object()


def check_program(archive: zipfile.ZipFile) -> None:
    """Check the pickle of a file of torch.save without running it.

    Raises:
        ArchiveError: it asks for more than the file holds, or for what no state needs.
    """
    entries = {entry.filename: entry.file_size for entry in archive.infolist()}
    root = next(iter(entries), "").partition("/")[0]
    program = archive.read(f"{root}/data.pkl")
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(program)):
            _take(opcode.name, argument, stack, memo, entries, root, len(program))
    except (IndexError, KeyError, ValueError, TypeError, OverflowError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise ArchiveError(f"is damaged in {root}/data.pkl: {first}") from error


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET")
GIVEN = ("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1")
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
TAKEN = {"APPEND": 1, "SETITEM": 2}


def _take(
    name: str,
    argument: Any,
    stack: list[Any],
    memo: dict[int, Any],
    entries: dict[str, int],
    root: str,
    size: int,
) -> None:
    """Follow one instruction; those that torch.load does not know are left to its own error."""
    if name in CONSTANTS:
        stack.append(CONSTANTS[name])
    elif name in EMPTY:
        stack.append(OTHER)
    elif name in GIVEN:
        if name == "LONG1" and argument.bit_length() > 8 * LONGEST_NUMBER:
            raise ArchiveError(f"holds a whole number of more than {LONGEST_NUMBER} bytes")
        stack.append(argument)
    elif name == "GLOBAL":
        stack.append(Name(".".join(argument.split(" ", 1))))
    elif name == "MARK":
        stack.append(MARK)
    elif name == "EMPTY_TUPLE":
        stack.append(_tuple((), size))
    elif name in TUPLES:
        items = _pop(stack, TUPLES[name])
        stack.append(_tuple(items, size))
    elif name == "TUPLE":
        stack.append(_tuple(_pop_to_mark(stack), size))
    elif name in TAKEN:
        _pop(stack, TAKEN[name])
    elif name in ("APPENDS", "SETITEMS"):
        _pop_to_mark(stack)
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop(), entries, root))
    elif name in ("REDUCE", "NEWOBJ"):
        called, arguments = _pop(stack, 2)
        stack.append(_called(called, arguments))
    elif name == "BUILD":
        stack.pop()
        _check_build(stack[-1])


def _pop(stack: list[Any], count: int) -> tuple[Any, ...]:
    if count > len(stack) or any(item is MARK for item in stack[-count:]):
        raise ValueError("an instruction without its values")
    items = tuple(stack[-count:])
    del stack[-count:]
    return items


def _pop_to_mark(stack: list[Any]) -> tuple[Any, ...]:
    items = []
    while (item := stack.pop()) is not MARK:
        items.append(item)
    return tuple(reversed(items))


def _tuple(items: tuple[Any, ...], size: int) -> Items:
    """A tuple; a hash looks at each place in it again, and at each level in one of C's frames."""
    places = depth = 1
    for item in items:
        if isinstance(item, Items):
            places += item.places
            depth = max(depth, item.depth + 1)
        else:
            places += 1
    if depth > DEEPEST or places > MOST_PLACES + size:
        raise ArchiveError("holds a nest that unfolds into more than the file could hold")
    return Items(items, places, depth)


def _storage(identity: Any, entries: dict[str, int], root: str) -> Storage:
    """The storage that the pickle asks for: it must be in the file."""
    if not isinstance(identity, Items) or len(identity.items) < 5:
        raise ValueError("a storage without a name")
    _, kind, key, _, numel = identity.items[:5]
    name = kind.text.rpartition(".")[2].removesuffix("Storage") if isinstance(kind, Name) else ""
    if name not in ITEM_SIZES or type(key) is not str or type(numel) is not int:
        raise ValueError("a storage of no kind that is known")
    entry = f"{root}/data/{key}"
    if entry not in entries:
        raise ArchiveError(f"is damaged: there is no {entry} in it")
    if not 0 <= numel * ITEM_SIZES[name] <= entries[entry]:
        raise ArchiveError(
            f"is damaged: it claims {numel} elements of {entry}, which has {entries[entry]} bytes"
        )
    return Storage(numel, ITEM_SIZES[name])


def _called(called: Any, arguments: Any) -> Made:
    """A call, judged by its name; which names are known at all is torch's affair."""
    if not isinstance(called, Name) or not isinstance(arguments, Items):
        raise ValueError("a call of something without a name")
    module, _, name = called.text.rpartition(".")
    given = arguments.items
    of_torch = module.partition(".")[0] == "torch"
    makes_memory = of_torch and (name == "Tensor" or name.endswith(("Tensor", "Storage")))
    if makes_memory or name in ("bytearray", "xrange", "range") or name.endswith("nested_tensor"):
        raise ArchiveError(
            f"calls {called.text}, which no state of a model needs, and was not read"
        )
    if module == "_codecs" and (len(given) != 2 or given[1] not in ("latin1", "latin-1")):
        raise ArchiveError(f"calls {called.text} otherwise than for bytes, and was not read")
    if name.endswith("from_type_v2") and not (
        isinstance(given[0], Name) and "rebuild" in given[0].text
    ):
        # a tensor with attributes: what makes it is an argument, and called by torch
        raise ArchiveError(
            f"calls something else than a tensor through {called.text}, and was not read"
        )
    if given and isinstance(given[0], Storage):
        _check_view(name, given)
    return Made(called.text)


def _check_view(name: str, given: tuple[Any, ...]) -> None:
    """A tensor must lie within its storage: torch makes the storage larger where it does not."""
    storage, offset, shape = given[0], given[1], given[2]
    stride = (
        given[3]
        if len(given) > 3 and isinstance(given[3], Items)
        else _tuple((0,) * len(shape.items), 0)
    )
    numbers = (offset, *shape.items, *stride.items)
    if len(shape.items) != len(stride.items) or not all(
        type(number) is int and number >= 0 for number in numbers
    ):
        raise ValueError("a tensor of no shape")
    numel = math.prod(shape.items)
    elements = storage.numel * storage.item_size // _item_size(given[6:], storage.item_size)
    last = offset + sum(
        (size - 1) * step for size, step in zip(shape.items, stride.items, strict=True)
    )
    if numel and last >= elements:
        raise ArchiveError(
            f"is damaged: a tensor {shape.items} in it is larger than its {elements} elements"
        )
    if name.endswith("qtensor") and numel > elements:
        raise ArchiveError(
            f"is damaged: a tensor {shape.items} in it is larger than its {elements} elements"
        )


def _item_size(more: tuple[Any, ...], otherwise: int) -> int:
    """Of the dtype among further arguments, where the storage has none."""
    for argument in more:
        dtype = (
            getattr(torch, argument.text.rpartition(".")[2], None)
            if isinstance(argument, Name)
            else None
        )
        if isinstance(dtype, torch.dtype):
            return dtype.itemsize
    return otherwise


def _check_build(target: Any) -> None:
    """A state that is set on something made: a tensor's would replace its storage."""
    if not isinstance(target, Made) or target.by.startswith("torch"):
        raise ArchiveError(
            "sets the state of a tensor, which torch.save does not do, and was not read"
        )


# --- the values ---


def check_values(value: Any, size: int) -> None:
    """Check what torch.load made of a file of so many bytes.

    Raises:
        ArchiveError: it contains itself, unfolds into more than the file could hold, or has a tensor without data.
    """
    measured: dict[int, tuple[int, int, int]] = {}  # by identity: places, depth and bytes
    begun: set[int] = set()
    stack = [value]
    while stack:
        current = stack[-1]
        number = id(current)
        if number in measured:
            stack.pop()
            continue
        inner = _inner(current)
        if not inner:
            measured[number] = (1, 1, _check_tensor(current) if isinstance(current, Tensor) else 0)
            stack.pop()
        elif number not in begun:
            begun.add(number)
            for part in inner:
                if id(part) in begun and id(part) not in measured:
                    raise ArchiveError("holds a container that contains itself")
                if id(part) not in measured:
                    stack.append(part)
        else:
            parts = [measured[id(part)] for part in inner]
            places = 1 + sum(part[0] for part in parts)
            depth = 1 + max(part[1] for part in parts)
            bytes_ = sum(part[2] for part in parts)
            if depth > DEEPEST or places > MOST_PLACES + size or bytes_ > MOST_BYTES + 8 * size:
                raise ArchiveError("holds a nest that unfolds into more than the file could hold")
            measured[number] = (places, depth, bytes_)
            stack.pop()


def _inner(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set)):
        return list(value)
    return []


def _check_tensor(tensor: Tensor) -> int:
    """How many bytes a tensor takes when it is copied."""
    if tensor.device.type != "cpu":
        raise ArchiveError(f"holds a tensor {tuple(tensor.shape)} without data")
    return tensor.numel() * tensor.element_size()
