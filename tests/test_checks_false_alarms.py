"""Data and losses that look wrong and are right train without an error or a warning."""

import warnings

import pandas as pd
import pytest
import torch
from helpers.bad_input import (
    CE,
    CLASSES,
    COLUMN,
    ROW,
    S,
    Scale,
    X,
    Y,
    compiled,
    sgd,
)
from helpers.metrics import cosine
from torch import nn

FRAME = pd.DataFrame(X.double().numpy())
SERIES = pd.Series(ROW.double().numpy())
TRAINS = {
    "class probabilities": (CE, S, S.softmax(1)),
    "ignored labels": (CE, S, CLASSES.where(CLASSES < 2, -100)),
    "labels ignored by a number of one's own": (
        nn.CrossEntropyLoss(ignore_index=9),
        S,
        CLASSES.where(CLASSES < 2, 9),
    ),
    "uint8 labels": (CE, S, CLASSES.to(torch.uint8)),
    "(N, 1) labels and outputs": (nn.BCELoss(), COLUMN.sigmoid(), COLUMN.round()),
    "int labels for MSELoss": (nn.MSELoss(), COLUMN, COLUMN.long()),
    "a loss round CosineSimilarity": (cosine, S, S.roll(1, 0)),
    "a weight per row": (nn.MSELoss(reduction="none"), COLUMN, Y, ROW),
    "NumPy arrays of float64": (nn.MSELoss(), X.double().numpy(), X.double().numpy()),
    "DataFrames of float64": (nn.MSELoss(), FRAME, FRAME),
    "Series of float64": (nn.MSELoss(), SERIES, SERIES),
}


@pytest.mark.parametrize("given", TRAINS.values(), ids=TRAINS)
def test_loss_and_labels_that_look_wrong_and_are_right_train(given):
    loss, *data = given
    history = compiled(Scale(), loss, sgd).fit(1, tuple(data), verbose=0)
    assert history["loss"].notna().all()


class Shifted(nn.Module):
    """Labels from 1, as its users number them."""

    def __init__(self):
        super().__init__()
        self.loss_func = CE

    def forward(self, p, t):
        return self.loss_func(p, t - 1)


class PerStep(nn.CrossEntropyLoss):
    """Scores (N, T, classes) against labels (N, T)."""

    def forward(self, p, t):
        return super().forward(p.transpose(1, 2), t)


OWN = {
    "all pairs of rows": (
        lambda p, t: ((p.unsqueeze(1) - t) ** 2).sum(-1).min(1)[0].mean(),
        S,
        S.abs(),
    ),
    "all pairs of numbers": (lambda p, t: (p[:, None] - t).abs().mean(), ROW.clone(), ROW),
    "a wrapper with labels of its own": (Shifted(), S, CLASSES + 1),
    "a subclass with axes of its own": (PerStep(), torch.randn(8, 2, 5), torch.full((8, 2), 4)),
}


@pytest.mark.parametrize("given", OWN.values(), ids=OWN)
def test_loss_that_treats_its_labels_in_its_own_way_trains(given):
    loss, *data = given
    assert compiled(Scale(), loss, sgd).fit(1, tuple(data), verbose=0)["loss"].notna().all()


def test_softmax_before_cross_entropy_is_warned_of_once_per_fit():
    model = compiled(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), CE)
    for _ in range(2):
        with pytest.warns(UserWarning, match="already sum to 1") as caught:
            model.fit(2, (X, CLASSES), (X, CLASSES), batch_size=4, verbose=0)
        assert [str(warning.message) for warning in caught] == [
            "the model's outputs already sum to 1 in each row, and CrossEntropyLoss applies "
            "softmax itself. Give it raw scores: remove the softmax from the model, or use "
            "log_softmax and NLLLoss."
        ]


def test_raw_scores_before_nll_loss_are_warned_of_once_per_fit_and_the_remedies_are_not():
    said = (
        "NLLLoss takes log-probabilities, which are at most 0, and the model's outputs go up to "
        f"{S.max().item():.4g}, so the loss may fall without limit. Use CrossEntropyLoss, which "
        "takes raw scores, or end the model with nn.LogSoftmax(dim=1)."
    )
    for loss in (nn.NLLLoss(), nn.functional.nll_loss):
        with pytest.warns(UserWarning, match="log-probabilities") as caught:
            compiled(Scale(), loss).fit(2, (S, CLASSES), (S, CLASSES), batch_size=8, verbose=0)
        assert [str(warning.message) for warning in caught] == [said]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(Scale(), CE).fit(1, (S, CLASSES), verbose=0)
        network = nn.Sequential(Scale(), nn.LogSoftmax(dim=1))
        compiled(network, nn.NLLLoss()).fit(1, (S, CLASSES), verbose=0)
        compiled(network, nn.NLLLoss()).fit(1, (S * 1000, CLASSES), verbose=0)


SCORES = {
    "raw": S,
    "summing to 1, some below 0": torch.tensor([[2.0, -1.0, 0.0]]).expand(8, 3),
    "positive": S.abs(),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_cross_entropy_of_raw_scores_is_not_warned_of(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(Scale(), CE).fit(1, (scores, CLASSES), verbose=0)


def test_checks_call_a_metric_once_per_batch():
    calls = []
    model = compiled(metrics={"rows": lambda p, t: calls.append(len(t)) or 0.0})
    model.fit(2, (X, Y), (X, Y), batch_size=3, verbose=0)
    assert calls == [3, 3, 2] * 4
