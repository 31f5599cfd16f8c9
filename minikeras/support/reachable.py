"""What a value reaches by attributes, containers, closures and the globals that its functions name.

reachable            every object once, with a name for it, such as dl_train.dataset.transform.rng
PlainAttributes      the counters and lists of such objects, where a fit changes them
"""

from __future__ import annotations

import functools
import itertools
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MOST = 20_000  # objects that are looked at
LONG = 1_000  # items of a container that are looked at
SCALARS = (bool, int, float, complex, str, bytes, type(None))
FLAT = (*SCALARS, Tensor, np.ndarray, np.generic)  # which reach nothing
CLOSED = (
    "pandas",
    "PIL",
    "pyarrow",
    "polars",
    "matplotlib",
    "logging",
    "threading",
    "tqdm",
    "h5py",
)
LIBRARIES = ("torch", "numpy", "minikeras", "builtins")
CONTAINERS = (list, tuple, deque, set, frozenset)
MADE_LATER = (
    "__dict__",
    "__weakref__",
    "__annotations__",
)  # of a class: Python makes the last when it is asked for
SIZE = 100_000  # elements of a list or array that is compared and held
ORDER = "order"  # the key of an order, in place of a list


def reachable(roots: Mapping[str, Any], without: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield each object that the roots reach, with its name; nearest first, in a fixed order.

    Looks into neither tensors, arrays nor long lists of numbers; of large nests it looks at the
    first 20,000 objects.

    Args:
        roots: name -> object.
        without: objects that are not looked into.

    >>> [name for name, _ in reachable({"loader": {"rows": [1, [2]]}})]
    ['loader', "loader['rows']", "loader['rows'][0]", "loader['rows'][1]", "loader['rows'][1][0]"]
    """
    seen = {id(value) for value in without}
    kept = []  # an object that a property made must not give its id to another
    waiting = deque(roots.items())
    count = 0
    while waiting and count < MOST:
        name, value = waiting.popleft()
        if id(value) in seen and not isinstance(value, SCALARS):
            continue
        seen.add(id(value))
        kept.append(value)
        count += 1
        yield name, value
        for part, child in children(value):
            waiting.append((name + part, child))


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value holds, each with what is appended to the value's name."""
    kind = type(value)
    if isinstance(value, (*FLAT, types.ModuleType, range, slice, torch.Generator, RemovableHandle)):
        return  # a handle of a hook has a number that counts up in a process
    if kind.__module__.partition(".")[0] in CLOSED:
        return
    if isinstance(value, dict):
        for number, (key, item) in enumerate(list(dict.items(value))):
            if number >= LONG:
                return
            yield f"[{key!r}]" if isinstance(key, SCALARS) else f"[{number}]", item
    elif isinstance(value, CONTAINERS):
        yield from items_of(value)
    elif isinstance(value, functools.partial):
        yield ".func", value.func
        yield ".args", value.args
        yield ".keywords", value.keywords
    elif isinstance(value, types.FunctionType):
        yield from names_of_function(value)
    elif isinstance(value, type):
        yield from members_of_class(value)
        return
    elif isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        yield ".__self__", value.__self__
        if isinstance(value, types.MethodType):
            yield ".__func__", value.__func__
        return
    yield from attributes_of(value)
    for cls in kind.__mro__:
        if is_users(cls):
            yield f".{cls.__name__}", cls


def items_of(container: Any) -> Iterator[tuple[str, Any]]:
    """Yield the items of a list, a tuple or a set; not those of a long one of numbers or tensors.

    A subclass may draw random numbers as it is iterated: its items are read as those of its base.
    """
    base: Any = next(kind for kind in CONTAINERS if isinstance(container, kind))
    items = list(itertools.islice(base.__iter__(container), LONG))
    if base.__len__(container) > LONG and all(is_flat(item) for item in items[:32]):
        return
    for number, item in enumerate(items):
        yield f"[{number}]", item


def is_flat(value: Any) -> bool:
    """Whether a value, or each item of a tuple, is a number, a string or a tensor."""
    if type(value) in (tuple, list):
        return len(value) < LONG and all(isinstance(item, FLAT) for item in value)
    return isinstance(value, FLAT)


def attributes_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield an object's own attributes; no property is called."""
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        for name, child in list(attributes.items()):
            yield f".{name}", child
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if isinstance(vars(cls).get(name), types.MemberDescriptorType):
                try:
                    yield f".{name}", getattr(value, name)
                except AttributeError:  # it has not been set
                    continue


def names_of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function closes over, its defaults, and the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # it has not been filled
            continue
    for number, default in enumerate(function.__defaults__ or ()):
        yield f".__defaults__[{number}]", default
    for name, default in (function.__kwdefaults__ or {}).items():
        yield f".{name}", default
    if not is_users_code(function.__code__):
        return
    named = names_in(function.__code__)
    for name in named:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType):
            for part in named:
                child = vars(value).get(part)
                if isinstance(child, (torch.Generator, np.random.Generator, np.random.RandomState)):
                    yield f".{name}.{part}", child
        elif value is not None and (not isinstance(value, type) or is_users(value)):
            yield f".{name}", value


def names_in(code: types.CodeType) -> list[str]:
    """The global names and attributes that a function's code has, with those of functions inside it."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(names_in(constant))
    return list(names)


def members_of_class(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield what a user's class has as attributes, and its methods."""
    if not is_users(cls):
        return
    for name, member in list(vars(cls).items()):
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        elif isinstance(member, property):
            member = member.fget
        if member is not None and not name.startswith("__abc") and name not in MADE_LATER:
            yield f".{name}", member


def is_users(cls: type) -> bool:
    """Whether a class is of a script or a package that is not installed."""
    root = cls.__module__.partition(".")[0]
    if root in LIBRARIES or (root in sys.stdlib_module_names and root != "__main__"):
        return False
    module = sys.modules.get(cls.__module__)
    return not is_installed(getattr(module, "__file__", None) or "")


def is_users_code(code: types.CodeType) -> bool:
    return not is_installed(code.co_filename)


def is_installed(path: str) -> bool:
    """Whether a file is of the standard library, of minikeras or of an installed package."""
    folders = (OWN, STANDARD)
    return "site-packages" in path or "dist-packages" in path or path.startswith(folders)


OWN = __file__.rpartition("reachable")[0]
STANDARD = types.__file__.rpartition("types")[0]


class PlainAttributes:
    """Numbers, strings, short lists and arrays that objects keep as attributes, where a fit changes them.

    A sampler that counts its epochs, a list of rows that is shuffled in place, a number in the model. Of a list of
    other objects, such as pairs of a path and a label, the order is held.

    >>> from types import SimpleNamespace
    >>> sampler = SimpleNamespace(epoch=0, seed=7)
    >>> attributes = PlainAttributes({"dl_train.sampler": sampler})
    >>> sampler.epoch += 1
    >>> attributes.states()
    {'dl_train.sampler': {'epoch': 1}}
    >>> attributes.restore({})
    >>> sampler.epoch
    0
    """

    def __init__(self, holders: Mapping[str, Any]) -> None:
        self.holders = dict(holders)
        self.begun = {name: plain_attributes(holder) for name, holder in self.holders.items()}
        self.lists = {name: lists_of_objects(holder) for name, holder in self.holders.items()}

    def states(self) -> dict[str, dict[str, Any]]:
        """The attributes that are other than they were when this was made."""
        changed = {}
        for name, holder in self.holders.items():
            begun = self.begun[name]
            other = {}
            for key, value in plain_attributes(holder).items():
                if key not in begun or not is_same(value, begun[key]):
                    other[key] = value
            for key, items in self.lists[name].items():
                order = order_of(vars(holder).get(key), items)
                if order is not None:
                    other[key] = {ORDER: order}
            if other:
                changed[name] = other
        return changed

    def restore(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Put the attributes back as they were when `states` was called."""
        now = self.states()
        for name, holder in self.holders.items():
            values = dict(states.get(name, {}))
            for key in now.get(name, {}):
                if key not in values and key in self.begun[name]:
                    values[key] = copied(self.begun[name][key])
                elif key not in values and key in self.lists[name]:
                    values[key] = {ORDER: list(range(len(self.lists[name][key])))}
            for key, value in values.items():
                if isinstance(value, dict):
                    put_order(
                        vars(holder).get(key), self.lists[name].get(key, []), value.get(ORDER)
                    )
                else:
                    put_attribute(holder, key, value)


def lists_of_objects(holder: Any) -> dict[str, list[Any]]:
    """An object's own attributes that are lists of other things than numbers and strings; copies of the lists."""
    found = {}
    for name, value in vars(holder).items():
        if type(value) is list and 1 < len(value) <= SIZE and not is_plain(value, False):
            found[name] = list(value)
    return found


def order_of(items: Any, begun: list[Any]) -> list[int] | None:
    """Where each object of a list was in the list as it began; None if it is as it was, or has other objects."""
    if type(items) is not list or len(items) != len(begun):
        return None
    if all(item is other for item, other in zip(items, begun, strict=True)):
        return None
    places: dict[int, list[int]] = {}
    for number, item in reversed(list(enumerate(begun))):
        places.setdefault(id(item), []).append(number)
    order = []
    for item in items:
        left = places.get(id(item))
        if not left:
            return None
        order.append(left.pop())
    return order


def is_order(value: Any) -> bool:
    """Whether a value is an order of a list's objects, as `PlainAttributes.states` gives it: each place once.

    >>> is_order({"order": [2, 0, 1]}), is_order({"order": [2, 0, 0]}), is_order([2, 0, 1])
    (True, False, False)
    """
    if type(value) is not dict or value.keys() != {ORDER}:
        return False
    order = value[ORDER]
    if (
        type(order) is not list
        or len(order) > SIZE
        or not all(type(number) is int for number in order)
    ):
        return False
    return sorted(order) == list(range(len(order)))


def put_order(items: Any, begun: list[Any], order: Any) -> None:
    """Put the objects of a list into an order that `order_of` gave, where the list has as many."""
    if type(items) is not list or not isinstance(order, (list, tuple)) or len(items) != len(begun):
        return
    if not all(type(number) is int for number in order) or sorted(order) != list(range(len(begun))):
        return
    items[:] = [begun[number] for number in order]


def put_attribute(holder: Any, name: str, value: Any) -> None:
    """Set an attribute; a list, an array or a tensor of that size is filled, since others may hold it too."""
    current = vars(holder).get(name)
    value = copied(value)
    if isinstance(current, list) and isinstance(value, list):
        current[:] = value
    elif (
        isinstance(current, np.ndarray)
        and current.flags.writeable
        and current.shape == np.shape(value)
    ):
        current[...] = value
    elif isinstance(current, Tensor) and isinstance(value, Tensor):
        vars(holder)[name] = value.to(current.device)
    else:
        vars(holder)[name] = value


def plain_attributes(holder: Any) -> dict[str, Any]:
    """An object's own attributes that are numbers, strings, or short lists and arrays of numbers; copies."""
    found = {}
    for name, value in vars(holder).items():
        if name not in ("training", "stop_training") and is_plain(
            value, isinstance(holder, nn.Module)
        ):
            found[name] = copied(value)
    return found


def is_plain(value: Any, floats: bool) -> bool:
    """Whether an attribute is compared and held; arrays and tensors of floats where `floats`, else of integers."""
    if type(value) in (bool, int, float, complex, str, type(None)):
        return True
    if type(value) is list:
        return len(value) <= SIZE and all(type(item) in (bool, int, float, str) for item in value)
    if isinstance(value, np.ndarray):
        return value.size <= SIZE and value.dtype.kind in ("fiub" if floats else "iub")
    if type(value) is Tensor:
        return value.numel() <= SIZE and (floats or not value.is_floating_point())
    return False


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, (list, np.ndarray)) else value


def is_same(value: Any, other: Any) -> bool:
    """Whether two values are of one type and equal; NaN equals NaN."""
    if type(value) is not type(other):
        return False
    if isinstance(value, Tensor):
        return (
            value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other)
        )
    if isinstance(value, np.ndarray):
        return value.dtype == other.dtype and np.array_equal(value, other)
    return bool(value == other or (value != value and other != other))
