"""Models as scikit-learn estimators, under scikit-learn's own checks and in its tools.

Validation, callbacks, partial_fit and losses with parameters are in test_sklearn_training.py.
"""

import pickle

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import minikeras
from minikeras.integrations.sklearn import Classifier, Regressor

CPU = {"device": "cpu", "random_state": 0}
pytestmark = pytest.mark.usefixtures("one_thread")
# scikit-learn compares to 1e-7. What float32 gives to that digit depends on the processor, so these
# checks may fail or pass; the tests below them compare to 1e-5.
ROUNDING = {
    "check_sample_weight_equivalence_on_dense_data": (
        "a row of weight 2 and the row twice: steps in float32"
    ),
    "check_methods_subset_invariance": (
        "a row alone and the row in a batch: matrix products in float32"
    ),
    "check_methods_sample_order_invariance": "rows in another order: matrix products in float32",
}


@parametrize_with_checks(
    [Classifier(**CPU), Regressor(**CPU)],
    expected_failed_checks=lambda estimator: ROUNDING,
    xfail_strict=False,
)
def test_estimator_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    ("Estimator", "method"), [(Classifier, "predict_proba"), (Regressor, "predict")]
)
def test_estimator_prediction_depends_on_its_row_alone_to_1e_5(Estimator, method):
    X, y = load_iris(return_X_y=True)
    estimator = Estimator(epochs=3, **CPU).fit(X, y)
    predict = getattr(estimator, method)
    whole = predict(X)
    order = np.random.default_rng(0).permutation(len(X))
    alone = np.concatenate([predict(X[row : row + 1]) for row in range(len(X))])
    np.testing.assert_allclose(alone, whole, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(predict(X[order]), whole[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("Estimator", [Classifier, Regressor])
def test_estimator_trains_a_row_of_weight_2_as_the_row_twice_to_1e_5(Estimator):
    X, y = load_iris(return_X_y=True)
    y = y if Estimator is Classifier else y.astype(float)
    weights = np.where(np.arange(len(X)) % 3 == 0, 2.0, 1.0)
    twice = np.repeat(np.arange(len(X)), weights.astype(int))
    settings = {"epochs": 2, **CPU}
    weighted = Estimator(batch_size=len(X), **settings).fit(X, y, sample_weight=weights)
    repeated = Estimator(batch_size=len(twice), **settings).fit(X[twice], y[twice])
    method = "predict_proba" if Estimator is Classifier else "predict"
    expected = getattr(repeated, method)(X)
    np.testing.assert_allclose(getattr(weighted, method)(X), expected, atol=1e-5, rtol=1e-5)


def network(n_features, n_outputs, width=8, depth=1):
    layers = [nn.Linear(n_features, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, n_outputs))


def iris():
    X, y = load_iris(return_X_y=True)
    return X, np.array(["setosa", "versicolor", "virginica"])[y]


def test_classifier_learns_labels_of_any_kind_in_a_pipeline():
    X, y = iris()
    pipeline = make_pipeline(StandardScaler(), Classifier(network, epochs=30, **CPU)).fit(X, y)
    assert pipeline.score(X, y) > 0.95
    assert pipeline.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    proba = pipeline.predict_proba(X)
    assert (pipeline.classes_[proba.argmax(1)] == pipeline.predict(X)).all()
    np.testing.assert_allclose(proba.sum(1), 1)


def test_regressor_learns_one_number_or_several():
    X, y = load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std()
    one = make_pipeline(StandardScaler(), Regressor(epochs=20, lr=0.003, **CPU))
    assert cross_val_score(one, X, y, cv=3).min() > 0.35  # LinearRegression has 0.47 at the least
    two = Regressor(epochs=5, **CPU).fit(X, np.stack([y, -y], 1))
    assert two.predict(X).shape == (442, 2)
    assert Regressor(epochs=1, **CPU).fit(X, y[:, None]).predict(X).shape == (442, 1)


@pytest.mark.parametrize(
    "turned", [lambda y: y[::-1], lambda y: y.astype(">f4"), lambda y: np.stack([y, -y], 1)[::-1]]
)
def test_regressor_takes_targets_of_any_memory_layout(turned):
    X, y = load_diabetes(return_X_y=True)
    expected = (
        Regressor(epochs=1, **CPU)
        .fit(X, np.array(turned(y), dtype=np.float64, order="C"))
        .predict(X)
    )
    np.testing.assert_array_equal(Regressor(epochs=1, **CPU).fit(X, turned(y)).predict(X), expected)


def test_estimator_keeps_its_model_and_labels_if_the_next_fit_fails():
    X, y = iris()
    classifier = Classifier(epochs=1, **CPU).fit(X, y)
    predicted = classifier.predict(X)
    with pytest.raises(ValueError, match="learning rate"):
        classifier.set_params(lr=-1.0).fit(X, np.char.upper(y))
    assert classifier.predict(X).tolist() == predicted.tolist()
    regressor = Regressor(epochs=1, **CPU).fit(X, X[:, :1])
    with pytest.raises(ValueError, match="learning rate"):
        regressor.set_params(lr=-1.0).fit(X, X[:, 0])
    assert regressor.predict(X).shape == (150, 1)


def test_estimators_in_threads_are_what_they_are_one_by_one():
    X, y = iris()

    def proba(seed):
        return Classifier(epochs=3, device="cpu", random_state=seed).fit(X, y).predict_proba(X)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = Parallel(4, backend="threading")(delayed(proba)(seed) for seed in range(8))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(found, [proba(seed) for seed in range(8)])


def test_estimator_search_goes_over_the_factorys_arguments_and_over_factories():
    X, y = iris()
    search = GridSearchCV(
        Classifier(network, epochs=5, **CPU),
        [{"width": [2, 16], "lr": [0.03]}, {"model": [None], "hidden": [4]}],
        cv=2,
    ).fit(X, y)
    assert len(search.cv_results_["params"]) == 3
    assert search.best_params_ in (
        {"width": 2, "lr": 0.03},
        {"width": 16, "lr": 0.03},
        {"model": None, "hidden": 4},
    )
    searched = GridSearchCV(Classifier(network, epochs=1, **CPU), {"width": [5]}, cv=2).fit(X, y)
    assert searched.best_estimator_.model_.net[0].out_features == 5


def test_estimator_arguments_can_be_read_set_and_cloned():
    classifier = Classifier(network, width=3, epochs=2)
    assert classifier.get_params()["width"] == 3
    assert classifier.get_params()["depth"] == 1  # the factory's default
    assert "depth" not in classifier.get_params(deep=False)
    twin = clone(classifier.set_params(depth=2, lr=0.5))
    assert twin.get_params() == classifier.get_params()
    assert (twin.depth, twin.width, twin.lr) == (2, 3, 0.5)
    assert not hasattr(twin, "model_")


def test_estimator_argument_is_not_the_factorys_of_that_name():
    def rated(n_features, n_outputs, lr=5.0):
        return nn.Linear(n_features, n_outputs)

    assert Classifier(rated, lr=0.5).get_params()["lr"] == 0.5


def test_estimator_factory_may_have_an_argument_that_ends_with_an_underscore():
    def scaled(n_features, n_outputs, lambda_=1.0):
        layer = nn.Linear(n_features, n_outputs)
        layer.scale = lambda_
        return layer

    classifier = Classifier(scaled, lambda_=3.0, epochs=1, **CPU).fit(*iris())
    assert classifier.model_.net.scale == 3.0
    assert classifier.get_params()["lambda_"] == clone(classifier).lambda_ == 3.0
    assert "classes_" not in classifier.get_params()


def test_estimator_factory_may_have_arguments_without_a_default():
    def wide(n_features, n_outputs, *, width):
        return network(n_features, n_outputs, width)

    classifier = Classifier(wide, width=3, epochs=1, **CPU).fit(*iris())
    assert classifier.model_.net[0].out_features == 3
    assert clone(classifier).width == 3


def weights(estimator):
    return torch.nn.utils.parameters_to_vector(estimator.model_.parameters())


def test_estimator_random_state_gives_the_same_network_and_leaves_the_global_one_alone():
    X, y = iris()
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    first = Classifier(network, epochs=2, **CPU).fit(X, y)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    torch.rand(5)
    again = Classifier(network, epochs=2, **CPU).fit(X, y)
    other = Classifier(network, epochs=2, device="cpu", random_state=1).fit(X, y)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_classifier_can_be_pickled_after_fit():
    X, y = iris()
    classifier = Classifier(network, epochs=2, **CPU).fit(X, y)
    assert (
        pickle.loads(pickle.dumps(classifier)).predict_proba(X) == classifier.predict_proba(X)
    ).all()


def test_estimator_uses_a_custom_model_loss_and_optimizer():
    class Net(minikeras.Model):
        def __init__(self, n_features, n_classes, start=0.0):
            super().__init__()
            self.fc = nn.Linear(n_features, n_classes)
            nn.init.constant_(self.fc.weight, start)
            nn.init.zeros_(self.fc.bias)

        def forward(self, x):
            return self.fc(x)

    seen = []

    def loss_func(y_pred, y_true):
        seen.append((tuple(y_pred.shape), y_true.dtype))
        return nn.functional.cross_entropy(y_pred, y_true)

    X, y = iris()
    classifier = Classifier(
        Net, loss_func, torch.optim.SGD, epochs=1, batch_size=150, lr=0.5, start=0.25, **CPU
    )
    classifier.fit(X, y)
    assert isinstance(classifier.model_, Net)
    assert seen == [((150, 3), torch.int64)]
    reference = torch.full((3, 4), 0.25, requires_grad=True)
    rows = torch.tensor(X, dtype=torch.float32)
    labels = torch.tensor(load_iris().target)
    nn.functional.cross_entropy(rows @ reference.T, labels).backward()
    torch.testing.assert_close(classifier.model_.fc.weight, reference - 0.5 * reference.grad)
    assert list(classifier.history_.columns) == ["loss"]


def test_estimator_sample_weight_weighs_the_rows():
    X, y = iris()
    weight = np.where(y == "setosa", 0.0, 1.0)
    classifier = Classifier(network, epochs=10, **CPU).fit(X, y, sample_weight=weight)
    assert "setosa" not in classifier.predict(X)
    assert (
        Regressor(epochs=30, **CPU)
        .fit(X, (y == "setosa") * 5.0, sample_weight=weight)
        .predict(X)
        .max()
        < 1
    )


MISTAKES = {
    "a network instead of its factory": (
        Classifier(nn.Linear(4, 3)),
        TypeError,
        "model must be a function of (n_features, n_outputs) that makes a new network for each "
        "fit, got Linear. Pass lambda n_features, n_outputs: ..., or the network's class.",
    ),
    "a misspelt argument": (
        Classifier(network, epoch=3),
        TypeError,
        "Classifier got 'epoch', which is no argument of its own and none of the model's factory. "
        "Expected batch_size, callbacks, device, epochs, loss_func, lr, metrics_dict, model, "
        "optimizer, random_state, validation, verbose, width, depth. Did you mean 'epochs'?",
    ),
    "a factory without a return": (
        Classifier(lambda n_features, n_outputs: None),
        TypeError,
        "model must give a torch.nn.Module, got NoneType. Let it return one.",
    ),
    "a factory that takes one number": (
        Classifier(lambda n_features: nn.Linear(n_features, 3)),
        TypeError,
        "model is called with (n_features, n_outputs), and <lambda> cannot be: too many positional "
        "arguments. Let it take the two, and give what else it needs a default.",
    ),
    "an optimizer instead of its class": (
        Classifier(network, optimizer=torch.optim.SGD(nn.Linear(4, 3).parameters())),
        TypeError,
        "optimizer must be a function of (parameters, lr=) that makes one for each fit, got SGD. "
        "Pass the class, torch.optim.SGD, or functools.partial of it.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_estimator_raises_errors_that_say_what_to_pass(mistake):
    estimator, kind, message = MISTAKES[mistake]
    with pytest.raises(kind) as caught:
        estimator.fit(*iris())
    assert str(caught.value) == message


def test_classifier_refuses_one_class_alone():
    X, y = iris()
    with pytest.raises(ValueError, match="one class") as caught:
        Classifier(network, **CPU).fit(X[:50], y[:50])
    assert (
        str(caught.value)
        == "y has one class, setosa; expected two or more to tell apart. Add rows of another."
    )


def test_classifier_refuses_outputs_for_other_classes():
    X, y = iris()
    classifier = Classifier(
        lambda n_features, n_classes: nn.Linear(n_features, 7), epochs=1, **CPU
    ).fit(X, y)
    with pytest.raises(ValueError, match="needs outputs") as caught:
        classifier.predict(X)
    assert str(caught.value) == (
        "Classifier needs outputs of shape (150, 3), got (150, 7). Let the model's factory make "
        "n_outputs outputs."
    )


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            np.ones((150, 2)),
            "sample_weight must be one number a row, of shape (150,), got (150, 2). Pass one "
            "weight for each.",
        ),
        (
            np.zeros(150),
            "sample_weight is zero for every row, and there is nothing to learn. Give some rows a "
            "weight.",
        ),
    ],
)
def test_estimator_refuses_impossible_sample_weights(weight, message):
    with pytest.raises(ValueError, match="sample_weight") as caught:
        Classifier(epochs=1, **CPU).fit(*iris(), sample_weight=weight)
    assert str(caught.value) == message
