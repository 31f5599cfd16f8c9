"""Train a copy on one small batch: a network that can learn can memorize it.

memorize
    a copy with the user's optimizer      `steps` steps on the batch
    if it does not memorize the batch:
    copies with Adam at a few rates       to tell the optimizer from the network
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minikeras.callback import BatchLogs, Callback
from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import copy_leaf, use_batch_statistics
from minikeras.diagnosis.layers import copy_to_train, make_batch
from minikeras.nests import leaves, map_leaves
from minikeras.run import has_own_step

if TYPE_CHECKING:
    from minikeras.diagnosis.evidence import Evidence
    from minikeras.model import Model

ROWS = 32  # of the batch
SECONDS = 4.0  # for one training; on a large network there are fewer steps
RATES = (1e-3, 1e-2)  # of Adam: its default, and ten times that for the few steps
ENOUGH = 0.5  # of the way to the lowest loss there is: the network can memorize


@dataclass
class Training:
    """A training on the batch."""

    losses: list[float]  # of each step
    share: float | None  # of the way from the start to the lowest loss; None if not known


@dataclass
class Memorized:
    """The trainings on one small batch."""

    rows: int
    own: Training  # with the user's optimizer
    others: dict[float, Training] = field(default_factory=dict)  # with Adam, by its rate
    seconds: float = 0.0  # of one step

    @property
    def losses(self) -> list[float]:
        """The losses with the user's optimizer."""
        return self.own.losses

    @property
    def best_share(self) -> float | None:
        """The largest share of all trainings."""
        shares = [self.own.share, *(training.share for training in self.others.values())]
        known = [share for share in shares if share is not None]
        return max(known, default=None)


def memorize(evidence: Evidence) -> Memorized:
    """Train copies on the first rows of dl_train, `evidence.steps` steps each.

    Raises:
        Exception: the training raises it.
    """
    batch, rows = take_rows(evidence)
    start = time.perf_counter()
    own = train_on(evidence, batch, None)
    seconds = (time.perf_counter() - start) / len(own.losses)
    found = Memorized(rows, own, seconds=seconds)
    if is_enough(own) or not can_change_optimizer(evidence):
        return found
    for rate in RATES:
        found.others[rate] = train_on(evidence, batch, rate)
        if is_enough(found.others[rate]):
            break
    return found


def is_enough(training: Training) -> bool:
    """Tell whether a training has memorized the batch, or as good as."""
    return training.share is not None and training.share >= ENOUGH


def take_rows(evidence: Evidence) -> tuple[tuple[Any, Any, Any], int]:
    """Return the first rows of the first batch: features, labels and weights, and their number."""
    parts = evidence.train.batches[0]
    size = evidence.train.sizes[0]
    tensors = [leaf for leaf in leaves(parts) if isinstance(leaf, Tensor)]
    others = [leaf for leaf in leaves(parts) if leaf is not None and not isinstance(leaf, Tensor)]
    if others or size <= ROWS or any(not t.ndim or len(t) != size for t in tensors):
        return parts, size

    def first_rows(leaf: Any) -> Any:
        return leaf if leaf is None else leaf[:ROWS]

    return map_leaves(first_rows, parts), ROWS


def can_change_optimizer(evidence: Evidence) -> bool:
    """Tell whether another optimizer makes sense: not in a custom step, which may use several."""
    return list(evidence.optimizers) == [""] and not has_own_step(evidence.model)


def train_on(evidence: Evidence, parts: tuple[Any, Any, Any], rate: float | None) -> Training:
    """Train a copy on one batch, again and again.

    Args:
        rate: of Adam, on the parameters that the user's optimizer has; None for that one itself.
    """
    model, _ = copy_to_train(evidence)
    run = model._compiled("diagnose")
    rows = evidence.train.sizes[0]
    if isinstance(parts[0], Tensor):
        rows = len(parts[0])
    batch = make_batch(parts, rows, evidence.run.options["split_batch"] is not None)
    if rate is not None:
        parameters = []
        for group in run.optimizers[""].param_groups:
            parameters += group["params"]
        with silenced():
            model.compile(run.loss_func, torch.optim.Adam(parameters, lr=rate), **run.options)
    measure = Measure(model, parts)
    first = measure()
    watch = Watch(SECONDS)
    with silenced():
        model.fit(
            1,
            [batch],
            steps_per_epoch=evidence.steps,
            callbacks=[watch],
            verbose=0,
            on_nan="ignore",
        )
    last = measure()
    share = share_of_way(first, last, floor_of(evidence, parts), watch.losses)
    return Training(watch.losses, share)


class Watch(Callback):
    """Notes the loss of each step, and stops the fit after some seconds."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.losses: list[float] = []

    def on_batch_end(self, batch: int, logs: BatchLogs) -> None:
        self.losses.append(logs.batch.get("loss", math.nan))
        if time.perf_counter() > self.end:
            self.model.stop_training = True


class Measure:
    """Computes the loss of the batch without dropout, as it is before and after the training.

    BatchNorm uses the statistics of the batch, as in training: its running statistics may not have
    settled in so few steps.
    """

    def __init__(self, model: Model, parts: tuple[Any, Any, Any]) -> None:
        self.model = model
        self.parts = parts

    def __call__(self) -> float | None:
        """Return the loss; None if forward does not take the features."""
        features, labels, weight = self.parts
        try:
            with torch.no_grad(), silenced(), use_batch_statistics(self.model):
                outputs = self.model.compute_outputs(map_leaves(copy_leaf, features))
                loss: Any = self.model.compute_loss(outputs, labels, weight)
        except Exception:
            return None
        finally:
            self.model.train()
        total, count = loss if isinstance(loss, tuple) else (loss, 1)
        return float(total) / float(count) if float(count) else None


def floor_of(evidence: Evidence, parts: tuple[Any, Any, Any]) -> float | None:
    """Return the lowest loss that there can be: that of outputs equal to the labels.

    None if it is not known, as with several losses or a custom one.
    """
    tasks = evidence.tasks
    labels = parts[1]
    if len(tasks) != 1 or not isinstance(labels, Tensor):
        return None
    answer = perfect_answers().get((tasks[0].kind, tasks[0].takes))
    if answer is None or labels.shape[1:] != tasks[0].outputs.shape[1:]:
        return 0.0 if tasks[0].kind == "classes" else None
    with torch.no_grad():
        loss = tasks[0].loss_func(answer(labels.to(tasks[0].outputs.dtype)), labels)
    return float(loss.mean()) if isinstance(loss, Tensor) else None


def perfect_answers() -> dict[tuple[str, str], Callable[[Tensor], Tensor]]:
    """Return the outputs that are equal to labels, by what a loss takes."""
    return {
        ("regression", "values"): lambda labels: labels,
        ("binary", "probabilities"): lambda labels: labels,
        ("binary", "scores"): lambda labels: torch.logit(labels.clamp(1e-6, 1 - 1e-6)),
    }


def share_of_way(
    first: float | None, last: float | None, floor: float | None, losses: list[float]
) -> float | None:
    """Return how much of the way from the first loss to the lowest one the training went.

    Without a floor it is the fall relative to the first loss; 1 if it fell below 0.
    """
    if first is None or last is None:
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            return None
        first = finite[0]
        last = min(finite)
    if not math.isfinite(last) or not math.isfinite(first):
        return 0.0
    if floor is None:
        if last < 0:
            return 1.0 if last < first else 0.0
        floor = 0.0
    if first <= floor:
        return 1.0
    return (first - last) / (first - floor)
