"""Export a model as a program that runs without its code, for any number of rows.

export
    copy the model to the CPU, in eval mode
    trace it with the example, as forward takes it; the first size of each tensor stays dynamic
    .pt2     torch.export.save
    .onnx    torch.onnx.export, with the user's names for inputs and outputs
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from minikeras.batch import choose_call, to_device
from minikeras.errors import describe
from minikeras.nests import is_sharded, leaves, map_leaves, take_apart
from minikeras.processes import OneProcess
from minikeras.rows import first_size
from minikeras.support.atomic import write
from minikeras.support.paths import user_path

if TYPE_CHECKING:
    from minikeras.model import Model

STACK_TRACE = "pkg.torch.onnx.stack_trace"  # the key of a node's lines of source code
# bytes of weights; protobuf cannot hold more, and they are written to NAME.data instead
ONE_FILE = 2**31 - 2**24


def export(model: Model, path: str | Path, example: Any) -> None:
    """Write the model as a program that runs without its code, for any number of rows.

    The file contains `forward` in eval mode and in float32, with the weights on the CPU. The model
    is not changed. Its hooks are called during tracing, so what they change is in the file.

    Args:
        model: a Model, compiled or not.
        path: NAME.pt2 for torch.export.load, or NAME.onnx (pip install onnx onnxscript). The inputs
            of an .onnx file have the names of forward's arguments. Its outputs have the keys of a
            dict as names, otherwise output, output_1, ... The folder is created. With several
            processes all must make the call; rank 0 writes.
        example: features as `predict` passes them to forward, one row or more: a tensor, or a tuple
            or dict of tensors.

    Raises:
        ValueError: another file ending; sharded or uninitialized parameters; a forward that depends
            on values, or on the number of rows; an example that a layer cannot take, as in
            `predict`; for .onnx, two tensors with the same name.
        TypeError: an example without a tensor of rows; for .onnx, outputs that are not tensors.
        ModuleNotFoundError: for .onnx, one of its packages is missing.

    >>> import minikeras, tempfile
    >>> path = tempfile.mkdtemp() + "/model.pt2"
    >>> minikeras.Model(nn.Linear(2, 1)).export(path, torch.zeros(1, 2))
    >>> torch.export.load(path).module()(torch.zeros(5, 2)).shape
    torch.Size([5, 1])
    """
    path = user_path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(
            f"path must end in .pt2 or .onnx, got {str(path)!r}. Take .pt2 for torch.export.load, "
            f".onnx for other runtimes."
        )
    if path.suffix == ".onnx":
        _check_packages()
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "export needs whole parameters, and this process holds one part of each. "
            "Write them with model.save, load them into a new model, and export that."
        )
    if any(map(is_lazy, model.parameters())):
        raise ValueError(
            "export needs weights, and the model has lazy layers without any yet. Fit it, or call "
            "it once on a batch."
        )
    world = OneProcess() if model._run is None else model._run.world
    with world.verb("export"):
        world.meet(model)
        world.by_main(lambda: _write(model, path, example))


def _write(model: Model, path: Path, example: Any) -> None:
    twin = give_names(copy_model(model).cpu().eval())
    args, kwargs = arguments_for(twin, at_least_two_rows(example))
    with exporter_silenced(), torch.no_grad():
        # deep copies, since a layer may work in place
        outputs = run_example(twin, *copy.deepcopy((args, kwargs)))
        program = trace(twin, args, kwargs)
        if path.suffix == ".onnx":
            write_file = _to_onnx(program, twin, (args, kwargs), outputs)
        else:
            write_file = _to_pt2(program)
        write_file(path)


def copy_model(model: Model) -> Model:
    """Deep-copy the model.

    Tensors that a forward has stored, such as attention weights, are copied without their graph,
    which deepcopy refuses.
    """
    copies: dict[int, Any] = {}  # for deepcopy: id -> the copy to use
    for module in model.modules():
        for leaf in leaves(list(vars(module).values())):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                copies[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(model, copies)


def run_example(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the outputs for the example; if it does not fit, torch's error in the user's words."""
    try:
        # copies of the buffers, since a forward may count in them
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return functional_call(model, buffers, args, kwargs)
    except Exception as error:
        model._explanations().explain_forward(error, model, args[0] if args else kwargs)
        raise


# --- the example ----------------------------------------------------------------------------------


def at_least_two_rows(example: Any) -> Any:
    """Return the example as tensors on the CPU, with two rows or more.

    A single row is repeated, since torch treats a size of 1 as fixed.
    """
    example = to_device(example, torch.device("cpu"))
    if not any(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) for leaf in leaves(example)):
        raise TypeError(
            f"example must be a batch of features as forward takes it, one row or more, got "
            f"{describe(example)}. Pass tensors or arrays, X[:2]; of a DataFrame "
            f"X[:2].to_numpy('float32')."
        )
    if first_size(example) > 1:
        return example
    return map_leaves(lambda leaf: torch.cat([leaf, leaf]) if has_rows(leaf, 1) else leaf, example)


def has_rows(leaf: Any, rows: int) -> bool:
    """Tell whether a leaf is a tensor of this many rows."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.size(0) == rows


def arguments_for(model: nn.Module, features: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that forward is called with, names in the order of its signature."""
    how = choose_call(model, features)
    if how == "by name":
        bound = inspect.signature(model.forward).bind(**features).arguments
        ordered = {}
        for name in bound:
            if name in features:
                ordered[name] = features[name]
        return (), ordered | dict(features)
    if how == "unpacked":
        return tuple(features), {}
    return (features,), {}


def give_names(model: nn.Module) -> nn.Module:
    """Give a forward(*args, **kwargs) the signature of the forward that it wraps.

    Without names torch keeps no size dynamic, and the inputs of a file are called by them.
    """
    inner = find_named(model)
    forward = model.forward
    if inner is not model:

        def named_forward(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        signature = inspect.signature(inner.forward)
        named_forward.__signature__ = signature  # type: ignore[attr-defined]
        model.forward = named_forward
    return model


def find_named(model: nn.Module) -> nn.Module:
    """Return the module whose forward names its arguments: this one, or the one it wraps."""
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    children = list(model.children())
    nameless = kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return find_named(children[0]) if nameless and len(children) == 1 else model


# --- the program ----------------------------------------------------------------------------------


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Trace forward with torch.export; the number of rows stays dynamic."""
    rows = first_size((args, kwargs))
    batch = torch.export.Dim("batch")
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = map_leaves(lambda leaf: {0: batch} if has_rows(leaf, rows) else None, dict(bound))
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be exported for any number of rows: "
            f"{str(error).splitlines()[0]} "
            f"Its forward must go the same way whatever the values and the number of rows: "
            f"torch.where for an if, x.flatten(1) for a reshape to the example's size."
        ) from error
    remove_sources(program)
    return program


def remove_sources(program: Any) -> None:
    """Remove the lines and files of source code from a program, since its file is handed on."""
    for module in program.graph_module.modules():
        graph = getattr(module, "graph", None)
        if graph is not None:
            for node in graph.nodes:
                node.meta.pop("stack_trace", None)


def remove_sources_of_onnx(graph: Any) -> None:
    """Remove the source code from an ONNX graph and the graphs inside its nodes.

    The translation to ONNX has added lines of torch's own code.
    """
    for node in graph:
        node.metadata_props.pop(STACK_TRACE, None)
        node.doc_string = None
        for attribute in node.attributes.values():
            inner = attribute.value
            for part in inner if isinstance(inner, (list, tuple)) else [inner]:
                if hasattr(part, "initializers"):
                    remove_sources_of_onnx(part)


def _to_pt2(program: Any) -> Callable[[Path], None]:
    """Return the function that writes the .pt2 file to a path."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return partial(_write_bytes, buffer.getvalue())


def _to_onnx(
    program: Any, model: nn.Module, arguments: tuple[Any, Any], outputs: Any
) -> Callable[[Path], None]:
    """Translate a program to ONNX, and return the function that writes the file to a path."""
    args, kwargs = arguments
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    input_names = names_of(dict(bound))
    output_names = []
    for name in names_of(outputs, "output"):
        output_names.append(f"{name}_out" if name in input_names else name)
    _check_onnx(outputs, input_names + output_names)
    rows = first_size(arguments)
    shapes: Any = []
    for leaf in leaves(arguments):
        if isinstance(leaf, Tensor):
            shapes.append({0: "batch"} if has_rows(leaf, rows) else None)
    translated = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=input_names,
        output_names=output_names,
        dynamic_shapes=shapes,
    )
    assert translated is not None
    for graph in (translated.model.graph, *translated.model.functions.values()):
        remove_sources_of_onnx(graph)
    size = 0
    for value in model.state_dict().values():
        if isinstance(value, Tensor):
            size += value.nbytes
    if size > ONE_FILE:
        return partial(_write_two_files, translated)
    return partial(_write_bytes, translated.model_proto.SerializeToString())


def _check_onnx(outputs: Any, names: list[str]) -> None:
    """Refuse what an .onnx file cannot hold."""
    if any(isinstance(leaf, (int, float, str)) for leaf in leaves(outputs)):
        raise TypeError(
            f"forward returned {describe(outputs)}, and an .onnx file holds tensors alone. "
            f"Return no others, or take .pt2."
        )
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(
            f"two tensors would be called {repeated[0]!r} in the .onnx file: a name is the keys on "
            f"the way to a tensor, joined by _, and an output with the name of an input gets _out. "
            f"Rename one of the keys."
        )


def _write_bytes(content: bytes, path: Path) -> None:
    def put(new: Path) -> None:
        new.write_bytes(content)

    write(path, put, keep=False)


def _write_two_files(program: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=True)


def names_of(nest: Any, name: str = "") -> list[str]:
    """Return a name for each tensor of a nest, made of the keys and numbers on the way to it.

    >>> names_of({"x": torch.zeros(1), "more": (torch.zeros(1), torch.zeros(1))})
    ['x', 'more_0', 'more_1']
    """
    inner = take_apart(nest)
    if inner is None:
        return [name] if isinstance(nest, Tensor) else []
    keys = list(nest) if isinstance(nest, dict) else range(len(inner[0]))
    names = []
    for key, part in zip(keys, inner[0], strict=True):
        names += names_of(part, _join_names(name, key))
    return names


def _join_names(name: str, key: Any) -> str:
    if not name or (name == "output" and isinstance(key, str)):
        return str(key)
    return f"{name}_{key}"


# --- packages and messages ------------------------------------------------------------------------


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            ".onnx files need two packages: pip install onnx onnxscript"
        ) from error


@contextlib.contextmanager
def exporter_silenced() -> Iterator[None]:
    """Silence torch's exporter about itself; warnings about the model are shown."""
    logger = logging.getLogger("torch.onnx")  # logs operators of packages that are not installed
    level = logger.level
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"torch\.|copyreg")
        # nn.LSTM
        warnings.filterwarnings(
            "ignore", message=r"The tensor attributes? (\S*\._flat_weights\[\d+\],? )+w"
        )
        warnings.filterwarnings("ignore", message="# The axis name: batch will not be used")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
