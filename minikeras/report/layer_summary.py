"""A model's layers, output shapes and parameter counts, as a table.

    copy the model without its hooks
        (the user's model is not touched)
        a large model with every tensor on the meta device, which needs no memory
        a small model as it is, since torch imports its compiler for the meta device: a second
    run forward on such copies, with 2 rows and with 4
        (a size that differs depends on the batch)
        if meta fails: run it once more on real copies; an error there is the one to show
    make one row per layer; a parameter is counted at its first occurrence
        (so that the rows add up to the total)

The table is printed, or displayed in a notebook, and returned. The returned object shows it again,
but not in the cell or the statement that has just shown it.
"""

from __future__ import annotations

import copy
import html
import random
import sys
import textwrap
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset

from minikeras.arrays import array_to_tensor, is_array
from minikeras.batch import call_with, to_device
from minikeras.errors import ForwardError, check_positive_int, describe, find_failing_layer
from minikeras.nests import is_sharded, leaves, map_leaves, take_apart
from minikeras.rows import first_size
from minikeras.support.shown import Shown, show

MB = 1024**2  # bytes
ROWS = 2  # of a batch in the first run
MORE_ROWS = 4  # in the second; both are even, since some models pair the rows of a batch
META = torch.device("meta")
# A small model is run on real copies. The product bounds the multiply-adds, and so the time; the
# number of input elements bounds the memory of a forward that pairs each with each.
SMALL_PRODUCT = 2**30  # parameters times input elements
SMALL_INPUT = 2**15  # input elements of all rows
LAZY = "lazy"  # the note of a layer whose parameters have no shape yet
NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# attributes of a module that contain hooks
HOOK_TABLES = {
    name for name, value in vars(nn.Module()).items() if "hook" in name and isinstance(value, dict)
}
SIDES = ("left", "left", "right", "left")  # to which the columns are aligned
INDENT = "\ue000\ue000"  # stands for blanks, which tabulate would strip
Features = Callable[[torch.device, int], Any]  # device, number of rows -> arguments of forward


@dataclass(frozen=True)
class LayerRow:
    """One layer of the table."""

    layer: str  # dotted, as in model.named_modules(); "" is the model itself
    type: str
    depth: int  # 0 for the model itself
    # [-1, 4] for a tensor, a tuple or dict of such lists, None if the layer returned nothing
    output_shape: Any
    # elements of the layer's own parameters, neither of layers inside it nor of a row above
    params: int
    trainable_params: int
    note: str  # "frozen", "tied to fc1.weight", "called 2 times", ...


@dataclass(frozen=True, repr=False)
class Summary(Shown):
    """The rows and the totals of a model; shown as a table.

    `summary` has shown it already, so the same cell of a notebook or the same statement at a prompt
    does not show it again.
    """

    model: str  # its class
    rows: list[LayerRow]
    total_params: int
    trainable_params: int
    params_bytes: int
    batch: int  # number of rows that the next three fields are for
    input_bytes: int | None  # None if the model could not be run
    output_bytes: int | None  # of all layers, each tensor once
    # in matrix products, convolutions and attention; None if they cannot be counted
    multiply_adds: int | None
    note: str  # what was done differently and why, in one line, or ""

    @property
    def non_trainable_params(self) -> int:
        """The number of elements of the frozen parameters."""
        return self.total_params - self.trainable_params

    def to_dataframe(self) -> pd.DataFrame:
        """Return a DataFrame with one row per layer and the fields of `LayerRow` as columns."""
        return pd.DataFrame([vars(row) for row in self.rows])

    def __str__(self) -> str:
        table = _table(self.rows)
        return f"{table}\n{'-' * max(map(len, table.splitlines()))}\n{self.totals()}"

    def _repr_html_(self) -> str:
        return f"{_table_html(self.rows)}\n<pre>{html.escape(self.totals())}</pre>"

    def totals(self) -> str:
        """Return the lines below the table."""
        rows = "1 row" if self.batch == 1 else f"{self.batch} rows"
        lines = [
            f"Total params: {self.total_params:,}",
            f"Trainable params: {self.trainable_params:,}",
            f"Non-trainable params: {self.non_trainable_params:,}",
            f"Params size (MB): {self.params_bytes / MB:,.6f}",
        ]
        if self.input_bytes is not None:
            lines.append(f"Input size (MB), {rows}: {self.input_bytes / MB:,.6f}")
        if self.output_bytes is not None:
            lines.append(f"Outputs size (MB), {rows}: {self.output_bytes / MB:,.6f}")
        if self.multiply_adds is not None:
            lines.append(f"Multiply-adds, {rows}: {self.multiply_adds:,}")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


def _table(rows: list[LayerRow]) -> str:
    """Return the rows as plain text."""
    head, cells = _cells(rows)
    for row, line in zip(rows, cells, strict=True):
        line[0] = INDENT * row.depth + line[0]
    text = tabulate(cells, head, disable_numparse=True, colalign=SIDES[: len(head)])
    return text.replace(INDENT[0], " ")


def _table_html(rows: list[LayerRow]) -> str:
    """Return the rows as HTML."""
    from minikeras.report.notebook import table_html

    head, cells = _cells(rows)
    for row, line in zip(rows, cells, strict=True):
        line[:] = [html.escape(cell) for cell in line]
        line[0] = "&nbsp;&nbsp;" * row.depth + line[0]
    return table_html(head, cells, SIDES)


def _cells(rows: list[LayerRow]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the cells of the table, as text; the layers are not indented."""
    head = ["layer (type)", "output shape", "params", "note"]
    columns = 4 if any(row.note for row in rows) else 3
    cells = []
    for row in rows:
        label = label_of(row)
        if len(label) > 30:
            label = label[:27] + "..."
        shape = "" if row.output_shape is None else textwrap.fill(str(row.output_shape), 30)
        line = [label, shape, f"{row.params:,}", row.note]
        cells.append(line[:columns])
    return head[:columns], cells


def label_of(row: LayerRow) -> str:
    """Return the name of a layer with its type."""
    name = row.layer.rpartition(".")[2]
    return f"{name} ({row.type})" if name else row.type


def summary(
    model: nn.Module,
    input_shape: Any = None,
    input_dtype: Any = torch.float32,
    *,
    input_data: Any = None,
    batch_size: int = -1,
) -> Summary:
    """Show and return a model's layers, output shapes and parameters.

    The model is not changed in any way.

    Args:
        model: any module. Copies of it are run, in eval mode.
        input_shape: shape of one row, without the batch: (3, 32, 32); for several inputs a list of
            shapes, or a dict by argument name.
        input_dtype: default torch.float32; also torch.LongTensor, or a list or dict of dtypes like
            that of `input_shape`.
        input_data: instead of `input_shape`, the features of a batch: tensors, NumPy arrays,
            DataFrames or Series, several in a tuple, list or dict as forward takes them. NumPy
            and pandas floats become float32, as in `predict`. The shapes of outputs show the
            batch as `batch_size`.
        batch_size: the number of rows for the shapes and sizes shown; with -1, the default, shapes
            show -1 and sizes are for 1 row.

    Returns:
        The rows and totals. Total params are the distinct elements of `model.parameters()`. The
        rows add up to them, since a tied or reused parameter is counted at its first occurrence. A
        MB is 1024**2 bytes.

    Raises:
        ForwardError: a layer could not take its input; the message names the layer, the shape and
            the rows so far.
        ValueError: no input is given, or two; an invalid shape or dtype; a lazy layer without
            parameters yet.
        TypeError: `model` is not a module, or the input is a DataLoader, a Dataset or a table with
            columns that are not numbers.

    >>> _ = summary(nn.Sequential(nn.Linear(2, 1), nn.Sigmoid()), input_shape=(2,))
    layer (type)    output shape      params
    --------------  --------------  --------
    Sequential      [-1, 1]                0
      0 (Linear)    [-1, 1]                3
      1 (Sigmoid)   [-1, 1]                0
    ----------------------------------------
    Total params: 3
    Trainable params: 3
    Non-trainable params: 0
    Params size (MB): 0.000011
    Input size (MB), 1 row: 0.000008
    Outputs size (MB), 1 row: 0.000008
    Multiply-adds, 1 row: 2
    """
    _check(model, input_shape, input_dtype, input_data)
    input_data = map_leaves(_array_to_tensor, input_data)
    size = check_positive_int("batch_size", batch_size) if batch_size != -1 else 1
    if input_data is not None:
        row_counts = [max(first_size(input_data, unknown=1), 1)]
        inputs = input_data

        def features(device: torch.device, rows: int) -> Any:
            return to_device(copy.deepcopy(input_data), device)  # forward may write into it

    else:
        row_counts = [ROWS, MORE_ROWS] if batch_size == -1 else [size]
        features = partial(_make_inputs, input_shape, input_dtype)
        inputs = features(META, max(row_counts))
    runs, note = _run_copies(model, features, row_counts, inputs)
    parameters = list(model.parameters())
    result = Summary(
        model=_type_name(model),
        rows=layer_rows(model, runs, batch_size),
        total_params=sum(parameter.numel() for parameter in parameters),
        trainable_params=_count(parameters, trainable_only=True),
        params_bytes=sum(parameter.nbytes for parameter in parameters),
        batch=size,
        input_bytes=None,
        output_bytes=None,
        multiply_adds=None,
        note=note,
    )
    if runs:
        run = runs[0]
        scale = size / row_counts[0]  # sizes are shown for `size` rows
        result = replace(
            result,
            input_bytes=round(_bytes(run.features) * scale),
            output_bytes=round(_bytes(run.outputs) * scale),
            multiply_adds=None if run.flops is None else round(run.flops // 2 * scale),
        )
    show(result)
    return result


def _check(model: nn.Module, input_shape: Any, input_dtype: Any, input_data: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {describe(model)}. "
            f"Pass an instance, nn.Linear(2, 1)."
        )
    if hasattr(input_shape, "shape"):
        raise ValueError(
            f"input_shape is a {type(input_shape).__name__} of shape {tuple(input_shape.shape)}; "
            f"expected the shape of one row, such as {tuple(input_shape.shape[1:])}. Pass a batch "
            f"by its name: summary(net, input_data=batch)."
        )
    arrays = [leaf for leaf in leaves(input_shape) if _is_data(leaf)]
    if arrays:
        raise ValueError(
            f"input_shape is {describe(input_shape)}; expected the shape of one row, or a list or "
            f"dict of shapes, such as {tuple(arrays[0].shape[1:])}. Pass a batch by its name: "
            f"summary(net, input_data=batch)."
        )
    for name, value in (("input_shape", input_shape), ("input_data", input_data)):
        if isinstance(value, (DataLoader, Dataset)):
            raise TypeError(
                f"{name} is a {type(value).__name__}; expected one batch of features. Pass the "
                f"features of its first batch: summary(net, input_data=next(iter(loader))[0])."
            )
    if (input_shape is None) == (input_data is None):
        raise ValueError(
            f"summary takes either input_shape or input_data, got "
            f"{'neither' if input_data is None else 'both'}. Pass input_shape=(2,), the shape of "
            f"one row, or input_data=features, a batch of what forward takes."
        )
    try:
        _make_inputs(input_shape or (), input_dtype, META, 1)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
        raise ValueError(
            f"got input_shape={input_shape!r}, input_dtype={input_dtype!r}. Pass as input_shape "
            f"the shape of one row without the batch, such as (3, 32, 32), or a list or dict of "
            f"such shapes; as input_dtype a dtype such as torch.float32, or a list or dict of "
            f"dtypes like input_shape."
        ) from None
    lazy = []
    for name, module in model.named_modules():
        if any(map(is_lazy, module.parameters(recurse=False))):
            lazy.append(name or "model")
    if lazy:
        raise ValueError(
            f"lazy layers have no parameters to count yet: {lazy}. Run a batch first: "
            f"model(features)."
        )


def _is_data(leaf: Any) -> bool:
    """Tell whether a leaf is an array or a frame of any library, and no single number of NumPy."""
    return is_array(leaf) and not isinstance(leaf, np.generic)


def _array_to_tensor(leaf: Any) -> Any:
    """Convert an array or a frame to a tensor, as `predict` does; return anything else as it is."""
    if isinstance(leaf, Tensor) or not _is_data(leaf):
        return leaf
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "fiubc":
        return array_to_tensor(leaf, "input_data")
    from minikeras.data.arrays import as_tensor

    return as_tensor(leaf, "input_data")


def _make_inputs(shape: Any, dtype: Any, device: torch.device, rows: int) -> Any:
    """Make a tensor of random floats, or a tuple or dict of such tensors.

    Other dtypes are filled with zeros, since 0 is always a valid index.
    """
    if isinstance(shape, Mapping):
        dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shape, dtype)
        return {key: _make_inputs(part, dtypes[key], device, rows) for key, part in shape.items()}
    if not all(isinstance(size, (int, np.integer)) for size in shape):
        dtype_of_each = dtype if isinstance(dtype, (tuple, list)) else [dtype] * len(shape)
        inputs = []
        for part, dtype_of_part in zip(shape, dtype_of_each, strict=True):
            inputs.append(_make_inputs(part, dtype_of_part, device, rows))
        return tuple(inputs)
    dtype = getattr(dtype, "dtype", dtype)  # torch.FloatTensor has one
    fill = torch.rand if dtype.is_floating_point or dtype.is_complex else torch.zeros
    return fill(rows, *shape, device=device).to(dtype)


@dataclass
class _Run:
    """One forward of a copy of the model, recorded by hooks."""

    model: nn.Module  # the copy
    features: Any
    rows: int
    inputs: dict[str, str] = field(default_factory=dict)  # layer -> its last input, described
    calls: Counter[str] = field(default_factory=Counter)
    first_output: dict[str, Any] = field(default_factory=dict)  # layer -> of its first call
    outputs: list[Any] = field(default_factory=list)  # of all calls
    flops: int | None = None

    def record_input(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        arguments = (*args, *kwargs.values())
        self.inputs[name] = _describe(arguments[0] if len(arguments) == 1 else arguments)

    def record_output(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        if any(_outliving(leaf) is not leaf for leaf in leaves(output)):
            output = map_leaves(_outliving, output)
        self.calls[name] += 1
        self.first_output.setdefault(name, output)
        self.outputs.append(output)


def _describe(value: Any) -> str:
    return describe(value).removeprefix("Tensor ")


def _outliving(leaf: Any) -> Any:
    """Return an output that can be read after forward.

    Under torch.vmap a tensor can be read only inside, so one like it is returned.
    """
    if type(leaf) is not Tensor:
        return leaf
    try:
        leaf.data  # noqa: B018 - an error under vmap
    except RuntimeError:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=META)
    return leaf


def _run_copies(
    model: nn.Module, features: Features, row_counts: list[int], inputs: Any
) -> tuple[list[_Run], str]:
    """Run copies of the model, one for each number of rows; `inputs` are as large as the largest.

    A small model runs on its own device, another one on the meta device, or if that fails on its
    own. Returns the runs, and a note if one way to run them failed.
    """
    device = _device_of(model)
    # the random state of this kind of device is restored afterwards, as is the CPU's
    kind = "cuda" if device.type in ("cpu", "meta") else device.type
    devices = range(torch.accelerator.device_count()) if kind == device.type else range(0)
    numpy_state = np.random.get_state()
    python_state = random.getstate()
    attempts = [(META, True), (device, True), (device, False)]  # device, with flops counted
    if any(isinstance(layer, torch.jit.ScriptModule) for layer in model.modules()):
        attempts = attempts[1:]  # TorchScript modules cannot be copied to meta
    elif _is_small(model, device, inputs):
        # meta last: it has no values that a forward could refuse
        attempts = [*attempts[1:], attempts[0]]
    first_failure: BaseException | None = None
    error_to_show: ForwardError | None = None  # of a real copy
    for run_device, counts_flops in attempts:
        try:
            runs = []
            with torch.random.fork_rng(devices, device_type=kind):
                for rows in row_counts:
                    runs.append(_run_copy(model, features, rows, run_device, counts_flops))
        except ForwardError as error:
            first_failure = first_failure or error.__cause__
            if run_device != META:
                error_to_show = error
        except Exception as error:  # while copying
            first_failure = first_failure or error
        else:
            note = ""
            if first_failure and not counts_flops:
                note = f"Note: multiply-adds cannot be counted: {_one_line(first_failure)}"
            elif first_failure and run_device != META:
                reason = _one_line(first_failure)
                note = f"Note: run on a real copy, since the meta one failed: {reason}"
            return runs, note
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
    if error_to_show is not None:
        raise error_to_show
    reason = _one_line(first_failure)
    return [], f"Note: no output shapes, since the model cannot be copied: {reason}"


def _is_small(model: nn.Module, device: torch.device, inputs: Any) -> bool:
    """Tell whether a forward on the CPU is fast, and needs little memory, with these inputs."""
    parameters = list(model.parameters())
    if device.type != "cpu" or any(map(is_sharded, parameters)):
        return False
    elements = 0
    for leaf in leaves(inputs, inside=True):
        if isinstance(leaf, (Tensor, PackedSequence)):
            elements += leaf.data.numel()
    size = sum(parameter.numel() for parameter in parameters)
    return elements <= SMALL_INPUT and size * elements <= SMALL_PRODUCT


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _run_copy(
    model: nn.Module, features: Features, rows: int, device: torch.device, counts_flops: bool
) -> _Run:
    from torch.utils.flop_counter import FlopCounterMode

    run = _Run(_copy_without_hooks(model, device == META), features(device, rows), rows)
    for name, layer in run.model.named_modules():
        if not isinstance(layer, torch.jit.ScriptModule):  # takes no hooks
            layer.register_forward_pre_hook(partial(run.record_input, name), with_kwargs=True)
            layer.register_forward_hook(partial(run.record_output, name))
    counter: Any = FlopCounterMode(display=False) if counts_flops else None
    with (
        warnings.catch_warnings(action="ignore"),  # the model will show them when it is run
        # the counter does not work with gradients; without it, a forward may call
        # torch.autograd.grad
        torch.set_grad_enabled(not counts_flops),
        META if device == META else _countable_kernels(),
    ):
        try:
            with counter or nullcontext():
                if counter is not None:
                    _avoid_compiler_import(counter)
                output = call_with(run.model.eval(), run.features)
        except Exception as error:
            raise _explain(model, run, error) from error
    if counter is not None:
        run.flops = counter.get_total_flops()
    if "" not in run.inputs:  # a TorchScript model
        run.record_output("", run.model, (), output)
    return run


@contextmanager
def _countable_kernels() -> Iterator[None]:
    """Use no kernel that does a whole layer at once on the CPU: the counter does not know it."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _avoid_compiler_import(counter: Any) -> None:
    """Let a running counter of floating point operations not import torch's compiler.

    torch wraps the counter's `__torch_dispatch__`, so that the compiler does not trace it, and
    imports the compiler for that: more than a second, most of it for sympy. While sympy has not
    been imported, there is no compiler to keep away.
    """
    mode = counter.mode
    wrapped = type(mode).__torch_dispatch__
    if "sympy" in sys.modules or not hasattr(wrapped, "__wrapped__"):
        return
    kind: Any = type("PlainFlopCounterMode", (type(mode),), {})
    # assigned, since torch would wrap a method in the class's body again
    kind.__torch_dispatch__ = wrapped.__wrapped__
    mode.__class__ = kind


def _copy_without_hooks(model: nn.Module, on_meta: bool) -> nn.Module:
    """Deep-copy the model without the user's hooks."""
    copies: dict[int, Any] = {}  # for deepcopy: id -> the copy to use
    for module in model.modules():
        for name, value in vars(module).items():
            if name in HOOK_TABLES:
                copies[id(value)] = OrderedDict()
                continue
            for leaf in leaves(value):
                if not isinstance(leaf, Tensor) or id(leaf) in copies:
                    continue
                if on_meta:
                    copies[id(leaf)] = _copy_to_meta(leaf)
                elif not leaf.is_leaf:  # deepcopy refuses a tensor with a graph
                    copies[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(model, copies)


def _copy_to_meta(tensor: Tensor) -> Tensor:
    twin = torch.empty_like(tensor, device=META)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, tensor.requires_grad)
    return twin


def _explain(model: nn.Module, run: _Run, error: Exception) -> ForwardError:
    """Return the error with its layer, the input of that layer, and the rows so far."""
    name, layer, first_argument = find_failing_layer(error, run.model) or (
        "",
        run.model,
        run.features,
    )
    title = _type_name(layer) if list(layer.children()) else repr(layer)
    if name:
        title = f"{name}: {title}"
    received = run.inputs.get(name, _describe(first_argument))
    words = str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
    rows = [row for row in layer_rows(model, [run], run.rows) if row.layer in run.inputs]
    return ForwardError(
        f"{title} was given {received}: {words}\n"
        f"The input, with {run.rows} rows, was {describe(run.features)}. "
        f"The layers up to there:\n\n{_table(rows)}"
    )


def _one_line(error: BaseException | None) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 100, placeholder=" ...")


def layer_rows(model: nn.Module, runs: list[_Run], batch_size: int) -> list[LayerRow]:
    """Return one row per layer, in the order of `named_modules`; without runs, no shapes.

    A layer that occurs again has a row for each occurrence; the layers inside it do not.
    """
    rows: list[LayerRow] = []
    layers: dict[int, str] = {}  # id of a layer -> its first name
    owners: dict[int, str] = {}  # id of a parameter -> its first name
    repeated: set[str] = set()
    for name, layer in model.named_modules(remove_duplicate=False):
        first_name = layers.setdefault(id(layer), name)
        if first_name != name:
            repeated.add(name)
        if name.rpartition(".")[0] in repeated:
            continue
        new: list[nn.Parameter] = []  # not counted in a row above
        tied: list[str] = []  # the first names of the others
        for key, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            full_name = f"{name}.{key}"
            owner = owners.setdefault(id(parameter), full_name)
            if owner == full_name:
                new.append(parameter)
            else:
                tied.append(owner.lstrip("."))
        if name in repeated:
            note = f"same as {first_name}"
        else:
            note = ", ".join(_notes(name, layer, new, tied, runs))
        shape = None
        if runs:
            first = runs[0].first_output.get(first_name)
            last = runs[-1].first_output.get(first_name)
            shape = _shape(first, last, runs[0].rows, batch_size)
        rows.append(
            LayerRow(
                layer=name,
                type=_type_name(layer),
                depth=name.count(".") + 1 if name else 0,
                output_shape=shape,
                params=_count(new),
                trainable_params=_count(new, trainable_only=True),
                note=note,
            )
        )
    return rows


def _count(parameters: list[nn.Parameter], trainable_only: bool = False) -> int:
    """Return the number of elements of parameters; a lazy one has none yet."""
    total = 0
    for parameter in parameters:
        if is_lazy(parameter):
            continue
        if parameter.requires_grad or not trainable_only:
            total += parameter.numel()
    return total


def _notes(
    name: str, layer: nn.Module, new: list[nn.Parameter], tied: list[str], runs: list[_Run]
) -> Iterator[str]:
    if any(map(is_lazy, new)):
        yield LAZY
    frozen = sum(not parameter.requires_grad for parameter in new)
    if frozen:
        yield "frozen" if frozen == len(new) else "partly frozen"
    for owner in tied:
        yield f"tied to {owner}"
    if runs and runs[0].calls[name] > 1:
        yield f"called {runs[0].calls[name]} times"
    if isinstance(layer, torch.jit.ScriptModule):
        yield "TorchScript"
    elif runs and name not in runs[0].inputs and not isinstance(layer, NEVER_CALLED):
        yield "not called"


def _shape(output: Any, other: Any, rows: int, shown: int) -> Any:
    """Return the shapes in an output, in its own structure.

    A size that differs from the `other` run, or with one run a first size of `rows`, becomes
    `shown`.

    >>> lstm, two, four = nn.LSTM(3, 5, num_layers=2), torch.zeros(9, 2, 3), torch.zeros(9, 4, 3)
    >>> _shape(lstm(two), lstm(four), 2, -1)
    ([9, -1, 5], ([2, -1, 5], [2, -1, 5]))
    """
    if isinstance(output, (Tensor, PackedSequence)) and type(other) is type(output):
        sizes = list(output.data.shape)  # the data of a packed sequence has all its steps
        if other is output:
            return [shown, *sizes[1:]] if sizes[:1] == [rows] else sizes
        other_sizes = other.data.shape
        shape = []
        for size, other_size in zip(sizes, other_sizes, strict=False):
            shape.append(size if size == other_size else shown)
        return shape
    found = take_apart(output)
    other_found = take_apart(other)
    if found is None or other_found is None:
        return None if output is None else type(output).__name__
    shapes = []
    for part, other_part in zip(found[0], other_found[0], strict=False):
        shapes.append(_shape(part, other_part, rows, shown))
    if isinstance(output, Mapping):
        names: Any = output
    else:
        names = getattr(output, "__dataclass_fields__", getattr(output, "_fields", ()))
    return dict(zip(names, shapes, strict=False)) if names else tuple(shapes)


def _bytes(nest: Any) -> int:
    """Return the bytes of the tensors in a nest, each tensor once."""
    sizes = {}
    for leaf in leaves(nest):
        if isinstance(leaf, (Tensor, PackedSequence)):
            sizes[id(leaf)] = leaf.data.nbytes
    return sum(sizes.values())


def _type_name(layer: nn.Module) -> str:
    if isinstance(layer, torch.jit.ScriptModule):
        return str(layer.original_name)
    return type(layer).__name__
