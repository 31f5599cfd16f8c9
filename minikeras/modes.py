"""Train and eval modes: the user's choices during a fit, and each mode put back after a pass."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from minikeras.exported import set_mode
from minikeras.overrides import overrides

# A plain attribute of a module, so that copies have it too. True: the module stays in eval mode
# whenever the model is put into train mode. False: it did until now, and its mode says nothing
# about the rest of the model. It is removed when the model is next put into train mode.
STAYS_IN_EVAL = "_stays_in_eval"


@contextlib.contextmanager
def keep_modes(*models: nn.Module) -> Iterator[None]:
    """Put each submodule's train or eval mode back at the end.

    A submodule that has begun or ceased to stay in eval mode meanwhile keeps that choice.
    """
    before = []
    for model in models:
        for module in model.modules():
            before.append((module, module.training, stays_in_eval(module)))
    any_trained = any(mode for _, mode, _ in before)
    try:
        yield
    finally:
        for module, mode, stayed in before:
            if stays_in_eval(module):
                module.training = False
            elif stayed:
                module.training = any_trained
            else:
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
    a BatchNorm, a teacher. So do those that `stay_in_eval` was called for. Apart from these, a
    model that is wholly in eval mode, as after `model.eval()`, is trained in train mode. What the
    user's own `train` method decides is left to that method.

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
        """Bring `in_eval` up to date, and return it.

        If the model is wholly in eval mode, that says nothing about its parts.
        """
        is_training = self._trains()
        before = set(self.in_eval)
        self.in_eval = []
        for name, module in self.model.named_modules():
            if is_training:
                is_chosen = not module.training and name not in self.by_train
            else:
                is_chosen = name in before and not has_left_eval(module)
            if is_chosen or stays_in_eval(module):
                self.in_eval.append(name)
        return self.in_eval

    def _trains(self) -> bool:
        """Tell whether any part is in train mode; a wrapper takes part in no computation.

        Parts that stay in eval mode, or have just left it, say nothing about the others.
        """
        parts = list(self.model.modules())
        if hasattr(self.model, "net") and not overrides_forward(self.model):
            net: Any = self.model.net
            parts = list(net.modules())
        others = [part for part in parts if STAYS_IN_EVAL not in vars(part)]
        return any(part.training for part in others or parts)

    def enter(self) -> None:
        """Put the model into train mode, and what stays in eval mode into that."""
        self._enter(self.look())

    def restore(self, in_eval: Iterable[str]) -> None:
        """Set the modes of a fit that is resumed."""
        self._enter(list(in_eval))

    def _enter(self, in_eval: list[str]) -> None:
        self.model.train()
        staying = names_staying_in_eval(self.model)
        self.by_train = set(names_in_eval(self.model)) - set(staying)
        chosen = {*in_eval, *staying} - self.by_train
        self.in_eval = [name for name, _ in self.model.named_modules() if name in chosen]
        put_into_eval(self._modules_in_eval())

    def _modules_in_eval(self) -> list[nn.Module]:
        modules = dict(self.model.named_modules())
        return [modules[name] for name in self.in_eval if name in modules]

    def describe(self) -> list[str]:
        """Return lines for people: which submodules are frozen, and which others in eval mode."""
        frozen = set()
        others = set()
        for module in self._modules_in_eval():
            if stays_in_eval(module):
                frozen.add(module)
            else:
                others.add(module)
        lines = []
        if frozen:
            lines.append(f"frozen: {self._name_outermost(frozen)}")
        if others:
            lines.append(f"in eval mode, as you left them: {self._name_outermost(others)}")
        return lines

    def _name_outermost(self, chosen: set[nn.Module]) -> str:
        """Name those of these submodules that are in no other of them."""
        outermost = []
        covered: set[nn.Module] = set()
        for name, module in self.model.named_modules():
            parts = set(module.modules())
            if module not in covered and parts <= chosen:
                outermost.append(name)
                covered |= parts
        shown = ", ".join(outermost[:3])
        if len(outermost) > 3:
            shown += f" and {len(outermost) - 3} more"
        return shown


# --- modules that stay in eval mode ---------------------------------------------------------------


def stay_in_eval(module: nn.Module) -> None:
    """Put a module into eval mode, and keep it there whenever its model is put into train mode.

    >>> body = nn.Sequential(nn.BatchNorm1d(2))
    >>> stay_in_eval(body)
    >>> model = nn.Sequential(body, nn.Linear(2, 1)).train()
    >>> keep_in_eval(model)
    >>> body.training, body[0].training, model.training
    (False, False, True)
    """
    for part in module.modules():
        vars(part)[STAYS_IN_EVAL] = True
    set_mode(module, False)


def leave_eval(module: nn.Module) -> None:
    """Put a module into train mode, and no longer keep it in eval mode."""
    for part in module.modules():
        vars(part).pop(STAYS_IN_EVAL, None)
    set_mode(module, True)
    for part in module.modules():
        vars(part)[STAYS_IN_EVAL] = False


def stays_in_eval(module: nn.Module) -> bool:
    """Tell whether a module stays in eval mode by `stay_in_eval`."""
    return vars(module).get(STAYS_IN_EVAL) is True


def has_left_eval(module: nn.Module) -> bool:
    """Tell whether a module has left eval mode by `leave_eval`, and no training has begun since."""
    return vars(module).get(STAYS_IN_EVAL) is False


def keep_in_eval(model: nn.Module) -> None:
    """Put what stays in eval mode back there: the model was put into train mode."""
    staying = []
    for module in model.modules():
        if stays_in_eval(module):
            staying.append(module)
        else:
            vars(module).pop(STAYS_IN_EVAL, None)
    put_into_eval(staying)


def names_staying_in_eval(model: nn.Module) -> list[str]:
    """The names of the submodules that stay in eval mode by `stay_in_eval`."""
    return [name for name, module in model.named_modules() if stays_in_eval(module)]


def set_staying_in_eval(model: nn.Module, names: Iterable[str]) -> None:
    """Let these submodules stay in eval mode, and no others; their modes do not change yet."""
    staying = set(names)
    for name, module in model.named_modules():
        if name in staying:
            vars(module)[STAYS_IN_EVAL] = True
        else:
            vars(module).pop(STAYS_IN_EVAL, None)


def way_back_of_eval(model: nn.Module) -> Callable[[], None]:
    """Return a function that puts back which submodules stay in eval mode, or have left it."""
    before = [(module, vars(module).get(STAYS_IN_EVAL)) for module in model.modules()]

    def put_back() -> None:
        for module, stays in before:
            vars(module).pop(STAYS_IN_EVAL, None)
            if stays is not None:
                vars(module)[STAYS_IN_EVAL] = stays

    return put_back


def put_into_eval(modules: list[nn.Module]) -> None:
    """Put these modules into eval mode, and none that is inside them and not listed."""
    chosen = set(modules)
    covered: set[nn.Module] = set()
    for module in modules:
        parts = set(module.modules())
        if not parts <= chosen:
            module.training = False
        elif module.training or module not in covered:
            # the module's own method: a layer may do more than set the mode
            set_mode(module, False)
            covered |= parts


def overrides_forward(model: nn.Module) -> bool:
    """Tell whether a model has a forward of its own, and does not only wrap a network."""
    return not hasattr(type(model), "train_step") or overrides(model, "forward")


def names_in_eval(model: nn.Module) -> list[str]:
    """The names of the submodules that are in eval mode."""
    return [name for name, module in model.named_modules() if not module.training]
