"""ModelCheckpoint: paths, and which epochs are saved."""

import re

import pytest
import torch
from helpers.callbacks import BATCHES, NAN, Loader, fit, log, names_in, saved_now
from helpers.compare import assert_equal_tensors, copy_weights
from helpers.models import compiled, points

from minikeras import (
    CheckpointError,
    CSVLogger,
    ModelCheckpoint,
)


def test_model_checkpoint_fills_in_the_path_and_makes_folders(tmp_path):
    save = ModelCheckpoint(tmp_path / "a" / "b" / "{epoch:02d}-{score:.2f}-{val_score}.pt")
    planned = [log("score", [0.5, 0.25]), log("val_score", [None, 2.0])]
    model, _ = fit(2, [*planned, save], val=BATCHES, validation_freq=2)
    assert names_in(tmp_path / "a" / "b") == ["01-0.50-nan.pt", "02-0.25-2.0.pt"]
    assert_equal_tensors(
        torch.load(tmp_path / "a" / "b" / "02-0.25-2.0.pt", weights_only=True), copy_weights(model)
    )


@pytest.mark.parametrize("name", ["file/weights.pt", "file/{epoch}/weights.pt", "folder"])
def test_model_checkpoint_refuses_a_path_that_cannot_be_written_before_anything_trains(
    name, tmp_path
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / name
    first = tmp_path / "file" / "_" if "{" in name else path
    for kind in (ModelCheckpoint, CSVLogger, None):
        model = compiled()
        before = model.fc1.weight.clone()
        more = {"checkpoint": path} if kind is None else {"callbacks": [kind(path)]}
        with pytest.raises((OSError, CheckpointError)) as caught:
            model.fit(1, points(8), verbose=0, **more)
        name = "fit(checkpoint=...)" if kind is None else kind.__name__
        told = str(caught.value)
        if kind is None and path.is_dir():
            assert told.startswith(f"{path} is a folder, but not one with a checkpoint.")
        else:
            shown = first if kind is ModelCheckpoint else path
            assert told.startswith(f"{name} cannot write {shown}: ")
            assert told.endswith(". Pass the path of a file that can be written.")
        assert torch.equal(model.fc1.weight, before)


def test_model_checkpoint_saves_only_the_best_epochs_if_asked(tmp_path):
    save = ModelCheckpoint(tmp_path / "{epoch}.pt", "acc", save_best_only=True)
    fit(6, [log("acc", [NAN, 0.5, 0.5, 0.75, 0.25, NAN]), save])
    assert names_in(tmp_path) == ["2.pt", "4.pt"]


def test_model_checkpoint_reads_its_monitor_only_if_it_saves_the_best(tmp_path):
    fit(1, [ModelCheckpoint(tmp_path / "w.pt", "anything")])
    assert names_in(tmp_path) == ["w.pt"]


def test_model_checkpoint_keeps_its_best_value_when_resumed(tmp_path):
    before, after = (
        ModelCheckpoint(tmp_path / "{epoch}.pt", "score", save_best_only=True, mode="min")
        for _ in "12"
    )
    fit(1, [log("score", [1.0]), before])
    fit(2, [log("score", [2.0, 0.5]), after, Loader([after], saved_now(before))])
    assert names_in(tmp_path) == ["1.pt", "2.pt"]
    fit(1, [log("score", [9.0]), after])  # a fit of its own: 9 is its best
    assert names_in(tmp_path) == ["1.pt", "2.pt"]
    assert after.best == 9.0


@pytest.mark.parametrize(
    ("mode", "scores", "saved"),
    [("min", [0.5, 0.4, 0.3, 0.35], ["3.pt"]), ("max", [0.4, 0.5, 0.3, 0.45], ["2.pt"])],
)
def test_model_checkpoint_saves_only_what_is_better_than_its_initial_value(
    mode, scores, saved, tmp_path
):
    save = ModelCheckpoint(
        tmp_path / "{epoch}.pt", "score", save_best_only=True, mode=mode, initial_value=0.4
    )
    fit(4, [log("score", scores), save])
    assert names_in(tmp_path) == saved
    fit(1, [log("score", [0.4]), save])  # each fit begins with it
    assert save.best == 0.4
    assert names_in(tmp_path) == saved


def test_model_checkpoint_of_a_second_fit_goes_on_from_the_best_of_the_first(tmp_path):
    path = tmp_path / "{epoch}.pt"
    first = ModelCheckpoint(path, "score", save_best_only=True, mode="min")
    fit(1, [log("score", [NAN]), first])
    for value in (first.best, None):  # none yet, as torch and NumPy have it
        fit(1, [log("score", [0.5]), first])
        second = ModelCheckpoint(
            path, "score", save_best_only=True, mode="min", initial_value=value
        )
        assert second.best == float("inf")
    second = ModelCheckpoint(
        path, "score", save_best_only=True, mode="min", initial_value=torch.tensor(first.best)
    )
    fit(2, [log("score", [0.6, 0.25]), second])
    assert names_in(tmp_path) == ["1.pt", "2.pt"]
    assert second.best == 0.25


def test_model_checkpoint_resumes_with_the_best_of_the_file_and_not_the_initial_value(tmp_path):
    before, after = (
        ModelCheckpoint(
            tmp_path / "{epoch}.pt", "score", save_best_only=True, mode="min", initial_value=5.0
        )
        for _ in "12"
    )
    fit(1, [log("score", [1.0]), before])
    fit(1, [log("score", [2.0]), after, Loader([after], saved_now(before))])
    assert after.best == 1.0


@pytest.mark.parametrize("value", [NAN, -float("inf"), "0.5", True, [0.5]])
def test_model_checkpoint_refuses_an_initial_value_that_nothing_can_be_compared_with(value):
    message = (
        "initial_value must be a number that another value of 'val_loss' can be better than, such "
        f"as the `best` of an earlier ModelCheckpoint, or None, got {value!r}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ModelCheckpoint("w.pt", save_best_only=True, initial_value=value)


def test_model_checkpoint_refuses_an_initial_value_if_it_saves_every_epoch():
    message = (
        "initial_value=0.5 needs save_best_only=True: without it every epoch is saved. Pass both "
        "or none."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ModelCheckpoint("w.pt", initial_value=0.5)
    assert ModelCheckpoint("w.pt", save_best_only=True, initial_value=0.5).best == 0.5
