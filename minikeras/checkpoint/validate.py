"""Validate the values of a run's state before any is used: the file may have been changed.

check_state       what every file must have, by type and range; anything else in it is ignored
check_contents    what must fit the model and the optimizers, by shape and name
check_random      random states that NumPy, torch and Python accept; NumPy itself accepts positions
                  that crash Python
untouched         restore a model, its optimizers, callbacks and random states if loading fails
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from minikeras.callback import Callback
from minikeras.checkpoint.file import remedy_of_fit
from minikeras.checkpoint.plain import ARRAY, restored
from minikeras.checkpoint.weights import buffers_of, check_weights, misfit, plain_name
from minikeras.errors import CheckpointError, describe, is_number
from minikeras.modes import way_back_of_eval
from minikeras.support.reachable import is_order, is_plain

if TYPE_CHECKING:
    from minikeras.run import Run

F = TypeVar("F", bound=Callable[..., Any])
LARGEST = 2**53  # largest count
WORDS = 624  # words in the state of a Mersenne Twister
BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")  # those of NumPy
# torch's optimizers whose state has tensors of other shapes than their parameter
OF_OWN_SHAPES = ("LBFGS", "Adafactor", "Muon", "SparseAdam")


class _Unfit(Exception):
    """A value that no run has written.

    Args:
        where: its place in the state.
        value: the value.
        expected: what it should be; "" if it is missing.
    """

    def __init__(self, where: str, value: Any, expected: str) -> None:
        message = f"{where} is missing"
        if expected:
            message = f"{where} is {show(value)} and not {expected}"
        super().__init__(message)


def show(value: Any) -> str:
    """Show a value in a message, shortened if it is long."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)[:60]
    return describe(value)[:60]


def check_state(state: Any, path: Path) -> None:
    """Check the values of a run's state by type and range.

    Raises:
        CheckpointError: a value has another type or is out of range; the message names it.
    """
    with _refuse(path):
        _check_layout(state)
        _check_optimizers(_get(state, "optimizers"))
        _check_groups(state.get("groups", {}), state["optimizers"])
        for number, rank in enumerate(_check_list(state.get("ranks", []), "ranks")):
            _check_process(rank, f"ranks {number}: ")


def check_contents(state: Any, model: nn.Module, run: Run, path: Path) -> None:
    """Check the values of a run's state against its model and optimizers.

    The state has the same layers, and optimizers of the same classes.

    Raises:
        CheckpointError: a value does not fit; the message names it.
    """
    with _refuse(path):
        _check_buffers(state["buffers"], model)
        _check_frozen(state.get("frozen"), model, run)
        _check_loss(state, run.loss_func)
        roots = {"model": model, "loss_func": run.loss_func}
        _check_attributes(state.get("attributes", {}), "attributes", roots)
        for name, optimizer in run.optimizers.items():
            written = state["optimizers"][name]["state"]
            where = name_optimizer(name)
            numbers: list[int] = []
            for group in written["param_groups"]:
                numbers.extend(group["params"])
            _check_settings(written["param_groups"], optimizer, where)
            _check_shapes(written["state"], numbers, optimizer, where)


def name_optimizer(name: str) -> str:
    """Say which optimizer a message is about."""
    return f"optimizer {name!r}" if name else "the optimizer"


@contextlib.contextmanager
def _refuse(path: Path) -> Iterator[None]:
    """Raise what is found as a CheckpointError."""
    try:
        yield
    except _Unfit as error:
        raise CheckpointError(
            f"{path} is damaged, or has been changed since it was written: {error}. "
            f"{remedy_of_fit(path)}"
        ) from None
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
        RuntimeError,
    ) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} is damaged, or has been changed since it was written: {first}. "
            f"{remedy_of_fit(path)}"
        ) from error


# --- types and ranges ---


def _get(state: Mapping[str, Any], key: str, where: str = "") -> Any:
    """Return a value that must not be missing."""
    if key not in state:
        raise _Unfit(where + key, None, "")
    return state[key]


def _is_count(value: Any, least: int = 0) -> bool:
    """Tell whether a value is a whole number from `least` to LARGEST."""
    return type(value) is int and least <= value <= LARGEST


def _check_count(value: Any, where: str, least: int = 0) -> int:
    """Check that a value is a whole number from `least` to LARGEST, and return it."""
    if not _is_count(value, least):
        raise _Unfit(where, value, f"a whole number of {least} or more")
    return int(value)


def _check_dict(value: Any, where: str) -> dict[Any, Any]:
    """Check that a value is a dict, and return it."""
    if not isinstance(value, dict):
        raise _Unfit(where, value, "a dict")
    return value


def _check_named(value: Any, where: str) -> dict[str, Any]:
    """Check that a value is a dict with strings as keys, and return a copy."""
    for key in _check_dict(value, where):
        if not isinstance(key, str):
            raise _Unfit(f"a key of {where}", key, "a string")
    return dict(value)


def _check_list(value: Any, where: str) -> list[Any]:
    """Check that a value is a list or a tuple, and return it as a list."""
    if not isinstance(value, (list, tuple)):
        raise _Unfit(where, value, "a list")
    return list(value)


def _check_strings(value: Any, where: str) -> list[str]:
    """Check that a value is a list of strings, and return it."""
    for item in _check_list(value, where):
        if not isinstance(item, str):
            raise _Unfit(f"an item of {where}", item, "a string")
    return list(value)


def _check_numbers(value: Any, where: str) -> None:
    """Check that a value is a dict of numbers by name."""
    for name, number in _check_named(value, where).items():
        if not is_number(number):
            raise _Unfit(f"{where} {name}", number, "a number")
        if isinstance(number, int) and abs(number) > LARGEST**2:
            raise _Unfit(f"{where} {name}", number, "a number that a float can be")


# --- the parts of a state ---


def _check_layout(state: Mapping[str, Any]) -> None:
    """Check all of a state but its optimizers and the states of other processes."""
    first = _check_count(_get(state, "first"), "first", 1)
    last = _check_count(_get(state, "last"), "last", 1)
    if type(_get(state, "stopped")) is not bool:
        raise _Unfit("stopped", state["stopped"], "True or False")
    history = _check_list(_get(state, "history"), "history")
    for number, row in enumerate(history):
        if not isinstance(row, (list, tuple)) or len(row) != 2:
            raise _Unfit(f"row {number} of history", row, "a pair of dicts")
        _check_numbers(row[0], f"row {number} of history,")
        _check_numbers(row[1], f"row {number} of history, rate")
    position = _check_named(_get(state, "position"), "position")
    if not {"epoch", "step", "logs"} == position.keys():
        raise _Unfit("position", position, "epoch, step and logs")
    epoch = _check_count(position["epoch"], "position epoch", 1)
    _check_count(position["step"], "position step")
    if position["logs"] is not None:
        _check_numbers(position["logs"], "position logs")
    if epoch != len(history) + 1 or not first <= epoch <= last + 1:
        expected = (
            f"that after the {len(history)} epochs of history, of a fit of epochs {first} to {last}"
        )
        raise _Unfit("position epoch", epoch, expected)
    _check_named(_get(state, "model"), "model")
    _check_named(_get(state, "buffers"), "buffers")
    _check_named(state.get("loss buffers", {}), "loss buffers")
    _check_named(_get(state, "loss"), "loss")
    for key in ("buffers", "loss buffers"):
        for name, buffer in state.get(key, {}).items():
            if not isinstance(buffer, Tensor):
                raise _Unfit(f"buffer {name}", buffer, "a tensor")
    if state.get("frozen") is not None:
        _check_strings(state["frozen"], "frozen")
    for name, own in _check_named(_get(state, "callbacks"), "callbacks").items():
        _check_named(own, f"callback {name}")
    _check_begun(state.get("begun"))
    if state.get("data") is not None:
        _check_count(state["data"], "data")
    for key in ("in_eval", "stays_in_eval"):
        if state.get(key) is not None:
            _check_strings(state[key], key)
    _check_process(state)
    if position["logs"] is not None:
        missing = state["totals"]["sums"].keys() - position["logs"].keys()
        if missing:
            raise _Unfit(f"position logs {min(missing)}", None, "")


def _check_begun(begun: Any) -> None:
    """Check what a script had set as the run began."""
    if begun is None:  # older files do not have it
        return
    _check_named(begun, "begun")
    for name, groups in _check_named(
        _get(begun, "optimizers", "begun "), "begun optimizers"
    ).items():
        for group in _check_list(groups, f"begun optimizers {name!r}"):
            _check_numbers(group, f"begun optimizers {name!r},")
    for name, groups in _check_named(begun.get("groups", {}), "begun groups").items():
        for group in _check_list(groups, f"begun groups {name!r}"):
            _check_strings(group, f"begun groups {name!r}")
    _check_strings(_get(begun, "frozen", "begun "), "begun frozen")
    for key in ("loss frozen", "in_eval", "stays_in_eval"):
        _check_strings(begun.get(key, []), f"begun {key}")
    for name, setting in _check_named(begun.get("compile", {}), "begun compile").items():
        if setting is not None and not isinstance(setting, (str, bool, int, float)):
            raise _Unfit(f"begun compile {name}", setting, "a number or a string")


def _check_process(state: Mapping[str, Any], where: str = "") -> None:
    """Check the state that each process has of its own."""
    _check_dict(state, where or "the state")
    _check_totals(_get(state, "totals", where), f"{where}totals")
    check_random(_get(state, "random", where), f"{where}random")
    train = _get(state, "train", where)
    if train is not None:
        _check_named(train, f"{where}train")
        seen = _check_count(_get(train, "seen", f"{where}train "), f"{where}train seen")
        if train.get("steps") is not None:
            steps = _check_count(train["steps"], f"{where}train steps")
            if seen > steps:
                raise _Unfit(f"{where}train seen", seen, f"one of {steps} batches")
        _get(train, "loader", f"{where}train ")
        check_random(_get(train, "start", f"{where}train "), f"{where}train start")
        for epoch in _check_list(train.get("epochs", []), f"{where}train epochs"):
            if epoch is not None:
                _check_count(epoch, f"{where}train epochs")
        if train.get("draws") is not None:
            _check_draws(train["draws"], f"{where}train draws")
    _check_precision(state.get("precision"), f"{where}precision")
    steps_taken = _check_named(state.get("optimizer_steps", {}), f"{where}optimizer_steps")
    for name, steps in steps_taken.items():
        _check_count(steps, f"{where}optimizer_steps {name!r}")
    for name, graph in _check_named(state.get("graphs", {}), f"{where}graphs").items():
        _check_named(graph, f"{where}graphs {name!r}")
        _check_list(_get(graph, "shapes", f"{where}graphs {name!r} "), f"{where}graphs {name!r}")
        for count in ("own", "others"):
            value = _get(graph, count, f"{where}graphs {name!r} ")
            _check_count(value, f"{where}graphs {name!r} {count}")


def _check_totals(totals: Any, where: str) -> None:
    """Check the totals of an epoch's means."""
    _check_named(totals, where)
    sums = _check_named(_get(totals, "sums", f"{where} "), f"{where} sums")
    counts = _check_named(_get(totals, "counts", f"{where} "), f"{where} counts")
    if sums.keys() != counts.keys():
        raise _Unfit(f"{where} sums", list(sums), f"of the names of counts, {list(counts)}"[:200])
    for name in sums:
        for what, value in (("sums", sums[name]), ("counts", counts[name])):
            if not is_number(value) or (isinstance(value, Tensor) and value.ndim):
                raise _Unfit(f"{where} {what} {name}", value, "a number")
        if not isinstance(sums[name], Tensor) or not sums[name].is_floating_point():
            raise _Unfit(f"{where} sums {name}", sums[name], "a 0-d tensor of floats")
        count = float(counts[name])
        if not count >= 0 or math.isinf(count):
            raise _Unfit(f"{where} counts {name}", count, "a count of 0 or more")
        if count == 0 and float(sums[name]) != 0:
            raise _Unfit(f"{where} sums {name}", float(sums[name]), "0, as it is of a count of 0")
    for name, weights in _check_named(totals.get("weights", {}), f"{where} weights").items():
        for part, weight in _check_named(weights, f"{where} weights {name}").items():
            if {name, part} - sums.keys() or type(weight) is not float or not weight >= 0:
                raise _Unfit(f"{where} weights {name} {part}", weight, "the weight of a column")
    if type(_get(totals, "updated", f"{where} ")) is not bool:
        raise _Unfit(f"{where} updated", totals["updated"], "True or False")
    _check_named(_get(totals, "objects", f"{where} "), f"{where} objects")
    _check_strings(totals.get("names", []), f"{where} names")


def _check_precision(precision: Any, where: str) -> None:
    """Check the state of accumulate: its windows and the gradients in them."""
    if precision is None:
        return
    _check_named(precision, where)
    _check_count(_get(precision, "accumulate", f"{where} "), f"{where} accumulate", 1)
    windows = _check_named(_get(precision, "windows", f"{where} "), f"{where} windows")
    for name, window in windows.items():
        place = f"{where} windows {name!r}"
        _check_named(window, place)
        _check_count(_get(window, "batches", f"{place} "), f"{place} batches")
    gradients = _check_named(_get(precision, "gradients", f"{where} "), f"{where} gradients")
    for name, gradients_of_window in gradients.items():
        place = f"{where} gradients {name!r}"
        for gradient in _check_list(gradients_of_window, place):
            if gradient is not None and not isinstance(gradient, (Tensor, dict)):
                raise _Unfit(place, gradient, "a tensor")


def _check_loss(state: Mapping[str, Any], loss_func: Any) -> None:
    """Check the buffers and frozen parameters of the loss; `check_buffers` checks the layers."""
    for name, buffer in state.get("loss buffers", {}).items():
        if not isinstance(buffer, Tensor):
            raise _Unfit(f"buffer {name} of the loss", buffer, "a tensor")
    if state.get("loss frozen") is None:
        return
    known: set[str] = set()
    if isinstance(loss_func, nn.Module):
        known = {plain_name(name) for name, _ in loss_func.named_parameters()}
    for name in _check_strings(state["loss frozen"], "loss frozen"):
        if plain_name(name) not in known:
            raise _Unfit("loss frozen", name, "a parameter of the loss")


def _check_attributes(states: Any, where: str, roots: Mapping[str, Any]) -> None:
    """Check values that become attributes of layers and of data.

    They must be plain, and their names must not be those of methods.
    """
    for owner, own in _check_named(states, where).items():
        methods = _find_methods(owner, roots)
        for name, value in _check_named(own, f"{where} {owner}").items():
            if not name.isidentifier() or name in methods or name == "training":
                raise _Unfit(f"a key of {where} {owner}", name, "the name of an attribute")
            if not is_plain(restored(value), floats=True) and not is_order(value):
                expected = "a number, a string, or a short list of them"
                raise _Unfit(f"{where} {owner}.{name}", value, expected)


def _find_methods(owner: str, roots: Mapping[str, Any]) -> set[str]:
    """Name the methods of the object at a path such as `model.net`.

    If the object is not known, the methods that every object has.
    """
    root, _, path = owner.partition(".")
    value = roots.get(root)
    if isinstance(value, nn.Module) and path:
        value = dict(value.named_modules()).get(path)
    return {name for name in dir(type(value)) if callable(getattr(type(value), name, None))}


def _check_groups(groups: Any, optimizers: Mapping[str, Any]) -> None:
    """Check how many groups each optimizer had as the epoch began."""
    for name, count in _check_named(groups, "groups").items():
        _check_count(count, f"groups {name!r}", 1)
        if name not in optimizers:
            raise _Unfit("a key of groups", name, "the name of an optimizer")


def _check_draws(draws: Any, where: str) -> None:
    """Check the states of generators by the number of the sampler's step."""
    for number, states in _check_named(draws, where).items():
        if not number.isdecimal():
            raise _Unfit(f"a key of {where}", number, "a number")
        for name, state in _check_named(states, f"{where} {number}").items():
            place = f"{where} {number}, {name}"
            if name == "the global numpy":
                _check_numpy(_convert_numpy_tuple(state, place), place)
            else:
                _check_generator(state, place)


def _convert_numpy_tuple(state: Any, where: str) -> Any:
    """Convert a state of NumPy's random from a tuple to a dict."""
    parts = _check_list(restored(state), where)
    if len(parts) != 5 or not isinstance(parts[1], np.ndarray):
        raise _Unfit(where, state, "a state of NumPy's random")
    inner = {"key": parts[1].tolist(), "pos": parts[2]}
    return {"bit_generator": parts[0], "state": inner, "has_gauss": parts[3], "gauss": parts[4]}


def _check_buffers(buffers: Any, model: nn.Module) -> None:
    """Check that the model can hold these buffers."""
    own = buffers_of(model)
    modules = {plain_name(f"{name}."): module for name, module in model.named_modules()}
    modules[""] = model
    for name, buffer in buffers.items():
        if not isinstance(buffer, Tensor):
            raise _Unfit(f"buffer {name}", buffer, "a tensor")
        current = own.get(plain_name(name))
        if current is None:
            owner, dot, last = plain_name(name).rpartition(".")
            module = modules.get(owner + dot)
            is_free = module is not None and getattr(module, last, None) is None
            if not is_free or hasattr(nn.Module, last):
                raise _Unfit(f"buffer {name}", buffer, "one of the model's")
            continue
        if is_lazy(current) or current.shape != buffer.shape:
            continue
        problem = misfit(current, buffer)
        if problem:
            raise _Unfit(f"buffer {name}", buffer, f"a buffer that fits the model: it is {problem}")


def _check_frozen(names: Any, model: nn.Module, run: Run) -> None:
    """Check that frozen parameters are the model's, and that something is left to train."""
    if names is None:
        return
    known = {plain_name(name) for name, _ in model.named_parameters()}
    for name in names:
        if plain_name(name) not in known:
            raise _Unfit("frozen", name, "a parameter of the model")
    trained = known - {plain_name(name) for name in names}
    loss_has_parameters = False
    if isinstance(run.loss_func, nn.Module):
        loss_has_parameters = bool(list(run.loss_func.parameters()))
    if known and not trained and not loss_has_parameters:
        raise _Unfit(
            "frozen", names, "only a part of the parameters: nothing would be left to train"
        )


def _check_optimizers(written: Any) -> None:
    """Check the optimizers' classes, groups and states by type."""
    for name, entry in _check_named(written, "optimizers").items():
        where = name_optimizer(name)
        _check_named(entry, where)
        if not isinstance(_get(entry, "class", f"{where}, "), str):
            raise _Unfit(f"{where}, class", entry["class"], "a string")
        state = _check_named(_get(entry, "state", f"{where}, "), f"{where}, state")
        groups = _check_list(_get(state, "param_groups", f"{where}, "), f"{where}, param_groups")
        numbers: list[int] = []
        for group in groups:
            params = _check_list(
                _get(_check_named(group, where), "params", f"{where}, "), f"{where}, params"
            )
            for number in params:
                numbers.append(_check_count(number, f"{where}, a number in params"))
        if entry.get("names") is not None:
            sizes = [len(group["params"]) for group in groups]
            named_sizes = []
            for group in _check_list(entry["names"], f"{where}, names"):
                named_sizes.append(len(_check_strings(group, f"{where}, names")))
            if named_sizes != sizes:
                raise _Unfit(f"{where}, names", entry["names"], "a name for each parameter")
        if len(set(numbers)) < len(numbers):
            raise _Unfit(f"{where}, params", numbers[:5], "numbers without duplicates")
        values = _check_dict(_get(state, "state", f"{where}, "), f"{where}, state")
        for number, own in values.items():
            if number not in numbers:
                raise _Unfit(f"{where}, a key of state", number, "the number of a parameter")
            _check_named(own, f"{where}, state of parameter {number}")


def _check_settings(groups: list[Any], optimizer: Optimizer, where: str) -> None:
    """Check the settings that the script's optimizer has too: they must be numbers if its are."""
    for group, own in zip(groups, optimizer.param_groups, strict=False):
        for key, value in group.items():
            if key == "params" or key not in own:
                continue
            pairs = [(own[key], value)]
            if isinstance(own[key], (tuple, list)):
                if not isinstance(value, (tuple, list)):
                    raise _Unfit(f"{where}, {key}", value, "a tuple of numbers")
                if len(value) != len(own[key]):
                    raise _Unfit(f"{where}, {key}", value, f"{len(own[key])} numbers")
                pairs = list(zip(own[key], value, strict=True))
            for current, number in pairs:
                _check_setting(current, number, f"{where}, {key}")
                if key == "betas" and not 0 <= float(number) < 1:
                    raise _Unfit(f"{where}, {key}", float(number), "a number from 0 to below 1")


def _check_setting(current: Any, value: Any, where: str) -> None:
    """Check a setting of an optimizer against the script's."""
    if isinstance(current, bool) and type(value) is not bool:
        raise _Unfit(where, value, "True or False")
    if current is None and not (value is None or isinstance(value, bool) or is_number(value)):
        raise _Unfit(where, value, "None, True or False")
    if isinstance(current, bool) or not is_number(current):
        return
    if value is None or isinstance(value, bool):
        raise _Unfit(where, value, "a number")
    if not is_number(value) or (isinstance(value, int) and abs(value) > LARGEST):
        raise _Unfit(where, value, "a number")
    if not math.isfinite(float(value)) and math.isfinite(float(current)):
        raise _Unfit(where, float(value), "a finite number")


def _check_shapes(
    values: Mapping[int, Any], numbers: list[int], optimizer: Optimizer, where: str
) -> None:
    """Check the states of torch's optimizers whose tensors have the shape of their parameter."""
    parameters: list[Any] = []
    for group in optimizer.param_groups:
        parameters.extend(group["params"])
    kind = type(optimizer)
    is_known = kind.__module__.startswith("torch.optim") and kind.__name__ not in OF_OWN_SHAPES
    if not is_known or len(parameters) != len(numbers):
        return
    filled = [own for own in values.values() if own]
    for own in filled:
        if own.keys() != filled[0].keys():
            expected = f"of the names {list(filled[0])}"[:200]
            raise _Unfit(f"{where}, state of a parameter", list(own), expected)
    for number, own in values.items():
        for key, value in own.items():
            place = f"{where}, {key} of parameter {number}"
            if key == "step" and (not is_number(value) or not 0 <= float(value) <= LARGEST):
                raise _Unfit(place, value, "a number of 0 or more")
            if value is None and key != "momentum_buffer":
                raise _Unfit(place, value, "a tensor or a number")
            tensors = [isinstance(other[key], Tensor) for other in filled if other[key] is not None]
            if value is not None and len(set(tensors)) > 1:
                raise _Unfit(place, value, "of the same type for each parameter")
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in values.get(number, {}).items():
            place = f"{where}, {key} of parameter {number}"
            if isinstance(value, (str, bytes, dict)):
                raise _Unfit(place, value, "a tensor or a number")
            if not isinstance(value, Tensor) or is_lazy(parameter):
                continue
            fits = value.shape == parameter.shape
            if value.numel() <= 1:
                fits = value.numel() in (1, parameter.numel())
            if value.layout != torch.strided or value.is_quantized or not fits:
                raise _Unfit(place, value, f"a tensor {tuple(parameter.shape)}")
            if value.is_complex() and not parameter.is_complex():
                raise _Unfit(place, value, "a tensor of real numbers")


# --- random states ---


def check_random(states: Any, where: str) -> None:
    """Check the random states of a run by setting them on generators that nothing else uses."""
    _check_named(states, where)
    _check_python(_get(states, "python", f"{where} "), f"{where} python")
    numpy_state = _get(states, "numpy", f"{where} ")
    _check_numpy(numpy_state, f"{where} numpy")
    kind = numpy_state["bit_generator"]
    used = np.random.get_state(legacy=False)["bit_generator"]
    if kind != used:
        raise _Unfit(f"{where} numpy bit_generator", kind, f"{used}, as NumPy's own has")
    size = torch.get_rng_state().numel()
    _check_torch(_get(states, "torch", f"{where} "), f"{where} torch", size)
    for state in _check_list(_get(states, "device", f"{where} "), f"{where} device"):
        _check_torch(state, f"{where} device")
    generators = _get(states, "generators", f"{where} ")
    if isinstance(generators, dict):
        generators = list(generators.values())
    for state in _check_list(generators, f"{where} generators"):
        _check_generator(state, f"{where} generators")
    for epoch in _check_list(_get(states, "epochs", f"{where} "), f"{where} epochs"):
        _check_count(epoch, f"{where} epochs")
    _check_attributes(states.get("attributes", {}), f"{where} attributes", {})


def _check_generator(state: Any, where: str) -> None:
    """Check the state of a generator of torch, NumPy or Python."""
    if isinstance(state, Tensor):
        _check_torch(state, where)
    elif isinstance(state, dict):
        _check_numpy(state, where)
    else:
        _check_python(state, where)


def _check_python(state: Any, where: str) -> None:
    """Check a state of Python's random.

    `setstate` does not look at the third part, the next number of `gauss`.
    """
    try:
        version, words, gauss = state
        random.Random().setstate((version, _convert_words(words), gauss))
        is_fit = gauss is None or type(gauss) is float
    except Exception:
        is_fit = False
    if not is_fit:
        raise _Unfit(where, state, "a state of Python's random")


def _check_torch(state: Any, where: str, size: int | None = None) -> None:
    """Check a state of torch's random, with so many bytes if `size` is given."""
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        raise _Unfit(where, state, "a tensor of bytes")
    if state.ndim != 1 or state.layout != torch.strided:
        raise _Unfit(where, state, "a tensor of bytes")
    own = torch.get_rng_state().numel()
    if size is not None and state.numel() != size:
        raise _Unfit(where, state, f"a tensor of {size} bytes")
    if state.numel() == own:
        try:
            torch.Generator().set_state(state.contiguous())
        except RuntimeError:
            raise _Unfit(where, state, "a state of torch's generator") from None


def _check_numpy(state: Any, where: str) -> None:
    """Check a state of NumPy's random.

    NumPy accepts a position outside its array, and reads memory there.
    """
    _check_named(state, where)
    kind = _get(state, "bit_generator", f"{where} ")
    if kind not in BIT_GENERATORS:
        if isinstance(kind, str) and not hasattr(np.random, kind):
            return  # of another package, which has its own check
        raise _Unfit(f"{where} bit_generator", kind, "one of NumPy's")
    for key in ("has_gauss", "has_uint32"):
        if key in state and not (isinstance(state[key], int) and state[key] in (0, 1)):
            raise _Unfit(f"{where} {key}", state[key], "0 or 1")
    for key in ("gauss", "uinteger"):
        if key in state and not isinstance(state[key], (int, float)):
            raise _Unfit(f"{where} {key}", state[key], "a number")
    inner = _check_named(_get(state, "state", f"{where} "), f"{where} state")
    if kind == "MT19937":
        words = _convert_words(_get(inner, "key", f"{where} "))
        _check_list(words, f"{where} key")
        state = {**state, "state": {**inner, "key": words}}
        if len(words) != WORDS or not all(_is_count(word) and word < 2**32 for word in words):
            raise _Unfit(f"{where} key", f"{len(words)} words", f"{WORDS} words of 32 bits")
        if not _is_count(_get(inner, "pos", f"{where} ")) or inner["pos"] > WORDS:
            raise _Unfit(f"{where} pos", inner["pos"], f"a position of 0 to {WORDS}")
    if kind == "Philox":
        buffer = _check_list(_get(state, "buffer", f"{where} "), f"{where} buffer")
        position = _get(state, "buffer_pos", f"{where} ")
        if len(buffer) != 4 or not _is_count(position) or position > 4:
            raise _Unfit(f"{where} buffer_pos", position, "a position of 0 to 4")
    try:
        generator = getattr(np.random, kind)()
        generator.state = _convert_lists(state)
    except Exception:
        raise _Unfit(where, state, "a state of NumPy's random") from None


def _convert_words(words: Any) -> Any:
    """Convert the words of a Mersenne Twister to a tuple, if they are an array."""
    if type(words) is dict and words.keys() == {ARRAY}:
        array = words[ARRAY]
        if isinstance(array, Tensor) and array.dtype == torch.int64 and array.ndim == 1:
            if array.layout == torch.strided and array.numel() <= WORDS + 1:
                return tuple(array.tolist())
    return words


def _convert_lists(state: Any) -> Any:
    """Convert the lists in a state to the arrays that NumPy expects."""
    if isinstance(state, dict):
        return {key: _convert_lists(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return np.array(state, np.uint64)
    return state


# --- callbacks ---


def check_callbacks(
    states: Mapping[str, Any], callbacks: list[Callback], model: nn.Module, path: Path
) -> None:
    """Check the states of minikeras's own callbacks: numbers must be numbers, weights must fit.

    Raises:
        CheckpointError: a value does not.
    """
    from minikeras.checkpoint.state import named  # imported here, since that module imports this

    for name, callback in named(callbacks):
        if not type(callback).__module__.startswith("minikeras.callbacks") or name not in states:
            continue
        written = states[name]
        for key, value in callback.state_dict().items():
            if key in written and is_number(value) and not is_number(written[key]):
                problem = _Unfit(f"callback {name}, {key}", written[key], "a number")
                raise CheckpointError(f"{path} is damaged: {problem}. {remedy_of_fit(path)}")
        weights = written.get("weights")
        has_weights = weights is not None and (type(weights) is not dict or weights)
        if getattr(callback, "keeps_weights", False) and has_weights:
            check_weights(model, weights, path, remedy_of_fit)


# --- all or nothing ---


def untouched(restore: F) -> F:
    """Decorate a method that loads a state so that a failure leaves everything as it was."""

    @functools.wraps(restore)
    def all_or_nothing(self: Any, callbacks: list[Callback], say: Any) -> Any:
        if self.state is None:
            return restore(self, callbacks, say)
        check_callbacks(self.state["callbacks"], callbacks, self.model, self.path)
        put_back = _remember(self, callbacks)
        try:
            return restore(self, callbacks, say)
        except Exception as error:
            put_back()
            # Users may turn warnings into errors.
            if isinstance(error, (CheckpointError, Warning)):
                raise
            first = (str(error).splitlines() or [""])[0]
            raise CheckpointError(
                f"{self.path} could not be loaded: {type(error).__name__}: {first} The model is "
                f"unchanged. {remedy_of_fit(self.path)}"
            ) from error

    return cast("F", all_or_nothing)


def _remember(checkpoint: Any, callbacks: list[Callback]) -> Callable[[], None]:
    """Return a function that restores all that loading a state may change."""
    model = checkpoint.model
    run = checkpoint.run
    randomness = checkpoint.randomness
    modules = [model]
    if isinstance(run.loss_func, nn.Module):
        modules.append(run.loss_func)
    tensors = []
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if not is_lazy(tensor):
                tensors.append((tensor, tensor.detach().clone(), tensor.requires_grad))
    optimizers = []
    for optimizer in run.optimizers.values():
        optimizers.append((optimizer, copy.deepcopy(optimizer.state_dict())))
    states = [(callback, copy.deepcopy(callback.state_dict())) for callback in callbacks]
    put_eval_back = way_back_of_eval(model)
    epochs = run.epochs
    stop_training = model.stop_training
    random_states = randomness.states()
    put_steps_back = run.stepper.way_back()
    graphs = run.engine.state_dict()

    def put_back() -> None:
        for tensor, before, requires_grad in tensors:
            tensor.detach().copy_(before)
            if tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
        for optimizer, before in optimizers:
            optimizer.load_state_dict(before)
        for callback, before in states:
            try:
                callback.load_state_dict(before)
            except Exception:
                continue  # it accepts no state, and starts in its own way
        put_eval_back()
        run.epochs = epochs
        model.stop_training = stop_training
        put_steps_back()
        run.kept["unfinished"] = None
        run.train.totals.reset()
        run.engine.expect_steps([])
        run.engine.load_state_dict(graphs)
        randomness.restore(random_states)

    return put_back
