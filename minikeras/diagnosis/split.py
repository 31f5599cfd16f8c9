"""Checks of dl_train against dl_val: the same rows in both, and what differs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import Evidence, Sample, copy_leaf, named_tensors
from minikeras.diagnosis.features import stands_for_all
from minikeras.diagnosis.findings import Finding
from minikeras.nests import map_leaves

SHARED = 0.05  # of the validation rows; real data has a few equal rows
LEAST_SHARED = 3  # of a small dl_val
REPEATED = 0.5  # of the training rows: the data has few different rows
ROWS = 20
MANY_ROWS = 100  # for comparing means
SHIFT = 3.0  # deviations between the two means
RATIO = 5.0  # between the two deviations
EXPECTED = 10  # rows of a class, by its share in the other; that none comes has a chance of e^-10


def check_leaks(evidence: Evidence) -> Iterator[Finding]:
    """Find rows that are in dl_train and in dl_val."""
    if evidence.val is None:
        return
    if is_same_source(evidence.dl_train, evidence.dl_val):
        yield Finding(
            "error",
            "dl_train and dl_val",
            "they are the same data",
            "no row in both",
            "val_loss then shows what was memorized. Keep rows for validation: "
            "sklearn.model_selection.train_test_split, or torch.utils.data.random_split.",
        )
        return
    train = hash_rows(evidence.train)
    val = hash_rows(evidence.val)
    if train is None or val is None or not val:
        return
    known = set(train)
    shared = sum(row in known for row in val)
    repeated = 1 - len(known) / len(train)
    share = shared / len(val)
    if shared < LEAST_SHARED or share <= SHARED:
        return
    if repeated > REPEATED or share <= 2 * repeated:
        return
    seen = "" if evidence.train.is_whole else f", though only {len(train):,} of dl_train were seen"
    yield Finding(
        "error" if share > 0.5 else "warning",
        "dl_train and dl_val",
        f"{shared:,} of {len(val):,} validation rows are training rows too{seen}",
        "no row in both",
        "val_loss then shows what was memorized. Split before any row is repeated or augmented, "
        "for instance with sklearn.model_selection.train_test_split, and drop duplicates first "
        "(df.drop_duplicates()).",
    )


def is_same_source(train: Any, val: Any) -> bool:
    """Tell whether both read all rows of the same data, however many rows that are.

    Samples of a large data set have few rows in common.
    """
    if isinstance(train, DataLoader) and isinstance(val, DataLoader):
        # an IterableDataset may make other rows each time; its rows are compared
        return (
            not isinstance(train.dataset, IterableDataset)
            and train.dataset is val.dataset
            and draws_from_all(train)
            and draws_from_all(val)
        )
    if isinstance(train, tuple) and isinstance(val, tuple) and train and val:
        return train[0] is val[0]
    return train is val and hasattr(train, "__getitem__")


def draws_from_all(loader: DataLoader[Any]) -> bool:
    """Tell whether a loader's rows are all of its Dataset's: it has no sampler of the user's."""
    if not isinstance(loader.sampler, (RandomSampler, SequentialSampler)):
        return False
    batch_sampler = loader.batch_sampler  # given one, a loader has a sampler that it does not use
    return batch_sampler is None or getattr(batch_sampler, "sampler", None) is loader.sampler


def hash_rows(sample: Sample) -> list[int] | None:
    """Return a number for each row of the features, equal for equal rows; None without any.

    Tokens and other whole numbers count as well. Rows of two dtypes are equal if their values are.
    """
    if sample.rows < ROWS:
        return None
    hashes: list[int] = []
    for features, _, _ in sample.batches:
        tables = []
        for _, tensor in named_tensors(features, "features"):
            if tensor.ndim:
                tables.append(tensor.detach().reshape(len(tensor), -1).cpu())
        if not tables or len({len(table) for table in tables}) > 1:
            return None
        rows: list[list[bytes]] = []
        for table in tables:
            # by value: other dtypes have other bytes, and -0.0 has not those of 0.0
            values = table if table.is_complex() else table.double() + 0.0
            rows.append([row.tobytes() for row in values.contiguous().numpy()])
        hashes += [hash(parts) for parts in zip(*rows, strict=True)]
    return hashes


def check_split(evidence: Evidence) -> Iterator[Finding]:
    """Find classes and scales that differ between dl_train and dl_val."""
    if evidence.val is None:
        return
    yield from try_validation(evidence, evidence.val)
    yield from compare_classes(evidence, evidence.val)
    yield from compare_scales(evidence, evidence.val)


def try_validation(evidence: Evidence, val: Sample) -> Iterator[Finding]:
    """Find rows of dl_val that forward does not take, though it takes those of dl_train."""
    model = evidence.model
    model.eval()
    raised: Exception | None = None
    for sample in (evidence.train, val):
        try:
            with torch.no_grad(), silenced():
                model.compute_outputs(map_leaves(copy_leaf, sample.batches[0][0]))
        except Exception as error:
            if sample is not val:
                return  # said elsewhere, or a custom step does not call forward so
            raised = error
    if raised is not None:
        yield Finding(
            "error",
            "dl_val",
            f"forward raises {type(raised).__name__} for its first batch, and not for dl_train",
            "features of one form",
            str(raised).partition("\n\n")[0],
        )


def compare_classes(evidence: Evidence, val: Sample) -> Iterator[Finding]:
    """Find classes that only one of them has."""
    train_labels = class_labels(evidence.train.labels)
    val_labels = class_labels(val.labels)
    if train_labels is None or val_labels is None:
        return
    if stands_for_all(evidence.train, evidence.dl_train):
        missing = find_missing(val_labels, train_labels)
        if missing:
            effect = "The network never sees them."
            yield describe_classes("dl_val", "dl_train", missing, effect)
    if stands_for_all(val, evidence.dl_val):
        missing = find_missing(train_labels, val_labels)
        if missing:
            effect = "val_loss says nothing of them."
            yield describe_classes("dl_train", "dl_val", missing, effect)


def find_missing(first: Tensor, second: Tensor) -> list[int]:
    """Return the classes of `first` that are not in `second`, though rows of them had to come."""
    classes, counts = first.unique(return_counts=True)
    expected = counts.double() / len(first) * len(second)
    is_missing = ~torch.isin(classes, second) & (expected >= EXPECTED)
    numbers: list[int] = classes[is_missing].tolist()
    return numbers


def describe_classes(where: str, where_not: str, classes: list[int], effect: str) -> Finding:
    """Say that classes are in one of the two alone."""
    shown = ", ".join(map(str, classes[:5])) + (", ..." if len(classes) > 5 else "")
    return Finding(
        "warning",
        "dl_train and dl_val",
        f"class {shown} is in {where} and not in {where_not}",
        "the same classes",
        f"{effect} Shuffle before splitting, or split by class: "
        "train_test_split(X, y, stratify=y).",
    )


def class_labels(labels: Any) -> Tensor | None:
    """Return labels that are class numbers, one for each row; None if they are not."""
    if not isinstance(labels, Tensor) or labels.numel() != len(labels):
        return None
    numbers = labels.reshape(-1)
    if numbers.is_floating_point():
        is_binary = bool(((numbers == 0) | (numbers == 1)).all())
        return numbers.long() if is_binary else None
    return numbers.long() if numbers.unique().numel() < len(numbers) / 4 else None


def compare_scales(evidence: Evidence, val: Sample) -> Iterator[Finding]:
    """Find features whose mean or deviation differs much."""
    if evidence.train.features is None or val.features is None:
        return
    if min(evidence.train.rows, val.rows) < ROWS:
        return
    others = dict(named_tensors(val.features, "features"))
    for name, tensor in named_tensors(evidence.train.features, "features"):
        other = others.get(name)
        if other is None or not tensor.is_floating_point() or not tensor.ndim:
            continue
        first = as_columns(tensor)
        second = as_columns(other)
        if first.shape[1] != second.shape[1] or not first.isfinite().all():
            continue
        if not second.isfinite().all():
            continue
        # of all columns together, a difference is no matter of one rare value
        whole = first.std().item()
        if not whole > 0:
            continue  # constant features have their own line
        shift = abs(first.mean().item() - second.mean().item()) / whole
        ratio = second.std().item() / whole
        column = None
        if not (shift > SHIFT or ratio > RATIO or ratio < 1 / RATIO):
            column = find_shifted(first, second)
            if column is None:
                continue
        yield describe_scales(evidence, name, first, second, column)


def as_columns(tensor: Tensor) -> Tensor:
    """Return a table (rows, columns): of images the channels, of sequences the last size."""
    values = tensor.detach().float()
    if values.ndim == 4:
        return values.transpose(0, 1).flatten(1).T
    return values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values[:, None]


def find_shifted(first: Tensor, second: Tensor) -> int | None:
    """Return the column whose mean has moved most, if it has moved far; None else."""
    if min(len(first), len(second)) < MANY_ROWS:
        return None
    deviation = torch.maximum(first.std(0), second.std(0))
    moved = (first.mean(0) - second.mean(0)).abs() / deviation.clamp(min=1e-12)
    moved[deviation == 0] = 0
    column = int(moved.argmax())
    return column if moved[column] > SHIFT else None


def describe_scales(
    evidence: Evidence, name: str, first: Tensor, second: Tensor, column: int | None
) -> Finding:
    """Say how the features differ."""
    looked_at = f"{name} of dl_train and dl_val"
    if column is not None:
        first, second = first[:, column], second[:, column]
        columns = evidence.train.columns
        looked_at = f"column {column} of {name}"
        if columns is not None and column < len(columns):
            looked_at = f'feature "{columns[column]}"'
    return Finding(
        "warning",
        looked_at,
        f"mean {first.mean():.3g} and deviation {first.std():.3g} in dl_train, "
        f"{second.mean():.3g} and {second.std():.3g} in dl_val",
        "about the same",
        "Scale both with the numbers of the training rows: scaler.fit(X_train), then "
        "scaler.transform for both. If they come from different times or places, val_loss "
        "measures that.",
    )
