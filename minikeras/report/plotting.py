"""The history as a figure: a panel for each metric, training and validation together.

matplotlib is imported by the call. Nothing is shown or written: plt.show(), plt.savefig(...) or a notebook's cell does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from minikeras.columns import is_rate, mode_of
from minikeras.errors import did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of Okabe and Ito's palette, which colour-blind people tell apart; dashes and markers do it in grey print
TRAINING: dict[str, Any] = {
    "color": "#0072B2",
    "linestyle": "-",
    "marker": "o",
    "label": "training",
}
VALIDATION: dict[str, Any] = {
    "color": "#D55E00",
    "linestyle": "--",
    "marker": "s",
    "label": "validation",
}
RATE: dict[str, Any] = {
    "color": "#555555",
    "linestyle": "-",
    "marker": "o",
    "drawstyle": "steps-post",
}
BEST: dict[str, Any] = {
    "color": "black",
    "linestyle": "",
    "marker": "o",
    "ms": 10,
    "fillstyle": "none",
    "zorder": 3,
}
MARKERS = 30  # epochs up to which each has a marker
PANEL = 4.4, 3.2  # inches
WIDEST = 3  # panels in a row


def plot_history(dfhistory: pd.DataFrame, metrics: str | Iterable[str] | None = None) -> list[Axes]:
    """Draw a history: one panel per metric, with its validation, and one for the learning rate where it changed.

    A ring marks the best epoch, of validation where there is one, if the name says what is better (as EarlyStopping
    reads it). A line runs through epochs without a value, as where validation was skipped.

    Args:
        dfhistory: what `fit` returned, whose row k is epoch k + 1; or a CSVLogger's file as pandas reads it, whose
            column `epoch` (or index of that name) has the numbers.
        metrics: a column or several, in this order; default all. "loss" brings "val_loss" with it.

    Returns:
        The panels, matplotlib's Axes, in one new figure: `axes[0].figure`. Nothing is shown or saved.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError, ValueError: no history, one without an epoch or with values that are no numbers, or a name that is
            not one of its columns.

    >>> import minikeras
    >>> dfhistory = pd.DataFrame({"loss": [0.5, 0.3], "val_loss": [0.6, 0.4], "lr": [0.1, 0.01]})
    >>> axes = minikeras.plot_history(dfhistory)
    >>> [axis.get_title() for axis in axes]
    ['loss', 'lr']
    """
    frame = _checked(dfhistory)
    names = _names(frame, metrics)
    _check_numbers(frame, names)
    plt = _pyplot()
    columns = 2 if len(names) == 4 else min(len(names), WIDEST)
    rows = -(-len(names) // columns)
    figsize = PANEL[0] * columns, PANEL[1] * rows
    _, grid = plt.subplots(rows, columns, figsize=figsize, layout="constrained", squeeze=False)
    axes: list[Axes] = list(grid.flat)
    for axis, name in zip(axes, names, strict=False):
        _panel(axis, frame, name)
    for axis in axes[len(names) :]:
        axis.remove()
    return axes[: len(names)]


def plot_metric(dfhistory: pd.DataFrame, metric: str) -> Axes:
    """Draw one column of `dfhistory`, `metric`, with its validation, and return the panel; see `plot_history`.

    >>> import minikeras
    >>> axis = minikeras.plot_metric(pd.DataFrame({"loss": [0.5, 0.3], "val_loss": [0.6, 0.4]}), "loss")
    >>> [line.get_label() for line in axis.get_lines()]
    ['training', 'validation', 'best: 0.4 in epoch 2']
    """
    return plot_history(dfhistory, [metric])[0]


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install matplotlib") from error
    return matplotlib.pyplot


def _checked(dfhistory: Any) -> pd.DataFrame:
    """The history with its epochs, which count from 1, as index."""
    if not isinstance(dfhistory, pd.DataFrame):
        raise TypeError(
            f"dfhistory must be the DataFrame that fit returned, got {type(dfhistory).__name__}. "
            f"After a fit it is at model.history too."
        )
    if dfhistory.empty:
        raise ValueError(
            "dfhistory has no epoch to draw. Pass what fit returned, after one epoch or more."
        )
    frame = (dfhistory.set_index("epoch") if "epoch" in dfhistory else dfhistory).rename(
        columns=str
    )
    if frame.columns.empty:
        raise ValueError(
            "dfhistory has no column but epoch. Pass what fit returned, with loss and metrics."
        )
    if frame.index.name != "epoch" and is_numeric_dtype(frame.index):
        frame.index = frame.index + 1
    return frame


def _names(frame: pd.DataFrame, metrics: str | Iterable[str] | None) -> list[str]:
    """A name for each panel; validation without a training column has one of its own."""
    columns = [str(name) for name in frame]
    if metrics is None:
        return [
            name
            for name in columns
            if name.removeprefix("val_") not in columns or not name.startswith("val_")
        ]
    if not isinstance(metrics, Iterable):
        raise TypeError(
            f'metrics must be a column\'s name or several, got {metrics!r}. Pass "loss" or ["loss", "lr"].'
        )
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    if not names:
        raise ValueError(
            "metrics must name a column of the history or more, got none. Leave it out to draw all."
        )
    for name in names:
        if name not in columns:
            known = ", ".join(map(repr, columns))
            hint = did_you_mean(str(name), columns)
            raise ValueError(
                f"metrics has {name!r}, which is no column of the history. Its columns are {known}.{hint}"
            )
    return names


def _check_numbers(frame: pd.DataFrame, names: list[str]) -> None:
    """What is drawn must be numbers, and over numbers."""
    if not is_numeric_dtype(frame.index):
        raise ValueError(
            f"dfhistory's index must be numbers, from 0 as in a history, got {frame.index[0]!r}. Pass what fit "
            f"returned."
        )
    drawn = [column for name in names for column in (name, f"val_{name}") if column in frame]
    for column in drawn:
        if not is_numeric_dtype(frame[column]):
            raise ValueError(
                f"dfhistory has {frame[column].iloc[0]!r} in the column {column!r}; expected numbers. Name the columns "
                f"to draw in metrics, or drop this one."
            )


def _panel(axis: Axes, frame: pd.DataFrame, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    styles = {name: VALIDATION if name.startswith("val_") else RATE if is_rate(name) else TRAINING}
    if f"val_{name}" in frame:
        styles[f"val_{name}"] = VALIDATION
    for column, style in styles.items():
        values = _finite(frame[column])
        axis.plot(
            values.index,
            values,
            **style | {"marker": style["marker"] if len(values) <= MARKERS else ""},
            ms=3.5,
        )
    if not is_rate(name):
        _mark_best(axis, _finite(frame[list(styles)[-1]]), name)
        axis.legend(frameon=False, fontsize="small")
    elif (
        0 < _finite(frame[name]).min() * 100 <= _finite(frame[name]).max()
    ):  # a rate of 0 has no place on a log scale
        axis.set_yscale("log")
    axis.set_title(name, parse_math=False)  # a $ in it is a $
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    first, last = frame.index.min(), frame.index.max()
    axis.set_xlim(
        first - 0.5, last + max(0.5, (last - first) / 50)
    )  # there is no epoch 0 to have a tick
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _mark_best(axis: Axes, values: pd.Series[float], name: str) -> None:
    mode = mode_of(name)
    if mode is None or values.empty:
        return
    place = int(values.argmin() if mode == "min" else values.argmax())  # the first of equals
    epoch, best = values.index[place], values.iloc[place]
    axis.plot([epoch], [best], **BEST, label=f"best: {best:.4g} in epoch {epoch}")


def _finite(values: pd.Series[float]) -> pd.Series[float]:
    return values[np.isfinite(values.astype(float))]
