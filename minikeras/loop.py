"""What happens in a fit, in order of time.

run_fit:
    hooks: around_fit; callbacks: on_fit_begin
    hooks: resume                    the fit may stand in a later epoch now
    for each epoch (run_epoch):
        train mode
        callbacks: on_epoch_begin; hooks: before_epoch, on_epoch_begin
        run_pass over dl_train:
            for each batch: to the device, callbacks: on_batch_begin,
                            model.train_step, add to the totals,
                            callbacks: on_batch_end; hooks: on_batch_end
            the stepper takes the steps that are left
        hooks: on_train_end
        when validation is due:
            hooks: on_validation_begin; callbacks: on_evaluate_begin
            run_pass over dl_val:
                for each batch: to the device, model.evaluate_step, add to the totals
            callbacks: on_evaluate_end
        one row of the history
        callbacks: on_epoch_end; hooks: on_epoch_end
    no further batch and no further epoch once model.stop_training is set
    callbacks: on_fit_end, however the fit ends

Between batches nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

# torch prints with it as Python ends. Were it imported then, a Ctrl-C that ended the script would
# be forgotten: the exit status would be 1, and a shell would go on with the next command.
import tabulate  # noqa: F401
import torch
from torch import nn

from minikeras.batch import move_to_device, pins_memory
from minikeras.callback import Callback, check_row, with_method
from minikeras.engine import WAITING
from minikeras.hooks import Fit, Hook, Position
from minikeras.modes import keep_modes, record_gradients
from minikeras.phase import NO_BATCH, FillerBatch, Phase
from minikeras.results import Result
from minikeras.run import Run, has_own_step, parameters_of, remember_buffers
from minikeras.sources import make_empty_error
from minikeras.stepper import optimizer_parameters

if TYPE_CHECKING:
    from minikeras.model import Model

BatchEnd = Callable[[int], bool]  # of a batch's number; True ends the pass
# of a batch's number and what its step returned
BatchResults = Callable[[int, Mapping[str, Result]], None]


def run_fit(fit: Fit) -> None:
    """Train up to the last epoch; each whole epoch leaves its row in `run.epochs`."""
    model, run = fit.model, fit.run
    model.stop_training = False
    run.train.begin()
    run.val.begin()
    with contextlib.ExitStack() as contexts:
        contexts.enter_context(mark_as_fitting(fit))
        contexts.enter_context(record_gradients())
        contexts.enter_context(keep_modes(model))
        contexts.enter_context(clear_gradients(model, run))
        contexts.enter_context(use_parts_of_fit(fit))
        for hook in fit.hooks:
            contexts.enter_context(hook.around_fit(fit))
        contexts.enter_context(call_fit_callbacks(fit))
        for hook in fit.hooks:
            hook.resume(fit)
        for line in run.modes.describe():
            fit.say(line)
        while fit.at.epoch <= fit.last_epoch:
            run_epoch(fit)
            if model.stop_training and fit.at.epoch <= fit.last_epoch:
                fit.say(f"stopped after epoch {len(run.epochs)} of {fit.last_epoch}")
                break


def run_epoch(fit: Fit) -> None:
    """Train and validate once, and set `fit.at` to where the next epoch begins."""
    run, at = fit.run, fit.at
    with contextlib.ExitStack() as contexts:
        for hook in fit.hooks:
            contexts.enter_context(hook.around_epoch(fit))
        contexts.enter_context(note_errors(f"epoch {at.epoch}"))
        run.modes.enter()
        for hook in fit.hooks:
            hook.before_epoch(fit)
        clear_other_gradients(fit.model, run)
        call(fit.callbacks, "on_epoch_begin", at.epoch)
        for hook in fit.hooks:
            hook.on_epoch_begin(fit)
        if at.logs is None:
            on_batch_begin = make_on_batch_begin(fit)
            on_batch_end = make_on_batch_end(fit, run.train)
            after_batch = make_after_batch(fit, is_training=True)
            at.logs = run_pass(
                run, run.train, fit.train, at.step, on_batch_begin, on_batch_end, after_batch
            )
            for hook in fit.hooks:
                hook.on_train_end(fit)
        logs = dict(at.logs)
        if fit.val is not None and at.epoch % fit.validation_freq == 0:
            run.modes.look()  # before validation puts the whole model into eval mode
            for hook in fit.hooks:
                hook.on_validation_begin(fit)
            logs |= validate(fit)
        run.epochs.append((logs, run.learning_rates()))
        call(fit.callbacks, "on_epoch_end", at.epoch, logs)
        fit.at = Position(at.epoch + 1)
        for hook in fit.hooks:
            hook.on_epoch_end(fit)


def validate(fit: Fit) -> dict[str, float]:
    """Evaluate dl_val between on_evaluate_begin and on_evaluate_end, which errors do not skip."""
    assert fit.val is not None
    with contextlib.ExitStack() as contexts:
        for callback in fit.callbacks:
            contexts.callback(call, [callback], "on_evaluate_end")
            call([callback], "on_evaluate_begin")
        after_batch = make_after_batch(fit, is_training=False)
        return evaluate(fit.model, fit.run, fit.val, after_batch)


def evaluate(
    model: Model, run: Run, batches: Iterable[Any], after_batch: BatchEnd | None = None
) -> dict[str, float]:
    """Return the means over all rows of the batches, under names with val_."""
    loss = run.loss_func if isinstance(run.loss_func, nn.Module) else nn.Identity()
    with keep_modes(model, loss), torch.no_grad():
        model.eval()
        loss.eval()  # its mode in training is the user's affair: a network inside it may be frozen
        means = run_pass(run, run.val, batches, after_batch=after_batch)
    return {f"val_{name}": mean for name, mean in means.items()}


def run_pass(
    run: Run,
    phase: Phase,
    batches: Iterable[Any],
    done: int = 0,
    on_batch_begin: Callable[[int], None] | None = None,
    on_batch_end: BatchResults | None = None,
    after_batch: BatchEnd | None = None,
) -> dict[str, float]:
    """Take every batch once through the phase's step; return the means over the rows.

    Args:
        done: how many batches have been taken, which the totals hold already.
        on_batch_begin: called with a batch's number before its step, but not for a batch that goes
            through a graph together with the one before.
        on_batch_end: called with a batch's number after its step, and with the step's results.
        after_batch: called with a batch's number after its step, but not for batches that waited
            at the end; True ends the pass.
    """
    previous, run.phase = run.phase, phase  # a callback may evaluate in the middle of an epoch
    phase.begin_pass()
    if not done:
        phase.totals.reset()
    step = run.engine.step(phase)
    split_batch = run.split_batch
    pinned = pins_memory(batches)
    number = done
    results: Any = None
    try:
        for number, given in number_batches(batches, done, phase):
            is_filler = isinstance(given, FillerBatch)
            if is_filler:  # repeated to keep in step with other processes: counts for nothing
                given = given.batch
                put_back = remember_buffers(run.engine.model, run.loss_func)
            features, labels, sample_weight, rows = move_to_device(
                given, run.device, split_batch, pinned
            )
            batch = phase.take(number, features, labels, sample_weight, is_filler, rows)
            phase.checks.batch(step, batch)
            if on_batch_begin is not None and results is not WAITING:
                on_batch_begin(number)
            if sample_weight is None:
                results = step(features, labels)
            else:
                results = step(features, labels, sample_weight)
            if is_filler:
                put_back()
            if results is WAITING:  # for other batches, to go through a graph together
                continue
            phase.add(step, results)
            if on_batch_end is not None:
                on_batch_end(number, results)
            if after_batch is not None and after_batch(number):
                break
        if not number:
            raise make_empty_error(batches, phase.data)
        rest = run.engine.flush(phase)
        if rest is not None:
            phase.add(step, rest)
            if on_batch_end is not None:
                on_batch_end(number, rest)
        if phase.is_training:
            run.stepper.end_pass()
        sums, counts = phase.totals.summed()  # its error for NaN weights names the last batch
        phase.batch = NO_BATCH  # what metric objects raise now is not of that batch
        return phase.totals.means(sums, counts)
    except Exception as error:
        note_batch(error, phase, number)
        # an error that is kept must not keep a batch
        features = labels = sample_weight = given = batch = results = None  # type: ignore[assignment]
        raise
    finally:
        run.phase = previous
        phase.totals.last = {}, False


def number_batches(batches: Iterable[Any], done: int, phase: Phase) -> Iterator[tuple[int, Any]]:
    """Yield the batches with their numbers; an error in reading one says which."""
    number = done
    try:
        remaining: Any = batches
        if done:  # a resumed fit: its source knows where it stands
            remaining = remaining.after(done)
        for number, batch in enumerate(remaining, start=done + 1):
            yield number, batch
    except Exception as error:
        if getattr(error, "says_where", False):
            raise
        phase.explanations.explain_reading(error, getattr(batches, "loader", batches))
        error.add_note(f"{phase.data}, batch {number + 1}, as it was read")
        raise


def note_batch(error: Exception, phase: Phase, number: int) -> None:
    """Add to an error at which batch it came, unless it says so itself."""
    if getattr(error, "says_where", False):
        return
    batch, phase.batch = phase.batch, NO_BATCH
    if any(note.startswith(phase.data) for note in getattr(error, "__notes__", ())):
        return
    if batch.number == number:  # else it has not come as far as that
        phase.explanations.explain_step(error, batch)
    error.add_note(f"{phase.data}, batch {number}")


# --- callbacks and hooks --------------------------------------------------------------------------


def make_on_batch_begin(fit: Fit) -> Callable[[int], None] | None:
    """What tells the callbacks of a batch before its step; None if none of them listens."""
    listeners = with_method(fit.callbacks, "on_batch_begin")
    if not listeners:
        return None

    def on_batch_begin(number: int) -> None:
        call(listeners, "on_batch_begin", number)

    return on_batch_begin


def make_on_batch_end(fit: Fit, phase: Phase) -> BatchResults | None:
    """What tells the callbacks of a batch after its step; None if none of them listens."""
    listeners = with_method(fit.callbacks, "on_batch_end")
    if not listeners:
        return None
    totals = phase.totals

    def on_batch_end(number: int, results: Mapping[str, Result]) -> None:
        totals.last = results, phase.batch.is_filler
        call(listeners, "on_batch_end", number, totals)

    return on_batch_end


def make_after_batch(fit: Fit, is_training: bool) -> BatchEnd:
    """What tells the hooks of a batch, and whether to end a pass over the training data."""
    model, at = fit.model, fit.at
    listeners = []
    for hook in fit.hooks:
        if type(hook).on_batch_end is not Hook.on_batch_end:
            listeners.append(hook)

    def after_training(number: int) -> bool:
        at.step = number
        for hook in listeners:
            hook.on_batch_end(fit, number)
        return model.stop_training

    def after_validating(number: int) -> bool:
        for hook in listeners:
            hook.on_batch_end(fit, number)
        return False

    return after_training if is_training else after_validating


def call(callbacks: Iterable[Callback], moment: str, *args: Any) -> None:
    """Call each callback's method for a moment; an error says whose it is."""
    for callback in callbacks:
        try:
            getattr(callback, moment)(*args)
            if moment == "on_epoch_end":
                check_row(args[1])
        except Exception as error:
            error.add_note(f"{type(callback).__name__}.{moment}")
            raise


@contextlib.contextmanager
def call_fit_callbacks(fit: Fit) -> Iterator[None]:
    """Call on_fit_begin at the start, and on_fit_end however the fit ends, of those that began."""
    with contextlib.ExitStack() as contexts:
        for callback in fit.callbacks:
            callback.model = fit.model
            contexts.callback(call, [callback], "on_fit_end")
            call([callback], "on_fit_begin")
        contexts.callback(fit.model._publish_history)  # before the callbacks
        yield


# --- what surrounds a fit -------------------------------------------------------------------------


@contextlib.contextmanager
def mark_as_fitting(fit: Fit) -> Iterator[None]:
    """Set `run.fit` meanwhile, so that a second fit or compile of the model can be refused."""
    run = fit.run
    run.fit = fit
    try:
        yield
    finally:
        run.fit = None
        run.train.batch = run.val.batch = NO_BATCH


@contextlib.contextmanager
def use_parts_of_fit(fit: Fit) -> Iterator[None]:
    """Give the stepper the parts of this fit, and those of compile back at the end."""
    stepper = fit.run.stepper
    stepper.begin(fit.parts)
    try:
        yield
    finally:
        stepper.end()


@contextlib.contextmanager
def clear_gradients(model: nn.Module, run: Run) -> Iterator[None]:
    """Keep gradients from before the fit out of its first step, and leave none of a broken step."""

    def clear() -> None:
        for parameter in parameters_of(model, run.loss_func):
            parameter.grad = None
        for optimizer in run.optimizers.values():
            optimizer.zero_grad()

    clear()
    try:
        yield
    finally:
        clear()


def clear_other_gradients(model: Model, run: Run) -> None:
    """Clear the gradients of parameters that no optimizer has: they have added up over steps.

    A callback may give such parameters to an optimizer now, as in fine-tuning. A custom train_step
    may step by hand.
    """
    if has_own_step(model):
        return
    filled = []
    for parameter in parameters_of(model, run.loss_func):
        if parameter.grad is not None:
            filled.append(parameter)
    if not filled:
        return
    of_optimizers = set()
    for optimizer in run.optimizers.values():
        of_optimizers.update(optimizer_parameters(optimizer))
    for parameter in filled:
        if parameter not in of_optimizers:
            parameter.grad = None


@contextlib.contextmanager
def note_errors(note: str) -> Iterator[None]:
    """Add a note to any error."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise
