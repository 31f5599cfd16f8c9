"""CSVLogger: the file is the history."""

import pandas as pd
import pytest
from helpers.callbacks import BATCHES, Loader, fit, log, names_in, saved_now
from helpers.models import compiled
from torch.optim import lr_scheduler

from minikeras import (
    CSVLogger,
    LambdaCallback,
    LRScheduler,
)


def lines_of(path):
    return path.read_text().splitlines()


def test_csv_logger_writes_the_history(tmp_path):
    path = tmp_path / "logs" / "log.csv"
    model = compiled()
    halve = LRScheduler(lr_scheduler.ExponentialLR(model.optimizer, 0.5))
    _, dfhistory = fit(4, [halve, CSVLogger(path)], model, val=BATCHES, validation_freq=2)
    table = pd.read_csv(path)
    assert list(table.pop("epoch")) == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(table, dfhistory, check_exact=True)
    assert lines_of(path)[0] == "epoch,loss,val_loss,lr"
    assert lines_of(path)[1].split(",")[2] == ""
    assert names_in(path.parent) == ["log.csv"]


def test_csv_logger_writes_each_row_when_its_epoch_ends(tmp_path):
    sizes = []
    count = LambdaCallback(
        on_epoch_end=lambda epoch, logs: sizes.append(len(lines_of(tmp_path / "log.csv")))
    )
    fit(3, [CSVLogger(tmp_path / "log.csv"), count])
    assert sizes == [2, 3, 4]


@pytest.mark.parametrize("append", [False, True])
def test_csv_logger_overwrites_or_appends_to_a_file_that_exists(append, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('epoch,loss,note\n7,0.5,"a, b"\n')
    fit(2, [log("lr", [1.0, 1.0]), log("loss", [0.25, 0.125]), CSVLogger(path, append=append)])
    old = ["epoch,loss,note,lr", '7,0.5,"a, b",', "1,0.25,,1.0", "2,0.125,,1.0"]
    assert lines_of(path) == (old if append else ["epoch,loss,lr", "1,0.25,1.0", "2,0.125,1.0"])


def test_csv_logger_keeps_the_header_of_a_file_that_it_appends_to(tmp_path):
    path = tmp_path / "log.csv"
    for _ in range(2):
        fit(1, [log("val_x", [1.0]), log("loss", [0.5]), CSVLogger(path, append=True)])
    assert lines_of(path) == ["epoch,loss,val_x", "1,0.5,1.0", "1,0.5,1.0"]


@pytest.mark.parametrize("append", [False, True])
def test_csv_logger_on_resume_drops_only_the_rows_after_the_last_save(append, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("epoch,loss\n1,9.0\n5,9.0\n")
    first = CSVLogger(path, append)
    second = CSVLogger(path, append)
    saved = {}
    save = LambdaCallback(
        on_epoch_end=lambda epoch, logs: epoch == 2 and saved.update(saved_now(first))
    )
    fit(3, [log("loss", [1.0, 2.0, 3.0]), first, save])
    with path.open("a") as file:
        file.write("4,0.")  # killed in the middle of a row
    model = compiled()
    model._run.epochs = [({"loss": 1.0}, {"lr": 0.1})] * 2
    fit(2, [log("loss", [4.0, 5.0]), second, Loader([second], saved)], model)
    assert lines_of(path)[1 + 2 * append :] == ["1,1.0", "2,2.0", "3,4.0", "4,5.0"]
    assert lines_of(path)[: 1 + 2 * append] == ["epoch,loss", "1,9.0", "5,9.0"][: 1 + 2 * append]
