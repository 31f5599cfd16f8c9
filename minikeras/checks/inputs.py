"""Refuse what cannot train, or would silently train wrongly.

first batch    outputs and labels that broadcast, losses that are always 0, softmax applied twice,
               weights that are not one per row, metrics that are not a number
fit            optimizers that do not hold the model's parameters, or not all of them
compile        classes instead of instances, functions that take the labels first, names that
               history uses
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.argument_order import find_labels_first, is_of_sklearn, write_swapped
from minikeras.checks.broadcast import BroadcastGuard
from minikeras.checks.calls import LOSS_LINES, METRIC_LINES
from minikeras.checks.causes import no_class
from minikeras.checks.classes import check_class_dimension
from minikeras.checks.forms import name_parts, write_split
from minikeras.checks.half import check_not_half
from minikeras.columns import check_name
from minikeras.errors import describe, dtype_name, write_instance
from minikeras.metric_objects import find_view, is_stateful
from minikeras.nests import leaves, names_in
from minikeras.overrides import overrides
from minikeras.results import Average, check_number, has_parts, unwrap_loss
from minikeras.rows import UnknownRows
from minikeras.run import parameters_of

ROUNDING = 1e-3  # how far above 0 a log-probability may be

# forward of a loss that broadcasts with no more than a warning -> its function
BROADCASTING: dict[Any, Any] = {
    nn.MSELoss.forward: F.mse_loss,
    nn.L1Loss.forward: F.l1_loss,
    nn.SmoothL1Loss.forward: F.smooth_l1_loss,
    nn.HuberLoss.forward: F.huber_loss,
}

# --- losses and metrics, looked at ----------------------------------------------------------------


def guarded(
    function: Callable[..., Any], outputs: Any, labels: Any, name: str, *, scalar: bool = True
) -> Any:
    """Call `function(outputs, labels)`, and raise an error if it broadcasts them.

    Args:
        scalar: the result must be a number; that error comes first.
    """
    guard = BroadcastGuard(outputs, labels)
    try:
        with guard:
            result = function(outputs, labels)
    except Exception as error:
        if guard.found:
            raise ValueError(f"{name}: {guard.found}") from None
        hint = ""
        if isinstance(outputs, tuple) and "'tuple'" in str(error):
            hint = ". Let forward return only the first part."
        if isinstance(outputs, Mapping) and name.startswith("metric"):
            key = next(iter(outputs), "name")
            hint = f". For one output alone write metrics_dict={{{key!r}: {{...: metric}}}}."
        if labels is None:
            hint += (
                ". The batches contain only features: pass (features, labels), or (X, X) for an "
                "autoencoder; or, if the labels are in another place, such as in a dict, pass "
                "compile(split_batch=function), which returns (features, labels)."
            )
        error.add_note(f"{name} got y_pred {describe(outputs)}, y_true {describe(labels)}{hint}")
        raise
    if scalar:
        _check_metric(name, result, labels)
    if guard.found:
        raise ValueError(f"{name}: {guard.found}")
    return result


def _check_metric(name: str, result: Any, labels: Any) -> None:
    """Check that a metric function has returned one number; if several, say how to log them."""
    rows = getattr(labels, "shape", ())[:1]
    try:
        check_number(name, result, wait=True)
    except ValueError as error:
        parts: list[Any] = list(result) if isinstance(result, Average) else [result]
        for part in parts:
            shape = getattr(part, "shape", ())
            has_columns = math.prod(shape) > 1 and shape[:1] != rows  # else a value per row
            if has_columns or isinstance(part, Mapping):
                raise ValueError(
                    f"{error} For several columns pass minikeras.OnAllRows(function), whose "
                    "function gets NumPy arrays."
                ) from None
        raise


# --- losses ---------------------------------------------------------------------------------------


def check_loss_inputs(
    loss_func: Any, outputs: Any, labels: Any, warn: bool, model: nn.Module, fitting: bool
) -> None:
    """Refuse what torch silently accepts, or an accelerator reports too late.

    Warn once of what the model's layers tell about the outputs: in training, or in an evaluation
    outside a fit.

    Args:
        warn: whether the batch is of the training.
        fitting: whether a fit is running.
    """
    loss_func = unwrap_loss(loss_func)
    check_not_half(loss_func, outputs)
    check_one_tensor(loss_func, outputs, labels)
    _check_columns(loss_func, outputs, labels)
    # by its forward: a subclass may do something else with labels
    forward = getattr(type(loss_func), "forward", None)
    takes_scores = forward is nn.CrossEntropyLoss.forward or loss_func is F.cross_entropy
    takes_classes = takes_scores or forward is nn.NLLLoss.forward or loss_func is F.nll_loss
    if not takes_classes or not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        return
    if outputs.ndim <= 1:
        return
    function = "cross_entropy" if takes_scores else "nll_loss"
    check_class_dimension(function, outputs, labels, model, warn or not fitting)
    classes = outputs.shape[1]
    if classes == 1:
        raise ValueError(
            f"predictions {tuple(outputs.shape)} have one class, so the loss is always 0. Give the "
            f"model as many outputs as there are classes, or use BCEWithLogitsLoss for a yes-or-no "
            f"question."
        )
    if not labels.is_floating_point() and labels.ndim == outputs.ndim - 1:
        ignored = getattr(loss_func, "ignore_index", -100)
        outside = labels[((labels < 0) | (labels >= classes)) & (labels != ignored)]
        if outside.numel():
            raise ValueError(no_class(int(outside[0]), classes))
    if warn and takes_scores and outputs.ndim == 2 and _sums_to_one(outputs):
        warnings.warn(
            "the model's outputs already sum to 1 in each row, and CrossEntropyLoss applies "
            "softmax itself. Give it raw scores: remove the softmax from the model, or use "
            "log_softmax and NLLLoss.",
            stacklevel=2,
        )
    if warn and not takes_scores and outputs.numel() and float(outputs.detach().max()) > ROUNDING:
        warnings.warn(
            "NLLLoss takes log-probabilities, which are at most 0, and the model's outputs go up "
            f"to {float(outputs.detach().max()):.4g}, so the loss may fall without limit. Use "
            "CrossEntropyLoss, which takes raw scores, or end the model with "
            "nn.LogSoftmax(dim=1).",
            stacklevel=2,
        )


def is_of_torch(loss_func: Any) -> bool:
    """Tell whether a loss is one of torch's, which all compare with labels."""
    loss_func = unwrap_loss(loss_func)
    forward = getattr(type(loss_func), "forward", None)
    of_torch = getattr(forward, "__module__", "") == "torch.nn.modules.loss"
    return of_torch or getattr(loss_func, "__module__", "") == F.__name__


def needs_labels(model: nn.Module, loss_func: Any, step: str) -> bool:
    """Tell whether batches need labels: a custom loss or step may ignore them."""
    compares = is_of_torch(loss_func) or has_parts(unwrap_loss(loss_func))
    return compares and not overrides(model, step, "compute_loss")


def _check_columns(loss_func: Any, outputs: Any, labels: Any) -> None:
    """Refuse one prediction per row that a loss of torch would compare with several labels.

    torch only warns. A custom loss may broadcast on purpose, and is not looked at.

    Raises:
        ValueError: predictions (N, 1) and labels (N, 3).
    """
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        return
    function = BROADCASTING.get(getattr(type(loss_func), "forward", None))
    for known in BROADCASTING.values():
        if loss_func is known:
            function = known
    if function is None or not outputs.ndim == labels.ndim > 1:
        return
    columns = labels.shape[-1]
    if outputs.shape[:-1] != labels.shape[:-1] or outputs.shape[-1] != 1 or columns < 2:
        return
    reduction = getattr(loss_func, "reduction", "mean")
    rest = "" if reduction == "mean" else f", reduction={reduction!r}"
    raise ValueError(
        f"predictions have shape {tuple(outputs.shape)} and labels {tuple(labels.shape)}: one "
        f"prediction would be compared with {columns} labels. Give the model {columns} outputs; or "
        "pass as loss_func lambda y_pred, y_true: "
        f"nn.functional.{function.__name__}(y_pred.expand_as(y_true), y_true{rest})."
    )


def check_one_tensor(loss_func: Any, outputs: Any, labels: Any) -> None:
    """Check that a loss of torch gets one tensor of outputs and one of labels.

    Raises:
        ValueError: it gets something else.
    """
    if not is_of_torch(loss_func) or (isinstance(outputs, Tensor) and isinstance(labels, Tensor)):
        return
    name = getattr(loss_func, "__name__", type(loss_func).__name__)
    if any(isinstance(label, str) for label in leaves(labels)):
        raise ValueError(
            f"the labels are text, {describe(labels)}, and {name} compares numbers. Number the "
            f"classes first, for instance with numbers, classes = pandas.factorize(labels), and "
            f"pass torch.tensor(numbers)."
        )
    if isinstance(outputs, Tensor):
        which = f"the labels are {describe(labels)}"
        remedy = "Give the labels as one tensor"
    else:
        which = f"the model gave {describe(outputs)}"
        remedy = "Let forward return the part that is compared"
        if isinstance(outputs, tuple):
            remedy = "Let forward return only the first part, if that is compared"
    names = names_in(outputs) or [0]
    first = f"{names[0]!r}: {name}"
    if isinstance(loss_func, nn.Module):
        first += "()"
    raise ValueError(
        f"{name} takes one tensor of predictions and one of labels, and {which}. {remedy}; or pass "
        f"a dict with a loss for each output as loss_func, starting with {{{first}, ...}}."
    )


def _sums_to_one(outputs: Tensor) -> bool:
    rows = outputs.detach().float()
    return bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-4).all())


# --- metrics and weights --------------------------------------------------------------------------


def check_results(results: Any, step: Callable[..., Any]) -> None:
    """Check that a step has returned a dict of name -> number.

    Raises:
        TypeError: it has not.
    """
    name = getattr(step, "__name__", "the step")
    if not isinstance(results, Mapping) or not results:
        raise TypeError(
            f"{name} returned {describe(results)}; expected a dict of name -> number for the "
            f'history. Return for instance {{"loss": loss}}.'
        )
    for key, value in results.items():
        check_name(f"{name} returned", key, ("lr", "epoch"))
        check_number(f"{name}'s {key!r}", value, wait=True)


def check_batch(
    step: Callable[..., Any],
    features: Any,
    labels: Any,
    sample_weight: Any,
    rows: int | UnknownRows,
    needs_labels: bool = True,
    is_split: bool = False,
) -> None:
    """Check the parts of a pass's first batch.

    Args:
        rows: how many rows the batch has.
        needs_labels: False for a custom step or loss computation.
        is_split: the user's split_batch has returned the parts.

    Raises:
        ValueError: features or labels are missing, or the third part is not one weight per row.
        TypeError: the step does not take a sample_weight.
    """
    if features is None and needs_labels:
        raise ValueError(
            "the first part of a batch is None; expected (features, labels). Give the features "
            "there."
        )
    if labels is None and needs_labels:
        raise _without_labels(step, features, is_split)
    if sample_weight is None:
        return
    _check_weight(sample_weight, rows, is_split)
    try:
        inspect.signature(step).bind(None, None, None)
    except TypeError:
        raise TypeError(
            f"the batches carry a sample_weight, and {step.__qualname__} does not take one. Write "
            f"it as {step.__name__}(self, features, labels, sample_weight=None)."
        ) from None


def _without_labels(step: Callable[..., Any], features: Any, is_split: bool) -> ValueError:
    """Return the error for batches that are features alone."""
    if is_split:
        return ValueError(
            f"split_batch returned no labels, ({describe(features)}, None), and the loss compares "
            f"with labels. Let it return (features, labels); or override {step.__name__}."
        )
    are = "features alone"
    remedy = (
        "Give batches of (features, labels), arrays as a tuple (X, y), for an autoencoder (X, X)"
    )
    names = name_parts(features)
    if len(names) > 1:
        kind = "dicts" if isinstance(features, Mapping) else f"{type(features).__name__} objects"
        are = f"{kind} of {', '.join(map(str, names))}, all of them features"
        split = write_split(features, names)
        remedy = f"Pass compile(split_batch={split}), with the name of your labels"
    elif not isinstance(features, (Tensor, Mapping, list, tuple)):
        are = f"{type(features).__name__} objects, each of them the features"
        remedy = (
            "Pass compile(split_batch=lambda batch: (batch.x, batch.y)), with the names of your "
            "features and labels"
        )
    return ValueError(
        f"the batches are {are}, and the loss compares with labels. {remedy}; or override "
        f"{step.__name__}."
    )


def _check_weight(sample_weight: Any, rows: int | UnknownRows, is_split: bool) -> None:
    """Check that a sample_weight has one weight per row."""
    if isinstance(rows, UnknownRows):  # there is nothing to compare with
        rows = getattr(sample_weight, "numel", lambda: 0)()
    if isinstance(sample_weight, Tensor):
        if sample_weight.numel() == rows and len(sample_weight) == rows:
            return
    remedy = ""
    if not is_split:
        remedy = (
            ", or pass compile(split_batch=lambda batch: ((batch[0], batch[1]), batch[2])) for "
            "batches (a, b, labels)"
        )
    raise ValueError(
        f"the third part of a batch is a weight per row: expected shape ({rows},), got "
        f"{describe(sample_weight)}. Put several inputs into a tuple of their own: ((a, b), "
        f"labels){remedy}."
    )


# --- before a fit ---------------------------------------------------------------------------------


def check_optimizers(
    model: nn.Module, loss_func: Any, optimizers: dict[str, Optimizer], compiled: dict[int, bool]
) -> None:
    """Check that there is something to train, and that the optimizers hold it as it is now.

    Args:
        compiled: the id of each parameter that the model had at compile -> whether it was trained.

    Raises:
        ValueError: there is nothing to train, or an optimizer holds other parameters.
    """
    name = type(model).__name__
    own = {id(parameter): parameter for parameter in parameters_of(model, loss_func)}
    if not any(parameter.requires_grad for parameter in own.values()):
        why = f"{name} has no parameters"
        remedy = "Add a layer that has some"
        if own:
            why = f"all {len(own)} parameters of {name} are frozen"
            remedy = "Call minikeras.unfreeze on the layers to train"
        raise ValueError(f"there is nothing to train: {why}. {remedy}, then compile again.")
    again = f"Make a new optimizer from model.parameters() and call {name}.compile again."
    in_optimizers: set[int] = set()
    for optimizer in optimizers.values():
        in_optimizers |= _ids_in(optimizer)
    for key, optimizer in optimizers.items():
        which = f"optimizer {key!r}" if key else "the optimizer"
        ids = _ids_in(optimizer)
        holds_none = not ids & own.keys()
        if holds_none and (ids & compiled.keys() or not in_optimizers & own.keys()):
            raise ValueError(
                f"{which} holds none of the parameters of {name}: it was made from another model, "
                f"or the network was replaced after compile. {again}"
            )
        stale = _stale_state(optimizer)
        if stale is not None:
            what = f"it is {stale[0]} from earlier steps and the parameters are {stale[1]} now"
            raise ValueError(f"{which} holds stale state: {what}. {again}")
    untrained = 0
    unfrozen = 0
    for number, parameter in own.items():
        if not parameter.requires_grad or number in in_optimizers:
            continue
        if number not in compiled:
            untrained += 1
        elif not compiled[number]:
            unfrozen += 1
    if untrained:
        what = "lacks parameters: a layer was added"
        if any(number in compiled and number not in own for number in in_optimizers):
            what = "holds stale parameters: a layer was replaced"
        raise ValueError(
            f"the optimizer {what} after compile, and {untrained} new parameters would not be "
            f"trained. {again}"
        )
    if unfrozen:
        raise ValueError(
            f"the optimizer lacks parameters: {unfrozen} parameter tensors were frozen when "
            f"{name}.compile was called, and have been unfrozen since. They would not be trained. "
            f"{again}"
        )


def warn_of_untrained_parameters(
    model: nn.Module, loss_func: Any, optimizers: dict[str, Optimizer]
) -> None:
    """Warn of parameters that require a gradient and are in no optimizer."""
    in_optimizers: set[int] = set()
    for optimizer in optimizers.values():
        in_optimizers |= _ids_in(optimizer)
    named = dict(model.named_parameters())
    if isinstance(loss_func, nn.Module):
        known = set(map(id, named.values()))
        for name, parameter in loss_func.named_parameters():
            if id(parameter) not in known:
                named[f"{name} of the loss"] = parameter
    names = []
    for name, parameter in named.items():
        if parameter.requires_grad and id(parameter) not in in_optimizers:
            names.append(name)
    if not names:
        return
    shown = ", ".join(names[:4])
    if len(names) > 4:
        shown += f" and {len(names) - 4} more"
    subject = "1 parameter requires a gradient and is in no optimizer, so it is not trained"
    them = "it"
    if len(names) > 1:
        subject = (
            f"{len(names)} parameters require a gradient and are in no optimizer, so they are not "
            f"trained"
        )
        them = "them"
    warnings.warn(
        f"{subject}: {shown}. Make an optimizer with {them} and call "
        f"{type(model).__name__}.compile again, or freeze {them}: minikeras.freeze(module).",
        stacklevel=2,
    )


def _stale_state(optimizer: Optimizer) -> tuple[str, str] | None:
    """Return the dtypes of a state and its parameter if they differ.

    Only torch's own optimizers always keep them the same.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return None
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if not isinstance(value, Tensor) or not value.ndim or value.shape != parameter.shape:
                continue
            if value.is_floating_point() and value.dtype != parameter.dtype:
                return dtype_name(value), dtype_name(parameter)
    return None


def check_closures(optimizers: dict[str, Optimizer]) -> None:
    """Refuse an optimizer that calls the model itself, which the default step does not allow.

    Raises:
        ValueError: its step needs a closure.
    """
    for optimizer in optimizers.values():
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"{type(optimizer).__name__} needs a closure that computes the loss again, which "
                "the default train_step does not pass. Override train_step and call "
                "self.optimizer.step(closure) there."
            )


def _ids_in(optimizer: Optimizer) -> set[int]:
    """Return the ids of an optimizer's parameters."""
    ids = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            ids.add(id(parameter))
    return ids


# --- what Model and compile are given -------------------------------------------------------------


def network(net: nn.Module) -> nn.Module:
    """Return what Model wraps.

    Raises:
        TypeError: it is no module.
    """
    if isinstance(net, nn.Module):
        return net
    got = f"{describe(net)}. Pass nn.Sequential(*layers), or subclass Model and write its forward."
    if isinstance(net, type):
        got = f"the class {net.__name__}. Pass an instance, {net.__name__}(...)."
    raise TypeError(f"Model wraps a torch.nn.Module, got {got}")


def check_callable(name: str, function: Any) -> None:
    """Check that a loss or a metric is a function or an instance, and a module initialised.

    Raises:
        TypeError: it is something else, such as a class; or it takes the labels first.
    """
    if isinstance(function, type):
        raise TypeError(
            f"{name} is the class {function.__name__}; expected an instance. Pass "
            f"{write_instance(function)}."
        )
    if isinstance(function, nn.Module):
        try:
            list(function.parameters())
        except AttributeError:
            raise TypeError(
                f"{name} is a {type(function).__name__} whose __init__ did not call "
                f"super().__init__(). Call it there, before anything else."
            ) from None
    if isinstance(function, str):
        if name.startswith("loss"):
            line = LOSS_LINES.get(function.lower(), "nn.MSELoss()")
            order = ""
            if name == "loss_func":
                order = (
                    "; the optimizer comes second, torch.optim.Adam(model.parameters(), lr=1e-3)"
                )
        else:
            line = METRIC_LINES.get(function.lower(), "nn.L1Loss()")
            order = ""
        raise TypeError(
            f"{name} must be a function of (y_pred, y_true) or a module, got {function!r}. "
            f"Strings are not accepted: pass for instance {line}{order}."
        )
    if isinstance(function, Optimizer):
        raise TypeError(
            f"{name} must be a function of (y_pred, y_true) or a module, got the optimizer "
            f"{type(function).__name__}. Write compile(loss_func, optimizer): the loss comes first."
        )
    if isinstance(function, list | tuple) and name == "loss_func":
        raise TypeError(
            f"loss_func must be a function of (y_pred, y_true), a module or a dict of them, got "
            f"{describe(function)}. For several outputs pass a dict by their names, or by their "
            "positions {0: loss, 1: (loss, weight)}."
        )
    if isinstance(function, list | tuple) and name.startswith("metric"):
        raise TypeError(
            f"{name} must be a function of (y_pred, y_true) or an object with update, compute and "
            f"reset, got {describe(function)}. Give each metric a name of its own; those of one of "
            "several outputs go into a dict, {output: {name: metric}}."
        )
    if not callable(function) and not is_stateful(function):
        raise TypeError(
            f"{name} must be a function of (y_pred, y_true) or a module, got {function!r}. Pass "
            "for instance nn.MSELoss() or a custom function."
        )
    _check_argument_order(name, unwrap_loss(function))


def _check_argument_order(name: str, function: Any) -> None:
    """Refuse a loss or a metric that takes the labels first: its value would silently be wrong.

    A function for which the order makes no difference is refused too, since that is not known.
    """
    first = find_labels_first(function)
    if first is None:
        return
    kind = "loss" if name.startswith("loss") else "metric"
    wrapper = ""
    if kind == "metric" and is_of_sklearn(function):
        wrapper = "minikeras.OnAllRows"  # it takes NumPy arrays, and most are no means over rows
    raise TypeError(
        f"{name} takes {first} first, as in Keras and scikit-learn, and minikeras calls a {kind} "
        f"with (y_pred, y_true). {write_swapped(function, wrapper)}"
    )


def check_metrics_dict(metrics_dict: Any) -> None:
    """Check names of columns -> functions or objects; history uses some names itself.

    Raises:
        TypeError, ValueError: a name or a metric is something else.
    """
    if not isinstance(metrics_dict, Mapping):
        raise TypeError(
            f"metrics_dict must be a dict of name -> metric, got {type(metrics_dict).__name__}. "
            f'Pass for instance {{"accuracy": minikeras.accuracy}}.'
        )
    for name, metric in metrics_dict.items():
        check_name("metrics_dict has", name, ("loss", "lr", "epoch"))
        check_callable(f"metric {name!r}", find_view(metric)[0])


def check_optimizer_argument(optimizer: Any) -> None:
    """Refuse what compile was given as optimizer if it is neither one nor a dict of them.

    Raises:
        TypeError: it is something else, such as a class.
        ValueError: an empty dict.
    """
    optimizers = optimizer if isinstance(optimizer, Mapping) else {"": optimizer}
    for name, given in optimizers.items():
        if not isinstance(given, Optimizer):
            got = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
            where = f"optimizer {name!r}" if name else "optimizer"
            raise TypeError(
                f"{where} must be a torch.optim.Optimizer or a dict of them, got {got}. "
                f"Pass for instance torch.optim.Adam(model.parameters(), lr=1e-3)."
            )
    if not optimizers:
        raise ValueError(
            "optimizer is an empty dict; expected at least one. Omit it to use Adam(lr=1e-3)."
        )
