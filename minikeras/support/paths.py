"""Check, expand and resolve the paths that users pass.

user_path        check the type, expand `~`
follow_links     the file that a path leads to, with symbolic links followed
refuse_special   refuse a FIFO, a device or a socket: none is ever opened
same_place       tell whether two paths lead to one file
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPECIAL: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
MOST_LINKS = 40  # as many as Linux follows


def user_path(path: Any, argument: str = "path") -> Path:
    """Return a user's path with `~` expanded; it stays relative if it was.

    Raises:
        TypeError: it is not a string or a pathlib.Path.
        ValueError: it cannot be the name of a file.

    >>> str(user_path("weights/best.pt"))
    'weights/best.pt'
    """
    text = path
    if isinstance(path, os.PathLike):
        text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(
            f"{argument} must be the path of a file, a string or a pathlib.Path, got {path!r}. "
            f'Pass one, such as "run.pt".'
        )
    ends_in_folder = text.endswith(os.sep) or Path(text).name in ("", "..")
    if ends_in_folder or "\0" in text:
        shown = text.replace("\0", "\\0")
        raise ValueError(
            f'{argument}="{shown}" is not the path of a file. Pass one, such as "run.pt".'
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # a user that this machine does not have
        raise ValueError(
            f'{argument}="{text}": {error} Pass the full path of the folder.'
        ) from None


def fix(path: Path) -> Path:
    """Return the absolute path, so that a later chdir does not change it."""
    return path.absolute()


def follow_links(path: Path) -> Path:
    """Return the path at the end of a chain of symbolic links, whether it exists or not.

    Raises:
        OSError: the links lead in a circle.
    """
    followed = path
    for _ in range(MOST_LINKS):
        if not followed.is_symlink():
            return followed
        followed = followed.parent / os.readlink(followed)
    raise OSError(errno.ELOOP, "symbolic links that lead in a circle", str(path))


def refuse_special(path: Path) -> None:
    """Refuse a path that blocks when it is opened, or does not store bytes.

    Raises:
        OSError: the path is a FIFO, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    for is_kind, kind in SPECIAL:
        if is_kind(mode):
            raise OSError(f"{path} is {kind}, not a regular file. Pass the path of a file.")


def same_place(first: Path, second: Path) -> bool:
    """Tell whether two paths lead to one file, with links followed and however they are written."""
    return _resolve(first) == _resolve(second)


def _resolve(path: Path) -> str:
    """Return the real path, in one spelling."""
    return os.path.normcase(os.path.realpath(path))
