"""Copy a metric or a loss, so that calling the copy leaves the state of the original unchanged."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from minikeras.support.reachable import is_installed

LARGE = 2**20  # elements; a larger table is shared, since what a metric counts in is smaller
# where torch.compile keeps the function that it was given; the compiled one cannot be copied
COMPILED_FROM = "_torchdynamo_orig_callable"
# types whose values are shared and not copied
SHARED = (
    types.ModuleType,
    types.BuiltinFunctionType,
    type,
    Dataset,
    DataLoader,
    torch.device,
    torch.dtype,
)
SCALARS = (str, bytes, int, float, complex, bool, type(None), range, slice)


def twin_of(metric: Any) -> Any:
    """Copy a metric with all that it keeps.

    What a function can reach is copied too, its attributes, closure, defaults and globals: it may
    count its calls, or collect what it is given.

    Raises:
        Exception: something in it cannot be copied.
    """
    return Copier().copy(metric)


class Copier:
    """Copies what a function or an object keeps, and everything only once.

    Args:
        memo: the memo of `copy.deepcopy`; what has been copied already, such as a model.
    """

    def __init__(self, memo: dict[int, Any] | None = None) -> None:
        self.memo: dict[int, Any] = {} if memo is None else memo
        self.globals: dict[int, dict[str, Any]] = {}  # id of a module's globals -> their copy
        self.functions: dict[int, Any] = {}  # id of a function -> its copy

    def copy(self, value: Any) -> Any:
        """Copy a value; share modules, classes, data sets, large tables and parameters.

        The copy of a function that torch.compile has compiled is not compiled.
        """
        if isinstance(value, types.FunctionType):
            if hasattr(value, COMPILED_FROM):
                return self.copy(getattr(value, COMPILED_FROM))
            return value if _is_torchs(value) else self.copy_function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.copy(value.__func__), self.copy(value.__self__))
        if isinstance(value, functools.partial):
            function = self.copy(value.func)
            args = [self.copy(argument) for argument in value.args]
            return functools.partial(function, *args, **self.copy_values(value.keywords))
        if isinstance(value, (*SCALARS, *SHARED)) or _is_large(value):
            return value
        if isinstance(value, nn.Module):
            for parameter in value.parameters():
                self.memo.setdefault(id(parameter), parameter)
        return copy.deepcopy(value, self.memo)

    def copy_values(self, values: dict[str, Any]) -> dict[str, Any]:
        """Copy the values of a dict."""
        return {key: self.copy(value) for key, value in values.items()}

    def copy_function(self, function: types.FunctionType) -> Any:
        """Copy a function with its closure, defaults and globals."""
        if id(function) in self.functions:
            return self.functions[id(function)]
        reached = {}
        for name in _names_in(function.__code__):
            if name in function.__globals__:
                reached[name] = function.__globals__[name]
        originals = function.__closure__ or ()
        cells = tuple(types.CellType() for _ in originals)
        names = self.globals.setdefault(id(function.__globals__), dict(function.__globals__))
        twin = types.FunctionType(function.__code__, names, function.__name__, None, cells or None)
        # Known before its parts are copied: one of them may lead back to the function.
        self.functions[id(function)] = twin
        twin.__dict__.update(self.copy_values(vars(function)))
        if function.__defaults__ is not None:
            twin.__defaults__ = tuple(self.copy(value) for value in function.__defaults__)
        if function.__kwdefaults__:
            twin.__kwdefaults__ = self.copy_values(function.__kwdefaults__)
        for cell, original in zip(cells, originals, strict=True):
            try:
                cell.cell_contents = self.copy(original.cell_contents)
            except ValueError:  # not yet assigned
                continue
        for name, value in reached.items():
            is_function = isinstance(value, types.FunctionType)
            if is_function and value.__globals__ is not function.__globals__:
                if is_installed(value.__code__.co_filename):
                    continue  # a library's own
            names[name] = self.copy(value)
        return twin


def _is_torchs(function: types.FunctionType) -> bool:
    """Tell whether a function is one of torch's own, such as F.mse_loss, which keeps nothing."""
    module = function.__module__ or ""
    return module.partition(".")[0] == "torch" and function.__closure__ is None


def _names_in(code: types.CodeType) -> set[str]:
    """Collect the names that a function's code, and functions inside it, may look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _is_large(value: Any) -> bool:
    """Tell whether a value is a table too large to be what a metric counts in."""
    if isinstance(value, Tensor):
        return value.numel() > LARGE
    if isinstance(value, (np.ndarray, pd.DataFrame, pd.Series)):
        return value.size > LARGE
    return False
