"""Learning rates: a torch scheduler as a callback."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler

from minikeras.callbacks.monitor import Monitor, MonitoringCallback
from minikeras.columns import rate_name
from minikeras.errors import did_you_mean

# parts of a scheduler's state that it counts, or takes from its optimizer; the rest are settings
COUNTS = (
    "last_epoch",
    "base_lrs",
    "best",
    "num_bad_epochs",
    "cooldown_counter",
    "T_cur",
    "T_i",
    "verbose",
)
# what a scheduler writes into a group of its optimizer
RATES: tuple[str, ...] = (
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "base_momentum",
    "max_momentum",
)


class LRScheduler(MonitoringCallback):
    """Step a torch scheduler after each epoch or batch, and log the learning rate.

    The column is "lr", or "lr_<name>" if the model was compiled with several optimizers: the
    learning rate of the optimizer's first group in the last batch of the epoch. List this callback
    before those that read it, such as CSVLogger.

    Args:
        scheduler: from torch.optim.lr_scheduler, created with an optimizer that the model is
            compiled with. It continues over several fits, as its optimizer does.
        step: when to step, "epoch" or "batch"; default "epoch". "batch" means each step of the
            optimizer, as `model.optimizer_steps` counts them.
        monitor: only for ReduceLROnPlateau: the name that it watches. It steps in the epochs that
            log this name. No default.

    Raises:
        TypeError: not a torch scheduler.
        ValueError: a bad argument; when the fit begins, a scheduler of another optimizer, or a name
            with val_ without dl_val; at the end of an epoch, a name that is not logged.

    >>> import minikeras, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> model.compile(nn.MSELoss(), optimizer)
    >>> halve = minikeras.LRScheduler(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    >>> data = torch.zeros(8, 1), torch.ones(8, 1)
    >>> list(model.fit(3, data, callbacks=[halve], verbose=0)["lr"])
    [1.0, 0.5, 0.25]
    """

    def __init__(
        self, scheduler: lr_scheduler.LRScheduler, step: str = "epoch", monitor: str | None = None
    ) -> None:
        _check(scheduler, step, monitor)
        self.scheduler: Any = scheduler  # only ReduceLROnPlateau's step takes a value
        self.step = step
        self.monitor: Monitor | None = None
        if monitor is not None:
            self.monitor = Monitor("LRScheduler", monitor, "min")  # the scheduler itself compares
        self._reset_counts()
        self._record_start()

    def _record_start(self) -> None:
        """Record the scheduler and its optimizer as they are when a fit begins."""
        self.settings: dict[str, str] = settings_of(self.scheduler) | {"step": self.step}
        self.start_state: Any = copy.deepcopy(self.scheduler.state_dict())  # to replay from
        self.start_groups: list[dict[str, Any]] = []
        for group in self.scheduler.optimizer.param_groups:
            self.start_groups.append(settings_of_group(group))

    def _reset_counts(self) -> None:
        self.rate: Any = None  # of the last batch, if the scheduler steps after each batch
        self.steps_seen: int = 0  # steps of the optimizer already followed

    def on_fit_begin(self) -> None:
        self._reset_counts()
        names = []
        for name, optimizer in self.model._compiled("LRScheduler").optimizers.items():
            if optimizer is self.scheduler.optimizer:
                names.append(name)
        if not names:
            raise ValueError(
                f"LRScheduler has a {type(self.scheduler).__name__} of an optimizer that the model "
                f"was not compiled with. Make it with model.optimizer, or compile the model with "
                f"its optimizer."
            )
        self.optimizer_name: str = names[0]
        self.column: str = rate_name(self.optimizer_name)
        self._record_start()

    def _current_rate(self) -> Any:
        rate = self.scheduler.optimizer.param_groups[0]["lr"]
        if isinstance(rate, Tensor):
            return rate.clone()  # float(rate) would wait for the device
        return rate

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        if self.step == "batch":
            self.rate = self._current_rate()
            self._catch_up()

    def _steps_taken(self) -> int:
        """Return the steps that the scheduler's optimizer has taken in this fit."""
        steps: Any = self.model.optimizer_steps
        return int(steps[self.optimizer_name] if isinstance(steps, dict) else steps)

    def _catch_up(self) -> None:
        """Step the scheduler once for each step of the optimizer since the last call."""
        steps = self._steps_taken()
        for _ in range(self.steps_seen, steps):  # several with steps_per_execution
            self.scheduler.step()
        self.steps_seen = steps

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        rate = self.rate if self.step == "batch" else self._current_rate()
        # another scheduler of the same optimizer may have logged already, and stepped
        logs.setdefault(self.column, float(rate))
        if self.monitor is not None:
            value = self._read_monitored(self.monitor, logs)
            if value is not None:
                self.scheduler.step(value)
        elif self.step == "epoch":
            self.scheduler.step()
        else:
            self._catch_up()  # with the step that closed the last window of the epoch

    @property
    def schedule_settings(self) -> dict[str, str]:
        """What a resumed fit compares with the run before."""
        return self.settings

    def watched_names(self) -> list[tuple[str, str, str]]:
        return [] if self.monitor is None else self.monitor.watched_names()

    def state_dict(self) -> dict[str, Any]:
        scheduler = copy.deepcopy(self.scheduler.state_dict())  # torch returns its own lists
        state = {
            "scheduler": scheduler,
            "rate": self.rate,
            "taken": self.steps_seen,
        }
        if self.monitor is not None:
            state["monitor"] = self.monitor.state()
        return state | {"settings": dict(self.settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved_settings = state.get("settings", self.settings)
        own_monitor = None if self.monitor is None else self.monitor.state()
        same_monitor = state.get("monitor", own_monitor) == own_monitor
        if saved_settings["step"] != self.step:
            raise ValueError(
                f"the scheduler stepped after each {saved_settings['step']} so far, and "
                f'step="{self.step}" here. Pass step="{saved_settings["step"]}".'
            )
        if saved_settings != self.settings or not same_monitor:
            self._replace_schedule(state["scheduler"], same_monitor)
        else:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        self.rate = state["rate"]
        self.steps_seen = state.get("taken", 0)
        if hasattr(self, "model"):
            if "batch" in state and not self.steps_seen:  # an older file counts batches
                self.steps_seen = self._steps_taken()
            # a state may be of another fit, and each counts its steps from 0
            self.steps_seen = min(self.steps_seen, self._steps_taken())

    def _replace_schedule(self, saved: dict[str, Any], same_monitor: bool) -> None:
        """Continue with this script's scheduler where another one was saved.

        The scheduler is replayed from the beginning of the fit, so that its learning rates are
        those of a run that had it from the start. ReduceLROnPlateau cannot be replayed: the
        learning rate stays, and so do the counts that mean the same.
        """
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self._keep_counts(saved, same_monitor)
            return
        groups = self.scheduler.optimizer.param_groups
        added = groups[len(self.start_groups) :]  # by a callback
        del groups[len(self.start_groups) :]
        current = [settings_of_group(group) for group in groups]
        for group, start in zip(groups, self.start_groups, strict=True):
            group.update(copy.deepcopy(start))
        self._replay(saved["last_epoch"])
        names = RATES
        if getattr(self.scheduler, "cycle_momentum", False) or "cycle_momentum" in saved:
            names += ("momentum", "betas")
        for group, start, before in zip(groups, self.start_groups, current, strict=True):
            replayed = settings_of_group(group)
            group.update(before)
            for name, value in replayed.items():
                if name in names or value != start.get(name):
                    group[name] = value
        groups.extend(added)

    def _keep_counts(self, saved: dict[str, Any], same_monitor: bool) -> None:
        """Start ReduceLROnPlateau again with the saved counts, if they are of the same monitor."""
        kept = {}
        if same_monitor:
            for name in ("last_epoch", "best", "num_bad_epochs", "cooldown_counter"):
                if name in saved:
                    kept[name] = saved[name]
        self.scheduler.load_state_dict(copy.deepcopy(self.start_state) | kept)

    def _replay(self, last_epoch: int) -> None:
        """Step the scheduler from the beginning of the fit to `last_epoch`."""
        self.scheduler.load_state_dict(copy.deepcopy(self.start_state))
        with warnings.catch_warnings():
            # torch warns of a scheduler that steps before its optimizer
            warnings.simplefilter("ignore")
            for _ in range(self.start_state["last_epoch"], last_epoch):
                self.scheduler.step()


def settings_of(scheduler: Any) -> dict[str, str]:
    """Return a scheduler's class and its settings as strings that can be compared.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> settings_of(lr_scheduler.StepLR(optimizer, 3))
    {'class': 'StepLR', 'step_size': '3', 'gamma': '0.1'}
    """
    return {"class": type(scheduler).__name__} | settings_in(scheduler.state_dict())


def settings_in(state: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the settings in a scheduler's state_dict, and those of schedulers inside it."""
    settings: dict[str, str] = {}
    for name, value in state.items():
        if name in COUNTS:
            continue
        if is_list_of_dicts(value):
            for number, item in enumerate(value):
                settings |= settings_in(item, f"{prefix}{name.strip('_')}[{number}].")
        elif isinstance(value, dict) and not name.startswith("_"):
            settings[prefix + name] = repr(dict(value))
        elif name == "_milestones" or (not name.startswith("_") and is_simple(value)):
            settings[prefix + name.strip("_")] = repr(value)
    return settings


def is_list_of_dicts(value: Any) -> bool:
    """Tell whether a value is a list or tuple of one or more dicts."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(item, dict) for item in value)


def is_simple(value: Any) -> bool:
    """Tell whether a value is a number, a string, or a list of them."""
    if isinstance(value, (list, tuple)):
        return all(is_simple(item) for item in value)
    return isinstance(value, (bool, int, float, str))


def settings_of_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of an optimizer's group without its parameters."""
    settings = {}
    for name, value in group.items():
        if name != "params":
            settings[name] = value.clone() if isinstance(value, Tensor) else value
    return settings


def _check(scheduler: Any, step: Any, monitor: str | None) -> None:
    """Refuse wrong arguments of LRScheduler."""
    if not isinstance(scheduler, lr_scheduler.LRScheduler):
        got = f"the class {scheduler.__name__}" if isinstance(scheduler, type) else repr(scheduler)
        raise TypeError(
            f"scheduler must be a torch.optim.lr_scheduler.LRScheduler, got {got}. "
            f"Pass for instance torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)."
        )
    if step not in ("epoch", "batch"):
        hint = did_you_mean(step, ["epoch", "batch"]) if isinstance(step, str) else ""
        raise ValueError(f'step must be "epoch" or "batch", got {step!r}.{hint}')
    if step == "epoch" and isinstance(scheduler, (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)):
        raise ValueError(
            f"{type(scheduler).__name__} goes through its cycle batch by batch, and "
            f'step="epoch" would take one step of it in each epoch. '
            f'Pass LRScheduler(scheduler, step="batch").'
        )
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    if plateau and (monitor is None or step == "batch"):
        raise ValueError(
            "ReduceLROnPlateau needs the name of a value to watch, once an epoch. "
            'Pass LRScheduler(scheduler, monitor="val_loss").'
        )
    if monitor is not None and not plateau:
        raise ValueError(
            f"monitor={monitor!r} is for ReduceLROnPlateau, and {type(scheduler).__name__} "
            f"watches nothing. Leave monitor out."
        )
