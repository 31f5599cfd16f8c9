"""ModelCheckpoint: paths, and which epochs are saved."""

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
