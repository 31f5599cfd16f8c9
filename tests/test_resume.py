"""A fit broken off and carried on in another process gives, bit by bit, what it gives never stopped."""

import shutil

import pytest
from runs import LOADERS, call_of, differences, result_of, seed
from torchmetrics import AUROC

from minikeras import LambdaCallback


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """Waiting for the disk is what test_kill.py is for."""
    monkeypatch.setattr("minikeras.checkpoint.file.flush", lambda path: None)


class Killed(BaseException):
    """Ends a fit as SIGKILL does: nothing that follows is saved."""


def killed_after(count):
    """Dies as the batch of that number, counted over all epochs, has been saved."""

    def count_down(batch, logs):
        nonlocal count
        count -= 1
        if count < 0:
            raise Killed

    return LambdaCallback(on_batch_end=count_down)


def whole(**kwargs):
    seed(1)
    model, arguments = call_of(**kwargs)
    return result_of(model, model.fit(**arguments))


def broken_off(path, kills, every=1, **kwargs):
    """The same call, killed after so many more batches, each time carried on in what might be another process."""
    for number, kill in enumerate([*kills, None]):  # without a file the script begins as it began
        seed(100 + number if path.exists() else 1)
        model, arguments = call_of(**kwargs)
        callbacks = arguments.pop("callbacks", [])
        try:
            dfhistory = model.fit(
                **arguments,
                checkpoint=path,
                checkpoint_every=every,
                callbacks=[*callbacks, *([] if kill is None else [killed_after(kill)])],
            )
        except Killed:
            continue
        return result_of(model, dfhistory)
    return None


@pytest.mark.filterwarnings("ignore:dl_train is a Batches, which has no state_dict")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's
@pytest.mark.parametrize("kills", [[3], [5], [6], [2, 1], [0, 1, 1, 4], [14]], ids=str)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_fit_carried_on_is_the_fit_never_stopped(loader, kills, tmp_path):
    assert differences(whole(loader=loader), broken_off(tmp_path / "run.pt", kills, loader=loader)) == []


SETTINGS = {
    "every 3 steps": {"checkpoint_every": 3},
    "at epochs' ends alone": {"checkpoint_every": None},
    "no validation": {"dl_val": None},
    "validation every second epoch": {"validation_freq": 2},
    "validation with workers": {"dl_val": LOADERS["noisy, 2 workers"]},
    "two optimizers": {"model": "pair"},
    "3 steps an epoch": {"steps_per_epoch": 3},
    "3 steps an epoch, written at the last": {"steps_per_epoch": 3, "checkpoint_every": 3, "loader": "noisy"},
    "7 steps an epoch": {"steps_per_epoch": 7, "loader": "noisy"},
    "as many steps an epoch as there are": {"steps_per_epoch": 5, "loader": "noisy, 2 workers"},
    "a torchmetrics object": {"metrics": lambda: {"auroc": AUROC("binary")}},
    "3 steps of a list": {"steps_per_epoch": 3, "loader": "list of batches"},
}


@pytest.mark.parametrize("kills", [[4], [2, 1], [6], [8, 1], [3, 0, 0]], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_so_it_is_in_each_setting(setting, kills, tmp_path):
    kwargs = SETTINGS[setting].copy()
    every = kwargs.pop("checkpoint_every", 1)
    assert differences(whole(**kwargs), broken_off(tmp_path / "run.pt", kills, every, **kwargs)) == []


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize(("loader", "steps"), [("in memory", 1), ("noisy", 3)])
def test_so_it_is_under_jit(loader, steps, tmp_path):
    kwargs = {"loader": loader, "compile": {"jit": True, "steps_per_execution": steps}}
    assert differences(whole(**kwargs), broken_off(tmp_path / "run.pt", [2, 3], **kwargs)) == []
