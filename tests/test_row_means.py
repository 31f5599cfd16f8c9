"""A metric function that is not a mean over rows causes one warning; a mean never does."""

import copy
import dataclasses
import functools
import random
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import sklearn.metrics as skm
import torch
import torch.nn.functional as F
import torchmetrics.functional as tmf
from helpers.compare import assert_same_weights
from helpers.metrics import r2
from helpers.models import compiled, points
from torch import nn

import minikeras
from minikeras.nests import take_apart


class Same(nn.Module):
    """Outputs are the features: the data say what the predictions are."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.weight


def given(function, **kwargs):
    """A model whose only metric is that function, and whose loss is a mean of anything."""

    def loss_func(y_pred, y_true):
        first = y_pred[0] if isinstance(y_pred, tuple) else y_pred
        return (first * 0).mean()

    return compiled(minikeras.Model(Same()), loss_func, {"m": function}, **kwargs)


def warned(call):
    """The names of metrics that a call warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert {type(warning.message) for warning in caught} <= {UserWarning}
    said = [str(warning.message) for warning in caught]
    assert all("gives another number if a batch is split" in message for message in said), said
    return [message.split("'")[1] for message in said]


# --- data: predictions and labels -----------------------------------------------------------------


def binary(rows, generator):
    scores = 1.5 * torch.randn(rows, 1, generator=generator)
    labels = ((scores + torch.randn(rows, 1, generator=generator)) > 0).float()
    return scores.sigmoid(), labels


def logits(rows, generator):
    probabilities, labels = binary(rows, generator)
    return probabilities.logit(), labels


def numbers(rows, generator):
    labels = torch.randn(rows, 1, generator=generator)
    return labels + 0.5 * torch.randn(rows, 1, generator=generator), labels


def prices(rows, generator):
    predictions, labels = numbers(rows, generator)
    return 3e5 + 1e5 * predictions, 3e5 + 1e5 * labels


def classes(rows, generator):
    labels = torch.randint(0, 5, (rows,), generator=generator)
    return torch.randn(rows, 5, generator=generator) + F.one_hot(labels, 5), labels


def images(rows, generator):
    labels = (
        torch.rand(rows, 1, 6, 6, generator=generator)
        > torch.rand(rows, 1, 1, 1, generator=generator)
    ).float()
    noise = torch.rand(rows, 1, 1, 1, generator=generator) * torch.randn(
        rows, 1, 6, 6, generator=generator
    )
    return (2 * labels - 1 + 2 * noise).sigmoid(), labels


def vectors(rows, generator):
    labels = torch.randn(rows, 8, generator=generator)
    return labels + torch.randn(rows, 8, generator=generator), labels


def tokens(rows, generator):
    labels = torch.randint(0, 7, (rows, 6), generator=generator)
    lengths = torch.randint(1, 7, (rows, 1), generator=generator)
    labels = torch.where(torch.arange(6) < lengths, labels, -100)
    return torch.randn(rows, 7, 6, generator=generator), labels


def right(y_pred, y_true):
    return (y_pred > 0.5) == (y_true > 0.5)


def overlap(y_pred, y_true):
    both = ((y_pred > 0.5) & (y_true > 0.5)).flatten(1).sum(1)
    either = ((y_pred > 0.5) | (y_true > 0.5)).flatten(1).sum(1)
    return both, either


def centered(values):
    return values - values.mean(1, keepdim=True)


MEANS = {
    "accuracy": (binary, lambda p, t: right(p, t).float().mean()),
    "accuracy as a Python number": (binary, lambda p, t: right(p, t).float().mean().item()),
    "accuracy in percent, rounded": (
        binary,
        lambda p, t: round(100 * right(p, t).float().mean().item(), 2),
    ),
    "accuracy to three digits": (binary, lambda p, t: round(right(p, t).float().mean().item(), 3)),
    "accuracy in percent to one digit": (
        binary,
        lambda p, t: round(100 * right(p, t).float().mean().item(), 1),
    ),
    "accuracy rounded in torch": (
        binary,
        lambda p, t: right(p, t).float().mean().round(decimals=3),
    ),
    "a percentage over a hundred": (
        binary,
        lambda p, t: round(100 * right(p, t).float().mean().item(), 1) / 100,
    ),
    "accuracy of scikit-learn": (classes, lambda p, t: skm.accuracy_score(t, p.argmax(1))),
    "error rate in float64": (binary, lambda p, t: (~right(p, t)).double().mean()),
    "share of positives": (binary, lambda p, t: (p > 0.5).float().mean()),
    "BCE": (binary, nn.BCELoss()),
    "BCE of scores": (logits, nn.BCEWithLogitsLoss()),
    "hinge": (logits, lambda p, t: (1 - (2 * t - 1) * p).clamp(min=0).mean()),
    "Brier": (binary, lambda p, t: ((p - t) ** 2).mean()),
    "MSE": (numbers, nn.MSELoss()),
    "MAE": (numbers, nn.L1Loss()),
    "MAE in NumPy": (numbers, lambda p, t: np.abs(p.numpy() - t.numpy()).mean()),
    "MAE by a loop": (
        numbers,
        lambda p, t: sum(abs(a - b).item() for a, b in zip(p, t, strict=True)) / len(t),
    ),
    "Huber": (numbers, nn.HuberLoss()),
    "bias": (numbers, lambda p, t: p.mean() - t.mean()),
    "quantile loss": (numbers, lambda p, t: torch.maximum(0.9 * (t - p), 0.1 * (p - t)).mean()),
    "share within 0.1": (numbers, lambda p, t: ((p - t).abs() < 0.1).float().mean()),
    "only where labels are positive, of all rows": (
        numbers,
        lambda p, t: ((p - t).abs() * (t > 0)).mean(),
    ),
    "MAE of large numbers": (prices, nn.L1Loss()),
    "MSE of large numbers": (prices, nn.MSELoss()),
    "bias of large numbers": (prices, lambda p, t: p.mean() - t.mean()),
    "MAPE": (prices, lambda p, t: ((p - t) / t).abs().mean()),
    "MSLE": (
        prices,
        lambda p, t: (torch.log1p(p.clamp(0)) - torch.log1p(t.clamp(0))).pow(2).mean(),
    ),
    "cross entropy": (classes, nn.CrossEntropyLoss()),
    "smoothed cross entropy": (classes, nn.CrossEntropyLoss(label_smoothing=0.1)),
    "focal loss": (logits, minikeras.FocalLoss(from_logits=True)),
    "top 1": (classes, lambda p, t: (p.argmax(1) == t).float().mean()),
    "top 2": (classes, lambda p, t: (p.topk(2).indices == t[:, None]).any(1).float().mean()),
    "reciprocal rank": (
        classes,
        lambda p, t: (1 / (1 + (p > p.gather(1, t[:, None])).sum(1))).mean(),
    ),
    "confidence": (classes, lambda p, t: p.softmax(1).max(1).values.mean()),
    "KL": (vectors, lambda p, t: F.kl_div(p.log_softmax(1), t.softmax(1), reduction="batchmean")),
    "cosine similarity": (vectors, lambda p, t: F.cosine_similarity(p, t).mean()),
    "cosine distance near 0": (vectors, lambda p, t: 1 - F.cosine_similarity(t, 1.0001 * t).mean()),
    "norm of each row": (vectors, lambda p, t: (p - t).norm(dim=1).mean()),
    "RMSE of each row": (vectors, lambda p, t: ((p - t) ** 2).mean(1).sqrt().mean()),
    "correlation of each row": (
        vectors,
        lambda p, t: F.cosine_similarity(centered(p), centered(t)).mean(),
    ),
    "all labels of a row": (vectors, lambda p, t: ((p > 0) == (t > 0)).all(1).float().mean()),
    "IoU of each row": (images, lambda p, t: (overlap(p, t)[0] / overlap(p, t)[1].clamp(1)).mean()),
    "PSNR of each row": (
        images,
        lambda p, t: (-10 * ((p - t) ** 2).flatten(1).mean(1).log10()).mean(),
    ),
    "accuracy of pixels": (images, lambda p, t: right(p, t).float().mean()),
    "accuracy of each row's tokens": (
        tokens,
        lambda p, t: (((p.argmax(1) == t) & (t >= 0)).sum(1) / (t >= 0).sum(1)).mean(),
    ),
    "a constant": (numbers, lambda p, t: 3.0),
    "half precision inside": (numbers, lambda p, t: (p.half() - t.half()).abs().mean()),
    "an Average": (
        tokens,
        lambda p, t: minikeras.Average(F.cross_entropy(p, t, reduction="sum"), (t >= 0).sum()),
    ),
}


@pytest.mark.parametrize(("data", "function"), MEANS.values(), ids=MEANS)
def test_metric_that_is_a_mean_over_rows_is_never_warned_of(data, function):
    for rows in (4, 5, 16, 33, 128):
        for seed in range(3):
            generator = torch.Generator().manual_seed(100 * seed + rows)
            X, y = data(rows, generator)
            order = torch.randperm(rows, generator=generator)
            assert (
                warned(lambda X=X[order], y=y[order]: given(function).evaluate([(X, y)])) == []
            ), (rows, seed)


def rmse(y_pred, y_true):
    return ((y_pred - y_true) ** 2).mean().sqrt()


def f1(y_pred, y_true):
    found = ((y_pred > 0.5) & (y_true > 0.5)).sum()
    return 2 * found / ((y_pred > 0.5).sum() + (y_true > 0.5).sum())


def auc(y_pred, y_true):
    positive = y_pred[y_true > 0.5]
    negative = y_pred[y_true < 0.5]
    return (positive[:, None] > negative).float().mean()


def macro_f1(y_pred, y_true):
    scores = []
    for label in range(5):
        guessed = y_pred.argmax(1) == label
        true = y_true == label
        scores.append(2 * (guessed & true).sum() / (guessed.sum() + true.sum()).clamp(1))
    return torch.stack(scores).mean()


OTHERS = {
    "R2": (numbers, r2),
    "R2 of large numbers": (prices, r2),
    "R2 of predictions near 0": (numbers, lambda p, t: r2(0.01 * p, t)),
    "R2 of scikit-learn": (numbers, lambda p, t: skm.r2_score(t, p)),
    "RMSE": (numbers, lambda p, t: ((p - t) ** 2).mean().sqrt()),
    "RMSE as a Python number": (numbers, lambda p, t: ((p - t) ** 2).mean().item() ** 0.5),
    "RMSE of large numbers": (prices, lambda p, t: ((p - t) ** 2).mean().sqrt()),
    "F1": (binary, f1),
    "F1 of scikit-learn": (binary, lambda p, t: skm.f1_score(t > 0.5, p > 0.5)),
    "precision": (binary, lambda p, t: ((p > 0.5) & (t > 0.5)).sum() / ((p > 0.5).sum() + 1e-7)),
    "recall": (binary, lambda p, t: ((p > 0.5) & (t > 0.5)).sum() / (t > 0.5).sum().clamp(1)),
    "balanced accuracy": (binary, lambda p, t: skm.balanced_accuracy_score(t > 0.5, p > 0.5)),
    "AUC": (binary, auc),
    "AUC of scikit-learn": (binary, lambda p, t: skm.roc_auc_score(t, p)),
    "Pearson": (numbers, lambda p, t: torch.corrcoef(torch.cat([p, t], 1).T)[0, 1]),
    "Spearman of torchmetrics": (numbers, lambda p, t: tmf.spearman_corrcoef(p[:, 0], t[:, 0])),
    "macro F1": (classes, macro_f1),
    "macro F1 of torchmetrics": (
        classes,
        functools.partial(tmf.f1_score, task="multiclass", num_classes=5, average="macro"),
    ),
    "Cohen's kappa": (classes, lambda p, t: skm.cohen_kappa_score(t, p.argmax(1))),
    "geometric mean": (binary, lambda p, t: p.log().mean().exp()),
    "perplexity": (classes, lambda p, t: F.cross_entropy(p, t).exp()),
    "cross entropy with class weights": (
        classes,
        nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 1.0, 1.0, 9.0])),
    ),
    "cross entropy of the tokens that count": (tokens, nn.CrossEntropyLoss()),
    "accuracy of the tokens that count": (
        tokens,
        lambda p, t: (p.argmax(1) == t)[t >= 0].float().mean(),
    ),
    "IoU of all pixels": (images, lambda p, t: overlap(p, t)[0].sum() / overlap(p, t)[1].sum()),
    "PSNR of all pixels": (images, lambda p, t: -10 * ((p - t) ** 2).mean().log10()),
    "a sum": (numbers, nn.L1Loss(reduction="sum")),
    "how many are right": (binary, lambda p, t: right(p, t).sum()),
    "the largest error": (numbers, lambda p, t: (p - t).abs().max()),
    "the median error": (numbers, lambda p, t: (p - t).abs().median()),
    "the spread of the predictions": (numbers, lambda p, t: p.std()),
    "the rows of the batch": (numbers, lambda p, t: float(len(t))),
}


@pytest.mark.parametrize(("data", "function"), OTHERS.values(), ids=OTHERS)
def test_metric_that_is_no_mean_over_rows_is_warned_of_at_any_batch_size_and_order(data, function):
    for rows in (16, 33, 256):
        for seed in range(2):
            generator = torch.Generator().manual_seed(100 * seed + rows)
            X, y = data(4 * rows, generator)
            batches = list(zip(X.split(rows), y.split(rows), strict=True))
            assert warned(lambda batches=batches: given(function).evaluate(batches)) == ["m"], (
                rows,
                seed,
            )


# --- when, how often and what it says -------------------------------------------------------------


def test_row_means_warning_says_what_is_wrong_and_what_to_do():
    X, y = numbers(32, torch.Generator().manual_seed(0))
    said = (
        "metric 'm' gives another number if a batch is split in two, so its value for an epoch "
        "depends on batch_size. For the value on all rows pass "
        "minikeras.OnAllRows(function), whose function gets NumPy arrays, or a torchmetrics "
        "object. If the value is a total divided by a count, such as a mean over tokens or a "
        "recall, return minikeras.Average(total, count)."
    )
    with pytest.warns(UserWarning, match="gives another number") as caught:
        given(r2).evaluate((X, y))
    assert [str(warning.message) for warning in caught] == [said]


def test_row_means_remedies_give_the_value_on_all_rows_at_any_batch_size():
    import torchmetrics

    X, y = numbers(101, torch.Generator().manual_seed(0))
    expected = skm.r2_score(y, X)
    for remedy in (
        minikeras.OnAllRows(lambda y_pred, y_true: skm.r2_score(y_true, y_pred)),
        torchmetrics.R2Score(),
    ):
        for batch_size in (4, 32, 101):
            found = given(remedy).evaluate((X, y), batch_size=batch_size)["val_m"]
            assert found == pytest.approx(expected, rel=1e-5)
    X, y = tokens(101, torch.Generator().manual_seed(0))
    expected = F.cross_entropy(X, y).item()
    remedy = MEANS["an Average"][1]
    assert given(remedy).evaluate((X, y), batch_size=8)["val_m"] == pytest.approx(
        expected, rel=1e-6
    )


def test_row_means_warning_comes_once_for_training_and_validation_and_all_fits():
    data = numbers(64, torch.Generator().manual_seed(0))
    model = given(r2)
    assert warned(lambda: model.fit(2, data, data, batch_size=16, verbose=0)) == ["m"]
    assert warned(lambda: model.fit(1, data, data, batch_size=16, verbose=0)) == []
    assert warned(lambda: model.evaluate(data)) == []


def test_row_means_warning_comes_in_evaluate_if_that_is_first():
    data = numbers(64, torch.Generator().manual_seed(0))
    model = given(r2)
    assert warned(lambda: model.evaluate(data)) == ["m"]
    assert warned(lambda: model.fit(1, data, data, verbose=0)) == []


def test_row_means_warning_names_each_metric():
    data = numbers(64, torch.Generator().manual_seed(0))
    metrics = {"mae": nn.L1Loss(), "r2": r2, "rmse": OTHERS["RMSE"][1], "bias": MEANS["bias"][1]}
    model = compiled(minikeras.Model(Same()), nn.MSELoss(), metrics)
    assert warned(lambda: model.fit(1, data, verbose=0)) == ["r2", "rmse"]


def test_row_means_warning_can_be_silenced_by_a_filter():
    data = numbers(64, torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "metric 'm' gives another number")
        given(r2).evaluate(data)
    assert caught == []


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_row_means_check_joins_batches_of_fewer_than_four_rows(batch_size):
    X, y = numbers(24, torch.Generator().manual_seed(0))
    batches = list(zip(X.split(batch_size), y.split(batch_size), strict=True))
    assert warned(lambda: given(OTHERS["RMSE"][1]).evaluate(batches)) == ["m"]
    assert warned(lambda: given(nn.L1Loss()).evaluate(batches)) == []


def test_row_means_warning_comes_in_a_later_epoch_if_the_first_batches_do_not_show_it():
    y = torch.cat([torch.zeros(32, 1), torch.ones(32, 1)])
    nothing = torch.zeros(64, 1)
    something = torch.rand(64, 1, generator=torch.Generator().manual_seed(0))

    class Learns(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.epoch = 1

        def forward(self, x):
            return (nothing[: len(x)] if self.epoch < 3 else something[: len(x)]) + self.weight

    model = compiled(
        minikeras.Model(Learns()), nn.MSELoss(), {"f1": lambda p, t: f1(p, t).nan_to_num()}, lr=0.0
    )
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    seen = []

    def count(epoch):
        model.net.epoch = epoch
        seen.append(len(caught))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = minikeras.LambdaCallback(on_epoch_begin=count)
        model.fit(4, [(y[order], y[order])], callbacks=[callback], verbose=0)
    assert seen == [0, 0, 0, 1]


def test_row_means_check_splits_outputs_and_labels_of_any_structure():
    generator = torch.Generator().manual_seed(0)
    X, y = numbers(32, generator)

    class Several(Same):
        def forward(self, x):
            return {
                "values": (super().forward(x), x.flip(0)),
                "scale": x.new_ones(()),
                "table": x.new_ones(3),
            }

    def loss_func(y_pred, y_true):
        return y_pred["values"][0].mean()

    metrics = {
        "r2": lambda p, t: r2(p["values"][0] * p["scale"], t["y"][0]) * p["table"].mean(),
        "mae": lambda p, t: (
            (p["values"][0] * p["scale"] - t["y"][0]).abs().mean() * p["table"].sum()
        ),
    }
    model = compiled(minikeras.Model(Several()), loss_func, metrics)
    assert warned(lambda: model.evaluate([(X, {"y": [y], "text": "a name"})])) == ["r2"]


def test_row_means_check_splits_rows_in_a_list_by_item():
    X, y = numbers(8, torch.Generator().manual_seed(0))
    lengths = [3, 1, 4, 1, 5, 2, 6, 5]
    boxes = [torch.full((length, 4), float(length)) for length in lengths]

    def mean_boxes(y_pred, y_true):
        return sum(len(boxes) for boxes in y_true["boxes"]) / len(y_pred)

    def longest(y_pred, y_true):
        return float(max(len(boxes) for boxes in y_true["boxes"]))

    model = compiled(
        minikeras.Model(Same()), lambda p, t: p.mean(), {"boxes": mean_boxes, "longest": longest}
    )
    assert warned(lambda: model.evaluate([(X, {"y": y, "boxes": boxes})])) == ["longest"]


@dataclasses.dataclass
class Heads:
    first: torch.Tensor
    second: torch.Tensor


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


# outputs of a model of features (batch, 1), and what the metric takes of outputs and of labels
STRUCTURES = {
    "a tuple of 1": (lambda x: (x,), lambda nest: nest[0]),
    "a tuple of 2": (lambda x: (x, -x), lambda nest: nest[0]),
    "a tuple of 3": (lambda x: (x, -x, x), lambda nest: nest[0]),
    "a tuple of 4": (lambda x: (x, -x, x, x), lambda nest: nest[0]),
    "a list of 1": (lambda x: [x], lambda nest: nest[0]),
    "a list of 2": (lambda x: [x, -x], lambda nest: nest[0]),
    "a list of 3": (lambda x: [x, -x, x], lambda nest: nest[0]),
    "a list of 4": (lambda x: [x, -x, x, -x], lambda nest: nest[0]),
    "a dict of 1": (lambda x: {"a": x}, lambda nest: nest["a"]),
    "a dict of 2": (lambda x: {"a": x, "b": -x}, lambda nest: nest["a"]),
    "a dict of 3": (lambda x: {"a": x, "b": -x, "c": x}, lambda nest: nest["a"]),
    "a named tuple": (lambda x: Pair(x, -x), lambda nest: nest.first),
    "a dataclass": (lambda x: Heads(x, -x), lambda nest: nest.first),
    "a tuple of dicts": (lambda x: ({"a": x}, {"a": -x}), lambda nest: nest[0]["a"]),
    "a list of dicts": (lambda x: [{"a": x}, {"a": -x}], lambda nest: nest[0]["a"]),
    "a list of other dicts": (lambda x: [{"a": x}, {"b": -x}], lambda nest: nest[0]["a"]),
    "a list of 3 dicts": (lambda x: [{"a": x}, {"a": -x}, {"a": x}], lambda nest: nest[0]["a"]),
    "pairs in a pair": (lambda x: ((x, -x), (x, x)), lambda nest: nest[0][0]),
    "a list in a dict": (lambda x: {"a": [x, -x]}, lambda nest: nest["a"][0]),
    "a list of vectors": (lambda x: [x[:, 0], -x[:, 0]], lambda nest: nest[0][:, None]),
}


def count_parts(nest):
    container = take_apart(nest)
    return None if container is None else [count_parts(part) for part in container[0]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("build", "first"), STRUCTURES.values(), ids=STRUCTURES)
def test_row_means_check_keeps_the_structure_for_any_number_of_rows(build, first, batch_size):
    X, y = numbers(22, torch.Generator().manual_seed(0))
    expected = count_parts(build(X))

    class Builds(Same):
        def forward(self, x):
            return build(super().forward(x))

    def see(y_pred, y_true):
        assert count_parts(y_pred) == expected
        assert count_parts(y_true) == expected
        return first(y_pred), first(y_true)

    metrics = {"mae": lambda p, t: F.l1_loss(*see(p, t)), "rmse": lambda p, t: rmse(*see(p, t))}
    model = compiled(minikeras.Model(Builds()), lambda p, t: first(p).mean(), metrics, lr=0.0)
    pairs = zip(X.split(batch_size), y.split(batch_size), strict=True)
    batches = [(features, build(labels)) for features, labels in pairs]
    assert warned(lambda: model.fit(2, batches, batches, verbose=0)) == ["rmse"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_row_means_check_takes_losses_and_metrics_by_output_for_any_number_of_rows(batch_size):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 1)
            self.b = nn.Linear(3, 3)

        def forward(self, x):
            return {"a": self.a(x), "b": self.b(x)}

    generator = torch.Generator().manual_seed(0)
    X = torch.randn(19, 3, generator=generator)
    y = {
        "a": torch.randn(19, 1, generator=generator),
        "b": torch.randint(0, 3, (19,), generator=generator),
    }
    losses = {"a": nn.MSELoss(), "b": nn.CrossEntropyLoss()}
    metrics = {"a": {"mae": nn.L1Loss(), "rmse": rmse}}
    model = compiled(minikeras.Model(TwoHeads()), losses, metrics)
    data = (X, y)
    fit = functools.partial(model.fit, 2, data, data, batch_size=batch_size, verbose=0)
    assert warned(fit) == ["a_rmse"]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_row_means_check_has_no_false_alarm_by_parts_that_look_like_rows(batch_size):
    X, y = numbers(16, torch.Generator().manual_seed(0))
    size = batch_size

    class Returns(Same):
        def forward(self, x):
            x = super().forward(x)
            temperatures = [torch.tensor(float(number)) for number in range(size)]
            return {
                "values": x,
                "table": torch.arange(float(size)),
                "temperatures": temperatures,
                "heads": [{"values": x, "temperature": leaf} for leaf in temperatures],
                "states": tuple(leaf.expand(1, len(x), 8) for leaf in temperatures),
                "state list": [leaf.expand(1, len(x), 8) for leaf in temperatures],
            }

    metrics = {
        "last of the table": lambda p, t: p["table"][size - 1],
        "last of the temperatures": lambda p, t: p["temperatures"][size - 1],
        "all temperatures": lambda p, t: sum(p["temperatures"]),
        "last head": lambda p, t: p["heads"][size - 1]["temperature"],
        "last state": lambda p, t: p["states"][size - 1].mean(),
        "last of the list": lambda p, t: p["state list"][size - 1].mean(),
    }
    model = compiled(minikeras.Model(Returns()), lambda p, t: p["values"].mean(), metrics, lr=0.0)
    batches = list(zip(X.split(batch_size), y.split(batch_size), strict=True))
    assert warned(lambda: model.fit(2, batches, batches, verbose=0)) == []


def test_row_means_check_joins_small_batches_with_an_item_for_each_row():
    X, y = numbers(16, torch.Generator().manual_seed(0))
    sizes = [3, 1, 4, 1, 5, 2, 6, 5, 3, 1, 4, 1, 5, 2, 6, 5]
    boxes = [{"boxes": torch.full((size, 4), float(size))} for size in sizes]
    batches = []
    for start in range(0, 16, 2):
        rows = slice(start, start + 2)
        batches.append((X[rows], {"y": y[rows], "boxes": boxes[rows]}))

    def mean_boxes(y_pred, y_true):
        return sum(len(row["boxes"]) for row in y_true["boxes"]) / len(y_pred)

    def most_boxes(y_pred, y_true):
        return float(max(len(row["boxes"]) for row in y_true["boxes"]))

    metrics = {"mean": mean_boxes, "most": most_boxes}
    model = compiled(minikeras.Model(Same()), lambda p, t: p.mean(), metrics)
    assert warned(lambda: model.evaluate(batches)) == ["most"]


# --- it leaves no trace ---------------------------------------------------------------------------


def test_row_means_check_draws_no_random_numbers_and_skips_a_metric_that_draws():
    data = numbers(64, torch.Generator().manual_seed(0))
    drawn = []

    def noisy(y_pred, y_true):
        noise = torch.rand(()), np.random.rand(), random.random()
        drawn.append(noise)
        return float(r2(y_pred, y_true)) + sum(float(value) for value in noise)

    def seed():
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)

    seed()
    assert warned(lambda: given(noisy).evaluate(data, batch_size=16)) == []
    seed()
    expected = [(torch.rand(()), np.random.rand(), random.random()) for _ in range(4)]
    assert drawn == expected


def test_row_means_check_leaves_generators_that_functions_of_other_modules_draw_from():
    module = {"generator": np.random.default_rng(0)}
    exec("def draw():\n    return generator.random()", module)
    drawn = []

    script = {"draw": module["draw"], "drawn": drawn}
    exec("def noisy(p, t):\n    drawn.append(draw())\n    return p.mean()", script)
    given(script["noisy"]).evaluate(points(32), batch_size=8)
    assert drawn == np.random.default_rng(0).random(4).tolist()


CALLS = []


def module_level(y_pred, y_true):
    CALLS.append(len(y_true))
    return y_pred.mean()


def test_row_means_check_leaves_what_a_function_keeps_as_if_called_once_a_batch():
    CALLS.clear()
    calls = []
    total = 0
    default = []

    def closure(y_pred, y_true):
        nonlocal total
        calls.append(len(y_true))
        total += len(y_true)
        return y_pred.mean()

    def with_default(y_pred, y_true, kept=default):
        kept.append(len(y_true))
        return y_pred.mean()

    class Counts:
        def __init__(self):
            self.rows = 0

        def __call__(self, y_pred, y_true):
            self.rows += len(y_true)
            return y_pred.mean()

        def method(self, y_pred, y_true):
            self.rows += len(y_true)
            return y_pred.mean()

    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("rows", torch.zeros(()))

        def forward(self, y_pred, y_true):
            self.rows += len(y_true)
            return y_pred.mean()

    counts = Counts()
    other = Counts()
    running = Running()
    closure.calls = []
    metrics = {
        "closure": closure,
        "partial": functools.partial(with_default),
        "object": counts,
        "method": other.method,
        "module": running,
        "global": module_level,
    }
    model = compiled(metrics_dict=metrics)
    model.fit(1, points(70), batch_size=32, verbose=0)
    assert calls == default == CALLS == [32, 32, 6]
    assert [total, counts.rows, other.rows, running.rows] == [70] * 4


def add_to_gradients(parameters):
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.add_(1.0)


NETWORK = None  # set by a test


def changes_a_global(y_pred, y_true):
    add_to_gradients(NETWORK.parameters())
    return y_pred.mean()


class Changes:
    """An object that holds a network, whose method is a metric."""

    def __init__(self, network):
        self.network = network

    def __call__(self, y_pred, y_true):
        add_to_gradients(self.network.parameters())
        return y_pred.mean()

    def method(self, y_pred, y_true):
        return self(y_pred, y_true)


def changes_a_closure(net):
    def metric(y_pred, y_true):
        add_to_gradients(net.parameters())
        return y_pred.mean()

    return metric


def changes_a_list(net):
    parameters = list(net.parameters())

    def metric(y_pred, y_true):
        add_to_gradients(parameters)
        return y_pred.mean()

    return metric


def changes_what_an_optimizer_has(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def metric(y_pred, y_true):
        for group in optimizer.param_groups:
            add_to_gradients(group["params"])
        return y_pred.mean()

    return metric


def changes_by_a_default(net):
    def metric(y_pred, y_true, net=net):
        add_to_gradients(net.parameters())
        return y_pred.mean()

    return metric


def changes_by_a_view(net):
    def view(outputs):
        add_to_gradients(net.parameters())
        return outputs

    return minikeras.Transformed(lambda y_pred, y_true: y_pred.mean(), y_pred=view)


CHANGES = {
    "a closure": changes_a_closure,
    "a global": lambda net: changes_a_global,
    "a list of parameters": changes_a_list,
    "an optimizer": changes_what_an_optimizer_has,
    "a default": changes_by_a_default,
    "an object": Changes,
    "a method": lambda net: Changes(net).method,
    "a partial": lambda net: functools.partial(changes_a_closure(net)),
    "a function in a function": lambda net: lambda p, t: changes_a_closure(net)(p, t),
    "a view": changes_by_a_view,
}


@pytest.mark.parametrize("make", CHANGES.values(), ids=CHANGES)
def test_row_means_check_does_not_call_a_metric_that_changes_gradients(make, monkeypatch):
    X, y = points(24)
    net = nn.Linear(2, 1)
    expected = copy.deepcopy(net)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for features, labels in zip(X.split(4), y.split(4), strict=True):
        optimizer.zero_grad()
        F.mse_loss(expected(features), labels).backward()
        add_to_gradients(expected.parameters())
        optimizer.step()
    monkeypatch.setitem(globals(), "NETWORK", net)
    model = minikeras.Model(net)
    own = torch.optim.SGD(net.parameters(), lr=0.1)
    model.compile(nn.MSELoss(), own, {"m": make(net)}, device="cpu")
    batches = list(zip(X.split(4), y.split(4), strict=True))
    assert warned(lambda: model.fit(1, batches, verbose=0)) == []
    assert_same_weights(model.net, expected)


def test_row_means_check_does_not_call_a_metric_that_changes_weights_buffers_or_an_optimizer():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    total = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    expected = {name: 5 * value for name, value in net.named_parameters()}

    def add_weights(y_pred, y_true):
        for parameter, other in zip(total.parameters(), net.parameters(), strict=True):
            parameter.add_(other)
        return y_pred.mean()

    def change_buffer(y_pred, y_true):
        net[1].num_batches_tracked.add_(100)
        return y_pred.mean()

    def change_rate(y_pred, y_true):
        optimizer.param_groups[0]["weight_decay"] += 1.0
        return y_pred.mean()

    metrics = {"weights": add_weights, "buffer": change_buffer, "rate": change_rate}
    model = minikeras.Model(net)
    model.compile(nn.MSELoss(), optimizer, metrics, device="cpu")
    model.fit(1, points(32), batch_size=8, verbose=0)
    for name, value in total.named_parameters():
        torch.testing.assert_close(value, expected[name])
    assert net[1].num_batches_tracked.item() == 404
    assert optimizer.param_groups[0]["weight_decay"] == 4.0


COUNT = """
def count(rows):
    calls.append(rows)
"""
MEAN_AND_COUNT = """
def mean(y_pred, y_true):
    count(len(y_true))
    return y_pred.mean()
"""


def test_row_means_check_leaves_what_a_function_of_the_users_other_module_counts():
    other = {"calls": []}  # the names of one module, and those of another that imports from it
    exec(COUNT, other)
    own = {"count": other["count"]}
    exec(MEAN_AND_COUNT, own)
    compiled(metrics_dict={"m": own["mean"]}).fit(1, points(64), batch_size=16, verbose=0)
    assert other["calls"] == [16] * 4


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_row_means_check_does_not_call_a_metric_that_counts_in_a_large_table(kind):
    table = np.zeros((1100, 1100)) if kind == "array" else torch.zeros(1100, 1100)

    def count(y_pred, y_true):
        table[0, 0] += len(y_true)
        return y_pred.mean()

    compiled(metrics_dict={"m": count}).fit(1, points(64), batch_size=16, verbose=0)
    assert table.sum() == 64


def test_row_means_check_gives_copies_of_labels_of_any_kind():
    class Boxes:
        def __init__(self, values):
            self.values = values

        def to(self, device, **kwargs):
            return self

    X, y = points(32)
    boxes = [Boxes(torch.ones(8)) for _ in range(4)]
    batches = [
        (features, {"y": labels, "boxes": box})
        for features, labels, box in zip(X.split(8), y.split(8), boxes, strict=True)
    ]

    def double(y_pred, y_true):
        y_true["boxes"].values *= 2
        return y_pred.mean()

    model = compiled(loss_func=lambda p, t: F.mse_loss(p, t["y"]), metrics_dict={"m": double})
    model.fit(1, batches, verbose=0)
    assert [box.values.tolist() for box in boxes] == [[2.0] * 8] * 4


def test_row_means_check_gives_copies_to_a_metric_that_edits_in_place():
    data = points(64)
    seen = []

    def edits(y_pred, y_true):
        seen.append(y_pred.sum().item())
        y_pred.zero_()
        y_true.zero_()
        return y_pred.mean()

    model = compiled(metrics_dict={"edits": edits}, lr=0.0)
    expected = model.predict(data[0]).sum().item()
    model.evaluate(data, batch_size=64)
    assert seen == [pytest.approx(expected, rel=1e-5)]


def test_row_means_check_skips_a_metric_that_cannot_be_copied():
    def lines():
        yield from range(100)

    numbered = lines()
    calls = []

    def r2_and_a_line(y_pred, y_true):
        calls.append(next(numbered))
        return r2(y_pred, y_true)

    data = numbers(64, torch.Generator().manual_seed(0))
    assert warned(lambda: given(r2_and_a_line).evaluate(data, batch_size=16)) == []
    assert calls == [0, 1, 2, 3]


def test_row_means_check_ignores_an_error_in_a_half():
    def several(y_pred, y_true):
        if len(y_true) < 16:
            raise ValueError("too few rows")
        return r2(y_pred, y_true)

    data = numbers(16, torch.Generator().manual_seed(0))
    assert warned(lambda: given(several).evaluate(data)) == []


def test_row_means_check_leaves_the_fit_bit_for_bit_the_same():
    X, y = points(64)
    model = compiled(metrics_dict={"m": nn.L1Loss()})
    twin = compiled(copy.deepcopy(model))
    for net in (model, twin):
        torch.manual_seed(1)
        net.fit(2, (X, y), batch_size=16, verbose=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name])


@pytest.mark.parametrize(
    "options", [{"precision": "bf16"}, {"accumulate": 2}, {"jit": {"backend": "eager"}}], ids=str
)
def test_row_means_warning_comes_with_each_option_of_compile(options):
    X, y = points(64)
    metrics = {"rmse": lambda p, t: ((p - t) ** 2).mean().sqrt(), "mae": nn.L1Loss()}
    net = nn.Linear(2, 1)
    model = compiled(minikeras.Model(net), nn.MSELoss(), metrics, **options)
    assert warned(lambda: model.fit(2, (X, y), (X, y), batch_size=16, verbose=0)) == ["rmse"]
