"""The package as a whole: names, imports, README, examples, the files of the top level."""

import ast
import configparser
import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minikeras

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
    ["checks"],
    ["broadcast", "losses", "faults"],
    ["data"],
    ["distributed", "randomness"],
    ["errors"],
]


def test_all_is_what_can_be_imported():
    public = {name for name, value in vars(minikeras).items() if not name.startswith("_") and not is_module(value)}
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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_outgrows_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_names_of_torch_are_used(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert not ast.unparse(node).startswith("torch."), ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            assert "._" not in node.module
            assert not any(alias.name.startswith("_") for alias in node.names)


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
    assert [re.split("[><=]", name)[0] for name in needed] == ["torch", "numpy", "pandas", "tqdm", "tabulate"]


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


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_names_each_module_that_there_is():
    readme = (ROOT / "README.md").read_text()
    rooms = {path.name for path in PACKAGE.glob("*.py")} | {f"{path.parent.name}/" for path in PACKAGE.glob("*/*.py")}
    assert rooms == set(re.findall(r"^  (\w+(?:\.py|/))  ", readme, re.MULTILINE))


def run(arguments, **kwargs):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **kwargs)
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
    assert first.splitlines()[:-4] == whole.splitlines()[: len(first.splitlines()) - 4]
    assert second.splitlines()[-1] == whole.splitlines()[-1]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short_and_say_what_they_are_for(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 60
    assert lines[0].startswith('"""')
