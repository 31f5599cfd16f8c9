"""Write a value to a file while the training goes on.

the fit                           the thread
starts the thread, and waits
                                  serializes the value into memory
goes on and changes the value     writes the memory to the file, atomically
waits for the end                 ends

Nothing of the value is read once the fit goes on, so a file never mixes two states. All of torch
runs while the fit waits: later the thread only calls the system, so a process that forks meanwhile,
as a DataLoader with workers does, gives no lock of torch to its children.
"""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any

from minikeras.checkpoint.file import Sink, serialize, wait_for_thread
from minikeras.support.atomic import write

UNDER_WAY: set[BackgroundWrite] = set()  # of this process


class BackgroundWrite:
    """One file that a thread writes. The constructor returns once the value may be changed.

    Args:
        path: the file.
        value: plain values, whose tensors no device is still computing.
        keep: whether an existing file becomes NAME.prev.

    Raises:
        MemoryError: there is no memory for a copy of the value. Nothing is written.
    """

    def __init__(self, path: Path, value: Any, *, keep: bool) -> None:
        self.process = os.getpid()
        self.failure: BaseException | None = None
        self._memory = io.BytesIO()
        self._sink = Sink(self._memory)
        self._serialized = threading.Event()  # or failed
        self._done = threading.Event()
        # Python waits for it when it ends: a fit in a daemon thread has its last state written too.
        self._thread = threading.Thread(
            target=self._run, args=(path, value, keep), name="minikeras save", daemon=False
        )
        wait_for_thread(self._thread, self._serialized, self._done, self._sink.stop)
        if self.failure is not None:
            raise self.failure

    def _run(self, path: Path, value: Any, keep: bool) -> None:
        UNDER_WAY.add(self)
        try:
            serialize(value, self._sink)
            self._serialized.set()
            write(path, self._write_memory, keep=keep)
        except BaseException as error:
            self.failure = error
        finally:
            self._memory = io.BytesIO()  # frees the other one
            UNDER_WAY.discard(self)
            self._done.set()
            self._serialized.set()

    def _write_memory(self, path: Path) -> None:
        with open(path, "wb", buffering=0) as file:
            rest = self._memory.getbuffer()
            while rest:
                self._sink.raise_if_stopped()
                rest = rest[file.write(rest) :]
        self._sink.raise_if_stopped()

    def is_done(self) -> bool:
        """Tell whether the file is complete, or could not be written."""
        return self._done.is_set()

    def wait(self) -> OSError | None:
        """Wait for the end, and return the error if the file could not be written.

        What a signal handler raises meanwhile, as a second Ctrl-C does, is raised once the thread
        has ended. Unless the file is complete, the one before it stays.
        """
        wait_for_thread(self._thread, self._done, self._done, self._sink.stop)
        self._thread.join()
        if self.failure is None or isinstance(self.failure, OSError):
            return self.failure
        raise self.failure


def wait_for_writes() -> None:
    """Wait until no file of this process is being written; their errors stay with their fits."""
    for writing in list(UNDER_WAY):
        if writing.process == os.getpid():  # a forked child has no thread that writes
            writing._done.wait()
