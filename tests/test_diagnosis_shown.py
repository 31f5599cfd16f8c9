"""How a diagnosis is shown: as text on a terminal, as a table in a notebook, once, and as a figure.

And what a check of the user's own may return.
"""

import io
import pickle
import re
import sys
import time
import types
from html.parser import HTMLParser
from unittest import mock

import pytest
import torch
from helpers.launch import run_python
from helpers.models import Net, compiled, points
from torch import nn

import minikeras
from minikeras.diagnosis import Diagnosis, Finding, bar
from minikeras.diagnosis.figure import Curves
from minikeras.support import shown

X, y = points(40)
REMEDY = (
    "Leave these rows out, X = X[X['income'].notna()], or fill in a value: "
    "X['income'] = X['income'].fillna(X['income'].median()), which is quick-and-dirty."
)
CODE = "Scale the columns:\n    scaler = StandardScaler().fit(X_train)\n    X = scaler.transform(X)"
FINDINGS = [
    Finding("error", 'feature "income"', "NaN in 12 of 2,000 rows", "no NaN", REMEDY),
    Finding("warning", "12 columns, the largest " + "a_column" * 9, "3e+04", "about 1", CODE),
    Finding("warning", "the learning rate", "1e-05", "0.01", "Raise it."),
    Finding("note", "<b>&", "1 < 2", "", "Use x[:, 0]."),
]
ARTICLE = """\
Diagnosis of Net: 1 error, 1 note

Errors: the network cannot learn like this

1. feature "income": NaN in 12 of 2,000 rows (usual: no NaN)
   Leave these rows out, X = X[X['income'].notna()], or fill in a value:
   X['income'] = X['income'].fillna(X['income'].median()), which is
   quick-and-dirty.

Notes: nothing is wrong, but worth knowing

2. <b>&: 1 < 2
   Use x[:, 0].

Looked at 2,000 rows of dl_train and 500 rows of dl_val; steps=100; 2.3 s."""


class Terminal(io.StringIO):
    """A stdout that says that it is a terminal."""

    def isatty(self):
        return True


def diagnosis_of(findings, **kwargs):
    return Diagnosis("Net", findings, 100, 2.34, {"dl_train": 2000, "dl_val": 500}, **kwargs)


# --- the text -------------------------------------------------------------------------------------


def test_text_is_a_numbered_line_for_each_finding_with_what_to_do_below():
    assert str(diagnosis_of([FINDINGS[0], FINDINGS[3]])) == ARTICLE


@pytest.mark.parametrize("width", [40, 60, 80, 100])
@pytest.mark.parametrize("count", [1, 12])
def test_text_is_wrapped_and_never_cut(width, count):
    text = diagnosis_of(FINDINGS * count).text(width)
    words = text.split()
    for finding in FINDINGS:
        for part in (finding.looked_at, finding.found, finding.usual, finding.remedy):
            for word in part.split():
                assert any(word in printed for printed in words)  # whole, on one line
    too_long = [line for line in text.splitlines() if len(line) > width]
    # only what cannot be broken: a word, or code
    assert all(len(line.split()) == 1 or line.startswith("      ") for line in too_long)


def test_text_keeps_the_lines_of_code_in_a_remedy():
    lines = str(diagnosis_of([FINDINGS[1]])).splitlines()
    start = lines.index("   Scale the columns:")
    assert lines[start + 1] == "       scaler = StandardScaler().fit(X_train)"
    assert lines[start + 2] == "       X = scaler.transform(X)"


def test_text_aligns_the_findings_though_their_numbers_have_two_digits():
    lines = str(diagnosis_of([FINDINGS[2]] * 11)).splitlines()
    assert " 1. the learning rate: 1e-05 (usual: 0.01)" in lines
    assert "11. the learning rate: 1e-05 (usual: 0.01)" in lines
    assert lines.count("    Raise it.") == 11


def test_text_of_a_diagnosis_without_findings_promises_nothing():
    text = " ".join(str(diagnosis_of([])).split())
    assert text.startswith("Diagnosis of Net: nothing found Nothing wrong was found in the data, ")
    assert "That does not prove that the model is right" in text
    assert text.endswith(
        "Looked at 2,000 rows of dl_train and 500 rows of dl_val; steps=100; 2.3 s."
    )


@pytest.mark.parametrize(("columns", "width"), [(60, 60), (80, 80), (120, 100), (20, 40)])
def test_text_is_as_wide_as_the_terminal(columns, width, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", str(columns))
    assert str(diagnosis_of(FINDINGS)) == diagnosis_of(FINDINGS).text(width)


# --- once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["notebook", "console", "script"])
def test_diagnosis_is_shown_once(where, monkeypatch, capsys):
    shown = []
    notebook = types.SimpleNamespace(kernel=1, execution_count=7)
    shell = {"notebook": notebook, "console": types.SimpleNamespace(), "script": None}[where]
    display = types.SimpleNamespace(display=lambda data, raw: shown.append(data))
    ipython = types.SimpleNamespace(get_ipython=lambda: shell, display=display)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    diagnosis = compiled().diagnose((X, y), steps=3)
    text = str(diagnosis)
    assert capsys.readouterr().out == ("" if where == "notebook" else text + "\n")
    if where == "notebook":
        diagnosis._ipython_display_()  # as the last line of the cell that has shown it
        assert [data["text/plain"] for data in shown] == [text]
        notebook.execution_count += 1
        diagnosis._ipython_display_()
        assert len(shown) == 2
        assert shown[0] == shown[1]
    else:
        with pytest.raises(NotImplementedError):
            diagnosis._ipython_display_()  # IPython prints the repr instead
        assert repr(diagnosis) == text


def test_diagnosis_is_shown_once_at_the_prompt_of_python():
    lines = [
        "import torch, minikeras",
        "model = minikeras.Model(torch.nn.Linear(2, 1))",
        "model.compile(torch.nn.MSELoss(), device='cpu')",
        "data = torch.randn(40, 2), torch.randn(40, 1)",
        "model.diagnose(data, steps=3)",
        "_",
    ]
    code = (
        "import code, sys; sys.ps1 = ''; names = {}\n"
        f"for line in {lines!r}: exec(compile(line, '<stdin>', 'single'), names)"
    )
    assert run_python(["-c", code]).count("Diagnosis of Model") == 2  # the call, and `_`


def test_diagnosis_is_printed_by_rank_0_alone(monkeypatch, capsys):
    monkeypatch.setattr(shown, "is_main", lambda: False)
    shown.show(diagnosis_of(FINDINGS))
    assert capsys.readouterr().out == ""


# --- HTML, DataFrame, pickle ----------------------------------------------------------------------


class Cells(HTMLParser):
    """Collects the texts of a table's cells, and the tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.rows = []
        self.open = []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def test_html_is_a_table_of_all_texts():
    parser = Cells()
    parser.feed(diagnosis_of(FINDINGS)._repr_html_())
    assert parser.open == []
    head, *rows = parser.rows
    assert head == ["", "level", "looked at", "found", "usual", "what to do"]
    for number, (row, finding) in enumerate(zip(rows, FINDINGS, strict=True), start=1):
        texts = [finding.looked_at, finding.found, finding.usual, finding.remedy]
        assert row == [str(number), f"\u25cf {finding.level}", *texts]


def test_html_can_be_read_on_a_light_and_on_a_dark_page():
    page = diagnosis_of(FINDINGS)._repr_html_()
    assert not re.search(r"background", page)
    # only the marks have a color
    assert re.findall(r'color: #\w+">(.*?)<', page) == ["&#9679;"] * len(FINDINGS)


def test_dataframe_has_a_row_for_each_finding():
    frame = diagnosis_of(FINDINGS).to_dataframe()
    assert list(frame["found"]) == [finding.found for finding in FINDINGS]
    assert list(frame)[:5] == ["level", "looked_at", "found", "usual", "remedy"]
    assert list(diagnosis_of([]).to_dataframe()) == list(frame)


def test_warnings_are_the_findings_without_the_notes():
    assert diagnosis_of(FINDINGS).warnings == FINDINGS[:3]


def test_diagnosis_can_be_pickled(capsys):
    diagnosis = compiled().diagnose((X, y), steps=3)
    copied = pickle.loads(pickle.dumps(diagnosis))
    assert copied == diagnosis
    assert str(copied) == str(diagnosis)


# --- the bar --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stdout", "delay", "is_drawn"),
    [(Terminal, 0.01, True), (Terminal, 60.0, False), (io.StringIO, 0.0, False)],
    ids=["a long one", "a short one", "in a pipe"],
)
def test_bar_is_drawn_on_a_terminal_if_it_takes_long(stdout, delay, is_drawn, monkeypatch):
    stream = stdout()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(bar, "DELAY", delay)

    def check(evidence):
        for _ in range(200):
            evidence.report("counting the sheep")
            if not is_drawn or "counting the sheep" in stream.getvalue():
                break
            time.sleep(0.01)
        return []

    compiled().diagnose((X, y), steps=3, checks=[check])
    printed = stream.getvalue()
    assert ("counting the sheep" in printed) == is_drawn
    assert ("\r" in printed) == is_drawn
    # it is removed: what is left on its line is blank
    before = printed.partition("Diagnosis of")[0]
    assert before.rpartition("\r")[2].strip() == ""


def test_bar_is_removed_when_a_check_raises(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(bar, "DELAY", 0.01)

    def check(evidence):
        for _ in range(200):
            if "diagnose |" in stream.getvalue():
                raise KeyboardInterrupt
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        compiled().diagnose((X, y), steps=3, checks=[check])
    assert stream.getvalue().rpartition("\r")[2].strip() == ""


# --- the figure -----------------------------------------------------------------------------------


@pytest.fixture
def plt():
    pytest.importorskip("matplotlib").use("agg")
    import matplotlib.pyplot as pyplot

    yield pyplot
    pyplot.close("all")


def with_relu():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())
    return compiled(minikeras.Model(net), lr=0.25)


def labels_of(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_figure_has_four_panels_of_what_was_measured(plt, tmp_path):
    diagnosis = with_relu().diagnose((X, y), steps=20)
    figure = diagnosis.plot()
    figure.savefig(tmp_path / "figure.png")  # all can be drawn
    rates, memorized, ratios, dead = figure.axes
    assert rates.get_xscale() == "log"
    assert "the optimizer's: 0.25" in labels_of(rates)
    found = diagnosis.curves.learning_rates
    smoothed = next(line for line in rates.get_lines() if line.get_label() == "smoothed")
    assert list(smoothed.get_ydata()) == found.smoothed
    assert labels_of(memorized)[0] == "the model's optimizer"
    assert len(memorized.get_lines()[0].get_ydata()) == 20
    assert [text.get_text() for text in ratios.get_yticklabels()] == ["net.0", "net.2"]
    assert [text.get_text() for text in dead.get_yticklabels()] == ["net.1"]


def test_figure_has_the_norms_of_one_step_of_the_optimizer(plt):
    model = with_relu()
    curves = model.diagnose((X, y), batch_size=40, steps=3).curves
    loss = nn.functional.binary_cross_entropy(model(X), y)  # all rows, so in any order
    for layer in ("net.0", "net.2"):
        parameters = list(model.get_submodule(layer).parameters())
        gradient = torch.cat(
            [part.flatten() for part in torch.autograd.grad(loss, parameters, retain_graph=True)]
        )
        weights = torch.cat([part.detach().flatten() for part in parameters])
        ratio = float(gradient.norm() / weights.norm())
        assert curves.gradients[layer] == pytest.approx(ratio, rel=1e-4)
        assert curves.updates[layer] == pytest.approx(0.25 * ratio, rel=1e-4)  # SGD


def test_figure_shows_the_dead_units(plt):
    model = with_relu()
    with torch.no_grad():
        model.net[0].bias[:6] = -100.0
    diagnosis = model.diagnose((X, y), steps=3)
    assert diagnosis.curves.dead["net.1"] >= 6 / 8
    dead = diagnosis.plot().axes[3]
    assert dead.patches[0].get_width() == 100 * diagnosis.curves.dead["net.1"]


def test_figure_says_what_was_not_measured(plt, tmp_path):
    figure = diagnosis_of([]).plot()
    figure.savefig(tmp_path / "figure.png")
    said = [axis.texts[0].get_text() for axis in figure.axes]
    assert said == ["not measured"] * 3 + ["no ReLU layer was measured"]


def test_figure_of_a_step_that_fails_is_drawn_without_it(plt, tmp_path):
    class Broken(Net):
        def train_step(self, features, labels, sample_weight=None):
            raise RuntimeError("broken")

    diagnosis = compiled(Broken()).diagnose((X, y), steps=3)
    assert diagnosis.findings[0].found == "raises RuntimeError"
    diagnosis.plot().savefig(tmp_path / "figure.png")


def test_figure_of_many_layers_has_the_worst_ones(plt, tmp_path):
    dead = {f"layers.{'inner.' * 9}{number}": number / 100 for number in range(60)}
    ratios = dict.fromkeys(dead, 0.001) | {"broken": float("nan"), "still": 0.0}
    curves = Curves(gradients=ratios, updates=ratios, dead=dead)
    figure = diagnosis_of([], curves=curves).plot()
    figure.savefig(tmp_path / "figure.png")
    _, _, ratio_axis, dead_axis = figure.axes
    labels = [text.get_text() for text in dead_axis.get_yticklabels()]
    assert [label.rpartition(".")[2] for label in labels] == [str(n) for n in range(35, 60)]
    assert max(map(len, labels)) <= 28
    assert dead_axis.get_ylabel() == "the worst 25 of 60 layers"
    labels = [text.get_text() for text in ratio_axis.get_yticklabels()]
    assert {"broken", "still"} <= set(labels)


def test_figure_keeps_no_tensor_and_no_model():
    model = with_relu()
    diagnosis = model.diagnose((X, y), steps=3)
    waiting = [diagnosis]
    seen = set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        assert not isinstance(value, (torch.Tensor, nn.Module))
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif hasattr(value, "__dict__"):
            waiting += vars(value).values()
    assert diagnosis.curves.learning_rates is not None


def test_figure_without_matplotlib_names_the_line_that_installs_it():
    missing = mock.patch.dict(sys.modules, {"matplotlib.pyplot": None})
    error = pytest.raises(ModuleNotFoundError, match=r"^figures need matplotlib: pip install")
    with missing, error:
        diagnosis_of([]).plot()


# --- checks of the user's own ---------------------------------------------------------------------


def three_findings(evidence):
    yield Finding("note", "mine", f"{evidence.train.rows} rows", "any", "Nothing.")
    yield Finding("warning", "mine", "a symptom", "none", "Nothing.", is_symptom=True)
    yield Finding("warning", "mine", "a cause", "none", "Nothing.")


def test_own_check_is_made_and_its_findings_are_sorted():
    checks = [three_findings, lambda evidence: []]
    diagnosis = compiled().diagnose((X, y), steps=3, checks=checks)
    mine = [finding for finding in diagnosis.findings if finding.looked_at == "mine"]
    assert [finding.found for finding in mine] == ["a cause", "a symptom", "40 rows"]
    assert {finding.check for finding in mine} == {"three_findings"}


def test_error_of_an_own_check_is_raised_and_says_in_which():
    def look_twice(evidence):
        yield FINDINGS[0]
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken") as raised:
        compiled().diagnose((X, y), steps=3, checks=[look_twice])
    assert raised.value.__notes__ == ["diagnose, your check look_twice"]


@pytest.mark.parametrize(
    ("found", "got"),
    [
        ("all is well", "'all is well'"),
        (FINDINGS[2], "a single Finding"),
        (None, "None"),
        (True, "True"),
        (["all is well"], "'all is well'"),
        ({}, "{}"),
        ("", "''"),
    ],
)
def test_own_check_that_returns_something_else_is_refused(found, got):
    def look(evidence):
        return found

    with pytest.raises(TypeError) as raised:
        compiled().diagnose((X, y), steps=3, checks=[look])
    assert str(raised.value) == (
        f"the check look must return a list of Findings, or yield them, got {got}. Write return "
        "[Finding(level, looked_at, found, usual, remedy)], with Finding from "
        "minikeras.diagnosis; return [] if nothing was found."
    )


@pytest.mark.parametrize("checks", [three_findings, 3, ["check"], "check"])
def test_checks_that_are_no_list_of_functions_are_refused_before_anything_is_made(checks):
    with pytest.raises(TypeError, match=r"^checks must be .*pass checks=\[check_x\]\.$"):
        compiled().diagnose((X, y), checks=checks)


def test_room_is_reached_as_an_attribute():
    code = (
        "import minikeras; print(minikeras.diagnosis.Finding.__name__, "
        "minikeras.diagnosis.Diagnosis.__name__, minikeras.diagnosis.Evidence.__name__, "
        "minikeras.diagnosis.LearningRates.__name__, 'diagnosis' in dir(minikeras))"
    )
    expected = ["Finding", "Diagnosis", "Evidence", "LearningRates", "True"]
    assert run_python(["-c", code]).split() == expected
