"""The error classes of minikeras, and the wording that its error messages share.

    Exception
    ├── ValueError, TypeError    bad input, as everywhere in Python
    └── RuntimeError
        ├── NotCompiledError     fit, evaluate or a part of the step before compile
        ├── ForwardError         a layer could not take its input
        └── CheckpointError      a file that cannot be loaded, or not into this model

Every message says what was expected, what was received and what to do.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import operator
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn


class NotCompiledError(RuntimeError):
    """`fit`, `evaluate` or a part of the step was called before `compile`."""


class ForwardError(RuntimeError):
    """A layer could not take the tensor that it received; raised by `summary`."""


class CheckpointError(RuntimeError):
    """A file of weights or of a run's state cannot be loaded.

    It is damaged, was not written by minikeras, or belongs to another model or run.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean ...?' if `name` is close to one of the `known` names, else ''.

    >>> did_you_mean("val_los", ["loss", "val_loss"])
    " Did you mean 'val_loss'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_positive_int(name: str, value: object, hint: str = "") -> int:
    """Return `value` as an int of 1 or more; refuse a bool, a string or a fraction.

    The `hint` is added to the message if `value` is data, such as a tensor.
    """
    return check_whole_number(name, value, least=1, hint=hint)


def check_whole_number(name: str, value: object, least: int, hint: str = "") -> int:
    """Return `value` as an int of `least` or more; refuse a bool, a string or a fraction.

    The `hint` is added to the message if `value` is data, such as a tensor.
    """
    number = least - 1  # refused
    if not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]
    if number < least:
        if value is None or isinstance(value, (int, float, str)):
            shown = f"{value!r}."
        else:
            shown = f"{describe(value)}.{hint}"
        raise ValueError(f"{name} must be a whole number of {least} or more, got {shown}")
    return number


def check_number_in_range(
    name: str, value: object, expected: str, holds: Callable[[float], bool] = lambda number: True
) -> float:
    """Return `value` as a float for which `holds` is true; refuse NaN, a bool and a string.

    `expected` says in words what must hold, for the message.
    """
    number = math.nan
    if is_number(value) and not isinstance(value, bool):
        number = float(value)  # type: ignore[arg-type]
    if math.isnan(number) or not holds(number):
        raise ValueError(f"{name} must be a number {expected}, got {value!r}.")
    return number


def check_one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Refuse a value that is not one of the known words."""
    words = list(known)
    if value not in words:
        choices = f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}"
        hint = did_you_mean(str(value), words)
        raise ValueError(f"{name} must be {choices}, got {value!r}.{hint}")


def check_bool(name: str, value: object) -> None:
    """Refuse a value that is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}.")


def describe(value: object) -> str:
    """Describe a value for an error message.

    Tensors and arrays are shown by shape and dtype, containers by their items.

    >>> import torch
    >>> describe((torch.zeros(4, 2), [1, "a"]))
    '(Tensor (4, 2) float32, [int, str])'
    """
    if isinstance(value, Tensor) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        shape = tuple(value.shape)
        return f"{type(value).__name__} {shape} {dtype_name(value.dtype)}"
    if isinstance(value, dict):
        items = [f"{key!r}: {describe(item)}" for key, item in value.items()]
        return "{" + ", ".join(items) + "}"
    if type(value) is tuple or type(value) is list:
        shown = [describe(item) for item in value[:4]]
        if len(value) > 4:
            shown.append("...")
        text = ", ".join(shown)
        return f"({text})" if isinstance(value, tuple) else f"[{text}]"
    return type(value).__name__


def write_instance(kind: type) -> str:
    """Write how an instance of a class is created, with the arguments that it needs.

    >>> write_instance(nn.MSELoss)
    'MSELoss()'
    >>> write_instance(nn.Linear)
    'Linear(in_features=..., out_features=...)'
    """
    try:
        parameters = list(inspect.signature(kind).parameters.values())
    except (TypeError, ValueError):  # a builtin may have no signature
        return f"{kind.__name__}(...)"
    needed = []
    for parameter in parameters:
        is_by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_by_name and parameter.default is parameter.empty:
            needed.append(f"{parameter.name}=...")
    return f"{kind.__name__}({', '.join(needed)})"


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype, or of a tensor's dtype: float32, not torch.float32."""
    return str(dtype.dtype if isinstance(dtype, Tensor) else dtype).removeprefix("torch.")


def is_number(value: object) -> bool:
    """Tell whether a value is one real number: of Python, of NumPy, or a tensor of one element."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "fiub"
    return isinstance(value, (int, float, np.integer, np.floating, np.bool_))


def find_failing_layer(error: BaseException, model: nn.Module) -> tuple[str, nn.Module, Any] | None:
    """Find the innermost layer of `model` in whose forward `error` was raised.

    Returns its name, the layer and its first argument.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_name != "forward":
            continue
        arguments = []
        for name in code.co_varnames[: code.co_argcount]:
            arguments.append(frame.f_locals.get(name))
        if len(arguments) < 2:
            continue
        layer = arguments[0]
        if isinstance(layer, nn.Module) and id(layer) in names:
            found = (names[id(layer)], layer, arguments[1])
    return found
