"""The progress bar and the table that a fit prints."""

import fcntl
import functools
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from helpers.models import accuracy, compiled, points
from helpers.pages import TIME, without_times
from helpers.paths import TESTS

import minikeras
from minikeras import Callback
from minikeras.report import progress, table
from minikeras.report.progress import Progress

SCRIPT = """
import torch
from helpers.models import accuracy, compiled, points
torch.manual_seed(0)
compiled(metrics_dict={"accuracy": accuracy}).fit(3, points(64), points(64))
"""


def test_progress_in_a_pipe_is_rows_and_log_lines_without_control_characters(capsys):
    compiled(metrics_dict={"accuracy": accuracy}).fit(3, points(96), points(64), log_step_freq=2)
    lines = without_times(capsys.readouterr().out).splitlines()
    number = r" +\d\.\d{2,4}"
    assert lines[1].split() == ["epoch", "loss", "accuracy", "val_loss", "val_accuracy"]
    assert [
        bool(re.fullmatch(rf"epoch \d  step 2  loss{number}  accuracy{number}", lines[i]))
        for i in (0, 4, 6)
    ]
    rows = [lines[i] for i in (3, 5, 7)]
    assert all(
        re.fullmatch(rf" +{epoch}{number}{number}{number}( +\*)?{number}", row)
        for epoch, row in enumerate(rows, 1)
    )
    assert len(lines) == 8
    assert not re.search(r"[\r\x1b]", "".join(lines))


def test_progress_table_shows_what_the_history_holds(capsys):
    dfhistory = compiled().fit(2, points(64), points(64))
    lines = without_times(capsys.readouterr().out).splitlines()
    rows = [line.replace("*", "").split() for line in lines[2:]]
    assert rows == [
        [str(row + 1), *(f"{value:#.4g}" for value in values)]
        for row, *values in dfhistory.itertuples()
    ]


def test_progress_table_marks_the_best_validation_loss_so_far(capsys):
    losses = iter([3.0, 4.0, 2.0, 2.0])
    model = compiled()
    model.evaluate_step = lambda features, labels: {"loss": next(losses)}
    model.fit(3, points(8), [points(8)])
    model.fit(1, points(8), [points(8)])
    printed = without_times(capsys.readouterr().out)
    marks = [line.endswith("*") for line in printed.splitlines() if re.match(r" +\d", line)]
    assert marks == [True, False, True, False]


def test_progress_header_comes_once_if_validation_is_not_in_every_epoch(capsys):
    compiled().fit(5, points(8), points(8), validation_freq=2)
    lines = without_times(capsys.readouterr().out).splitlines()
    assert [line.split() for line in lines if "loss" in line] == [["epoch", "loss", "val_loss"]]
    assert [len(line.replace("*", "").split()) for line in lines[2:]] == [2, 3, 2, 3, 2]


class Alternates(Callback):
    """Logs one name in odd epochs, and another one in even ones."""

    def on_epoch_end(self, epoch, logs):
        logs["odd" if epoch % 2 else "even"] = epoch


def test_progress_header_comes_once_if_columns_alternate(capsys):
    compiled().fit(6, points(8), callbacks=[Alternates()])
    lines = without_times(capsys.readouterr().out).splitlines()
    first, second = (line for line in lines if "loss" in line)
    assert (first.split(), second.split()) == (
        ["epoch", "loss", "odd"],
        ["epoch", "loss", "odd", "even"],
    )
    ends = [second.index(name) + len(name) for name in ("odd", "even")]
    assert [len(line) for line in lines[-4:]] == ends * 2  # each number under its name


def test_progress_bar_counts_the_time_of_each_epoch_from_its_beginning(capsys):
    bar = Progress(True, epochs=2, steps=3, log_step_freq=None, validates=False, best=math.inf)
    bar.model = compiled()
    bar.on_epoch_begin(1)
    bar.bar.start_t -= 1000  # seconds
    assert bar.bar.format_dict["elapsed"] > 999
    bar.on_epoch_begin(2)
    assert bar.bar.format_dict["elapsed"] < 100
    bar.on_fit_end()


def test_progress_takes_ipython_that_cannot_be_imported_for_no_notebook(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "IPython", None)
    compiled().fit(1, points(8), verbose=1)
    assert "loss" in capsys.readouterr().out


def test_progress_with_verbose_0_prints_nothing(capsys):
    compiled().fit(2, points(8), points(8), 1, verbose=0)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


class Kept:
    """What a script may put in the place of sys.stdout: no more than what print needs."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("verbose", ["auto", 1, 2])
def test_progress_prints_to_an_object_with_write_and_flush_alone(verbose, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Kept())
    compiled().fit(2, points(8), points(8), log_step_freq=1, verbose=verbose)
    assert re.findall(r"^ +(\d) +\d\.\d+ ", sys.stdout.text.replace("\r", "\n"), re.MULTILINE) == [
        "1",
        "2",
    ]
    assert ("\r" in sys.stdout.text) == (verbose == 1)


@pytest.mark.parametrize("verbose", ["auto", 0, 1, 2])
def test_progress_without_standard_output_shows_nothing(verbose, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert len(compiled().fit(2, points(8), points(8), log_step_freq=1, verbose=verbose)) == 2


def test_progress_epoch_numbers_continue_over_several_fits(capsys):
    model = compiled()
    model.fit(1, points(8))
    model.fit(1, points(8))
    assert [
        line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match(r" +\d", line)
    ] == ["1", "2"]


# --- time -----------------------------------------------------------------------------------------


class Clock:
    """A clock that stands still until it is set forward; takes the place of the module time."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now

    def time(self):
        return self.now

    def forward(self, seconds):
        self.now += seconds

    def after_each_batch(self, seconds):
        def wait(batch, logs):
            self.forward(seconds() if callable(seconds) else seconds)

        return minikeras.LambdaCallback(on_batch_end=wait)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize("verbose", ["auto", 1, 2])
def test_progress_rows_end_with_the_seconds_of_the_epoch_and_the_fit_with_the_total(
    verbose, clock, capsys
):
    ten = clock.after_each_batch(10)
    validate = minikeras.LambdaCallback(
        on_evaluate_end=lambda: setattr(clock, "now", clock.now + 5)
    )
    dfhistory = compiled().fit(3, points(64), points(8), callbacks=[ten, validate], verbose=verbose)
    printed = capsys.readouterr().out.replace("\r", "\n")
    lines = [line for line in printed.splitlines() if line.strip() and "|" not in line]
    assert lines[0].split()[-1] == "time"
    assert [line[-8:] for line in lines[2:5]] == ["  25.0 s"] * 3
    assert lines[5:] == ["3 epochs in 1 min 15 s"]
    assert list(dfhistory) == ["loss", "val_loss"]  # times differ from run to run


def test_progress_of_one_epoch_ends_with_one_epoch(clock, capsys):
    compiled().fit(1, points(64), callbacks=[clock.after_each_batch(2)])
    assert capsys.readouterr().out.splitlines()[-1] == "1 epoch in 4.0 s"


def test_progress_of_a_fit_that_was_interrupted_has_no_total(capsys):
    def interrupt(batch, logs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled().fit(1, points(8), callbacks=[minikeras.LambdaCallback(on_batch_end=interrupt)])
    assert capsys.readouterr().out == ""


def test_progress_time_column_widens_before_a_time_would_stick_out(clock, capsys):
    seconds = iter([3, 59.96, 5, 4000])
    compiled().fit(4, points(8), callbacks=[clock.after_each_batch(lambda: next(seconds))])
    lines = capsys.readouterr().out.splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("epoch")]
    assert heads == [0, 3]
    assert [line.split("  ")[-1].strip() for line in lines] == [
        *("time", "------", "3.0 s"),
        *("time", "-----------", "1 min 0 s", "5.0 s", "1 h 6 min"),
        "4 epochs in 1 h 7 min",
    ]
    assert {len(line) for line in lines[:3]} == {24}
    assert {len(line) for line in lines[3:8]} == {29}


def test_progress_time_column_is_wide_from_the_start_if_the_first_epoch_is_long(clock, capsys):
    seconds = iter([40, 70])
    compiled().fit(2, points(8), callbacks=[clock.after_each_batch(lambda: next(seconds))])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[2:4]] == ["40.0 s", "1 min 10 s"]
    assert {len(line) for line in lines[:4]} == {29}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (119.6, "2 min 0 s"),
        (3599.6, "1 h 0 min"),
        (3600 * 100, "100 h 0 min"),
    ],
)
def test_progress_time_is_rounded_to_the_next_unit(seconds, text):
    assert progress.clock(seconds) == text
    assert re.fullmatch(TIME, text)


def test_progress_estimates_the_time_left_from_whole_epochs_without_the_first(clock, capsys):
    left = []

    def look(epoch):
        (table,) = [
            callback for callback in model._run.fit.callbacks if isinstance(callback, Progress)
        ]
        left.append(table.fit_left())

    seconds = iter([100, 10, 20, 30])
    model = compiled()
    wait = clock.after_each_batch(lambda: next(seconds))
    save = minikeras.LambdaCallback(on_epoch_begin=look)
    model.fit(4, points(8), callbacks=[wait, save], verbose=2)
    # looked at before the table's own on_epoch_begin, so in the epoch that has ended
    assert left == [None, 300.0 + 100, 2 * 10 + 10, 15 + 15]


def test_progress_of_a_resumed_epoch_counts_only_the_steps_of_this_process(clock, capsys, tmp_path):
    def fit(stop):
        def look(batch, logs):
            clock.now += 10
            (table,) = [
                callback for callback in model._run.fit.callbacks if isinstance(callback, Progress)
            ]
            seen.append((batch, table.epoch_left(), table.fit_left()))
            if batch == stop:
                raise KeyboardInterrupt

        model = compiled()
        callbacks = [minikeras.LambdaCallback(on_batch_end=look)]
        saving = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 1}
        model.fit(2, points(32 * 4), callbacks=callbacks, verbose=1, **saving)

    seen = []
    with pytest.raises(KeyboardInterrupt):
        fit(stop=3)
    seen.clear()
    fit(stop=None)
    # the table comes after the callback, so its last step is the one before
    assert seen[:2] == [(3, None, None), (4, 20.0, None)]
    # the first epoch was not whole, and no second one has ended
    assert [left for _, _, left in seen] == [None] * 6
    assert "20.0 s" in capsys.readouterr().out


def test_progress_bar_says_that_it_validates(clock, capsys):
    compiled().fit(1, points(64), points(8), callbacks=[clock.after_each_batch(1)], verbose=1)
    assert re.search(r"2/2 \[\d\d:\d\d<00:00\], validating", capsys.readouterr().out)


# --- the width of the table -----------------------------------------------------------------------

NAMES = ["accuracy", "precision", "recall", "sensitivity", "mae", "price_loss", "specificity"]
VALUES = [1.0, -0.123456, 1.2345e-5, -1.2345e-5, 123456.0, math.nan, math.inf]


@pytest.mark.parametrize("width", [34, 40, 60, 80, 100, 120, 160, None])
@pytest.mark.parametrize("validates", [False, True])
@pytest.mark.parametrize("count", range(8))
def test_progress_table_fits_the_terminal_and_each_number_stands_under_its_name(
    count, validates, width
):
    names = ["loss", *NAMES[:count]]
    columns = [*names, *(f"val_{name}" for name in names if validates), "lr"]
    layout = table.choose_layout(columns, width, table.TIME_WIDTH)
    head, dashes = layout.head(width).splitlines()[-2:]
    assert len(head) == len(dashes) == layout.width()
    assert width is None or len(head) < width
    assert width is not None or (layout.names, layout.number_width) == (tuple(columns), 9)
    ends = [match.end() for match in re.finditer(r"-+", dashes)]
    for value in VALUES:
        rows = layout.rows(7, dict.fromkeys(columns, value), "59.9 s", True).splitlines()
        assert len(rows) == 1 + layout.is_stacked
        for row in rows:
            assert len(row) <= len(dashes)
            for cell in re.finditer(r"\S*\d\S*|nan|inf|\*", row.replace(" s", "_s")):
                assert cell.end() in ends
    shown = len(layout.names) * (2 if layout.is_stacked else 1)
    assert layout.left_out or shown >= len(columns)


def test_progress_table_takes_shorter_numbers_then_two_lines_then_shorter_names():
    def chosen(width):
        layout = table.choose_layout(columns, width, table.TIME_WIDTH)
        return layout.number_width, layout.is_stacked, layout.name_width, layout.left_out

    columns = ["loss", "sensitivity", "val_loss", "val_sensitivity"]
    full = table.choose_layout(columns, None, table.TIME_WIDTH).width()
    assert chosen(full + 1) == (9, False, None, ())
    assert chosen(full) == (7, False, None, ())
    assert chosen(full - 4) == (9, True, None, ())
    narrow = table.Layout(("loss", "sensitivity"), is_stacked=True, number_width=7).width()
    assert chosen(narrow + 1) == (7, True, None, ())
    assert chosen(narrow) == (7, True, 10, ())
    assert chosen(narrow - 4) == (7, True, 7, ("sensitivity",))
    assert chosen(1) == (7, True, 7, ("sensitivity",))  # there is nothing left to leave out


EXPECTED = """\
no space for precision; the history has
them
epoch            loss     acc~acy    time
-----  -----  -------  -  -------  ------
    1  train   0.5000      0.1235   0.0 s
    2  train   0.4000      0.1235   0.0 s
       val     0.7000  *   0.1235
    3  train   0.3000      0.1235   0.0 s
3 epochs in 0.0 s
"""


def train(epochs, losses, callbacks=(), metrics=(), **kwargs):
    """Fit with given losses, one an epoch, and metrics of one value."""
    names = dict.fromkeys(metrics, lambda y_pred, y_true: 0.123456)
    model = compiled(metrics_dict=names)
    loss = iter(losses)
    model.compute_loss = lambda outputs, labels, weight=None: outputs.sum() * 0 + next(loss)
    return model.fit(epochs, points(8), callbacks=callbacks, **kwargs)


def test_progress_two_lines_for_each_epoch_mark_the_best_validation_loss(monkeypatch, capsys):
    monkeypatch.setattr(progress, "terminal_width", lambda: 42)
    train(
        3,
        [0.5, 0.4, 0.7, 0.3],
        metrics=["accuracy", "precision"],
        dl_val=points(8),
        validation_freq=2,
    )
    printed = re.sub(r"\d+\.\d s", "0.0 s", capsys.readouterr().out)
    assert printed == EXPECTED


def test_progress_column_that_comes_later_gets_a_head_of_its_own(monkeypatch, capsys):
    def change(epoch, logs):
        if epoch == 2:
            logs["extra"] = 2.0

    monkeypatch.setattr(progress, "terminal_width", lambda: 80)
    late = minikeras.LambdaCallback(on_epoch_end=change)
    train(3, [0.5, 0.4, 0.3], [late], ["accuracy", "recall", "mae"])
    lines = without_times(capsys.readouterr().out).splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("epoch")]
    assert heads == [0, 3]
    assert lines[3].split() == ["epoch", "loss", "accuracy", "recall", "mae", "extra"]
    assert lines[5].index("2.000") + 5 == lines[3].index("extra") + 5
    assert len(lines[6].split()) == 5  # epoch 3 has no value


def test_progress_table_changes_with_the_width_of_the_terminal(monkeypatch, capsys):
    widths = iter([120, 120, 60, 60, 3, 120])
    monkeypatch.setattr(progress, "terminal_width", lambda: next(widths))
    train(6, [0.5] * 12, (), ["accuracy", "recall"], dl_val=points(8))
    lines = without_times(capsys.readouterr().out).splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("epoch")]
    assert [len(lines[number].split()) for number in heads] == [7, 4, 2, 7]
    assert "space" in lines  # a word a line


@functools.cache
def on_a_terminal(code, columns, encoding="utf-8"):
    """What a script writes to a terminal of that many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(TESTS)}
    environment |= {"PYTHONIOENCODING": encoding, "NO_COLOR": "1" if encoding == "ascii" else ""}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            read = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not read:
            break
        written += read
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


@pytest.mark.parametrize("columns", [80, 120])
def test_progress_on_a_terminal_is_a_bar_that_gives_way_to_the_row_of_the_table(columns):
    written = on_a_terminal(SCRIPT, columns)
    lines = written.replace("\r\n", "\n").split("\n")
    assert re.search(r"epoch 1/3 \|.{12}\| \d/2", written)
    assert "loss 0." in written
    kept = [line.rpartition("\r")[2] for line in lines]
    firsts = [line.split()[0] for line in kept if line.strip()]
    assert firsts == ["epoch", "-----", "1", "2", "3", "3"]
    assert re.fullmatch(rf"3 epochs in {TIME}", kept[-2])
    assert max(len(part) for line in lines for part in line.split("\r")) <= columns


MANY = """
from helpers.models import compiled, points
names = ["precision", "recall", "sensitivity", "specificity"]
metrics = {name: lambda y_pred, y_true: 0.123456 for name in names}
compiled(metrics_dict=metrics).fit(2, points(64), log_step_freq=1)
"""


@pytest.mark.parametrize("columns", [60, 120])
def test_progress_bar_shows_whole_numbers_and_its_time_on_a_narrow_terminal(columns):
    written = on_a_terminal(MANY, columns)
    bars = [part.rstrip() for part in re.split(r"[\r\n]", written) if "loss 0." in part]
    assert bars
    for bar in bars:
        assert re.fullmatch(
            r"epoch \d/2 \|.{12}\| \d/2 \[\d\d:\d\d<[\d:?]+"
            r"(?:, fit \d\d:\d\d left)?\], loss \d\.\d{4}(  [a-z]+ 0\.1235)*",
            bar,
        ), bar
        assert len(bar) < columns
    assert max(bar.count("0.1235") for bar in bars) == {60: 0, 120: 3}[columns]


SEVERAL = """
import fcntl, struct, sys, termios
import minikeras
from helpers.models import compiled, points

def fit(count, epochs, callbacks=()):
    names = ["accuracy", "precision", "recall", "sensitivity", "mae"][:count]
    metrics = dict.fromkeys(names, lambda y_pred, y_true: 0.123456)
    model = compiled(metrics_dict=metrics)
    model.fit(epochs, points(64), points(8), callbacks=callbacks, log_step_freq=1)

def resize(epoch, logs):
    size = struct.pack("HHHH", 24, [20, 3, 0, 200][epoch - 1], 0, 0)
    fcntl.ioctl(sys.stdout, termios.TIOCSWINSZ, size)

for count in range(6):
    fit(count, 2)
print("resized")
fit(5, 4, [minikeras.LambdaCallback(on_epoch_end=resize)])
"""


@pytest.mark.parametrize("columns", [80, 120])
def test_progress_on_a_terminal_wraps_no_line_and_survives_its_resizing(columns):
    written, _, resized = on_a_terminal(SEVERAL, columns).partition("resized")
    parts = re.split(r"[\r\n]", written)
    assert max(map(len, parts)) < columns
    assert len(re.findall("^2 epochs in ", written, re.MULTILINE)) == 6
    stacked = len(re.findall("^ +1  train ", written, re.MULTILINE))
    assert stacked >= {80: 4, 120: 2}[columns]  # more if epochs are slow: their times are wider
    assert "4 epochs in" in resized


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_progress_bar_uses_characters_that_the_terminal_has(encoding):
    written = on_a_terminal(SCRIPT, 80, encoding)
    bars = re.findall(r"\|(.{12})\|", written)
    assert bars
    assert any("\u2588" in bar for bar in bars) == (encoding == "utf-8")
    assert any("#" in bar for bar in bars) == (encoding != "utf-8")


def test_progress_uses_no_colour():
    assert not re.search(
        r"\x1b\[[\d;]*m", on_a_terminal(SCRIPT, 80) + on_a_terminal(SCRIPT, 80, "ascii")
    )


def test_progress_in_a_pipe_in_ascii_is_ascii():
    environment = os.environ | {
        "PYTHONIOENCODING": "ascii",
        "PYTHONPATH": str(TESTS),
    }
    code = f"{SCRIPT}\nimport torch, minikeras\nminikeras.summary(torch.nn.Linear(2, 1), (2,))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert len(done.stdout.splitlines()) > 5
