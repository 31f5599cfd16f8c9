"""Several outputs: losses and metrics by the names of the outputs."""

import copy
import re
import warnings
from typing import NamedTuple

import pytest
import sklearn.metrics as skm
import torch
import torch.nn.functional as F
import torchmetrics
import torchmetrics.classification as tmc
from helpers.compare import assert_same_weights, copy_weights
from helpers.compiling import FAST
from helpers.exact import assert_exact
from helpers.models import compiled
from torch import nn

import minikeras

ROWS = 70
BATCH = 32  # the last batch has 6 rows


class Outputs(NamedTuple):
    digit: torch.Tensor
    parity: torch.Tensor


class Two(minikeras.Model):
    """Raw scores of three digits (rows, 3) and of whether one is odd (rows, 1)."""

    def __init__(self, kind=dict):
        super().__init__()
        self.kind = kind
        self.digit = nn.Linear(4, 3)
        self.parity = nn.Linear(4, 1)

    def forward(self, x):
        return build(self.kind, self.digit(x), self.parity(x))


def build(kind, digit, parity):
    """Put two parts into a dict, a named tuple, a tuple or a list."""
    if kind is dict:
        return {"digit": digit, "parity": parity}
    return kind(digit, parity) if kind is Outputs else kind([digit, parity])


def data(rows=ROWS, kind=dict):
    X = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    return X, build(kind, X[:, :3].argmax(1), (X.sum(1, keepdim=True) > 0).float())


def model_of(losses, metrics_dict=None, kind=dict, **kwargs):
    torch.manual_seed(0)
    return compiled(Two(kind), losses, metrics_dict, **kwargs)


def both():
    return {"digit": nn.CrossEntropyLoss(), "parity": (nn.BCEWithLogitsLoss(), 0.5)}


def accuracy(y_pred, y_true):
    return (y_pred.argmax(1) == y_true).float().mean()


def odd(y_pred, y_true):
    return ((y_pred > 0) == (y_true > 0.5)).float().mean()


def batches_of(X, y, size=BATCH):
    """Yield batches of data whose labels are a dict."""
    for start in range(0, len(X), size):
        rows = slice(start, start + size)
        yield X[rows], {name: part[rows] for name, part in y.items()}


# --- the numbers of a bare loop -------------------------------------------------------------------


def loop(model, X, y, epochs=2, lr=0.1):
    """Train with a bare loop; return the means over the rows of each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    history = []
    for _ in range(epochs):
        sums = torch.zeros(3, dtype=torch.float64)
        for inputs, labels in batches_of(X, y):
            outputs = model(inputs)
            digit = F.cross_entropy(outputs["digit"], labels["digit"])
            parity = F.binary_cross_entropy_with_logits(outputs["parity"], labels["parity"])
            loss = digit + 0.5 * parity
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += torch.stack([loss, digit, parity]).detach().double() * len(inputs)
        history.append((sums / len(X)).tolist())
    return history


def metrics_by_output():
    return {
        "digit": {"accuracy": accuracy, "f1": tmc.MulticlassF1Score(3)},
        "parity": {"accuracy": odd},
    }


@pytest.mark.parametrize("options", [{}, {"jit": FAST}], ids=["eager", "jit"])
def test_losses_by_name_train_and_count_as_a_bare_loop(options):
    X, y = data()
    model = model_of(both(), metrics_by_output(), **options)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dfhistory = model.fit(2, list(batches_of(X, y)), (X, y), batch_size=None, verbose=0)
    parts = ["loss", "digit_loss", "parity_loss"]
    names = [*parts, "digit_accuracy", "digit_f1", "parity_accuracy"]
    assert list(dfhistory) == names + [f"val_{name}" for name in names]
    expected = loop(twin, X, y)
    for row, values in zip(dfhistory[parts].to_numpy().tolist(), expected, strict=True):
        assert row == pytest.approx(values, rel=1e-6)
    assert_same_weights(model, twin)
    outputs = model.predict(X)
    digit = F.cross_entropy(outputs["digit"].double(), y["digit"]).item()
    parity = F.binary_cross_entropy_with_logits(outputs["parity"], y["parity"]).item()
    guess = outputs["digit"].argmax(1)
    evaluated = {
        "val_loss": digit + 0.5 * parity,
        "val_digit_loss": digit,
        "val_parity_loss": parity,
        "val_digit_accuracy": skm.accuracy_score(y["digit"], guess),
        "val_digit_f1": skm.f1_score(y["digit"], guess, average="macro"),
        "val_parity_accuracy": skm.accuracy_score(y["parity"], outputs["parity"] > 0),
    }
    assert model.evaluate((X, y), batch_size=9) == pytest.approx(evaluated, rel=1e-6)
    assert dfhistory.iloc[-1].to_dict() | evaluated == pytest.approx(
        dfhistory.iloc[-1].to_dict(), rel=1e-6
    )


@pytest.mark.parametrize("kind", [dict, Outputs, tuple, list])
def test_losses_by_name_take_dicts_named_tuples_tuples_and_lists(kind):
    first, second = ("digit", "parity") if kind in (dict, Outputs) else (0, 1)
    losses = dict(zip((first, second), both().values(), strict=True))
    model = model_of(losses, {first: {"accuracy": accuracy}}, kind)
    X, y = data(kind=kind)
    dfhistory = model.fit(2, (X, y), (X, y), verbose=0)
    expected = model_of(both(), {"digit": {"accuracy": accuracy}}).fit(2, data(), data(), verbose=0)
    assert list(dfhistory)[:4] == [
        "loss",
        f"{first}_loss",
        f"{second}_loss",
        f"{first}_accuracy",
    ]
    assert dfhistory["val_loss"].tolist() == pytest.approx(expected["val_loss"].tolist())


def test_losses_in_a_module_dict_are_those_of_a_dict():
    losses = {"digit": nn.CrossEntropyLoss(), "parity": nn.BCEWithLogitsLoss()}
    expected = model_of(losses).evaluate(data())
    assert model_of(nn.ModuleDict(losses)).evaluate(data()) == expected


def test_losses_by_name_of_weight_0_are_logged_and_train_nothing():
    X, y = data()
    y["parity"][:] = torch.nan  # it does not spoil the sum either
    model = model_of({"digit": nn.CrossEntropyLoss(), "parity": (nn.MSELoss(), 0)})
    before = copy_weights(model)
    dfhistory = model.fit(2, (X, y), verbose=0)
    assert dfhistory["loss"].tolist() == dfhistory["digit_loss"].tolist()
    assert dfhistory["parity_loss"].isna().all()
    assert torch.equal(before["parity.weight"], model.parity.weight)
    assert not torch.equal(before["digit.weight"], model.digit.weight)


def test_output_without_a_loss_is_predicted_and_may_have_a_metric():
    X, y = data()
    model = model_of({"digit": F.cross_entropy}, {"parity": {"odd": odd}})
    assert list(model.fit(1, (X, y), verbose=0)) == ["loss", "digit_loss", "parity_odd"]
    model = model_of({"digit": F.cross_entropy})
    assert list(model.fit(1, (X, {"digit": y["digit"]}), verbose=0)) == ["loss", "digit_loss"]
    assert set(model.predict(X)) == {"digit", "parity"}


def test_metrics_by_output_need_no_losses_by_name():
    def total(y_pred, y_true):
        return F.cross_entropy(y_pred["digit"], y_true["digit"])

    metrics = {"digit": {"a": accuracy}, "all": lambda y_pred, y_true: 1.0}
    assert list(model_of(total, metrics).evaluate(data())) == ["val_loss", "val_digit_a", "val_all"]


def test_members_of_a_collection_are_named_after_their_output():
    scores = tmc.BinaryF1Score(), tmc.BinaryRecall()
    collection = minikeras.Transformed(
        torchmetrics.MetricCollection(list(scores)), torch.sigmoid, torch.Tensor.int
    )
    model = model_of(both(), {"parity": {"scores": collection}})
    X, y = data()
    values = model.evaluate((X, y), batch_size=3)
    guess = model.predict(X)["parity"] > 0
    assert list(values)[3:] == ["val_parity_BinaryF1Score", "val_parity_BinaryRecall"]
    assert values["val_parity_BinaryF1Score"] == pytest.approx(skm.f1_score(y["parity"], guess))


# --- what it combines with ------------------------------------------------------------------------


def digits_that_count(y_pred, y_true):
    """Leave out the digit 0: a mean over fewer units than the rows."""
    return minikeras.Average(
        F.cross_entropy(y_pred, y_true, ignore_index=0, reduction="sum"), (y_true != 0).sum()
    )


@pytest.mark.parametrize("options", [{}, {"jit": FAST, "steps_per_execution": 2}])
def test_loss_of_an_epoch_is_the_weighted_sum_of_parts_that_count_different_units(options):
    X, y = data()
    losses = {"digit": (digits_that_count, 2.0), "parity": nn.BCEWithLogitsLoss()}
    model = model_of(losses, lr=0.0, **options)
    outputs = model.predict(X)
    digit = F.cross_entropy(outputs["digit"], y["digit"], ignore_index=0).item()
    parity = F.binary_cross_entropy_with_logits(outputs["parity"], y["parity"]).item()
    logged = []
    of_batch = []

    def log(batch, logs):
        logged.append(dict(logs))
        of_batch.append(dict(logs.batch))

    callback = minikeras.LambdaCallback(on_batch_end=log)
    dfhistory = model.fit(1, (X, y), (X, y), batch_size=9, callbacks=[callback], verbose=0)
    expected = {"loss": 2 * digit + parity, "digit_loss": digit, "parity_loss": parity}
    assert list(dfhistory)[:3] == list(expected)
    for name, value in expected.items():
        assert dfhistory[name].iloc[0] == pytest.approx(value, rel=1e-6)
        assert dfhistory[f"val_{name}"].iloc[0] == pytest.approx(value, rel=1e-6)
    assert logged[-1] == pytest.approx(expected, rel=1e-6)
    last = of_batch[-1]
    assert last["loss"] == pytest.approx(2 * last["digit_loss"] + last["parity_loss"], rel=1e-6)


def test_gradient_of_parts_that_count_different_units_is_that_of_the_sum_of_their_means():
    X, y = data(20)
    model = model_of({"digit": (digits_that_count, 2.0), "parity": nn.BCEWithLogitsLoss()})
    twin = copy.deepcopy(model)
    outputs = twin(X)
    loss = 2 * F.cross_entropy(outputs["digit"], y["digit"], ignore_index=0)
    loss = loss + F.binary_cross_entropy_with_logits(outputs["parity"], y["parity"])
    loss.backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    model.fit(1, [(X, y)], verbose=0)
    assert_same_weights(model, twin)


def test_accumulate_with_losses_by_name_is_the_step_of_all_rows():
    X, y = data()
    expected = model_of(both())
    expected.fit(2, [(X, y)], verbose=0)
    model = model_of(both(), accumulate=3)
    model.fit(2, list(batches_of(X, y)), verbose=0)
    assert_same_weights(model, expected, 1e-5)


def test_accumulate_refuses_losses_that_count_different_units_and_says_what_to_do():
    losses = {"digit": digits_that_count, "parity": nn.BCEWithLogitsLoss()}
    model = model_of(losses, accumulate=2)
    before = copy_weights(model)
    with pytest.raises(ValueError, match="different units") as caught:
        model.fit(1, data(), verbose=0)
    assert str(caught.value) == (
        "the losses count different units: digit_loss an Average(total, count) and parity_loss a "
        "mean over rows. accumulate=2 adds up the gradients of several batches and divides them by "
        "one count, so expected means over rows from all, or one Average alone with a weight above "
        "0. Return means over rows, or compile with accumulate=1."
    )
    torch.testing.assert_close(before, copy_weights(model), rtol=0, atol=0)
    model_of(losses, accumulate=1).fit(1, data(), verbose=0)
    alone = {"digit": digits_that_count, "parity": (nn.BCEWithLogitsLoss(), 0.0)}
    X, y = data()
    model = model_of(alone, accumulate=3)
    model.fit(1, list(batches_of(X, y)), verbose=0)
    expected = model_of(alone)
    expected.fit(1, [(X, y)], verbose=0)
    assert_same_weights(model, expected, 1e-5)


def test_losses_by_name_with_a_weight_per_row_weigh_each_part():
    X, y = data()
    weight = torch.rand(ROWS)
    losses = {
        "digit": nn.CrossEntropyLoss(reduction="none"),
        "parity": (nn.BCEWithLogitsLoss(reduction="none"), 0.5),
    }
    model = model_of(losses, lr=0.0)
    dfhistory = model.fit(1, (X, y, weight), (X, y), verbose=0)
    outputs = model.predict(X)
    digit = F.cross_entropy(outputs["digit"], y["digit"], reduction="none")
    parity = F.binary_cross_entropy_with_logits(
        outputs["parity"], y["parity"], reduction="none"
    ).squeeze(1)
    row = dfhistory.iloc[0]
    assert row["digit_loss"] == pytest.approx((digit * weight).mean().item(), rel=1e-5)
    assert row["loss"] == pytest.approx(((digit + 0.5 * parity) * weight).mean().item(), rel=1e-5)
    assert row["val_loss"] == pytest.approx((digit + 0.5 * parity).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"so loss 'digit_loss' must have a value per row"):
        model_of(both()).fit(1, (X, y, weight), verbose=0)
    with pytest.raises(ValueError, match=r"loss 'digit_loss' gave Tensor .* expected one number"):
        model_of(losses).fit(1, (X, y), verbose=0)


class Center(nn.Module):
    """A loss with a weight of its own, a buffer and a mode."""

    def __init__(self):
        super().__init__()
        self.center = nn.Parameter(torch.zeros(1))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, y_pred, y_true):
        if self.training:
            self.calls += 1
        return ((y_pred - y_true - self.center) ** 2).mean()


def test_losses_by_name_are_trained_and_in_eval_mode_at_evaluation_as_one_loss_is():
    X, y = data()
    center = Center()
    model = Two()
    model.compile({"digit": nn.CrossEntropyLoss(), "parity": center}, device="cpu")
    model.fit(1, (X, y), (X, y), verbose=0)
    assert center.calls.item() == 3
    assert center.center.item() != 0
    assert center.training
    model.evaluate((X, y))
    assert center.calls.item() == 3
    assert set(model.state_dict()) == set(Two().state_dict())


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize("loss", [nn.MSELoss, lambda: squared])
def test_losses_by_name_resume_within_an_epoch_as_if_never_interrupted(loss, tmp_path):
    class Parts(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 1)

        def forward(self, x):
            return self.a(x), x[:, :1]

    class Labels(torch.utils.data.Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, row):
            x = torch.tensor([row / 60, 1.0])
            return x, (x[:1] ** 2, x[1:])

    def losses():
        return minikeras.Regularized({0: loss(), 1: (Center(), 0.5)}, nn.Linear(2, 1), l2=0.1)

    def parts():
        return {
            "net": Parts,
            "loss": losses,
            "data": Labels,
            "compile": {"metrics_dict": {0: {"mae": nn.L1Loss()}}},
        }

    assert_exact(parts, tmp_path, kills=(5,))


def squared(y_pred, y_true):
    return minikeras.Average(((y_pred - y_true) ** 2).sum(), y_pred.numel())


def test_regularized_takes_a_dict_of_losses_and_adds_the_penalty_once():
    X, y = data()
    net = Two()
    weights = copy_weights(net)
    for losses in (both(), both() | {"digit": digits_that_count}):
        net.load_state_dict(weights)
        twin = copy.deepcopy(net)
        compiled(net, minikeras.Regularized(losses, net, l2=0.1), lr=0.0)
        values = net.evaluate((X, y), batch_size=9)
        compiled(twin, losses, lr=0.0)
        expected = twin.evaluate((X, y), batch_size=9)
        expected["val_loss"] += minikeras.l2_penalty(net, 0.1).item()
        assert values == pytest.approx(expected, rel=1e-6)
        dfhistory = net.fit(1, (X, y), batch_size=9, verbose=0)
        assert dfhistory["loss"].iloc[0] == pytest.approx(expected["val_loss"], rel=1e-6)


def test_losses_by_name_in_a_custom_step_are_one_tensor_with_columns_for_its_parts():
    class Doubled(Two):
        def train_step(self, features, labels, sample_weight=None):
            outputs = self(features)
            loss = 2 * self.compute_loss(outputs, labels)
            self.backward(loss)
            metrics = self.compute_metrics(outputs, labels)
            self.optimizer_step()
            return {"loss": loss, **metrics}

    torch.manual_seed(0)
    row = compiled(Doubled(), both(), lr=0.0).fit(1, data(), verbose=0).iloc[0]
    assert row["loss"] == pytest.approx(2 * row["digit_loss"] + row["parity_loss"], rel=1e-6)


def test_early_stopping_and_callbacks_know_the_columns_of_the_parts():
    X, y = data()
    model = model_of(both())
    stopping = minikeras.EarlyStopping(monitor="val_digit_loss", patience=1, min_delta=100)
    assert len(model.fit(5, (X, y), (X, y), callbacks=[stopping], verbose=0)) == 2
    monitor = minikeras.EarlyStopping(monitor="val_digits_loss")
    with pytest.raises(ValueError, match="Did you mean 'val_digit_loss'"):
        model.fit(1, (X, y), (X, y), callbacks=[monitor], verbose=0)


def test_losses_by_name_under_mixed_precision_are_near_those_of_float32():
    X, y = data()
    expected = model_of(both()).fit(2, (X, y), verbose=0)
    found = model_of(both(), precision="bf16").fit(2, (X, y), verbose=0)
    assert found.iloc[-1].to_dict() == pytest.approx(expected.iloc[-1].to_dict(), rel=0.02)


# --- mistakes -------------------------------------------------------------------------------------


def check_refused(losses, labels, message, metrics_dict=None):
    """Check that the first batch raises this error, before a weight moves."""
    model = model_of(losses, metrics_dict)
    before = copy_weights(model)
    with pytest.raises(ValueError, match=re.escape(message[:20])) as caught:
        model.fit(1, (data()[0], labels), verbose=0)
    assert str(caught.value) == message
    torch.testing.assert_close(before, copy_weights(model), rtol=0, atol=0)


def test_loss_for_an_output_that_is_not_there_says_which_there_are():
    _, y = data()
    message = (
        "loss 'digt': the outputs have no part 'digt'; there are 'digit', 'parity'. Did you mean "
        "'digit'? Name losses and metrics after the outputs that forward returns."
    )
    labels = {"digt": y["digit"]}
    check_refused({"digt": nn.CrossEntropyLoss()}, labels, message)
    check_refused({"digt": nn.CrossEntropyLoss()}, y, message)  # not that a label has no loss
    model_of({"digit": nn.CrossEntropyLoss()}).fit(1, (data()[0], {"digit": y["digit"]}), verbose=0)


def test_loss_without_a_label_says_which_labels_there_are():
    _, y = data()
    message = (
        "loss 'parity': the labels have no part 'parity'; there are 'digit', 'party'. Did you mean "
        "'party'? Give each output with a loss or a metric a label of the same name."
    )
    labels = {"digit": y["digit"], "party": y["parity"]}

    def sees_all(y_pred, y_true):  # so that any label may be used
        return 0.0

    check_refused(both(), labels, message, {"m": sees_all})
    labels["parity"] = labels.pop("party")
    model_of(both()).fit(1, (data()[0], labels), verbose=0)


def test_labels_that_are_one_tensor_for_losses_by_name_are_refused():
    _, y = data()
    message = (
        "loss 'digit': the labels are Tensor (32,) int64; expected a dict, a named tuple or a "
        "tuple with a part 'digit'. Give each output with a loss or a metric a label of the same "
        "name."
    )
    check_refused(both(), y["digit"], message)


def test_label_that_nothing_uses_is_refused_with_what_to_do():
    _, y = data()
    message = (
        "the labels have a part 'parity', and no loss and no metric is for it; there are losses "
        "and metrics for 'digit'. Leave it out of the labels; or give it a loss of weight 0, "
        "(loss, 0.0), which is logged and not trained."
    )
    check_refused({"digit": nn.CrossEntropyLoss()}, y, message, {"digit": {"a": accuracy}})
    remedy = {"digit": nn.CrossEntropyLoss(), "parity": (nn.BCEWithLogitsLoss(), 0.0)}
    model_of(remedy, {"digit": {"a": accuracy}}).fit(1, data(), verbose=0)


def test_labels_in_a_tuple_for_losses_by_name_are_refused_with_what_to_do():
    X, y = data()
    message = (
        "the labels have the parts 0, 1, and the losses and metrics are for 'digit', 'parity'; "
        "expected the same names. Build the labels as forward builds the outputs: a dict with "
        "these keys, or a tuple with these positions."
    )
    check_refused(both(), tuple(y.values()), message)
    model_of(both()).fit(1, (X, dict(zip(both(), y.values(), strict=True))), verbose=0)


def test_metrics_of_an_output_that_is_not_there_say_which_there_are():
    _, y = data()
    message = (
        "metric 'digits_a': the outputs have no part 'digits'; there are 'digit', 'parity'. Did "
        "you mean 'digit'? Name losses and metrics after the outputs that forward returns."
    )
    check_refused(both(), y, message, {"digits": {"a": accuracy}})


def test_loss_of_one_output_is_checked_and_named():
    X, y = data()
    message = (
        "loss 'parity': predictions (32, 1) and labels (32,) would broadcast to (32, 32). Pass "
        "labels.unsqueeze(-1), in NumPy labels[:, None], in pandas labels.to_frame(), or squeeze "
        "the predictions."
    )
    losses = {"digit": nn.CrossEntropyLoss(), "parity": nn.MSELoss()}
    check_refused(losses, y | {"parity": y["parity"].squeeze(1)}, message)
    message = (
        "loss 'digit': label 7 is not a valid class: the model has 3 outputs, so labels go from "
        "0 to 2. Number the classes from 0, or give the model more outputs."
    )
    check_refused(both(), y | {"digit": y["digit"] * 0 + 7}, message)
    model = model_of(both())
    with pytest.raises(ValueError, match=r"^loss 'digit': labels are float32"):
        model.fit(1, (X, y | {"digit": y["digit"].float()}), verbose=0)
    bad = [(X, y), (X, y | {"digit": y["digit"] + 1})]  # in a later batch as well
    with pytest.raises(ValueError, match=r"^loss 'digit': label 3 is not a valid class"):
        model.fit(1, bad, verbose=0)


def test_softmax_before_one_of_several_losses_warns_and_names_it():
    class Softmax(Two):
        def forward(self, x):
            outputs = super().forward(x)
            return outputs | {"digit": outputs["digit"].softmax(1)}

    model = compiled(Softmax(), both())
    with pytest.warns(UserWarning, match=r"^loss 'digit': the model's outputs already sum to 1"):
        model.fit(1, data(), verbose=0)


def test_torchmetrics_on_an_output_whose_loss_takes_raw_scores_is_told():
    model = model_of(both(), {"parity": {"f1": tmc.BinaryF1Score()}})
    with torch.no_grad():
        model.parity.weight.zero_()
        model.parity.bias.fill_(0.5)
    with pytest.warns(UserWarning, match="raw scores, as BCEWithLogitsLoss takes them"):
        model.evaluate(data())
    metric = minikeras.Transformed(tmc.BinaryF1Score(), y_pred=torch.sigmoid)
    model_of(both(), {"parity": {"f1": metric}}).evaluate(data())


def test_nan_in_one_of_several_losses_names_it():
    X, y = data()
    y["parity"][40] = torch.nan
    with pytest.raises(FloatingPointError) as caught:
        model_of(both()).fit(1, (X, y), batch_size=70, verbose=0)
    said = str(caught.value)
    assert "It is a sum of losses, and parity_loss is not finite. The labels of this batch" in said


def test_part_that_returns_an_average_in_some_batches_alone_is_refused():
    returned = []

    def sometimes(y_pred, y_true):
        returned.append(1)
        loss = F.cross_entropy(y_pred, y_true)
        return loss if len(returned) % 2 else minikeras.Average(loss * 9, 9)

    model = model_of(both() | {"digit": sometimes})
    with pytest.raises(ValueError, match="one returned an Average in some batches"):
        model.fit(1, data(), verbose=0)


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ({}, ValueError, "loss_func is an empty dict; expected at least one loss with a weight"),
        ({"a": (nn.MSELoss(), 0)}, ValueError, "loss_func gives every output the weight 0, so"),
        (
            {"a": (nn.MSELoss(), -1)},
            ValueError,
            "the weight of loss 'a' must be a number of 0 or more, and finite, got -1.",
        ),
        ({"a": (nn.MSELoss(), float("nan"))}, ValueError, "the weight of loss 'a' must be a numb"),
        ({"a": (nn.MSELoss(), float("inf"))}, ValueError, "the weight of loss 'a' must be a numb"),
        ({"a": (nn.MSELoss(), "1")}, ValueError, "the weight of loss 'a' must be a number of 0 o"),
        (
            {"a": (nn.MSELoss(), 1, 2)},
            TypeError,
            "loss 'a' must be a loss or a pair (loss, weight), got (MSELoss, int, int). Pass for "
            "instance (nn.MSELoss(), 0.5).",
        ),
        (
            {"a": (0.5, nn.MSELoss())},
            TypeError,
            "loss 'a' must be a pair (loss, weight), got (float, MSELoss). Pass the loss first, "
            "for instance (nn.MSELoss(), 0.5).",
        ),
        (
            {"a": (nn.MSELoss(), nn.Parameter(torch.ones(())))},
            TypeError,
            "the weight of loss 'a' must be a constant, got Parameter () float32 with a gradient, "
            "which would not be trained. For a weight that is learned write a loss module that has "
            "it as a parameter.",
        ),
        (
            {"a": nn.MSELoss(), "b": None},
            TypeError,
            "loss 'b' is None; expected a loss or a pair (loss, weight). Leave 'b' out, and its "
            "label too: an output needs no loss.",
        ),
        ({"a": {"b": nn.MSELoss()}}, TypeError, "loss 'a' must be a loss or a pair (loss, weight)"),
        ({"a": nn.MSELoss}, TypeError, "loss 'a' is the class MSELoss; expected an instance."),
        ({"a": "mse"}, TypeError, "loss 'a' must be a function of (y_pred, y_true) or a module, g"),
        ({True: nn.MSELoss()}, TypeError, "loss_func has the name True for an output; expected"),
        ({"0": nn.MSELoss(), 0: nn.MSELoss()}, ValueError, "loss_func has two outputs whose colu"),
        ({"val": nn.MSELoss()}, ValueError, "loss_func gives a column the name 'val_loss', which"),
        (
            [nn.MSELoss(), nn.MSELoss()],
            TypeError,
            "loss_func must be a function of (y_pred, y_true), a module or a dict of them, got "
            "[MSELoss, MSELoss]. For several outputs pass a dict by their names, or by their "
            "positions {0: loss, 1: (loss, weight)}.",
        ),
    ],
)
def test_compile_refuses_losses_by_name_that_make_no_sense(losses, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        Two().compile(losses)


@pytest.mark.parametrize(
    ("metrics_dict", "message"),
    [
        (
            {"digit": {"loss": accuracy}},
            "metrics_dict has the name 'digit_loss', which is the column of a loss of loss_func. "
            "Give the metric another name.",
        ),
        (
            {"digit": {"a": accuracy}, "digit_a": accuracy},
            "metrics_dict gives two metrics the name 'digit_a'; expected a column for each. Give "
            "one of them another name.",
        ),
    ],
)
def test_compile_refuses_metrics_by_output_with_a_name_that_is_taken(metrics_dict, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Two().compile(both(), metrics_dict=metrics_dict)


def test_compile_refuses_metrics_of_an_output_in_a_list_and_says_how_to_write_them():
    message = (
        "metric 'digit' must be a function of (y_pred, y_true) or an object with update, compute "
        "and reset, got [function]. Give each metric a name of its own; those of one of several "
        "outputs go into a dict, {output: {name: metric}}."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        Two().compile(both(), metrics_dict={"digit": [accuracy]})
    model_of(both(), {"digit": {"accuracy": accuracy}}).fit(1, data(), verbose=0)


def test_accumulate_refuses_a_sum_over_rows_among_losses_by_name():
    losses = {"digit": nn.CrossEntropyLoss(reduction="sum"), "parity": nn.BCEWithLogitsLoss()}
    with pytest.raises(ValueError, match=r"^loss 'digit' has reduction=.sum., and accumulate=2"):
        Two().compile(losses, accumulate=2)


def test_metric_of_all_outputs_that_wants_one_says_how_to_write_it():
    model = model_of(both(), {"accuracy": accuracy})
    with pytest.raises(AttributeError) as caught:
        model.fit(1, data(), verbose=0)
    assert caught.value.__notes__[0].endswith(
        "For one output alone write metrics_dict={'digit': {...: metric}}."
    )
