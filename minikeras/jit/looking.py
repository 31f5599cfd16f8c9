"""Run a step only to check it, and undo everything it changed. You may skip this file.

After a resume the graph must run that batch, as it did in the interrupted run.

put back: weights, buffers and other attributes of modules, even if forward assigns them; the state
and settings of the optimizers; gradients, and what the parts of the stepper count; the totals;
random states of Python, NumPy, torch, and of generators that a module holds.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.jit.graphs import way_back
from minikeras.support.randomness import KINDS, set_state, state_of

if TYPE_CHECKING:
    from minikeras.model import Model
    from minikeras.run import Run
    from minikeras.totals import Totals

Restore = Callable[[], None]
CONTAINERS = (dict, OrderedDict, list, set)


@contextlib.contextmanager
def put_back(model: Model, run: Run, totals: Totals) -> Iterator[None]:
    """Put everything back after a step inside, in the same tensors; nothing after an error."""
    modules = list(model.modules())
    if isinstance(run.loss_func, nn.Module):
        modules += run.loss_func.modules()
    tensors: list[Tensor] = []
    ways_back = [way_back_of_module(module) for module in dict.fromkeys(modules)]
    for module in modules:
        tensors += module.parameters(recurse=False)
        tensors += module.buffers(recurse=False)
    for optimizer in run.optimizers.values():
        ways_back.append(way_back_of_optimizer(optimizer))
        tensors += tensors_in_state(optimizer)
    gradients = []
    for parameter in parameters_in(modules, run):
        gradients.append((parameter, parameter.grad))
        if parameter.grad is not None:
            tensors.append(parameter.grad)
    ways_back.append(run.stepper.way_back())
    restore_tensors = way_back(each_once(tensors), run.device)
    counted = copy.deepcopy(totals.state_dict())
    yield
    for restore in ways_back:
        restore()
    for parameter, gradient in gradients:
        parameter.grad = gradient
    restore_tensors()
    totals.load_state_dict(counted)


def each_once(tensors: list[Tensor]) -> list[Tensor]:
    """Return each tensor once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def parameters_in(modules: list[nn.Module], run: Run) -> list[Tensor]:
    """Return the parameters of the modules and of the optimizers, each once."""
    found: list[Tensor] = []
    for module in modules:
        found += module.parameters(recurse=False)
    for optimizer in run.optimizers.values():
        for group in optimizer.param_groups:
            found += group["params"]
    return each_once(found)


def way_back_of_module(module: nn.Module) -> Restore:
    """Return a function that restores a module: attributes, its lists and dicts, generators."""
    kind = type(module)
    attributes = dict(vars(module))
    contents = {}
    generators = []
    for name, value in attributes.items():
        if type(value) in CONTAINERS:  # the buffers are in one of them
            contents[name] = copy.copy(value)
        if isinstance(value, KINDS):
            generators.append((value, state_of(value)))

    def restore() -> None:
        if type(module) is not kind:  # a lazy layer, whose class changes in its first batch
            return
        if not same_items(vars(module), attributes):
            vars(module).clear()
            vars(module).update(attributes)
        for name, before in contents.items():
            put_contents_back(attributes[name], before)
        for generator, state in generators:
            set_state(generator, state)

    return restore


def same_items(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """Tell whether two dicts hold the same objects under the same names."""
    return now.keys() == before.keys() and all(now[name] is value for name, value in before.items())


def put_contents_back(container: Any, before: Any) -> None:
    """Fill a dict, list or set with what its copy holds."""
    if isinstance(container, dict):
        if not same_items(container, before):
            container.clear()
            container.update(before)
    elif isinstance(container, list):
        container[:] = before
    else:
        container.clear()
        container.update(before)


def way_back_of_optimizer(optimizer: Optimizer) -> Restore:
    """Return a function that restores an optimizer: its groups, its state and its own numbers.

    The values of tensors are restored elsewhere.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    states: dict[Any, Any] = {}
    for parameter, state in optimizer.state.items():
        if isinstance(state, dict):
            state = {key: kept(value) for key, value in state.items()}
        states[parameter] = state
    counts = {}
    for name, value in vars(optimizer).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            counts[name] = value

    def restore() -> None:
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        for parameter in list(optimizer.state):
            if parameter not in states:
                del optimizer.state[parameter]
        for parameter, state in states.items():
            if isinstance(state, dict):
                optimizer.state[parameter].clear()
                optimizer.state[parameter].update(state)
        vars(optimizer).update(counts)

    return restore


def kept(value: Any) -> Any:
    """Return a tensor itself, since a graph refers to it; a copy of anything else."""
    return value if isinstance(value, Tensor) else copy.deepcopy(value)


def tensors_in_state(optimizer: Optimizer) -> list[Tensor]:
    """Return the tensors in an optimizer's state."""
    found = []
    for state in optimizer.state.values():
        values = state.values() if isinstance(state, dict) else (state,)
        found += [value for value in values if isinstance(value, Tensor)]
    return found
