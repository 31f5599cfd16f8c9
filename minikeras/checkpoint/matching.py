"""Whether the state in a file fits this run, and what is other than it was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from minikeras.callbacks import Callback
from minikeras.checkpoint.file import remedy_of_fit as remedy
from minikeras.checkpoint.validate import check_state
from minikeras.checkpoint.weights import RUN, check_weights
from minikeras.errors import CheckpointError, is_number

if TYPE_CHECKING:
    from minikeras.run import Run

VERSION = 1  # of the file's layout; files of older versions keep loading


def check_run(state: Any, model: nn.Module, run: Run, path: Path) -> None:
    """What is in the file must fit this model, its loss, optimizers and metrics.

    Raises:
        CheckpointError: it does not.
    """
    version = state.get(RUN) if isinstance(state, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is not the state of a run of minikeras. {remedy(path)}")
    if version > VERSION:
        raise CheckpointError(
            f"{path} has layout {version} and this minikeras knows those up to {VERSION}. Update minikeras."
        )
    check_state(state, model, run, path)
    check_weights(model, state["model"], path, remedy)
    if isinstance(run.loss_func, nn.Module):
        check_weights(run.loss_func, state["loss"], path, remedy)
    check_metrics(state, run, path)
    check_window(state.get("precision"), run, path)
    check_processes(state, run, path)
    check_optimizers(state["optimizers"], run.optimizers, path)


def check_metrics(state: Any, run: Run, path: Path) -> None:
    """Within an epoch, what has been counted must be counted on."""
    own = run.train.names
    counted = state["totals"].get("names", own)  # older files have none
    if state["position"]["step"] and set(counted) != set(own):
        raise CheckpointError(
            f"{path} was written within an epoch that counts {', '.join(counted)}, and here it would be "
            f"{', '.join(own)}. Compile as it was compiled then. {remedy(path)}"
        )


def check_window(written: Any, run: Run, path: Path) -> None:
    now = 1 if run.precision is None else run.precision.accumulate
    inside = written and any(window["batches"] for window in written["windows"].values())
    if inside and written["accumulate"] != now:
        raise CheckpointError(
            f"{path} was written between two steps of accumulate={written['accumulate']}, and the model was "
            f"compiled with accumulate={now}. Compile as it was compiled then. {remedy(path)}"
        )


def check_processes(state: Any, run: Run, path: Path) -> None:
    """Means can be passed on to another number of processes in the middle of an epoch, and other counts not."""
    then, now = len(state.get("ranks", [None])), 1 if run.world is None else run.world.size
    train, windows = state["train"] or {}, (state.get("precision") or {}).get("windows", {})
    held = {
        "a half full window of accumulate": any(window["batches"] for window in windows.values()),
        "metric objects": bool(state["totals"]["objects"]) and state["totals"]["updated"],
        "a loader that keeps its own state": train.get("loader") is not None,
    }
    what = next((name for name, there in held.items() if there), None)
    if then != now and what is not None and state["position"]["step"] and state["position"]["logs"] is None:
        raise CheckpointError(
            f"{path} was written by {then} process{'es' * (then > 1)} in the middle of an epoch, with {what}, and "
            f"this is a run of {now}. Start as many as then; from an epoch's end on any number will do. "
            f"{remedy(path)}"
        )


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


def warn_of_other_settings(begun: Mapping[str, Any], now: Mapping[str, Any], path: Any) -> None:
    """The script's settings are not those that the run began with, and will not be taken."""
    other = other_settings(begun, now)
    if other:
        warnings.warn(
            f"{path} was begun with other settings of the optimizer than this script's, {other}. The file's go on. Set "
            f"them in on_epoch_begin of a callback to change them in the run.",
            stacklevel=5,
        )


def other_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two of those, in words.

    >>> other_settings({"": [{"lr": 0.1, "momentum": 0.0}]}, {"": [{"lr": 0.2, "momentum": 0.0}]})
    'lr 0.1 and not 0.2'
    """
    pairs = [(old, new) for name in then for old, new in zip(then[name], now.get(name, []), strict=False)]
    both = [(key, old[key], new[key]) for old, new in pairs for key in old if key in new]
    told = [f"{key} {old:g} and not {new:g}" for key, old, new in both if not math.isclose(old, new, rel_tol=1e-6)]
    return ", ".join(dict.fromkeys(told))


def warn_of_other_callbacks(states: Mapping[str, Any], now: Mapping[str, Callback]) -> None:
    """Where a state has no callback to go to, or there may be another of its class that it belongs to."""
    held = [name for name, state in states.items() if state]
    keep = [name for name, callback in now.items() if type(callback).state_dict is not Callback.state_dict]
    added = [name for name in keep if name not in states and name.partition(" ")[0] in held]
    if added or not set(keep) >= set(held):
        warnings.warn(
            f"the checkpoint has the state of {', '.join(held)}, and those that keep one are "
            f"{', '.join(keep) or 'none'} here. It goes to the callback of its class and number. Give the same ones in "
            f"the same order.",
            stacklevel=4,
        )
