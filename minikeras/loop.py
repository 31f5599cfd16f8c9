"""What happens to a fit, in calendar order.

fit:
    callbacks: on_fit_begin
    checkpoint: the state of the run from its file, where there is one
    for each epoch:
        train mode; samplers that shuffle by the epoch get its number
        callbacks: on_epoch_begin
        one_pass over dl_train:
            for each batch: to the device, model.train_step, add to the totals, callbacks: on_batch_end
            under accumulate: the step of the batches that are left
        when validation is due:
            callbacks: on_evaluate_begin
            one_pass over dl_val:
                for each batch: to the device, model.evaluate_step, add to the totals
            callbacks: on_evaluate_end
        one row of the history
        callbacks: on_epoch_end
        checkpoint: the state of the run to its file
        no further epoch, and after a batch no further batch, where model.stop_training was set
    callbacks: on_fit_end, however the fit ended

Between batches nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minikeras import checks
from minikeras.callbacks import Callback, check_row, with_method
from minikeras.checkpoint import Checkpoint, Position
from minikeras.data import ContinuedBatches, RowCounter, empty, placed, set_epoch, worked
from minikeras.distributed import World, settled
from minikeras.faults import (
    FiniteLoss,
    FiniteWeights,
    NonFiniteGradient,
    NonFiniteLoss,
    NonFiniteWeights,
    explain_gradient,
    explain_weights,
    explained,
    tell_of_reading,
    tell_of_step,
)
from minikeras.losses import weights_found_once
from minikeras.metrics import Totals
from minikeras.modes import gradients_recorded, modes_kept
from minikeras.randomness import Randomness, reseed
from minikeras.run import Run, learning_rates

if TYPE_CHECKING:
    from minikeras.model import Model

AfterBatch = Callable[[int], bool]  # of a batch's number; True ends the pass
Step = Callable[..., Mapping[str, Any]]  # train_step or evaluate_step


@dataclass
class Plan:
    """What one call of fit is to do."""

    last: int  # epoch
    train: Iterable[Any]
    val: Iterable[Any] | None
    validation_freq: int
    callbacks: list[Callback]
    say: Callable[[str], None]  # shows a line to the user
    checkpoint: Checkpoint
    on_nan: str  # "raise", "stop" or "ignore"


def fit(model: Model, run: Run, plan: Plan) -> None:
    """Train up to the last epoch; each whole epoch leaves its row in `run.epochs`, whatever happens later."""
    run.train.unseen = run.val.unseen = True
    model.stop_training = False
    world = run.world
    listeners, checkpoint = with_method(plan.callbacks, "on_batch_end"), plan.checkpoint
    jitted = run.jit.fitting(plan.say) if run.jit else contextlib.nullcontext()
    precise = run.precision.fitting(model) if run.precision else contextlib.nullcontext()
    with (
        marked_as_fitting(run),
        gradients_recorded(),
        random_states_apart(world),
        modes_kept(model),
        no_gradients_left(model, run),
        weights_found_once(model),
        jitted,
        precise,
        checkpoint.interruptions,
        watched_loss(run, plan),
        watched_weights(model, run),
        fit_callbacks(plan.callbacks, model),
        settled(model),
    ):
        train_step = run.jit.step("train_step") if run.jit else run.under_autocast(model.train_step)
        needs_labels = checks.inputs.needs_labels(model, run.loss_func, "train_step")

        def before_first(features: Any, labels: Any) -> None:
            if plan.val is not None:
                checks.validation.look_ahead(model, run, plan.val, features, labels)

        at = checkpoint.restore(plan.callbacks, plan.say)
        if run.modes.described():
            plan.say(f"in eval mode, as you left them: {run.modes.described()}")

        def after_batch(number: int) -> bool:
            return checkpoint.after_batch(at, number)

        while at.epoch <= plan.last:
            with (
                checkpoint.noted(),
                noted(f"epoch {at.epoch}"),
                ended_by_bad_loss(model, run, plan, at.epoch),
            ):
                run.modes.enter()
                for batches in (plan.train, plan.val):
                    set_epoch(batches, at.epoch - 1)
                checkpoint.epoch_begins()
                call(plan.callbacks, "on_epoch_begin", at.epoch)
                checkpoint.enter(at)
                if at.logs is None:
                    done = at.step
                    at.logs = one_pass(
                        run,
                        run.train,
                        train_step,
                        plan.train,
                        "dl_train",
                        listeners,
                        after_batch,
                        done,
                        needs_labels,
                        before_first,
                    )
                    if world is not None:
                        world.share(
                            model.buffers()
                        )  # each has counted its own rows: rank 0's go on
                logs = dict(at.logs)
                if plan.val is not None and at.epoch % plan.validation_freq == 0:
                    run.modes.look()  # before validation puts the whole model into eval mode
                    checkpoint.before_validation()
                    logs |= validate(model, run, plan, after_batch)
                run.epochs.append((logs, learning_rates(run)))
                call(plan.callbacks, "on_epoch_end", at.epoch, logs)
                at = Position(at.epoch + 1)
                checkpoint.epoch_ended(at)
            if model.stop_training and at.epoch <= plan.last:
                plan.say(f"stopped after epoch {len(run.epochs)} of {plan.last}")
                break


def validate(model: Model, run: Run, plan: Plan, after_batch: AfterBatch) -> dict[str, float]:
    """A fit's evaluation of dl_val, between two moments of its callbacks; the second comes even after an error."""
    assert plan.val is not None
    with contextlib.ExitStack() as stack:
        for callback in plan.callbacks:
            stack.callback(call, [callback], "on_evaluate_end")
            call([callback], "on_evaluate_begin")
        return evaluate(model, run, plan.val, after_batch)


def evaluate(
    model: Model, run: Run, batches: Iterable[Any], after_batch: AfterBatch = lambda number: False
) -> dict[str, float]:
    """The means over all rows of the batches, under names with val_."""
    loss = run.loss_func if isinstance(run.loss_func, nn.Module) else nn.Identity()
    with modes_kept(model, loss), torch.no_grad():
        model.eval()
        loss.eval()  # its mode in training is the user's affair: a network inside it may be frozen
        evaluate_step = (
            run.jit.step("evaluate_step") if run.jit else run.under_autocast(model.evaluate_step)
        )
        needs_labels = checks.inputs.needs_labels(model, run.loss_func, "evaluate_step")
        means = one_pass(
            run,
            run.val,
            evaluate_step,
            batches,
            "dl_val",
            (),
            after_batch,
            needs_labels=needs_labels,
        )
    return {f"val_{name}": mean for name, mean in means.items()}


def one_pass(
    run: Run,
    totals: Totals,
    step: Step,
    batches: Iterable[Any],
    name: str,
    listeners: Sequence[Callback] = (),
    after_batch: AfterBatch = lambda number: False,
    done: int = 0,
    needs_labels: bool = True,
    before_first: Callable[[Any, Any], None] | None = None,
) -> dict[str, float]:
    """Every batch once through `step`, until `after_batch` says to stop; returns the means over the rows.

    Where so many batches are `done`, `batches` begin after them and the totals hold them already.
    """
    before, run.totals = run.totals, totals  # a callback may evaluate in the middle of an epoch
    counter_before, run.row_counter = run.row_counter, RowCounter(run.takes_several)
    rows_before = run.rows
    if not done:
        totals.reset()
    flush = getattr(step, "flush", None)  # of a compiled step
    number = done
    remaining = batches.after(done) if isinstance(batches, ContinuedBatches) else batches
    features = labels = None
    try:
        for number, batch in fetched(remaining, done, name):
            batch, totals.idle = worked(batch)
            features, labels, sample_weight = placed(batch, run.device)
            rows = run.count_rows(features, labels, sample_weight)
            if totals.unseen:
                checks.inputs.check_batch(step, features, labels, sample_weight, rows, needs_labels)
                if before_first is not None:
                    before_first(features, labels)
            results = (
                step(features, labels)
                if sample_weight is None
                else step(features, labels, sample_weight)
            )
            if results is None and flush:  # it waits for others, to go through the graph together
                continue
            if totals.unseen or not isinstance(results, Mapping):
                checks.inputs.check_results(results, step)
            totals.add(results, rows)
            totals.unseen = False
            call(listeners, "on_batch_end", number, totals)
            if after_batch(number):
                break
        if not number:
            raise empty(batches, name)
        if flush and (rest := flush()):
            totals.add(rest, run.count_rows(features, labels))
            call(listeners, "on_batch_end", number, totals)
        if totals is run.train:
            trained(run)
        return totals.means()
    except Exception as error:
        tell_of_batch(error, features, labels, number, name)
        features = labels = sample_weight = batch = results = (
            None  # an error that is kept must not keep them
        )
        raise
    finally:
        run.totals, run.row_counter, run.rows = before, counter_before, rows_before


def trained(run: Run) -> None:
    """A pass of training has seen all its batches."""
    if run.finite_loss is not None:
        run.finite_loss.ended()
    if run.precision is not None:
        run.precision.finish()
    if run.finite_loss is not None:
        if run.precision is not None:
            run.finite_loss.ended()  # the norm of the last step
        if run.finite_weights is not None:
            run.finite_weights.check()


def tell_of_batch(error: Exception, features: Any, labels: Any, number: int, name: str) -> None:
    """Adds to an error at which batch it came, where that has not been said as the batch was read."""
    if isinstance(error, NonFiniteLoss):
        error.batch = (features, labels, number)
    elif not any(
        note.startswith((name, checks.validation.NOTE)) for note in getattr(error, "__notes__", ())
    ):
        tell_of_step(error, features, labels)
        error.add_note(f"{name}, batch {number}")


def fetched(batches: Iterable[Any], done: int, name: str) -> Iterator[tuple[int, Any]]:
    """The batches with their numbers; an error in reading one says which."""
    number = done
    try:
        for number, batch in enumerate(batches, start=done + 1):
            yield number, batch
    except Exception as error:
        tell_of_reading(error, getattr(batches, "loader", batches))
        error.add_note(f"{name}, batch {number + 1}, as it was read")
        raise


@contextlib.contextmanager
def marked_as_fitting(run: Run) -> Iterator[None]:
    """Set `run.fitting` meanwhile, so that a second fit or compile of the model can be refused."""
    run.fitting = True
    try:
        yield
    finally:
        run.fitting = False


@contextlib.contextmanager
def random_states_apart(world: World | None) -> Iterator[None]:
    """During a fit each process draws its own numbers, for dropout; after it they all go on as rank 0 does."""
    if world is None:
        yield
        return
    state = Randomness(torch.device("cpu"), [])
    seed = int(world.broadcast(torch.get_rng_state().long().sum().item() + torch.initial_seed()))
    if world.rank:
        reseed((seed + world.rank) % 2**63)
    world.apart = True
    try:
        yield
    finally:
        world.apart = False
    state.restore(world.broadcast(state.states()))


@contextlib.contextmanager
def no_gradients_left(model: nn.Module, run: Run) -> Iterator[None]:
    """Gradients from before the fit do not enter its first step, and none of a broken step stay behind."""

    def clear() -> None:
        model.zero_grad()
        for optimizer in run.optimizers.values():
            optimizer.zero_grad()

    clear()
    try:
        yield
    finally:
        clear()


@contextlib.contextmanager
def watched_loss(run: Run, plan: Plan) -> Iterator[None]:
    """`run.finite_loss` looks at each loss, unless on_nan="ignore"."""
    if plan.on_nan == "ignore":
        yield
        return
    counts = (run.jit.train.bad, True, run.jit.train.of_gradient) if run.jit else ()
    with FiniteLoss(run.device, run.optimizers.values(), *counts) as run.finite_loss:
        run.finite_loss.alone = run.world is None
        if run.precision is not None:
            run.precision.norm_watch = run.finite_loss
            run.finite_loss.skipped_elsewhere = run.precision.scaler is not None
        if run.precision is not None and run.world is not None:
            run.precision.finite_loss = run.finite_loss
        if run.precision is not None and not run.finite_loss.reads_each:
            run.precision.found = run.finite_loss.found
        try:
            yield
        finally:
            run.finite_loss = None


@contextlib.contextmanager
def watched_weights(model: Model, run: Run) -> Iterator[None]:
    """`run.finite_weights` looks at what a step leaves, and before anything is written to a file."""
    run.finite_weights = FiniteWeights(
        model, run.loss_func, run.optimizers, run.world, run.finite_loss, run.precision
    )
    try:
        yield
    finally:
        run.finite_weights = None


@contextlib.contextmanager
def ended_by_bad_loss(model: Model, run: Run, plan: Plan, epoch: int) -> Iterator[None]:
    """A loss that is not finite ends the fit: with an error, or with a warning and the history so far."""
    try:
        yield
    except NonFiniteLoss as error:
        message = explanation(error, model, run, epoch)
        if plan.on_nan == "raise":
            error.args = (message,)
            error.batch = error.culprit = None
            raise
        warnings.warn(message, stacklevel=2)
        model.stop_training = True


def explanation(error: NonFiniteLoss, model: Model, run: Run, epoch: int) -> str:
    """What is said of a loss, a gradient or weights that are not finite."""
    assert run.finite_loss is not None
    assert run.finite_weights is not None
    if run.jit is not None and run.jit.train.is_in_graph():
        run.finite_loss.skipped_elsewhere = True
    rates = learning_rates(run)
    if isinstance(error, NonFiniteWeights):
        return explain_weights(error, model, epoch, rates, run.finite_loss)
    if isinstance(error, NonFiniteGradient):
        return explain_gradient(error, model, epoch, rates, run.finite_loss)
    suspects = run.finite_weights.suspects()
    return explained(error, model, run.loss_func, epoch, rates, run.finite_loss, suspects)


@contextlib.contextmanager
def fit_callbacks(callbacks: Iterable[Callback], model: Model) -> Iterator[None]:
    """on_fit_begin at the start; on_fit_end at the end, however it comes, for those that began."""
    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            callback.model = model
            stack.callback(call, [callback], "on_fit_end")
            call([callback], "on_fit_begin")
        yield


def call(callbacks: Iterable[Callback], moment: str, *args: Any) -> None:
    """That method of each callback; an error in one says whose it is."""
    for callback in callbacks:
        try:
            getattr(callback, moment)(*args)
            if moment == "on_epoch_end":
                check_row(args[1])
        except Exception as error:
            error.add_note(f"{type(callback).__name__}.{moment}")
            raise


@contextlib.contextmanager
def noted(where: str) -> Iterator[None]:
    """Adds to any error where in the fit it happened."""
    try:
        yield
    except Exception as error:
        error.add_note(where)
        raise
