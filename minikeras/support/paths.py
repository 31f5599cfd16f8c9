"""Paths that a user gives: which are refused, where they lead, and how they are fixed.

user_path        check the type, expand `~`
follow_links     the file that a path leads to, over symbolic links
refuse_special   no FIFO, device or socket is ever opened
same_place       whether two paths lead to one file
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
MOST_LINKS = 40  # as Linux follows


def user_path(path: Any, argument: str = "path") -> Path:
    """Return a user's path with `~` expanded; it stays relative if it was.

    Raises:
        TypeError: it is not a string or a pathlib.Path.
        ValueError: it cannot be the name of a file.

    >>> str(user_path("weights/best.pt"))
    'weights/best.pt'
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
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
        raise ValueError(f'{argument}="{text}": {error} Write the folder out.') from None


def fix(path: Path) -> Path:
    """Return the path as an absolute one, which a later chdir does not change."""
    return path.absolute()


def follow_links(path: Path) -> Path:
    """Return where a chain of symbolic links ends, whether a file is there or not.

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
    """Refuse what blocks when it is opened, or is no store of bytes.

    Raises:
        OSError: the path is a FIFO, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    for is_kind, kind in SPECIAL:
        if is_kind(mode):
            raise OSError(f"{path} is {kind}, and not a regular file. Give the path of a file.")


def same_place(first: Path, second: Path) -> bool:
    """Whether two paths lead to one file, over links and however they are written."""
    return _place(first) == _place(second)


def _place(path: Path) -> str:
    return os.path.normcase(os.path.realpath(path))
