"""Write the state of a run to a file while the training goes on.

the fit                                        the thread of the fit
copies the state into memory
goes on and changes the state                  writes the memory to the file, atomically
waits for the end of the write

A file never mixes two states, since the fit itself takes the copy. The thread calls zlib and the
system alone, and nothing of torch: a process that is forked meanwhile, as a DataLoader with workers
does, inherits no lock of torch that is taken.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO

import torch

from minikeras.checkpoint.plain import plain
from minikeras.checkpoint.snapshot import Memory, UnusualError
from minikeras.support.atomic import write

THREAD = "minikeras save"  # its name
BUFFERED = 2**16  # bytes: a small file is one call of the system
UNDER_WAY: set[BackgroundWrite] = set()


class BackgroundWrites:
    """The thread that writes the files of a fit, one after another."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._executor: Executor | None = None
        # the copies, which are kept from save to save: a save waits for the end of the last one
        self._memory = Memory()
        self._file_in_memory = io.BytesIO()
        self._is_plain = True  # states hold plain values alone, as far as has been seen

    def start(self, path: Path, state: dict[str, Any], *, keep: bool) -> BackgroundWrite:
        """Copy the state of a run, and begin to write it; it may change from then on.

        The last write must have ended.

        Args:
            path: the file.
            state: the state, with "history".
            keep: whether an existing file becomes NAME.prev.

        Raises:
            RuntimeError, MemoryError: there is no memory for a copy, or no thread. Nothing is
                written.
            TypeError: it holds something that is not plain.
        """
        write_copy = self._copy(state)
        if self._executor is None:
            # Python waits for it when it ends, so a state that a fit has saved is written.
            self._executor = ThreadPoolExecutor(1, THREAD)
        return BackgroundWrite(self._executor, path, write_copy, keep)

    def _copy(self, state: dict[str, Any]) -> Callable[[BinaryIO], Any]:
        """Copy a state, and return a function that writes the copy to an open file."""
        rest = dict(state)
        epochs = rest.pop("history")
        if self._is_plain:
            try:
                return self._memory.copy(rest, epochs).write
            except UnusualError:
                self._is_plain = False
        rest = plain(rest, "the state of the run")
        with contextlib.suppress(UnusualError):
            return self._memory.copy(rest, epochs).write
        # What a signal handler raises meanwhile is raised here: in C++ torch.save only calls the
        # methods of `BytesIO`, which are C and run no handler.
        file_in_memory = self._file_in_memory
        file_in_memory.seek(0)
        torch.save(rest | {"history": plain(epochs, "the history")}, file_in_memory)
        file_in_memory.truncate()
        return lambda file: file.write(file_in_memory.getbuffer())

    def close(self) -> None:
        """End the thread, once it has written all files."""
        if self._executor is not None and self.process == os.getpid():
            self._executor.shutdown()
        self._executor = None
        self._memory = Memory()
        self._file_in_memory = io.BytesIO()


class BackgroundWrite:
    """A file that a thread writes.

    Args:
        executor: of the thread.
        path: the file.
        write_copy: writes the copy to an open file.
        keep: whether an existing file becomes NAME.prev.
    """

    def __init__(
        self, executor: Executor, path: Path, write_copy: Callable[[BinaryIO], Any], keep: bool
    ) -> None:
        self.process = os.getpid()
        self._is_stopped = False
        self._future: Future[None] = executor.submit(self._write, path, write_copy, keep)
        UNDER_WAY.add(self)
        self._future.add_done_callback(lambda future: UNDER_WAY.discard(self))

    def _write(self, path: Path, write_copy: Callable[[BinaryIO], Any], keep: bool) -> None:
        def dump(temporary: Path) -> None:
            with open(temporary, "wb", BUFFERED) as file:
                write_copy(file)
            if self._is_stopped:
                raise InterruptedError("a signal has ended the writing of the file")

        write(path, dump, keep=keep)

    def is_done(self) -> bool:
        """Tell whether the file is complete, or could not be written."""
        return self._future.done()

    def wait(self) -> OSError | None:
        """Wait for the end, and return the error if the file could not be written.

        What a signal handler raises meanwhile, as a second Ctrl-C does, is raised once the write
        has ended. Unless the new file is complete, the one before it stays.
        """
        if self.process != os.getpid():  # a forked child: the thread is its parent's
            return None
        try:
            error = self._future.exception()
        except BaseException:
            self._is_stopped = True
            while not self._future.done():
                with contextlib.suppress(BaseException):  # a third signal: the second is raised
                    wait([self._future], timeout=1.0)
            raise
        if error is None or isinstance(error, OSError):
            return error
        raise error


def wait_for_writes() -> None:
    """Wait until no file of this process is being written; their errors are for their fits."""
    own = [writing._future for writing in list(UNDER_WAY) if writing.process == os.getpid()]
    wait(own)
