"""A model's parameters in parts, one part in each process, by torch's fully_shard.

shard          each block, then the model; optimizers follow by name, with their state
whole          a tensor with the parts of all processes
as_part        ... and back: this process's part
sum_of_parts   a number that each process has of its own parts, added up

Between forward passes a model holds its parts alone. A block's are put together for its forward and its backward, after
which each process has its part of the gradients' sum over all: nothing is left to send in `optimizer_step`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.hooks import Fit, Hook
from minikeras.nests import is_sharded
from minikeras.stepper import Part, StepLoss, gradients_of, parameters_of
from minikeras.support.sharded_tensors import as_part


def shard(
    model: nn.Module,
    blocks: Any,
    optimizers: Iterable[Optimizer],
    own_step: bool,
    device: torch.device,
) -> None:
    """Put a model into parts, which must be alike in all processes before; one that is in parts stays as it is.

    Args:
        blocks: a class of modules or several, None for the children of each ModuleList.
        own_step: blocks may be called one by one. A model without parameters beside them is left as it is then, since
            torch wants the outermost to be called first.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_gradient_divide_factor"):
        raise RuntimeError(
            f'distributed="fsdp" needs torch 2.8 or newer, and this is {torch.__version__}. Upgrade it.'
        )
    chosen = blocks_of(model, blocks)
    before = dict(model.named_parameters())
    if not any(map(is_sharded, model.parameters())):
        mesh = init_device_mesh(
            device.type, (dist.get_world_size(),)
        )  # by itself torch takes a GPU where there is one
        for block in chosen:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        if not own_step or not all(map(is_sharded, model.parameters())):
            fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(
            module, FSDPModule
        ):  # sums and not means: all gradients here are sums until a step divides them
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    after = dict(model.named_parameters())
    for optimizer in optimizers:
        follow(optimizer, {before[name]: after[name] for name in before})


def blocks_of(model: nn.Module, blocks: Any) -> list[nn.Module]:
    """The modules that are put together one at a time, inner ones first."""
    modules = [module for module in model.modules() if module is not model]
    if blocks is None:
        children = {
            child
            for module in model.modules()
            if isinstance(module, nn.ModuleList)
            for child in module
        }
        found = [module for module in modules if module in children]
    else:
        classes = tuple(blocks) if isinstance(blocks, (tuple, list)) else (blocks,)
        if not classes or not all(
            isinstance(one, type) and issubclass(one, nn.Module) for one in classes
        ):
            raise TypeError(
                f"fsdp_blocks must be a class of modules or several, got {blocks!r}. Pass (nn.Linear,)."
            )
        found = [module for module in modules if isinstance(module, classes)]
        if not found:
            there = ", ".join(sorted({type(module).__name__ for module in modules}))
            names = ", ".join(one.__name__ for one in classes)
            raise ValueError(
                f"fsdp_blocks: no part of {type(model).__name__} is a {names}. It has {there or 'none'}."
            )
    containers = (nn.ModuleList, nn.ModuleDict)  # which are never called
    return [
        one
        for one in reversed(found)
        if not isinstance(one, containers) and any(True for _ in one.parameters())
    ]


def follow(optimizer: Optimizer, now: Mapping[Tensor, Tensor]) -> None:
    """The optimizer trains the parts in place of the parameters that it was made with."""
    for group in optimizer.param_groups:
        group["params"] = [now.get(parameter, parameter) for parameter in group["params"]]
    for parameter in [parameter for parameter in optimizer.state if parameter in now]:
        state = optimizer.state.pop(parameter)
        optimizer.state[now[parameter]] = {
            name: as_part(value, now[parameter]) for name, value in state.items()
        }


class ShardedBackward(Part, Hook):
    """Fills the gradients of parameters in parts, and puts a model into parts again after an error.

    A custom train_step must call `self.backward`: gradients of parts call no hook as they are filled.
    """

    def __init__(self) -> None:
        self.seen: set[Optimizer] = (
            set()
        )  # those that backward was called for since their last step

    def on_loss(self, loss: StepLoss) -> None:
        """Note whose gradients are filled."""
        self.seen.update(loss.optimizers)

    def backward(self, loss: StepLoss) -> bool:
        """Do what loss.total.backward(inputs=...) would.

        torch does not find parts among its inputs: the gradients of all other parameters are laid
        aside meanwhile.
        """
        if loss.inputs is None or not any(map(is_sharded, loss.inputs)):
            loss.total.backward(inputs=loss.inputs)
            return True
        wanted = set(loss.inputs)
        aside = {}
        for optimizer in self.stepper.optimizers.values():
            for parameter in parameters_of(optimizer):
                if parameter not in wanted:
                    aside[parameter] = parameter.grad
                    parameter.grad = None
        loss.total.backward()
        for parameter, gradient in aside.items():
            parameter.grad = gradient
        return True

    def on_step(self, optimizers: list[Optimizer]) -> None:
        """Refuse a step whose gradients were not filled by `self.backward`."""
        for optimizer in optimizers:
            if optimizer not in self.seen and any(map(is_sharded, gradients_of(optimizer))):
                raise RuntimeError(
                    f"loss.backward() passes {self.stepper.bypassed} by. Call self.backward(loss) in "
                    f"train_step."
                )

    def on_waiting(self, optimizer: Optimizer) -> None:
        """Note that the gradients of this window have been filled."""
        self.seen.add(optimizer)

    def on_stepped(self, optimizer: Optimizer) -> None:
        """Begin a new window."""
        self.seen.discard(optimizer)

    def reset(self) -> None:
        """Forget whose gradients were filled."""
        self.seen.clear()

    @contextlib.contextmanager
    def around_epoch(self, fit: Fit) -> Iterator[None]:
        """Put the model into parts again when an error ends the epoch."""
        try:
            yield
        except BaseException:
            settle(fit.model)
            raise


def sync_batchnorm(model: nn.Module, world: Any, device: torch.device) -> None:
    """Let BatchNorm take the rows of all processes together; the state_dict's keys stay.

    Raises:
        ValueError: on the CPU, for which torch has none.
    """
    if device.type == "cpu":
        raise ValueError(
            f"sync_batchnorm=True with {world.size} processes needs GPUs: torch has no SyncBatchNorm for "
            f"the CPU. Leave it out, and choose a batch_size that is enough for the statistics of each "
            f"process."
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def settle(model: nn.Module) -> None:
    """In parts again, after a forward or backward that an error has ended."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reset_iter_state"):
            with contextlib.suppress(
                AttributeError, RuntimeError
            ):  # it is not the outermost, or has not been called
                module.reset_iter_state()
            module.reshard()


def sum_of_parts(number: Tensor, like: Any) -> Tensor:
    """A 0-d tensor summed over the processes that hold parts of `like`; its gradients are summed, too."""
    summed: Tensor = _Sum.apply(number, like.device_mesh.get_group())  # type: ignore[no-untyped-call]
    return summed


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, number: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _added(number, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _added(gradient, ctx.group), None


def _added(number: Tensor, group: Any) -> Tensor:
    import torch.distributed as dist

    total = number.detach().clone()
    dist.all_reduce(total, group=group)
    return total
