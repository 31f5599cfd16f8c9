"""All that compile sets up, in one plain object beside the module: nothing of it enters the model's state_dict."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras import checks
from minikeras.callbacks import column_order, rate_name
from minikeras.data import (
    RowCounter,
    UnknownRows,
    as_batches,
    check_ends,
    choose_device,
    empty,
    first_sizes,
    is_batched,
    length,
    limited,
    long_pass,
    manner,
    sharded,
)
from minikeras.distributed import World, is_part, settle, shard, world_of
from minikeras.errors import did_you_mean, positive_int
from minikeras.exported import check_not_exported
from minikeras.faults import FiniteLoss, FiniteWeights
from minikeras.losses import parameters_of
from minikeras.metrics import Totals, by_column
from minikeras.overrides import overrides
from minikeras.precision import Precision, precision_of
from minikeras.results import Average

if TYPE_CHECKING:
    from minikeras.model import Model


@dataclass
class Run:
    """What compile sets up, and what a fit adds to it."""

    loss_func: Any
    optimizers: dict[str, Optimizer]  # one alone goes by the name ""
    train: Totals
    val: Totals
    device: torch.device
    parameters: set[int] = field(default_factory=set)  # the ids of the parameters at compile
    published: dict[str, Any] = field(
        default_factory=dict
    )  # the model's plain attributes that are ours, as set
    jit: Any = None  # a minikeras.jit.Jit, where compile was asked for it
    begun: Any = (
        None  # optimizers' settings and what is frozen, as the first fit with a checkpoint began
    )
    under_way: Any = (
        None  # of a fit that has not come to its end: its checkpoint's path, and its first epoch
    )
    world: World | None = None  # where several processes train together
    by_parts: bool = False  # forward and loss are compiled each by itself: for steps of the user's own, and to predict
    carried_on: set[str] = field(
        default_factory=set
    )  # steps that were taken in the fit before it was carried on here
    precision: Precision | None = (
        None  # where compile was asked for mixed precision, clipping or accumulation
    )
    rows: int | UnknownRows = 0  # of the batch at hand
    row_counter: RowCounter = field(default_factory=RowCounter)  # of the pass that is under way
    takes_several: Callable[[Any], bool] = lambda features: (
        False
    )  # whether forward takes such features apart
    totals: Totals = field(init=False)  # of the phase that is under way
    lent: Any = None  # during a fit with EMA, a minikeras.callbacks.averaging.Lent
    fitting: bool = False  # a fit of this model is running
    modes: Any = None  # of the last fit, a minikeras.modes.TrainingModes
    finite_loss: FiniteLoss | None = None  # during a fit, unless on_nan="ignore"
    finite_weights: FiniteWeights | None = None  # during a fit
    epochs: list[tuple[dict[str, float], dict[str, float]]] = field(
        default_factory=list
    )  # logs and learning rates

    def __post_init__(self) -> None:
        self.totals = self.val

    def named(self, optimizer: str | None) -> list[Optimizer]:
        """The optimizer of that name, or all of them."""
        if optimizer is None:
            return list(self.optimizers.values())
        if optimizer not in self.optimizers:
            known = ", ".join(map(repr, self.optimizers))
            hint = "one without a name. Leave the name out." if known == "''" else f"{known}."
            hint += did_you_mean(optimizer, self.optimizers)
            raise ValueError(f"there is no optimizer {optimizer!r}; compile was given {hint}")
        return [self.optimizers[optimizer]]

    def under_autocast(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A step, or what gives outputs, in the precision that compile was asked for."""
        return step if self.precision is None else self.precision.under_autocast(step)

    def inputs(self, optimizer: str) -> list[Tensor]:
        """The parameters that the optimizer of that name trains."""
        (one,) = self.named(optimizer)
        return [
            parameter
            for group in one.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def call(self, name: str, function: Any, outputs: Any, labels: Any, scalar: bool = True) -> Any:
        """A loss or metric called, in the first batch under the eyes of checks.inputs.guarded."""
        if self.totals.unseen:
            return checks.inputs.guarded(function, outputs, labels, name, scalar=scalar)
        return function(outputs, labels)

    def count_rows(
        self, features: Any, labels: Any, sample_weight: Any = None
    ) -> int | UnknownRows:
        """The rows of a batch, noted as those of the batch at hand.

        A third part has a weight for each row: it settles what labels and features do not agree on.
        """
        rows = self.row_counter.count(features, labels)
        if isinstance(sample_weight, Tensor) and sample_weight.ndim:
            weights = len(sample_weight)
            if isinstance(rows, UnknownRows) or weights in first_sizes((features, labels)):
                rows = weights
        self.rows = rows
        return rows

    def check_rows(self, *results: Any) -> None:
        """Raise an error if the batch's rows are unknown and one of these means is over them."""
        if isinstance(self.rows, UnknownRows) and not all(
            isinstance(result, Average) for result in results
        ):
            self.rows.refuse()

    def batches(
        self, dl: Any, name: str, batch_size: int | None, shuffle: bool = False, passes: int = 1
    ) -> Any:
        """What the user has as batches on the device; this process's part of them."""
        return sharded(
            as_batches(dl, name, batch_size, shuffle, self.device, passes), self.world, name
        )

    def batches_of_fit(
        self,
        dl_train: Any,
        dl_val: Any,
        batch_size: int | None,
        epochs: int,
        steps: int | None,
        validation_freq: int,
        validation_steps: int | None = None,
    ) -> tuple[Iterable[Any], Any]:
        """What a fit trains on, and what it validates on or None; without a batch that is an error before an epoch."""
        check_ends(dl_train, "dl_train", steps, "steps_per_epoch")
        check_ends(dl_val, "dl_val", validation_steps, "validation_steps")
        train = self.batches(dl_train, "dl_train", batch_size, True, 1 if steps else epochs)
        if dl_val is None and validation_steps is not None:
            raise ValueError(
                f"validation_steps={validation_steps} needs data to validate on. Pass dl_val as well."
            )
        if dl_val is None:
            return train, None
        done = len(self.epochs)
        passes = (done + epochs) // validation_freq - done // validation_freq
        if validation_steps is not None:
            passes = 1  # a generator goes on where the last pass stopped
        val = self.batches(
            dl_val, "dl_val", None if is_batched(dl_val) else batch_size, passes=passes
        )
        if length(val) == 0:
            raise empty(val, "dl_val")
        return train, limited(
            val, validation_steps, "dl_val", "validation_steps", long_pass(train, steps)
        )

    def best_val_loss(self) -> float:
        """The lowest so far; infinite before the first."""
        return min(
            (logs["val_loss"] for logs, _ in self.epochs if "val_loss" in logs), default=math.inf
        )

    def history(self) -> pd.DataFrame:
        """The rows so far: training columns first, then validation's, then a learning rate that has changed."""
        rows, rates = [logs for logs, _ in self.epochs], [rates for _, rates in self.epochs]
        names = list(dict.fromkeys(name for row in rows for name in row))
        changed = [
            name
            for name in (rates[0] if rates else ())
            if len({row.get(name) for row in rates}) > 1
        ]
        names = column_order([*names, *(name for name in changed if name not in names)])
        merged = [
            rate | logs for logs, rate in self.epochs
        ]  # where a callback logs a rate, its own value stays
        index = pd.RangeIndex(len(rows))  # from 0; the epoch's number is one more
        return pd.DataFrame(
            {name: [row.get(name, math.nan) for row in merged] for name in names}, index
        )


def made(
    model: Model,
    loss_func: Any,
    optimizer: Optimizer | Mapping[str, Optimizer] | None,
    metrics_dict: Mapping[str, Any] | None,
    device: str | torch.device | None,
    jit: bool | Mapping[str, Any],
    steps_per_execution: int,
    precision: str,
    distributed: str | None = None,
    sync_batchnorm: bool = False,
    fsdp_blocks: Any = None,
    **big: Any,
) -> Run:
    """What compile's arguments make, checked; the model and its loss are on the device."""
    metrics_dict = {} if metrics_dict is None else metrics_dict
    checks.inputs.check_callable("loss_func", loss_func)
    checks.inputs.check_metrics_dict(metrics_dict)
    metrics_dict = by_column(metrics_dict)
    checks.inputs.check_metrics_dict(metrics_dict)
    optimizers = {} if optimizer is None else checks.inputs.named_optimizers(optimizer)
    check_jit(jit, steps_per_execution)
    world = world_of(distributed)
    chosen = choose_device(device) if world is None else world.device(choose_device(device))
    looks: Counter[str] = Counter()
    train, val = (Totals(metrics_dict, chosen, world, looks) for _ in ("train", "val"))
    run = Run(loss_func, optimizers, train, val, chosen, world=world)
    run.takes_several = lambda features: manner(model, features) == "unpacked"
    if distributed == "fsdp" or any(map(is_part, model.parameters())):
        check_parts(model, run, jit, precision)
    elif fsdp_blocks is not None:
        raise ValueError(
            f'fsdp_blocks needs distributed="fsdp", got distributed={distributed!r}. Pass both or none.'
        )
    place(model, run)
    trained = list(parameters_of(model, loss_func))  # with what is frozen: it may be thawed later
    if optimizer is None and any(parameter.requires_grad for parameter in trained):
        # fused, it can be held back where a loss is not finite; torch has it for floats alone
        fused = chosen.type == "cuda" and all(
            parameter.is_floating_point() for parameter in trained
        )
        run.optimizers[""] = torch.optim.Adam(trained, lr=1e-3, fused=fused or None)
    run.precision = precision_of(chosen, loss_func, run.optimizers, precision, **big, world=world)
    if sync_batchnorm and world is not None:
        over_all_rows(model, world, chosen)
    if world is not None and (distributed == "fsdp" or any(map(is_part, model.parameters()))):
        share(model, run, world)
        shard(model, fsdp_blocks, run.optimizers.values(), has_own_step(model), chosen)
    run.parameters = {id(parameter) for parameter in parameters_of(model, loss_func)}
    if jit:
        run.jit = jit_of(model, run, jit, steps_per_execution)
        run.by_parts = run.jit.overrides("train_step")
    return run


def check_parts(model: Model, run: Run, jit: Any, precision: str) -> None:
    """Parameters in parts, one in each process, do not go with everything."""
    if jit:
        raise ValueError(
            'distributed="fsdp" and jit=True do not go together. Leave one of them out.'
        )
    if precision == "fp16":
        raise ValueError(
            'distributed="fsdp" and precision="fp16" do not go together. Pass precision="bf16".'
        )
    if run.world is None and any(map(is_part, model.parameters())):
        raise ValueError(
            "the model's parameters are in parts in several processes, and distributed=None trains in one alone. "
            'Compile with distributed="fsdp", or build the model anew.'
        )


def check_jit(jit: Any, steps_per_execution: int) -> None:
    """Whether the steps can be compiled as asked for."""
    if not isinstance(jit, bool | Mapping):
        raise TypeError(
            f"jit must be True, False or a dict of torch.compile's arguments, got {jit!r}."
        )
    ours = {"fullgraph", "dynamic"} & set(jit if isinstance(jit, Mapping) else ())
    if ours:
        raise ValueError(
            f"jit={jit!r}: {min(ours)} is set by minikeras, which makes one graph where it can and says with a warning "
            f"where it cannot. Leave it out; mode, backend and options are yours."
        )
    if positive_int("steps_per_execution", steps_per_execution) > 1 and not jit:
        raise ValueError(
            f"steps_per_execution={steps_per_execution} needs jit=True, which makes a graph of the steps."
        )


def jit_of(model: Model, run: Run, jit: Any, steps_per_execution: int) -> Any:
    """The steps as compiled graphs."""
    from minikeras.jit import Jit  # on first use: it loads the compiler

    if run.world is not None and run.world.rank == 0 and steps_per_execution > 1:
        warnings.warn(
            f"steps_per_execution={steps_per_execution} is 1 on {run.world.size} processes, which add up their "
            f"gradients between backward and step. The numbers are the same. Leave it out there.",
            stacklevel=5,
        )
    return Jit(
        model, run, {} if jit is True else jit, steps_per_execution if run.world is None else 1
    )


def over_all_rows(model: Model, world: World, device: torch.device) -> None:
    """BatchNorm takes the rows of all processes together; the state_dict's keys stay."""
    if device.type == "cpu":
        raise ValueError(
            f"sync_batchnorm=True with {world.size} processes needs GPUs: torch has no SyncBatchNorm for the CPU. "
            f"Leave it out, and choose a batch_size that is enough for the statistics of each process."
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def place(model: Model, run: Run) -> None:
    """Model, loss and optimizer state on the device; costs nothing where they are there already."""
    model.to(run.device)
    if isinstance(run.loss_func, nn.Module):
        run.loss_func.to(run.device)
    for optimizer in run.optimizers.values():
        if any(_strayed(parameter, state) for parameter, state in optimizer.state.items()):
            optimizer.load_state_dict(
                optimizer.state_dict()
            )  # torch's own way to put state beside its parameter


def ready(model: Model, run: Run) -> None:
    """In place, and with the weights of rank 0 where there are several processes."""
    settle(model)
    place(model, run)
    if run.world is not None and not run.world.shared:
        share(model, run, run.world)


def share(model: Model, run: Run, world: World) -> None:
    """All get the weights of rank 0; what is in parts has come from it already."""
    loss = run.loss_func if isinstance(run.loss_func, nn.Module) else nn.Identity()
    tensors = [*parameters_of(model, run.loss_func), *model.buffers(), *loss.buffers()]
    world.share([tensor for tensor in tensors if not is_part(tensor)])
    world.shared = True


def _strayed(parameter: Tensor, state: Mapping[str, Any]) -> bool:
    # a 0-d tensor such as Adam's step stays on the CPU by torch's own choice
    return any(
        isinstance(v, Tensor) and v.ndim and v.device != parameter.device for v in state.values()
    )


def check_optimizers(model: Model, run: Run) -> None:
    """Before a fit: they are those of compile, and train the model's parameters."""
    if "optimizer" in run.published and run.published["optimizer"] is not vars(model).get(
        "optimizer"
    ):
        raise ValueError(
            "model.optimizer was replaced after compile. Call model.compile with the new optimizer."
        )
    check_not_exported(model)
    checks.inputs.check_optimizers(model, run.loss_func, run.optimizers, run.parameters)
    if not has_own_step(model):
        checks.inputs.check_closures(run.optimizers)


def has_own_step(model: Model) -> bool:
    """Tell whether train_step is the user's."""
    return overrides(model, "train_step")


def names_logged(model: Model, run: Run, validates: bool) -> list[str] | None:
    """The names that the default steps log in an epoch; None where steps or metrics are the user's own objects."""
    steps = ("train_step", "evaluate_step", "compute_metrics")
    if overrides(model, *steps) or run.train.objects:
        return None
    names = list(run.train.names)
    if validates:
        names += [f"val_{name}" for name in run.train.names]
    return names


def learning_rates(run: Run) -> dict[str, float]:
    """The rate of each optimizer's first group, where it has one by the name of lr."""
    rates = {rate_name(name): one.param_groups[0].get("lr") for name, one in run.optimizers.items()}
    return {name: float(rate) for name, rate in rates.items() if rate is not None}
