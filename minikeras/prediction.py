"""What happens to a predict: every batch through the model, off the device, and all rows joined in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from minikeras.data import (
    Idle,
    RowCounter,
    UnknownRows,
    as_batches,
    empty,
    first_sizes,
    join,
    leaves,
    limited,
    manner,
    map_leaves,
    parts,
    shapes_of,
    to_device,
    unpack,
    worked,
)
from minikeras.distributed import World, is_part
from minikeras.modes import modes_kept
from minikeras.precision import in_float32
from minikeras.randomness import Randomness
from minikeras.run import ready

if TYPE_CHECKING:
    from minikeras.model import Model


@dataclass
class Outputs:
    """The model's outputs for some batches, on the CPU, and how many rows each may have."""

    pieces: list[Any] = field(default_factory=list)
    rows: dict[str, list[int | None]] = field(
        default_factory=dict
    )  # by the labels, or by the features alone
    unknown: UnknownRows | None = None  # why they could not be counted, where that is so
    features: Any = None  # of the last batch, to probe the model with


def predict(
    model: Model, dl: Any, batch_size: int | None, everywhere: bool, steps: int | None
) -> Any:
    """The model's outputs for every row, in order, on the CPU; of several processes on rank 0 alone or `everywhere`."""
    run = model._run
    if run is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        batches = limited(as_batches(dl, "dl", batch_size, device=device), steps, "dl", "steps")
        outputs = outputs_of(model, batches, device)
        return joined(model, outputs, device)
    ready(model, run)
    before, run.by_parts = run.by_parts, run.jit is not None
    try:
        batches = limited(run.batches(dl, "dl", batch_size), steps, "dl", "steps")
        outputs = outputs_of(model, batches, run.device)
        if run.world is not None:
            everyones = gathered(outputs, run.world, everywhere)
            if everyones is None:
                return None
            outputs = everyones
        return joined(model, outputs, run.device)
    finally:
        run.by_parts = before


# --- forward --------------------------------------------------------------------------------------


def outputs_of(model: Model, batches: Iterable[Any], device: torch.device) -> Outputs:
    """The model's outputs for each batch."""
    outputs = Outputs()
    run = model._run
    compute_outputs = (
        model.compute_outputs if run is None else run.under_autocast(model.compute_outputs)
    )
    counter, alone = (
        RowCounter(lambda features: manner(model, features) == "unpacked") for _ in range(2)
    )
    with modes_kept(model), torch.no_grad():
        model.eval()
        for batch in batches:
            batch, idle = worked(batch)
            features, labels, _ = unpack(batch)
            rows, rows_alone = counter.count(features, labels), alone.count(features)
            if is_second_size(rows, features, rows_alone):
                rows_alone = rows  # time first: the features alone would tell the wrong number
            note(outputs, labels=rows, features=rows_alone)
            sizes = first_sizes(features)
            features = to_device(features, device)
            piece = on_cpu(model, compute_outputs(features))
            outputs.features = features
            outputs.pieces.append(Idle(piece) if idle else piece)
            outputs.rows.setdefault("outputs", []).append(agreed_size(piece, sizes))
            if len(outputs.pieces) == 1:
                try:
                    joined(model, outputs, device, final=False)  # says what is wrong at once
                except ValueError as error:
                    refuse_single_row(model, features, error)
                    raise
    if not outputs.pieces:
        raise empty(batches, "dl")
    return outputs


def refuse_single_row(model: Model, features: Any, error: ValueError) -> None:
    """Say so where the features are those of one row, without a dimension of the batch."""
    if not isinstance(features, Tensor) or features.ndim != 1:
        return
    width = features.shape[0]
    if any(getattr(module, "in_features", None) == width for module in model.modules()):
        raise ValueError(
            f"the features have shape ({width},), those of one row; expected a batch, (rows, {width}). For one row "
            f"pass X[:1], not X[0]; for a list of rows pass torch.stack(rows)."
        ) from error


def on_cpu(model: Model, outputs: Any) -> Any:
    """The outputs for a batch in float32, on the CPU."""
    run = model._run
    if run is not None and run.precision is not None:
        outputs = in_float32(outputs)
    return map_leaves(off_device, outputs)


def off_device(leaf: Any) -> Any:
    """A tensor or packed sequence on the CPU, with no graph and in memory of its own.

    A key-value cache, which transformers' models return for the next token, is None: it is no output
    of the rows, and would fill the device. Anything else stays as it is.
    """
    if isinstance(leaf, Tensor):  # a view would keep all that it is a view of
        return leaf.detach().to("cpu", copy=True)
    if isinstance(leaf, PackedSequence):
        return PackedSequence(
            leaf.data.detach().to("cpu", copy=True), *(off_device(part) for part in leaf[1:])
        )
    if hasattr(leaf, "get_seq_length"):
        return None
    return leaf.cpu() if hasattr(leaf, "cpu") else leaf


def note(outputs: Outputs, **found: Any) -> None:
    """Note the rows of a batch: by the same rule as in `evaluate`, and as the features alone have them."""
    for name, rows in found.items():
        if isinstance(rows, UnknownRows):
            outputs.unknown = outputs.unknown or rows
            rows = None
        outputs.rows.setdefault(name, []).append(rows)


def is_second_size(rows: int | UnknownRows, features: Any, rows_alone: int | UnknownRows) -> bool:
    """Whether the labels' number of rows is the second size of the features, and not the first."""
    if isinstance(rows, UnknownRows) or rows_alone in (1, rows):
        return False
    return any(rows in shape[1:2] for shape in shapes_of(features))


def agreed_size(piece: Any, sizes: set[int]) -> int | None:
    """The first size of all outputs, if it is one of the features' or these have none."""
    found = first_sizes(piece)
    if len(found) == 1 and (not sizes or found <= sizes):
        return next(iter(found))
    return None


# --- joined ---------------------------------------------------------------------------------------


def joined(model: Model, outputs: Outputs, device: torch.device, final: bool = True) -> Any:
    """The outputs of all batches, by the first way to count the rows that they fit."""
    first_error: ValueError | None = None
    pieces = [worked(piece)[0] for piece in outputs.pieces]
    tried: list[list[int]] = []
    for name, counts in outputs.rows.items():
        if name == "outputs" and tried:
            continue  # for batches that tell nothing
        rows = [number for number in counts if number is not None]
        if len(rows) != len(pieces) or rows in tried:
            continue
        tried.append(rows)
        try:
            if rows == outputs.rows["features"]:
                another = partial(probe, model, outputs.features, rows[-1], device)
                return join(pieces, rows, another, final)
            return join(pieces, rows, final=final)  # the features cannot be cut along the rows
        except ValueError as error:
            first_error = first_error or error
    if first_error is None:
        assert outputs.unknown is not None
        outputs.unknown.refuse()
    raise first_error


def probe(model: Model, features: Any, rows: int, device: torch.device) -> tuple[Any, int] | None:
    """The model's outputs for another number of rows: two of many, or twice as many.

    None if the features do not have the rows first, or the model cannot take as many; or if it has
    hooks, which would see a batch that is not the user's. Random states are as before.
    """
    if features is None or not rows or any(map(is_part, model.parameters())) or has_hooks(model):
        return None
    fewer = 2 if rows > 2 else 2 * rows
    tensors = [leaf for leaf in leaves(features) if isinstance(leaf, Tensor)]
    first_rows = all(leaf.ndim and leaf.shape[0] == rows for leaf in tensors)
    by_item = type(features) in (list, tuple) and len(features) == rows and not first_rows
    if not tensors or not (first_rows or by_item):
        return None

    def changed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf[:2] if rows > 2 else torch.cat([leaf, leaf])

    run = model._run
    by_parts = run is not None and run.by_parts
    randomness = Randomness(device, [])
    before = randomness.states()
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            if run is not None:
                run.by_parts = False  # another size would be compiled anew
            compute_outputs = (
                model.compute_outputs if run is None else run.under_autocast(model.compute_outputs)
            )
            changed_features = (features * 2)[:fewer] if by_item else map_leaves(changed, features)
            return on_cpu(model, compute_outputs(changed_features)), fewer
    except Exception:
        return None  # a model for batches of one size
    finally:
        if run is not None:
            run.by_parts = by_parts
        randomness.restore(before)


def has_hooks(model: Model) -> bool:
    """Whether a layer calls a function of the user's as it is called."""
    for module in model.modules():
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *args: None)
            hooks = handle.hooks_dict_ref()
            handle.remove()
            if hooks:
                return True
    return False


# --- several processes ----------------------------------------------------------------------------


def gathered(outputs: Outputs, world: World, everywhere: bool) -> Outputs | None:
    """The outputs of all processes, by step and rank; None where they are not wanted."""
    template, _ = worked(outputs.pieces[0])
    own = [None if idle else plain(piece) for piece, idle in map(worked, outputs.pieces)]
    why = None if outputs.unknown is None else outputs.unknown.why
    found = world.gather([own, outputs.rows, why], everywhere)
    if found is None:
        return None
    together = Outputs(features=outputs.features)
    for _, _, why in found:
        if together.unknown is None and why is not None:
            together.unknown = UnknownRows(why)
    for rank, step in by_step(found):
        piece = found[rank][0][step]
        if piece is None:
            continue
        together.pieces.append(rebuilt(piece, template))
        for name, counts in found[rank][1].items():
            together.rows.setdefault(name, []).append(counts[step])
    return together


def by_step(found: list[Any]) -> Iterator[tuple[int, int]]:
    """The rank and the step of each piece, in the order of the rows."""
    for step in range(len(found[0][0])):
        for rank in range(len(found)):
            yield rank, step


def plain(nest: Any) -> Any:
    """A nest as values that can be sent: ["parts", ...] of a container, ["leaf", value] of anything else."""
    if isinstance(nest, PackedSequence):
        return ["packed", list(nest)]
    if isinstance(nest, np.ndarray):
        return ["array", torch.from_numpy(nest)]
    found = parts(nest)
    if found is None:
        return ["leaf", nest]
    return ["parts", [plain(part) for part in found[0]]]


def rebuilt(sent: Any, template: Any) -> Any:
    """... and back, in containers like those of the template."""
    kind, value = sent
    if kind == "packed":
        return PackedSequence(*value)
    if kind == "array":
        return value.numpy()
    if kind == "leaf":
        return value
    found = parts(template)
    if found is not None and len(found[0]) == len(value):
        return found[1]([rebuilt(part, like) for part, like in zip(value, found[0], strict=True)])
    like = found[0][0] if found is not None and found[0] else None
    items = [rebuilt(part, like) for part in value]
    return type(template)(items) if isinstance(template, (list, tuple)) else items
