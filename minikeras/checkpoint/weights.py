"""Weights alone in a file: .pt as torch's users know it, or .safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minikeras.checkpoint.file import dump, read_newest, remedy, write
from minikeras.checkpoint.folder import reader
from minikeras.checkpoint.plain import plain
from minikeras.distributed import World, load_whole, whole
from minikeras.errors import CheckpointError

RUN = "minikeras"  # the key of the version number in a run's state
COMPILED = "_orig_mod."  # what torch.compile puts into the names of what it wraps


def save_weights(model: nn.Module, path: Path, world: World | None) -> None:
    """The model's state_dict in a file: whole, or not there; there for each process when it goes on."""

    state = weights_of(model)
    for key, value in state.items():
        state[key] = whole(value)  # by all processes

    def save() -> None:
        write(path, _dump_safetensors(state) if path.suffix == ".safetensors" else dump(state))

    save() if world is None else world.by_main(save)


def weights_of(module: nn.Module) -> dict[str, Any]:
    """A module's state_dict, of plain values."""
    state: dict[str, Any] = module.state_dict()
    for key, value in state.items():  # in place: torch keeps version numbers beside the items
        state[key] = plain(value, f"{key} in the state_dict of {type(module).__name__}")
    return state


def set_buffers(model: nn.Module, buffers: Mapping[str, Tensor], device: torch.device) -> None:
    """Fill buffers, those that are not in a state_dict too; one of another size, or of none, is replaced."""
    for name, value in buffers.items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        held = getattr(module, last, None)
        if isinstance(held, Tensor) and held.shape == value.shape:
            held.copy_(value)
        elif hasattr(module, last):
            setattr(module, last, value.to(device))
        else:  # made by the first batch
            module.register_buffer(last, value.to(device), persistent=False)


def frozen(model: nn.Module) -> list[str]:
    """The parameters that are not trained."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def freeze(model: nn.Module, names: list[str] | None) -> None:
    """Those and no others; None leaves them as they are."""
    if names is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in names)


def load_weights(model: nn.Module, path: Path) -> None:
    """Weights from a file into the model; nothing is changed where they do not fit."""
    found = read_newest(path, _read_safetensors if path.suffix == ".safetensors" else reader(model))
    if found is None:
        raise FileNotFoundError(f"there is no file {path}. Pass the path of a file that model.save wrote.")
    state = found[0]["model"] if isinstance(found[0], dict) and RUN in found[0] else found[0]
    check_weights(model, state, path)
    load_whole(model, state)


def check_weights(model: nn.Module, state: Any, path: Path) -> None:
    """A state_dict must have the model's keys and shapes.

    Raises:
        CheckpointError: it has others; the message names them.
    """
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{path} holds a {type(state).__name__} and not a model's weights. {remedy(path)}")
    own = model.state_dict()
    shapes = {key: tuple(value.shape) for key, value in own.items() if isinstance(value, Tensor) and not is_lazy(value)}
    given = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    differing = [key for key in shapes if given.get(key, shapes[key]) != shapes[key]]
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [f"{key} {given[key]} instead of {shapes[key]}" for key in differing],
    }
    told = [f"{what}: {', '.join(keys[:5])}{', ...' * (len(keys) > 5)}" for what, keys in problems.items() if keys]
    if told:
        raise CheckpointError(
            f"{path} holds the weights of another architecture than {type(model).__name__}: {'; '.join(told)}. "
            f"{under_other_names(own, state) or 'Build the model as it was when the file was written.'} {remedy(path)}"
        )


def under_other_names(own: dict[str, Any], state: dict[str, Any]) -> str:
    """Where a part of the model, or what the file holds under one name, would have the right names: what to call.

    >>> under_other_names({"net.weight": 0}, {"weight": 0})
    'They have the names of model.net: model.net.load_state_dict(...) takes them.'
    """
    for part in {key.partition(".")[0] for key in own}:
        if {f"{part}.{key}" for key in state} == set(own):
            return f"They have the names of model.{part}: model.{part}.load_state_dict(...) takes them."
    for first in {key.partition(".")[0] for key in state}:
        if {f"{first}.{key}" for key in own} == set(state):
            return f'Each name has "{first}." in front, which the model\'s have not: save them without it.'
    for key, value in state.items():
        if isinstance(value, dict) and set(value) == set(own):
            return f'They are under "{key}" in it: model.load_state_dict(torch.load(...)["{key}"]) takes them.'
    return ""


# --- safetensors, which has no checksum of its own: one goes into its metadata ----------------------------------------


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('.safetensors files need a package: pip install "minikeras[safetensors]"') from error
    return safetensors


def _dump_safetensors(state: dict[str, Any]) -> Any:
    package = _safetensors()
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise TypeError(f"a .safetensors file holds tensors alone, and the model's state has {others[0]}. Save to .pt.")
    whole = {key: value.cpu().contiguous().clone() for key, value in state.items()}  # it refuses tied ones

    def save(path: Path) -> None:
        package.torch.save_file(whole, path, metadata={"format": "pt", "sha256": _checksum(whole)})

    return save


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    package = _safetensors()
    try:
        with package.safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
            checksum = (file.metadata() or {}).get("sha256")
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or is no safetensors file: {error}. {remedy(path)}") from error
    if checksum not in (None, _checksum(state)):
        raise CheckpointError(f"{path} is damaged: its tensors do not match its checksum. {remedy(path)}")
    return state


def _checksum(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(f"{key} {state[key].dtype} {tuple(state[key].shape)}".encode())
        digest.update(state[key].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- names ------------------------------------------------------------------------------------------------------------


def under_plain_names(model: nn.Module) -> None:
    """From now on `Model(torch.compile(net))` saves and loads under the names of `Model(net)`."""
    model.register_state_dict_post_hook(_drop_compiled_names)
    model.register_load_state_dict_pre_hook(_add_compiled_names)


def _drop_compiled_names(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix) and COMPILED in name]:
        state[name.replace(COMPILED, "")] = state.pop(name)


def _add_compiled_names(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for wrapper, _ in module.named_modules(prefix=prefix.rstrip(".")):
        if f"{wrapper}.".endswith("." + COMPILED):
            outer = wrapper[: -len(COMPILED)] + "."
            for name in [name for name in state if name.startswith(outer) and not name.startswith(wrapper)]:
                state[wrapper + name[len(outer) - 1 :]] = state.pop(name)
