"""Walk all objects that a value refers to: by attributes, containers, closures and named globals.

reachable            yields each object once, with a name such as dl_train.dataset.transform.rng
PlainAttributes      the counters and lists of such objects that a fit changes
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

from minikeras.modes import STAYS_IN_EVAL

MOST = 20_000  # objects that are visited
LONG = 1_000  # items of a container that are visited
SCALARS = (bool, int, float, complex, str, bytes, type(None))
FLAT = (*SCALARS, Tensor, np.ndarray, np.generic)  # types whose values refer to nothing
# libraries whose objects are not looked into
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
# members of a class that are not looked at; Python creates the last one on first use
IGNORED_MEMBERS = ("__dict__", "__weakref__", "__annotations__")
# attributes of modules and models that a checkpoint holds in its own way
NOT_COUNTED = ("training", STAYS_IN_EVAL, "stop_training")
SIZE = 100_000  # most elements of a list or array that is compared and copied
ORDER = "order"  # the key of a dict that has the order of a list, in place of the list


def reachable(roots: Mapping[str, Any], without: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield each object that can be reached from the roots, with its name.

    The nearest objects come first, in a fixed order. Tensors, arrays and long lists of numbers are
    not looked into; of a large nest the first 20,000 objects are visited.

    Args:
        roots: name -> object.
        without: objects that are not looked into.

    >>> [name for name, _ in reachable({"loader": {"rows": [1, [2]]}})]
    ['loader', "loader['rows']", "loader['rows'][0]", "loader['rows'][1]", "loader['rows'][1][0]"]
    """
    seen = {id(value) for value in without}
    # Visited objects are kept alive: one that a property creates must not give its id to another.
    kept = []
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
    """Yield what a value refers to, each with what is appended to the value's name."""
    kind = type(value)
    if isinstance(value, (*FLAT, types.ModuleType, range, slice, torch.Generator)):
        return
    if isinstance(value, RemovableHandle):  # its number counts up within a process
        return
    if kind.__module__.partition(".")[0] in CLOSED:
        return
    if isinstance(value, dict):
        for number, (key, item) in enumerate(list(dict.items(value))):
            if number >= LONG:
                return
            shown = repr(key) if isinstance(key, SCALARS) else number
            yield f"[{shown}]", item
    elif isinstance(value, CONTAINERS):
        yield from walk_items(value)
    elif isinstance(value, functools.partial):
        yield ".func", value.func
        yield ".args", value.args
        yield ".keywords", value.keywords
    elif isinstance(value, types.FunctionType):
        yield from walk_function(value)
    elif isinstance(value, type):
        yield from walk_class(value)
        return
    elif isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        yield ".__self__", value.__self__
        if isinstance(value, types.MethodType):
            yield ".__func__", value.__func__
        return
    yield from walk_attributes(value)
    for cls in kind.__mro__:
        if is_users(cls):
            yield f".{cls.__name__}", cls


def walk_items(container: Any) -> Iterator[tuple[str, Any]]:
    """Yield the items of a list, a tuple or a set, unless it is a long one of numbers or tensors.

    Iterating a subclass may draw random numbers, so the methods of its base class are used.
    """
    base: Any = next(kind for kind in CONTAINERS if isinstance(container, kind))
    items = list(itertools.islice(base.__iter__(container), LONG))
    if base.__len__(container) > LONG and all(is_flat(item) for item in items[:32]):
        return
    for number, item in enumerate(items):
        yield f"[{number}]", item


def is_flat(value: Any) -> bool:
    """Tell whether a value, or each item of a tuple, is a number, a string or a tensor."""
    if type(value) in (tuple, list):
        return len(value) < LONG and all(isinstance(item, FLAT) for item in value)
    return isinstance(value, FLAT)


def walk_attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield an object's own attributes, without calling a property."""
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        for name, child in list(attributes.items()):
            yield f".{name}", child
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        if isinstance(slots, str):
            slots = (slots,)
        for name in slots:
            if isinstance(vars(cls).get(name), types.MemberDescriptorType):
                try:
                    yield f".{name}", getattr(value, name)
                except AttributeError:  # not set
                    continue


def walk_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield a function's closure, its defaults, and the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # not assigned
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
    """List the names of globals and attributes in a function's code and in functions inside it."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(names_in(constant))
    return list(names)


def walk_class(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the attributes and methods of a user's class."""
    if not is_users(cls):
        return
    for name, member in list(vars(cls).items()):
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        elif isinstance(member, property):
            member = member.fget
        if member is None or name.startswith("__abc") or name in IGNORED_MEMBERS:
            continue
        yield f".{name}", member


def is_users(cls: type) -> bool:
    """Tell whether a class comes from a script or a package that is not installed."""
    root = cls.__module__.partition(".")[0]
    if root in LIBRARIES or (root in sys.stdlib_module_names and root != "__main__"):
        return False
    module = sys.modules.get(cls.__module__)
    return not is_installed(getattr(module, "__file__", None) or "")


def is_users_code(code: types.CodeType) -> bool:
    """Tell whether code comes from a script or a package that is not installed."""
    return not is_installed(code.co_filename)


def is_installed(path: str) -> bool:
    """Tell whether a file is in the standard library, in minikeras or in an installed package."""
    if "site-packages" in path or "dist-packages" in path:
        return True
    return path.startswith((OWN, STANDARD))


OWN = __file__.rpartition("reachable")[0]
STANDARD = types.__file__.rpartition("types")[0]


class PlainAttributes:
    """Numbers, strings, short lists and arrays in attributes of objects, if a fit changes them.

    Such as the epoch of a sampler, a list of rows that is shuffled in place, or a number in the
    model. Of a list of other objects, such as pairs of a path and a label, only the order is kept.

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

    def __init__(self, owners: Mapping[str, Any]) -> None:
        self.owners = dict(owners)
        self.first = {}  # name -> the attributes as they were first
        self.first_lists = {}  # name -> the lists of objects as they were first
        for name, owner in self.owners.items():
            self.first[name] = plain_attributes(owner)
            self.first_lists[name] = lists_of_objects(owner)

    def states(self) -> dict[str, dict[str, Any]]:
        """Return the attributes that have changed since this object was created."""
        states = {}
        for name, owner in self.owners.items():
            first = self.first[name]
            changed = {}
            for key, value in plain_attributes(owner).items():
                if key not in first or not is_same(value, first[key]):
                    changed[key] = value
            for key, items in self.first_lists[name].items():
                order = find_order(vars(owner).get(key), items)
                if order is not None:
                    changed[key] = {ORDER: order}
            if changed:
                states[name] = changed
        return states

    def restore(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Set the attributes to what they were when `states` was called."""
        now = self.states()
        for name, owner in self.owners.items():
            first = self.first[name]
            first_lists = self.first_lists[name]
            values = dict(states.get(name, {}))
            for key in now.get(name, {}):
                if key in values:
                    continue
                if key in first:
                    values[key] = copy_value(first[key])
                elif key in first_lists:
                    values[key] = {ORDER: list(range(len(first_lists[key])))}
            for key, value in values.items():
                if isinstance(value, dict):
                    items = vars(owner).get(key)
                    set_order(items, first_lists.get(key, []), value.get(ORDER))
                else:
                    set_attribute(owner, key, value)


def lists_of_objects(owner: Any) -> dict[str, list[Any]]:
    """Copy an object's attributes that are lists of other values than numbers and strings."""
    lists = {}
    for name, value in vars(owner).items():
        if type(value) is list and 1 < len(value) <= SIZE and not is_plain(value, False):
            lists[name] = list(value)
    return lists


def find_order(items: Any, first: list[Any]) -> list[int] | None:
    """Find where each object of a list was at first.

    Return None if the list has the same order as then, or other objects.
    """
    if type(items) is not list or len(items) != len(first):
        return None
    if all(item is other for item, other in zip(items, first, strict=True)):
        return None
    places: dict[int, list[int]] = {}
    for number, item in reversed(list(enumerate(first))):
        places.setdefault(id(item), []).append(number)
    order = []
    for item in items:
        left = places.get(id(item))
        if not left:
            return None
        order.append(left.pop())
    return order


def is_order(value: Any) -> bool:
    """Tell whether a value is an order in `PlainAttributes.states`, with each place once.

    >>> is_order({"order": [2, 0, 1]}), is_order({"order": [2, 0, 0]}), is_order([2, 0, 1])
    (True, False, False)
    """
    if type(value) is not dict or value.keys() != {ORDER}:
        return False
    order = value[ORDER]
    if type(order) is not list or len(order) > SIZE:
        return False
    return is_permutation(order)


def is_permutation(order: Any) -> bool:
    """Tell whether a list has each number from 0 once."""
    if not all(type(number) is int for number in order):
        return False
    return sorted(order) == list(range(len(order)))


def set_order(items: Any, first: list[Any], order: Any) -> None:
    """Put the objects of a list into an order of `find_order`, if the list has the same length."""
    if type(items) is not list or not isinstance(order, (list, tuple)):
        return
    if len(items) != len(first) or len(order) != len(first) or not is_permutation(order):
        return
    items[:] = [first[number] for number in order]


def set_attribute(owner: Any, name: str, value: Any) -> None:
    """Set an attribute; a list or an array of the same shape is filled, since others may use it."""
    current = vars(owner).get(name)
    value = copy_value(value)
    if isinstance(current, list) and isinstance(value, list):
        current[:] = value
        return
    if isinstance(current, np.ndarray) and current.flags.writeable:
        if current.shape == np.shape(value):
            current[...] = value
            return
    if isinstance(current, Tensor) and isinstance(value, Tensor):
        value = value.to(current.device)
    vars(owner)[name] = value


def plain_attributes(owner: Any) -> dict[str, Any]:
    """Copy an object's attributes that are numbers, strings, or short lists and arrays of them."""
    attributes = {}
    is_module = isinstance(owner, nn.Module)
    for name, value in vars(owner).items():
        if name not in NOT_COUNTED and is_plain(value, is_module):
            attributes[name] = copy_value(value)
    return attributes


def is_plain(value: Any, floats: bool) -> bool:
    """Tell whether an attribute is compared and copied.

    With `floats`, arrays and tensors of floats are plain too; without, only those of integers.
    """
    if type(value) in (bool, int, float, complex, str, type(None)):
        return True
    if type(value) is list:
        return len(value) <= SIZE and all(type(item) in (bool, int, float, str) for item in value)
    if isinstance(value, np.ndarray):
        kinds = "fiub" if floats else "iub"
        return value.size <= SIZE and value.dtype.kind in kinds
    if type(value) is Tensor:
        return value.numel() <= SIZE and (floats or not value.is_floating_point())
    return False


def copy_value(value: Any) -> Any:
    """Copy a tensor, an array or a list; return anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (list, np.ndarray)):
        return value.copy()
    return value


def is_same(value: Any, other: Any) -> bool:
    """Tell whether two values have one type and are equal; NaN equals NaN."""
    if type(value) is not type(other):
        return False
    if isinstance(value, Tensor):
        if value.shape != other.shape or value.dtype != other.dtype:
            return False
        return torch.equal(value, other)
    if isinstance(value, np.ndarray):
        return value.dtype == other.dtype and np.array_equal(value, other)
    return bool(value == other or (value != value and other != other))
