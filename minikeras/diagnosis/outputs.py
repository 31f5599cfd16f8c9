"""Checks of the outputs: whether they differ, saturate, or fit the loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import Evidence, copy_leaf, named_tensors
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.tasks import (
    BINARY,
    CLASSES,
    LOG_PROBABILITIES,
    PROBABILITIES,
    REGRESSION,
    SCORES,
    Task,
    only_tensor,
)
from minikeras.nests import map_leaves

SAME = 1e-6  # spread over the rows, relative to the size of the outputs: rounding alone
ROWS = 4  # fewer may be equal by chance
NEAR = 1e-4  # a probability that near to 0 or 1 hardly gives a gradient
SATURATED_SHARE = 0.9
HUGE = 30.0  # scores; exp(-30) is 1e-13
NODES = 12  # autograd nodes that are looked at, from the outputs backward
OUTSIDE = 0.05  # share of the targets that the last function cannot give

# autograd nodes that only change the shape
SHAPES = (
    "View",
    "UnsafeView",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Select",
    "Slice",
    "Transpose",
    "Permute",
    "Clone",
    "ToCopy",
    "Alias",
    "Expand",
    "TBackward",
    "AsStrided",
)
# node -> function, and the range of its values
LAST_FUNCTIONS = {
    "LogSoftmax": ("log_softmax", -float("inf"), 0.0),
    "Softmax": ("softmax", 0.0, 1.0),
    "LogSigmoid": ("logsigmoid", -float("inf"), 0.0),
    "Sigmoid": ("sigmoid", 0.0, 1.0),
    "Tanh": ("tanh", -1.0, 1.0),
    "Relu": ("relu", 0.0, float("inf")),
    "Threshold": ("relu", 0.0, float("inf")),
}


def check_outputs_differ(evidence: Evidence) -> Iterator[Finding]:
    """Find outputs that are the same for all rows."""
    for name, outputs in named_tensors(evidence.outputs, "the outputs"):
        if not outputs.is_floating_point() or len(outputs) < ROWS or not features_differ(evidence):
            continue
        if not bool(outputs.isfinite().all()):
            yield explain_nan(name, outputs)
            continue
        rows = outputs.reshape(len(outputs), -1).float()
        size = rows.abs().max()
        spread = (rows - rows[0]).abs().max()
        if spread <= SAME * size and has_layers_that_train(evidence):
            yield Finding(
                "error",
                name,
                f"the same for all {len(rows):,} rows, {rows[0, 0]:.4g}",
                "different from row to row",
                "Nothing of the features arrives at the outputs. Look at the layers below: units "
                "that never fire, weights of zero, a saturated activation, dropout near 1, or a "
                "forward that does not use its argument.",
                is_symptom=True,
            )


def has_layers_that_train(evidence: Evidence) -> bool:
    """Tell whether the last layer does not begin with zeros: it is the same at first then."""
    last: Tensor | None = None
    for parameter in evidence.model.parameters():
        if parameter.ndim > 1:
            last = parameter
    return last is None or bool(last.detach().count_nonzero())


def features_differ(evidence: Evidence) -> bool:
    """Tell whether the rows that were looked at differ."""
    for _, tensor in named_tensors(evidence.train.features, "features"):
        if len(tensor) > 1 and bool((tensor != tensor[:1]).any()):
            return True
    return False


def explain_nan(name: str, outputs: Tensor) -> Finding:
    """Say that outputs are not finite."""
    rows = outputs.reshape(len(outputs), -1)
    bad = int((~rows.isfinite()).any(1).sum())
    return Finding(
        "error",
        name,
        f"NaN or infinite in {bad:,} of {len(rows):,} rows",
        "finite",
        "If the features are finite, look for a log or a division of 0, a square root of a "
        "negative number, an exp of a large one, or weights that are NaN already.",
        is_symptom=True,
    )


def check_saturated_outputs(evidence: Evidence) -> Iterator[Finding]:
    """Find probabilities that are all near 0 or 1."""
    if not evidence.history.empty:
        return  # a network that has learnt is sure of itself
    for task in evidence.tasks:
        outputs = task.outputs.detach().float()
        if task.kind not in (CLASSES, BINARY) or not bool(outputs.isfinite().all()):
            continue
        share = None
        if task.takes == PROBABILITIES:
            share = (torch.minimum(outputs, 1 - outputs) < NEAR).float().mean().item()
            found = f"{share:.0%} of the probabilities within {NEAR:g} of 0 or 1"
        elif task.takes == SCORES:
            sizes = outputs - outputs.mean(1, keepdim=True) if task.kind == CLASSES else outputs
            share = (sizes.abs() > HUGE).float().mean().item()
            found = f"{share:.0%} of the scores above {HUGE:g} or below -{HUGE:g}"
        if share is not None and share > SATURATED_SHARE:
            yield Finding(
                "warning",
                f"the outputs{task.called}",
                f"saturated: {found}",
                "scores near 0 at the start",
                "The network is sure of its answers before it has learnt, and gets hardly any "
                "gradient. Give the last layer smaller weights, put a norm layer before it, and "
                "standardize the features.",
                is_symptom=True,
            )


def check_activation_before_loss(evidence: Evidence) -> Iterator[Finding]:
    """Find a last function that the loss does not expect, or none where it does."""
    for task in evidence.tasks:
        outputs = outputs_with_gradient(evidence, task)
        last = find_last_function(outputs)
        finding = None
        if last is not None:
            finding = judge_last_function(task, *last)
        elif task.kind == CLASSES and task.takes == LOG_PROBABILITIES:
            finding = judge_log_probabilities(task)
        if finding is not None:
            yield finding


def outputs_with_gradient(evidence: Evidence, task: Task) -> Tensor | None:
    """Return the outputs of the first batch for a task, with what they were computed from."""
    features = map_leaves(copy_leaf, evidence.train.batches[0][0])
    evidence.model.eval()
    with torch.enable_grad(), silenced():
        outputs: Any = evidence.model.compute_outputs(features)
    if not task.name:
        return only_tensor(outputs)
    for name, tensor in named_tensors(outputs, ""):
        if name in (f'["{task.name}"]', f"[{task.name}]"):
            return tensor
    return None


def find_last_function(outputs: Tensor | None) -> tuple[str, float, float] | None:
    """Return the function that gave the outputs, and its range; None if it is no activation."""
    node: Any = None if outputs is None else outputs.grad_fn
    for _ in range(NODES):
        if node is None:
            return None
        name = node.name()
        for word, function in LAST_FUNCTIONS.items():
            if name.startswith(word):
                return function
        if not name.startswith(SHAPES):
            return None
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def judge_last_function(task: Task, name: str, lowest: float, highest: float) -> Finding | None:
    """Return what is wrong with a last function before this loss."""
    loss = getattr(task.loss_func, "__name__", type(task.loss_func).__name__)
    looked_at = f"the outputs{task.called}"
    if task.kind == CLASSES and name == "log_softmax" and task.takes == SCORES:
        return Finding(
            "note",
            looked_at,
            f"log_softmax before {loss}, which applies it again",
            "raw scores",
            "It changes nothing, since a second log_softmax has no effect. Leave it out.",
        )
    if task.takes == SCORES and name in ("softmax", "sigmoid"):
        return Finding(
            "error",
            looked_at,
            f"{name} before {loss}, which applies one itself",
            "raw scores",
            f"Applied twice, the loss cannot come near 0 and its gradients are small. Leave out "
            f"the {name} at the end of forward, and apply it to what predict returns.",
        )
    if task.takes == LOG_PROBABILITIES and name not in ("log_softmax", "logsigmoid"):
        return Finding(
            "error",
            looked_at,
            f"{name} before {loss}, which takes log-probabilities",
            "log_softmax",
            "End forward with .log_softmax(1), or return raw scores and pass "
            "nn.CrossEntropyLoss().",
        )
    if task.takes == SCORES and name in ("relu", "tanh"):
        reason = "never negative" if name == "relu" else "never beyond -1 or 1"
        return Finding(
            "warning",
            looked_at,
            f"{name} before {loss}: scores that are {reason}",
            "raw scores",
            f"Leave out the {name} after the last layer: the loss needs scores of any size.",
        )
    if task.kind == REGRESSION and task.labels.is_floating_point():
        outside = ((task.labels < lowest) | (task.labels > highest)).float().mean().item()
        if outside > OUTSIDE:
            limits = f"below {lowest:g}" if name == "relu" else f"outside {lowest:g} to {highest:g}"
            return Finding(
                "error" if outside > 0.5 else "warning",
                looked_at,
                f"{name} at the end, and {outside:.0%} of the targets are {limits}",
                "outputs of any size",
                f"The network cannot give these targets. Leave out the {name} after the last "
                "layer, or scale the targets into its range.",
            )
    return None


def judge_log_probabilities(task: Task) -> Finding | None:
    """Return what is wrong with raw scores before a loss of log-probabilities."""
    total = task.outputs.detach().float().exp().sum(1)
    if bool(((total - 1).abs() < 1e-2).all()):
        return None
    return Finding(
        "error",
        f"the outputs{task.called}",
        "raw scores before NLLLoss, which takes log-probabilities",
        "log_softmax",
        "The loss falls without end and means nothing. End forward with .log_softmax(1), or pass "
        "nn.CrossEntropyLoss().",
    )
