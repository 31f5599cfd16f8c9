"""Checks whether the network can memorize one small batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.features import plural
from minikeras.diagnosis.findings import Finding, rank
from minikeras.diagnosis.memorize import Memorized, take_rows

# of the way to the lowest loss; a network that learns slowly goes further, one that learns nothing
# hardly moves
BARELY = 0.1
STEPS = 100  # of which that is expected; of fewer, less
CONTRADICTING = 0.1  # share of the rows whose label differs from that of an equal row


def check_memorized(evidence: Evidence) -> Iterator[Finding]:
    """Find a network that cannot memorize one small batch."""
    memorized = evidence.memorized
    best = memorized.best_share
    limit = BARELY * min(1.0, len(memorized.losses) / STEPS)
    if best is None or best >= limit:
        if best is not None and (memorized.own.share or 0.0) < limit:
            yield describe_optimizer(memorized)
        return
    rows = memorized.rows
    trained = "with the optimizer"
    if memorized.others:
        rates = " and ".join(f"{rate:g}" for rate in memorized.others)
        trained = f"with the optimizer, nor with Adam at {rates}"
    yield Finding(
        "note" if is_mostly_frozen(evidence.model) else "warning",
        f"training on one batch of {rows} {plural('row', rows)}",
        f"the loss falls by {max(best, 0.0):.0%} of the way in {len(memorized.losses)} steps "
        f"{trained}",
        "nearly all of the way",
        f"The network cannot memorize even these rows. {name_cause(evidence)}",
        is_symptom=True,
    )


def is_mostly_frozen(model: nn.Module) -> bool:
    """Tell whether few of the parameters are trained, which need not be able to memorize rows."""
    known = [parameter for parameter in model.parameters() if not is_lazy(parameter)]
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in known]
    trained = sum(size for size, is_trained in sizes if is_trained)
    return trained < sum(size for size, _ in sizes) / 2


def describe_optimizer(memorized: Memorized) -> Finding:
    """Say that another optimizer memorizes the batch."""
    rate, training = max(memorized.others.items(), key=lambda item: item[1].share or 0.0)
    share = memorized.own.share or 0.0
    return Finding(
        "note",
        f"training on one batch of {memorized.rows} {plural('row', memorized.rows)}",
        f"{max(share, 0.0):.0%} of the way in {len(memorized.losses)} steps with the optimizer, "
        f"{training.share:.0%} with Adam(lr={rate:g})",
        "nearly all of the way",
        "The optimizer is slow on these rows, and another one goes further. Try the learning rate "
        "that model.lr_find suggests, or more epochs.",
        is_symptom=True,
    )


def name_cause(evidence: Evidence) -> str:
    """Say what is the likely cause: what was found before, or the labels of equal rows."""
    share = share_of_contradictions(evidence)
    if share > CONTRADICTING:
        return (
            f"The likely cause: {share:.0%} of the rows have the same features as another row and "
            "another label. Check that features and labels are in the same order, and that no "
            "feature is missing."
        )
    causes = [
        found for found in evidence.findings if found.level != "note" and not found.is_symptom
    ]
    causes.sort(key=rank)
    if causes:
        return f"The likely cause: {causes[0].looked_at}, see its own line."
    return (
        "Nothing else that was looked at explains it. Check forward line by line: does every "
        "layer's output reach the loss, and does the gradient come back (no detach(), .item(), "
        "argmax or torch.no_grad() on the way)?"
    )


def share_of_contradictions(evidence: Evidence) -> float:
    """Return the share of the batch's rows that have an equal row with another label."""
    (features, labels, _), _ = take_rows(evidence)
    if not isinstance(features, Tensor) or not isinstance(labels, Tensor) or not labels.ndim:
        return 0.0
    if features.layout is not torch.strided or features.is_nested or not len(labels):
        return 0.0
    if len(features) != len(labels):
        return 0.0
    _, groups = torch.unique(features.reshape(len(features), -1), dim=0, return_inverse=True)
    seen: dict[int, set[Any]] = {}
    for group, label in zip(groups.tolist(), labels.reshape(len(labels), -1).tolist(), strict=True):
        seen.setdefault(group, set()).add(tuple(label))
    return sum(len(seen[group]) > 1 for group in groups.tolist()) / len(labels)
