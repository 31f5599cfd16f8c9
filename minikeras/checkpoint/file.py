"""Plain values <-> a file that is whole or not there.

dump     writes a value, for `atomic.write`: to a temporary file next to it, flushed to the disk; the last one
         gets the name NAME.prev too, then the new one takes its place
read     every byte against its checksum, then values only: nothing in a file can run, or take more memory than it has

Whenever the process dies, NAME is a whole state; where it is gone, the user has removed it. A folder cannot have two
names, so between two renamings there may be NAME.prev alone.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikeras.checkpoint.archive import ArchiveError, check_entries, check_program, check_values
from minikeras.errors import CheckpointError
from minikeras.nests import leaves
from minikeras.support.atomic import REST, discard, flush, previous, temporaries, write
from minikeras.support.paths import follow_links, refuse_special

__all__ = [
    "discard",
    "dump",
    "flush",
    "previous",
    "read",
    "read_newest",
    "refuse_special_file",
    "remedy",
    "remedy_of_fit",
    "remedy_of_load",
    "write",
]

ZIP = b"PK\x03\x04"  # how what torch.save writes begins


class _Sink:
    """A file that never raises: what goes wrong is kept for later, and nothing more is written.

    torch's writer cannot take an error from below: it hides it behind one of its own, or ends the process.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None
        self.stopped = False

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None and not self.stopped and not self.file.closed:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return size

    def flush(self) -> None:
        """At the end, by `dump`."""

    def stop(self) -> None:
        self.stopped = True


def dump(value: Any) -> Callable[[Path], None]:
    """Writes a plain value with torch.save."""

    def save(path: Path) -> None:
        for device in {leaf.device for leaf in leaves(value) if isinstance(leaf, Tensor)}:
            if device.type not in ("cpu", "meta"):  # another thread has another stream
                torch.get_device_module(device).synchronize()
        with open(path, "wb") as file:
            sink = _Sink(file)
            run_uninterrupted(lambda: torch.save(value, sink), sink.stop)  # type: ignore[arg-type] # it takes any
            if sink.error is not None:
                raise sink.error

    return save


def run_uninterrupted(work: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run what no signal may interrupt: in a thread, since Python's signal handlers run in the main one.

    What a handler raises meanwhile, as Ctrl-C does, is raised here once the work has ended; `stop` tells it to hurry.
    """
    if threading.current_thread() is not threading.main_thread():
        work()
        return
    failures: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, name="minikeras save")
    try:
        thread.start()
        done.wait()
    except BaseException:
        stop()
        while thread.is_alive() and not done.is_set():
            with contextlib.suppress(BaseException):  # another Ctrl-C: the first one is on its way
                done.wait(1.0)
        raise
    if failures:
        raise failures[0]


def read(path: str | Path) -> Any:
    """The plain value in a file, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is none.
        PermissionError: it may not be read.
        CheckpointError: it is damaged, or holds something else than plain values.
    """
    path = Path(path)
    refuse_special_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = path.stat().st_size
            check_entries(archive, size)
            check_program(archive)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", category=UserWarning, module=r"torch\."
            )  # of what is refused below
            value = torch.load(path, map_location="cpu", weights_only=True)
        check_values(value, size)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        raise
    except ArchiveError as error:
        raise CheckpointError(f"{path} {error}. {remedy(path)}") from None
    except Exception as error:
        why = reason(path, error)
        raise CheckpointError(f"{path} {why}. {remedy(path)}") from error
    return value


def refuse_special_file(path: Path) -> None:
    """Refuse to read a FIFO, a device or a socket.

    Raises:
        CheckpointError: it is one.
    """
    try:
        refuse_special(path)
    except PermissionError:
        raise
    except OSError as error:
        raise CheckpointError(str(error)) from None


def reason(path: Path, error: Exception) -> str:
    """Why a file could not be read."""
    if path.is_dir():
        return "is a folder, and not a file"
    try:
        with open(path, "rb") as file:
            begin = file.read(len(ZIP))
    except OSError as unreadable:
        return f"could not be read: {unreadable}"
    if not begin:
        return "is empty"
    if begin != ZIP:
        return "is not a file that torch.save wrote"
    if "weights_only" in str(error):
        return "holds more than tensors and plain values, which could run code, and was not read"
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return f"is damaged or cut short: {first.rstrip('.')}"


def remedy(path: Path) -> str:
    """What to do about a file that cannot be used."""
    path = follow_links(path)
    if previous(path).exists():
        return f"The one written before it is {previous(path)}."
    return (
        "There is none written before it: give another file, or move this one away to start anew."
    )


def remedy_of_load(path: Path) -> str:
    """What to do about weights that do not fit the model."""
    before = previous(follow_links(path))
    if before.exists():
        return f"If it is the wrong file, give another one: the one written before it is {before}."
    return "If it is the wrong file, give another one."


def remedy_of_fit(path: Path) -> str:
    """What to do about the state of a run that does not fit this script."""
    path = follow_links(path)
    newest = path
    if path.name.endswith(".prev"):
        newest = path.with_name(path.name.removesuffix(".prev"))
    files = [file for file in (newest, previous(newest)) if file.exists()]
    return f"To start anew, delete {' and '.join(map(str, files)) or path}, or give another path."


def read_newest(path: Path, read: Callable[[Path], Any] = read) -> tuple[Any, Path] | None:
    """What `read` gives of the newest whole file at `path`, and which file that was; None where there is none.

    Warns where the newest is damaged and the one before it is used.

    Raises:
        CheckpointError: there are files, and none is whole.
    """
    path = follow_links(path)
    before = previous(path)
    try:
        return read(path), path
    except (
        FileNotFoundError,
        NotADirectoryError,
    ):  # where a folder came or went, between two renamings
        folders = any((folder / REST).is_file() for folder in temporaries(path))
        midway = before.is_dir() or (before.exists() and folders)
        return (read(before), before) if midway else None
    except CheckpointError as error:
        if not before.exists():
            raise
        value = read(before)
        warnings.warn(f"{error} It is used instead.", stacklevel=2)
        return value, before
