"""Any of torchmetrics in metrics_dict gives scikit-learn's value on the whole set."""

import re

import numpy as np
import pytest
import sklearn.metrics as skm
import torch
import torchmetrics
import torchmetrics.classification as tmc
from conftest import compiled, points
from torch import nn

import minikeras

CLASSES = 5
ROWS, BATCH = 101, 32  # the last batch has 5 rows


def wrapped(net, loss_func, metrics_dict):
    """A model that stays as it is: what fit sees is what predict gives."""
    return compiled(minikeras.Model(net).double(), loss_func, metrics_dict, lr=0.0)


def both(model, data):
    """The values of a fit's epoch, of its validation, and of evaluate."""
    dfhistory = model.fit(2, data, data, batch_size=BATCH, verbose=0)
    assert list(dfhistory.iloc[0]) == pytest.approx(list(dfhistory.iloc[1]), rel=1e-6)  # each epoch counts anew
    evaluated = model.evaluate(data, batch_size=BATCH)
    row = dfhistory.iloc[-1]
    return {name: (row[name], row[f"val_{name}"], evaluated[f"val_{name}"]) for name in dfhistory if name[:4] != "val_"}


def assert_near(values, expected):
    assert values == pytest.approx([expected] * 3, rel=1e-6, abs=1e-6)


def macro(function):
    return lambda y, p: function(y, p.argmax(1), average="macro")


def specificity(y, p):
    """Of one class against the rest, the recall of the rest; the mean over the classes."""
    guess = p.argmax(1)
    return np.mean([skm.recall_score(y != one, guess != one) for one in range(CLASSES)])


MULTICLASS = {
    "accuracy": (tmc.MulticlassAccuracy(CLASSES, average="micro"), lambda y, p: skm.accuracy_score(y, p.argmax(1))),
    "balanced_accuracy": (
        tmc.MulticlassAccuracy(CLASSES, average="macro"),
        lambda y, p: skm.balanced_accuracy_score(y, p.argmax(1)),
    ),
    "f1": (tmc.MulticlassF1Score(CLASSES), macro(skm.f1_score)),
    "precision": (tmc.MulticlassPrecision(CLASSES), macro(skm.precision_score)),
    "recall": (tmc.MulticlassRecall(CLASSES), macro(skm.recall_score)),
    "specificity": (tmc.MulticlassSpecificity(CLASSES), specificity),
    "mcc": (tmc.MulticlassMatthewsCorrCoef(CLASSES), lambda y, p: skm.matthews_corrcoef(y, p.argmax(1))),
    "kappa": (tmc.MulticlassCohenKappa(CLASSES), lambda y, p: skm.cohen_kappa_score(y, p.argmax(1))),
    "auroc": (tmc.MulticlassAUROC(CLASSES), lambda y, p: skm.roc_auc_score(y, p, multi_class="ovr")),
    "average_precision": (
        tmc.MulticlassAveragePrecision(CLASSES),
        lambda y, p: skm.average_precision_score(np.eye(CLASSES)[y], p),
    ),
}


@pytest.fixture(scope="module")
def classified():
    """A classifier's values of all those metrics at once, its labels, and the probabilities it gives."""
    torch.manual_seed(1)
    X = torch.randn(ROWS, 4, dtype=torch.float64)
    y = (X[:, 0] * 1.5 + torch.randn(ROWS) + 2).long().clamp(0, CLASSES - 1)
    model = wrapped(nn.Linear(4, CLASSES), nn.CrossEntropyLoss(), {name: m for name, (m, _) in MULTICLASS.items()})
    return both(model, (X, y)), y.numpy(), model.predict(X).softmax(1).numpy()


@pytest.mark.parametrize("name", MULTICLASS)
def test_a_metric_of_classes_is_scikit_learns_on_the_whole_set(name, classified):
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
    model = wrapped(net, nn.MSELoss(), {name: metric.set_dtype(torch.float64) for name, (metric, _) in NUMBERS.items()})
    return both(model, (X, y)), y.numpy(), model.predict(X).numpy()


@pytest.mark.parametrize("name", NUMBERS)
def test_a_metric_of_numbers_is_scikit_learns_on_the_whole_set(name, estimated):
    values, y, p = estimated
    assert_near(values[name], NUMBERS[name][1](y, p))


def summed(y_pred, y_true):
    """The loss of all tokens, and how many they are."""
    flat = y_pred.flatten(0, 1), y_true.flatten()
    return minikeras.Average(nn.functional.cross_entropy(*flat, reduction="sum"), (y_true != -100).sum())


def test_perplexity_is_that_of_all_tokens_without_the_padding():
    tokens = torch.randint(0, 7, (ROWS, 6))
    labels = torch.where(torch.rand(ROWS, 6) < 0.3, -100, torch.randint(0, 7, (ROWS, 6)))
    model = wrapped(
        nn.Embedding(7, 7),
        summed,
        {"perplexity": torchmetrics.text.Perplexity(ignore_index=-100)},
    )
    p, kept = model.predict(tokens).softmax(-1).numpy(), labels.numpy() != -100
    expected = np.exp(skm.log_loss(labels.numpy()[kept], p[kept], labels=range(7)))
    assert_near(both(model, (tokens, labels))["perplexity"], expected)


# --- collections ------------------------------------------------------------------------------------------------------


def scores(**kwargs):
    """Of one group for torchmetrics, which then counts once for all of them."""
    return torchmetrics.MetricCollection([tmc.BinaryPrecision(), tmc.BinaryRecall(), tmc.BinaryF1Score()], **kwargs)


def spread_out(metrics_dict):
    """A model that stays as it is and says yes to half of them."""
    model = compiled(metrics_dict=metrics_dict, lr=0.0)
    with torch.no_grad():
        outputs = model.predict(points(ROWS)[0])
        model.fc2.bias.sub_(outputs.logit().median())
    return model


def expected_scores(model, X, y):
    truth, guess = y.numpy(), model.predict(X).numpy() > 0.5
    assert 0.2 < guess.mean() < 0.8
    return [function(truth, guess) for function in (skm.precision_score, skm.recall_score, skm.f1_score)]


def test_a_collection_is_a_column_for_each_member_under_its_own_name():
    X, y = points(ROWS)
    model = spread_out({"scores": scores(), "mae": nn.L1Loss()})
    dfhistory = model.fit(2, (X, y), (X, y), batch_size=BATCH, verbose=0)
    names = ["BinaryPrecision", "BinaryRecall", "BinaryF1Score"]
    assert list(dfhistory)[:5] == ["loss", *names, "mae"]
    for prefix in ("", "val_"):
        assert list(dfhistory[[prefix + name for name in names]].iloc[-1]) == pytest.approx(
            expected_scores(model, X, y)
        )


def test_a_collections_own_names_and_its_prefix_are_in_the_columns():
    named = torchmetrics.MetricCollection({"f1": tmc.BinaryF1Score(), "auroc": tmc.BinaryAUROC()}, prefix="ring_")
    dfhistory = compiled(metrics_dict={"all": named}).fit(1, points(20), verbose=0)
    assert list(dfhistory) == ["loss", "ring_auroc", "ring_f1"]


def test_two_metrics_of_one_name_are_refused_with_what_to_do():
    message = (
        "metrics_dict gives two metrics the name 'BinaryF1Score': a MetricCollection has a column for each of its "
        'members, under their own names. Give it a prefix: MetricCollection(..., prefix="scores_").'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        compiled(metrics_dict={"BinaryF1Score": tmc.BinaryF1Score(), "scores": scores()})


def test_a_members_name_that_history_uses_itself_is_refused():
    with pytest.raises(ValueError, match="metrics_dict has the name 'loss'"):
        compiled(metrics_dict={"all": torchmetrics.MetricCollection({"loss": torchmetrics.MeanSquaredError()})})


def test_the_users_own_collection_is_left_alone():
    collection = scores()
    compiled(metrics_dict={"scores": collection}).fit(1, points(20), points(10), verbose=0)
    assert not any(metric.update_called for metric in collection.values())


@pytest.mark.gpu
def test_a_collection_follows_the_model_to_the_accelerator():
    X, y = points(ROWS)
    model = spread_out({"scores": scores()})
    model.compile(nn.BCELoss(), model.optimizer, {"scores": scores()})
    found = model.evaluate((X, y), batch_size=BATCH)
    values = [found[f"val_Binary{name}"] for name in ("Precision", "Recall", "F1Score")]
    assert values == pytest.approx(expected_scores(model, X, y))


def test_a_metric_that_needs_several_rows_takes_them_one_by_one():
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


def test_a_metric_that_has_too_few_rows_at_the_end_says_so():
    X, y = points(1)
    model = compiled(loss_func=nn.MSELoss(), metrics_dict={"r2": torchmetrics.R2Score()})
    with pytest.raises(ValueError, match="Needs at least two samples to calculate r2 score"):
        model.evaluate((X, y))
