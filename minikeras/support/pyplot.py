"""Import matplotlib when a figure is asked for."""

from __future__ import annotations

from typing import Any


def import_pyplot() -> Any:
    """Return matplotlib.pyplot.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message is the line that installs it.
    """
    try:
        import matplotlib.pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install matplotlib") from error
    return matplotlib.pyplot
