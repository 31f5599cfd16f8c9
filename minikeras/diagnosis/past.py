"""Checks of the history of earlier fits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from minikeras.batch import unpack
from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.labels import find_tasks
from minikeras.diagnosis.layers import make_batch, return_parts
from minikeras.diagnosis.tasks import BINARY, CLASSES, PROBABILITIES, Task

EPOCHS = 5  # fewer say little
FAR = 0.1  # of what val_loss fell before: a rise that counts
ROSE = 0.2  # of val_loss above its best at the end, relative to the best
PATIENCE = 3  # epochs since the best
DIVERGED = 2.0  # times the best loss
FALLING = 0.05  # of the loss, over the last fifth of the epochs
NEAR = 0.01  # of the share of the most frequent class
ALONE = 0.99  # of the rows get one answer
STANDS = 0.005  # the most that a metric that stands still moves


def check_history(evidence: Evidence) -> Iterator[Finding]:
    """Find a fit that diverged, was cut short, overfits, or stands at the majority class."""
    history = evidence.history
    if "loss" not in history or not len(history):
        return
    loss = history["loss"]
    if len(history) < EPOCHS and np.isfinite(loss.iloc[-1]):
        return
    if find_divergence(loss) is not None:
        yield describe_divergence(loss)
        return
    standing = list(find_standing(evidence, history))
    yield from standing
    overfitting = find_overfitting(evidence, history)
    if overfitting is not None:
        yield overfitting
    elif not standing:
        yield from find_unfinished(loss)


def find_divergence(loss: pd.Series[float]) -> int | None:
    """Return the epoch, from 1, from which the loss is far above its best or not finite."""
    values = loss.to_numpy(float)
    if not np.isfinite(values[-1]):
        return int(np.argmin(np.isfinite(values))) + 1
    best = int(np.nanargmin(values))
    limit = values[best] + (DIVERGED - 1) * abs(values[best])
    # a fit that has come near 0 may rise a little, and still be far below where it began
    if values[-1] > limit and values[-1] > values[0]:
        return best + 2
    return None


def describe_divergence(loss: pd.Series[float]) -> Finding:
    """Say that the loss diverged."""
    values = loss.to_numpy(float)
    last = f"{values[-1]:.3g}" if np.isfinite(values[-1]) else "NaN or infinite"
    finite = values[np.isfinite(values)]
    best = f", {finite.min():.3g} at best" if len(finite) else ""
    return Finding(
        "warning" if np.isfinite(values[-1]) else "error",
        "the history",
        f"the loss diverged in epoch {find_divergence(loss)}: {last} at the end{best}",
        "a loss that falls",
        "Build and compile the model again, with a lower learning rate (model.lr_find) or "
        "compile(clip_grad_norm=1.0).",
    )


def find_overfitting(evidence: Evidence, history: pd.DataFrame) -> Finding | None:
    """Return the finding of a val_loss that rises while the loss falls."""
    if "val_loss" not in history:
        return None
    val_loss = history["val_loss"].dropna()
    if len(val_loss) < EPOCHS or not np.isfinite(val_loss).all():
        return None
    best = int(val_loss.argmin())
    epoch = int(val_loss.index[best]) + 1
    lowest = val_loss.iloc[best]
    last = val_loss.iloc[-PATIENCE:].mean()
    loss = history["loss"]
    still_falls = loss.iloc[-1] < loss.loc[val_loss.index[best]]
    if len(val_loss) - 1 - best < PATIENCE or not still_falls:
        return None
    fall = max(0.0, val_loss.iloc[0] - lowest)
    if last < lowest + max(ROSE * abs(lowest), FAR * fall):
        return None
    if has_best_weights(evidence, lowest, last):
        return Finding(
            "note",
            "the history",
            f"overfitting since epoch {epoch}; the weights are those of about that epoch",
            "val_loss falls with loss",
            "More rows or augmentation, dropout, weight decay, or a smaller network may lower "
            f"val_loss below {lowest:.3g}.",
        )
    return Finding(
        "warning",
        "the history",
        f"overfitting since epoch {epoch}: val_loss {lowest:.3g} then, {val_loss.iloc[-1]:.3g} "
        "at the end, while loss falls",
        "val_loss falls with loss",
        "Keep the best weights: EarlyStopping(patience=5, restore_best_weights=True). Then more "
        "rows or augmentation, dropout, weight decay, or a smaller network.",
    )


def has_best_weights(evidence: Evidence, lowest: float, last: float) -> bool:
    """Tell whether the model is again as it was at its best, as after EarlyStopping.

    It is if the loss on dl_val is nearer to the lowest one of the history than to the last.
    """
    val = evidence.val
    if val is None:
        return False
    is_split = evidence.run.split_batch is not unpack
    model = evidence.copy_model(split_batch=return_parts if is_split else None)
    batches = []
    for parts, size in zip(val.batches, val.sizes, strict=True):
        batches.append(make_batch(parts, size, is_split))
    with silenced():
        loss = model.evaluate(batches).get("val_loss")
    return loss is not None and abs(loss - lowest) < abs(loss - last)


def find_standing(evidence: Evidence, history: pd.DataFrame) -> Iterator[Finding]:
    """Find metrics that stand at the share of the most frequent class.

    They may be there by chance: the model then still gives different answers.
    """
    shares = []
    for task in find_tasks(evidence):
        numbers = task.class_numbers if task.kind in (CLASSES, BINARY) else None
        if numbers is None or not numbers.numel() or int(numbers.min()) < 0:
            continue
        if has_one_answer(task):
            shares.append(np.bincount(numbers.cpu().numpy()).max() / numbers.numel())
    for name in history:
        if not shares or str(name).startswith("val_") or name in ("loss", "lr"):
            continue
        values = history[name].dropna().to_numpy(float)
        half = values[len(values) // 2 :]  # the network may have begun elsewhere
        if len(half) < 2 or np.ptp(half) > STANDS:
            continue
        for share in shares:
            if abs(half.mean() - share) < NEAR and share < 1:
                yield Finding(
                    "warning",
                    f"the history, {name}",
                    f"{half.mean():.3f} in the last {len(half)} epochs, the share of the most "
                    "frequent class",
                    "above that",
                    "The network gives the same answer for every row. See the other lines; with "
                    "rare classes weight them, and watch recall or AUROC.",
                )
                break


def has_one_answer(task: Task) -> bool:
    """Tell whether nearly all rows get the same class."""
    if task.kind == CLASSES:
        answers = task.outputs.argmax(1)
    else:
        threshold = 0.5 if task.takes == PROBABILITIES else 0.0
        answers = (task.outputs > threshold).long()
    counts = torch.bincount(answers.reshape(-1))
    return bool(counts.max() >= ALONE * answers.numel())


def find_unfinished(loss: pd.Series[float]) -> Iterator[Finding]:
    """Find a loss that still falls at the end."""
    count = max(2, len(loss) // 5)
    values = loss.to_numpy(float)
    before = values[-count]
    if before > 0 and (before - values[-1]) / before > FALLING:
        yield Finding(
            "note",
            "the history",
            f"the loss still falls: {before:.3g} to {values[-1]:.3g} in the last {count} epochs",
            "level at the end",
            "Train for more epochs: fit goes on where it stopped.",
        )
