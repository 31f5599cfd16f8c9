"""Transformed: a metric on a part or a function of the outputs and labels."""

import re
import warnings

import pytest
import sklearn.metrics as skm
import torch
import torchmetrics
import torchmetrics.classification as tmc
from helpers.compiling import FAST
from helpers.exact import assert_exact
from helpers.models import accuracy, compiled
from torch import nn

import minikeras
from minikeras import Transformed

ROWS = 101
BATCH = 32  # the last batch has 5 rows


class Two(minikeras.Model):
    """A digit's raw scores (rows, 3) and the raw score of a yes (rows, 1)."""

    def __init__(self):
        super().__init__()
        self.digit = nn.Linear(4, 3)
        self.yes = nn.Linear(4, 1)

    def forward(self, x):
        return {"digit": self.digit(x), "yes": self.yes(x)}


def loss_of_both(y_pred, y_true):
    return nn.functional.cross_entropy(y_pred["digit"], y_true["digit"]) + (
        nn.functional.binary_cross_entropy_with_logits(y_pred["yes"], y_true["yes"])
    )


def data(rows=ROWS):
    """X, and labels of both outputs."""
    X = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    return X, {"digit": X[:, :3].argmax(1), "yes": (X.sum(1, keepdim=True) > 0.5).float()}


def model_of(metrics_dict, **kwargs):
    torch.manual_seed(0)
    return compiled(Two(), loss_of_both, metrics_dict, **({"lr": 0.0} | kwargs))


def right(y_pred, y_true):
    return (y_pred.argmax(1) == y_true).float().mean()


def digit(nest):
    return nest["digit"]


def yes(nest):
    return nest["yes"]


def probability(outputs):
    return outputs["yes"].sigmoid()


def whole_number(labels):
    return labels["yes"].int()


# --- the same numbers as the bare metric on what it sees ------------------------------------------


def metrics_of_all_kinds():
    scores = torchmetrics.MetricCollection([tmc.BinaryPrecision(), tmc.BinaryRecall()])
    return {
        "digit": Transformed(right, y_pred=digit, y_true=digit),
        "f1": Transformed(tmc.BinaryF1Score(), y_pred=probability, y_true=whole_number),
        "scores": Transformed(scores, probability, whole_number),
        "auroc": Transformed(
            minikeras.OnAllRows(lambda y_pred, y_true: skm.roc_auc_score(y_true, y_pred)), yes, yes
        ),
        "per_class": Transformed(tmc.MulticlassRecall(3, average=None), digit, digit),
        "accuracy": Transformed(Transformed(accuracy, torch.sigmoid), yes, yes),
    }


def expected_of_all_kinds(model, X, y):
    outputs = model.predict(X)
    guess = outputs["yes"] > 0
    right_digits = outputs["digit"].argmax(1)
    recalls = skm.recall_score(y["digit"], right_digits, average=None)
    return {
        "digit": skm.accuracy_score(y["digit"], right_digits),
        "f1": skm.f1_score(y["yes"], guess),
        "BinaryPrecision": skm.precision_score(y["yes"], guess),
        "BinaryRecall": skm.recall_score(y["yes"], guess),
        "auroc": skm.roc_auc_score(y["yes"], outputs["yes"]),
        "per_class_0": recalls[0],
        "per_class_1": recalls[1],
        "per_class_2": recalls[2],
        "accuracy": skm.accuracy_score(y["yes"], guess),
    }


@pytest.mark.parametrize("batch_size", [1, BATCH, ROWS])
def test_transformed_metrics_are_scikit_learns_values_at_any_batch_size(batch_size):
    X, y = data()
    model = model_of(metrics_of_all_kinds())
    expected = expected_of_all_kinds(model, X, y)
    dfhistory = model.fit(1, (X, y), (X, y), batch_size=batch_size, verbose=0)
    names = ["loss", *expected]
    assert list(dfhistory) == names + [f"val_{name}" for name in names]
    for prefix in ("", "val_"):
        found = {name: dfhistory[prefix + name].iloc[0] for name in expected}
        assert found == pytest.approx(expected, rel=1e-5)
    found = model.evaluate((X, y), batch_size=batch_size)
    assert {name: found[f"val_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_transformed_metrics_under_jit_are_those_without_it():
    X, y = data(64)
    expected = model_of(metrics_of_all_kinds(), lr=0.1).fit(2, (X, y), (X, y), verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model_of(metrics_of_all_kinds(), lr=0.1, jit=FAST).fit(2, (X, y), (X, y), verbose=0)
    assert found.to_dict("list") == {
        name: pytest.approx(column, rel=1e-5) for name, column in expected.to_dict("list").items()
    }


def test_transformed_metrics_leave_the_given_metric_as_it_was():
    f1 = tmc.BinaryF1Score()
    model = model_of({"f1": Transformed(f1, probability, whole_number)})
    model.fit(1, data(), data(), verbose=0)
    assert f1.update_count == 0


def test_transformed_functions_get_float32_under_mixed_precision():
    dtypes = set()

    def seen(y_pred, y_true):
        dtypes.add(y_pred.dtype)
        return 0.0

    model = model_of({"m": Transformed(seen, yes, yes)}, precision="bf16")
    model.fit(1, data(), data(), verbose=0)
    assert dtypes == {torch.float32}


@pytest.mark.usefixtures("quick_disk")
def test_transformed_metrics_resume_within_an_epoch_as_if_never_interrupted(tmp_path):
    def parts():
        scores = torchmetrics.MetricCollection([tmc.BinaryPrecision(), tmc.BinaryRecall()])
        metrics_dict = {
            "scores": Transformed(scores, torch.sigmoid, lambda y: (y > 0).int()),
            "mae": Transformed(nn.L1Loss(), y_pred=lambda y_pred: 2 * y_pred),
            "max": Transformed(minikeras.OnAllRows(lambda p, t: float(p.max())), torch.neg),
        }
        return {"compile": {"metrics_dict": metrics_dict}}

    assert_exact(parts, tmp_path, kills=(5,))


# --- raw scores, which torchmetrics takes for probabilities in some batches -----------------------


def scored():
    """A model of raw scores, its data, and the scores: those of the last row are within 0 to 1."""
    torch.manual_seed(0)
    X = torch.randn(201, 1)
    X = X[(X[:, 0] - 0.25).abs().argsort(descending=True)]
    y = (X + 0.5 * torch.randn(201, 1) > 0).float()
    return minikeras.Model(nn.Identity()), (X, y)


def test_transformed_by_sigmoid_gives_torchmetrics_probabilities_in_each_batch():
    model, (X, y) = scored()
    metrics_dict = {
        "f1": Transformed(tmc.BinaryF1Score(), y_pred=torch.sigmoid),
        "auroc": Transformed(tmc.BinaryAUROC(), torch.sigmoid, lambda y: y.int()),
    }
    model.compile(nn.BCEWithLogitsLoss(), None, metrics_dict, device="cpu")
    for batch_size in (1, 4, 50, 201):
        found = model.evaluate((X, y), batch_size=batch_size)
        assert found["val_f1"] == pytest.approx(skm.f1_score(y, X > 0), rel=1e-6)
        assert found["val_auroc"] == pytest.approx(skm.roc_auc_score(y, X), rel=1e-6)


def test_raw_scores_within_0_to_1_in_the_first_batch_are_told_if_the_loss_takes_scores():
    model, (X, y) = scored()
    X, y = X.flip(0), y.flip(0)  # the first row scores between 0 and 1
    model.compile(nn.BCEWithLogitsLoss(), None, {"f1": tmc.BinaryF1Score()}, device="cpu")
    said = (
        "metric 'f1': the outputs are raw scores, as BCEWithLogitsLoss takes them. BinaryF1Score "
        "applies a sigmoid to a batch only if a score in it is below 0 or above 1, and takes any "
        "other batch for probabilities, so the value may depend on batch_size. Give it "
        "probabilities in each batch: minikeras.Transformed(BinaryF1Score(...), "
        "y_pred=torch.sigmoid)."
    )
    with pytest.warns(UserWarning, match="raw scores") as caught:
        wrong = model.evaluate((X, y), batch_size=1)["val_f1"]
    assert [str(warning.message) for warning in caught] == [said]
    metric = Transformed(tmc.BinaryF1Score(), y_pred=torch.sigmoid)  # what it says
    model.compile(nn.BCEWithLogitsLoss(), None, {"f1": metric}, device="cpu")
    expected = skm.f1_score(y, X > 0)
    assert model.evaluate((X, y), batch_size=1)["val_f1"] == pytest.approx(expected, rel=1e-6)
    assert wrong != pytest.approx(expected, rel=1e-3)


def test_focal_loss_of_raw_scores_tells_as_well():
    model = minikeras.Model(nn.Identity())
    loss = minikeras.FocalLoss(from_logits=True)
    model.compile(loss, None, {"f1": tmc.BinaryF1Score()}, device="cpu")
    p = torch.rand(20, 1)
    with pytest.warns(UserWarning, match="raw scores, as FocalLoss takes them"):
        model.evaluate((p, (p > 0.5).float()))


@pytest.mark.parametrize(
    ("loss_func", "metric"),
    [
        (nn.BCELoss(), tmc.BinaryF1Score()),
        (minikeras.FocalLoss(), tmc.BinaryF1Score()),
        (nn.MSELoss(), tmc.BinaryF1Score()),
        (nn.BCEWithLogitsLoss(), Transformed(tmc.BinaryF1Score(), torch.sigmoid)),
        (nn.BCEWithLogitsLoss(), torchmetrics.MeanSquaredError()),
        (nn.BCEWithLogitsLoss(), minikeras.OnAllRows(lambda p, t: skm.f1_score(t, p > 0))),
    ],
)
def test_probabilities_and_metrics_of_any_number_are_not_taken_for_raw_scores(loss_func, metric):
    model = minikeras.Model(nn.Identity())
    model.compile(loss_func, None, {"m": metric}, device="cpu")
    p = torch.rand(20, 1)
    model.evaluate((p, (p > 0.5).float()), batch_size=7)  # a warning is an error in these tests


# --- what is checked ------------------------------------------------------------------------------


def f1(y_pred, y_true):
    hits = ((y_pred > 0.5) & (y_true > 0.5)).sum()
    return 2 * hits / ((y_pred > 0.5).sum() + (y_true > 0.5).sum()).clamp(min=1)


def test_transformed_function_that_is_no_mean_over_rows_is_told():
    model = model_of({"f1": Transformed(f1, probability, yes)})
    with pytest.warns(
        UserWarning, match="^metric 'f1' gives another number if a batch is split in two"
    ):
        model.evaluate(data())


def test_transformed_function_that_is_a_mean_over_rows_is_not_told():
    mean = Transformed(accuracy, lambda y_pred: y_pred["yes"].sigmoid().double(), yes)
    model_of({"accuracy": mean, "digit": Transformed(right, digit, digit)}).evaluate(data())


def test_transformed_metric_that_broadcasts_is_refused_with_the_shapes_that_it_sees():
    model = model_of({"accuracy": Transformed(accuracy, yes, lambda y: y["yes"].squeeze(1))})
    message = (
        "metric 'accuracy': predictions (32, 1) and labels (32,) would broadcast to (32, 32). Pass "
        "labels.unsqueeze(-1), in NumPy labels[:, None], in pandas labels.to_frame(), or squeeze "
        "the predictions."
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="would broadcast") as caught:
        model.fit(1, data(), verbose=0)
    assert str(caught.value) == message
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    remedy = Transformed(accuracy, yes, lambda y: y["yes"].squeeze(1).unsqueeze(-1))
    model_of({"accuracy": remedy}).fit(1, data(), verbose=0)


def test_transformed_function_that_fails_says_which_metric_and_what_it_was_given():
    model = model_of({"digit": Transformed(right, lambda outputs: outputs["digits"], digit)})
    with pytest.raises(KeyError) as caught:
        model.evaluate(data())
    assert caught.value.__notes__[0] == (
        "metric 'digit', before it was called, given outputs {'digit': Tensor (32, 3) float32, "
        "'yes': Tensor (32, 1) float32}, labels {'digit': Tensor (32,) int64, 'yes': Tensor "
        "(32, 1) float32}"
    )


def test_metric_that_fails_on_what_it_sees_says_what_that_is():
    model = model_of({"digit": Transformed(right, yes, lambda y: y["digit"].tolist())})
    with pytest.raises(AttributeError) as caught:
        model.evaluate(data())
    assert caught.value.__notes__[0].startswith(
        "metric 'digit' got y_pred Tensor (32, 1) float32, y_true [int, int, int, int, ...]"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (tmc.BinaryF1Score,),
            "`metric` is the class BinaryF1Score; expected an instance. Pass "
            "Transformed(BinaryF1Score(), ...).",
        ),
        (
            (tmc.MulticlassF1Score,),
            "`metric` is the class MulticlassF1Score; expected an instance. Pass "
            "Transformed(MulticlassF1Score(num_classes=...), ...).",
        ),
        (
            ([accuracy],),
            "`metric` must be a function of (y_pred, y_true) or an object with update, compute and "
            "reset, got [function]. Pass for instance Transformed(accuracy, y_pred=torch.sigmoid); "
            "with several metrics, wrap each.",
        ),
        (
            (accuracy, nn.Sigmoid),
            "`y_pred` must be a function of the outputs of a batch, got the class Sigmoid. Pass "
            "for instance y_pred=lambda outputs: outputs[0], which gives the first of several.",
        ),
        (
            (torch.sigmoid, tmc.BinaryF1Score()),
            "`y_pred` must be a function, got the metric BinaryF1Score. The metric comes first: "
            "Transformed(metric, y_pred=function).",
        ),
        (
            (torch.sigmoid, Transformed(accuracy)),
            "`y_pred` must be a function, got the metric Transformed. The metric comes first: "
            "Transformed(metric, y_pred=function).",
        ),
        (
            (accuracy, None, "digit"),
            "`y_true` must be a function of the labels of a batch, got 'digit'. Pass for instance "
            "y_true=lambda labels: labels[0], which gives the first of several.",
        ),
    ],
)
def test_transformed_refuses_what_is_no_metric_or_no_function(arguments, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        Transformed(*arguments)


def test_transformed_shows_what_it_was_given():
    assert repr(Transformed(nn.L1Loss(), y_pred=torch.sigmoid)) == (
        "Transformed(L1Loss(), y_pred=sigmoid)"
    )
