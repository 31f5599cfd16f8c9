"""A model as a scikit-learn estimator: in pipelines, cross-validation and searches.

fit            check the rows as scikit-learn does -> keep some for validation -> create network,
               loss, optimizer and callbacks -> Model.compile, Model.fit
partial_fit    the same for one epoch; later calls continue with what the first one created
predict        Model.predict -> classes, or numbers
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import minikeras
from minikeras.errors import describe, did_you_mean, is_number
from minikeras.integrations.named_callbacks import (
    create_callbacks,
    list_settings,
    name_callbacks,
    set_settings,
)

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.model_selection import train_test_split
    from sklearn.utils import (
        check_array,
        check_consistent_length,
        check_random_state,
        column_or_1d,
    )
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "minikeras.integrations.sklearn needs scikit-learn: pip install scikit-learn"
    ) from error


# estimators train one after the other, since all threads share torch's random state
TRAINING_LOCK = threading.RLock()

CALLBACKS = "callbacks__"  # what the names of callbacks and their settings begin with

# arguments of Keras, scikit-learn and skorch -> what to pass here
SUGGESTED = {
    "validation_split": " Pass validation=0.1.",
    "validation_fraction": " Pass validation=0.1.",
    "train_split": " Pass validation=0.2.",
    "early_stopping": " Pass callbacks=[EarlyStopping(...)] and validation=0.1.",
    "max_iter": " Pass epochs.",
    "learning_rate": " Pass lr.",
    "learning_rate_init": " Pass lr.",
    "criterion": " Pass loss_func.",
    "module": " Pass model.",
    "warm_start": " Call partial_fit to continue.",
}


def perceptron(n_features: int, n_outputs: int, hidden: int = 64) -> nn.Module:
    """Create the default network: one hidden layer of `hidden` units with ReLU.

    It takes `n_features` columns and returns `n_outputs`.
    """
    return nn.Sequential(nn.Linear(n_features, hidden), nn.ReLU(), nn.Linear(hidden, n_outputs))


@dataclass
class Training:
    """What one fit creates and trains, so that partial_fit can continue with it."""

    model: minikeras.Model
    loss_func: Any
    optimizer: Any
    callbacks: dict[str, Any]  # by name
    random_states: list[Tensor]  # of torch, at the end of the last epoch
    history: pd.DataFrame  # of all epochs
    history_before: pd.DataFrame  # of the epochs before the model was compiled the last time
    has_default_loss: bool
    is_compiled: bool = True

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and deepcopy, which give an uncompiled model."""
        return vars(self) | {"is_compiled": False}


class Estimator(BaseEstimator):  # type: ignore[misc]
    """What Classifier and Regressor share: their arguments, and training."""

    default_loss: Callable[..., nn.Module]
    stratifies: bool  # whether validation=share takes the share of each class

    def __init__(
        self,
        model: Callable[..., nn.Module] | None = None,
        loss_func: Any = None,
        optimizer: Callable[..., Any] | None = None,
        *,
        epochs: int = 10,
        batch_size: int = 32,
        lr: float = 0.01,
        validation: Any = None,
        callbacks: Any = None,
        metrics_dict: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        verbose: str | int = 0,
        random_state: Any = None,
        **factory_arguments: Any,
    ) -> None:
        self.model = model
        self.loss_func = loss_func
        self.optimizer = optimizer
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.validation = validation
        self.callbacks = callbacks
        self.metrics_dict = metrics_dict
        self.device = device
        self.verbose = verbose
        self.random_state = random_state
        for name, value in factory_arguments.items():
            setattr(self, name, value)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments.

        With `deep`, the factory's keyword arguments that have their defaults are included, and the
        callbacks and their settings: callbacks__earlystopping, callbacks__earlystopping__patience.
        """
        own: dict[str, Any] = super().get_params(deep)
        defaults: dict[str, Any] = {}
        if deep:
            defaults = defaults_of(self._factory())
            with contextlib.suppress(TypeError, ValueError):  # fit says what is wrong with them
                for name, value in list_settings(name_callbacks(self.callbacks)).items():
                    own[CALLBACKS + name] = value
        return defaults | own | self._factory_arguments()

    def set_params(self, **params: Any) -> Any:
        """Set arguments by name, also those of the factory, and the callbacks and their settings.

        callbacks__earlystopping=None leaves this callback out; callbacks__earlystopping__patience=5
        puts a new callback with this setting in its place. A new factory, and a new list of
        callbacks, are set first.
        """
        changes = {}
        for key in list(params):
            if key.startswith(CALLBACKS):
                changes[key.removeprefix(CALLBACKS)] = params.pop(key)
        if changes:
            params["callbacks"] = set_settings(params.get("callbacks", self.callbacks), changes)
        if "model" in params:
            super().set_params(model=params.pop("model"))
        return super().set_params(**params)

    def _factory(self) -> Any:
        return perceptron if self.model is None else self.model

    def _factory_arguments(self) -> dict[str, Any]:
        """Return the factory's arguments that were set.

        Attributes that begin or end with an underscore are arguments only if the factory has them.
        """
        own = self._get_param_names()
        known = arguments_of(self._factory())
        arguments = {}
        for name, value in vars(self).items():
            if name not in own and (name in known or name.strip("_") == name):
                arguments[name] = value
        return arguments

    def _create_network(self, n_outputs: int) -> nn.Module:
        factory = self._factory()
        if not callable(factory) or isinstance(factory, nn.Module):
            raise TypeError(
                f"model must be a function of (n_features, n_outputs) that makes a new network for "
                f"each fit, got {type(factory).__name__}. Pass lambda n_features, n_outputs: ..., "
                f"or the network's class."
            )
        known = arguments_of(factory)
        arguments = self._factory_arguments()
        unknown = [name for name in arguments if name not in known]
        if unknown and not takes_any(factory):
            expected = [*self._get_param_names(), *known]
            raise TypeError(
                f"{type(self).__name__} got {unknown[0]!r}, which is no argument of its own and "
                f"none of the model's factory. Expected {', '.join(expected)}."
                f"{suggest_argument(unknown[0], expected)}"
            )
        check_takes(factory, arguments)
        network = factory(self.n_features_in_, n_outputs, **arguments)
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"model must give a torch.nn.Module, got {type(network).__name__}. "
                f"Let it return one."
            )
        return network

    def _fit_new(
        self,
        X: np.ndarray,
        labels: Tensor,
        sample_weight: Any,
        n_outputs: int,
        encode: Callable[[Any], Tensor],
    ) -> None:
        """Create a new network and train it.

        Args:
            X: (rows, n_features).
            labels: what the loss compares with.
            sample_weight: as in `fit`.
            n_outputs: number of the network's outputs.
            encode: returns the labels of the validation data as the loss needs them.
        """
        weights = None if sample_weight is None else check_weights(sample_weight, X)
        validation = check_validation(self.validation)
        if isinstance(validation, float):
            train, val = self._split(validation, X, labels, weights)
        else:
            train, val = as_data(X, labels, weights), self._validation_data(validation, encode)
        with seeded(self._draw_seed()):
            training = self._create_training(n_outputs)
            self._train(training, self.epochs, train, val)

    def _fit_one_epoch(
        self,
        X: np.ndarray,
        labels: Tensor,
        sample_weight: Any,
        n_outputs: int,
        encode: Callable[[Any], Tensor],
    ) -> None:
        """Train for one epoch, with a new network at the first call; arguments as `_fit_new`."""
        weights = None if sample_weight is None else check_weights(sample_weight, X)
        validation = check_validation(self.validation)
        if isinstance(validation, float):
            raise ValueError(
                f"partial_fit trains on all rows that it is given, and validation={validation} "
                f"keeps a share of them out: in another call they might be trained on. Pass "
                f"validation data, validation=(X_val, y_val), or validation=None."
            )
        train, val = as_data(X, labels, weights), self._validation_data(validation, encode)
        if not hasattr(self, "_training"):
            refuse_comparing(name_callbacks(self.callbacks))
            with seeded(self._draw_seed()):
                self._train(self._create_training(n_outputs), 1, train, val)
            return
        training = self._training
        refuse_comparing(training.callbacks)
        if not training.is_compiled:  # it comes from pickle
            training.model.compile(
                training.loss_func, training.optimizer, self.metrics_dict, device=self.device
            )
            training.history_before = training.history
            training.is_compiled = True
        with continued(training.random_states):
            self._train(training, 1, train, val)

    def _draw_seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _create_training(self, n_outputs: int) -> Training:
        """Create network, loss, optimizer and callbacks, and compile the model."""
        named = name_callbacks(self.callbacks)
        network = self._create_network(n_outputs)
        model = network if isinstance(network, minikeras.Model) else minikeras.Model(network)
        if self.loss_func is None:
            loss_func: Any = self.default_loss()
        else:
            loss_func = create_loss(self.loss_func)
        parameters = list(model.parameters())
        if isinstance(loss_func, nn.Module):
            parameters += loss_func.parameters()
        create_optimizer = check_optimizer(self.optimizer)
        optimizer = create_optimizer(parameters, lr=self.lr)
        model.compile(loss_func, optimizer, self.metrics_dict, device=self.device)
        callbacks = create_callbacks(named, model)
        return Training(
            model,
            loss_func,
            optimizer,
            callbacks,
            random_states=[],
            history=pd.DataFrame(),
            history_before=pd.DataFrame(),
            has_default_loss=self.loss_func is None,
        )

    def _train(self, training: Training, epochs: int, train: Any, val: Any) -> None:
        """Train for some epochs, and keep what was trained."""
        if training.has_default_loss:
            # a weight per row needs a loss per row
            training.loss_func.reduction = "mean" if len(train) == 2 else "none"
        try:
            history = training.model.fit(
                epochs,
                train,
                val,
                batch_size=self.batch_size,
                callbacks=list(training.callbacks.values()),
                verbose=self.verbose,
            )
        except ValueError as error:
            if val is None and "dl_val" in str(error):
                error.add_note(
                    f"dl_val is what {type(self).__name__} gets as `validation`: pass "
                    f"validation=0.1, or validation=(X_val, y_val)."
                )
            raise
        if len(training.history_before):
            history = pd.concat([training.history_before, history], ignore_index=True)
        training.history = history
        training.random_states = torch_random_states()
        # after the training: if a fit fails, the previous model stays
        self._training = training
        self.model_ = training.model
        self.loss_func_ = training.loss_func
        self.optimizer_ = training.optimizer
        self.callbacks_ = training.callbacks
        self.history_ = history
        self.n_iter_ = len(history)

    def _split(
        self, share: float, X: np.ndarray, labels: Tensor, weights: Tensor | None
    ) -> tuple[Any, Any]:
        """Return the data for training, and a share of the rows for validation."""
        stratify = labels.numpy() if self.stratifies else None
        check_share(share, len(X), stratify)
        train, val = train_test_split(
            np.arange(len(X)), test_size=share, stratify=stratify, random_state=self.random_state
        )
        parts = []
        for rows, use in ((train, "training"), (val, "validation")):
            part = as_data(X[rows], labels[rows], None if weights is None else weights[rows])
            if weights is not None and not part[2].any():
                raise ValueError(
                    f"sample_weight is zero for every row that validation={share} leaves for "
                    f"{use}. Leave rows without weight out of X, or pass validation data, "
                    f"validation=(X_val, y_val)."
                )
            parts.append(part)
        return parts[0], parts[1]

    def _validation_data(self, validation: Any, encode: Callable[[Any], Tensor]) -> Any:
        """Return the validation data as the network and the loss need them; None without."""
        if validation is None:
            return None
        X_val, y_val = validation
        try:
            X_val = validate_data(self, X_val, dtype=np.float32, reset=False)
            labels = encode(y_val)
            check_consistent_length(X_val, labels)
        except ValueError as error:
            raise ValueError(
                f"`validation` is (X_val, y_val), which must fit X and y of fit: {error}"
            ) from None
        return X_val, labels

    def _outputs(self, X: Any, n_outputs: int) -> Tensor:
        """Return the network's outputs; (rows, n_outputs)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, reset=False)
        outputs = self.model_.predict(X, batch_size=self.batch_size)
        if not isinstance(outputs, Tensor) or outputs.shape != (len(X), n_outputs):
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"{type(self).__name__} needs outputs of shape {(len(X), n_outputs)}, got {got}. "
                f"Let the model's factory make n_outputs outputs."
            )
        return outputs


class Classifier(ClassifierMixin, Estimator):  # type: ignore[misc]
    """A network that classifies, as a scikit-learn estimator.

    Args:
        model: factory that creates a new network for each fit: a function of
            (n_features, n_classes), or a class. It returns an nn.Module or a minikeras.Model:
            (rows, n_features) float32 -> (rows, n_classes) raw scores. Its keyword arguments are
            arguments of the estimator too, for set_params and searches, unless the estimator has
            one of the same name, such as lr. Default one hidden layer of `hidden` units, 64. For
            pickling, use a function defined at the top of a module, not a lambda.
        loss_func: function or module of (y_pred, y_true), y_true the numbers of the classes,
            (rows,) int64; default CrossEntropyLoss. With sample_weight it must return a value per
            row, as with reduction="none". Each fit trains a copy of a module, and its parameters;
            a class, functools.partial of one, or a function without arguments creates a new module
            for each fit.
        optimizer: function of (parameters, lr=), such as torch.optim.SGD; default torch.optim.Adam.
        epochs, batch_size: number of epochs, default 10, and rows per batch, default 32.
        lr: learning rate, default 0.01.
        validation: a share of the rows, such as 0.1, to validate on instead of training on them:
            those that train_test_split(X, y, test_size=0.1, stratify=y, random_state=random_state)
            would take; or data (X_val, y_val), transformed as X is. Default none; 0 is none.
        callbacks: a list of callbacks, of pairs (name, callback), and of functions of the compiled
            model that return a callback, such as lambda model: LRScheduler(StepLR(model.optimizer,
            10)). Each fit trains with copies. A callback without a name goes by its class, in
            lower case; searches set callbacks__earlystopping__patience, or the whole callback,
            callbacks__earlystopping. Default none.
        metrics_dict: as in `Model.compile`; y_true as for loss_func. Default none.
        device: where to train; default the accelerator if there is one, else the CPU.
        verbose: as in `Model.fit`; default nothing.
        random_state: an int for the same network each time; None draws from NumPy's global state,
            as scikit-learn does. torch's random state is not changed.
        **factory_arguments: keyword arguments of `model`, such as `hidden`.

    Attributes:
        classes_: the labels found, sorted.
        model_: the trained minikeras.Model.
        history_: what its fit returned, a DataFrame with a row per epoch.
        n_iter_: number of epochs trained.
        callbacks_: name -> callback, the copies that the fit trained with.
        loss_func_, optimizer_: the loss and the optimizer of the fit.
        n_features_in_: number of columns of X.

    >>> from minikeras.integrations.sklearn import Classifier
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> classifier = Classifier(epochs=50, hidden=32, random_state=0, device="cpu").fit(X, y)
    >>> bool(classifier.score(X, y) > 0.9)
    True
    >>> classifier.predict_proba(X[:2]).shape
    (2, 3)
    """

    default_loss = nn.CrossEntropyLoss
    stratifies = True

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Classifier:
        """Train a new network, and return the estimator.

        Args:
            X: (rows, n_features), numbers.
            y: (rows,), labels of any kind, two or more different ones.
            sample_weight: (rows,); the loss is the mean over the rows of loss * weight.

        Raises:
            TypeError, ValueError: an argument of the estimator, or data, that cannot be used for
                training.
        """
        X, y = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(y)
        classes, numbers = np.unique(y, return_inverse=True)
        if len(classes) == 1:
            raise ValueError(
                f"y has one class, {y[0]!s}; expected two or more to tell apart. "
                f"Add rows of another."
            )
        labels = torch.from_numpy(numbers).long()
        self._fit_new(X, labels, sample_weight, len(classes), class_encoder(classes))
        # after the training: if a fit fails, the previous model keeps its labels
        self.classes_ = classes
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> Classifier:
        """Train for one epoch on these rows, and return the estimator.

        The first call creates the network, unless `fit` has done so; later calls continue with it,
        with the optimizer's state and the random state. model, loss_func, optimizer, lr, callbacks
        and metrics_dict are those of the first call. k calls with the same rows do what one `fit`
        of k epochs does, also if the estimator is pickled between them. For the callbacks each call
        is a fit.

        Args:
            X: (rows, n_features), numbers.
            y: (rows,), labels; not all of `classes` need be there.
            classes: all labels that any call will have; needed at the first call.
            sample_weight: (rows,), as in `fit`.

        Raises:
            ValueError: `classes` is missing, or others than those of the first call; y has a label
                that is not in `classes`; or there is what only a fit of several epochs can do: a
                share for validation, EarlyStopping, or ModelCheckpoint(save_best_only=True).
        """
        is_first = not hasattr(self, "_training")
        known = check_classes(classes, None if is_first else self.classes_)
        X, y = validate_data(self, X, y, dtype=np.float32, reset=is_first)
        check_classification_targets(y)
        encode = class_encoder(known)
        self._fit_one_epoch(X, encode(y), sample_weight, len(known), encode)
        self.classes_ = known
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probabilities of the classes for the rows of `X`, the softmax of the outputs.

        Their shape is (rows, n_classes), in the order of classes_.
        """
        check_is_fitted(self)
        proba: np.ndarray = self._outputs(X, len(self.classes_)).double().softmax(1).numpy()
        return proba

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable label of each row of `X`; (rows,)."""
        numbers: np.ndarray = self.predict_proba(X).argmax(1)
        labels: np.ndarray = self.classes_[numbers]
        return labels


class Regressor(RegressorMixin, Estimator):  # type: ignore[misc]
    """A network that predicts one or several numbers per row, as a scikit-learn estimator.

    Networks learn numbers near 1: put a StandardScaler before it, and large targets into a
    TransformedTargetRegressor. If R2 is still poor, train for more epochs:
    TransformedTargetRegressor(make_pipeline(StandardScaler(), Regressor(epochs=30)),
    transformer=StandardScaler()).

    Args:
        model: as in `Classifier`, a function of (n_features, n_outputs).
        loss_func: function or module of (y_pred, y_true), both (rows, n_outputs); default MSELoss.
            Otherwise as in `Classifier`.
        validation: as in `Classifier`, but the share is drawn from all rows alike.
        optimizer, epochs, batch_size, lr, callbacks, metrics_dict, device, verbose, random_state:
            as in `Classifier`.
        **factory_arguments: as in `Classifier`.

    Attributes:
        model_, history_, n_iter_, callbacks_, loss_func_, optimizer_, n_features_in_: as in
            `Classifier`.

    >>> import numpy as np
    >>> from minikeras.integrations.sklearn import Regressor
    >>> X = np.linspace(-1, 1, 200).reshape(-1, 1)
    >>> regressor = Regressor(epochs=30, random_state=0, device="cpu").fit(X, X[:, 0] ** 2)
    >>> bool(regressor.score(X, X[:, 0] ** 2) > 0.95)
    True
    """

    default_loss = nn.MSELoss
    stratifies = False

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Regressor:
        """Train a new network, and return the estimator.

        Args:
            X: (rows, n_features), numbers.
            y: (rows,) or (rows, n_outputs), numbers.
            sample_weight: (rows,); for one output, the loss is the mean over the rows of
                loss * weight.

        Raises:
            TypeError, ValueError: as in `Classifier.fit`.
        """
        X, y = validate_data(self, X, y, dtype=np.float32, multi_output=True, y_numeric=True)
        labels = as_numbers(y)
        encode = number_encoder(y.shape[1:])
        self._fit_new(X, labels, sample_weight, labels.shape[1], encode)
        self._shape = y.shape[1:]
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Regressor:
        """Train for one epoch on these rows, and return the estimator: see `Classifier`.

        Args:
            X: (rows, n_features), numbers.
            y: (rows,) or (rows, n_outputs), numbers, in each call of the same shape but for rows.
            sample_weight: (rows,), as in `fit`.

        Raises:
            ValueError: y has another shape than in the first call; or there is what only a fit of
                several epochs can do: a share for validation, EarlyStopping, or
                ModelCheckpoint(save_best_only=True).
        """
        is_first = not hasattr(self, "_training")
        X, y = validate_data(
            self, X, y, dtype=np.float32, multi_output=True, y_numeric=True, reset=is_first
        )
        shape = y.shape[1:] if is_first else self._shape
        encode = number_encoder(shape)
        labels = encode(y)
        self._fit_one_epoch(X, labels, sample_weight, labels.shape[1], encode)
        self._shape = shape
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the network's outputs for the rows of `X`, as float64.

        Their shape is (rows,) or (rows, n_outputs), as that of y in fit.
        """
        check_is_fitted(self)
        outputs = self._outputs(X, int(np.prod(self._shape)))
        predicted: np.ndarray = outputs.double().reshape(len(outputs), *self._shape).numpy()
        return predicted

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def defaults_of(factory: Any) -> dict[str, Any]:
    """Return the defaults of a factory's keyword arguments, after the two numbers that it takes.

    >>> defaults_of(perceptron)
    {'hidden': 64}
    """
    defaults = {}
    for name, parameter in arguments_of(factory).items():
        if parameter.default is not parameter.empty:
            defaults[name] = parameter.default
    return defaults


def arguments_of(factory: Any) -> dict[str, inspect.Parameter]:
    """Return a factory's arguments, after the two numbers that it takes."""
    if not callable(factory):
        return {}
    arguments = {}
    for parameter in list(inspect.signature(factory).parameters.values())[2:]:
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            arguments[parameter.name] = parameter
    return arguments


def takes_any(factory: Any) -> bool:
    """Tell whether a factory takes keyword arguments that it does not name."""
    kinds = [parameter.kind for parameter in inspect.signature(factory).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def check_takes(factory: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Refuse a factory that does not take the two numbers, or needs an argument that is missing."""
    try:
        inspect.signature(factory).bind(1, 1, **arguments)
    except TypeError as error:
        raise TypeError(
            f"model is called with (n_features, n_outputs), and "
            f"{getattr(factory, '__name__', 'it')} cannot be: {error}. Let it take the two, and "
            f"give what else it needs a default."
        ) from None


def suggest_argument(name: str, known: list[str]) -> str:
    """Return what to pass in place of an unknown argument, with a blank before it, or ''."""
    owner, separator, setting = name.partition("__")
    if separator and owner == "callbacks":
        return (
            " Pass the callbacks as a list, callbacks=[EarlyStopping(...)]; set_params and "
            "searches take the names of their settings."
        )
    if separator and owner == "optimizer":
        return f" Pass functools.partial(torch.optim.SGD, {setting}=...) as optimizer."
    if separator and setting in known:
        return f" Pass {setting}=..."
    return SUGGESTED.get(name) or did_you_mean(name, known)


def check_optimizer(optimizer: Any) -> Callable[..., Any]:
    """Return the function that creates the optimizer of each fit for its new parameters."""
    if optimizer is None:
        return torch.optim.Adam
    if not callable(optimizer):
        raise TypeError(
            f"optimizer must be a function of (parameters, lr=) that makes one for each fit, got "
            f"{describe(optimizer)}. Pass the class, torch.optim.SGD, or functools.partial of it."
        )
    create: Callable[..., Any] = optimizer
    return create


def check_weights(sample_weight: Any, X: np.ndarray) -> Tensor:
    """Return one weight per row of `X`; refuse weights of another shape, and all zeros."""
    weights = check_array(
        sample_weight, ensure_2d=False, dtype=np.float32, input_name="sample_weight"
    )
    if weights.ndim != 1:
        raise ValueError(
            f"sample_weight must be one number a row, of shape {(len(X),)}, got {weights.shape}. "
            f"Pass one weight for each."
        )
    check_consistent_length(X, weights)
    if not weights.any():
        raise ValueError(
            "sample_weight is zero for every row, and there is nothing to learn. "
            "Give some rows a weight."
        )
    return torch.from_numpy(weights)


def as_data(X: np.ndarray, labels: Tensor, weights: Tensor | None) -> tuple[Any, ...]:
    """Return the data of `Model.fit`, with a third part if there are weights."""
    return (X, labels) if weights is None else (X, labels, weights)


# --- labels ---------------------------------------------------------------------------------------


def class_encoder(classes: np.ndarray) -> Callable[[Any], Tensor]:
    """Return a function that replaces labels by their numbers in `classes`, which is sorted."""

    def encode(y: Any) -> Tensor:
        labels = column_or_1d(y)
        unknown = labels
        # NumPy would compare "2" and 2 as text, and sort "10" before "2"
        if is_text(labels) == is_text(classes):
            unknown = np.setdiff1d(labels, classes)
        if len(unknown):
            expected = ", ".join(map(repr, classes.tolist()))
            raise ValueError(
                f"y has the label {unknown.tolist()[0]!r}, which is none of the classes: expected "
                f"{expected}. Leave its rows out, or train with all classes: fit with rows of "
                f"each, or name them in classes of the first partial_fit."
            )
        return torch.from_numpy(np.searchsorted(classes, labels)).long()

    return encode


def is_text(labels: np.ndarray) -> bool:
    """Tell whether labels are text; scikit-learn takes objects only if they are."""
    return labels.dtype.kind in "OUS"


def check_classes(classes: Any, known: np.ndarray | None) -> np.ndarray:
    """Return the sorted labels of partial_fit; `known` are those of the calls before."""
    if classes is None:
        if known is None:
            raise ValueError(
                "classes must be passed on the first call to partial_fit, since its rows may not "
                "have all labels. Pass partial_fit(X, y, classes=numpy.unique(all_labels))."
            )
        return known
    labels = np.asarray(classes)
    if labels.ndim == 0:  # one label, or a set
        raise ValueError(
            f"`classes` must be a list of all labels, got {describe(classes)}. Pass such as "
            f"classes=numpy.unique(all_labels)."
        )
    found = np.unique(column_or_1d(labels))
    if known is not None and found.tolist() != known.tolist():
        raise ValueError(
            f"classes are {', '.join(map(str, found))}, and the network was created for "
            f"{', '.join(map(str, known))}. Leave classes out, or start with a new estimator: "
            f"sklearn.base.clone(estimator)."
        )
    if len(found) == 1:
        raise ValueError(
            f"classes has one class, {found[0]!s}; expected two or more to tell apart. "
            f"Pass the labels of all rows to come."
        )
    return found


def as_numbers(y: np.ndarray) -> Tensor:
    """Return targets as a tensor; (rows, n_outputs)."""
    # contiguous, since torch takes no array with negative strides, such as y[::-1]
    numbers = np.ascontiguousarray(y.reshape(len(y), -1), dtype=np.float64)
    return torch.tensor(numbers, dtype=torch.get_default_dtype())


def number_encoder(shape: tuple[int, ...]) -> Callable[[Any], Tensor]:
    """Return a function that makes a tensor of targets; each row must have this shape."""

    def encode(y: Any) -> Tensor:
        numbers = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        if numbers.shape[1:] != shape:
            raise ValueError(
                f"y has the shape {numbers.shape}; expected {(len(numbers), *shape)}, as in "
                f"training. Reshape it."
            )
        return as_numbers(numbers)

    return encode


# --- validation -----------------------------------------------------------------------------------


def check_validation(validation: Any) -> float | tuple[Any, Any] | None:
    """Return the share of the rows to validate on, or the pair of data, or None."""
    if validation is None:
        return None
    if is_number(validation) and not isinstance(validation, bool):
        share = float(validation)
        if share == 0:
            return None
        if 0 < share < 1:
            return share
    elif isinstance(validation, (tuple, list)) and len(validation) == 2:
        return validation[0], validation[1]
    got = repr(validation) if is_number(validation) else describe(validation)
    raise ValueError(
        f"`validation` must be a share of the rows above 0 and below 1, data (X_val, y_val), or "
        f"None, got {got}. Pass such as validation=0.1."
    )


def check_share(share: float, n_rows: int, labels: np.ndarray | None) -> None:
    """Refuse a share that leaves too few rows for training or validation.

    Args:
        share: the share of the rows to validate on.
        n_rows: number of rows.
        labels: the numbers of the classes, of which each must have a row on both sides; None if
            there are no classes.
    """
    n_val = math.ceil(share * n_rows)  # as train_test_split rounds
    remedy = "Pass more rows, or validation data, validation=(X_val, y_val)."
    if labels is None:
        if n_val == n_rows:
            raise ValueError(
                f"validation={share} keeps {n_val} of n_samples={n_rows} for validation and leaves "
                f"none for training. {remedy}"
            )
        return
    counts = np.bincount(labels)
    if counts.min() < 2:
        raise ValueError(
            f"validation={share} takes a share of the rows of each class, and "
            f"{(counts < 2).sum()} of {len(counts)} classes have 1 row; expected 2 or more of "
            f"each. {remedy}"
        )
    if min(n_val, n_rows - n_val) < len(counts):
        raise ValueError(
            f"validation={share} of {n_rows} rows keeps {n_val} for validation and leaves "
            f"{n_rows - n_val} for training, and there are {len(counts)} classes; expected as many "
            f"rows or more in both. Pass another share, more rows, or validation data, "
            f"validation=(X_val, y_val)."
        )


# --- losses and callbacks -------------------------------------------------------------------------


def create_loss(loss_func: Any) -> Any:
    """Return the loss of one fit: a copy of a module, what a factory creates, or the function."""
    if isinstance(loss_func, nn.Module):
        return copy.deepcopy(loss_func)
    if not creates_loss(loss_func):
        return loss_func
    name = getattr(loss_func, "__name__", type(loss_func).__name__)
    try:
        inspect.signature(loss_func).bind()
    except TypeError as error:
        raise TypeError(
            f"loss_func {name} is called without arguments to create the loss of each fit, and "
            f"cannot be: {error}. Pass functools.partial({name}, ...) with its arguments."
        ) from None
    loss = loss_func()
    if not callable(loss):
        raise TypeError(
            f"loss_func must be a function or module of (y_pred, y_true), or create one when "
            f"called without arguments, got {describe(loss)} from {name}. Let it return one."
        )
    return loss


def creates_loss(loss_func: Any) -> bool:
    """Tell whether a loss is one to be called without arguments first.

    >>> creates_loss(nn.MSELoss), creates_loss(lambda: nn.MSELoss())
    (True, True)
    >>> creates_loss(nn.functional.mse_loss)
    False
    """
    maker = loss_func.func if isinstance(loss_func, functools.partial) else loss_func
    if isinstance(maker, type):
        return True
    try:
        parameters = inspect.signature(loss_func).parameters
    except (TypeError, ValueError):  # no function, or one of C
        return False
    return len(parameters) == 0


def refuse_comparing(named: Mapping[str, Any]) -> None:
    """Refuse callbacks that compare the epochs of a fit, since partial_fit trains one."""
    for name, callback in named.items():
        compares = isinstance(callback, minikeras.EarlyStopping)
        if isinstance(callback, minikeras.ModelCheckpoint):
            compares = callback.save_best_only
        if compares:
            raise ValueError(
                f"partial_fit trains for one epoch, and {type(callback).__name__} under {name!r} "
                f"in `callbacks` compares the epochs of a fit. Leave it out, "
                f"set_params(callbacks__{name}=None), or call fit."
            )


# --- random numbers -------------------------------------------------------------------------------


@contextlib.contextmanager
def own_random_numbers() -> Iterator[None]:
    """Keep other estimators from training meanwhile; restore torch's random state afterwards."""
    with TRAINING_LOCK, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from this seed; restore torch's random state afterwards."""
    with own_random_numbers():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def continued(states: list[Tensor]) -> Iterator[None]:
    """Draw torch's random numbers from these states on; restore its random state afterwards."""
    with own_random_numbers():
        torch.set_rng_state(states[0])
        # an estimator that comes from another machine may have met more devices
        for device, state in zip(range(torch.cuda.device_count()), states[1:], strict=False):
            torch.cuda.set_rng_state(state, device)
        yield


def torch_random_states() -> list[Tensor]:
    """Return torch's random states, of the CPU and of each CUDA device."""
    states = [torch.get_rng_state()]
    for device in range(torch.cuda.device_count()):
        states.append(torch.cuda.get_rng_state(device))
    return states
