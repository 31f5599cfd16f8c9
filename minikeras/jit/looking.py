"""A step that is taken only to be looked at, and leaves no trace: after a resume the graph takes that batch itself.

put back: weights, buffers and other attributes of modules, also where forward assigns them; the optimizers' state and
settings; gradients and windows of `accumulate`; the scale of float16; the totals; the watch over the losses; Python's,
NumPy's and torch's random states, and those of generators that a module holds.
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
    """A step inside leaves everything as it was before it, in the same tensors. After an error nothing is put back."""
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
    restore_tensors = way_back(
        list({id(tensor): tensor for tensor in tensors}.values()), run.device
    )
    counted = copy.deepcopy(totals.state_dict())
    yield
    for restore in ways_back:
        restore()
    for parameter, gradient in gradients:
        parameter.grad = gradient
    restore_tensors()
    totals.load_state_dict(counted)


def parameters_in(modules: list[nn.Module], run: Run) -> list[Tensor]:
    """The parameters of the modules and of the optimizers, each once."""
    found: list[Tensor] = []
    for module in modules:
        found += module.parameters(recurse=False)
    for optimizer in run.optimizers.values():
        for group in optimizer.param_groups:
            found += group["params"]
    return list({id(parameter): parameter for parameter in found}.values())


def way_back_of_module(module: nn.Module) -> Restore:
    """Its attributes, what its own lists and dicts hold, its buffers among them, and its generators."""
    kind = type(module)
    attributes = dict(vars(module))
    contents = {
        name: copy.copy(value) for name, value in attributes.items() if type(value) in CONTAINERS
    }
    generators = [
        (value, state_of(value)) for value in attributes.values() if isinstance(value, KINDS)
    ]

    def restore() -> None:
        if type(module) is not kind:  # a lazy layer, which is another from its first batch on
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
    """Whether two dicts hold the same objects under the same names."""
    return now.keys() == before.keys() and all(now[name] is value for name, value in before.items())


def put_contents_back(container: Any, before: Any) -> None:
    """A dict, list or set holds again what its copy holds."""
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
    """Its groups, its state and its own numbers; the values of tensors are put back elsewhere."""
    groups = [dict(group) for group in optimizer.param_groups]
    states: dict[Any, Any] = {}
    for parameter, state in optimizer.state.items():
        states[parameter] = (
            {key: kept(value) for key, value in state.items()} if isinstance(state, dict) else state
        )
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
    """A tensor itself, since a graph holds on to it; a copy of anything else."""
    return value if isinstance(value, Tensor) else copy.deepcopy(value)


def tensors_in_state(optimizer: Optimizer) -> list[Tensor]:
    """The tensors in an optimizer's state."""
    found = []
    for state in optimizer.state.values():
        values = state.values() if isinstance(state, dict) else (state,)
        found += [value for value in values if isinstance(value, Tensor)]
    return found
