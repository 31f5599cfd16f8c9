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
from helpers.paths import TESTS

from minikeras import Callback
from minikeras.report.progress import Progress

SCRIPT = """
import torch
from helpers.models import accuracy, compiled, points
torch.manual_seed(0)
compiled(metrics_dict={"accuracy": accuracy}).fit(3, points(64), points(64))
"""


def test_progress_in_a_pipe_is_rows_and_log_lines_without_control_characters(capsys):
    compiled(metrics_dict={"accuracy": accuracy}).fit(3, points(96), points(64), log_step_freq=2)
    lines = capsys.readouterr().out.splitlines()
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
    rows = [line.replace("*", "").split() for line in capsys.readouterr().out.splitlines()[2:]]
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
    marks = [
        line.endswith("*")
        for line in capsys.readouterr().out.splitlines()
        if re.match(r" +\d", line)
    ]
    assert marks == [True, False, True, False]


def test_progress_header_comes_once_if_validation_is_not_in_every_epoch(capsys):
    compiled().fit(5, points(8), points(8), validation_freq=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "loss" in line] == [["epoch", "loss", "val_loss"]]
    assert [len(line.replace("*", "").split()) for line in lines[2:]] == [2, 3, 2, 3, 2]


class Alternates(Callback):
    """Logs one name in odd epochs, and another one in even ones."""

    def on_epoch_end(self, epoch, logs):
        logs["odd" if epoch % 2 else "even"] = epoch


def test_progress_header_comes_once_if_columns_alternate(capsys):
    compiled().fit(6, points(8), callbacks=[Alternates()])
    lines = capsys.readouterr().out.splitlines()
    first, second = (line for line in lines if "loss" in line)
    assert (first.split(), second.split()) == (
        ["epoch", "loss", "odd"],
        ["epoch", "loss", "odd", "even"],
    )
    ends = [second.index(name) + len(name) for name in ("odd", "even")]
    assert [len(line) for line in lines[-4:]] == ends * 2  # each number under its name


def test_progress_bar_counts_the_time_of_each_epoch_from_its_beginning(capsys):
    bar = Progress(True, epochs=2, steps=3, log_step_freq=None, validates=False, best=math.inf)
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
    assert [line.split()[0] for line in kept if line.strip()] == ["epoch", "-----", "1", "2", "3"]
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
            r"epoch \d/2 \|.{12}\| \d/2 \[\d\d:\d\d<\S+\], loss \d\.\d{4}(  [a-z]+ 0\.1235)*", bar
        ), bar
        assert len(bar) < columns
    assert max(bar.count("0.1235") for bar in bars) == {60: 0, 120: 3}[columns]


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
