"""The history as a figure: a panel for each metric, training and validation together.

matplotlib is imported only by the call. Nothing is shown or saved: call plt.show() or
plt.savefig(...); a notebook shows the figure by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from minikeras.columns import infer_mode, is_rate
from minikeras.errors import did_you_mean
from minikeras.support.pyplot import import_pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# colors of Okabe and Ito's palette, which colour-blind people can tell apart;
# in grey print the dashes and markers tell the lines apart
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
MARKERS = 30  # lines of more epochs have no markers
PANEL = (4.4, 3.2)  # width and height of a panel in inches
WIDEST = 3  # panels in a row


def plot_history(dfhistory: pd.DataFrame, metrics: str | Iterable[str] | None = None) -> list[Axes]:
    """Plot a history: a panel per metric, with validation, and one for a changing learning rate.

    A ring marks the best epoch, of validation if there is any, if the name tells which direction is
    better (inferred as by EarlyStopping). A line has no gaps: it connects the epochs with a value,
    also across epochs without validation.

    Args:
        dfhistory: what `fit` returned, whose row k is epoch k + 1; or the file of a CSVLogger as
            pandas reads it, with the numbers in a column `epoch` (or an index of that name).
        metrics: one column or several, in this order; default all. "loss" includes "val_loss".

    Returns:
        The panels, matplotlib's Axes, in one new figure: `axes[0].figure`. Nothing is shown or
        saved.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        TypeError, ValueError: not a history, a list of histories, a history without epochs, with
            several rows of one epoch or with values that are not numbers, or a name that is not
            one of its columns.

    >>> import minikeras
    >>> dfhistory = pd.DataFrame({"loss": [0.5, 0.3], "val_loss": [0.6, 0.4], "lr": [0.1, 0.01]})
    >>> axes = minikeras.plot_history(dfhistory)
    >>> [axis.get_title() for axis in axes]
    ['loss', 'lr']
    """
    frame = _check_history(dfhistory)
    names = _panel_names(frame, metrics)
    _check_numbers(frame, names)
    plt = import_pyplot()
    columns = 2 if len(names) == 4 else min(len(names), WIDEST)
    rows = -(-len(names) // columns)  # rounded up
    width, height = PANEL
    _, grid = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        layout="constrained",
        squeeze=False,
    )
    axes: list[Axes] = list(grid.flat)
    for axis, name in zip(axes, names, strict=False):
        _draw_panel(axis, frame, name)
    for axis in axes[len(names) :]:
        axis.remove()
    return axes[: len(names)]


def plot_metric(dfhistory: pd.DataFrame, metric: str) -> Axes:
    """Plot one column of `dfhistory`, `metric`, with its validation, and return the panel.

    See `plot_history`.

    >>> import minikeras
    >>> dfhistory = pd.DataFrame({"loss": [0.5, 0.3], "val_loss": [0.6, 0.4]})
    >>> axis = minikeras.plot_metric(dfhistory, "loss")
    >>> [line.get_label() for line in axis.get_lines()]
    ['training', 'validation', 'best: 0.4 in epoch 2']
    """
    return plot_history(dfhistory, [metric])[0]


def _check_history(dfhistory: Any) -> pd.DataFrame:
    """Return the history with its epochs, numbered from 1, as index."""
    if isinstance(dfhistory, list | tuple):
        raise TypeError(
            f"dfhistory must be the DataFrame that fit returned, got a {type(dfhistory).__name__} "
            f"of {len(dfhistory)}. For the mean of several histories, epoch by epoch, pass "
            "pd.concat(histories).groupby(level=0).mean()."
        )
    if not isinstance(dfhistory, pd.DataFrame):
        raise TypeError(
            f"dfhistory must be the DataFrame that fit returned, got {type(dfhistory).__name__}. "
            f"After a fit it is at model.history too."
        )
    if dfhistory.empty:
        raise ValueError(
            "dfhistory has no epoch to draw. Pass what fit returned, after one epoch or more."
        )
    frame = dfhistory.set_index("epoch") if "epoch" in dfhistory else dfhistory
    frame = frame.rename(columns=str)
    if frame.columns.empty:
        raise ValueError(
            "dfhistory has no column but epoch. Pass what fit returned, with loss and metrics."
        )
    if not frame.index.is_unique:
        twice = frame.index[frame.index.duplicated()][0]
        if "epoch" in dfhistory:
            remedy = 'dfhistory.groupby("epoch").mean()'
        else:
            remedy = "dfhistory.groupby(level=0).mean()"
        raise ValueError(
            f"dfhistory has several rows of one epoch (`{twice}` in its index); expected a row per "
            f"epoch. For the mean of several histories pass {remedy}."
        )
    if frame.index.name != "epoch" and is_numeric_dtype(frame.index):
        frame.index = frame.index + 1
    return frame


def _panel_names(frame: pd.DataFrame, metrics: str | Iterable[str] | None) -> list[str]:
    """Return a name for each panel; a validation column without a training column has its own."""
    columns = [str(name) for name in frame]
    if metrics is None:
        names = []
        for name in columns:
            if not name.startswith("val_") or name.removeprefix("val_") not in columns:
                names.append(name)
        return names
    if not isinstance(metrics, Iterable):
        raise TypeError(
            f"metrics must be a column's name or several, got {metrics!r}. "
            f'Pass "loss" or ["loss", "lr"].'
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
                f"metrics has {name!r}, which is no column of the history. "
                f"Its columns are {known}.{hint}"
            )
    return names


def _check_numbers(frame: pd.DataFrame, names: list[str]) -> None:
    """Refuse an index or columns to be drawn that are not numbers."""
    if not is_numeric_dtype(frame.index):
        raise ValueError(
            f"dfhistory's index must be numbers, from 0 as in a history, got {frame.index[0]!r}. "
            f"Pass what fit returned."
        )
    for name in names:
        for column in (name, f"val_{name}"):
            if column in frame and not is_numeric_dtype(frame[column]):
                raise ValueError(
                    f"dfhistory has {frame[column].iloc[0]!r} in the column {column!r}; expected "
                    f"numbers. Name the columns to draw in metrics, or drop this one."
                )


def _style_of(name: str) -> dict[str, Any]:
    if name.startswith("val_"):
        return VALIDATION
    return RATE if is_rate(name) else TRAINING


def _draw_panel(axis: Axes, frame: pd.DataFrame, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    columns = [name]
    if f"val_{name}" in frame:
        columns.append(f"val_{name}")
    for column in columns:
        values = _finite(frame[column])
        style = dict(_style_of(column))
        if len(values) > MARKERS:
            style["marker"] = ""
        axis.plot(values.index, values, **style, ms=3.5)
    if is_rate(name):
        values = _finite(frame[name])
        # a learning rate of 0 cannot be drawn on a log scale
        if 0 < values.min() * 100 <= values.max():
            axis.set_yscale("log")
    else:
        _mark_best(axis, _finite(frame[columns[-1]]), name)
        axis.legend(frameon=False, fontsize="small")
    axis.set_title(name, parse_math=False)  # a $ in it is a $
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    first = frame.index.min()
    last = frame.index.max()
    # there is no epoch 0 that could have a tick
    axis.set_xlim(first - 0.5, last + max(0.5, (last - first) / 50))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _mark_best(axis: Axes, values: pd.Series[float], name: str) -> None:
    mode = infer_mode(name)
    if mode is None or values.empty:
        return
    place = int(values.argmin() if mode == "min" else values.argmax())  # the first of equals
    epoch = values.index[place]
    best = values.iloc[place]
    axis.plot([epoch], [best], **BEST, label=f"best: {best:.4g} in epoch {epoch}")


def _finite(values: pd.Series[float]) -> pd.Series[float]:
    return values[np.isfinite(values.astype(float))]
