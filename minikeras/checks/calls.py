"""Calls in the words of Keras, torchkeras 3 and 4, skorch and Lightning: the line to write here.

The signatures of the methods stay plain: a call that does not fit one raises a TypeError that
names the argument and shows the call with its words of this library.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from minikeras.errors import did_you_mean

P = ParamSpec("P")
R = TypeVar("R")

TRAINING = (
    "dl_train",
    "x",
    "X",
    "train_data",
    "train_loader",
    "train_dataloader",
    "train_dataloaders",
)
VALIDATION = (
    "dl_val",
    "validation_data",
    "val_data",
    "val_loader",
    "val_dataloaders",
    "valid_data",
)
EPOCHS = ("epochs", "nb_epoch", "max_epochs", "num_epochs", "n_epochs")
LOSSES = ("loss_func", "loss", "loss_fn", "criterion")
METRICS = ("metrics_dict", "metrics")
DATA = ("dl_val", "dl", "x", "X", "test_loader", "dataloaders")

WRITTEN = (
    "epochs",
    "dl_train",
    "dl_val",
    "dl",
    "loss_func",
    "optimizer",
    "metrics_dict",
)  # by the writers

STOP = "callbacks=[minikeras.EarlyStopping(monitor, patience=5)]"
NOTES = {
    "fit": {
        "validation_split": (
            "Split the rows before: fit(epochs, (X[n:], y[n:]), dl_val=(X[:n], y[:n]))."
        ),
        "class_weight": (
            "The loss takes it: nn.CrossEntropyLoss(weight=...); or pass a weight per row, (X, y, "
            "weight)."
        ),
        "sample_weight": (
            "It is the third part of the data: (X, y, sample_weight), with a loss of "
            'reduction="none".'
        ),
        "shuffle": (
            "Arrays and Datasets are shuffled; a DataLoader(TensorDataset(X, y), batch_size=32) "
            "is not."
        ),
        "initial_epoch": (
            "`epochs` says how many to train now; their numbers continue from the history."
        ),
        "ckpt_path": (
            'checkpoint="run.pt" resumes a fit; minikeras.ModelCheckpoint(path) saves the weights.'
        ),
        "patience": f"Pass {STOP}.",
        "monitor": f"Pass {STOP}.",
        "mode": f"Pass {STOP}.",
        "plot": "Call minikeras.plot_history(dfhistory) afterwards.",
        "device": "compile takes it: compile(loss_func, optimizer, device=...).",
    },
    "compile": {
        "run_eagerly": "Training is eager unless jit=True.",
        "jit_compile": "Pass jit=True.",
        "lr": "The optimizer takes it: torch.optim.Adam(model.parameters(), lr=...).",
        "weighted_metrics": "Pass metrics_dict={name: function}.",
    },
    "evaluate": {
        "sample_weight": "It is the third part of the data: evaluate((X, y, sample_weight)).",
        "verbose": "evaluate prints nothing.",
        "return_dict": "evaluate returns a dict.",
    },
    "predict": {"verbose": "predict prints nothing."},
    "summary": {"input_size": "input_shape is the shape of one row, without the batch."},
}


def in_other_words(method: Callable[P, R]) -> Callable[P, R]:
    """Let a method raise a TypeError that teaches where a call does not fit its signature."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(lesson(method.__name__, signature, args[1:], kwargs, error)) from None
        return method(*args, **kwargs)

    return call


def lesson(
    verb: str, signature: inspect.Signature, args: Any, kwargs: dict[str, Any], error: TypeError
) -> str:
    """What is wrong with a call, and the line to write in its place."""
    known = list(signature.parameters)[1:]
    unknown = [name for name in kwargs if name not in known]
    line = WRITERS[verb](args, dict(kwargs))
    rest = {name: value for name, value in kwargs.items() if name in known}
    for name, value in rest.items():
        if f"{name}=" not in line and name not in WRITTEN:
            line += f", {name}={shown(value)}"
    what = str(error)
    if what.startswith(("multiple", "too many")):
        what = f"got {what}"
    message = f"{verb}() {what}."
    for name in unknown:
        if name in NOTES[verb]:
            if NOTES[verb][name] not in message:  # several words may stand for one thing
                message += f" {NOTES[verb][name]}"
        elif name not in (*TRAINING, *VALIDATION, *EPOCHS, *LOSSES, *METRICS, *DATA, "y"):
            message += did_you_mean(name, known)
    return f"{message.rstrip()} Write model.{verb}({line.lstrip(', ')})."


def built_in_other_words(method: Callable[P, None]) -> Callable[P, None]:
    """Let `Model.__init__` refuse the loss and optimizer that torchkeras's `KerasModel` takes, and say `compile`."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def build(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            what = str(error)
            if what.startswith(("multiple", "too many")):
                what = f"got {what}"
            line = compile_line((), dict(kwargs))
            raise TypeError(
                f"Model() {what}; expected a network alone, and compile takes the loss and the "
                f"optimizer. Write model = minikeras.Model(net), then model.compile({line})."
            ) from None
        method(*args, **kwargs)

    return build


def order_of_fit(epochs: Any, data: Any) -> str:
    """The call to write where the data came first: fit(X, y, 2), fit(loader, loader, 2)."""
    if is_array(epochs) or isinstance(epochs, tuple):
        return " Epochs come first: fit(5, (X, y))."
    if type(data) is int or is_array(data) or isinstance(data, tuple):
        return f" Epochs come first: fit({data if type(data) is int else 5}, dl_train)."
    return " Epochs come first: fit(5, dl_train, dl_val)."


def fit_line(args: Any, kwargs: dict[str, Any]) -> str:
    """The arguments of a fit that names epochs first."""
    epochs, rest = first_of(kwargs, EPOCHS, 5), list(args)
    if rest and type(rest[0]) is int:
        epochs = rest.pop(0)
    has_labels = "y" in kwargs or (len(rest) > 1 and is_array(rest[0]))
    data = "(X, y)" if has_labels or any(is_array(value) for value in rest[:1]) else "dl_train"
    if (rest and isinstance(rest[0], tuple)) or isinstance(first_of(kwargs, TRAINING), tuple):
        data = "(X, y)"
    line = f"{shown(epochs)}, {data}"
    validation = first_of(kwargs, VALIDATION)
    if validation is not None:
        pair = isinstance(validation, tuple)
        line += ", dl_val=(X_val, y_val)" if pair else ", dl_val=dl_val"
    return line


def compile_line(args: Any, kwargs: dict[str, Any]) -> str:
    """The arguments of a compile that takes objects and no names of them."""
    metrics = first_of(kwargs, METRICS)
    line = f"{loss_line(first_of(kwargs, LOSSES))}, {optimizer_line(kwargs.pop('optimizer', None))}"
    if metrics:
        names = metrics if isinstance(metrics, list | tuple | dict) else [metrics]
        name = next(iter(names))
        shown_name = name if isinstance(name, str) else "name"
        line += f', metrics_dict={{"{shown_name}": {METRIC_LINES.get(shown_name, "function")}}}'
    return line


LOSS_LINES = {
    "mse": "nn.MSELoss()",
    "mean_squared_error": "nn.MSELoss()",
    "mae": "nn.L1Loss()",
    "mean_absolute_error": "nn.L1Loss()",
    "binary_crossentropy": "nn.BCELoss()",
    "categorical_crossentropy": "nn.CrossEntropyLoss()",
    "sparse_categorical_crossentropy": "nn.CrossEntropyLoss()",
}
ACCURACY = "lambda y_pred, y_true: (y_pred.argmax(1) == y_true).float().mean()"
METRIC_LINES = {
    "mae": "nn.L1Loss()",
    "mse": "nn.MSELoss()",
    "acc": ACCURACY,
    "accuracy": ACCURACY,
    "sparse_categorical_accuracy": ACCURACY,
    "binary_accuracy": "lambda y_pred, y_true: ((y_pred > 0) == (y_true > 0.5)).float().mean()",
}


def loss_line(loss: Any) -> str:
    """A loss as it is written here."""
    if isinstance(loss, str):
        return LOSS_LINES.get(loss.lower(), "nn.MSELoss()")
    if loss is None:
        return "nn.MSELoss()"
    if inspect.isfunction(loss):
        return loss.__name__
    kind = loss if isinstance(loss, type) else type(loss)
    prefix = "nn." if kind.__module__.startswith("torch.nn.") else ""
    return f"{prefix}{kind.__name__}()"


def optimizer_line(optimizer: Any) -> str:
    """An optimizer as it is written here."""
    names = {"sgd": "SGD", "rmsprop": "RMSprop", "adamw": "AdamW"}
    name = "Adam"
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    if isinstance(optimizer, str):
        name = names.get(optimizer.lower(), "Adam")
    elif kind.__module__.startswith("torch.optim."):
        name = kind.__name__
    return f"torch.optim.{name}(model.parameters(), lr=1e-3)"


def evaluate_line(args: Any, kwargs: dict[str, Any]) -> str:
    """The arguments of an evaluation."""
    pair = "y" in kwargs or len(args) > 1 or isinstance(first_of(kwargs, DATA), tuple)
    return "(X, y)" if pair else "dl_val"


def predict_line(args: Any, kwargs: dict[str, Any]) -> str:
    """The arguments of a prediction."""
    line = "X"
    if len(args) > 1 and type(args[1]) is int:
        line += f", batch_size={args[1]}"
    return line


def summary_line(args: Any, kwargs: dict[str, Any]) -> str:
    """The arguments of a summary."""
    return "input_data=X"


WRITERS = {
    "fit": fit_line,
    "compile": compile_line,
    "evaluate": evaluate_line,
    "predict": predict_line,
    "summary": summary_line,
}


def first_of(kwargs: dict[str, Any], names: tuple[str, ...], default: Any = None) -> Any:
    """The argument that came under the first of these names."""
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return default


def is_array(value: Any) -> bool:
    """Tell whether a value has rows of its own, as tensors, arrays and tables have."""
    return hasattr(value, "shape")


def shown(value: Any) -> str:
    """A plain value as it is written, anything else as dots."""
    return repr(value) if isinstance(value, int | float | str | bool) or value is None else "..."


MODEL = (
    "Here it is minikeras.Model: model = minikeras.Model(net), then model.compile(loss_func, "
    "optimizer, metrics_dict) and model.fit(epochs, dl_train, dl_val)."
)
NAMES = {
    "KerasModel": MODEL,
    "LightModel": MODEL,
    "Sequential": MODEL,
    "Trainer": MODEL,
    "LightningModule": MODEL,
    "ReduceLROnPlateau": (
        "Here it is minikeras.LRScheduler(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))."
    ),
    "LearningRateScheduler": (
        "Here it is minikeras.LRScheduler(scheduler), with one of torch.optim.lr_scheduler."
    ),
}


def missing_name(name: str) -> Any:
    """The error for a name that minikeras has not, with those of torchkeras and Keras explained.

    `from minikeras import KerasModel` would replace an AttributeError's text by its own; what Python
    asks for that import is answered by an ImportError, whose text it leaves.
    """
    message = f"module 'minikeras' has no attribute {name!r}"
    if name not in NAMES:
        raise AttributeError(message)
    frame = inspect.currentframe()
    caller = frame.f_back if frame is not None else None
    if caller is not None and caller.f_code.co_name == "_handle_fromlist":
        raise ImportError(
            f"cannot import name {name!r} from 'minikeras'. {NAMES[name]}", name="minikeras"
        )
    raise AttributeError(f"{message}. {NAMES[name]}")


METHODS = {
    "predict_proba": (
        "predict gives the outputs: torch.softmax(model.predict(X), 1) for scores of classes."
    ),
    "predict_classes": (
        "predict gives the outputs: model.predict(X).argmax(1) for scores of classes."
    ),
    "predict_on_batch": "Write model.predict(X).",
    "train_on_batch": "Write model.fit(1, [(X, y)], verbose=0), a list of one batch.",
    "test_on_batch": "Write model.evaluate([(X, y)]), a list of one batch.",
    "fit_generator": (
        "fit takes any iterable of batches: model.fit(epochs, dl_train, steps_per_epoch=...)."
    ),
    "save_weights": "Write model.save(path).",
    "load_weights": "Write model.load(path).",
    "load_ckpt": "Write model.load(path).",
    "get_weights": "The weights are in model.state_dict().",
    "set_weights": "Write model.load_state_dict(weights).",
}


def missing_method(owner: str, name: str) -> None:
    """Raise the error for a method that Keras or torchkeras has and Model has not."""
    if name in METHODS:
        raise AttributeError(f"{owner!r} object has no attribute {name!r}. {METHODS[name]}")
