"""Callbacks under names: what a search reaches into, and what each fit trains with.

name_callbacks    a list of callbacks and of (name, callback) pairs -> name -> callback
list_settings     name -> callback -> stop -> callback, stop__patience -> 3, ...
set_settings      the list, and stop__patience=5 -> a list with a new callback named stop
create_callbacks  name -> callback -> the copies that one fit trains with
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

import minikeras
from minikeras.errors import describe, did_you_mean


def name_callbacks(callbacks: Any) -> dict[str, Any]:
    """Return name -> callback.

    A callback without a name goes by its class, in lower case; if several are of one class, they
    are numbered from 1.

    >>> stop, timer = minikeras.EarlyStopping(), minikeras.Timer(60)
    >>> list(name_callbacks([stop, ("limit", timer), minikeras.EarlyStopping()]))
    ['earlystopping_1', 'limit', 'earlystopping_2']

    Raises:
        TypeError: an entry is not a callback, or a function that creates one.
        ValueError: a name is used twice, or cannot be a part of an argument's name.
    """
    if callbacks is None:
        return {}
    if isinstance(callbacks, minikeras.Callback):
        callbacks = [callbacks]
    if not isinstance(callbacks, (list, tuple)):
        got = describe(callbacks)
        remedy = "Pass [callback], or [(name, callback)] to choose the name"
        if isinstance(callbacks, Mapping):
            remedy = "Pass list(callbacks.items())"
        elif isinstance(callbacks, type):
            got = f"the class {callbacks.__name__}"
            remedy = f"Pass [{callbacks.__name__}()]"
        raise TypeError(
            f"`callbacks` must be a list of callbacks or of (name, callback) pairs, got "
            f"{got}. {remedy}."
        )
    kinds = Counter(name_of(entry) for entry in callbacks if not isinstance(entry, tuple))
    numbers: Counter[str] = Counter()
    named: dict[str, Any] = {}
    for entry in callbacks:
        if isinstance(entry, tuple):
            name, callback = split_pair(entry)
        else:
            name, callback = name_of(entry), entry
            if kinds[name] > 1:
                numbers[name] += 1
                name = f"{name}_{numbers[name]}"
            check_entry(name, callback)
        if name in named:
            raise ValueError(
                f"`callbacks` has two entries with the name {name!r}; expected different names. "
                f"Rename one: ({name + '_2'!r}, callback)."
            )
        named[name] = callback
    return named


def name_of(callback: Any) -> str:
    """Return the name of an entry that has none: its class or function, in lower case.

    >>> name_of(minikeras.EarlyStopping())
    'earlystopping'
    """
    name = getattr(callback, "__name__", type(callback).__name__)
    return str(name).strip("<>").lower()


def split_pair(pair: tuple[Any, ...]) -> tuple[str, Any]:
    """Return name and callback of a pair; the callback may be None, and is left out then."""
    if len(pair) != 2 or not isinstance(pair[0], str):
        raise TypeError(
            f"an entry of `callbacks` must be a callback or a pair (name, callback), got "
            f"{describe(pair)}. Pass such as ('stop', EarlyStopping())."
        )
    name, callback = pair
    if callback is not None:
        check_entry(name, callback)
    elif "__" in name or not name:
        check_name(name)
    return name, callback


def check_entry(name: str, callback: Any) -> None:
    """Refuse what is neither a callback nor a function that creates one."""
    check_name(name)
    if isinstance(callback, type):
        raise TypeError(
            f"`callbacks` must hold instances of minikeras.Callback, got the class "
            f"{callback.__name__}. Pass {callback.__name__}()."
        )
    if not isinstance(callback, minikeras.Callback) and not callable(callback):
        raise TypeError(
            f"`callbacks` must hold instances of minikeras.Callback, or functions of the model "
            f"that create one, got {describe(callback)}. Pass such as "
            f"EarlyStopping(patience=3), or lambda model: LRScheduler(...)."
        )


def check_name(name: str) -> None:
    """Refuse a name that could not be found in callbacks__name__setting."""
    if "__" in name or not name:
        raise ValueError(
            f"`callbacks` has the name {name!r}; expected a name without two underscores in a row, "
            f"which separate it from its settings: callbacks__stop__patience. Rename it."
        )


# --- settings -------------------------------------------------------------------------------------


def list_settings(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the callbacks and their settings, such as stop -> callback and stop__patience -> 3."""
    found = {}
    for name, callback in named.items():
        found[name] = callback
        for setting, value in settings_of(callback).items():
            found[f"{name}__{setting}"] = value
    return found


def settings_of(callback: Any) -> dict[str, Any]:
    """Return the arguments of a callback's constructor that it keeps under the same names.

    >>> settings_of(minikeras.EMA(0.9))
    {'decay': 0.9, 'evaluate': False}
    """
    settings = {}
    for name in arguments_of_constructor(callback):
        if name in vars(callback):
            settings[name] = vars(callback)[name]
    return settings


def arguments_of_constructor(callback: Any) -> list[str]:
    """Return the names of the constructor's arguments; a function and None have no settings."""
    if not isinstance(callback, minikeras.Callback):
        return []
    names = []
    for name, parameter in inspect.signature(type(callback)).parameters.items():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            names.append(name)
    return names


def set_settings(callbacks: Any, changes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the callbacks as pairs, with some of them changed; those given are left as they are.

    Args:
        callbacks: as for `name_callbacks`.
        changes: name -> another callback or None, or name__setting -> value.

    >>> stop = minikeras.EarlyStopping(patience=2)
    >>> (name, changed), = set_settings([stop], {"earlystopping__patience": 5})
    >>> name, changed.patience, stop.patience
    ('earlystopping', 5, 2)

    Raises:
        ValueError: there is no callback of this name, or it has no setting of this name.
        TypeError: a callback does not keep its arguments, so that it cannot be created again.
    """
    named = name_callbacks(callbacks)
    settings: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        name, separator, setting = key.partition("__")
        if name not in named:
            known = "Known are none: pass them as `callbacks`, a list, first."
            if named:
                known = f"Known are {', '.join(map(repr, named))}.{did_you_mean(name, named)}"
            raise ValueError(f"callbacks__{key}: there is no callback named {name!r}. {known}")
        if separator:
            settings.setdefault(name, {})[setting] = value
        else:
            if value is not None:
                check_entry(name, value)
            named[name] = value
    for name, changed in settings.items():
        named[name] = create_changed(name, named[name], changed)
    return list(named.items())


def create_changed(name: str, callback: Any, changed: Mapping[str, Any]) -> Any:
    """Return a new callback of the same class with some of its constructor's arguments changed."""
    known = arguments_of_constructor(callback)
    for setting in changed:
        if setting not in known:
            kind = type(callback).__name__
            if known:
                has = f"Known are {', '.join(map(repr, known))}.{did_you_mean(setting, known)}"
            else:
                has = f"It has none. Set the whole callback: callbacks__{name}=..."
            raise ValueError(
                f"callbacks__{name}__{setting}: {kind} has no setting {setting!r}. {has}"
            )
    settings = settings_of(callback)
    for argument in inspect.signature(type(callback)).parameters:
        if argument not in settings and argument not in changed:
            raise TypeError(
                f"callbacks__{name}__{next(iter(changed))}: {type(callback).__name__} is created "
                f"again with the new setting, and all arguments of its __init__ are expected as "
                f"attributes of the same names; it has no attribute {argument!r}. Write "
                f"self.{argument} = {argument} in its __init__, or set the whole callback: "
                f"callbacks__{name}=..."
            )
    settings.update(changed)
    return type(callback)(**settings)


# --- the callbacks of a fit -----------------------------------------------------------------------


def create_callbacks(named: Mapping[str, Any], model: minikeras.Model) -> dict[str, Any]:
    """Return the callbacks that a fit trains with: copies, and what the functions create.

    Args:
        named: what `name_callbacks` returned.
        model: the model, compiled; functions are called with it.

    Raises:
        TypeError: a callback cannot be copied, or a function creates something else.
        ValueError: a callback holds the optimizer of another model.
    """
    created = {}
    for name, callback in named.items():
        if callback is None:
            continue
        if isinstance(callback, minikeras.LRScheduler):
            kind = type(callback.scheduler).__name__
            raise ValueError(
                f"`callbacks` has an LRScheduler under {name!r}, whose {kind} changes the "
                f"optimizer that it was made with, and each fit creates a new optimizer. Pass a "
                f"function that creates it for the model of the fit: "
                f"lambda model: LRScheduler({kind}(model.optimizer, ...))."
            )
        if isinstance(callback, minikeras.Callback):
            created[name] = copy_callback(name, callback)
            continue
        check_takes_model(name, callback)
        created[name] = callback(model)
        if not isinstance(created[name], minikeras.Callback):
            raise TypeError(
                f"the function under {name!r} in `callbacks` must create an instance of "
                f"minikeras.Callback from the model, got {describe(created[name])}. Let it return "
                f"one."
            )
    return created


def check_takes_model(name: str, function: Any) -> None:
    """Refuse a function that is not made to be called with the model."""
    what = f"the function under {name!r} in `callbacks` is called with the model of the fit"
    if isinstance(function, functools.partial) and isinstance(function.func, type):
        kind = function.func.__name__
        raise TypeError(
            f"{what}, and functools.partial of {kind} would take it for its next argument. Pass an "
            f"instance, {kind}(...)."
        )
    try:
        inspect.signature(function).bind("model")
    except TypeError as error:
        raise TypeError(
            f"{what}, and cannot be: {error}. Pass a function of the model, lambda model: ..., or "
            f"the callback itself."
        ) from None
    except ValueError:  # some functions of C have no signature
        return


def copy_callback(name: str, callback: minikeras.Callback) -> minikeras.Callback:
    """Return a copy of a callback, so that no state of one fit gets into another."""
    try:
        return copy.deepcopy(callback)
    except Exception as error:
        kind = type(callback).__name__
        raise TypeError(
            f"each fit trains with a copy of its callbacks, and {kind} under {name!r} in "
            f"`callbacks` cannot be copied: {error}. Pass a function that creates it: "
            f"lambda model: {kind}(...)."
        ) from error
