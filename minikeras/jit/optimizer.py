"""Let an optimizer step inside a graph without a visible difference. You may skip this file.

Without it the optimizer would step in eager mode, after the graph.
"""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OTHER_PARAMETERS = "the loss uses other parameters than in the batch before"


class OptimizerTwin:
    """A copy of an optimizer for the graph.

    It has the same parameters and state, but the learning rate in a tensor, and counts of steps in
    float64. The user's own optimizer looks as it does without jit: a fused flag, a float learning
    rate, float32 steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state = optimizer.state
        # numbers in the state of other optimizers stay as they are
        self.is_of_torch = type(optimizer).__module__.startswith("torch.optim")
        self.copy: Optimizer = object.__new__(type(optimizer))
        self.copy.__dict__.update(optimizer.__dict__)
        # what holds back a fused step; the graph does that itself
        vars(self.copy).pop("found_inf", None)
        self.copy.param_groups = [dict(group) for group in optimizer.param_groups]
        self.copy.state = defaultdict(dict)
        # undecorated: hooks and profiling would break the graph
        self.step = inspect.unwrap(type(optimizer).step)
        self.settings = [settings_of(group) for group in optimizer.param_groups]
        self.rates = [group.get("lr") for group in optimizer.param_groups]
        self.handles: list[Any] = []
        self.taken = 0  # steps in the graph since the optimizer's own count was written
        for group in self.copy.param_groups:
            prepare_for_graph(group)
        self.read()

    def has_own_number(self, parameter: Tensor, key: str, value: Any) -> bool:
        """Tell whether the copy has a number of its own for a part of the state.

        Not for optimizers from elsewhere, which may read theirs as Python numbers: the compiler
        would silently take those of float64 for constants.
        """
        return self.is_of_torch and counts_steps(parameter, key, value)

    def is_current(self) -> bool:
        """Tell whether the optimizer still has the groups and the state that were copied."""
        own = self.optimizer
        if own.state is not self.state or len(own.state) != self.size:
            return False
        return len(own.param_groups) == len(self.rates)

    def follow(self) -> bool:
        """Copy the learning rate.

        Return False if another setting has changed, which is part of the graph's code.
        """
        for number, group in enumerate(self.optimizer.param_groups):
            rate = group.get("lr")
            # a tensor may be changed in place
            is_same = rate is self.rates[number] and not isinstance(rate, Tensor)
            if not is_same and rate is not self.copy.param_groups[number].get("lr"):
                if rate is None or self.rates[number] is None:
                    return False
                self.rates[number] = rate
                self.copy.param_groups[number]["lr"].fill_(rate)
            names, values = self.settings[number]
            if list(map(group.get, names)) != values:
                return False
        return True

    def read(self) -> bool:
        """Copy the optimizer's state after it has stepped outside the graph.

        Return False if the state is in other tensors than before.
        """
        is_same = True
        self.size = len(self.optimizer.state)
        for parameter, state in self.optimizer.state.items():
            copied = self.copy.state[parameter]
            for key, value in state.items():
                if not self.has_own_number(parameter, key, value):
                    if copied.get(key) is not value:
                        is_same = False
                    copied[key] = value
                elif key in copied:
                    copied[key].copy_(value)
                else:
                    device = parameter.device if parameter.is_cuda else value.device
                    # beta ** step in float32 would lose four digits
                    copied[key] = as_parameter(value.to(device, torch.float64, copy=True))
        return is_same

    def before_a_graph(self) -> Callable[[], None]:
        """Return a check to be called after a graph's first step; call this before it.

        Raises:
            RuntimeError: from the check: the step replaces a tensor, or changes to one would be
                lost.
        """
        before = {}
        for state in self.copy.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    before[id(state), key] = state, value

        def after() -> None:
            replaced = []
            for (_, key), (state, value) in before.items():
                if state.get(key) is not value:
                    replaced.append(key)
                state[key] = value
            if replaced:
                raise RuntimeError(
                    f"a step of the optimizer replaces a tensor in its state, {min(replaced)!r}. "
                    "If the step updated it in place, it would be in the graph"
                )
            for (_, key), (_, value) in before.items():
                if not self.is_of_torch and is_lost_in_a_graph(value):
                    raise RuntimeError(
                        f"{key!r} in the optimizer's state is a 0-d float64 tensor, and "
                        "torch.compile loses changes to it on the CPU"
                    )

        return after

    def attach(self) -> None:
        """Let the copy step from now on; whoever asks the optimizer for its state gets it."""
        if self.handles:
            return
        own = self.optimizer
        # also before loading: what is loaded may hold the tensors that the optimizer has
        self.handles = [
            own.register_state_dict_pre_hook(lambda _: self.write_back()),
            own.register_load_state_dict_pre_hook(lambda _, loaded: self.write_back()),
        ]

    def detach(self) -> None:
        """Let the optimizer step outside the graph again."""
        if self.handles:
            self.write_back()
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def write_back(self) -> None:
        """Write the counts of steps to the optimizer's own state."""
        if self.optimizer.state is not self.state:
            return  # another was loaded meanwhile: the copy's steps are those of another run
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                if not self.has_own_number(parameter, key, value):
                    continue
                number = self.copy.state[parameter][key]
                if key == "step" and parameter.grad is not None:
                    # the compiler loses some that nothing reads, such as RMSprop's
                    number.copy_(value + self.taken)
                value.copy_(number)
        self.taken = 0


def settings_of(group: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Return the settings of a group that are part of a graph's code: names and values."""
    names = [name for name in group if name not in ("params", "lr")]
    return names, [group[name] for name in names]


def prepare_for_graph(group: dict[str, Any]) -> None:
    """Change the settings of a copied group as a graph needs them."""
    first = group["params"][0]
    if group.get("fused"):
        group["fused"] = None  # Dynamo refuses it, and the compiler fuses by itself
    if "capturable" in group and first.is_cuda:
        # a count of steps on the CPU would keep the step out of a CUDA graph
        group["capturable"] = True
    rate = group.get("lr")
    if not isinstance(rate, Tensor | None):
        # a float would be part of the code, compiled again when it changes
        group["lr"] = as_parameter(torch.tensor(rate, dtype=torch.float64, device=first.device))


def as_parameter(number: Tensor) -> nn.Parameter:
    """Return a 0-d tensor as a parameter without a gradient.

    Of a plain tensor in float64 on the CPU the compiler would trace the value too, find that it
    must not, and trace the whole step again.
    """
    return nn.Parameter(number, requires_grad=False)


def counts_steps(parameter: Tensor, key: str, value: Any) -> bool:
    """Tell whether a part of an optimizer's state is its count of steps, or a product over them.

    Such a number is float32, or float64 if that is torch's default dtype. An average over a
    parameter that is itself one number is neither.
    """
    if not isinstance(value, Tensor) or value.ndim != 0:
        return False
    if value.dtype not in (torch.float32, torch.float64):
        return False
    return parameter.ndim > 0 or key in ("step", "mu_product")


def is_lost_in_a_graph(tensor: Tensor) -> bool:
    """Tell whether torch.compile loses changes in place: it takes the tensor for a number."""
    return tensor.ndim == 0 and tensor.dtype == torch.float64 and tensor.device.type == "cpu"


def numbers(optimizer: Optimizer) -> dict[tuple[str, int], Any]:
    """Return the Python numbers among an optimizer's settings and state, but for lr.

    A graph would hold them as they were.
    """
    found = {}
    for place, part in enumerate([*optimizer.param_groups, *optimizer.state.values()]):
        for key, value in part.items():
            if key != "lr" and isinstance(value, int | float) and not isinstance(value, bool):
                found[key, place] = value
    return found


# the compiler differentiates through it; Dynamo does not look inside
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def gradients_in_graph(reached: int, loss: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Compute torch.autograd.grad as one operation of a graph.

    Args:
        reached: the loss reaches the first so many parameters, and none of the rest.
    """
    trained = [number for number, parameter in enumerate(parameters) if parameter.requires_grad]
    wanted = [parameters[number] for number in trained]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    with_gradient = []
    for number, gradient in zip(trained, found, strict=True):
        if gradient is not None:
            with_gradient.append(number)
    if with_gradient != list(range(reached)):
        raise RuntimeError(OTHER_PARAMETERS)
    return found[:reached]


def has_hooks(parameters: Iterable[Tensor], optimizers: Iterable[Optimizer]) -> bool:
    """Tell whether hooks of parameters or optimizers would not be called by a graph.

    torch has no public way to ask.
    """
    own = (
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
        "_optimizer_step_pre_hooks",
        "_optimizer_step_post_hooks",
    )
    for owner in (*parameters, *optimizers):
        if any(getattr(owner, name, None) for name in own):
            return True
    everywhere = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    module = sys.modules[Optimizer.__module__]
    return any(getattr(module, name, None) for name in everywhere)
