"""The core is closed, every room can be deleted, and no capability is named outside its room."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import without_rooms
from helpers.modules import MODULES, room_of
from helpers.paths import PACKAGE

# The files at the top of the package that are not the core: the one that knows all rooms, public
# helpers, and what runs by `python -m minikeras`.
NOT_CORE = {
    "assemble",
    "__main__",
    "by_name",
    "export",
    "freezing",
    "losses",
    "metrics",
    "on_all_rows",
    "transformed",
}
CORE = sorted(path for path in PACKAGE.glob("*.py") if path.stem not in NOT_CORE)

# Imports from room to room, each with its reason. All others are of the core, or of `support`.
ROOM_TO_ROOM = {
    ("diagnosis", "by_name"): "it looks at each of several outputs",
    ("diagnosis", "data"): "it reads the arrays and tables that fit takes, as fit reads them",
    ("distributed", "on_all_rows"): "its rows are gathered from all processes",
    ("losses", "by_name"): "a penalty may be added to losses by name",
    ("report", "data"): "summary takes the tables that predict takes",
    ("losses", "distributed"): "a penalty adds up what each process has in parts",
}


def imports_of(path, in_functions=True):
    """Yield the modules of the package that a file imports, but not for type checkers."""
    tree = ast.parse(path.read_text())
    left_out = set()
    for node in ast.walk(tree):
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if is_for_types or (isinstance(node, ast.FunctionDef) and not in_functions):
            left_out |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in left_out:
            continue
        module = node.module or ""
        if module == "minikeras":
            yield from (alias.name for alias in node.names)
        elif module.startswith("minikeras."):
            yield module.removeprefix("minikeras.").split(".")[0]


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_core_imports_only_the_core(path):
    core = {path.stem for path in CORE}
    known = core | {"assemble"} if path.stem in ("model", "prediction", "__init__") else core
    assert set(imports_of(path, in_functions=False)) <= known


def test_rooms_import_the_core_and_not_one_another():
    core = {path.stem for path in CORE}
    found = set()
    for path in MODULES:
        room = room_of(path)
        if room in core | {"assemble"}:
            continue
        for imported in imports_of(path):
            if imported not in core | {room, "support"}:
                found.add((room, imported))
    assert found == set(ROOM_TO_ROOM)


def test_assemble_imports_rooms_only_when_they_are_asked_for():
    core = {path.stem for path in CORE}
    assert set(imports_of(PACKAGE / "assemble.py", in_functions=False)) <= core


def words_of_capabilities():
    """The names of the classes of all rooms, and of what compile and fit are asked for."""
    words = {
        "jit",
        "checkpoint",
        "accumulate",
        "precision",
        "scaler",
        "fsdp",
        "clip",
        "clip_grad_norm",
    }
    for path in MODULES:
        if room_of(path) in {path.stem for path in CORE} | {"callbacks", "assemble"}:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                words.add(node.name)
    return words


def words_in(path):
    """The identifiers and strings of a file: no docstrings, comments and annotations."""
    left_out = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in ("compile", "fit"):
            left_out |= {id(inner) for inner in ast.walk(node)}  # they hand their arguments on
        if isinstance(node, ast.Expr):
            left_out.add(id(node.value))
        for annotation in (getattr(node, "returns", None), getattr(node, "annotation", None)):
            if annotation is not None:
                left_out |= {id(inner) for inner in ast.walk(annotation)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword):
            yield str(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_core_names_no_capability(path):
    if path.stem == "__init__":  # the table of public names
        return
    found = set(words_in(path)) & words_of_capabilities()
    assert found == set()


@pytest.fixture(scope="module")
def deletions(tmp_path_factory):
    """What the plain script does without each room, and without all."""
    folder = tmp_path_factory.mktemp("copies")
    command = [sys.executable, without_rooms.__file__, str(PACKAGE), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("room", [*without_rooms.ROOMS, without_rooms.ALL])
def test_deleted_room_leaves_the_rest_as_it_is_to_the_bit(deletions, room):
    assert "error" not in deletions[room], deletions[room]["error"]
    assert deletions[room]["plain"] == deletions[""]["plain"]


@pytest.mark.parametrize("room", [room for room, asked in without_rooms.ROOMS.items() if asked])
def test_deleted_room_is_named_when_it_is_asked_for(deletions, room):
    expected = "minikeras." + room.removesuffix(".py").replace("/", ".")
    assert deletions[room]["missing"].startswith(expected)


def test_every_room_is_deleted_once():
    core = {path.stem for path in CORE}
    rooms = {room_of(path) for path in MODULES} - core - {"assemble", "__main__", "support"}
    assert rooms == {Path(room).parts[0].removesuffix(".py") for room in without_rooms.ROOMS}
    parts = {f"parts/{path.name}" for path in (PACKAGE / "parts").glob("*.py")}
    assert parts - {"parts/__init__.py"} <= set(without_rooms.ROOMS)
