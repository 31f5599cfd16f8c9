"""Whether the state in a file fits this run, and what is other than it was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from minikeras.callbacks import Callback, LRScheduler
from minikeras.checkpoint.file import remedy_of_fit as remedy
from minikeras.checkpoint.validate import check_contents, check_state
from minikeras.checkpoint.weights import COMPILED, RUN, check_weights, frozen
from minikeras.errors import CheckpointError, is_number

if TYPE_CHECKING:
    from minikeras.run import Run

RATES = ("lr", "initial_lr", "max_lr", "min_lr")
VERSION = 1  # of the file's layout; files of older versions keep loading


def check_run(state: Any, model: nn.Module, run: Run, path: Path) -> None:
    """What is in the file must fit this model, its loss, optimizers and metrics.

    Nothing is changed.

    Raises:
        CheckpointError: it does not.
    """
    version = state.get(RUN) if isinstance(state, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is not the state of a run of minikeras. {remedy(path)}")
    if version > VERSION:
        raise CheckpointError(
            f"{path} has layout {version} and this minikeras knows those up to {VERSION}. Update "
            "minikeras."
        )
    check_state(state, path)
    check_weights(model, state["model"], path, remedy)
    if isinstance(run.loss_func, nn.Module):
        check_weights(run.loss_func, state["loss"], path, remedy)
    check_metrics(state, run, path)
    check_window(state.get("precision"), run, path)
    check_processes(state, run, path)
    check_buffers(model, state["buffers"], path)
    if isinstance(run.loss_func, nn.Module):
        check_buffers(run.loss_func, state.get("loss buffers", {}), path)
    begun = (state.get("begun") or {}).get("groups", {})
    for name, optimizer in run.optimizers.items():
        own = run.begun["groups"][name]
        check_optimizer(
            name, state["optimizers"], optimizer, model, run.loss_func, begun.get(name) == own, path
        )
    gone = [name for name in state["optimizers"] if name not in run.optimizers]
    if gone:
        raise CheckpointError(
            f"{path} was written with an optimizer {gone[0]!r}, which compile was not given here. "
            f"Compile as it was compiled then. {remedy(path)}"
        )
    check_contents(state, model, run, path)


def check_buffers(module: nn.Module, buffers: Mapping[str, Any], path: Path) -> None:
    """Buffers outside the state_dict need the layer that they were in.

    Raises:
        CheckpointError: it is not there.
    """
    layers = {name for name, _ in module.named_modules()}
    for name in buffers:
        owner = name.rpartition(".")[0]
        if owner not in layers:
            raise CheckpointError(
                f"{path} holds the buffer {name}, and {type(module).__name__} has no layer "
                f"{owner}. Build the model as it was when the file was written. {remedy(path)}"
            )


def check_metrics(state: Any, run: Run, path: Path) -> None:
    """Within an epoch, what has been counted must be counted on."""
    own = run.train.names
    counted = state["totals"].get("names", own)  # older files have none
    if state["position"]["step"] and set(counted) != set(own):
        raise CheckpointError(
            f"{path} was written within an epoch that counts {', '.join(counted)}, and here it "
            f"would be {', '.join(own)}. Compile as it was compiled then. {remedy(path)}"
        )


def check_window(written: Any, run: Run, path: Path) -> None:
    now = 1 if run.precision is None else run.precision.accumulate
    inside = written and any(window["batches"] for window in written["windows"].values())
    if inside and written["accumulate"] != now:
        raise CheckpointError(
            f"{path} was written between two steps of accumulate={written['accumulate']}, and the "
            f"model was compiled with accumulate={now}. Compile as it was compiled then. "
            f"{remedy(path)}"
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
    if (
        then != now
        and what is not None
        and state["position"]["step"]
        and state["position"]["logs"] is None
    ):
        raise CheckpointError(
            f"{path} was written by {then} process{'es' * (then > 1)} in the middle of an epoch, "
            f"with {what}, and this is a run of {now}. Start as many as then; from an epoch's end "
            f"on any number will do. {remedy(path)}"
        )


def check_optimizer(
    name: str,
    optimizers: Mapping[str, Any],
    optimizer: Optimizer,
    model: nn.Module,
    loss_func: Any,
    same_beginning: bool,
    path: Path,
) -> None:
    """The file's optimizer of that name must be of the same class, with the same parameters in each group.

    Groups that callbacks have added since the run began may be missing on either side.

    Raises:
        CheckpointError: it is another.
    """
    written: Any = optimizers.get(name)
    own = group_names(optimizer, model, loss_func)
    fits = written is not None and written["class"] == type(optimizer).__name__
    if fits:
        names = written.get("names")
        if names is None:
            fits = sizes(written["state"]) == [len(group) for group in own]
        else:
            both = min(len(own), len(names)) if same_beginning else max(len(own), len(names))
            fits = own[:both] == names[:both]
    if not fits:
        was = "none" if written is None else f"{written['class']} {sizes(written['state'])}"
        other = ""
        same_class = written is not None and written["class"] == type(optimizer).__name__
        if same_class and sizes(written["state"]) == [len(group) for group in own]:
            other = " with other parameters or in another order"
        raise CheckpointError(
            f"{path} was written with another optimizer{f' {name!r}' * bool(name)}: {was} instead "
            f"of {type(optimizer).__name__} {[len(group) for group in own]} (parameters in each "
            f"group){other}. Compile as it was compiled then. {remedy(path)}"
        )


def group_names(optimizer: Optimizer, model: nn.Module, loss_func: Any) -> list[list[str]]:
    """The names of the parameters of each group; "" for one that neither the model nor the loss has."""
    names = {
        id(parameter): name for name, parameter in parameters_by_name(model, loss_func).items()
    }
    return [
        [names.get(id(parameter), "") for parameter in group["params"]]
        for group in optimizer.param_groups
    ]


def parameters_by_name(model: nn.Module, loss_func: Any) -> dict[str, Any]:
    """The parameters of the model, and of the loss where it has some."""
    found = {}
    if isinstance(loss_func, nn.Module):
        for name, parameter in loss_func.named_parameters():
            found[f"loss_func.{name}"] = parameter
    for name, parameter in model.named_parameters():
        found[name.replace(COMPILED, "")] = parameter
    return found


def sizes(optimizer_state: Any) -> list[int]:
    """How many parameters each group of an optimizer has."""
    return [len(group["params"]) for group in optimizer_state["param_groups"]]


def beginning(model: nn.Module, run: Run) -> dict[str, Any]:
    """What a script has set as its fit begins, as plain values: for the file, to find later what has changed."""
    loss, precision = run.loss_func, run.precision
    named = getattr(loss, "__qualname__", type(loss).__qualname__)
    return {
        "optimizers": settings(run.optimizers),
        "groups": {name: group_names(one, model, loss) for name, one in run.optimizers.items()},
        "frozen": frozen(model),
        "loss frozen": frozen(loss) if isinstance(loss, nn.Module) else [],
        "in_eval": list(run.modes.look()),
        "compile": {
            "loss_func": named,
            "precision": "float32"
            if precision is None or precision.dtype is None
            else str(precision.dtype)[6:],
            "accumulate": 1 if precision is None else precision.accumulate,
            "clip_grad_norm": None if precision is None else precision.clip_grad_norm,
            "clip_grad_value": None if precision is None else precision.clip_grad_value,
        },
    }


def settings(optimizers: Mapping[str, Optimizer]) -> dict[str, list[dict[str, float]]]:
    """The settings of each optimizer's groups that are numbers, as plain values."""
    found: dict[str, list[dict[str, float]]] = {}
    for name, one in optimizers.items():
        found[name] = [numbers_of(group) for group in one.param_groups]
    return found


def numbers_of(group: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among a group's settings; of a tuple, such as betas, each by itself."""
    found = {}
    for key, value in group.items():
        if key == "params":
            continue
        if is_number(value):
            found[key] = float(value)
        elif isinstance(value, (tuple, list)):
            for number, part in enumerate(value):
                if is_number(part):
                    found[f"{key}[{number}]"] = float(part)
    return found


def warn_of_other_settings(
    begun: Mapping[str, Any], now: Mapping[str, Any], path: Any, scheduled: bool
) -> None:
    """Warn that the script's optimizer settings are not those that the run began with, and will not be taken.

    Args:
        begun: the settings then.
        now: the settings of this script.
        path: of the file.
        scheduled: whether the script's own schedule is taken, which decides the learning rate.
    """
    other = other_settings(begun, now, RATES if scheduled else ())
    if other:
        warnings.warn(
            f"{path} was begun with other settings of the optimizer than this script's, {other}. "
            "The file's go on. Set them in on_epoch_begin of a callback to change them in the "
            "run.",
            stacklevel=5,
        )


def warn_of_another_script(begun: Mapping[str, Any], now: Mapping[str, Any], path: Any) -> None:
    """Warn that the loss, the precision or what is trained has been changed since the run began, and is taken."""
    told = []
    for key, value in now["compile"].items():
        was = begun.get("compile", {}).get(key, value)
        if was != value:
            told.append(f"{key} {was} and not {value}")
    for key in ("frozen", "loss frozen"):
        was, names = begun.get(key, now[key]), now[key]
        thawed = [name for name in was if name not in names]
        froze = [name for name in names if name not in was]
        if thawed:
            told.append(f"{', '.join(thawed[:3])} frozen, and trained here")
        if froze:
            told.append(f"{', '.join(froze[:3])} trained, and frozen here")
    if told:
        warnings.warn(
            f"{path} was begun by another script: with {'; '.join(told)}. What this script says "
            "is taken from here on.",
            stacklevel=5,
        )


def other_schedules(states: Mapping[str, Any], now: Mapping[str, Callback]) -> dict[str, str]:
    """The callbacks whose scheduler the script has changed since, with what has changed."""
    changed = {}
    for name, callback in now.items():
        written = (
            states.get(name, {}).get("settings") if isinstance(callback, LRScheduler) else None
        )
        if (
            isinstance(callback, LRScheduler)
            and written is not None
            and written != callback.settings
        ):
            own = callback.settings
            keys = [key for key in {**written, **own} if written.get(key) != own.get(key)]
            if written["class"] != own["class"]:
                keys = ["class"]
            differing = [
                f"{key} {written.get(key, 'none')} and not {own.get(key, 'none')}"
                for key in keys[:4]
            ]
            changed[name] = ", ".join(differing)
    return changed


def warn_of_other_schedules(changed: Mapping[str, str], path: Any) -> None:
    for name, differing in changed.items():
        warnings.warn(
            f"{path} was written with another schedule than this script's {name}: {differing}. "
            "The script's is taken: from here on its learning rates are those of a run that had "
            "it from its beginning.",
            stacklevel=5,
        )


def warn_of_other_monitors(
    states: Mapping[str, Any], now: Mapping[str, Callback], path: Any
) -> None:
    """Warn where a callback watches another value than it did, and begins anew to look for the best one."""
    for name, callback in now.items():
        if "monitor" not in states.get(name, {}):
            continue
        was, own = states[name]["monitor"], callback.state_dict().get("monitor")
        if was != own:
            warnings.warn(
                f"{path} was written with {article(name)} that watched {watched(was)}, and this "
                f"script's watches {watched(own)}. The script's is taken, and its best value is "
                "looked for anew from here on.",
                stacklevel=5,
            )


def watched(monitor: Any) -> str:
    """A monitor's name and mode, in words."""
    return (
        "nothing" if monitor is None else f"{monitor[0]!r} ({'max' if monitor[1] > 0 else 'min'})"
    )


def other_settings(
    then: Mapping[str, Any], now: Mapping[str, Any], without: tuple[str, ...] = ()
) -> str:
    """What differs between two of those, in words.

    >>> other_settings({"": [{"lr": 0.1, "momentum": 0.0}]}, {"": [{"lr": 0.2, "momentum": 0.0}]})
    'lr 0.1 and not 0.2'
    """
    told = []
    for name in then:
        for old, new in zip(then[name], now.get(name, []), strict=False):
            for key in old:
                if (
                    key in new
                    and key not in without
                    and not math.isclose(old[key], new[key], rel_tol=1e-6)
                ):
                    told.append(f"{key} {old[key]:g} and not {new[key]:g}")
    return ", ".join(dict.fromkeys(told))


def warn_of_other_callbacks(states: Mapping[str, Any], now: Mapping[str, Callback]) -> None:
    """Where a state has no callback to go to, or there may be another of its class that it belongs to."""
    held = [name for name, state in states.items() if state]
    keep = [
        name
        for name, callback in now.items()
        if type(callback).state_dict is not Callback.state_dict
    ]
    added = [name for name in keep if name not in states and name.partition(" ")[0] in held]
    if added or not set(keep) >= set(held):
        warnings.warn(
            f"the checkpoint has the state of {', '.join(held)}, and those that keep one are "
            f"{', '.join(keep) or 'none'} here. It goes to the callback of its class and number. "
            "Give the same ones in the same order.",
            stacklevel=4,
        )


def warn_of_other_generators(names: list[str], path: Any) -> None:
    """Warn of generators that the run had and this script has not, or the reverse."""
    if names:
        warnings.warn(
            f"{path} was written with other random generators in the model, the loss or the "
            f"callbacks than this script's: {', '.join(names[:3])}. Each that is in both goes on; "
            "the others begin anew.",
            stacklevel=5,
        )


def warn_of_other_data(state: Any, now: int | None, finished: bool, path: Any) -> None:
    """Warn where the data are others within an epoch, or where a finished run is not trained on them."""
    then = state.get("data")
    if then is None or now is None or then == now:
        return
    if finished:
        warnings.warn(
            f"{path} holds a finished run, and dl_train has other data here: nothing is trained "
            "on them. Give another file to train on these data, or more epochs to go on with "
            "them.",
            stacklevel=5,
        )
    elif state["position"]["step"]:
        warnings.warn(
            f"{path} was written in the middle of an epoch, and dl_train has other data here: the "
            "batches that are left out are others than those that were trained on. Give the same "
            "data as before; from an epoch's end on any will do.",
            stacklevel=5,
        )


def article(name: str) -> str:
    """A name with a or an before it.

    >>> article("EarlyStopping"), article("ModelCheckpoint")
    ('an EarlyStopping', 'a ModelCheckpoint')
    """
    return f"{'an' if name[0] in 'AEIOUL' else 'a'} {name}"  # an LRScheduler
