"""Metrics are means over rows, whatever they return."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
import torchmetrics
from helpers.models import Net, accuracy, compiled, points
from sklearn.metrics import accuracy_score, f1_score, recall_score, roc_auc_score
from torch import nn

import minikeras
from minikeras import Average
from minikeras.processes import OneProcess
from minikeras.totals import Totals


def hits(y_pred, y_true):
    return ((y_pred > 0.5) == (y_true > 0.5)).sum()


KINDS = {
    "tensor": accuracy,
    "tensor of one element": lambda y_pred, y_true: (
        ((y_pred > 0.5) == (y_true > 0.5)).float().mean(0)
    ),
    "Python float": lambda y_pred, y_true: accuracy(y_pred, y_true).item(),
    "NumPy scalar": lambda y_pred, y_true: np.float32(accuracy(y_pred, y_true).item()),
    "scikit-learn": lambda y_pred, y_true: accuracy_score(
        y_true.cpu().numpy(), y_pred.cpu().numpy() > 0.5
    ),
    "average of tensors": lambda y_pred, y_true: Average(
        hits(y_pred, y_true), torch.tensor(len(y_true))
    ),
    "average of numbers": lambda y_pred, y_true: Average(hits(y_pred, y_true).item(), len(y_true)),
    "torchmetrics": torchmetrics.classification.BinaryAccuracy(),
}


@pytest.mark.parametrize("metric", KINDS.values(), ids=KINDS)
def test_metric_of_each_kind_gives_the_value_over_the_whole_set(metric):
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
def test_metric_object_gives_scikit_learns_value_on_the_whole_set(metric, expected):
    X, y = points(101)
    model = compiled(metrics_dict={"metric": metric})
    dfhistory = model.fit(2, (X, y), (X, y), verbose=0)
    value = expected(y[:, 0].int().numpy(), model.predict(X)[:, 0].numpy())
    assert dfhistory["val_metric"].iloc[-1] == pytest.approx(value, rel=1e-5)
    assert dfhistory["metric"].notna().all()


def test_metric_object_has_a_copy_each_for_training_and_validation():
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
    for net in (model, twin):
        net.fit(1, [points(32)], verbose=0)
    assert seen == [(False, False)]
    assert torch.equal(model.fc1.weight, twin.fc1.weight)


def test_metric_is_called_once_per_batch():
    calls = []
    model = compiled(metrics_dict={"n": lambda y_pred, y_true: calls.append(len(y_true)) or 0.0})
    model.fit(1, points(70), batch_size=32, verbose=0)
    assert calls == [32, 32, 6]


def test_metric_counts_are_exact_beyond_what_float32_can_hold():
    totals = Totals({}, torch.device("cpu"), OneProcess())
    for _ in range(3):
        totals.add(
            {
                "loss": torch.tensor(1.0),
                "units": Average(torch.tensor(2.0**24), torch.tensor(2.0**24)),
            },
            2**24,
        )
    totals.add(
        {"loss": torch.tensor(0.0), "units": Average(torch.tensor(0.0), torch.tensor(1.0))}, 1
    )
    assert totals["loss"] == totals["units"] == 3 * 2**24 / (3 * 2**24 + 1)


def test_metric_that_counts_nothing_is_nan():
    model = compiled(
        metrics_dict={"none": lambda y_pred, y_true: Average(torch.tensor(0.0), torch.tensor(0))}
    )
    assert np.isnan(model.evaluate(points(10))["val_none"])


def test_metric_may_look_at_several_outputs():
    class Two(Net):
        def forward(self, x):
            return {"p": super().forward(x), "x": x}

    def loss_func(y_pred, y_true):
        return nn.functional.binary_cross_entropy(y_pred["p"], y_true)

    model = compiled(Two(), loss_func, {"mean_x": lambda y_pred, y_true: y_pred["x"].mean()})
    X, y = points(30)
    assert model.evaluate((X, y), batch_size=7)["val_mean_x"] == pytest.approx(
        X.mean().item(), abs=1e-6
    )


# --- objects that give several numbers ------------------------------------------------------------


class Gives:
    """A metric object with a given answer, which records when it is asked."""

    def __init__(self, answer, asked=None):
        self.answer = answer
        self.asked = asked
        self.rows = 0

    def reset(self):
        self.rows = 0

    def update(self, y_pred, y_true):
        self.rows += len(y_true)

    def compute(self):
        if self.asked is not None:
            self.asked.append(self.rows)
        return self.answer(self.rows) if callable(self.answer) else self.answer


ANSWERS = {
    "a number": (0.5, {"m": 0.5}),
    "a tensor of one element": (torch.tensor([0.5]), {"m": 0.5}),
    "an Average": (minikeras.Average(3.0, torch.tensor(4)), {"m": 0.75}),
    "a dict": ({"cat": 0.5, "dog": torch.tensor(0.25)}, {"m_cat": 0.5, "m_dog": 0.25}),
    "a dict of numbered classes": ({0: 0.5, 1: np.float32(0.25)}, {"m_0": 0.5, "m_1": 0.25}),
    "a dict of dicts": (
        {"all": {"p": 1, "r": 0}, "n": 2},
        {"m_all_p": 1.0, "m_all_r": 0.0, "m_n": 2.0},
    ),
    "a dict with a vector": (
        {"map": 0.5, "each": torch.tensor([0.25, 0.75])},
        {"m_map": 0.5, "m_each_0": 0.25, "m_each_1": 0.75},
    ),
    "a vector": (torch.tensor([0.5, 0.25]), {"m_0": 0.5, "m_1": 0.25}),
    "an array": (np.array([0.5, 0.25]), {"m_0": 0.5, "m_1": 0.25}),
    "a list": ([0.5, torch.tensor(0.25)], {"m_0": 0.5, "m_1": 0.25}),
    "a matrix": (
        torch.tensor([[1, 2], [3, 4]]),
        {"m_0_0": 1.0, "m_0_1": 2.0, "m_1_0": 3.0, "m_1_1": 4.0},
    ),
}


@pytest.mark.parametrize(("answer", "columns"), ANSWERS.values(), ids=ANSWERS)
def test_metric_object_has_a_column_for_each_number_of_its_answer(answer, columns):
    model = compiled(metrics_dict={"before": nn.L1Loss(), "m": Gives(answer), "after": nn.L1Loss()})
    dfhistory = model.fit(2, points(20), points(10), verbose=0)
    names = ["loss", "before", *columns, "after"]
    assert list(dfhistory) == names + [f"val_{name}" for name in names]
    for name, value in columns.items():
        assert list(dfhistory[name]) == list(dfhistory[f"val_{name}"]) == [value, value]
    evaluated = model.evaluate(points(10))
    assert {name: evaluated[f"val_{name}"] for name in columns} == columns


REFUSED = {
    "nothing": (None, "gave NoneType"),
    "a string": ("0.5", "gave str"),
    "a pair": ((0.5, 0.25), "gave (float, float)"),
    "a curve": (
        (torch.zeros(3), torch.zeros(3), torch.zeros(2)),
        "gave (Tensor (3,) float32, Tensor (3,) float32",
    ),
    "an empty dict": ({}, "gave {}"),
    "a dict with a string": ({"a": "b"}, "gave {'a': str}"),
    "an empty vector": (torch.zeros(0), "gave Tensor (0,) float32"),
    "complex numbers": (torch.zeros(2, dtype=torch.complex64), "gave Tensor (2,) complex64"),
    "a large matrix": (torch.zeros(100, 100), "gave Tensor (100, 100) float32"),
    "a long list": ([0.0] * 1001, "gave [float, float, float, float, ...]"),
}


@pytest.mark.parametrize(("answer", "said"), REFUSED.values(), ids=REFUSED)
def test_metric_object_whose_answer_is_no_number_is_an_error_at_the_end_of_the_pass(answer, said):
    model = compiled(metrics_dict={"m": Gives(answer)})
    expected = (
        "; expected a number, or a dict, list or tensor of numbers, which becomes a column for "
        "each (at most 1000). "
    )
    with pytest.raises(ValueError, match=re.escape(f"metric 'm': compute() {said}")) as error:
        model.evaluate(points(20))
    assert expected in str(error.value)
    assert error.value.__notes__[0] == "metric 'm', computed at the end of a pass"


def test_metric_object_whose_answer_is_a_pair_may_return_a_dict():
    with pytest.raises(
        ValueError, match=r'return a dict of name -> number, such as {"precision": p, "recall": r}'
    ):
        compiled(metrics_dict={"m": Gives((0.5, 0.25))}).evaluate(points(20))
    found = compiled(metrics_dict={"m": Gives({"precision": 0.5, "recall": 0.25})}).evaluate(
        points(20)
    )
    assert (found["val_m_precision"], found["val_m_recall"]) == (0.5, 0.25)


def test_metric_columns_of_one_name_are_refused_with_what_to_do():
    message = (
        "metric 'm' gives a column 'm_a', and there is a column of this name. Give the metric "
        "another name in "
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        compiled(metrics_dict={"m_a": nn.L1Loss(), "m": Gives({"a": 1.0})}).evaluate(points(20))
    message = "metric 'm_a' gives a column 'm_a_b', and metric 'm' gives a column of this name."
    metrics = {"m": Gives({"a_b": 1.0}), "m_a": Gives({"b": 1.0})}
    with pytest.raises(ValueError, match=re.escape(message)):
        compiled(metrics_dict=metrics).evaluate(points(20))
    with pytest.raises(
        ValueError, match="metric 'val' gives a column the name 'val_a', which history uses itself"
    ):
        compiled(metrics_dict={"val": Gives({"a": 1.0})}).evaluate(points(20))


def test_metric_columns_of_an_object_reach_callbacks_and_the_table(capsys, tmp_path):
    improving = Gives(lambda rows: {"f1": 0.5, "recall": 0.25})
    stop = minikeras.EarlyStopping("val_m_f1", patience=1)
    best = minikeras.ModelCheckpoint(tmp_path / "best.pt", monitor="val_m_recall", mode="max")
    log = minikeras.CSVLogger(tmp_path / "log.csv")
    model = compiled(metrics_dict={"m": improving})
    dfhistory = model.fit(
        9, points(40), points(20), callbacks=[stop, best, log], verbose=2, log_step_freq=1
    )
    assert len(dfhistory) == 2
    assert (tmp_path / "best.pt").is_file()
    written = pd.read_csv(tmp_path / "log.csv")
    assert {"m_f1", "m_recall", "val_m_f1", "val_m_recall"} <= set(written)
    lines = capsys.readouterr().out.splitlines()
    assert "m_f1 0.5000  m_recall 0.2500" in lines[0]
    assert any("val_m_f1" in line for line in lines)


# --- when an object is asked ----------------------------------------------------------------------


def test_metric_object_computes_once_at_the_end_of_each_pass():
    asked = []
    model = compiled(metrics_dict={"m": Gives(0.5, asked)})
    # deepcopy would copy the list as well
    for phase in (model._run.train, model._run.val):
        phase.totals.objects["m"].asked = asked
    model.fit(2, points(40), points(20), batch_size=8, verbose=0)
    model.evaluate(points(12))
    assert asked == [40, 20, 40, 20, 12]


class Recall:
    """Division by zero before the first positive."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.found = self.positives = 0

    def update(self, y_pred, y_true):
        self.found += int(((y_pred > 0.5) & (y_true > 0.5)).sum())
        self.positives += int((y_true > 0.5).sum())

    def compute(self):
        return self.found / self.positives


def sorted_points(rows):
    X, y = points(rows)
    order = y[:, 0].argsort()
    return X[order], y[order]


def test_metric_object_that_cannot_compute_yet_is_left_out_of_the_running_means():
    X, y = sorted_points(100)
    model = compiled(metrics_dict={"recall": Recall()}, lr=0.0)
    expected = recall_score(y, model.predict(X) > 0.5)
    seen = []
    listen = minikeras.LambdaCallback(
        on_batch_end=lambda batch, logs: seen.append((logs["recall"], list(logs)))
    )
    batches = list(zip(X.split(10), y.split(10), strict=True))
    dfhistory = model.fit(1, batches, batches, callbacks=[listen], verbose=2, log_step_freq=1)
    assert dfhistory["recall"].item() == dfhistory["val_recall"].item() == pytest.approx(expected)
    assert np.isnan(seen[0][0])
    assert seen[0][1] == ["loss"]
    assert seen[-1][0] == pytest.approx(expected)
    assert seen[-1][1] == ["loss", "recall"]


def test_metric_object_that_fails_at_the_end_of_a_pass_raises_with_its_name():
    X, _ = points(20)
    model = compiled(metrics_dict={"recall": Recall()})
    with pytest.raises(ZeroDivisionError) as error:
        model.evaluate((X, torch.zeros(20, 1)))
    assert error.value.__notes__[0] == "metric 'recall', computed at the end of a pass"


def test_metric_object_that_clears_its_rows_as_it_computes_gives_running_means_too():
    class Emptied:
        def __init__(self):
            self.reset()

        def reset(self):
            self.rows = []

        def update(self, y_pred, y_true):
            self.rows += ((y_pred > 0.5) == (y_true > 0.5)).flatten().tolist()

        def compute(self):
            rows = self.rows
            self.rows = []
            return sum(rows) / len(rows)

    X, y = points(100)
    model = compiled(metrics_dict={"accuracy": Emptied()}, lr=0.0)
    expected = accuracy_score(y, model.predict(X) > 0.5)
    seen = []
    listen = minikeras.LambdaCallback(
        on_batch_end=lambda batch, logs: seen.append(logs["accuracy"])
    )
    dfhistory = model.fit(
        1, (X, y), (X, y), batch_size=10, callbacks=[listen], verbose=2, log_step_freq=1
    )
    assert (
        dfhistory["accuracy"].item() == dfhistory["val_accuracy"].item() == pytest.approx(expected)
    )
    assert seen[-1] == pytest.approx(expected)
    assert len(seen) == 10


def test_metric_object_computes_no_running_means_if_nothing_shows_them():
    asked = []

    class Asked(Gives):
        def compute(self):
            ASKED.append(self.rows)
            return 0.5

    ASKED.clear()
    listen = minikeras.LambdaCallback(on_batch_end=lambda batch, logs: asked.append(logs["loss"]))
    compiled(metrics_dict={"m": Asked(0.5)}).fit(
        1, points(40), batch_size=10, callbacks=[listen], verbose=0
    )
    assert ASKED == [40]
    assert len(asked) == 4


ASKED = []
