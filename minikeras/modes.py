"""Train and eval modes: the user's choices during a fit, and each mode put back after a pass."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from minikeras.exported import set_mode
from minikeras.overrides import overrides


@contextlib.contextmanager
def keep_modes(*models: nn.Module) -> Iterator[None]:
    """Put each submodule's train or eval mode back at the end."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def keep_random_states(device: torch.device) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch, on CPU and device, at the end."""
    states = random.getstate(), np.random.get_state()
    devices = [] if device.type in ("cpu", "meta") else [device.index or 0]
    device_type = "cuda" if device.type in ("cpu", "meta") else device.type
    try:
        with torch.random.fork_rng(devices, device_type=device_type):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def record_gradients() -> Iterator[None]:
    """Record gradients even if the caller switched them off: a fit under torch.no_grad() trains."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.enable_grad():
        yield


class TrainingModes:
    """Which submodules stay in eval mode while a model trains.

    Submodules that the user has put into eval mode, before the fit or in a callback, stay there:
    a frozen BatchNorm, a teacher. A model that is wholly in eval mode, as after `model.eval()`, is
    trained in train mode. What the user's own `train` method decides is left to that method.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
    >>> modes = TrainingModes(model)
    >>> modes.enter()
    >>> modes.in_eval, [module.training for module in model]
    (['1'], [True, False])
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.in_eval: list[str] = []  # names of the submodules that stay in eval mode
        self.by_train: set[str] = set()  # those that model.train() itself has put into eval mode

    def look(self) -> list[str]:
        """Bring `in_eval` up to date, unless the model is wholly in eval mode, and return it."""
        if self._trains():
            names = names_in_eval(self.model)
            self.in_eval = [name for name in names if name not in self.by_train]
        return self.in_eval

    def _trains(self) -> bool:
        """Tell whether any part is in train mode; a wrapper takes part in no computation."""
        parts = list(self.model.modules())
        if hasattr(self.model, "net") and not overrides_forward(self.model):
            net: Any = self.model.net
            parts = list(net.modules())
        return any(part.training for part in parts)

    def enter(self) -> None:
        """Put the model into train mode, and what stays in eval mode into that."""
        before = self.look()
        self.model.train()
        self.by_train = set(names_in_eval(self.model))
        self.in_eval = [name for name in before if name not in self.by_train]
        self._put_into_eval()

    def _put_into_eval(self) -> None:
        modules = dict(self.model.named_modules())
        staying = {name: modules[name] for name in self.in_eval if name in modules}
        chosen = set(staying.values())
        for module in staying.values():
            if all(part in chosen for part in module.modules()):
                # the module's own method: a layer may do more than set the mode
                set_mode(module, False)
            else:
                module.training = False

    def restore(self, in_eval: Iterable[str]) -> None:
        """Set the modes of a fit that is resumed."""
        self.in_eval = list(in_eval)
        self.model.train()
        self.by_train = set(names_in_eval(self.model))
        self._put_into_eval()

    def described(self) -> str:
        """The outermost submodules that stay in eval mode, for people; empty if there are none."""
        chosen = set(self.in_eval)
        outermost = [name for name in self.in_eval if name.rpartition(".")[0] not in chosen]
        shown = ", ".join(outermost[:3])
        if len(outermost) > 3:
            shown += f" and {len(outermost) - 3} more"
        return shown


def overrides_forward(model: nn.Module) -> bool:
    """Tell whether a model has a forward of its own, and does not only wrap a network."""
    return not hasattr(type(model), "train_step") or overrides(model, "forward")


def names_in_eval(model: nn.Module) -> list[str]:
    """The names of the submodules that are in eval mode."""
    return [name for name, module in model.named_modules() if not module.training]
