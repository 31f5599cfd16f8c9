"""Write a file so that it is whole or not there, whoever else writes it and whenever the process dies.

temporary   a name next to the file that no other writer has
claim       create it, and lock it for as long as it is written
put         give it the name of the file
sweep       remove the temporary files that killed processes left
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from minikeras.support.paths import follow_links, refuse_special

SETTLED = 60.0  # seconds after which an unlocked temporary file belongs to no living writer
ABANDONED = 24 * 3600.0  # ... and where files cannot be locked, or of a folder
REST = "run.pt"  # in a folder of parts, the file of all else
METADATA = ".metadata"  # ... and that of torch
LONGEST_NAME = 255 - len(".prev.0123456789abcdef.tmp")  # bytes of a file's name


def previous(path: Path) -> Path:
    """Where the file before the newest is kept."""
    return path.with_name(path.name + ".prev")


def temporary(path: Path) -> Path:
    """Return a name next to the file that no other writer has: NAME.0123456789abcdef.tmp."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def temporaries(path: Path) -> list[Path]:
    """The temporary files and folders of all writers of that file, and of its NAME.prev."""
    pattern = re.compile(rf"{re.escape(path.name)}(\.prev)?\.[0-9a-f]{{16}}\.tmp")
    try:
        with os.scandir(path.parent) as entries:
            return [path.parent / entry.name for entry in entries if pattern.fullmatch(entry.name)]
    except OSError:
        return []


def check_name(path: Path) -> None:
    """Refuse a name that leaves no room for those next to it.

    Raises:
        OSError: it is too long.
    """
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise OSError(
            errno.ENAMETOOLONG, f"the name of a file may have {LONGEST_NAME} bytes here", path.name
        )


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Create an empty file that was not there, and hold a lock on it meanwhile.

    Raises:
        FileExistsError: something has that name, even a link to nowhere.
    """
    descriptor = os.open(
        path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666
    )
    try:
        if os.name == "nt":  # where an open file cannot be renamed, and cannot be removed either
            os.close(descriptor)
            descriptor = -1
        else:
            lock(descriptor)
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def lock(descriptor: int) -> bool | None:
    """Lock an open file; False if another process has locked it, None where that cannot be known."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # not every file system has locks
        return None
    return True


def sweep(path: Path) -> None:
    """Remove what writers of that file left that were killed; one that is still written is left alone."""
    for left in temporaries(path):
        with contextlib.suppress(OSError):
            if is_abandoned(left):
                discard(left)


def is_abandoned(path: Path) -> bool:
    """Whether the writer of a temporary file or folder lives no longer."""
    status = path.lstat()
    seconds = time.time() - max(status.st_mtime, status.st_ctime)
    if path.is_symlink() or seconds < SETTLED:
        return False
    if path.is_dir():
        return seconds > ABANDONED
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NONBLOCK", 0))
    try:
        locked = lock(descriptor)
    finally:
        os.close(descriptor)
    return seconds > ABANDONED if locked is None else locked


def write(
    path: Path, dump: Callable[[Path], None], *, keep: bool = True, new: Path | None = None
) -> None:
    """Put what `dump` writes into a file in place of the one at `path`, over symbolic links.

    Args:
        keep: the file that was there becomes NAME.prev.
        new: a folder, from `temporary`, that `dump` completes; default a new temporary file.

    Raises:
        OSError: it could not be written, or something else than a file is there; what was there is still there.
    """
    target = follow_links(path)
    places = [target]
    if keep:
        places.append(previous(target))
    for place in places:
        refuse_special(place)
    refuse_folders(*places)
    check_name(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    try:
        with contextlib.ExitStack() as stack:
            if new is None:
                new = temporary(target)
                stack.enter_context(claim(new))
            dump(new)
            flush(new)
            if keep:
                keep_previous(target)
            put(new, target)
    except BaseException:
        if new is not None:
            with contextlib.suppress(OSError):
                discard(new)
        raise
    flush(target.parent)


def refuse_folders(*paths: Path) -> None:
    """Refuse a folder, but for one that a run with parameters in parts has written.

    Raises:
        IsADirectoryError: one is a folder of something else.
    """
    for path in paths:
        if path.is_dir() and not is_folder_of_run(path):
            hint = "Give the path of a file."
            if (path / REST).is_file():
                hint = f"Give the path of the file in it, {path / REST}."
            raise IsADirectoryError(f"{path} is a folder, and not one of a run. {hint}")


def is_folder_of_run(path: Path) -> bool:
    """Whether a folder holds the parts of a run's state and nothing else."""
    names = {entry.name for entry in path.iterdir()}
    parts = {name for name in names if name.endswith(".distcp")}
    return bool(parts) and names == parts | {REST, METADATA}


def keep_previous(path: Path) -> None:
    """What is there gets the name NAME.prev as well, or alone where it cannot have two."""
    if path.is_dir():
        put(path, previous(path))
        return
    if not path.exists():
        return
    second = temporary(previous(path))
    try:
        try:
            os.link(path, second)
        except FileNotFoundError:  # another process has removed it meanwhile
            return
        except OSError:  # not every file system has them
            with claim(second):
                shutil.copyfile(path, second)
            flush(second)
        put(second, previous(path))
        second.unlink(missing_ok=True)  # two names of one file: a renaming does nothing
    except BaseException:
        with contextlib.suppress(OSError):
            discard(second)
        raise


def put(source: Path, target: Path) -> None:
    """Give it that name, over what has it; between a folder that goes and one that comes there is neither."""
    if source.is_dir() or target.is_dir():
        discard(target)
    os.replace(source, target)


def discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """To the disk, so that it outlives a loss of power too."""
    if os.name == "nt" and path.is_dir():  # Windows has no such thing for folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: Path, name: str) -> None:
    """Make the folder of a file, and check before the training that the file can be written.

    Raises:
        OSError: it cannot be written.
    """
    try:
        place = follow_links(path)
        refuse_special(place)
        check_name(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place.parent).close()
        if place.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        raise type(error)(
            f"{name} cannot write {path}: {error}. Give the path of a file that can be."
        ) from error
