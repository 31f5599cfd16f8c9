"""Losses and metrics that cannot train, found in the first batch before a weight moves."""

import pytest
import torch
import torch.nn.functional as F
from helpers.bad_input import (
    CE,
    CLASSES,
    COLUMN,
    ONES,
    ROW,
    S,
    Scale,
    X,
    Y,
    cases,
    compiled,
    fits_badly,
    sgd,
)
from helpers.metrics import mse
from torch import nn

from minikeras import Average
from minikeras.errors import describe

BCE = nn.BCELoss()
LOGITS = nn.BCEWithLogitsLoss()
LOSSES = {
    "float labels": (CE, S, CLASSES.float()),
    "(N, 1) labels": (CE, S, CLASSES[:, None]),
    "(N, 1) float labels": (CE, S, CLASSES[:, None].float()),
    "probabilities of 2 of 3 classes": (CE, S, S[:, :2]),
    "int32 labels": (CE, S, CLASSES.int()),
    "float labels for NLLLoss": (nn.NLLLoss(), -S.abs(), CLASSES.float()),
    "a label past the classes": (CE, S, CLASSES + 1),
    "a label below 0": (CE, S, CLASSES - 1),
    "a label past the classes in a loss of one's own": (
        lambda p, t: F.cross_entropy(p, t) * 2,
        S,
        CLASSES + 1,
    ),
    "one class": (CE, ONES, torch.zeros(8).long()),
    "raw scores for BCELoss": (BCE, ONES.cumsum(0), ONES),
    "labels of 1 to 8 for BCELoss": (BCE, ONES, ONES.cumsum(0)),
    "NaN for BCELoss": (BCE, torch.where(ONES.cumsum(0) > 7, torch.nan, ONES), ONES),
    "int labels for BCELoss": (BCE, ONES, ONES.long()),
    "int labels for logits": (LOGITS, ONES, ONES.long()),
    "bool labels for BCELoss": (BCE, ONES, ONES.bool()),
    "bool labels for logits": (LOGITS, ONES, ONES.bool()),
    "bool labels for a loss of one's own": (mse, ONES, ONES.bool()),
    "float64 labels for BCELoss": (BCE, ONES, ONES.double()),
    "one loss per row": (nn.MSELoss(reduction="none"), ONES, Y),
    "a loss cut off by detach": (lambda p, t: mse(p.detach(), t), S, S),
    "a loss cut off by item": (lambda p, t: mse(p, t).item(), S, S),
    "two losses": (lambda p, t: (p.mean() * 4, p.mean() * 2.5), ONES, ONES),
    "a loss and its detached part": (lambda p, t: (mse(p, t), p.detach().mean()), S, S),
    "a loss and a part of 0": (lambda p, t: (mse(p, t), torch.tensor(0.0)), S, S),
    "a loss and a part below 0": (lambda p, t: (mse(p, t), torch.tensor(-1.0)), S, S),
    "a loss and a float": (lambda p, t: (mse(p, t), 0.3), S, S),
    "a loss and a number of pairs": (lambda p, t: (mse(p, t), len(p) ** 2), S, S),
    "a loss and a dict": (lambda p, t: (mse(p, t), {"mse": 1.0}), S, S),
    "a list": (lambda p, t: [mse(p, t)], S, S),
    "a dict": (lambda p, t: {"mse": mse(p, t), "part": 0.5}, S, S),
    "an average with a count below 0": (lambda p, t: Average(mse(p, t), torch.tensor(-1)), S, S),
    "an average with a count of NaN": (lambda p, t: Average(mse(p, t), float("nan")), S, S),
    "an average with a gradient in both": (lambda p, t: Average(mse(p, t), p.mean()), S, S),
    "an average that is not summed": (lambda p, t: Average((p - t) ** 2, 8), S, S),
}
LOSSES_SAY = """
float labels | ValueError: labels are float32 (8,); expected one class index (int64) per row, or
    class probabilities of shape (8, 3). Pass labels.long(), or in NumPy and pandas
    .astype('int64').
(N, 1) labels | ValueError: labels have shape (8, 1); expected one class index (int64) per row, or
    class probabilities of shape (8, 3). Pass labels.squeeze(1).
(N, 1) float labels | ValueError: labels are float32 (8, 1); expected one class index (int64) per
    row, or class probabilities of shape (8, 3). Pass labels.squeeze(1).long(), or in NumPy and
    pandas .astype('int64').
probabilities of 2 of 3 classes | ValueError: labels are float32 (8, 2); expected one class index
    (int64) per row, or class probabilities of shape (8, 3). Give labels and predictions the same
    number of columns.
int32 labels | ValueError: labels are int32; expected one class index (int64) per row, or class
    probabilities of shape (8, 3). Pass labels.long(), or in NumPy and pandas .astype('int64').
float labels for NLLLoss | ValueError: labels are float32 (8,); expected one class index (int64) per
    row. Pass labels.long(), or in NumPy and pandas .astype('int64').
a label past the classes | ValueError: label 3 is not a valid class: the model has 3 outputs, so
    labels go from 0 to 2. Number the classes from 0, or give the model more outputs.
a label below 0 | ValueError: label -1 is not a valid class: the model has 3 outputs, so labels go
    from 0 to 2. Number the classes from 0; or build the loss with ignore_index=-1 to leave such
    labels out.
a label past the classes in a loss of one's own | ValueError: label 3 is not a valid class: the
    model has 3 outputs, so labels go from 0 to 2. Number the classes from 0, or give the model more
    outputs.
one class | ValueError: predictions (8, 1) have one class, so the loss is always 0. Give the model
    as many outputs as there are classes, or use BCEWithLogitsLoss for a yes-or-no question.
raw scores for BCELoss | ValueError: BCELoss takes probabilities from 0 to 1, and the predictions go
    from 1 to 8. End the model with a sigmoid, or use BCEWithLogitsLoss on raw scores.
labels of 1 to 8 for BCELoss | ValueError: BCELoss takes probabilities from 0 to 1, and the labels
    go from 1 to 8. Scale the labels to 0 and 1.
NaN for BCELoss | ValueError: BCELoss takes probabilities from 0 to 1, and 1 of 8 predictions is
    NaN. Look for NaN in the features, or lower the learning rate.
int labels for BCELoss | int labels for logits | ValueError: labels are int64 and predictions
    float32; the loss takes both in one dtype. Pass labels.float(), or in NumPy and pandas
    .astype('float32').
bool labels for BCELoss | bool labels for logits | bool labels for a loss of one's own | ValueError:
    labels are bool and predictions float32; the loss takes both in one dtype. Pass labels.float(),
    or in NumPy and pandas .astype('float32').
float64 labels for BCELoss | ValueError: labels are float64 and predictions float32; the loss takes
    both in one dtype. Pass labels.float(), or in NumPy and pandas .astype('float32').
one loss per row | ValueError: the loss gave Tensor (8, 1) float32; expected one number, a 0-d
    tensor. Build it with reduction="mean", or end it with .mean().
a loss cut off by detach | ValueError: the loss is Tensor () float32 without a gradient: it does not
    depend on any trainable parameter. Compute it from the model's outputs in torch, without detach,
    .item() or NumPy.
a loss cut off by item | ValueError: the loss is float without a gradient: it does not depend on any
    trainable parameter. Compute it from the model's outputs in torch, without detach, .item() or
    NumPy.
two losses | a loss and its detached part | a loss and a part of 0 | a loss and a part below 0 |
    ValueError: the loss gave a tuple, (Tensor () float32, Tensor () float32); expected one number.
    Return one part, such as [0], or the sum of several; or minikeras.Average(total, count), if they
    are a total and the count to divide it by.
a loss and a float | ValueError: the loss gave a tuple, (Tensor () float32, float); expected one
    number. Return one part, ...
a loss and a number of pairs | ValueError: the loss gave a tuple, (Tensor () float32, int); expected
    one number. Return one part, ...
a loss and a dict | ValueError: the loss gave a tuple, (Tensor () float32, {'mse': float}); expected
    one number. Return one part, ...
a list | ValueError: the loss gave a list, [Tensor () float32]; expected one number. Return one
    part, ...
a dict | ValueError: the loss gave a dict, {'mse': Tensor () float32, 'part': float}; expected one
    number. Return one of its values, such as ['mse'], or their sum. The others can be metrics under
    names of their own.
an average with a count below 0 | ValueError: the loss gave an Average with count -1; expected a
    finite number, 0 or more. The count is how many units the total is a sum of. If it is something
    else, return the number [0] alone.
an average with a count of NaN | ValueError: the loss gave an Average with count nan; expected a
    finite number, 0 or more. ...
an average with a gradient in both | ValueError: the loss gave an Average whose count has a
    gradient, and a count is a constant. Pass count.detach(); if the second part is another loss,
    add the two up and return one number.
an average that is not summed | ValueError: the loss gave Average(total=Tensor (8, 3) float32,
    count=int); expected a number for each: a float or a 0-d tensor. Add up what counts with .sum().
"""


@pytest.mark.parametrize(("given", "message"), cases(LOSSES, LOSSES_SAY))
def test_loss_that_cannot_train_is_refused_before_a_weight_moves(given, message):
    loss, outputs, labels = given
    fits_badly(message, data=(outputs, labels), model={"net": Scale(), "loss": loss})


NUMBER = (
    "expected one number: a float, a NumPy scalar, a 0-d tensor, or minikeras.Average(total, "
    "count). "
)
NUMBER += "Take the mean over the rows."
METRICS = {
    "not a scalar": (lambda p, t: p[:, 0] - t, f"gave Tensor (8,) float32; {NUMBER}"),
    "not a scalar, which broadcasts too": (
        lambda p, t: p - t,
        f"gave Tensor (8, 8) float32; {NUMBER}",
    ),
    "nothing": (lambda p, t: None, f"gave NoneType; {NUMBER}"),
}


def refused_metric(metric, message):
    model = {"net": Scale(), "loss": lambda p, t: p.mean(), "metrics": {"m": metric}}
    fits_badly(f"ValueError: metric 'm' {message}", data=(COLUMN, ROW), model=model)


@pytest.mark.parametrize(("metric", "message"), METRICS.values(), ids=METRICS)
def test_metric_that_is_no_number_is_refused_before_a_weight_moves(metric, message):
    refused_metric(metric, message)


COLUMNS = {
    "a vector": lambda p, t: (p - t).abs().mean(0).repeat(3),
    "a dict": lambda p, t: {"a": p.mean(), "b": p.mean()},
    "an average of a vector": lambda p, t: Average(torch.ones(3), 8),
}


@pytest.mark.parametrize("metric", COLUMNS.values(), ids=COLUMNS)
def test_metric_function_of_several_columns_is_refused_with_the_class_that_takes_it(metric):
    model = compiled(Scale(), nn.MSELoss(), metrics={"m": metric})
    message = (
        r"^metric 'm' gave [^\n]* For several columns pass minikeras\.OnAllRows\(function\), whose "
        r"function gets NumPy arrays\.\ndl_val, batch 1$"
    )
    with pytest.raises(ValueError, match=message):
        model.evaluate((COLUMN, COLUMN))


@pytest.mark.parametrize("count", [-1.0, float("nan"), float("inf")])
def test_metric_average_with_a_wrong_count_is_refused_before_a_weight_moves(count):
    message = f"gave an Average with count {count:g}; expected a finite number, 0 or more. ..."
    refused_metric(lambda p, t: Average(torch.tensor(1.0), torch.tensor(count)), message)


@pytest.mark.parametrize(
    "pair", [(0.5, 0.25), (0.0, 0.0), (1.0, 1.0), (torch.tensor(0.5), torch.tensor(8))]
)
def test_metric_that_gives_two_numbers_is_refused_whatever_they_are(pair):
    message = f"gave a tuple, {describe(pair)}; expected one number. Return one part, ..."
    refused_metric(lambda p, t: pair, message)


FAILS = {
    "a metric": (
        {"metrics": {"m": lambda p, t: 1 / 0}},
        "metric 'm' got y_pred Tensor (8, 1) float32, y_true Tensor (8, 1) float32",
    ),
    "a loss": (
        {"loss": lambda p, t: 1 / 0},
        "the loss got y_pred Tensor (8, 1) float32, y_true Tensor (8, 1) float32",
    ),
}


@pytest.mark.parametrize(("model", "note"), FAILS.values(), ids=FAILS)
def test_error_in_a_metric_or_a_loss_says_which_and_what_it_was_given(model, note):
    with pytest.raises(ZeroDivisionError) as error:
        compiled(**model).fit(1, (X, Y), verbose=0)
    assert error.value.__notes__ == [note, "dl_train, batch 1", "epoch 1"]


def test_loss_that_is_given_all_that_an_lstm_returns_raises_an_error_that_says_so():
    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'size'") as error:
        compiled(nn.LSTM(4, 1), lambda p, t: F.mse_loss(p, t)).fit(1, (X, Y), verbose=0)
    assert error.value.__notes__ == [
        "the loss got y_pred (Tensor (8, 1) float32, (Tensor (1, 1) float32, Tensor (1, 1) "
        "float32)), y_true Tensor (8, 1) float32. Let forward return only the first part.",
        "dl_train, batch 1",
        "epoch 1",
    ]


SWAPPED = {
    "cross entropy": (lambda t, p: F.cross_entropy(p, t), S, CLASSES),
    "binary cross entropy": (
        lambda t, p: F.binary_cross_entropy(p, t),
        COLUMN,
        ONES * 2,
    ),
    "a module's": (lambda t, p: CE(p, t), S, CLASSES),
}


@pytest.mark.parametrize("given", SWAPPED.values(), ids=SWAPPED)
def test_loss_with_arguments_in_the_order_of_keras_raises_an_error_with_ours(given):
    loss, features, labels = given
    with pytest.raises(RuntimeError) as error:
        compiled(Scale(), loss).fit(1, (features, labels), verbose=0)
    assert error.value.__notes__[1:] == [
        "The labels were passed as predictions: a loss is called with (y_pred, y_true), while "
        "Keras uses (y_true, y_pred).",
        "dl_train, batch 1",
        "epoch 1",
    ]


SENTENCES = torch.zeros(8, 5, 12)  # scores of 12 words at 5 places
WORDS = torch.tensor([[0, 1, 2, 3, 40]] * 8)
OTHERWISE = {
    "labels of words": (
        lambda p, t: F.cross_entropy(p.reshape(-1, 12), t.reshape(-1)),
        SENTENCES,
        WORDS,
    ),
    "weights of 2 classes": (
        lambda p, t: F.cross_entropy(p, t.long(), weight=torch.ones(2)),
        S,
        CLASSES.float(),
    ),
    "probabilities made in the loss": (
        lambda p, t: F.binary_cross_entropy(2 * p, t),
        ONES * 0.75,
        ONES,
    ),
}
OTHERWISE_SAY = """
labels of words | IndexError: Target 40 is out of bounds.
weights of 2 classes | RuntimeError: weight tensor should be defined either for all 3 classes or no
    classes but got weight tensor of shape: [2]
probabilities made in the loss | RuntimeError: all elements of input should be between 0 and 1
"""


@pytest.mark.parametrize(("given", "message"), cases(OTHERWISE, OTHERWISE_SAY))
def test_loss_of_the_user_keeps_its_own_error_without_a_wrong_guess(given, message):
    loss, outputs, labels = given
    fits_badly(message, data=(outputs, labels), model={"net": Scale(), "loss": loss})


class InOneDtype(torch.autograd.Function):
    """A loss whose gradient needs labels of the predictions' dtype, as MSELoss of older torch."""

    @staticmethod
    def forward(ctx, y_pred, y_true):
        return ((y_pred - y_true) ** 2).mean()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("Found dtype Long but expected Float")


def test_labels_of_integers_get_a_note_if_the_loss_has_no_gradient_for_them():
    model = compiled(Scale(), InOneDtype.apply, sgd)
    with pytest.raises(RuntimeError, match="Found dtype Long") as error:
        model.fit(1, (COLUMN, COLUMN.long()), verbose=0)
    assert error.value.__notes__[0] == (
        "The labels are int64, and this loss has a gradient only if both have the predictions' "
        "dtype. Pass labels.float()."
    )
