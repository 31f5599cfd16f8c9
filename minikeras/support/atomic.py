"""Write a file atomically: it is complete or missing, whoever else writes it and whenever one dies.

temporary   a name next to the file that no other writer has
claim       create the temporary file, and lock it while it is written
put         rename it to the file's name
sweep       remove temporary files that killed processes left
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
ABANDONED = 24 * 3600.0  # the same for folders, and for files if files cannot be locked
REST = "run.pt"  # in the folder of a sharded state, the file with all but the shards
METADATA = ".metadata"  # in the same folder, torch's own file
LONGEST_NAME = 255 - len(".prev.0123456789abcdef.tmp")  # bytes of a file's name


def previous(path: Path) -> Path:
    """Return the path at which the file before the newest is kept."""
    return path.with_name(path.name + ".prev")


def temporary(path: Path) -> Path:
    """Return a name next to the file that no other writer has: NAME.0123456789abcdef.tmp."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


def temporaries(path: Path) -> list[Path]:
    """List the temporary files and folders of all writers of a file, and of its NAME.prev."""
    pattern = re.compile(rf"{re.escape(path.name)}(\.prev)?\.[0-9a-f]{{16}}\.tmp")
    try:
        with os.scandir(path.parent) as entries:
            return [path.parent / entry.name for entry in entries if pattern.fullmatch(entry.name)]
    except OSError:
        return []


def check_name(path: Path) -> None:
    """Refuse a name so long that the names of the files next to it would be too long.

    Raises:
        OSError: it is too long.
    """
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise OSError(
            errno.ENAMETOOLONG, f"expected a file name of at most {LONGEST_NAME} bytes", path.name
        )


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Create a new empty file, and lock it until the context ends.

    Raises:
        FileExistsError: the name exists, even as a link that leads nowhere.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        if os.name == "nt":  # Windows renames and removes no open file
            os.close(descriptor)
            descriptor = -1
        else:
            lock(descriptor)
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def lock(descriptor: int) -> bool | None:
    """Lock an open file, and tell whether that succeeded.

    False if another process has locked it, None if files cannot be locked.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some file systems have no locks
        return None
    return True


def sweep(path: Path) -> None:
    """Remove temporary files of the file's killed writers, but none that is still being written."""
    for leftover in temporaries(path):
        with contextlib.suppress(OSError):
            if is_abandoned(leftover):
                discard(leftover)


def is_abandoned(path: Path) -> bool:
    """Tell whether the writer of a temporary file or folder is dead."""
    status = path.lstat()
    seconds = time.time() - max(status.st_mtime, status.st_ctime)
    if path.is_symlink() or seconds < SETTLED:
        return False
    if path.is_dir():
        return seconds > ABANDONED
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NONBLOCK", 0))
    try:
        could_lock = lock(descriptor)
    finally:
        os.close(descriptor)
    if could_lock is None:
        return seconds > ABANDONED
    return could_lock


def write(
    path: Path, dump: Callable[[Path], None], *, keep: bool = True, new: Path | None = None
) -> None:
    """Replace the file at `path` atomically by what `dump` writes; symbolic links are followed.

    Args:
        dump: writes the new file to the path that it is given.
        keep: whether the old file becomes NAME.prev.
        new: a folder, from `temporary`, that `dump` completes; default a new temporary file.

    Raises:
        OSError: the file could not be written, or the path is something else than a file. The old
            file is unchanged.
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
    """Refuse folders, except those that a run with sharded parameters wrote.

    Raises:
        IsADirectoryError: one is another folder.
    """
    for path in paths:
        if path.is_dir() and not is_folder_of_run(path):
            hint = "Pass the path of a file."
            if (path / REST).is_file():
                hint = f"Pass the path of the file in it, {path / REST}."
            raise IsADirectoryError(f"{path} is a folder, but not one with a checkpoint. {hint}")


def is_folder_of_run(path: Path) -> bool:
    """Tell whether a folder contains a sharded state of a run and nothing else."""
    names = {entry.name for entry in path.iterdir()}
    shards = {name for name in names if name.endswith(".distcp")}
    return bool(shards) and names == shards | {REST, METADATA}


def keep_previous(path: Path) -> None:
    """Give the file the name NAME.prev as well; rename a folder, which cannot have two names."""
    if path.is_dir():
        put(path, previous(path))
        return
    if not path.exists():
        return
    second = temporary(previous(path))
    try:
        try:
            os.link(path, second)
        except FileNotFoundError:  # another process has removed it in between
            return
        except OSError:  # some file systems have no hard links
            with claim(second):
                shutil.copyfile(path, second)
            flush(second)
        put(second, previous(path))
        # If NAME.prev was the same file already, the rename has done nothing.
        second.unlink(missing_ok=True)
    except BaseException:
        with contextlib.suppress(OSError):
            discard(second)
        raise


def put(source: Path, target: Path) -> None:
    """Rename source to target and replace what is there.

    A folder cannot be replaced in one step: for a moment there is neither.
    """
    if source.is_dir() or target.is_dir():
        discard(target)
    os.replace(source, target)


def discard(path: Path) -> None:
    """Remove a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file or folder to the disk, so that it survives a power failure."""
    if os.name == "nt" and path.is_dir():  # Windows cannot flush folders
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
            f"{name} cannot write {path}: {error}. Pass the path of a file that can be written."
        ) from error
