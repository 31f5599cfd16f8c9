"""Explain torch's errors: name the layer or the labels at fault, and say what to do."""

from __future__ import annotations

import inspect
import re
import traceback
import types
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikeras.batch import choose_call
from minikeras.checks.broadcast import CLASS_LOSSES
from minikeras.checks.classes import explain_class_dimension
from minikeras.checks.forms import put_labels_last
from minikeras.checks.half import half_probabilities
from minikeras.errors import describe, dtype_name, find_failing_layer
from minikeras.nests import leaves
from minikeras.processes import OneProcess

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)  # take integers, though their parameters are floats
TUPLE = (
    ". It came from a layer that returns a tuple, as nn.LSTM does: use the first part, outputs, _ "
    "= self.lstm(x)."
)
PROBABILITY_LOSSES = ("binary_cross_entropy",)  # functions that take probabilities

# --- losses ---


def no_class(label: int, classes: int) -> str:
    """Say that a label is not a valid class, and what to do."""
    remedy = "Number the classes from 0, or give the model more outputs."
    if label < 0:
        remedy = (
            f"Number the classes from 0; or build the loss with ignore_index={label} to leave such "
            "labels out."
        )
    return (
        f"label {label} is not a valid class: the model has {classes} outputs, so labels go from "
        f"0 to {classes - 1}. {remedy}"
    )


def explain_loss(error: Exception, outputs: Any, labels: Any) -> None:
    """Raise an error of a loss again with its cause and remedy, if the cause is known."""
    frames = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == F.__file__:
            frames.append(frame)
    functions = {frame.f_code.co_name for frame in frames}
    if "unsafe to autocast" in str(error):  # raised only on CUDA
        raise ValueError(half_probabilities(outputs)) from error
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        return
    if _were_given(frames, labels, outputs):
        error.add_note(
            "The labels were passed as predictions: a loss is called with (y_pred, y_true), while "
            "Keras uses (y_true, y_pred)."
        )
        return
    if labels.shape == (1, *outputs.shape) and labels.ndim and outputs.numel() == labels.numel():
        raise ValueError(
            f"predictions have shape {tuple(outputs.shape)} for a batch of one row with labels "
            f"{tuple(labels.shape)}: squeeze() in forward takes the rows' dimension too. Write "
            "squeeze(-1), or name another dimension."
        ) from error
    # A custom loss may have called torch with other tensors, about which nothing is known here.
    are_as_given = _were_given(frames, outputs, labels)
    if are_as_given and functions.intersection(CLASS_LOSSES):
        _explain_classes(error, outputs, labels, scores="cross_entropy" in functions)
    takes_probabilities = bool(functions.intersection(PROBABILITY_LOSSES))
    if are_as_given and takes_probabilities and "between 0 and 1" in str(error):
        wrong = _explain_range(error, outputs, labels)
        raise ValueError(f"BCELoss takes probabilities from 0 to 1, and {wrong}") from error
    is_about_dtype = bool("type" in str(error) and functions)
    if "bool tensor" in str(error) and labels.dtype == torch.bool:
        is_about_dtype = True
    if is_about_dtype and labels.dtype != outputs.dtype:
        wanted = outputs.dtype
        if torch.is_autocast_enabled(outputs.device.type):
            wanted = torch.float32  # autocast casts the predictions itself
        raise ValueError(
            f"labels are {dtype_name(labels)} and predictions {dtype_name(outputs)}; the loss "
            f"takes both in one dtype. Pass labels.{_show_cast(wanted, 'labels')}."
        ) from error


def _were_given(frames: list[types.FrameType], first: Tensor, second: Tensor) -> bool:
    """Tell whether a function of torch was called with these very tensors as input and target."""
    for frame in frames:
        given = frame.f_locals
        if given.get("input") is first and given.get("target") is second:
            return True
    return False


def explain_squeezed(error: Exception, outputs: Any, labels: Any) -> None:
    """Raise the error of a loss with its cause if a batch of one row lost its row dimension."""
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        return
    if not labels.ndim or labels.shape[0] != 1:
        return
    if outputs.ndim == 0 or (outputs.ndim == 1 and outputs.shape[0] > 1):
        raise ValueError(_describe_squeezed(outputs, labels)) from error


def warn_of_squeezed(outputs: Tensor, labels: Any) -> None:
    """Warn about outputs of one row that have no row dimension and that the loss accepted.

    The loss is right, but other uses of such outputs would fail.
    """
    if isinstance(labels, Tensor) and labels.ndim and labels.shape[0] == 1:
        warnings.warn(_describe_squeezed(outputs, labels), stacklevel=4)


def _describe_squeezed(outputs: Tensor, labels: Tensor) -> str:
    """Say that predictions have lost their row dimension."""
    return (
        f"predictions {tuple(outputs.shape)} for labels {tuple(labels.shape)}: in a batch of one "
        "row the predictions have lost the dimension of the rows, as squeeze() does. Name the "
        "dimension in forward: squeeze(-1)."
    )


def _explain_range(error: Exception, outputs: Tensor, labels: Tensor) -> str:
    """Say which values are not between 0 and 1, and what to do."""
    if "target" in str(error):
        which = "labels"
        values = labels
        source = "labels"
        remedy = "Scale the labels to 0 and 1."
    else:
        which = "predictions"
        values = outputs.detach()
        source = "features"
        remedy = "End the model with a sigmoid, or use BCEWithLogitsLoss on raw scores."
    missing = int(values.isnan().sum())
    if missing:
        are = "are" if missing > 1 else "is"
        return (
            f"{missing} of {values.numel()} {which} {are} NaN. Look for NaN in the {source}, or "
            "lower the learning rate."
        )
    return f"the {which} go from {values.min().item():.4g} to {values.max().item():.4g}. {remedy}"


def _explain_classes(error: Exception, outputs: Tensor, labels: Tensor, scores: bool) -> None:
    """Raise an error of a loss over classes again with its cause, if the cause is known.

    `scores` is True if the loss is cross_entropy, which takes class probabilities as labels too.
    """
    classes_last = explain_class_dimension(outputs, labels)
    if classes_last:
        raise ValueError(classes_last) from error
    label = re.search(r"Target (-?\d+) is out of bounds", str(error))
    if label and outputs.ndim > 1:
        raise ValueError(no_class(int(label[1]), outputs.shape[1])) from error
    expected = "expected one class index (int64) per row"
    if scores:
        expected += f", or class probabilities of shape {tuple(outputs.shape)}"
    shape = tuple(labels.shape)
    is_column = labels.ndim == outputs.ndim > 1 and labels.shape[1] == 1
    cast = _show_cast(torch.int64, "labels")
    if labels.is_floating_point() and labels.shape != outputs.shape:
        remedy = f"Pass labels.{cast}."
        if is_column:
            remedy = f"Pass labels.squeeze(1).{cast}."
        elif labels.ndim == outputs.ndim:
            remedy = "Give labels and predictions the same number of columns."
        raise ValueError(
            f"labels are {dtype_name(labels)} {shape}; {expected}. {remedy}"
        ) from error
    if is_column:
        raise ValueError(
            f"labels have shape {shape}; {expected}. Pass labels.squeeze(1)."
        ) from error
    # The second text is that of older torch.
    if "target dtype" in str(error) or "type Long but found" in str(error):
        raise ValueError(
            f"labels are {dtype_name(labels)}; {expected}. Pass labels.{cast}."
        ) from error


# --- forward ---


def explain_forward(error: Exception, model: nn.Module, features: Any, world: OneProcess) -> None:
    """Name the layer in which forward failed and its input.

    Known causes are raised again with their remedy; any other error gets a note.
    """
    failure = find_failing_layer(error, model)
    if failure is None:
        _explain_call(error, model, features)
        return
    name, layer, given = failure
    if isinstance(given, Tensor):
        _explain_layer(error, failure, model, features, world)
    if isinstance(features, Mapping) and given is features:
        _explain_whole_dict(error, model, features)
    hint = ""
    if type(given) is tuple and given is not features and "tuple" in str(error):
        hint = TUPLE
    if isinstance(given, (int, float)) and "must be Tensor" in str(error):
        hint = ". Python lists of rows are not an array: pass numpy.array(rows, dtype='float32')"
    if hasattr(given, "toarray") and not isinstance(given, Tensor):
        hint = (
            ". Pass the whole matrix, (X, y), which is converted batch by batch; or "
            "matrix.toarray() in each batch"
        )
    if isinstance(given, Tensor) and given.is_nested:
        hint = (
            ". If it only takes tensors whose rows have one shape, pass "
            "torch.nested.to_padded_tensor(features, 0.0)"
        )
    if isinstance(layer, EMBEDDINGS) and "out of range" in str(error):
        taken = f"takes 0 to {layer.num_embeddings - 1}: number from 0, or build it with more rows"
        hint = f" of {int(given.min())} to {int(given.max())}, and {taken}."
    if isinstance(layer, nn.RNNBase) and isinstance(features, Tensor) and features.ndim == 2:
        if layer.input_size == 1 and "input.size(-1)" in str(error):
            hint = ". Add a dimension for the feature of each step: pass X[..., None]"
        if given.shape == (1, *features.shape):
            given = features  # the layer itself has added a batch dimension
    if _takes_all(layer, model, features) and any(part is given for part in leaves(features)):
        given = dict(features) if isinstance(features, Mapping) else features
    shown = type(layer).__name__ if list(layer.children()) else str(layer)
    if name:
        shown = f"layer {name}: {shown}"
    error.add_note(f"{shown} got {describe(given)}{hint}")


def _takes_all(layer: nn.Module, model: nn.Module, features: Any) -> bool:
    """Tell whether the network itself was called with several features."""
    if layer is not model and layer is not getattr(model, "net", None):
        return False
    return choose_call(layer, features) != "whole"


def _explain_whole_dict(error: Exception, model: nn.Module, features: Mapping[Any, Any]) -> None:
    """Raise an error again if forward got a dict whole, and wanted its parts."""
    network = getattr(model, "net", model)
    parameters = list(inspect.signature(network.forward).parameters)
    if "must be Tensor" not in str(error):
        return
    if len(parameters) > 1:
        _refuse_keys(error, list(features), parameters)
    keys = put_labels_last(features)
    part = parameters[0] if parameters[0] in keys else keys[0]
    raise ValueError(
        f"the features are a dict with the keys {', '.join(map(str, features))}, and forward takes "
        f"one argument, {parameters[0]}, which gets the whole dict. Take the part out in forward, "
        f"{parameters[0]}[{part!r}]; or pass compile(split_batch=function), which returns "
        f"(batch[{part!r}], labels)."
    ) from error


def _explain_call(error: Exception, model: nn.Module, features: Any) -> None:
    """Explain that forward could not be called with these features."""
    missing = re.match(r"(\S+)\(\) missing .* argument", str(error))
    if not missing:
        return
    if isinstance(features, Mapping):
        for module in model.modules():
            if getattr(type(module).forward, "__qualname__", "") != missing[1]:
                continue
            parameters = list(inspect.signature(module.forward).parameters)
            _refuse_keys(error, list(features), parameters)
    error.add_note(
        "Put several inputs into a tuple of their own: ((a, b), labels), or ((a, b),) without "
        "labels; or pass compile(split_batch=lambda batch: ((batch[0], batch[1]), batch[2]))."
    )


def _refuse_keys(error: Exception, keys: list[Any], parameters: list[str]) -> NoReturn:
    """Raise an error for a dict of features with other keys than the arguments of forward."""
    raise ValueError(
        f"the features are a dict with the keys {', '.join(map(str, keys))}, and forward takes "
        f"{', '.join(parameters)}. {_suggest_keys(keys, parameters)}"
    ) from error


def _suggest_keys(keys: list[Any], parameters: list[str]) -> str:
    """Say how to give forward the keys of a dict of features that it takes."""
    others = put_labels_last([key for key in keys if key not in parameters])
    if not others or not set(parameters) <= set(keys):
        return "Name the keys like these."
    kept = f"{{name: batch[name] for name in {tuple(parameters)}}}"
    return (
        f"Leave out {', '.join(map(str, others))}; if the batches are such dicts with the labels "
        f"inside, pass compile(split_batch=lambda batch: ({kept}, batch[{others[-1]!r}])), with "
        "the name of your labels."
    )


def _explain_layer(
    error: Exception,
    failure: tuple[str, nn.Module, Any],
    model: nn.Module,
    features: Any,
    world: OneProcess,
) -> None:
    """Raise the error of a layer again with the wrong input and the remedy, if known."""
    name, layer, given = failure
    shape = tuple(given.shape)
    if "Expected more than 1 value per channel" in str(error):
        whose = world.describe_part()
        other = "a bigger" if whose else "another"
        raise ValueError(
            f"layer {name} ({type(layer).__name__}) cannot train on one row, which has no "
            f"variance: it got shape {shape}{whose}. Drop the short last batch with "
            f"drop_last=True, or choose {other} batch_size."
        ) from error
    _explain_dtype(error, failure, features)
    if any(not isinstance(size, int) for size in shape):  # of a nested tensor
        return
    given_is_features = any(leaf is given for leaf in leaves(features))
    unbatched = _find_unbatched(model, features) if len(shape) == 1 else ""
    if isinstance(layer, nn.Linear) and shape and shape[-1] != layer.in_features:
        raise ValueError(
            f"layer {name} takes rows of {layer.in_features} values (in_features) and got shape "
            f"{shape}. {unbatched or _suggest_for_linear(layer, shape, given_is_features)}"
        ) from error
    remedy = _suggest_for_convolution(layer, shape)
    if remedy:
        raise ValueError(
            f"layer {name} ({type(layer).__name__}) takes {layer.in_channels} channels in "
            f"dimension 1, and got shape {shape}. {remedy}"
        ) from error


def _find_unbatched(model: nn.Module, features: Any) -> str:
    """Say that a layer took the features for one sequence without a batch dimension, if one did."""
    if not isinstance(features, Tensor) or features.ndim != 2:
        return ""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.RNNBase) and layer.input_size == features.shape[-1]:
            return (
                f"The features have shape {tuple(features.shape)}, which layer {name} "
                f"({type(layer).__name__}) takes for one sequence without a batch dimension: pass "
                "X[None]."
            )
    return ""


def _explain_dtype(error: Exception, failure: tuple[str, nn.Module, Any], features: Any) -> None:
    """Raise the error of a layer again if its parameters have another dtype than the features."""
    name, layer, given = failure
    if not isinstance(error, RuntimeError) or isinstance(layer, EMBEDDINGS):
        return
    if not re.search(r"dtype|type \(|same type", str(error)):
        return
    if not type(layer).__module__.startswith("torch."):
        return  # a custom forward has other tensors too
    wanted = None
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            wanted = parameter.dtype
            break
    if wanted is None or wanted == given.dtype:
        return
    dtypes = [getattr(leaf, "dtype", None) for leaf in leaves(features, inside=True)]
    if given.dtype in dtypes:
        raise ValueError(
            f"layer {name} has {dtype_name(wanted)} parameters and got {dtype_name(given)} "
            f"values. {_suggest_for_dtype(given.dtype, wanted)}"
        ) from error


def _suggest_for_dtype(given: torch.dtype, wanted: torch.dtype) -> str:
    """Say what to do if a layer's input has another dtype than its parameters."""
    if given.is_complex:
        return (
            "Pass features.real or features.abs(), in NumPy and pandas numpy.real(X) or "
            "numpy.abs(X)."
        )
    alternative = ""
    if given in (torch.float32, torch.float64):
        alternative = f", or change the model with model.to({given}) before compile"
    return f"Pass features.{_show_cast(wanted, 'features')}{alternative}."


def _suggest_for_linear(layer: nn.Linear, shape: tuple[int, ...], given_is_features: bool) -> str:
    """Say what to do if the last size is not in_features."""
    wanted = layer.in_features
    last = shape[-1]
    if len(shape) == 1:  # one number a row, which must not be taken for a single row
        column = "a column, X.reshape(-1, 1), in NumPy X[:, None], in pandas X.to_frame()"
        if wanted == 1:
            return f"Pass X as {column}."
        return (
            f"Pass X of shape (rows, {wanted}), or build the layer with in_features=1 and pass X "
            f"as {column}."
        )
    values = 1
    for size in shape[1:]:
        values *= size
    if len(shape) > 2 and values == wanted:
        return "Put nn.Flatten() before it."
    if len(shape) > 2:
        flat = f"or put nn.Flatten() before it and build it with in_features={values}"
        return f"Build it with in_features={last}, the last size, {flat}."
    if given_is_features:
        return f"Pass {wanted} features per row, or build it with in_features={last}."
    return (
        f"Build it with in_features={last}, or change the layer before it to give {wanted} values "
        "per row."
    )


def _suggest_for_convolution(layer: nn.Module, shape: tuple[int, ...]) -> str:
    """Say what to do if the channels are missing or last; "" if that is not the cause."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ""
    channels = layer.in_channels
    spatial = len(layer.kernel_size)
    if len(shape) == spatial + 1 and channels == 1:
        return "The channel is missing: pass X.unsqueeze(1), in NumPy X[:, None]."
    if len(shape) != spatial + 2 or shape[1] == channels:
        return ""
    if shape[-1] == channels:
        return "The channels are last: pass X.movedim(-1, 1), in NumPy numpy.moveaxis(X, -1, 1)."
    return f"Build it with in_channels={shape[1]}, or pass {channels} channels."


def _show_cast(dtype: torch.dtype, what: str) -> str:
    """Show the call that casts a tensor to a dtype, and that for an array or a DataFrame."""
    cast = {torch.float32: "float()", torch.int64: "long()"}.get(dtype, f"to({dtype})")
    # Floats of NumPy and pandas arrive in the default dtype, whatever their own is.
    if dtype == torch.get_default_dtype():
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
