"""Add up the gradients of all processes in buckets, while backward is still running.

You may skip this file. Without buckets one message would be sent after backward.

    of the last layers                                           of the first
    bucket 0, bucket 1, ... each sent as soon as it is full      the last bucket, sent at the end
                                                                 with the other numbers

Each bucket says which of its gradients exist, so that a gradient that no process has stays None.
All processes send the buckets in this order, whatever the order in which gradients are filled. A
model of one bucket sends it at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minikeras.distributed.world import World

BUCKET = 2**23  # bytes; a bucket ends with the parameter that fills it


class GradientSums:
    """The gradients of one step while they are being added up.

    Args:
        parameters: the same ones in all processes, in the order of the layers.
    """

    def __init__(self, world: World, parameters: Sequence[Tensor]) -> None:
        self.world = world
        self.buckets = buckets_of(parameters)
        self.bucket_of = {}
        for number, bucket in enumerate(self.buckets[:-1]):
            for parameter in bucket:
                self.bucket_of[parameter] = number
        self.missing = [len(bucket) for bucket in self.buckets]
        # for each bucket what is added up, torch's handle, and which gradients exist here
        self.sent: list[tuple[Tensor, Any, list[bool]]] = []

    def arrived(self, parameter: Tensor) -> None:
        """Note that backward has filled a gradient; send buckets that are full now.

        Raises:
            RuntimeError: backward had filled it before, and it has been sent.
        """
        number = self.bucket_of.get(parameter)
        if number is None:
            return
        if number < len(self.sent):
            raise RuntimeError(
                "backward computed the gradient of a parameter a second time, after the processes "
                "had added it up, as torch.utils.checkpoint does with use_reentrant=True. Pass "
                "use_reentrant=False."
            )
        self.missing[number] -= 1
        while len(self.sent) < len(self.buckets) - 1 and self.missing[len(self.sent)] <= 0:
            self._send()

    def finish(self, *numbers: Any) -> list[Tensor]:
        """Send the rest, set the gradients to their sums, and return the sums of the numbers.

        A gradient that no process has stays None.
        """
        while len(self.sent) < len(self.buckets) - 1:
            self._send()
        self._send(*numbers)
        totals: tuple[Tensor, ...] = ()
        for bucket, (flat, work, own) in zip(self.buckets, self.sent, strict=True):
            self.world.wait_for_sum(work, flat)
            sizes = [view_as_real(parameter).numel() for parameter in bucket]
            rest = len(flat) - sum(sizes) - len(bucket)
            sums, counts, totals = flat.split([sum(sizes), len(bucket), rest])
            # read from the device only if a gradient is missing here
            exists = own if all(own) else (counts > 0).tolist()
            gradients = sums.split(sizes)
            for parameter, gradient, has_one in zip(bucket, gradients, exists, strict=True):
                if has_one:
                    parameter.grad = reshape_gradient(gradient, parameter)
        return list(totals)

    def _send(self, *numbers: Any) -> None:
        bucket = self.buckets[len(self.sent)]
        own = [parameter.grad is not None for parameter in bucket]
        flat = join_gradients(bucket, [*map(float, own), *numbers])
        with self.world.answered():
            work = self.world.dist.all_reduce(flat, async_op=True)
        self.sent.append((flat, work, own))


def buckets_of(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the parameters from the last to the first, in buckets of one device each."""
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for parameter in reversed(parameters):
        if size >= BUCKET or (buckets[-1] and buckets[-1][0].device != parameter.device):
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets


def join_gradients(bucket: list[Tensor], numbers: list[Any]) -> Tensor:
    """Return the bucket's gradients and some numbers as one tensor, (n,).

    It is float32, or float64 if a parameter is.
    """
    if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in bucket):
        raise ValueError(
            "gradients must be dense to be added up over several processes. Build the embedding "
            "with sparse=False."
        )
    device = bucket[0].device if bucket else torch.device("cpu")
    dtype = torch.float32
    parts = []
    for parameter in bucket:
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        if view_as_real(parameter).dtype == torch.float64:
            dtype = torch.float64
        parts.append(view_as_real(gradient))
    for number in numbers:
        parts.append(torch.as_tensor(number, device=device))
    return torch.cat([part.detach().to(dtype).reshape(-1) for part in parts])


def view_as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as pairs of real numbers, and any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def reshape_gradient(flat: Tensor, parameter: Tensor) -> Tensor:
    """Return a parameter's gradient from its numbers, (n,)."""
    flat = flat.to(view_as_real(parameter).dtype)
    if parameter.is_complex():
        return torch.view_as_complex(flat.view(*parameter.shape, 2))
    return flat.view_as(parameter)
