"""One checkpoint serves one fit."""

import pandas as pd
import pytest
import torch
from helpers.exact import X, Y, start
from torch import nn

import minikeras
from minikeras import CheckpointError, LambdaCallback
from minikeras.support.atomic import previous

pytestmark = pytest.mark.usefixtures("quick_disk")


def fold(number, path, seed=True, error=None):
    if seed:
        torch.manual_seed(0)
    model = minikeras.Model(nn.Linear(2, 1))
    model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), device="cpu")
    rows = torch.arange(60) % 3 != number
    callbacks = [LambdaCallback(on_epoch_end=lambda epoch, logs: 1 // (not error))]
    model.fit(2, (X[rows], Y[rows]), callbacks=callbacks, checkpoint=path, verbose=0)
    return model.history["loss"].tolist()


@pytest.mark.parametrize("seed", [True, False])
def test_checkpoint_of_another_fold_is_refused_and_a_file_for_each_trains(seed, tmp_path):
    path = tmp_path / "run.pt"
    fold(0, path, seed)
    with pytest.raises(CheckpointError) as raised:
        fold(1, path, seed)
    assert str(raised.value) == (
        f"{path} is the checkpoint of another fit of this process: of another model, or of another "
        "compile. Loading it would give this fit the weights and the history of that one. Give "
        "each fit its own file, such as "
        f'checkpoint="run_2.pt". To start from scratch, delete {path} and {path}.prev, or pass '
        "another path. To resume that fit, call fit of the model that it trained, or start the "
        "script again."
    )
    assert fold(1, tmp_path / "run_2.pt") == fold(1, None)
    path.unlink()
    previous(path).unlink()
    fold(2, path)


def test_checkpoint_of_a_fold_that_failed_is_refused_by_the_next(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fold(0, tmp_path / "run.pt", error=True)
    fold(0, tmp_path / "run.pt")  # the same fit, begun again
    with pytest.raises(ZeroDivisionError):
        fold(0, tmp_path / "other.pt", error=True)
    (tmp_path / "run.pt").rename(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="another fit of this process"):
        fold(1, tmp_path / "other.pt")


@pytest.mark.parametrize("rate", [0.1, 0.2])
def test_checkpoint_of_the_first_phase_is_refused_by_the_second(rate, tmp_path):
    path = tmp_path / "run.pt"
    model = minikeras.Model(nn.Linear(2, 1))
    for phase in (1, 2):
        model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=rate), device="cpu")
        if phase == 1:
            model.fit(2, (X, Y), checkpoint=path, verbose=0)
            # a second fit of the same compile may go on
            model.fit(1, (X, Y), checkpoint=path, verbose=0)
            assert len(model.history) == 3
    weight = model.net.weight.clone()
    with pytest.raises(CheckpointError, match="Give each fit its own file"):
        model.fit(2, (X, Y), checkpoint=path, verbose=0)
    assert torch.equal(model.net.weight, weight)
    model.fit(2, (X, Y), checkpoint=tmp_path / "run_2.pt", verbose=0)
    assert len(model.history) == 2


@pytest.mark.parametrize("change", [{"lr": 0.2}, {"dropout": 0.2}, {"weight": 0.5}], ids=str)
def test_checkpoint_of_another_trial_of_a_sweep_is_refused(change, tmp_path):
    def trial(lr=0.1, dropout=0.1, weight=1.0):
        torch.manual_seed(0)
        model = minikeras.Model(
            nn.Sequential(nn.Linear(2, 4), nn.Dropout(dropout), nn.Linear(4, 1))
        )
        model.compile(
            lambda y_pred, y_true: weight * ((y_pred - y_true) ** 2).mean(),
            torch.optim.SGD(model.parameters(), lr=lr),
            device="cpu",
        )
        return model.fit(2, (X, Y), checkpoint=tmp_path / "run.pt", verbose=0)

    first = trial()
    pd.testing.assert_frame_equal(trial(), first, check_exact=True)  # the same fit once more
    with pytest.raises(CheckpointError, match="another fit of this process"):
        trial(**change)


def test_checkpoint_path_that_a_callback_writes_too_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"would write one file\. Give each a path of its own"):
        start(
            lambda: {
                "callbacks": lambda: [minikeras.ModelCheckpoint(tmp_path / "a" / ".." / "run.pt")]
            },
            tmp_path / "run.pt",
        )
    start(
        lambda: {"callbacks": lambda: [minikeras.ModelCheckpoint(tmp_path / "best.pt")]},
        tmp_path / "run.pt",
    )
