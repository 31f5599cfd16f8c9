"""Take a batch apart, move it to the device, and call a module with its features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from minikeras.arrays import array_to_tensor
from minikeras.errors import describe
from minikeras.nests import can_move, map_leaves

PAIRS = (tuple, list)
# features, labels, sample_weight, and the number of rows that the batch itself states
Parts = tuple[Any, Any, Any, int | None]


def unpack(batch: Any) -> Parts:
    """Split a batch into (features, labels, sample_weight, rows); missing parts are None.

    `rows` is always None here: a batch that states its number of rows is the features as well.
    """
    if type(batch) in PAIRS and len(batch) == 2:  # most are
        return batch[0], batch[1], None, None
    if not isinstance(batch, (tuple, list)) or can_move(batch):
        return batch, None, None, None
    if not 1 <= len(batch) <= 3:
        raise ValueError(
            f"a batch has {len(batch)} parts: {describe(batch)}; expected (features, labels) or "
            "(features, labels, sample_weight). Put several inputs into a tuple of their own: "
            "((a, b), labels); or, with the labels last, pass compile(split_batch=lambda batch: "
            "(batch[:-1], batch[-1]))."
        )
    features, labels, sample_weight = (*batch, None, None)[:3]
    return features, labels, sample_weight, None


def pins_memory(batches: Any) -> bool:
    """Tell whether each batch gets pinned memory of its own, from which nobody waits for a copy.

    Another source of pinned tensors may write the next batch into the same memory.
    """
    loader = getattr(batches, "loader", batches)
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return False
    return bool(loader.pin_memory)


def move_to_device(
    batch: Any,
    device: torch.device,
    split_batch: Callable[[Any], Parts] = unpack,
    non_blocking: bool = False,
) -> Parts:
    """Split a batch as `unpack` does, and move features, labels and sample_weight to the device."""
    features, labels, weight, rows = split_batch(batch)
    return (
        to_device(features, device, non_blocking),
        to_device(labels, device, non_blocking),
        None if weight is None else to_device(weight, device, non_blocking),
        rows,
    )


def to_device(nest: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """Move everything in a nest that has `to` to the device; NumPy arrays become tensors."""
    if type(nest) is Tensor:
        return nest.to(device, non_blocking=non_blocking)

    def move(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fiubc":
            leaf = array_to_tensor(leaf)
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=non_blocking)
        return leaf.to(device) if can_move(leaf) else leaf

    return map_leaves(move, nest)


def call_with(module: nn.Module, features: Any) -> Any:
    """Call `module` with a batch's features.

    They are passed whole if its forward takes one argument, unpacked if it takes several, and by
    name if it takes several and they are a mapping.
    """
    if isinstance(features, Tensor):  # most are
        return module(features)
    return call_as(choose_call(module, features), module, features)


def choose_call(module: nn.Module, features: Any) -> str:
    """Tell how to call a module with such features: "whole", "unpacked" or "by name"."""
    if isinstance(features, Tensor):
        return "whole"
    if isinstance(features, Mapping):
        return "by name" if _takes_several(module, tuple(features.keys())) else "whole"
    if (
        isinstance(features, (tuple, list))
        and not can_move(features)
        and _takes_several(module, None)
    ):
        return "unpacked"
    return "whole"


def call_as(how: str, module: nn.Module, features: Any) -> Any:
    """Call `module` with features whole, unpacked or by name, as `choose_call` tells."""
    if how == "whole":
        return module(features)
    if how == "by name":
        return module(**features)
    return module(*features)


def _takes_several(module: nn.Module, names: tuple[str, ...] | None) -> bool:
    """Tell whether forward takes several arguments; with `names`, arguments of these names.

    A wrapper's forward(*args, **kwargs) is judged by the module that it wraps.
    """
    function = getattr(module.forward, "__func__", module.forward)
    several, passes_on = _inspect(function, function is not module.forward, names)
    inner = list(module.children())
    if passes_on and len(inner) == 1:
        return _takes_several(inner[0], names)
    return several


@lru_cache(maxsize=256)
def _inspect(
    function: Callable[..., Any], is_bound: bool, names: tuple[str, ...] | None
) -> tuple[bool, bool]:
    """Tell whether a function takes several arguments, and whether it has no named ones.

    With `names`, whether it takes arguments of these names.
    """
    signature = inspect.signature(function)
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if is_bound:
        kinds = kinds[1:]
    named = 0
    for kind in kinds:
        if kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            named += 1
    has_star = inspect.Parameter.VAR_POSITIONAL in kinds
    passes_on = has_star and not named
    if names is None:
        return has_star or named > 1, passes_on
    arguments = [None] if is_bound else []  # None stands for self
    try:
        signature.bind(*arguments, **dict.fromkeys(names))
    except TypeError:
        return False, passes_on
    return named != 1 or len(kinds) > 1, passes_on


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return the requested device; without one, the accelerator (CUDA, XPU, MPS, ...) or the CPU.

    Raises:
        ValueError: the device is not available; the message lists the available ones.
    """
    # On a CUDA build of torch, current_accelerator() alone returns "cuda" even without a GPU:
    # https://github.com/pytorch/pytorch/pull/146098
    accelerator = None
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
    if device is None:
        return accelerator or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        available = ["cpu"]
        if accelerator:
            for index in range(torch.accelerator.device_count()):
                available.append(f"{accelerator.type}:{index}")
        raise ValueError(
            f"device {str(device)!r} is not there; expected one of {', '.join(available)}."
        ) from error
    return chosen
