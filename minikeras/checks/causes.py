"""torch's errors in the user's words: the same error, saying which layer or which labels, and what to do."""

from __future__ import annotations

import inspect
import re
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikeras.broadcast import CLASS_LOSSES
from minikeras.checks.classes import explain_class_dimension
from minikeras.data import leaves
from minikeras.distributed import World
from minikeras.errors import described, dtype_name, failing_layer
from minikeras.losses import half_probabilities

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)  # take integers, though their parameters are floats
TUPLE = ". It came from a layer that returns a tuple, as nn.LSTM does: take the first part, outputs, _ = self.lstm(x)."
PROBABILITY_LOSSES = ("binary_cross_entropy",)  # take probabilities

# --- losses ---


def no_class(label: int, classes: int) -> str:
    """What is wrong with a label that is no class."""
    remedy = "Number the classes from 0, or give the model more outputs."
    if label < 0:
        remedy = f"Number the classes from 0; or build the loss with ignore_index={label} to leave such labels out."
    return (
        f"label {label} is outside the classes: the model has {classes} outputs, so labels go from "
        f"0 to {classes - 1}. {remedy}"
    )


def explain_loss(error: Exception, outputs: Any, labels: Any) -> None:
    """Raise an error that torch raised inside a loss in the user's words, where the cause is known."""
    frames = [
        frame
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == F.__file__
    ]
    inside = {frame.f_code.co_name for frame in frames}
    if "unsafe to autocast" in str(error):  # said on CUDA alone
        raise ValueError(half_probabilities(outputs)) from error
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        return
    if any(
        at.f_locals.get("input") is labels and at.f_locals.get("target") is outputs for at in frames
    ):
        error.add_note(
            "The labels came in for the predictions: a loss is called with (y_pred, y_true), "
            "unlike Keras's."
        )
        return
    if labels.shape == (1, *outputs.shape) and labels.ndim and outputs.numel() == labels.numel():
        raise ValueError(
            f"predictions have shape {tuple(outputs.shape)} for a batch of one row with labels "
            f"{tuple(labels.shape)}: squeeze() in forward takes the rows' dimension too. Write "
            "squeeze(-1), or name another dimension."
        ) from error
    # a loss of one's own may have given torch something else, of which nothing is known here
    as_given = any(
        at.f_locals.get("input") is outputs and at.f_locals.get("target") is labels for at in frames
    )
    if as_given and inside.intersection(CLASS_LOSSES):
        _explain_classes(error, outputs, labels, scores="cross_entropy" in inside)
    if as_given and inside.intersection(PROBABILITY_LOSSES) and "between 0 and 1" in str(error):
        wrong = _off_range(error, outputs, labels)
        raise ValueError(f"BCELoss takes probabilities from 0 to 1, and {wrong}") from error
    by_dtype = ("type" in str(error) and inside) or (
        "bool tensor" in str(error) and labels.dtype == torch.bool
    )
    if by_dtype and labels.dtype != outputs.dtype:
        wanted = outputs.dtype
        if torch.is_autocast_enabled(outputs.device.type):
            wanted = torch.float32  # autocast casts them itself
        raise ValueError(
            f"labels are {dtype_name(labels)} and predictions {dtype_name(outputs)}; the loss "
            f"takes both in one dtype. Pass labels.{_cast(wanted, 'labels')}."
        ) from error


def explain_squeezed(error: Exception, outputs: Any, labels: Any) -> None:
    """Raise the error of a loss in the user's words if the outputs of one row have lost the dimension of the rows."""
    if (
        not isinstance(outputs, Tensor)
        or not isinstance(labels, Tensor)
        or not labels.ndim
        or labels.shape[0] != 1
    ):
        return
    if outputs.ndim == 0 or (outputs.ndim == 1 and outputs.shape[0] > 1):
        raise ValueError(squeezed(outputs, labels)) from error


def warn_of_squeezed(outputs: Tensor, labels: Any) -> None:
    """Say it where the loss has taken such outputs: its number is right, and other uses of them would fail."""
    if isinstance(labels, Tensor) and labels.ndim and labels.shape[0] == 1:
        warnings.warn(squeezed(outputs, labels), stacklevel=3)


def squeezed(outputs: Tensor, labels: Tensor) -> str:
    return (
        f"predictions {tuple(outputs.shape)} for labels {tuple(labels.shape)}: in a batch of one "
        "row the predictions have lost the dimension of the rows, as squeeze() does. Name the "
        "dimension in forward: squeeze(-1)."
    )


def _off_range(error: Exception, outputs: Tensor, labels: Tensor) -> str:
    which = "labels" if "target" in str(error) else "predictions"
    values = labels if which == "labels" else outputs.detach()
    missing = int(values.isnan().sum())
    if missing:
        return (
            f"{missing} of {values.numel()} {which} {'are' if missing > 1 else 'is'} NaN. Look for "
            f"NaN in the {'labels' if which == 'labels' else 'features'}, or lower the learning "
            "rate."
        )
    remedy = "End the model with a sigmoid, or use BCEWithLogitsLoss on raw scores."
    if which == "labels":
        remedy = "Scale the labels to 0 and 1."
    return f"the {which} go from {values.min().item():.4g} to {values.max().item():.4g}. {remedy}"


def _explain_classes(error: Exception, outputs: Tensor, labels: Tensor, scores: bool) -> None:
    classes_last = explain_class_dimension(outputs, labels)
    if classes_last:
        raise ValueError(classes_last) from error
    label = re.search(r"Target (-?\d+) is out of bounds", str(error))
    if label and outputs.ndim > 1:
        raise ValueError(no_class(int(label[1]), outputs.shape[1])) from error
    expected = "expected one class index (int64) a row"
    if scores:
        expected += f", or class probabilities of shape {tuple(outputs.shape)}"
    shape, column = tuple(labels.shape), labels.ndim == outputs.ndim > 1 and labels.shape[1] == 1
    if labels.is_floating_point() and labels.shape != outputs.shape:
        remedy = f"Pass labels.{'squeeze(1).' * column}{_cast(torch.int64, 'labels')}."
        if labels.ndim == outputs.ndim and not column:
            remedy = "Give labels and predictions as many columns."
        raise ValueError(
            f"labels are {dtype_name(labels)} {shape}; {expected}. {remedy}"
        ) from error
    if column:
        raise ValueError(
            f"labels have shape {shape}; {expected}. Pass labels.squeeze(1)."
        ) from error
    if "target dtype" in str(error) or "type Long but found" in str(
        error
    ):  # the other is of older torch
        raise ValueError(
            f"labels are {dtype_name(labels)}; {expected}. Pass "
            f"labels.{_cast(torch.int64, 'labels')}."
        ) from error


# --- forward ---


def explain_forward(
    error: Exception, model: nn.Module, features: Any, world: World | None = None
) -> None:
    """Name the layer in which forward failed and what reached it; raise known causes with their remedy."""
    where = failing_layer(error, model)
    if where is None:
        _explain_call(error, model, features)
        return
    name, layer, given = where
    if isinstance(given, Tensor):
        _explain_layer(error, where, features, world)
    hint = TUPLE * (type(given) is tuple and given is not features and "tuple" in str(error))
    if isinstance(given, (int, float)) and "must be Tensor" in str(error):
        hint = ". Rows in Python lists are not one array: pass numpy.array(rows, dtype='float32')"
    if hasattr(given, "toarray") and not isinstance(given, Tensor):
        hint = ". Pass a whole matrix, (X, y), which is taken batch by batch; or matrix.toarray() in each batch"
    if isinstance(given, Tensor) and given.is_nested:
        hint = ". If it takes tensors of one shape alone, pass torch.nested.to_padded_tensor(features, 0.0)"
    if isinstance(layer, EMBEDDINGS) and "out of range" in str(error):
        taken = f"takes 0 to {layer.num_embeddings - 1}: number from 0, or build it with more rows"
        hint = f" of {int(given.min())} to {int(given.max())}, and {taken}."
    shown = type(layer).__name__ if list(layer.children()) else str(layer)
    error.add_note(f"{f'layer {name}: ' * bool(name)}{shown} was given {described(given)}{hint}")


def _explain_call(error: Exception, model: nn.Module, features: Any) -> None:
    """A forward that was not entered, since it takes other arguments."""
    missing = re.match(r"(\S+)\(\) missing .* argument", str(error))
    called = [
        m
        for m in model.modules()
        if missing and getattr(type(m).forward, "__qualname__", "") == missing[1]
    ]
    if called and isinstance(features, Mapping):
        raise ValueError(
            f"the features are a dict with the keys {', '.join(map(str, features))}, and forward "
            f"takes {', '.join(inspect.signature(called[0].forward).parameters)}. Name the keys "
            "like these."
        ) from error
    if missing:
        error.add_note(
            "Put several inputs into a tuple of their own: ((a, b), labels), or ((a, b),) without "
            "labels."
        )


def _explain_layer(
    error: Exception, where: tuple[str, nn.Module, Any], features: Any, world: World | None
) -> None:
    """What a layer cannot take, and what to give it."""
    name, layer, given = where
    shape = tuple(given.shape)
    if "Expected more than 1 value per channel" in str(error):
        whose, other = (
            ("", "another")
            if world is None
            else (f", process {world.rank}'s part of the batch", "a bigger")
        )
        raise ValueError(
            f"layer {name} ({type(layer).__name__}) cannot train on one row, which has no "
            f"variance: it was given {shape}{whose}. Leave the short last batch out with "
            f"drop_last=True, or choose {other} batch_size."
        ) from error
    wanted = next((p.dtype for p in layer.parameters() if p.is_floating_point()), None)
    by_dtype = isinstance(error, RuntimeError) and re.search(r"dtype|type \(|same type", str(error))
    theirs = type(layer).__module__.startswith(
        "torch."
    )  # a forward of one's own has other values too
    from_features = theirs and any(
        getattr(leaf, "dtype", None) == given.dtype for leaf in leaves(features, inside=True)
    )
    if (
        by_dtype
        and from_features
        and wanted not in (None, given.dtype)
        and not isinstance(layer, EMBEDDINGS)
    ):
        raise ValueError(
            f"layer {name} has {dtype_name(wanted)} parameters and was given {dtype_name(given)} "
            f"values. {_remedy_of_dtype(given.dtype, wanted)}"
        ) from error
    if any(not isinstance(size, int) for size in shape):  # of a nested tensor
        return
    given_is_features = any(leaf is given for leaf in leaves(features))
    if isinstance(layer, nn.Linear) and shape and shape[-1] != layer.in_features:
        raise ValueError(
            f"layer {name} takes rows of {layer.in_features} values (in_features) and was given "
            f"{shape}. {_remedy_of_linear(layer, shape, given_is_features)}"
        ) from error
    remedy = _remedy_of_convolution(layer, shape)
    if remedy:
        raise ValueError(
            f"layer {name} ({type(layer).__name__}) takes {layer.in_channels} channels in "
            f"dimension 1, and was given {shape}. {remedy}"
        ) from error


def _remedy_of_dtype(given: torch.dtype, wanted: torch.dtype) -> str:
    """What to do where a layer has other values than its parameters are."""
    if given.is_complex:
        return "Pass features.real or features.abs(), in NumPy and pandas numpy.real(X) or numpy.abs(X)."
    other = ""
    if given in (torch.float32, torch.float64):
        other = f", or change the model with model.to({given}) before compile"
    return f"Pass features.{_cast(wanted, 'features')}{other}."


def _remedy_of_linear(layer: nn.Linear, shape: tuple[int, ...], given_is_features: bool) -> str:
    """What to do where the last size is not in_features."""
    wanted, last = layer.in_features, shape[-1]
    if len(shape) == 1:  # a number a row, which must not be taken for one row
        column = "a column, X.reshape(-1, 1), in NumPy X[:, None], in pandas X.to_frame()"
        if wanted == 1:
            return f"Pass X as {column}."
        return f"Pass X of shape (rows, {wanted}), or build the layer with in_features=1 and pass X as {column}."
    values = 1
    for size in shape[1:]:
        values *= size
    if len(shape) > 2 and values == wanted:
        return "Put nn.Flatten() before it."
    if len(shape) > 2:
        flat = f"or put nn.Flatten() before it and build it with in_features={values}"
        return f"Build it with in_features={last}, the last size, {flat}."
    if given_is_features:
        return f"Pass {wanted} features a row, or build it with in_features={last}."
    return f"Build it with in_features={last}, or make what comes before it give {wanted} values a row."


def _remedy_of_convolution(layer: nn.Module, shape: tuple[int, ...]) -> str:
    """What to do where the channels are missing or last; "" where that is not the matter."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ""
    channels, spatial = layer.in_channels, len(layer.kernel_size)
    if len(shape) == spatial + 1 and channels == 1:
        return "The channel is missing: pass X.unsqueeze(1), in NumPy X[:, None]."
    if len(shape) != spatial + 2 or shape[1] == channels:
        return ""
    if shape[-1] == channels:
        return "The channels are last: pass X.movedim(-1, 1), in NumPy numpy.moveaxis(X, -1, 1)."
    return f"Build it with in_channels={shape[1]}, or pass {channels} channels."


def _cast(dtype: torch.dtype, what: str) -> str:
    """The call that gives tensors a dtype, and what does so for an array or a DataFrame."""
    cast = {torch.float32: "float()", torch.int64: "long()"}.get(dtype, f"to({dtype})")
    if (
        dtype == torch.get_default_dtype()
    ):  # in which floats of NumPy and pandas arrive, whatever theirs is
        in_numpy = "float64" if dtype == torch.float64 else "float32"
    elif not dtype.is_floating_point:
        in_numpy = dtype_name(dtype)
    else:
        return (
            f"{cast}; from NumPy and pandas floats arrive as "
            f"{dtype_name(torch.get_default_dtype())}, so pass torch.tensor(numpy.asarray({what}), "
            f"dtype={dtype})"
        )
    return f"{cast}, or in NumPy and pandas .astype('{in_numpy}')"
