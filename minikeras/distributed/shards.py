"""Shard a model's parameters over the processes, by torch's fully_shard.

shard          each block, then the model; optimizers follow by name, with their state
sum_of_parts   add up a number that each process has of its own shard; gradients are averaged

Between forward passes a process holds its own shard of each parameter alone. The parameters of a
block are whole during its forward and its backward; after that each process has its shard of the
gradients' mean over all, and `optimizer_step` has nothing left to send.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.hooks import Fit, Hook
from minikeras.modes import names_staying_in_eval, set_staying_in_eval
from minikeras.nests import is_sharded
from minikeras.stepper import Part, StepLoss, gradients_of, optimizer_parameters
from minikeras.support.sharded_tensors import as_part


def shard(
    model: nn.Module,
    blocks: Any,
    optimizers: Iterable[Optimizer],
    own_step: bool,
    device: torch.device,
) -> None:
    """Shard a model, which must be alike in all processes before; a sharded one stays as it is.

    Args:
        blocks: a class of modules or several, None for the children of each ModuleList.
        own_step: a custom step may call blocks one by one. A model without parameters beside them
            is then not sharded as a whole, since torch wants the outermost to be called first.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_gradient_divide_factor"):
        raise RuntimeError(
            f'distributed="fsdp" needs torch 2.8 or newer, got {torch.__version__}. Upgrade torch.'
        )
    chosen = blocks_of(model, blocks)
    before = dict(model.named_parameters())
    if not any(map(is_sharded, model.parameters())):
        check_shared(model, chosen)
        # by itself torch takes a GPU if there is one
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in chosen:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        if not own_step or not all(map(is_sharded, model.parameters())):
            fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # each backend can add up, and not each can average
            module.set_gradient_divide_factor(dist.get_world_size())
            module.set_force_sum_reduction_for_comms(True)
    after = dict(model.named_parameters())
    for optimizer in optimizers:
        follow(optimizer, {before[name]: after[name] for name in before})


def blocks_of(model: nn.Module, blocks: Any) -> list[nn.Module]:
    """Return the modules that are sharded one by one, inner ones first.

    Raises:
        TypeError, ValueError: `blocks` are no classes of modules, or of none in the model.
    """
    modules = [module for module in model.modules() if module is not model]
    if blocks is None:
        found = children_of_lists(model)
    else:
        found = modules_of_classes(model, modules, blocks)
    called = []
    for module in sorted(found, key=lambda module: len(list(module.modules()))):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # which are never called
            continue
        if any(True for _ in module.parameters()):
            called.append(module)
    return called


def children_of_lists(model: nn.Module) -> list[nn.Module]:
    """Return the children of each ModuleList, in the order of the model's modules."""
    children: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            children.update(module)
    return [module for module in model.modules() if module is not model and module in children]


def modules_of_classes(model: nn.Module, modules: list[nn.Module], blocks: Any) -> list[nn.Module]:
    """Return the modules that are of the user's classes."""
    classes = tuple(blocks) if isinstance(blocks, (tuple, list)) else (blocks,)
    are_classes = all(isinstance(cls, type) and issubclass(cls, nn.Module) for cls in classes)
    if not classes or not are_classes:
        raise TypeError(
            f"fsdp_blocks must be a module class or a tuple of them, got {blocks!r}. Pass "
            "(nn.Linear,)."
        )
    found = [module for module in modules if isinstance(module, classes)]
    if not found:
        existing = ", ".join(sorted({type(module).__name__ for module in modules}))
        names = ", ".join(cls.__name__ for cls in classes)
        raise ValueError(
            f"fsdp_blocks: {type(model).__name__} has no module of class {names}. Its classes: "
            f"{existing or 'none'}."
        )
    return found


def check_shared(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Check that no parameter is in several blocks, of which torch shards each by itself.

    Raises:
        ValueError: one is, as a tied parameter or by a layer that several blocks share.
    """
    names: dict[Tensor, dict[nn.Module, str]] = {}  # parameter -> block -> its name there
    for name, parameter, block in parameters_in_blocks(model, model, set(blocks)):
        names.setdefault(parameter, {}).setdefault(block, name)
    for found in names.values():
        if len(found) > 1:
            raise ValueError(
                f"{' and '.join(found.values())} are one parameter in {len(found)} blocks; "
                'distributed="fsdp" expects each parameter in one block, since each block is '
                "gathered by itself. Choose fsdp_blocks so that one block has all of these names, "
                'or no block has any; or pass distributed="ddp".'
            )


def parameters_in_blocks(
    module: nn.Module, block: nn.Module, blocks: set[nn.Module], prefix: str = ""
) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """Yield the parameters by each of their names, with the innermost block round them.

    Args:
        block: the one round the module, the model itself outside all blocks.
    """
    if module in blocks:
        block = module
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter, block
    for name, child in module.named_children():
        yield from parameters_in_blocks(child, block, blocks, f"{prefix}{name}.")


def follow(optimizer: Optimizer, now: Mapping[Tensor, Tensor]) -> None:
    """Let an optimizer train the shards in place of the parameters that it was created with."""
    for group in optimizer.param_groups:
        group["params"] = [now.get(parameter, parameter) for parameter in group["params"]]
    for parameter in list(optimizer.state):
        if parameter not in now:
            continue
        shard_of_parameter = now[parameter]
        states = {}
        for name, value in optimizer.state.pop(parameter).items():
            states[name] = as_part(value, shard_of_parameter)
        optimizer.state[shard_of_parameter] = states


class ShardedBackward(Part, Hook):
    """Fill the gradients of sharded parameters, and shard a model again after an error.

    A custom train_step must call `self.backward`: no hook is called as the gradients of shards are
    filled.
    """

    def __init__(self) -> None:
        # those that backward was called for since their last step
        self.seen: set[Optimizer] = set()

    def on_loss(self, loss: StepLoss) -> None:
        """Note whose gradients are filled."""
        self.seen.update(loss.optimizers)

    def backward(self, loss: StepLoss) -> bool:
        """Do what loss.total.backward(inputs=...) would.

        torch does not find shards among its inputs: the gradients of all other parameters are set
        aside meanwhile.
        """
        if loss.inputs is None or not any(map(is_sharded, loss.inputs)):
            loss.total.backward(inputs=loss.inputs)
            return True
        wanted = set(loss.inputs)
        aside = {}
        for optimizer in self.stepper.optimizers.values():
            for parameter in optimizer_parameters(optimizer):
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
                    f"loss.backward() bypasses {self.stepper.bypassed}. Call self.backward(loss) "
                    "in train_step."
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
        """Shard the model again when an error ends the epoch."""
        try:
            yield
        except BaseException:
            settle(fit.model)
            raise


def sync_batchnorm(model: nn.Module, world: Any, device: torch.device) -> None:
    """Let BatchNorm use the rows of all processes; the keys of the state_dict stay.

    Raises:
        ValueError: on the CPU, for which torch has none.
    """
    if device.type == "cpu":
        raise ValueError(
            f"sync_batchnorm=True with {world.size} processes needs GPUs: torch has no "
            "SyncBatchNorm for the CPU. Omit it, and choose a batch_size that is large enough for "
            "the statistics of each process."
        )
    staying_in_eval = names_staying_in_eval(model)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # replaces modules
    set_staying_in_eval(model, staying_in_eval)


def settle(model: nn.Module) -> None:
    """Shard a model again, after an error in its forward or backward."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reset_iter_state"):
            # errors if it is not the outermost, or has not been called
            with contextlib.suppress(AttributeError, RuntimeError):
                module.reset_iter_state()
            module.reshard()


def sum_of_parts(number: Tensor, like: Any) -> Tensor:
    """Add up a 0-d tensor over the processes that hold shards of `like`.

    Its gradient is the mean of theirs, as gradients are between backward and step.
    """
    summed: Tensor = _Sum.apply(number, like.device_mesh.get_group())  # type: ignore[no-untyped-call]
    return summed


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, number: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _add_up(number, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        import torch.distributed as dist

        return _add_up(gradient, ctx.group) / dist.get_world_size(ctx.group), None


def _add_up(number: Tensor, group: Any) -> Tensor:
    import torch.distributed as dist

    total = number.detach().clone()
    dist.all_reduce(total, group=group)
    return total
