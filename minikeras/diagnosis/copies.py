"""Leave everything as it was: what is trained is a copy, and what is read is put back.

compiled_copy    a copy of model, loss and optimizers, compiled as the model was
leave_no_trace   put random states, samplers and loaders back, however the block ends
"""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from minikeras.nests import is_sharded, leaves
from minikeras.run import parameters_of
from minikeras.support.loaders import DRAWN_FOR
from minikeras.support.randomness import Randomness
from minikeras.support.reachable import reachable
from minikeras.support.twin import Copier

if TYPE_CHECKING:
    from minikeras.model import Model

# what one process needs to train a copy in eager mode, a step per batch
PLAIN = {
    "jit": False,
    "steps_per_execution": 1,
    "accumulate": 1,
    "distributed": None,
    "sync_batchnorm": False,
    "fsdp_blocks": None,
}


def check_can_copy(model: Model, verb: str) -> None:
    """Check that the model can be copied.

    Raises:
        ValueError: its parameters are in parts in several processes.
    """
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            f"{verb} trains a copy of the model, and this process holds only a part of each "
            'parameter (distributed="fsdp"). Build the model again, compile it with '
            f"distributed=None, and call {verb} in a script of one process."
        )


def compiled_copy(model: Model, verb: str, **changes: Any) -> Model:
    """Copy a compiled model with its loss and optimizers, and compile the copy in the same way.

    Metrics are left out: nothing here reads them. Tensors that a forward has stored are copied
    without their graph, which deepcopy refuses.

    Args:
        verb: what the user has called, for messages.
        changes: arguments of compile that differ, such as those of `PLAIN`.

    Raises:
        TypeError: something in the model, the loss, an optimizer or a hook cannot be copied.
    """
    run = model._compiled(verb)
    copies: dict[int, Any] = {}  # for deepcopy: id -> the copy to use
    copier = Copier(copies)
    for root in (model, run.loss_func):
        for module in root.modules() if isinstance(root, nn.Module) else ():
            for leaf in leaves(list(vars(module).values())):
                if isinstance(leaf, Tensor) and not leaf.is_leaf:
                    copies[id(leaf)] = leaf.detach().clone()
            for buffer in module.buffers(recurse=False):
                if is_lazy(buffer):  # deepcopy knows lazy parameters only
                    make: Any = UninitializedBuffer
                    copies[id(buffer)] = make(device=buffer.device, dtype=buffer.dtype)
    try:
        # first: the model may hold an optimizer, and this is the copy that it holds then
        optimizers = {}
        for name, optimizer in run.optimizers.items():
            optimizers[name] = copy_optimizer(optimizer, copier)
        twin = copy.deepcopy(model, copies)
        # a function may reach the model too, as one that adds a penalty does
        is_module = isinstance(run.loss_func, nn.Module)
        loss_func = (
            copy.deepcopy(run.loss_func, copies) if is_module else copier.copy(run.loss_func)
        )
        for root in (twin, loss_func):
            for module in root.modules() if isinstance(root, nn.Module) else ():
                # the copy of a module that torch.compile has compiled has functions of its own
                if "_orig_mod" not in dict(module.named_children()):
                    copy_functions(vars(module), copier)
    except Exception as error:
        raise TypeError(
            f"{verb} trains a copy of the model, its loss and its optimizers, and one of them or "
            f"of their hooks cannot be copied: {type(error).__name__}: {error}. "
            "copy.deepcopy(model) must work: create what cannot be copied (a file, a lock, a "
            "connection) outside the model, or give its class a __deepcopy__; remove hooks that "
            "use it, handle.remove(), and register them again afterwards."
        ) from error
    for parameter in parameters_of(twin, loss_func):
        parameter.grad = None
    given: Any = optimizers or None
    if list(optimizers) == [""]:
        given = optimizers[""]
    with silenced():
        twin.compile(loss_func, given, **{**run.options, **changes})
    return twin


def copy_functions(values: dict[str, Any], copier: Copier) -> None:
    """Copy the functions in the attributes of a copied object, and in its tables of hooks.

    `copy.deepcopy` shares functions: a hook that appends to a list, or a lambda that reaches the
    model, would act on what is the user's.
    """
    for name, value in values.items():
        if isinstance(value, types.FunctionType):
            values[name] = copier.copy(value)
        elif isinstance(value, dict) and "hooks" in name:
            for key, hook in value.items():
                if isinstance(hook, types.FunctionType):
                    value[key] = copier.copy(hook)


def copy_optimizer(optimizer: Optimizer, copier: Copier) -> Optimizer:
    """Copy an optimizer with its parameters, or with the copies that there are of them.

    torch's own pickling leaves out the attributes of subclasses. A learning-rate scheduler replaces
    `step` in the instance; the copy has the method of the class again.
    """
    twin = type(optimizer).__new__(type(optimizer))
    copier.memo[id(optimizer)] = twin
    for name, value in vars(optimizer).items():
        if name != "step":
            vars(twin)[name] = copy.deepcopy(value, copier.memo)
    copy_functions(vars(twin), copier)
    return twin


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Show no warnings: those about a copy would be said of the user's model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def leave_no_trace(model: Model, verb: str, data: Mapping[str, Any]) -> Iterator[None]:
    """Put random states, samplers, counters and loaders back, however the block ends.

    Args:
        data: what the user passed, by argument name; None is left out.

    Raises:
        TypeError: data that reading would use up.
    """
    run = model._compiled(verb)
    check_can_copy(model, verb)
    data = {name: value for name, value in data.items() if value is not None}
    for name, value in data.items():
        check_can_be_read_again(value, name, verb)
    roots = {**data, "model": model, "loss_func": run.loss_func}
    randomness = Randomness(run.device, list(data.values()), roots, counted=data, without=(run,))
    states = randomness.states()
    with contextlib.ExitStack() as contexts:
        for _, value in reachable(data):  # the user's own iterable may have a loader inside
            if isinstance(value, DataLoader):
                contexts.enter_context(keep_workers(value))
        gradients = []
        for parameter in parameters_of(model, run.loss_func):
            gradients.append((parameter, parameter.grad))
            parameter.grad = None  # a loss that reaches the model itself would add to it
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            randomness.restore(states)


def check_can_be_read_again(data: Any, name: str, verb: str) -> None:
    """Refuse data that one reading uses up.

    Raises:
        TypeError: it is an iterator.
    """
    if isinstance(data, Iterator):
        raise TypeError(
            f"{verb} reads {name} and must leave it as it is, and a {type(data).__name__} is used "
            "up by reading. Pass a DataLoader, arrays, or a list of batches: "
            f"list(itertools.islice({name}, 100))."
        )


@contextlib.contextmanager
def keep_workers(loader: DataLoader[Any]) -> Iterator[None]:
    """Keep the loader's persistent workers and their position: read with workers of its own."""
    workers = loader._iterator
    was_drawn = loader in DRAWN_FOR
    loader._iterator = None
    try:
        yield
    finally:
        ours = loader._iterator
        loader._iterator = workers
        if ours is not None and hasattr(ours, "_shutdown_workers"):
            ours._shutdown_workers()
        if not was_drawn:
            DRAWN_FOR.discard(loader)
