"""The exponential moving average of the weights."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from minikeras.callback import Callback
from minikeras.errors import check_number_in_range
from minikeras.support.sharded_tensors import as_part


@functools.cache  # not kept by the callback, which could not be pickled then
def make_update_of_average(decay: float) -> Callable[..., Any]:
    """Return torch's function that updates averages in place, given new values and a count."""
    # not torch's AveragedModel: it waits for the GPU at each update
    update: Callable[..., Any] = get_ema_multi_avg_fn(decay)
    return update


@dataclass
class Lent:
    """Averaged weights that a model holds instead of its own until the next epoch begins."""

    owner: EMA | None = None  # the EMA that lends its average; with several, only one does
    raw: list[Tensor] = field(default_factory=list)  # the model's own weights
    # at the end of the fit: another EMA that has replaced them with its average
    filled_by: EMA | None = None


# the share of the first step's weights in the final average above which a warning is due
STILL_INITIAL = 0.05


class EMA(Callback):
    """Keep an exponential moving average of the parameters; the model holds it after the fit.

    After the first step the average equals the weights. After each later step it is
    average = decay * average + (1 - decay) * weights, as in Tarvainen and Valpola 2017, "Mean
    teachers are better role models". Buffers, such as the running statistics of BatchNorm, are not
    averaged: they are always those of the training. A step is one of `model.optimizer_steps`, of
    any optimizer; it is looked at after each batch, and with `steps_per_execution=n` once every n
    steps.

    Args:
        decay: the share of the average that remains at each step, from 0 to 1; default 0.999,
            about the last 1000 steps. Choose it by the steps of the fit, about 1 - 5 / steps: if
            more than 5 % of the final average is still the weights of the first step, the fit ends
            with a warning.
        evaluate: the model holds the averaged weights from validation (without validation, from
            the end of the epoch) until the next epoch begins. Validation uses them, and so do
            ModelCheckpoint and EarlyStopping if they come after this callback in the list.
            Default False.

    Raises:
        ValueError: `decay` is not a number from 0 to 1.

    Several EMAs average the same weights. Of those with evaluate=True, the first in the list lends
    its average to the model.

    Each fit starts a new average. At the end of a fit the first callback in the list acts last: put
    EMA before EarlyStopping(restore_best_weights=True) to end with the averaged weights, or after
    it to end with the best weights. With evaluate=True a fit that ends normally keeps the best
    weights in either order.

    >>> import minikeras, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    >>> ema = minikeras.EMA(decay=0.9, evaluate=True)
    >>> data = torch.zeros(8, 1), torch.ones(8, 1)
    >>> dfhistory = model.fit(50, data, callbacks=[ema], verbose=0)
    >>> torch.equal(model.net.bias, ema.averaged[-1])
    True
    """

    def __init__(self, decay: float = 0.999, evaluate: bool = False) -> None:
        self.decay: float = check_number_in_range(
            "decay", decay, "between 0 and 1", lambda share: 0 <= share <= 1
        )
        self.evaluate = evaluate
        self._reset()

    def _reset(self) -> None:
        self.steps_seen: int = 0  # steps of the optimizers already averaged
        self.updates: int = 0  # of the average, after the first step
        self.averaged: list[Tensor] = []  # empty before the first step
        self._steps_at_epoch_end: int | None = None

    def on_fit_begin(self) -> None:
        self._reset()
        self._run.kept["lent"] = Lent()

    @property
    def _run(self) -> Any:
        return self.model._compiled("EMA")

    @property
    def _lent(self) -> Lent:
        """Return what the EMAs of this fit share."""
        return self._run.kept.get("lent") or Lent()

    def _weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, parameter in self.model.named_parameters():
            if is_lazy(parameter):
                continue
            if parameter.is_floating_point() or parameter.is_complex():
                weights[name] = parameter.detach()
        return weights

    def on_epoch_begin(self, epoch: int) -> None:
        """Give the model its own weights back before `epoch`, whichever EMA lent its average."""
        self._set_weights(self._lent.raw)
        self._run.kept["lent"] = Lent()

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        self._update()

    def _steps_taken(self) -> int:
        """Return the steps that all optimizers have taken in this fit."""
        steps = self.model.optimizer_steps
        return sum(steps.values()) if isinstance(steps, dict) else steps

    def _update(self) -> None:
        """Update the average if a step has changed the weights."""
        steps = self._steps_taken()
        if steps <= self.steps_seen:
            return
        self.steps_seen = steps
        # the training's weights, even if another EMA has already lent its average to the model
        weights = self._lent.raw or list(self._weights().values())
        if self.averaged:
            # torch ignores the count
            make_update_of_average(self.decay)(self.averaged, weights, 0)
            self.updates += 1
        else:
            self.averaged = [tensor.clone() for tensor in weights]

    def on_evaluate_begin(self) -> None:
        self._update()  # the step that closed the last window of the epoch comes after its batch
        if self.evaluate and self.averaged and self._lent.owner is None:
            raw = [tensor.clone() for tensor in self._weights().values()]
            self._run.kept["lent"] = Lent(self, raw)
            self._set_weights(self.averaged)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.on_evaluate_begin()
        self._steps_at_epoch_end = self.steps_seen

    def on_fit_end(self) -> None:
        lent = self._lent
        lends = self.evaluate and lent.owner is not None
        if self.averaged and not (lends and lent.filled_by in (None, lent.owner)):
            self._set_weights(self.averaged)
            lent.filled_by = self
        lent.raw = []
        self._warn_of_initial_weights()

    def _warn_of_initial_weights(self) -> None:
        """Warn if the average is still the first step's weights for a good part."""
        if self._steps_at_epoch_end != self.steps_seen:  # an error or Ctrl-C ends the fit
            return
        share = self.decay**self.updates
        if not self.updates or share <= STILL_INITIAL or not self.model.is_main_process:
            return
        averaged = self.updates + 1
        fitting = max(0.0, 1 - float(f"{5 / averaged:.1g}"))
        warnings.warn(
            f"EMA(decay={self.decay:.7g}): after {averaged} steps, {share:.0%} of the average is "
            f"still the weights of the first step. For this many steps take about 1 - 5 / steps: "
            f"EMA(decay={fitting:.6g}).",
            stacklevel=2,
        )

    def _set_weights(self, tensors: list[Tensor]) -> None:
        """Copy tensors into the model's weights; there are none, or one for each weight."""
        for weight, tensor in zip(self._weights().values(), tensors, strict=False):
            weight.copy_(tensor)

    def _raw_weights(self) -> list[Tensor]:
        """Return the model's own weights while this EMA lends its average, else an empty list."""
        lent = self._lent
        return lent.raw if lent.owner is self else []

    def tensors(self) -> list[tuple[str, str, Tensor]]:
        """Return the tensors of the state: a title, the parameter's name, and the tensor.

        They are each parameter's average, and its own value while the average is lent.
        """
        names = list(self._weights())
        found = []
        for name, tensor in zip(names, self.averaged, strict=False):
            found.append((f"the EMA of {name}", name, tensor))
        for name, tensor in zip(names, self._raw_weights(), strict=False):
            found.append((f"{name} in training", name, tensor))
        return found

    def state_dict(self) -> dict[str, Any]:
        averaged = [tensor.clone() for tensor in self.averaged]  # the originals keep changing
        return {
            "taken": self.steps_seen,
            "updates": self.updates,
            "averaged": dict(zip(self._weights(), averaged, strict=False)),
            "raw": dict(zip(self._weights(), self._raw_weights(), strict=False)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part in ("averaged", "raw"):
            self._check_shapes(part, state[part])
        # a state may be of another fit, and each counts its steps from 0
        self.steps_seen = min(state.get("taken", 0), self._steps_taken())
        # a file of an earlier version has no number of updates
        self.updates = state.get("updates", max(state.get("taken", 0) - 1, 0))
        self.averaged = self._to_device(state["averaged"])
        if state["raw"]:
            self._run.kept["lent"] = Lent(self, self._to_device(state["raw"]))

    def _check_shapes(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        for name, weight in self._weights().items():
            if name not in tensors or tensors[name].shape != weight.shape:
                raise ValueError(
                    f"EMA: the state has {part} weights of another shape than the model's."
                )

    def _to_device(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Copy loaded tensors to the devices of the weights, sharded as the weights are."""
        copies = []
        if tensors:
            for name, weight in self._weights().items():
                copies.append(as_part(tensors[name].to(weight.device, copy=True), weight))
        return copies
