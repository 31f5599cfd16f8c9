"""A model's layers, output shapes and parameter counts, as a table.

    copy the model without its hooks, every tensor on the meta device     no memory, nothing of the user's is touched
    forward on such copies, with 2 rows and with 4                        a size that differs is the batch's
        where that fails: once more on real copies, whose error is the one to show
    one row per layer, each parameter counted where it comes first        so that the rows add up to the total

The table is printed, or displayed in a notebook, and returned.
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
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from minikeras.batch import call_with, to_device
from minikeras.errors import ForwardError, described, failing_layer, positive_int
from minikeras.nests import leaves, map_leaves, parts
from minikeras.processes import is_main
from minikeras.rows import first_size

MB = 1024**2  # bytes
ROWS, MORE_ROWS = 2, 4  # both even: some models pair the rows of a batch
META = torch.device("meta")
NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
HOOK_TABLES = {
    name for name, held in vars(nn.Module()).items() if "hook" in name and isinstance(held, dict)
}
INDENT = "\ue000\ue000"  # stands for blanks until tabulate, which strips those, is done
Features = Callable[[torch.device, int], Any]  # device, number of rows -> what forward takes


@dataclass(frozen=True)
class LayerRow:
    """One layer of the table."""

    layer: str  # dotted, as in model.named_modules(); "" is the model itself
    type: str
    depth: int  # 0 for the model itself
    output_shape: (
        Any  # [-1, 4] for a tensor, a tuple or dict of those, None where the layer gave none
    )
    params: int  # elements held by the layer itself, neither by those inside it nor by a row above
    trainable_params: int
    note: str  # "frozen", "tied to fc1.weight", "called 2 times", ...


@dataclass(frozen=True, repr=False)
class Summary:
    """The rows and the totals; `str()` is the whole text, `repr()` one line, as the table was shown already."""

    model: str  # its class
    rows: list[LayerRow]
    total_params: int
    trainable_params: int
    params_bytes: int
    batch: int  # rows that the next three are for
    input_bytes: int | None  # None where the model could not be run
    output_bytes: int | None  # of all layers, each tensor once
    multiply_adds: (
        int | None
    )  # in matrix products, convolutions and attention; None where they cannot be counted
    note: str  # what was done otherwise and why, in one line, or ""
    cell: int | None = field(default=None, compare=False)  # of the notebook, where it was displayed

    @property
    def non_trainable_params(self) -> int:
        """Elements of the frozen parameters."""
        return self.total_params - self.trainable_params

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer, with the fields of `LayerRow` as columns."""
        return pd.DataFrame([vars(row) for row in self.rows])

    def __str__(self) -> str:
        table = _table(self.rows)
        return f"{table}\n{'-' * max(map(len, table.splitlines()))}\n{self.totals()}"

    def __repr__(self) -> str:
        return f"<Summary of {self.model}: {len(self.rows)} rows, {self.total_params:,} params>"

    def _repr_html_(self) -> str | None:
        stands_there = (
            self.cell is not None and self.cell == notebook_cell()
        )  # as displayed already
        return (
            None
            if stands_there
            else f"{_table(self.rows, 'html')}\n<pre>{html.escape(self.totals())}</pre>"
        )

    def totals(self) -> str:
        """The lines under the table."""
        of = f"{self.batch} row{'s' * (self.batch != 1)}"
        lines = [
            f"Total params: {self.total_params:,}",
            f"Trainable params: {self.trainable_params:,}",
        ]
        lines += [f"Non-trainable params: {self.non_trainable_params:,}"]
        lines += [f"Params size (MB): {self.params_bytes / MB:,.6f}"]
        sizes = {"Input size (MB)": self.input_bytes, "Outputs size (MB)": self.output_bytes}
        lines += [
            f"{name}, {of}: {size / MB:,.6f}" for name, size in sizes.items() if size is not None
        ]
        if self.multiply_adds is not None:
            lines += [f"Multiply-adds, {of}: {self.multiply_adds:,}"]
        return "\n".join([*lines, self.note] if self.note else lines)


def _table(rows: list[LayerRow], style: str = "simple") -> str:
    headers, sides = (
        ["layer (type)", "output shape", "params", "note"],
        ["left", "left", "right", "left"],
    )
    cells = []
    for row in rows:
        name = row.layer.rpartition(".")[2]
        label = f"{name} ({row.type})" if name else row.type
        label = INDENT * row.depth + (label if len(label) <= 30 else label[:27] + "...")
        shape = "" if row.output_shape is None else textwrap.fill(str(row.output_shape), 30)
        cells.append([label, shape, f"{row.params:,}", row.note])
    n = 4 if any(row.note for row in rows) else 3
    text = tabulate(
        [line[:n] for line in cells], headers[:n], style, disable_numparse=True, colalign=sides[:n]
    )
    return text.replace(INDENT[0], "&nbsp;" if style == "html" else " ")


def summary(
    model: nn.Module,
    input_shape: Any = None,
    input_dtype: Any = torch.float32,
    *,
    input_data: Any = None,
    batch_size: int = -1,
) -> Summary:
    """Show a model's layers, output shapes and parameters, and return them. The model is left exactly as it was.

    Args:
        model: any module. Copies of it are run, in eval mode.
        input_shape: of one row, without the batch: (3, 32, 32); several as a list, or as a dict by argument name.
        input_dtype: default torch.float32; torch.LongTensor will do, as will a list or dict of them like `input_shape`.
        input_data: instead of `input_shape`, a real batch of what forward takes. The batch is then shown as first size.
        batch_size: rows of a batch, for the shapes and sizes shown; -1, the default, shows -1, and sizes are for 1 row.

    Returns:
        The rows and totals. Total params are the distinct elements of `model.parameters()`; the rows add up to them, as
        a tied or reused parameter is counted where it comes first. A MB is 1024**2 bytes.

    Raises:
        ForwardError: a layer could not take what reached it; it names the layer, the shape and the rows so far.
        ValueError: no input is given, or two; a shape or dtype is not one; a lazy layer has no parameters yet.
        TypeError: `model` is not a module.

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
    size = positive_int("batch_size", batch_size) if batch_size != -1 else 1
    features: Features = partial(_made, input_shape, input_dtype)
    row_counts = [ROWS, MORE_ROWS] if batch_size == -1 else [size]
    if input_data is not None:
        row_counts = [max(first_size(input_data, unknown=1), 1)]
        features = lambda device, _: to_device(copy.deepcopy(input_data), device)  # noqa: E731 - forward may write into it
    runs, note = _forward(model, features, row_counts)
    run, parameters = runs[0] if runs else None, list(model.parameters())
    share = size / row_counts[0]  # of the run's rows, those the sizes are for
    result = Summary(
        model=_type_name(model),
        rows=_rows(model, runs, batch_size),
        total_params=sum(parameter.numel() for parameter in parameters),
        trainable_params=sum(
            parameter.numel() for parameter in parameters if parameter.requires_grad
        ),
        params_bytes=sum(parameter.nbytes for parameter in parameters),
        batch=size,
        input_bytes=round(_bytes(run.features) * share) if run else None,
        output_bytes=round(_bytes(run.outputs) * share) if run else None,
        multiply_adds=round(run.flops // 2 * share) if run and run.flops is not None else None,
        note=note,
    )
    _show(result)
    return replace(result, cell=notebook_cell())


def _check(model: nn.Module, input_shape: Any, input_dtype: Any, input_data: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {described(model)}. Pass an instance, nn.Linear(2, 1)."
        )
    if hasattr(input_shape, "shape"):
        raise ValueError(
            f"input_shape is a {type(input_shape).__name__} of shape {tuple(input_shape.shape)}; expected the shape of "
            f"one row, such as {tuple(input_shape.shape[1:])}. Pass a batch by its name: "
            f"summary(net, input_data=batch)."
        )
    if (input_shape is None) == (input_data is None):
        raise ValueError(
            f"summary takes either input_shape or input_data, got {'neither' if input_data is None else 'both'}. Pass "
            "input_shape=(2,), the shape of one row, or input_data=features, a batch of what forward takes."
        )
    try:
        _made(input_shape or (), input_dtype, META, 1)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
        raise ValueError(
            f"got input_shape={input_shape!r}, input_dtype={input_dtype!r}. Pass as input_shape the shape of one row "
            "without the batch, such as (3, 32, 32), or a list or dict of such shapes; as input_dtype a dtype such as "
            "torch.float32, or a list or dict of dtypes like input_shape."
        ) from None
    if lazy := [
        name or "model"
        for name, it in model.named_modules()
        if any(map(is_lazy, it.parameters(False)))
    ]:
        raise ValueError(
            f"lazy layers have no parameters to count yet: {lazy}. Run a batch first: model(features)."
        )


def _show(result: Summary) -> None:
    """Display it in a notebook, print it elsewhere; of several processes on rank 0 alone."""
    if notebook_cell() is not None:
        rich = result._repr_html_()
        sys.modules["IPython"].display.display(
            {"text/html": rich, "text/plain": str(result)}, raw=True
        )
    elif is_main():
        print(result)


def notebook_cell() -> int | None:
    """The number of the notebook's cell that runs; None in a script or a terminal, where IPython has no kernel."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell.execution_count if hasattr(shell, "kernel") else None


def _made(shape: Any, dtype: Any, device: torch.device, rows: int) -> Any:
    """Random floats, or zeros of other dtypes (an id of 0 is always there): a tensor, or a tuple or dict of those."""
    if isinstance(shape, Mapping):
        dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shape, dtype)
        return {key: _made(part, dtypes[key], device, rows) for key, part in shape.items()}
    if not all(isinstance(size, (int, np.integer)) for size in shape):
        each = dtype if isinstance(dtype, (tuple, list)) else [dtype] * len(shape)
        return tuple(_made(part, its, device, rows) for part, its in zip(shape, each, strict=True))
    dtype = getattr(dtype, "dtype", dtype)  # torch.FloatTensor has one
    draw = torch.rand if dtype.is_floating_point or dtype.is_complex else torch.zeros
    return draw(rows, *shape, device=device).to(dtype)


@dataclass
class _Run:
    """One forward of a copy, filled in by hooks."""

    model: nn.Module  # the copy
    features: Any
    rows: int
    given: dict[str, str] = field(default_factory=dict)  # layer -> its last arguments, described
    calls: Counter[str] = field(default_factory=Counter)
    first: dict[str, Any] = field(default_factory=dict)  # layer -> the output of its first call
    outputs: list[Any] = field(default_factory=list)  # of all calls
    flops: int | None = None

    def entered(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        arguments = (*args, *kwargs.values())
        self.given[name] = described(
            arguments[0] if len(arguments) == 1 else arguments
        ).removeprefix("Tensor ")

    def left(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if any(_kept(leaf) is not leaf for leaf in leaves(output)):
            output = map_leaves(_kept, output)
        self.calls[name] += 1
        self.first.setdefault(name, output)
        self.outputs.append(output)


def _kept(leaf: Any) -> Any:
    """An output that can be looked at after forward; under torch.vmap, which has values there alone, one like it."""
    if type(leaf) is not Tensor:
        return leaf
    try:
        leaf.data  # noqa: B018 - an error under vmap
    except RuntimeError:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=META)
    return leaf


def _forward(model: nn.Module, features: Features, row_counts: list[int]) -> tuple[list[_Run], str]:
    """A run for each number of rows, on meta or else on the model's device, and a note where not on meta."""
    device = next(
        (tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu")
    )
    kind = (
        "cuda" if device.type in ("cpu", "meta") else device.type
    )  # whose random state is kept, with the CPU's
    devices = range(torch.accelerator.device_count()) if kind == device.type else range(0)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    scripted = any(
        isinstance(layer, torch.jit.ScriptModule) for layer in model.modules()
    )  # its copies are real
    failed: BaseException | None = None
    for place, counted in ((META, True), (device, True), (device, False))[scripted:]:
        try:
            with torch.random.fork_rng(devices, device_type=kind):
                runs = [_run(model, features, rows, place, counted) for rows in row_counts]
            return (
                runs,
                f"Note: run on a real copy, since the meta one failed: {_one_line(failed)}"
                if failed
                else "",
            )
        except ForwardError as error:
            if not counted:
                raise
            failed = failed or error.__cause__
        except Exception as error:  # while copying
            failed = error
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
    return [], f"Note: no output shapes, since the model cannot be copied: {_one_line(failed)}"


def _run(
    model: nn.Module, features: Features, rows: int, device: torch.device, counted: bool
) -> _Run:
    from torch.utils.flop_counter import FlopCounterMode

    run = _Run(_copied(model, device == META), features(device, rows), rows)
    for name, layer in run.model.named_modules():
        if not isinstance(layer, torch.jit.ScriptModule):  # takes no hooks
            layer.register_forward_pre_hook(partial(run.entered, name), with_kwargs=True)
            layer.register_forward_hook(partial(run.left, name))
    counter = FlopCounterMode(display=False) if counted else None
    # the counter and gradients do not go together; without it, a forward may call torch.autograd.grad
    with (
        torch.set_grad_enabled(not counted),
        META if device == META else nullcontext(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # they come when the model itself is run
        try:
            with counter or nullcontext():
                output = call_with(run.model.eval(), run.features)
        except Exception as error:
            raise _explained(model, run, error) from error
    run.flops = counter.get_total_flops() if counter else None
    if "" not in run.given:  # a TorchScript model
        run.left("", run.model, (), output)
    return run


def _copied(model: nn.Module, on_meta: bool) -> nn.Module:
    """A deep copy without the user's hooks."""
    memo: dict[int, Any] = {}  # id -> what deepcopy takes for the copy already made
    for name, held in (
        (name, held) for module in model.modules() for name, held in vars(module).items()
    ):
        if name in HOOK_TABLES:
            memo[id(held)] = OrderedDict()
            continue
        for leaf in leaves(held):
            if isinstance(leaf, Tensor) and id(leaf) not in memo and (on_meta or not leaf.is_leaf):
                twin = torch.empty_like(leaf, device=META) if on_meta else leaf.detach().clone()
                memo[id(leaf)] = (
                    nn.Parameter(twin, leaf.requires_grad)
                    if isinstance(leaf, nn.Parameter)
                    else twin
                )
    return copy.deepcopy(model, memo)


def _explained(model: nn.Module, run: _Run, error: Exception) -> ForwardError:
    """An error with its layer, what reached that, and the rows so far."""
    name, layer, first = failing_layer(error, run.model) or ("", run.model, run.features)
    shown = _type_name(layer) if list(layer.children()) else repr(layer)
    given = run.given.get(name, described(first).removeprefix("Tensor "))
    words = str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
    table = _table([row for row in _rows(model, [run], run.rows) if row.layer in run.given])
    return ForwardError(
        f"{name}{': ' * bool(name)}{shown} was given {given}: {words}\n"
        f"The input, with {run.rows} rows, was {described(run.features)}. The layers up to there:\n\n{table}"
    )


def _one_line(error: BaseException | None) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 100, placeholder=" ...")


def _rows(model: nn.Module, runs: list[_Run], batch_size: int) -> list[LayerRow]:
    """One row per layer, in the order of `named_modules`; one met again has a row more, those inside it have not."""
    rows: list[LayerRow] = []
    layers: dict[int, str] = {}  # id of a layer -> the name it came under first
    owners: dict[int, str] = {}  # id of a parameter -> likewise
    again: set[str] = set()
    for name, layer in model.named_modules(remove_duplicate=False):
        if layers.setdefault(id(layer), name) != name:
            again.add(name)
        if name.rpartition(".")[0] in again:
            continue
        held = {
            f"{name}.{key}": it
            for key, it in layer.named_parameters(recurse=False, remove_duplicate=False)
        }
        new = [it for key, it in held.items() if owners.setdefault(id(it), key) == key]
        tied = [owners[id(it)].lstrip(".") for key, it in held.items() if owners[id(it)] != key]
        notes = (
            f"same as {layers[id(layer)]}"
            if name in again
            else ", ".join(_notes(name, layer, new, tied, runs))
        )
        first = [run.first.get(layers[id(layer)]) for run in runs] or [None]
        shape = _shape(first[0], first[-1], runs[0].rows if runs else 0, batch_size)
        params, trainable = (
            sum(map(torch.numel, new)),
            sum(it.numel() for it in new if it.requires_grad),
        )
        rows.append(
            LayerRow(
                name,
                _type_name(layer),
                name.count(".") + bool(name),
                shape,
                params,
                trainable,
                notes,
            )
        )
    return rows


def _notes(
    name: str, layer: nn.Module, new: list[nn.Parameter], tied: list[str], runs: list[_Run]
) -> Iterator[str]:
    if frozen := sum(not parameter.requires_grad for parameter in new):
        yield "frozen" if frozen == len(new) else "partly frozen"
    yield from (f"tied to {other}" for other in tied)
    if runs and runs[0].calls[name] > 1:
        yield f"called {runs[0].calls[name]} times"
    if isinstance(layer, torch.jit.ScriptModule):
        yield "TorchScript"
    elif runs and name not in runs[0].given and not isinstance(layer, NEVER_CALLED):
        yield "not called"


def _shape(output: Any, other: Any, rows: int, shown: int) -> Any:
    """An output's shapes in its own structure; `shown` for sizes not as in the `other` run, or a first size of `rows`.

    >>> lstm, two, four = nn.LSTM(3, 5, num_layers=2), torch.zeros(9, 2, 3), torch.zeros(9, 4, 3)
    >>> _shape(lstm(two), lstm(four), 2, -1)
    ([9, -1, 5], ([2, -1, 5], [2, -1, 5]))
    """
    if isinstance(output, (Tensor, PackedSequence)) and type(other) is type(output):
        sizes, changed = (
            list(nest.data.shape) for nest in (output, other)
        )  # a packed sequence's: all its steps
        if other is output:
            return [shown, *sizes[1:]] if sizes[:1] == [rows] else sizes
        return [size if size == twin else shown for size, twin in zip(sizes, changed, strict=False)]
    found, twins = parts(output), parts(other)
    if found is None or twins is None:
        return None if output is None else type(output).__name__
    inner = [
        _shape(part, twin, rows, shown) for part, twin in zip(found[0], twins[0], strict=False)
    ]
    fields = getattr(output, "__dataclass_fields__", getattr(output, "_fields", ()))
    names = output if isinstance(output, Mapping) else fields
    return dict(zip(names, inner, strict=False)) if names else tuple(inner)


def _bytes(nest: Any) -> int:
    return sum(
        {
            id(it): it.data.nbytes
            for it in leaves(nest)
            if isinstance(it, (Tensor, PackedSequence))
        }.values()
    )


def _type_name(layer: nn.Module) -> str:
    return (
        str(layer.original_name)
        if isinstance(layer, torch.jit.ScriptModule)
        else type(layer).__name__
    )
