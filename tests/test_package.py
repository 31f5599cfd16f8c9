"""The package as a whole: names, imports, README, examples, the files of the top level."""

import ast
import builtins
import configparser
import contextlib
import importlib
import inspect
import io
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from helpers.models import compiled, points
from torch import nn

import minikeras
from minikeras.export import export

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minikeras"

# a module may import those below it only; a folder is one room
ORDER = [
    ["__main__", "integrations"],
    ["__init__"],
    ["model", "plotting"],
    ["prediction", "export"],
    ["loop", "notebook", "jit"],
    ["progress", "checkpoint"],
    ["run"],
    ["callbacks"],
    ["precision"],
    ["metrics", "layer_summary"],
    ["columns", "on_all_rows"],
    ["checks"],
    ["broadcast", "losses", "faults"],
    ["data"],
    ["distributed", "randomness", "atomic"],
    ["results"],
    ["modes"],
    ["exported"],
    ["errors", "overrides", "paths", "reachable"],
]


def test_all_is_what_can_be_imported():
    public = {
        name
        for name, value in vars(minikeras).items()
        if not name.startswith("_") and not is_module(value)
    }
    assert sorted(public) == sorted(minikeras.__all__)


def is_module(value):
    return type(value).__name__ == "module"


def test_no_module_has_the_name_of_something_exported():
    assert not {room_of(path) for path in MODULES} & set(minikeras.__all__)


MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports_of(tree):
    """The rooms imported when the module runs; what is imported inside functions or for type checkers is left out."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minikeras"):
            inner = node.module.split(".")[1:2]
            yield from inner or [alias.name for alias in node.names]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward_only(path):
    level = {name: number for number, names in enumerate(ORDER) for name in names}
    room = room_of(path)
    for imported in imports_of(ast.parse(path.read_text())):
        assert imported == room or level[imported] > level[room], f"{path} imports {imported}"


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "integrations").glob("*.py")), ids=lambda path: path.name
)
def test_integrations_use_the_public_names_alone(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    imported += [
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    ]
    ours = {
        name for name in imported if name.startswith("minikeras") and "integrations" not in name
    }
    assert ours <= {"minikeras", "minikeras.errors"}  # the last for its wording
    named = [
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "minikeras"
    ]
    assert set(named) <= set(minikeras.__all__)
    assert not {node.attr for node in nodes if isinstance(node, ast.Attribute)} & {
        "_run",
        "_compiled",
        "_publish",
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_names_of_torch_are_used(path):
    assert private_names(path.read_text()) == []


def private_names(code):
    """What the code has of torch, or reads of an nn.Module, that begins with an underscore, in its strings too."""
    tree = ast.parse(code)
    torch_names = dict(imports_from_torch(tree))
    used = [*torch_names.values(), *(full_name(node, torch_names) for node in ast.walk(tree))]
    used += [
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        for name in named_in(node.value)
    ]
    return sorted({name for name in used if any(is_private(part) for part in name.split("."))})


def is_private(part):
    return part.startswith("_") and not part.startswith("__")


def imports_from_torch(tree):
    """Each name that an import binds, with the full name of what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.asname or alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found = [
                (alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names
            ]
        else:
            continue
        yield from ((name, full) for name, full in found if full.split(".")[0] == "torch")


def full_name(node, torch_names):
    """`torch.nn.Module._x` for `nn.Module._x`, called or indexed on the way or not; "" for what is not torch's."""
    if isinstance(node, ast.Name):
        return torch_names.get(node.id, "torch" if node.id == "torch" else "")
    if isinstance(node, ast.Call | ast.Subscript):
        return full_name(node.func if isinstance(node, ast.Call) else node.value, torch_names)
    if not isinstance(node, ast.Attribute):
        return ""
    owner = full_name(node.value, torch_names) or ("Module" if node.attr in OF_MODULES else "")
    return owner and f"{owner}.{node.attr}"


OF_MODULES = {
    name for name in dir(torch.nn.Module()) if is_private(name)
}  # `model._parameters`, whatever model is


def named_in(value):
    return re.findall(r"\btorch(?:\.\w+)+", value) if isinstance(value, str) else []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch\ntorch._x", "torch._x"),
        ("import torch\ntorch.nn.modules._x.y(1)", "torch.nn.modules._x"),
        ("import torch\ntorch.randn(1)[0]._x", "torch.randn._x"),
        ("import torch._x", "torch._x"),
        ("import torch.nn._x as x", "torch.nn._x"),
        ("import torch as t\nt._x = 1", "torch._x"),
        ("import torch.distributed as dist\ndist._x()", "torch.distributed._x"),
        ("from torch import _x", "torch._x"),
        ("from torch import _x as x", "torch._x"),
        ("from torch._x import y", "torch._x.y"),
        ("from torch.nn import functional as F, _x", "torch.nn._x"),
        ("def f():\n    from torch import nn\n    return nn.Module._x", "torch.nn.Module._x"),
        ("from torch import nn\nnn.modules._y", "torch.nn.modules._y"),
        ("from torch import Tensor\nclass X(Tensor._x): ...", "torch.Tensor._x"),
        ("importlib.import_module('torch._x')", "torch._x"),
        ("def f():\n    'torch.nn._x(1)'", "torch.nn._x"),
        ("list(model.net._parameters)", "Module._parameters"),
    ],
)
def test_a_private_name_of_torch_is_found_however_it_is_reached(code, found):
    assert found in private_names(code)


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.__version__; torch.nn.Module.__call__",
        "from torch import nn\nclass Model(nn.Module):\n    def f(self): return self._run",
        "from torchmetrics import _x\nimport pandas\npandas._x",
        "from minikeras import nn\nnn._x",
    ],
)
def test_what_is_public_or_not_of_torch_is_not_taken_for_private(code):
    assert private_names(code) == []


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_the_citation_has_what_the_format_asks_for():
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    assert citation["version"] == minikeras.__version__


FORMS = sorted(
    set((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    - {ROOT / ".github/ISSUE_TEMPLATE/config.yml"}
)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_has_what_github_asks_for(path):
    form = read_yaml(path)
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) > 0
    for field in form["body"]:
        assert field["type"] in {"checkboxes", "dropdown", "input", "textarea"}
        assert field["attributes"]["label"]


def test_there_is_a_form_for_what_is_wrong_and_one_for_what_is_missing():
    assert [path.name for path in FORMS] == ["bug.yml", "feature.yml"]
    assert isinstance(read_yaml(".github/ISSUE_TEMPLATE/config.yml")["blank_issues_enabled"], bool)


def test_importing_brings_in_nothing_optional():
    optional = "'matplotlib', 'sklearn', 'torchmetrics', 'IPython', 'torch._dynamo', 'torch._inductor', 'minikeras.jit'"
    optional += ", 'tensorboard', 'mlflow', 'wandb', 'minikeras.integrations'"
    code = f"import sys, minikeras; print([name for name in ({optional}) if name in sys.modules])"
    assert run(["-c", code]).strip() == "[]"


def test_the_version_is_that_of_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["version"] == minikeras.__version__


def test_the_core_needs_five_packages():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = config["options"]["install_requires"].split()
    assert [re.split("[><=]", name)[0] for name in needed] == [
        "torch",
        "numpy",
        "pandas",
        "tqdm",
        "tabulate",
    ]


def test_ci_runs_the_test_command_of_the_readme():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    command = 'pip install -e ".[test]" && pytest'
    assert f"\n{command}\n" in readme
    assert f"readme_command='{command}'\n" in ci


def test_the_readme_runs_and_prints_what_it_shows():
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```\n", readme, re.DOTALL)
    shown = re.search(r"```text\n(.*?)```\n", readme[code.end() :], re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code[1], "README.md", "exec"), {"__name__": "__main__"})
    assert numbers_rounded(printed.getvalue()) == numbers_rounded(shown[1])


def numbers_rounded(text):
    """Two digits of each number: the rest may differ from one processor to another."""
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.1f}", text).split()


def test_the_readme_names_each_module_that_there_is():
    readme = (ROOT / "README.md").read_text()
    rooms = {path.name for path in PACKAGE.glob("*.py")} | {
        f"{path.parent.name}/" for path in PACKAGE.glob("*/*.py")
    }
    assert rooms == set(re.findall(r"^  (\w+(?:\.py|/))  ", readme, re.MULTILINE))


def run(arguments, **kwargs):
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **kwargs
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_ring_example_finds_the_rare_positives(tmp_path):
    printed = run([str(ROOT / "examples" / "ring_focal.py")], cwd=tmp_path)
    result = ast.literal_eval(printed.splitlines()[-1])
    assert result["val_accuracy"] >= 0.975
    assert result["val_recall"] >= 0.5
    assert (tmp_path / "ring_focal.png").stat().st_size > 10_000
    assert "[-1, 1]" in printed
    assert "Total params: 61" in printed


def test_the_linear_regression_example_recovers_w_and_b(tmp_path):
    printed = run([str(ROOT / "examples" / "linear_regression.py")], cwd=tmp_path)
    found = re.search(r"found w = \[ *(\S+), *(\S+)\]  b = *(\S+)", printed)
    assert [float(number) for number in found.groups()] == pytest.approx([2, -3, 10], abs=0.15)


def test_the_resume_example_goes_on_where_it_was_stopped(tmp_path):
    example = str(ROOT / "examples" / "resume.py")
    whole = run([example, "--epochs", "2", "--pause", "0", "--file", "whole.pt"], cwd=tmp_path)
    first = run([example, "--epochs", "1", "--pause", "0"], cwd=tmp_path)
    second = run([example, "--epochs", "2", "--pause", "0"], cwd=tmp_path)
    assert "resume.pt: carried on in epoch 2 after step 0" in second
    assert first.splitlines()[:-3] == whole.splitlines()[: len(first.splitlines()) - 3]
    assert second.splitlines()[-1] == whole.splitlines()[-1]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name
)
def test_examples_say_what_they_are_for(path):
    assert path.read_text().startswith('"""')


# --- docstrings: what a user reads of a public name -------------------------------------------------------------------

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
                f"{name}.{key}": one for key, one in inspect.getmembers(value) if is_ours(key, one)
            }
            found |= {
                key: one for key, one in methods.items() if one not in found.values()
            }  # where it comes first
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
def test_a_docstring_names_each_argument(name):
    words = re.sub(r"^ *(>>>|\.\.\.) .*$", "", described_by(name), flags=re.MULTILINE)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(PUBLIC[name]).parameters.values()
    asked = [one.name for one in parameters if one.name != "self" and one.kind not in kinds]
    assert [argument for argument in asked if not re.search(rf"\b{argument}\b", words)] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_has_an_example_or_its_class_has_one(name):
    owner = name.partition(".")[0]
    has_one = any(">>> " in described_by(one) for one in (name, owner))
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
    ("Model.evaluate", "NotCompiledError"): lambda folder: plain().evaluate((X, y)),
    ("Model.evaluate", "TypeError"): lambda folder: compiled().evaluate(3),
    ("Model.evaluate", "ValueError"): lambda folder: compiled().evaluate((X[:0], y[:0])),
    ("Model.predict", "TypeError"): lambda folder: plain().predict(3),
    ("Model.predict", "ValueError"): lambda folder: plain().predict(torch.zeros(8, 3)),
    ("Model.save", "TypeError"): lambda folder: Rest().save(folder / "weights.pt"),
    ("Model.save", "OSError"): lambda folder: plain().save(written(folder / "file") / "weights.pt"),
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
    ("FocalLoss", "ValueError"): lambda folder: minikeras.FocalLoss()(y, y[:, 0]),
    ("FocalLoss", "RuntimeError"): lambda folder: minikeras.FocalLoss()(y + 1, y),
    ("Regularized", "TypeError"): lambda folder: minikeras.Regularized(nn.MSELoss, plain()),
    ("Regularized", "ValueError"): lambda folder: minikeras.Regularized(
        nn.MSELoss(), plain(), l2=-1
    ),
    ("l1_penalty", "ValueError"): lambda folder: minikeras.l1_penalty(plain(), -1),
    ("weight_decay_groups", "ValueError"): lambda folder: minikeras.weight_decay_groups(
        plain(), -1
    ),
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


def test_each_error_under_raises_is_looked_for_here():
    assert sorted(documented_errors()) == sorted(MISTAKES)


@pytest.mark.parametrize(
    ("name", "error"), [pair for pair, call in MISTAKES.items() if callable(call)]
)
def test_an_error_under_raises_is_what_the_mistake_raises(name, error, tmp_path):
    kind = getattr(minikeras, error, None) or getattr(builtins, error)
    with pytest.raises(kind):
        MISTAKES[name, error](tmp_path)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # SQLAlchemy's, of MLflow
@pytest.mark.parametrize("name", ["MLflow", "WandB"])
def test_the_example_of_a_tracker_runs(name, tmp_path, monkeypatch):
    from test_trackers import Store

    monkeypatch.chdir(tmp_path)
    if name == "MLflow":
        Store(tmp_path)  # the database that the example would take seconds to make
    else:
        importlib.import_module(
            "wandb"
        ).teardown()  # it remembers the folder that an earlier test ran in
    code = textwrap.dedent(re.search(r"::\n\n((?: {4}.*\n?|\n)+)", described_by(name))[1])
    model = compiled()
    names = {"model": model, "dl_train": (X, y), "dl_valid": (X, y)}
    exec(compile(code, name, "exec"), names)
    assert len(model.history) == 30
    assert list(tmp_path.glob("mlflow.db" if name == "MLflow" else "wandb/offline-run-*/*.wandb"))
