"""What `python -m minikeras` does: `env` prints what a report of a fault needs, `summary` the layers of a network.

python -m minikeras env
python -m minikeras summary package.module:Net --input 3,224,224
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import nn

import minikeras
from minikeras.errors import did_you_mean

NEEDED = "numpy", "pandas", "tqdm", "tabulate"
OFTEN_BESIDE = "ipykernel", "torchdata", "torchmetrics"
FOR_WORK_ON_IT = "test", "dev", "docs"  # extras that no user's fault comes from


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and do what it asks for."""
    parser = argparse.ArgumentParser(prog="python -m minikeras", description=str(minikeras.__doc__))
    commands = parser.add_subparsers(required=True, dest="command", metavar="{env,summary}")
    commands.add_parser("env", help="print the versions and devices that a bug report needs")
    table = commands.add_parser(
        "summary", help="print a network's layers, output shapes and parameters"
    )
    table.add_argument(
        "target",
        metavar="MODULE:NAME",
        help="an nn.Module, its class, or a function that makes one",
    )
    table.add_argument(
        *("--input", "-i"),
        action="append",
        required=True,
        metavar="SIZES",
        help="shape of one row, without the batch: 3,224,224; once for each argument of forward",
    )
    table.add_argument(
        "--dtype", action="append", help="of the input, default float32; once for all, or for each"
    )
    given = parser.parse_args(arguments)
    if given.command == "env":
        print("\n".join(f"{name:<14} {value}" for name, value in environment().items()))
        return
    try:
        show_summary(given.target, given.input, given.dtype or ["float32"])
    except Wrong as error:
        table.exit(1, f"{error}\n")


class Wrong(Exception):
    """Something in the command line that its writer can mend."""


# --- env --------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """What a report of a fault needs: name -> value."""
    found = {
        "minikeras": minikeras.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    found |= {name: metadata.version(name) for name in NEEDED}
    found |= {
        "OS": platform.platform(),
        "CPUs": _cpus(),
        "threads": f"{torch.get_num_threads()} of torch",
    }
    found["accelerators"] = ", ".join(_accelerators()) or "none"
    if torch.version.cuda:
        found["CUDA"] = f"{torch.version.cuda} of torch"
    versions = {name: _version(name) for name in _optional()}
    found["optional"] = (
        ", ".join(f"{name} {version}" for name, version in versions.items() if version) or "none"
    )
    found["not there"] = (
        ", ".join(name for name, version in versions.items() if not version) or "none"
    )
    return found


def _cpus() -> str:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{os.cpu_count()}, {allowed} for this process"


def _accelerators() -> list[str]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return []
    numbers = range(torch.accelerator.device_count())
    names = [
        torch.cuda.get_device_name(number) if device.type == "cuda" else "" for number in numbers
    ]
    return [
        f"{device.type}:{number} {name}".rstrip()
        for number, name in zip(numbers, names, strict=True)
    ]


def _optional() -> list[str]:
    """The packages in minikeras's extras, but for those to work on it, and those that users have beside it."""
    try:
        lines = metadata.requires("minikeras") or []
    except metadata.PackageNotFoundError:  # run from its source, not installed
        lines = []
    found = [re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", line) for line in lines]
    return sorted(
        {*OFTEN_BESIDE, *(match[1] for match in found if match and match[2] not in FOR_WORK_ON_IT)}
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- summary ----------------------------------------------------------------------------------------------------------


def show_summary(target: str, inputs: list[str], dtypes: list[str]) -> None:
    """Print the summary of what a target names."""
    shapes, types = [_shape(text) for text in inputs], [_dtype(name) for name in dtypes]
    if len(types) not in (1, len(shapes)):
        raise Wrong(
            f"--dtype must come once for all, or once for each --input, got {len(types)} for {len(shapes)}. Pass as "
            f"many of the one as of the other."
        )
    model = _model(target)  # an error in the user's code comes with its traceback
    try:
        if len(shapes) == 1:
            minikeras.summary(model, shapes[0], types[0])
        else:
            minikeras.summary(model, shapes, types if len(types) > 1 else types * len(shapes))
    except (minikeras.ForwardError, ValueError) as error:
        raise Wrong(str(error)) from error


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*,?", text):
        raise Wrong(
            f"--input must be whole numbers of 1 or more with commas between, got {text!r}. Pass the shape of one row, "
            f"without the batch: --input 3,224,224."
        )
    return tuple(int(size) for size in text.split(",") if size)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        known = [known for known, value in vars(torch).items() if isinstance(value, torch.dtype)]
        raise Wrong(
            f"--dtype must be a dtype of torch, such as float32 or int64, got {name!r}.{did_you_mean(name, known)}"
        )
    return found


def _model(target: str) -> nn.Module:
    """The network that a target names: itself, or what its class or a function gives when called."""
    module_name, colon, name = target.partition(":")
    if not (colon and module_name and name):
        raise Wrong(
            f"got {target!r}, which names no network. Pass MODULE:NAME, such as package.module:Net."
        )
    found = _named(_module(module_name), module_name, name)
    if isinstance(found, nn.Module):
        return found
    made = _called(found, target)
    if not isinstance(made, nn.Module):
        raise Wrong(
            f"{target} gives {type(made).__name__}, not a torch.nn.Module. Return the network from it."
        )
    return made


def _module(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())  # where python -m looks too, but for python -P
    try:
        if name.startswith("."):  # relative to nothing
            raise ModuleNotFoundError(name=name)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and what it imports is not
        path = name.removesuffix(".py").replace("/", ".").strip(".")
        hint = f" Did you mean {path!r}?" if path not in ("", name) else ""
        raise Wrong(
            f"there is no module {name!r} to import from {os.getcwd()}.{hint} Pass it as an import statement there "
            f"would have it: package.module:Net, or net:Net for a file net.py."
        ) from None


def _named(module: ModuleType, module_name: str, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise Wrong(f"{module_name} has no {name!r}.{_instead(module, name)}")
        found = getattr(found, part)
    return found


def _instead(module: ModuleType, name: str) -> str:
    """A close name, or else the networks that there are."""
    public = [known for known in vars(module) if not known.startswith("_")]
    hint = did_you_mean(name, public)
    networks = [known for known in public if _is_network(getattr(module, known))]
    return hint or (
        f" Its networks are {', '.join(map(repr, networks))}."
        if networks
        else " It has no network."
    )


def _is_network(value: Any) -> bool:
    return isinstance(value, nn.Module) or (
        isinstance(value, type) and issubclass(value, nn.Module)
    )


def _called(found: Any, target: str) -> Any:
    if not callable(found):
        raise Wrong(
            f"{target} is {type(found).__name__}. Pass the name of a torch.nn.Module, of its class, or of a function "
            f"that makes one."
        )
    needed = [
        name
        for name, parameter in inspect.signature(found).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise Wrong(
            f"{target} cannot be called without its arguments: {', '.join(needed)}. Pass the name of a function that "
            f"needs none and returns the network: def make_net(): return {target.rpartition(':')[2]}(...)."
        )
    return found()


if __name__ == "__main__":
    main()
