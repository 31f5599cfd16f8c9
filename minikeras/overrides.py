"""Whether a method of a model is the user's own or the library's."""

from __future__ import annotations

from typing import Any


def overrides(model: Any, *names: str) -> bool:
    """Tell whether the user wrote at least one of these methods of `Model`.

    The functions themselves are compared, since `functools.wraps` copies a function's module and
    name: what a subclass, a decorator, `functools.partial` or an assignment to the instance puts
    in a method's place is the user's.
    """
    from minikeras.model import Model  # when called: model.py is above this module

    for name in names:
        method = getattr(model, name)
        function = getattr(method, "__func__", None)
        bound_to = getattr(method, "__self__", None)
        if function is not vars(Model)[name] or bound_to is not model:
            return True
    return False
