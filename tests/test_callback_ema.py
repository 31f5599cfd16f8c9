"""EMA averages the weights as a plain loop does."""

import copy
import warnings

import pytest
import torch
from helpers.callbacks import (
    BATCHES,
    fit,
    log,
    nn_with_batch_norm,
)
from helpers.compare import assert_equal_tensors, copy_weights
from helpers.models import compiled
from torch import nn

from minikeras import (
    EMA,
    Callback,
    EarlyStopping,
    LambdaCallback,
    Model,
    ModelCheckpoint,
)


def averages_of_a_plain_loop(net, epochs, decay):
    """The averaged and the raw weights at each epoch's end."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    average = None
    ends = []
    for _ in range(epochs):
        for features, labels in BATCHES:
            optimizer.zero_grad()
            nn.BCELoss()(net(features), labels).backward()
            optimizer.step()
            now = [parameter.detach().clone() for parameter in net.parameters()]
            if average is None:
                average = now
            else:
                average = [decay * a + (1 - decay) * w for a, w in zip(average, now, strict=True)]
        ends.append((average, now))
    return ends


class Peek(Callback):
    """The model's parameters at each moment."""

    def __init__(self):
        self.seen = {"on_epoch_begin": [], "on_evaluate_begin": [], "on_epoch_end": []}

    def _look(self, moment):
        self.seen[moment].append(
            [parameter.detach().clone() for parameter in self.model.parameters()]
        )

    def on_epoch_begin(self, epoch):
        self._look("on_epoch_begin")

    def on_evaluate_begin(self):
        self._look("on_evaluate_begin")

    def on_epoch_end(self, epoch, logs):
        self._look("on_epoch_end")


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("validation_freq", [1, 2])
def test_ema_is_the_average_of_a_plain_loop(evaluate, validation_freq):
    model = compiled(nn_with_batch_norm())
    net = copy.deepcopy(model)
    net.train()
    ends = averages_of_a_plain_loop(net, 4, 0.7)
    peek = Peek()
    identities = [id(parameter) for parameter in model.parameters()]
    _, dfhistory = fit(
        4, [EMA(0.7, evaluate), peek], model, val=BATCHES, validation_freq=validation_freq
    )
    held = [average if evaluate else raw for average, raw in ends]
    torch.testing.assert_close(peek.seen["on_epoch_end"], held)
    torch.testing.assert_close(
        peek.seen["on_evaluate_begin"], held[validation_freq - 1 :: validation_freq]
    )
    torch.testing.assert_close(peek.seen["on_epoch_begin"][1:], [raw for _, raw in ends[:-1]])
    torch.testing.assert_close(
        [parameter.detach() for parameter in model.parameters()], ends[-1][0]
    )
    assert [id(parameter) for parameter in model.parameters()] == identities
    buffers = dict(net.named_buffers())  # those of the training, whatever is averaged
    assert_equal_tensors(dict(model.named_buffers()), buffers)
    if evaluate:
        assert dfhistory["val_loss"].iloc[-1] == model.evaluate(BATCHES)["val_loss"]


@pytest.mark.parametrize("evaluate", [False, True])
def test_ema_follows_the_optimizer_steps_under_accumulate(evaluate):
    model = compiled(accumulate=2)  # of 3 batches an epoch: the second step closes a window of one
    net = copy.deepcopy(model)
    average = None
    ends = []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        for batches in (BATCHES[:2], BATCHES[2:]):
            features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            optimizer.zero_grad()
            nn.BCELoss()(net(features), labels).backward()
            optimizer.step()
            now = [parameter.detach().clone() for parameter in net.parameters()]
            average = (
                now
                if average is None
                else [0.7 * a + 0.3 * w for a, w in zip(average, now, strict=True)]
            )
        ends.append((average, now))
    peek = Peek()
    fit(3, [EMA(0.7, evaluate), peek], model, val=BATCHES)
    held = [average if evaluate else raw for average, raw in ends]
    torch.testing.assert_close(peek.seen["on_evaluate_begin"], held)
    torch.testing.assert_close(peek.seen["on_epoch_end"], held)
    torch.testing.assert_close(
        [parameter.detach() for parameter in model.parameters()], ends[-1][0]
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "kinds",
    [
        [(0.9, True), (0.5, True)],
        [(0.9, False), (0.5, True)],
        [(0.5, True), (0.9, False)],
        [(0.9, False), (0.5, False)],
    ],
)
def test_ema_beside_other_emas_follows_the_training_and_leaves_it_alone(kinds, accumulate):
    def fitted(*emas):
        torch.manual_seed(0)
        model = compiled(accumulate=accumulate)
        raw = []
        seen = []
        look = LambdaCallback(
            on_batch_end=lambda batch, logs: raw.append(copy_weights(model)),
            on_evaluate_end=lambda: seen.append(copy_weights(model)),
        )
        model, dfhistory = fit(3, [*emas, look], model, val=BATCHES)
        return model, raw, seen, dfhistory["loss"].tolist()

    _, expected_raw, _, expected_loss = fitted()
    alone = []
    for decay, evaluate in kinds:
        ema = EMA(decay, evaluate)
        _, _, seen_alone, _ = fitted(ema)
        alone.append((ema.averaged, seen_alone))
    emas = [EMA(decay, evaluate) for decay, evaluate in kinds]
    model, raw, seen, loss = fitted(*emas)
    torch.testing.assert_close(raw, expected_raw, rtol=0, atol=0)
    assert loss == expected_loss
    for ema, (averaged, _) in zip(emas, alone, strict=True):
        torch.testing.assert_close(ema.averaged, averaged, rtol=0, atol=0)
    lender = next((number for number, (_, evaluate) in enumerate(kinds) if evaluate), 0)
    # validation sees the first that evaluates
    torch.testing.assert_close(seen, alone[lender][1], rtol=0, atol=0)
    torch.testing.assert_close(list(copy_weights(model).values()), emas[0].averaged, rtol=0, atol=0)


def test_ema_that_evaluates_lets_later_callbacks_save_and_restore_the_average(tmp_path):
    model = compiled()
    peek = Peek()
    stop = EarlyStopping("score", patience=2, mode="min", restore_best_weights=True)
    save = ModelCheckpoint(tmp_path / "{epoch}.pt")
    fit(4, [log("score", [2.0, 1.0, 3.0, 3.0]), EMA(0.5, evaluate=True), peek, save, stop], model)
    best = peek.seen["on_epoch_end"][1]
    torch.testing.assert_close(list(copy_weights(model).values()), best, rtol=0, atol=0)
    saved = torch.load(tmp_path / "2.pt", weights_only=True)
    torch.testing.assert_close(list(saved.values()), best, rtol=0, atol=0)


def test_ema_begins_before_lazy_layers_know_their_sizes():
    model = compiled(Model(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1), nn.Sigmoid())))
    ema = EMA(0.5, evaluate=True)
    ema.model = model
    assert ema.state_dict() == {"taken": 0, "updates": 0, "averaged": {}, "raw": {}}
    fit(2, [ema], model)
    assert_equal_tensors(ema.state_dict()["averaged"], copy_weights(model))


def test_ema_starts_again_in_a_second_fit():
    ema = EMA(1.0)  # stays at the weights after the first batch
    peek = Peek()
    model = compiled()
    fit(1, [ema], model)
    firsts = []
    keep = LambdaCallback(on_batch_end=lambda batch, logs: firsts.append(copy_weights(model)))
    fit(2, [ema, keep, peek], model)
    assert_equal_tensors(copy_weights(model), firsts[0])


def test_ema_leaves_the_average_after_an_error_in_validation():
    model = compiled()
    fail = LambdaCallback(on_evaluate_begin=lambda: 1 / 0)
    peek = Peek()
    ema = EMA(0.5, evaluate=True)
    with pytest.raises(ZeroDivisionError):
        fit(1, [ema, peek, fail], model, val=BATCHES)
    torch.testing.assert_close(
        list(copy_weights(model).values()), peek.seen["on_evaluate_begin"][0], rtol=0, atol=0
    )
    assert ema.state_dict()["raw"] == {}


def fit_of(steps, decay, **how):
    """Fit `steps` batches of one row, with an average of this decay."""
    model = compiled(Model(nn.Sequential(nn.Linear(2, 1), nn.Sigmoid())))
    rows = BATCHES[0][0][:1], BATCHES[0][1][:1]
    model.fit(1, [rows] * steps, callbacks=[EMA(decay, **how)], verbose=0)


SHARES = {
    # steps, decay: the share of the first step's weights, and a decay that fits
    (88, 0.999): ("92%", "0.94"),
    (20, 0.9): ("14%", "0.8"),
    (3, 1.0): ("100%", "0"),
    (2, 0.5): ("50%", "0"),
}


@pytest.mark.parametrize(("steps", "decay"), SHARES)
def test_ema_warns_of_a_decay_that_leaves_the_first_weights_and_its_remedy_works(steps, decay):
    share, fitting = SHARES[steps, decay]
    coefficient = 1.0  # of the first step's weights
    for _ in range(steps - 1):
        coefficient = decay * coefficient
    assert f"{coefficient:.0%}" == share
    with pytest.warns(UserWarning, match="of the average") as caught:
        fit_of(steps, decay)
    assert [str(warning.message) for warning in caught] == [
        f"EMA(decay={decay:.7g}): after {steps} steps, {share} of the average is still the weights "
        f"of the first step. For this many steps take about 1 - 5 / steps: EMA(decay={fitting})."
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_of(steps, float(fitting))


def test_ema_with_a_fitting_decay_or_a_single_step_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_of(100, 0.97, evaluate=True)
        fit_of(1, 0.999)  # the average is the weights


def test_ema_of_a_fit_that_an_error_ends_does_not_warn():
    fail = LambdaCallback(on_batch_end=lambda batch, logs: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError):
            fit(3, [EMA(0.999), fail], compiled())
