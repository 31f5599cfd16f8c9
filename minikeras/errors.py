"""The error classes of minikeras and the wording they share.

    Exception
    ├── ValueError, TypeError    bad input, as everywhere in Python
    └── RuntimeError
        ├── NotCompiledError     fit, evaluate or a step before compile
        ├── ForwardError         a layer could not take what reached it
        └── CheckpointError      a file that cannot be loaded, or not into this model

Every message says what was expected, what came and what to do.
"""

from __future__ import annotations

import difflib
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
    """A layer could not take the tensor that reached it; raised by `summary`."""


class CheckpointError(RuntimeError):
    """A file of weights or of a run's state is damaged, foreign, or of something else than what it is loaded into."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' when `name` is close to one of the `known` names, else ''.

    >>> did_you_mean("val_los", ["loss", "val_loss"])
    " Did you mean 'val_loss'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def positive_int(name: str, value: object, hint: str = "") -> int:
    """`value` as an int of 1 or more; a bool, a string or a fraction is refused, and of data with a `hint`."""
    return whole_number(name, value, least=1, hint=hint)


def whole_number(name: str, value: object, least: int, hint: str = "") -> int:
    """`value` as an int of `least` or more; a bool, a string or a fraction is refused, and of data with a `hint`."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if number < least:
        plain = value is None or isinstance(value, (int, float, str))
        shown = f"{value!r}." if plain else f"{described(value)}.{hint}"
        raise ValueError(f"{name} must be a whole number of {least} or more, got {shown}")
    return number


def real(
    name: str, value: object, expected: str, holds: Callable[[float], bool] = lambda number: True
) -> float:
    """`value` as a float of which something holds, `expected` in words; NaN, a bool and a string are refused."""
    number = math.nan if isinstance(value, bool) or not is_number(value) else float(value)  # type: ignore[arg-type]
    if math.isnan(number) or not holds(number):
        raise ValueError(f"{name} must be a number {expected}, got {value!r}.")
    return number


def one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Refuse a value that is not one of the known words."""
    if value not in (words := list(known)):
        hint = did_you_mean(str(value), words)
        raise ValueError(
            f"{name} must be {', '.join(map(repr, words[:-1]))} or {words[-1]!r}, got {value!r}.{hint}"
        )


def described(value: object) -> str:
    """A value as an error message shows it: tensors and arrays by shape and dtype, containers by their parts.

    >>> import torch
    >>> described((torch.zeros(4, 2), [1, "a"]))
    '(Tensor (4, 2) float32, [int, str])'
    """
    if isinstance(value, Tensor) or (hasattr(value, "shape") and hasattr(value, "dtype")):
        shape = tuple(value.shape)
        return f"{type(value).__name__} {shape} {dtype_name(value.dtype)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {described(part)}" for key, part in value.items()) + "}"
    if type(value) in (tuple, list):
        left, right = "()" if isinstance(value, tuple) else "[]"
        shown = [described(part) for part in value[:4]] + ["..."] * (len(value) > 4)  # type: ignore[index,arg-type]
        return left + ", ".join(shown) + right
    return type(value).__name__


def dtype_name(dtype: Any) -> str:
    """float32, not torch.float32; of a tensor or of a dtype."""
    return str(dtype.dtype if isinstance(dtype, Tensor) else dtype).removeprefix("torch.")


def is_number(value: object) -> bool:
    """Whether a value is one real number: of Python, of NumPy, or a tensor of one element."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "fiub"
    return isinstance(value, (int, float, np.integer, np.floating, np.bool_))


def failing_layer(error: BaseException, model: nn.Module) -> tuple[str, nn.Module, Any] | None:
    """The innermost layer of `model` in whose forward `error` was raised: (name, layer, its first argument)."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
        if (
            code.co_name == "forward"
            and len(given) > 1
            and isinstance(given[0], nn.Module)
            and id(given[0]) in names
        ):
            found = (names[id(given[0])], given[0], given[1])
    return found
