"""The values of a run's state, each looked at before any is used: a file may have been changed since it was written.

check_state       all that a file must have, by type and range; what it has besides is left alone
check_contents    what must fit the model and the optimizers, by shape and name
check_random      random states that NumPy, torch and Python can take: NumPy's own check lets a position crash Python
untouched         put a model, its optimizers, callbacks and random states back where taking a state over fails
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

from minikeras.callbacks import Callback, EarlyStopping
from minikeras.checkpoint.file import remedy_of_fit
from minikeras.checkpoint.plain import restored
from minikeras.checkpoint.weights import buffers_of, check_weights, misfit, plain_name
from minikeras.errors import CheckpointError, described, is_number
from minikeras.reachable import is_order, is_plain

if TYPE_CHECKING:
    from minikeras.run import Run

F = TypeVar("F", bound=Callable[..., Any])
LARGEST = 2**53  # of a count
WORDS = 624  # of a Mersenne Twister's state
BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")  # NumPy's
OF_OWN_SHAPES = (
    "LBFGS",
    "Adafactor",
    "Muon",
    "SparseAdam",
)  # torch's whose state has not its parameter's shape alone


class _Unfit(Exception):
    """A value that no run has written: where it is, what it is, what it should be; '' if it is missing."""

    def __init__(self, where: str, value: Any, expected: str) -> None:
        super().__init__(
            f"{where} is {shown(value)} and not {expected}" if expected else f"{where} is missing"
        )


def shown(value: Any) -> str:
    """A value in a message, however long it is."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)[:60]
    return described(value)[:60]


def check_state(state: Any, path: Path) -> None:
    """Check the values of a run's state by themselves.

    Raises:
        CheckpointError: one is of another type or out of its range; the message names it.
    """
    with _refused(path):
        _check_layout(state)
        _check_optimizers(_get(state, "optimizers"))
        _check_groups(state.get("groups", {}), state["optimizers"])
        for number, rank in enumerate(_list(state.get("ranks", []), "ranks")):
            _check_of_process(rank, f"ranks {number}: ")


def check_contents(state: Any, model: nn.Module, run: Run, path: Path) -> None:
    """Check the values of a run's state beside those of the model and the optimizers, which it is known to be of.

    Raises:
        CheckpointError: one does not fit them; the message names it.
    """
    with _refused(path):
        _check_buffers(state["buffers"], model)
        _check_frozen(state.get("frozen"), model, run)
        _check_loss(state, run.loss_func)
        _check_attributes(
            state.get("attributes", {}), "attributes", {"model": model, "loss_func": run.loss_func}
        )
        for name, optimizer in run.optimizers.items():
            written = state["optimizers"][name]["state"]
            where = place_of(name)
            numbers = [number for group in written["param_groups"] for number in group["params"]]
            _check_settings(written["param_groups"], optimizer, where)
            _check_shapes(written["state"], numbers, optimizer, where)


def place_of(name: str) -> str:
    """Say which optimizer a message is about: the one of that name."""
    return f"optimizer {name!r}" if name else "the optimizer"


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Make what is found a CheckpointError."""
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
    if key not in state:
        raise _Unfit(where + key, None, "")
    return state[key]


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= LARGEST


def _count(value: Any, where: str, least: int = 0) -> int:
    if not _is_count(value, least):
        raise _Unfit(where, value, f"a whole number of {least} or more")
    return int(value)


def _dict(value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _Unfit(where, value, "a dict")
    return value


def _named(value: Any, where: str) -> dict[str, Any]:
    for key in _dict(value, where):
        if not isinstance(key, str):
            raise _Unfit(f"a key of {where}", key, "a string")
    return dict(value)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise _Unfit(where, value, "a list")
    return list(value)


def _strings(value: Any, where: str) -> list[str]:
    for item in _list(value, where):
        if not isinstance(item, str):
            raise _Unfit(f"an item of {where}", item, "a string")
    return list(value)


def _numbers(value: Any, where: str) -> None:
    for name, number in _named(value, where).items():
        if not is_number(number):
            raise _Unfit(f"{where} {name}", number, "a number")
        if isinstance(number, int) and abs(number) > LARGEST**2:
            raise _Unfit(f"{where} {name}", number, "a number that a float can be")


# --- the parts of a state ---


def _check_layout(state: Mapping[str, Any]) -> None:
    first = _count(_get(state, "first"), "first", 1)
    last = _count(_get(state, "last"), "last", 1)
    if type(_get(state, "stopped")) is not bool:
        raise _Unfit("stopped", state["stopped"], "True or False")
    history = _list(_get(state, "history"), "history")
    for number, row in enumerate(history):
        if not isinstance(row, (list, tuple)) or len(row) != 2:
            raise _Unfit(f"row {number} of history", row, "a pair of dicts")
        _numbers(row[0], f"row {number} of history,")
        _numbers(row[1], f"row {number} of history, rate")
    position = _named(_get(state, "position"), "position")
    if not {"epoch", "step", "logs"} == position.keys():
        raise _Unfit("position", position, "epoch, step and logs")
    epoch = _count(position["epoch"], "position epoch", 1)
    _count(position["step"], "position step")
    if position["logs"] is not None:
        _numbers(position["logs"], "position logs")
    if epoch != len(history) + 1 or not first <= epoch <= last + 1:
        expected = (
            f"that after the {len(history)} epochs of history, of a fit of epochs {first} to {last}"
        )
        raise _Unfit("position epoch", epoch, expected)
    _named(_get(state, "model"), "model")
    _named(_get(state, "buffers"), "buffers")
    _named(state.get("loss buffers", {}), "loss buffers")
    _named(_get(state, "loss"), "loss")
    for key, buffers in (
        ("buffers", _get(state, "buffers")),
        ("loss buffers", state.get("loss buffers", {})),
    ):
        for name, buffer in _named(buffers, key).items():
            if not isinstance(buffer, Tensor):
                raise _Unfit(f"buffer {name}", buffer, "a tensor")
    if state.get("frozen") is not None:
        _strings(state["frozen"], "frozen")
    for name, own in _named(_get(state, "callbacks"), "callbacks").items():
        _named(own, f"callback {name}")
    _check_begun(state.get("begun"))
    if state.get("data") is not None:
        _count(state["data"], "data")
    if state.get("in_eval") is not None:
        _strings(state["in_eval"], "in_eval")
    _check_of_process(state)
    missing = state["totals"]["sums"].keys() - (position["logs"] or {}).keys()
    if position["logs"] is not None and missing:
        raise _Unfit(f"position logs {min(missing)}", None, "")


def _check_begun(begun: Any) -> None:
    if begun is None:  # of older files
        return
    _named(begun, "begun")
    for name, groups in _named(_get(begun, "optimizers", "begun "), "begun optimizers").items():
        for group in _list(groups, f"begun optimizers {name!r}"):
            _numbers(group, f"begun optimizers {name!r},")
    for name, groups in _named(begun.get("groups", {}), "begun groups").items():
        for group in _list(groups, f"begun groups {name!r}"):
            _strings(group, f"begun groups {name!r}")
    _strings(_get(begun, "frozen", "begun "), "begun frozen")
    for key in ("loss frozen", "in_eval"):
        _strings(begun.get(key, []), f"begun {key}")
    for name, setting in _named(begun.get("compile", {}), "begun compile").items():
        if setting is not None and not isinstance(setting, (str, bool, int, float)):
            raise _Unfit(f"begun compile {name}", setting, "a number or a string")


def _check_of_process(state: Mapping[str, Any], where: str = "") -> None:
    """What each of several processes has of its own."""
    _dict(state, where or "the state")
    _check_totals(_get(state, "totals", where), f"{where}totals")
    check_random(_get(state, "random", where), f"{where}random")
    train = _get(state, "train", where)
    if train is not None:
        _named(train, f"{where}train")
        seen = _count(_get(train, "seen", f"{where}train "), f"{where}train seen")
        if train.get("steps") is not None:
            steps = _count(train["steps"], f"{where}train steps")
            if seen > steps:
                raise _Unfit(f"{where}train seen", seen, f"one of {steps} batches")
        _get(train, "loader", f"{where}train ")
        check_random(_get(train, "start", f"{where}train "), f"{where}train start")
        for epoch in _list(train.get("epochs", []), f"{where}train epochs"):
            if epoch is not None:
                _count(epoch, f"{where}train epochs")
        if train.get("draws") is not None:
            _check_draws(train["draws"], f"{where}train draws")
    _check_precision(state.get("precision"), f"{where}precision")


def _check_totals(totals: Any, where: str) -> None:
    _named(totals, where)
    sums = _named(_get(totals, "sums", f"{where} "), f"{where} sums")
    counts = _named(_get(totals, "counts", f"{where} "), f"{where} counts")
    if sums.keys() != counts.keys():
        raise _Unfit(f"{where} sums", list(sums), f"of the names of counts, {list(counts)}"[:200])
    for name in sums:
        for value, what in ((sums[name], "sums"), (counts[name], "counts")):
            if not is_number(value) or (isinstance(value, Tensor) and value.ndim):
                raise _Unfit(f"{where} {what} {name}", value, "a number")
        if not isinstance(sums[name], Tensor) or not sums[name].is_floating_point():
            raise _Unfit(f"{where} sums {name}", sums[name], "a 0-d tensor of floats")
        if not float(counts[name]) >= 0 or math.isinf(float(counts[name])):
            raise _Unfit(f"{where} counts {name}", float(counts[name]), "a count of 0 or more")
        if float(counts[name]) == 0 and float(sums[name]) != 0:
            raise _Unfit(f"{where} sums {name}", float(sums[name]), "0, as it is of a count of 0")
    if type(_get(totals, "updated", f"{where} ")) is not bool:
        raise _Unfit(f"{where} updated", totals["updated"], "True or False")
    _named(_get(totals, "objects", f"{where} "), f"{where} objects")
    _strings(totals.get("names", []), f"{where} names")


def _check_precision(precision: Any, where: str) -> None:
    if precision is None:
        return
    _named(precision, where)
    _count(_get(precision, "accumulate", f"{where} "), f"{where} accumulate", 1)
    for name, window in _named(_get(precision, "windows", f"{where} "), f"{where} windows").items():
        _named(window, f"{where} windows {name!r}")
        _count(
            _get(window, "batches", f"{where} windows {name!r} "),
            f"{where} windows {name!r} batches",
        )
    for name, gradients in _named(
        _get(precision, "gradients", f"{where} "), f"{where} gradients"
    ).items():
        for gradient in _list(gradients, f"{where} gradients {name!r}"):
            if gradient is not None and not isinstance(gradient, (Tensor, dict)):
                raise _Unfit(f"{where} gradients {name!r}", gradient, "a tensor")


def _check_loss(state: Mapping[str, Any], loss_func: Any) -> None:
    """The loss's own buffers and frozen parameters; `check_buffers` looks for the layers."""
    for name, buffer in state.get("loss buffers", {}).items():
        if not isinstance(buffer, Tensor):
            raise _Unfit(f"buffer {name} of the loss", buffer, "a tensor")
    if state.get("loss frozen") is None:
        return
    known: set[str] = set()
    if isinstance(loss_func, nn.Module):
        known = {plain_name(name) for name, _ in loss_func.named_parameters()}
    for name in _strings(state["loss frozen"], "loss frozen"):
        if plain_name(name) not in known:
            raise _Unfit("loss frozen", name, "a parameter of the loss")


def _check_attributes(states: Any, where: str, roots: Mapping[str, Any]) -> None:
    """Plain values, under names that hide no method: they become attributes of the model's layers and of data."""
    for holder, own in _named(states, where).items():
        methods = _methods_of(holder, roots)
        for name, value in _named(own, f"{where} {holder}").items():
            if not name.isidentifier() or name in methods or name == "training":
                raise _Unfit(f"a key of {where} {holder}", name, "the name of an attribute")
            if not is_plain(restored(value), floats=True) and not is_order(value):
                raise _Unfit(
                    f"{where} {holder}.{name}", value, "a number, a string, or a short list of them"
                )


def _methods_of(holder: str, roots: Mapping[str, Any]) -> set[str]:
    """The names of methods of an object that is named by its path, as `model.net`; of others those of object."""
    root, _, path = holder.partition(".")
    value = roots.get(root)
    if isinstance(value, nn.Module) and path:
        value = dict(value.named_modules()).get(path)
    return {name for name in dir(type(value)) if callable(getattr(type(value), name, None))}


def _check_groups(groups: Any, optimizers: Mapping[str, Any]) -> None:
    """How many groups each optimizer had as the epoch began."""
    for name, count in _named(groups, "groups").items():
        _count(count, f"groups {name!r}", 1)
        if name not in optimizers:
            raise _Unfit("a key of groups", name, "the name of an optimizer")


def _check_draws(draws: Any, where: str) -> None:
    """The states of generators by the number of the sampler's step."""
    for number, states in _named(draws, where).items():
        if not number.isdecimal():
            raise _Unfit(f"a key of {where}", number, "a number")
        for name, state in _named(states, f"{where} {number}").items():
            place = f"{where} {number}, {name}"
            if name == "the global numpy":
                _check_numpy(_numpy_dict(state, place), place)
            else:
                _check_generator(state, place)


def _numpy_dict(state: Any, where: str) -> Any:
    """NumPy's tuple as its dict."""
    parts = _list(restored(state), where)
    if len(parts) != 5 or not isinstance(parts[1], np.ndarray):
        raise _Unfit(where, state, "a state of NumPy's random")
    inner = {"key": parts[1].tolist(), "pos": parts[2]}
    return {"bit_generator": parts[0], "state": inner, "has_gauss": parts[3], "gauss": parts[4]}


def _check_buffers(buffers: Any, model: nn.Module) -> None:
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
            if (
                module is None
                or getattr(module, last, None) is not None
                or hasattr(nn.Module, last)
            ):
                raise _Unfit(f"buffer {name}", buffer, "one of the model's")
            continue
        if is_lazy(current):
            continue
        if current.shape == buffer.shape and (problem := misfit(current, buffer)):
            raise _Unfit(f"buffer {name}", buffer, f"one that the model can take: it is {problem}")


def _check_frozen(names: Any, model: nn.Module, run: Run) -> None:
    if names is None:
        return
    known = {plain_name(name) for name, _ in model.named_parameters()}
    for name in names:
        if plain_name(name) not in known:
            raise _Unfit("frozen", name, "a parameter of the model")
    trained = known - {plain_name(name) for name in names}
    loss_is_trained = isinstance(run.loss_func, nn.Module) and any(
        True for _ in run.loss_func.parameters()
    )
    if known and not trained and not loss_is_trained:
        raise _Unfit("frozen", names, "a part of the parameters: it is all of them")


def _check_optimizers(written: Any) -> None:
    for name, entry in _named(written, "optimizers").items():
        where = place_of(name)
        _named(entry, where)
        if not isinstance(_get(entry, "class", f"{where}, "), str):
            raise _Unfit(f"{where}, class", entry["class"], "a string")
        state = _named(_get(entry, "state", f"{where}, "), f"{where}, state")
        groups = _list(_get(state, "param_groups", f"{where}, "), f"{where}, param_groups")
        numbers: list[int] = []
        for group in groups:
            params = _list(_get(_named(group, where), "params", f"{where}, "), f"{where}, params")
            numbers += [_count(number, f"{where}, a number in params") for number in params]
        if entry.get("names") is not None:
            named = [
                _strings(group, f"{where}, names")
                for group in _list(entry["names"], f"{where}, names")
            ]
            if [len(group) for group in named] != [len(group["params"]) for group in groups]:
                raise _Unfit(f"{where}, names", entry["names"], "a name for each parameter")
        if len(set(numbers)) < len(numbers):
            raise _Unfit(f"{where}, params", numbers[:5], "numbers that are there once each")
        values = _dict(_get(state, "state", f"{where}, "), f"{where}, state")
        for number, own in values.items():
            if number not in numbers:
                raise _Unfit(f"{where}, a key of state", number, "the number of a parameter")
            _named(own, f"{where}, state of parameter {number}")


def _check_settings(groups: list[Any], optimizer: Optimizer, where: str) -> None:
    """Those that the script's optimizer has too: numbers where it has numbers."""
    for group, own in zip(groups, optimizer.param_groups, strict=False):
        for key, value in group.items():
            if key == "params" or key not in own:
                continue
            if isinstance(own[key], (tuple, list)) and not isinstance(value, (tuple, list)):
                raise _Unfit(f"{where}, {key}", value, "a tuple of numbers")
            pairs = [(own[key], value)]
            if isinstance(own[key], (tuple, list)):
                pairs = list(zip(own[key], value, strict=False))
                if len(value) != len(own[key]):
                    raise _Unfit(f"{where}, {key}", value, f"{len(own[key])} numbers")
            for current, number in pairs:
                _check_setting(current, number, f"{where}, {key}")
                if key == "betas" and not 0 <= float(number) < 1:
                    raise _Unfit(f"{where}, {key}", float(number), "a number from 0 to below 1")


def _check_setting(current: Any, value: Any, where: str) -> None:
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
    """Of torch's optimizers whose tensors have their parameter's shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kind = type(optimizer)
    is_known = kind.__module__.startswith("torch.optim") and kind.__name__ not in OF_OWN_SHAPES
    if not is_known or len(parameters) != len(numbers):
        return
    filled = [own for own in values.values() if own]
    for own in filled:
        if own.keys() != filled[0].keys():
            raise _Unfit(
                f"{where}, state of a parameter", list(own), f"of the names {list(filled[0])}"[:200]
            )
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
            if (
                value.layout != torch.strided
                or value.is_quantized
                or value.numel() not in (1, parameter.numel())
            ):
                raise _Unfit(place, value, f"a tensor {tuple(parameter.shape)}")
            if value.numel() > 1 and value.shape != parameter.shape:
                raise _Unfit(place, value, f"a tensor {tuple(parameter.shape)}")
            if value.is_complex() and not parameter.is_complex():
                raise _Unfit(place, value, "a tensor of real numbers")


# --- random states ---


def check_random(states: Any, where: str) -> None:
    """Check the random states of a run by trying them on generators that nothing draws from."""
    _named(states, where)
    _check_python(_get(states, "python", f"{where} "), f"{where} python")
    numpy_state = _get(states, "numpy", f"{where} ")
    _check_numpy(numpy_state, f"{where} numpy")
    used = np.random.get_state(legacy=False)["bit_generator"]
    if numpy_state["bit_generator"] != used:
        raise _Unfit(
            f"{where} numpy bit_generator",
            numpy_state["bit_generator"],
            f"{used}, as NumPy's own has",
        )
    _check_torch(
        _get(states, "torch", f"{where} "), f"{where} torch", size=torch.get_rng_state().numel()
    )
    for state in _list(_get(states, "device", f"{where} "), f"{where} device"):
        _check_torch(state, f"{where} device")
    generators = _get(states, "generators", f"{where} ")
    for state in (
        generators.values()
        if isinstance(generators, dict)
        else _list(generators, f"{where} generators")
    ):
        _check_generator(state, f"{where} generators")
    for epoch in _list(_get(states, "epochs", f"{where} "), f"{where} epochs"):
        _count(epoch, f"{where} epochs")
    _check_attributes(states.get("attributes", {}), f"{where} attributes", {})


def _check_generator(state: Any, where: str) -> None:
    if isinstance(state, Tensor):
        _check_torch(state, where)
    elif isinstance(state, dict):
        _check_numpy(state, where)
    else:
        _check_python(state, where)


def _check_python(state: Any, where: str) -> None:
    try:
        random.Random().setstate(state)
    except Exception:
        raise _Unfit(where, state, "a state of Python's random") from None


def _check_torch(state: Any, where: str, size: int | None = None) -> None:
    if (
        not isinstance(state, Tensor)
        or state.dtype != torch.uint8
        or state.ndim != 1
        or state.layout != torch.strided
    ):
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
    """NumPy takes a position that is out of its array, and reads there."""
    _named(state, where)
    kind = _get(state, "bit_generator", f"{where} ")
    if kind not in BIT_GENERATORS:
        if isinstance(kind, str) and not hasattr(np.random, kind):
            return  # of another package: its own check has to do
        raise _Unfit(f"{where} bit_generator", kind, "one of NumPy's")
    for key in ("has_gauss", "has_uint32", "gauss", "uinteger"):
        if key in state and not isinstance(state[key], (int, float)):
            raise _Unfit(f"{where} {key}", state[key], "a number")
    inner = _named(_get(state, "state", f"{where} "), f"{where} state")
    if kind == "MT19937":
        words = _list(_get(inner, "key", f"{where} "), f"{where} key")
        if len(words) != WORDS or not all(_is_count(word) and word < 2**32 for word in words):
            raise _Unfit(f"{where} key", f"{len(words)} words", f"{WORDS} words of 32 bits")
        if not _is_count(_get(inner, "pos", f"{where} ")) or inner["pos"] > WORDS:
            raise _Unfit(f"{where} pos", inner["pos"], f"a position of 0 to {WORDS}")
    if kind == "Philox":
        buffer = _list(_get(state, "buffer", f"{where} "), f"{where} buffer")
        position = _get(state, "buffer_pos", f"{where} ")
        if len(buffer) != 4 or not _is_count(position) or position > 4:
            raise _Unfit(f"{where} buffer_pos", position, "a position of 0 to 4")
    try:
        trial = getattr(np.random, kind)()
        trial.state = _arrays(state)
    except Exception:
        raise _Unfit(where, state, "a state of NumPy's random") from None


def _arrays(state: Any) -> Any:
    """As NumPy takes it: arrays for lists."""
    if isinstance(state, dict):
        return {key: _arrays(value) for key, value in state.items()}
    return np.array(state, np.uint64) if isinstance(state, (list, tuple)) else state


# --- callbacks ---


def check_callbacks(
    states: Mapping[str, Any], callbacks: list[Callback], model: nn.Module, path: Path
) -> None:
    """Check the states of the callbacks that come with minikeras: numbers where they have numbers, weights that fit.

    Raises:
        CheckpointError: one is something else.
    """
    from minikeras.checkpoint.state import named  # as it is needed: that module imports this one

    for name, callback in named(callbacks):
        if not type(callback).__module__.startswith("minikeras.callbacks") or name not in states:
            continue
        given = states[name]
        for key, value in callback.state_dict().items():
            if key in given and is_number(value) and not is_number(given[key]):
                problem = _Unfit(f"callback {name}, {key}", given[key], "a number")
                raise CheckpointError(f"{path} is damaged: {problem}. {remedy_of_fit(path)}")
        weights = given.get("weights")
        if isinstance(callback, EarlyStopping) and (
            weights is not None and (type(weights) is not dict or weights)
        ):
            check_weights(model, given["weights"], path, remedy_of_fit)


# --- all or nothing ---


def untouched(restore: F) -> F:
    """Decorate a method that takes a state over: where it fails, all is as it was before."""

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
            if isinstance(
                error, (CheckpointError, Warning)
            ):  # a user may turn warnings into errors
                raise
            first = (str(error).splitlines() or [""])[0]
            raise CheckpointError(
                f"{self.path} could not be taken over: {type(error).__name__}: {first} The model "
                f"is as it was. {remedy_of_fit(self.path)}"
            ) from error

    return cast("F", all_or_nothing)


def _remember(checkpoint: Any, callbacks: list[Callback]) -> Callable[[], None]:
    """What puts back all that taking a state over changes."""
    model, run, randomness = checkpoint.model, checkpoint.run, checkpoint.randomness
    modules = [model]
    if isinstance(run.loss_func, nn.Module):
        modules.append(run.loss_func)
    tensors = []
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if not is_lazy(tensor):
                tensors.append((tensor, tensor.detach().clone(), tensor.requires_grad))
    optimizers = [
        (optimizer, copy.deepcopy(optimizer.state_dict())) for optimizer in run.optimizers.values()
    ]
    states = [(callback, copy.deepcopy(callback.state_dict())) for callback in callbacks]
    epochs, stop, drawn = run.epochs, model.stop_training, randomness.states()

    def put_back() -> None:
        for tensor, before, trained in tensors:
            tensor.detach().copy_(before)
            if tensor.is_leaf:
                tensor.requires_grad_(trained)
        for optimizer, before in optimizers:
            optimizer.load_state_dict(before)
        for callback, before in states:
            try:
                callback.load_state_dict(before)
            except Exception:
                continue  # one that takes no state: it has its own way to begin
        run.epochs, model.stop_training = epochs, stop
        run.under_way = None
        run.train.reset()
        run.carried_on.clear()
        randomness.restore(drawn)

    return put_back
