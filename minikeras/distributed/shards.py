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
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


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
    if not any(map(is_part, model.parameters())):
        mesh = init_device_mesh(
            device.type, (dist.get_world_size(),)
        )  # by itself torch takes a GPU where there is one
        for block in chosen:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        if not own_step or not all(map(is_part, model.parameters())):
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


def is_part(tensor: Any) -> bool:
    """Whether a tensor is in parts. Asked without loading torch's DTensor, which one process has no use for."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all parts, on the CPU where it was in parts; to be called by all processes."""
    return tensor.detach().full_tensor().cpu() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def as_part(value: Any, like: Any) -> Any:
    """This process's part of a whole tensor, where `like` is in parts; anything else as it is."""
    if (
        not is_part(like)
        or not isinstance(value, Tensor)
        or is_part(value)
        or value.shape != like.shape
    ):
        return value
    from torch.distributed.tensor import distribute_tensor

    there = value.detach().to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def load_whole(model: nn.Module, state: Mapping[str, Any]) -> None:
    """load_state_dict of whole tensors, each process taking its parts."""
    own = model.state_dict()
    if any(map(is_part, own.values())):
        parts: Any = copy.copy(state)  # with torch's version numbers
        for name, value in state.items():
            parts[name] = as_part(value, own.get(name))
        state = parts
    model.load_state_dict(state)


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """load_state_dict of whole tensors, each process taking its parts."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        number: {name: as_part(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    own = optimizer.state_dict()[
        "param_groups"
    ]  # with what a scheduler has put into them meanwhile
    groups = [{**mine, **group} for mine, group in zip(own, state["param_groups"], strict=True)]
    optimizer.load_state_dict({**state, "state": parts, "param_groups": groups})


def backward(total: Tensor, inputs: Any, held: Iterable[Tensor]) -> None:
    """total.backward(inputs=inputs). torch does not find parts among its inputs: the gradients of the rest of `held`
    are laid aside meanwhile."""
    if inputs is None or not any(map(is_part, inputs)):
        total.backward(inputs=inputs)
        return
    wanted = set(inputs)
    aside = {parameter: parameter.grad for parameter in held if parameter not in wanted}
    for parameter in aside:
        parameter.grad = None
    total.backward()
    for parameter, gradient in aside.items():
        parameter.grad = gradient


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


@contextlib.contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """In parts again at the end, however that comes."""
    try:
        yield
    finally:
        settle(model)


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
