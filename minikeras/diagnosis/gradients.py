"""Checks of the gradients and updates of one training step, by layer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from torch import nn

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.layers import ParameterStep, Step

# The gradient-to-weight ratios of healthy networks lie within a factor of about 100. A sigmoid
# takes about 6/7 of the gradient away with PyTorch's initialization: three cost a factor of 400.
DEPTH = 1e-4
LARGEST_RATIO = 1e4  # gradient to weight; labels in the hundreds give about 1e3
# https://cs231n.github.io/neural-networks-3/#ratio: about 1e-3. Adam's first step changes each
# element by the learning rate: 0.5 with lr=0.01 and 784 inputs.
LARGEST_UPDATE = 3.0
SMALLEST_UPDATE = 1e-6
SHOWN = 3  # names in a line


def check_gradients(evidence: Evidence) -> Iterator[Finding]:
    """Find gradients that are NaN, zero, vanishing or exploding."""
    step = evidence.step
    bad = [parameter for parameter in step.parameters if not parameter.is_finite]
    is_bad_loss = step.loss is not None and not math.isfinite(step.loss)
    if bad or is_bad_loss:
        yield explain_nan(evidence, step, bad)
        return
    if not any(layer.is_dead for layer in evidence.layers):  # else that line tells it
        yield from find_zero(step)
    vanishing = find_vanishing(evidence, step)
    if vanishing is not None:
        first, share = vanishing
        yield Finding(
            "warning",
            f"gradient of layer {first.layer}",
            f"vanishes: {share:.0e} of the largest, relative to the weights",
            "above 0.01",
            "The first layers learn almost nothing. Use ReLU or GELU instead of sigmoid and tanh, "
            "a norm layer between the layers (nn.BatchNorm1d, nn.LayerNorm) or residual "
            "connections x + layer(x), or fewer layers.",
        )
    yield from find_exploding(evidence, step)


def explain_nan(evidence: Evidence, step: Step, bad: list[ParameterStep]) -> Finding:
    """Return the finding for gradients, or a loss, that are NaN or infinite."""
    found = f"NaN or infinite in {len(bad)} of {len(step.parameters)}: {join_names(bad)}"
    looked_at = "gradients"
    if not bad:
        found = f"{step.loss:g}"
        looked_at = "loss of the first step"
    for layer in evidence.layers:
        if not layer.is_finite:
            return Finding(
                "error",
                looked_at,
                found,
                "finite",
                f"The first layer that returns NaN or infinity is {layer.called}. Look for NaN in "
                "the features, and for log(0) and a division by 0 before that layer.",
                is_symptom=True,
            )
    remedy = (
        "All layers return finite values, and the loss is not finite: look for log(0), sqrt or a "
        "division by 0 in the loss, and for NaN in the labels."
    )
    if step.loss is None or math.isfinite(step.loss):
        remedy = (
            "All layers return finite values, so the gradient itself is infinite: sqrt, norm or a "
            "power at 0, a division or log near 0, also in a branch that torch.where does not "
            "take. Write torch.sqrt(x + 1e-8), or x.clamp(min=1e-8).log()."
        )
        return Finding("error", looked_at, found, "finite", remedy)
    return Finding("error", looked_at, found, "finite", remedy, is_symptom=True)


def find_zero(step: Step) -> Iterator[Finding]:
    """Find weights whose gradient was 0 in all steps, although the loss uses them."""
    weights = [parameter for parameter in step.parameters if parameter.is_weight]
    used = [parameter for parameter in weights if parameter.gradient_norm is not None]
    zero = [parameter for parameter in used if not parameter.is_moving]
    # layers that stay alike are told by the check of the initialization
    zero = [parameter for parameter in zero if not parameter.stays_alike]
    if not zero:
        return
    is_all = len(zero) == len(used)
    yield Finding(
        "error" if is_all else "warning",
        f"gradient of {len(zero)} layers"
        if len(zero) > 1
        else f"gradient of layer {zero[0].layer}",
        f"0 everywhere: {join_names(zero)}",
        "not 0",
        "These layers cannot learn. Look for round, sign or argmax (their gradient is 0), for a "
        "clamp, for units that never fire, and for a softmax over a single output.",
        is_symptom=True,
    )


def weights_in_order(evidence: Evidence, step: Step) -> list[list[ParameterStep]]:
    """Return the weights of each optimizer, in the order in which their layers are called.

    Embeddings are left out: most of their rows have no gradient in a batch.
    """
    modules = dict(evidence.model.named_modules())
    order: dict[str, int] = {}
    for layer in evidence.layers:
        order.setdefault(layer.name, len(order))
    groups: dict[str, list[ParameterStep]] = {}
    for parameter in step.parameters:
        if isinstance(modules.get(parameter.layer), (nn.Embedding, nn.EmbeddingBag)):
            continue
        if parameter.is_weight and parameter.gradient_ratio is not None:
            groups.setdefault(str(parameter.optimizer), []).append(parameter)
    for group in groups.values():
        group.sort(key=lambda parameter: order.get(parameter.layer, len(order)))
    return list(groups.values())


def find_vanishing(evidence: Evidence, step: Step) -> tuple[ParameterStep, float] | None:
    """Return the first layer and its share of the largest ratio, if its gradient vanishes.

    It vanishes if it does in the whole first third of the weights: the queries and keys of
    attention begin with small gradients, and its values do not.
    """
    for weights in weights_in_order(evidence, step):
        ratios = [parameter.gradient_ratio or 0.0 for parameter in weights]
        first_third = ratios[: math.ceil(len(ratios) / 3)]
        share = max(first_third) / max(ratios)
        if len(weights) > 2 and share < DEPTH:
            return weights[0], share
    return None


def find_exploding(evidence: Evidence, step: Step) -> Iterator[Finding]:
    """Find gradients that grow from the last layer to the first, or are huge everywhere."""
    for weights in weights_in_order(evidence, step):
        ratios = [parameter.gradient_ratio or 0.0 for parameter in weights]
        growth = ratios[0] / ratios[-1]
        if len(weights) > 2 and growth > 1 / DEPTH and ratios[0] > 1:
            yield Finding(
                "warning",
                f"gradient of layer {weights[0].layer}",
                f"explodes: {growth:.0e} times that of the last layer",
                "about the same",
                "Use PyTorch's initialization or nn.init.kaiming_normal_, a norm layer "
                "between the layers, and compile(clip_grad_norm=1.0).",
            )
            return
        largest = max(weights, key=lambda parameter: parameter.gradient_ratio or 0.0)
        ratio = largest.gradient_ratio or 0.0
        if ratio > LARGEST_RATIO:
            yield Finding(
                "warning",
                f"gradient of layer {largest.layer}",
                f"explodes: {ratio:.0e} times the weights",
                "0.001 to 10",
                "Scale features and labels to mean 0 and standard deviation 1, use PyTorch's "
                "initialization, or pass compile(clip_grad_norm=1.0).",
                is_symptom=True,
            )
            return


def check_updates(evidence: Evidence) -> Iterator[Finding]:
    """Find updates of the optimizer far from a thousandth of the weights."""
    step = evidence.step
    for name, optimizer in evidence.optimizers.items():
        which = f"optimizer {name!r}" if name else "the optimizer"
        ratios = []
        rates = []
        for parameter in step.parameters:
            ratio = parameter.update_ratio
            if parameter.optimizer != name or not parameter.is_weight or ratio is None:
                continue
            # a gradient of 0, NaN or infinity has a line already
            if parameter.is_finite and parameter.gradient_norm:
                ratios.append(ratio)
        for group in optimizer.param_groups:
            rates.append(float(group.get("lr", math.nan)))
        if not ratios or not all(map(math.isfinite, ratios)):
            continue
        shown = f"lr={rates[0]:g}"
        if len(ratios) > 1 and statistics.median(ratios) > LARGEST_UPDATE:
            yield Finding(
                "warning",
                f"first step of {which}",
                f"changes the weights by {statistics.median(ratios):.2g} times their size",
                "about 0.001",
                f"The learning rate is too high ({shown}): try a tenth or a hundredth of it, and "
                "look at model.lr_find(dl_train).",
                is_symptom=True,
            )
        # a warmup begins with a tiny learning rate, or with 0
        is_scheduled = any("initial_lr" in group for group in optimizer.param_groups)
        if max(ratios) < SMALLEST_UPDATE and not is_scheduled:
            yield Finding(
                "warning",
                f"first step of {which}",
                f"changes the weights by {max(ratios):.1g} of their size",
                "about 0.001",
                f"The learning rate is too low ({shown}): look at model.lr_find(dl_train). For "
                "Adam 1e-3 is usual, for SGD 0.01 to 0.1.",
                is_symptom=True,
            )


def join_names(parameters: list[ParameterStep]) -> str:
    """Join the names of the parameters' layers; of many only the first.

    >>> join_names([ParameterStep(f"net.{number}.weight", 2) for number in range(5)])
    'net.0, net.1, net.2 and 2 more'
    """
    names = list(dict.fromkeys(parameter.layer or parameter.name for parameter in parameters))
    return join_words(names)


def join_words(names: list[str]) -> str:
    """Join names; of many only the first."""
    shown = ", ".join(names[:SHOWN])
    if len(names) > SHOWN:
        shown += f" and {len(names) - SHOWN} more"
    return shown
