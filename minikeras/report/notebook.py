"""What a notebook shows: a fit as one output that is redrawn in place, a model as a table.

on_fit_begin         create the output
during training      redraw it by time: a bar, charts of the loss and first metrics, the epochs
on_fit_end           redraw it a last time
fit returns          if the cell ends with the call, the history is not shown below as well

IPython is used only inside a notebook, which has it. The charts are SVG, written here.
"""

from __future__ import annotations

import ast
import html
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from minikeras.columns import infer_mode, is_rate
from minikeras.report.layer_summary import LAZY, LayerRow, label_of, layer_rows
from minikeras.report.progress import Progress, clock, format_logs, wants_bar
from minikeras.support.shown import notebook_cell

if TYPE_CHECKING:
    import pandas as pd

REFRESH = 0.3  # seconds between two redraws
SHARE = 0.02  # of the time, at most, is spent on them
ROWS = 30  # of a table; further epochs or layers are not shown
POINTS = 150  # of a line in a chart; the best epoch has its own ring
CHARTS = 3
WIDTH = 280  # of a chart, in pixels
HEIGHT = 130
LEFT = 60  # space for the numbers on the left
EDGE = 18  # space for the numbers above and below
# of lines, as in plotting.py: colour-blind people can tell them apart, and so can a light page and
# a dark one. No colour of text can be read on both: text has the page's own.
BLUE = "#0072B2"  # training
ORANGE = "#D55E00"  # validation
DASHES = "5 3"  # of validation
STYLE = "font-family: sans-serif; font-size: 13px"
Rows = Mapping[int, Mapping[str, float]]  # epoch -> its row of the history
Point = tuple[int, float]  # epoch and value


def progress(verbose: str | int, *args: Any) -> Progress:
    """Return what shows a fit here; `args` are those of `Progress` without `bar`."""
    bar = wants_bar(verbose)
    kind = LiveTable if bar and notebook_cell() is not None else Progress
    return kind(bar, *args)


class LiveTable(Progress):
    """The bar, the charts and the table of one fit in a notebook; arguments as for `Progress`.

    However short epochs and steps are, it is redrawn at most a few times a second, and for at most
    2 % of the time.
    """

    def on_fit_begin(self) -> None:
        super().on_fit_begin()
        self.rows: dict[int, dict[str, float]] = {}
        self.running_means = ""
        self.lines: list[str] = []
        self.is_validating = False
        self.has_ended = False
        display = sys.modules["IPython"].display.display
        self.display = display(self.formats(), raw=True, display_id=True)

    def say(self, line: str) -> None:
        """Show a line, such as where a fit resumes, inside the one output of the fit."""
        self.lines.append(line)
        if self.has_ended:
            self.redraw()
        else:
            self.redraw_if_due()

    def on_epoch_begin(self, epoch: int) -> None:
        self.start_epoch(epoch)
        self.running_means = ""

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        self.batch = batch
        if time.perf_counter() >= self.next_refresh:
            self.running_means = format_logs(logs)  # waits for the device
            self.redraw()

    def on_evaluate_begin(self) -> None:
        self.is_validating = True
        self.redraw_if_due()

    def on_evaluate_end(self) -> None:
        self.is_validating = False

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.rows[epoch] = self.end_epoch(epoch, logs)
        self.running_means = ""
        self.redraw_if_due()

    def on_fit_end(self) -> None:
        self.has_ended = True
        self.redraw()

    def redraw_if_due(self) -> None:
        """Redraw unless that was done a moment ago."""
        if time.perf_counter() >= self.next_refresh:
            self.redraw()

    def redraw(self) -> None:
        """Replace the displayed output by the current one."""
        now = time.perf_counter()
        self.display.update(self.formats(), raw=True)
        spent = time.perf_counter() - now
        self.next_refresh = now + max(REFRESH, spent / SHARE)

    def formats(self) -> dict[str, str]:
        """Return the output as HTML and as plain text."""
        names = [name for name in self.columns if not name.startswith("val_") and not is_rate(name)]
        charts = "".join(chart(name, self.rows) for name in names[:CHARTS])
        parts = [self.bar_html()]
        for line in self.lines:
            parts.append(f"<div>{html.escape(line)}</div>")
        if charts:
            drawn = {f"val_{name}" for name in names[:CHARTS]}
            is_validated = any(drawn & logs.keys() for logs in self.rows.values())
            parts.append(f"<div>{charts}</div>{legend(is_validated)}")
        times = {epoch: clock(seconds) for epoch, seconds in self.seconds.items()}
        parts.append(epochs_table(self.columns, self.rows, times))
        plain = list(self.lines)
        best = find_best(self.rows)
        for epoch in find_shown(self.rows, best):
            mark = "  lowest val_loss" if epoch == best else ""
            plain.append(f"epoch {epoch}  {format_logs(self.rows[epoch])}  {times[epoch]}{mark}")
        return {
            "text/html": f'<div style="{STYLE}">{"".join(parts)}</div>',
            "text/plain": "\n".join(plain),
        }

    def bar_html(self) -> str:
        """Return the current epoch with its bar, times and running means.

        At the end of the fit, return how it ended.
        """
        if self.has_ended:
            ending = self.ending()
            return f"<div>{ending}</div>" if ending else ""
        if self.epoch is None:
            return "<div>starting</div>"
        steps = f"{self.batch}/{self.steps}" if self.steps else str(self.batch)
        bar = ""
        if self.steps:
            bar = f'<progress max="{self.steps}" value="{self.batch}"></progress> '
        tail = "validating" if self.is_validating else html.escape(self.running_means)
        return f"<div>epoch {self.epoch}/{self.epochs} {bar}{steps} {self.times()} {tail}</div>"

    def times(self) -> str:
        """Return the time since the epoch began, and what is left as far as it is known."""
        times = clock(time.perf_counter() - self.epoch_start)
        epoch_left = self.epoch_left()
        if epoch_left is not None:
            times += f", {clock(epoch_left)} left"
        fit_left = self.fit_left()
        if fit_left is not None:
            times += f" (fit: {clock(fit_left)} left)"
        return f"&nbsp;{times}&nbsp;"

    def take_history(self, history: pd.DataFrame) -> None:
        """Do not show the history below the live output if the cell ends with the call of fit."""
        hide_once(history)


def hide_once(history: pd.DataFrame) -> None:
    """Let IPython show nothing of a DataFrame that is the result of the running cell's last line.

    A cell that ends with `model.fit(...)` has shown every epoch already. The DataFrame is shown as
    usual if the cell ends with anything else, by `display(...)`, and in every later cell.
    """
    cell = notebook_cell()
    shell = sys.modules["IPython"].get_ipython()

    def _ipython_display_() -> None:
        object.__delattr__(history, "_ipython_display_")
        # of the kernel's display hook: there is a message only as it shows a cell's result
        is_result = getattr(shell.displayhook, "msg", None) is not None
        if notebook_cell() != cell or not is_result or not ends_with_fit(shell):
            raise NotImplementedError  # IPython goes on to show it as any other DataFrame

    # on this object only, past pandas's own __setattr__; a copy or a pickle lacks it
    object.__setattr__(history, "_ipython_display_", _ipython_display_)


def ends_with_fit(shell: Any) -> bool:
    """Tell whether the last line of the running cell is `model.fit(...)` and nothing more."""
    source = shell.history_manager.input_hist_parsed[-1]
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return False
    last = statements[-1] if statements else None
    if not isinstance(last, ast.Expr) or not isinstance(last.value, ast.Call):
        return False
    function = last.value.func
    return isinstance(function, ast.Attribute) and function.attr == "fit"


def legend(is_validated: bool) -> str:
    """Return which line of the charts is which: a sample of each, and text in the page's color."""
    kinds = [("training", BLUE, "")]
    if is_validated:
        kinds.append(("validation", ORANGE, DASHES))
    parts = []
    for label, color, dashes in kinds:
        line = _svg_polyline("0,4 26,4", color, dashes)
        parts.append(f'<svg width="26" height="8" viewBox="0 0 26 8">{line}</svg> {label}')
    return f"<div>{' &nbsp;'.join(parts)} &nbsp;ring: the best value of this chart</div>"


def epochs_table(columns: Sequence[str], rows: Rows, times: Mapping[int, str]) -> str:
    """Return the last rows of the history as HTML, with the time that each epoch took.

    The epoch with the lowest val_loss is bold, and always among the rows.
    """
    if not rows:
        return ""
    best = find_best(rows)
    shown = find_shown(rows, best)
    lines = []
    for epoch in shown:
        cells = [str(epoch)]
        for name in columns:
            cells.append(f"{rows[epoch][name]:#.4g}" if name in rows[epoch] else "")
        cells.append(times[epoch])
        if epoch == best:
            cells = [f"<b>{cell}</b>" if cell else "" for cell in cells]
        lines.append(cells)
    table = table_html(["epoch", *columns, "time"], lines)
    hidden = len(rows) - len(shown)
    if hidden:
        table = f"<div>{hidden} earlier epochs are not shown; the history has them.</div>{table}"
    if best is not None:
        table += "<div>bold: the lowest val_loss of this fit</div>"
    return table


def find_best(rows: Rows) -> int | None:
    """Find the epoch with the lowest val_loss; None without validation."""
    losses = {}
    for epoch, logs in rows.items():
        if not math.isnan(logs.get("val_loss", math.nan)):
            losses[epoch] = logs["val_loss"]
    return min(losses, key=losses.__getitem__, default=None)


def find_shown(rows: Rows, best: int | None) -> list[int]:
    """Choose the epochs that are shown: the last ones, and always the best."""
    shown = sorted(rows)[-ROWS:]
    if best is not None and best not in shown:
        shown[0] = best
    return shown


def table_html(
    head: Iterable[str], rows: Iterable[Iterable[str]], sides: Iterable[str] = ()
) -> str:
    """Return a table as HTML; the cells are HTML already, the head is escaped.

    `sides` has the alignment of each column, "left" or "right"; default all right.
    """
    names = list(head)
    styles = []
    for side in list(sides)[: len(names)] or ["right"] * len(names):
        styles.append(f'style="text-align: {side}; padding: 1px 8px; white-space: pre"')
    header = ""
    for style, name in zip(styles, names, strict=True):
        header += f"<th {style}>{html.escape(name)}</th>"
    body = ""
    for row in rows:
        cells = ""
        for style, cell in zip(styles, row, strict=True):
            cells += f"<td {style}>{cell}</td>"
        body += f"<tr>{cells}</tr>"
    return (
        f'<table style="border-collapse: collapse"><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def chart(name: str, rows: Rows) -> str:
    """Draw a metric over the epochs as SVG.

    Training is solid, validation dashed, and a ring marks the best epoch.
    """
    training = _points(name, rows)
    validation = _points(f"val_{name}", rows)
    points = training + validation
    if not points:
        return ""
    epochs = [epoch for epoch, _ in points]
    values = [value for _, value in points]
    first = min(epochs)
    last = max(epochs)
    low = min(values)
    high = max(values)

    def place(epoch: float, value: float) -> tuple[str, str]:
        across = (epoch - first) / (last - first) if last > first else 0.5
        down = (high - value) / (high - low) if high > low else 0.5
        x = LEFT + (WIDTH - LEFT - 6) * across
        y = EDGE + (HEIGHT - 2 * EDGE) * down
        return f"{x:.1f}", f"{y:.1f}"

    drawn = _svg_line(training, BLUE, "", place) + _svg_line(validation, ORANGE, DASHES, place)
    mode = infer_mode(name)
    if mode is not None:
        watched = validation or training
        choose = min if mode == "min" else max
        x, y = place(*choose(watched, key=lambda point: point[1]))
        drawn += (
            f'<circle cx="{x}" cy="{y}" r="4.5" fill="none" stroke="currentColor" '
            f'stroke-width="1.5"/>'
        )
    drawn += _svg_text(LEFT, EDGE - 6, "start", name)
    drawn += _svg_text(LEFT - 4, EDGE + 4, "end", f"{high:.3g}")
    if high > low:
        drawn += _svg_text(LEFT - 4, HEIGHT - EDGE + 4, "end", f"{low:.3g}")
    drawn += _svg_text(LEFT, HEIGHT - 2, "start", str(first))
    if last > first:
        drawn += _svg_text(WIDTH - 6, HEIGHT - 2, "end", str(last))
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" '
        f'fill="currentColor" role="img" aria-label="{html.escape(name)}">{drawn}</svg>'
    )


def _points(column: str, rows: Rows) -> list[Point]:
    """Return the epochs and finite values of a column."""
    points = []
    for epoch, logs in rows.items():
        if math.isfinite(logs.get(column, math.nan)):
            points.append((epoch, logs[column]))
    return points


def _svg_text(x: int, y: int, anchor: str, text: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg_line(
    line: list[Point], color: str, dashes: str, place: Callable[[float, float], tuple[str, str]]
) -> str:
    if not line:
        return ""
    if len(line) == 1:  # a line of one point would be invisible
        x, y = place(*line[0])
        return f'<circle cx="{x}" cy="{y}" r="2.5" fill="{color}"/>'
    thinned = [*line[: -1 : max(1, len(line) // POINTS)], line[-1]]
    return _svg_polyline(" ".join(",".join(place(*point)) for point in thinned), color, dashes)


def _svg_polyline(points: str, color: str, dashes: str) -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"{dashed}/>'


def model_html(model: nn.Module) -> str:
    """Return a model's layers and parameters as HTML, down to a depth that fits a short table.

    The numbers are those of `summary`: each parameter is counted once, in the row of its layer. A
    layer that is not shown is counted in the row above it that is.

    >>> model_html(nn.Linear(2, 1)).count("<tr>")
    2
    """
    layers = layer_rows(model, [], -1)
    depths = [layer.depth for layer in layers]
    deepest = 1
    for depth in sorted(set(depths)):
        layers_up_to_depth = sum(other <= depth for other in depths)
        if layers_up_to_depth <= ROWS:
            deepest = depth
    shown: dict[str, LayerRow] = {}
    params: Counter[str] = Counter()  # by the name of the shown layer
    inside: Counter[str] = Counter()  # how many layers are not shown
    lazy: set[str] = set()
    for layer in layers:
        name = layer.layer
        if len(shown) < ROWS and layer.depth <= deepest:
            shown[name] = layer
        else:
            while name not in shown:
                name = name.rpartition(".")[0]
            inside[name] += 1
        params[name] += layer.params
        if LAZY in layer.note.split(", "):
            lazy.add(name)
    rows = []
    for name, layer in shown.items():
        count = "?" if name in lazy else f"{params[name]:,}"
        notes = [layer.note] if layer.note else []
        if inside[name]:
            notes.append(f"with {inside[name]} more layers inside")
        label = "&nbsp;&nbsp;" * layer.depth + html.escape(label_of(layer))
        rows.append([label, count, html.escape(", ".join(notes))])
    table = table_html(["layer (type)", "params", "note"], rows, ("left", "right", "left"))
    total = sum(params.values())
    lines = f"<div>Total params: {total:,}{' and those of lazy layers' if lazy else ''}</div>"
    hidden = sum(inside.values())
    if hidden:
        lines += f"<div>{hidden} more layers inside; model.summary(input_shape) has them.</div>"
    return f'<div style="{STYLE}">{table}{lines}</div>'
