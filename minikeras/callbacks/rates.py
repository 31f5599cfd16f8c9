"""Learning rates: a torch scheduler as a callback."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler

from minikeras.callbacks.monitor import Monitor, Watching
from minikeras.errors import did_you_mean


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

    def __init__(self, scheduler: lr_scheduler.LRScheduler, step: str = "epoch", monitor: str | None = None) -> None:
        _check(scheduler, step, monitor)
        self.scheduler: Any = scheduler  # torch's step takes the value in ReduceLROnPlateau alone
        self.step = step
        self.monitor: Monitor | None = None
        if monitor is not None:
            self.monitor = Monitor("LRScheduler", monitor, "min")  # the scheduler judges
        self._afresh()

    def _afresh(self) -> None:
        self.rate: Any = None  # that the last batch used, where the scheduler steps after each
        self.batch: int = 0  # the last one of the epoch
        self.taken: int = 0  # steps of the optimizer that have been followed, under accumulate

    def on_fit_begin(self) -> None:
        self._afresh()
        optimizers = self.model._compiled("LRScheduler").optimizers
        names = [name for name, one in optimizers.items() if one is self.scheduler.optimizer]
        if not names:
            raise ValueError(
                f"LRScheduler has a {type(self.scheduler).__name__} of an optimizer that the model was not compiled "
                f"with. Make it with model.optimizer, or compile the model with its optimizer."
            )
        self.column: str = rate_name(names[0])

    def _rate(self) -> Any:
        rate = self.scheduler.optimizer.param_groups[0]["lr"]
        return rate.clone() if isinstance(rate, Tensor) else rate  # not a float yet: that waits for the device

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        if self.step == "batch":
            self.rate = self._rate()
            self._follow(batch)

    def _follow(self, batch: int) -> None:
        precision = self.model._compiled("LRScheduler").precision
        if precision is not None and precision.accumulate > 1:
            done, taken = self.taken, precision.windows[self.scheduler.optimizer].steps
            self.taken = taken
        else:
            done, taken = self.batch, batch
        for _ in range(done, taken):  # several under steps_per_execution
            self.scheduler.step()
        self.batch = batch

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        rate = self.rate if self.step == "batch" else self._rate()
        logs.setdefault(self.column, float(rate))  # a scheduler of the same optimizer may have logged, and stepped
        if self.monitor is not None:
            value = self.monitor.read(logs, self.validates)
            if value is not None:
                self.scheduler.step(value)
        elif self.step == "epoch":
            self.scheduler.step()
        else:
            self._follow(self.batch)  # the step that closed the epoch's last window
        self.batch = 0

    def watched(self) -> list[tuple[str, str, str]]:
        return [] if self.monitor is None else self.monitor.watched()

    def state_dict(self) -> dict[str, Any]:
        scheduler = copy.deepcopy(self.scheduler.state_dict())  # torch hands out its own lists
        return {"scheduler": scheduler, "rate": self.rate, "batch": self.batch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        self.rate, self.batch, self.taken = state["rate"], state["batch"], state.get("taken", 0)


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


def rate_name(optimizer: str) -> str:
    """The column of an optimizer's rate: lr, or lr_<name> where there are several optimizers."""
    return f"lr_{optimizer}" if optimizer else "lr"
