"""From a batch to what the step takes, on its device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minikeras.data.arrays import as_tensor
from minikeras.data.nests import can_move, map_leaves
from minikeras.errors import described


def unpack(batch: Any) -> tuple[Any, Any, Any]:
    """(features, labels, sample_weight) of a batch; what it does not have is None."""
    if not isinstance(batch, (tuple, list)) or can_move(batch):
        return batch, None, None
    if not 1 <= len(batch) <= 3:
        raise ValueError(
            f"a batch has {len(batch)} parts: {described(batch)}; expected (features, labels) or "
            "(features, labels, sample_weight). Put several inputs into a tuple of their own: "
            "((a, b), labels)."
        )
    features, labels, sample_weight = (*batch, None, None)[:3]
    return features, labels, sample_weight


def placed(batch: Any, device: torch.device) -> tuple[Any, Any, Any]:
    """(features, labels, sample_weight) of a batch, on the device."""
    features, labels, weight = unpack(batch)
    return (
        to_device(features, device),
        to_device(labels, device),
        None if weight is None else to_device(weight, device),
    )


def to_device(nest: Any, device: torch.device) -> Any:
    """A nest with everything that can move on the device; NumPy arrays in it become tensors."""
    if type(nest) is Tensor:
        return nest.to(device)

    def moved(leaf: Any) -> Any:
        leaf = (
            as_tensor(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fiubc" else leaf
        )
        return leaf.to(device) if can_move(leaf) else leaf

    return map_leaves(moved, nest)


def call_with(module: nn.Module, features: Any) -> Any:
    """`module` called with a batch's features.

    Whole when its forward takes one argument; unpacked when it takes several, by name when they are a mapping.
    """
    return call_as(manner(module, features), module, features)


def manner(module: nn.Module, features: Any) -> str:
    """How a module is to be called with features such as these: "whole", "unpacked" or "by name"."""
    if isinstance(features, Mapping):
        return "by name" if _takes(module, tuple(features.keys())) else "whole"
    if isinstance(features, (tuple, list)) and not can_move(features) and _takes(module, None):
        return "unpacked"
    return "whole"


def call_as(how: str, module: nn.Module, features: Any) -> Any:
    """`module` called with features whole, unpacked or by name."""
    if how == "whole":
        return module(features)
    return module(**features) if how == "by name" else module(*features)


def _takes(module: nn.Module, names: tuple[str, ...] | None) -> bool:
    """Whether forward takes several arguments, those of these `names` where given.

    A wrapper's forward(*args, **kwargs) is judged by what it wraps.
    """
    function = getattr(module.forward, "__func__", module.forward)
    several, passes_on = _arguments(function, function is not module.forward, names)
    inner = list(module.children())
    return _takes(inner[0], names) if passes_on and len(inner) == 1 else several


@lru_cache(maxsize=256)
def _arguments(
    function: Callable[..., Any], bound: bool, names: tuple[str, ...] | None
) -> tuple[bool, bool]:
    """Whether a function takes several arguments (of these names), and whether it names none itself."""
    signature = inspect.signature(function)
    kinds = [parameter.kind for parameter in signature.parameters.values()][int(bound) :]
    named = sum(
        kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for kind in kinds
    )
    star = inspect.Parameter.VAR_POSITIONAL in kinds
    if names is None:
        return star or named > 1, star and not named
    try:
        signature.bind(*[None] * bound, **dict.fromkeys(names))
    except TypeError:
        return False, star and not named
    return named != 1 or len(kinds) > 1, star and not named


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the best there is: the accelerator (CUDA, XPU, MPS, ...) where one works, else the CPU.

    Raises:
        ValueError: the device is not there; the message names the ones that are.
    """
    # current_accelerator() alone answers "cuda" on a CUDA build of torch even where there is no GPU
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return best or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        there = ["cpu"] + [
            f"{best.type}:{i}"
            for i in range(torch.accelerator.device_count() if best else 0)
            if best
        ]
        raise ValueError(
            f"device {str(device)!r} is not there; expected one of {', '.join(there)}."
        ) from error
    return chosen
