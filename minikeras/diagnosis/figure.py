"""The figure of a diagnosis: what the copies of the model did in training.

collect    take the numbers of the figure from what the checks have looked at
draw       draw them, in four panels

matplotlib is imported only by `draw`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minikeras.support.pyplot import import_pyplot
from minikeras.support.shown import notebook_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from minikeras.diagnosis.evidence import Evidence
    from minikeras.diagnosis.layers import ParameterStep
    from minikeras.diagnosis.lr_find import LearningRates

MOST_LAYERS = 25  # bars whose names can still be read; of more layers the worst are drawn
LEAST_ROWS = 6  # for which there is space, so that a few bars are not as thick as a picture
LONGEST_NAME = 28  # characters; of a longer name the end is shown, which tells layers apart
USUAL_UPDATE = 1e-3  # of a step, relative to the weights: a rule of thumb, Karpathy 2022
SMALLEST = 1e-12  # what a bar of 0 is drawn as, on a log scale
# colors of Okabe and Ito's palette, which colour-blind people can tell apart
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
GREY = "#999999"
SIZE = (11.0, 8.0)  # inches
INCHES_PER_LAYER = 0.22


@dataclass(frozen=True)
class Curves:
    """The numbers of the figure, as plain values; what was not measured is empty."""

    learning_rates: LearningRates | None = None
    optimizer_rates: list[float] = field(default_factory=list)  # of all groups, each once
    memorized_rows: int = 0  # of the small batch
    # the losses of each training on it, by the words for its optimizer
    memorized: dict[str, list[float]] = field(default_factory=dict)
    # norms of one step relative to that of the weights, by layer
    gradients: dict[str, float] = field(default_factory=dict)
    updates: dict[str, float] = field(default_factory=dict)
    dead: dict[str, float] = field(default_factory=dict)  # share of the ReLU units, by layer


def collect(evidence: Evidence) -> Curves:
    """Return the numbers of the figure, of those parts of the evidence that a check has made."""
    made = vars(evidence)
    numbers: dict[str, Any] = {"optimizer_rates": rates_of(evidence)}
    if "learning_rates" in made:
        numbers["learning_rates"] = evidence.learning_rates
    if "memorized" in made:
        found = evidence.memorized
        numbers["memorized_rows"] = found.rows
        numbers["memorized"] = {"the model's optimizer": list(found.losses)}
        for rate, training in found.others.items():
            numbers["memorized"][f"Adam, lr={rate:g}"] = list(training.losses)
    if "step" in made:
        gradients, updates = relative_norms(evidence.step.parameters)
        numbers["gradients"] = gradients
        numbers["updates"] = updates
    if "layers" in made:
        dead = {}
        for layer in evidence.layers:
            if layer.fires is not None and layer.units:
                dead[layer.name] = layer.dead_units / layer.units
        numbers["dead"] = dead
    return Curves(**numbers)


def rates_of(evidence: Evidence) -> list[float]:
    """Return the learning rates of the user's optimizers, each once."""
    rates = []
    for optimizer in evidence.run.optimizers.values():
        for group in optimizer.param_groups:
            rate = float(group["lr"]) if "lr" in group else math.nan
            if rate > 0 and rate not in rates:
                rates.append(rate)
    return rates


def relative_norms(parameters: list[ParameterStep]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the norms of gradient and update relative to the weights', by layer.

    A layer's parameters are taken together. A layer whose weights are all 0 is left out.
    """
    layers: dict[str, list[ParameterStep]] = {}
    for parameter in parameters:
        layers.setdefault(parameter.layer or parameter.name, []).append(parameter)
    gradients = {}
    updates = {}
    for name, layer in layers.items():
        weights = math.hypot(*(parameter.weight_norm for parameter in layer))
        if weights > 0:
            gradient = math.hypot(*(parameter.gradient_norm or 0.0 for parameter in layer))
            update = math.hypot(*(parameter.update_norm for parameter in layer))
            gradients[name] = gradient / weights
            updates[name] = update / weights
    return gradients, updates


def draw(curves: Curves, title: str) -> Figure:
    """Draw the numbers as one figure of four panels."""
    plt = import_pyplot()
    bars = min(max(len(curves.gradients), len(curves.dead)), MOST_LAYERS)
    width, height = SIZE
    lower = max(height / 2, 1.2 + bars * INCHES_PER_LAYER)
    figure, grid = plt.subplots(
        2,
        2,
        figsize=(width, height / 2 + lower),
        height_ratios=(height / 2, lower),
        layout="constrained",
    )
    figure.suptitle(title, parse_math=False)
    if curves.learning_rates is not None:
        draw_learning_rates(grid[0, 0], curves.learning_rates, curves.optimizer_rates)
    else:
        grid[0, 0].set_title("learning rate")
        say_not_measured(grid[0, 0], "not measured")
    draw_memorized(grid[0, 1], curves)
    draw_ratios(grid[1, 0], curves)
    draw_dead(grid[1, 1], curves)
    for axis in grid.flat:
        axis.spines[["top", "right"]].set_visible(False)
    if notebook_cell() is not None and "inline" in plt.get_backend():
        plt.close(figure)  # else the notebook shows it twice: as open, and as a result
    drawn: Figure = figure
    return drawn


def say_not_measured(axis: Axes, why: str) -> None:
    """Leave a panel empty but for a sentence."""
    axis.set_axis_off()
    axis.text(0.5, 0.5, why, ha="center", va="center", color="grey", transform=axis.transAxes)


def draw_learning_rates(
    axis: Axes, found: LearningRates, optimizer_rates: Sequence[float] = ()
) -> None:
    """Draw the loss over the learning rate, with the suggestion and where it diverges.

    Args:
        optimizer_rates: the rates that the optimizers have, to be marked.
    """
    axis.set_title("learning rate")
    axis.plot(found.rates, found.losses, color=GREY, linewidth=0.8, label="loss")
    axis.plot(found.rates, found.smoothed, color=BLUE, label="smoothed")
    limit_losses(axis, found.smoothed)
    if found.suggestion is not None:
        label = f"suggestion: {found.suggestion:.2g}"
        axis.axvline(found.suggestion, color=GREEN, linestyle="-", label=label)
    for rate in optimizer_rates:
        label = f"the optimizer's: {rate:.2g}"
        axis.axvline(rate, color=ORANGE, linestyle="--", label=label)
    if found.diverges_at is not None:
        label = f"diverges at {found.diverges_at:.2g}"
        axis.axvline(found.diverges_at, color="black", linestyle=":", label=label)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.25)
    axis.legend(edgecolor="none", fontsize="small")


def limit_losses(axis: Axes, smoothed: list[float]) -> None:
    """Leave out the last, diverged losses, beside which the rest of the curve would be flat."""
    finite = [loss for loss in smoothed if math.isfinite(loss)]
    if not finite:
        return
    low = min(finite)
    span = max(finite[0] - low, abs(low) * 0.1)
    high = min(max(finite), finite[0] + span)
    if high > low:
        axis.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))


def draw_memorized(axis: Axes, curves: Curves) -> None:
    """Draw the loss of each step on one small batch."""
    axis.set_title("one small batch")
    if not curves.memorized:
        say_not_measured(axis, "not measured")
        return
    finite = []
    colors = itertools.cycle([BLUE, ORANGE, GREEN, GREY])
    for (label, losses), color in zip(curves.memorized.items(), colors, strict=False):
        axis.plot(range(1, len(losses) + 1), losses, color=color, label=label)
        finite += [loss for loss in losses if math.isfinite(loss)]
    # a loss that falls by orders of magnitude; a negative one has no logarithm
    if finite and min(finite) > 0 and max(finite) > 100 * min(finite):
        axis.set_yscale("log")
    axis.set_xlabel(f"steps on the same {curves.memorized_rows} rows")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.25)
    axis.legend(edgecolor="none", fontsize="small")


def draw_ratios(axis: Axes, curves: Curves) -> None:
    """Draw the gradient and the update of one step relative to the weights, by layer."""
    axis.set_title("one step, relative to the weights")
    if not curves.gradients:
        say_not_measured(axis, "not measured")
        return
    names = choose_layers(curves.updates, lambda ratio: abs(math.log(drawable(ratio)) - USUAL_LOG))
    rows = range(len(names))
    gradients = [drawable(curves.gradients[name]) for name in names]
    updates = [drawable(curves.updates[name]) for name in names]
    axis.barh([row - 0.2 for row in rows], gradients, 0.38, color=BLUE, label="gradient")
    axis.barh([row + 0.2 for row in rows], updates, 0.38, color=ORANGE, label="update")
    axis.axvline(USUAL_UPDATE, color="black", linestyle=":", label="a usual update")
    axis.set_xscale("log")
    smallest = min([*gradients, *updates, USUAL_UPDATE])
    largest = max([*gradients, *updates, USUAL_UPDATE])
    axis.set_xlim(smallest / 10, largest * 10)
    axis.set_xlabel("norm / norm of the weights")
    name_rows(axis, names, len(curves.updates))
    axis.legend(edgecolor="none", fontsize="small")


def draw_dead(axis: Axes, curves: Curves) -> None:
    """Draw the share of units that are 0 for every row, by layer."""
    axis.set_title("dead units")
    if not curves.dead:
        say_not_measured(axis, "no ReLU layer was measured")
        return
    names = choose_layers(curves.dead, lambda share: share)
    shares = [100 * curves.dead[name] for name in names]
    axis.barh(range(len(names)), shares, 0.6, color=ORANGE)
    for row, share in enumerate(shares):
        axis.text(share + 1, row, f"{share:.0f} %", va="center", fontsize="small")
    axis.set_xlim(0, 112)
    axis.set_xlabel("% of the units that are 0 for every row")
    name_rows(axis, names, len(curves.dead))


USUAL_LOG = math.log(USUAL_UPDATE)


def drawable(ratio: float) -> float:
    """Return a ratio that a log scale can show: NaN and infinity as 1, 0 as almost 0."""
    if not math.isfinite(ratio):
        return 1.0
    return max(ratio, SMALLEST)


def choose_layers(values: Mapping[str, float], badness: Callable[[float], float]) -> list[str]:
    """Return the layers that are drawn, in the model's order: all, or the worst of too many."""
    if len(values) <= MOST_LAYERS:
        return list(values)
    worst = sorted(values, key=lambda name: badness(values[name]), reverse=True)
    chosen = set(worst[:MOST_LAYERS])
    return [name for name in values if name in chosen]


def name_rows(axis: Axes, names: list[str], count: int) -> None:
    """Write the layers' names, the first on top, and how many layers there are if not all fit."""
    labels = []
    for name in names:
        short = name or "model"
        labels.append(f"...{short[3 - LONGEST_NAME :]}" if len(short) > LONGEST_NAME else short)
    axis.set_yticks(range(len(names)), labels, fontsize="small", parse_math=False)
    axis.set_ylim(max(len(names), LEAST_ROWS) - 0.5, -0.5)
    if count > len(names):
        axis.set_ylabel(f"the worst {len(names)} of {count} layers")
