"""OnAllRows: a function of all rows gives scikit-learn's value on the whole set."""

import copy
import re
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as skm
import torch
from helpers.models import compiled, points
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import minikeras
from minikeras import OnAllRows

SCORES = {
    "auc": (lambda p, t: skm.roc_auc_score(t, p)),
    "ap": (lambda p, t: skm.average_precision_score(t, p)),
    "f1": (lambda p, t: skm.f1_score(t, p > 0.5)),
    "kappa": (lambda p, t: skm.cohen_kappa_score(t[:, 0] > 0.5, p[:, 0] > 0.5)),
    "r2": (lambda p, t: skm.r2_score(t, p)),
    "rmse": (lambda p, t: skm.root_mean_squared_error(t, p)),
    "pearson": (lambda p, t: np.corrcoef(p[:, 0], t[:, 0])[0, 1]),
}


def on_all_rows():
    return {name: OnAllRows(function) for name, function in SCORES.items()}


@pytest.mark.parametrize("batch_size", [1, 7, 32, 101])
def test_on_all_rows_gives_scikit_learns_value_on_the_whole_set_at_any_batch_size(batch_size):
    X, y = points(101)
    model = compiled(metrics_dict=on_all_rows(), lr=0.0)
    p = model.predict(X).numpy()
    evaluated = model.evaluate((X, y), batch_size=batch_size)
    dfhistory = model.fit(2, (X, y), (X[:50], y[:50]), batch_size=batch_size, verbose=0)
    for name, function in SCORES.items():
        expected = function(p, y.numpy())
        of_half = function(p[:50], y[:50].numpy())
        assert evaluated[f"val_{name}"] == pytest.approx(expected, rel=1e-5)
        assert list(dfhistory[name]) == pytest.approx([expected] * 2, rel=1e-5)
        assert list(dfhistory[f"val_{name}"]) == pytest.approx([of_half] * 2, rel=1e-5)


def test_on_all_rows_in_training_gets_the_outputs_that_each_batch_had_before_its_step():
    X, y = points(64)
    batches = list(zip(X.split(16), y.split(16), strict=True))
    model = compiled(metrics_dict={"rmse": OnAllRows(SCORES["rmse"])}, lr=0.5)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    outputs = []
    for features, labels in batches:
        outputs.append(twin(features))
        nn.functional.binary_cross_entropy(outputs[-1], labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = SCORES["rmse"](torch.cat(outputs).detach().numpy(), y.numpy())
    assert model.fit(1, batches, verbose=0)["rmse"].item() == pytest.approx(expected, rel=1e-6)


def test_on_all_rows_calls_the_function_once_a_pass_with_numpy_arrays_of_all_rows():
    X, y = points(50)
    seen = []

    def watch(y_pred, y_true):
        seen.append((type(y_pred), y_pred.shape, y_pred.dtype, y_true.shape))
        return len(y_pred)

    listen = minikeras.LambdaCallback(
        on_batch_end=lambda batch, logs: shown.append((list(logs), logs["m"]))
    )
    shown = []
    model = compiled(metrics_dict={"m": OnAllRows(watch)})
    dfhistory = model.fit(
        2, (X, y), (X, y), batch_size=20, callbacks=[listen], verbose=2, log_step_freq=1
    )
    assert seen == [(np.ndarray, (50, 1), np.float32, (50, 1))] * 4
    assert list(dfhistory["m"]) == [50, 50]
    # nothing is shown before the end of a pass
    assert [names for names, _ in shown] == [["loss"]] * 6
    assert all(np.isnan(value) for _, value in shown)


def test_on_all_rows_has_a_column_for_each_value_of_a_dict():
    def precision_recall(y_pred, y_true):
        precision, recall, _, _ = skm.precision_recall_fscore_support(
            y_true > 0.5, y_pred > 0.5, average="binary"
        )
        return {"precision": precision, "recall": recall}

    X, y = points(101)
    model = compiled(metrics_dict={"of": OnAllRows(precision_recall)}, lr=0.0)
    with torch.no_grad():
        model.fc2.bias.sub_(model.predict(X).logit().median())  # it says yes to half of them
    guess = model.predict(X) > 0.5
    found = model.evaluate((X, y))
    assert found["val_of_precision"] == pytest.approx(skm.precision_score(y, guess))
    assert found["val_of_recall"] == pytest.approx(skm.recall_score(y, guess))
    cells = compiled(
        copy.deepcopy(model),
        None,
        {"cells": OnAllRows(lambda p, t: skm.confusion_matrix(t, p > 0.5))},
    )
    assert cells.evaluate((X, y))["val_cells_1_1"] == skm.confusion_matrix(y, guess)[1, 1]


@dataclass
class Answer:
    scores: torch.Tensor
    extra: torch.Tensor


Named = namedtuple("Named", ["scores", "extra"])


class Custom(dict):
    """As the outputs of other libraries: a dict whose items are attributes too."""

    @property
    def scores(self):
        return self["scores"]

    @property
    def extra(self):
        return self["extra"]


MAKERS = {
    "tuple": (lambda scores, extra: (scores, extra), lambda p: p[0]),
    "list": (lambda scores, extra: [scores, extra], lambda p: p[0]),
    "dict": (lambda scores, extra: {"scores": scores, "extra": extra}, lambda p: p["scores"]),
    "named tuple": (Named, lambda p: p.scores),
    "dataclass": (Answer, lambda p: p.scores),
    "a class of one's own": (
        lambda scores, extra: Custom(scores=scores, extra=extra),
        lambda p: p.scores,
    ),
    "nested": (lambda scores, extra: {"a": (extra, [scores, extra])}, lambda p: p["a"][1][0]),
}


class Several(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.make = make

    def forward(self, x):
        return self.make(self.layer(x), x.mean())


@pytest.mark.parametrize(("make", "scores"), MAKERS.values(), ids=MAKERS)
def test_on_all_rows_passes_outputs_and_labels_in_their_structure(make, scores):
    X, y = points(50)
    labels = {"y": y, "id": [torch.arange(50)]}
    rows = DataLoader(TensorDataset(X, torch.arange(50)), batch_size=16)
    batches = [
        (features, {"y": labels["y"][numbers], "id": [numbers]}) for features, numbers in rows
    ]

    def rmse(y_pred, y_true):
        assert list(y_true["id"][0]) == list(range(50))
        return skm.root_mean_squared_error(y_true["y"], scores(y_pred))

    model = minikeras.Model(Several(make))
    compiled(model, lambda p, t: ((scores(p) - t["y"]) ** 2).mean(), {"rmse": OnAllRows(rmse)})
    with torch.no_grad():
        expected = skm.root_mean_squared_error(y, model.net.layer(X))
    assert model.evaluate(batches)["val_rmse"] == pytest.approx(expected, rel=1e-6)


def test_on_all_rows_joins_labels_in_lists_by_rows():
    X, y = points(10)
    names = [f"row {number}" for number in range(10)]
    boxes = [torch.full((number % 3, 4), float(number)) for number in range(10)]
    batches = [
        (
            X[at : at + 4],
            {"y": y[at : at + 4], "name": names[at : at + 4], "boxes": boxes[at : at + 4]},
        )
        for at in (0, 4, 8)
    ]

    def rows(y_pred, y_true):
        assert y_true["name"] == names
        assert [len(boxes) for boxes in y_true["boxes"]] == [number % 3 for number in range(10)]
        assert all(isinstance(boxes, np.ndarray) for boxes in y_true["boxes"])
        return len(y_pred)

    model = compiled(
        minikeras.Model(nn.Linear(2, 1)),
        lambda p, t: ((p - t["y"]) ** 2).mean(),
        {"n": OnAllRows(rows)},
    )
    assert model.evaluate(batches)["val_n"] == 10


def test_on_all_rows_keeps_rows_that_later_changes_of_a_batch_do_not_reach():
    y = torch.zeros(4, 1)

    def reused():  # a loader that fills the same memory again
        for number in range(3):
            y.fill_(number)
            yield torch.zeros(4, 2), y

    class Batches:
        def __iter__(self):
            return reused()

    model = compiled(
        loss_func=nn.MSELoss(), metrics_dict={"labels": OnAllRows(lambda p, t: t.sum())}
    )
    assert model.evaluate(Batches())["val_labels"] == 4 * (0 + 1 + 2)


OPTIONS = {
    "bf16": {"precision": "bf16"},
    "accumulate": {"accumulate": 3},
    "jit": {"jit": {"backend": "eager"}},
    "jit, several steps": {"jit": {"backend": "eager"}, "steps_per_execution": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_on_all_rows_works_with_each_option_of_compile(options):
    X, y = points(101)
    kinds = []

    def r2(y_pred, y_true):
        kinds.append((y_pred.dtype, len(y_pred)))
        return skm.r2_score(y_true, y_pred)

    net = nn.Linear(2, 1)
    model = compiled(minikeras.Model(net), nn.MSELoss(), {"r2": OnAllRows(r2)}, lr=0.0, **options)
    expected = skm.r2_score(y, model.predict(X))
    dfhistory = model.fit(2, (X, y), (X, y), batch_size=16, verbose=0)
    assert list(dfhistory["r2"]) + list(dfhistory["val_r2"]) == pytest.approx(
        [expected] * 4, rel=1e-5
    )
    assert kinds == [(np.float32, 101)] * 4


def test_on_all_rows_passes_outputs_in_bfloat16_as_float32():
    X, y = points(20)
    model = minikeras.Model(nn.Linear(2, 1)).bfloat16()
    compiled(
        model,
        nn.MSELoss(),
        {"m": OnAllRows(lambda p, t: float(p.dtype == np.float32 and t.dtype == np.float32))},
    )
    assert model.evaluate((X.bfloat16(), y.bfloat16()))["val_m"] == 1.0


def test_on_all_rows_in_a_fit_resumed_within_an_epoch_counts_all_rows_of_it(tmp_path):
    X, y = points(64)

    def fit(**kwargs):
        torch.manual_seed(0)
        model = compiled(metrics_dict=on_all_rows())
        return model.fit(3, (X, y), (X, y), batch_size=8, verbose=0, **kwargs)

    def stop(batch, logs):
        batches.append(batch)
        if len(batches) == stopped_after:
            raise InterruptedError

    expected = fit()
    for stopped_after in (5, 8, 11, 20):  # 8 is an epoch's last batch
        batches = []
        file = {"checkpoint": tmp_path / f"{stopped_after}.pt", "checkpoint_every": 1}
        with pytest.raises(InterruptedError):
            fit(callbacks=[minikeras.LambdaCallback(on_batch_end=stop)], **file)
        pd.testing.assert_frame_equal(fit(**file), expected, check_exact=True)


def test_on_all_rows_in_a_fit_resumed_after_an_epochs_last_batch_needs_no_further_batch():
    metric = OnAllRows(lambda p, t: float(p.scores.sum() + t["y"].sum()))
    metric.update(Answer(torch.ones(3, 1), torch.zeros(())), {"y": torch.ones(3, 1)})
    other = OnAllRows(metric.function)
    other.load_state_dict(metric.state_dict())
    assert metric.compute() == other.compute() == 6


def test_on_all_rows_keeps_rows_of_training_and_validation_apart_and_shares_the_function():
    class Table:
        def __deepcopy__(self, memo):
            raise AssertionError("the function's own data are not copied")

        def __call__(self, y_pred, y_true):
            return len(y_true)

    metric = OnAllRows(Table())
    dfhistory = compiled(metrics_dict={"n": metric}).fit(2, points(100), points(40), verbose=0)
    assert list(dfhistory["n"]) == [100, 100]
    assert list(dfhistory["val_n"]) == [40, 40]


def test_on_all_rows_can_be_monitored_by_early_stopping(tmp_path):
    values = iter([0.5, 0.5, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7])
    metric = OnAllRows(lambda p, t: next(values))
    stop = minikeras.EarlyStopping("val_auc", patience=2)
    dfhistory = compiled(metrics_dict={"auc": metric}).fit(
        9, points(20), points(20), callbacks=[stop], verbose=0
    )
    assert list(dfhistory["val_auc"]) == [0.5, 0.9, 0.8, 0.7]


# --- mistakes -------------------------------------------------------------------------------------


def test_on_all_rows_names_the_metric_and_its_arguments_when_the_function_fails():
    X, _ = points(20)
    model = compiled(metrics_dict={"auc": OnAllRows(lambda p, t: {}["missing"])})
    with pytest.raises(KeyError, match="missing") as error:
        model.evaluate((X, torch.zeros(20, 1)))
    assert error.value.__notes__[:2] == [
        "OnAllRows gave the function all rows as NumPy arrays: y_pred ndarray (20, 1) float32, "
        "y_true ndarray (20, 1) float32",
        "metric 'auc', computed at the end of a pass",
    ]


def test_on_all_rows_without_memory_is_not_said_to_be_of_the_last_batch():
    def fail(y_pred, y_true):
        raise MemoryError

    model = compiled(metrics_dict={"auc": OnAllRows(fail)})
    with pytest.raises(MemoryError) as error:
        model.evaluate(points(20))
    assert not any("batch_size" in note for note in error.value.__notes__)


@pytest.mark.parametrize("answer", [None, "0.5", (0.5, 0.25)], ids=str)
def test_on_all_rows_refuses_a_function_that_returns_no_number(answer):
    model = compiled(metrics_dict={"m": OnAllRows(lambda p, t: answer)})
    with pytest.raises(
        ValueError, match=r"metric 'm': its function gave .*; expected a number, or a dict"
    ):
        model.evaluate(points(20))


def test_on_all_rows_refuses_a_function_that_takes_the_labels_first_and_the_remedy_works():
    message = (
        "r2_score takes y_true first, as functions of scikit-learn do, and minikeras calls a "
        "metric with (y_pred, y_true). Pass OnAllRows(lambda y_pred, y_true: r2_score(y_true, "
        "y_pred))."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        OnAllRows(skm.r2_score)
    X, y = points(20)
    model = compiled(
        metrics_dict={"r2": OnAllRows(lambda y_pred, y_true: skm.r2_score(y_true, y_pred))}, lr=0.0
    )
    assert model.evaluate((X, y))["val_r2"] == pytest.approx(skm.r2_score(y, model.predict(X)))


def test_on_all_rows_refuses_a_lambda_that_takes_the_labels_first():
    message = (
        "the function takes y_true first, as functions of scikit-learn do, and minikeras calls a "
        "metric with (y_pred, y_true). Swap its two arguments: lambda y_pred, y_true: ..."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        OnAllRows(lambda y_true, y_pred: skm.r2_score(y_true, y_pred))


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda rows: 0.0, "<lambda>(rows)"),
        (lambda y_pred, y_true, weight: 0.0, "<lambda>(y_pred, y_true, weight)"),
    ],
    ids=["one argument", "three arguments"],
)
def test_on_all_rows_refuses_a_function_that_cannot_be_called_with_two_arguments(function, got):
    message = (
        f"OnAllRows calls its function with two arguments, (y_pred, y_true), got {got}. Pass for "
        "instance OnAllRows(lambda y_pred, y_true: r2_score(y_true, y_pred))."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        OnAllRows(function)


def test_on_all_rows_refuses_what_is_no_function():
    import torchmetrics

    with pytest.raises(
        TypeError, match=re.escape("OnAllRows takes a function of (y_pred, y_true), got 3.")
    ):
        OnAllRows(3)
    with pytest.raises(TypeError, match="got the class L1Loss"):
        OnAllRows(nn.L1Loss)
    with pytest.raises(
        TypeError, match="got a R2Score, an object with update and compute, which sees all rows"
    ):
        OnAllRows(torchmetrics.R2Score())
    message = (
        "OnAllRows takes a function of (y_pred, y_true), got a Transformed. Write it the other way "
        "round: Transformed(OnAllRows(function), y_pred=...)."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        OnAllRows(minikeras.Transformed(skm.r2_score, y_pred=torch.sigmoid))


def test_on_all_rows_refuses_rows_of_different_shapes_when_they_come():
    batches = [(torch.zeros(2, 3), torch.zeros(2, 3)), (torch.zeros(2, 4), torch.zeros(2, 4))]
    net = nn.PReLU()
    model = compiled(minikeras.Model(net), nn.MSELoss(), {"m": OnAllRows(lambda p, t: 0.0)})
    message = (
        "OnAllRows joins the rows of all batches, and this batch is (Tensor (2, 4) float32, Tensor "
        "(2, 4) float32), but the first was (Tensor (2, 3) float32, Tensor (2, 3) float32). Pad "
        "the rows of outputs and labels to one shape; or, to count each token as a row, flatten "
        "them: minikeras.Transformed(minikeras.OnAllRows(function), y_pred=lambda p: p.flatten(0, "
        "1), y_true=lambda t: t.flatten(0, 1))."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        model.evaluate(batches)
    count_tokens = minikeras.Transformed(
        OnAllRows(lambda p, t: float(len(t))),
        y_pred=lambda p: p.flatten(0, 1),
        y_true=lambda t: t.flatten(0, 1),
    )
    model.compile(nn.MSELoss(), metrics_dict={"m": count_tokens}, device="cpu")
    assert model.evaluate(batches)["val_m"] == 14


def test_on_all_rows_works_in_a_scikit_learn_estimator_and_a_custom_step():
    class Own(minikeras.Model):
        def train_step(self, features, labels, sample_weight=None):
            return super().train_step(features, labels, sample_weight)

    X, y = points(40)
    model = compiled(Own(nn.Linear(2, 1)), nn.MSELoss(), {"r2": OnAllRows(SCORES["r2"])}, lr=0.0)
    expected = skm.r2_score(y, model.predict(X))
    assert model.fit(1, (X, y), verbose=0)["r2"].item() == pytest.approx(expected, rel=1e-6)
