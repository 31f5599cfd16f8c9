"""The gradients of all processes, added up in buckets; what backward fills first is sent while it is still at work.

    of the last layers                                           of the first
    bucket 0, bucket 1, ... each sent as soon as it is full      the last one, sent at the end with the other numbers

Each bucket carries which of its gradients are there, so that one that nobody has stays None. All processes send the
buckets in this one order, whatever the order in which gradients come. A model of one bucket sends it at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minikeras.distributed.world import World

BUCKET = 2**23  # bytes; a bucket ends with the parameter that fills it


class GradientSums:
    """The gradients of one step on their way.

    Args:
        parameters: the same ones in all processes, in the order of the layers.
    """

    def __init__(self, world: World, parameters: Sequence[Tensor]) -> None:
        self.world = world
        self.buckets = buckets_of(parameters)
        self.bucket_of = {
            p: number for number, bucket in enumerate(self.buckets[:-1]) for p in bucket
        }
        self.missing = [len(bucket) for bucket in self.buckets]
        self.sent: list[
            tuple[Tensor, Any, list[bool]]
        ] = []  # what is added up, torch's handle, which are there

    def arrived(self, parameter: Tensor) -> None:
        """Backward has filled its gradient; buckets that are full now are sent.

        Raises:
            RuntimeError: backward had filled it before, and it is on its way already.
        """
        number = self.bucket_of.get(parameter)
        if number is None:
            return
        if number < len(self.sent):
            raise RuntimeError(
                "backward filled the gradient of a parameter twice, after several processes had added it up, as "
                "torch.utils.checkpoint does with use_reentrant=True. Pass use_reentrant=False."
            )
        self.missing[number] -= 1
        while len(self.sent) < len(self.buckets) - 1 and self.missing[len(self.sent)] <= 0:
            self._send()

    def finish(self, *numbers: Any) -> list[Tensor]:
        """Send the rest: gradients become their sums, None where nobody has one; and so do the numbers, returned."""
        while len(self.sent) < len(self.buckets) - 1:
            self._send()
        self._send(*numbers)
        for bucket, (flat, work, mine) in zip(self.buckets, self.sent, strict=True):
            with self.world.answered():
                work.wait()
            sizes = [as_real(parameter).numel() for parameter in bucket]
            sums, present, totals = flat.split(
                [sum(sizes), len(bucket), len(flat) - sum(sizes) - len(bucket)]
            )
            # read from the device only where one is missing here
            there = mine if all(mine) else (present > 0).tolist()
            for parameter, total, some in zip(bucket, sums.split(sizes), there, strict=True):
                if some:
                    parameter.grad = shaped(total, parameter)
        return list(totals)

    def _send(self, *numbers: Any) -> None:
        bucket = self.buckets[len(self.sent)]
        mine = [parameter.grad is not None for parameter in bucket]
        flat = joined(bucket, [*map(float, mine), *numbers])
        with self.world.answered():
            self.sent.append((flat, self.world.dist.all_reduce(flat, async_op=True), mine))


def buckets_of(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """The parameters from the last to the first, in buckets of one device each; at least one bucket."""
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for parameter in reversed(parameters):
        if size >= BUCKET or (buckets[-1] and buckets[-1][0].device != parameter.device):
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel() * parameter.element_size()
    return buckets


def joined(bucket: list[Tensor], numbers: list[Any]) -> Tensor:
    """The bucket's gradients and some numbers, (n,), in float32, or float64 where one is."""
    if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in bucket):
        raise ValueError(
            "gradients of several processes must be dense. Build the embedding with sparse=False."
        )
    device = bucket[0].device if bucket else torch.device("cpu")
    wide = (
        torch.float64 if any(as_real(p).dtype == torch.float64 for p in bucket) else torch.float32
    )
    parts = [as_real(torch.zeros_like(p) if p.grad is None else p.grad) for p in bucket]
    parts += [torch.as_tensor(number, device=device) for number in numbers]
    return torch.cat([part.detach().to(wide).reshape(-1) for part in parts])


def as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def shaped(flat: Tensor, parameter: Tensor) -> Tensor:
    """A parameter's gradient from its numbers, (n,)."""
    flat = flat.to(as_real(parameter).dtype)
    if parameter.is_complex():
        return torch.view_as_complex(flat.view(*parameter.shape, 2))
    return flat.view_as(parameter)
