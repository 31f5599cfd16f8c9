"""Write a value to a file atomically; read it back with every byte verified.

dump     writes a value, for `atomic.write`: that writes a temporary file next to NAME,
         flushes it to the disk, keeps the last file as NAME.prev and renames the new one to NAME
read     checks every byte against its checksum, then loads values only: nothing in a file can run,
         or take more memory than the file has bytes

Whenever the process dies, NAME is a complete state; if NAME is missing, the user has removed it.
A folder cannot have two names, so between two renames there may be only NAME.prev.
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

from minikeras.checkpoint.archive import ArchiveError, check_entries, check_program, check_values
from minikeras.checkpoint.plain import find_tensors
from minikeras.errors import CheckpointError
from minikeras.support.atomic import REST, discard, flush, previous, temporaries, write
from minikeras.support.paths import follow_links, refuse_special

__all__ = [
    "discard",
    "dump",
    "flush",
    "name_files",
    "previous",
    "read",
    "read_newest",
    "refuse_special_file",
    "remedy",
    "remedy_of_fit",
    "remedy_of_load",
    "write",
]

ZIP = b"PK\x03\x04"  # the first bytes of a file that torch.save writes


class _Sink:
    """A file that never raises: it keeps the first error for later and writes nothing after it.

    torch's writer cannot handle an error of the file: it hides it behind its own, or ends the
    process (https://github.com/pytorch/pytorch/issues/156955).
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None
        self.stopped = False

    def write(self, data: Any) -> int:
        """Write data, unless there was an error before."""
        size = memoryview(data).nbytes
        if self.error is None and not self.stopped and not self.file.closed:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return size

    def flush(self) -> None:
        """Do nothing: the file is flushed once, after the whole value."""

    def stop(self) -> None:
        """Write nothing from now on."""
        self.stopped = True


def dump(value: Any) -> Callable[[Path], None]:
    """Return a function that writes a plain value to a path with torch.save."""

    def save(path: Path) -> None:
        for device in {tensor.device for tensor in find_tensors(value)}:
            if device.type not in ("cpu", "meta"):  # the thread that saves has another stream
                torch.get_device_module(device).synchronize()
        with open(path, "wb") as file:
            sink: Any = _Sink(file)
            run_uninterrupted(lambda: torch.save(value, sink), sink.stop)
            if sink.error is not None:
                raise sink.error

    return save


def run_uninterrupted(work: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run work that no signal may interrupt, in another thread.

    Python runs signal handlers in the main thread. What a handler raises, as Ctrl-C does, is raised
    here once the work has ended; `stop` is called to make it end soon.
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
            with contextlib.suppress(BaseException):  # a second Ctrl-C: the first is raised below
                done.wait(1.0)
        raise
    if failures:
        raise failures[0]


def read(path: str | Path) -> Any:
    """Read the plain value in a file, with its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no file.
        PermissionError: it may not be read.
        CheckpointError: it is damaged, or contains something else than plain values.
    """
    path = Path(path)
    refuse_special_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = path.stat().st_size
            check_entries(archive, size)
            check_program(archive)
        with warnings.catch_warnings():
            # These are about values that `check_values` refuses.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
            value = torch.load(path, map_location="cpu", weights_only=True)
        check_values(value, size)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        raise
    except ArchiveError as error:
        raise CheckpointError(f"{path} {error}. {remedy(path)}") from None
    except Exception as error:
        reason = find_reason(path, error)
        raise CheckpointError(f"{path} {reason}. {remedy(path)}") from error
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


def find_reason(path: Path, error: Exception) -> str:
    """Say why a file could not be read."""
    if path.is_dir():
        return "is a folder, not a file"
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
        return (
            "contains objects other than tensors and plain values, which could run code, so it "
            "was not loaded"
        )
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return f"is damaged or cut short: {first.rstrip('.')}"


def remedy(path: Path) -> str:
    """Say what to do about a file that cannot be used."""
    path = follow_links(path)
    if previous(path).exists():
        return f"The previous version is {previous(path)}."
    return (
        "There is no previous version: pass another path, or delete this file to start from "
        "scratch."
    )


def remedy_of_load(path: Path) -> str:
    """Say what to do about weights that do not fit the model."""
    before = previous(follow_links(path))
    if before.exists():
        return f"If it is the wrong file, pass another path: the previous version is {before}."
    return "If it is the wrong file, pass another path."


def remedy_of_fit(path: Path) -> str:
    """Say what to do about the state of a run that does not fit this script."""
    return f"To start from scratch, delete {name_files(path)}, or pass another path."


def name_files(path: Path) -> str:
    """Name the files to delete for a fit to start from scratch: the newest and the previous one."""
    path = follow_links(path)
    newest = path
    if path.name.endswith(".prev"):
        newest = path.with_name(path.name.removesuffix(".prev"))
    files = [str(file) for file in (newest, previous(newest)) if file.exists()]
    return " and ".join(files) if files else str(path)


def read_newest(path: Path, read: Callable[[Path], Any] = read) -> tuple[Any, Path] | None:
    """Read the newest complete file at `path`, and return its value and its path.

    Return None if there is no file. Warn if the newest file is damaged, and read the one before it.

    Raises:
        CheckpointError: there are files, and none is complete.
    """
    path = follow_links(path)
    before = previous(path)
    try:
        return read(path), path
    except (FileNotFoundError, NotADirectoryError):
        # The process may have died between the two renames of a folder.
        has_new_folder = any((folder / REST).is_file() for folder in temporaries(path))
        if before.is_dir() or (before.exists() and has_new_folder):
            return read(before), before
        return None
    except CheckpointError as error:
        if not before.exists():
            raise
        value = read(before)
        warnings.warn(f"{error} The previous version is used instead.", stacklevel=2)
        return value, before
