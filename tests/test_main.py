"""What `python -m minikeras` prints."""

import os
import platform
import subprocess
import sys

import pytest
import torch

import minikeras
from minikeras.__main__ import environment, main

NETS = """
import functools
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x)

class Wide(nn.Module):
    def __init__(self, width, depth=3, *more, **options):
        super().__init__()

thin = functools.partial(Wide, depth=1)

class Two(nn.Module):
    def __init__(self, words=9):
        super().__init__()
        self.embedding, self.fc = nn.Embedding(words, 4), nn.Linear(3, 4)

    def forward(self, ids, x):
        return self.embedding(ids).sum(1) + self.fc(x)

def made():
    return Net()

def nothing():
    return 7

instance = Net()
number = 7
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to be in, with a module of networks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "nets.py").write_text(NETS)
    (tmp_path / "package" / "broken.py").write_text("import not_installed_anywhere")
    (tmp_path / "plain.py").write_text("answer = 42")
    yield tmp_path
    for name in ("package", "package.nets", "package.broken", "plain"):
        sys.modules.pop(name, None)


def command(*arguments, **kwargs):
    line = [sys.executable, "-m", "minikeras", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False, **kwargs)


def test_command_env_prints_what_a_report_needs():
    done = command("env")
    assert done.returncode == 0, done.stderr
    printed = dict(
        line.split(maxsplit=1)
        for line in done.stdout.splitlines()
        if not line.startswith("not there")
    )
    assert printed["minikeras"] == minikeras.__version__
    assert printed["Python"] == platform.python_version()
    assert printed["torch"] == torch.__version__
    assert {"numpy", "pandas", "tqdm", "tabulate", "OS", "accelerators"} <= set(printed)
    assert printed["CPUs"].startswith(f"{os.cpu_count()}, ")
    assert "matplotlib " in printed["optional"]


def test_command_env_lists_missing_and_installed_optional_packages(monkeypatch):
    needs = [
        "torch>=2.6",
        'one>=2; extra == "plot"',
        'two[x]>=1 ; extra == "ray"',
        'three; extra == "test"',
    ]
    versions = {"one": "2.5"}

    def version(name):
        if name in ("two", "three", "ipykernel", "torchdata", "torchmetrics"):
            raise environment.__globals__["metadata"].PackageNotFoundError(name)
        return versions.get(name, "1.0")

    monkeypatch.setattr("importlib.metadata.requires", lambda name: needs)
    monkeypatch.setattr("importlib.metadata.version", version)
    found = environment()
    assert found["optional"] == "one 2.5"
    assert found["not there"] == "ipykernel, torchdata, torchmetrics, two"


def test_command_summary_prints_the_table_of_a_network_in_the_folder(folder):
    done = command("summary", "package.nets:Net", "--input", "3", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:4] == [
        "Net             [-1, 2]                0",
        "  fc (Linear)   [-1, 2]                8",
    ]
    assert "Total params: 8" in done.stdout


def test_command_summary_of_a_wrong_name_is_one_line_on_stderr_and_no_traceback(folder):
    done = command("summary", "package.nets:Nett", "--input", "3", cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "package.nets has no 'Nett'. Did you mean 'Net'?\n"


@pytest.mark.parametrize("name", ["Net", "made", "instance"])
def test_command_summary_is_the_same_for_a_class_a_function_and_an_instance(folder, capsys, name):
    main(["summary", f"package.nets:{name}", "--input", "3"])
    assert "fc (Linear)   [-1, 2]                8" in capsys.readouterr().out


def test_command_summary_takes_shapes_and_dtypes_of_several_inputs(folder, capsys):
    main(
        [
            "summary",
            "package.nets:Two",
            "-i",
            "5",
            "--dtype",
            "int64",
            "-i",
            "3",
            "--dtype",
            "torch.float32",
        ]
    )
    assert "embedding (Embedding)  [-1, 5, 4]" in capsys.readouterr().out


def test_command_summary_takes_one_dtype_for_all_inputs(folder, capsys):
    (folder / "plain.py").write_text(
        "import torch\nnet = torch.nn.Bilinear(2, 3, 4, dtype=torch.float64)"
    )
    main(["summary", "plain:net", "-i", "2", "-i", "3", "--dtype", "float64"])
    assert "[-1, 4]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["package.nets"],
            "got 'package.nets', which names no network. Pass MODULE:NAME, such as "
            "package.module:Net.",
        ),
        (
            ["package/nets.py:Net"],
            "there is no module 'package/nets.py' to import from {here}. Did you mean "
            "'package.nets'? Pass it as an import statement there would have it: "
            "package.module:Net, or net:Net for a file net.py.",
        ),
        (
            ["./plain.py:net"],
            "there is no module './plain.py' to import from {here}. Did you mean 'plain'? Pass it "
            "as an import statement there would have it: package.module:Net, or net:Net for a file "
            "net.py.",
        ),
        (
            ["package.other:Net"],
            "there is no module 'package.other' to import from {here}. Pass it as an import "
            "statement there would have it: package.module:Net, or net:Net for a file net.py.",
        ),
        (
            ["package.nets:Unet3Plus"],
            "package.nets has no 'Unet3Plus'. Its networks are 'Net', 'Wide', 'Two', 'instance'.",
        ),
        (["plain:Unet3Plus"], "plain has no 'Unet3Plus'. It has no network."),
        (
            ["package.nets:Wide"],
            "package.nets:Wide cannot be called without its arguments: width. Pass the name of a "
            "function that needs none and returns the network: def make_net(): return Wide(...).",
        ),
        (
            ["package.nets:thin"],
            "package.nets:thin cannot be called without its arguments: width. Pass the name of a "
            "function that needs none and returns the network: def make_net(): return thin(...).",
        ),
        (
            ["package.nets:number"],
            "package.nets:number is int. Pass the name of a torch.nn.Module, of its class, or of a "
            "function that makes one.",
        ),
        (
            ["package.nets:nothing"],
            "package.nets:nothing gives int, not a torch.nn.Module. Return the network from it.",
        ),
        (
            ["package.nets:Net", "--dtype", "flaot32"],
            "--dtype must be a dtype of torch, such as float32 or int64, got 'flaot32'. Did you "
            "mean 'float32'?",
        ),
        (
            ["package.nets:Net", "--dtype", "int64", "--dtype", "int64"],
            "--dtype must come once for all, or once for each --input, got 2 for 1. Pass as many "
            "of the one as of the other.",
        ),
    ],
)
def test_command_summary_of_a_wrong_object_says_what_to_pass(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(["summary", *arguments, "--input", "3"])
    assert caught.value.code == 1
    assert capsys.readouterr().err == message.replace("{here}", str(folder)) + "\n"


@pytest.mark.parametrize("shape", ["3x224", "-1,3", "0", "3,,4", "(3,224)", "", "2.5"])
def test_command_summary_refuses_sizes_that_are_no_numbers(folder, capsys, shape):
    with pytest.raises(SystemExit) as caught:
        main(["summary", "package.nets:Net", f"--input={shape}"])
    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        f"--input must be whole numbers of 1 or more with commas between, got {shape!r}. Pass the "
        f"shape of one row, without the batch: --input 3,224,224.\n"
    )


def test_command_summary_names_a_layer_that_cannot_take_the_input(folder, capsys):
    with pytest.raises(SystemExit):
        main(["summary", "package.nets:Net", "--input", "4"])
    assert capsys.readouterr().err.startswith(
        "fc: Linear(in_features=3, out_features=2, bias=True) was given (2, 4) float32: "
    )


def test_command_summary_shows_an_error_in_the_network_itself_as_such(folder):
    (folder / "plain.py").write_text("def net():\n    raise ValueError('no such width')")
    done = command("summary", "plain:net", "--input", "3", cwd=folder)
    assert done.returncode == 1
    assert 'plain.py", line 2, in net' in done.stderr
    assert done.stderr.endswith("ValueError: no such width\n")


def test_command_that_is_missing_raises_an_error_with_those_that_exist(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(
        "error: the following arguments are required: {env,summary}\n"
    )


def test_command_summary_does_not_take_a_package_that_the_module_lacks_for_the_module(folder):
    with pytest.raises(ModuleNotFoundError, match="No module named 'not_installed_anywhere'"):
        main(["summary", "package.broken:Net", "--input", "3"])
