"""The docstrings of the public names: arguments, examples, errors."""

import builtins
import importlib
import inspect
import re
import sys
import textwrap
from unittest import mock

import pytest
import torch
from helpers.models import compiled, points
from torch import nn

import minikeras
from minikeras.export import export

INTEGRATIONS = {
    "sklearn": ["Classifier", "Regressor"],
    "huggingface": ["HubModel"],
    "tensorboard": ["TensorBoard"],
    "mlflow": ["MLflow"],
    "wandb": ["WandB"],
}
WITHOUT_EXAMPLE = {
    "NotCompiledError": "is raised, not called",
    "ForwardError": "is raised, not called",
    "CheckpointError": "is raised, not called",
    "MLflow": "makes a database, which takes seconds: its example has a test of its own, below",
    "WandB": "starts a process of its own: likewise",
}


def public():
    """Name -> each public class and function, and each method that is ours."""
    found = {name: getattr(minikeras, name) for name in minikeras.__all__} | {"export": export}
    for module, names in INTEGRATIONS.items():
        found |= {name: integration(module, name) for name in names}
    for name, value in list(found.items()):
        if isinstance(value, type):
            methods = {
                f"{name}.{key}": method
                for key, method in inspect.getmembers(value)
                if is_ours(key, method)
            }
            # where it comes first
            found |= {
                key: method for key, method in methods.items() if method not in found.values()
            }
    return found


def integration(module, name):
    return getattr(importlib.import_module(f"minikeras.integrations.{module}"), name)


def is_ours(key, method):
    return (
        inspect.isfunction(method)
        and not key.startswith("_")
        and method.__module__.startswith("minikeras")
    )


PUBLIC = public()


def described_by(name):
    """A docstring; that of a loss's forward is its class's."""
    owner, _, method = name.partition(".")
    text = inspect.getdoc(PUBLIC[name if method != "forward" or owner == "Model" else owner])
    assert text, f"{name} has no docstring"
    return text


def is_error(name):
    return isinstance(PUBLIC[name], type) and issubclass(PUBLIC[name], Exception)


@pytest.mark.parametrize("name", [name for name in PUBLIC if not is_error(name)])
def test_docstring_names_each_argument(name):
    words = re.sub(r"^ *(>>>|\.\.\.) .*$", "", described_by(name), flags=re.MULTILINE)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    asked = [
        parameter.name
        for parameter in parameters
        if parameter.name != "self" and parameter.kind not in kinds
    ]
    assert [argument for argument in asked if not re.search(rf"\b{argument}\b", words)] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_or_that_of_its_class_has_an_example(name):
    owner = name.partition(".")[0]
    has_one = any(">>> " in described_by(documented) for documented in (name, owner))
    assert has_one != (owner in WITHOUT_EXAMPLE)


def documented_errors():
    """Pairs of a name and an error under its Raises."""
    for name, value in PUBLIC.items():
        section = re.search(
            r"^Raises:\n((?: {4}.*\n?)+)", inspect.getdoc(value) or "", re.MULTILINE
        )
        for errors in re.findall(r"^ {4}(\w.*?):", section[1], re.MULTILINE) if section else ():
            yield from ((name, error) for error in errors.split(", "))


class Rest(minikeras.Model):
    """A state that no file can hold."""

    def __init__(self):
        super().__init__(nn.Linear(2, 1))

    def get_extra_state(self):
        return object()

    def set_extra_state(self, state):
        pass


X, y = points(8)
CPU = {"device": "cpu", "verbose": 0}


def plain():
    return minikeras.Model(nn.Linear(2, 1))


def trained(callback=None, **kwargs):
    return compiled().fit(1, (X, y), callbacks=[callback] if callback else [], verbose=0, **kwargs)


def trained_inside(call):
    model = compiled()
    model.fit(
        1, (X, y), callbacks=[minikeras.LambdaCallback(on_fit_begin=lambda: call(model))], verbose=0
    )


def scheduler(name):
    return minikeras.LRScheduler(
        torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(plain().parameters())),
        monitor=name,
    )


def missing(package, call):
    with mock.patch.dict(sys.modules, {package: None}):
        call()


def other_weights(folder, hub):
    class Net(hub):
        def __init__(self, width=1):
            super().__init__()
            self.layer = nn.Linear(2, width)

    Net(3).save_pretrained(folder)
    Net.from_pretrained(folder, width=2)


# the name and the error -> what raises it, in a folder that is empty
MISTAKES = {
    ("Model.compile", "TypeError"): lambda folder: plain().compile(nn.MSELoss),
    ("Model.compile", "ValueError"): lambda folder: plain().compile(nn.MSELoss(), device="gpu"),
    ("Model.fit", "NotCompiledError"): lambda folder: plain().fit(1, (X, y)),
    ("Model.fit", "TypeError"): lambda folder: compiled().fit(1, 3),
    ("Model.fit", "ValueError"): lambda folder: compiled().fit(0, (X, y)),
    ("Model.fit", "CheckpointError"): lambda folder: trained(checkpoint=written(folder / "run.pt")),
    ("Model.fit", "FloatingPointError"): lambda folder: compiled(loss_func=nan).fit(
        1, (X, y), verbose=0
    ),
    ("Model.compile", "RuntimeError"): lambda folder: trained_inside(
        lambda model: model.compile(nn.MSELoss())
    ),
    ("Model.fit", "RuntimeError"): lambda folder: trained_inside(
        lambda model: model.fit(1, (X, y), verbose=0)
    ),
    ("Model.forward", "NotImplementedError"): lambda folder: minikeras.Model()(X),
    ("Model.backward", "ValueError"): lambda folder: compiled().backward(torch.zeros(())),
    ("Model.compute_loss", "ValueError"): lambda folder: compiled().compute_loss(X[:, 0], y),
    ("Model.evaluate", "NotCompiledError"): lambda folder: plain().evaluate((X, y)),
    ("Model.evaluate", "TypeError"): lambda folder: compiled().evaluate(3),
    ("Model.evaluate", "ValueError"): lambda folder: compiled().evaluate((X[:0], y[:0])),
    ("Model.predict", "TypeError"): lambda folder: plain().predict(3),
    ("Model.predict", "ValueError"): lambda folder: plain().predict(torch.zeros(8, 3)),
    ("Model.save", "TypeError"): lambda folder: Rest().save(folder / "weights.pt"),
    ("Model.save", "OSError"): lambda folder: plain().save(written(folder / "file") / "weights.pt"),
    ("Model.diagnose", "NotCompiledError"): lambda folder: plain().diagnose((X, y)),
    ("Model.diagnose", "TypeError"): lambda folder: compiled().diagnose(iter([(X, y)])),
    ("Model.diagnose", "ValueError"): lambda folder: compiled().diagnose((X, y), steps=0),
    ("Model.lr_find", "NotCompiledError"): lambda folder: plain().lr_find((X, y)),
    ("Model.lr_find", "TypeError"): lambda folder: compiled().lr_find(iter([(X, y)])),
    ("Model.lr_find", "ValueError"): lambda folder: compiled().lr_find((X, y), min_lr=1, max_lr=1),
    ("Model.load", "FileNotFoundError"): lambda folder: plain().load(folder / "weights.pt"),
    ("Model.load", "CheckpointError"): lambda folder: plain().load(written(folder / "weights.pt")),
    ("EarlyStopping", "ValueError"): lambda folder: trained(
        minikeras.EarlyStopping("los", mode="min")
    ),
    ("ModelCheckpoint", "ValueError"): lambda folder: trained(
        minikeras.ModelCheckpoint("{val_loss}.pt")
    ),
    ("ModelCheckpoint", "OSError"): lambda folder: trained(minikeras.ModelCheckpoint(folder)),
    ("LRScheduler", "TypeError"): lambda folder: minikeras.LRScheduler(
        torch.optim.lr_scheduler.StepLR
    ),
    ("LRScheduler", "ValueError"): lambda folder: trained(scheduler("loss")),
    ("CSVLogger", "OSError"): lambda folder: trained(minikeras.CSVLogger(folder)),
    ("EMA", "ValueError"): lambda folder: minikeras.EMA(2),
    ("Timer", "ValueError"): lambda folder: minikeras.Timer(0),
    ("OnAllRows", "TypeError"): lambda folder: minikeras.OnAllRows(3),
    ("accuracy", "TypeError"): lambda folder: minikeras.accuracy(y, [0, 1]),
    ("accuracy", "ValueError"): lambda folder: minikeras.accuracy(y, y),
    ("binary_accuracy", "TypeError"): lambda folder: minikeras.binary_accuracy([0.5], y),
    ("binary_accuracy", "ValueError"): lambda folder: minikeras.binary_accuracy(y - 2, y),
    ("FocalLoss", "ValueError"): lambda folder: minikeras.FocalLoss()(y, y[:, 0]),
    ("FocalLoss", "RuntimeError"): lambda folder: minikeras.FocalLoss()(y + 1, y),
    ("Transformed", "TypeError"): lambda folder: minikeras.Transformed(nn.L1Loss(), y_pred=0),
    ("Regularized", "TypeError"): lambda folder: minikeras.Regularized(nn.MSELoss, plain()),
    ("Regularized", "ValueError"): lambda folder: minikeras.Regularized(
        nn.MSELoss(), plain(), l2=-1
    ),
    ("l1_penalty", "ValueError"): lambda folder: minikeras.l1_penalty(plain(), -1),
    ("weight_decay_groups", "ValueError"): lambda folder: minikeras.weight_decay_groups(
        plain(), -1
    ),
    ("weight_decay_groups", "TypeError"): lambda folder: minikeras.weight_decay_groups(
        plain(), 0.1, spare=True
    ),
    ("freeze", "TypeError"): lambda folder: minikeras.freeze(plain().parameters()),
    ("unfreeze", "TypeError"): lambda folder: minikeras.unfreeze(nn.Linear),
    ("plot_history", "ModuleNotFoundError"): lambda folder: missing(
        "matplotlib.pyplot", lambda: minikeras.plot_history(compiled().fit(1, (X, y), verbose=0))
    ),
    ("plot_history", "TypeError"): lambda folder: minikeras.plot_history(None),
    ("plot_history", "ValueError"): lambda folder: minikeras.plot_history(compiled().history),
    ("summary", "ForwardError"): lambda folder: minikeras.summary(plain(), (3,)),
    ("summary", "ValueError"): lambda folder: minikeras.summary(plain()),
    ("summary", "TypeError"): lambda folder: minikeras.summary(plain, (2,)),
    ("export", "ValueError"): lambda folder: export(
        plain(), folder / "model.pt2", torch.zeros(1, 3)
    ),
    ("export", "TypeError"): lambda folder: export(plain(), folder / "model.pt2", None),
    ("export", "ModuleNotFoundError"): lambda folder: missing(
        "onnx", lambda: export(plain(), folder / "x.onnx", X)
    ),
    ("Classifier.fit", "TypeError"): lambda folder: PUBLIC["Classifier"](
        nn.Linear(2, 2), **CPU
    ).fit(X, y[:, 0]),
    ("Classifier.fit", "ValueError"): lambda folder: PUBLIC["Classifier"](**CPU).fit(X, y[:3, 0]),
    ("Regressor.fit", "TypeError"): lambda folder: PUBLIC["Regressor"](hiden=3, **CPU).fit(X, y),
    ("Regressor.fit", "ValueError"): lambda folder: PUBLIC["Regressor"](epochs=0, **CPU).fit(X, y),
    ("Classifier.partial_fit", "ValueError"): lambda folder: PUBLIC["Classifier"](
        **CPU
    ).partial_fit(X, y[:, 0]),
    ("Regressor.partial_fit", "ValueError"): lambda folder: PUBLIC["Regressor"](
        validation=0.5, **CPU
    ).partial_fit(X, y),
    ("HubModel", "CheckpointError"): lambda folder: other_weights(folder, PUBLIC["HubModel"]),
    ("HubModel", "FileNotFoundError"): lambda folder: PUBLIC["HubModel"].from_pretrained(folder),
    ("HubModel", "TypeError"): lambda folder: PUBLIC["HubModel"](nn.Linear(2, 1)).save_pretrained(
        folder
    ),
    ("TensorBoard", "ModuleNotFoundError"): lambda folder: missing(
        "torch.utils.tensorboard", lambda: PUBLIC["TensorBoard"](folder)
    ),
    ("TensorBoard", "ValueError"): lambda folder: trained(
        PUBLIC["TensorBoard"](folder, graph=torch.zeros(1, 3))
    ),
    ("TensorBoard", "TypeError"): lambda folder: PUBLIC["TensorBoard"](folder, hparams=3),
    ("MLflow", "ModuleNotFoundError"): lambda folder: missing("mlflow", PUBLIC["MLflow"]),
    ("MLflow", "TypeError"): lambda folder: PUBLIC["MLflow"](params=3),
    ("WandB", "ModuleNotFoundError"): lambda folder: missing(
        "wandb", lambda: PUBLIC["WandB"]("rings")
    ),
    ("WandB", "TypeError"): lambda folder: PUBLIC["WandB"]("rings", config=3),
}


def written(path):
    """A file of something else."""
    path.write_text("something else")
    return path


def nan(y_pred, y_true):
    return y_pred.sum() * float("nan")


def test_docstring_raises_lists_the_errors_that_are_tested_here():
    assert sorted(documented_errors()) == sorted(MISTAKES)


@pytest.mark.parametrize(
    ("name", "error"), [pair for pair, call in MISTAKES.items() if callable(call)]
)
def test_docstring_raises_lists_what_the_mistake_raises(name, error, tmp_path):
    kind = getattr(minikeras, error, None) or getattr(builtins, error)
    with pytest.raises(kind):
        MISTAKES[name, error](tmp_path)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # SQLAlchemy's, of MLflow
@pytest.mark.parametrize("name", ["MLflow", "WandB"])
def test_docstring_example_of_a_tracker_runs(name, tmp_path, monkeypatch):
    from helpers.trackers import Store

    monkeypatch.chdir(tmp_path)
    if name == "MLflow":
        Store(tmp_path)  # the database that the example would take seconds to make
    else:
        # it remembers the folder that an earlier test ran in
        importlib.import_module("wandb").teardown()
    code = textwrap.dedent(re.search(r"::\n\n((?: {4}.*\n?|\n)+)", described_by(name))[1])
    model = compiled()
    names = {"model": model, "dl_train": (X, y), "dl_valid": (X, y)}
    exec(compile(code, name, "exec"), names)
    assert len(model.history) == 30
    assert list(tmp_path.glob("mlflow.db" if name == "MLflow" else "wandb/offline-run-*/*.wandb"))
