"""Checks of the features: missing values, constant columns, scales.

The scales are those that the first layer with weights gets: a model may begin with a norm layer,
or standardize its features itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import RandomSampler

from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import Evidence, Sample, copy_leaf, named_tensors
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.kinds import NORMS, WITH_ROWS
from minikeras.nests import leaves, map_leaves

LARGE = 30.0  # root mean square of a column; standardized ones have 1, scikit-learn's digits 6
SMALL = 1e-3
APART = 1000.0  # times, between the scales of two columns; of 100 the network takes longer
# BatchNorm adds eps=1e-5 to the variance, and hardly scales a column below its square root
LEAST_OF_NORM = 3e-3
PIXELS = 20.0  # root mean square of pixels of 0 to 255; dark images still have more
BRIGHTEST = 100.0  # the least that the brightest pixel of images of 0 to 255 has
MANY_COLUMNS = 49  # of flat images, 7 x 7 at least; a table of so many bytes is rare
BACKGROUND = 0.01  # share of the other columns' values; two measured values are seldom equal
ROWS = 20  # fewer are constant by chance
SHOWN = 3  # names of columns in a line


def check_missing_features(evidence: Evidence) -> Iterator[Finding]:
    """Find NaN and infinite features."""
    bad_rows = 0
    rows = 0
    names: dict[str, int] = {}  # of columns -> rows
    first_bad: Any = None  # features of a batch with some
    for features, _, _ in evidence.train.batches:
        batch_rows: Tensor | None = None
        for name, tensor in named_tensors(features, "features"):
            if not tensor.is_floating_point() or tensor.ndim == 0 or is_mask(tensor):
                continue
            bad = ~tensor.isfinite()
            if bad.any():
                first_bad = features if first_bad is None else first_bad
                for column, count in count_by_column(evidence, name, bad).items():
                    names[column] = names.get(column, 0) + count
            in_rows = bad.reshape(len(bad), -1).any(1)
            if batch_rows is None or len(batch_rows) == len(in_rows):
                batch_rows = in_rows if batch_rows is None else batch_rows | in_rows
        if batch_rows is not None:
            bad_rows += int(batch_rows.sum())
            rows += len(batch_rows)
    if bad_rows:
        inputs = find_inputs(evidence, first_bad)
        is_filled = bool(inputs) and all(bool(given.isfinite().all()) for given in inputs)
        remedy = (
            "One of them makes every weight NaN. Fill them (X.fillna(X.median()), "
            "sklearn.impute.SimpleImputer) or drop the rows (X.dropna())."
        )
        if is_filled:
            remedy = "forward replaces them before the first layer with weights: nothing to do."
        yield Finding(
            "note" if is_filled else "error",
            join_names(list(names)),
            f"NaN or infinite in {bad_rows:,} of {rows:,} rows",
            "none",
            remedy,
        )


def is_mask(tensor: Tensor) -> bool:
    """Tell whether this is a mask to add to scores of attention: 0, or minus infinity."""
    return bool(((tensor == 0) | (tensor == -torch.inf)).all()) and bool((tensor == 0).any())


def count_by_column(evidence: Evidence, name: str, bad: Tensor) -> dict[str, int]:
    """Count the rows with a bad value by column, channel or tensor."""
    if bad.ndim < 2:
        return {name: int(bad.sum())}
    if bad.ndim == 3:  # (rows, steps, columns)
        bad = bad.transpose(1, 2)
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
    tensors = list(named_tensors(evidence.train.features, "features"))
    for name, tensor in tensors:
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
        is_alone = len(tensors) == 1
        is_all = len(numbers) == len(is_constant)
        if is_all and not is_alone and not tensor.is_floating_point():
            continue  # the mask of sequences of one length
        if is_all and is_alone:
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
        suspicious: list[int] = []
        if is_measured and stands_for_all(evidence.train, evidence.dl_train):
            suspicious = drop_background(tensor, numbers, is_constant)
        shown = suspicious or numbers
        named = [name_column(evidence, name, tensor, number) for number in shown]
        remedy = "A constant column tells nothing. Drop it, or look at how it is read."
        if not suspicious:
            remedy = (
                "Nothing to do for a rare category, padding, a mask, the border of images, or if "
                "the rows that were not looked at differ."
            )
        yield Finding(
            "warning" if suspicious else "note",
            join_names(named),
            f"one value in all {len(tensor):,} rows",
            "values that differ",
            remedy,
        )


def stands_for_all(sample: Sample, data: Any) -> bool:
    """Tell whether the rows of a sample are all rows, or random ones, and not those of a time."""
    is_shuffled = isinstance(getattr(data, "sampler", None), RandomSampler)
    return sample.is_whole or sample.is_batched_here or is_shuffled


def drop_background(table: Tensor, numbers: list[int], is_constant: Tensor) -> list[int]:
    """Return the constant columns whose value is not 0, nor common in the columns that vary.

    A value that other columns have too is the background of flat images, or a category.
    """
    others = table[:, ~is_constant]
    kept = []
    for number in numbers:
        value = table[0, number]
        if value != 0 and (others == value).float().mean() < BACKGROUND:
            kept.append(number)
    return kept


def check_feature_scales(evidence: Evidence) -> Iterator[Finding]:
    """Find features far from unit scale, or far from each other; images of 0 to 255."""
    scaled = find_inputs(evidence, evidence.train.batches[0][0])
    for name, tensor in named_tensors(evidence.train.features, "features"):
        if tensor.is_complex():
            continue
        if not any(is_same_data(tensor, layer_input) for layer_input in scaled):
            continue
        values = tensor.detach().float()
        if not bool(values.isfinite().all()) or len(values) < ROWS:
            continue
        if is_image(values) or has_bytes(values):
            if values.square().mean().sqrt() > PIXELS and values.min() >= 0:
                yield describe_pixels(name, values)
            continue
        yield from judge_columns(evidence, name, values)


def describe_pixels(name: str, values: Tensor) -> Finding:
    """Say that images are still 0 to 255, or 0 to 4,095 as of some cameras."""
    remedy = f"Divide by the largest value: X = X.float() / {values.max():g}."
    if values.max() <= 255:
        remedy = (
            "Divide by 255: X = X.float() / 255, or torchvision.transforms.ToTensor() in the "
            "Dataset."
        )
    return Finding(
        "warning",
        f"the images, {name}",
        f"pixels of {values.min():g} to {values.max():g}, mean {values.mean():.0f}",
        "0 to 1, or mean 0 and deviation 1",
        remedy,
    )


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
            name_column(evidence, name, table, largest),
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
            name_column(evidence, name, table, smallest),
            f"values of about {low:.2g}, and {high:.2g} in "
            f"{name_column(evidence, name, table, largest)}",
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
    """Tell whether these are images: (rows, channels, height, width), or the channels last."""
    return values.ndim == 4 and sorted(values.shape[1:])[1] > 1


def has_bytes(values: Tensor) -> bool:
    """Tell whether these are images as rows, or without a channel: whole numbers of 0 to 255."""
    if (values.ndim == 2 and values.shape[1] < MANY_COLUMNS) or values.ndim not in (2, 3):
        return False
    if values.min() < 0 or not BRIGHTEST < values.max() <= 255:
        return False
    return bool((values == values.round()).all())


def is_same_data(tensor: Tensor, layer_input: Tensor) -> bool:
    """Tell whether a layer gets these features as they are, in whatever shape."""
    rows = tensor[: len(layer_input)].detach().float().reshape(-1)
    given = layer_input.reshape(-1)
    if rows.numel() == given.numel():
        return bool(torch.equal(rows.sort().values, given.sort().values))
    # one input of several that are joined, or some of the columns: it gets their largest value
    if not rows.numel():
        return False
    largest = rows[rows.abs().argmax()]
    return bool((given == largest).any()) and abs(largest.item()) > LARGE


def find_inputs(evidence: Evidence, features: Any) -> list[Tensor]:
    """Return what the layers with weights get of these features of a batch, as float32.

    Norm layers and embeddings are left out: they take values of any scale. Of the features
    themselves, if forward cannot be called.
    """
    found: list[Tensor] = []
    handles: list[Any] = []
    model = evidence.model

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        for leaf in leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim:
                if not is_mask(leaf):
                    found.append(leaf.detach().float().clone())

    for module in model.modules():
        if takes_unit_scale(module):
            handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
    model.eval()
    try:
        with torch.no_grad(), silenced():
            model.compute_outputs(map_leaves(copy_leaf, features))
    except Exception:  # a custom step may call submodules with the features
        found = [
            tensor.detach().float()
            for _, tensor in named_tensors(features, "features")
            if tensor.is_floating_point()
        ]
    finally:
        for handle in handles:
            handle.remove()
    return found


def takes_unit_scale(module: nn.Module) -> bool:
    """Tell whether a layer multiplies what it gets with weights, as it is.

    One whose own parameters are vectors scales each column: a norm layer, of whatever class. What
    has parameters and layers too may scale the features before it calls the layers.
    """
    if isinstance(module, WITH_ROWS):
        return True
    if isinstance(module, (*NORMS, nn.Embedding, nn.EmbeddingBag)) or list(module.children()):
        return False
    parameters = list(module.parameters(recurse=False))
    return any(not is_lazy(parameter) and parameter.ndim > 1 for parameter in parameters)


def write_number(value: float) -> str:
    """Write a number as people do.

    >>> write_number(58210.4), write_number(0.01234)
    ('58,210', '0.0123')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def plural(word: str, count: int) -> str:
    """Return a word in the plural, but for a count of 1."""
    return word if count == 1 else f"{word}s"
