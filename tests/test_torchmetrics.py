"""Metrics of torchmetrics give scikit-learn's value on the whole set."""

import re

import numpy as np
import pytest
import sklearn.metrics as skm
import torch
import torchmetrics
import torchmetrics.classification as tmc
import torchmetrics.clustering as tmcluster
import torchmetrics.nominal as tmnominal
from helpers.models import compiled, points
from torch import nn

import minikeras
from minikeras.columns import find_columns

CLASSES = 5
# the last batch has 5 rows
ROWS = 101
BATCH = 32


def wrapped(net, loss_func, metrics_dict):
    """A model that stays as it is: what fit sees is what predict gives."""
    return compiled(minikeras.Model(net).double(), loss_func, metrics_dict, lr=0.0)


def both(model, data):
    """The values of a fit's epoch, of its validation, and of evaluate."""
    dfhistory = model.fit(2, data, data, batch_size=BATCH, verbose=0)
    # each epoch counts anew
    assert list(dfhistory.iloc[0]) == pytest.approx(list(dfhistory.iloc[1]), rel=1e-6)
    evaluated = model.evaluate(data, batch_size=BATCH)
    row = dfhistory.iloc[-1]
    return {
        name: (row[name], row[f"val_{name}"], evaluated[f"val_{name}"])
        for name in dfhistory
        if name[:4] != "val_"
    }


def assert_near(values, expected):
    assert values == pytest.approx([expected] * 3, rel=1e-6, abs=1e-6)


def macro(function):
    return lambda y, p: function(y, p.argmax(1), average="macro")


def specificity(y, p):
    """Of one class against the rest, the recall of the rest; the mean over the classes."""
    guess = p.argmax(1)
    return np.mean([skm.recall_score(y != label, guess != label) for label in range(CLASSES)])


MULTICLASS = {
    "accuracy": (
        tmc.MulticlassAccuracy(CLASSES, average="micro"),
        lambda y, p: skm.accuracy_score(y, p.argmax(1)),
    ),
    "balanced_accuracy": (
        tmc.MulticlassAccuracy(CLASSES, average="macro"),
        lambda y, p: skm.balanced_accuracy_score(y, p.argmax(1)),
    ),
    "f1": (tmc.MulticlassF1Score(CLASSES), macro(skm.f1_score)),
    "precision": (tmc.MulticlassPrecision(CLASSES), macro(skm.precision_score)),
    "recall": (tmc.MulticlassRecall(CLASSES), macro(skm.recall_score)),
    "specificity": (tmc.MulticlassSpecificity(CLASSES), specificity),
    "mcc": (
        tmc.MulticlassMatthewsCorrCoef(CLASSES),
        lambda y, p: skm.matthews_corrcoef(y, p.argmax(1)),
    ),
    "kappa": (
        tmc.MulticlassCohenKappa(CLASSES),
        lambda y, p: skm.cohen_kappa_score(y, p.argmax(1)),
    ),
    "auroc": (
        tmc.MulticlassAUROC(CLASSES),
        lambda y, p: skm.roc_auc_score(y, p, multi_class="ovr"),
    ),
    "average_precision": (
        tmc.MulticlassAveragePrecision(CLASSES),
        lambda y, p: skm.average_precision_score(np.eye(CLASSES)[y], p),
    ),
}


@pytest.fixture(scope="module")
def classified():
    """Return a classifier's values of all those metrics, its labels and its probabilities."""
    torch.manual_seed(1)
    X = torch.randn(ROWS, 4, dtype=torch.float64)
    y = (X[:, 0] * 1.5 + torch.randn(ROWS) + 2).long().clamp(0, CLASSES - 1)
    net = nn.Sequential(nn.Linear(4, CLASSES), nn.Softmax(1))
    model = wrapped(net, log_loss, {name: metric for name, (metric, _) in MULTICLASS.items()})
    return both(model, (X, y)), y.numpy(), model.predict(X).numpy()


def log_loss(y_pred, y_true):
    return nn.functional.nll_loss(y_pred.log(), y_true)


@pytest.mark.parametrize("name", MULTICLASS)
def test_torchmetrics_of_classes_are_scikit_learns_on_the_whole_set(name, classified):
    values, y, p = classified
    assert_near(values[name], MULTICLASS[name][1](y, p))


NUMBERS = {
    "mae": (torchmetrics.MeanAbsoluteError(), skm.mean_absolute_error),
    "mse": (torchmetrics.MeanSquaredError(), skm.mean_squared_error),
    "rmse": (torchmetrics.MeanSquaredError(squared=False), skm.root_mean_squared_error),
    "r2": (torchmetrics.R2Score(), skm.r2_score),
    "explained": (torchmetrics.ExplainedVariance(), skm.explained_variance_score),
}


@pytest.fixture(scope="module")
def estimated():
    torch.manual_seed(1)
    X = torch.randn(ROWS, 3, dtype=torch.float64)
    y = X.sum(1, keepdim=True) + 3 + torch.randn(ROWS, 1)
    net = nn.Linear(3, 1)
    with torch.no_grad():
        net.weight.fill_(0.9)
        net.bias.fill_(2.9)
    model = wrapped(
        net,
        nn.MSELoss(),
        {name: metric.set_dtype(torch.float64) for name, (metric, _) in NUMBERS.items()},
    )
    return both(model, (X, y)), y.numpy(), model.predict(X).numpy()


@pytest.mark.parametrize("name", NUMBERS)
def test_torchmetrics_of_numbers_are_scikit_learns_on_the_whole_set(name, estimated):
    values, y, p = estimated
    assert_near(values[name], NUMBERS[name][1](y, p))


def summed(y_pred, y_true):
    """The loss of all tokens, and how many they are."""
    flat = y_pred.flatten(0, 1), y_true.flatten()
    return minikeras.Average(
        nn.functional.cross_entropy(*flat, reduction="sum"), (y_true != -100).sum()
    )


def test_torchmetrics_perplexity_is_that_of_all_tokens_without_the_padding():
    tokens = torch.randint(0, 7, (ROWS, 6))
    labels = torch.where(torch.rand(ROWS, 6) < 0.3, -100, torch.randint(0, 7, (ROWS, 6)))
    model = wrapped(
        nn.Embedding(7, 7),
        summed,
        {"perplexity": torchmetrics.text.Perplexity(ignore_index=-100)},
    )
    p = model.predict(tokens).softmax(-1).numpy()
    kept = labels.numpy() != -100
    expected = np.exp(skm.log_loss(labels.numpy()[kept], p[kept], labels=range(7)))
    assert_near(both(model, (tokens, labels))["perplexity"], expected)


# --- collections ----------------------------------------------------------------------------------


def scores(**kwargs):
    """Of one group for torchmetrics, which then counts once for all of them."""
    return torchmetrics.MetricCollection(
        [tmc.BinaryPrecision(), tmc.BinaryRecall(), tmc.BinaryF1Score()], **kwargs
    )


def spread_out(metrics_dict):
    """A model that stays as it is and says yes to half of them."""
    model = compiled(metrics_dict=metrics_dict, lr=0.0)
    with torch.no_grad():
        outputs = model.predict(points(ROWS)[0])
        model.fc2.bias.sub_(outputs.logit().median())
    return model


def expected_scores(model, X, y):
    truth = y.numpy()
    guess = model.predict(X).numpy() > 0.5
    assert 0.2 < guess.mean() < 0.8
    return [
        function(truth, guess) for function in (skm.precision_score, skm.recall_score, skm.f1_score)
    ]


def test_metric_collection_has_a_column_for_each_member_under_its_own_name():
    X, y = points(ROWS)
    model = spread_out({"scores": scores(), "mae": nn.L1Loss()})
    dfhistory = model.fit(2, (X, y), (X, y), batch_size=BATCH, verbose=0)
    names = ["BinaryPrecision", "BinaryRecall", "BinaryF1Score"]
    assert list(dfhistory)[:5] == ["loss", *names, "mae"]
    for prefix in ("", "val_"):
        assert list(dfhistory[[prefix + name for name in names]].iloc[-1]) == pytest.approx(
            expected_scores(model, X, y)
        )


def test_metric_collection_has_its_own_names_and_prefix_in_the_columns():
    named = torchmetrics.MetricCollection(
        {"f1": tmc.BinaryF1Score(), "auroc": tmc.BinaryAUROC()}, prefix="ring_"
    )
    dfhistory = compiled(metrics_dict={"all": named}).fit(1, points(20), verbose=0)
    assert list(dfhistory) == ["loss", "ring_auroc", "ring_f1"]


def test_metric_collection_with_two_metrics_of_one_name_is_refused_with_what_to_do():
    message = (
        "metrics_dict gives two metrics the name 'BinaryF1Score': a MetricCollection has a column "
        "for each of its "
        'members, under their own names. Give it a prefix: MetricCollection(..., prefix="scores_").'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        compiled(metrics_dict={"BinaryF1Score": tmc.BinaryF1Score(), "scores": scores()})


def test_metric_collection_with_a_name_that_history_uses_is_refused():
    with pytest.raises(ValueError, match="metrics_dict has the name 'loss'"):
        compiled(
            metrics_dict={
                "all": torchmetrics.MetricCollection({"loss": torchmetrics.MeanSquaredError()})
            }
        )


def test_metric_collection_of_the_user_is_left_alone():
    collection = scores()
    compiled(metrics_dict={"scores": collection}).fit(1, points(20), points(10), verbose=0)
    assert not any(metric.update_called for metric in collection.values())


@pytest.mark.gpu
def test_metric_collection_follows_the_model_to_the_accelerator():
    X, y = points(ROWS)
    model = spread_out({"scores": scores()})
    model.compile(nn.BCELoss(), model.optimizer, {"scores": scores()})
    found = model.evaluate((X, y), batch_size=BATCH)
    values = [found[f"val_Binary{name}"] for name in ("Precision", "Recall", "F1Score")]
    assert values == pytest.approx(expected_scores(model, X, y))


def test_torchmetrics_that_need_several_rows_take_them_one_by_one():
    X, y = points(12)
    model = compiled(loss_func=nn.MSELoss(), metrics_dict={"r2": torchmetrics.R2Score()}, lr=0.0)
    expected = skm.r2_score(y.numpy(), model.predict(X).numpy())
    assert model.evaluate((X, y), batch_size=1)["val_r2"] == pytest.approx(expected, rel=1e-5)
    seen = []
    listen = minikeras.LambdaCallback(on_batch_end=lambda step, logs: seen.append(logs["r2"]))
    dfhistory = model.fit(1, (X, y), batch_size=1, callbacks=[listen], verbose=2, log_step_freq=1)
    assert dfhistory["r2"].item() == pytest.approx(expected, rel=1e-5)
    assert np.isnan(seen[0])
    assert seen[-1] == pytest.approx(expected, rel=1e-5)


def test_torchmetrics_with_too_few_rows_at_the_end_raise_an_error():
    X, y = points(1)
    model = compiled(loss_func=nn.MSELoss(), metrics_dict={"r2": torchmetrics.R2Score()})
    with pytest.raises(ValueError, match="Needs at least two samples to calculate r2 score"):
        model.evaluate((X, y))


# --- several values, and every kind of object -----------------------------------------------------


def classifier(metrics_dict):
    """A model of probabilities that stays as it is, its data, its predictions and its labels."""
    torch.manual_seed(1)
    X = torch.randn(ROWS, 4, dtype=torch.float64)
    y = (X[:, 0] * 1.5 + torch.randn(ROWS) + 2).long().clamp(0, CLASSES - 1)
    model = wrapped(nn.Sequential(nn.Linear(4, CLASSES), nn.Softmax(1)), log_loss, metrics_dict)
    return model, (X, y), model.predict(X).numpy(), y.numpy()


def test_torchmetrics_value_per_class_is_a_column_per_class():
    metric = tmc.MulticlassF1Score(CLASSES, average=None)
    names = [f"class {number}" for number in range(CLASSES)]
    wrapper = torchmetrics.ClasswiseWrapper(
        tmc.MulticlassF1Score(CLASSES, average=None), labels=names
    )
    model, data, p, y = classifier({"f1": metric, "named": wrapper})
    values = both(model, data)
    for number, expected in enumerate(skm.f1_score(y, p.argmax(1), average=None)):
        assert_near(values[f"f1_{number}"], expected)
        assert_near(values[f"named_multiclassf1score_class {number}"], expected)
    assert len(values) == 1 + 2 * CLASSES


def test_torchmetrics_confusion_matrix_is_a_column_for_each_cell():
    model, data, p, y = classifier({"cells": tmc.MulticlassConfusionMatrix(CLASSES)})
    values = both(model, data)
    expected = skm.confusion_matrix(y, p.argmax(1))
    for row in range(CLASSES):
        for column in range(CLASSES):
            assert_near(values[f"cells_{row}_{column}"], expected[row, column])


def test_metric_collection_members_may_return_several_values():
    members = {
        "f1": tmc.MulticlassF1Score(CLASSES, average=None),
        "top": tmc.MulticlassAccuracy(CLASSES, average="micro"),
    }
    model, data, p, y = classifier({"all": torchmetrics.MetricCollection(members, prefix="my_")})
    values = both(model, data)
    assert list(values) == ["loss", *(f"my_f1_{number}" for number in range(CLASSES)), "my_top"]
    assert_near(values["my_top"], skm.accuracy_score(y, p.argmax(1)))
    assert_near(values["my_f1_2"], skm.f1_score(y, p.argmax(1), average=None)[2])


def two_targets(metrics_dict):
    torch.manual_seed(1)
    X = torch.randn(ROWS, 3, dtype=torch.float64)
    y = X[:, :2] + torch.randn(ROWS, 2)
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(torch.eye(2, 3))
        net.bias.zero_()
    return wrapped(net, nn.MSELoss(), metrics_dict), (X, y)


def test_torchmetrics_raw_values_of_several_targets_are_a_column_each():
    metric = torchmetrics.R2Score(multioutput="raw_values").set_dtype(torch.float64)
    model, data = two_targets({"r2": metric})
    values = both(model, data)
    for number, expected in enumerate(
        skm.r2_score(data[1], model.predict(data[0]), multioutput="raw_values")
    ):
        assert_near(values[f"r2_{number}"], expected)


BINARY = {
    "accuracy": tmc.BinaryAccuracy,
    "f1": tmc.BinaryF1Score,
    "fbeta": lambda: tmc.BinaryFBetaScore(2.0),
    "precision": tmc.BinaryPrecision,
    "recall": tmc.BinaryRecall,
    "specificity": tmc.BinarySpecificity,
    "hamming": tmc.BinaryHammingDistance,
    "jaccard": tmc.BinaryJaccardIndex,
    "kappa": tmc.BinaryCohenKappa,
    "mcc": tmc.BinaryMatthewsCorrCoef,
    "auroc": tmc.BinaryAUROC,
    "auroc in bins": lambda: tmc.BinaryAUROC(thresholds=20),
    "average precision": tmc.BinaryAveragePrecision,
    "calibration": tmc.BinaryCalibrationError,
    "hinge": tmc.BinaryHingeLoss,
    "stat scores": tmc.BinaryStatScores,
    "confusion matrix": tmc.BinaryConfusionMatrix,
}
VALUES = {
    "mae": torchmetrics.MeanAbsoluteError,
    "mse": torchmetrics.MeanSquaredError,
    "rmse": lambda: torchmetrics.MeanSquaredError(squared=False),
    "mape": torchmetrics.MeanAbsolutePercentageError,
    "smape": torchmetrics.SymmetricMeanAbsolutePercentageError,
    "r2": torchmetrics.R2Score,
    "explained variance": torchmetrics.ExplainedVariance,
    "pearson": torchmetrics.PearsonCorrCoef,
    "spearman": torchmetrics.SpearmanCorrCoef,
    "kendall": torchmetrics.KendallRankCorrCoef,
    "concordance": torchmetrics.ConcordanceCorrCoef,
    "relative": torchmetrics.RelativeSquaredError,
    "minkowski": lambda: torchmetrics.MinkowskiDistance(3),
    "log cosh": torchmetrics.LogCoshError,
    "tweedie": torchmetrics.TweedieDevianceScore,
    "bounds": lambda: torchmetrics.MinMaxMetric(torchmetrics.MeanAbsoluteError()),
}
CLASS_NUMBERS = {
    "cramers": lambda: tmnominal.CramersV(2, bias_correction=False),
    "tschuprows": lambda: tmnominal.TschuprowsT(2, bias_correction=False),
    "theils": lambda: tmnominal.TheilsU(2),
    "rand": tmcluster.RandScore,
    "mutual information": tmcluster.MutualInfoScore,
}


class Column(nn.Module):
    """The first feature as the prediction."""

    def __init__(self, change):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.change = change

    def forward(self, x):
        return self.change(x[:, 0] + 0 * self.weight)


def whole(metric, y_pred, y_true):
    """Return torchmetrics's value of all rows in one update, as columns of a history."""
    metric.update(y_pred, y_true)
    return find_columns("m", metric.compute())


# theirs
@pytest.mark.filterwarnings(
    "ignore:Metric `SpearmanCorrcoef` will save", "ignore:Sparse invariant checks"
)
@pytest.mark.parametrize(
    ("metric", "change", "label"),
    [
        *(
            pytest.param(metric, torch.sigmoid, "class", id=f"binary {name}")
            for name, metric in BINARY.items()
        ),
        *(
            pytest.param(metric, lambda x: x, "number", id=f"number {name}")
            for name, metric in VALUES.items()
        ),
        *(
            pytest.param(metric, lambda x: (x > 0).long(), "class", id=name)
            for name, metric in CLASS_NUMBERS.items()
        ),
    ],
)
def test_torchmetrics_object_gives_its_value_of_all_rows_in_one_update(metric, change, label):
    X = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(3))
    y = X[:, 0] + X[:, 1]
    if label == "class":
        y = (y > 0).long()
    model = minikeras.Model(Column(change))
    compiled(model, lambda y_pred, y_true: model.net.weight * 1.0, {"m": metric()}, lr=0.0)
    expected = whole(metric(), model.predict(X), y)
    values = both(model, (X, y))
    assert list(values) == ["loss", *expected]
    for name, value in expected.items():
        assert values[name] == pytest.approx([value] * 3, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "metric", [torchmetrics.MeanMetric(), torchmetrics.SumMetric(), torchmetrics.MaxMetric()]
)
def test_torchmetrics_aggregator_takes_what_its_subclass_gives_it(metric):
    class OfOutputs(type(metric)):
        def update(self, y_pred, y_true):
            super().update(y_pred)

    X, y = points(ROWS)
    model = compiled(metrics_dict={"m": OfOutputs()}, lr=0.0)
    p = model.predict(X).numpy()
    expected = {"MeanMetric": p.mean(), "SumMetric": p.sum(), "MaxMetric": p.max()}[
        type(metric).__name__
    ]
    assert model.evaluate((X, y), batch_size=BATCH)["val_m"] == pytest.approx(expected, rel=1e-5)


# --- raw scores -----------------------------------------------------------------------------------


def scored(metrics_dict, rows=ROWS):
    """A model of raw scores, and data whose last row scores between 0 and 1."""
    torch.manual_seed(0)
    X = torch.randn(rows, 1)
    X = X[(X[:, 0] - 0.25).abs().argsort(descending=True)]
    y = (X + 0.5 * torch.randn(rows, 1) > 0).float()
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.zero_()
    return compiled(minikeras.Model(net), nn.BCEWithLogitsLoss(), metrics_dict, lr=0.0), (X, y)


def test_torchmetrics_with_raw_scores_warn_with_a_remedy():
    model, data = scored({"f1": tmc.BinaryF1Score()})
    lowest = data[0].min().item()
    highest = data[0].max().item()
    said = (
        f"metric 'f1': the outputs are raw scores, from {lowest:.4g} to {highest:.4g}. "
        "BinaryF1Score applies a sigmoid to a batch only if a score in it is below 0 or above 1, "
        "and takes any other batch for probabilities, so the value may depend on batch_size. Give "
        "it probabilities in each batch: minikeras.Transformed(BinaryF1Score(...), "
        "y_pred=torch.sigmoid)."
    )
    with pytest.warns(UserWarning, match="raw scores") as caught:
        model.fit(1, [data], [data], verbose=0)
    assert [str(warning.message) for warning in caught] == [said]
    model.evaluate(data, batch_size=BATCH)  # it is not told twice


def test_torchmetrics_remedies_for_raw_scores_give_scikit_learns_value_at_any_batch_size():
    model, (X, y) = scored(
        {
            "f1": minikeras.Transformed(tmc.BinaryF1Score(), y_pred=torch.sigmoid),
            "auroc": minikeras.Transformed(tmc.BinaryAUROC(), torch.sigmoid, torch.Tensor.long),
            "also f1": minikeras.OnAllRows(lambda y_pred, y_true: skm.f1_score(y_true, y_pred > 0)),
            "also auroc": minikeras.OnAllRows(
                lambda y_pred, y_true: skm.roc_auc_score(y_true, y_pred)
            ),
        }
    )
    f1 = skm.f1_score(y, X > 0)
    auroc = skm.roc_auc_score(y, X)
    for batch_size in (1, 4, BATCH, ROWS):
        found = model.evaluate((X, y), batch_size=batch_size)
        values = [found[f"val_{name}"] for name in ("f1", "auroc", "also f1", "also auroc")]
        assert values == pytest.approx([f1, auroc, f1, auroc], rel=1e-5)
    probabilities = compiled(
        minikeras.Model(nn.Sequential(model.net, nn.Sigmoid())),
        nn.BCELoss(),
        {"f1": tmc.BinaryF1Score()},
    )
    assert probabilities.evaluate((X, y), batch_size=1)["val_f1"] == pytest.approx(f1, rel=1e-5)


def test_torchmetrics_with_raw_scores_of_several_classes_warn_if_more_than_the_highest_counts():
    X = torch.randn(ROWS, 3)
    y = torch.randint(0, 3, (ROWS,))
    metrics = {"f1": tmc.MulticlassF1Score(3), "auroc": tmc.MulticlassAUROC(3)}
    model = compiled(minikeras.Model(nn.Linear(3, 3)), nn.CrossEntropyLoss(), metrics)
    with pytest.warns(UserWarning, match="raw scores") as caught:
        model.evaluate((X, y))
    assert len(caught) == 1
    assert str(caught[0].message).startswith("metric 'auroc'")
    assert "y_pred.softmax(1)" in str(caught[0].message)


def test_torchmetrics_with_probabilities_or_class_numbers_do_not_warn():
    model = compiled(metrics_dict={"f1": tmc.BinaryF1Score(), "auroc": tmc.BinaryAUROC()})
    model.fit(1, points(ROWS), points(ROWS), verbose=0)
