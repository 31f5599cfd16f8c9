"""A fit that is interrupted and resumed is bit-for-bit the fit that is never stopped."""

import shutil

import pandas as pd
import pytest
import torch
from helpers.interruptions import Killed, killed_after
from helpers.models import compiled, points
from helpers.pages import without_times
from helpers.runs import LOADERS, Mean, Noisy, call_of, differences, result_of
from helpers.seeds import seed
from torch.utils.data import DataLoader
from torchmetrics import AUROC

import minikeras
from minikeras import CheckpointError, LambdaCallback, LRScheduler
from minikeras.support.atomic import previous

pytestmark = pytest.mark.usefixtures("each_fit_in_a_process_of_its_own", "quick_disk")


def whole(**kwargs):
    seed(1)
    model, arguments = call_of(**kwargs)
    return result_of(model, model.fit(**arguments))


def broken_off(path, kills, every=1, **kwargs):
    """Run the same call, killed after so many more batches, and resumed each time."""
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


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's
@pytest.mark.parametrize("kills", [[3], [5], [6], [2, 1], [0, 1, 1, 4], [14]], ids=str)
@pytest.mark.parametrize("loader", LOADERS)
def test_resumed_fit_is_the_fit_never_stopped(loader, kills, tmp_path):
    assert (
        differences(whole(loader=loader), broken_off(tmp_path / "run.pt", kills, loader=loader))
        == []
    )


SETTINGS = {
    "every 3 steps": {"checkpoint_every": 3},
    "at epochs' ends alone": {"checkpoint_every": None},
    "no validation": {"dl_val": None},
    "validation every second epoch": {"validation_freq": 2},
    "validation with workers": {"dl_val": LOADERS["noisy, 2 workers"]},
    "two optimizers": {"model": "pair"},
    "3 steps an epoch": {"steps_per_epoch": 3},
    "3 steps an epoch, written at the last": {
        "steps_per_epoch": 3,
        "checkpoint_every": 3,
        "loader": "noisy",
    },
    "3 steps an epoch, persistent workers": {"steps_per_epoch": 3, "loader": "persistent workers"},
    "7 steps an epoch": {"steps_per_epoch": 7, "loader": "noisy"},
    "as many steps an epoch as there are": {"steps_per_epoch": 5, "loader": "noisy, 2 workers"},
    "a torchmetrics object": {"metrics": lambda: {"auroc": AUROC("binary")}},
    "3 steps of a list": {"steps_per_epoch": 3, "loader": "list of batches"},
    "3 batches a step": {"compile": {"accumulate": 3}},
    "3 batches a step, every 2 batches": {"compile": {"accumulate": 3}, "checkpoint_every": 2},
    "two optimizers, 3 batches a step": {
        "model": "pair",
        "compile": {"accumulate": 3},
        "checkpoint_every": 2,
    },
    "3 batches a step, 7 an epoch": {
        "compile": {"accumulate": 3},
        "steps_per_epoch": 7,
        "loader": "noisy",
    },
    "fp16, 2 batches a step, clipped": {
        "model": "scores",
        "compile": {"accumulate": 2, "precision": "fp16", "clip_grad_norm": 0.1},
    },
}


@pytest.mark.parametrize("kills", [[4], [2, 1], [6], [8, 1], [3, 0, 0]], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_resumed_fit_is_the_fit_never_stopped_in_each_setting(setting, kills, tmp_path):
    kwargs = SETTINGS[setting].copy()
    every = kwargs.pop("checkpoint_every", 1)
    assert (
        differences(whole(**kwargs), broken_off(tmp_path / "run.pt", kills, every, **kwargs)) == []
    )


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)
@pytest.mark.parametrize(("loader", "steps"), [("in memory", 1), ("noisy", 3)])
def test_resumed_fit_is_the_fit_never_stopped_under_jit(loader, steps, tmp_path):
    kwargs = {"loader": loader, "compile": {"jit": True, "steps_per_execution": steps}}
    assert differences(whole(**kwargs), broken_off(tmp_path / "run.pt", [2, 3], **kwargs)) == []


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"jit": True}], ids=str)
def test_resumed_fit_is_the_fit_never_stopped_on_an_accelerator(options, tmp_path):
    kwargs = {"loader": "noisy", "compile": {"device": None, **options}}
    assert differences(whole(**kwargs), broken_off(tmp_path / "run.pt", [2, 3], **kwargs)) == []


# --- which call of fit a file is of ---------------------------------------------------------------


def fits(path, *epochs, kill=None):
    """A script of several fits; the histories they return, and the model.

    `path` has the arguments of each fit, or is a list of them.
    """
    torch.manual_seed(1)
    model = compiled()
    histories = []
    for number, count in enumerate(epochs):
        callbacks = [killed_after(kill[1])] if kill and kill[0] == number else []
        kwargs = path[number] if isinstance(path, list) else path
        histories.append(
            model.fit(count, points(60), batch_size=20, verbose=0, callbacks=callbacks, **kwargs)
        )
    return histories, model


def test_resumed_fit_that_was_finished_returns_its_history_and_more_epochs_are_added(
    tmp_path, capsys
):
    path = {"checkpoint": tmp_path / "run.pt"}
    (expected,), model = fits({}, 3)
    fits(path, 3)
    (again,), other = fits(path, 3)
    pd.testing.assert_frame_equal(again, expected, check_exact=True)
    assert torch.equal(other.fc1.weight, model.fc1.weight)
    (longer,), _ = fits(path, 5)
    pd.testing.assert_frame_equal(longer, fits({}, 5)[0][0], check_exact=True)


@pytest.mark.parametrize("has_own_file", [False, True])
@pytest.mark.parametrize("kill", [(0, 4), (1, 0), (1, 5), (2, 2)], ids=str)
def test_resumed_script_of_several_fits_needs_a_file_for_each(kill, has_own_file, tmp_path):
    expected, model = fits({}, 2, 3, 1)

    def script(**kwargs):
        paths = []
        for number in range(3):
            path = tmp_path / (f"phase{number}.pt" if has_own_file else "run.pt")
            paths.append({"checkpoint": path, "checkpoint_every": 1})
        return fits(paths, 2, 3, 1, **kwargs)

    with pytest.raises(Killed):
        script(kill=kill)
    is_of_later_fit = kill in [(1, 5), (2, 2)]  # the second or third fit has written it
    if is_of_later_fit and not has_own_file:
        with pytest.raises(CheckpointError) as raised:
            script()
        path = tmp_path / "run.pt"
        epochs = "3 to 5" if kill[0] == 1 else "6 to 6"
        assert str(raised.value) == (
            f"{path} is of a fit of epochs {epochs}, and this one is of epochs 1 to 2. Pass a "
            f"different path to each fit. To start from scratch, delete {path} and {path}.prev, "
            "or pass another path."
        )
        path.unlink()
        previous(path).unlink()
    histories, other = script()
    for history, expected_history in zip(histories, expected, strict=True):
        pd.testing.assert_frame_equal(history, expected_history, check_exact=True)
    assert torch.equal(other.fc1.weight, model.fc1.weight)


def test_second_fit_says_that_it_replaces_the_file_of_the_first(tmp_path, capsys):
    path = tmp_path / "run.pt"
    model = compiled()
    for _ in range(2):
        model.fit(2, points(60), checkpoint=path, verbose=2)
    assert f"\n{path}: epochs 3 to 4 replace the fit of epochs 1 to 2 in this file\n" in (
        capsys.readouterr().out
    )


def test_checkpoint_from_within_an_epoch_after_the_last_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    kwargs = {"batch_size": 20, "verbose": 0, "checkpoint": path, "checkpoint_every": 1}
    with pytest.raises(Killed):
        compiled().fit(4, points(60), callbacks=[killed_after(7)], **kwargs)
    model = compiled()
    weight = model.fc1.weight.clone()
    with pytest.raises(CheckpointError) as raised:
        model.fit(2, points(60), **kwargs)
    assert str(raised.value) == (
        f"{path} was written in epoch 3 after step 1, and this fit is of epochs 1 to 2. Ask for 3 "
        f"epochs or more. To start from scratch, delete {path} and {path}.prev, or pass another "
        "path."
    )
    assert torch.equal(model.fc1.weight, weight)
    assert len(model.fit(3, points(60), **kwargs)) == 3


def test_resumed_fit_in_the_same_process_continues_when_it_is_called_again(tmp_path):
    path = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 1}
    (expected,), model = fits({}, 4)
    torch.manual_seed(1)
    other = compiled()
    for kill in (1, 5, 2):
        with pytest.raises(Killed):
            other.fit(
                4, points(60), batch_size=20, verbose=0, callbacks=[killed_after(kill)], **path
            )
    pd.testing.assert_frame_equal(
        other.fit(4, points(60), batch_size=20, verbose=0, **path), expected, check_exact=True
    )
    assert torch.equal(other.fc1.weight, model.fc1.weight)


def test_resumed_fit_that_was_stopped_stays_stopped(tmp_path):
    path = {"checkpoint": tmp_path / "run.pt"}
    stop = LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(stop.model, "stop_training", epoch == 2)
    )
    for _ in range(2):
        assert list(compiled().fit(5, points(60), verbose=0, callbacks=[stop], **path).index) == [
            0,
            1,
        ]


@pytest.mark.parametrize(
    "metric", [Mean(), lambda y_pred, y_true: y_pred.mean()], ids=["object", "function"]
)
def test_resumed_fit_takes_other_metrics_between_epochs_and_refuses_them_within_one(
    metric, tmp_path
):
    path = {
        "checkpoint": tmp_path / "run.pt",
        "checkpoint_every": 1,
        "verbose": 0,
        "batch_size": 20,
    }
    compiled(metrics_dict={"mean": Mean()}).fit(1, points(60), **path)
    with pytest.raises(Killed):
        compiled(metrics_dict={"other": metric}).fit(
            2, points(60), callbacks=[killed_after(2)], **path
        )
    with pytest.raises(CheckpointError) as raised:
        compiled().fit(2, points(60), **path)
    assert str(raised.value) == (
        f"{path['checkpoint']} was written in the middle of an epoch that logs loss, other, and "
        "this run logs loss. Call compile with the same arguments as then. To start from scratch, "
        f"delete {path['checkpoint']} and {path['checkpoint']}.prev, or pass another path."
    )
    dfhistory = compiled(metrics_dict={"other": metric}).fit(2, points(60), **path)
    assert dfhistory["mean"].isna().tolist() == [False, True]


def test_resumed_fit_says_where_it_continues_in_a_line(tmp_path, capsys):
    path = tmp_path / "run.pt"

    def fit(kill=None, epochs=2):
        callbacks = [] if kill is None else [killed_after(kill)]
        compiled().fit(
            epochs,
            points(60),
            batch_size=20,
            checkpoint=path,
            checkpoint_every=1,
            callbacks=callbacks,
        )
        return capsys.readouterr().out

    with pytest.raises(Killed):
        fit(kill=4)
    capsys.readouterr()
    assert fit().splitlines()[0] == f"{path}: resumed in epoch 2 after step 1"
    assert fit() == (
        f"{path}: finished after epoch 2: nothing is left to train (ask for more epochs, or delete "
        f"{path} and {path}.prev to start from scratch)\n"
    )
    assert fit(epochs=3).splitlines()[0] == f"{path}: resumed after epoch 2"
    assert fit(epochs=1) == (
        f"{path}: finished after epoch 3, and this fit asks for epochs 1 to 1: nothing is left to "
        f"train (ask for more epochs, or delete {path} and {path}.prev to start from scratch)\n"
    )


def test_resumed_fit_keeps_the_mark_of_the_best_epoch(tmp_path, capsys):
    def fit(epochs):
        model = compiled(loss_func=lambda y_pred, y_true: losses.pop(0) + 0 * y_pred.sum())
        model.fit(epochs, points(8), points(8), checkpoint=tmp_path / "run.pt")
        printed = without_times(capsys.readouterr().out)
        return [line for line in printed.splitlines() if line.lstrip()[:1].isdigit()]

    losses = [9.0, 1.0]
    assert "*" in fit(1)[-1]
    losses = [9.0, 2.0]
    assert "*" not in fit(2)[-1]


# --- what is not exact, and said so ---------------------------------------------------------------


def test_checkpoint_with_persistent_workers_that_may_draw_warns_as_the_fit_begins(tmp_path):
    loader = DataLoader(Noisy(), batch_size=20, num_workers=1, persistent_workers=True)
    with pytest.warns(UserWarning, match="persistent_workers") as warned:
        compiled().fit(1, loader, verbose=0, checkpoint=tmp_path / "run.pt")
    assert [str(warning.message) for warning in warned] == [
        "dl_train has persistent_workers, whose random states a checkpoint cannot save: if the "
        "dataset draws random numbers, a resumed run draws others. Set persistent_workers=False "
        "for an exact resume."
    ]


@pytest.mark.parametrize(("rows", "batch_size"), [(40, 5), (80, 10)])
def test_resumed_fit_warns_of_other_rows_or_another_batch_size_within_an_epoch(
    rows, batch_size, tmp_path
):
    path = tmp_path / "run.pt"

    def fit(rows, batch_size, after=None):
        callbacks = [] if after is None else [killed_after(after)]
        more = {"checkpoint": path, "checkpoint_every": 1, "callbacks": callbacks, "verbose": 0}
        compiled().fit(2, points(rows), batch_size=batch_size, **more)

    with pytest.raises(Killed):
        fit(40, 10, after=1)
    with pytest.warns(
        UserWarning, match="the checkpoint was written|dl_train has other data here"
    ) as told:
        fit(rows, batch_size)
    assert len(told) == (1 if rows == 40 else 2)
    assert str(told[-1].message) == (
        "the checkpoint was written in an epoch of 4 batches, and dl_train has 8 now: its rows or "
        "its batch_size differ. The first 1 are skipped, but they are not those that were trained "
        "on. Give the same data and batch_size as before; a checkpoint written at the end of an "
        "epoch resumes with any data."
    )


def test_resumed_fit_does_not_warn_of_another_batch_size_from_an_epochs_end_on(tmp_path):
    for epochs, batch_size in ((1, 10), (2, 5)):
        compiled().fit(
            epochs, points(40), batch_size=batch_size, checkpoint=tmp_path / "run.pt", verbose=0
        )


def test_resumed_fit_warns_of_another_learning_rate_in_the_script_and_not_of_one_that_moved(
    tmp_path,
):
    path = tmp_path / "run.pt"

    def fit(epochs, lr, warmed=True):
        model = compiled(lr=lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            model.optimizer, lambda step: min(1.0, (step + 1) / 10)
        )
        callbacks = [LRScheduler(scheduler, step="batch")] if warmed else []
        model.fit(epochs, points(40), callbacks=callbacks, checkpoint=path, verbose=0)
        model.optimizer.param_groups[0]["lr"] = 0.5  # by hand, for what follows
        second = tmp_path / "second.pt"
        return model.fit(epochs, points(40), checkpoint=second, verbose=0)["loss"]

    first = fit(2, 0.1)
    for _ in range(2):
        assert fit(2, 0.1).equals(first)
    with pytest.warns(UserWarning, match="was started") as told:
        fit(2, 0.2)
    assert str(told[0].message) == (
        f"{path} was started with other optimizer settings than this script's: lr 0.01 and not "
        "0.02, initial_lr 0.1 and not 0.2. The file's settings are used. To change them during a "
        "run, set them in on_epoch_begin of a callback."
    )


@pytest.mark.parametrize("epochs", [3, 5])
def test_resumed_fit_continues_in_the_same_process_after_an_error_at_an_epochs_end(
    epochs, tmp_path
):
    path = {"checkpoint": tmp_path / "run.pt", "verbose": 0}
    broken = LambdaCallback(on_epoch_end=lambda epoch, logs: 1 // (epoch != 2))
    torch.manual_seed(1)
    expected = compiled()
    expected.fit(epochs, points(40), verbose=0)
    torch.manual_seed(1)
    model = compiled()
    with pytest.raises(ZeroDivisionError) as raised:
        model.fit(3, points(40), callbacks=[broken], **path)
    assert raised.value.__notes__[-1].endswith("Call fit again to resume from there.")
    model.fit(epochs, points(40), **path)
    pd.testing.assert_frame_equal(model.history, expected.history, check_exact=True)
    assert len(model.fit(1, points(40), **path)) == epochs + 1  # that one had come to its end


def test_resumed_fit_keeps_the_milestones_of_a_schedule(tmp_path):
    def rates(*calls):
        for epochs, path in calls:
            model = compiled(lr=1.0)
            scheduler = torch.optim.lr_scheduler.MultiStepLR(model.optimizer, [2, 4], gamma=0.1)
            dfhistory = model.fit(
                epochs, points(40), checkpoint=path, callbacks=[LRScheduler(scheduler)], verbose=0
            )
        return dfhistory["lr"].tolist()

    assert rates((1, tmp_path / "run.pt"), (6, tmp_path / "run.pt")) == rates((6, None))


class Thaws(minikeras.Callback):
    def on_epoch_begin(self, epoch):
        if epoch == 2:
            self.model.fc1.requires_grad_(True)


def test_resumed_fit_keeps_layers_thawed_by_a_callback_and_takes_those_thawed_by_the_script(
    tmp_path,
):
    def fit(epochs, path=None, frozen=True):
        torch.manual_seed(1)
        model = compiled()
        model.fc1.requires_grad_(not frozen)
        return model, model.fit(epochs, points(40), checkpoint=path, callbacks=[Thaws()], verbose=0)

    expected = fit(4)[1]
    fit(3, tmp_path / "run.pt")
    pd.testing.assert_frame_equal(fit(4, tmp_path / "run.pt")[1], expected, check_exact=True)
    fit(1, tmp_path / "other.pt")
    with pytest.warns(UserWarning, match="fc1.bias frozen, and trained here"):
        assert fit(1, tmp_path / "other.pt", frozen=False)[0].fc1.weight.requires_grad


class Cached(torch.nn.Module):
    """Two buffers that are in no state_dict: one grows, one comes with the first batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.register_buffer("mean", None, persistent=False)

    def forward(self, x):
        self.mean = x.mean(dim=0) if self.mean is None else self.mean
        self.table = torch.cat([self.table, torch.zeros(1)])
        return torch.sigmoid(self.layer(x - self.mean))


def test_resumed_fit_restores_buffers_that_grow_or_come_late(tmp_path):
    def fit(epochs, path=None):
        torch.manual_seed(1)
        model = compiled(minikeras.Model(Cached()))
        return model.fit(
            epochs, points(40), batch_size=10, checkpoint=path, verbose=0
        ), model.net.table

    expected, table = fit(3)
    fit(1, tmp_path / "run.pt")
    again, other = fit(3, tmp_path / "run.pt")
    pd.testing.assert_frame_equal(again, expected, check_exact=True)
    assert len(other) == len(table) == 13


@pytest.mark.parametrize("kinds", [(), (minikeras.Timer, minikeras.EMA, minikeras.EMA)], ids=len)
def test_resumed_fit_warns_of_callbacks_that_the_states_may_not_belong_to(kinds, tmp_path):
    path = tmp_path / "run.pt"

    def fit(epochs, kinds):
        callbacks = [kind(9) if kind is minikeras.Timer else kind() for kind in kinds]
        compiled().fit(epochs, points(40), checkpoint=path, callbacks=callbacks, verbose=0)

    fit(1, [minikeras.EMA])
    fit(2, [minikeras.Timer, minikeras.EMA])  # one more of another class: nothing to tell
    with pytest.warns(UserWarning, match="goes to the callback of") as told:
        fit(3, kinds)
    assert str(told[0].message) == (
        "the checkpoint has the state of the callbacks Timer, EMA, and this fit's callbacks with "
        f"a state are {'Timer, EMA, EMA 2' if kinds else 'none'}. Each state goes to the callback "
        "of its class and number. Pass the same callbacks in the same order."
    )


def test_resumed_fit_may_have_another_verbose(tmp_path, capsys):
    for epochs, verbose in ((1, 2), (2, 0), (3, 2)):
        model = compiled()
        model.fit(epochs, points(40), checkpoint=tmp_path / "run.pt", verbose=verbose)
    assert len(model.history) == 3


def test_resumed_fit_may_have_a_new_scheduler(tmp_path):
    compiled(lr=0.5).fit(1, points(40), checkpoint=tmp_path / "run.pt", verbose=0)
    model = compiled(lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(model.optimizer, 1, 0.1)
    model.fit(
        3, points(40), checkpoint=tmp_path / "run.pt", callbacks=[LRScheduler(scheduler)], verbose=0
    )
    assert model.history["lr"].tolist() == pytest.approx([0.5, 0.5, 0.05])


class Versioned(torch.nn.Linear):
    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            # as it would have been written then
            state[prefix + "weight"] = state[prefix + "weight"] * 100
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_resumed_fit_gives_a_layer_the_version_that_its_weights_were_written_by(tmp_path):
    def made():
        torch.manual_seed(0)
        return compiled(minikeras.Model(torch.nn.Sequential(Versioned(2, 1), torch.nn.Sigmoid())))

    model = made()
    other = made()
    best = minikeras.EarlyStopping("loss", patience=9, restore_best_weights=True)
    model.fit(2, points(40), checkpoint=tmp_path / "run.pt", callbacks=[best], verbose=0)
    other.fit(2, points(40), checkpoint=tmp_path / "run.pt", verbose=0)
    assert model.net[0].weight.abs().max() < 10
    assert torch.equal(other.net[0].weight, model.net[0].weight)
    other.load(tmp_path / "run.pt")
    assert torch.equal(other.net[0].weight, model.net[0].weight)


def test_resumed_fit_refuses_data_that_ends_before_the_place_of_the_checkpoint(tmp_path):
    path = {
        "checkpoint": tmp_path / "run.pt",
        "checkpoint_every": 1,
        "verbose": 0,
        "batch_size": 20,
    }
    with pytest.raises(Killed):
        compiled().fit(2, points(60), callbacks=[killed_after(2)], **path)
    with pytest.raises(RuntimeError) as raised:
        compiled().fit(2, points(20), **path)
    assert str(raised.value) == (
        "the checkpoint was written after batch 2 and dl_train ended after 1. Give the same data "
        f"as before. To start from scratch, delete {tmp_path}/run.pt and {tmp_path}/run.pt.prev, "
        "or pass another path."
    )
