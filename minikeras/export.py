"""What happens to an export: a copy of the model in eval mode on the CPU, traced for any number of rows, in a file.

export
    the example as forward takes it, each tensor's first size left open
    .pt2     torch.export.save
    .onnx    torch.onnx.export, under the user's names for inputs and outputs
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

from minikeras.batch import manner, to_device
from minikeras.errors import described
from minikeras.nests import is_sharded, leaves, map_leaves, parts
from minikeras.processes import OneProcess
from minikeras.rows import first_size
from minikeras.support.atomic import write
from minikeras.support.paths import user_path

if TYPE_CHECKING:
    from minikeras.model import Model

STACK_TRACE = "pkg.torch.onnx.stack_trace"  # the key of a node's lines of source code
ONE_FILE = (
    2**31 - 2**24
)  # bytes of weights; beyond it protobuf cannot hold them, and they lie in NAME.data


def export(model: Model, path: str | Path, example: Any) -> None:
    """Write the model as a program that runs without its code, for any number of rows.

    What is written is `forward` in eval mode and in float32, weights on the CPU. The model stays as it is; its hooks
    are called while it is traced, and what they change is in the file.

    Args:
        model: a Model, compiled or not.
        path: NAME.pt2 for torch.export.load, or NAME.onnx (pip install onnx onnxscript), whose inputs have the names
            of forward's arguments, and its outputs those of a dict's keys, else output, output_1, ... Its folder is
            made. Several processes all make the call; rank 0 writes.
        example: features as `predict` gives them to forward, one row or more: a tensor, or a tuple or dict of them.

    Raises:
        ValueError: another ending; parameters in parts, or none yet; a forward that goes by values, or by the number
            of rows; an example that a layer cannot take, as in `predict`; for .onnx, two tensors of one name.
        TypeError: an example without a tensor of rows; for .onnx, outputs that are no tensors.
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
            f"path must end in .pt2 or .onnx, got {str(path)!r}. Take .pt2 for torch.export.load, .onnx for other "
            f"runtimes."
        )
    if path.suffix == ".onnx":
        _needed()
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "export needs whole parameters, and this process holds one part of each. "
            "Write them with model.save, load them into a new model, and export that."
        )
    if any(map(is_lazy, model.parameters())):
        raise ValueError(
            "export needs weights, and the model has lazy layers without any yet. Fit it, or call it once on a batch."
        )
    world = OneProcess() if model._run is None else model._run.world
    world.by_main(lambda: _write(model, path, example))


def _write(model: Model, path: Path, example: Any) -> None:
    twin = with_names(copied(model).cpu().eval())
    args, kwargs = arguments(twin, two_rows(example))
    with of_torch_alone(), torch.no_grad():
        outputs = outputs_of(twin, *copy.deepcopy((args, kwargs)))  # a layer may work in place
        program = traced(twin, args, kwargs)
        dump = (
            _onnx(program, twin, (args, kwargs), outputs)
            if path.suffix == ".onnx"
            else _pt2(program)
        )
        dump(path)


def copied(model: Model) -> Model:
    """A copy of the model; what a forward has kept, such as attention weights, comes without the graph that deepcopy
    refuses."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    kept = [leaf for leaf in leaves(attributes) if isinstance(leaf, Tensor) and not leaf.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in kept})


def outputs_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The outputs for the example; where it is wrong, torch's error in the user's words."""
    try:
        buffers = {
            name: buffer.clone() for name, buffer in model.named_buffers()
        }  # a forward may count in them
        return functional_call(model, buffers, args, kwargs)
    except Exception as error:
        model._explanations().explain_forward(error, model, args[0] if args else kwargs)
        raise


# --- the example ------------------------------------------------------------------------------------------------------


def two_rows(example: Any) -> Any:
    """The example as tensors on the CPU; a single row comes twice, since torch takes a size of 1 for a fixed one."""
    example = to_device(example, torch.device("cpu"))
    if not any(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) for leaf in leaves(example)):
        raise TypeError(
            f"example must be a batch of features as forward takes it, one row or more, got {described(example)}. "
            f"Pass tensors or arrays, X[:2]; of a DataFrame X[:2].to_numpy('float32')."
        )
    if first_size(example) > 1:
        return example
    return map_leaves(lambda leaf: torch.cat([leaf, leaf]) if has_rows(leaf, 1) else leaf, example)


def has_rows(leaf: Any, rows: int) -> bool:
    """Whether a leaf is a tensor of so many rows."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.size(0) == rows


def arguments(model: nn.Module, features: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What forward is called with, names in the order in which it has them."""
    how = manner(model, features)
    if how == "by name":
        order = list(inspect.signature(model.forward).bind(**features).arguments)
        return (), {name: features[name] for name in order if name in features} | dict(features)
    return (tuple(features) if how == "unpacked" else (features,)), {}


def with_names(model: nn.Module) -> nn.Module:
    """The model, its forward(*args, **kwargs) under the signature of what it wraps: torch leaves no size open in one
    that has no names, and a file's inputs are called by them."""
    inner, forward = named(model), model.forward
    if inner is not model:

        def called(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        called.__signature__ = inspect.signature(inner.forward)  # type: ignore[attr-defined]
        model.forward = called
    return model


def named(model: nn.Module) -> nn.Module:
    """The module whose forward has names for its arguments: the wrapped one, where there is one."""
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    inner = list(model.children())
    nameless = kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return named(inner[0]) if nameless and len(inner) == 1 else model


# --- the program ------------------------------------------------------------------------------------------------------


def traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch's program of forward, the number of rows left open."""
    rows, batch = first_size((args, kwargs)), torch.export.Dim("batch")
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes = map_leaves(lambda leaf: {0: batch} if has_rows(leaf, rows) else None, dict(given))
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be exported for any number of rows: {str(error).splitlines()[0]} "
            f"Its forward must go the same way whatever the values and the number of rows: "
            f"torch.where for an if, x.flatten(1) for a reshape to the example's size."
        ) from error
    forget_sources(program)
    return program


def forget_sources(program: Any) -> None:
    """Take the lines of source code, with their files, out of a program: a file is handed on, and they are not."""
    for module in program.graph_module.modules():
        graph = getattr(module, "graph", None)
        for node in () if graph is None else graph.nodes:
            node.meta.pop("stack_trace", None)


def forget_sources_of_onnx(graph: Any) -> None:
    """The same for a graph of ONNX and those in its nodes: translating it has added torch's own lines."""
    for node in graph:
        node.metadata_props.pop(STACK_TRACE, None)
        node.doc_string = None
        for attribute in node.attributes.values():
            inner = attribute.value
            for part in inner if isinstance(inner, (list, tuple)) else [inner]:
                if hasattr(part, "initializers"):
                    forget_sources_of_onnx(part)


def _pt2(program: Any) -> Callable[[Path], None]:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return partial(_whole, buffer.getvalue())


def _onnx(
    program: Any, model: nn.Module, given: tuple[Any, Any], outputs: Any
) -> Callable[[Path], None]:
    args, kwargs = given
    inputs = names_of(dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments))
    names = [f"{name}_out" if name in inputs else name for name in names_of(outputs, "output")]
    _check_onnx(outputs, inputs + names)
    rows = first_size(given)
    sizes = [
        {0: "batch"} if has_rows(leaf, rows) else None
        for leaf in leaves(given)
        if isinstance(leaf, Tensor)
    ]
    more: Any = {"input_names": inputs, "output_names": names, "dynamic_shapes": sizes}
    made = torch.onnx.export(program, dynamo=True, verbose=False, **more)
    assert made is not None
    for graph in (made.model.graph, *made.model.functions.values()):
        forget_sources_of_onnx(graph)
    if (
        sum(value.nbytes for value in model.state_dict().values() if isinstance(value, Tensor))
        > ONE_FILE
    ):
        return partial(_in_two_files, made)
    return partial(_whole, made.model_proto.SerializeToString())


def _check_onnx(outputs: Any, names: list[str]) -> None:
    """What an .onnx file cannot hold."""
    if any(isinstance(leaf, (int, float, str)) for leaf in leaves(outputs)):
        raise TypeError(
            f"forward returned {described(outputs)}, and an .onnx file holds tensors alone. Return no others, or take "
            f".pt2."
        )
    double = [name for name in names if names.count(name) > 1]
    if double:
        raise ValueError(
            f"two tensors would be called {double[0]!r} in the .onnx file: a name is the keys on the way to a tensor, "
            f"joined by _, and an output with the name of an input gets _out. Rename one of the keys."
        )


def _whole(content: bytes, path: Path) -> None:
    def put(new: Path) -> None:
        new.write_bytes(content)

    write(path, put, keep=False)


def _in_two_files(program: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=True)


def names_of(nest: Any, name: str = "") -> list[str]:
    """A name for each tensor of a nest, of the keys and numbers on the way to it.

    >>> names_of({"x": torch.zeros(1), "more": (torch.zeros(1), torch.zeros(1))})
    ['x', 'more_0', 'more_1']
    """
    inner = parts(nest)
    if inner is None:
        return [name] if isinstance(nest, Tensor) else []
    keys = list(nest) if isinstance(nest, dict) else range(len(inner[0]))
    return [
        found
        for key, part in zip(keys, inner[0], strict=True)
        for found in names_of(part, _joined(name, key))
    ]


def _joined(name: str, key: Any) -> str:
    return f"{name}_{key}" if name and (name != "output" or not isinstance(key, str)) else str(key)


# --- what it says meanwhile -------------------------------------------------------------------------------------------


def _needed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            ".onnx files need two packages: pip install onnx onnxscript"
        ) from error


@contextlib.contextmanager
def of_torch_alone() -> Iterator[None]:
    """Torch's exporter says nothing about itself; what concerns the model is heard."""
    logger = logging.getLogger("torch.onnx")  # operators of packages that are not there
    level = logger.level
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"torch\.|copyreg")
        warnings.filterwarnings(
            "ignore", message=r"The tensor attributes? (\S*\._flat_weights\[\d+\],? )+w"
        )  # nn.LSTM
        warnings.filterwarnings("ignore", message="# The axis name: batch will not be used")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
