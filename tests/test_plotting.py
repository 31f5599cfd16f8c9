"""plot_history draws the history."""

import re
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers.models import accuracy, compiled, points

import minikeras

NAN = float("nan")


@pytest.fixture(autouse=True)
def _figures_in_memory():
    mpl.use("Agg")
    yield
    plt.close("all")


def history(**columns):
    index = pd.RangeIndex(len(next(iter(columns.values()))))
    return pd.DataFrame(columns, index=index)


def lines(axis):
    """Label -> the points of a panel's lines."""
    return {
        line.get_label(): list(zip(*map(list, line.get_data()), strict=True))
        for line in axis.get_lines()
    }


def test_plot_has_a_panel_per_metric_with_validation_in_it():
    model = compiled(metrics_dict={"accuracy": accuracy})
    dfhistory = model.fit(3, points(64), points(32), verbose=0)
    axes = minikeras.plot_history(dfhistory)
    assert [axis.get_title() for axis in axes] == ["loss", "accuracy"]
    for axis in axes:
        drawn = lines(axis)
        name = axis.get_title()
        assert drawn["training"] == list(zip([1, 2, 3], dfhistory[name], strict=True))
        assert drawn["validation"] == list(zip([1, 2, 3], dfhistory[f"val_{name}"], strict=True))
        assert axis.get_xlabel() == "epoch"


@pytest.mark.parametrize(
    ("columns", "label", "at"),
    [
        ({"loss": [3.0, 1, 2], "val_loss": [3.0, 4, 2]}, "best: 2 in epoch 3", (3, 2.0)),
        ({"loss": [3.0, 1, 2]}, "best: 1 in epoch 2", (2, 1.0)),
        ({"accuracy": [0.5, 0.9, 0.9]}, "best: 0.9 in epoch 2", (2, 0.9)),  # the first of equals
        ({"mae": [NAN, 2.0, 1.0], "val_mae": [NAN, 0.25, NAN]}, "best: 0.25 in epoch 2", (2, 0.25)),
    ],
)
def test_plot_marks_the_best_epoch_by_the_direction_of_the_name(columns, label, at):
    assert lines(minikeras.plot_history(history(**columns))[0])[label] == [at]


@pytest.mark.parametrize(
    "columns", [{"temperature": [1.0, 2.0]}, {"lr": [0.1, 0.01]}, {"loss": [NAN, NAN]}]
)
def test_plot_marks_no_epoch_if_the_direction_is_not_known(columns):
    assert not [
        label
        for label in lines(minikeras.plot_history(history(**columns))[0])
        if label.startswith("best")
    ]


def test_plot_line_runs_through_epochs_without_validation():
    axis = minikeras.plot_metric(
        history(loss=[4.0, 3, 2, 1], val_loss=[NAN, 3.5, NAN, 1.5]), "loss"
    )
    assert lines(axis)["validation"] == [(2, 3.5), (4, 1.5)]


def test_plot_counts_epochs_from_1_in_a_part_of_a_history_and_in_a_csv_file():
    whole = history(loss=[4.0, 3, 2, 1])
    table = pd.DataFrame({"epoch": [7, 8], "loss": [2.0, 1.0]})
    for part, expected in (
        (whole.tail(2), [(3, 2.0), (4, 1.0)]),
        (table, [(7, 2.0), (8, 1.0)]),
        (table.set_index("epoch"), [(7, 2.0), (8, 1.0)]),
    ):
        assert lines(minikeras.plot_history(part)[0])["training"] == expected


def test_plot_is_not_flattened_by_an_infinite_loss():
    assert lines(minikeras.plot_metric(history(loss=[1.0, np.inf, 2.0]), "loss"))["training"] == [
        (1, 1.0),
        (3, 2.0),
    ]


def test_plot_has_the_learning_rate_in_the_last_panel_on_a_log_scale_if_it_spans_much():
    frame = history(loss=[1.0, 2, 3], accuracy=[0.1, 0.2, 0.3], lr=[0.1, 0.01, 0.001])
    axes = minikeras.plot_history(frame)
    assert [axis.get_title() for axis in axes] == ["loss", "accuracy", "lr"]
    assert [axis.get_yscale() for axis in axes] == ["linear", "linear", "log"]
    assert minikeras.plot_metric(frame[:2], "lr").get_yscale() == "linear"


def test_plot_shows_a_learning_rate_that_warms_up_from_zero():
    axis = minikeras.plot_metric(history(loss=[3.0, 2, 1], lr=[0.0, 0.001, 0.1]), "lr")
    axis.figure.canvas.draw()
    assert axis.get_ylim()[0] <= 0
    assert axis.get_yscale() == "linear"


@pytest.mark.parametrize("epochs", [1, 2, 3, 30, 31, 500])
def test_plot_axis_has_whole_epochs_and_a_short_history_has_markers(epochs):
    axis = minikeras.plot_metric(history(loss=np.linspace(1, 0, epochs)), "loss")
    axis.figure.canvas.draw()
    labels = [text.get_text() for text in axis.get_xticklabels()]
    assert labels
    assert axis.get_xlim()[0] > 0  # there is no epoch 0
    assert all(re.fullmatch(r"\d+|\N{MINUS SIGN}\d+", label) for label in labels)
    assert (axis.get_lines()[0].get_marker() == "o") == (epochs <= 30)


@pytest.mark.parametrize(
    ("panels", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (7, (3, 3))]
)
def test_plot_panels_are_in_rows_and_none_is_empty(panels, shape):
    axes = minikeras.plot_history(history(**{f"metric{i}": [1.0] for i in range(panels)}))
    assert len(axes) == panels
    assert axes[0].figure.axes == axes
    assert axes[0].get_gridspec().get_geometry() == shape


@pytest.mark.parametrize(
    ("metrics", "titles"),
    [
        ("accuracy", ["accuracy"]),
        (["accuracy", "loss"], ["accuracy", "loss"]),
        (("val_loss",), ["val_loss"]),
        (None, ["loss", "accuracy", "val_other"]),
    ],
)
def test_plot_draws_the_named_metrics_in_that_order(metrics, titles):
    frame = history(loss=[1.0], accuracy=[0.5], val_loss=[2.0], val_other=[3.0])
    assert [axis.get_title() for axis in minikeras.plot_history(frame, metrics)] == titles


def test_plot_draws_validation_alone_if_it_is_named():
    axis = minikeras.plot_metric(history(loss=[1.0, 2.0], val_loss=[2.0, 1.0]), "val_loss")
    assert lines(axis) == {"validation": [(1, 2.0), (2, 1.0)], "best: 1 in epoch 2": [(2, 1.0)]}


def test_plot_draws_the_file_of_a_csv_logger(tmp_path):
    log = minikeras.CSVLogger(tmp_path / "log.csv")
    dfhistory = compiled().fit(2, points(32), callbacks=[log], verbose=0)
    axis = minikeras.plot_metric(pd.read_csv(tmp_path / "log.csv"), "loss")
    assert dict(lines(axis)["training"]) == pytest.approx(
        dict(zip([1, 2], dfhistory["loss"], strict=True))
    )


def test_plot_shows_and_writes_nothing_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda *args, **kwargs: pytest.fail("shown"))
    axes = minikeras.plot_history(history(loss=[1.0]))
    assert plt.get_fignums() == [axes[0].figure.number]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dfhistory", "metrics", "error", "message"),
    [
        (
            history(loss=[1.0], val_loss=[1.0]),
            "los",
            ValueError,
            "metrics has 'los', which is no column of the history. Its columns are 'loss', "
            "'val_loss'. Did you mean 'loss'?",
        ),
        (
            history(loss=[1.0]),
            [],
            ValueError,
            "metrics must name a column of the history or more, got none. Leave it out to draw "
            "all.",
        ),
        (
            history(loss=[]),
            None,
            ValueError,
            "dfhistory has no epoch to draw. Pass what fit returned, after one epoch or more.",
        ),
        (
            {"loss": [1.0]},
            None,
            TypeError,
            "dfhistory must be the DataFrame that fit returned, got dict. After a fit it is at "
            "model.history too.",
        ),
        (
            [history(loss=[1.0]), history(loss=[2.0])],
            None,
            TypeError,
            "dfhistory must be the DataFrame that fit returned, got a list of 2. For the mean of "
            "several histories, epoch by epoch, pass pd.concat(histories).groupby(level=0).mean().",
        ),
        (
            pd.concat([history(loss=[1.0, 0.5]), history(loss=[2.0, 1.0])]),
            None,
            ValueError,
            "dfhistory has several rows of one epoch (`0` in its index); expected a row per epoch. "
            "For the mean of several histories pass dfhistory.groupby(level=0).mean().",
        ),
        (
            pd.DataFrame({"epoch": [1, 2, 2], "loss": [1.0, 0.5, 0.5]}),
            None,
            ValueError,
            "dfhistory has several rows of one epoch (`2` in its index); expected a row per epoch. "
            'For the mean of several histories pass dfhistory.groupby("epoch").mean().',
        ),
        (
            history(loss=[1.0]),
            3,
            TypeError,
            'metrics must be a column\'s name or several, got 3. Pass "loss" or ["loss", "lr"].',
        ),
        (
            pd.DataFrame({"epoch": [1, 2]}),
            None,
            ValueError,
            "dfhistory has no column but epoch. Pass what fit returned, with loss and metrics.",
        ),
        (
            history(loss=[1.0], remark=["slow"]),
            None,
            ValueError,
            "dfhistory has 'slow' in the column 'remark'; expected numbers. Name the columns to "
            "draw in metrics, or drop this one.",
        ),
        (
            history(loss=[1.0]).rename(index=str),
            None,
            ValueError,
            "dfhistory's index must be numbers, from 0 as in a history, got '0'. Pass what fit "
            "returned.",
        ),
    ],
)
def test_plot_of_what_cannot_be_drawn_says_what_to_pass(dfhistory, metrics, error, message):
    with pytest.raises(error) as caught:
        minikeras.plot_history(dfhistory, metrics)
    assert str(caught.value) == message
    assert not plt.get_fignums()


def test_plot_of_several_histories_draws_the_mean_that_its_error_shows():
    histories = [history(loss=[1.0, 0.5]), history(loss=[3.0])]
    (axis,) = minikeras.plot_history(pd.concat(histories).groupby(level=0).mean())
    assert lines(axis)["training"] == [(1, 2.0), (2, 0.5)]
    numbered = pd.concat(histories).rename_axis("epoch").reset_index()
    (axis,) = minikeras.plot_history(numbered.groupby("epoch").mean())
    assert lines(axis)["training"] == [(0, 2.0), (1, 0.5)]


def test_plot_ignores_a_column_of_words():
    (axis,) = minikeras.plot_history(history(loss=[1.0, 0.5], remark=["slow", "fast"]), "loss")
    assert axis.get_title() == "loss"


def test_plot_without_matplotlib_raises_an_error_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        minikeras.plot_history(history(loss=[1.0]))
    assert str(caught.value) == "figures need matplotlib: pip install matplotlib"


def test_plot_draws_a_name_with_dollars_as_it_is():
    (axis,) = minikeras.plot_history(pd.DataFrame({r"$cost\per$": [2.0, 1.0]}, index=[1, 2]))
    axis.figure.canvas.draw()
    assert axis.get_title() == r"$cost\per$"
