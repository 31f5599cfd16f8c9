"""What happens to a predict: every batch through the model, off the device, and all rows joined in order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from minikeras import checks
from minikeras.data import (
    Idle,
    as_batches,
    count_rows,
    empty,
    join,
    leaves,
    limited,
    map_leaves,
    to_device,
    unpack,
    worked,
)
from minikeras.distributed import World
from minikeras.modes import modes_kept
from minikeras.precision import in_float32
from minikeras.run import ready

if TYPE_CHECKING:
    from minikeras.model import Model


def predict(model: Model, dl: Any, batch_size: int | None, everywhere: bool, steps: int | None) -> Any:
    """The model's outputs for every row, in order, on the CPU; of several processes on rank 0 alone or `everywhere`."""
    run = model._run
    if run is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        batches = limited(as_batches(dl, "dl", batch_size, device=device), steps, "dl", "steps")
        return join(outputs_of(model, batches, device))
    ready(model, run)
    before, run.by_parts = run.by_parts, run.jit is not None
    try:
        batches = limited(run.batches(dl, "dl", batch_size), steps, "dl", "steps")
        pieces = outputs_of(model, batches, run.device)
    finally:
        run.by_parts = before
    return join(pieces) if run.world is None else everyones(pieces, run.world, everywhere)


def everyones(pieces: list[Any], world: World, everywhere: bool) -> Any:
    """The outputs of all processes, by step and rank."""
    template, _ = worked(pieces[0])
    found = world.gather([None if idle else leaves(piece) for piece, idle in map(worked, pieces)], everywhere)
    if found is None:
        return None
    tensors = [iter(part) for step in zip(*found, strict=True) for part in step if part is not None]
    return join([map_leaves(lambda _, part=part: next(part), template) for part in tensors])  # type: ignore[misc]


def outputs_of(model: Model, batches: Iterable[Any], device: torch.device) -> list[Any]:
    """The model's outputs for each batch."""
    pieces: list[Any] = []
    run = model._run
    compute_outputs = model.compute_outputs if run is None else run.under_autocast(model.compute_outputs)
    with modes_kept(model), torch.no_grad():
        model.eval()
        for batch in batches:
            batch, idle = worked(batch)
            features = to_device(unpack(batch)[0], device)
            outputs = compute_outputs(features)
            if run is not None and run.precision is not None:
                outputs = in_float32(outputs)
            if not pieces:
                checks.inputs.check_rows_first(outputs, count_rows(features, unpack(batch)[1], unknown=-1))
            outputs = map_leaves(off_device, outputs)
            pieces.append(Idle(outputs) if idle else outputs)
    if not pieces:
        raise empty(batches, "dl")
    return pieces


def off_device(leaf: Any) -> Any:
    """A tensor or packed sequence on the CPU, with no graph and in memory of its own; anything else as it is."""
    if isinstance(leaf, torch.Tensor):  # a view would keep all that it is a view of
        return leaf.detach().to("cpu", copy=True)
    return leaf.cpu() if hasattr(leaf, "cpu") else leaf
