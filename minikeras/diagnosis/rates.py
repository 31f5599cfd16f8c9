"""Checks of the optimizer's learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.lr_find import LearningRates
from minikeras.diagnosis.memorize import ENOUGH, Training
from minikeras.run import has_own_step

# below the suggestion by more than this, the loss hardly moves: fine-tuning uses a hundredth
FAR_BELOW = 3000.0
BARELY = 0.02  # of the way to the lowest loss on one batch, in all steps
JUMPED = 30.0  # times the first loss on one batch: it may come back, from weights that are lost
RISEN = 0.5  # of the first loss on one batch, above it at the end: the rate is too high
# faults with which the loss is NaN, or no number at all, at every rate
NO_LOSS = (
    "check_missing_features",
    "check_missing_labels",
    "check_class_range",
    "check_gradients",
)


def check_learning_rate(evidence: Evidence) -> Iterator[Finding]:
    """Compare the optimizer's learning rate with that of the range test."""
    group = next(iter(evidence.optimizers.values())).param_groups[0]
    # a scheduler of torch notes the rate that it begins from, such as that after a warm-up
    found = group.get("initial_lr", group.get("lr"))
    if found is None or not float(found) > 0 or has_own_step(evidence.model):
        return
    if any(finding.check in NO_LOSS and finding.level == "error" for finding in evidence.findings):
        return
    rate = float(found)
    curve = evidence.learning_rates
    what = try_instead(curve)
    if is_too_high(rate, curve, evidence.memorized.own):
        yield Finding(
            "warning",
            "the learning rate",
            f"{rate:g}, at which the loss rises or diverges",
            "below where it diverges" + at(curve.diverges_at),
            f"Lower it. {what}",
        )
        return
    share = evidence.memorized.own.share
    is_scheduled = "initial_lr" in group  # the copies were trained with the rate of this moment
    barely_moves = share is not None and share < BARELY and not is_scheduled
    if curve.suggestion is not None and rate * FAR_BELOW < curve.suggestion and barely_moves:
        yield Finding(
            "warning",
            "the learning rate",
            f"{rate:g}, at which the loss hardly moves in {len(evidence.memorized.losses)} steps",
            f"near {curve.suggestion:.1e}",
            f"Raise it. {what}",
        )


def is_too_high(rate: float, curve: LearningRates, training: Training) -> bool:
    """Tell whether the loss diverges at a rate.

    The range test alone does not tell: it arrives at a rate after smaller ones, and from trained
    weights the loss can only rise. So a training on one small batch at this rate has to fail too.
    """
    is_above = curve.suggestion is not None and rate > curve.suggestion
    if is_above and has_jumped(training.losses):
        return True
    if training.share is not None and training.share >= ENOUGH:
        return False
    if curve.diverges_at is not None and rate >= curve.diverges_at:
        return True
    if not training.losses:
        return False
    first = training.losses[0]
    last = training.losses[-max(1, len(training.losses) // 5) :]
    if not all(map(math.isfinite, last)):
        return True
    has_risen = sum(last) / len(last) > first + RISEN * abs(first)
    return has_risen and is_above


def has_jumped(losses: list[float]) -> bool:
    """Tell whether a loss was far above its first value in between."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite or not finite[0] > 0:  # one near 0 or below it has no such scale
        return False
    return max(finite) > JUMPED * finite[0]


def try_instead(curve: LearningRates) -> str:
    """Say which rate to try."""
    if curve.suggestion is None:
        return "model.lr_find(dl_train).plot() shows the loss over the learning rate."
    return (
        f"Try lr={curve.suggestion:.1e}, where the loss falls most steeply; "
        "model.lr_find(dl_train).plot() shows the curve."
    )


def at(rate: float | None) -> str:
    """Return a rate in words, if it is known."""
    return "" if rate is None else f", {rate:.1e}"
