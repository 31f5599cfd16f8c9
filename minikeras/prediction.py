"""What happens in predict: every batch through the model, off the device, all rows joined.

for each batch (compute_all_outputs):
    split it; copy its labels if they are asked for; count its rows, unless it is like the last one
    forward, and the outputs to the CPU: behind those of earlier batches if they are plain tensors
with several processes: gather the outputs of all
join outputs, and labels, along the rows (join_all)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from minikeras import assemble
from minikeras.batch import Parts, choose_call, to_device, unpack
from minikeras.errors import describe
from minikeras.joining import BY_BATCH, Probe, Stack, join, join_stack
from minikeras.modes import keep_modes, keep_random_states
from minikeras.nests import is_sharded, leaves, map_leaves
from minikeras.phase import FillerBatch, unwrap_filler
from minikeras.processes import OneProcess
from minikeras.rows import RowCounter, UnknownRows, first_sizes, shapes_of
from minikeras.run import prepare
from minikeras.sources import ArrayBatches, make_empty_error

if TYPE_CHECKING:
    from minikeras.model import Model


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Wanted:
    """What the user asks predict for."""

    labels: bool  # next to the outputs, of the same rows
    joined: bool  # along the rows; else a list with an item for each batch
    everywhere: bool  # in all processes; else on rank 0 alone


class Counts(NamedTuple):
    """How many rows a batch may have."""

    labels: int | UnknownRows  # as `evaluate` counts them
    features: int | UnknownRows  # by the features alone
    outputs: int | None  # by the outputs


@dataclass
class Outputs:
    """The model's outputs for some batches, on the CPU, and how many rows each may have."""

    stack: Stack | None = None  # of the first batches, if they can be joined as they come
    pieces: list[Any] = field(default_factory=list)  # of the batches after those
    labels: list[Any] = field(default_factory=list)  # of each batch, if they are wanted
    # the rows of each batch: by the labels, by the features alone, or by the outputs
    rows: dict[str, list[int | None]] = field(default_factory=dict)
    unknown: UnknownRows | None = None  # why they could not be counted, where that is so
    features: Any = None  # of the first batch, to probe the model with

    def note_counts(self, counts: list[Counts]) -> None:
        """Note how many rows each batch may have."""
        for name, numbers in zip(Counts._fields, zip(*counts, strict=True), strict=True):
            self.rows[name] = list(numbers)
            if UnknownRows not in set(map(type, numbers)):
                continue
            for position, number in enumerate(numbers):
                if isinstance(number, UnknownRows):
                    self.unknown = self.unknown or number
                    self.rows[name][position] = None

    def join(self, rows: list[int], probe: Probe = lambda: None, final: bool = True) -> Any:
        """Join the outputs of all batches along the rows, as `joining.join` does."""
        if self.stack is not None and not self.pieces:
            return join_stack(self.stack, rows, probe, final)
        pieces = [] if self.stack is None else list(self.stack)
        for piece in self.pieces:
            pieces.append(unwrap_filler(piece)[0])
        return join(pieces, rows, probe, final)


def predict(
    model: Model, dl: Any, batch_size: int | None, steps: int | None, wanted: Wanted
) -> Any:
    """Return the outputs for every row, in order, on the CPU; with their labels if wanted."""
    run = model._run
    if run is None:
        device = next((parameter.device for parameter in model.parameters()), CPU)
        batches = assemble.make_source_of_prediction(dl, batch_size, steps, device, OneProcess())
        outputs = begin_outputs(batches, wanted, OneProcess())
        compute_all_outputs(model, batches, device, unpack, wanted, outputs)
        return choose_result(model, outputs, device, wanted)
    with run.world.verb("predict"), run.engine.predicting():
        batches = assemble.make_source_of_prediction(dl, batch_size, steps, run.device, run.world)
        run.world.meet(model, run, dl=batches, batch_size=batch_size, steps=steps, **asdict(wanted))
        prepare(model, run)
        own = begin_outputs(batches, wanted, run.world)
        compute_all_outputs(model, batches, run.device, run.split_batch, wanted, own)
        outputs = run.world.join_outputs(own, wanted.everywhere)
        if outputs is None:
            return (None, None) if wanted.labels else None
        return choose_result(model, outputs, run.device, wanted)


def begin_outputs(batches: Iterable[Any], wanted: Wanted, world: OneProcess) -> Outputs:
    """Return what the outputs of all batches go into.

    It is a stack if the batches of this process are joined; not if they go to other processes
    first, or to the user one by one.
    """
    if not wanted.joined or world.size > 1:
        return Outputs()
    if isinstance(batches, ArrayBatches):
        return Outputs(stack=Stack(batches.rows, batches.batch_size))
    return Outputs(stack=Stack())


def choose_result(model: Model, outputs: Outputs, device: torch.device, wanted: Wanted) -> Any:
    """Return what the user asks for, from the outputs of all processes."""
    if wanted.joined:
        joined, labels = join_all(model, outputs, device)
    else:
        joined, labels = outputs.pieces, outputs.labels
    return (joined, labels) if wanted.labels else joined


# --- forward --------------------------------------------------------------------------------------


def compute_all_outputs(
    model: Model,
    batches: Iterable[Any],
    device: torch.device,
    split_batch: Callable[[Any], Parts],
    wanted: Wanted,
    outputs: Outputs,
) -> None:
    """Add the model's outputs for each batch to `outputs`, and its labels if they are wanted."""
    compute_outputs = make_forward(model)
    counters = make_counters(model)
    stack = outputs.stack
    counts: list[Counts] = []
    shape = None  # of the last batch, if it was a tensor of features and nothing else
    size = 0  # first size of its outputs, if they went onto the stack
    number = 0
    with keep_modes(model), torch.no_grad():
        model.eval()
        for batch in batches:  # enumerate would keep a batch alive until it has the next
            number += 1
            is_filler = False
            is_same = type(batch) is Tensor and batch.shape == shape
            if is_same:  # most are: they have as many rows as the batch before
                features = batch.to(device)
            else:
                batch, is_filler = unwrap_filler(batch)
                features, labels, _, rows_stated = split_batch(batch)
                if wanted.labels:
                    # copied before forward, which may write into features that they are
                    outputs.labels.append(copy_labels(labels, features, number))
                rows, rows_alone = count_rows(counters, features, labels, rows_stated)
                sizes = first_sizes(features)
                shape = batch.shape if type(batch) is Tensor and split_batch is unpack else None
                features = to_device(features, device)
            piece = compute_outputs(features)
            size_before = size
            size = 0 if stack is None else stack.add(piece)
            if not size:
                piece = map_leaves(move_to_cpu, piece)
                outputs.pieces.append(FillerBatch(piece) if is_filler else piece)
            if not is_same or not size or size != size_before:  # else they are as before
                counts_of_batch = Counts(rows, rows_alone, find_agreed_size(piece, sizes))
            counts.append(counts_of_batch)
            if number == 1 and wanted.joined:
                outputs.features = features
                outputs.note_counts(counts)
                try:
                    join_all(model, outputs, device, final=False)  # says what is wrong at once
                except ValueError as error:
                    refuse_single_row(model, features, error)
                    raise
            del batch, features, piece  # so that the next batch gets their memory, still in a cache
    if not number:
        raise make_empty_error(batches, "dl")
    outputs.note_counts(counts)


def copy_labels(labels: Any, features: Any, number: int) -> Any:
    """Return the labels of a batch on the CPU, in memory of their own.

    Raises:
        ValueError: it has none.
    """
    if labels is None:
        raise ValueError(
            f"return_labels=True needs labels, and batch {number} of dl is features alone, "
            f"{describe(features)}. Give batches of (features, labels), arrays as a tuple (X, y); "
            "if the batches have labels in another place, such as in a dict, pass "
            "compile(split_batch=function), which returns (features, labels)."
        )
    return map_leaves(move_to_cpu, to_device(labels, CPU))


def refuse_single_row(model: Model, features: Any, error: ValueError) -> None:
    """Raise a plainer error if the features are those of one row, without a batch dimension."""
    if not isinstance(features, Tensor):
        return
    if features.ndim == 2:
        _note_sequence(model, features, error)
    if features.ndim != 1:
        return
    width = features.shape[0]
    if any(getattr(module, "in_features", None) == width for module in model.modules()):
        raise ValueError(
            f"the features have shape ({width},), those of one row; expected a batch, (rows, "
            f"{width}). For one row pass X[:1], not X[0]; for a list of rows pass "
            "torch.stack(rows)."
        ) from error


def _note_sequence(model: Model, features: Tensor, error: ValueError) -> None:
    """Note that a recurrent layer takes features of two dimensions for one sequence."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.RNNBase) and layer.input_size == features.shape[1]:
            error.add_note(
                f"Layer {name} ({type(layer).__name__}) takes features {tuple(features.shape)} for "
                "one sequence without a batch dimension. If they are one, pass X[None]."
            )
            return


def move_to_cpu(leaf: Any) -> Any:
    """Move a tensor or packed sequence to the CPU, with no graph and in memory of its own.

    A key-value cache, which transformers' models return for the next token, is None: it is no
    output of the rows, and would fill the device. Anything else stays as it is.
    """
    if isinstance(leaf, Tensor):  # a view would keep all that it is a view of
        return leaf.detach().to("cpu", copy=True)
    if isinstance(leaf, PackedSequence):
        return PackedSequence(
            leaf.data.detach().to("cpu", copy=True), *(move_to_cpu(part) for part in leaf[1:])
        )
    if hasattr(leaf, "get_seq_length"):
        return None
    return leaf.cpu() if hasattr(leaf, "cpu") else leaf


def make_counters(model: Model) -> tuple[RowCounter, RowCounter]:
    """Return what counts the rows of batches: by their labels, and by their features alone."""

    def takes_several(features: Any) -> bool:
        return choose_call(model, features) == "unpacked"

    return RowCounter(takes_several), RowCounter(takes_several)


def count_rows(
    counters: tuple[RowCounter, RowCounter], features: Any, labels: Any, rows_stated: int | None
) -> tuple[int | UnknownRows, int | UnknownRows]:
    """Count the rows of a batch: by the labels as in `evaluate`, and by the features alone."""
    by_labels, by_features = counters
    rows: int | UnknownRows
    rows = by_labels.count(features, labels) if rows_stated is None else rows_stated
    rows_alone = by_features.count(features)
    if is_second_size(rows, features, rows_alone):
        rows_alone = rows  # time first: the features alone would tell the wrong number
    return rows, rows_alone


def is_second_size(rows: int | UnknownRows, features: Any, rows_alone: int | UnknownRows) -> bool:
    """Tell whether the labels' number of rows is the features' second size, and not the first."""
    if isinstance(rows, UnknownRows) or rows_alone in (1, rows):
        return False
    return any(rows in shape[1:2] for shape in shapes_of(features))


def find_agreed_size(piece: Any, sizes: set[int]) -> int | None:
    """Return the first size of all outputs, if it is one of the features' or these have none."""
    if type(piece) is Tensor and piece.ndim:  # most are
        size = piece.shape[0]
        return size if size in sizes or not sizes else None
    found = first_sizes(piece)
    if len(found) == 1 and (not sizes or found <= sizes):
        return next(iter(found))
    return None


# --- joined ---------------------------------------------------------------------------------------


def join_all(
    model: Model, outputs: Outputs, device: torch.device, final: bool = True
) -> tuple[Any, Any]:
    """Join the outputs of all batches, by the first way to count the rows that they fit.

    Returns:
        The joined outputs, and the joined labels or None.
    """
    first_error: ValueError | None = None
    tried: list[list[int]] = []
    for name, counts in outputs.rows.items():
        if name == "outputs" and tried:
            continue  # for batches that tell nothing
        rows = [number for number in counts if number is not None]
        if len(rows) != len(counts) or rows in tried:
            continue
        tried.append(rows)
        try:
            if rows == outputs.rows["features"]:
                another = partial(probe, model, outputs.features, rows[0], device)
                joined = outputs.join(rows, another, final)
            else:  # the features cannot be cut along the rows
                joined = outputs.join(rows, final=final)
        except ValueError as error:
            first_error = first_error or error
            continue
        return joined, join_labels(outputs.labels, rows, final)
    if first_error is None:
        assert outputs.unknown is not None
        raise ValueError(
            "the rows of a batch, along which predict joins the outputs, cannot be told: "
            f"{outputs.unknown.why}. Set an int `batch_size` on the batch, as an attribute of an "
            f"object or a dict subclass of your own; or {BY_BATCH}."
        )
    raise first_error


def join_labels(labels: list[Any], rows: list[int], final: bool) -> Any:
    """Join the labels of all batches along the rows by which the outputs were joined.

    None if no labels are wanted.

    Raises:
        ValueError: they have other rows.
    """
    if not labels:
        return None
    try:
        return join(labels, rows, final=final)
    except ValueError as error:
        shown = []
        for piece, count in zip(labels, rows, strict=True):
            text = f"{describe(piece)} for {count} rows"
            if text not in shown:
                shown.append(text)
        others = f" and {shown[-1]}" if len(shown) > 1 else ""
        raise ValueError(
            "return_labels=True: the labels of the batches cannot be joined like the outputs; "
            "expected the rows first, one label for each row or a fixed number, and got "
            f"{shown[0]}{others}. Pass join=False for two lists, with the outputs and the labels "
            "of each batch."
        ) from error


def probe(model: Model, features: Any, rows: int, device: torch.device) -> tuple[Any, int] | None:
    """Return the model's outputs for another number of rows: two of many, or twice as many.

    None if the features do not have the rows first, or the model cannot take as many; or if it has
    hooks, which would see a batch that is not the user's. Random states are as before.
    """
    if features is None or not rows or any(map(is_sharded, model.parameters())) or has_hooks(model):
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
    probing = contextlib.nullcontext() if run is None else run.engine.probing()
    try:
        with keep_random_states(device), keep_modes(model), torch.no_grad(), probing:
            model.eval()
            changed_features = (features * 2)[:fewer] if by_item else map_leaves(changed, features)
            changed_outputs = make_forward(model)(changed_features)
            return map_leaves(move_to_cpu, changed_outputs), fewer
    except Exception:
        return None  # a model for batches of one size


def make_forward(model: Model) -> Callable[[Any], Any]:
    """Return what computes the outputs that the user gets, in float32."""
    if model._run is None:
        return model.compute_outputs
    stepper = model._run.stepper
    forward = stepper.decorated("around_step", model.compute_outputs)
    if not stepper.moments("outputs_for_user"):
        return forward
    return lambda features: stepper.outputs_for_user(forward(features))


def has_hooks(model: Model) -> bool:
    """Tell whether a layer calls a function of the user's as it is called."""
    for module in model.modules():
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *args: None)
            hooks = handle.hooks_dict_ref()
            handle.remove()
            if hooks:
                return True
    return False
