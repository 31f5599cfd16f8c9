"""minikeras: Keras's compile, fit, evaluate and predict for PyTorch modules."""

import typing

from minikeras.callbacks import (
    EMA,
    Callback,
    CSVLogger,
    EarlyStopping,
    LambdaCallback,
    LRScheduler,
    ModelCheckpoint,
    Timer,
)
from minikeras.errors import CheckpointError, ForwardError, NotCompiledError
from minikeras.layer_summary import summary
from minikeras.losses import FocalLoss, Regularized, l1_penalty, l2_penalty, weight_decay_groups
from minikeras.model import Model
from minikeras.on_all_rows import OnAllRows
from minikeras.plotting import plot_history, plot_metric
from minikeras.results import Average

if not typing.TYPE_CHECKING:  # type checkers refuse a name that is not there by themselves
    from minikeras.checks.calls import missing_name as __getattr__  # noqa: F401

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "Average",
    "CSVLogger",
    "Callback",
    "CheckpointError",
    "EarlyStopping",
    "FocalLoss",
    "ForwardError",
    "LRScheduler",
    "LambdaCallback",
    "Model",
    "ModelCheckpoint",
    "NotCompiledError",
    "OnAllRows",
    "Regularized",
    "Timer",
    "l1_penalty",
    "l2_penalty",
    "plot_history",
    "plot_metric",
    "summary",
    "weight_decay_groups",
]
