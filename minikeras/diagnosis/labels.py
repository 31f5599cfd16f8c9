"""Checks of the labels: missing values, classes and their shares, the scale of targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minikeras.diagnosis.constant_answer import best_constant_loss, loss_of
from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import Evidence, copy_leaf, named_tensors
from minikeras.diagnosis.features import stands_for_all, write_number
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.tasks import BINARY, CLASSES, REGRESSION, Task
from minikeras.diagnosis.tasks import find_tasks as tasks_of
from minikeras.nests import map_leaves

NEARLY_ALL = 0.97  # share of one class; a rare class of 5 to 10 % is common and can be learnt
ROWS_PER_CLASS = 20  # rows, on average, from which a class that never comes is no chance
MOST_CLASSES = 1000
MOST_TOKENS = 30  # a vocabulary has words that are rare, or never to be predicted
LARGE = 30.0  # root mean square of a target; the loss is its square
LEARNT = 0.5  # of the loss of the best constant answer: the network has reached the targets
SMALL = 1e-3
REACHED = 0.05  # deviation of the outputs by that of the targets; large targets are not reached
FAR = 2.0  # deviations of the targets from 0 to their mean, which no network reaches by chance
ROWS = 20
NAMES_OF_WEIGHTS = ("weight", "pos_weight", "alpha")  # of classes, in torch's losses and FocalLoss


def check_missing_labels(evidence: Evidence) -> Iterator[Finding]:
    """Find NaN and infinite labels."""
    bad_rows = 0
    rows = 0
    first_bad: tuple[Any, Any] | None = None  # features and labels of a batch with some
    for features, labels, _ in evidence.train.batches:
        for _, tensor in named_tensors(labels, "the labels"):
            if tensor.is_floating_point() and tensor.ndim:
                bad = ~tensor.reshape(len(tensor), -1).isfinite()
                bad_rows += int(bad.any(1).sum())
                rows += len(tensor)
                if first_bad is None and bool(bad.any()):
                    first_bad = features, labels
    if first_bad is None:
        return
    level = "error"
    remedy = "One of them makes every weight NaN. Drop these rows, from features and labels alike."
    if is_left_out(evidence, *first_bad):
        level = "note"
        remedy = "The loss leaves them out: it is finite for a batch with some."
    found = f"NaN or infinite in {bad_rows:,} of {rows:,} rows"
    yield Finding(level, "the labels", found, "none", remedy)


def is_left_out(evidence: Evidence, features: Any, labels: Any) -> bool:
    """Tell whether a custom loss leaves out labels that are NaN, as of values not measured."""
    model = evidence.model
    model.eval()
    try:
        with torch.no_grad(), silenced():
            outputs = model.compute_outputs(map_leaves(copy_leaf, features))
            tasks = tasks_of(evidence.loss_func, outputs, labels)
    except Exception:  # said elsewhere
        return False
    return bool(tasks) and all(loss_of(task, task.outputs) is not None for task in tasks)


def find_tasks(evidence: Evidence) -> list[Task]:
    """Return the tasks; none if the model cannot be called, which is said elsewhere."""
    try:
        return evidence.tasks
    except Exception:
        return []


def check_class_range(evidence: Evidence) -> Iterator[Finding]:
    """Find classes that the outputs do not have."""
    for task in find_tasks(evidence):
        labels = task.labels
        if task.kind == CLASSES and task.classes and not labels.is_floating_point():
            numbers = all_class_numbers(evidence, task)
            if numbers is None or not numbers.numel():
                continue
            outside = numbers[(numbers < 0) | (numbers >= task.classes)]
            if outside.numel():
                yield Finding(
                    "error",
                    f"the labels{task.called}",
                    f"class {outside[0].item()}, outside the {task.classes} outputs, in "
                    f"{outside.numel():,} of {numbers.numel():,} labels",
                    f"0 to {task.classes - 1}",
                    explain_range(numbers, task.classes),
                )
        elif task.kind == BINARY and labels.numel():
            lowest, highest = labels.min().item(), labels.max().item()
            if lowest < 0 or highest > 1:
                yield Finding(
                    "error",
                    f"the labels{task.called}",
                    f"{lowest:g} to {highest:g}",
                    "0 to 1",
                    "The loss compares with 0 and 1, and becomes negative without end beyond. "
                    "Map the labels: y = (y > 0).float(); for several classes use "
                    "nn.CrossEntropyLoss.",
                )


def explain_range(numbers: Tensor, classes: int) -> str:
    """Return what to do about classes outside the outputs."""
    lowest, highest = int(numbers.min()), int(numbers.max())
    if lowest == 1 and highest == classes:
        return "The classes begin at 1: subtract it, y = y - 1."
    if lowest < 0:
        return (
            "Number the classes from 0; labels that are to be left out have the loss's "
            "ignore_index, -100."
        )
    return f"Give the last layer {highest + 1} outputs, or number the classes from 0 without gaps."


def check_class_shares(evidence: Evidence) -> Iterator[Finding]:
    """Find classes that never come, and one that is nearly all there is."""
    sample = evidence.train
    for task in find_tasks(evidence):
        numbers = all_class_numbers(evidence, task)
        if numbers is None or numbers.numel() < ROWS or task.outputs[0].numel() == 0:
            continue
        classes = task.classes if task.kind == CLASSES else 2
        if task.kind == BINARY and task.labels[0].numel() > 1:
            continue  # several labels for each row: each may be rare
        if classes is None or bool(((numbers < 0) | (numbers >= classes)).any()):
            continue
        counts = torch.bincount(numbers, minlength=classes)
        ignored = getattr(task.loss_func, "ignore_index", None)
        missing = [number for number in (counts == 0).nonzero()[:, 0].tolist() if number != ignored]
        share = counts.max().item() / numbers.numel()
        most = int(counts.argmax())
        # most of an image is background, and most words are rare
        is_of_rows = task.labels.numel() == len(task.labels) or task.labels.is_floating_point()
        if share > NEARLY_ALL:
            level = "error" if share == 1 and sample.is_whole else "warning"
            if share < 1 and (is_weighted(task) or not is_of_rows):
                level = "note"
            sort = ""
            if not stands_for_all(sample, evidence.dl_train):
                sort = (
                    "These are the first rows: if dl_train is sorted, shuffle it, "
                    "DataLoader(..., shuffle=True). "
                )
            yield Finding(
                level,
                f"the labels{task.called}",
                f"class {most} is {share:.1%} of {numbers.numel():,} labels",
                "no class nearly alone",
                f"{sort}Always answering {most} has an accuracy of {share:.1%}: compare with that. "
                "Get more rows of the others, weight them (nn.CrossEntropyLoss(weight=...), "
                "nn.BCEWithLogitsLoss(pos_weight=...), FocalLoss), draw them more often "
                "(WeightedRandomSampler), and watch recall or AUROC in place of accuracy.",
            )
        elif (
            missing
            and classes <= most_classes(task)
            and numbers.numel() >= ROWS_PER_CLASS * classes
        ):
            is_certain = is_of_rows and stands_for_all(sample, evidence.dl_train)
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            yield Finding(
                "warning" if is_certain else "note",
                f"the labels{task.called}",
                f"no row of class {shown} in {numbers.numel():,} labels; the outputs have "
                f"{classes} classes",
                "rows of each class",
                "The network cannot learn a class without rows. Add some, or give the last layer "
                "as many outputs as there are classes.",
            )


def is_weighted(task: Task) -> bool:
    """Tell whether the loss gives rare classes more weight."""
    weights = [getattr(task.loss_func, name, None) for name in NAMES_OF_WEIGHTS]
    return any(weight is not None for weight in weights)


def all_class_numbers(evidence: Evidence, task: Task) -> Tensor | None:
    """Return the class numbers of all rows that were looked at, not only of those with outputs."""
    labels = evidence.train.labels
    if task.name or not isinstance(labels, Tensor) or labels.shape[1:] != task.labels.shape[1:]:
        return task.class_numbers
    if labels.is_floating_point():
        return task.class_numbers
    whole = Task(task.name, task.kind, task.takes, task.loss_func, task.outputs, labels)
    return whole.class_numbers


def check_target_scale(evidence: Evidence) -> Iterator[Finding]:
    """Find regression targets far from unit scale."""
    for task in find_tasks(evidence):
        if task.kind != REGRESSION or len(task.labels) < ROWS:
            continue
        targets = task.labels.detach().float()
        if not bool(targets.isfinite().all()):
            continue
        size = targets.square().mean().sqrt().item()
        deviation = (targets - targets.mean(0)).square().mean().sqrt().item()
        is_constant = bool((targets == targets[:1]).all())
        if size > LARGE and not is_constant and not is_learnt(task) and not is_reached(task):
            found = f"values of about {write_number(size)}, deviation {write_number(deviation)}"
        elif deviation < SMALL and not is_constant:
            found = f"a deviation of {deviation:.2g}"
        elif is_constant:
            yield Finding(
                "error",
                f"the targets{task.called}",
                f"the same for all {len(targets):,} rows: {targets.reshape(-1)[0].item():g}",
                "values that differ",
                "There is nothing to learn. Look at how the labels are read.",
            )
            continue
        else:
            continue
        yield Finding(
            "warning",
            f"the targets{task.called}",
            found,
            "mean 0 and deviation 1",
            "The weights have to grow for many steps to reach them. Train on "
            "(y - y_train.mean()) / y_train.std(), and undo it after predict.",
        )


def is_learnt(task: Task) -> bool:
    """Tell whether the outputs are much nearer to the targets than the best constant answer."""
    loss = loss_of(task, task.outputs)
    constant = best_constant_loss(task)
    return loss is not None and constant is not None and loss < LEARNT * constant


def is_reached(task: Task) -> bool:
    """Tell whether the outputs have the scale of the targets: forward ends with their scaling."""
    if not task.outputs.is_floating_point():
        return False
    targets = task.labels.detach().float()
    outputs = task.outputs.detach().float()
    deviation = targets.std()
    is_wide = outputs.std() > REACHED * deviation
    is_far_from_0 = targets.mean().abs() > FAR * deviation
    is_near = (outputs.mean() - targets.mean()).abs() < deviation
    return bool(is_near and (is_wide or is_far_from_0))


def most_classes(task: Task) -> int:
    """Return up to how many classes each is expected to come."""
    return MOST_CLASSES if task.labels.ndim == 1 else MOST_TOKENS
