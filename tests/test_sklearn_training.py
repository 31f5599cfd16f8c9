"""Estimators: validation, callbacks, searches over their settings, partial_fit, trained losses."""

import copy
import functools
import pickle
import re

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.compare import assert_same_weights
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.estimator_checks import check_estimator
from torch import nn
from torch.optim.lr_scheduler import StepLR

import minikeras
from minikeras import EMA, EarlyStopping, LambdaCallback, LRScheduler, ModelCheckpoint, Timer
from minikeras.integrations.sklearn import Classifier, Regressor

CPU = {"device": "cpu", "random_state": 0}
NAMES = np.array(["setosa", "versicolor", "virginica"])
pytestmark = pytest.mark.usefixtures("one_thread")


def network(n_features, n_outputs, width=8):
    return nn.Sequential(
        nn.Linear(n_features, width), nn.Dropout(0.2), nn.ReLU(), nn.Linear(width, n_outputs)
    )


def rows(count=100):
    """A short last batch at 32 rows; (count, 4) and the names of the three classes."""
    X, y = load_iris(return_X_y=True)
    chosen = np.random.default_rng(0).permutation(150)[:count]
    return X[chosen].astype(np.float32), NAMES[y[chosen]]


def numbers_of(y):
    return torch.from_numpy(np.searchsorted(NAMES, y))


def written_out(
    train, val=None, epochs=4, callbacks=(), loss_func=None, n_outputs=3, schedule=None, state=0
):
    """The same fit by `minikeras.Model`, and its history."""
    torch.manual_seed(int(check_random_state(state).randint(2**31 - 1)))
    model = minikeras.Model(network(4, n_outputs))
    loss_func = nn.CrossEntropyLoss() if loss_func is None else loss_func
    parameters = list(model.parameters())
    if isinstance(loss_func, nn.Module):
        parameters += loss_func.parameters()
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    model.compile(loss_func, optimizer, device="cpu")
    if schedule is not None:
        callbacks = [LRScheduler(schedule(optimizer))]
    dfhistory = model.fit(epochs, train, val, batch_size=32, callbacks=callbacks, verbose=0)
    return model, dfhistory


def assert_same_fit(estimator, expected):
    model, dfhistory = expected
    assert_same_weights(estimator.model_, model)
    pd.testing.assert_frame_equal(estimator.history_, dfhistory, check_exact=True)
    assert estimator.n_iter_ == len(dfhistory)


# --- validation -----------------------------------------------------------------------------------


def test_classifier_validates_on_the_stratified_share_that_train_test_split_takes():
    X, y = rows()
    classifier = Classifier(network, epochs=4, validation=0.25, **CPU).fit(X, y)
    X_train, X_val, y_train, y_val = train_test_split(
        X, y, test_size=0.25, stratify=y, random_state=0
    )
    train, val = (X_train, numbers_of(y_train)), (X_val, numbers_of(y_val))
    assert_same_fit(classifier, written_out(train, val))
    # over all rows, in float64
    logits = classifier.model_.predict(X_val).double()
    val_loss = nn.functional.cross_entropy(logits, numbers_of(y_val)).item()
    assert classifier.history_["val_loss"].iloc[-1] == pytest.approx(val_loss, rel=1e-6)


def test_regressor_validates_on_a_share_with_its_weights():
    X, y = rows()
    y = X[:, :2] - X[:, 2:]
    weight = np.linspace(0, 2, len(X)).astype(np.float32)
    regressor = Regressor(network, epochs=4, validation=0.25, **CPU).fit(X, y, sample_weight=weight)
    X_train, X_val, y_train, y_val, w_train, w_val = train_test_split(
        X, y, weight, test_size=0.25, random_state=0
    )
    expected = written_out(
        (X_train, y_train, torch.from_numpy(w_train)),
        (X_val, y_val, torch.from_numpy(w_val)),
        loss_func=nn.MSELoss(reduction="none"),
        n_outputs=2,
    )
    assert_same_fit(regressor, expected)
    errors = ((regressor.predict(X_val) - y_val) ** 2).mean(axis=1)
    assert regressor.history_["val_loss"].iloc[-1] == pytest.approx((errors * w_val).mean(), 1e-5)


def test_estimator_validates_on_data_with_the_labels_of_training():
    X, y = rows(120)
    val = (pd.DataFrame(X[90:].astype(np.float64)).to_numpy(), list(y[90:]))
    classifier = Classifier(network, epochs=3, validation=val, **CPU).fit(X[:90], y[:90])
    expected = written_out((X[:90], numbers_of(y[:90])), (X[90:], numbers_of(y[90:])), epochs=3)
    assert_same_fit(classifier, expected)
    target = X[:, 0]
    val = (X[90:], target[90:])
    regressor = Regressor(network, epochs=3, validation=val, **CPU).fit(X[:90], target[:90])
    data = [(part, labels[:, None]) for part, labels in ((X[:90], target[:90]), val)]
    assert_same_fit(regressor, written_out(*data, epochs=3, loss_func=nn.MSELoss(), n_outputs=1))


def test_regressor_with_weights_validates_on_data_without_weights():
    X, _ = rows()
    y = X[:, 0]
    weight = np.linspace(0, 2, 100)
    regressor = Regressor(network, epochs=2, validation=(X[:9], y[:9]), **CPU)
    regressor.fit(X, y, sample_weight=weight)
    expected = ((regressor.predict(X[:9]) - y[:9]) ** 2).mean()
    assert regressor.history_["val_loss"].iloc[-1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("nothing", [None, 0, 0.0])
def test_estimator_trains_on_all_rows_without_validation(nothing):
    X, y = rows()
    classifier = Classifier(network, epochs=2, validation=nothing, **CPU).fit(X, y)
    assert_same_fit(classifier, written_out((X, numbers_of(y)), epochs=2))


def test_classifier_logs_the_metrics_of_the_validation_rows():
    def accuracy(y_pred, y_true):
        return (y_pred.argmax(1) == y_true).float().mean()

    X, y = rows()
    stop = EarlyStopping("val_accuracy", patience=3, restore_best_weights=True)
    classifier = Classifier(
        epochs=40,
        validation=0.3,
        callbacks=[stop],
        metrics_dict={"accuracy": accuracy},
        **CPU,
    ).fit(X, y)
    _, X_val, _, y_val = train_test_split(X, y, test_size=0.3, stratify=y, random_state=0)
    best = classifier.history_["val_accuracy"].max()
    assert accuracy_score(y_val, classifier.predict(X_val)) == pytest.approx(best)
    assert classifier.n_iter_ < 40


VALIDATION_MISTAKES = {
    "a number of rows": (
        {"validation": 10},
        "`validation` must be a share of the rows above 0 and below 1, data (X_val, y_val), or "
        "None, got 10. Pass such as validation=0.1.",
    ),
    "a bool": (
        {"validation": True},
        "`validation` must be a share of the rows above 0 and below 1, data (X_val, y_val), or "
        "None, got True. Pass such as validation=0.1.",
    ),
    "features alone": (
        {"validation": np.zeros((3, 4))},
        "`validation` must be a share of the rows above 0 and below 1, data (X_val, y_val), or "
        "None, got ndarray (3, 4) float64. Pass such as validation=0.1.",
    ),
    "too small a share": (
        {"validation": 0.01},
        "validation=0.01 of 100 rows keeps 1 for validation and leaves 99 for training, and there "
        "are 3 classes; expected as many rows or more in both. Pass another share, more rows, or "
        "validation data, validation=(X_val, y_val).",
    ),
    "other columns": (
        {"validation": (np.zeros((3, 2)), NAMES)},
        "`validation` is (X_val, y_val), which must fit X and y of fit: X has 2 features, but "
        "Classifier is expecting 4 features as input.",
    ),
    "another label": (
        {"validation": (np.zeros((2, 4)), ["setosa", "rose"])},
        "`validation` is (X_val, y_val), which must fit X and y of fit: y has the label 'rose', "
        "which is none of the classes: expected 'setosa', 'versicolor', 'virginica'. Leave its "
        "rows out, or train with all classes: fit with rows of each, or name them in classes of "
        "the first partial_fit.",
    ),
    "numbers for text": (
        {"validation": (np.zeros((2, 4)), [0, 1])},
        "`validation` is (X_val, y_val), which must fit X and y of fit: y has the label 0, which "
        "is none of the classes: expected 'setosa', 'versicolor', 'virginica'. Leave its rows out, "
        "or train with all classes: fit with rows of each, or name them in classes of the first "
        "partial_fit.",
    ),
    "fewer labels": (
        {"validation": (np.zeros((3, 4)), ["setosa"])},
        "`validation` is (X_val, y_val), which must fit X and y of fit: Found input variables with "
        "inconsistent numbers of samples: [3, 1]",
    ),
}


@pytest.mark.parametrize("mistake", VALIDATION_MISTAKES)
def test_estimator_refuses_validation_that_cannot_be(mistake):
    arguments, message = VALIDATION_MISTAKES[mistake]
    with pytest.raises(ValueError, match="validation") as caught:
        Classifier(network, **arguments, **CPU).fit(*rows())
    assert str(caught.value) == message
    Classifier(network, epochs=1, validation=0.1, **CPU).fit(*rows())  # the remedy


def test_classifier_refuses_to_take_a_share_of_a_class_of_one_row():
    X, y = rows()
    keep = np.r_[np.flatnonzero(y == "setosa")[:1], np.flatnonzero(y != "setosa")]
    with pytest.raises(ValueError, match="validation") as caught:
        Classifier(network, validation=0.2, **CPU).fit(X[keep], y[keep])
    assert str(caught.value) == (
        "validation=0.2 takes a share of the rows of each class, and 1 of 3 classes have 1 row; "
        "expected 2 or more of each. Pass more rows, or validation data, "
        "validation=(X_val, y_val)."
    )
    Classifier(network, epochs=1, validation=(X, y), **CPU).fit(X[keep], y[keep])


def test_regressor_refuses_a_share_that_leaves_no_row_to_train_on():
    with pytest.raises(ValueError, match="validation") as caught:
        Regressor(validation=0.9, **CPU).fit([[1.0], [2.0]], [1.0, 2.0])
    assert str(caught.value) == (
        "validation=0.9 keeps 2 of n_samples=2 for validation and leaves none for training. Pass "
        "more rows, or validation data, validation=(X_val, y_val)."
    )
    with pytest.raises(ValueError, match="validation") as caught:
        Regressor(validation=([[1.0]], [[1.0]]), **CPU).fit([[1.0], [2.0]], [1.0, 2.0])
    assert str(caught.value) == (
        "`validation` is (X_val, y_val), which must fit X and y of fit: y has the shape (1, 1); "
        "expected (1,), as in training. Reshape it."
    )


def test_estimator_refuses_weights_that_are_all_zero_on_one_side():
    X, y = rows()
    train, _ = train_test_split(np.arange(100), test_size=0.2, stratify=y, random_state=0)
    weight = np.zeros(100)
    weight[train] = 1.0
    with pytest.raises(ValueError, match="sample_weight") as caught:
        Classifier(network, validation=0.2, **CPU).fit(X, y, sample_weight=weight)
    assert str(caught.value) == (
        "sample_weight is zero for every row that validation=0.2 leaves for validation. Leave rows "
        "without weight out of X, or pass validation data, validation=(X_val, y_val)."
    )
    remedied = Classifier(network, epochs=1, validation=0.2, **CPU)
    remedied.fit(X[train], y[train], sample_weight=weight[train])


# --- callbacks ------------------------------------------------------------------------------------


def stop(patience=2):
    return EarlyStopping(patience=patience, restore_best_weights=True)


def test_estimator_stops_early_and_restores_the_best_weights():
    X, y = rows()
    data = {"test_size": 0.3, "stratify": y, "random_state": 0}
    X_train, X_val, y_train, y_val = train_test_split(X, y, **data)
    val = (X_val, numbers_of(y_val))
    classifier = Classifier(network, epochs=200, validation=0.3, callbacks=[stop()], **CPU)
    classifier.fit(X, y)
    expected = written_out((X_train, numbers_of(y_train)), val, epochs=200, callbacks=[stop()])
    assert_same_fit(classifier, expected)
    losses = classifier.history_["val_loss"]
    assert losses.iloc[-1] > losses.min()
    assert 3 <= classifier.n_iter_ < 200
    assert classifier.callbacks_["earlystopping"].best == losses.min()
    logits = classifier.model_.predict(X_val)
    assert nn.functional.cross_entropy(logits, val[1]).item() == pytest.approx(losses.min(), 1e-5)


class Count(minikeras.Callback):
    """Counts epochs without ever starting again."""

    def __init__(self, limit):
        self.limit = limit
        self.epochs = 0

    def on_epoch_end(self, epoch, logs):
        self.epochs += 1
        self.model.stop_training = self.epochs >= self.limit


def test_estimator_trains_each_fit_with_fresh_copies_of_its_callbacks():
    X, y = rows()
    count = Count(3)
    classifier = Classifier(network, epochs=9, callbacks=[count], **CPU)
    for _ in range(2):
        classifier.fit(X, y)
        assert classifier.n_iter_ == classifier.callbacks_["count"].epochs == 3
    assert count.epochs == 0
    assert not hasattr(count, "model")
    search = GridSearchCV(classifier, {"callbacks__count__limit": [2, 4]}, cv=3).fit(X, y)
    assert search.best_estimator_.n_iter_ in (2, 4)
    assert (classifier.callbacks[0] is count, count.limit) == (True, 3)


def test_estimator_takes_a_learning_rate_schedule_as_a_function_of_the_model():
    def halve(optimizer):
        return StepLR(optimizer, 2, gamma=0.5)

    X, y = rows()
    callbacks = [("rate", lambda model: LRScheduler(halve(model.optimizer)))]
    classifier = Classifier(network, epochs=5, callbacks=callbacks, **CPU).fit(X, y)
    assert_same_fit(classifier, written_out((X, numbers_of(y)), epochs=5, schedule=halve))
    assert classifier.history_["lr"].tolist() == [0.01, 0.01, 0.005, 0.005, 0.0025]


def test_estimator_can_be_pickled_and_cloned_before_and_after_a_fit_with_callbacks(tmp_path):
    from minikeras.integrations.tensorboard import TensorBoard

    X, y = rows()
    board = TensorBoard(tmp_path / "board")
    callbacks = [stop(), EMA(0.9), ModelCheckpoint(tmp_path / "weights.pt"), Timer(600), board]
    classifier = Classifier(epochs=3, validation=0.2, callbacks=callbacks, **CPU)
    before = pickle.loads(pickle.dumps(clone(classifier))).fit(X, y)
    classifier.fit(X, y)
    after = pickle.loads(pickle.dumps(classifier))
    expected = classifier.predict_proba(X)
    np.testing.assert_array_equal(before.predict_proba(X), expected)
    np.testing.assert_array_equal(after.predict_proba(X), expected)
    np.testing.assert_array_equal(clone(after).fit(X, y).predict_proba(X), expected)
    assert (tmp_path / "weights.pt").exists()
    assert list((tmp_path / "board").glob("events*"))


def test_estimator_names_the_settings_of_its_callbacks():
    first = stop(3)
    classifier = Classifier(callbacks=[first, ("slow", stop(9)), Timer(5), stop(4)])
    found = classifier.get_params()
    assert found["callbacks__earlystopping_1"] is first
    patiences = {name: value for name, value in found.items() if name.endswith("__patience")}
    assert patiences == {
        "callbacks__earlystopping_1__patience": 3,
        "callbacks__slow__patience": 9,
        "callbacks__earlystopping_2__patience": 4,
    }
    assert found["callbacks__earlystopping_1__monitor"] == "val_loss"
    assert found["callbacks__timer__max_seconds"] == 5
    assert "callbacks__timer" not in classifier.get_params(deep=False)
    assert not hasattr(classifier, "callbacks__timer")


def test_estimator_sets_settings_without_changing_the_callback_it_was_given():
    given = stop(3)
    classifier = Classifier(callbacks=[given, Timer(5)])
    classifier.set_params(
        callbacks__earlystopping__patience=7,
        callbacks__earlystopping__mode="max",
        callbacks__timer=None,
        lr=0.5,
    )
    assert (given.patience, given.mode) == (3, "auto")
    names, callbacks = zip(*classifier.callbacks, strict=True)
    assert names == ("earlystopping", "timer")
    changed = callbacks[0]
    assert (changed.patience, changed.mode, changed.monitor) == (7, "max", "val_loss")
    assert changed.restore_best_weights
    assert (callbacks[1], classifier.lr) == (None, 0.5)
    classifier.set_params(callbacks__timer=Timer(8), callbacks__timer__max_seconds=9)
    assert classifier.get_params()["callbacks__timer__max_seconds"] == 9
    pipeline = make_pipeline(StandardScaler(), classifier)
    pipeline.set_params(classifier__callbacks__earlystopping__patience=1)
    assert pipeline.get_params()["classifier__callbacks__earlystopping__patience"] == 1


def test_estimator_leaves_out_a_callback_set_to_none():
    X, y = rows()
    classifier = Classifier(network, epochs=4, callbacks=[Count(1)], **CPU)
    search = GridSearchCV(classifier, {"callbacks__count": [None, Count(2)]}, cv=2, refit=False)
    epochs = []
    for params in search.fit(X, y).cv_results_["params"]:
        epochs.append(clone(classifier).set_params(**params).fit(X, y).n_iter_)
    assert epochs == [4, 2]


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_estimator_search_over_callbacks_equals_a_loop_over_the_settings(n_jobs):
    X, y = rows()
    grid = {"callbacks__earlystopping__patience": [1, 4], "width": [2, 8]}
    classifier = Classifier(network, epochs=25, validation=0.2, callbacks=[stop()], lr=0.03, **CPU)
    folds = StratifiedKFold(3)
    search = GridSearchCV(classifier, grid, cv=folds, n_jobs=n_jobs).fit(X, y)
    for params, mean in zip(
        search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True
    ):
        scores = []
        for train, test in folds.split(X, y):
            fresh = Classifier(
                network,
                epochs=25,
                validation=0.2,
                callbacks=[stop(params["callbacks__earlystopping__patience"])],
                lr=0.03,
                width=params["width"],
                **CPU,
            ).fit(X[train], y[train])
            scores.append(accuracy_score(y[test], fresh.predict(X[test])))
        assert mean == pytest.approx(np.mean(scores))
    best = clone(classifier).set_params(**search.best_params_).fit(X, y)
    np.testing.assert_array_equal(search.predict_proba(X), best.predict_proba(X))


class Private(minikeras.Callback):
    def __init__(self, patience=2, delta=0):
        self._patience = patience
        self.delta = delta


class AnyArguments(minikeras.Callback):
    def __init__(self, limit=1, **rest):
        self.limit = limit


SETTING_MISTAKES = {
    "an unknown callback": (
        {"callbacks__earlystoping__patience": 3},
        ValueError,
        "callbacks__earlystoping__patience: there is no callback named 'earlystoping'. Known are "
        "'earlystopping', 'private', 'anyarguments', 'function', 'off'. Did you mean "
        "'earlystopping'?",
    ),
    "an unknown setting": (
        {"callbacks__earlystopping__patiance": 3},
        ValueError,
        "callbacks__earlystopping__patiance: EarlyStopping has no setting 'patiance'. Known are "
        "'monitor', 'min_delta', 'patience', 'mode', 'baseline', 'restore_best_weights', "
        "'start_from_epoch'. Did you mean 'patience'?",
    ),
    "a value that the callback refuses": (
        {"callbacks__earlystopping__patience": -1},
        ValueError,
        "patience must be a whole number of 0 or more, got -1.",
    ),
    "two settings of which one is unknown": (
        {"callbacks__private__patience": 3, "callbacks__private__more": 4},
        ValueError,
        "callbacks__private__more: Private has no setting 'more'. Known are 'patience', 'delta'.",
    ),
    "an argument that is not kept": (
        {"callbacks__private__delta": 3},
        TypeError,
        "callbacks__private__delta: Private is created again with the new setting, and all "
        "arguments of its __init__ are expected as attributes of the same names; it has no "
        "attribute 'patience'. Write self.patience = patience in its __init__, or set the whole "
        "callback: callbacks__private=...",
    ),
    "arguments that have no name": (
        {"callbacks__anyarguments__limit": 3},
        TypeError,
        "callbacks__anyarguments__limit: AnyArguments is created again with the new setting, and "
        "all arguments of its __init__ are expected as attributes of the same names; it has no "
        "attribute 'rest'. Write self.rest = rest in its __init__, or set the whole callback: "
        "callbacks__anyarguments=...",
    ),
    "a setting of a function": (
        {"callbacks__function__limit": 3},
        ValueError,
        "callbacks__function__limit: function has no setting 'limit'. It has none. Set the whole "
        "callback: callbacks__function=...",
    ),
    "a class": (
        {"callbacks__off": EarlyStopping},
        TypeError,
        "`callbacks` must hold instances of minikeras.Callback, got the class EarlyStopping. Pass "
        "EarlyStopping().",
    ),
}


@pytest.mark.parametrize("mistake", SETTING_MISTAKES)
def test_estimator_refuses_settings_that_no_callback_has(mistake):
    params, kind, message = SETTING_MISTAKES[mistake]
    entries = [stop(), Private(), AnyArguments(), ("function", lambda model: None), ("off", None)]
    classifier = Classifier(callbacks=entries)
    with pytest.raises(kind) as caught:
        classifier.set_params(lr=0.5, **params)
    assert str(caught.value) == message
    assert classifier.callbacks is entries
    assert classifier.lr == 0.01  # nothing was set


def test_estimator_without_callbacks_has_no_settings_of_them():
    with pytest.raises(ValueError, match="callbacks__stop") as caught:
        Classifier().set_params(callbacks__stop__patience=3)
    assert str(caught.value) == (
        "callbacks__stop__patience: there is no callback named 'stop'. Known are none: pass them "
        "as `callbacks`, a list, first."
    )
    both = Classifier().set_params(callbacks=[("stop", stop())], callbacks__stop__patience=3)
    assert both.callbacks[0][1].patience == 3


class Uncopied(minikeras.Callback):
    def __init__(self):
        self.rows = (row for row in range(3))


OPTIMIZER = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
CALLBACK_MISTAKES = {
    "a dict": (
        {"stop": stop()},
        TypeError,
        "`callbacks` must be a list of callbacks or of (name, callback) pairs, got "
        "{'stop': EarlyStopping}. Pass list(callbacks.items()).",
    ),
    "a name alone": (
        "stop",
        TypeError,
        "`callbacks` must be a list of callbacks or of (name, callback) pairs, got str. Pass "
        "[callback], or [(name, callback)] to choose the name.",
    ),
    "a class alone": (
        EarlyStopping,
        TypeError,
        "`callbacks` must be a list of callbacks or of (name, callback) pairs, got the class "
        "EarlyStopping. Pass [EarlyStopping()].",
    ),
    "a partial of a class": (
        [("stop", functools.partial(EarlyStopping, patience=3))],
        TypeError,
        "the function under 'stop' in `callbacks` is called with the model of the fit, and "
        "functools.partial of EarlyStopping would take it for its next argument. Pass an instance, "
        "EarlyStopping(...).",
    ),
    "a function without arguments": (
        [("stop", lambda: EarlyStopping("loss"))],
        TypeError,
        "the function under 'stop' in `callbacks` is called with the model of the fit, and cannot "
        "be: too many positional arguments. Pass a function of the model, lambda model: ..., or "
        "the callback itself.",
    ),
    "a triple": (
        [("stop", stop(), 3)],
        TypeError,
        "an entry of `callbacks` must be a callback or a pair (name, callback), got (str, "
        "EarlyStopping, int). Pass such as ('stop', EarlyStopping()).",
    ),
    "a class": (
        [EarlyStopping],
        TypeError,
        "`callbacks` must hold instances of minikeras.Callback, got the class EarlyStopping. Pass "
        "EarlyStopping().",
    ),
    "a scheduler of torch": (
        [StepLR(OPTIMIZER, 2)],
        TypeError,
        "`callbacks` must hold instances of minikeras.Callback, or functions of the model that "
        "create one, got StepLR. Pass such as EarlyStopping(patience=3), or lambda model: "
        "LRScheduler(...).",
    ),
    "a name twice": (
        [("stop", stop()), ("stop", stop())],
        ValueError,
        "`callbacks` has two entries with the name 'stop'; expected different names. Rename one: "
        "('stop_2', callback).",
    ),
    "two underscores": (
        [("my__stop", stop())],
        ValueError,
        "`callbacks` has the name 'my__stop'; expected a name without two underscores in a row, "
        "which separate it from its settings: callbacks__stop__patience. Rename it.",
    ),
    "a schedule of another optimizer": (
        [LRScheduler(StepLR(OPTIMIZER, 2))],
        ValueError,
        "`callbacks` has an LRScheduler under 'lrscheduler', whose StepLR changes the optimizer "
        "that it was made with, and each fit creates a new optimizer. Pass a function that creates "
        "it for the model of the fit: lambda model: LRScheduler(StepLR(model.optimizer, ...)).",
    ),
    "a function of something else": (
        [("mine", lambda model: 3)],
        TypeError,
        "the function under 'mine' in `callbacks` must create an instance of minikeras.Callback "
        "from the model, got int. Let it return one.",
    ),
    "what cannot be copied": (
        [Uncopied()],
        TypeError,
        "each fit trains with a copy of its callbacks, and Uncopied under 'uncopied' in "
        "`callbacks` cannot be copied: cannot pickle 'generator' object. Pass a function that "
        "creates it: lambda model: Uncopied(...).",
    ),
    "val_loss without validation": (
        [stop()],
        ValueError,
        "EarlyStopping monitors 'val_loss' and fit has no dl_val. Pass dl_val, or monitor='loss'.",
    ),
}


@pytest.mark.parametrize("mistake", CALLBACK_MISTAKES)
def test_estimator_refuses_callbacks_that_cannot_be(mistake):
    callbacks, kind, message = CALLBACK_MISTAKES[mistake]
    classifier = Classifier(network, callbacks=callbacks, epochs=1, **CPU)
    with pytest.raises(kind) as caught:
        classifier.fit(*rows())
    assert str(caught.value) == message
    if "dl_val" in message:
        assert caught.value.__notes__[-1] == (
            "dl_val is what Classifier gets as `validation`: pass validation=0.1, or "
            "validation=(X_val, y_val)."
        )
    assert not hasattr(classifier, "model_")
    classifier.set_params(callbacks=[EarlyStopping("loss")]).fit(*rows())


SUGGESTIONS = {
    "validation_split": "Pass validation=0.1.",
    "early_stopping": "Pass callbacks=[EarlyStopping(...)] and validation=0.1.",
    "callback": "Did you mean 'callbacks'?",
    "callbacks__earlystopping__patience": (
        "Pass the callbacks as a list, callbacks=[EarlyStopping(...)]; set_params and searches "
        "take the names of their settings."
    ),
    "optimizer__momentum": "Pass functools.partial(torch.optim.SGD, momentum=...) as optimizer.",
    "module__hidden": "Pass hidden=...",
    "max_epochs": "Did you mean 'epochs'?",
}


@pytest.mark.parametrize("name", SUGGESTIONS)
def test_estimator_given_an_argument_of_another_library_says_what_to_pass(name):
    classifier = Classifier(**{name: 3}, **CPU)
    with pytest.raises(TypeError) as caught:
        classifier.fit(*rows())
    assert str(caught.value) == (
        f"Classifier got {name!r}, which is no argument of its own and none of the model's factory."
        f" Expected batch_size, callbacks, device, epochs, loss_func, lr, metrics_dict, model, "
        f"optimizer, random_state, validation, verbose, hidden. {SUGGESTIONS[name]}"
    )


# --- partial_fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [None, "pickle", "deepcopy"])
def test_classifier_partial_fit_in_k_calls_equals_a_fit_of_k_epochs(copied):
    X, y = rows()
    val = (X[:10], y[:10])
    arguments = {"validation": val, "metrics_dict": {"one": lambda a, b: 1.0}} | CPU
    if copied == "pickle":
        arguments["metrics_dict"] = None
    fitted = Classifier(network, epochs=5, **arguments).fit(X, y)
    partial = Classifier(network, **arguments)
    for call in range(5):
        partial.partial_fit(X, y, classes=NAMES[[2, 0, 1]] if call == 0 else None)
        if call == 2 and copied == "pickle":
            partial = pickle.loads(pickle.dumps(partial))
        if call == 2 and copied == "deepcopy":
            partial = copy.deepcopy(partial)
    assert_same_fit(partial, (fitted.model_, fitted.history_))
    np.testing.assert_array_equal(partial.predict(X), fitted.predict(X))


def test_classifier_partial_fit_learns_from_chunks_that_lack_classes():
    X, y = load_iris(return_X_y=True)  # sorted by class
    X = torch.from_numpy(X).float()
    net = nn.Linear(4, 3)
    classifier = Classifier(
        lambda n_features, n_classes: copy.deepcopy(net), batch_size=40, lr=0.05, **CPU
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for start in range(0, 150, 40):  # one batch in each call, the last one short
        chunk = slice(start, start + 40)
        classifier.partial_fit(X[chunk], NAMES[y[chunk]], classes=NAMES)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X[chunk]), torch.from_numpy(y[chunk])).backward()
        optimizer.step()
    torch.testing.assert_close(classifier.model_.net.weight, net.weight, rtol=1e-5, atol=1e-6)
    assert classifier.classes_.tolist() == NAMES.tolist()
    assert classifier.predict_proba(X[:1]).shape == (1, 3)
    assert len(classifier.history_) == classifier.n_iter_ == 4


@pytest.mark.parametrize("kind", [str, int, float, object])
def test_classifier_partial_fit_numbers_the_labels_as_fit_does(kind):
    labels = np.arange(12).astype(str if kind is object else kind).astype(kind)  # "10" before "2"
    y = np.tile(labels, 10)
    X = np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32)
    fitted = Classifier(network, epochs=2, **CPU).fit(X, y)
    partial = Classifier(network, validation=(X, y), **CPU)
    partial.partial_fit(X, y, labels).partial_fit(X[::-1][::-1], list(y))
    assert partial.classes_.tolist() == fitted.classes_.tolist()
    assert_same_weights(partial.model_, fitted.model_)
    val_loss = partial.model_.evaluate((X, torch.from_numpy(np.unique(y, return_inverse=True)[1])))
    assert partial.history_["val_loss"].iloc[-1] == pytest.approx(val_loss["val_loss"])


def test_regressor_partial_fit_takes_the_steps_of_a_bare_loop():
    X, _ = rows(90)
    y = X[:, 0] - X[:, 1]
    weight = np.linspace(0.5, 2, 90)
    net = nn.Linear(4, 1)
    regressor = Regressor(
        lambda n_features, n_outputs: copy.deepcopy(net), batch_size=90, lr=0.05, **CPU
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    given = [None, weight, None]  # in some calls there are weights
    for weights, chunk in zip(given, (slice(0, 30), slice(30, 70), slice(70, 90)), strict=True):
        chosen = None if weights is None else weights[chunk]
        regressor.partial_fit(X[chunk], y[chunk], sample_weight=chosen)
        errors = (net(torch.from_numpy(X[chunk])).squeeze(1) - torch.from_numpy(y[chunk])) ** 2
        if chosen is not None:
            errors = errors * torch.from_numpy(chosen)
        optimizer.zero_grad()
        errors.mean().backward()
        optimizer.step()
    torch.testing.assert_close(regressor.model_.net.weight, net.weight, rtol=1e-5, atol=1e-6)
    assert regressor.n_iter_ == 3


def test_estimator_partial_fit_continues_a_fit_and_fit_starts_again():
    X, y = rows()
    classifier = Classifier(network, epochs=2, **CPU).fit(X, y).partial_fit(X, y)
    assert_same_fit(classifier, written_out((X, numbers_of(y)), epochs=3))
    classifier.fit(X, y)
    assert_same_fit(classifier, written_out((X, numbers_of(y)), epochs=2))


def test_estimator_partial_fit_leaves_the_global_random_states_alone():
    X, y = rows()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    classifier = Classifier(network, **CPU)
    for _ in range(2):
        classifier.partial_fit(X, y, NAMES)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_estimator_partial_fit_keeps_its_callbacks_over_the_calls():
    X, y = rows()
    callbacks = [Count(99), lambda model: LRScheduler(StepLR(model.optimizer, 2, gamma=0.5))]
    classifier = Classifier(network, callbacks=callbacks, **CPU)
    for _ in range(5):
        classifier.partial_fit(X, y, NAMES)
    assert classifier.callbacks_["count"].epochs == 5
    assert classifier.history_["lr"].tolist() == [0.01, 0.01, 0.005, 0.005, 0.0025]


def first_call(**arguments):
    return Classifier(network, **arguments, **CPU)


def later_call(**arguments):
    return first_call(**arguments).partial_fit(*rows(), NAMES)


PARTIAL_MISTAKES = {
    "no classes": (
        lambda X, y: first_call().partial_fit(X, y),
        "classes must be passed on the first call to partial_fit, since its rows may not have all "
        "labels. Pass partial_fit(X, y, classes=numpy.unique(all_labels)).",
    ),
    "other classes": (
        lambda X, y: later_call().partial_fit(X, y, [*NAMES, "rose"]),
        "classes are rose, setosa, versicolor, virginica, and the network was created for setosa, "
        "versicolor, virginica. Leave classes out, or start with a new estimator: "
        "sklearn.base.clone(estimator).",
    ),
    "a number of classes": (
        lambda X, y: first_call().partial_fit(X, y, 3),
        "`classes` must be a list of all labels, got int. Pass such as "
        "classes=numpy.unique(all_labels).",
    ),
    "one class": (
        lambda X, y: first_call().partial_fit(X, y, ["rose"]),
        "classes has one class, rose; expected two or more to tell apart. Pass the labels of all "
        "rows to come.",
    ),
    "a label that is in none": (
        lambda X, y: first_call().partial_fit(X, y, NAMES[:2]),
        "y has the label 'virginica', which is none of the classes: expected 'setosa', "
        "'versicolor'. Leave its rows out, or train with all classes: fit with rows of each, or "
        "name them in classes of the first partial_fit.",
    ),
    "a share for validation": (
        lambda X, y: first_call(validation=0.1).partial_fit(X, y, NAMES),
        "partial_fit trains on all rows that it is given, and validation=0.1 keeps a share of them "
        "out: in another call they might be trained on. Pass validation data, "
        "validation=(X_val, y_val), or validation=None.",
    ),
    "early stopping": (
        lambda X, y: first_call(callbacks=[EarlyStopping("loss")]).partial_fit(X, y, NAMES),
        "partial_fit trains for one epoch, and EarlyStopping under 'earlystopping' in `callbacks` "
        "compares the epochs of a fit. Leave it out, "
        "set_params(callbacks__earlystopping=None), or call fit.",
    ),
    "the best weights": (
        lambda X, y: first_call(
            callbacks=[("best", ModelCheckpoint("w.pt", "loss", save_best_only=True))]
        ).partial_fit(X, y, NAMES),
        "partial_fit trains for one epoch, and ModelCheckpoint under 'best' in `callbacks` "
        "compares the epochs of a fit. Leave it out, set_params(callbacks__best=None), or call "
        "fit.",
    ),
    "targets of another shape": (
        lambda X, y: Regressor(epochs=1, **CPU).partial_fit(X, X[:, 0]).partial_fit(X, X[:, :1]),
        "y has the shape (100, 1); expected (100,), as in training. Reshape it.",
    ),
}


@pytest.mark.parametrize("mistake", PARTIAL_MISTAKES)
def test_estimator_partial_fit_refuses_what_cannot_be(mistake):
    call, message = PARTIAL_MISTAKES[mistake]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call(*rows())
    assert str(caught.value) == message


def test_estimator_partial_fit_after_a_refused_call_is_as_if_it_had_not_been():
    X, y = rows()
    classifier = Classifier(network, epochs=2, callbacks=[EarlyStopping("loss", patience=9)], **CPU)
    classifier.fit(X, y)
    with pytest.raises(ValueError, match="partial_fit trains for one epoch"):
        classifier.partial_fit(X, y)
    with pytest.raises(ValueError, match="y has the label 'rose'"):
        classifier.partial_fit(X, np.where(y == "setosa", "rose", y))
    assert_same_fit(classifier, written_out((X, numbers_of(y)), epochs=2))
    first = Classifier(network, callbacks=[("stop", EarlyStopping("loss"))], **CPU)
    with pytest.raises(ValueError, match=r"set_params\(callbacks__stop=None\)"):
        first.partial_fit(X, y, NAMES)
    first.set_params(callbacks__stop=None).partial_fit(X, y, NAMES)
    assert_same_fit(first, written_out((X, numbers_of(y)), epochs=1))


# --- losses that are trained ----------------------------------------------------------------------


class Scaled(nn.Module):
    """Cross entropy of scores that are multiplied by a scale that is learned."""

    def __init__(self, scale=2.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, y_pred, y_true):
        return nn.functional.cross_entropy(self.scale * y_pred, y_true)


@pytest.mark.parametrize(
    ("loss_func", "scale"),
    [
        (Scaled(3.0), 3.0),
        (Scaled, 2.0),
        (functools.partial(Scaled, scale=4.0), 4.0),
        (lambda: Scaled(5.0), 5.0),
    ],
    ids=["instance", "class", "partial", "function"],
)
def test_estimator_trains_the_parameters_of_its_loss_from_the_start_in_each_fit(loss_func, scale):
    X, y = rows()
    loss = Scaled(scale)
    expected = written_out((X, numbers_of(y)), loss_func=loss)
    assert loss.scale.item() != scale
    classifier = Classifier(network, loss_func, epochs=4, **CPU)
    for estimator in (classifier, classifier, clone(classifier)):
        estimator.fit(X, y)
        assert_same_fit(estimator, expected)
        assert torch.equal(estimator.loss_func_.scale, loss.scale)
    if isinstance(loss_func, nn.Module):
        assert loss_func.scale.item() == scale
        assert loss_func.scale.grad is None
    partial = Classifier(network, loss_func, **CPU)
    for _ in range(4):
        partial.partial_fit(X, y, NAMES)
    assert torch.equal(partial.loss_func_.scale, loss.scale)


class NeedsClasses(nn.Module):
    def __init__(self, n_classes):
        super().__init__()


@pytest.mark.parametrize(
    ("loss_func", "message"),
    [
        (
            NeedsClasses,
            "loss_func NeedsClasses is called without arguments to create the loss of each fit, "
            "and cannot be: missing a required argument: 'n_classes'. Pass "
            "functools.partial(NeedsClasses, ...) with its arguments.",
        ),
        (
            lambda: 3,
            "loss_func must be a function or module of (y_pred, y_true), or create one when called "
            "without arguments, got int from <lambda>. Let it return one.",
        ),
    ],
)
def test_estimator_refuses_a_factory_that_creates_no_loss(loss_func, message):
    with pytest.raises(TypeError) as caught:
        Classifier(network, loss_func, **CPU).fit(*rows())
    assert str(caught.value) == message


# --- the whole of it, under scikit-learn's checks -------------------------------------------------


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_estimator_with_validation_and_callbacks_passes_the_checks_of_scikit_learn():
    regressor = Regressor(epochs=3, validation=0.2, callbacks=[stop(), EMA(0.5)], **CPU)
    failed = set()
    for result in check_estimator(regressor, on_fail=None):
        if result["status"] == "failed":
            failed.add(result["check_name"])
    rounding = {"check_methods_subset_invariance", "check_methods_sample_order_invariance"}
    assert failed - rounding == {
        # other rows are kept for validation if a row is there twice
        "check_sample_weight_equivalence_on_dense_data",
        # partial_fit refuses a share of its rows for validation
        "check_estimators_partial_fit_n_features",
        "check_fit_score_takes_y",
        "check_n_features_in_after_fitting",
    }


def test_estimator_calls_a_callback_that_is_no_list():
    seen = []
    lone = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch))
    Regressor(epochs=2, callbacks=lone, **CPU).fit(*[rows()[0]] * 2)
    assert seen == [1, 2]
