"""Average the gradients of all processes in buckets, while backward is still running.

You may skip this file. Without buckets one message would be sent after backward.

    arrived first                                                       arrived last
    bucket 0, bucket 1, ... each sent as soon as it is full             the last bucket, sent at the
                                                                        end with the other numbers

A gradient is let go as its bucket is sent, and is a part of the bucket's memory afterwards, in the
layout of its parameter. Each bucket says which of its gradients exist, so that a gradient that no
process has stays None. All processes send the buckets in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from minikeras.distributed.world import World
from minikeras.nests import is_sharded

BUCKET = 25 * 2**20  # bytes; a bucket ends with the parameter that fills it
SMALL_BUCKET = 2**20  # of the first one, so that sending begins early, and of the last one
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

    def unflatten(self, memory: Tensor, start: int) -> Tensor:
        """Return the gradient of these real numbers of a bucket's memory."""
        if memory.dtype == self.dtype:
            return memory.as_strided(self.shape, self.strides, memory.storage_offset() + start)
        numbers = memory[start : start + self.size]
        if self.dtype.is_complex:  # a pair begins at an even place, as a copy does
            numbers = torch.view_as_complex(numbers.clone().view(-1, 2))
        return numbers.to(self.dtype).as_strided(self.shape, self.strides)


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
        self.groups: list[list[tuple[Tensor, Layout]]] = []  # of up to `GROUP` bytes, or of one
        self.group_sizes: list[int] = []  # real numbers
        self.size = 0  # of all
        self.bytes = 0
        self.all_exist: Tensor | None = None  # what is sent if every gradient exists here
        self.memory = torch.empty(0)  # of the means, which are parts of it
        self.gradients: list[Tensor | None] = []  # the means as the parameters got them

    def add(self, parameter: Tensor) -> None:
        """Add a parameter at the end."""
        layout = Layout(parameter)
        self.parameters.append(parameter)
        self.layouts.append(layout)
        self.size += layout.size
        self.bytes += parameter.numel() * parameter.element_size()
        if not self.groups or self.group_sizes[-1] + layout.size > GROUP // self.dtype.itemsize:
            self.groups.append([])
            self.group_sizes.append(0)
        self.groups[-1].append((parameter, layout))
        self.group_sizes[-1] += layout.size

    def take(self, message: Tensor, share: float) -> list[bool]:
        """Take the gradients away from the parameters, times `share` into the message.

        Returns:
            which of them exist; the others are 0 in the message.
        """
        exist = []
        places = message.split_with_sizes(self.group_sizes)
        for group, place in zip(self.groups, places, strict=True):
            numbers = []
            for parameter, layout in group:
                exist.append(parameter.grad is not None)
                numbers.append(self._take_gradient(parameter, layout))
            if len(numbers) == 1:
                torch.mul(numbers[0], share, out=place)
            else:
                torch.cat(numbers, out=place).mul_(share)
        return exist

    def _take_gradient(self, parameter: Tensor, layout: Layout) -> Tensor:
        """Take a gradient away from its parameter; return its real numbers, 0 if there is none."""
        gradient = parameter.grad
        if gradient is None:
            return torch.zeros(layout.size, dtype=self.dtype, device=self.device)
        if gradient.is_sparse:
            raise ValueError(
                "gradients must be dense to be added up over several processes. Build the "
                "embedding with sparse=False."
            )
        parameter.grad = None
        numbers = layout.flatten(gradient)
        return numbers if numbers.dtype == self.dtype else numbers.to(self.dtype)

    def give(self, memory: Tensor, exist: Sequence[bool]) -> None:
        """Give the parameters their gradients, which are parts of this memory."""
        self.memory = memory
        self.gradients = []
        start = 0
        for parameter, layout, exists in zip(self.parameters, self.layouts, exist, strict=True):
            if exists:
                parameter.grad = layout.unflatten(memory, start)
            start += layout.size
            self.gradients.append(parameter.grad)

    def holds_gradients(self) -> bool:
        """Tell whether the parameters' gradients are still parts of the memory."""
        if not self.gradients or any(layout.dtype != self.dtype for layout in self.layouts):
            return False  # cleared, or half precision: those were copied
        pairs = zip(self.parameters, self.gradients, strict=True)
        return all(parameter.grad is gradient for parameter, gradient in pairs)

    def let_go(self) -> None:
        """Keep no memory: the gradients have been cleared."""
        self.memory = torch.empty(0)
        self.gradients = []

    def describe_existing(self, exist: list[bool]) -> Tensor:
        """Return 1 for each gradient that exists and else 0, (parameters,), on the device."""
        if not all(exist):
            return to_device([float(exists) for exists in exist], self.device, self.dtype)
        if self.all_exist is None:
            self.all_exist = torch.ones(len(exist), dtype=self.dtype, device=self.device)
        return self.all_exist


class GradientSums:
    """The gradients of one step while they are being averaged over the processes.

    Args:
        buckets: the same ones in all processes.
    """

    def __init__(self, world: World, buckets: list[Bucket]) -> None:
        self.world = world
        self.buckets = buckets
        self.missing = [len(bucket.parameters) for bucket in buckets]
        # for each bucket what is added up, torch's handle, and which gradients exist here
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
        is not waited for.
        """
        while len(self.sent) < len(self.buckets) - 1:
            self._send()
        self._send(*numbers)
        sums: Tensor = torch.empty(0)
        for bucket, (flat, work, own) in zip(self.buckets, self.sent, strict=True):
            self.world.wait_for_sum(work, flat)
            size, end = bucket.size, bucket.size + len(own)
            # read from the device only if a gradient is missing here
            exist = own if all(own) else (flat[size:end] > 0).tolist()
            bucket.give(flat[:size], exist)
            sums = flat[end:]
        return sums.tolist() if sums.device.type == "cpu" else list(sums)

    def _send(self, *numbers: Any) -> None:
        bucket = self.buckets[len(self.sent)]
        size, end = bucket.size, bucket.size + len(bucket.parameters)
        flat = torch.empty(end + len(numbers), dtype=bucket.dtype, device=bucket.device)
        with torch.no_grad():  # gradients may have a graph of their own
            exist = bucket.take(flat[:size], 1 / self.world.size)
            if numbers:
                tail = as_vectors(exist, numbers, bucket.device, bucket.dtype)
                torch.cat(tail, out=flat[size:])
            else:
                flat[size:] = bucket.describe_existing(exist)
        self.sent.append((flat, self.world.begin_sum(flat), exist))


def make_buckets(owners: Mapping[Tensor, Optimizer], order: Mapping[Tensor, int]) -> list[Bucket]:
    """Return parameters in buckets.

    The last bucket is small: it waits for the last gradient and the other numbers, and nothing is
    left to compute while it is sent. It also takes the parameters that `order` lacks. Sharded
    parameters are in no bucket: backward has averaged their gradients.

    Args:
        owners: the parameters, each with the optimizer that steps with its gradient.
        order: the place of each parameter whose gradient arrives.
    """
    owners = {parameter: owner for parameter, owner in owners.items() if not is_sharded(parameter)}
    arriving = sorted(filter(order.__contains__, owners), key=order.__getitem__)
    last = [parameter for parameter in owners if parameter not in order]
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
    return buckets or [Bucket(None, torch.device("cpu"), torch.float64)]


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
