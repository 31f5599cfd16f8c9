"""Checks of what the layers return."""

from __future__ import annotations

from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.gradients import find_vanishing
from minikeras.diagnosis.layers import LAYER, RELU, SIGMOID, TANH, VALUES, LayerStatistics

# Half of the units of a deep layer with PyTorch's initialization may be dead: rows differ little
# there, so that the sign of a unit is the same for all of them. Of 16 such units 13 are with
# a probability of 1 %.
DEAD_SHARE = 0.8
UNITS = 16  # of fewer, all have to be dead
SATURATED_SHARE = 0.5  # weights of N(0, 1) and 64 inputs give 0.7; PyTorch's less than 0.05
SATURATED_SHARE_TRAINED = 0.9  # training saturates units too: 0.6 after 40 epochs on digits
EXPLODES = 1e3  # from the first layer to the largest
VANISHES = 1e-4  # from the first to the last; 6 layers of ReLU, PyTorch's initialization: 5e-3


def check_dead_units(evidence: Evidence) -> Iterator[Finding]:
    """Find ReLU units that never fire."""
    dead = []
    for layer in evidence.layers:
        if layer.kind != RELU or layer.is_output or layer.values < VALUES or not layer.units:
            continue
        if not layer.is_finite:
            continue  # NaN does not fire either, and has its own line
        needed = DEAD_SHARE * layer.units if layer.units >= UNITS else layer.units
        if layer.dead_units >= needed:
            dead.append(layer)
    if not dead:
        return
    worst = max(dead, key=lambda layer: layer.dead_units / layer.units)
    yield Finding(
        "error" if worst.is_dead else "warning",
        name_layers(worst, dead),
        f"{worst.dead_units} of {worst.units} ReLU units are 0 for all rows",
        "less than half",
        "Dead units get no gradient and do not come back. Start from new weights with a lower "
        "learning rate, or put a norm layer before ReLU; look at the scale of the features and at "
        "the biases. With new weights, nn.LeakyReLU keeps units alive.",
        is_symptom=True,
    )


def check_saturated_units(evidence: Evidence) -> Iterator[Finding]:
    """Find tanh and sigmoid layers that are saturated."""
    limit = SATURATED_SHARE if evidence.history.empty else SATURATED_SHARE_TRAINED
    saturated = []
    for layer in evidence.layers:
        if layer.kind not in (TANH, SIGMOID) or layer.is_output or layer.values < VALUES:
            continue
        if layer.saturated_share > limit:
            saturated.append(layer)
    if not saturated:
        return
    worst = max(saturated, key=lambda layer: layer.saturated_share)
    limits = "-1 or 1" if worst.kind == TANH else "0 or 1"
    yield Finding(
        "warning",
        name_layers(worst, saturated),
        f"{worst.saturated_share:.0%} of the {worst.kind} values are saturated, at {limits}",
        "below 10 %",
        "The gradient there is nearly 0. Scale the features to mean 0 and standard deviation 1, "
        "use smaller weights (nn.init.xavier_uniform_), or put a norm layer before it.",
        is_symptom=True,
    )


def check_activation_growth(evidence: Evidence) -> Iterator[Finding]:
    """Find activations whose scale explodes or vanishes through depth."""
    layers = []
    for layer in evidence.layers:
        if layer.kind == LAYER and layer.values >= VALUES and not layer.is_output:
            layers.append(layer)
    with_weights = [layer for layer in layers if layer.has_weights and layer.spread > 0]
    if len(with_weights) < 3 or not all(layer.is_finite for layer in evidence.layers):
        return
    first = with_weights[0]
    largest = max(with_weights, key=lambda layer: layer.spread)
    last = with_weights[-1]
    if largest.spread > EXPLODES * first.spread:
        yield Finding(
            "warning",
            f"output of {largest.called}",
            f"standard deviation {largest.spread:.2g}, in the first layer {first.spread:.2g}",
            "about the same",
            "The values explode from layer to layer. Use PyTorch's initialization or "
            "nn.init.kaiming_normal_, or a norm layer (nn.BatchNorm1d, nn.LayerNorm) between the "
            "layers.",
        )
        return
    if last.spread < VANISHES * first.spread and find_vanishing(evidence, evidence.step) is None:
        yield Finding(
            "warning",
            f"output of {last.called}",
            f"standard deviation from row to row {last.spread:.2g}, in the first layer "
            f"{first.spread:.2g}",
            "about the same",
            "The layers lose what tells the rows apart. Use nn.init.kaiming_normal_, a norm layer "
            "(nn.BatchNorm1d, nn.LayerNorm) between the layers, residual connections, or fewer "
            "layers.",
        )


def name_layers(worst: LayerStatistics, layers: list[LayerStatistics]) -> str:
    """Name the worst of several layers, and say how many others there are."""
    if len(layers) == 1:
        return worst.called
    return f"{worst.called} and {len(layers) - 1} more"
