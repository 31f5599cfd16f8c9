"""What an optimizer needs to step inside a graph, without its user seeing a difference."""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Double:
    """A twin of an optimizer for the graph: the same parameters and state, its rate in a tensor, its steps in float64.

    The user's own optimizer looks as it does without jit: a fused flag, a float rate, float32 steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state = optimizer.state
        self.is_of_torch = type(optimizer).__module__.startswith(
            "torch.optim"
        )  # else its numbers stay as they are
        self.twin: Optimizer = object.__new__(type(optimizer))
        self.twin.__dict__.update(optimizer.__dict__)
        vars(self.twin).pop(
            "found_inf", None
        )  # what holds back a fused step; the graph does that by itself
        self.twin.param_groups = [dict(group) for group in optimizer.param_groups]
        self.twin.state = defaultdict(dict)
        self.step = inspect.unwrap(
            type(optimizer).step
        )  # undecorated: hooks and profiling would break the graph
        self.settings = [
            [(k, v) for k, v in g.items() if k not in ("params", "lr")]
            for g in optimizer.param_groups
        ]
        self.rates = [group.get("lr") for group in optimizer.param_groups]
        self.handles: list[Any] = []
        self.taken = 0  # steps in the graph since the optimizer's own count was written
        for group in self.twin.param_groups:
            if group.get("fused"):
                group["fused"] = None  # Dynamo refuses it, and the compiler fuses by itself
            if "capturable" in group and group["params"][0].is_cuda:
                group["capturable"] = (
                    True  # a count of steps on the CPU would keep the step out of a CUDA graph
                )
            rate = group.get(
                "lr"
            )  # a float would be part of the code, compiled anew when it changes
            if not isinstance(rate, Tensor | None):
                group["lr"] = torch.tensor(
                    rate, dtype=torch.float64, device=group["params"][0].device
                )
        self.read()

    def counts(self, parameter: Tensor, key: str, value: Any) -> bool:
        """Whether the twin has a number of its own for it. Not of optimizers from elsewhere, which may read theirs as
        Python numbers: those of float64 would be taken for constants by the compiler, in silence."""
        return self.is_of_torch and counts_steps(parameter, key, value)

    def current(self) -> bool:
        """Whether the optimizer has the groups and the state that the twin was made of, and has not loaded others."""
        own = self.optimizer
        return (
            own.state is self.state
            and len(own.state) == self.size
            and len(own.param_groups) == len(self.rates)
        )

    def follow(self) -> bool:
        """Take over the learning rate; False when another setting has changed, which is part of the code."""
        for number, group in enumerate(self.optimizer.param_groups):
            rate = group.get("lr")
            followed = rate is self.rates[number] and not isinstance(
                rate, Tensor
            )  # a tensor may be changed in place
            if not followed and rate is not self.twin.param_groups[number].get("lr"):
                if rate is None or self.rates[number] is None:
                    return False
                self.rates[number] = rate
                self.twin.param_groups[number]["lr"].fill_(rate)
            if any(
                group[key] is not value and group[key] != value
                for key, value in self.settings[number]
            ):
                return False
        return True

    def read(self) -> bool:
        """Take over the optimizer's state after a step of its own; False when it is in other tensors than before."""
        same, self.size = True, len(self.optimizer.state)
        for parameter, state in self.optimizer.state.items():
            twins = self.twin.state[parameter]
            for key, value in state.items():
                if not self.counts(parameter, key, value):
                    same = same and twins.get(key) is value
                    twins[key] = value
                elif key in twins:
                    twins[key].copy_(value)
                else:
                    device = parameter.device if parameter.is_cuda else value.device
                    twins[key] = value.to(
                        device, torch.float64, copy=True
                    )  # beta ** step in float32 would lose four digits
        return same

    def before_a_graph(self) -> Callable[[], None]:
        """Before a graph's first step; what it gives is to be called after it.

        Raises:
            RuntimeError: from what it gives: a tensor was put in place of another, or changes to one would be lost.
        """
        before = {}
        for state in self.twin.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    before[id(state), key] = state, value

        def after() -> None:
            assigned = sorted(
                key for (_, key), (state, value) in before.items() if state.get(key) is not value
            )
            for (_, key), (state, value) in before.items():
                state[key] = value
            if assigned:
                raise RuntimeError(
                    f"a step of the optimizer puts another tensor into its state, {assigned[0]!r}. Filled in place, it "
                    f"would be in the graph"
                )
            for (_, key), (_, value) in before.items():
                if not self.is_of_torch and is_lost_in_a_graph(value):
                    raise RuntimeError(
                        f"{key!r} in the optimizer's state is one number in float64, to which torch.compile loses "
                        f"changes on the CPU"
                    )

        return after

    def attach(self) -> None:
        """From now on the twin steps; whoever asks the optimizer for its state gets it as it is then."""
        if not self.handles:
            own = self.optimizer  # what it is told to load may hold the tensors that it has
            self.handles = [
                own.register_state_dict_pre_hook(lambda _: self.write_back()),
                own.register_load_state_dict_pre_hook(lambda _, loaded: self.write_back()),
            ]

    def detach(self) -> None:
        """From now on the optimizer steps by itself again."""
        if self.handles:
            self.write_back()
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def write_back(self) -> None:
        if (
            self.optimizer.state is not self.state
        ):  # loaded meanwhile: the twin's steps are those of another run
            return
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                if self.counts(parameter, key, value):
                    twin = self.twin.state[parameter][key]
                    if key == "step" and parameter.grad is not None:
                        twin.copy_(
                            value + self.taken
                        )  # the compiler loses some that nothing reads, as RMSprop's
                    value.copy_(twin)
        self.taken = 0


def counts_steps(parameter: Tensor, key: str, value: Any) -> bool:
    """Whether a part of an optimizer's state is its count of steps or a product over them, a number on its own.

    It is float32, or float64 where that is torch's default dtype.

    An average over a parameter that is itself one number is neither.
    """
    number = (
        isinstance(value, Tensor)
        and value.ndim == 0
        and value.dtype in (torch.float32, torch.float64)
    )
    return number and (parameter.ndim > 0 or key in ("step", "mu_product"))


def is_lost_in_a_graph(tensor: Tensor) -> bool:
    """Whether torch.compile loses what is done to it in place: on the CPU it takes such a one for a Python number."""
    return tensor.ndim == 0 and tensor.dtype == torch.float64 and tensor.device.type == "cpu"


def numbers(optimizer: Optimizer) -> dict[tuple[str, int], Any]:
    """The Python numbers among an optimizer's settings and state, but for lr: a graph holds them as they were."""
    return {
        (key, at): value
        for at, part in enumerate([*optimizer.param_groups, *optimizer.state.values()])
        for key, value in part.items()
        if key != "lr" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def gradients_in_graph(reached: int) -> Callable[..., tuple[Tensor, ...]]:
    """torch.autograd.grad of a loss by its first so many parameters as one op of a graph; none of the rest has any."""

    def gradients(loss: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        trained = [number for number, parameter in enumerate(parameters) if parameter.requires_grad]
        found = torch.autograd.grad(
            loss, [parameters[number] for number in trained], allow_unused=True
        )
        if [number for number, one in zip(trained, found, strict=True) if one is not None] != list(
            range(reached)
        ):
            raise RuntimeError("the loss reaches other parameters than in the batch before")
        return found[:reached]

    # the compiler differentiates through it; Dynamo does not look inside
    in_graph: Callable[..., tuple[Tensor, ...]] = torch.compiler.allow_in_graph(gradients)
    return in_graph


def has_hooks(parameters: Iterable[Tensor], optimizers: Iterable[Optimizer]) -> bool:
    """Whether somebody waits for gradients or steps, who would not be called. Torch has no public way to ask."""
    names = (
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
        "_optimizer_step_pre_hooks",
        "_optimizer_step_post_hooks",
    )
    own = any(getattr(one, name, None) for one in (*parameters, *optimizers) for name in names)
    everywhere = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    module = sys.modules[Optimizer.__module__]
    return own or any(getattr(module, name, None) for name in everywhere)
