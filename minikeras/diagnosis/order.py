"""Checks of the order of the training rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minikeras.diagnosis.evidence import Evidence, Sample, named_tensors
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.split import class_labels

BATCHES = 4  # fewer are of one class by chance
ROWS = 4  # of a batch
ROWS_TO_SORT = 20  # fewer may be sorted by chance
ONE_CLASS = 0.5  # share of the batches with rows of one class alone
SORTED = 0.98  # share of neighbors that are in order
DISTANCE = 6.0  # standard deviations, so that it is no chance
SMALLEST = 1e-12


def check_order(evidence: Evidence) -> Iterator[Finding]:
    """Find batches of one class, or labels that are sorted."""
    sample = evidence.train
    if sample.is_batched_here or len(sample.batches) < 2 or sample.labels is None:
        return
    for _, labels in named_tensors(sample.labels, "the labels"):
        finding = judge_order(sample, drop_one_hot(labels))
        if finding is not None:
            yield finding
            return


def drop_one_hot(labels: Tensor) -> Tensor:
    """Return the class numbers of one-hot labels; others as they are."""
    if labels.ndim != 2 or labels.shape[1] < 2:
        return labels
    is_one_hot = ((labels == 0) | (labels == 1)).all() & (labels.sum(1) == 1).all()
    return labels.argmax(1) if bool(is_one_hot) else labels


def judge_order(sample: Sample, labels: Tensor) -> Finding | None:
    """Return what is wrong with the order of these labels, if anything is."""
    if labels.numel() != sample.rows or labels.unique().numel() < 2:
        return None
    classes = class_labels(labels)
    remedy = "Shuffle: DataLoader(..., shuffle=True)."
    if classes is not None:
        single, distance = count_single_class(classes.split(sample.sizes))
        batches = len(sample.batches)
        if batches >= BATCHES and single >= ONE_CLASS * batches and distance > DISTANCE:
            return Finding(
                "warning",
                "the order of dl_train",
                f"{single} of {batches} batches have rows of one class alone",
                "rows of all classes",
                f"The network forgets each class as it learns the next. {remedy}",
            )
    if is_sorted(labels.reshape(-1).double(), classes is not None):
        return Finding(
            "warning",
            "the order of dl_train",
            f"the labels are sorted in {sample.rows:,} rows",
            "a random order",
            f"The network forgets the first rows as it learns the next. {remedy}",
        )
    return None


def is_sorted(values: Tensor, are_classes: bool) -> bool:
    """Tell whether labels are sorted, up or down, from the first row to the last."""
    steps = values.diff()
    if len(values) < ROWS_TO_SORT:
        return False
    if are_classes:
        return bool((steps >= 0).all() | (steps <= 0).all())
    moves = steps[steps != 0]  # a target may be 0 in most rows
    if len(moves) < ROWS_TO_SORT or is_sorted_by_nature(values):
        return False
    rising = (moves > 0).double().mean().item()
    if max(rising, 1 - rising) < SORTED:
        return False
    # what rises again and again, such as a countdown, comes back to where it was
    first_half = values[: len(values) // 2]
    below = (first_half <= values.median()).double().mean().item()
    return below >= SORTED or below <= 1 - SORTED


def count_single_class(batches: tuple[Tensor, ...]) -> tuple[int, float]:
    """Count the batches of one class, and say how far that is from chance.

    Returns:
        The count; and its distance from what shuffled rows would have on average, in standard
        deviations of that count (a sum of independent events of different probability).
    """
    everything = torch.cat(batches)
    shares = torch.bincount(everything - everything.min()).double() / len(everything)
    single = 0
    expected = 0.0
    variance = 0.0
    for labels in batches:
        if len(labels) < ROWS:
            continue
        single += labels.unique().numel() == 1
        probability = float((shares ** len(labels)).sum())
        expected += probability
        variance += probability * (1 - probability)
    return single, (single - expected) / max(variance, SMALLEST) ** 0.5


def is_sorted_by_nature(values: Tensor) -> bool:
    """Tell whether the values rise with time by nature: a trend, in steps of one size."""
    steps = values.diff()
    return bool((steps.abs() < 1e-12).all())
