"""Which fit of this process has used a checkpoint's path, and whether another one is the same fit begun again.

A path belongs to one compile. In one process another model, or another `compile`, is refused; but a fit that was broken
off may be begun again by a new model, and so may one that begins bit-for-bit as the one before did: the same weights,
data, settings and random states. That is what running a cell of a notebook, or a function, once more does.
"""

from __future__ import annotations

import os
import random
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import StackDataset, Subset, TensorDataset

from minikeras.callback import Callback
from minikeras.checkpoint.checksums import SAMPLE, checksum
from minikeras.checkpoint.matching import settings
from minikeras.errors import CheckpointError
from minikeras.support.randomness import KINDS, state_of
from minikeras.support.reachable import SCALARS, reachable

if TYPE_CHECKING:
    from minikeras.model import Model
    from minikeras.run import Run


@dataclass
class Use:
    """The last fit of this process that used a path."""

    run: weakref.ref[Run]
    last: int  # epoch
    start: int  # a checksum of how it began
    callbacks: int  # a checksum of its callbacks
    came_to: str = "a break"  # or "an error", or "its end"


USES: dict[str, Use] = {}  # by the file's real path


def use(
    path: Path,
    model: Model,
    run: Run,
    loaders: list[Any],
    callbacks: list[Callback],
    last: int,
    there: bool,
) -> Use:
    """Enter that a fit uses this path.

    Args:
        path: of the checkpoint.
        model: that is fitted.
        run: what compile has set up.
        loaders: dl_train and dl_val, as the user gave them.
        callbacks: of the fit.
        last: the number of its last epoch.
        there: whether there is a file.

    Raises:
        CheckpointError: another fit of this process has used it, and this is not the same one begun again.
    """
    key = os.path.realpath(path)
    before = USES.get(key)
    if before is not None and before.run() is run:
        before.last, before.came_to = last, "a break"
        return before
    without = (run, model, *(getattr(callback, "model", None) for callback in callbacks))
    listed = checksum(values_in({"callbacks": callbacks}, without))
    now = Use(weakref.ref(run), last, start_of(model, run, loaders), listed)
    is_another = there and before is not None and not may_be_the_same(before, now)
    # each process has random states of its own: rank 0 says it for all
    is_another = run.world.broadcast(is_another)
    if is_another:
        raise CheckpointError(
            f"{path} is the checkpoint of another fit of this process: of another model, or of another compile. Taking "
            f"it would give this fit the weights and the history of that one. Give each fit a file of its own, such as "
            f'checkpoint="{path.stem}_2{path.suffix}", or delete {path.name} to start anew. To resume that fit, call '
            f"fit of the model that it trained, or start the script again."
        )
    USES[key] = now
    return now


def may_be_the_same(before: Use, now: Use) -> bool:
    """Whether a fit is the one before it, begun again."""
    if before.came_to == "a break":
        return True
    if before.start != now.start:
        return False
    return (
        before.came_to == "an error" or now.last > before.last or before.callbacks == now.callbacks
    )


def start_of(model: Model, run: Run, loaders: list[Any]) -> int:
    """A checksum of weights, data, settings and random states as a fit begins."""
    parts: list[Any] = [
        settings(run.optimizers),
        random.getstate(),
        np.random.get_state(legacy=False)["state"],
    ]
    parts.append(torch.get_rng_state())
    loss = run.loss_func
    for module in (model, loss):
        if isinstance(module, nn.Module):
            parts.append([(name, tensor) for name, tensor in module.state_dict().items()])
            parts.append([parameter.requires_grad for parameter in module.parameters()])
    roots = {"dl_train": loaders[0], "dl_val": loaders[1], "model": model, "loss_func": loss}
    return checksum(
        [*parts, *values_in(roots, (run, model.stop_training, vars(model).get("optimizer")))]
    )


def values_in(roots: Mapping[str, Any], without: tuple[Any, ...]) -> Iterable[Any]:
    """What the roots reach that is a value: numbers, strings, tensors, arrays, code; without names, some count up."""
    for _, value in reachable(roots, without):
        if isinstance(value, (*SCALARS, Tensor, np.ndarray)):
            yield value
        elif isinstance(value, KINDS) and not isinstance(value, random.SystemRandom):
            yield state_of(value)
        elif type(value) in (list, tuple) and len(value) > SAMPLE:
            yield (
                len(value),
                [item for item in value[:: len(value) // SAMPLE] if type(item) in SCALARS],
            )
        else:
            code = getattr(value, "__code__", None)
            yield type(value).__name__, getattr(code, "co_code", b"")


def data_of(loader: Any) -> int | None:
    """A checksum of data that is whole in memory: of tensors, and which rows of them; None for other data."""
    if type(loader) is list:
        tensors = [value for _, value in reachable({"": loader}) if isinstance(value, Tensor)]
        return checksum(tensors) if tensors else None
    if hasattr(loader, "arrays"):
        return checksum(
            [value for _, value in reachable({"": loader.arrays}) if isinstance(value, Tensor)]
        )
    dataset = getattr(loader, "dataset", None)
    indices: list[Any] = []
    while type(dataset) is Subset:
        indices.append(
            [int(index) for index in dataset.indices[:: max(1, len(dataset.indices) // SAMPLE)]]
        )
        indices.append(len(dataset.indices))
        dataset = dataset.dataset
    if type(dataset) is TensorDataset:
        return checksum([*indices, *dataset.tensors])
    if type(dataset) is StackDataset:
        return checksum(
            [
                *indices,
                *(value for _, value in reachable({"": dataset}) if isinstance(value, Tensor)),
            ]
        )
    return None
