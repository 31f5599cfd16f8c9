"""Several processes that train one model.

They are started by torchrun, or by anything that sets RANK, LOCAL_RANK and WORLD_SIZE.

world_of        the process group: an existing one, or a new one if WORLD_SIZE is above 1
World           the rank of this process, and the collective operations:
    verb, meet  compare what all processes are about to do: see handshake.py
    share       broadcast the weights and buffers of rank 0
    broadcast   send a plain value of rank 0 to all
    gather      collect a plain value of each
    agree       take the largest of each number
    by_main     run a function on rank 0; the others wait for it
    add_up      add up tensors

A process that fails leaves a note, or ends: the others then get an error, see channel.py. All
processes must call each function of this module at the same place.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minikeras.distributed import handshake, shards
from minikeras.distributed.channel import (
    TIMEOUT,
    VERBS,
    Channel,
    Exchange,
    Verb,
    is_broken,
    open_channel,
)
from minikeras.metric_objects import find_syncing_parts, needs_all_rows
from minikeras.nests import is_sharded
from minikeras.processes import OneProcess
from minikeras.run import buffers_of, parameters_of


def world_of(distributed: str) -> OneProcess:
    """Return the processes that compile(distributed=...) asks for.

    Raises:
        ValueError: it asks for several, and this one was started alone.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        if distributed in ("ddp", "fsdp") and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f'distributed="{distributed}" needs several processes, and only this one was '
                "started. Start the script with torchrun --nproc-per-node=2 script.py, or omit "
                "distributed."
            )
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return OneProcess()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        atexit.register(leave)
    return World() if dist.get_world_size() > 1 else OneProcess()


def leave() -> None:
    """End the group that `world_of` created. After an error nothing is waited for.

    The group's threads end with it, unless sharded parameters keep it alive: torch keeps those to
    the end. A thread that frees a tensor waits for the GIL. If Python ended then, the process would
    abort; if the group ended then, older torch would wait for the thread, and the thread for it.
    The pause releases the GIL before either.
    """
    import torch.distributed as dist

    if dist.is_initialized() and not hasattr(sys, "last_value") and not is_broken():
        time.sleep(0.05)
        dist.destroy_process_group()


MESSAGE = 2**23  # bytes


class World(OneProcess):
    """The processes that train together.

    Small values go through the CPU, so that no device is waited for.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        self.dist = dist
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        # without a launcher: as many processes on each machine as it has GPUs
        gpus = torch.cuda.device_count() or 1
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank % gpus))
        self.has_shared = False  # all have the weights of rank 0
        # with the next totals: whether something is so here, and what hears if it is anywhere
        self.told: list[tuple[bool, Callable[[bool], None]]] = []
        self.follows_main = False  # a fit is running, and the same callbacks monitor in all

    def device(self, chosen: torch.device) -> torch.device:
        """Return this process's device of a kind.

        Raises:
            ValueError: the machine has fewer GPUs than processes.
        """
        if chosen.type != "cuda" or chosen.index is not None:
            return chosen
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {self.local_rank} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}. Start as many processes as there are GPUs, or pass "
                f"device."
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    @property
    def draws_apart(self) -> bool:
        """Whether a fit is running, of any model: ranks have other random states, for dropout."""
        return any(verb.draws_apart for verb in VERBS)

    @property
    def channel(self) -> Channel:
        """The small messages of the process group that exists now."""
        return open_channel()

    @contextlib.contextmanager
    def verb(self, name: str) -> Iterator[None]:
        """Return a context of one call of fit, evaluate, ...; an error in it is told to the others.

        An error before `meet` is this process's own: the others have not been met yet. At the end
        buffers are put back that `meet` has replaced for this call alone.
        """
        verb = Verb(name)
        VERBS.append(verb)
        try:
            yield
        except BaseException as error:
            verb.tell_left(error)
            raise
        finally:
            VERBS.remove(verb)
            self.told = []
            if verb.channel is not None:
                verb.channel.attached = []
            if verb.put_back is not None:
                verb.put_back()

    def meet(self, model: nn.Module, run: Any = None, **given: Any) -> None:
        """Compare what the processes are about to do, before a weight moves.

        Args:
            model: the model.
            run: what compile set up, once it is.
            given: what else must be the same, such as the arguments of the call.

        Raises:
            ValueError: something differs; the message names what, and where.
        """
        handshake.meet(self, model, run, given)

    def begin_sum(self, tensor: Tensor) -> Any:
        """Begin to add up a tensor over all processes, in place; return torch's handle."""
        channel = self.channel
        channel.send_attached()
        channel.sums_begun += 1
        try:
            return channel.of.allreduce([tensor])  # torch.distributed.all_reduce, less its checks
        except RuntimeError as error:
            channel.explain(error)

    def wait_for_sum(self, work: Any, tensor: Tensor) -> None:
        """Wait for an operation on a tensor such as gradients; an error says why there is none."""
        self.channel.wait_for_sum(work, tensor)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Fill tensors with those of rank 0, in messages of about `MESSAGE` bytes."""
        together: list[Tensor] = []
        size = 0
        for tensor in tensors:
            if is_lazy(tensor):
                raise ValueError(
                    "the model has lazy layers without weights yet, which each process would "
                    "initialize differently. Call the model once on a batch before compile."
                )
            if together and (size >= MESSAGE or tensor.device != together[0].device):
                self._share_together(together)
                together, size = [], 0
            together.append(tensor.detach())
            size += tensor.numel() * tensor.element_size()
        if together:
            self._share_together(together)

    def _share_together(self, tensors: list[Tensor]) -> None:
        """Fill tensors of one device with those of rank 0, in one message."""
        contiguous = [tensor.contiguous() for tensor in tensors]
        # as bytes, since backends lack some dtypes
        numbers = [tensor.reshape(-1).view(torch.uint8) for tensor in contiguous]
        message = torch.cat(numbers)
        self.wait_for_sum(self.dist.broadcast(message, 0, async_op=True), message)
        received = message.split([len(part) for part in numbers])
        for tensor, like, part in zip(tensors, contiguous, received, strict=True):
            # a copy begins where its dtype may
            tensor.copy_(part.clone().view(like.dtype).view(like.shape))

    def broadcast(self, value: Any) -> Any:
        """Return a plain value of rank 0."""
        return self.channel.broadcast(value)[0]

    def broadcast_and_agree(self, value: Any, *numbers: float) -> tuple[Any, list[float]]:
        """Return a plain value of rank 0, and the largest of each number over all processes."""
        return self.channel.broadcast(value, "", *numbers)

    def gather(self, value: Any, everywhere: bool = True) -> list[Any] | None:
        """Return the plain values of all, by rank.

        Without `everywhere` only rank 0 gets them, and the others None.
        """
        return self.channel.gather(value, everywhere)

    def agree(self, *numbers: float, about: str = "") -> list[float]:
        """Return the largest of each number over all processes.

        Args:
            about: what it is about, for the error of processes that are not at the same place.
        """
        return self.channel.exchange(about, *numbers)

    def begin_to_agree(self, *numbers: float, about: str) -> Exchange:
        """Do as `agree`, without waiting: the others' numbers are asked for before the next."""
        return self.channel.begin(about, *numbers)

    def agree_with_next(
        self, *numbers: float, about: str, then: Callable[[list[float]], None]
    ) -> None:
        """Do as `agree` with the next message, or before tensors are added up.

        Args:
            then: is called with the largest of each number.
        """
        self.channel.attach(about, numbers, then)

    def follow(self, value: float) -> float:
        """Return a value that rank 0 has read, if all processes read it in this fit."""
        if not self.follows_main:
            return value
        return float(self.channel.broadcast(value, "a callback monitors")[0])

    def by_main(self, act: Callable[[], None]) -> None:
        """Run a function on rank 0 while the others wait; if it fails, all fail."""
        error = None
        if self.rank == 0:
            try:
                act()
            except Exception as caught:
                error = caught
        has_failed = self.agree(error is not None, about="rank 0 has done its work")[0]
        if error is not None:
            raise error
        if has_failed:
            raise RuntimeError(
                f"process 0 of {self.size}, which writes the files, has failed. Look for its "
                "error message."
            )

    def add_up(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place, and return it."""
        self.wait_for_sum(self.begin_sum(tensor), tensor)
        return tensor

    def tell_with_totals(self, here: bool, then: Callable[[bool], None]) -> None:
        """Call `then` with whether it is so in any process, as the totals are added up next."""
        self.told.append((here, then))

    def add_up_totals(
        self, sums: list[Tensor], counts: Mapping[str, Any]
    ) -> tuple[list[Tensor], Mapping[str, Any]]:
        """Return the sums and counts of a pass over all processes, and hear what was told."""
        told, self.told = self.told, []
        if not sums:
            for here, then in told:
                then(bool(self.agree(here)[0]))
            return sums, counts
        zero = torch.zeros_like(sums[0])
        numbers = list(sums)
        for number in [*counts.values(), *(here for here, _ in told)]:
            numbers.append(zero + number)
        found = list(self.add_up(torch.stack(numbers)))
        for (_, then), processes in zip(told, found[len(sums) + len(counts) :], strict=True):
            then(bool(processes > 0))
        all_counts = found[len(sums) : len(sums) + len(counts)]
        return found[: len(sums)], dict(zip(counts, all_counts, strict=True))

    def share_weights(self, model: nn.Module, loss_func: Any) -> None:
        """Broadcast the weights and buffers of rank 0, once; shards have them already."""
        if self.has_shared:
            return
        tensors: list[Tensor] = list(parameters_of(model, loss_func))
        tensors += buffers_of(model, loss_func)
        self.share([tensor for tensor in tensors if not is_sharded(tensor)])
        self.has_shared = True

    def settle(self, model: nn.Module) -> None:
        """Shard a model again, after an error in its forward or backward."""
        shards.settle(model)

    def part_of(self, batches: Iterable[Any], name: str) -> Iterable[Any]:
        """Return this process's share of `batches`, which the user calls `name`."""
        from minikeras.distributed.sharded import sharded

        return sharded(batches, self, name)

    def draw_first_seed(self, loader: Any) -> None:
        """Draw what a loader drew for its persistent workers in its first iteration, now over."""
        from minikeras.distributed.sharded import draw_first_seed

        draw_first_seed(loader, self)

    def prepare_metric(self, metric: Any, name: str, syncs: Callable[[], bool]) -> None:
        """Let a torchmetrics object synchronize its state when `syncs()` says so.

        Raises:
            TypeError: it is another object, whose counts cannot be combined.
        """
        if needs_all_rows(metric):
            return
        parts = find_syncing_parts(metric)
        if not parts:
            raise TypeError(
                f"metric {name!r} is a {type(metric).__name__}, an object whose state cannot be "
                "combined over several processes. Pass a function that returns a mean or an "
                "Average(total, count), minikeras.OnAllRows(function), or a torchmetrics object."
            )
        for part in parts:
            part.distributed_available_fn = syncs
            part.compute_with_cache = False  # what was read before was of this process alone

    def compute_metric(
        self, metric: Any, read: Callable[[Any], dict[str, float]]
    ) -> dict[str, float]:
        """Return the columns that `read` finds in the result of a metric over all processes."""
        if not needs_all_rows(metric):
            return read(metric.compute())
        from minikeras.on_all_rows import compute_on_all_processes

        return compute_on_all_processes(metric, self, read)

    def have_updated(self, metrics: Iterable[Any], updated: bool) -> bool:
        """Tell whether the metric objects have seen rows: torchmetrics needs all or none to have.

        Raises:
            ValueError: the metric objects of one process have seen none, and those of another have.
        """
        some, none = self.agree(updated, not updated)
        if some and none and not all(map(needs_all_rows, metrics)):
            raise ValueError(
                f"there are fewer rows than processes, {self.size}, and the metric objects of one "
                "process have seen none. Give more rows, or start fewer processes."
            )
        return bool(some)

    def join_outputs(self, outputs: Any, everywhere: bool) -> Any:
        """Return the outputs of all processes, in the order of the rows; None where not wanted."""
        from minikeras.distributed.outputs import gathered

        return gathered(outputs, self, everywhere)

    def describe_part(self) -> str:
        """Return the words for a message that a batch is this process's share."""
        return f", process {self.rank}'s share of the batch"
