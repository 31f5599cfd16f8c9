"""Checks of the order of the training rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.split import class_labels

BATCHES = 4  # fewer are of one class by chance
ROWS = 4  # of a batch
ONE_CLASS = 0.5  # share of the batches with rows of one class alone
SORTED = 0.98  # share of neighbors that are in order
CHANCE = 1e-6  # that shuffled batches are of one class as often


def check_order(evidence: Evidence) -> Iterator[Finding]:
    """Find batches of one class, or labels that are sorted."""
    sample = evidence.train
    if sample.is_batched_here or len(sample.batches) < 2 or not isinstance(sample.labels, Tensor):
        return
    classes = class_labels(sample)
    remedy = (
        "The network forgets each class as it learns the next. Shuffle: DataLoader(..., "
        "shuffle=True)."
    )
    if classes is not None and classes.unique().numel() > 1:
        single, chance = count_single_class(classes.split(sample.sizes))
        batches = len(sample.batches)
        if batches >= BATCHES and single >= ONE_CLASS * batches and chance < CHANCE:
            yield Finding(
                "warning",
                "the order of dl_train",
                f"{single} of {batches} batches have rows of one class alone",
                "rows of all classes",
                remedy,
            )
            return
    labels = sample.labels
    if labels.numel() != len(labels) or labels.unique().numel() < 2 or sample.rows < 20:
        return
    values = labels.reshape(-1).double()
    steps = values.diff()
    if classes is None and not is_sorted_by_chance(values):
        rising = (steps >= 0).float().mean().item()
        found = max(rising, (steps <= 0).float().mean().item())
    elif classes is not None and bool((steps >= 0).all() | (steps <= 0).all()):
        found = 1.0
    else:
        return
    if found >= SORTED:
        yield Finding(
            "warning",
            "the order of dl_train",
            f"the labels are sorted in {sample.rows:,} rows",
            "a random order",
            remedy.replace("each class as it learns the next", "the first rows"),
        )


def count_single_class(batches: tuple[Tensor, ...]) -> tuple[int, float]:
    """Return how many batches have one class alone, and the chance of that after shuffling."""
    everything = torch.cat(batches)
    shares = torch.bincount(everything - everything.min()).double() / len(everything)
    single = 0
    chance = 1.0
    for labels in batches:
        if len(labels) >= ROWS and labels.unique().numel() == 1:
            single += 1
            chance *= float((shares ** len(labels)).sum())
    return single, chance


def is_sorted_by_chance(values: Tensor) -> bool:
    """Tell whether the values rise with time by nature: a trend, in steps of one size."""
    steps = values.diff()
    return bool((steps.abs() < 1e-12).all())
