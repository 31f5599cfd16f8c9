"""Results that show themselves: printed, or displayed in a notebook, by the call that makes them.

Shown            the base class of such results
show             print or display a result, once for each statement
notebook_cell    the number of the notebook's running cell
is_on_terminal   whether stdout goes to a terminal
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from minikeras.processes import is_main


class Shown:
    """A result that the call that made it has shown already.

    So the same cell of a notebook or the same statement at a prompt does not show it again. A
    subclass has `__str__` and `_repr_html_`.
    """

    # where it was shown, as `_running_statement` returns it; set past a frozen dataclass
    _shown_by: Any = None

    def __repr__(self) -> str:
        # IPython asks `_ipython_display_`, Python's prompt knows nothing but this
        is_at_prompt = _ipython_shell() is None
        return "" if is_at_prompt and self._is_just_shown() else str(self)

    def _repr_html_(self) -> str:
        raise NotImplementedError

    def _ipython_display_(self) -> None:
        if self._is_just_shown():
            return
        if notebook_cell() is None:
            raise NotImplementedError  # IPython goes on to print what `repr` returns
        _display(self)

    def _is_just_shown(self) -> bool:
        statement = _running_statement()
        if isinstance(statement, int):
            return bool(statement == self._shown_by)
        # the same one: equal ones may be typed twice
        return statement is not None and statement is self._shown_by

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        state.pop("_shown_by", None)  # a statement cannot be pickled
        return state


def show(result: Shown) -> None:
    """Display a result in a notebook, otherwise print it; with several processes on rank 0."""
    if notebook_cell() is not None:
        _display(result)
    elif is_main():
        print(result)
    object.__setattr__(result, "_shown_by", _running_statement())


def _display(result: Shown) -> None:
    formats = {"text/html": result._repr_html_(), "text/plain": str(result)}
    sys.modules["IPython"].display.display(formats, raw=True)


def notebook_cell() -> int | None:
    """Return the number of the notebook's running cell.

    None in a script, and in a terminal, where IPython has no kernel.
    """
    shell = _ipython_shell()
    return shell.execution_count if hasattr(shell, "kernel") else None


def is_on_terminal() -> bool:
    """Tell whether stdout goes to a terminal."""
    isatty = getattr(sys.stdout, "isatty", None)  # a custom stdout may have none
    return isatty is not None and bool(isatty())


def _ipython_shell() -> Any:
    return getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()


def _running_statement() -> Any:
    """Return what stands for the running cell, or for the running statement at Python's prompt.

    IPython's is a number, Python's a code object; None in a script.
    """
    shell = _ipython_shell()
    if shell is not None:
        return getattr(shell, "execution_count", None)
    if not hasattr(sys, "ps1"):  # which only an interactive Python has
        return None
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "<module>" and code.co_filename.startswith("<"):  # <stdin>
            return code
        frame = frame.f_back
    return None
