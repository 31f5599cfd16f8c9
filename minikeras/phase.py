"""Training or validation, as it goes through its batches.

Batch      what the step takes, and how many rows it has
Phase      the totals of a pass, its current batch, and what looks at its first batches
NoChecks   nothing is looked at: the null object in the place of `checks.first_batch.FirstBatch`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from minikeras.nests import detach_nest
from minikeras.results import Average, LossParts, Result, settle_parts
from minikeras.rows import RowCounter, UnknownRows, settle_by_weight
from minikeras.totals import Totals


@dataclass(slots=True)
class Batch:
    """One batch on its device."""

    features: Any
    labels: Any
    sample_weight: Any  # (batch,), None in most data
    rows: int | UnknownRows
    is_filler: bool = False  # repeated to keep in step with other processes: counts for nothing
    number: int = 0  # in its pass, from 1


NO_BATCH = Batch(None, None, None, 0)


class FillerBatch:
    """A batch that is repeated so that this process keeps in step, and counts for nothing."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch


def unwrap_filler(batch: Any) -> tuple[Any, bool]:
    """Return a batch, and whether it is a filler."""
    if isinstance(batch, FillerBatch):
        return batch.batch, True
    return batch, False


class NoChecks:
    """Looks at nothing and explains nothing; `checks.first_batch` overrides what it needs."""

    is_first = False  # whether results are read closely, which may wait for a device

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def begin_pass(self, current: NoChecks) -> NoChecks:
        """Return what looks at the first batch of a pass, where `current` would."""
        return current

    def batch(self, step: Callable[..., Any], batch: Batch) -> None:
        """Look at a batch before its step."""

    def loss(self, outputs: Any, labels: Any) -> Any:
        """Call the loss."""
        return self.phase.loss_func(outputs, labels)

    @torch.no_grad()
    def metrics(self, outputs: Any, labels: Any, with_functions: bool = True) -> dict[str, Result]:
        """Return each function's answer for a batch; the objects take it in, and answer when read.

        `with_functions` is False if the functions have been called elsewhere.
        """
        phase = self.phase
        totals = phase.totals
        if totals.objects and not phase.batch.is_filler:
            for update in totals.updates.values():
                update(outputs, labels)
            totals.mark_updated()
        results: dict[str, Result] = {}
        if with_functions:
            for name, call in totals.calls.items():
                results[name] = call(outputs, labels)
        return results

    def after_batch(self, step: Callable[..., Any], results: Any) -> NoChecks:
        """Look at what a step has returned; return what looks at the next batch."""
        return self

    def explain_forward(self, error: Exception, model: Any, features: Any) -> None:
        """Say in the user's words why forward failed: raise another error, or add a note."""

    def explain_loss(self, error: Exception, outputs: Any, labels: Any) -> None:
        """Say in the user's words why the loss failed."""

    def explain_step(self, error: Exception, batch: Batch) -> None:
        """Say what torch's words about a step hide."""

    def explain_reading(self, error: Exception, loader: Any) -> None:
        """Say what torch's words about reading a batch hide."""

    def warn_of_squeezed(self, outputs: Any, labels: Any) -> None:
        """Warn of outputs that have lost the dimension of the batch."""


class Phase:
    """Training or validation of one model.

    Args:
        data: what the user calls its data, "dl_train" or "dl_val".
        totals: the running means.
        loss_func: what compile was given.
        takes_several: whether the model's forward takes such features as several arguments.
    """

    def __init__(
        self, data: str, totals: Totals, loss_func: Any, takes_several: Callable[[Any], bool]
    ) -> None:
        self.data = data
        self.totals = totals
        self.loss_func = loss_func  # an engine may compile it, for all batches but the first
        self.takes_several = takes_several
        self.is_training = data == "dl_train"
        self.batch = NO_BATCH
        self.loss_parts: dict[str, Result] = {}  # of the last loss, until they are taken
        self.kinds_of_parts: list[bool] = []  # whether each part is an Average, in this pass
        self.counter = RowCounter(takes_several)
        self.no_checks = NoChecks(self)
        self.explanations = self.no_checks  # what explains all errors, and looks at the first batch
        self.checks = self.no_checks  # what looks at the next batch
        self.decorate: Callable[[Any], Any] = lambda metrics: metrics  # as the stepper's parts do
        self.metrics = self.decorate(self.checks.metrics)

    def look_by(self, checks: NoChecks) -> None:
        """Let the next batch be looked at by `checks`."""
        self.checks = checks
        self.metrics = self.decorate(checks.metrics)

    def begin(self) -> None:
        """Look closely at the next batch: a fit or an evaluation begins."""
        self.look_by(self.explanations)

    def begin_pass(self) -> None:
        """Count rows by one rule for all batches of a pass."""
        self.counter = RowCounter(self.takes_several)
        self.kinds_of_parts = []
        self.loss_parts = {}
        self.look_by(self.explanations.begin_pass(self.checks))

    def take(
        self,
        number: int,
        features: Any,
        labels: Any,
        sample_weight: Any,
        is_filler: bool,
        rows_stated: int | None = None,
    ) -> Batch:
        """Make a batch the current one.

        Args:
            rows_stated: how many rows it has, if the user's batch says so.
        """
        rows: int | UnknownRows
        rows = self.counter.count(features, labels) if rows_stated is None else rows_stated
        if sample_weight is not None:
            rows = settle_by_weight(rows, features, labels, sample_weight)
        batch = Batch(features, labels, sample_weight, rows, is_filler, number)
        self.batch = batch
        return batch

    def count_rows(
        self, features: Any, labels: Any, sample_weight: Any = None
    ) -> int | UnknownRows:
        """Return the rows of a batch; a weight for each row settles what the rest leaves open."""
        rows = self.counter.count(features, labels)
        return settle_by_weight(rows, features, labels, sample_weight)

    def add(self, step: Callable[..., Any], results: Mapping[str, Result]) -> None:
        """Add what a step has returned for the current batch."""
        checks = self.checks.after_batch(step, results)
        batch = self.batch
        try:
            self.totals.add(results, batch.rows, batch.is_filler)
        except AttributeError:
            if not isinstance(results, Mapping):
                self.explanations.after_batch(step, results)  # says what is expected
            raise
        if checks is not self.checks:
            self.look_by(checks)

    def keep_parts(self, loss: LossParts) -> Any:
        """Keep the parts of a loss for `take_parts`, and return their sum."""
        kinds = [isinstance(part, Average) for part in loss.parts.values()]
        if self.kinds_of_parts and kinds != self.kinds_of_parts:
            raise ValueError(
                f"of the losses {', '.join(loss.parts)} one returned an Average in some batches "
                "and a mean over rows in others; expected one kind in all batches of an epoch. "
                "Return the Average in each."
            )
        self.kinds_of_parts = kinds
        self.loss_parts = detach_nest(loss.parts)
        return settle_parts(loss)

    def take_parts(self) -> dict[str, Result]:
        """Return the parts of the last loss that was computed, once."""
        parts = self.loss_parts
        self.loss_parts = {}
        return parts

    def need_rows(self, *results: Any) -> None:
        """Raise an error if a result is a mean over rows and the batch's rows are unknown."""
        rows = self.batch.rows
        if isinstance(rows, UnknownRows):
            for result in results:
                if isinstance(result, LossParts):
                    self.need_rows(*result.parts.values())
                elif not isinstance(result, Average):
                    rows.refuse()
