"""Losses and metrics that take the labels first are refused by compile; no others are."""

import functools
import inspect

import pytest
import sklearn.metrics as skm
import torch
import torch.nn.functional as F
import torchmetrics
from helpers.bad_input import refused
from helpers.models import points
from torch import nn

import minikeras
from minikeras.argument_order import find_labels_first


def mape(y_true, y_pred):
    return ((y_true - y_pred) / y_true).abs().mean()


class TargetFirst(nn.Module):
    def forward(self, target, input):
        return mape(target, input)


class CallableFirst:
    def __call__(self, gt, pred):
        return mape(gt, pred)


class LabelsFirst:
    def update(self, labels, preds): ...

    def compute(self): ...

    def reset(self): ...


def say(what, first, kind, remedy):
    return (
        f"TypeError: {what} takes {first} first, as in Keras and scikit-learn, and minikeras calls "
        f"a {kind} with (y_pred, y_true). {remedy}"
    )


MAPE = "Pass lambda y_pred, y_true: mape(y_true, y_pred)."
SKLEARN = "Pass minikeras.OnAllRows(lambda y_pred, y_true: "
SWAP = "Swap its two arguments: lambda y_pred, y_true: ..."
F1 = functools.partial(skm.f1_score, average="macro", labels=[0, 1])
METRICS = {
    "a function": (mape, "y_true", MAPE),
    "of scikit-learn": (
        skm.mean_absolute_percentage_error,
        "y_true",
        SKLEARN + "mean_absolute_percentage_error(y_true, y_pred)).",
    ),
    "a partial": (
        F1,
        "y_true",
        SKLEARN + "f1_score(y_true, y_pred, average='macro', labels=...)).",
    ),
    "a lambda": (lambda labels, scores: 0.0, "labels", SWAP),
    "a module": (TargetFirst(), "target", "Swap the two arguments of its forward."),
    "a callable object": (CallableFirst(), "gt", "Swap the two arguments of its __call__."),
    "an object": (LabelsFirst(), "labels", "Swap the two arguments of its update."),
    "inside Transformed": (minikeras.Transformed(mape, torch.sigmoid), "y_true", MAPE),
}


@pytest.mark.parametrize("kind", METRICS)
def test_labels_first_in_a_metric_are_refused(kind):
    metric, first, remedy = METRICS[kind]
    model = minikeras.Model(nn.Linear(2, 1))
    with refused(say("metric 'm'", first, "metric", remedy), model):
        model.compile(nn.MSELoss(), metrics_dict={"m": metric})
    with refused(say("metric 'out_m'", first, "metric", remedy), model):
        model.compile({"out": nn.MSELoss()}, metrics_dict={"out": {"m": metric}})


LOSSES = {
    "a function": (mape, "loss_func", "y_true", MAPE),
    "a lambda": (lambda y_true, y_pred: 0.0, "loss_func", "y_true", SWAP),
    "a module": (TargetFirst(), "loss_func", "target", "Swap the two arguments of its forward."),
    "by name": ({"a": nn.MSELoss(), "b": (mape, 0.5)}, "loss 'b'", "y_true", MAPE),
    "with a penalty": (
        minikeras.Regularized(mape, nn.Linear(2, 1), l2=0.1),
        "loss_func",
        "y_true",
        MAPE,
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_labels_first_in_a_loss_are_refused(kind):
    loss, what, first, remedy = LOSSES[kind]
    model = minikeras.Model(nn.Linear(2, 1))
    with refused(say(what, first, "loss", remedy), model):
        model.compile(loss)


def test_labels_first_remedies_give_the_right_numbers():
    model = minikeras.Model(nn.Linear(2, 1))
    X, y = points(20)
    y = y + 1
    metrics = {
        "own": lambda y_pred, y_true: mape(y_true, y_pred),
        "sklearn": minikeras.OnAllRows(
            lambda y_pred, y_true: skm.mean_absolute_percentage_error(y_true, y_pred)
        ),
    }
    model.compile(lambda y_pred, y_true: mape(y_true, y_pred), metrics_dict=metrics)
    values = model.evaluate((X, y), batch_size=7)
    expected = skm.mean_absolute_percentage_error(y, model.predict(X))
    assert list(values.values()) == pytest.approx([expected] * 3)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of torch.compile itself
def test_labels_first_are_found_in_a_compiled_module():
    assert find_labels_first(torch.compile(TargetFirst())) == "target"
    assert find_labels_first(torch.compile(nn.MSELoss())) is None


def test_labels_first_are_found_in_all_of_scikit_learn():
    first = []
    for name, function in inspect.getmembers(skm, inspect.isfunction):
        names = list(inspect.signature(function).parameters)
        if names[:1] in (["y_true"], ["labels_true"]):
            first.append(name)
            assert find_labels_first(function) == names[0], name
    assert len(first) > 40


@pytest.mark.parametrize("module", [nn, F, torchmetrics, torchmetrics.functional, minikeras])
def test_labels_first_are_found_in_nothing_of_torch(module):
    looked_at = 0
    for name in dir(module):
        member = getattr(module, name)
        if isinstance(member, type):
            member = getattr(member, "update", None) or getattr(member, "forward", member)
            member = functools.partial(member, None)  # in place of self
        if callable(member):
            looked_at += 1
            assert find_labels_first(member) is None, name
    assert looked_at > 5


@pytest.mark.parametrize(
    "function",
    [
        lambda p, t: 0.0,
        lambda y_pred, y_true: 0.0,
        lambda a, y_true: 0.0,
        lambda target, margin: 0.0,
        lambda *arguments: 0.0,
        torch.add,
        max,
    ],
)
def test_labels_first_are_not_found_in_other_functions(function):
    assert find_labels_first(function) is None
