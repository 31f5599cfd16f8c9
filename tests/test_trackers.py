"""TensorBoard, MLflow and W&B hold the history, however often the run was resumed."""

import copy
import math
import pickle
import sys
import time

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import wandb
from helpers.models import Net, accuracy, compiled, points
from helpers.trackers import Board, Files, Store, events, scalars
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn

import minikeras
from minikeras.integrations.mlflow import MLflow
from minikeras.integrations.tensorboard import TensorBoard
from minikeras.integrations.wandb import WandB

# SQLAlchemy's, of MLflow
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Files in a folder of the test's own, and nothing that speaks with the world."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "WANDB_SILENT"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture(params=[Board, Store, Files], ids=["TensorBoard", "MLflow", "WandB"])
def tracker(request, tmp_path):
    return request.param(tmp_path)


def ring(lr=0.1):
    torch.manual_seed(0)
    return compiled(metrics_dict={"accuracy": accuracy}, lr=lr)


def fit(model, callbacks, epochs=3, **kwargs):
    return model.fit(
        epochs, points(50), points(20), batch_size=10, callbacks=callbacks, verbose=0, **kwargs
    )


def halving(model):
    return minikeras.LRScheduler(torch.optim.lr_scheduler.ExponentialLR(model.optimizer, 0.5))


def assert_holds(table, dfhistory):
    """Each value of the history under its column's name, once, and nothing else."""
    assert sorted(table) == sorted(dfhistory)
    for name, column in dfhistory.items():
        expected = {row + 1: value for row, value in column.items() if not math.isnan(value)}
        assert table[name] == pytest.approx(expected, rel=1e-6), name


def test_tracker_run_is_the_history_under_its_columns_names(tracker):
    model = ring()
    dfhistory = fit(model, [halving(model), tracker.callback()], validation_freq=2)
    assert list(dfhistory["lr"]) == [0.1, 0.05, 0.025]
    assert_holds(tracker.table(), dfhistory)
    assert tracker.state() == "FINISHED"


def test_tracker_logs_learning_rates_even_if_they_do_not_change(tracker):
    generator = nn.Linear(1, 1)
    critic = nn.Linear(1, 1)
    model = ring()
    model.both = nn.ModuleList([generator, critic])
    optimizers = {
        "net": torch.optim.SGD([*model.fc1.parameters(), *model.fc2.parameters()], lr=0.25),
        "both": torch.optim.SGD(model.both.parameters(), lr=0.5),
    }
    model.compile(nn.BCELoss(), optimizers, device="cpu")
    fit(model, [tracker.callback()], epochs=1)
    assert {name: points[1] for name, points in tracker.table().items() if "lr" in name} == {
        "lr_net": 0.25,
        "lr_both": 0.5,
    }


def test_tracker_logs_no_learning_rate_of_an_optimizer_without_one(tracker):
    class Unrated(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    model = ring()
    model.compile(nn.BCELoss(), Unrated(model.parameters(), {}), device="cpu")
    fit(model, [tracker.callback()], epochs=1)
    assert [name for name in tracker.table() if "lr" in name] == []


class Breaks(minikeras.Callback):
    """Raises in the middle of an epoch, or after it."""

    def __init__(self, error, epoch, batch=None):
        self.error = error
        self.epoch = epoch
        self.batch = batch

    def on_epoch_begin(self, epoch):
        self.now = epoch

    def on_batch_end(self, batch, logs):
        if (self.now, batch) == (self.epoch, self.batch):
            raise self.error

    def on_epoch_end(self, epoch, logs):
        if self.batch is None and epoch == self.epoch:
            raise self.error


@pytest.mark.parametrize(("epoch", "batch"), [(1, 3), (3, 4), (2, None)], ids=str)
def test_tracker_of_a_resumed_fit_continues_its_run_without_doubled_points(
    tracker, epoch, batch, tmp_path
):
    model = ring()
    run = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 2}
    with pytest.raises(RuntimeError, match="broken"):
        fit(
            model,
            [halving(model), tracker.callback(), Breaks(RuntimeError("broken"), epoch, batch)],
            **run,
        )
    if tracker.table():  # of the first epoch nothing may be there yet
        assert tracker.state() == "FAILED"
    model = ring()
    dfhistory = fit(model, [halving(model), tracker.callback()], **run)
    assert_holds(tracker.table(), dfhistory)
    assert tracker.state() == "FINISHED"
    assert tracker.runs() == 1


def test_tracker_ends_the_run_of_a_failed_fit_as_failed(tracker):
    with pytest.raises(ValueError, match="no"):
        fit(ring(), [tracker.callback(), Breaks(ValueError("no"), 2, 1)])
    assert tracker.state() == "FAILED"


def test_tracker_does_not_take_a_fit_inside_an_except_block_for_failed(tracker):
    try:
        raise ValueError("an older one")
    except ValueError:
        fit(ring(), [tracker.callback()], epochs=1)
    assert tracker.state() == "FINISHED"


def test_tracker_of_a_second_fit_continues_the_run_and_compile_starts_a_new_one(tracker):
    model = ring()
    callback = tracker.callback()
    fit(model, [callback], epochs=1)
    dfhistory = fit(model, [callback], epochs=2)
    assert_holds(
        {name: values for name, values in tracker.table().items() if name != "lr"}, dfhistory
    )
    model.compile(nn.BCELoss(), model.optimizer, device="cpu")
    fit(model, [callback], epochs=1)
    model.compile(nn.BCELoss(), model.optimizer, device="cpu")
    fit(model, [callback], epochs=1)  # no more epochs than before
    assert tracker.runs() == (1 if isinstance(tracker, Board) else 3)


def test_tracker_that_was_copied_after_a_fit_continues_the_run(tracker):
    model = ring()
    callback = tracker.callback()
    fit(model, [callback], epochs=2)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(callback)))
    dfhistory = fit(model, [copied], epochs=1)
    assert_holds(tracker.table(), dfhistory.assign(lr=0.1))
    assert tracker.state() == "FINISHED"


def test_tracker_of_a_fit_that_failed_in_its_first_epoch_is_a_separate_run(tracker):
    model = ring()
    callback = tracker.callback()
    with pytest.raises(ValueError, match="no"):
        fit(model, [callback, Breaks(ValueError("no"), 1, 2)])
    model.compile(nn.BCELoss(), model.optimizer, device="cpu")
    dfhistory = fit(model, [callback], epochs=1)
    assert tracker.runs() == (1 if isinstance(tracker, Board) else 2)
    if isinstance(tracker, Board):
        assert_holds(
            {name: values for name, values in tracker.table().items() if name != "lr"}, dfhistory
        )


@pytest.mark.parametrize(
    ("make", "missing", "packages"),
    [
        (lambda: TensorBoard("runs"), "torch.utils.tensorboard", "tensorboard"),
        (MLflow, "mlflow", "mlflow-skinny alembic sqlalchemy"),
        (lambda: WandB("rings"), "wandb", "wandb"),
    ],
    ids=["TensorBoard", "MLflow", "WandB"],
)
def test_tracker_without_its_package_raises_an_error_that_says_what_to_install(
    make, missing, packages, monkeypatch
):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError) as error:
        make()
    name = {"torch.utils.tensorboard": "TensorBoard", "mlflow": "MLflow", "wandb": "WandB"}[missing]
    assert str(error.value) == f"{name} needs a package: pip install {packages}"


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda made_with: TensorBoard("runs", hparams=made_with), "hparams"),
        (lambda made_with: MLflow(params=made_with), "params"),
        (lambda made_with: WandB("rings", config=made_with), "config"),
    ],
    ids=["TensorBoard", "MLflow", "WandB"],
)
def test_tracker_takes_a_dict_of_parameters(make, name):
    with pytest.raises(TypeError) as error:
        make(["lr", 0.1])
    assert (
        str(error.value)
        == f'{name} must be a dict of name -> value, got [str, float]. Pass such as {{"lr": 0.1}}.'
    )


def test_tensorboard_logs_running_means_over_the_batches(tmp_path):
    seen = []
    log = minikeras.LambdaCallback(on_batch_end=lambda batch, logs: seen.append(logs["loss"]))
    fit(ring(), [TensorBoard(tmp_path, every=2), log], epochs=2)
    assert scalars(tmp_path / "steps")["loss"] == pytest.approx(
        {step: seen[step - 1] for step in (2, 4, 6, 8, 10)}
    )


def test_tensorboard_points_over_the_batches_continue_where_the_checkpoint_is(tmp_path):
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    run = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 2}
    fit(ring(), [TensorBoard(whole, every=1)])
    with pytest.raises(RuntimeError):
        fit(ring(), [TensorBoard(broken, every=1), Breaks(RuntimeError("broken"), 2, 5)], **run)
    fit(ring(), [TensorBoard(broken, every=1)], **run)
    assert scalars(broken / "steps") == scalars(whole / "steps")
    assert len(scalars(whole / "steps")["loss"]) == 15


def test_tensorboard_points_of_an_epoch_run_again_without_a_checkpoint_are_replaced(tmp_path):
    model = ring()
    board = TensorBoard(tmp_path, every=1)
    with pytest.raises(RuntimeError):
        fit(model, [board, Breaks(RuntimeError("broken"), 2, 3)])
    fit(model, [board], epochs=2)
    assert list(scalars(tmp_path / "steps")["loss"]) == list(range(1, 16))


@pytest.mark.parametrize("every", [1, None])
def test_tensorboard_of_a_second_fit_with_its_own_callback_continues_in_the_folder(every, tmp_path):
    model = ring()
    fit(model, [TensorBoard(tmp_path, every=every)], epochs=2)
    with pytest.raises(RuntimeError):
        fit(model, [TensorBoard(tmp_path, every=1), Breaks(RuntimeError("broken"), 4, 3)], epochs=2)
    fit(model, [TensorBoard(tmp_path, every=1)], epochs=2)
    assert list(scalars(tmp_path)["loss"]) == list(range(1, 6))
    assert list(scalars(tmp_path / "steps")["loss"]) == list(range(1 if every else 11, 26))


def test_tensorboard_reads_fits_in_quick_succession_in_their_order(tmp_path):
    model = ring()
    board = TensorBoard(tmp_path)
    time.sleep(1 - time.time() % 1)  # there is time for two in a second
    fit(model, [board], epochs=1)
    fit(model, [board], epochs=1)
    # files are in order of seconds
    assert len({file.name.split(".")[3] for file in tmp_path.glob("events.*")}) == 2


def test_tensorboard_histograms_hold_each_parameter_after_each_epoch(tmp_path):
    model = ring()
    fit(model, [TensorBoard(tmp_path, histograms=True)], epochs=2)
    held = events(tmp_path)
    assert sorted(held.Tags()["histograms"]) == [
        f"weights/fc{n}.{part}" for n in (1, 2) for part in ("bias", "weight")
    ]
    points = held.Histograms("weights/fc1.weight")
    assert [point.step for point in points] == [1, 2]
    assert points[-1].histogram_value.num == 16
    assert points[-1].histogram_value.sum == pytest.approx(model.fc1.weight.sum().item(), rel=1e-5)


def test_tensorboard_histograms_leave_out_weights_that_are_not_finite(tmp_path):
    model = ring()
    model.unused = nn.Parameter(torch.tensor([math.nan, math.inf, 1.0]))
    model.nothing = nn.Parameter(torch.tensor(math.nan))
    model.unused.requires_grad_(False)
    model.nothing.requires_grad_(False)
    model.compile(
        nn.BCELoss(),
        torch.optim.SGD([*model.fc1.parameters(), *model.fc2.parameters()]),
        device="cpu",
    )
    fit(model, [TensorBoard(tmp_path, histograms=True)], epochs=1)
    held = events(tmp_path)
    assert held.Histograms("weights/unused")[0].histogram_value.num == 1
    assert "weights/nothing" not in held.Tags()["histograms"]


class Noisy(Net):
    """With what a run of the model would move: statistics, and random numbers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(self.drop(self.norm(x + 0.1 * torch.randn_like(x))))


def noisy(callbacks):
    torch.manual_seed(0)
    model = compiled(Noisy())
    model.drop.eval()
    return fit(model, callbacks, epochs=2)


def test_tensorboard_graph_shows_the_layers_and_moves_nothing(tmp_path):
    drawn = noisy([TensorBoard(tmp_path, graph=points(3)[0])])
    pd.testing.assert_frame_equal(drawn, noisy([]), check_exact=True)
    nodes = [node.name for node in graph_of(tmp_path).node]
    assert all(any(layer in name for name in nodes) for layer in ("fc1", "fc2", "norm"))


def graph_of(folder):
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    return GraphDef.FromString(events(folder).Graph().SerializeToString())


def test_tensorboard_graph_that_cannot_be_drawn_leaves_no_file_open(tmp_path):
    board = TensorBoard(tmp_path, graph=torch.zeros(1, 7))
    with pytest.raises(ValueError, match="cannot draw"):
        fit(ring(), [board])
    assert [writer.file_writer for writer in board.writers] == [None]


def test_tensorboard_hparams_are_in_the_table_next_to_the_columns(tmp_path):
    board = Board(tmp_path)
    for _ in range(2):  # the second takes the place of the first
        fit(ring(), [board.callback()], epochs=1)
    held = events(board.folder)
    content = {
        tag: held.SummaryMetadata(tag).plugin_data.content
        for tag in held.PluginTagToContent("hparams")
    }
    start = HParamsPluginData.FromString(
        content["_hparams_/session_start_info"]
    ).session_start_info.hparams
    assert (start["lr"].number_value, start["kind"].string_value) == (0.1, "ring")
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    columns = ["loss", "accuracy", "val_loss", "val_accuracy", "lr"]
    assert [metric.name.tag for metric in experiment.metric_infos] == columns
    assert len(list(board.folder.glob("*.hparams"))) == 1


def test_tensorboard_hparams_that_the_table_cannot_show_are_refused_before_the_fit(tmp_path):
    with pytest.raises(ValueError, match="hparams") as error:
        TensorBoard(tmp_path, hparams={"lr": 0.1, "widths": [8, 8]})
    assert str(error.value) == (
        "hparams has [int, int] under 'widths'; expected a number, a string or a bool. Pass it as "
        "a string, str(...)."
    )


def test_tensorboard_hparams_may_be_numbers_of_numpy_and_torch(tmp_path):
    numbers = {
        "lr": np.float32(0.5),
        "width": np.int64(8),
        "decay": torch.tensor(0.25),
        "nesterov": True,
    }
    fit(ring(), [TensorBoard(tmp_path, hparams=numbers)], epochs=1)
    content = events(tmp_path).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: start[name].number_value or start[name].bool_value for name in numbers} == {
        "lr": 0.5,
        "width": 8,
        "decay": 0.25,
        "nesterov": True,
    }


def test_tensorboard_graph_of_something_else_than_tensors_is_refused(tmp_path):
    with pytest.raises(TypeError) as error:
        TensorBoard(tmp_path, graph="X")
    assert (
        str(error.value)
        == "graph must be a tensor or a tuple of them, got str. Pass features, X[:1]."
    )


def test_tensorboard_graph_that_the_model_cannot_take_is_one_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="graph") as error:
        fit(ring(), [TensorBoard(tmp_path, graph=torch.zeros(1, 3))], epochs=1)
    assert str(error.value) == (
        "TensorBoard cannot draw the model with graph=(Tensor (1, 3) float32): mat1 and mat2 "
        "shapes cannot be multiplied (1x3 and 2x8). Pass features as forward takes them, such as "
        "X[:1], or leave graph out."
    )
    assert "No graph saved" not in capsys.readouterr().out


def test_tensorboard_every_must_be_a_whole_number(tmp_path):
    with pytest.raises(ValueError, match=r"^every must be a whole number of 1 or more, got 0\.$"):
        TensorBoard(tmp_path, every=0)


def test_mlflow_holds_the_parameters_and_the_summary(tmp_path, capsys):
    store = Store(tmp_path)
    model = ring()
    summary = model.summary(input_shape=(2,))
    fit(
        model,
        [MLflow("rings", "first", store.uri, {"lr": 0.1, "kind": "ring"}, summary=summary)],
        epochs=1,
    )
    run = store.run()
    assert run.data.params == {"lr": "0.1", "kind": "ring"}
    assert run.info.run_name == "first"
    path = store.client().download_artifacts(run.info.run_id, "summary.txt", str(tmp_path))
    with open(path) as file:
        assert file.read() == str(summary)


def test_mlflow_run_that_fails_as_it_begins_has_failed(tmp_path):
    stored = Store(tmp_path)
    with pytest.raises(Exception, match="rate@"):
        fit(ring(), [MLflow("rings", tracking_uri=stored.uri, params={"rate@": 1})])
    assert stored.state() == "FAILED"


def test_mlflow_takes_a_metric_with_a_name_that_it_refuses(tmp_path):
    model = ring()
    model.compile(
        nn.BCELoss(), model.optimizer, {"top5 (acc@1)": lambda y_pred, y_true: 0.25}, device="cpu"
    )
    stored = Store(tmp_path)
    fit(model, [stored.callback()], epochs=1)
    assert stored.table()["val_top5 _acc_1_"] == {1: 0.25}


def test_mlflow_keeps_metrics_apart_whose_names_differ_in_what_it_refuses(tmp_path):
    class Counts(minikeras.Callback):
        def on_epoch_end(self, epoch, logs):
            logs |= (
                {"n>1": 3 * epoch, "n<1": 2 * epoch, "n_1": epoch}
                if epoch > 1
                else {"n<1": 2 * epoch}
            )

    stored = Store(tmp_path)
    run = {"checkpoint": tmp_path / "run.pt"}
    with pytest.raises(RuntimeError, match="broken"):
        fit(ring(), [Counts(), stored.callback(), Breaks(RuntimeError("broken"), 2, 1)], **run)
    fit(ring(), [Counts(), stored.callback()], **run)
    table = stored.table()
    assert table["n_1"] == {1: 2, 2: 4, 3: 6}  # as the run began with it
    assert table["n_1_2"] == {2: 2, 3: 3}
    assert table["n_1_3"] == {2: 6, 3: 9}


def test_mlflow_says_killed_after_ctrl_c(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(ring(), [store.callback(), Breaks(KeyboardInterrupt(), 2, 1)])
    assert store.state() == "KILLED"


def test_mlflow_takes_the_experiment_of_the_environment(tmp_path, monkeypatch):
    store = Store(tmp_path)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "rings")
    fit(ring(), [MLflow(tracking_uri=store.uri)], epochs=1)
    assert store.runs() == 1


def test_mlflow_takes_the_experiment_that_the_user_has_set_and_in_its_store_alone(
    tmp_path, monkeypatch
):
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    store = Store(tmp_path / "one")
    other = Store(tmp_path / "other")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "")  # set_experiment sets it
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    mlflow.set_experiment("rings")
    for callback in (
        MLflow(),
        MLflow(tracking_uri=store.uri),
        MLflow("mine"),
        MLflow(tracking_uri=other.uri),
    ):
        fit(ring(), [callback], epochs=1)
    assert store.runs() == 2
    assert (
        len(
            store.client().search_runs(
                [store.client().get_experiment_by_name("mine").experiment_id]
            )
        )
        == 1
    )
    assert len(other.client().search_runs(["0"])) == 1  # MLflow's own


def test_wandb_holds_the_project_the_name_and_the_config(tmp_path):
    files = Files(tmp_path)
    fit(ring(), [files.callback()], epochs=1)
    (run,) = files.records("run")
    assert (run.project, run.display_name) == ("rings", "first")
    config = {item.key: item.value_json for item in run.config.update}
    assert (config["lr"], config["kind"]) == ("0.1", '"ring"')


def test_wandb_run_of_the_user_continues_next_to_that_of_the_fit(tmp_path):
    files = Files(tmp_path)
    with wandb.init(project="mine", mode="offline", dir=str(tmp_path)) as own:
        for row in range(5):
            wandb.log({"before": row})
        model = ring()
        callback = files.callback()
        dfhistory = fit(model, [callback], epochs=2)
        wandb.log({"after": 1})
        dfhistory = fit(model, [callback], epochs=2)  # goes on in its own
        assert wandb.run is own
    table = files.table()
    assert (list(table.pop("before")), list(table.pop("after"))) == ([0, 1, 2, 3, 4], [5])
    assert_holds({name: values for name, values in table.items() if name != "lr"}, dfhistory)
    assert {run.project for run in files.records("run")} == {"mine", "rings"}
    assert files.runs() == 2


def test_wandb_follows_the_mode_of_the_environment_and_may_be_off(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # it has read the environment already
    fit(ring(), [WandB("rings", dir=str(tmp_path))], epochs=1)
    assert Files(tmp_path).runs() == 1
    fit(ring(), [WandB("rings", mode="disabled", dir=str(tmp_path))], epochs=1)
    assert Files(tmp_path).runs() == 1
