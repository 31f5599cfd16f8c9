"""A twin of a metric, to be called on trial: what the metric itself keeps stays as it is."""

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

LARGE = 2**20  # elements; a table of as many is shared: what a metric counts in is smaller
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
    """A metric that does the same, and leaves what the first one keeps as it is.

    What a function reaches by itself, as attributes, closure, defaults and globals, is copied: it may count its
    calls, or collect what it is given.

    Raises:
        Exception: something of it cannot be copied.
    """
    return _Copier().copied(metric)


class _Copier:
    def __init__(self) -> None:
        self.memo: dict[int, Any] = {}
        self.globals: dict[int, dict[str, Any]] = {}
        self.functions: dict[int, Any] = {}

    def copied(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.copied(value.__func__), self.copied(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {key: self.copied(part) for key, part in value.keywords.items()}
            return functools.partial(
                self.copied(value.func), *map(self.copied, value.args), **keywords
            )
        if isinstance(value, (*SCALARS, *SHARED)) or _is_large(value):
            return value
        if isinstance(value, nn.Module):
            self.memo |= {id(parameter): parameter for parameter in value.parameters()}
        return copy.deepcopy(value, self.memo)

    def function(self, function: types.FunctionType) -> Any:
        """A function with copies in its closure, defaults and globals."""
        if id(function) in self.functions:
            return self.functions[id(function)]
        reached = {}
        for name in _names_in(function.__code__):
            if name in function.__globals__:
                reached[name] = function.__globals__[name]
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        names = self.globals.setdefault(id(function.__globals__), dict(function.__globals__))
        twin = types.FunctionType(function.__code__, names, function.__name__, None, cells or None)
        self.functions[id(function)] = twin
        twin.__dict__.update({key: self.copied(value) for key, value in vars(function).items()})
        twin.__defaults__ = self._defaults(function.__defaults__)
        if function.__kwdefaults__:
            twin.__kwdefaults__ = {
                key: self.copied(value) for key, value in function.__kwdefaults__.items()
            }
        for cell, original in zip(cells, function.__closure__ or (), strict=True):
            try:
                cell.cell_contents = self.copied(original.cell_contents)
            except ValueError:  # not yet assigned
                continue
        for name, value in reached.items():
            elsewhere = (
                isinstance(value, types.FunctionType)
                and value.__globals__ is not function.__globals__
            )
            if not elsewhere:
                names[name] = self.copied(value)
        return twin

    def _defaults(self, defaults: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return None if defaults is None else tuple(map(self.copied, defaults))


def _names_in(code: types.CodeType) -> set[str]:
    """The names that a function's code may look up, those of functions inside it too."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _is_large(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() > LARGE
    if isinstance(value, (np.ndarray, pd.DataFrame, pd.Series)):
        return value.size > LARGE
    return False
