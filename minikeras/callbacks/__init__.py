"""Callbacks: the base class, whose methods are the timetable of a fit, and the built-in ones."""

from minikeras.callbacks.averaging import EMA
from minikeras.callbacks.base import (
    Callback,
    LambdaCallback,
    check_callbacks,
    check_row,
    column_order,
    is_rate,
    with_method,
)
from minikeras.callbacks.files import CSVLogger, ModelCheckpoint, check_places, check_writable
from minikeras.callbacks.monitor import mode_of
from minikeras.callbacks.names import check_monitors
from minikeras.callbacks.rates import LRScheduler, rate_name
from minikeras.callbacks.stopping import EarlyStopping, Timer

__all__ = [
    "EMA",
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "LRScheduler",
    "LambdaCallback",
    "ModelCheckpoint",
    "Timer",
    "check_callbacks",
    "check_monitors",
    "check_places",
    "check_row",
    "check_writable",
    "column_order",
    "is_rate",
    "mode_of",
    "rate_name",
    "with_method",
]
