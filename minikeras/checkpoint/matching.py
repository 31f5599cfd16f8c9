"""Check that the state in a file fits this run, and warn of what has changed since."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from minikeras.callback import Callback
from minikeras.checkpoint.file import remedy_of_fit as remedy
from minikeras.checkpoint.validate import check_contents, check_state
from minikeras.checkpoint.weights import RUN, check_weights, frozen
from minikeras.compiled_names import COMPILED
from minikeras.errors import CheckpointError, is_number
from minikeras.modes import names_staying_in_eval

if TYPE_CHECKING:
    from minikeras.run import Run

# callbacks that fit itself adds to show what happens; `verbose` may differ between two starts
SHOWN_BY_FIT = ("Progress", "LiveTable")
RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # settings that a schedule decides
VERSION = 1  # version of the file's layout; files of older versions keep loading


def check_run(state: Any, model: nn.Module, run: Run, path: Path) -> None:
    """Check that a file's state fits this model, its loss, optimizers and metrics; change nothing.

    Raises:
        CheckpointError: it does not fit.
    """
    version = state.get(RUN) if isinstance(state, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is not a checkpoint of a minikeras fit. {remedy(path)}")
    if version > VERSION:
        raise CheckpointError(
            f"{path} has file layout {version}, and this version of minikeras reads layouts up to "
            f"{VERSION}. Upgrade minikeras. {remedy(path)}"
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
    begun_groups = (state.get("begun") or {}).get("groups", {})
    for name, optimizer in run.optimizers.items():
        own_groups = group_names(optimizer, model, run.loss_func)
        same_beginning = begun_groups.get(name) == run.kept["begun"]["groups"][name]
        written = state["optimizers"].get(name)
        check_optimizer(name, written, optimizer, own_groups, same_beginning, path)
    for name in state["optimizers"]:
        if name not in run.optimizers:
            raise CheckpointError(
                f"{path} was written with an optimizer {name!r}, which this call of compile does "
                f"not have. Call compile with the same arguments as then. {remedy(path)}"
            )
    check_contents(state, model, run, path)


def check_buffers(module: nn.Module, buffers: Mapping[str, Any], path: Path) -> None:
    """Check that the layers of buffers outside the state_dict exist.

    Raises:
        CheckpointError: a layer does not exist.
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
    """Check that a file written within an epoch has totals of the same metrics."""
    own = run.train.totals.names
    counted = state["totals"].get("names", own)  # older files have no names
    if state["position"]["step"] and set(counted) != set(own):
        raise CheckpointError(
            f"{path} was written in the middle of an epoch that logs {', '.join(counted)}, and "
            f"this run logs {', '.join(own)}. Call compile with the same arguments as then. "
            f"{remedy(path)}"
        )


def check_window(written: Any, run: Run, path: Path) -> None:
    """Check that a file written within a window of accumulate has the same `accumulate`."""
    if not written:
        return
    now = settings_of_parts(run)["accumulate"]
    if has_open_window(written) and written["accumulate"] != now:
        raise CheckpointError(
            f"{path} was written in a partly filled window of accumulate={written['accumulate']}, "
            f"and the model is now compiled with accumulate={now}. Call compile with the same "
            f"arguments as then. {remedy(path)}"
        )


def has_open_window(precision: Mapping[str, Any]) -> bool:
    """Tell whether a file was written within a window of accumulate."""
    return any(window["batches"] for window in precision.get("windows", {}).values())


def check_processes(state: Any, run: Run, path: Path) -> None:
    """Check that the number of processes is the same if the file has what depends on it.

    In the middle of an epoch, means can be divided among another number of processes, but other
    state cannot.
    """
    then = len(state.get("ranks", [None]))
    now = run.world.size
    position = state["position"]
    if then == now or not position["step"] or position["logs"] is not None:
        return
    totals = state["totals"]
    if has_open_window(state.get("precision") or {}):
        what = "a partly filled window of accumulate"
    elif totals["objects"] and totals["updated"]:
        what = "metric objects"
    elif (state["train"] or {}).get("loader") is not None:
        what = "a loader that keeps its own state"
    else:
        return
    processes = "processes" if then > 1 else "process"
    raise CheckpointError(
        f"{path} was written by {then} {processes} in the middle of an epoch, with {what}, and "
        f"this run has {now}. Start as many as then; a checkpoint written at the end of an epoch "
        f"resumes on any number. {remedy(path)}"
    )


def check_optimizer(
    name: str,
    written: Any,
    optimizer: Optimizer,
    own: list[list[str]],
    same_beginning: bool,
    path: Path,
) -> None:
    """Check that the file's optimizer has the same class, and the same parameters in each group.

    Groups that callbacks have added since the run began may be missing on either side.

    Args:
        name: the optimizer's name.
        written: the file's optimizer of that name, or None.
        optimizer: the optimizer of this run.
        own: the names of its parameters, by group.
        same_beginning: whether the file's run began with the same groups as this one.

    Raises:
        CheckpointError: it is another optimizer.
    """
    own_class = type(optimizer).__name__
    own_sizes = [len(group) for group in own]
    other = ""
    if written is None:
        was = "none"
    else:
        sizes = group_sizes(written["state"])
        was = f"{written['class']} {sizes}"
        if written["class"] == own_class:
            names = written.get("names")
            if names is None:
                fits = sizes == own_sizes
            else:
                compared = max(len(own), len(names))
                if same_beginning:
                    compared = min(len(own), len(names))
                fits = own[:compared] == names[:compared]
            if fits:
                return
            if sizes == own_sizes:
                other = " with other parameters or in another order"
    shown_name = f" {name!r}" if name else ""
    raise CheckpointError(
        f"{path} was written with another optimizer{shown_name}: {was} instead of {own_class} "
        f"{own_sizes} (parameters in each group){other}. Call compile with the same arguments as "
        f"then. {remedy(path)}"
    )


def group_names(optimizer: Optimizer, model: nn.Module, loss_func: Any) -> list[list[str]]:
    """Name the parameters of each group; "" for those of neither the model nor the loss."""
    names = {}
    for name, parameter in parameters_by_name(model, loss_func).items():
        names[id(parameter)] = name
    groups = []
    for group in optimizer.param_groups:
        groups.append([names.get(id(parameter), "") for parameter in group["params"]])
    return groups


def parameters_by_name(model: nn.Module, loss_func: Any) -> dict[str, Any]:
    """Collect the parameters of the model and of the loss by name."""
    parameters = {}
    if isinstance(loss_func, nn.Module):
        for name, parameter in loss_func.named_parameters():
            parameters[f"loss_func.{name}"] = parameter
    for name, parameter in model.named_parameters():
        parameters[name.replace(COMPILED, "")] = parameter
    return parameters


def group_sizes(optimizer_state: Any) -> list[int]:
    """Count the parameters in each group of an optimizer's state."""
    return [len(group["params"]) for group in optimizer_state["param_groups"]]


def beginning(model: nn.Module, run: Run) -> dict[str, Any]:
    """Collect what a script has set as its fit begins, as plain values.

    It goes into the file, to find later what has changed.
    """
    loss_func = run.loss_func
    groups = {}
    for name, optimizer in run.optimizers.items():
        groups[name] = group_names(optimizer, model, loss_func)
    loss_name = getattr(loss_func, "__qualname__", type(loss_func).__qualname__)
    return {
        "optimizers": settings(run.optimizers),
        "groups": groups,
        "frozen": frozen(model),
        "loss frozen": frozen(loss_func) if isinstance(loss_func, nn.Module) else [],
        "in_eval": list(run.modes.look()),
        "stays_in_eval": names_staying_in_eval(model),
        "compile": {"loss_func": loss_name, **settings_of_parts(run)},
    }


# what a file says of a model without parts of the stepper; keys of other parts are left out
NO_PARTS: dict[str, Any] = {
    "precision": "float32",
    "accumulate": 1,
    "clip_grad_norm": None,
    "clip_grad_value": None,
}


def settings_of_parts(run: Run) -> dict[str, Any]:
    """Return what compile was asked for between a loss and moved weights."""
    return NO_PARTS | run.stepper.settings()


def settings(optimizers: Mapping[str, Optimizer]) -> dict[str, list[dict[str, float]]]:
    """Collect the numbers among the settings of each optimizer's groups, as plain values."""
    numbers: dict[str, list[dict[str, float]]] = {}
    for name, optimizer in optimizers.items():
        numbers[name] = [find_numbers(group) for group in optimizer.param_groups]
    return numbers


def find_numbers(group: Mapping[str, Any]) -> dict[str, float]:
    """Collect the numbers among a group's settings; those in a tuple, such as betas, one by one."""
    numbers = {}
    for key, value in group.items():
        if key == "params":
            continue
        if is_number(value):
            numbers[key] = float(value)
        elif isinstance(value, (tuple, list)):
            for index, part in enumerate(value):
                if is_number(part):
                    numbers[f"{key}[{index}]"] = float(part)
    return numbers


def warn_of_other_settings(
    begun: Mapping[str, Any], now: Mapping[str, Any], path: Any, scheduled: bool
) -> None:
    """Warn that the script's optimizer settings differ from those of the run, and are not used.

    Args:
        begun: the settings with which the run began.
        now: the settings of this script.
        path: the file's path.
        scheduled: whether the script's own schedule is used, which decides the learning rate.
    """
    differences = other_settings(begun, now, RATES if scheduled else ())
    if differences:
        warnings.warn(
            f"{path} was started with other optimizer settings than this script's: {differences}. "
            "The file's settings are used. To change them during a run, set them in "
            "on_epoch_begin of a callback.",
            stacklevel=5,
        )


def warn_of_another_script(begun: Mapping[str, Any], now: Mapping[str, Any], path: Any) -> None:
    """Warn that the loss, the precision or the frozen layers have changed, and are used as now."""
    differences = []
    written = begun.get("compile", {})
    for key in {**now["compile"], **written}:
        value = now["compile"].get(key)
        was = written.get(key)
        is_older = key not in written and key in ("loss_func", *NO_PARTS)
        if was != value and not is_older:
            differences.append(f"{key} {was} and not {value}")
    for key in ("frozen", "loss frozen"):
        names = now[key]
        was = begun.get(key, names)
        thawed = [name for name in was if name not in names]
        froze = [name for name in names if name not in was]
        if thawed:
            differences.append(f"{', '.join(thawed[:3])} frozen, and trained here")
        if froze:
            differences.append(f"{', '.join(froze[:3])} trained, and frozen here")
    if differences:
        warnings.warn(
            f"{path} was started by a script with other settings: {'; '.join(differences)}. This "
            "script's settings are used from now on.",
            stacklevel=5,
        )


def other_schedules(states: Mapping[str, Any], now: Mapping[str, Callback]) -> dict[str, str]:
    """Find the callbacks whose scheduler has changed since, and say what has changed."""
    changed = {}
    for name, callback in now.items():
        own = getattr(callback, "schedule_settings", None)  # of an LRScheduler
        written = states.get(name, {}).get("settings")
        if own is None or written is None or written == own:
            continue
        if written["class"] != own["class"]:
            keys = ["class"]
        else:
            keys = [key for key in {**written, **own} if written.get(key) != own.get(key)]
        differences = []
        for key in keys[:4]:
            differences.append(f"{key} {written.get(key, 'none')} and not {own.get(key, 'none')}")
        changed[name] = ", ".join(differences)
    return changed


def warn_of_other_schedules(changed: Mapping[str, str], path: Any) -> None:
    """Warn of callbacks whose scheduler has changed since the file was written."""
    for name, differing in changed.items():
        warnings.warn(
            f"{path} was written with another schedule than this script's {name}: {differing}. "
            "This script's schedule is used: from now on the learning rates are those of a run "
            "that had it from the start.",
            stacklevel=5,
        )


def warn_of_other_monitors(
    states: Mapping[str, Any], now: Mapping[str, Callback], path: Any
) -> None:
    """Warn of callbacks that monitor another value than before, and so forget their best value."""
    for name, callback in now.items():
        if "monitor" not in states.get(name, {}):
            continue
        was = states[name]["monitor"]
        own = callback.state_dict().get("monitor")
        if was != own:
            warnings.warn(
                f"{path} was written with {add_article(name)} that monitored {show_monitor(was)}, "
                f"and this script's monitors {show_monitor(own)}. This script's is used, and its "
                "best value starts over.",
                stacklevel=5,
            )


def show_monitor(monitor: Any) -> str:
    """Show the name and mode of a monitored value."""
    if monitor is None:
        return "nothing"
    mode = "max" if monitor[1] > 0 else "min"
    return f"{monitor[0]!r} ({mode})"


def other_settings(
    then: Mapping[str, Any], now: Mapping[str, Any], without: tuple[str, ...] = ()
) -> str:
    """Say what differs between two results of `settings`.

    >>> other_settings({"": [{"lr": 0.1, "momentum": 0.0}]}, {"": [{"lr": 0.2, "momentum": 0.0}]})
    'lr 0.1 and not 0.2'
    """
    differences = []
    for name in then:
        for old, new in zip(then[name], now.get(name, []), strict=False):
            for key in old:
                if key not in new or key in without:
                    continue
                if not math.isclose(old[key], new[key], rel_tol=1e-6):
                    differences.append(f"{key} {old[key]:g} and not {new[key]:g}")
    return ", ".join(dict.fromkeys(differences))


def warn_of_other_callbacks(states: Mapping[str, Any], now: Mapping[str, Callback]) -> None:
    """Warn if a callback's state has no callback to go to, or might belong to a new one."""
    written = [name for name, state in states.items() if state and name not in SHOWN_BY_FIT]
    stateful = []
    for name, callback in now.items():
        has_state = type(callback).state_dict is not Callback.state_dict
        if has_state and name not in SHOWN_BY_FIT:
            stateful.append(name)
    added = [name for name in stateful if name not in states and name.partition(" ")[0] in written]
    if added or not set(stateful) >= set(written):
        warnings.warn(
            f"the checkpoint has the state of the callbacks {', '.join(written)}, and this fit's "
            f"callbacks with a state are {', '.join(stateful) or 'none'}. Each state goes to the "
            "callback of its class and number. Pass the same callbacks in the same order.",
            stacklevel=4,
        )


def warn_of_other_generators(names: list[str], path: Any) -> None:
    """Warn of random generators that only the run or only this script has."""
    if names:
        warnings.warn(
            f"{path} was written with other random generators in the model, the loss or the "
            f"callbacks than this script's: {', '.join(names[:3])}. Generators in both continue; "
            "the others start over.",
            stacklevel=5,
        )


def warn_of_other_data(state: Any, now: int | None, finished: bool, path: Any) -> None:
    """Warn of other data within an epoch, or of other data that a finished run does not use."""
    then = state.get("data")
    if then is None or now is None or then == now:
        return
    if finished:
        warnings.warn(
            f"{path} holds a finished run, and dl_train has other data here: nothing is trained "
            "on it. Pass another path to train on this data, or more epochs to continue with it.",
            stacklevel=5,
        )
    elif state["position"]["step"]:
        warnings.warn(
            f"{path} was written in the middle of an epoch, and dl_train has other data here: the "
            "skipped batches are not those that were trained on. Give the same data as before; a "
            "checkpoint written at the end of an epoch resumes with any data.",
            stacklevel=5,
        )


def add_article(name: str) -> str:
    """Put "a" or "an" before a name.

    >>> add_article("EarlyStopping"), add_article("ModelCheckpoint")
    ('an EarlyStopping', 'a ModelCheckpoint')
    """
    if name[0] in "AEIOUL":  # L as in LRScheduler
        return f"an {name}"
    return f"a {name}"
