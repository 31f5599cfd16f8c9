"""Callbacks in a run that is killed and resumed."""

import io

import pandas as pd
import pytest
import torch
from helpers.callbacks import (
    BATCHES,
    Loader,
    fit,
    log,
    nn_with_batch_norm,
)
from helpers.compare import assert_equal_tensors, copy_weights
from helpers.interruptions import Stopped
from helpers.models import compiled
from torch.optim import lr_scheduler

from minikeras import (
    EMA,
    Callback,
    EarlyStopping,
    LambdaCallback,
    LRScheduler,
)


class Saver(Callback):
    """Writes down the run at an epoch's end, or after a batch, and dies some batches later."""

    def __init__(self, others, after_epoch):
        self.others = others
        self.after_epoch = after_epoch
        self.saved = None
        self.dies_in = None

    def on_epoch_end(self, epoch, logs):
        if epoch == self.after_epoch:
            run = self.model._run
            saved = {
                "model": self.model.state_dict(),
                "optimizer": run.optimizers[""].state_dict(),
                "callbacks": [callback.state_dict() for callback in self.others],
                "epochs": [[dict(logs), dict(rates)] for logs, rates in run.epochs],
            }
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            self.saved = torch.load(file, weights_only=True)
        elif self.saved:
            raise Stopped


def carried_on(make, after, epochs=6, **kwargs):
    """Return two results of fit, (model, history): never stopped, and killed and resumed.

    The second run is saved after `after` epochs, killed, and resumed from there.

    `make(model)` gives the callbacks, new ones in each process.
    """

    def fresh():
        torch.manual_seed(1)
        return compiled(nn_with_batch_norm())

    model = fresh()
    whole = fit(epochs, make(model), model, **kwargs)
    model = fresh()
    callbacks = make(model)
    saver = Saver(callbacks, after)
    with pytest.raises(Stopped):
        fit(epochs, [*callbacks, saver], model, **kwargs)
    model = fresh()
    model._run.epochs = [tuple(row) for row in saver.saved["epochs"]]
    callbacks = make(model)
    return whole, fit(epochs - after, [*callbacks, Loader(callbacks, saver.saved)], model, **kwargs)


CARRIED = {
    "EarlyStopping": lambda model: [
        log("note", [0.5] * 9),
        EarlyStopping("loss", min_delta=0.02, patience=4, restore_best_weights=True),
    ],
    "a best epoch before the stop": lambda model: [
        LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(score=float(-epoch))),
        EarlyStopping(
            "score", patience=4, mode="max", restore_best_weights=True, start_from_epoch=1
        ),
    ],
    "LRScheduler": lambda model: [LRScheduler(lr_scheduler.CosineAnnealingLR(model.optimizer, 6))],
    "LRScheduler by batch": lambda model: [
        LRScheduler(lr_scheduler.OneCycleLR(model.optimizer, 0.5, total_steps=18), step="batch")
    ],
    "LRScheduler of several": lambda model: [
        LRScheduler(
            lr_scheduler.SequentialLR(
                model.optimizer,
                [
                    lr_scheduler.ConstantLR(model.optimizer),
                    lr_scheduler.MultiStepLR(model.optimizer, [1, 3]),
                ],
                [2],
            )
        )
    ],
    "ReduceLROnPlateau": lambda model: [
        LRScheduler(
            lr_scheduler.ReduceLROnPlateau(model.optimizer, patience=0, threshold=1.0),
            monitor="val_loss",
        )
    ],
    "EMA": lambda model: [EMA(0.8)],
    "EMA that evaluates": lambda model: [EMA(0.8, evaluate=True)],
    "several EMAs": lambda model: [EMA(0.8), EMA(0.5, evaluate=True), EMA(0.9, evaluate=True)],
    "EMA and EarlyStopping": lambda model: [
        EMA(0.8, evaluate=True),
        EarlyStopping("val_loss", patience=3, min_delta=0.01, restore_best_weights=True),
    ],
}


@pytest.mark.parametrize("after", [2, 3])
@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR's own
def test_callbacks_of_a_resumed_run_end_as_if_it_was_never_stopped(name, after):
    (whole, dfwhole), (resumed, dfresumed) = carried_on(
        CARRIED[name], after, val=BATCHES[:2], validation_freq=2
    )
    pd.testing.assert_frame_equal(dfresumed, dfwhole, check_exact=True)
    assert_equal_tensors(copy_weights(resumed), copy_weights(whole))
