"""Losses and metrics of several outputs: check each by itself, and name it in errors."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from minikeras.errors import did_you_mean
from minikeras.nests import names_in
from minikeras.results import has_parts


@contextlib.contextmanager
def prefix_messages(name: str) -> Iterator[None]:
    """Begin errors and warnings with a name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error.__cause__
    for warning in caught:
        warnings.warn(f"{name}: {warning.message}", warning.category, stacklevel=3)


def find_failing_part(error: BaseException) -> tuple[Any, Any, Any] | None:
    """Return name, outputs and labels of the loss that failed; None if it is not one of several."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        given = frame.f_locals
        if frame.f_code.co_name == "forward" and has_parts(given.get("self")):
            if "y_pred" in given and "y_true" in given:
                return given["name"], given["y_pred"], given["y_true"]
    return None


def check_extra_labels(
    outputs: Any, labels: Any, of_losses: Iterable[Any], of_metrics: Iterable[Any]
) -> None:
    """Refuse labels with a name that no loss and no metric uses.

    If a loss is for an output that is not there, nothing is raised: the loss says so.

    Raises:
        ValueError: there are such labels.
    """
    losses = list(of_losses)
    names = names_in(labels) or []
    if any(name not in (names_in(outputs) or ()) for name in losses):
        return
    used = list(dict.fromkeys([*losses, *of_metrics]))
    shown = ", ".join(map(repr, used))
    if names and not set(names) & set(used):
        raise ValueError(
            f"the labels have the parts {', '.join(map(repr, names))}, and the losses and metrics "
            f"are for {shown}; expected the same names. Build the labels as forward builds the "
            "outputs: a dict with these keys, or a tuple with these positions."
        )
    for name in names:
        if name in used:
            continue
        hint = ""
        if isinstance(name, str):
            hint = did_you_mean(name, [key for key in used if isinstance(key, str)])
        raise ValueError(
            f"the labels have a part {name!r}, and no loss and no metric is for it; there are "
            f"losses and metrics for {shown}.{hint} Leave it out of the labels; or give it a loss "
            "of weight 0, (loss, 0.0), which is logged and not trained."
        )
