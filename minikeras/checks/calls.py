"""Explain calls written for Keras, torchkeras 3 and 4, skorch or Lightning.

The methods of Model have plain signatures. A call that does not fit one raises a TypeError that
names the argument and shows the call as it is written in minikeras.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from minikeras.errors import did_you_mean

# names of arguments, here and in other libraries
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

# arguments that the functions in WRITERS write
WRITTEN = ("epochs", "dl_train", "dl_val", "dl", "loss_func", "optimizer", "metrics_dict")

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
        "loss_weights": "The dict of losses takes them: loss_func={name: (loss, weight)}.",
        "weighted_metrics": "Pass metrics_dict={name: function}.",
        "clipnorm": "Pass clip_grad_norm=..., for the norm of all gradients together.",
        "global_clipnorm": "Pass clip_grad_norm=....",
        "clipvalue": "Pass clip_grad_value=....",
        "scheduler": "Pass it to fit: fit(callbacks=[minikeras.LRScheduler(scheduler)]).",
        "lr_scheduler": "Pass it to fit: fit(callbacks=[minikeras.LRScheduler(lr_scheduler)]).",
        "use_ema": "Pass the callback to fit: fit(callbacks=[minikeras.EMA(decay)]).",
    },
    "evaluate": {
        "sample_weight": "It is the third part of the data: evaluate((X, y, sample_weight)).",
        "verbose": "evaluate prints nothing.",
        "return_dict": "evaluate returns a dict.",
    },
    "predict": {
        "verbose": "predict prints nothing.",
        "return_ground_truth": "Pass return_labels=True.",
        "concatenate_returns": "Pass join=False for a list with the outputs of each batch.",
    },
    "summary": {"input_size": "input_shape is the shape of one row, without the batch."},
    "diagnose": {},
    "lr_find": {},
}


def explain_call(
    verb: str, signature: inspect.Signature, args: Any, kwargs: dict[str, Any], error: TypeError
) -> str:
    """Say what is wrong with a call, and which line to write instead."""
    known = list(signature.parameters)[1:]
    line = WRITERS[verb](args, dict(kwargs))
    unknown = []
    for name, value in kwargs.items():
        if name not in known:
            unknown.append(name)
        elif f"{name}=" not in line and name not in WRITTEN:
            line += f", {name}={show(value)}"
    message = f"{verb}() {_show_error(error)}."
    for name in unknown:
        if name in NOTES[verb]:
            if NOTES[verb][name] not in message:  # several names may have the same note
                message += f" {NOTES[verb][name]}"
        elif name not in (*TRAINING, *VALIDATION, *EPOCHS, *LOSSES, *METRICS, *DATA, "y"):
            message += did_you_mean(name, known)
    if verb == "compile" and unknown and all(name in NOTES[verb] for name in unknown):
        return message  # the rest of the call is right, and the line does not show it
    return f"{message.rstrip()} Write model.{verb}({line.lstrip(', ')})."


def _show_error(error: TypeError) -> str:
    """Show an error of `Signature.bind` so that it continues a sentence that names the method."""
    text = str(error)
    if text.startswith(("multiple", "too many")):
        return f"got {text}"
    return text


def explain_constructor(
    verb: str, signature: inspect.Signature, args: Any, kwargs: dict[str, Any], error: TypeError
) -> str:
    """Say that `compile` takes the loss and the optimizer; torchkeras's `KerasModel` takes them."""
    line = write_compile((), dict(kwargs))
    return (
        f"Model() {_show_error(error)}; expected a network alone, and compile takes the loss and "
        f"the optimizer. Write model = minikeras.Model(net), then model.compile({line})."
    )


def order_of_fit(epochs: Any, data: Any) -> str:
    """Show the call to write if the data came first: fit(X, y, 2), fit(loader, loader, 2)."""
    if is_array(epochs) or isinstance(epochs, tuple):
        return " Epochs come first: fit(5, (X, y))."
    if type(data) is int:
        return f" Epochs come first: fit({data}, dl_train)."
    if is_array(data) or isinstance(data, tuple):
        return " Epochs come first: fit(5, dl_train)."
    return " Epochs come first: fit(5, dl_train, dl_val)."


def write_fit(args: Any, kwargs: dict[str, Any]) -> str:
    """Write the arguments of fit, epochs first."""
    epochs = first_of(kwargs, EPOCHS, 5)
    rest = list(args)
    if rest and type(rest[0]) is int:
        epochs = rest.pop(0)
    data = "dl_train"
    if "y" in kwargs or isinstance(first_of(kwargs, TRAINING), tuple):
        data = "(X, y)"
    if rest and (is_array(rest[0]) or isinstance(rest[0], tuple)):
        data = "(X, y)"
    line = f"{show(epochs)}, {data}"
    validation = first_of(kwargs, VALIDATION)
    if isinstance(validation, tuple):
        line += ", dl_val=(X_val, y_val)"
    elif validation is not None:
        line += ", dl_val=dl_val"
    return line


def write_compile(args: Any, kwargs: dict[str, Any]) -> str:
    """Write the arguments of compile, with objects for the names that Keras takes."""
    loss = write_loss(first_of(kwargs, LOSSES))
    optimizer = write_optimizer(kwargs.get("optimizer"))
    line = f"{loss}, {optimizer}"
    metrics = first_of(kwargs, METRICS)
    if metrics:
        names = metrics if isinstance(metrics, list | tuple | dict) else [metrics]
        name = next(iter(names))
        if not isinstance(name, str):
            name = "name"
        line += f', metrics_dict={{"{name}": {write_metric(name, loss)}}}'
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
METRIC_LINES = {
    "mae": "nn.L1Loss()",
    "mse": "nn.MSELoss()",
    "acc": "minikeras.accuracy",
    "accuracy": "minikeras.accuracy",
    "categorical_accuracy": "minikeras.accuracy",
    "sparse_categorical_accuracy": "minikeras.accuracy",
    "binary_accuracy": "minikeras.binary_accuracy",
}
# the accuracy that goes with a loss for yes-or-no questions
BINARY_LINES = {
    "nn.BCELoss()": "minikeras.binary_accuracy",
    "nn.BCEWithLogitsLoss()": "functools.partial(minikeras.binary_accuracy, threshold=0.0)",
}


def write_loss(loss: Any) -> str:
    """Write a loss as an argument of compile."""
    if isinstance(loss, str):
        return LOSS_LINES.get(loss.lower(), "nn.MSELoss()")
    if loss is None:
        return "nn.MSELoss()"
    if inspect.isfunction(loss):
        return loss.__name__
    kind = loss if isinstance(loss, type) else type(loss)
    prefix = "nn." if kind.__module__.startswith("torch.nn.") else ""
    return f"{prefix}{kind.__name__}()"


def write_metric(name: str, loss: str) -> str:
    """Write a metric, by Keras's name for it, as it goes with a loss."""
    line = METRIC_LINES.get(name, "function")
    return BINARY_LINES.get(loss, line) if "accuracy" in line else line


def write_optimizer(optimizer: Any) -> str:
    """Write an optimizer as an argument of compile."""
    names = {"sgd": "SGD", "rmsprop": "RMSprop", "adamw": "AdamW"}
    name = "Adam"
    kind = optimizer if isinstance(optimizer, type) else type(optimizer)
    if isinstance(optimizer, str):
        name = names.get(optimizer.lower(), "Adam")
    elif kind.__module__.startswith("torch.optim."):
        name = kind.__name__
    return f"torch.optim.{name}(model.parameters(), lr=1e-3)"


def write_evaluate(args: Any, kwargs: dict[str, Any]) -> str:
    """Write the arguments of evaluate."""
    if "y" in kwargs or len(args) > 1 or isinstance(first_of(kwargs, DATA), tuple):
        return "(X, y)"
    return "dl_val"


def write_diagnose(args: Any, kwargs: dict[str, Any]) -> str:
    """Write the data that diagnose and lr_find take."""
    return "dl_train"


def write_predict(args: Any, kwargs: dict[str, Any]) -> str:
    """Write the arguments of predict."""
    line = "X"
    if len(args) > 1 and type(args[1]) is int:
        line += f", batch_size={args[1]}"
    return line


def write_summary(args: Any, kwargs: dict[str, Any]) -> str:
    """Write the arguments of summary."""
    return "input_data=X"


WRITERS = {
    "fit": write_fit,
    "compile": write_compile,
    "evaluate": write_evaluate,
    "predict": write_predict,
    "summary": write_summary,
    "diagnose": write_diagnose,
    "lr_find": write_diagnose,
}


def first_of(kwargs: dict[str, Any], names: tuple[str, ...], default: Any = None) -> Any:
    """Return the first of these arguments that was passed."""
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return default


def is_array(value: Any) -> bool:
    """Tell whether a value is a tensor, an array or a table."""
    return hasattr(value, "shape")


def show(value: Any) -> str:
    """Show a number, string, bool or None as it is written, anything else as dots."""
    if value is None or isinstance(value, int | float | str | bool):
        return repr(value)
    return "..."


MODEL = (
    "In minikeras it is minikeras.Model: model = minikeras.Model(net), then "
    "model.compile(loss_func, optimizer, metrics_dict) and model.fit(epochs, dl_train, dl_val)."
)
NAMES = {
    "KerasModel": MODEL,
    "LightModel": MODEL,
    "Sequential": MODEL,
    "Trainer": MODEL,
    "LightningModule": MODEL,
    "ReduceLROnPlateau": (
        "In minikeras it is "
        "minikeras.LRScheduler(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))."
    ),
    "LearningRateScheduler": (
        "In minikeras it is minikeras.LRScheduler(scheduler), with one of torch.optim.lr_scheduler."
    ),
}


def missing_name(name: str) -> Any:
    """Raise the error for a name that minikeras does not have; explain those of other libraries.

    Python replaces the text of an AttributeError in `from minikeras import KerasModel`. It leaves
    the text of an ImportError, so that is raised when Python looks up a name for such an import.
    """
    message = f"module 'minikeras' has no attribute {name!r}"
    if name not in NAMES:
        raise AttributeError(message)
    caller = inspect.currentframe()
    while caller is not None and caller.f_globals.get("__name__", "").startswith("minikeras"):
        caller = caller.f_back
    if caller is not None and caller.f_code.co_name == "_handle_fromlist":
        raise ImportError(
            f"cannot import name {name!r} from 'minikeras'. {NAMES[name]}", name="minikeras"
        )
    raise AttributeError(f"{message}. {NAMES[name]}")


TORCH = ("torch", "torchvision", "minikeras")  # packages whose modules have no `trainable`


def check_trainable(model: nn.Module) -> None:
    """Refuse `module.trainable = False`, which freezes a layer in Keras and nothing here.

    A class of the user's own may have such an attribute, and do what it says.

    Raises:
        ValueError: a module with parameters to train has it.
    """
    for name, module in model.named_modules():
        is_own = type(module).__module__.partition(".")[0] not in TORCH
        if is_own or vars(module).get("trainable") is not False:
            continue
        trained = sum(parameter.requires_grad for parameter in module.parameters())
        if trained:
            place = f"model.get_submodule({name!r})" if name else "model"
            raise ValueError(
                f"`trainable` of {name or 'the model'} ({type(module).__name__}) is False, as in "
                f"Keras; torch does not know it, and {trained} parameters would be trained. Call "
                f"minikeras.freeze({place}) instead."
            )


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
    "freeze": "Write minikeras.freeze(model.net), or a part of it: minikeras.freeze(model.net[0]).",
    "freeze_to": "Write minikeras.freeze(model.net[:n]), with the layers to freeze.",
    "unfreeze": "Write minikeras.unfreeze(model.net), or a part of it.",
    "get_weights": "The weights are in model.state_dict().",
    "set_weights": "Write model.load_state_dict(weights).",
}


def missing_method(owner: str, name: str) -> None:
    """Raise the error for a method that Keras or torchkeras has and Model does not have."""
    if name in METHODS:
        raise AttributeError(f"{owner!r} object has no attribute {name!r}. {METHODS[name]}")
