"""on_batch_begin, and the values of one batch alone in the logs of on_batch_end."""

import gc
import math
import weakref

import pytest
import torch
from helpers.compiling import FAST
from helpers.models import Net, accuracy, compiled, points
from sklearn.metrics import accuracy_score
from torch import nn
from torchmetrics.classification import BinaryF1Score

import minikeras
from minikeras import Average, LambdaCallback

ROWS = (20, 20, 20, 20, 20, 20, 20, 7)
BATCHES = [points(rows) for rows in ROWS]


def bare_losses(model, batches, window=1, lr=0.1):
    """Return the loss of each batch, and its accuracy, in a bare loop from the model's weights."""
    net = Net()
    net.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    values = []
    for number, (X, y) in enumerate(batches, start=1):
        outputs = net(X)
        loss = nn.functional.binary_cross_entropy(outputs, y)
        values.append({"loss": loss.item(), "accuracy": accuracy(outputs, y).item()})
        (loss / window).backward()
        if number % window == 0:
            optimizer.step()
            optimizer.zero_grad()
    return values


class Keep(minikeras.Callback):
    """Note the moments, and the values of each batch."""

    def __init__(self):
        self.moments = []
        self.values = []
        self.means = []

    def on_batch_begin(self, batch):
        self.moments.append(f"{batch} begins")

    def on_batch_end(self, batch, logs):
        self.moments.append(f"{batch} ends")
        self.values.append(dict(logs.batch))
        self.means.append(dict(logs))


def train(batches=BATCHES, epochs=1, metrics_dict=None, model=None, **options):
    """Fit with `Keep`; return the callback and the values of a bare loop."""
    torch.manual_seed(1)
    model = model or Net()
    expected = bare_losses(model, batches, options.get("accumulate", 1))
    keep = Keep()
    compiled(model, None, metrics_dict or {"accuracy": accuracy}, **options)
    model.fit(epochs, batches, callbacks=[keep], verbose=0)
    return keep, expected


def assert_close(found, expected):
    assert len(found) == len(expected)
    for values, others in zip(found, expected, strict=True):
        assert values == pytest.approx(others, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"jit": FAST}],
    ids=["eager", "jit"],
)
def test_batch_values_are_those_of_a_bare_loop(options):
    keep, expected = train(**options)
    assert_close(keep.values, expected)
    assert list(keep.values[0]) == ["loss", "accuracy"]
    assert keep.means[-1]["loss"] != pytest.approx(keep.values[-1]["loss"])


def test_batch_values_are_those_of_each_small_batch_when_gradients_are_accumulated():
    keep, expected = train(BATCHES[:6], accumulate=2)
    assert_close(keep.values, expected)


@pytest.mark.parametrize("metric", [accuracy, BinaryF1Score()], ids=["function", "object"])
def test_batch_values_with_steps_per_execution_are_those_of_the_last_batch_of_a_call(metric):
    keep, expected = train(metrics_dict={"accuracy": metric}, jit=FAST, steps_per_execution=3)
    # the first by itself, and what is left at the end
    assert keep.moments == [
        "1 begins",
        "1 ends",
        "2 begins",
        "4 ends",
        "5 begins",
        "7 ends",
        "8 begins",
        "8 ends",
    ]
    expected = [expected[number] for number in (0, 3, 6, 7)]
    if metric is not accuracy:
        expected = [{"loss": values["loss"]} for values in expected]
    assert_close(keep.values, expected)


def test_batch_values_with_steps_per_execution_in_eager_mode_are_of_the_last_batch_too():
    def outside(y_pred, y_true):  # leaves torch, so that it is called outside the graph
        return accuracy_score(y_true.numpy(), y_pred.numpy() > 0.5)

    with pytest.warns(UserWarning, match="not one graph"):
        keep, expected = train(metrics_dict={"accuracy": outside}, jit=FAST, steps_per_execution=3)
    assert_close(keep.values, [expected[number] for number in (0, 3, 6, 7)])


def test_batch_begins_before_its_step_and_ends_after_it():
    seen = []
    model = compiled(Net())

    def note(*_):
        seen.append((model.optimizer_steps, model.net_weight()))

    model.net_weight = lambda: model.fc1.weight.detach().clone()
    model.fit(
        1,
        BATCHES[:2],
        callbacks=[LambdaCallback(on_batch_begin=note, on_batch_end=note)],
        verbose=0,
    )
    assert [steps for steps, _ in seen] == [0, 1, 1, 2]
    assert torch.equal(seen[1][1], seen[2][1])
    assert not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("options", [{}, {"jit": FAST}], ids=["eager", "jit"])
def test_batch_begin_may_set_the_rate_of_its_step(options):
    model = Net()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    compiled(model, **options)

    def set_rate(batch):
        model.optimizer.param_groups[0]["lr"] = 0.0

    model.fit(1, BATCHES[:3], callbacks=[LambdaCallback(on_batch_begin=set_rate)], verbose=0)
    for parameter, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)


def test_batch_begin_may_evaluate_the_model():
    model = compiled(Net(), metrics_dict={"accuracy": accuracy})
    keep, expected = Keep(), bare_losses(model, BATCHES)
    evaluate = LambdaCallback(on_batch_begin=lambda batch: model.evaluate(points(30)))
    model.fit(1, BATCHES, callbacks=[evaluate, keep], verbose=0)
    assert_close(keep.values, expected)


def test_batch_values_are_of_averages_and_of_what_a_custom_step_returns():
    class Extra(Net):
        def train_step(self, features, labels, sample_weight=None):
            results = super().train_step(features, labels, sample_weight)
            shown = Average(torch.tensor(6.0), torch.tensor(4.0))
            empty = Average(torch.tensor(0.0), 0)
            return {**results, "shown": shown, "empty": empty, "rows": float(len(features))}

    keep = Keep()
    compiled(Extra()).fit(1, BATCHES[-2:], callbacks=[keep], verbose=0)
    assert [values["shown"] for values in keep.values] == [1.5, 1.5]
    assert [values["rows"] for values in keep.values] == [20.0, 7.0]
    assert all(math.isnan(values["empty"]) for values in keep.values)


def test_batch_values_of_an_unknown_name_are_a_key_error_and_show_as_a_dict():
    shown = []

    def look(batch, logs):
        with pytest.raises(KeyError, match="accuracy"):
            logs.batch["accuracy"]
        shown.append((repr(logs.batch), len(logs.batch), "loss" in logs.batch))

    compiled(Net(), lr=0.0).fit(
        1, BATCHES[:1], callbacks=[LambdaCallback(on_batch_end=look)], verbose=0
    )
    text, size, has_loss = shown[0]
    assert text.startswith("{'loss': 0.")
    assert (size, has_loss) == (1, True)


def test_batch_values_keep_nothing_alive_after_the_pass_and_no_graph_if_they_are_kept():
    kept = []
    losses = []

    class Watched(Net):
        def train_step(self, features, labels, sample_weight=None):
            results = super().train_step(features, labels, sample_weight)
            losses.append(weakref.ref(results["loss"]))
            return results

    model = compiled(Watched())
    alive = []

    def look(batch, logs):
        alive.append(sum(loss() is not None for loss in losses))
        kept.append(logs.batch)

    model.fit(1, BATCHES, callbacks=[LambdaCallback(on_batch_end=look)], verbose=0)
    gc.collect()
    assert set(alive) == {1}  # of the current batch alone
    assert not any(loss() is not None for loss in losses)
    assert all(not values.results["loss"].requires_grad for values in kept)
    assert len({values["loss"] for values in kept}) == len(BATCHES)


def test_batch_values_are_the_same_after_a_resume(tmp_path):
    def fit(*callbacks, **kwargs):
        torch.manual_seed(1)
        keep = Keep()
        compiled(Net(), metrics_dict={"accuracy": accuracy}).fit(
            1, BATCHES, callbacks=[*callbacks, keep], verbose=0, **kwargs
        )
        return keep

    def interrupt(batch, logs):
        if batch == 5:
            raise KeyboardInterrupt

    expected = fit()
    file = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        fit(LambdaCallback(on_batch_end=interrupt), **file)
    resumed = fit(**file)
    left = len(resumed.values)
    assert 0 < left < len(BATCHES)
    assert resumed.values == expected.values[-left:]
    assert resumed.moments == expected.moments[-2 * left :]


def test_batch_begin_error_names_the_callback_and_the_batch():
    def fail(batch):
        if batch == 2:
            raise ZeroDivisionError

    model = compiled(Net())
    with pytest.raises(ZeroDivisionError) as raised:
        model.fit(1, BATCHES, callbacks=[LambdaCallback(on_batch_begin=fail)], verbose=0)
    assert raised.value.__notes__ == [
        "LambdaCallback.on_batch_begin",
        "dl_train, batch 2",
        "epoch 1",
    ]
