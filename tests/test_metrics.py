"""Metrics are means over rows, whatever kind of answer they give."""

import numpy as np
import pytest
import torch
import torchmetrics
from conftest import Net, accuracy, compiled, points
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from torch import nn

from minikeras import Average
from minikeras.metrics import Totals


def hits(y_pred, y_true):
    return ((y_pred > 0.5) == (y_true > 0.5)).sum()


KINDS = {
    "tensor": accuracy,
    "tensor of one element": lambda y_pred, y_true: ((y_pred > 0.5) == (y_true > 0.5)).float().mean(0),
    "Python float": lambda y_pred, y_true: accuracy(y_pred, y_true).item(),
    "NumPy scalar": lambda y_pred, y_true: np.float32(accuracy(y_pred, y_true).item()),
    "scikit-learn": lambda y_pred, y_true: accuracy_score(y_true.cpu().numpy(), y_pred.cpu().numpy() > 0.5),
    "average of tensors": lambda y_pred, y_true: Average(hits(y_pred, y_true), torch.tensor(len(y_true))),
    "average of numbers": lambda y_pred, y_true: Average(hits(y_pred, y_true).item(), len(y_true)),
    "torchmetrics": torchmetrics.classification.BinaryAccuracy(),
}


@pytest.mark.parametrize("metric", KINDS.values(), ids=KINDS)
def test_each_kind_of_metric_gives_the_value_over_the_whole_set(metric):
    X, y = points(101)
    model = compiled(metrics_dict={"metric": metric})
    model.fit(2, (X, y), (X, y), verbose=0)
    expected = accuracy_score(y, model.predict(X) > 0.5)
    assert model.evaluate((X, y), batch_size=10)["val_metric"] == pytest.approx(expected, rel=1e-6)


WHOLE_SET = {
    "f1": (torchmetrics.classification.BinaryF1Score(), lambda y, p: f1_score(y, p > 0.5)),
    "auroc": (torchmetrics.classification.BinaryAUROC(), lambda y, p: roc_auc_score(y, p)),
}


@pytest.mark.parametrize(("metric", "expected"), WHOLE_SET.values(), ids=WHOLE_SET)
def test_an_object_with_update_and_compute_gives_scikit_learns_value_on_the_whole_set(metric, expected):
    X, y = points(101)
    model = compiled(metrics_dict={"metric": metric})
    dfhistory = model.fit(2, (X, y), (X, y), verbose=0)
    value = expected(y[:, 0].int().numpy(), model.predict(X)[:, 0].numpy())
    assert dfhistory["val_metric"].iloc[-1] == pytest.approx(value, rel=1e-5)
    assert dfhistory["metric"].notna().all()


def test_training_and_validation_have_a_copy_each_of_a_metric_object():
    class Rows:
        def __init__(self):
            self.reset()

        def reset(self):
            self.rows = 0

        def update(self, y_pred, y_true):
            self.rows += len(y_true)

        def compute(self):
            return self.rows

    dfhistory = compiled(metrics_dict={"rows": Rows()}).fit(2, points(100), points(40), verbose=0)
    assert list(dfhistory["rows"]) == [100, 100]
    assert list(dfhistory["val_rows"]) == [40, 40]


def test_metrics_see_outputs_without_gradient_after_backward():
    seen = []

    def metric(y_pred, y_true):
        seen.append((y_pred.requires_grad, torch.is_grad_enabled()))
        return y_pred.zero_().sum()  # in place: must not disturb the gradient

    twin = compiled()
    model = compiled(metrics_dict={"zero": metric})
    model.load_state_dict(twin.state_dict())
    for one in (model, twin):
        one.fit(1, [points(32)], verbose=0)
    assert seen == [(False, False)]
    assert torch.equal(model.fc1.weight, twin.fc1.weight)


def test_a_metric_is_called_once_per_batch():
    calls = []
    model = compiled(metrics_dict={"n": lambda y_pred, y_true: calls.append(len(y_true)) or 0.0})
    model.fit(1, points(70), batch_size=32, verbose=0)
    assert calls == [32, 32, 6]


def test_counts_are_exact_beyond_what_float32_can_hold():
    totals = Totals({}, torch.device("cpu"))
    for _ in range(3):
        totals.add({"loss": torch.tensor(1.0), "units": Average(torch.tensor(2.0**24), torch.tensor(2.0**24))}, 2**24)
    totals.add({"loss": torch.tensor(0.0), "units": Average(torch.tensor(0.0), torch.tensor(1.0))}, 1)
    assert totals["loss"] == totals["units"] == 3 * 2**24 / (3 * 2**24 + 1)


def test_nothing_counted_is_nan():
    model = compiled(metrics_dict={"none": lambda y_pred, y_true: Average(torch.tensor(0.0), torch.tensor(0))})
    assert np.isnan(model.evaluate(points(10))["val_none"])


def test_a_metric_may_look_at_several_outputs():
    class Two(Net):
        def forward(self, x):
            return {"p": super().forward(x), "x": x}

    def loss_func(y_pred, y_true):
        return nn.functional.binary_cross_entropy(y_pred["p"], y_true)

    model = compiled(Two(), loss_func, {"mean_x": lambda y_pred, y_true: y_pred["x"].mean()})
    X, y = points(30)
    assert model.evaluate((X, y), batch_size=7)["val_mean_x"] == pytest.approx(X.mean().item(), abs=1e-6)


def test_a_metric_object_that_gives_more_than_one_number_is_refused_before_a_weight_moves():
    model = compiled(metrics_dict={"m": torchmetrics.classification.BinaryConfusionMatrix()})
    before = model.fc1.weight.clone()
    with pytest.raises(ValueError, match=r"metric 'm' gave Tensor \(2, 2\) int64; expected one number"):
        model.fit(1, points(10), verbose=0)
    assert torch.equal(model.fc1.weight, before)
