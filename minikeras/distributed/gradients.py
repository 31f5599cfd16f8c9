"""Average the gradients of all processes in buckets, while backward is still running.

You may skip this file. Without buckets one message would be sent after backward.

    arrived first                                                       arrived last
    bucket 0, bucket 1, ... each sent as soon as it is full             the last bucket, sent at the
                                                                        end with the other numbers
    never arrived: rare buckets, sent after the last one if a process has a gradient for them

A gradient is let go as its bucket is sent, and is a part of the message afterwards, in the layout
of its parameter. Each message says which of its gradients exist, so that a gradient that no
process has stays None. All processes send the buckets in the same order.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from minikeras.distributed.world import World
from minikeras.nests import is_sharded

BUCKET = 25 * 2**20  # bytes; a bucket ends with the parameter that fills it
SMALL_BUCKET = 2**20  # of the first one, so that sending begins early, and of the last one
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
GROUP = 2**20  # bytes of gradients that are copied together, so that they are in the cache


class Layout:
    """How a parameter lies in memory; its gradients are to lie in the same way.

    An optimizer that goes through the memory of several tensors at once relies on it. Of a
    parameter whose numbers do not fill its memory, such as an expanded one, gradients are
    contiguous.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.shape = parameter.shape
        self.dtype = parameter.dtype
        self.size = view_as_real(parameter).numel()  # real numbers
        self.strides = parameter.stride()
        # dimensions from the slowest to the fastest in memory
        self.order = sorted(range(parameter.ndim), key=lambda number: -self.strides[number])
        if not parameter.permute(self.order).is_contiguous():
            self.order = list(range(parameter.ndim))
            self.strides = torch.empty(self.shape, device="meta").stride()
        # as nearly all are: a gradient's numbers are in their place as they are
        self.is_plain = self.order == sorted(self.order) and not self.dtype.is_complex

    def flatten(self, gradient: Tensor) -> Tensor:
        """Return the real numbers of a gradient, (n,), in the order of the parameter's memory."""
        if self.is_plain:
            return gradient.reshape(-1)
        return view_as_real(gradient.permute(self.order).resolve_conj()).reshape(-1)

    def unflatten(self, message: Tensor, start: int) -> Tensor:
        """Return the gradient of real numbers of a message: a part of it, or of another dtype."""
        if message.dtype == self.dtype:
            return message.as_strided(self.shape, self.strides, start)
        numbers = message[start : start + self.size]
        if self.dtype.is_complex:  # a pair begins at an even place, as a copy does
            numbers = torch.view_as_complex(numbers.clone().view(-1, 2))
        return numbers.to(self.dtype).as_strided(self.shape, self.strides)


class Memory:
    """Memory of a message, used again in the next step if no gradient lies in it any more.

    Freed memory would go back to the system, and come again page by page. A gradient that the user
    keeps keeps its memory as well; the next step gets other memory. torch holds the array that is
    lent for gradients until the last of them ends. Memory of a GPU it uses again by itself.

    The message is one tensor all the time, and the first handle holds it too, so that no thread of
    torch is the last to let go of either: see `Channel.keep`.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.array = np.empty(0)
        self.message = torch.empty(0)  # over the array
        self.first: Any = None  # torch's handle of the first message in it
        self.last: Any = None  # and of the last one
        self.lent: Callable[[], Any] = lambda: None  # the array over it, while gradients are in it

    def message_of(self, size: int) -> Tensor:
        """Return a vector of this size to be sent; what is in it is undefined."""
        if self.device.type != "cpu":
            return torch.empty(size, dtype=self.dtype, device=self.device)
        if len(self.array) != size or self.is_used():
            self.array = np.empty(size, NUMPY[self.dtype])
            self.message = torch.from_numpy(self.array)
            self.first = None
        return self.message

    def is_used(self) -> bool:
        """Tell whether gradients lie in it, or it is still being sent, as after an error."""
        return self.lent() is not None or (self.last is not None and not self.last.is_completed())

    def note_sent(self, work: Any) -> None:
        """Note torch's handle of the message."""
        if self.device.type == "cpu":
            self.first = self.first or work
            self.last = work

    def lend(self, message: Tensor) -> Tensor:
        """Return the same numbers as another tensor, for gradients to be parts of."""
        if self.device.type != "cpu":
            return message
        array = self.array[:]
        self.lent = weakref.ref(array)
        return torch.from_numpy(array)

    def free(self) -> None:
        """Keep nothing that is not lent."""
        self.array = np.empty(0)
        self.message = torch.empty(0)
        self.first = None
        self.last = None


class Bucket:
    """Parameters of one optimizer, one device and one kind of numbers, averaged in one message.

    Attributes:
        dtype: of the message, float32, or float64 for parameters that are.
        bytes: of the parameters.
    """

    def __init__(self, optimizer: Optimizer | None, device: torch.device, dtype: torch.dtype):
        self.optimizer = optimizer
        self.device = device
        self.dtype = dtype
        self.parameters: list[Tensor] = []
        self.layouts: list[Layout] = []
        self.starts: list[int] = []  # of each parameter in the message
        self.groups: list[list[tuple[Tensor, Layout]]] = []  # of up to `GROUP` bytes, or of one
        self.group_sizes: list[int] = []  # real numbers
        self.size = 0  # of all
        self.bytes = 0
        self.is_rare = False  # its gradients have not arrived when the others have
        self.gives_parts = True  # of the message as gradients; half precision is copied
        self.memory = Memory(device, dtype)
        self.message = torch.empty(0)  # with the means in it
        self.gradients: list[Tensor | None] = []  # the means as the parameters got them

    def add(self, parameter: Tensor) -> None:
        """Add a parameter at the end."""
        layout = Layout(parameter)
        self.parameters.append(parameter)
        self.layouts.append(layout)
        self.starts.append(self.size)
        self.size += layout.size
        self.bytes += parameter.numel() * parameter.element_size()
        self.gives_parts &= layout.dtype == self.dtype
        if not self.groups or self.group_sizes[-1] + layout.size > GROUP // self.dtype.itemsize:
            self.groups.append([])
            self.group_sizes.append(0)
        self.groups[-1].append((parameter, layout))
        self.group_sizes[-1] += layout.size

    def has_gradients(self) -> bool:
        """Tell whether a parameter has a gradient in this process."""
        return any(parameter.grad is not None for parameter in self.parameters)

    @torch.no_grad()  # gradients may have a graph of their own
    def take(self, share: float, numbers: Sequence[Any]) -> tuple[Tensor, list[bool]]:
        """Take the gradients away from the parameters.

        Returns:
            the message: the gradients times `share`, 0 for one that does not exist; 1 for each that
            does, and else 0; the numbers. And which of them exist.
        """
        rest = len(self.parameters) + len(numbers)
        message = self.memory.message_of(self.size + rest)
        *places, last = message.split_with_sizes([*self.group_sizes, rest])
        exist = []
        for group, place in zip(self.groups, places, strict=True):
            flat = []
            for parameter, layout in group:
                gradient = parameter.grad
                parameter.grad = None
                exist.append(gradient is not None)
                flat.append(self._flatten(gradient, layout))
            if len(flat) == 1:
                torch.mul(flat[0], share, out=place)
            else:
                torch.cat(flat, out=place).mul_(share)
        if last.device.type == "cpu":
            last.numpy()[:] = [*exist, *map(float, numbers)]
        else:
            torch.cat(as_vectors(exist, numbers, self.device, self.dtype), out=last)
        return message, exist

    def _flatten(self, gradient: Tensor | None, layout: Layout) -> Tensor:
        """Return the real numbers of a gradient, 0 if there is none."""
        if gradient is None:
            return torch.zeros(layout.size, dtype=self.dtype, device=self.device)
        if gradient.is_sparse:
            raise ValueError(
                "gradients must be dense to be added up over several processes. Build the "
                "embedding with sparse=False."
            )
        flat = layout.flatten(gradient)
        return flat if flat.dtype == self.dtype else flat.to(self.dtype)

    def give(self, message: Tensor, exist: Sequence[bool]) -> None:
        """Give the parameters their gradients, which are parts of this message."""
        message = self.memory.lend(message)
        self.message = message
        self.gradients = []
        places = zip(self.parameters, self.layouts, self.starts, exist, strict=True)
        for parameter, layout, start, exists in places:
            gradient = layout.unflatten(message, start) if exists else None
            parameter.grad = gradient
            self.gradients.append(gradient)

    def gradient_memory(self) -> Tensor | None:
        """Return the memory whose parts the parameters' gradients are; None if some are not."""
        if not self.gradients or not self.gives_parts:  # they have been cleared, or copied
            return None
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not gradient:
                return None
        return self.message[: self.size]

    def let_go(self) -> None:
        """Hold no gradient: they have been cleared."""
        self.message = torch.empty(0)
        self.gradients = []


class GradientSums:
    """The gradients of one step while they are being averaged over the processes.

    Args:
        buckets: the same ones in all processes.
    """

    def __init__(self, world: World, buckets: list[Bucket]) -> None:
        self.world = world
        self.all = buckets
        self.buckets = [bucket for bucket in buckets if not bucket.is_rare]
        self.rare = [bucket for bucket in buckets if bucket.is_rare]
        self.missing = [len(bucket.parameters) for bucket in self.buckets]
        # for each of `buckets` what is added up, torch's handle, and which gradients exist here
        self.sent: list[tuple[Tensor, Any, list[bool]]] = []

    def arrived(self, number: int) -> None:
        """Note that backward has filled a gradient of a bucket; send buckets that are full now.

        Raises:
            RuntimeError: backward had filled it before, and it has been sent.
        """
        if number < len(self.sent):
            raise RuntimeError(
                "backward computed the gradient of a parameter a second time, after the processes "
                "had added it up, as torch.utils.checkpoint does with use_reentrant=True. Pass "
                "use_reentrant=False."
            )
        self.missing[number] -= 1
        # the last one waits for the other numbers
        while len(self.sent) < len(self.buckets) - 1 and self.missing[len(self.sent)] <= 0:
            self._send()

    def finish(self, *numbers: Any) -> list[Any]:
        """Send the rest, set the gradients to their means, and return the sums of the numbers.

        A gradient that one process has alone counts as 0 in the others; one that no process has
        stays None. The sums are plain numbers on the CPU, and 0-d tensors on another device, which
        is waited for only if there are rare buckets, or a gradient is missing.
        """
        while len(self.sent) < len(self.buckets) - 1:
            self._send()
        self._send(*numbers, *(bucket.has_gradients() for bucket in self.rare))
        for bucket, sent in zip(self.buckets, self.sent, strict=True):
            self._wait(bucket, *sent)
        message, _, exist = self.sent[-1]
        sums = message[self.buckets[-1].size + len(exist) :]
        found = sums.tolist() if sums.device.type == "cpu" else list(sums)
        for bucket, processes in zip(self.rare, found[len(numbers) :], strict=True):
            if processes > 0:
                self._wait(bucket, *self._begin(bucket))
        return found[: len(numbers)]

    def _send(self, *numbers: Any) -> None:
        self.sent.append(self._begin(self.buckets[len(self.sent)], *numbers))

    def _begin(self, bucket: Bucket, *numbers: Any) -> tuple[Tensor, Any, list[bool]]:
        message, exist = bucket.take(1 / self.world.size, numbers)
        work = self.world.begin_sum(message)
        bucket.memory.note_sent(work)
        return message, work, exist

    def _wait(self, bucket: Bucket, message: Tensor, work: Any, exist: list[bool]) -> None:
        if all(exist) and bucket.gives_parts:  # while they are being added up
            bucket.give(message, exist)
            self.world.wait_for_sum(work, message)
            return
        self.world.wait_for_sum(work, message)
        if not all(exist):  # read from the device only if one is missing here
            flags = message[bucket.size : bucket.size + len(exist)]
            exist = (flags > 0).tolist()
        bucket.give(message, exist)


def make_buckets(
    owners: Mapping[Tensor, Optimizer],
    order: Mapping[Tensor, int],
    known: Container[Tensor] = (),
) -> list[Bucket]:
    """Return parameters in buckets, rare ones at the end.

    The last other bucket is small: it waits for the last gradient and the other numbers, and
    nothing is left to compute while it is sent. Sharded parameters are in no bucket: backward has
    averaged their gradients.

    Args:
        owners: the parameters, each with the optimizer that steps with its gradient.
        order: the place of each parameter whose gradient arrives.
        known: the parameters that were trained when the order was found.
    """
    owners = {parameter: owner for parameter, owner in owners.items() if not is_sharded(parameter)}
    arriving = sorted(filter(order.__contains__, owners), key=order.__getitem__)
    last: list[Tensor] = []
    rare: list[Tensor] = []
    for parameter in owners:
        if parameter not in order:
            (rare if parameter in known else last).append(parameter)
    size = 0
    while arriving and size < SMALL_BUCKET:
        last.insert(0, arriving.pop())
        size += last[0].numel() * last[0].element_size()
    buckets = []
    for bucket in fill_buckets(arriving, owners, SMALL_BUCKET, BUCKET):
        if bucket.bytes >= SMALL_BUCKET:
            buckets.append(bucket)
        else:  # not worth a message
            last = bucket.parameters + last
    buckets += fill_buckets(last, owners, math.inf, math.inf)
    if not buckets:  # the numbers alone
        buckets.append(Bucket(None, torch.device("cpu"), torch.float64))
    for bucket in fill_buckets(rare, owners, math.inf, math.inf):
        bucket.is_rare = True
        buckets.append(bucket)
    return buckets


def fill_buckets(
    parameters: Iterable[Tensor],
    owners: Mapping[Tensor, Optimizer],
    first_limit: float,
    limit: float,
) -> list[Bucket]:
    """Put parameters into buckets, each of one kind; a limit in bytes fills a bucket."""
    full: list[Bucket] = []
    filling: dict[Any, Bucket] = {}
    for parameter in parameters:
        is_double = view_as_real(parameter).dtype == torch.float64
        dtype = torch.float64 if is_double else torch.float32
        kind = (owners[parameter], parameter.device, dtype)
        bucket = filling.setdefault(kind, Bucket(*kind))
        bucket.add(parameter)
        if bucket.bytes >= (limit if full else first_limit):
            full.append(filling.pop(kind))
    return full + list(filling.values())


def view_as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as pairs of real numbers, and any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def as_vectors(
    exist: Iterable[bool], numbers: Iterable[Any], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Return these in their order as vectors on a device; plain ones move there together."""
    vectors = []
    plain: list[float] = [*exist]
    for number in numbers:
        if not isinstance(number, Tensor) or number.device.type == "cpu":
            plain.append(float(number))
            continue
        if plain:
            vectors.append(to_device(plain, device, dtype))
            plain = []
        vectors.append(number.detach().to(device, dtype).reshape(1))
    if plain:
        vectors.append(to_device(plain, device, dtype))
    return vectors


def to_device(numbers: list[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return plain numbers as a vector on a device, which is not waited for."""
    vector = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return vector.to(device, non_blocking=True)
