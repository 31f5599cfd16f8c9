"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from minikeras.callbacks.base import Callback
from minikeras.errors import real


class EMA(Callback):
    """Keeps an exponential moving average of the model's parameters, which the model holds after the fit.

    After the first batch the average is the weights; after each later one, average = decay * average +
    (1 - decay) * weights. Buffers, such as the running statistics of BatchNorm, are not averaged: they are always
    those of the training. Under `steps_per_execution=n` the average takes the weights in once every n steps.

    Args:
        decay: how much of the average stays at each batch, from 0 to 1; default 0.999, about the last 1000 batches.
        evaluate: from validation (from the epoch's end where none is due) until the next epoch begins, the model
            holds the averaged weights, so that validation, and ModelCheckpoint and EarlyStopping after this callback in
            the list, see those.

    Each fit starts afresh. When a fit ends the first callback in the list has the last word: put EMA before
    EarlyStopping(restore_best_weights=True) to end with the averaged weights, or after it to end with the best ones.
    A normal end with evaluate=True keeps the best ones either way.

    >>> import minikeras, torch
    >>> from torch import nn
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    >>> ema = minikeras.EMA(decay=0.99, evaluate=True)
    >>> dfhistory = model.fit(2, (torch.zeros(8, 1), torch.ones(8, 1)), callbacks=[ema], verbose=0)
    """

    def __init__(self, decay: float = 0.999, evaluate: bool = False) -> None:
        self.decay = real("decay", decay, "between 0 and 1", lambda share: 0 <= share <= 1)
        self.evaluate = evaluate
        self.on_fit_begin()

    def on_fit_begin(self) -> None:
        self.averaged: AveragedModel | None = None
        self.raw: list[Tensor] = []  # the model's own weights, as long as it holds the averaged ones

    def on_epoch_begin(self, epoch: int) -> None:
        if self.raw:
            _copy(self.raw, self.model.parameters())
            self.raw = []

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        averaged = self.averaged or self._start()
        averaged.update_parameters(self.weights)

    def _start(self) -> AveragedModel:
        self.weights = nn.ParameterList(self.model.parameters())  # the model's own, without its buffers and hooks
        self.averaged = AveragedModel(self.weights, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        return self.averaged

    def on_evaluate_begin(self) -> None:
        if self.evaluate:
            self._lend()

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.on_evaluate_begin()

    def _lend(self) -> None:
        """The model gets the averaged weights, where it has not got them."""
        if self.averaged is not None and not self.raw:
            self.raw = [parameter.detach().clone() for parameter in self.model.parameters()]
            _copy(self.averaged.parameters(), self.model.parameters())

    def on_fit_end(self) -> None:
        self._lend()
        self.raw = []

    def state_dict(self) -> dict[str, Any]:
        names = [name for name, _ in self.model.named_parameters()]
        averaged = [] if self.averaged is None else [tensor.detach().clone() for tensor in self.averaged.parameters()]
        return {
            "averaged": dict(zip(names, averaged, strict=False)),  # empty before the first batch
            "raw": dict(zip(names, self.raw, strict=False)),  # empty while the model holds them itself
            "updates": 0 if self.averaged is None else int(self.averaged.n_averaged),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = [name for name, _ in self.model.named_parameters()]
        if state["averaged"]:
            averaged = self._start()
            _copy([state["averaged"][name] for name in names], averaged.parameters())
            averaged.n_averaged.fill_(state["updates"])
        self.raw = [state["raw"][name] for name in names] if state["raw"] else []


@torch.no_grad()
def _copy(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
