"""Remember which fit of this process used a checkpoint's path, and tell whether a fit repeats it.

A path belongs to one compile. In the same process, another model or another `compile` is refused,
with two exceptions: a new model may repeat a fit that was interrupted, and a fit may use the path
if it begins bit-for-bit identical to the last one, with the same weights, data, settings and random
states. Both happen when a notebook's cell, or a function, is run again.
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
from minikeras.checkpoint.file import remedy_of_fit
from minikeras.checkpoint.matching import settings
from minikeras.errors import CheckpointError
from minikeras.support.checksums import SAMPLE, checksum
from minikeras.support.randomness import KINDS, state_of
from minikeras.support.reachable import SCALARS, reachable

if TYPE_CHECKING:
    from minikeras.model import Model
    from minikeras.run import Run


@dataclass
class Use:
    """The last fit of this process that used a path."""

    run: weakref.ref[Run]
    last: int  # its last epoch
    start: int  # a checksum of how it began
    callbacks: int  # a checksum of its callbacks
    came_to: str = "a break"  # how it ended: "a break", "an error" or "its end"


USES: dict[str, Use] = {}  # real path of the file -> its last use


def use(
    path: Path,
    model: Model,
    run: Run,
    loaders: list[Any],
    callbacks: list[Callback],
    last: int,
    there: bool,
) -> Use:
    """Record that a fit uses a path.

    Args:
        path: the checkpoint's path.
        model: the model of the fit.
        run: what compile set up.
        loaders: dl_train and dl_val, as the user passed them.
        callbacks: the callbacks of the fit.
        last: the number of its last epoch.
        there: whether the file exists.

    Raises:
        CheckpointError: another fit of this process used it, and this fit does not repeat that one.
    """
    key = os.path.realpath(path)
    before = USES.get(key)
    if before is not None and before.run() is run:
        before.last = last
        before.came_to = "a break"
        return before
    models = [getattr(callback, "model", None) for callback in callbacks]
    callback_values = find_values({"callbacks": callbacks}, (run, model, *models))
    start = compute_start(model, run, loaders)
    now = Use(weakref.ref(run), last, start, checksum(callback_values))
    is_another = there and before is not None and not may_be_the_same(before, now)
    # each process has its own random states, so rank 0 decides for all
    is_another = run.world.broadcast(is_another)
    if is_another:
        raise CheckpointError(
            f"{path} is the checkpoint of another fit of this process: of another model, or of "
            "another compile. Loading it would give this fit the weights and the history of "
            "that one. Give each fit its own file, such as "
            f'checkpoint="{path.stem}_2{path.suffix}". {remedy_of_fit(path)} To resume that fit, '
            "call fit of the model that it trained, or start the script again."
        )
    USES[key] = now
    return now


def may_be_the_same(before: Use, now: Use) -> bool:
    """Tell whether a fit may be the one before it, run again."""
    if before.came_to == "a break":
        return True
    if before.start != now.start:
        return False
    if before.came_to == "an error" or now.last > before.last:
        return True
    return before.callbacks == now.callbacks


def compute_start(model: Model, run: Run, loaders: list[Any]) -> int:
    """Compute a checksum of weights, data, settings and random states as a fit begins."""
    loss_func = run.loss_func
    values: list[Any] = [
        settings(run.optimizers),
        random.getstate(),
        np.random.get_state(legacy=False)["state"],
        torch.get_rng_state(),
    ]
    for module in (model, loss_func):
        if isinstance(module, nn.Module):
            values.append(list(module.state_dict().items()))
            values.append([parameter.requires_grad for parameter in module.parameters()])
    roots = {
        "dl_train": loaders[0],
        "dl_val": loaders[1],
        "model": model,
        "loss_func": loss_func,
    }
    without = (run, model.stop_training, vars(model).get("optimizer"))
    values.extend(find_values(roots, without))
    return checksum(values)


def find_values(roots: Mapping[str, Any], without: tuple[Any, ...]) -> Iterable[Any]:
    """Yield the values that can be reached from roots: numbers, strings, tensors, arrays and code.

    Their names are left out, since some names contain a counter.
    """
    for _, value in reachable(roots, without):
        if isinstance(value, (*SCALARS, Tensor, np.ndarray)):
            yield value
        elif isinstance(value, KINDS) and not isinstance(value, random.SystemRandom):
            yield state_of(value)
        elif type(value) in (list, tuple) and len(value) > SAMPLE:
            sample = value[:: len(value) // SAMPLE]
            yield len(value), [item for item in sample if type(item) in SCALARS]
        else:
            code = getattr(value, "__code__", None)
            yield type(value).__name__, getattr(code, "co_code", b"")


def data_of(loader: Any) -> int | None:
    """Compute a checksum of data in memory: of its tensors, and of the rows chosen from them.

    Return None for other data.
    """
    if type(loader) is list:
        tensors = find_tensors(loader)
        return checksum(tensors) if tensors else None
    if hasattr(loader, "arrays"):
        return checksum(find_tensors(loader.arrays))
    dataset = getattr(loader, "dataset", None)
    rows: list[Any] = []
    while type(dataset) is Subset:
        sample = dataset.indices[:: max(1, len(dataset.indices) // SAMPLE)]
        rows.append([int(index) for index in sample])
        rows.append(len(dataset.indices))
        dataset = dataset.dataset
    if type(dataset) is TensorDataset:
        return checksum([*rows, *dataset.tensors])
    if type(dataset) is StackDataset:
        return checksum([*rows, *find_tensors(dataset)])
    return None


def find_tensors(value: Any) -> list[Tensor]:
    """List the tensors that can be reached from a value."""
    return [found for _, found in reachable({"": value}) if isinstance(found, Tensor)]
