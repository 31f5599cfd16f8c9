"""What losses, metrics and steps return: one number or an Average, and no tuple of two."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.compiling import FAST
from helpers.metrics import mse
from helpers.models import Net, compiled, points
from torch import nn

import minikeras
from minikeras import Average

WEIGHT = torch.tensor([0.3, 2.5, 1.7], dtype=torch.float64)


def contrastive(embeddings, labels):
    """The mean over all pairs of the batch, and how many pairs there are."""
    distance = torch.cdist(embeddings, embeddings)
    each = torch.where(labels[:, None] == labels[None], distance**2, torch.relu(1 - distance) ** 2)
    return each.mean(), each.numel()


def total_of(embeddings, labels):
    mean, pairs = contrastive(embeddings, labels)
    return Average(mean * pairs, pairs)


WAYS_OUT = {"[0]": lambda p, t: contrastive(p, t)[0], "Average(total, count)": total_of}


@pytest.mark.parametrize("loss_func", WAYS_OUT.values(), ids=WAYS_OUT)
def test_loss_in_a_tuple_has_two_remedies_that_train_as_a_bare_loop(loss_func):
    X = torch.randn(60, 4)
    labels = torch.arange(60) % 4
    net = nn.Linear(4, 2)
    twin = copy.deepcopy(net)
    model = minikeras.Model(net)
    model.compile(contrastive, torch.optim.SGD(net.parameters(), lr=0.1), device="cpu")
    with pytest.raises(ValueError, match=r"such as \[0\].* or minikeras\.Average\(total, count\)"):
        model.fit(1, (X, labels), verbose=0)
    model.compile(loss_func, torch.optim.SGD(net.parameters(), lr=0.1), device="cpu")
    loss = model.fit(3, [(X, labels)], verbose=0)["loss"].tolist()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    expected = []
    for _ in range(3):
        value = contrastive(twin(X), labels)[0]
        expected.append(value.item())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(net.weight, twin.weight)


def by_class_weight(y_pred, y_true):
    """The weighted cross entropy, whose count is a sum of class weights."""
    total = F.cross_entropy(y_pred, y_true, WEIGHT, reduction="sum")
    return Average(total, WEIGHT[y_true].sum())


def by_a_python_count(y_pred, y_true):
    total, count = by_class_weight(y_pred, y_true)
    return Average(total, count.item())


def of_one_element(y_pred, y_true):
    total, count = by_class_weight(y_pred, y_true)
    return Average(total.reshape(1), count.reshape(1))


FORMS = {
    "tensors": (by_class_weight, {}),
    "a Python count": (by_a_python_count, {}),
    "of one element": (of_one_element, {}),
    "tensors, accumulated": (by_class_weight, {"accumulate": 3}),
    "a Python count, accumulated": (by_a_python_count, {"accumulate": 3}),
    "tensors, compiled": (by_class_weight, {"jit": FAST}),
    "of one element, compiled": (of_one_element, {"jit": FAST}),
}


@pytest.mark.parametrize(("loss_func", "options"), FORMS.values(), ids=FORMS)
def test_average_count_may_be_a_sum_of_class_weights(loss_func, options):
    X = torch.randn(50, 5, dtype=torch.float64)
    labels = torch.randint(0, 3, (50,))
    batches = [(X[start : start + 8], labels[start : start + 8]) for start in range(0, 50, 8)]
    model = minikeras.Model(nn.Linear(5, 3).double())
    twin = copy.deepcopy(model.net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.compile(loss_func, optimizer, {"again": loss_func}, device="cpu", **options)
    history = model.fit(1, batches, verbose=0)
    step = torch.optim.SGD(twin.parameters(), lr=0.1)
    every = options.get("accumulate", 1)
    total = count = 0.0
    for start in range(0, len(batches), every):
        window = batches[start : start + every]
        inputs = torch.cat([x for x, _ in window])
        targets = torch.cat([t for _, t in window])
        loss = F.cross_entropy(twin(inputs), targets, WEIGHT)
        loss.backward()
        step.step()
        step.zero_grad()
        total += loss.item() * WEIGHT[targets].sum().item()
        count += WEIGHT[targets].sum().item()
    torch.testing.assert_close(model.net.weight, twin.weight)
    assert (
        history["loss"].iloc[0]
        == history["again"].iloc[0]
        == pytest.approx(total / count, rel=1e-12)
    )
    expected = F.cross_entropy(model.net(X), labels, WEIGHT).item()
    assert model.evaluate((X, labels), batch_size=7)["val_loss"] == pytest.approx(
        expected, rel=1e-12
    )


def mean_of_the_positive(y_pred, y_true):
    """A mean over positives times their number, which is NaN in a batch without a positive."""
    positive = y_true > 0
    each = (y_pred - y_true) ** 2
    return Average(each[positive].mean() * positive.sum(), positive.sum())


COUNTS = {
    "a tensor": mean_of_the_positive,
    "a number": lambda p, t: Average(mean_of_the_positive(p, t).total, int((t > 0).sum())),
}


@pytest.mark.parametrize("metric", COUNTS.values(), ids=COUNTS)
def test_average_of_count_0_counts_for_nothing_even_if_its_total_is_nan(metric):
    X = torch.randn(12, 3)
    y = torch.rand(12, 1)
    y[4:8] = -1.0
    model = compiled(minikeras.Model(nn.Linear(3, 1)), mse, {"positive": metric})
    with torch.no_grad():
        expected = ((model(X) - y) ** 2)[y > 0].mean().item()
    assert model.evaluate((X, y), batch_size=4)["val_positive"] == pytest.approx(expected, rel=1e-6)


def test_average_of_count_0_moves_no_weight():
    X = torch.randn(4, 3)
    y = -torch.ones(4, 1)
    model = compiled(minikeras.Model(nn.Linear(3, 1)), lambda p, t: Average(p.sum(), 0))
    before = model.net.weight.clone()
    model.fit(1, (X, y), verbose=0)
    assert torch.equal(model.net.weight, before)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
def test_average_of_a_count_below_0_in_a_later_batch_is_refused_before_its_step(options):
    class Once(minikeras.Model):
        def optimizer_step(self, optimizer=None):
            super().optimizer_step(optimizer)
            self.kept = self.net.weight.detach().clone()

    model = compiled(
        Once(nn.Linear(2, 1)), lambda p, t: Average(mse(p, t) * len(p), t.sum()), **options
    )
    batches = [(torch.randn(4, 2), torch.ones(4, 1)), (torch.randn(4, 2), -torch.ones(4, 1))]
    with pytest.raises(
        ValueError,
        match="the loss gave an Average with count -4; expected a finite number, 0 or more",
    ):
        model.fit(1, batches, verbose=0)
    assert torch.equal(model.net.weight, model.kept)


def test_metric_whose_tuple_comes_in_a_later_batch_is_refused():
    calls = []

    def metric(y_pred, y_true):
        calls.append(1)
        return 1.0 if len(calls) == 1 else (0.5, 0.25)

    with pytest.raises(ValueError, match=r"'m' gave a tuple, \(float, float\)"):
        compiled(metrics_dict={"m": metric}).fit(1, points(8), batch_size=4, verbose=0)


class Step(Net):
    result = (0.5, 0.25)

    def train_step(self, features, labels):
        return super().train_step(features, labels) | {"part": self.result}

    def evaluate_step(self, features, labels):
        return super().evaluate_step(features, labels) | {"part": self.result}


@pytest.mark.parametrize("verb", ["fit", "evaluate"])
def test_custom_step_may_return_an_average_and_no_tuple(verb):
    data = points(8)
    model = compiled(Step())
    with pytest.raises(ValueError, match=r"_step's 'part' gave a tuple, \(float, float\)"):
        model.fit(1, data, verbose=0) if verb == "fit" else model.evaluate(data)
    model.result = Average(0.5, 0.25)
    assert model.evaluate(data)["val_part"] == 2.0
    assert model.fit(1, data, verbose=0)["part"].iloc[0] == 2.0


def test_backward_takes_an_average_and_no_tuple():
    class Own(Net):
        def train_step(self, features, labels):
            outputs = self.compute_outputs(features)
            self.backward((outputs.sum(), len(outputs)))
            self.optimizer_step()
            return {"loss": 0.0}

    with pytest.raises(ValueError, match=r"backward was given a loss that gave a tuple"):
        compiled(Own()).fit(1, points(8), verbose=0)


def test_metric_object_that_computes_a_tuple_is_refused_at_the_end_of_the_pass():
    class Both:
        def reset(self):
            self.values = []

        def update(self, y_pred, y_true):
            self.values.append(float(y_pred.mean()))

        def compute(self):
            return sum(self.values), len(self.values)

    model = compiled(metrics_dict={"m": Both()})
    with pytest.raises(ValueError, match=r"metric 'm': compute\(\) gave \(float, int\)"):
        model.fit(1, points(8), verbose=0)
    Both.compute = lambda self: Average(sum(self.values), len(self.values))
    assert 0 < model.evaluate(points(8))["val_m"] < 1


def test_regularized_refuses_a_loss_with_parts_with_both_remedies():
    model = minikeras.Model(nn.Linear(3, 2))
    loss_func = minikeras.Regularized(lambda p, t: (mse(p, t), 1.0), model, l2=0.1)
    with pytest.raises(ValueError, match=r"the loss gave a tuple, \(Tensor \(\) float32, float\)"):
        compiled(model, loss_func).fit(1, (torch.randn(4, 3), torch.randn(4, 2)), verbose=0)


def test_number_of_an_average_with_a_gradient_is_read_without_a_warning():
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch warns once in a process
    try:
        total = torch.tensor(6.0, requires_grad=True)
        assert float(Average(total, torch.tensor(4.0))) == 1.5
    finally:
        torch.set_warn_always(before)
