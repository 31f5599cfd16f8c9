"""Whether a file's optimizers are those of this run, and were begun with the same settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from minikeras.checkpoint.file import remedy
from minikeras.errors import CheckpointError, is_number


def check_optimizers(written: Mapping[str, Any], optimizers: Mapping[str, Optimizer], path: Path) -> None:
    """Those of the file must be of the same classes, with as many parameters in each group.

    Raises:
        CheckpointError: one is another.
    """
    for name, optimizer in optimizers.items():
        given, own = written.get(name), optimizer.state_dict()
        if given is None or given["class"] != type(optimizer).__name__ or sizes(given["state"]) != sizes(own):
            was = "none" if given is None else f"{given['class']} {sizes(given['state'])}"
            raise CheckpointError(
                f"{path} was written with another optimizer{f' {name!r}' * bool(name)}: {was} instead of "
                f"{type(optimizer).__name__} {sizes(own)} (parameters in each group). Compile as it was compiled "
                f"then. {remedy(path)}"
            )


def sizes(optimizer_state: Any) -> list[int]:
    """How many parameters each group of an optimizer has."""
    return [len(group["params"]) for group in optimizer_state["param_groups"]]


def settings(optimizers: Mapping[str, Optimizer]) -> dict[str, list[dict[str, float]]]:
    """The settings of each optimizer's groups that are numbers, as plain values."""
    found: dict[str, list[dict[str, float]]] = {}
    for name, one in optimizers.items():
        found[name] = [
            {key: float(value) for key, value in group.items() if is_number(value)} for group in one.param_groups
        ]
    return found


def other_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two of those, in words.

    >>> other_settings({"": [{"lr": 0.1, "momentum": 0.0}]}, {"": [{"lr": 0.2, "momentum": 0.0}]})
    'lr 0.1 and not 0.2'
    """
    pairs = [(old, new) for name in then for old, new in zip(then[name], now.get(name, []), strict=False)]
    both = [(key, old[key], new[key]) for old, new in pairs for key in old if key in new]
    told = [f"{key} {old:g} and not {new:g}" for key, old, new in both if not math.isclose(old, new, rel_tol=1e-6)]
    return ", ".join(dict.fromkeys(told))
