"""What a notebook shows; the notebooks of the examples run in a real kernel."""

import html
import pickle
import re
import sys
import time
import types
import xml.etree.ElementTree as ET
from datetime import datetime

import nbformat
import pandas as pd
import pytest
import torch
from helpers.models import Net, accuracy, compiled, points
from helpers.paths import ROOT
from nbclient import NotebookClient
from torch import nn

import minikeras
from minikeras.report import notebook, progress

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
NAN = float("nan")


# --- the notebooks of the examples ----------------------------------------------------------------


class Reader(NotebookClient):
    """Runs a notebook and keeps the messages that make or change the outputs of each cell."""

    kinds: dict

    def process_message(self, msg, cell, cell_index):
        self.kinds.setdefault(cell_index, []).append(msg["msg_type"])
        return super().process_message(msg, cell, cell_index)


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def executed(request):
    """Run a notebook on one thread; return its cells and their messages."""
    book = nbformat.read(request.param, as_version=4)
    client = Reader(book, timeout=240, kernel_name="python3")
    client.kinds = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        client.execute()  # an error in a cell is raised
    return book.cells, client.kinds


def test_notebooks_exist_among_the_examples():
    assert [path.stem for path in NOTEBOOKS] == ["digits", "ring"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def fit_of(cells):
    """The number of the cell that fits with something shown."""
    (number,) = [
        number
        for number, cell in enumerate(cells)
        if re.search(r"^dfhistory = ", cell.source, re.MULTILINE)
    ]
    return number


def test_notebook_fit_is_one_output_that_is_redrawn_a_few_times_a_second(executed):
    cells, kinds = executed
    fit = fit_of(cells)
    times = cells[fit].metadata["execution"]
    begin, end = (
        datetime.fromisoformat(times[f"iopub.{moment}"])
        for moment in ("execute_input", "status.idle")
    )
    seconds = (end - begin).total_seconds()
    drawn = [
        kind
        for kind in kinds[fit]
        if kind in ("display_data", "update_display_data", "stream", "execute_result")
    ]
    assert drawn[0] == "display_data"
    assert set(drawn[1:]) == {"update_display_data"}
    assert 1 <= len(drawn[1:]) <= seconds / notebook.REFRESH + 2
    assert len(cells[fit].outputs) == 1


def test_notebook_fit_leaves_its_table_and_its_charts(executed):
    cells, _ = executed
    fit = fit_of(cells)
    page = ET.fromstring(cells[fit].outputs[0]["data"]["text/html"].replace("&nbsp;", " "))
    assert "val_loss" in [cell.text for cell in page.iter("th")]
    numbers = ["".join(row[0].itertext()) for row in page.findall(".//tbody/tr")]
    assert numbers == [str(epoch) for epoch in range(1, len(numbers) + 1)]
    assert re.match(rf"{len(numbers)} epochs in ", page[0].text)
    assert len(page.findall(".//polyline")) >= 4
    assert not page.findall(".//progress")


def test_notebooks_show_figures_the_model_and_its_summary(executed):
    cells, _ = executed
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    shown = [output["data"].get("text/html", "") for output in outputs]
    assert sum("image/png" in output["data"] for output in outputs) == 3
    # once, though it is the cell's last line as well
    assert sum("<pre>Total params: " in page for page in shown) == 1
    plain = [output["data"].get("text/plain", "") for output in outputs]
    assert sum("Total params: " in text for text in plain) == 1
    assert not [text for text in plain if "Summary" in text]
    assert not [output for output in outputs if output["output_type"] in ("stream", "error")]


# --- one live output ------------------------------------------------------------------------------


@pytest.fixture
def page(monkeypatch):
    """Return the outputs of a fit under a notebook's IPython: [first, redrawn, ...], by display."""
    made = []

    def display(data, raw, display_id=False):
        made.append([data])
        return types.SimpleNamespace(update=lambda data, raw: made[-1].append(data))

    shell = types.SimpleNamespace(kernel=1, execution_count=1)
    module = types.SimpleNamespace(
        get_ipython=lambda: shell, display=types.SimpleNamespace(display=display)
    )
    monkeypatch.setitem(sys.modules, "IPython", module)
    return made


def text_of(output):
    return html.unescape(re.sub(r"<[^>]+>", " ", output["text/html"]))


def test_notebook_live_output_shows_the_bar_the_running_means_and_the_validation(
    page, monkeypatch, capsys
):
    monkeypatch.setattr(notebook, "REFRESH", 0.0)
    monkeypatch.setattr(notebook, "SHARE", 1e9)
    compiled(metrics_dict={"accuracy": accuracy}).fit(2, points(96), points(32))
    (outputs,) = page
    shown = [output["text/html"] for output in outputs]
    assert "starting" in shown[0]
    assert any(
        '<progress max="3" value="2"></progress> 2/3' in it and "loss 0." in it for it in shown
    )
    assert any("epoch 2/2" in it and "validating" in it for it in shown)
    assert not any('value="2"' in it and "validating" in it for it in shown)
    assert "progress" not in shown[-1]
    assert capsys.readouterr().out == ""


def test_notebook_table_has_all_columns_that_alternate(page):
    def logged(epoch, logs):
        logs["odd" if epoch % 2 else "even"] = epoch

    compiled().fit(4, points(8), callbacks=[minikeras.LambdaCallback(on_epoch_end=logged)])
    table = page[0][-1]["text/html"].partition("<table")[2]
    assert re.findall(r"<th[^>]*>(\w+)<", table) == ["epoch", "loss", "odd", "even", "time"]
    rows = [re.findall(r"<td[^>]*>([^<]*)<", row)[2:4] for row in table.split("<tr>")[2:]]
    assert rows == [["1.000", ""], ["", "2.000"], ["3.000", ""], ["", "4.000"]]


def test_notebook_page_is_not_flooded_by_many_short_epochs(page):
    begin = time.monotonic()
    dfhistory = compiled().fit(200, points(32), points(32))
    seconds = time.monotonic() - begin
    (outputs,) = page
    assert len(outputs) <= 3 + seconds / notebook.REFRESH  # the first, the last, and one at once
    assert len(outputs[-1]["text/html"]) < 20_000
    table = outputs[-1]["text/html"]
    assert f"{200 - notebook.ROWS} earlier epochs are not shown" in table
    assert f"<b>{dfhistory['val_loss'].idxmin() + 1}</b>" in table


def test_notebook_table_keeps_the_best_epoch_though_it_is_long_past():
    rows = {epoch: {"loss": 1.0, "val_loss": abs(epoch - 3) + 1.0} for epoch in range(1, 101)}
    times = dict.fromkeys(rows, "1.0 s")
    table = notebook.epochs_table(["loss", "val_loss"], rows, times)
    numbers = [int(number) for number in re.findall(r"<tr><td [^>]*>(?:<b>)?(\d+)", table)]
    assert numbers == [3, *range(102 - notebook.ROWS, 101)]
    assert "<b>1.000</b>" in table


@pytest.mark.parametrize("number", [1, 2])
def test_notebook_fit_that_is_cut_short_says_after_which_step(page, number):
    def interrupt(batch, logs):
        if batch == number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled().fit(5, points(96), callbacks=[minikeras.LambdaCallback(on_batch_end=interrupt)])
    assert re.match(
        rf" +ended in epoch 1 of 5, at step {number - 1}/3, after \S+ s ", text_of(page[0][-1])
    )


def test_notebook_fit_that_was_stopped_early_says_after_which_epoch(page):
    model = compiled()

    def stop(epoch, logs):
        model.stop_training = epoch == 2

    model.fit(5, points(64), callbacks=[minikeras.LambdaCallback(on_epoch_end=stop)])
    assert re.match(r" +2 epochs in \S+ s +stopped after epoch 2 of 5 ", text_of(page[0][-1]))


def test_notebook_fit_that_its_checkpoint_has_finished_does_not_look_like_one_that_starts(
    page, tmp_path, capsys
):
    for _ in range(2):
        torch.manual_seed(0)  # as in a script that is started again
        compiled().fit(1, points(64), checkpoint=tmp_path / "run.pt")
    assert text_of(page[1][0]).split() == ["starting"]
    assert "finished after epoch 1" in text_of(page[1][-1])
    assert "starting" not in text_of(page[1][-1])
    assert capsys.readouterr().out == ""


def test_notebook_names_validation_only_if_there_is_some_and_marks_the_best_epoch(page, tmp_path):
    compiled().fit(2, points(64))
    assert "validation" not in text_of(page[0][-1])
    losses = iter([3.0, 2.0, 4.0])
    model = compiled()
    model.evaluate_step = lambda features, labels: {"loss": next(losses)}
    model.fit(3, points(64), [points(64)])
    text = text_of(page[1][-1])
    for expected in (
        "validation",
        "ring: the best value of this chart",
        "bold: the lowest val_loss of this fit",
    ):
        assert expected in text
    marked = [line.endswith("  lowest val_loss") for line in plain_of(page[1][-1])]
    assert marked == [False, True, False]


def test_notebook_plain_text_begins_with_where_the_fit_resumed(page, tmp_path):
    path = tmp_path / "run.pt"
    for epochs in (1, 2):
        torch.manual_seed(0)
        compiled().fit(epochs, points(64), checkpoint=path)
    lines = plain_of(page[1][-1])
    assert lines[0] == f"{path}: resumed after epoch 1"
    assert lines[1].startswith("epoch 2  loss ")


def plain_of(output):
    return output["text/plain"].splitlines()


def test_notebook_fit_counts_its_own_epochs(page):
    model = compiled()
    model.fit(2, points(64))
    model.fit(3, points(64))
    model.fit(1, points(64))
    endings = [re.match(r" +(.*?) in ", text_of(outputs[-1]))[1] for outputs in page]
    assert endings == ["2 epochs", "epochs 3 to 5", "epoch 6"]


@pytest.mark.parametrize(("verbose", "displays"), [("auto", 1), (1, 1), (2, 0), (0, 0)])
def test_notebook_verbose_means_what_it_means_elsewhere(page, capsys, verbose, displays):
    compiled().fit(1, points(32), verbose=verbose)
    assert len(page) == displays
    assert bool(capsys.readouterr().out) == (verbose == 2)


@pytest.mark.parametrize(
    ("columns", "lines", "dots"),
    [
        ({"loss": [3.0, 2, 1], "val_loss": [4.0, 3, 4]}, 2, 1),
        ({"loss": [3.0, 2, 1], "val_loss": [NAN, 3, NAN]}, 1, 2),  # a line of one point is a dot
        ({"temperature": [3.0, 2, 1]}, 1, 0),  # nothing says what is best
        ({"loss": [1.0]}, 0, 2),
        ({"loss": [NAN, float("inf")]}, 0, 0),
        ({"loss": [2.0, 2.0]}, 1, 1),
    ],
)
def test_notebook_chart_has_a_line_for_training_and_one_for_validation(columns, lines, dots):
    rows = {
        epoch: dict(zip(columns, row, strict=True))
        for epoch, row in enumerate(zip(*columns.values(), strict=True))
    }
    drawn = notebook.chart(next(iter(columns)), rows)
    assert (drawn.count("<polyline"), drawn.count("<circle")) == (lines, dots)
    assert not drawn or ET.fromstring(drawn).tag == "svg"
    assert "nan" not in drawn


@pytest.mark.parametrize(
    ("columns", "epoch"),
    [
        ({"loss": [3.0, 1, 2]}, 2),
        ({"accuracy": [0.1, 0.5, 0.9]}, 3),
        ({"loss": [3.0, 2, 1], "val_loss": [NAN, 3, 4]}, 2),
    ],
)
def test_notebook_chart_rings_the_best_epoch_of_validation_if_there_is_one(columns, epoch):
    rows = {
        number + 1: {name: values[number] for name, values in columns.items()}
        for number in range(3)
    }
    *_, ring = ET.fromstring(notebook.chart(next(iter(columns)), rows)).findall("circle")
    left = notebook.LEFT
    right = notebook.WIDTH - 6
    assert float(ring.attrib["cx"]) == left + (right - left) * (epoch - 1) / 2


def test_notebook_redraws_take_a_small_share_of_the_time(page, monkeypatch):
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(notebook, "time", clock)
    drawing = sys.modules["IPython"].display.display

    def slow(*args, **kwargs):
        first = drawing(*args, **kwargs)
        return types.SimpleNamespace(
            update=lambda *args, **kwargs: (first.update(*args, **kwargs), pass_time(0.2))
        )

    def pass_time(seconds):
        now[0] += seconds

    monkeypatch.setattr(sys.modules["IPython"].display, "display", slow)
    second = minikeras.LambdaCallback(on_batch_end=lambda batch, logs: pass_time(1.0))
    compiled().fit(1, points(32 * 100), callbacks=[second])
    assert 9 <= len(page[0]) <= 13  # 0.2 s of each 10


def test_notebook_chart_keeps_every_number_inside_it():
    drawn = ET.fromstring(
        notebook.chart("<loss>", {epoch: {"<loss>": 1 / (epoch + 1)} for epoch in range(1000)})
    )
    points = drawn.find("polyline").attrib["points"].split()
    assert len(points) <= notebook.POINTS * 2
    for point in points:
        x, y = map(float, point.split(","))
        assert 0 <= x <= notebook.WIDTH
        assert 0 <= y <= notebook.HEIGHT
    assert drawn.find("text").text == "<loss>"


@pytest.mark.usefixtures("page")
def test_notebook_history_is_a_plain_dataframe():
    dfhistory = compiled().fit(2, points(32))
    assert type(dfhistory) is pd.DataFrame
    for copied in (pickle.loads(pickle.dumps(dfhistory)), dfhistory.copy(), dfhistory.head()):
        assert copied.equals(dfhistory)
        assert not hasattr(copied, "_ipython_display_")


def test_history_outside_a_notebook_has_no_display_of_its_own(capsys):
    assert not hasattr(compiled().fit(1, points(32)), "_ipython_display_")


CELLS = [
    """
import torch, minikeras
model = minikeras.Model(torch.nn.Linear(1, 1))
model.compile(torch.nn.MSELoss(), device="cpu")
data = torch.zeros(8, 1), torch.ones(8, 1)
""",
    "model.fit(1, data)",
    "_",
    "dfhistory = model.fit(1, data)",
    "dfhistory",
    "dfhistory = model.fit(1, data)\ndfhistory",
    "display(model.fit(1, data))",
    "model.fit(1, data)\nmodel.history",
    "model.fit(1, data, verbose=0)",
    "model.fit(1, data, verbose=2)",
    "histories = [model.fit(1, data)]\nhistories[0]",
    "model.fit(1, data).query('loss >= 0')",
    "histories[0].equals(model.fit(1, data))\nmodel.fit(1, data)",
]
LIVE = "display_data"
SHOWN = "execute_result"


@pytest.fixture(scope="module")
def cells():
    """Run CELLS in a kernel; return the kinds of the outputs of each."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(book, timeout=240, kernel_name="python3").execute()
    kinds = {}
    for cell in book.cells:
        outputs = [output.output_type for output in cell.outputs]
        while outputs[:2] == ["stream", "stream"]:  # one text may come in pieces
            del outputs[0]
        kinds[cell.source] = outputs
    return kinds


@pytest.mark.parametrize(
    ("number", "outputs"),
    [
        (1, [LIVE]),
        (2, [SHOWN]),  # what the cell before returned, in a cell of its own
        (3, [LIVE]),
        (4, [SHOWN]),
        (5, [LIVE, SHOWN]),  # assigned, and asked for
        (6, [LIVE, LIVE]),
        (7, [LIVE, SHOWN]),
        (8, [SHOWN]),
        (9, ["stream", SHOWN]),
        (10, [LIVE, SHOWN]),  # asked for, though no variable holds it
        (11, [LIVE, SHOWN]),
        (12, [LIVE, LIVE]),
    ],
    ids=lambda value: CELLS[value].replace("\n", "; ") if isinstance(value, int) else "",
)
def test_notebook_fit_at_the_end_of_a_cell_has_one_table(cells, number, outputs):
    assert cells[CELLS[number]] == outputs


# --- times and colours ----------------------------------------------------------------------------


def test_notebook_table_has_the_time_of_each_epoch_and_the_bar_what_is_left(page, monkeypatch):
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(notebook, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    ten = minikeras.LambdaCallback(on_batch_end=lambda batch, logs: now.__setitem__(0, now[0] + 10))
    compiled().fit(3, points(32 * 4), callbacks=[ten])
    table = page[0][-1]["text/html"].partition("<table")[2]
    assert [row.count("40.0 s") for row in table.split("<tr>")[2:]] == [1, 1, 1]
    assert re.match(r" +3 epochs in 2 min 0 s ", text_of(page[0][-1]))
    texts = [" ".join(text_of(output).split()) for output in page[0]]
    assert any("epoch 1/3 2/4 20.0 s, 20.0 s left loss" in text for text in texts)
    left = "epoch 2/3 2/4 20.0 s, 20.0 s left (fit: 1 min 0 s left) loss"
    assert any(left in text for text in texts)
    plain = page[0][-1]["text/plain"].splitlines()
    assert [line.endswith("  40.0 s") for line in plain] == [True] * 3


BACKGROUNDS = {"light": "#ffffff", "dark": "#111111"}


def linear(color):
    """Return the red, green and blue of a color in linear light, 0 to 1."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(color, background):
    """Return the contrast ratio of two colors, 1 to 21 (WCAG 2.1)."""
    red_green_blue = (0.2126, 0.7152, 0.0722)
    light, dark = sorted(
        (
            sum(share * part for share, part in zip(red_green_blue, linear(one), strict=True))
            for one in (color, background)
        ),
        reverse=True,
    )
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("background", BACKGROUNDS.values(), ids=BACKGROUNDS)
def test_notebook_text_and_lines_can_be_read_in_both_themes(page, background):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    compiled(metrics_dict={"accuracy": accuracy}).fit(3, points(64), points(32))
    output = ET.fromstring(page[0][-1]["text/html"].replace("&nbsp;", " "))
    lines = set()
    for element in output.iter():
        styles = element.attrib.get("style", "").split(";")
        colors = [style.split(":")[1].strip() for style in styles if re.match(r" *color:", style)]
        if element.tag in ("svg", "text"):  # of the text in it
            colors += [element.attrib["fill"]] if "fill" in element.attrib else []
        for color in colors:  # the page's own can be read on the page
            assert color == "currentColor" or contrast(color, background) >= 4.5
        if element.tag in ("polyline", "circle"):
            lines |= {element.attrib.get(name, "none") for name in ("stroke", "fill")}
    assert lines == {notebook.BLUE, notebook.ORANGE, "currentColor", "none"}
    for color in (notebook.BLUE, notebook.ORANGE):
        assert contrast(color, background) >= 3  # of what is no text


# Machado, Oliveira and Fernandes 2009, "A physiologically-based model for simulation of color
# vision deficiency", severity 1.0; of linear red, green and blue
VISION = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(red_green_blue):
    """Return a color of linear red, green and blue in CIELAB (D65)."""
    to_xyz = torch.tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ red_green_blue.clamp(0, 1) / torch.tensor([0.9505, 1.0, 1.089])
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_notebook_lines_differ_for_colour_blind_readers(vision):
    seen = [
        lab(torch.tensor(VISION[vision]) @ torch.tensor(linear(color)))
        for color in (notebook.BLUE, notebook.ORANGE)
    ]
    assert (seen[0] - seen[1]).norm() > 40  # a difference of 2 can just be seen
    red_and_green = [
        lab(torch.tensor(VISION["deuteranopia"]) @ torch.tensor(linear(color)))
        for color in ("#b30000", "#4d6600")
    ]
    assert (red_and_green[0] - red_and_green[1]).norm() < 40  # the test tells some apart


# --- a model --------------------------------------------------------------------------------------


def test_notebook_shows_a_model_as_a_table_of_its_layers():
    model = Net()
    model.fc1.requires_grad_(False)
    cells = re.findall(r"<td [^>]*>(.*?)</td>", model._repr_html_())
    first = ["&nbsp;&nbsp;fc1 (Linear)", "24", "frozen"]
    second = ["&nbsp;&nbsp;fc2 (Linear)", "9", ""]
    assert cells == ["Net", "0", "", *first, *second]
    assert "<div>Total params: 33</div>" in model._repr_html_()
    assert repr(model).startswith("Net(\n  (fc1)")


def test_notebook_shows_a_big_model_as_deep_as_a_short_table_goes():
    block = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(20)]
    shown = minikeras.Model(nn.Sequential(*block))._repr_html_()
    assert shown.count("<tr>") == 1 + 22
    assert "40 more layers inside; model.summary(input_shape) has them." in shown
    cells = re.findall(r"<td [^>]*>(.*?)</td>", shown)
    assert cells[-3:] == [
        "&nbsp;&nbsp;&nbsp;&nbsp;19 (Sequential)",
        "6",
        "with 2 more layers inside",
    ]
    assert sum(int(count) for count in cells[1::3]) == 20 * 6
    assert "Total params: 120<" in shown
    assert (
        minikeras.Model(nn.Sequential(*[nn.ReLU() for _ in range(999)]))._repr_html_().count("<tr>")
        <= 31
    )


def test_notebook_shows_a_lazy_layer_without_a_count():
    shown = minikeras.Model(nn.LazyLinear(3))._repr_html_()
    cells = re.findall(r"<td [^>]*>(.*?)</td>", shown)
    assert cells == ["Model", "0", "", "&nbsp;&nbsp;net (LazyLinear)", "?", "lazy"]
    assert "Total params: 0 and those of lazy layers<" in shown


def test_notebook_counts_a_tied_layer_once_in_the_whole():
    layer = nn.Linear(2, 2)
    shown = minikeras.Model(nn.Sequential(layer, nn.ReLU(), layer))._repr_html_()
    cells = re.findall(r"<td [^>]*>(.*?)</td>", shown)
    assert cells[1::3] == ["0", "0", "6", "0", "0"]
    assert cells[-1] == "same as net.0"
    assert "Total params: 6<" in shown
