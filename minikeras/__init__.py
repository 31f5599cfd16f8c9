"""minikeras: Keras's compile, fit, evaluate and predict for PyTorch modules."""

import importlib
import importlib.util
import typing

from minikeras.callback import BatchLogs, Callback, LambdaCallback
from minikeras.errors import CheckpointError, ForwardError, NotCompiledError
from minikeras.model import Model
from minikeras.results import Average

if typing.TYPE_CHECKING:
    from minikeras import diagnosis as diagnosis
    from minikeras.callbacks.averaging import EMA
    from minikeras.callbacks.files import CSVLogger, ModelCheckpoint
    from minikeras.callbacks.rates import LRScheduler
    from minikeras.callbacks.stopping import EarlyStopping, Timer
    from minikeras.freezing import freeze, unfreeze
    from minikeras.losses import FocalLoss, Regularized, l1_penalty, l2_penalty, weight_decay_groups
    from minikeras.metrics import accuracy, binary_accuracy
    from minikeras.on_all_rows import OnAllRows
    from minikeras.report.layer_summary import summary
    from minikeras.report.plotting import plot_history, plot_metric
    from minikeras.transformed import Transformed

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "Average",
    "BatchLogs",
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
    "Transformed",
    "accuracy",
    "binary_accuracy",
    "freeze",
    "l1_penalty",
    "l2_penalty",
    "plot_history",
    "plot_metric",
    "summary",
    "unfreeze",
    "weight_decay_groups",
]

# The other names, by the room they are in: each is imported when it is first asked for.
_ROOMS = {
    "EMA": "callbacks.averaging",
    "CSVLogger": "callbacks.files",
    "ModelCheckpoint": "callbacks.files",
    "LRScheduler": "callbacks.rates",
    "EarlyStopping": "callbacks.stopping",
    "Timer": "callbacks.stopping",
    "summary": "report.layer_summary",
    "freeze": "freezing",
    "unfreeze": "freezing",
    "FocalLoss": "losses",
    "Regularized": "losses",
    "l1_penalty": "losses",
    "l2_penalty": "losses",
    "weight_decay_groups": "losses",
    "accuracy": "metrics",
    "binary_accuracy": "metrics",
    "OnAllRows": "on_all_rows",
    "plot_history": "report.plotting",
    "plot_metric": "report.plotting",
    "Transformed": "transformed",
}


def _find(name: str) -> typing.Any:
    if name in _ROOMS:
        module = importlib.import_module(f"minikeras.{_ROOMS[name]}")
        globals()[name] = getattr(module, name)
        return globals()[name]
    if not name.startswith("_") and importlib.util.find_spec(f"minikeras.{name}") is not None:
        return importlib.import_module(f"minikeras.{name}")  # as minikeras.export, a module
    from minikeras import assemble

    return assemble.explain_missing_name(name)


if not typing.TYPE_CHECKING:  # type checkers refuse a name that is not there by themselves
    __getattr__ = _find


def __dir__() -> list[str]:
    """Return what tab completion shows: the public names, and the modules that users import."""
    return sorted([*__all__, "diagnosis", "export", "integrations"])
