"""What a person sees in a notebook: a fit as one output that redraws itself in place, a model as a table.

on_fit_begin         one display
while it trains      redrawn by the clock: a bar, a chart for loss and the first metrics, the table of the epochs
on_fit_end           redrawn a last time

IPython is there where there is a notebook; the charts are SVG, written here.
"""

from __future__ import annotations

import html
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from minikeras.callbacks import is_rate, mode_of
from minikeras.layer_summary import notebook_cell
from minikeras.progress import Progress, format_logs, wants_bar

REFRESH = 0.3  # seconds between two redrawings
SHARE = 0.02  # of the time may go into them
ROWS = 30  # of a table; more epochs or layers are left out of it
POINTS = 150  # of a line in a chart; the best epoch has a dot of its own
CHARTS = 3
WIDTH, HEIGHT, LEFT, EDGE = 280, 130, 60, 18  # pixels of a chart; the last two are left for numbers
BLUE, ORANGE = "#0072B2", "#D55E00"  # training and validation, as in plotting.py
LEGEND = f'<span style="color: {BLUE}">training</span>, <span style="color: {ORANGE}">validation dashed</span>, best ringed'
STYLE = "font-family: sans-serif; font-size: 13px"
Rows = Mapping[int, Mapping[str, float]]  # epoch -> its row of the history


def progress(verbose: str | int, *args: Any) -> Progress:
    """What shows a fit here; `args` are those of `Progress` without `bar`."""
    bar = wants_bar(verbose)
    kind = LiveTable if bar and notebook_cell() is not None else Progress
    return kind(bar, *args)


class LiveTable(Progress):
    """The bar, the charts and the table of one fit in a notebook. Takes what `Progress` takes.

    However short epochs and steps are, it is redrawn a few times a second at most, and for at most 2 % of the time.
    """

    def on_fit_begin(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.batch, self.logs = 0, ""
        self.lines: list[str] = []
        self.validating = self.ended = False
        self.started = time.perf_counter()
        self.display = sys.modules["IPython"].display.display(
            self.shown(), raw=True, display_id=True
        )

    def say(self, line: str) -> None:
        """Show a line, such as where a fit resumes, inside the one output of the fit."""
        self.lines.append(line)
        if self.ended:
            self.redraw()
        else:
            self.redraw_if_due()

    def on_epoch_begin(self, epoch: int) -> None:
        self.epoch, self.batch, self.logs = epoch, 0, ""

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        self.batch = batch
        if time.perf_counter() >= self.next_refresh:
            self.logs = format_logs(logs)  # waits for the device
            self.redraw()

    def on_evaluate_begin(self) -> None:
        self.validating = True
        self.redraw_if_due()

    def on_evaluate_end(self) -> None:
        self.validating = False

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.add_columns(logs)
        self.rows[epoch] = dict(logs)
        self.batch, self.logs = 0, ""
        self.redraw_if_due()

    def on_fit_end(self) -> None:
        self.ended = True
        self.redraw()

    def redraw_if_due(self) -> None:
        """Redraw unless that was done a moment ago."""
        if time.perf_counter() >= self.next_refresh:
            self.redraw()

    def redraw(self) -> None:
        """Put what is known now in the place of what was displayed."""
        now = time.perf_counter()
        self.display.update(self.shown(), raw=True)
        spent = time.perf_counter() - now
        self.next_refresh = now + max(REFRESH, spent / SHARE)

    def shown(self) -> dict[str, str]:
        """The output, for a page and for where there is none."""
        names = [name for name in self.columns if not name.startswith("val_") and not is_rate(name)]
        charts = "".join(chart(name, self.rows) for name in names[:CHARTS])
        parts = [
            self.bar_html(),
            *(f"<div>{html.escape(line)}</div>" for line in self.lines),
            f"<div>{charts}</div><div>{LEGEND}</div>" if charts else "",
            epochs_table(self.columns, self.rows),
        ]
        plain = [
            f"epoch {epoch}  {format_logs(logs)}" for epoch, logs in list(self.rows.items())[-ROWS:]
        ]
        plain += self.lines
        return {
            "text/html": f'<div style="{STYLE}">{"".join(parts)}</div>',
            "text/plain": "\n".join(plain),
        }

    def bar_html(self) -> str:
        """The epoch at hand with its bar and running means; in the end what became of the fit."""
        if self.epoch is None:
            return "" if self.ended else "<div>starting</div>"
        steps = f"{self.batch}/{self.steps}" if self.steps else str(self.batch)
        if self.ended:
            took = clock(time.perf_counter() - self.started)
            if self.epoch not in self.rows:
                return f"<div>ended in epoch {self.epoch} of {self.epochs}, at step {steps}, after {took}</div>"
            return f"<div>{len(self.rows)} epochs in {took}</div>"
        bar = (
            f'<progress max="{self.steps}" value="{self.batch}"></progress> ' if self.steps else ""
        )
        tail = "validating" if self.validating else html.escape(self.logs)
        return f"<div>epoch {self.epoch}/{self.epochs} {bar}{steps} &nbsp;{tail}</div>"


def clock(seconds: float) -> str:
    """A time as a person says it.

    >>> clock(3.21), clock(75), clock(7384)
    ('3.2 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return (
        f"{minutes} min {int(seconds) % 60} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60} min"
    )


def epochs_table(columns: Sequence[str], rows: Rows) -> str:
    """The last rows of the history; the epoch with the lowest val_loss is marked, and among them in any case."""
    if not rows:
        return ""
    losses = {
        epoch: logs["val_loss"]
        for epoch, logs in rows.items()
        if not math.isnan(logs.get("val_loss", math.nan))
    }
    best = min(losses, key=losses.__getitem__, default=None)
    kept = sorted(rows)[-ROWS:]
    kept = [best, *kept[1:]] if best is not None and best not in kept else kept
    lines = []
    for epoch in kept:
        cells = [
            str(epoch),
            *(f"{rows[epoch][name]:#.4g}" if name in rows[epoch] else "" for name in columns),
        ]
        lines.append(
            [f"<b>{cell}</b>" if cell else "" for cell in cells] if epoch == best else cells
        )
    table = table_html(["epoch", *columns], lines)
    rest = len(rows) - len(kept)
    note = f"<div>{rest} earlier epochs are not shown; the history has them.</div>" if rest else ""
    return note + table + ("<div>bold: the lowest val_loss</div>" if best is not None else "")


def table_html(head: Iterable[str], rows: Iterable[Iterable[str]], side: str = "right") -> str:
    """A table of cells that are HTML already; the head is escaped."""
    style = f'style="text-align: {side}; padding: 1px 8px; white-space: pre"'
    above = "".join(f"<th {style}>{html.escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr>{''.join(f'<td {style}>{cell}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<table style="border-collapse: collapse"><thead><tr>{above}</tr></thead><tbody>{body}</tbody></table>'


def chart(name: str, rows: Rows) -> str:
    """A metric over the epochs as SVG: training solid, validation dashed, a dot for the best epoch."""
    lines = {column: _line(column, rows) for column in (name, f"val_{name}")}
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    (first, last), (low, high) = ((min(it), max(it)) for it in zip(*points, strict=True))

    def place(epoch: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 6) * ((epoch - first) / (last - first) if last > first else 0.5)
        y = EDGE + (HEIGHT - 2 * EDGE) * ((high - value) / (high - low) if high > low else 0.5)
        return f"{x:.1f},{y:.1f}"

    drawn = [
        _svg_line(lines[name], BLUE, "", place),
        _svg_line(lines[f"val_{name}"], ORANGE, "5 3", place),
    ]
    text = [(LEFT, EDGE - 6, "start", name), (LEFT - 4, EDGE + 4, "end", f"{high:.3g}")]
    if high > low:
        text += [(LEFT - 4, HEIGHT - EDGE + 4, "end", f"{low:.3g}")]
    text += [(LEFT, HEIGHT - 2, "start", str(first)), (WIDTH - 6, HEIGHT - 2, "end", str(last))][
        : 1 + (last > first)
    ]
    words = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{to}">{html.escape(it)}</text>'
        for x, y, to, it in text
    )
    mode = mode_of(name)
    if mode is not None:  # validation is watched where there is one
        watched = lines[f"val_{name}"] or lines[name]
        best = (min if mode == "min" else max)(watched, key=lambda point: point[1])
        x, y = place(*best).split(",")
        drawn.append(
            f'<circle cx="{x}" cy="{y}" r="4.5" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        )
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" fill="currentColor"'
    return f'<svg {size} role="img" aria-label="{html.escape(name)}">{"".join(drawn)}{words}</svg>'


def _line(column: str, rows: Rows) -> list[tuple[int, float]]:
    return [
        (epoch, logs[column])
        for epoch, logs in rows.items()
        if math.isfinite(logs.get(column, math.nan))
    ]


def _svg_line(line: list[tuple[int, float]], color: str, dashes: str, place: Any) -> str:
    if len(line) == 1:  # a line of one point is not seen
        x, y = place(*line[0]).split(",")
        return f'<circle cx="{x}" cy="{y}" r="2.5" fill="{color}"/>'
    if not line:
        return ""
    kept = [*line[: -1 : max(1, len(line) // POINTS)], line[-1]]
    points = " ".join(place(*point) for point in kept)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"{dashed}/>'


def model_html(model: nn.Module) -> str:
    """A model's layers with their parameters, as deep as fits into a short table; each parameter is counted once.

    >>> model_html(nn.Linear(2, 1)).count("<tr>")
    2
    """
    named = list(model.named_modules())
    depths = [name.count(".") + 1 for name, _ in named]
    deepest = max(
        (depth for depth in set(depths) if sum(it <= depth for it in depths) <= ROWS), default=1
    )
    kept = [(name, layer) for name, layer in named if not name or name.count(".") < deepest]
    rows = [_layer_cells(name, layer) for name, layer in kept[:ROWS]]
    rest = len(named) - len(rows)
    note = (
        f"<div>{rest} more layers inside; model.summary(input_shape) has them.</div>"
        if rest
        else ""
    )
    return f'<div style="{STYLE}">{table_html(["layer (type)", "params", ""], rows, "left")}{note}</div>'


def _layer_cells(name: str, layer: nn.Module) -> list[str]:
    """A layer with all that is inside it."""
    parameters = list(layer.parameters())
    label = f"{name.rpartition('.')[2]} ({type(layer).__name__})" if name else type(layer).__name__
    if any(map(is_lazy, parameters)):
        return [_indented(name, label), "?", "lazy"]
    frozen = sum(not parameter.requires_grad for parameter in parameters)
    note = "" if not frozen else "frozen" if frozen == len(parameters) else "partly frozen"
    return [_indented(name, label), f"{sum(parameter.numel() for parameter in parameters):,}", note]


def _indented(name: str, label: str) -> str:
    return "&nbsp;&nbsp;" * (name.count(".") + bool(name)) + html.escape(label)
