"""Plain values <-> a file that is whole or not there.

write    to a temporary file beside it, flushed to the disk; the last one gets the name NAME.prev too, then the new one
         takes its place
read     every byte against its checksum, then values only: nothing in a file can run

Whenever the process dies, NAME is a whole state; where it is gone, the user has removed it. A folder cannot have two
names, so between two renamings there may be NAME.prev alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minikeras.errors import CheckpointError

FOLDER = 0x10  # the bit of a zip entry's attributes
REST = "run.pt"  # in a folder of parts, the file of all else
ZIP = b"PK\x03\x04"  # how what torch.save writes begins


def previous(path: Path) -> Path:
    """Where the file before the newest is kept."""
    return path.with_name(path.name + ".prev")


def temporary(path: Path) -> Path:
    """Where the newest is written before it is whole."""
    return path.with_name(path.name + ".tmp")


def write(path: Path, dump: Callable[[Path], None], *, keep: bool = True) -> None:
    """Put what `dump` writes into a file at `path`, whole; with `keep` the one there becomes NAME.prev.

    Raises:
        OSError: it could not be written, or a folder of something else is there; what was there is there still.
    """
    new = temporary(path)
    refuse_folders(path, previous(path), new)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        dump(new)
        flush(new)
        if keep:
            keep_previous(path)
        put(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            discard(new)
        raise
    flush(path.parent)


def refuse_folders(*paths: Path) -> None:
    """One that a run with parameters in parts has written, or begun to, may be written over, and no other.

    Raises:
        IsADirectoryError: one is a folder of something else.
    """
    for path in filter(Path.is_dir, paths):
        names = [one.name for one in path.iterdir()]
        other = any(name not in (REST, ".metadata") and not name.endswith(".distcp") for name in names)
        if other or not (REST in names or path.suffix == ".tmp"):
            raise IsADirectoryError(f"{path} is a folder, and not one of a run. Give the path of a file.")


def keep_previous(path: Path) -> None:
    """What is there gets the name NAME.prev as well, or alone where it cannot have two."""
    if path.is_dir():
        put(path, previous(path))
    elif path.exists():
        second = temporary(previous(path))
        second.unlink(missing_ok=True)
        try:
            os.link(path, second)
        except OSError:  # not every file system has them
            shutil.copyfile(path, second)
            flush(second)
        put(second, previous(path))


def put(source: Path, target: Path) -> None:
    """Give it that name, over what has it; between a folder that goes and the one that comes there is neither."""
    if source.is_dir() or target.is_dir():
        discard(target)
    os.replace(source, target)


def discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def dump(value: Any) -> Callable[[Path], None]:
    """Writes a plain value with torch.save."""

    def save(path: Path) -> None:
        if path.is_dir():  # left by a run with parameters in parts
            discard(path)
        try:
            with open(path, "wb") as file:
                torch.save(value, file)
        except RuntimeError as error:  # torch's, of a position in the file, hides what the disk said
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    return save


def flush(path: Path) -> None:
    """To the disk, so that it outlives a loss of power too."""
    if os.name == "nt" and path.is_dir():  # Windows has no such thing for folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> Any:
    """The plain value in a file, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged, or holds something else than plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()  # torch.load takes a flipped bit in a tensor for a number
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & FOLDER]
            part = part or next(iter(folders), None)  # torch.load takes what memory holds for a folder's content
        if part is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:
        why = reason(path, error)
        raise CheckpointError(f"{path} {why}. {remedy(path)}") from error
    raise CheckpointError(f"{path} is damaged in {part}. {remedy(path)}")


def reason(path: Path, error: Exception) -> str:
    """Why a file could not be read."""
    if path.is_dir():
        return "is a folder, and not a file"
    with open(path, "rb") as file:
        begin = file.read(len(ZIP))
    if not begin:
        return "is empty"
    if begin != ZIP:
        return "is not a file that torch.save wrote"
    if "weights_only" in str(error):
        return "holds more than tensors and plain values, which could run code, and was not read"
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return f"is damaged or cut short: {first.rstrip('.')}"


def remedy(path: Path) -> str:
    if previous(path).exists():
        return f"The one written before it is {previous(path)}."
    return "There is none written before it: give another file, or move this one away to start anew."


def read_newest(path: Path, read: Callable[[Path], Any] = read) -> tuple[Any, Path] | None:
    """What `read` gives of the newest whole file at `path`, and which file that was; None where there is none.

    Warns where the newest is damaged and the one before it is used.

    Raises:
        CheckpointError: there are files, and none is whole.
    """
    before = previous(path)
    try:
        return read(path), path
    except (FileNotFoundError, NotADirectoryError):  # where a folder came or went, between two renamings
        midway = before.is_dir() or (before.exists() and temporary(path).is_dir())
        return (read(before), before) if midway else None
    except CheckpointError as error:
        if not before.exists():
            raise
        value = read(before)
        warnings.warn(f"{error} It is used instead.", stacklevel=2)
        return value, before
