"""SIGTERM and Ctrl-C in a fit with a checkpoint.

The current batch is finished and the state written. A second signal acts at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

TERMINATED = 128 + signal.SIGTERM  # the exit status that schedulers expect


class Interruptions:
    """Hold back SIGTERM and Ctrl-C until a fit has written its state. For use in `with`.

    Earlier handlers are called then, and put back at the end.
    """

    def __init__(self) -> None:
        self.active = threading.current_thread() is threading.main_thread()  # else Python refuses
        self.process = os.getpid()
        self.before: dict[int, Any] = {}
        self.received: int | None = None
        self.agreed: int | None = None  # what one of several processes has received
        self.alone = True  # there is one process

    def __enter__(self) -> Interruptions:
        if not self.active:
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN):  # whoever ignores it wants it ignored
                self.before[number] = handler
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        # it came after the last state was written
        if self.received is not None and error[0] is None:
            self._act(self.received, None)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:
            if get_worker_info() is None:  # another child: as if this handler were not there
                signal.signal(number, self.before[number])
                os.kill(os.getpid(), number)
            # a DataLoader's worker, which Ctrl-C reaches too: it continues, so that the batch can
            # be finished
            return
        if self.received is not None:
            self._act(number, frame)
        self.received = number
        # the workers may have received it as well: torch must not complain of them now
        if hasattr(signal, "SIGCHLD"):
            self.before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def act(self, save: Callable[[], None]) -> None:
        """If a signal has come, write the state, then do what the signal asks for."""
        due = self.received if self.alone else self.agreed
        if due is not None:
            save()
            self._act(due, None)

    def _act(self, number: int, frame: Any) -> None:
        handler = self.before.get(number)
        if callable(handler):
            handler(number, frame)  # Python's own for Ctrl-C raises KeyboardInterrupt
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)
