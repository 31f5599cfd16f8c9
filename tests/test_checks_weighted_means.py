"""Losses whose mean is not over rows, where batches are weighted by their rows."""

import re
import warnings

import pytest
import torch
from helpers.seeds import seed
from torch import nn

import minikeras

WEIGHT = torch.tensor([1.0, 8.0, 3.0])


def data(ignored):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(32, 4, generator=generator)
    y = torch.randint(3, (32,), generator=generator)
    if ignored is not None:
        y[torch.rand(32, generator=generator) < 0.4] = ignored
    return X, y


class LogProbabilities(nn.Module):
    """What NLLLoss takes."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x).log_softmax(1)


def fitted(loss, rows, accumulate, ignored):
    """Return the weights of two epochs, and what was said."""
    seed()
    model = minikeras.Model(LogProbabilities())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.compile(loss, optimizer, device="cpu", accumulate=accumulate)
    X, y = data(ignored)
    batches = list(zip(X.split(rows), y.split(rows), strict=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(2, batches, batches, verbose=0)
    return model.state_dict(), [str(warning.message) for warning in caught]


def smoothed(**options):
    return nn.CrossEntropyLoss(label_smoothing=0.1, **options)


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss, smoothed])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("ignored", [None, -100, -7])
def test_weighted_mean_is_told_under_accumulate_and_the_remedy_is_exact(kind, weight, ignored):
    options = {"weight": weight} | ({} if ignored is None else {"ignore_index": ignored})
    whole, said = fitted(kind(**options), 8, 1, ignored)
    assert said == []
    parts, said = fitted(kind(**options), 4, 2, ignored)
    if weight is None and ignored is None:
        assert said == []
        torch.testing.assert_close(parts, whole)
        return
    (text,) = said
    name = type(kind()).__name__
    over = (
        "the labels that are not ignored" if weight is None else "the class weights of its labels"
    )
    assert text.startswith(
        f"loss_func is a {name} whose mean is over {over}; expected a mean over rows, since "
        "accumulate=2 weights each batch by its rows: the steps are not those of the whole batch. "
        "Let the loss return its total and what it is divided by: lambda y_pred, y_true: "
    )
    assert not torch.allclose(parts["net.fc.weight"], whole["net.fc.weight"], atol=1e-4)
    remedy = re.search(r"lambda y_pred.*(?=\.$)", text).group()
    names = {"minikeras": minikeras, "nn": nn, "weight": weight}
    mended, said = fitted(eval(remedy, names), 4, 2, ignored)  # as the user would paste it
    assert said == []
    torch.testing.assert_close(mended, whole)
