"""Wrong arguments of the callbacks that come with minikeras."""

import math
from datetime import timedelta

import pytest
import torch
from helpers.callbacks import NAN
from torch import nn
from torch.optim import lr_scheduler

from minikeras import (
    EMA,
    EarlyStopping,
    LRScheduler,
    ModelCheckpoint,
    Timer,
)


def scheduler(kind=lr_scheduler.StepLR, *arguments):
    return kind(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), *arguments)


BAD = [
    (lambda: EarlyStopping(patience=-1), "patience must be a whole number of 0 or more, got -1."),
    (lambda: EarlyStopping(patience=1.5), "patience must be a whole number of 0 or more, got 1.5."),
    (
        lambda: EarlyStopping(start_from_epoch=True),
        "start_from_epoch must be a whole number of 0 or more, got True.",
    ),
    (lambda: EarlyStopping(min_delta=-0.1), "min_delta must be a number of 0 or more, got -0.1."),
    (
        lambda: EarlyStopping(min_delta=math.inf),
        "min_delta must be a number of 0 or more, got inf.",
    ),
    (lambda: EarlyStopping(baseline="low"), "baseline must be a number or None, got 'low'."),
    (
        lambda: EarlyStopping(mode="mx"),
        'mode must be "auto", "min" or "max", got \'mx\'. Did you mean \'max\'?',
    ),
    (lambda: EarlyStopping(3), "monitor must be a name, got 3. Did you mean patience=3?"),
    (
        lambda: ModelCheckpoint("w.pt", 3, save_best_only=True),
        'monitor must be a name, got 3. Pass a name as logged, such as "val_loss".',
    ),
    (
        lambda: LRScheduler(scheduler(lr_scheduler.ReduceLROnPlateau), monitor=True),
        'monitor must be a name, got True. Pass a name as logged, such as "val_loss".',
    ),
    (
        lambda: EarlyStopping("val_score"),
        "EarlyStopping cannot tell from the name 'val_score' whether more or less is better. "
        'Pass mode="max" or mode="min".',
    ),
    (
        lambda: ModelCheckpoint("w.pt", "error_recall", save_best_only=True),
        "ModelCheckpoint cannot tell from the name 'error_recall' whether more or less is better. "
        'Pass mode="max" or mode="min".',
    ),
    (
        lambda: ModelCheckpoint("w/{epoch.pt"),
        "path 'w/{epoch.pt' cannot be filled in: expected '}' before end of string. Write names in "
        "braces, {epoch:02d} or {val_loss:.3f}, and a brace that stands for itself twice.",
    ),
    (
        lambda: ModelCheckpoint("{loss:02d}.pt"),
        "path '{loss:02d}.pt' cannot be filled in: Unknown format code 'd' for object of type "
        "'float'. Write names in braces, {epoch:02d} or {val_loss:.3f}, and a brace that stands "
        "for itself twice.",
    ),
    (lambda: EMA(1.5), "decay must be a number between 0 and 1, got 1.5."),
    (lambda: EMA(decay=NAN), "decay must be a number between 0 and 1, got nan."),
    (lambda: Timer(0), "max_seconds must be a number of seconds above 0, or a timedelta, got 0."),
    (
        lambda: Timer(timedelta(0)),
        "max_seconds must be a number of seconds above 0, or a timedelta, got 0.0.",
    ),
    (
        lambda: Timer(),
        "Timer() needs something to do: expected `max_seconds` or `log=True`, got neither. Pass "
        "Timer(60) to stop after a minute, or Timer(log=True) to log the seconds of each epoch.",
    ),
    (
        lambda: LRScheduler(lr_scheduler.StepLR),
        "scheduler must be a torch.optim.lr_scheduler.LRScheduler, got the class StepLR. "
        "Pass for instance torch.optim.lr_scheduler.StepLR(optimizer, step_size=10).",
    ),
    (
        lambda: LRScheduler(scheduler(lr_scheduler.StepLR, 1), step="epochs"),
        "step must be \"epoch\" or \"batch\", got 'epochs'. Did you mean 'epoch'?",
    ),
    (
        lambda: LRScheduler(scheduler(lr_scheduler.StepLR, 1), monitor="loss"),
        "monitor='loss' is for ReduceLROnPlateau, and StepLR watches nothing. Leave monitor out.",
    ),
    (
        lambda: LRScheduler(scheduler(lr_scheduler.ReduceLROnPlateau)),
        "ReduceLROnPlateau needs the name of a value to watch, once an epoch. "
        'Pass LRScheduler(scheduler, monitor="val_loss").',
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_callback_with_bad_arguments_is_refused_when_it_is_created(make, message):
    with pytest.raises((ValueError, TypeError)) as raised:
        make()
    assert str(raised.value) == message
