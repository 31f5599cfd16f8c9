"""The command line: `env` prints what a bug report needs, `summary` the layers of a network.

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

REQUIRED = ("numpy", "pandas", "tqdm", "tabulate")
OFTEN_INSTALLED = ("ipykernel", "torchdata", "torchmetrics")
FOR_DEVELOPERS = ("test", "dev", "docs")  # extras that cause no user's bug


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run the command."""
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
    options = parser.parse_args(arguments)
    if options.command == "env":
        for name, value in environment().items():
            print(f"{name:<14} {value}")
        return
    try:
        show_summary(options.target, options.input, options.dtype or ["float32"])
    except UsageError as error:
        table.exit(1, f"{error}\n")


class UsageError(Exception):
    """A mistake in the command line, shown without a traceback."""


# --- env ------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return what a bug report needs: name -> value."""
    found = {
        "minikeras": minikeras.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in REQUIRED:
        found[name] = metadata.version(name)
    found["OS"] = platform.platform()
    found["CPUs"] = _cpus()
    found["threads"] = f"{torch.get_num_threads()} of torch"
    found["accelerators"] = ", ".join(_accelerators()) or "none"
    if torch.version.cuda:
        found["CUDA"] = f"{torch.version.cuda} of torch"
    installed = []
    missing = []
    for name in _optional_packages():
        version = _version(name)
        if version:
            installed.append(f"{name} {version}")
        else:
            missing.append(name)
    found["optional"] = ", ".join(installed) or "none"
    found["not there"] = ", ".join(missing) or "none"
    return found


def _cpus() -> str:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{os.cpu_count()}, {allowed} for this process"


def _accelerators() -> list[str]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return []
    found = []
    for number in range(torch.accelerator.device_count()):
        name = torch.cuda.get_device_name(number) if device.type == "cuda" else ""
        found.append(f"{device.type}:{number} {name}".rstrip())
    return found


def _optional_packages() -> list[str]:
    """Return the packages of minikeras's extras, and those that users often install next to it.

    The extras for developers are left out.
    """
    try:
        requirements = metadata.requires("minikeras") or []
    except metadata.PackageNotFoundError:  # run from its source, not installed
        requirements = []
    names = set(OFTEN_INSTALLED)
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if match and match[2] not in FOR_DEVELOPERS:
            names.add(match[1])
    return sorted(names)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- summary --------------------------------------------------------------------------------------


def show_summary(target: str, inputs: list[str], dtypes: list[str]) -> None:
    """Print the summary of the network that a target names."""
    shapes = [_parse_shape(text) for text in inputs]
    types = [_parse_dtype(name) for name in dtypes]
    if len(types) not in (1, len(shapes)):
        raise UsageError(
            f"--dtype must come once for all, or once for each --input, got {len(types)} for "
            f"{len(shapes)}. Pass as many of the one as of the other."
        )
    model = _load_network(target)  # an error in the user's code keeps its traceback
    try:
        if len(shapes) == 1:
            minikeras.summary(model, shapes[0], types[0])
        else:
            minikeras.summary(model, shapes, types if len(types) > 1 else types * len(shapes))
    except (minikeras.ForwardError, ValueError) as error:
        raise UsageError(str(error)) from error


def _parse_shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*,?", text):
        raise UsageError(
            f"--input must be whole numbers of 1 or more with commas between, got {text!r}. Pass "
            f"the shape of one row, without the batch: --input 3,224,224."
        )
    return tuple(int(size) for size in text.split(",") if size)


def _parse_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        known = [known for known, value in vars(torch).items() if isinstance(value, torch.dtype)]
        raise UsageError(
            f"--dtype must be a dtype of torch, such as float32 or int64, got {name!r}."
            f"{did_you_mean(name, known)}"
        )
    return dtype


def _load_network(target: str) -> nn.Module:
    """Return the network that a target names, or that its class or function returns."""
    module_name, colon, name = target.partition(":")
    if not (colon and module_name and name):
        raise UsageError(
            f"got {target!r}, which names no network. Pass MODULE:NAME, such as package.module:Net."
        )
    found = _find_name(_import_module(module_name), module_name, name)
    if isinstance(found, nn.Module):
        return found
    network = _call_without_arguments(found, target)
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"{target} gives {type(network).__name__}, not a torch.nn.Module. "
            f"Return the network from it."
        )
    return network


def _import_module(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())  # python -m looks there too, but python -P does not
    try:
        if name.startswith("."):  # there is nothing that it could be relative to
            raise ModuleNotFoundError(name=name)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, and something that it imports does not
        path = name.removesuffix(".py").replace("/", ".").strip(".")
        hint = f" Did you mean {path!r}?" if path not in ("", name) else ""
        raise UsageError(
            f"there is no module {name!r} to import from {os.getcwd()}.{hint} Pass it as an import "
            f"statement there would have it: package.module:Net, or net:Net for a file net.py."
        ) from None


def _find_name(module: ModuleType, module_name: str, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{module_name} has no {name!r}.{_suggest(module, name)}")
        found = getattr(found, part)
    return found


def _suggest(module: ModuleType, name: str) -> str:
    """Suggest a similar name, or else list the networks of the module."""
    public = [known for known in vars(module) if not known.startswith("_")]
    hint = did_you_mean(name, public)
    if hint:
        return hint
    networks = [repr(known) for known in public if _is_network(getattr(module, known))]
    if networks:
        return f" Its networks are {', '.join(networks)}."
    return " It has no network."


def _is_network(value: Any) -> bool:
    if isinstance(value, type):
        return issubclass(value, nn.Module)
    return isinstance(value, nn.Module)


def _call_without_arguments(found: Any, target: str) -> Any:
    if not callable(found):
        raise UsageError(
            f"{target} is {type(found).__name__}. Pass the name of a torch.nn.Module, of its "
            f"class, or of a function that makes one."
        )
    needed = []
    for name, parameter in inspect.signature(found).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            needed.append(name)
    if needed:
        raise UsageError(
            f"{target} cannot be called without its arguments: {', '.join(needed)}. Pass the name "
            f"of a function that needs none and returns the network: def make_net(): return "
            f"{target.rpartition(':')[2]}(...)."
        )
    return found()


if __name__ == "__main__":
    main()
