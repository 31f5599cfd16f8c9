"""Imports of the modules: nothing optional, no private names of torch."""

import ast
import re

import pytest
import torch
from helpers.launch import run_python
from helpers.modules import MODULES, room_of
from helpers.paths import PACKAGE

import minikeras


def test_imports_of_the_package_are_those_in_all():
    public = set()
    for name in {*vars(minikeras), *dir(minikeras)}:  # names of rooms are found when asked for
        if not name.startswith("_") and not is_module(getattr(minikeras, name)):
            public.add(name)
    assert sorted(public) == sorted(minikeras.__all__)


def test_imports_show_in_tab_completion_what_users_import():
    assert dir(minikeras) == sorted([*minikeras.__all__, "diagnosis", "export", "integrations"])


def test_imports_of_a_module_are_not_needed_to_reach_it():
    code = "import minikeras; print(minikeras.export.export.__name__, minikeras.losses.__name__)"
    assert run_python(["-c", code]).split() == ["export", "minikeras.losses"]


def is_module(value):
    return type(value).__name__ == "module"


def test_imports_of_modules_have_no_name_that_is_exported():
    assert not {room_of(path) for path in MODULES} & set(minikeras.__all__)


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "integrations").glob("*.py")), ids=lambda path: path.name
)
def test_imports_of_integrations_are_public_names_alone(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    for node in nodes:
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
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
def test_private_names_of_torch_are_not_used(path):
    assert private_names(path.read_text()) == []


def private_names(code):
    """List names of torch and of nn.Module that begin with an underscore, in strings too."""
    tree = ast.parse(code)
    torch_names = dict(imports_from_torch(tree))
    used = [*torch_names.values(), *(full_name(node, torch_names) for node in ast.walk(tree))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            used += named_in(node.value)
    return sorted({name for name in used if any(map(is_private, name.split(".")))})


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
    """Return `torch.nn.Module._x` for `nn.Module._x`, or "" for what is not torch's."""
    if isinstance(node, ast.Name):
        return torch_names.get(node.id, "torch" if node.id == "torch" else "")
    if isinstance(node, ast.Call | ast.Subscript):
        return full_name(node.func if isinstance(node, ast.Call) else node.value, torch_names)
    if not isinstance(node, ast.Attribute):
        return ""
    owner = full_name(node.value, torch_names) or ("Module" if node.attr in OF_MODULES else "")
    return owner and f"{owner}.{node.attr}"


# `model._parameters`, whatever model is
OF_MODULES = {name for name in dir(torch.nn.Module()) if is_private(name)}


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
def test_private_names_of_torch_are_found_however_they_are_reached(code, found):
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
def test_private_names_of_torch_are_not_seen_in_public_or_other_names(code):
    assert private_names(code) == []


def test_imports_bring_in_nothing_optional():
    optional = (
        "'matplotlib', 'sklearn', 'torchmetrics', 'IPython', 'torch._dynamo', 'torch._inductor', "
        "'minikeras.jit'"
    )
    optional += ", 'tensorboard', 'mlflow', 'wandb', 'minikeras.integrations'"
    code = f"import sys, minikeras; print([name for name in ({optional}) if name in sys.modules])"
    assert run_python(["-c", code]).strip() == "[]"
