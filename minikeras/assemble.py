"""From the arguments of compile and fit to the objects that the core runs with.

    make_run            compile -> Run: processes, stepper with its parts, phases, engine
    make_fit            fit -> Fit: sources of batches, parts and hooks of the fit, callbacks
    make_source         data of fit, evaluate and predict -> batches
    make_explanations   what says in the user's words why something failed

This is the only file that knows all capabilities. Each is a room, a folder or a file beside the
core: it is imported here when it is asked for, and every rule about two of them is here as well.
A room that works unasked (`import_room`) may be missing: the rest works to the bit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from minikeras.batch import Parts, choose_call, choose_device, unpack
from minikeras.callback import Callback, check_callbacks
from minikeras.columns import rate_name
from minikeras.engine import Eager
from minikeras.errors import check_one_of, check_positive_int
from minikeras.exported import check_not_exported
from minikeras.hooks import Fit, Hook, Position
from minikeras.metric_objects import View, name_metrics
from minikeras.modes import TrainingModes
from minikeras.nests import is_sharded
from minikeras.overrides import overrides
from minikeras.phase import NoChecks, Phase
from minikeras.processes import OneProcess
from minikeras.results import has_parts, losses_in, unwrap_loss
from minikeras.run import Run, has_own_step, keep_freed_memory, parameters_of, place, prepare
from minikeras.sources import (
    ContinuedBatches,
    as_batches,
    find_length,
    is_batched,
    make_empty_error,
)
from minikeras.stepper import Part, Stepper
from minikeras.totals import Totals

if TYPE_CHECKING:
    import pandas as pd

    from minikeras.model import Model

P = ParamSpec("P")
R = TypeVar("R")


def import_room(room: str) -> Any:
    """Import a room that works unasked; None if it is not there.

    It is looked for, not tried: a room that is broken must not look like one that is missing.
    """
    name = f"minikeras.{room}"
    if name not in sys.modules:
        parent = name.rpartition(".")[0]
        if parent != "minikeras" and import_room(parent.removeprefix("minikeras.")) is None:
            return None
        if importlib.util.find_spec(name) is None:
            return None
    return importlib.import_module(name)


# --- compile --------------------------------------------------------------------------------------


def make_run(
    model: Model,
    loss_func: Any,
    optimizer: Optimizer | Mapping[str, Optimizer] | None,
    metrics_dict: Mapping[str, Any] | None,
    device: str | torch.device | None,
    *,
    jit: Any,
    steps_per_execution: int,
    precision: str,
    clip_grad_norm: float | None,
    clip_grad_value: float | None,
    accumulate: int,
    split_batch: Callable[[Any], Any] | None,
    distributed: str | None,
    sync_batchnorm: bool,
    fsdp_blocks: Any,
) -> Run:
    """Check the arguments of compile and make a Run; model and loss are on the device then."""
    loss_func = make_loss(loss_func)
    columns_of_loss = columns_of_parts(loss_func)
    metrics, views = make_metrics(metrics_dict, columns_of_loss)
    optimizers = name_optimizers(optimizer)
    check_jit(jit, steps_per_execution)
    world = find_world(distributed)
    split = make_split(split_batch, 1 if world.size > 1 else steps_per_execution)
    chosen = world.device(choose_device(device))
    is_in_parts = distributed == "fsdp" or any(map(is_sharded, model.parameters()))
    if is_in_parts:
        check_fsdp(model, world, jit, precision)
    elif fsdp_blocks is not None:
        raise ValueError(
            f'fsdp_blocks needs distributed="fsdp", got distributed={distributed!r}. '
            f"Pass both or none."
        )
    train, val = (
        Phase(
            data,
            Totals(metrics, chosen, world, views, columns_of_loss),
            loss_func,
            make_test_of_arguments(model),
        )
        for data in ("dl_train", "dl_val")
    )
    place(model, loss_func, optimizers, chosen)
    if chosen.type == "cpu":
        keep_freed_memory()
    if optimizer is None:
        add_default_optimizer(optimizers, parameters_of(model, loss_func), chosen)
    parts = make_parts(
        chosen,
        loss_func,
        optimizers,
        world,
        precision=precision,
        clip_grad_norm=clip_grad_norm,
        clip_grad_value=clip_grad_value,
        accumulate=accumulate,
    )
    if world.size > 1:
        from minikeras.distributed import shards

        if sync_batchnorm:
            shards.sync_batchnorm(model, world, chosen)
        if is_in_parts:
            with world.verb("compile"):
                world.meet(model, fsdp_blocks=fsdp_blocks)
                world.share_weights(model, loss_func)
                shards.shard(model, fsdp_blocks, optimizers.values(), has_own_step(model), chosen)
            parts.append(shards.ShardedBackward())
    stepper = Stepper(optimizers, parts)
    run = Run(loss_func, optimizers, chosen, world, stepper, train, val, split)
    run.options = {
        "device": device,
        "jit": jit,
        "steps_per_execution": steps_per_execution,
        "precision": precision,
        "clip_grad_norm": clip_grad_norm,
        "clip_grad_value": clip_grad_value,
        "accumulate": accumulate,
        "split_batch": split_batch,
        "distributed": distributed,
        "sync_batchnorm": sync_batchnorm,
        "fsdp_blocks": fsdp_blocks,
    }
    for parameter in parameters_of(model, loss_func):
        run.parameters[id(parameter)] = parameter.requires_grad
    for phase in (train, val):
        phase.decorate = functools.partial(stepper.decorated, "around_metrics")
    add_first_batch_checks(model, run)
    run.engine = make_engine(model, run, jit, steps_per_execution)
    return run


def make_loss(loss_func: Any) -> Any:
    """The loss that compile was given; a dict of losses, for several outputs, as one loss."""
    if type(loss_func) is nn.ModuleDict:
        loss_func = dict(loss_func.items())
    if isinstance(loss_func, Mapping):
        from minikeras.by_name import LossesByName

        loss_func = LossesByName(loss_func)
    inputs = import_room("checks.inputs")
    if inputs is not None:
        inputs.check_callable("loss_func", loss_func)
        if has_parts(unwrap_loss(loss_func)):
            for name, loss in losses_in(loss_func).items():
                inputs.check_callable(f"loss {name!r}", loss)
    return loss_func


def columns_of_parts(loss_func: Any) -> list[str]:
    """The columns of the parts of a loss, if it has several."""
    loss = unwrap_loss(loss_func)
    return list(loss.columns.values()) if has_parts(loss) else []


def make_metrics(
    metrics_dict: Any, columns_of_loss: list[str]
) -> tuple[dict[str, Any], dict[str, View]]:
    """The metrics that compile was given, by column, and what some of them see of a batch."""
    inputs = import_room("checks.inputs")
    metrics_dict = {} if metrics_dict is None else metrics_dict
    if isinstance(metrics_dict, Mapping) and any(
        isinstance(metric, Mapping) for metric in metrics_dict.values()
    ):
        from minikeras.by_name import name_by_output

        metrics_dict = name_by_output(metrics_dict)
    if inputs is not None:
        inputs.check_metrics_dict(metrics_dict)
    metrics, views = name_metrics(metrics_dict)
    if inputs is not None:
        inputs.check_metrics_dict(metrics)
    for name in metrics:
        if name in columns_of_loss:
            raise ValueError(
                f"metrics_dict has the name {name!r}, which is the column of a loss of loss_func. "
                "Give the metric another name."
            )
    return metrics, views


def add_first_batch_checks(model: Model, run: Run) -> None:
    """Let the first batches of each fit and evaluation be looked at."""
    first_batch = import_room("checks.first_batch")
    for phase in (run.train, run.val):
        if first_batch is not None:
            phase.explanations = first_batch.FirstBatch(model, run, phase)
        phase.begin()


def make_explanations(model: Model) -> NoChecks:
    """What explains the errors of a model that has not been compiled."""
    phase = Phase(
        "dl", Totals({}, torch.device("cpu"), OneProcess()), None, make_test_of_arguments(model)
    )
    first_batch = import_room("checks.first_batch")
    if first_batch is None:
        return phase.no_checks
    explanations: NoChecks = first_batch.Explanations(phase, OneProcess())
    return explanations


def make_test_of_arguments(model: nn.Module) -> Callable[[Any], bool]:
    """Return a function that tells whether forward takes such features as several arguments."""
    return lambda features: choose_call(model, features) == "unpacked"


def name_optimizers(optimizer: Any) -> dict[str, Optimizer]:
    """A dict of optimizers from what compile was given; one alone goes by the name ''."""
    inputs = import_room("checks.inputs")
    if optimizer is None:
        return {}
    if inputs is not None:
        inputs.check_optimizer_argument(optimizer)
    return dict(optimizer) if isinstance(optimizer, Mapping) else {"": optimizer}


def add_default_optimizer(
    optimizers: dict[str, Optimizer], parameters: list[nn.Parameter], device: torch.device
) -> None:
    """Add Adam(lr=1e-3) on these parameters; frozen ones too, since they may be thawed later."""
    if not any(parameter.requires_grad for parameter in parameters):
        return
    # Fused, it can be held back when a loss is not finite; torch has it for floats alone.
    is_fused = device.type == "cuda" and all(p.is_floating_point() for p in parameters)
    optimizers[""] = torch.optim.Adam(parameters, lr=1e-3, fused=is_fused or None)


def find_world(distributed: str | None) -> OneProcess:
    """The processes that compile(distributed=...) trains with."""
    if distributed is None:
        return OneProcess()
    check_one_of("distributed", distributed, ("auto", "ddp", "fsdp"))
    starts_several = distributed != "auto" or "WORLD_SIZE" in os.environ
    if starts_several or has_process_group():
        from minikeras.distributed import world

        return world.world_of(distributed)
    return OneProcess()


def has_process_group() -> bool:
    """Tell whether the script has started a process group of torch's."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_fsdp(model: nn.Module, world: OneProcess, jit: Any, precision: str) -> None:
    """Refuse what does not go with parameters in parts, one part in each process.

    Raises:
        ValueError: jit, float16, or a model in parts that is to be trained in one process.
    """
    if jit:
        raise ValueError(
            'distributed="fsdp" and jit=True do not go together. Leave one of them out.'
        )
    if precision == "fp16":
        raise ValueError(
            'distributed="fsdp" and precision="fp16" do not go together. Pass precision="bf16".'
        )
    if world.size == 1 and any(map(is_sharded, model.parameters())):
        raise ValueError(
            "the model's parameters are in parts in several processes, and distributed=None "
            "trains in "
            'one alone. Compile with distributed="fsdp", or build the model again.'
        )


def make_parts(
    device: torch.device,
    loss_func: Any,
    optimizers: Mapping[str, Optimizer],
    world: Any,
    *,
    precision: str,
    clip_grad_norm: Any,
    clip_grad_value: Any,
    accumulate: int,
) -> list[Part]:
    """The parts of the stepper that compile asks for, from the outermost to the innermost."""
    parts: list[Part] = []
    check_one_of("precision", precision, ("fp32", "bf16", "fp16", "auto"))
    if clip_grad_norm is not None or clip_grad_value is not None:
        from minikeras.parts.clip import ClipGradients, check_clip

        parts.append(ClipGradients(*check_clip(clip_grad_norm, clip_grad_value)))
    dtype: torch.dtype | None = None
    if precision != "fp32":
        from minikeras.parts.mixed_precision import MixedPrecision, dtype_of

        dtype = dtype_of(precision, device, optimizers.values())
    if check_positive_int("accumulate", accumulate) > 1 or world.size > 1:
        from minikeras.parts.accumulate import Accumulate, check_mean

        if accumulate > 1:
            check_mean(loss_func, f"accumulate={accumulate}")
        if world.size > 1:
            check_mean(loss_func, f"training on {world.size} processes")
        parts.append(Accumulate(accumulate, world))
    if dtype is not None:
        parts.append(MixedPrecision(device, dtype))
    if world.size > 1:
        from minikeras.distributed import all_reduce

        parts.append(all_reduce.AllReduce(world))
    return parts


def check_jit(jit: Any, steps_per_execution: int) -> None:
    """Refuse arguments for compiled steps that make no sense.

    Raises:
        TypeError, ValueError: so it is.
    """
    if not isinstance(jit, bool | Mapping):
        raise TypeError(
            f"jit must be True, False or a dict of torch.compile's arguments, got {jit!r}."
        )
    ours = {"fullgraph", "dynamic"} & set(jit if isinstance(jit, Mapping) else ())
    if ours:
        raise ValueError(
            f"jit={jit!r}: {min(ours)} is set by minikeras, which makes one graph where it can and "
            f"says with a warning where it cannot. Leave it out; mode, backend and options are "
            f"yours."
        )
    if check_positive_int("steps_per_execution", steps_per_execution) > 1 and not jit:
        raise ValueError(
            f"steps_per_execution={steps_per_execution} needs jit=True, which makes a graph of "
            "the steps."
        )


def make_engine(model: Model, run: Run, jit: Any, steps_per_execution: int) -> Eager:
    """What runs the steps: Python, or compiled graphs."""
    if not jit:
        return Eager(model, run)
    from minikeras.jit import Jit  # it loads the compiler

    if run.world.size > 1:
        if run.world.rank == 0 and steps_per_execution > 1:
            warnings.warn(
                f"steps_per_execution={steps_per_execution} is 1 on {run.world.size} processes, "
                "which add up their gradients between backward and step. The numbers are the "
                "same. Leave it out there.",
                stacklevel=5,
            )
        steps_per_execution = 1
    return Jit(model, run, {} if jit is True else jit, steps_per_execution)


# --- data -----------------------------------------------------------------------------------------


def make_split(
    split_batch: Callable[[Any], Any] | None, steps_per_execution: int
) -> Callable[[Any], Parts]:
    """What splits a batch into features, labels, sample_weight and the rows that it states."""
    if split_batch is None:
        return unpack
    from minikeras.data.split_batch import SplitBatch

    return SplitBatch(split_batch, steps_per_execution)


def make_source(
    data: Any,
    name: str,
    batch_size: int | None,
    device: torch.device,
    world: OneProcess,
    shuffle: bool = False,
    passes: int = 1,
) -> Iterable[Any]:
    """What the user calls `name` as batches; this process's part of them."""
    fast = import_room("data.in_memory")
    options = {} if fast is None else {"fetch": fast.FastFetch()}
    batches = as_batches(data, name, batch_size, shuffle, device, passes, **options)
    return world.part_of(batches, name)


def make_source_of_evaluation(
    run: Run, dl_val: Any, batch_size: int | None, steps: int | None
) -> Iterable[Any]:
    """The batches of `evaluate`."""
    check_pass(dl_val, "dl_val", steps, "steps")
    batches = make_source(dl_val, "dl_val", batch_size, run.device, run.world)
    return limit_pass(batches, steps, "dl_val", "steps")


def make_source_of_prediction(
    dl: Any, batch_size: int | None, steps: int | None, device: torch.device, world: OneProcess
) -> Iterable[Any]:
    """The batches of `predict`."""
    check_pass(dl, "dl", steps, "steps")
    return limit_pass(make_source(dl, "dl", batch_size, device, world), steps, "dl", "steps")


def check_pass(data: Any, name: str, steps: int | None, argument: str) -> None:
    """Check how many batches a pass is to have; without a number the data must end."""
    if steps is not None:
        check_positive_int(argument, steps)
    endless = import_room("data.endless")
    if endless is not None:
        endless.check_ends(data, name, steps, argument)


def limit_pass(
    batches: Iterable[Any],
    steps: int | None,
    name: str,
    argument: str,
    training: tuple[Any, int | None] | None = None,
) -> Iterable[Any]:
    """The first `steps` batches of a pass, or all of them under the watch of a warning.

    Args:
        training: the fit's training batches and steps_per_epoch, which say how long is long.
    """
    if steps is None and find_length(batches) is not None:
        return batches
    if steps is not None:  # asked for: without the room it is an error that names it
        endless = importlib.import_module("minikeras.data.endless")
    else:
        endless = import_room("data.endless")
    if endless is None:
        return batches
    limit = endless.OUTSIDE_A_FIT if training is None else endless.long_pass(*training)
    result: Iterable[Any] = endless.limit_batches(batches, steps, name, argument, limit)
    return result


def make_sources_of_fit(
    run: Run,
    epochs: int,
    dl_train: Any,
    dl_val: Any,
    batch_size: int | None,
    steps_per_epoch: int | None,
    validation_steps: int | None,
    validation_freq: int,
) -> tuple[Iterable[Any], Iterable[Any] | None]:
    """What a fit trains on, and what it validates on or None; data without a batch is an error."""
    endless = import_room("data.endless")
    if endless is not None:
        endless.check_ends(dl_train, "dl_train", steps_per_epoch, "steps_per_epoch")
        endless.check_ends(dl_val, "dl_val", validation_steps, "validation_steps")
    passes = 1 if steps_per_epoch else epochs
    train = make_source(dl_train, "dl_train", batch_size, run.device, run.world, True, passes)
    if dl_val is None:
        if validation_steps is not None:
            raise ValueError(
                f"validation_steps={validation_steps} needs data to validate on. Pass dl_val as "
                f"well."
            )
        return train, None
    done = len(run.epochs)
    passes = (done + epochs) // validation_freq - done // validation_freq
    if validation_steps is not None:
        passes = 1  # a generator goes on where the last pass stopped
    size = None if is_batched(dl_val) else batch_size
    val = make_source(dl_val, "dl_val", size, run.device, run.world, passes=passes)
    if find_length(val) == 0:
        raise make_empty_error(val, "dl_val")
    training = (train, steps_per_epoch)
    return train, limit_pass(val, validation_steps, "dl_val", "validation_steps", training)


# --- fit ------------------------------------------------------------------------------------------


def make_fit(
    model: Model,
    run: Run,
    epochs: int,
    dl_train: Any,
    dl_val: Any,
    *,
    log_step_freq: int | None,
    batch_size: int | None,
    steps_per_epoch: int | None,
    validation_steps: int | None,
    validation_freq: int,
    callbacks: Iterable[Callback],
    verbose: str | int,
    checkpoint: str | Path | None,
    checkpoint_every: int | None,
    on_nan: str,
) -> Fit:
    """Check what fit was given, and put a Fit together; nothing has been trained then."""
    saved = make_checkpoint(checkpoint, checkpoint_every)
    check_one_of("on_nan", on_nan, ("raise", "stop", "ignore"))
    check_epochs(epochs, dl_train)
    check_positive_int("validation_freq", validation_freq)
    if log_step_freq is not None:
        check_positive_int("log_step_freq", log_step_freq)
    if validation_steps is not None:
        check_positive_int("validation_steps", validation_steps)
    train, val = make_sources_of_fit(
        run,
        epochs,
        dl_train,
        dl_val,
        batch_size,
        steps_per_epoch,
        validation_steps,
        validation_freq,
    )
    listed = check_callbacks(callbacks)
    data = {"dl_train": train, "dl_val": val}  # as each process reads it
    if saved is not None:
        train = saved.watched(train, val, model, run, listed)
    if steps_per_epoch is not None:
        steps_per_epoch = check_positive_int("steps_per_epoch", steps_per_epoch)
        train = ContinuedBatches(train, steps_per_epoch, "dl_train")
    check_listed(model, run, listed, val is not None, None if saved is None else saved.path)
    check_before_fit(model, run)
    run.modes = TrainingModes(model)
    run.world.meet(
        model,
        run,
        epochs=epochs,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        validation_steps=validation_steps,
        validation_freq=validation_freq,
        on_nan=on_nan,
        checkpoint=saved is not None,
        checkpoint_every=checkpoint_every,
        in_eval_mode=run.modes.look(),
        **data,
    )
    prepare(model, run)
    first = len(run.epochs) + 1
    last = len(run.epochs) + epochs
    if saved is None:
        run.kept.pop("unfinished", None)
    else:
        last = saved.open(model, run, epochs)
        saved.check_length(find_length(train))
    guard = make_guard(model, run, on_nan)
    together = make_together(run, listed, saved)
    fit = Fit(
        model,
        run,
        last,
        train,
        val,
        validation_freq,
        listed,
        parts=make_parts_of_fit(model, run, None if on_nan == "ignore" else guard, together),
        hooks=[],
        say=say_nothing,
        take_history=leave_history,
        at=Position(first),
    )
    fit.hooks = make_hooks(fit, saved, guard, together)
    show_fit(fit, verbose, log_step_freq)
    return fit


def make_checkpoint(path: Any, every: int | None) -> Any:
    """The checkpoint of a fit; None without a path."""
    if path is None:
        if every is not None:
            raise ValueError(
                f'checkpoint_every={every} needs a file. Pass checkpoint="run.pt" as well.'
            )
        return None
    from minikeras.checkpoint.state import Checkpoint

    return Checkpoint(path, every)


def check_epochs(epochs: Any, dl_train: Any) -> None:
    """Refuse a number of epochs that is none, as when the data comes first."""
    calls = import_room("checks.calls")
    hint = "" if calls is None else calls.order_of_fit(epochs, dl_train)
    check_positive_int("epochs", epochs, hint=hint)


def check_listed(
    model: Model, run: Run, callbacks: list[Callback], validates: bool, path: Path | None
) -> None:
    """Refuse callbacks that write to the same places, or wait for names that no epoch will log."""
    if not callbacks:
        return
    names = import_room("callbacks.names")
    if names is None:
        return
    from minikeras.callbacks import files

    files.check_places(callbacks, path)
    rates = [rate_name(name) for name in run.optimizers]
    names.check_monitors(callbacks, validates, find_logged_names(model, run, validates), rates)


def find_logged_names(model: Model, run: Run, validates: bool) -> list[str] | None:
    """Return the names that the default steps log; None if steps or metrics are custom objects."""
    totals = run.train.totals
    if overrides(model, "train_step", "evaluate_step", "compute_metrics") or totals.objects:
        return None
    names = list(totals.names)
    if validates:
        names += [f"val_{name}" for name in totals.names]
    return names


def check_before_fit(model: Model, run: Run) -> None:
    """Refuse a model and optimizers that would not train what the user has chosen."""
    published = run.published
    if "optimizer" in published and published["optimizer"] is not vars(model).get("optimizer"):
        raise ValueError(
            "model.optimizer was replaced after compile. Call model.compile with the new optimizer."
        )
    check_not_exported(model)
    inputs = import_room("checks.inputs")
    if inputs is not None:
        inputs.check_optimizers(model, run.loss_func, run.optimizers, run.parameters)
        if not has_own_step(model):
            inputs.check_closures(run.optimizers)
        if not has_custom_moves(model) and model.is_main_process:
            # a custom step may train a parameter without an optimizer
            inputs.warn_of_untrained_parameters(model, run.loss_func, run.optimizers)
    calls = import_room("checks.calls")
    if calls is not None:
        calls.check_trainable(model)


def make_guard(model: Model, run: Run, on_nan: str) -> Any:
    """What keeps NaN and infinities out of weights and files; None if its room is not there."""
    guard = import_room("faults.guard")
    if guard is None:
        return None
    scales = any(getattr(part, "scaler", None) is not None for part in run.stepper.compiled_parts)
    return guard.NaNGuard(model, run, on_nan, scales)


def make_together(run: Run, callbacks: list[Callback], saved: Any) -> Any:
    """What keeps several processes in lockstep; None for one."""
    if run.world.size == 1:
        return None
    from minikeras.distributed.together import KeepTogether

    world: Any = run.world
    return KeepTogether(world, callbacks, None if saved is None else saved.interruptions)


def make_parts_of_fit(
    model: Model, run: Run, guard: Part | None, together: Part | None
) -> list[Part]:
    """The parts of compile, and those that only a fit has, from the outermost to the innermost."""
    parts = list(run.stepper.compiled_parts)
    if guard is not None:  # it sees the loss before any other part changes it
        changing = [part for part in parts if changes_loss(part)]
        place_of_guard = parts.index(changing[0]) if changing else len(parts)
        parts.insert(place_of_guard, guard)
    if has_custom_moves(model) and run.stepper.bypassed:
        from minikeras.parts.bare_calls import RefuseBareCalls

        parts.append(RefuseBareCalls())
    if has_custom_moves(model) and run.world.size > 1:
        from minikeras.distributed.together import SameSteps

        world: Any = run.world
        parts.append(SameSteps(world))
    if together is not None:
        parts.append(together)
    return parts


def changes_loss(part: Part) -> bool:
    """Tell whether a part does something to the loss before it is differentiated."""
    return type(part).on_loss is not Part.on_loss or type(part).backward is not Part.backward


def has_custom_moves(model: Model) -> bool:
    """Tell whether the user's own code calls backward or the optimizer's step."""
    return overrides(model, "train_step", "backward", "optimizer_step")


def make_hooks(fit: Fit, saved: Any, guard: Any, together: Any) -> list[Hook]:
    """The hooks of a fit: of its contexts the first is the outermost."""
    run = fit.run
    hooks: list[Hook] = []
    if together is not None:
        hooks.append(together)
    losses = sys.modules.get("minikeras.losses")  # if it is not loaded, nobody has a penalty
    if losses is not None:
        hooks.append(losses.WeightsFoundOnce())
    epochs = import_room("data.epochs")
    if epochs is not None:
        hooks.append(epochs.SamplerEpochs())
    if has_custom_moves(fit.model):
        hooks.append(CountBareSteps())
    hooks.append(run.engine)
    for part in fit.parts:
        if isinstance(part, Hook) and part not in (guard, together):
            hooks.append(part)
    if saved is not None:
        hooks.append(saved)
    if guard is not None:
        hooks.append(guard)
    return hooks


class CountBareSteps(Hook):
    """Counts the steps of a custom train_step that calls `optimizer.step()` by itself."""

    def around_fit(self, fit: Fit) -> contextlib.AbstractContextManager[None]:
        """Count them during a fit."""
        return fit.run.stepper.counting_bare_steps()


def say_nothing(line: str) -> None:
    """Drop a line that a fit has for the user: nothing is shown."""


def leave_history(history: pd.DataFrame) -> None:
    """Leave the history that fit returns as it is."""


def show_fit(fit: Fit, verbose: str | int, log_step_freq: int | None) -> None:
    """Show the fit to the user as it goes on, if that is asked for and there is where to."""
    if verbose not in ("auto", 0, 1, 2):
        raise ValueError(
            f'verbose must be "auto", 0 (nothing), 1 (bar) or 2 (lines), got {verbose!r}.'
        )
    # under pythonw stdout is None
    if verbose == 0 or sys.stdout is None or not fit.model.is_main_process:
        return
    if import_room("report") is None:
        return
    from minikeras.report import notebook

    best = fit.run.best_val_loss()
    validates = fit.val is not None
    table = notebook.progress(
        verbose, fit.last_epoch, find_length(fit.train), log_step_freq, validates, best
    )
    fit.say = table.say
    fit.take_history = table.take_history
    fit.callbacks.append(table)


# --- weights in files -----------------------------------------------------------------------------


def save_weights(model: Model, path: str | Path, keep: bool) -> None:
    """Write the weights of a model to a file, once for all processes; see `Model._save`."""
    from minikeras.checkpoint import weights
    from minikeras.support.paths import user_path

    world = OneProcess() if model._run is None else model._run.world
    weights.save_weights(model, user_path(path), world, keep)


def load_weights(model: Model, path: str | Path) -> None:
    """Read the weights of a model from a file."""
    from minikeras.checkpoint import weights
    from minikeras.support.paths import user_path

    weights.load_weights(model, user_path(path))


# --- calls in other words -------------------------------------------------------------------------


def check_network(net: nn.Module) -> nn.Module:
    """What Model wraps, which must be a module."""
    inputs = import_room("checks.inputs")
    if inputs is None:
        return net
    network: nn.Module = inputs.network(net)
    return network


def explain_calls(method: Callable[P, R]) -> Callable[P, R]:
    """Let a method raise a TypeError that teaches, if a call does not fit its signature."""
    return _explained(method, "explain_call")


def explain_constructor_calls(method: Callable[P, R]) -> Callable[P, R]:
    """Let `Model.__init__` refuse what `compile` takes, and say so."""
    return _explained(method, "explain_constructor")


def _explained(method: Callable[P, R], lesson: str) -> Callable[P, R]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            calls = import_room("checks.calls")
            if calls is None:
                raise
            text = getattr(calls, lesson)(method.__name__, signature, args[1:], kwargs, error)
            raise TypeError(text) from None
        return method(*args, **kwargs)

    return call


def explain_missing_method(owner: str, name: str) -> None:
    """Raise the error for a method that Keras or torchkeras has and Model has not."""
    calls = import_room("checks.calls")
    if calls is not None:
        calls.missing_method(owner, name)


def explain_missing_name(name: str) -> Any:
    """Raise the error for a name that minikeras has not."""
    calls = import_room("checks.calls")
    if calls is None:
        raise AttributeError(f"module 'minikeras' has no attribute {name!r}")
    return calls.missing_name(name)
