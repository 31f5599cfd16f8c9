"""What compile sets up, in one plain object: nothing of it enters the model's state_dict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.batch import Parts, unpack
from minikeras.columns import rate_name
from minikeras.engine import Eager
from minikeras.history import HistoryColumns
from minikeras.hooks import Fit
from minikeras.modes import TrainingModes
from minikeras.overrides import overrides
from minikeras.phase import Phase
from minikeras.processes import OneProcess
from minikeras.stepper import Stepper

if TYPE_CHECKING:
    from minikeras.model import Model

LARGEST_BLOCK = 2**25 - 2**13  # bytes; glibc does not count blocks above 32 MiB


@dataclass
class Run:
    """What compile sets up, the history, and which fit is running."""

    loss_func: Any
    optimizers: dict[str, Optimizer]  # one alone goes by the name ""
    device: torch.device
    world: OneProcess
    stepper: Stepper
    train: Phase
    val: Phase
    split_batch: Callable[[Any], Parts] = unpack  # into features, labels, sample_weight, rows
    # the other arguments of compile, as they were given, to compile a copy in the same way
    options: Mapping[str, Any] = field(default_factory=dict)
    engine: Eager = field(init=False)
    phase: Phase = field(init=False)  # the one that is running, or has run last
    modes: TrainingModes = field(init=False)  # of the current or last fit
    fit: Fit | None = None  # the one that is running
    # the id of each parameter at compile -> whether it was trained then
    parameters: dict[int, bool] = field(default_factory=dict)
    # the model's plain attributes that are ours, as they were set
    published: dict[str, Any] = field(default_factory=dict)
    # logs and learning rates of each epoch
    epochs: list[tuple[dict[str, float], dict[str, float]]] = field(default_factory=list)
    # the same as columns, as far as they have been read
    columns: HistoryColumns = field(default_factory=lambda: HistoryColumns([]))
    kept: dict[str, Any] = field(default_factory=dict)  # what hooks and callbacks keep between fits

    def __post_init__(self) -> None:
        self.phase = self.val

    def best_val_loss(self) -> float:
        """Return the lowest val_loss so far; infinite before the first."""
        losses = [logs["val_loss"] for logs, _ in self.epochs if "val_loss" in logs]
        return min(losses, default=math.inf)

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rate of each optimizer's first group, if it has one named lr."""
        rates = {}
        for name, optimizer in self.optimizers.items():
            rate = optimizer.param_groups[0].get("lr")
            if rate is not None:
                rates[rate_name(name)] = float(rate)
        return rates

    def scheduled_rates(self) -> list[str]:
        """Return the learning rates, by column, whose optimizer was given to a torch scheduler."""
        names = []
        for name, optimizer in self.optimizers.items():
            if "initial_lr" in optimizer.param_groups[0]:  # torch's schedulers write it
                names.append(rate_name(name))
        return names

    def rate_columns(self) -> list[str]:
        """Return the learning rates that are columns: those that changed or have a scheduler.

        A scheduler that steps after each batch may be back at the same rate after each epoch.
        """
        scheduled = self.scheduled_rates()
        names = []
        for name, has_changed in self._columns_of_epochs().changed_rates().items():
            if name in scheduled or has_changed:
                names.append(name)
        return names

    def _columns_of_epochs(self) -> HistoryColumns:
        """Return the columns of the epochs, as far as they have been read."""
        if not self.columns.is_of(self.epochs):
            self.columns = HistoryColumns(self.epochs)
        return self.columns

    def history(self) -> pd.DataFrame:
        """Return the epochs so far: training columns, then validation's, then learning rates."""
        columns = self._columns_of_epochs()
        columns.extend()
        return columns.frame(self.rate_columns())

    def allows_writing(self, path: Any, with_state: bool = False) -> bool:
        """Tell whether weights may be written to a file now; the hooks of a fit may raise an error.

        Args:
            with_state: the file is to hold the state of the fit too.
        """
        if self.fit is None:
            return True
        return all(hook.allows_writing(path, with_state) for hook in self.fit.hooks)


def prepare(model: Model, run: Run) -> None:
    """Move model, loss and optimizer state to the device; all processes get rank 0's weights."""
    run.world.settle(model)
    place(model, run.loss_func, run.optimizers, run.device)
    run.world.share_weights(model, run.loss_func)


def place(
    model: nn.Module, loss_func: Any, optimizers: Mapping[str, Optimizer], device: torch.device
) -> None:
    """Move model, loss and optimizer state to the device; free if they are there already."""
    model.to(device)
    if isinstance(loss_func, nn.Module):
        loss_func.to(device)
    for optimizer in optimizers.values():
        if any(_is_elsewhere(parameter, state) for parameter, state in optimizer.state.items()):
            # torch's own way to put the state next to its parameter
            optimizer.load_state_dict(optimizer.state_dict())


def _is_elsewhere(parameter: Tensor, state: Mapping[str, Any]) -> bool:
    # a 0-d tensor such as Adam's step stays on the CPU by torch's own choice
    for value in state.values():
        if isinstance(value, Tensor) and value.ndim and value.device != parameter.device:
            return True
    return False


def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MiB of freed memory instead of giving it back to the system.

    What forward and backward free would be fetched again in each step, page by page: 10 % of the
    time of a small convolutional network. glibc keeps twice the largest block that was freed so far
    (mallopt(3), M_MMAP_THRESHOLD). This block is not touched, so it takes no memory.
    """
    torch.empty(LARGEST_BLOCK, dtype=torch.uint8)


def has_own_step(model: Model) -> bool:
    """Tell whether `train_step` is custom."""
    return overrides(model, "train_step")


def parameters_of(model: nn.Module, loss_func: Any) -> list[nn.Parameter]:
    """The parameters of a model and of its loss, each once."""
    parameters = list(model.parameters())
    if isinstance(loss_func, nn.Module):
        parameters += loss_func.parameters()
    return list(dict.fromkeys(parameters))


def buffers_of(model: nn.Module, loss_func: Any) -> list[Tensor]:
    """The buffers of a model and of its loss, each once."""
    buffers = list(model.buffers())
    if isinstance(loss_func, nn.Module):
        buffers += loss_func.buffers()
    return list(dict.fromkeys(buffers))


def remember_buffers(model: nn.Module, loss_func: Any) -> Callable[[], None]:
    """Return a function that puts the buffers of a model and of its loss back.

    They are the same tensors again, also if forward has assigned others. Autograd does not take
    them for changed: a custom step may still have to call backward.
    """
    modules = list(model.modules())
    if isinstance(loss_func, nn.Module):
        modules += loss_func.modules()
    before = []
    for module in dict.fromkeys(modules):
        for name, buffer in module.named_buffers(recurse=False):
            before.append((module, name, buffer, buffer.detach().clone()))

    def put_back() -> None:
        for module, name, buffer, numbers in before:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            buffer.data.copy_(numbers)

    return put_back
