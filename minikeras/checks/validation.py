"""Check dl_val in the first batch of a fit, not after an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from minikeras.batch import move_to_device, unpack
from minikeras.checks.inputs import check_batch, check_results, needs_labels
from minikeras.checks.peek import first_rows
from minikeras.modes import keep_modes
from minikeras.nests import map_leaves
from minikeras.overrides import overrides
from minikeras.phase import NO_BATCH
from minikeras.support.randomness import Randomness

if TYPE_CHECKING:
    from minikeras.model import Model
    from minikeras.run import Run

PARTS = ("evaluate_step", "compute_outputs", "compute_loss", "compute_metrics")
NOTE = "dl_val, batch 1, checked before the first step"


def look_ahead(model: Model, run: Run, val: Iterable[Any], features: Any, labels: Any) -> None:
    """Evaluate the first batch of dl_val if it differs in kind from a batch of dl_train.

    Nothing is read ahead: dl_val is checked only if it is in memory, in an order that is not drawn.
    A batch of the same kind as the training's is not evaluated, since the training step checks the
    same. Modes, random states and metrics are put back.

    Args:
        features, labels: the first training batch, before its step.

    Raises:
        ValueError, TypeError: what the evaluation of that batch raises.
    """
    if run.world.size > 1 or run.engine.compiles_parts or overrides(model, *PARTS):
        return
    if any(map(is_lazy, model.parameters())):  # the evaluation would initialize them
        return
    try:
        batch = first_rows(val)
        if batch is None:
            return
        val_features, val_labels, weight, rows = move_to_device(batch, run.device, run.split_batch)
        is_same_kind = kind_of((val_features, val_labels)) == kind_of((features, labels))
        if is_same_kind and weight is None:
            return
        evaluate_once(model, run, val_features, val_labels, weight, rows)
    except Exception as error:
        error.add_note(NOTE)
        # for the loop: it is no batch of dl_train
        error.says_where = True  # type: ignore[attr-defined]
        raise


def evaluate_once(
    model: Model, run: Run, features: Any, labels: Any, weight: Any, rows_stated: int | None
) -> None:
    """Take one batch through evaluate_step, and put back all that it changes."""
    loss = run.loss_func if isinstance(run.loss_func, nn.Module) else nn.Identity()
    phase = run.val
    randomness = Randomness(run.device, [])
    states = randomness.states()
    previous = run.phase
    run.phase = phase
    phase.totals.reset()
    phase.begin_pass()
    try:
        with keep_modes(model, loss), torch.no_grad():
            model.eval()
            loss.eval()
            step = run.stepper.decorated("around_step", model.evaluate_step)
            batch = phase.take(1, features, labels, weight, False, rows_stated)
            needed = needs_labels(model, run.loss_func, "evaluate_step")
            is_split = run.split_batch is not unpack
            check_batch(step, features, labels, weight, batch.rows, needed, is_split)
            if weight is None:
                results = step(features, labels)
            else:
                results = step(features, labels, weight)
            check_results(results, step)
    finally:
        phase.totals.reset()
        phase.batch = NO_BATCH
        run.phase = previous
        randomness.restore(states)


def kind_of(nest: Any) -> str:
    """Return containers, shapes of a row and dtypes of a batch, whatever its number of rows."""

    def leaf_of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape[1:]), leaf.dtype
        return type(leaf)

    return str(map_leaves(leaf_of, nest))
