"""Small messages between processes, and what to say if one of them does not answer.

    exchange    the largest of a few numbers over all processes
    broadcast   a plain value of rank 0
    gather      a plain value of each
    wait        wait for any message, and look for the reason if it takes long

Each small message begins with one all_reduce of the same size, whose first number says which verb
is running and what the message is about. So processes that have come to different places in a
script find it out, each says where it is, and no numbers are mixed up. A message of 5,000 numbers
takes about as long as one of 8, nearly all of it waiting: so a value of rank 0 travels in it.

A process that waits longer than a second writes into the group's store where it waits, and looks
there for what others have written. There are two reasons to give up:

    a process has left the verb with an error, and will not answer any more
    a process waits for a small message of this one, which itself waits for gradients of that one

After 20 s without a reason a process warns, and names those that have not come to the same place:
they work, or wait in an operation of the user's own.

All of it is in one group of gloo, which is created with the first message.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from minikeras.distributed.packing import pack, unpack

# after which a lost process is an error; a group of the user's own has its own timeout
TIMEOUT = timedelta(minutes=2)
NUMBERS = 16  # in one message
ATTACHED = 8  # numbers attached to it
HEAD = 2 + NUMBERS + ATTACHED  # before a value of rank 0
VALUE = 20_480  # bytes of a value of rank 0 in it, enough for the states of random generators
FIRST_LOOK = 1.0  # seconds until a process that waits looks for the reason; then ever more rarely
LAST_LOOK = 4.0  # seconds between two looks at most
KEPT = 64  # small messages that have ended
LONG_WAIT = 20.0  # seconds until a process that has found no reason warns
LONGEST_PLACE = 200  # characters of the names of running verbs
LONGEST_ERROR = 500  # characters of another process's error
LONGEST_REASON = 700  # characters of why another process does not answer
LARGEST_PLACE = 8_192  # bytes of a place and a reason, packed
OPTIMIZER_STEP = "optimizer_step"  # what the message of a custom step is about

REMEDY = (
    "All processes must make the same calls of fit, evaluate, predict, save and export, in the "
    "same order. Call them in every process, and not only `if model.is_main_process`: rank 0 alone "
    "prints and writes files anyway."
)
REMEDY_OF_STEPS = (
    "optimizer_step adds up the gradients of all processes, so it must be called equally often in "
    "every process. The loss and the rows of a batch differ between processes: skip or repeat "
    "optimizer_step by a number that all have, such as the batch's number."
)
REMEDY_WITHIN = (
    "Within a call all processes must do the same: train the same layers in each batch, and step "
    "equally often. Freeze a layer, or skip a step, in every process alike."
)
OTHER_WORK = (
    "Other work there may take long. But an operation of torch.distributed that not all processes "
    "call, such as a barrier in a callback, does not end: call it in every process, or in none."
)
RESTART = "Mend that error, and start all processes again."
ADVICE = (
    "Look for its error message first. Processes must make the same calls of fit, evaluate, "
    "predict and save. For a longer timeout call torch.distributed.init_process_group(timeout=...) "
    "before compile. With TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment torch says which "
    "operations did not meet."
)


@dataclass(eq=False)
class Verb:
    """A call of fit, evaluate, ... that is running."""

    name: str
    number: int = 0  # the same in all processes, once they have met
    channel: Channel | None = None  # by which they have met
    put_back: Callable[[], None] | None = None  # what is replaced for this call alone
    draws_apart: bool = False  # a fit, in which each process has random states of its own

    def tell_left(self, error: BaseException) -> None:
        """Note that an error ends it in this process, which will not answer in it any more."""
        if self.channel is None:  # the others have not been met: it is a matter of this one alone
            return
        self.channel.notes.write_once(
            f"left/{self.number}",
            f"process {self.channel.rank} has left {self.name} with {shorten(error)}",
        )


VERBS: list[Verb] = []  # the running ones; a callback of fit may call evaluate
_met = 0  # verbs so far, in all of which the processes have met
_channels: list[Channel] = []  # that of the current process group; every World uses it
_opened = 0  # channels so far


def open_channel() -> Channel:
    """Return the channel of the current process group; all processes must call it first.

    Raises:
        RuntimeError: the process group has been destroyed.
    """
    global _opened
    if _channels and _channels[0].is_open():
        return _channels[0]
    if not torch.distributed.is_initialized():
        raise RuntimeError(
            "there is no process group any more; expected the one that compile found to exist as "
            "long as the model is used. Call torch.distributed.destroy_process_group after the "
            "last call of fit, evaluate, predict and save. If you create another group, give it a "
            "store of its own, since torch may find in the old one what the first group has left, "
            "and call compile again."
        )
    _opened += 1
    _channels[:] = [Channel(_opened)]
    return _channels[0]


def count_verb(channel: Channel, number: float) -> None:
    """Number the verb in which the processes have just met, as all of them do."""
    global _met
    _met = int(number)
    if VERBS:
        VERBS[-1].number = _met
        VERBS[-1].channel = channel


def verbs_met() -> int:
    """Return the number of the last verb in which the processes met."""
    return _met


def is_broken() -> bool:
    """Tell whether a process has given up waiting, so that messages are still on their way."""
    return bool(_channels and _channels[0].broken)


class Channel:
    """The small messages of one process group.

    Args:
        number: how many channels this process has opened.
    """

    def __init__(self, number: int) -> None:
        import torch.distributed as dist

        self.dist = dist
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.notes = Notes(f"minikeras/{number}/")
        self.of: Any = dist.group.WORLD  # the process group
        self.group: Any = self._create_group()
        self.begun: Exchange | None = None  # on its way
        self.ended: deque[Any] = deque(maxlen=KEPT)  # torch's handles of messages
        self.attached: list[Attachment] = []  # to the next message
        self.messages = 0  # small ones begun so far
        self.sums = 0  # of gradients and other tensors on the CPU, waited for so far
        self.sums_begun = 0  # on any device
        self.broken = ""  # why this process has given up waiting

    def _create_group(self) -> Any:
        """Create the group of the messages: here all processes meet for the first time.

        Who is missing cannot be found out, since the store itself waits.

        Raises:
            RuntimeError: not all of them have come.
        """
        others = f"for the others at the beginning of {describe_verbs()}"

        def warn() -> None:
            warnings.warn(
                f"process {self.rank} of {self.size} has waited {LONG_WAIT:g} s {others}. "
                f"{OTHER_WORK}",
                stacklevel=1,
            )

        timer = threading.Timer(LONG_WAIT, warn)
        timer.daemon = True
        timer.start()
        begin = time.monotonic()
        try:
            return self.dist.new_group(backend="gloo", timeout=self.notes.timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} of {self.size} has waited {time.monotonic() - begin:.0f} s "
                f"{others}, in vain. {REMEDY} Torch says: {error}"
            ) from error
        finally:
            timer.cancel()

    def is_open(self) -> bool:
        """Tell whether the group still exists: the user may have destroyed the groups."""
        return self.dist.group.WORLD is self.of

    # --- messages ---------------------------------------------------------------------------------

    def exchange(self, about: str, *numbers: float) -> list[float]:
        """Return the largest of each number over all processes.

        Args:
            about: what the message is about, the same words in all processes.

        Raises:
            RuntimeError: the processes are in different calls, or one does not answer.
        """
        largest: list[float] = []
        for start in range(0, max(len(numbers), 1), NUMBERS):
            part = numbers[start : start + NUMBERS]
            largest += self._begin(about, f"{len(numbers)} numbers", part).largest()
        return largest

    def begin(self, about: str, *numbers: float) -> Exchange:
        """Send a few numbers, and go on: their `largest()` are asked for later.

        That is before the next message, of which all processes have the same ones. Nobody waits
        then, if it is late enough.
        """
        self.send_attached()
        return self._begin(about, f"{len(numbers)} numbers", numbers)

    def attach(
        self, about: str, numbers: Sequence[float], then: Callable[[list[float]], None]
    ) -> None:
        """Send up to `ATTACHED` numbers with the next message; `then` gets the largest of each."""
        self.attached.append(Attachment(about, numbers, then))

    def send_attached(self) -> None:
        """Send what is attached to no message yet, since tensors are to be added up now."""
        if self.attached:
            self._begin("", "attached", ()).largest()

    def broadcast(self, value: Any, about: str = "", *numbers: float) -> tuple[Any, list[float]]:
        """Return a plain value of rank 0, and the largest of each number."""
        packed = pack(value) if self.rank == 0 else b""
        given = (*numbers, len(packed))
        exchange = self._begin(about, "a value of rank 0", given, packed[:VALUE])
        *largest, size = exchange.largest()
        if self.rank:
            packed = exchange.value(int(size))
        if size > VALUE:
            rest = np.zeros(int(size) - VALUE, np.uint8)
            if self.rank == 0:
                rest[:] = np.frombuffer(packed[VALUE:], np.uint8)
            message = torch.from_numpy(rest)
            work = self.dist.broadcast(message, 0, group=self.group, async_op=True)
            self.wait(work, "a value of rank 0")
            packed += rest.tobytes()
        return value if self.rank == 0 else unpack(packed), largest

    def _begin(
        self, about: str, kind: str, numbers: tuple[float, ...], value: bytes = b""
    ) -> Exchange:
        """Send numbers and up to `VALUE` bytes of rank 0, after the message that is on its way."""
        self._check_in_step()
        if self.begun is not None:
            self.begun.largest()
        attached, self.attached = self.attached, []
        about = ", ".join(filter(None, [*(part.about for part in attached), about]))
        code = zlib.crc32(f"{describe_verbs()}: {about}: {kind}".encode())
        words = np.frombuffer(value + bytes(-len(value) % 4), np.uint32)
        frame = np.zeros(HEAD + VALUE // 4)
        frame[:2] = code, -code
        frame[2 : 2 + len(numbers)] = numbers
        start = 2 + NUMBERS
        for part in attached:
            frame[start : start + len(part.numbers)] = part.numbers
            start += len(part.numbers)
        frame[HEAD : HEAD + len(words)] = words
        message = torch.from_numpy(frame)
        self.messages += 1
        work = self.dist.all_reduce(
            message, self.dist.ReduceOp.MAX, group=self.group, async_op=True
        )
        self.begun = Exchange(self, about or kind, len(numbers), attached, frame, work)
        return self.begun

    def gather(self, value: Any, everywhere: bool = True, about: str = "") -> list[Any] | None:
        """Return the plain values of all, by rank; without `everywhere` on rank 0 alone."""
        packed = torch.frombuffer(bytearray(pack(value)), dtype=torch.uint8)
        kind = f"a value of each for {'all' if everywhere else 'rank 0'}"
        longest = int(self._begin(about, kind, (len(packed),)).largest()[0])
        size = torch.tensor([len(packed)], dtype=torch.int64).view(torch.uint8)
        padding = torch.zeros(longest - len(packed), dtype=torch.uint8)
        parts = self._gather(torch.cat([size, packed, padding]), everywhere)
        if parts is None:
            return None
        values = []
        for part in parts:
            length = int(part[:8].view(torch.int64))
            values.append(unpack(part[8 : 8 + length].numpy().tobytes()))
        return values

    def _gather(self, packed: Tensor, everywhere: bool) -> list[Tensor] | None:
        parts = None
        if everywhere or self.rank == 0:
            parts = [torch.empty_like(packed) for _ in range(self.size)]
        if everywhere:
            work = self.dist.all_gather(parts, packed, group=self.group, async_op=True)
        else:
            work = self.dist.gather(packed, parts, 0, group=self.group, async_op=True)
        self.wait(work, "values of all")
        if len(packed) <= VALUE:
            self.keep(work)
        return parts

    def explain_other_places(self, about: str) -> NoReturn:
        """Say which process is where; all know that they are in different places."""
        own = [describe_verbs()[:LONGEST_PLACE], about, self.find_reason()[:LONGEST_REASON]]
        packed = pack(own)
        padding = torch.zeros(LARGEST_PLACE - len(packed), dtype=torch.uint8)
        message = torch.cat([torch.frombuffer(bytearray(packed), dtype=torch.uint8), padding])
        found = [unpack(part.numpy().tobytes()) for part in self._gather(message, True) or []]
        verbs, abouts, reasons = zip(*found, strict=True)
        places = by_value([f"{verb} ({what})" for verb, what, _ in found])
        for reason in filter(None, reasons):
            raise OutOfStep(
                f"{reason}. So the processes are in different calls now: {places}. {RESTART}"
            )
        if len(set(verbs)) == 1 and OPTIMIZER_STEP in abouts:
            raise OutOfStep(
                f"train_step calls optimizer_step more often in one process than in another: "
                f"{places}. {REMEDY_OF_STEPS}"
            )
        raise OutOfStep(f"the processes are in different calls: {places}. {REMEDY}")

    # --- waiting ----------------------------------------------------------------------------------

    def wait_for_sum(self, work: Any, tensor: Tensor) -> None:
        """Wait for an operation on tensors such as gradients."""
        if tensor.device.type == "cpu":
            self.sums += 1
            self.wait(work, "gradients or other sums", for_sum=True)
            if tensor.nbytes <= VALUE:
                self.keep(work)
            return
        try:  # it is waited for on the device
            work.wait()
        except RuntimeError as error:
            self.explain(error)

    def check_sums(self, most: float, least: float) -> None:
        """Check that all processes have begun as many sums, as a call begins.

        Args:
            most, least: of their `sums_begun`.

        Raises:
            RuntimeError: they have not, in all processes.
        """
        if most == least:
            return
        begun = by_value(self.gather(self.sums_begun) or [])
        why = (
            "an earlier call has ended with an error at different places of backward in the "
            f"processes: expected equally many sums of gradients, got {begun}"
        )
        self.give_up(f"{why}. The next ones would be added to those of that call. {RESTART}", why)

    def wait(self, work: Any, about: str, for_sum: bool = False) -> None:
        """Wait for an operation, and look for the reason if it takes long.

        Args:
            about: what it is about, for the error.

        Raises:
            RuntimeError: it has failed, or will never end.
        """
        pause = FIRST_LOOK
        waited = 0.0
        try:
            while not self._has_ended(work, pause):
                self._look(about, for_sum)
                waited += pause
                if waited - pause < LONG_WAIT <= waited:  # once
                    self._warn_of_missing(about)
                pause = min(2 * pause, LAST_LOOK)
        except RuntimeError as error:
            self.explain(error)

    def keep(self, work: Any) -> None:
        """Keep torch's handle of a small message that has ended, and with it the message.

        A thread of torch still holds both for a moment. If it let go of them last, it would free a
        tensor of Python, and register itself with Python for that. A worker that a DataLoader forks
        in this moment would wait without end for the thread, which it has no copy of.
        """
        self.ended.append(work)

    def _has_ended(self, work: Any, pause: float) -> bool:
        try:
            work.wait(timedelta(seconds=pause))
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait()  # raises its error, if it has one
        return True

    def _look(self, about: str, for_sum: bool) -> None:
        """Write where this process waits, and give up if the notes of another say so."""
        reason = self.find_reason()
        if reason:
            self.give_up(
                f"process {self.rank} of {self.size} waits for the others, and {reason}. {RESTART}",
                reason,
            )
        own = [self.messages, self.sums, int(for_sum), describe_verbs(), about]
        self.notes.write(f"waits/{self.rank}", "|".join(map(str, own)))
        for other in {0, (self.rank + 1) % self.size} - {self.rank}:
            note = self.notes.read(f"waits/{other}")
            if note and are_stuck(own, note.split("|")):
                *_, verbs, what = note.split("|")
                why = (
                    f"process {self.rank} is in {describe_verbs()} ({about}), process {other} in "
                    f"{verbs} ({what}), and each waits for the other"
                )
                remedy = REMEDY_WITHIN if verbs == describe_verbs() else REMEDY
                self.give_up(f"{why}. {remedy}", why)

    def _warn_of_missing(self, about: str) -> None:
        """Warn of the processes that do not wait where this one does; the first that waits does."""
        missing = []
        for rank in range(self.size):
            note = self.notes.read(f"waits/{rank}").split("|")
            if note[:2] != [str(self.messages), str(self.sums)]:
                missing.append(rank)
            elif rank < self.rank:
                return
        if not missing:  # the message itself takes long
            return
        warnings.warn(
            f"process {self.rank} of {self.size} has waited {LONG_WAIT:g} s for "
            f"{name_processes(missing)} in {describe_verbs()} ({about}). {OTHER_WORK}",
            stacklevel=2,
        )

    def find_reason(self) -> str:
        """Return why another process will not answer, as far as it has said so."""
        for verb in VERBS:
            note = self.notes.read(f"left/{verb.number}")
            if note:
                return note
        return self.notes.read("broken")

    def give_up(self, message: str, why: str) -> None:
        """Raise an error, and tell the others why this process is out of step with them."""
        self.broken = why
        self.notes.write_once("broken", f"process {self.rank} has given up, since {why}")
        raise OutOfStep(message)

    def _check_in_step(self) -> None:
        if self.broken:
            raise OutOfStep(
                f"process {self.rank} of {self.size} is no longer in step with the others since an "
                f"earlier error: {self.broken}. Start all processes again."
            )

    def explain(self, error: RuntimeError) -> NoReturn:
        """Raise an error that explains one of a collective operation."""
        if isinstance(error, OutOfStep):
            raise error
        reason = self.find_reason()
        if reason:
            reason = f"{reason.rstrip('.')}. "
        self.broken = "another process did not answer"
        raise RuntimeError(
            f"process {self.rank} of {self.size} got no answer from the others: one has ended, or "
            f"has taken longer than the group's timeout. {reason}{ADVICE} Torch says: {error}"
        ) from error


@dataclass(eq=False)
class Attachment:
    """Numbers that travel with the next message, whatever that is about."""

    about: str
    numbers: Sequence[float]
    then: Callable[[list[float]], None]  # of the largest of each


@dataclass(eq=False)
class Exchange:
    """A small message that all processes send, and that may still be on its way."""

    channel: Channel
    about: str
    count: int  # of the numbers in it
    attached: list[Attachment]
    frame: np.ndarray
    work: Any  # torch's handle; None once it has been waited for

    def largest(self) -> list[float]:
        """Wait for the message, and return the largest of each number.

        Raises:
            RuntimeError: the processes are in different calls, or one does not answer.
        """
        if self.work is not None:
            self.channel.begun = None
            work, self.work = self.work, None
            self.channel.wait(work, self.about)
            self.channel.keep(work)
            if self.frame[0] != -self.frame[1]:
                self.channel.explain_other_places(self.about)
            self._tell_attached()
        found: list[float] = self.frame[2 : 2 + self.count].tolist()
        return found

    def _tell_attached(self) -> None:
        start = 2 + NUMBERS
        for part in self.attached:
            end = start + len(part.numbers)
            part.then(self.frame[start:end].tolist())
            start = end

    def value(self, size: int) -> bytes:
        """Return the value of rank 0, of `size` bytes, or as much as fits into a message."""
        words = self.frame[HEAD:].astype(np.uint32)
        return words.tobytes()[: min(size, VALUE)]


class OutOfStep(RuntimeError):
    """The processes have made different calls, or one of them has left a call with an error."""


class Notes:
    """What processes write into the store of the group for each other; empty without a store.

    Args:
        prefix: of the names, to tell the notes from those of an earlier group.
    """

    def __init__(self, prefix: str) -> None:
        from torch.distributed import group

        self.prefix = prefix
        self.store: Any = None
        world: Any = group.WORLD
        if hasattr(world, "get_group_store"):  # older torch has none
            self.store = world.get_group_store()
        self.timeout: timedelta = getattr(self.store, "timeout", TIMEOUT)  # that of the group

    def write(self, name: str, text: str) -> None:
        """Write a note; without a store, or if it has gone with its process, do nothing."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                self.store.set(self.prefix + name, text)

    def write_once(self, name: str, text: str) -> None:
        """Write a note, unless there is one: the first reason is the one that helps."""
        if not self.read(name):
            self.write(name, text)

    def read(self, name: str) -> str:
        """Return a note; empty if there is none."""
        text = ""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                if self.store.check([self.prefix + name]):
                    text = self.store.get(self.prefix + name).decode()
        return text


def are_stuck(own: list[Any], note: list[str]) -> bool:
    """Tell whether a process waits for this one in a message that this one has not come to.

    And the other way round: neither can go on then, so that the note cannot be out of date.

    Args:
        own, note: messages and sums begun so far, whether a sum is waited for, and more.
    """
    messages, sums, for_sum = map(int, note[:3])
    if bool(for_sum) == bool(own[2]):
        return False
    if for_sum:  # of the other process
        return bool(messages < own[0] and own[1] < sums)
    return bool(sums < own[1] and own[0] < messages)


def shorten(error: BaseException) -> str:
    """Return an error's first line, and the last one of several, as of a worker's traceback.

    >>> shorten(ValueError("no such image."))
    'ValueError: no such image'
    """
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    text = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    if len(text) > LONGEST_ERROR:
        text = f"{text[:LONGEST_ERROR]} ..."
    return text.rstrip(".: ")


def describe_verbs() -> str:
    """Name the running verbs, the innermost first: "evaluate in fit"."""
    names = [verb.name for verb in reversed(VERBS)]
    return " in ".join(names) or "no call of fit, evaluate, predict, save or export"


def by_value(values: list[Any]) -> str:
    """Name the processes of each value.

    >>> by_value(["fit", "save", "fit"])
    'fit in processes 0 and 2, save in process 1'
    """
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(rank)
    return ", ".join(f"{value} in {name_processes(of)}" for value, of in ranks.items())


def name_processes(ranks: list[int]) -> str:
    """Name processes, the first three of many.

    >>> name_processes([1]), name_processes([0, 2, 3, 5, 6])
    ('process 1', 'processes 0, 2, 3 and 2 more')
    """
    names = list(map(str, ranks))
    if len(names) == 1:
        return f"process {names[0]}"
    if len(names) > 4:
        names = [*names[:3], f"{len(names) - 3} more"]
    return f"processes {', '.join(names[:-1])} and {names[-1]}"
