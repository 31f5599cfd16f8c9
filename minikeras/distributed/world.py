"""Several processes that train one model.

They are started by torchrun, or by anything that sets RANK, LOCAL_RANK and WORLD_SIZE.

world_of        the process group: an existing one, or a new one if WORLD_SIZE is above 1
World           the rank of this process, and the collective operations:
    share       broadcast the weights and buffers of rank 0
    broadcast   send a plain value of rank 0 to all
    gather      collect a plain value of each
    agree       take the largest of each number
    by_main     run a function on rank 0; the others wait for it
    add_up      add up tensors

A process that fails ends, and the others then get an error from torch: `answered` explains it.
All processes must call each function of this module at the same place.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minikeras.distributed import shards
from minikeras.metric_objects import find_syncing_parts, needs_all_rows
from minikeras.nests import is_sharded
from minikeras.processes import OneProcess
from minikeras.run import parameters_of

# after which a lost process is an error; a group of the user's own has its own timeout
TIMEOUT = timedelta(minutes=2)


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

    if dist.is_initialized() and not hasattr(sys, "last_value"):
        time.sleep(0.05)
        dist.destroy_process_group()


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
        self.control = None  # the group for small values; None for the group of all
        if "cpu:" not in dist.get_backend_config():
            self.control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.has_shared = False  # all have the weights of rank 0
        # a fit is running: the random states of ranks differ, for dropout
        self.draws_apart = False

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

    @contextlib.contextmanager
    def answered(self) -> Iterator[None]:
        """Explain an error of a collective operation."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} of {self.size} got no answer from the others: one has "
                "ended, or has taken longer than the group's timeout. Look for its error message "
                "first. Processes must make the same calls of fit, evaluate, predict and save. "
                "For a longer timeout call torch.distributed.init_process_group(timeout=...) "
                f"before compile. Torch says: {error}"
            ) from error

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Fill tensors with those of rank 0."""
        with torch.no_grad():
            for tensor in tensors:
                if is_lazy(tensor):
                    raise ValueError(
                        "the model has lazy layers without weights yet, which each process would "
                        "initialize differently. Call the model once on a batch before compile."
                    )
                whole = tensor.detach().contiguous()
                numbers = whole.reshape(-1).view(torch.uint8)  # backends lack some dtypes
                with self.answered():
                    self.dist.broadcast(numbers, 0)
                tensor.detach().copy_(whole)

    def broadcast(self, value: Any) -> Any:
        """Return a plain value of rank 0."""
        is_main = self.rank == 0
        packed = pack(value) if is_main else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(packed)])
        with self.answered():
            self.dist.broadcast(size, 0, group=self.control)
            if not is_main:
                packed = torch.empty(int(size), dtype=torch.uint8)
            self.dist.broadcast(packed, 0, group=self.control)
        return value if is_main else unpack(packed)

    def gather(self, value: Any, everywhere: bool = True) -> list[Any] | None:
        """Return the plain values of all, by rank.

        Without `everywhere` only rank 0 gets them, and the others None.
        """
        packed = pack(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self.answered():
            self.dist.all_gather(sizes, torch.tensor([len(packed)]), group=self.control)
            longest = max(map(int, sizes))
            packed = torch.nn.functional.pad(packed, (0, longest - len(packed)))
            parts = None
            if everywhere or self.rank == 0:
                parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            if everywhere:
                self.dist.all_gather(parts, packed, group=self.control)
            else:
                self.dist.gather(packed, parts, 0, group=self.control)
        if parts is None:
            return None
        return [unpack(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]

    def agree(self, *numbers: float) -> list[float]:
        """Return the largest of each number over all processes."""
        largest = torch.tensor(numbers, dtype=torch.float64)
        with self.answered():
            self.dist.all_reduce(largest, self.dist.ReduceOp.MAX, group=self.control)
        return largest.tolist()

    def by_main(self, act: Callable[[], None]) -> None:
        """Run a function on rank 0 while the others wait; if it fails, all fail."""
        error = None
        if self.rank == 0:
            try:
                act()
            except Exception as caught:
                error = caught
        has_failed = self.agree(error is not None)[0]
        if error is not None:
            raise error
        if has_failed:
            raise RuntimeError(
                f"process 0 of {self.size}, which writes the files, has failed. Look for its "
                "error message."
            )

    def add_up(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place, and return it."""
        with self.answered():
            self.dist.all_reduce(tensor)
        return tensor

    def add_up_totals(
        self, sums: list[Tensor], counts: Mapping[str, Any]
    ) -> tuple[list[Tensor], Mapping[str, Any]]:
        """Return the sums and counts of a pass over all processes; both may be empty."""
        if not sums:
            return sums, counts
        zero = torch.zeros_like(sums[0])
        numbers = list(sums)
        for count in counts.values():
            numbers.append(zero + count)
        all_sums, all_counts = self.add_up(torch.stack(numbers)).split(len(sums))
        return list(all_sums), dict(zip(counts, all_counts, strict=True))

    def share_weights(self, model: nn.Module, loss_func: Any) -> None:
        """Broadcast the weights and buffers of rank 0, once; shards have them already."""
        if self.has_shared:
            return
        tensors: list[Tensor] = list(parameters_of(model, loss_func))
        tensors += model.buffers()
        if isinstance(loss_func, nn.Module):
            tensors += loss_func.buffers()
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


def pack(value: Any) -> Tensor:
    """Return a plain value as bytes, (n,) uint8."""
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def unpack(packed: Tensor) -> Any:
    """Return the value that was packed; no code in it can run."""
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)
