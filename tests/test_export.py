"""Exported files, run by torch.export and onnxruntime on other rows than the example."""

import copy
import sys
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.compare import assert_equal_tensors
from helpers.models import compiled
from torch import nn

import minikeras
from minikeras import export


class Whole(minikeras.Model):
    """Everything that differs between train and eval mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.layers(x)


class Several(minikeras.Model):
    """Two inputs, a dict of outputs; one of them is an input as it came."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x, tokens):
        return {"scores": self.fc(x) + tokens.unsqueeze(-1), "pair": (x.sum(1), tokens)}


class Keys(minikeras.Model):
    """One argument that is a dict."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, features):
        return self.fc(features["x"]), features["tokens"] * 2


def rows(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 4, generator=generator), torch.randint(
        9, (count,), generator=generator
    )


def by_name(count):
    x, tokens = rows(count)
    return {"tokens": tokens, "x": x}  # not in forward's order


class Reader(minikeras.Model):
    """A recurrent network."""

    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.recurrent = kind(4, 8, batch_first=True)
        self.fc = nn.Linear(8, 2)

    def forward(self, tokens):
        return self.fc(self.recurrent(self.embedding(tokens))[0][:, -1])


class Counting(minikeras.Model):
    """A buffer that each forward moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Keeping(minikeras.Model):
    """A forward that keeps what it has computed, to be looked at."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.seen = {}

    def forward(self, x):
        self.seen["scores"] = self.fc(x)
        return self.seen["scores"].log_softmax(1)


def sentences(count):
    return rows(5 * count)[1].reshape(count, 5)


CASES = {
    "a subclass": (Whole, lambda count: rows(count)[0]),
    "a wrapped network": (lambda: minikeras.Model(Whole().layers), lambda count: rows(count)[0]),
    "a tuple": (Several, rows),
    "a dict": (Several, by_name),
    "a dict to a wrapped network": (lambda: minikeras.Model(Several()), by_name),
    "a dict as one argument": (Keys, by_name),
    "an LSTM": (Reader, sentences),
    "a GRU": (lambda: Reader(nn.GRU), sentences),
}


def leaves(nest):
    if isinstance(nest, dict):
        nest = list(nest.values())
    if isinstance(nest, torch.Tensor):
        return [nest]
    found = []
    for part in nest:
        found += leaves(part)
    return found


def called_with(model, features):
    if isinstance(features, dict):
        return (
            ((features,), {})
            if isinstance(model, Keys)
            else ((), {"x": features["x"], "tokens": features["tokens"]})
        )
    return (features if isinstance(features, tuple) else (features,)), {}


def run(path, model, features):
    """The outputs of a file for these features, in a list."""
    if path.suffix == ".pt2":
        args, kwargs = called_with(model, features)
        return leaves(torch.export.load(path).module()(*args, **kwargs))
    session = onnxruntime.InferenceSession(path)
    if isinstance(features, dict):
        prefix = "features_" if isinstance(model, Keys) else ""
        given = {prefix + name: value.numpy() for name, value in features.items()}
    else:
        given = dict(
            zip(
                [node.name for node in session.get_inputs()],
                map(torch.Tensor.numpy, leaves([features])),
                strict=True,
            )
        )
    return [torch.from_numpy(value) for value in session.run(None, given)]


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("case", CASES)
def test_export_gives_what_predict_gives_for_any_number_of_rows(case, suffix, tmp_path):
    make, features = CASES[case]
    model = make()
    path = tmp_path / "made" / f"model{suffix}"
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.export(path, features(5))
    for count in (7, 2, 1):
        expected = leaves(model.predict([(features(count),)]))
        found = run(path, model, features(count))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_export_takes_one_row_as_an_example(suffix, tmp_path):
    model = Whole()
    path = tmp_path / f"model{suffix}"
    model.export(str(path), np.zeros((1, 4), np.float32))
    torch.testing.assert_close(
        run(path, model, rows(6)[0])[0], model.predict(rows(6)[0]), atol=1e-5, rtol=0
    )


def test_export_leaves_the_model_as_it_is_and_able_to_train(tmp_path):
    model = compiled(Whole(), nn.CrossEntropyLoss())
    data = (rows(20)[0], torch.arange(20) % 3)
    model.fit(1, data, verbose=0)
    model.layers[1].eval()
    calls = []
    model.layers.register_forward_hook(lambda module, args, output: calls.append(0))
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    model.export(tmp_path / "model.pt2", data[0])
    assert [module.training for module in model.modules()] == modes
    assert_equal_tensors(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)
    calls.clear()
    assert len(model.fit(1, data, verbose=0)) == 2
    assert calls == [0]


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_export_writes_the_models_value_of_a_buffer_that_forward_changes(suffix, tmp_path):
    model = Counting()
    path = tmp_path / f"model{suffix}"
    model.export(path, rows(3)[0])
    torch.testing.assert_close(run(path, model, rows(6)[0])[0], rows(6)[0])
    assert model.calls == 0


def test_export_does_not_change_the_example_in_place(tmp_path):
    class Adding(minikeras.Model):
        def forward(self, x):
            x += 1
            return x * 2

    example = rows(3)[0]
    Adding().export(tmp_path / "model.onnx", example)
    assert torch.equal(example, rows(3)[0])


def test_export_after_a_fit_takes_a_model_that_keeps_what_it_computed(tmp_path):
    model = compiled(Keeping(), nn.NLLLoss())
    model.fit(1, (rows(20)[0], torch.arange(20) % 3), verbose=0)
    assert model.seen["scores"].grad_fn is not None
    with pytest.warns(UserWarning, match="self.seen"):  # torch's, that the file will not keep it
        model.export(tmp_path / "model.pt2", rows(3)[0])
    assert model.seen["scores"].grad_fn is not None
    torch.testing.assert_close(
        run(tmp_path / "model.pt2", model, rows(6)[0])[0], model.predict(rows(6)[0])
    )


def test_export_includes_what_a_hook_changes(tmp_path):
    model = Whole()
    model.layers.register_forward_hook(lambda module, args, output: output * 100)
    model.export(tmp_path / "model.pt2", rows(3)[0])
    torch.testing.assert_close(
        run(tmp_path / "model.pt2", model, rows(6)[0])[0], model.predict(rows(6)[0])
    )


def test_export_to_onnx_has_the_users_names_and_an_open_number_of_rows(tmp_path):
    Several().export(tmp_path / "model.onnx", rows(3))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [node.name for node in session.get_inputs()] == ["x", "tokens"]
    assert [node.name for node in session.get_outputs()] == ["scores", "pair_0", "pair_1"]
    assert [node.shape for node in session.get_inputs()] == [["batch", 4], ["batch"]]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_export_to_onnx_renames_an_output_with_the_name_of_an_input(tmp_path):
    class Same(minikeras.Model):
        def forward(self, x):
            return {"x": x + 1}

    Same().export(tmp_path / "model.onnx", rows(3)[0])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [node.name for node in session.get_inputs()] == ["x"]
    assert [node.name for node in session.get_outputs()] == ["x_out"]


class Returns(nn.Module):
    """Gives back whatever its function makes of the outputs."""

    def __init__(self, made):
        super().__init__()
        self.fc = nn.Linear(2, 1)
        self.made = made

    def forward(self, x):
        return self.made(self.fc(x))


@pytest.mark.parametrize(
    ("made", "got"),
    [
        (lambda y: (y, 3), "(Tensor (2, 1) float32, int)"),
        (lambda y: {"a": [0.5], "b": y}, "{'a': [float], 'b': Tensor (2, 1) float32}"),
    ],
    ids=["tuple", "dict"],
)
def test_export_to_onnx_refuses_outputs_that_are_no_tensors(made, got, tmp_path):
    with pytest.raises(TypeError) as caught:
        minikeras.Model(Returns(made)).export(tmp_path / "model.onnx", torch.zeros(2, 2))
    assert str(caught.value) == (
        f"forward returned {got}, and an .onnx file holds tensors alone. Return no others, or take "
        ".pt2."
    )
    minikeras.Model(Returns(made)).export(tmp_path / "model.pt2", torch.zeros(2, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (lambda y: {"a": {"b": y}, "a_b": 2 * y}, "a_b"),
        (lambda y: {"x": y, "x_out": 2 * y}, "x_out"),
    ],
    ids=["joined", "input"],
)
def test_export_to_onnx_refuses_two_outputs_of_one_name(made, name, tmp_path):
    with pytest.raises(ValueError, match="two tensors") as caught:
        minikeras.Model(Returns(made)).export(tmp_path / "model.onnx", torch.zeros(2, 2))
    assert str(caught.value) == (
        f"two tensors would be called {name!r} in the .onnx file: a name is the keys on the way to "
        "a tensor, joined by _, and an output with the name of an input gets _out. Rename one of "
        "the keys."
    )


def test_export_to_onnx_writes_weights_too_big_for_one_file_next_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ONE_FILE", 100)
    model = minikeras.Model(nn.Linear(4, 4096))
    model.export(tmp_path / "model.onnx", rows(3)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    found = run(tmp_path / "model.onnx", model, rows(6)[0])[0]
    torch.testing.assert_close(found, model.predict(rows(6)[0]), atol=1e-5, rtol=0)


# as torch's compiler loads
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_export_of_a_compiled_network_is_that_of_the_network(tmp_path):
    model = minikeras.Model(torch.compile(Whole().layers))
    model.export(tmp_path / "model.pt2", rows(3)[0])
    expected = minikeras.Model(Whole().layers)
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        run(tmp_path / "model.pt2", model, rows(6)[0])[0], expected.predict(rows(6)[0])
    )


@pytest.mark.gpu
def test_export_of_a_model_on_a_device_runs_on_the_cpu(tmp_path):
    model = Whole()
    model.compile(nn.CrossEntropyLoss())
    model.fit(1, (rows(20)[0], torch.arange(20) % 3), verbose=0)
    model.export(tmp_path / "model.pt2", rows(3)[0])
    assert next(model.parameters()).device.type != "cpu"
    found = run(tmp_path / "model.pt2", model, rows(6)[0])[0]
    torch.testing.assert_close(found, model.predict(rows(6)[0]), atol=1e-5, rtol=1e-4)


def test_export_lets_warnings_of_the_users_forward_through(tmp_path):
    class Warns(minikeras.Model):
        def forward(self, x):
            warnings.warn("mind the gap", FutureWarning, stacklevel=1)
            return x + 1

    with pytest.warns(FutureWarning, match="mind the gap"):
        Warns().export(tmp_path / "model.pt2", rows(3)[0])


def test_export_refuses_another_ending():
    with pytest.raises(ValueError, match="path") as caught:
        Whole().export("model.pth", rows(3)[0])
    assert str(caught.value) == (
        "path must end in .pt2 or .onnx, got 'model.pth'. Take .pt2 for torch.export.load, .onnx "
        "for other runtimes."
    )


@pytest.mark.parametrize(
    ("example", "got"),
    [(None, "NoneType"), (torch.zeros(0, 4), "Tensor (0, 4) float32"), ([], "[]")],
)
def test_export_refuses_an_example_without_rows(example, got, tmp_path):
    with pytest.raises(TypeError) as caught:
        Whole().export(tmp_path / "model.pt2", example)
    assert str(caught.value) == (
        f"example must be a batch of features as forward takes it, one row or more, got {got}. "
        f"Pass tensors or arrays, X[:2]; of a DataFrame X[:2].to_numpy('float32')."
    )


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            torch.zeros(3, 5),
            "layer layers.0 takes rows of 4 values (in_features) and got shape (3, 5)",
        ),
        (
            torch.zeros(3, 4, dtype=torch.float64),
            "layer layers.0 has float32 parameters and got float64 values",
        ),
    ],
    ids=["width", "dtype"],
)
def test_export_explains_an_example_that_a_layer_cannot_take_as_predict_does(
    example, message, tmp_path
):
    with pytest.raises(ValueError, match=r"layers\.0") as caught:
        Whole().export(tmp_path / "model.pt2", example)
    assert str(caught.value).startswith(message)


def test_export_refuses_lazy_layers_without_weights(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules announce themselves
        model = minikeras.Model(nn.LazyLinear(1))
    with pytest.raises(ValueError, match="lazy") as caught:
        model.export(tmp_path / "model.pt2", rows(3)[0])
    assert str(caught.value) == (
        "export needs weights, and the model has lazy layers without any yet. Fit it, or call it "
        "once on a batch."
    )
    assert not list(tmp_path.iterdir())


class Fixed(Whole):
    def forward(self, x):
        return self.layers(x.reshape(5, 4))


class Deciding(Whole):
    def forward(self, x):
        return self.layers(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (
            Fixed,
            'Constraints violated (batch)! For more information, run with TORCH_LOGS="+dynamic".',
        ),
        (
            Deciding,
            "Could not guard on data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)). ",
        ),
    ],
)
def test_export_of_a_forward_that_cannot_be_traced_says_what_to_write(kind, why, tmp_path):
    with pytest.raises(ValueError, match="cannot be exported") as caught:
        kind().export(tmp_path / "model.pt2", rows(5)[0])
    message = str(caught.value)
    assert message.startswith(
        f"{kind.__name__} cannot be exported for any number of rows: {why.strip()}"
    )
    assert message.endswith(
        "Its forward must go the same way whatever the values and the number of rows: "
        "torch.where for an if, x.flatten(1) for a reshape to the example's size."
    )
    assert not (tmp_path / "model.pt2").exists()


def test_export_without_the_packages_says_which_pip_install_to_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        Whole().export("model.onnx", rows(3)[0])
    assert str(caught.value) == ".onnx files need two packages: pip install onnx onnxscript"
