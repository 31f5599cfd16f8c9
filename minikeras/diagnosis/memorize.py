"""Train a copy on one small batch: a network that can learn can memorize it.

memorize
    a copy with the user's optimizer      `steps` steps on the batch
    if it does not memorize the batch:
    copies with Adam at a few rates       to tell the optimizer from the network
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minikeras.callback import BatchLogs, Callback
from minikeras.diagnosis.constant_answer import as_number
from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import copy_leaf, use_batch_statistics
from minikeras.diagnosis.layers import copy_to_train, make_batch
from minikeras.diagnosis.tasks import (
    BINARY,
    CLASSES,
    LOG_PROBABILITIES,
    PROBABILITIES,
    REGRESSION,
    SCORES,
    VALUES,
    Task,
)
from minikeras.nests import detach_nest, leaves, map_leaves
from minikeras.run import has_own_step

if TYPE_CHECKING:
    from minikeras.diagnosis.evidence import Evidence
    from minikeras.model import Model

ROWS = 32  # of the batch
SECONDS = 4.0  # for one training; on a large network there are fewer steps
RATES = (1e-3, 1e-2)  # of Adam: its default, and ten times that for the few steps
SEARCH = 60  # iterations of LBFGS for the lowest loss
MOST_NUMBERS = 2**20  # in the outputs, for that
SETTLED = 0.02  # of the fall: the most that a second search may find
SMALLEST = 1e-6  # a probability; its logarithm is finite in float32
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
    own = train_on(evidence, batch, rows, None)
    seconds = (time.perf_counter() - start) / len(own.losses)
    found = Memorized(rows, own, seconds=seconds)
    if is_enough(own) or not can_change_optimizer(evidence):
        return found
    for rate in RATES:
        found.others[rate] = train_on(evidence, batch, rows, rate)
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


def train_on(
    evidence: Evidence, parts: tuple[Any, Any, Any], rows: int, rate: float | None
) -> Training:
    """Train a copy on one batch, again and again.

    Args:
        parts: features, labels and weights of the batch.
        rows: how many rows they have.
        rate: of Adam, on the parameters that the user's optimizer has; None for that one itself.
    """
    model, _ = copy_to_train(evidence)
    run = model._compiled("diagnose")
    batch = make_batch(parts, rows, evidence.run.options["split_batch"] is not None)
    if rate is not None:
        parameters = []
        for group in run.optimizers[""].param_groups:
            parameters += group["params"]
        with silenced():
            model.compile(run.loss_func, torch.optim.Adam(parameters, lr=rate), **run.options)
    measure = Measure(model, parts, evidence.compares_labels)
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
    if has_own_step(model) and len(run.optimizers) > 1:
        return Training(watch.losses, None)  # the losses of a GAN need not fall
    floor = floor_of(evidence, parts, measure.first_outputs)
    share = share_of_way(first, last, floor, watch.losses)
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

    A custom step that does not compare the outputs with the labels has another loss: none is known.
    BatchNorm uses the statistics of the batch, as in training: its running statistics may not have
    settled in so few steps.
    """

    def __init__(self, model: Model, parts: tuple[Any, Any, Any], is_known: bool) -> None:
        self.model = model
        self.parts = parts
        self.is_known = is_known
        self.first_outputs: Any = None  # before the training; None if forward raises an error

    def __call__(self) -> float | None:
        """Return the loss; None if forward does not take the features."""
        if not self.is_known:
            return None
        features, labels, weight = self.parts
        try:
            with torch.no_grad(), silenced(), use_batch_statistics(self.model):
                outputs = self.model.compute_outputs(map_leaves(copy_leaf, features))
                if self.first_outputs is None:
                    self.first_outputs = detach_nest(outputs)
                loss: Any = self.model.compute_loss(outputs, labels, weight)
        except Exception:
            return None
        finally:
            self.model.train()
        total, count = loss if isinstance(loss, tuple) else (loss, 1)
        return float(total) / float(count) if float(count) else None


def floor_of(evidence: Evidence, parts: tuple[Any, Any, Any], outputs: Any) -> float | None:
    """Return the lowest loss that there can be: that of outputs equal to the labels.

    Of a loss that is not known it is searched for. None if it is not found, as without a bound
    below.

    Args:
        outputs: of the batch before the training.
    """
    tasks = evidence.tasks
    labels = parts[1]
    if len(tasks) == 1 and isinstance(labels, Tensor):
        task = tasks[0]
        answer = perfect_answer(task, labels)
        if answer is not None:
            with torch.no_grad():
                loss = task.loss_func(answer, labels)
            return float(loss.mean()) if isinstance(loss, Tensor) else None
        if task.kind == CLASSES:
            return 0.0
    if parts[2] is not None or outputs is None:
        return None
    return search_lowest(evidence.loss_func, outputs, labels)


def perfect_answer(task: Task, labels: Tensor) -> Tensor | None:
    """Return the outputs with the lowest loss; None if they are not known."""
    dtype = task.outputs.dtype
    if task.kind == CLASSES and task.takes in (SCORES, LOG_PROBABILITIES):
        return perfect_scores(task, labels)
    if labels.shape[1:] != task.outputs.shape[1:]:
        return None
    if (task.kind, task.takes) in ((REGRESSION, VALUES), (BINARY, PROBABILITIES)):
        return labels.to(dtype)
    if (task.kind, task.takes) == (BINARY, SCORES):
        return torch.logit(labels.to(dtype).clamp(SMALLEST, 1 - SMALLEST))
    return None


def perfect_scores(task: Task, labels: Tensor) -> Tensor | None:
    """Return the logarithm of labels that are probabilities, as smoothed or of a teacher."""
    smoothing = getattr(task.loss_func, "label_smoothing", 0.0)
    if not labels.is_floating_point() or labels.shape[1:] != task.outputs.shape[1:]:
        return None  # class numbers
    shares = labels * (1 - smoothing) + smoothing / labels.shape[1]
    return shares.to(task.outputs.dtype).clamp(min=SMALLEST).log()


def search_lowest(loss_func: Any, outputs: Any, labels: Any) -> float | None:
    """Return the lowest loss of any outputs, which are moved on their own, without a network.

    None if it is not found: the loss has no bound below, no gradient, or is no number.
    """
    moved: list[Tensor] = []

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        moved.append(leaf.detach().clone().requires_grad_())
        return moved[-1]

    free = map_leaves(move, outputs)
    if not 0 < sum(tensor.numel() for tensor in moved) <= MOST_NUMBERS:
        return None
    losses: list[float] = []
    optimizer = torch.optim.LBFGS(moved, max_iter=SEARCH, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimizer.zero_grad()
        loss = as_number(loss_func(free, labels))
        if loss is None:
            raise TypeError("the loss is no number")
        loss.backward()
        losses.append(float(loss))
        return loss

    try:
        with torch.enable_grad(), silenced():
            optimizer.step(closure)
            found = min(losses)
            optimizer.step(closure)
    except Exception:  # it has no gradient, or needs more than outputs and labels
        return None
    lowest = min(losses)
    if not all(map(math.isfinite, losses)) or found - lowest > SETTLED * (losses[0] - lowest):
        return None
    return lowest


def share_of_way(
    first: float | None, last: float | None, floor: float | None, losses: list[float]
) -> float | None:
    """Return how much of the way from the first loss to the lowest one the training went.

    Without a floor it is the fall relative to the first loss; 1 if it fell, and is below 0.
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
        if last < 0 or first <= 0:
            return 1.0 if last < first else 0.0
        floor = 0.0
    if first <= floor:
        return 1.0
    return (first - last) / (first - floor)
