"""A model as a scikit-learn estimator: in pipelines, cross-validation and searches.

fit        rows checked as scikit-learn does -> a new network from the factory -> Model.compile,
           Model.fit
predict    Model.predict -> classes, or numbers
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import minikeras
from minikeras.errors import describe

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_array, check_consistent_length, check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "minikeras.integrations.sklearn needs scikit-learn: pip install scikit-learn"
    ) from error


# estimators train one after the other, since all threads share torch's random state
TRAINING_LOCK = threading.RLock()


def perceptron(n_features: int, n_outputs: int, hidden: int = 64) -> nn.Module:
    """Create the default network: one hidden layer of `hidden` units with ReLU.

    It takes `n_features` columns and returns `n_outputs`.
    """
    return nn.Sequential(nn.Linear(n_features, hidden), nn.ReLU(), nn.Linear(hidden, n_outputs))


class Estimator(BaseEstimator):  # type: ignore[misc]
    """What Classifier and Regressor share: their arguments, and training."""

    default_loss: Callable[..., nn.Module]

    def __init__(
        self,
        model: Callable[..., nn.Module] | None = None,
        loss_func: Any = None,
        optimizer: Callable[..., Any] | None = None,
        *,
        epochs: int = 10,
        batch_size: int = 32,
        lr: float = 0.01,
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
        self.device = device
        self.verbose = verbose
        self.random_state = random_state
        for name, value in factory_arguments.items():
            setattr(self, name, value)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments.

        With `deep`, the factory's keyword arguments that have their defaults are included.
        """
        own: dict[str, Any] = super().get_params(deep)
        defaults = defaults_of(self._factory()) if deep else {}
        return defaults | own | self._factory_arguments()

    def set_params(self, **params: Any) -> Any:
        """Set arguments by name, also those of the factory; a new factory is set first."""
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
            raise TypeError(
                f"{type(self).__name__} got {unknown[0]!r}, which is no argument of its own and "
                f"none of the model's factory. "
                f"Expected {', '.join([*self._get_param_names(), *known])}."
            )
        check_takes(factory, arguments)
        network = factory(self.n_features_in_, n_outputs, **arguments)
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"model must give a torch.nn.Module, got {type(network).__name__}. "
                f"Let it return one."
            )
        return network

    def _train(self, X: np.ndarray, y: Tensor, sample_weight: Any, n_outputs: int) -> None:
        data: tuple[Any, ...] = (X, y)
        if sample_weight is not None:
            data = (X, y, check_weights(sample_weight, X))
        with seeded(int(check_random_state(self.random_state).randint(2**31 - 1))):
            network = self._create_network(n_outputs)
            model = network if isinstance(network, minikeras.Model) else minikeras.Model(network)
            loss_func = self.loss_func
            if loss_func is None:
                loss_func = self.default_loss(reduction="mean" if sample_weight is None else "none")
            create_optimizer = check_optimizer(self.optimizer)
            optimizer = create_optimizer(model.parameters(), lr=self.lr)
            model.compile(loss_func, optimizer, device=self.device)
            self.history_ = model.fit(
                self.epochs, data, batch_size=self.batch_size, verbose=self.verbose
            )
        self.model_ = model

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
            row, as with reduction="none".
        optimizer: function of (parameters, lr=), such as torch.optim.SGD; default torch.optim.Adam.
        epochs, batch_size: number of epochs, default 10, and rows per batch, default 32.
        lr: learning rate, default 0.01.
        device: where to train; default the accelerator if there is one, else the CPU.
        verbose: as in `Model.fit`; default nothing.
        random_state: an int for the same network each time; None draws from NumPy's global state,
            as scikit-learn does. torch's random state is not changed.
        **factory_arguments: keyword arguments of `model`, such as `hidden`.

    Attributes:
        classes_: the labels found, sorted.
        model_: the trained minikeras.Model.
        history_: what its fit returned.
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
        self._train(X, torch.from_numpy(numbers).long(), sample_weight, len(classes))
        # after the training: if a fit fails, the previous model keeps its labels
        self.classes_ = classes
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
        optimizer, epochs, batch_size, lr, device, verbose, random_state: as in `Classifier`.
        **factory_arguments: as in `Classifier`.

    Attributes:
        model_, history_, n_features_in_: as in `Classifier`.

    >>> import numpy as np
    >>> from minikeras.integrations.sklearn import Regressor
    >>> X = np.linspace(-1, 1, 200).reshape(-1, 1)
    >>> regressor = Regressor(epochs=30, random_state=0, device="cpu").fit(X, X[:, 0] ** 2)
    >>> bool(regressor.score(X, X[:, 0] ** 2) > 0.95)
    True
    """

    default_loss = nn.MSELoss

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
        # contiguous, since torch takes no array with negative strides, such as y[::-1]
        numbers = np.ascontiguousarray(y.reshape(len(y), -1), dtype=np.float64)
        labels = torch.tensor(numbers, dtype=torch.get_default_dtype())
        self._train(X, labels, sample_weight, labels.shape[1])
        self._shape = y.shape[1:]
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


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from this seed; restore torch's random state afterwards."""
    with TRAINING_LOCK, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
