"""EarlyStopping stops where a plain reference does, and restores the best weights."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from helpers.callbacks import BATCHES, NAN, fit, log
from helpers.compare import assert_equal_tensors, copy_weights
from helpers.models import compiled

from minikeras import (
    EarlyStopping,
    LambdaCallback,
)
from minikeras.processes import OneProcess


def stopped_by(stop, values, name="score"):
    """(epoch at which it stops or None, epoch whose weights the model has at the end)."""
    now = {"epoch": torch.tensor(0)}
    stop.model = SimpleNamespace(
        stop_training=False,
        state_dict=lambda: now,
        load_state_dict=now.update,
        _compiled=lambda verb: SimpleNamespace(fit=None, world=OneProcess()),
    )
    stop.on_fit_begin()
    for epoch, value in enumerate(values, start=1):
        now["epoch"] = torch.tensor(epoch)
        stop.on_epoch_end(epoch, {"loss": 0.0} | ({} if value is None else {name: value}))
        if stop.model.stop_training:
            break
    stop.on_fit_end()
    return (epoch if stop.model.stop_training else None), int(now["epoch"])


def reference(values, min_delta, patience, mode, baseline, start_from_epoch):
    """The same from the definition, with values to be minimised."""
    sign = 1 if mode == "min" else -1
    limit = math.inf if baseline is None else sign * baseline
    best = math.inf
    best_epoch = None
    since = 0
    for epoch, value in enumerate(values, start=1):
        if value is None or epoch <= start_from_epoch:
            continue
        since += 1
        if sign * value + min_delta < best:  # False for NaN
            best = sign * value
            best_epoch = epoch
            if best + min_delta < limit:
                since = 0
        if since and since >= patience:
            return epoch, best_epoch or epoch
    return None, best_epoch or len(values)


ENDINGS = {
    # epochs, restore_best_weights: the last lines
    (9, True): [
        "stopped after epoch 5 of 9",
        "EarlyStopping: best score 0.9000 in epoch 3, restored",
    ],
    (9, False): ["stopped after epoch 5 of 9", "EarlyStopping: best score 0.9000 in epoch 3"],
    (4, True): ["EarlyStopping: best score 0.9000 in epoch 3, restored"],
    (4, False): [],
}


@pytest.mark.parametrize(("epochs", "restores"), ENDINGS)
def test_early_stopping_says_the_best_epoch_if_it_stopped_or_restored(epochs, restores, capsys):
    stop = EarlyStopping("score", patience=2, mode="max", restore_best_weights=restores)
    scores = log("score", [0.5, 0.7, 0.9, 0.8, 0.8])
    compiled().fit(epochs, BATCHES, callbacks=[scores, stop], verbose=2)
    assert stop.best_epoch == 3
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if line.startswith(("stopped", "EarlyStopping"))]
    assert said == ENDINGS[epochs, restores]


def test_best_epoch_is_none_before_there_is_a_best_value():
    stop = EarlyStopping("score", mode="max")
    fit(1, [log("score", [NAN]), stop])
    assert stop.best_epoch is None


def test_early_stopping_stops_where_a_plain_reference_does():
    draw = random.Random(0)
    stops = 0
    for _ in range(3000):
        settings = {
            "min_delta": draw.choice([0.0, 0.0, 0.25, 0.5]),
            "patience": draw.randrange(5),
            "mode": draw.choice(["min", "max"]),
            "baseline": draw.choice([None, None, 0.5, 1.0]),
            "start_from_epoch": draw.choice([0, 0, 1, 3]),
        }
        # steps of a quarter: exact in floating point, and equal values turn up
        kinds = [NAN, None, *(n / 4 for n in range(8))]
        values = [draw.choice(kinds) for _ in range(12)]
        stop = EarlyStopping("val_score", restore_best_weights=True, **settings)
        found = stopped_by(stop, values, "val_score")
        assert found == reference(values, **settings), (values, settings)
        stops += found[0] is not None
    assert 1000 < stops < 3000


@pytest.mark.parametrize(
    ("values", "arguments", "stops"),
    [
        ([3, 2, 2, 1], {}, 3),  # patience 0 behaves as 1
        ([3, 2, 2, 1], {"patience": 1}, 3),
        ([3, 2, 2, 2, 1], {"patience": 2}, 4),
        ([3, 2.5, 2.25], {"min_delta": 0.5}, 2),  # better by as much as min_delta is not better
        ([9, 8, 7, 6, 5], {"baseline": 5, "patience": 3}, 3),  # never beaten, though it improves
        ([9, 4, 3, 3], {"baseline": 5, "patience": 2}, None),
        ([1, 9, 9, 9], {"start_from_epoch": 2}, 4),
        ([NAN, NAN], {"patience": 2}, 2),
        ([math.inf, 1, NAN], {}, 1),
    ],
)
def test_early_stopping_stops_at_the_epochs_computed_by_hand(values, arguments, stops):
    assert stopped_by(EarlyStopping("score", mode="min", **arguments), values)[0] == stops


def test_early_stopping_restores_the_best_weights_and_ends_the_fit():
    seen = []
    keep = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(copy_weights(model)))
    model = compiled()
    stop = EarlyStopping("score", patience=2, mode="min", restore_best_weights=True)
    _, dfhistory = fit(9, [log("score", [3.0, 1.0, 2.0, 2.0]), keep, stop], model)
    assert len(dfhistory) == 4
    assert_equal_tensors(copy_weights(model), seen[1])
    assert all(value.device.type == "cpu" for value in stop.state_dict()["weights"].values())


def test_early_stopping_restores_the_best_weights_after_an_error():
    def fail(batch, logs):
        if model._run.epochs:
            raise RuntimeError("no luck")

    seen = []
    model = compiled()
    keep = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(copy_weights(model)))
    with pytest.raises(RuntimeError, match="no luck"):
        fit(
            5,
            [
                EarlyStopping("loss", restore_best_weights=True),
                keep,
                LambdaCallback(on_batch_end=fail),
            ],
            model,
        )
    assert_equal_tensors(copy_weights(model), seen[0])


def test_early_stopping_starts_again_in_a_second_fit():
    stop = EarlyStopping("score", patience=2, mode="min", restore_best_weights=True)
    model, _ = fit(3, [log("score", [1.0, 2.0, 2.0]), stop])
    assert (
        len(model.fit(5, BATCHES, callbacks=[log("score", [5.0, 4.0, 4.0, 4.0]), stop], verbose=0))
        == 3 + 4
    )


def test_early_stopping_waits_for_the_epochs_with_validation():
    _, dfhistory = fit(
        8, [EarlyStopping(patience=1)], compiled(lr=0.0), val=BATCHES, validation_freq=2
    )
    assert len(dfhistory) == 4
