"""Check the first batches of a fit or an evaluation, and explain errors.

Explanations   errors of torch in the user's words, at every batch
FirstBatch     also the first batch: its parts, loss and metrics, results, the first of dl_val
MetricLooks    also a few more: metrics that are not means over rows
NoChecks       all other batches: nothing is checked

Where does a new hint belong? If torch raises an error anyway: causes.py (a layer, the loss) or
torch_errors.py (reading, memory). If it silently trains wrongly: inputs.py, called from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from minikeras.batch import unpack
from minikeras.checks import causes, inputs, torch_errors, validation
from minikeras.checks.raw_scores import warn_of_raw_scores
from minikeras.checks.row_means import RowMeanCheck
from minikeras.checks.several_outputs import (
    check_extra_labels,
    check_third_part,
    find_failing_part,
    prefix_messages,
)
from minikeras.checks.weighted_means import warn_of_weighted_mean
from minikeras.errors import describe
from minikeras.nests import names_in, take_apart
from minikeras.overrides import overrides
from minikeras.phase import Batch, NoChecks, Phase
from minikeras.processes import OneProcess
from minikeras.results import Result, allow_waiting, has_parts, losses_in, unwrap_loss

if TYPE_CHECKING:
    from minikeras.model import Model
    from minikeras.run import Run


class Explanations(NoChecks):
    """Explain errors, and check nothing."""

    def __init__(self, phase: Phase, world: OneProcess) -> None:
        super().__init__(phase)
        self.world = world

    def explain_forward(self, error: Exception, model: Any, features: Any) -> None:
        """Name the layer in which forward failed and its input, or raise a plainer error."""
        causes.explain_forward(error, model, features, self.world)

    def explain_loss(self, error: Exception, outputs: Any, labels: Any) -> None:
        """Raise a plainer error than the loss did, if its cause is known."""
        part = find_failing_part(error)
        if part is None:
            causes.explain_squeezed(error, outputs, labels)
            causes.explain_loss(error, outputs, labels)
            return
        name, y_pred, y_true = part
        with prefix_messages(f"loss {name!r}"):
            causes.explain_squeezed(error, y_pred, y_true)
            causes.explain_loss(error, y_pred, y_true)
        error.add_note(f"loss {name!r}")

    def warn_of_squeezed(self, outputs: Any, labels: Any) -> None:
        """Warn of outputs that have lost the dimension of the batch."""
        causes.warn_of_squeezed(outputs, labels)

    def explain_step(self, error: Exception, batch: Batch) -> None:
        """Add what torch does not say: the shapes of a batch for which memory does not suffice."""
        torch_errors.explain_step(error, batch.features, batch.labels)

    def explain_reading(self, error: Exception, loader: Any) -> None:
        """Name the row that could not be read, or say what a worker may have died of."""
        torch_errors.explain_reading(error, loader)


class FirstBatch(Explanations):
    """Check the first batch of one phase, each time a fit or an evaluation begins."""

    is_first = True

    def __init__(self, model: Model, run: Run, phase: Phase) -> None:
        super().__init__(phase, run.world)
        self.model = model
        self.run = run
        # shared by train and val
        looks: Counter[str] = run.kept.setdefault("metric looks", Counter())
        self.row_means = RowMeanCheck(looks, run.device, run.world)
        self.later = MetricLooks(self)

    def begin_pass(self, current: NoChecks) -> NoChecks:
        """Look at metrics in the first batches of the first passes."""
        self.row_means.begin()
        if current is self.phase.no_checks and self.row_means.active:
            return self.later
        return current

    def after_batch(self, step: Callable[..., Any], results: Any) -> NoChecks:
        """Check that a step has returned a number under each name; then look at metrics alone."""
        inputs.check_results(results, step)
        return self.later.after_batch(step, results)

    def batch(self, step: Callable[..., Any], batch: Batch) -> None:
        """Check the parts of a batch, and look ahead at the first of dl_val."""
        phase = self.phase
        name = "train_step" if phase.is_training else "evaluate_step"
        needs_labels = inputs.needs_labels(self.model, self.run.loss_func, name)
        inputs.check_batch(
            step,
            batch.features,
            batch.labels,
            batch.sample_weight,
            batch.rows,
            needs_labels,
            is_split=self.run.split_batch is not unpack,
        )
        fit = self.run.fit
        if phase.is_training and fit is not None and fit.val is not None:
            validation.look_ahead(self.model, self.run, fit.val, batch.features, batch.labels)

    def loss(self, outputs: Any, labels: Any) -> Any:
        """Call the loss; raise an error for what it would silently compute wrongly."""
        loss_func = self.run.loss_func
        several = unwrap_loss(loss_func)
        if has_parts(several):
            self._check_extra_labels(outputs, labels)
            if self.run.split_batch is unpack:
                weight = self.phase.batch.sample_weight
                check_third_part(labels, weight, list(several.losses))
            with several.call_losses_by(self._loss_of_output):
                return loss_func(outputs, labels)
        self._check_loss_inputs(loss_func, outputs, labels)
        return inputs.guarded(loss_func, outputs, labels, "the loss", scalar=False)

    def _check_loss_inputs(self, loss: Any, y_pred: Any, y_true: Any) -> None:
        is_fitting = not self.run.train.checks.is_first
        inputs.check_loss_inputs(
            loss, y_pred, y_true, self.phase.is_training, self.model, is_fitting
        )
        batches = self.run.options.get("accumulate", 1)
        if self.phase.is_training and (self.world.size > 1 or batches > 1):
            what = f"training on {self.world.size} processes"
            if self.world.size == 1:
                what = f"accumulate={batches}"
            warn_of_weighted_mean(loss, y_true, what, self.world.rank == 0)

    def _loss_of_output(self, name: Any, loss: Any, y_pred: Any, y_true: Any) -> Any:
        """Call the loss of one of several outputs, and check it as one alone."""
        with prefix_messages(f"loss {name!r}"):
            self._check_loss_inputs(loss, y_pred, y_true)
        return inputs.guarded(loss, y_pred, y_true, f"loss {name!r}", scalar=False)

    def _check_extra_labels(self, outputs: Any, labels: Any) -> None:
        """Refuse labels that nothing uses, unless a metric or a custom step may use them all."""
        totals = self.phase.totals
        step = "train_step" if self.phase.is_training else "evaluate_step"
        if overrides(self.model, step, "compute_loss", "compute_metrics"):
            return
        of_metrics = []
        for name in [*totals.functions, *totals.objects]:
            output = getattr(totals.views.get(name), "output", None)
            if output is None:
                return
            of_metrics.append(output)
        check_extra_labels(outputs, labels, losses_in(self.run.loss_func), of_metrics)

    @torch.no_grad()
    def metrics(self, outputs: Any, labels: Any, with_functions: bool = True) -> dict[str, Result]:
        """Call each metric; refuse one that broadcasts outputs and labels or returns no number."""
        totals = self.phase.totals
        counts = not self.phase.batch.is_filler
        functions = totals.functions if with_functions else {}
        seen = {}
        for name in [*totals.objects, *functions]:
            seen[name] = self._see(name, outputs, labels)
        if counts:
            self._look_at_scores(totals.objects, outputs, seen)
        found: dict[str, int] = {}
        if functions and self.row_means.active:
            batch = self.phase.batch
            found = self.row_means.look(totals.calls, outputs, labels, batch, totals.views)
        if counts:
            for name, metric in totals.objects.items():
                inputs.guarded(metric.update, *seen[name], f"metric {name!r}", scalar=False)
            totals.mark_updated()
        results = {}
        with allow_waiting():  # a metric may read what it is given, in this batch
            for name, metric in functions.items():
                results[name] = inputs.guarded(metric, *seen[name], f"metric {name!r}")
        if found:
            self.row_means.tell(found)
        return results

    def _see(self, name: str, outputs: Any, labels: Any) -> tuple[Any, Any]:
        """Return outputs and labels as a metric sees them."""
        view = self.phase.totals.views.get(name)
        if view is None:
            return outputs, labels
        try:
            return view(outputs, labels)
        except Exception as error:
            given = f"outputs {describe(outputs)}, labels {describe(labels)}"
            error.add_note(f"metric {name!r}, before it was called, given {given}")
            raise

    def _look_at_scores(
        self, objects: dict[str, Any], outputs: Any, seen: dict[str, tuple[Any, Any]]
    ) -> None:
        if self.world.rank != 0:
            return
        looks = self.row_means.looks
        for name, metric in objects.items():
            if looks[name]:
                continue
            y_pred = seen[name][0]
            if warn_of_raw_scores(name, metric, y_pred, self._loss_of(y_pred, outputs)):
                looks[name] += 1

    def _loss_of(self, y_pred: Any, outputs: Any) -> Any:
        """Return the loss that is given this very tensor; None if that is not known."""
        losses = losses_in(self.run.loss_func)
        if y_pred is outputs:
            return losses.get("")
        container = take_apart(outputs, inside=True)
        if container is not None:
            for name, part in zip(names_in(outputs) or (), container[0], strict=False):
                if part is y_pred:
                    return losses.get(name)
        return None


class MetricLooks(Explanations):
    """Check the functions of metrics_dict in a few batches after the first."""

    def __init__(self, first: FirstBatch) -> None:
        super().__init__(first.phase, first.world)
        self.first = first

    def after_batch(self, step: Callable[..., Any], results: Any) -> NoChecks:
        """Continue as long as a metric has not been judged."""
        return self if self.first.row_means.active else self.phase.no_checks

    def metrics(self, outputs: Any, labels: Any, with_functions: bool = True) -> dict[str, Result]:
        """Call each metric, and warn about one that is not a mean over rows."""
        row_means = self.first.row_means
        totals = self.phase.totals
        found: dict[str, int] = {}
        if with_functions and totals.calls and row_means.active:
            batch = self.phase.batch
            with torch.no_grad():
                found = row_means.look(totals.calls, outputs, labels, batch, totals.views)
        results = super().metrics(outputs, labels, with_functions)
        if found:
            row_means.tell(found)
        return results
