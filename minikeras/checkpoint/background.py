"""Write a value to a file while the training goes on.

the fit                                        the thread of the fit
serializes the value into memory
goes on and changes the value                  writes the memory to the file, atomically
waits for the end of the write

A file never mixes two states, since the fit itself takes the copy. The thread calls the system
alone, and nothing of torch: a process that is forked meanwhile, as a DataLoader with workers does,
inherits no lock of torch that is taken.
"""

from __future__ import annotations

import contextlib
import io
import os
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from minikeras.support.atomic import write

THREAD = "minikeras save"  # its name
UNDER_WAY: set[BackgroundWrite] = set()


class BackgroundWrites:
    """The thread that writes the files of a fit, one after another."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._executor: Executor | None = None

    def start(self, path: Path, value: Any, *, keep: bool) -> BackgroundWrite:
        """Copy a value, and begin to write it; it may change from then on.

        What a signal handler raises meanwhile is raised here: in C++ torch.save only calls the
        methods of `BytesIO`, which are C and run no handler.

        Args:
            path: the file.
            value: plain values.
            keep: whether an existing file becomes NAME.prev.

        Raises:
            RuntimeError, MemoryError: there is no memory for a copy, or no thread. Nothing is
                written.
        """
        memory = io.BytesIO()
        torch.save(value, memory)
        if self._executor is None:
            # Python waits for it when it ends, so a state that a fit has saved is written.
            self._executor = ThreadPoolExecutor(1, THREAD)
        return BackgroundWrite(self._executor, path, memory, keep)

    def close(self) -> None:
        """End the thread, once it has written all files."""
        if self._executor is not None and self.process == os.getpid():
            self._executor.shutdown()
        self._executor = None


class BackgroundWrite:
    """A file that a thread writes.

    Args:
        executor: of the thread.
        path: the file.
        memory: its bytes.
        keep: whether an existing file becomes NAME.prev.
    """

    def __init__(self, executor: Executor, path: Path, memory: io.BytesIO, keep: bool) -> None:
        self.process = os.getpid()
        self._is_stopped = False
        self._future: Future[None] = executor.submit(self._write, path, memory, keep)
        UNDER_WAY.add(self)
        self._future.add_done_callback(lambda future: UNDER_WAY.discard(self))

    def _write(self, path: Path, memory: io.BytesIO, keep: bool) -> None:
        def dump(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                file.write(memory.getbuffer())
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
