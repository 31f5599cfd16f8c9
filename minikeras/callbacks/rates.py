"""Learning rates: a torch scheduler as a callback."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler

from minikeras.callbacks.monitor import Monitor, Watching
from minikeras.columns import rate_name
from minikeras.errors import did_you_mean

# what a scheduler's state counts, and what it takes from its optimizer; all else are its settings
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
RATES: tuple[str, ...] = (
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "base_momentum",
    "max_momentum",
)  # of a group


class LRScheduler(Watching):
    """Steps a torch scheduler after each epoch or batch, and logs the rate that the epoch used.

    The column is "lr", or "lr_<name>" where the model was compiled with several optimizers: the rate of the optimizer's
    first group in the epoch's last batch. List this callback before those that read it, such as CSVLogger.

    Args:
        scheduler: from torch.optim.lr_scheduler, made with an optimizer that the model is compiled with. It goes on
            over several fits, as its optimizer does.
        step: when to step, "epoch" or "batch"; default "epoch". Under `accumulate` "batch" is each step of the
            optimizer; one that loss scaling skips in float16 counts too.
        monitor: the name that ReduceLROnPlateau watches, which steps in the epochs that log it; for it alone. No
            default.

    Raises:
        TypeError: something other than a torch scheduler.
        ValueError: a bad argument; at the fit's beginning, a scheduler of another optimizer, or a name with val_
            without dl_val; at an epoch's end, one that is not logged.

    >>> import minikeras, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> model.compile(nn.MSELoss(), optimizer)
    >>> halve = minikeras.LRScheduler(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    >>> list(model.fit(3, (torch.zeros(8, 1), torch.ones(8, 1)), callbacks=[halve], verbose=0)["lr"])
    [1.0, 0.5, 0.25]
    """

    def __init__(
        self, scheduler: lr_scheduler.LRScheduler, step: str = "epoch", monitor: str | None = None
    ) -> None:
        _check(scheduler, step, monitor)
        self.scheduler: Any = scheduler  # torch's step takes the value in ReduceLROnPlateau alone
        self.step = step
        self.monitor: Monitor | None = None
        if monitor is not None:
            self.monitor = Monitor("LRScheduler", monitor, "min")  # the scheduler judges
        self._afresh()
        self._look()

    def _look(self) -> None:
        """How the scheduler and its optimizer stand as a fit begins."""
        self.settings: dict[str, str] = settings_of(self.scheduler) | {"step": self.step}
        self.begun: Any = copy.deepcopy(self.scheduler.state_dict())  # to replay it from here
        self.groups: list[dict[str, Any]] = [
            settings_of_group(group) for group in self.scheduler.optimizer.param_groups
        ]

    def _afresh(self) -> None:
        self.rate: Any = None  # that the last batch used, where the scheduler steps after each
        self.taken: int = 0  # steps of the optimizer that have been followed

    def on_fit_begin(self) -> None:
        self._afresh()
        optimizers = self.model._compiled("LRScheduler").optimizers
        names = [name for name, one in optimizers.items() if one is self.scheduler.optimizer]
        if not names:
            raise ValueError(
                f"LRScheduler has a {type(self.scheduler).__name__} of an optimizer that the model was not compiled "
                f"with. Make it with model.optimizer, or compile the model with its optimizer."
            )
        self.name: str = names[0]
        self.column: str = rate_name(self.name)
        self._look()

    def _rate(self) -> Any:
        rate = self.scheduler.optimizer.param_groups[0]["lr"]
        return (
            rate.clone() if isinstance(rate, Tensor) else rate
        )  # not a float yet: that waits for the device

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        if self.step == "batch":
            self.rate = self._rate()
            self._follow()

    def _steps(self) -> int:
        """The steps that the scheduler's optimizer has taken in this fit."""
        steps: Any = self.model.optimizer_steps
        return int(steps[self.name] if isinstance(steps, dict) else steps)

    def _follow(self) -> None:
        """Step once for each step of the optimizer: several under steps_per_execution."""
        steps = self._steps()
        for _ in range(self.taken, steps):
            self.scheduler.step()
        self.taken = steps

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        rate = self.rate if self.step == "batch" else self._rate()
        logs.setdefault(
            self.column, float(rate)
        )  # a scheduler of the same optimizer may have logged, and stepped
        if self.monitor is not None:
            value = self.monitor.read(logs, self.validates)
            if value is not None:
                self.scheduler.step(value)
        elif self.step == "epoch":
            self.scheduler.step()
        else:
            self._follow()  # the step that closed the epoch's last window

    @property
    def schedule_settings(self) -> dict[str, str]:
        """What a resumed fit compares with the run before."""
        return self.settings

    def watched(self) -> list[tuple[str, str, str]]:
        return [] if self.monitor is None else self.monitor.watched()

    def state_dict(self) -> dict[str, Any]:
        scheduler = copy.deepcopy(self.scheduler.state_dict())  # torch hands out its own lists
        state = {
            "scheduler": scheduler,
            "rate": self.rate,
            "taken": self.taken,
        }
        if self.monitor is not None:
            state["monitor"] = self.monitor.state()
        return state | {"settings": dict(self.settings)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        written = state.get("settings", self.settings)
        monitor = None if self.monitor is None else self.monitor.state()
        if written["step"] != self.step:
            raise ValueError(
                f'the scheduler stepped after each {written["step"]} so far, and step="{self.step}" here. '
                f'Pass step="{written["step"]}".'
            )
        if written != self.settings or state.get("monitor", monitor) != monitor:
            self._take_over(state["scheduler"], state.get("monitor", monitor) == monitor)
        else:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        self.rate = state["rate"]
        self.taken = state.get("taken", 0)
        if hasattr(self, "model"):
            # another fit, which counts its steps from 0, may have written the state
            self.taken = min(self.taken, self._steps())

    def _take_over(self, written: dict[str, Any], same_monitor: bool) -> None:
        """Go on with the script's schedule where another one stood.

        The script's scheduler is replayed from the fit's beginning, so that its rates are those of a run that had it
        from the start. ReduceLROnPlateau cannot be replayed: the rate stays, and its counts where they mean the same.
        """
        scheduler = self.scheduler
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            counts = ("last_epoch", "best", "num_bad_epochs", "cooldown_counter")
            kept = {name: written[name] for name in counts if same_monitor and name in written}
            scheduler.load_state_dict(copy.deepcopy(self.begun) | kept)
            return
        names = RATES
        if getattr(scheduler, "cycle_momentum", False) or "cycle_momentum" in written:
            names += ("momentum", "betas")
        groups = scheduler.optimizer.param_groups
        added = groups[len(self.groups) :]  # by a callback
        del groups[len(self.groups) :]
        current = [settings_of_group(group) for group in groups]
        for group, begun in zip(groups, self.groups, strict=True):
            group.update(copy.deepcopy(begun))
        scheduler.load_state_dict(copy.deepcopy(self.begun))
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch's, of a scheduler that steps before its optimizer
            for _ in range(self.begun["last_epoch"], written["last_epoch"]):
                scheduler.step()
        for group, begun, was in zip(groups, self.groups, current, strict=True):
            replayed = settings_of_group(group)
            group.update(was)
            for name, value in replayed.items():
                if name in names or value != begun.get(name):
                    group[name] = value
        groups.extend(added)


def settings_of(scheduler: Any) -> dict[str, str]:
    """A scheduler's class and its own settings, in words that can be compared.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> settings_of(lr_scheduler.StepLR(optimizer, 3))
    {'class': 'StepLR', 'step_size': '3', 'gamma': '0.1'}
    """
    return {"class": type(scheduler).__name__} | settings_in(scheduler.state_dict())


def settings_in(state: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The settings among what a scheduler's state_dict holds; of schedulers inside it, too."""
    found: dict[str, str] = {}
    for name, value in state.items():
        nested = (
            isinstance(value, (list, tuple))
            and bool(value)
            and all(isinstance(item, dict) for item in value)
        )
        if name in COUNTS:
            continue
        if nested:
            for number, item in enumerate(value):
                found |= settings_in(item, f"{prefix}{name.strip('_')}[{number}].")
        elif isinstance(value, dict) and not name.startswith("_"):
            found[prefix + name] = repr(dict(value))
        elif name == "_milestones" or (not name.startswith("_") and is_simple(value)):
            found[prefix + name.strip("_")] = repr(value)
    return found


def is_simple(value: Any) -> bool:
    """Whether a value is a number, a word, or a list of them."""
    if isinstance(value, (list, tuple)):
        return all(is_simple(item) for item in value)
    return isinstance(value, (bool, int, float, str))


def settings_of_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's group without its parameters; a copy."""
    found = {}
    for name, value in group.items():
        if name != "params":
            found[name] = value.clone() if isinstance(value, Tensor) else value
    return found


def _check(scheduler: Any, step: Any, monitor: str | None) -> None:
    """Refuse arguments of LRScheduler that mean nothing."""
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
            f'{type(scheduler).__name__} goes through its cycle batch by batch, and step="epoch" would take one step '
            f'of it in each epoch. Pass LRScheduler(scheduler, step="batch").'
        )
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    if plateau and (monitor is None or step == "batch"):
        raise ValueError(
            "ReduceLROnPlateau needs the name of a value to watch, once an epoch. "
            'Pass LRScheduler(scheduler, monitor="val_loss").'
        )
    if monitor is not None and not plateau:
        raise ValueError(
            f"monitor={monitor!r} is for ReduceLROnPlateau, and {type(scheduler).__name__} watches nothing. "
            f"Leave monitor out."
        )
