"""Save weights to a file, .pt as with torch.save or .safetensors, and load them."""

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

from minikeras.checkpoint.background import wait_for_writes
from minikeras.checkpoint.file import dump, read_newest, refuse_special_file, remedy, remedy_of_load
from minikeras.checkpoint.folder import reader
from minikeras.checkpoint.plain import plain
from minikeras.compiled_names import COMPILED
from minikeras.errors import CheckpointError, dtype_name
from minikeras.nests import is_sharded
from minikeras.processes import OneProcess
from minikeras.support.atomic import write
from minikeras.support.sharded_tensors import load_whole, whole

RUN = "minikeras"  # the key of the version number in a run's state
LOADERS = ("load_state_dict", "set_extra_state")  # methods by which a module loads its weights


def save_weights(model: nn.Module, path: Path, world: OneProcess, keep: bool = True) -> None:
    """Save the model's state_dict atomically.

    With several processes all of them call it, and none returns before the file is complete.

    Args:
        keep: whether an existing file becomes NAME.prev.
    """
    state = weights_of(model)
    for key, value in state.items():
        state[key] = whole(value)  # all processes gather it

    def save() -> None:
        save_state = _dump_safetensors if path.suffix == ".safetensors" else dump
        write(path, save_state(state), keep=keep)

    world.by_main(save)


def weights_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's state_dict with plain values."""
    state: dict[str, Any] = module.state_dict()
    for key, value in state.items():  # in place: torch keeps version numbers next to the items
        state[key] = plain(value, f"{key} in the state_dict of {type(module).__name__}")
    return state


def plain_name(name: str) -> str:
    """Remove what torch.compile puts into a name.

    >>> plain_name("net._orig_mod.weight")
    'net.weight'
    """
    return name.replace(COMPILED, "")


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Collect all buffers by their plain names, including those that are not in a state_dict."""
    return {plain_name(name): buffer for name, buffer in model.named_buffers()}


def set_buffers(model: nn.Module, buffers: Mapping[str, Tensor], device: torch.device) -> None:
    """Fill buffers, including those that are not in a state_dict.

    A buffer that is None or has another shape is replaced.
    """
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
        elif getattr(module, last, None) is None:  # set by the first batch
            with contextlib.suppress(KeyError):  # an attribute that is None and no buffer
                module.register_buffer(last, value.to(device), persistent=False)


def late_buffers(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Collect the values of a state_dict for late buffers: None until the model's first batch."""
    own = model.state_dict()
    modules = {plain_name(name): module for name, module in model.named_modules()}
    late = {}
    for name, value in state.items():
        if name in own or not isinstance(value, Tensor):
            continue
        owner, _, last = plain_name(name).rpartition(".")
        module = modules.get(owner)
        if module is not None and is_empty_buffer(module, last):
            late[name] = value
    return late


def is_empty_buffer(module: nn.Module, name: str) -> bool:
    """Tell whether a module has registered a buffer of this name as None.

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
        setattr(module, name, torch.empty(0))  # named_buffers leaves out buffers that are None
        return name in dict(module.named_buffers(recurse=False))
    except TypeError:  # a parameter that is None
        return False
    finally:
        setattr(module, name, None)


def fill_late_buffers(
    model: nn.Module, buffers: Mapping[str, Tensor], device: torch.device
) -> None:
    """Set late buffers of the model, as its first batch would."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    for name, value in buffers.items():
        owner, _, last = plain_name(name).rpartition(".")
        setattr(modules[owner], last, value.detach().clone().to(device))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def frozen(model: nn.Module) -> list[str]:
    """Name the parameters that are not trained."""
    names = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            names.append(plain_name(name))
    return names


def freeze(model: nn.Module, names: list[str] | None) -> None:
    """Freeze these parameters and train all others; None changes nothing."""
    if names is not None:
        plain_names = {plain_name(name) for name in names}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(plain_name(name) not in plain_names)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights from a file into the model; if they do not fit, change nothing."""
    read_state = _read_safetensors if path.suffix == ".safetensors" else reader(model)
    wait_for_writes()  # of a fit in whose callback the weights are loaded
    value_and_path = read_newest(path, read_state)
    if value_and_path is None:
        raise FileNotFoundError(
            f"there is no file {path}. Pass the path of a file that model.save wrote."
        )
    state, read_from = value_and_path
    if isinstance(state, dict) and RUN in state and "model" in state:  # the state of a run
        state = state["model"]
    state = under_own_names(model, state)
    check_weights(model, state, read_from)
    try:
        late = late_buffers(model, state)
        with all_or_nothing(model, late):
            fill_late_buffers(model, late, device_of(model))
            load_whole(model, state)
    except Exception as error:  # raised by a hook or a method of the model
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{read_from} could not be loaded into {type(model).__name__}: {first} The model is "
            f"unchanged. {remedy_of_load(path)}"
        ) from error


def under_own_names(model: nn.Module, state: Any) -> Any:
    """Rename a state_dict's keys to those of the model.

    Names of torch.compile's wrappers are removed. Some files have only one name of tied weights:
    the other name is added, as the model ties them.
    """
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        return state
    own = model.state_dict()
    if any(COMPILED in key for key in state) and not any(COMPILED in key for key in own):
        state = remove_compiled_names(state, own)
    missing = [key for key in own if key not in state and isinstance(own[key], Tensor)]
    if missing and not any(is_lazy(value) or is_sharded(value) for value in own.values()):
        state = copy.copy(state)
        for key in missing:
            other = find_tied_name(key, own, state)
            if other is not None:
                state[key] = state[other]
    return state


def remove_compiled_names(state: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Give a state_dict plain names; those of a compiled network become those of its Model."""
    plain_names = {key: plain_name(key) for key in state}
    if len(set(plain_names.values())) < len(plain_names):
        return state
    if all(key.startswith(COMPILED) for key in state):
        for first in {key.partition(".")[0] for key in own}:
            wrapped = {key: f"{first}.{name}" for key, name in plain_names.items()}
            if set(wrapped.values()) == set(own):
                plain_names = wrapped
                break
    renamed = copy.copy(state)  # with the version numbers that torch keeps next to the items
    renamed.clear()
    for key, value in state.items():
        renamed[plain_names[key]] = value
    return renamed


def find_tied_name(key: str, own: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
    """Find another name in `state` of the tensor that the model has under `key`."""
    tensor = own[key]
    if not tensor.numel():
        return None
    for other, value in own.items():
        if other in state and isinstance(value, Tensor) and is_same_tensor(tensor, value):
            return other
    return None


def is_same_tensor(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors are one: the same elements in memory."""
    if first.layout != torch.strided or second.layout != torch.strided:
        return first is second
    if first.shape != second.shape or first.stride() != second.stride():
        return False
    if first.dtype != second.dtype or first.device != second.device:
        return False
    return first.data_ptr() == second.data_ptr()


@contextlib.contextmanager
def all_or_nothing(model: nn.Module, late: Mapping[str, Tensor]) -> Iterator[None]:
    """Restore the tensors of a model after an error; `late` buffers become None again.

    The tensors are copied only if loading can fail halfway.
    """
    before: dict[str, Tensor] = {}
    if has_custom_loading(model):
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not is_lazy(tensor):
                before[name] = tensor.detach().clone()
    try:
        yield
    except BaseException:
        modules = {plain_name(name): module for name, module in model.named_modules()}
        for name in late:
            owner, _, last = plain_name(name).rpartition(".")
            setattr(modules[owner], last, None)
        now = dict([*model.named_parameters(), *model.named_buffers()])
        for name, tensor in before.items():
            if name in now and now[name].shape == tensor.shape:
                now[name].detach().copy_(tensor)
        raise


def has_custom_loading(model: nn.Module) -> bool:
    """Tell whether a part of the model loads its weights by code other than torch's.

    Such code may fail halfway.
    """
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__module__.partition(".")[0] in ("torch", "minikeras", "builtins"):
                continue
            if any("load_from_state" in name or name in LOADERS for name in vars(kind)):
                return True
        own_hooks = 0
        if hasattr(type(module), "compute_outputs"):
            own_hooks = 1  # a Model has the hook of `under_plain_names`
        for name, hooks in vars(module).items():
            if "load_state_dict" in name and len(hooks) > own_hooks:
                return True
    return False


def check_weights(
    model: nn.Module, state: Any, path: Path, remedy: Callable[[Path], str] = remedy_of_load
) -> None:
    """Check that a state_dict has the model's keys and shapes, and values that fit its dtypes.

    Raises:
        CheckpointError: it does not; the message names the keys.
    """
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(
            f"{path} contains a {type(state).__name__}, not the weights of a model. {remedy(path)}"
        )
    own = model.state_dict()
    late = late_buffers(model, state)
    other_shapes = []
    for key, value in own.items():
        given = state.get(key)
        if isinstance(value, Tensor) and not is_lazy(value) and isinstance(given, Tensor):
            shape = tuple(value.shape)
            given_shape = shape_of(given)
            if given_shape != shape:
                other_shapes.append(f"{key} {given_shape} instead of {shape}")
    differences = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own and key not in late],
        "of another shape": other_shapes,
    }
    problems = []
    for what, keys in differences.items():
        if keys:
            more = ", ..." if len(keys) > 5 else ""
            problems.append(f"{what}: {', '.join(keys[:5])}{more}")
    if problems:
        hint = explain_names(own, state)
        if not hint:
            hint = "Build the model as it was when the file was written."
        raise CheckpointError(
            f"{path} holds the weights of another architecture than {type(model).__name__}: "
            f"{'; '.join(problems)}. {hint} {remedy(path)}"
        )
    for key, value in own.items():
        problem = misfit(value, state[key])
        if problem:
            raise CheckpointError(f"{path} cannot be loaded: {key} is {problem}. {remedy(path)}")


def shape_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return a tensor's shape; a nested tensor has none."""
    return ("nested",) if tensor.is_nested else tuple(tensor.shape)


def misfit(own: Any, given: Any) -> str:
    """Say why the model's value cannot hold a value of a file; "" if it can.

    >>> misfit(torch.zeros(1), torch.ones(1, dtype=torch.int8))
    'int8 and the model has float32: convert it with .to(torch.float32)'
    """
    if own is None and isinstance(given, Tensor):
        return "a tensor, and the model has no tensor of that name"
    if not isinstance(own, Tensor):
        return ""
    if not isinstance(given, Tensor):
        return f"a {type(given).__name__}, not a tensor"
    same_layout = given.layout == own.layout and given.is_nested == own.is_nested
    if not same_layout or given.is_quantized != own.is_quantized:
        kind = "quantized" if given.is_quantized else str(given.layout).removeprefix("torch.")
        return f"a tensor of another layout, {kind}"
    if given.is_meta and not own.is_meta:
        return "a tensor without data"
    if given.dtype == own.dtype or own.is_quantized:
        return ""
    remedy = f"convert it with .to({own.dtype})"
    other_dtype = f"{dtype_name(given)} and the model has {dtype_name(own)}: {remedy}"
    if own.is_complex():
        return "" if given.is_complex() or given.is_floating_point() else other_dtype
    if own.is_floating_point():
        if not given.is_floating_point():
            return other_dtype
        if overflows(given, own.dtype):
            return f"beyond the range of the model's {dtype_name(own)}"
        return ""
    if given.is_complex() or not torch.equal(given.to(own.dtype).to(given.dtype), given):
        return other_dtype
    return ""


def overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a finite number becomes infinite in another dtype."""
    if tensor.layout != torch.strided or is_sharded(tensor):
        return False
    if torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max:
        return False
    return bool((tensor.isfinite() & ~tensor.to(dtype).isfinite()).any())


def explain_names(own: dict[str, Any], state: dict[str, Any]) -> str:
    """Say what to call if the names fit a part of the model, or a part of the file fits; else "".

    >>> explain_names({"net.weight": 0}, {"weight": 0})
    'The keys are those of model.net: load them with model.net.load_state_dict(...).'
    """
    for part in {key.partition(".")[0] for key in own}:
        if {f"{part}.{key}" for key in state} == set(own):
            return (
                f"The keys are those of model.{part}: load them with "
                f"model.{part}.load_state_dict(...)."
            )
    for first in {key.partition(".")[0] for key in state}:
        if {f"{first}.{key}" for key in own} == set(state):
            return (
                f'Each key has the prefix "{first}.", which the keys of the model do not have: '
                "save them without it."
            )
    for key, value in state.items():
        if isinstance(value, dict) and set(value) == set(own):
            return (
                f'The weights are under the key "{key}": call '
                f'model.load_state_dict(torch.load(...)["{key}"]).'
            )
    return ""


# --- safetensors, which has no checksum: one goes into its metadata ---


def _import_safetensors() -> Any:
    """Import safetensors, or say how to install it."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            ".safetensors files need a package: pip install safetensors"
        ) from error
    return safetensors


def _dump_safetensors(state: dict[str, Any]) -> Callable[[Path], None]:
    """Return a function that writes a state_dict to a .safetensors file."""
    package = _import_safetensors()
    tensors = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"a .safetensors file holds only tensors, and the model's state_dict has {key}. "
                "Save to a .pt file."
            )
        # safetensors refuses tied tensors, so each is copied.
        tensors[key] = value.cpu().contiguous().clone()

    def save(path: Path) -> None:
        metadata = {"format": "pt", "sha256": _checksum(tensors)}
        package.torch.save_file(tensors, path, metadata=metadata)

    return save


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file and check it against its checksum, if it has one."""
    package = _import_safetensors()
    refuse_special_file(path)
    try:
        with package.safe_open(path, framework="pt") as file:
            keys = file.keys()
            state = {key: file.get_tensor(key) for key in keys}
            checksum = (file.metadata() or {}).get("sha256")
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file: {error}. {remedy(path)}"
        ) from error
    if checksum not in (None, _checksum(state)):
        raise CheckpointError(
            f"{path} is damaged: its tensors do not match its checksum. {remedy(path)}"
        )
    return state


def _checksum(state: dict[str, Tensor]) -> str:
    """Compute the SHA-256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(f"{key} {state[key].dtype} {tuple(state[key].shape)}".encode())
        digest.update(state[key].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
