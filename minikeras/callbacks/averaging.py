"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import get_ema_multi_avg_fn

from minikeras.callback import Callback
from minikeras.errors import real
from minikeras.support.sharded_tensors import as_part


@dataclass
class Lent:
    """What a model holds in place of its own weights, until the next epoch begins."""

    owner: EMA | None = None  # whose average it is; one of several EMAs lends
    raw: list[Tensor] = field(default_factory=list)  # the model's own weights
    filled_by: EMA | None = (
        None  # at the fit's end, another EMA that has put its average in their place
    )


class EMA(Callback):
    """Keeps an exponential moving average of the model's parameters, which the model holds after the fit.

    After the first step the average is the weights; after each later one, average = decay * average +
    (1 - decay) * weights, as in Tarvainen and Valpola 2017, "Mean teachers are better role models". Buffers, such as
    the running statistics of BatchNorm, are not averaged: they are always those of the training. A step is a batch,
    under `accumulate` one that moved the weights; under `steps_per_execution=n` the average takes the weights in once
    every n steps.

    Args:
        decay: how much of the average stays at each step, from 0 to 1; default 0.999, about the last 1000 steps.
        evaluate: from validation (from the epoch's end where none is due) until the next epoch begins, the model
            holds the averaged weights, so that validation, and ModelCheckpoint and EarlyStopping after this callback in
            the list, see those; default False.

    Raises:
        ValueError: `decay` is no number from 0 to 1.

    Several of them follow the same weights. Of those with evaluate=True the first in the list lends its average.

    Each fit starts afresh. When a fit ends the first callback in the list has the last word: put EMA before
    EarlyStopping(restore_best_weights=True) to end with the averaged weights, or after it to end with the best ones.
    A normal end with evaluate=True keeps the best ones either way.

    >>> import minikeras, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    >>> ema = minikeras.EMA(decay=0.99, evaluate=True)
    >>> dfhistory = model.fit(2, (torch.zeros(8, 1), torch.ones(8, 1)), callbacks=[ema], verbose=0)
    >>> torch.equal(model.net.bias, ema.averaged[-1])
    True
    """

    def __init__(self, decay: float = 0.999, evaluate: bool = False) -> None:
        self.decay: float = real("decay", decay, "between 0 and 1", lambda share: 0 <= share <= 1)
        self.evaluate = evaluate
        # alone: torch's AveragedModel waits for the GPU at each update
        self.average: Callable[..., Any] = get_ema_multi_avg_fn(self.decay)
        self._start()

    def _start(self) -> None:
        self.taken: int = 0  # steps of the optimizers that have been followed
        self.averaged: list[Tensor] = []  # empty before the first step

    def on_fit_begin(self) -> None:
        self._start()
        self._run.kept["lent"] = Lent()

    @property
    def _run(self) -> Any:
        return self.model._compiled("EMA")

    @property
    def _lent(self) -> Lent:
        """What the EMAs of this fit share."""
        return self._run.kept.get("lent") or Lent()

    def _weights(self) -> dict[str, Tensor]:
        there = [(name, p) for name, p in self.model.named_parameters() if not is_lazy(p)]
        return {name: p.detach() for name, p in there if p.is_floating_point() or p.is_complex()}

    def on_epoch_begin(self, epoch: int) -> None:
        """Give the model its own weights back as an `epoch` begins, whichever EMA has lent it others."""
        self._fill(self._lent.raw)
        self._run.kept["lent"] = Lent()

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        self._follow()

    def _steps(self) -> int:
        """The steps that all optimizers have taken in this fit."""
        steps = self.model.optimizer_steps
        return sum(steps.values()) if isinstance(steps, dict) else steps

    def _follow(self) -> None:
        """Take the weights in, if a step has moved them."""
        steps = self._steps()
        if steps <= self.taken:
            return
        self.taken = steps
        # those of the training, also where another EMA has lent the model its own already
        weights = self._lent.raw or list(self._weights().values())
        if self.averaged:
            self.average(self.averaged, weights, 0)  # the count means nothing to it
        else:
            self.averaged = [tensor.clone() for tensor in weights]

    def on_evaluate_begin(self) -> None:
        self._follow()  # by the step that closed the epoch's last window
        if self.evaluate and self.averaged and self._lent.owner is None:
            raw = [tensor.clone() for tensor in self._weights().values()]
            self._run.kept["lent"] = Lent(self, raw)
            self._fill(self.averaged)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.on_evaluate_begin()

    def on_fit_end(self) -> None:
        lent = self._lent
        lends = self.evaluate and lent.owner is not None
        if self.averaged and not (lends and lent.filled_by in (None, lent.owner)):
            self._fill(self.averaged)
            lent.filled_by = self
        lent.raw = []

    def _fill(self, tensors: list[Tensor]) -> None:
        for weight, tensor in zip(
            self._weights().values(), tensors, strict=False
        ):  # none, or one for each
            weight.copy_(tensor)

    def tensors(self) -> list[tuple[str, str, Tensor]]:
        """What a state holds: a title, the name of the parameter, and its average or its own value while it is lent."""
        names = list(self._weights())
        raw = self._lent.raw if self._lent.owner is self else []
        found = [
            (f"the EMA of {name}", name, tensor)
            for name, tensor in zip(names, self.averaged, strict=False)
        ]
        found += [
            (f"{name} in training", name, tensor) for name, tensor in zip(names, raw, strict=False)
        ]
        return found

    def state_dict(self) -> dict[str, Any]:
        averaged = [tensor.clone() for tensor in self.averaged]  # they go on changing
        lent = self._lent
        raw = lent.raw if lent.owner is self else []
        return {
            "taken": self.taken,
            "averaged": dict(zip(self._weights(), averaged, strict=False)),
            "raw": dict(zip(self._weights(), raw, strict=False)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        weights = self._weights().items()
        for part in ("averaged", "raw"):
            given = state[part]
            if given and any(
                name not in given or given[name].shape != weight.shape for name, weight in weights
            ):
                raise ValueError(
                    f"EMA: the state has {part} weights of another shape than the model's."
                )
        # another fit, which counts its steps from 0, may have written the state
        self.taken = min(state.get("taken", 0), self._steps())
        self.averaged = self._loaded(state["averaged"])
        if state["raw"]:
            self._run.kept["lent"] = Lent(self, self._loaded(state["raw"]))

    def _loaded(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        loaded = []
        if tensors:
            for name, weight in self._weights().items():
                loaded.append(as_part(tensors[name].to(weight.device, copy=True), weight))
        return loaded
