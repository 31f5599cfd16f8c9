"""Weights alone in a file: .pt as torch's users know it, or .safetensors."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minikeras.atomic import write
from minikeras.checkpoint.file import dump, read_newest, refuse_special_file, remedy, remedy_of_load
from minikeras.checkpoint.folder import reader
from minikeras.checkpoint.plain import plain
from minikeras.distributed import World, is_part, load_whole, whole
from minikeras.errors import CheckpointError, dtype_name

RUN = "minikeras"  # the key of the version number in a run's state
OWN_WAYS = ("load_state_dict", "set_extra_state")  # of a module to take its weights
COMPILED = "_orig_mod."  # what torch.compile puts into the names of what it wraps


def save_weights(model: nn.Module, path: Path, world: World | None, keep: bool = True) -> None:
    """The model's state_dict in a file: whole, or not there; there for each process when it goes on.

    Args:
        keep: the file that was there becomes NAME.prev.
    """

    state = weights_of(model)
    for key, value in state.items():
        state[key] = whole(value)  # by all processes

    def save() -> None:
        write(
            path,
            _dump_safetensors(state) if path.suffix == ".safetensors" else dump(state),
            keep=keep,
        )

    save() if world is None else world.by_main(save)


def weights_of(module: nn.Module) -> dict[str, Any]:
    """A module's state_dict, of plain values."""
    state: dict[str, Any] = module.state_dict()
    for key, value in state.items():  # in place: torch keeps version numbers beside the items
        state[key] = plain(value, f"{key} in the state_dict of {type(module).__name__}")
    return state


def plain_name(name: str) -> str:
    """A name without what torch.compile puts into it.

    >>> plain_name("net._orig_mod.weight")
    'net.weight'
    """
    return name.replace(COMPILED, "")


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """All buffers by their plain names, those that are not in a state_dict too."""
    return {plain_name(name): buffer for name, buffer in model.named_buffers()}


def set_buffers(model: nn.Module, buffers: Mapping[str, Tensor], device: torch.device) -> None:
    """Fill buffers, those that are not in a state_dict too; one of another size, or of none, is replaced."""
    modules = {plain_name(f"{name}."): module for name, module in model.named_modules()}
    modules[""] = model
    for name, value in buffers.items():
        owner, _, last = plain_name(name).rpartition(".")
        module = modules.get(f"{owner}." if owner else "")
        if module is None:
            continue
        own = dict(module.named_buffers(recurse=False)).get(last)
        if own is not None and own.shape == value.shape:
            own.copy_(value)
        elif own is not None:
            setattr(module, last, value.to(device))
        elif getattr(module, last, None) is None:  # made by the first batch
            with contextlib.suppress(KeyError):  # None, and no buffer
                module.register_buffer(last, value.to(device), persistent=False)


def late_buffers(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a state_dict has of buffers that the model has registered as None until its first batch, by name."""
    own = model.state_dict()
    modules = {plain_name(name): module for name, module in model.named_modules()}
    found = {}
    for name, value in state.items():
        if name in own or not isinstance(value, Tensor):
            continue
        owner, _, last = plain_name(name).rpartition(".")
        module = modules.get(owner)
        if module is not None and is_empty_buffer(module, last):
            found[name] = value
    return found


def is_empty_buffer(module: nn.Module, name: str) -> bool:
    """Whether a module has registered a buffer of that name as None.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.register_buffer("mean", None)
    >>> is_empty_buffer(layer, "mean"), is_empty_buffer(layer, "bias")
    (True, False)
    """
    if name not in dir(module) or hasattr(type(module), name) or getattr(module, name) is not None:
        return False
    if name in vars(module):  # a plain attribute, such as a bias that another architecture has
        return False
    try:
        setattr(module, name, torch.empty(0))  # named_buffers leaves out those that are None
        return name in dict(module.named_buffers(recurse=False))
    except TypeError:  # a parameter that there is not
        return False
    finally:
        setattr(module, name, None)


def fill_late_buffers(
    model: nn.Module, buffers: Mapping[str, Tensor], device: torch.device
) -> None:
    """Give the model those buffers, as its first batch would."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    for name, value in buffers.items():
        owner, _, last = plain_name(name).rpartition(".")
        setattr(modules[owner], last, value.detach().clone().to(device))


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer of a model is; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def frozen(model: nn.Module) -> list[str]:
    """The parameters that are not trained."""
    return [
        plain_name(name)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    ]


def freeze(model: nn.Module, names: list[str] | None) -> None:
    """Those and no others; None leaves them as they are."""
    if names is not None:
        plain_names = {plain_name(name) for name in names}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(plain_name(name) not in plain_names)


def load_weights(model: nn.Module, path: Path) -> None:
    """Weights from a file into the model; nothing is changed where they do not fit."""
    found = read_newest(path, _read_safetensors if path.suffix == ".safetensors" else reader(model))
    if found is None:
        raise FileNotFoundError(
            f"there is no file {path}. Pass the path of a file that model.save wrote."
        )
    value, read_from = found
    state = (
        value["model"] if isinstance(value, dict) and RUN in value and "model" in value else value
    )
    state = under_own_names(model, state)
    check_weights(model, state, read_from)
    try:
        late = late_buffers(model, state)
        with all_or_nothing(model, late):
            fill_late_buffers(model, late, device_of(model))
            load_whole(model, state)
    except Exception as error:  # of a hook or a method of the model's own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{read_from} could not be taken by {type(model).__name__}: {first} The model is as it "
            f"was. {remedy_of_load(path)}"
        ) from error


def under_own_names(model: nn.Module, state: Any) -> Any:
    """A state_dict without the names of torch.compile's wrappers, and with both names of tied weights.

    Some files have one name alone of weights that are tied; the model's own ties say which the other is.
    """
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        return state
    own = model.state_dict()
    if any(COMPILED in key for key in state) and not any(COMPILED in key for key in own):
        state = renamed(state, own)
    missing = [key for key in own if key not in state and isinstance(own[key], Tensor)]
    if missing and not any(is_lazy(value) or is_part(value) for value in own.values()):
        state = copy.copy(state)
        for key in missing:
            other = twin_of(key, own, state)
            if other is not None:
                state[key] = state[other]
    return state


def renamed(state: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict with plain names; that of a compiled network has those of the Model that wraps it."""
    plain_names = {key: plain_name(key) for key in state}
    if len(set(plain_names.values())) < len(plain_names):
        return state
    if all(key.startswith(COMPILED) for key in state):
        for first in {key.partition(".")[0] for key in own}:
            wrapped = {key: f"{first}.{name}" for key, name in plain_names.items()}
            if set(wrapped.values()) == set(own):
                plain_names = wrapped
                break
    new = copy.copy(state)  # with the version numbers that torch keeps beside the items
    new.clear()
    for key, value in state.items():
        new[plain_names[key]] = value
    return new


def twin_of(key: str, own: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
    """Another name in `state` of the tensor that the model has under `key`."""
    tensor = own[key]
    for other, value in own.items():
        same = isinstance(value, Tensor) and other in state and is_same_tensor(tensor, value)
        if same and tensor.numel():
            return other
    return None


def is_same_tensor(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one: the same elements in memory."""
    if first.layout != torch.strided or second.layout != torch.strided:
        return first is second
    alike = (first.shape, first.stride(), first.dtype) == (
        second.shape,
        second.stride(),
        second.dtype,
    )
    return alike and first.device == second.device and first.data_ptr() == second.data_ptr()


@contextlib.contextmanager
def all_or_nothing(model: nn.Module, late: Mapping[str, Tensor]) -> Iterator[None]:
    """Put the tensors of a module back after an error, copied only where one can come; `late` ones are None again."""
    before: dict[str, Tensor] = {}
    if loads_by_itself(model):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        before = {name: tensor.detach().clone() for name, tensor in tensors if not is_lazy(tensor)}
    try:
        yield
    except BaseException:
        for name in late:
            owner, _, last = plain_name(name).rpartition(".")
            setattr(
                {plain_name(key): module for key, module in model.named_modules()}[owner],
                last,
                None,
            )
        now = dict([*model.named_parameters(), *model.named_buffers()])
        for name, tensor in before.items():
            if name in now and now[name].shape == tensor.shape:
                now[name].detach().copy_(tensor)
        raise


def loads_by_itself(model: nn.Module) -> bool:
    """Whether a part of the model takes its weights by code that is not torch's: that may fail halfway."""
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__module__.partition(".")[0] in ("torch", "minikeras", "builtins"):
                continue
            if any("load_from_state" in name or name in OWN_WAYS for name in vars(kind)):
                return True
        for name, hooks in vars(module).items():
            ours = (
                1 if hasattr(type(module), "compute_outputs") else 0
            )  # a Model has that of `under_plain_names`
            if "load_state_dict" in name and len(hooks) > ours:
                return True
    return False


def check_weights(
    model: nn.Module, state: Any, path: Path, remedy: Callable[[Path], str] = remedy_of_load
) -> None:
    """A state_dict must have the model's keys and shapes, and tensors that its own can take.

    Raises:
        CheckpointError: it has others; the message names them.
    """
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__} and not a model's weights. {remedy(path)}"
        )
    own = model.state_dict()
    shapes = {
        key: tuple(value.shape)
        for key, value in own.items()
        if isinstance(value, Tensor) and not is_lazy(value)
    }
    given = {key: shape_of(value) for key, value in state.items() if isinstance(value, Tensor)}
    differing = [key for key in shapes if given.get(key, shapes[key]) != shapes[key]]
    late = late_buffers(model, state)
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own and key not in late],
        "of another shape": [f"{key} {given[key]} instead of {shapes[key]}" for key in differing],
    }
    told = [
        f"{what}: {', '.join(keys[:5])}{', ...' * (len(keys) > 5)}"
        for what, keys in problems.items()
        if keys
    ]
    if told:
        raise CheckpointError(
            f"{path} holds the weights of another architecture than {type(model).__name__}: "
            f"{'; '.join(told)}. "
            f"{under_other_names(own, state) or 'Build the model as it was when the file was written.'} "
            f"{remedy(path)}"
        )
    for key, value in own.items():
        problem = misfit(value, state[key])
        if problem:
            raise CheckpointError(f"{path} cannot be taken: {key} is {problem}. {remedy(path)}")


def shape_of(tensor: Tensor) -> tuple[Any, ...]:
    return ("nested",) if tensor.is_nested else tuple(tensor.shape)


def misfit(own: Any, given: Any) -> str:
    """Why a value of a file cannot be put into the model's own, in words; '' if it can.

    >>> misfit(torch.zeros(1), torch.ones(1, dtype=torch.int8))
    'int8 and the model has float32: convert it with .to(torch.float32)'
    """
    if not isinstance(own, Tensor):
        return (
            ""
            if not isinstance(given, Tensor) or own is not None
            else "a tensor, and the model has none there"
        )
    if not isinstance(given, Tensor):
        return f"a {type(given).__name__} and not a tensor"
    if (
        given.layout != own.layout
        or given.is_quantized != own.is_quantized
        or given.is_nested != own.is_nested
    ):
        kind = "quantized" if given.is_quantized else str(given.layout).removeprefix("torch.")
        return f"a tensor of another layout, {kind}"
    if given.is_meta and not own.is_meta:
        return "a tensor without data"
    if given.dtype == own.dtype or own.is_quantized:
        return ""
    remedy = f"convert it with .to({own.dtype})"
    told = f"{dtype_name(given)} and the model has {dtype_name(own)}: {remedy}"
    if own.is_complex():
        return "" if given.is_complex() or given.is_floating_point() else told
    if own.is_floating_point():
        if not given.is_floating_point():
            return told
        return (
            "beyond the range of the model's " + dtype_name(own)
            if overflows(given, own.dtype)
            else ""
        )
    if given.is_complex() or not torch.equal(given.to(own.dtype).to(given.dtype), given):
        return told
    return ""


def overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a finite number becomes infinite in another dtype."""
    if tensor.layout != torch.strided or is_part(tensor):
        return False
    if torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return False
    return bool((tensor.isfinite() & ~tensor.to(dtype).isfinite()).any())


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


# --- safetensors, which has no checksum of its own: one goes into its metadata ---


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            ".safetensors files need a package: pip install safetensors"
        ) from error
    return safetensors


def _dump_safetensors(state: dict[str, Any]) -> Any:
    package = _safetensors()
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise TypeError(
            f"a .safetensors file holds tensors alone, and the model's state has {others[0]}. Save "
            "to .pt."
        )
    whole = {
        key: value.cpu().contiguous().clone() for key, value in state.items()
    }  # it refuses tied ones

    def save(path: Path) -> None:
        package.torch.save_file(whole, path, metadata={"format": "pt", "sha256": _checksum(whole)})

    return save


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    package = _safetensors()
    refuse_special_file(path)
    try:
        with package.safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
            checksum = (file.metadata() or {}).get("sha256")
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or is no safetensors file: {error}. {remedy(path)}"
        ) from error
    if checksum not in (None, _checksum(state)):
        raise CheckpointError(
            f"{path} is damaged: its tensors do not match its checksum. {remedy(path)}"
        )
    return state


def _checksum(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(f"{key} {state[key].dtype} {tuple(state[key].shape)}".encode())
        digest.update(state[key].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- names ---


def under_plain_names(model: nn.Module) -> None:
    """From now on `Model(torch.compile(net))` saves and loads under the names of `Model(net)`."""
    model.register_state_dict_post_hook(_drop_compiled_names)
    model.register_load_state_dict_pre_hook(_add_compiled_names)


def _drop_compiled_names(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    for name in [name for name in state if name.startswith(prefix) and COMPILED in name]:
        state[name.replace(COMPILED, "")] = state.pop(name)


def _add_compiled_names(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for wrapper, _ in module.named_modules(prefix=prefix.rstrip(".")):
        if f"{wrapper}.".endswith("." + COMPILED):
            outer = wrapper[: -len(COMPILED)] + "."
            for name in [
                name for name in state if name.startswith(outer) and not name.startswith(wrapper)
            ]:
                state[wrapper + name[len(outer) - 1 :]] = state.pop(name)
