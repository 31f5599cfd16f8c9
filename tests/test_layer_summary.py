"""`summary`: the table, counts that add up, errors that name the layer, a model left alone."""

import dataclasses
import random
import re
import sys
import threading
import types
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from helpers.launch import run_python
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import minikeras
from minikeras.errors import ForwardError
from minikeras.report import layer_summary
from minikeras.report.layer_summary import summary


class Net(nn.Module):
    """The network of the article."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(2, 4)
        self.fc2 = nn.Linear(4, 8)
        self.fc3 = nn.Linear(8, 1)

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return torch.sigmoid(self.fc3(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.out = nn.Linear(8, 50, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.embed(ids))


class Reused(nn.Module):
    """One block under two names, called three times; parameters of its own; an uncalled layer."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.same = self.block
        self.scale = nn.Parameter(torch.ones(4))
        self.spare = nn.Linear(4, 3)

    def forward(self, x):
        return self.scale * self.same(self.block(self.block(x)))


class Constants(nn.Module):
    """Plain tensors as attributes, one of them an output of forward, and draws of every kind."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.shift = torch.ones(4)
        self.factor = torch.tensor(2)
        self.last = self.fc(torch.zeros(1, 3))

    def forward(self, x):
        x = x + torch.rand(3) + random.random() + float(np.random.rand())
        self.last = self.fc(x) * self.shift
        return torch.cat([self.last, self.shift.expand(len(x), 4)]) * self.factor


class ReadsValues(nn.Module):
    """What meta tensors cannot do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        x = self.norm(self.fc(x + torch.rand(3)))
        return x if x.sum().item() > 0 else -x


class Derivative(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.fc(x).sum(), x)[0]


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    hidden: tuple


class Structured(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        y = self.fc(x)
        if self.kind == "dict":
            return {"logits": y, "extra": [y[:, 0], None, "text"]}
        if self.kind == "dataclass":
            return Answer(y, (y.T,))
        return pack_sequence(list(y.unsqueeze(1)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.fc = nn.Linear(3, 4)

    def forward(self, ids, x):
        return self.embed(ids).sum(1) + self.fc(x)


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(2), torch.ones(2)])
        self.layers = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})

    def forward(self, x):
        for layer, scale in zip(self.layers.values(), self.scales, strict=True):
            x = layer(x) * scale
        return x


def frozen_net():
    net = Net()
    net.fc1.requires_grad_(False)
    net.fc2.bias.requires_grad_(False)
    return net


def cnn():
    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), head
    )


def pruned():
    net = Net()
    prune.l1_unstructured(net.fc1, "weight", 0.5)
    return net


LONG = torch.LongTensor
CASES = {
    "article": (Net, {"input_shape": (2,)}),
    "cnn": (cnn, {"input_shape": [3, 8, 8]}),
    "frozen": (frozen_net, {"input_shape": (2,)}),
    "tied": (Tied, {"input_shape": (6,), "input_dtype": LONG}),
    "reused": (Reused, {"input_shape": (4,)}),
    "lstm": (
        lambda: nn.LSTM(3, 5, 2, batch_first=True, bidirectional=True),
        {"input_shape": (7, 3)},
    ),
    "packed": (
        lambda: nn.LSTM(3, 5),
        {"input_data": pack_sequence([torch.ones(4, 3), torch.ones(2, 3)])},
    ),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        {"input_shape": {"query": (5, 8), "key": (6, 8), "value": (6, 8)}},
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        {"input_shape": (5, 8)},
    ),
    "constants": (Constants, {"input_shape": (3,)}),
    "reads values": (ReadsValues, {"input_shape": (3,)}),
    "derivative": (Derivative, {"input_shape": (3,)}),
    "dict": (lambda: Structured("dict"), {"input_shape": (3,)}),
    "dataclass": (lambda: Structured("dataclass"), {"input_data": torch.ones(5, 3)}),
    "packed output": (lambda: Structured("packed"), {"input_shape": (3,)}),
    "two inputs": (
        TwoInputs,
        {"input_shape": [(4,), (3,)], "input_dtype": [torch.int64, torch.float32]},
    ),
    "data parallel": (lambda: nn.DataParallel(Net()), {"input_shape": (2,)}),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
        {"input_shape": (2,)},
    ),
    "pruned": (pruned, {"input_shape": (2,)}),
    "half": (
        lambda: Net().to(torch.bfloat16),
        {"input_shape": (2,), "input_dtype": torch.bfloat16},
    ),
    "containers": (Containers, {"input_shape": (2,)}),
}
cases = pytest.mark.parametrize(("build", "arguments"), CASES.values(), ids=CASES.keys())


def rows_of(result):
    return {row.layer: row for row in result.rows}


def state_of(model, data):
    """Everything that a look at the model must leave alone, as comparable values."""
    tensors = [
        *model.parameters(),
        *model.buffers(),
        *(leaf for leaf in (data,) if isinstance(leaf, torch.Tensor)),
    ]
    attributes = []
    for module in model.modules():
        for key, value in vars(module).items():
            # parameters, hooks and children are in dicts
            attributes.append((key, list(value.items()) if isinstance(value, dict) else id(value)))
    return (
        [(id(tensor), tensor.device, tensor.detach().clone()) for tensor in tensors],
        attributes,
        [module.training for module in model.modules()],
        torch.get_rng_state(),
        [
            torch.from_numpy(part) if isinstance(part, np.ndarray) else part
            for part in np.random.get_state()
        ],
        random.getstate(),
    )


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


# --- laws -----------------------------------------------------------------------------------------


@cases
def test_summary_total_is_the_number_of_distinct_elements(build, arguments):
    model = build()
    assert summary(model, **arguments).total_params == sum(
        held.numel() for held in set(model.parameters())
    )


@cases
def test_summary_rows_add_up_to_the_totals(build, arguments):
    result = summary(build(), **arguments)
    assert sum(row.params for row in result.rows) == result.total_params
    assert sum(row.trainable_params for row in result.rows) == result.trainable_params
    assert result.trainable_params + result.non_trainable_params == result.total_params


@cases
def test_summary_leaves_the_model_and_the_random_state_alone(build, arguments):
    model = build()
    children = list(model.children())
    if children:
        children[-1].eval()
    before = state_of(model, arguments.get("input_data"))
    summary(model, **arguments)
    assert same(before, state_of(model, arguments.get("input_data")))


@cases
def test_summary_has_a_row_for_every_layer_and_a_shape_for_the_model(build, arguments):
    model = build()
    result = summary(model, **arguments)
    assert {name for name, _ in model.named_modules()} <= set(rows_of(result))
    assert result.rows[0].output_shape is not None


@cases
def test_summary_table_has_a_line_for_each_row_within_eighty_columns(build, arguments, capsys):
    result = summary(build(), **arguments)
    printed = capsys.readouterr().out
    assert printed == f"{result}\n"
    table = printed.split("\nTotal params")[0].splitlines()
    assert len(table) >= 3 + len(result.rows)
    assert max(map(len, table)) <= 80


# --- the table ------------------------------------------------------------------------------------


ARTICLE = """\
layer (type)    output shape      params
--------------  --------------  --------
Net             [-1, 1]                0
  fc1 (Linear)  [-1, 4]               12
  fc2 (Linear)  [-1, 8]               40
  fc3 (Linear)  [-1, 1]                9
----------------------------------------
Total params: 61
Trainable params: 61
Non-trainable params: 0
Params size (MB): 0.000233
Input size (MB), 1 row: 0.000008
Outputs size (MB), 1 row: 0.000053
Multiply-adds, 1 row: 48
"""


def test_summary_table_is_that_of_the_article(capsys):
    summary(Net(), input_shape=(2,))
    assert capsys.readouterr().out == ARTICLE


def test_summary_takes_the_legacy_tensor_type_of_torchkeras(capsys):
    summary(Net(), input_shape=(2,), input_dtype=torch.FloatTensor, batch_size=-1)
    assert capsys.readouterr().out == ARTICLE


def test_summary_shows_the_batch_size_and_the_sizes_for_it():
    result = summary(Net(), (2,), batch_size=32)
    assert [row.output_shape for row in result.rows] == [[32, 1], [32, 4], [32, 8], [32, 1]]
    assert (result.input_bytes, result.output_bytes, result.multiply_adds) == (
        32 * 8,
        32 * 56,
        32 * 48,
    )
    assert "Multiply-adds, 32 rows: 1,536" in str(result)


def test_summary_sizes_use_the_real_dtypes():
    whole, half = (
        summary(Net().to(dtype), (2,), dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert (whole.params_bytes, whole.input_bytes, whole.output_bytes) == (4 * 61, 8, 56)
    assert (half.params_bytes, half.input_bytes, half.output_bytes) == (2 * 61, 4, 28)


def test_summary_object_shows_its_table_again():
    assert repr(summary(Net(), (2,))) + "\n" == ARTICLE


def test_summary_at_a_prompt_is_shown_once_and_again_when_asked_for():
    lines = [
        "import torch, minikeras",
        "net = torch.nn.Linear(2, 1)",
        "minikeras.summary(net, (2,))",  # Python shows what an expression returns
        "print('one')",
        "result = minikeras.summary(net, (2,))",
        "print('two')",
        "result",
        "print('three')",
        "_ = minikeras.summary(net, (2,)); result",
        "print('four')",
        "import pickle; pickle.loads(pickle.dumps(result)).total_params",
    ]
    printed = run_python(["-i", "-q"], input="\n".join(lines) + "\n")
    parts = re.split("one|two|three|four", printed)
    assert [part.count("Total params: 3\n") for part in parts] == [1, 1, 1, 2, 0]
    assert parts[-1].strip() == "3"
    assert "<" not in printed


def test_first_summary_of_a_process_does_not_import_the_compiler():
    code = (
        "import sys, torch, minikeras\n"
        "layers = torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten()\n"
        "model = torch.nn.Sequential(*layers, torch.nn.Linear(18, 10))\n"
        "result = minikeras.summary(model, (1, 5, 5))\n"
        "loaded = {'sympy', 'torch._dynamo'} & set(sys.modules)\n"
        "print(result.multiply_adds, sorted(loaded))"
    )
    printed = run_python(["-c", code])
    assert printed.splitlines()[-1] == f"{2 * 9 * 9 + 18 * 10} []"


def test_summary_to_dataframe_has_a_row_per_layer():
    frame = summary(Net(), (2,)).to_dataframe()
    columns = ["layer", "type", "depth", "output_shape", "params", "trainable_params", "note"]
    assert list(frame.columns) == columns
    assert list(frame.loc[1]) == ["fc1", "Linear", 1, [-1, 4], 12, 12, ""]
    assert frame["params"].sum() == 61


@pytest.mark.parametrize("where", ["notebook", "console", "script"])
def test_summary_table_is_shown_once(where, monkeypatch, capsys):
    shown = []
    notebook = types.SimpleNamespace(kernel=1, execution_count=7)
    shell = {"notebook": notebook, "console": types.SimpleNamespace(), "script": None}[where]
    display = types.SimpleNamespace(display=lambda data, raw: shown.append(data))
    ipython = types.SimpleNamespace(get_ipython=lambda: shell, display=display)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    result = summary(Net(), (2,))
    assert capsys.readouterr().out == ("" if where == "notebook" else ARTICLE)
    assert len(shown) == (where == "notebook")
    if where == "notebook":
        result._ipython_display_()  # as the last line of the cell that has shown it
        assert len(shown) == 1
        assert repr(result) + "\n" == ARTICLE  # what a cell prints is what it asks for
        notebook.execution_count += 1
        result._ipython_display_()
        assert len(shown) == 2
        assert shown[0] == shown[1]
        assert shown[0]["text/plain"] + "\n" == ARTICLE
    else:
        with pytest.raises(NotImplementedError):
            result._ipython_display_()  # IPython prints the repr instead
        assert repr(result) + "\n" == ARTICLE


def test_summary_in_a_notebook_has_an_indented_tree_and_aligned_columns():
    model = nn.Sequential(nn.Linear(2, 3), nn.ModuleList([nn.Sequential(nn.Linear(3, 999))]))
    model.forward = model[0].forward
    page = summary(model, (2,))._repr_html_()
    rows = [re.findall("<td ([^>]*)>(.*?)</td>", row) for row in page.split("<tr>")[2:]]
    labels = [row[0][1] for row in rows]
    assert [label.replace("&nbsp;&nbsp;", "_") for label in labels] == [
        "Sequential",
        "_0 (Linear)",
        "_1 (ModuleList)",
        "__0 (Sequential)",
        "___0 (Linear)",
    ]
    sides = {
        tuple(re.findall("text-align: (\\w+)", row[i][0])[0] for row in rows) for i in range(4)
    }
    assert sides == {("left",) * 5, ("right",) * 5}
    assert all("text-align: right" in row[2][0] for row in rows)
    assert rows[-1][2][1] == "3,996"


@cases
def test_summary_and_the_view_of_a_model_count_the_same_for_each_layer(build, arguments):
    model = build()
    result = summary(model, **arguments)
    expected = [f"{row.params:,}" for row in result.rows]
    page = result._repr_html_()
    assert [row.split("</td>")[2].split(">")[-1] for row in page.split("<tr>")[2:]] == expected
    page = minikeras.report.notebook.model_html(model)
    assert [row.split("</td>")[1].split(">")[-1] for row in page.split("<tr>")[2:]] == expected
    assert f"Total params: {result.total_params:,}<" in page


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lstm", ([-1, 7, 10], ([4, -1, 5], [4, -1, 5]))),
        ("packed", ([6, 5], ([1, 2, 5], [1, 2, 5]))),
        ("attention", ([-1, 5, 8], [-1, 5, 6])),
        ("transformer", [-1, 5, 8]),
        ("constants", [-1, 4]),
        ("dict", {"logits": [-1, 2], "extra": ([-1], None, "str")}),
        ("dataclass", {"logits": [-1, 2], "hidden": ([2, 5],)}),
        ("packed output", [-1, 2]),
        ("two inputs", [-1, 4]),
    ],
)
def test_summary_shows_the_shape_of_any_output(name, shape):
    build, arguments = CASES[name]
    assert summary(build(), **arguments).rows[0].output_shape == shape


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_shape": [(4,), (3,)], "input_dtype": [LONG, torch.FloatTensor]},
        {"input_shape": ((4,), (3,)), "input_dtype": (torch.int64, torch.float32)},
        {
            "input_shape": {"x": (3,), "ids": (4,)},
            "input_dtype": {"ids": torch.int32, "x": torch.float32},
        },
        {"input_data": (torch.zeros(5, 4, dtype=torch.int64), torch.zeros(5, 3))},
        {
            "input_data": {
                "x": np.zeros((5, 3), np.float32),
                "ids": torch.zeros(5, 4, dtype=torch.int64),
            }
        },
    ],
)
def test_summary_takes_several_inputs_in_order_or_by_name(arguments):
    result = summary(TwoInputs(), **arguments)
    assert [row.output_shape for row in result.rows] == [[-1, 4], [-1, 4, 4], [-1, 4]]


FRAME = pd.DataFrame({"a": [1.0, 2, 3], "b": [4, 5, 6]})


@pytest.mark.parametrize(
    "data",
    [
        FRAME,
        FRAME.to_numpy(),
        FRAME.to_numpy().astype(object),
        FRAME.astype("Float64"),
        scipy.sparse.csr_matrix(FRAME.to_numpy()),
        next(iter(DataLoader(TensorDataset(torch.rand(6, 2), torch.rand(6)), 3)))[0],
    ],
    ids=["DataFrame", "NumPy", "objects", "nullable", "sparse", "batch of a DataLoader"],
)
def test_summary_takes_the_features_that_predict_takes(data):
    model = minikeras.Model(Net())
    result = summary(model, input_data=data)
    assert [row.output_shape for row in result.rows[:2]] == [[-1, 1], [-1, 1]]
    assert (result.input_bytes, result.multiply_adds, result.note) == (8, 48, "")
    assert model.predict(data).shape == (3, 1)


def test_summary_takes_a_series_and_several_inputs_of_several_kinds():
    class Sum(nn.Module):
        def forward(self, table, column):
            return table.sum(1) + column

    series = FRAME["a"]
    for data in ((FRAME, series), [FRAME.to_numpy(), series], {"column": series, "table": FRAME}):
        assert summary(Sum(), input_data=data).rows[0].output_shape == [-1]
    assert summary(nn.Identity(), input_data=series).rows[0].output_shape == [-1]
    assert summary(nn.Identity(), input_data=FRAME[["b"]]).input_bytes == 8  # int64


def test_summary_of_a_table_with_words_says_what_to_do():
    words = pd.DataFrame({"a": [1.0, 2.0], "kind": ["x", "y"]})
    model = minikeras.Model(nn.Linear(2, 1))
    with pytest.raises(TypeError, match=r"^input_data .*: kind") as caught:
        model.summary(input_data=words)
    assert "pandas.get_dummies(frame, dtype=float)" in str(caught.value)
    summary(nn.Linear(3, 1), input_data=pd.get_dummies(words, dtype=float))


def test_summary_of_a_batch_with_its_labels_shows_both_in_the_error():
    with pytest.raises(ForwardError) as caught:
        summary(nn.Linear(2, 1), input_data=(FRAME, pd.Series([0.0, 1, 0])))
    assert (
        "was given (Tensor (3, 2) float32, Tensor (3,) float32): TypeError: linear(): argument "
        "'input' (position 1) must be Tensor, not tuple" in str(caught.value)
    )


def test_summary_of_input_data_shows_its_batch_size():
    assert summary(Net(), input_data=torch.zeros(5, 2), batch_size=7).rows[1].output_shape == [7, 4]


def test_summary_of_time_first_outputs_shows_the_batch_in_its_place():
    class TimeFirst(nn.Module):
        def forward(self, x):
            return x.transpose(0, 1)

    assert summary(TimeFirst(), (9, 3)).rows[0].output_shape == [9, -1, 3]
    assert summary(TimeFirst(), input_data=torch.zeros(5, 9, 3)).rows[0].output_shape == [9, 5, 3]


# --- marks ----------------------------------------------------------------------------------------


def test_summary_marks_tied_weights_and_counts_them_once():
    rows = rows_of(summary(Tied(), (6,), LONG))
    assert (rows["embed"].params, rows["embed"].note) == (400, "")
    assert (rows["out"].params, rows["out"].note) == (0, "tied to embed.weight")


def test_summary_marks_reused_and_uncalled_layers_and_own_parameters():
    rows = rows_of(summary(Reused(), (4,)))
    assert (rows[""].params, rows[""].note) == (4, "")
    assert (rows["block.0"].params, rows["block.0"].note) == (20, "called 3 times")
    assert (rows["same"].params, rows["same"].note, rows["same"].output_shape) == (
        0,
        "same as block",
        [-1, 4],
    )
    assert (rows["spare"].params, rows["spare"].note, rows["spare"].output_shape) == (
        15,
        "not called",
        None,
    )
    assert "same.0" not in rows


def test_summary_does_not_mark_containers_as_uncalled():
    rows = rows_of(summary(Containers(), (2,)))
    assert (rows["scales"].params, rows["scales"].note, rows["layers"].note) == (4, "", "")


def test_summary_marks_frozen_layers():
    result = summary(frozen_net(), (2,))
    assert [row.note for row in result.rows] == ["", "frozen", "partly frozen", ""]
    assert (result.trainable_params, result.non_trainable_params) == (41, 20)


# --- how it is run --------------------------------------------------------------------------------


def test_summary_of_two_billion_parameters_takes_little_memory():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8192, 8192) for _ in range(30)))
    result = summary(model, (8192,))
    assert result.total_params == 30 * (8192 * 8192 + 8192)
    assert result.rows[-1].output_shape == [-1, 8192]
    assert all(parameter.is_meta for parameter in model.parameters())


@cases
def test_summary_of_a_small_model_is_that_of_a_large_one(build, arguments, monkeypatch):
    small = summary(build(), **arguments)
    monkeypatch.setattr(layer_summary, "SMALL_INPUT", -1)  # on meta, as a large one
    large = summary(build(), **arguments)
    assert small.rows == large.rows
    assert small.multiply_adds == large.multiply_adds
    assert (small.input_bytes, small.output_bytes) == (large.input_bytes, large.output_bytes)


def test_summary_of_a_small_model_leaves_settings_of_torch_as_they_are():
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    with pytest.raises(ForwardError):
        summary(Net(), (3,))
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == before


def test_summary_of_a_small_model_that_refuses_the_values_runs_without_them():
    class Cholesky(nn.Module):
        def forward(self, x):
            return torch.linalg.cholesky(x - 2)  # of no positive-definite matrix

    result = summary(Cholesky(), (3, 3))
    assert (result.rows[0].output_shape, result.note) == ([-1, 3, 3], "")


@pytest.mark.parametrize(("rows", "expected"), [(1, "meta"), (None, "meta"), (-1, "cpu")])
def test_summary_runs_a_large_model_on_meta_only(rows, expected, monkeypatch):
    devices = set()
    if rows is None:  # a large product of parameters and inputs
        monkeypatch.setattr(layer_summary, "SMALL_PRODUCT", 1)
    elif rows == 1:  # a large input
        monkeypatch.setattr(layer_summary, "SMALL_INPUT", 1)

    class Spy(nn.Linear):
        def forward(self, x):
            devices.update((x.device.type, self.weight.device.type))
            return super().forward(x)

    result = summary(Spy(2, 3), (2,))
    assert devices == {expected}
    assert result.note == ""


def test_summary_does_not_fire_hooks_of_the_user():
    fired = []
    net = Net()
    net.fc1.register_forward_hook(lambda *_: fired.append(1))
    net.fc1.register_forward_pre_hook(lambda *_: fired.append(1))
    net.register_forward_hook(threading.Lock().acquire)  # cannot be copied
    summary(net, (2,))
    assert fired == []


def test_summary_of_a_forward_that_reads_values_runs_on_a_real_copy_and_says_so(monkeypatch):
    assert summary(ReadsValues(), (3,)).note == ""  # small: it is run on one anyway
    monkeypatch.setattr(layer_summary, "SMALL_INPUT", 1)
    result = summary(ReadsValues(), (3,))
    assert str(result).endswith(
        "\nNote: run on a real copy, since the meta one failed: RuntimeError: Tensor.item() cannot "
        "be called on meta tensors"
    )
    assert result.multiply_adds == 6


def test_summary_of_a_forward_that_differentiates_has_shapes_but_no_multiply_adds():
    result = summary(Derivative(), (3,))
    assert result.rows[0].output_shape == [-1, 3]
    assert result.multiply_adds is None
    assert result.note == (
        "Note: multiply-adds cannot be counted: RuntimeError: element 0 of tensors does not "
        "require grad and does not have a grad_fn"
    )


def test_summary_does_not_write_into_input_data():
    class InPlace(nn.Module):
        def forward(self, x):
            x += x.sum().item()
            return x

    data = torch.ones(2, 3)
    summary(InPlace(), input_data=data)
    assert torch.equal(data, torch.ones(2, 3))


def test_summary_counts_a_model_that_cannot_be_copied():
    model = Net()
    model.lock = threading.Lock()
    result = summary(model, (2,))
    assert result.total_params == 61
    assert [row.output_shape for row in result.rows] == [None] * 4
    assert result.note == (
        "Note: no output shapes, since the model cannot be copied: TypeError: cannot pickle "
        "'_thread.lock' object"
    )
    assert "Multiply-adds" not in str(result)


def test_summary_of_torchscript_shows_its_output_and_says_what_it_is():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        script = torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    result = summary(script, (2,))
    assert [(row.type, row.output_shape, row.params, row.note) for row in result.rows] == [
        ("Sequential", [-1, 3], 0, "TorchScript"),
        ("Linear", None, 9, "TorchScript"),
        ("ReLU", None, 0, "TorchScript"),
    ]
    assert summary(nn.Sequential(script, nn.Linear(3, 1)), (2,)).rows[0].output_shape == [-1, 1]


def test_summary_of_a_compiled_model_shows_its_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised while torch imports its compiler
        model = torch.compile(Net())
    result = summary(model, (2,))
    assert rows_of(result)["_orig_mod.fc2"].output_shape == [-1, 8]
    assert result.note == ""


# --- errors ---------------------------------------------------------------------------------------


def test_summary_names_a_failing_layer_with_its_input_and_the_rows_so_far():
    net = Net()
    net.fc2 = nn.Linear(5, 8)
    with pytest.raises(ForwardError) as caught:
        summary(net, (2,))
    assert str(caught.value) == (
        "fc2: Linear(in_features=5, out_features=8, bias=True) was given (2, 4) float32: mat1 and "
        "mat2 shapes cannot be multiplied (2x4 and 5x8)\n"
        "The input, with 2 rows, was Tensor (2, 2) float32. The layers up to there:\n\n"
        "layer (type)    output shape      params\n"
        "--------------  --------------  --------\n"
        "Net                                    0\n"
        "  fc1 (Linear)  [2, 4]                12\n"
        "  fc2 (Linear)                        48"
    )
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_summary_of_a_model_that_fails_says_what_it_was_given():
    class Rebinds(Net):
        def forward(self, x):
            x = self.fc1(x)
            raise KeyError("state")

    with pytest.raises(
        ForwardError, match=r"^Rebinds was given \(2, 2\) float32: KeyError: 'state'\n"
    ):
        summary(Rebinds(), (2,))


def test_summary_without_an_input_raises_the_error_of_torch():
    with pytest.raises(
        ForwardError,
        match=r"^TwoInputs was given \(2, 4\) float32: TypeError: .*missing 1 required",
    ):
        summary(TwoInputs(), (4,))


def test_summary_leaves_the_model_alone_when_the_forward_fails():
    model = ReadsValues()
    before = state_of(model, None)
    with pytest.raises(ForwardError):
        summary(model, (4,))
    assert same(before, state_of(model, None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            "summary takes either input_shape or input_data, got neither. Pass input_shape=(2,), "
            "the shape of one row, or input_data=features, a batch of what forward takes.",
        ),
        (
            {"input_shape": (2,), "input_data": torch.zeros(1, 2)},
            "summary takes either input_shape or input_data, got both. Pass input_shape=(2,), the "
            "shape of one row, or input_data=features, a batch of what forward takes.",
        ),
        (
            {"input_shape": (2,), "batch_size": 0},
            "batch_size must be a whole number of 1 or more, got 0.",
        ),
        *(
            (
                arguments,
                f"got input_shape={arguments['input_shape']!r}, "
                f"input_dtype={arguments['input_dtype']!r}. Pass as input_shape the shape of one "
                "row without the batch, such as (3, 32, 32), or a list or dict of such shapes; as "
                "input_dtype a dtype such as torch.float32, or a list or dict of dtypes like "
                "input_shape.",
            )
            for arguments in (
                {"input_shape": (-1, 2), "input_dtype": torch.float32},
                {"input_shape": 2, "input_dtype": torch.float32},
                {"input_shape": "2", "input_dtype": torch.float32},
                {"input_shape": (2,), "input_dtype": "float32"},
                {"input_shape": (2,), "input_dtype": torch.Tensor},
                {"input_shape": [(2,), (3,)], "input_dtype": [torch.float32]},
                {"input_shape": {"x": (2,)}, "input_dtype": {"y": torch.float32}},
            )
        ),
    ],
)
def test_summary_with_wrong_arguments_says_what_to_pass(arguments, message):
    with pytest.raises(ValueError, match=r"^(got|summary|batch_size) ") as caught:
        summary(Net(), **arguments)
    assert str(caught.value) == message


def test_summary_with_a_loader_or_a_batch_as_a_shape_says_what_to_pass():
    batch = (torch.zeros(4, 2), torch.zeros(4, 1))
    loader = DataLoader(TensorDataset(*batch), 4)
    for name in ("input_shape", "input_data"):
        with pytest.raises(TypeError, match=name) as caught:
            summary(Net(), **{name: loader})
        assert str(caught.value) == (
            f"{name} is a DataLoader; expected one batch of features. Pass the features of its "
            "first batch: summary(net, input_data=next(iter(loader))[0])."
        )
    summary(Net(), input_data=next(iter(loader))[0])
    with pytest.raises(ValueError, match="input_shape") as caught:
        summary(Net(), batch)
    assert str(caught.value) == (
        "input_shape is (Tensor (4, 2) float32, Tensor (4, 1) float32); expected the shape of one "
        "row, or a list or dict of shapes, such as (2,). Pass a batch by its name: summary(net, "
        "input_data=batch)."
    )


def test_summary_of_lazy_layers_says_what_to_do():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules announce themselves
        models = {"0": nn.Sequential(nn.LazyLinear(3), nn.ReLU()), "model": nn.LazyLinear(3)}
    for name, model in models.items():
        with pytest.raises(ValueError, match="lazy") as caught:
            summary(model, (2,))
        assert str(caught.value) == (
            f"lazy layers have no parameters to count yet: ['{name}']. Run a batch first: "
            "model(features)."
        )


def test_summary_refuses_what_is_not_a_module():
    with pytest.raises(TypeError) as caught:
        summary(lambda x: x, (2,))
    assert (
        str(caught.value)
        == "model must be a torch.nn.Module, got function. Pass an instance, nn.Linear(2, 1)."
    )
