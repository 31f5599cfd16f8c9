"""Checks of the features: missing values, constant columns, scales.

The scales are those that the first layer with weights gets: a model may begin with a norm layer,
or standardize its features itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import Evidence, copy_leaf, named_tensors
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.kinds import NORMS
from minikeras.nests import leaves, map_leaves

LARGE = 30.0  # root mean square of a column; standardized ones have 1, scikit-learn's digits 6
SMALL = 1e-3
APART = 1000.0  # times, between the scales of two columns; of 100 the network takes longer
# BatchNorm adds eps=1e-5 to the variance, and hardly scales a column below its square root
LEAST_OF_NORM = 3e-3
PIXELS = 20.0  # root mean square of pixels of 0 to 255; dark images still have more
ROWS = 20  # fewer are constant by chance
SHOWN = 3  # names of columns in a line


def check_missing_features(evidence: Evidence) -> Iterator[Finding]:
    """Find NaN and infinite features."""
    bad_rows = 0
    rows = 0
    names: dict[str, int] = {}  # of columns -> rows
    for features, _, _ in evidence.train.batches:
        batch_rows: Tensor | None = None
        for name, tensor in named_tensors(features, "features"):
            if not tensor.is_floating_point() or tensor.ndim == 0:
                continue
            bad = ~tensor.isfinite()
            if bad.any():
                for column, count in count_by_column(evidence, name, bad).items():
                    names[column] = names.get(column, 0) + count
            in_rows = bad.reshape(len(bad), -1).any(1)
            if batch_rows is None or len(batch_rows) == len(in_rows):
                batch_rows = in_rows if batch_rows is None else batch_rows | in_rows
        if batch_rows is not None:
            bad_rows += int(batch_rows.sum())
            rows += len(batch_rows)
    if bad_rows:
        yield Finding(
            "error",
            join_names(list(names)),
            f"NaN or infinite in {bad_rows:,} of {rows:,} rows",
            "none",
            "One of them makes every weight NaN. Fill them (X.fillna(X.median()), "
            "sklearn.impute.SimpleImputer) or drop the rows (X.dropna()).",
        )


def count_by_column(evidence: Evidence, name: str, bad: Tensor) -> dict[str, int]:
    """Count the rows with a bad value by column, channel or tensor."""
    if bad.ndim < 2:
        return {name: int(bad.sum())}
    by_column = bad.reshape(len(bad), bad.shape[1], -1).any(2).sum(0)
    counts = {}
    for column in by_column.nonzero()[:, 0].tolist():
        counts[name_column(evidence, name, bad, column)] = int(by_column[column])
    return counts


def name_column(evidence: Evidence, name: str, tensor: Tensor, column: int) -> str:
    """Return the name of a column of a DataFrame, or its number; of images that of the channel."""
    columns = evidence.train.columns
    if columns is not None and tensor.ndim == 2 and len(columns) == tensor.shape[1]:
        return f'feature "{columns[column]}"'
    if tensor.ndim == 4:
        return f"channel {column} of {name}"
    return f"column {column} of {name}"


def join_names(names: list[str]) -> str:
    """Join names of columns: the first few, and how many more."""
    shown = ", ".join(names[:SHOWN])
    more = len(names) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def check_constant_features(evidence: Evidence) -> Iterator[Finding]:
    """Find columns and channels that have one value."""
    if evidence.train.rows < ROWS or evidence.train.features is None:
        return
    for name, tensor in named_tensors(evidence.train.features, "features"):
        if len(tensor) < ROWS or tensor.ndim not in (2, 3, 4):
            continue
        if tensor.ndim == 2:
            is_constant = (tensor == tensor[:1]).all(0)
        elif tensor.ndim == 4:  # (rows, channels, height, width)
            channels = tensor.transpose(0, 1).reshape(tensor.shape[1], -1)
            is_constant = (channels == channels[:, :1]).all(1)
        else:  # (rows, steps, columns)
            columns = tensor.reshape(-1, tensor.shape[-1])
            is_constant = (columns == columns[:1]).all(0)
        numbers = is_constant.nonzero()[:, 0].tolist()
        if not numbers:
            continue
        if len(numbers) == len(is_constant) and not tensor.is_floating_point():
            continue  # the mask of sequences of one length
        if len(numbers) == len(is_constant):
            yield Finding(
                "error",
                name,
                f"all {len(numbers)} {plural('column', len(numbers))} have one value in "
                f"{len(tensor):,} rows",
                "values that differ",
                "There is nothing to learn from. Look at how the features are read and scaled: "
                "integers that were divided, a wrong column, a transform that returns zeros.",
            )
            continue
        # a rare category, a padded step, a mask or the border of an image is no mistake
        is_measured = tensor.ndim == 2 and tensor.is_floating_point()
        level = "warning" if is_measured and not is_zero(tensor, numbers) else "note"
        named = [name_column(evidence, name, tensor, number) for number in numbers]
        yield Finding(
            level,
            join_names(named),
            f"one value in all {len(tensor):,} rows",
            "values that differ",
            "A constant column tells nothing. Drop it, or look at how it is read.",
        )


def is_zero(tensor: Tensor, numbers: list[int]) -> bool:
    """Tell whether these columns of a table are 0 everywhere."""
    return bool((tensor[:, numbers] == 0).all())


def check_feature_scales(evidence: Evidence) -> Iterator[Finding]:
    """Find features far from unit scale, or far from each other; images of 0 to 255."""
    scaled = find_unscaled_inputs(evidence)
    for name, tensor in named_tensors(evidence.train.features, "features"):
        if not any(is_same_data(tensor, layer_input) for layer_input in scaled):
            continue
        values = tensor.detach().float()
        if not bool(values.isfinite().all()) or len(values) < ROWS:
            continue
        if is_image(values):
            if values.square().mean().sqrt() > PIXELS and values.min() >= 0:
                yield Finding(
                    "warning",
                    f"the images, {name}",
                    f"pixels of {values.min():g} to {values.max():g}, mean {values.mean():.0f}",
                    "0 to 1, or mean 0 and deviation 1",
                    "Divide by 255: X = X.float() / 255, or "
                    "torchvision.transforms.ToTensor() in the Dataset.",
                )
            continue
        yield from judge_columns(evidence, name, values)


def judge_columns(evidence: Evidence, name: str, values: Tensor) -> Iterator[Finding]:
    """Judge the scales of the columns of a table or of a sequence (rows, steps, columns)."""
    table = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values[:, None]
    sizes = table.square().mean(0).sqrt()
    varies = (table != table[:1]).any(0) & (sizes > 0)
    if not bool(varies.any()):
        return
    used = torch.where(varies, sizes, torch.nan)
    largest = int(torch.nan_to_num(used, nan=-1).argmax())
    smallest = int(torch.nan_to_num(used, nan=float("inf")).argmin())
    high = sizes[largest].item()
    low = sizes[smallest].item()
    columns = table if values.ndim == 2 else table[:, :]
    remedy = (
        "Standardize the columns by the training rows: X = (X - X_train.mean(0)) / "
        "X_train.std(0), or sklearn.preprocessing.StandardScaler"
    )
    remedy += "; or begin the network with nn.BatchNorm1d." if low > LEAST_OF_NORM else "."
    if high > LARGE:
        count = int((varies & (sizes > LARGE)).sum())
        more = f"; {count} columns above {LARGE:g}" if count > 1 else ""
        yield Finding(
            "warning",
            name_column(evidence, name, columns, largest),
            f"values of about {write_number(high)}{more}" + differ(high, low),
            "about 1 in each column",
            remedy,
        )
    elif high < SMALL:
        yield Finding(
            "warning",
            name,
            f"values of about {high:.2g} at most",
            "about 1 in each column",
            remedy,
        )
    elif high / low > APART and is_dense(table[:, smallest]):
        yield Finding(
            "warning",
            name_column(evidence, name, columns, smallest),
            f"values of about {low:.2g}, and {high:.2g} in "
            f"{name_column(evidence, name, columns, largest)}",
            "about 1 in each column",
            remedy,
        )


def differ(high: float, low: float) -> str:
    """Say how far the smallest column is from the largest, if that is far."""
    return f", {high / low:,.0f} times the smallest column" if high / low > APART else ""


def is_dense(column: Tensor) -> bool:
    """Tell whether most values of a column are not 0; a rare category is small by nature."""
    return bool((column != 0).float().mean() > 0.5)


def is_image(values: Tensor) -> bool:
    """Tell whether these are images: (rows, channels, height, width), or (rows, height, width)."""
    return values.ndim == 4 and min(values.shape[-2:]) > 1


def is_same_data(tensor: Tensor, layer_input: Tensor) -> bool:
    """Tell whether a layer gets these features as they are, in whatever shape."""
    rows = tensor[: len(layer_input)].detach().float().reshape(-1)
    given = layer_input.reshape(-1)
    if rows.numel() == given.numel():
        return bool(torch.equal(rows.sort().values, given.sort().values))
    # one input of several that are joined: its largest value is in what the layer gets
    if rows.numel() < given.numel() and rows.numel():
        largest = rows[rows.abs().argmax()]
        return bool((given == largest).any()) and abs(largest.item()) > LARGE
    return False


def find_unscaled_inputs(evidence: Evidence) -> list[Tensor]:
    """Return what the first layers with weights get of the first batch, if no norm layer is first.

    It is float32, on the rows of the first batch.
    """
    found: list[Tensor] = []
    handles: list[Any] = []
    model = evidence.model

    def look(module: nn.Module, args: Any, kwargs: Any = None) -> None:
        for leaf in leaves(args):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim:
                found.append(leaf.detach().float().clone())

    for module in model.modules():
        is_layer = bool(list(module.parameters(recurse=False)))
        if is_layer and not isinstance(module, (*NORMS, nn.Embedding, nn.EmbeddingBag)):
            handles.append(module.register_forward_pre_hook(look))
    model.eval()
    try:
        with torch.no_grad(), silenced():
            model.compute_outputs(map_leaves(copy_leaf, evidence.train.batches[0][0]))
    except Exception:  # a custom step may call submodules with the features
        found = [
            tensor.detach().float()
            for _, tensor in named_tensors(evidence.train.batches[0][0], "features")
            if tensor.is_floating_point()
        ]
    finally:
        for handle in handles:
            handle.remove()
    return found


def write_number(value: float) -> str:
    """Write a number as people do.

    >>> write_number(58210.4), write_number(0.01234)
    ('58,210', '0.0123')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def plural(word: str, count: int) -> str:
    """Return a word in the plural, but for a count of 1."""
    return word if count == 1 else f"{word}s"
