"""jit=True: the numbers of eager from one graph; what cannot be traced falls back and warns."""

import copy
import io
import logging
import shutil
import warnings

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from helpers.compare import assert_same_weights
from helpers.compiling import FAST
from helpers.models import Net, accuracy, points
from helpers.reference import accuracy64, reference_fit
from sklearn.metrics import accuracy_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import minikeras
from minikeras import LambdaCallback
from minikeras.jit.graphs import (
    CUDA_GRAPH,
    CompileError,
    Graphs,
    add_to_options,
    chosen,
    without_notes_on_operations,
)

PATHS = {"jit": {"jit": FAST}, "jit of 3 steps": {"jit": FAST, "steps_per_execution": 3}}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def batches(*rows):
    return [points(n) for n in rows or (20, 20, 20, 20, 20, 20, 20, 7)]


def compiled(model, loss_func=None, optimizer=None, metrics_dict=None, **kwargs):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.01)
    model.compile(
        loss_func or nn.BCELoss(),
        optimizer,
        metrics_dict or {"accuracy": accuracy},
        "cpu",
        **kwargs,
    )
    return model


def pair(kind=Net, **kwargs):
    """The same model twice: in eager, and as jit has it."""
    torch.manual_seed(1)
    model = kind()
    return model, copy.deepcopy(model)


def way(model):
    return model._run.engine.train.way


@pytest.fixture(autouse=True)
def compile_all_at_once(monkeypatch):
    """Compile each graph at its first batch: the tests look at the numbers of all of them."""
    monkeypatch.setattr("minikeras.jit.steps.BATCHES_BEFORE_A_GRAPH", 0)


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "path"),
    list(zip(OPTIMIZERS.values(), [*PATHS.values()] * 3, strict=True)),
    ids=OPTIMIZERS,
)
def test_jit_history_and_weights_equal_eager(make, path):
    model, twin = pair()
    compiled(model, optimizer=make(model.parameters()))
    compiled(twin, optimizer=make(twin.parameters()), **path)
    expected = model.fit(4, batches(), batches(30, 11), verbose=0)
    found = twin.fit(2, batches(), batches(30, 11), verbose=0)
    found = twin.fit(2, batches(), batches(30, 11), verbose=0)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    assert_same_weights(model, twin, 1e-5)
    assert way(twin) == "one graph"


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    ("rows", "batch_size", "drop_last"), [(70, 8, False), (41, 8, True), (9, 7, False)]
)
def test_jit_history_equals_a_bare_loop_in_float64(rows, batch_size, drop_last, path):
    X, y = (tensor.double() for tensor in points(rows))
    model = Net().double()
    bare = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled(model, nn.MSELoss(), optimizer, {"accuracy": accuracy64}, **path)
    found = model.fit(
        3, DataLoader(TensorDataset(X, y), batch_size, drop_last=drop_last), (X, y), verbose=0
    )
    expected = reference_fit(bare, X, y, 3, batch_size, drop_last, lr=0.1)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-10)


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)
def test_jit_code_of_the_compiler_gives_the_numbers_of_eager():
    model, twin = pair()
    compiled(model)
    compiled(twin, jit=True, steps_per_execution=2)
    expected, found = (
        net.fit(3, batches(20, 20, 20, 20), batches(20), verbose=0) for net in (model, twin)
    )
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    assert twin.evaluate(batches(20)) == pytest.approx(model.evaluate(batches(20)), rel=1e-5)
    torch.testing.assert_close(twin.predict(points(20)[0]), model.predict(points(20)[0]))
    assert twin._run.engine.forwards["whole"].has_worked


def test_jit_penalty_on_the_parameters_keeps_its_gradient():
    model, twin = pair()
    for net, jit in ((model, False), (twin, FAST)):

        def loss_func(y_pred, y_true, net=net):
            return F.binary_cross_entropy(y_pred, y_true) + minikeras.l2_penalty(net, 1.0)

        compiled(net, loss_func, jit=jit).fit(3, batches(), verbose=0)
    assert_same_weights(model, twin)


def test_jit_batch_norm_frozen_and_unused_parameters_are_as_in_eager():
    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.unused = nn.Linear(3, 3)
            self.fc1.bias.requires_grad_(False)

        def forward(self, x):
            return super().forward(self.norm(x))

    model, twin = pair(Odd)
    compiled(model).fit(2, batches(), verbose=0)
    compiled(twin, jit=FAST).fit(2, batches(), verbose=0)
    assert_same_weights(model, twin)
    assert twin.norm.num_batches_tracked == 16


def test_jit_graph_takes_sample_weights_several_inputs_and_averages():
    class Two(Net):
        def forward(self, a, b):
            return super().forward(torch.cat([a, b], 1))

    def per_row(y_pred, y_true):
        return F.binary_cross_entropy(y_pred, y_true, reduction="none")

    def found(y_pred, y_true):
        return minikeras.Average(((y_pred > 0.5) & (y_true > 0.5)).sum(), (y_true > 0.5).sum())

    data = [({"b": X[:, 1:], "a": X[:, :1]}, y, torch.rand(len(X))) for X, y in batches()]
    model, twin = pair(Two)
    compiled(model, per_row, metrics_dict={"recall": found})
    compiled(twin, per_row, metrics_dict={"recall": found}, jit=FAST, steps_per_execution=2)
    pd.testing.assert_frame_equal(
        twin.fit(2, data, data, verbose=0), model.fit(2, data, data, verbose=0), rtol=1e-5
    )
    assert_same_weights(model, twin)
    assert way(twin) == "one graph"


def test_jit_graph_steps_several_optimizers():
    model, twin = pair()
    for net, jit in ((model, False), (twin, FAST)):
        optimizers = {
            name: torch.optim.SGD(getattr(net, name).parameters(), lr=0.1)
            for name in ("fc1", "fc2")
        }
        compiled(net, optimizer=optimizers, jit=jit).fit(2, batches(), verbose=0)
    assert_same_weights(model, twin)
    assert way(twin) == "one graph"


def test_jit_callbacks_see_every_so_many_steps():
    seen = []
    model = compiled(Net(), jit=FAST, steps_per_execution=3)
    model.fit(
        1,
        batches(),
        callbacks=[LambdaCallback(on_batch_end=lambda batch, logs: seen.append(batch))],
        verbose=0,
    )
    assert seen == [1, 4, 7, 8]  # the first by itself, and what is left at the end


# --- what may change between steps ----------------------------------------------------------------


def test_jit_follows_schedulers_and_rates_set_by_hand_without_compiling_again():
    def train(one, **kwargs):
        compiled(one, optimizer=torch.optim.SGD(one.parameters(), lr=0.5), **kwargs)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(one.optimizer, 0.9)
        step = LambdaCallback(on_batch_end=lambda batch, logs: scheduler.step())
        return one.fit(5, batches(), callbacks=[step], verbose=0)

    model, twin = pair()
    expected = train(model)
    found = train(twin, jit=FAST)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    assert isinstance(twin.optimizer.param_groups[0]["lr"], float)
    assert way(twin) == "one graph"


def test_jit_follows_a_learning_rate_in_a_tensor():
    def set_rate(one, epoch):
        group = one.optimizer.param_groups[0]
        if epoch == 2:
            group["lr"] = torch.tensor(0.02)
        if epoch > 2:
            group["lr"].mul_(0.1)

    model, twin = pair()
    for net, jit in ((model, False), (twin, FAST)):
        compiled(net, optimizer=torch.optim.SGD(net.parameters(), lr=0.5), jit=jit)
        change = LambdaCallback(on_epoch_begin=lambda epoch, net=net: set_rate(net, epoch))
        net.fit(4, batches(), callbacks=[change], verbose=0)
    assert_same_weights(model, twin)
    assert way(twin) == "one graph"


def test_jit_follows_another_setting_of_the_optimizer_outside_the_graph_and_warns_once():
    def train(one, **kwargs):
        compiled(one, optimizer=torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9), **kwargs)

        def less(batch, logs):
            one.optimizer.param_groups[0]["momentum"] *= 0.95

        return one.fit(2, batches(), callbacks=[LambdaCallback(on_batch_end=less)], verbose=0)

    model, twin = pair()
    expected = train(model)
    with pytest.warns(
        UserWarning, match="a setting of the optimizer other than lr has changed"
    ) as caught:
        found = train(twin, jit=FAST)
    assert len(caught) == 1
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    assert_same_weights(model, twin)


def test_jit_batches_of_many_sizes_take_two_graphs():
    model = compiled(Net(), jit=FAST)
    model.fit(1, batches(*range(20, 40)), verbose=0)
    assert set(model._run.engine.train.graphs.compiled) == {True, False}
    assert way(model) == "one graph"


def test_jit_compiles_the_graphs_of_short_batches_and_of_validation_once_they_pay(monkeypatch):
    monkeypatch.setattr("minikeras.jit.steps.BATCHES_BEFORE_A_GRAPH", 2)
    model, twin = pair()
    found = []

    def look(epoch, logs):
        engine = twin._run.engine
        found.append((set(engine.train.graphs.compiled), set(engine.evaluate.graphs.compiled)))

    compiled(model)
    compiled(twin, jit=FAST)
    data = batches(20, 20, 7), batches(20, 20, 7)
    expected = model.fit(3, *data, verbose=0)
    seen = twin.fit(3, *data, callbacks=[LambdaCallback(on_epoch_end=look)], verbose=0)
    # the first batch of a fit runs in eager mode to be checked, and is not counted
    assert found == [
        ({False}, set()),
        ({False}, {False}),
        ({False, True}, {False, True}),
    ]
    pd.testing.assert_frame_equal(seen, expected, rtol=1e-5)
    assert_same_weights(model, twin, 1e-5)


def test_jit_of_several_steps_together_compiles_what_is_left_over_at_once(monkeypatch):
    monkeypatch.setattr("minikeras.jit.steps.BATCHES_BEFORE_A_GRAPH", 4)
    model, twin = pair()
    compiled(model)
    compiled(twin, jit=FAST, steps_per_execution=3)
    data = batches(*[20] * 6)
    pd.testing.assert_frame_equal(
        twin.fit(3, data, verbose=0), model.fit(3, data, verbose=0), rtol=1e-5
    )
    train = twin._run.engine.train
    # of 5 batches after the first, 2 are left over; later epochs have no first batch, and none
    assert set(train.graphs.compiled) == {False, True}
    assert train.without_graph[True] == 0
    assert_same_weights(model, twin, 1e-5)


def test_jit_short_batch_in_eager_after_a_nan_in_the_graph_moves_no_weight(monkeypatch):
    monkeypatch.setattr("minikeras.jit.steps.BATCHES_BEFORE_A_GRAPH", 9)
    model = Net()
    compiled(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), jit=FAST)
    data = batches(20, 20, 20, 7)
    data[2][0][3] = float("nan")
    with pytest.raises(FloatingPointError, match="in epoch 1, batch 3"):
        model.fit(1, data, verbose=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_jit_of_ten_models_in_one_process_shares_no_limit():
    for _ in range(10):
        model = compiled(Net(), jit=FAST)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.fit(1, batches(20, 20, 20), verbose=0)
        assert way(model) == "one graph"


def test_jit_trains_a_layer_thawed_between_fits():
    model, twin = pair()
    for net, jit in ((model, False), (twin, FAST)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net.fc1.requires_grad_(False)
        compiled(net, optimizer=optimizer, jit=jit).fit(1, batches(), verbose=0)
        net.fc1.requires_grad_(True)
        net.fit(1, batches(), verbose=0)
    assert_same_weights(model, twin)


def thaw(model):
    model.fc1.requires_grad_(True)


def freeze(model):
    model.fc2.bias.requires_grad_(False)


def add_group(model):
    thaw(model)
    model.optimizer.add_param_group({"params": model.late, "lr": 0.03})


def forget(model):
    model.optimizer.state.clear()


def load(model):
    model.optimizer.load_state_dict(copy.deepcopy(model.kept))


def take_another_way(model):
    model.long_way = not model.long_way


class Detour(Net):
    """fc3 is passed where Python says so; fc1 is frozen at first."""

    def __init__(self):
        super().__init__()
        self.fc3 = nn.Linear(2, 2)
        self.long_way = False
        self.fc1.requires_grad_(False)

    def forward(self, x):
        return super().forward(self.fc3(x) if self.long_way else x)


@pytest.mark.parametrize(
    ("change", "moment", "path", "kind"),
    [
        (thaw, "epoch", "jit", "SGD"),
        (thaw, "batch", "jit of 3 steps", "Adam"),
        (freeze, "epoch", "jit of 3 steps", "SGD"),
        (freeze, "batch", "jit", "Adam"),
        (add_group, "epoch", "jit", "Adam"),
        (add_group, "batch", "jit of 3 steps", "SGD"),
        (forget, "epoch", "jit", "SGD"),
        (forget, "batch", "jit of 3 steps", "Adam"),
        (load, "epoch", "jit of 3 steps", "Adam"),
        (load, "batch", "jit", "SGD"),
        (take_another_way, "epoch", "jit", "Adam"),
        (take_another_way, "batch", "jit", "RMSprop"),
    ],
)
def test_jit_graph_follows_what_a_callback_does_to_parameters_and_optimizers(
    change, moment, path, kind
):
    model, twin = pair(Detour)
    for net, kwargs in ((model, {}), (twin, PATHS[path])):
        late = list(net.fc1.parameters()) if change is add_group else []
        early = [
            parameter
            for parameter in net.parameters()
            if not any(parameter is other for other in late)
        ]
        compiled(net, optimizer=OPTIMIZERS[kind](early), **kwargs)
        vars(net).update(late=late, kept=copy.deepcopy(net.optimizer.state_dict()))

        def at(number, logs=None, net=net):
            if number == {"epoch": 2, "batch": 4}[moment]:
                change(net)

        changing = LambdaCallback(**{f"on_{moment}_{'begin' if moment == 'epoch' else 'end'}": at})
        net.fit(3 if moment == "epoch" else 1, batches(), callbacks=[changing], verbose=0)
    assert_same_weights(model, twin, 1e-5)
    torch.testing.assert_close(
        twin.optimizer.state_dict(), model.optimizer.state_dict(), rtol=1e-4, atol=1e-5
    )
    assert way(twin) == "one graph"


@pytest.mark.parametrize("change", [thaw, take_another_way])
def test_jit_graph_follows_a_change_right_after_a_batch_in_eager_mode(change):
    model, twin = pair(Detour)
    for net, jit in ((model, False), (twin, FAST)):
        compiled(net, optimizer=OPTIMIZERS["SGD"](net.parameters()), jit=jit)

        def at_1(number, logs, net=net):
            if number == 1:
                change(net)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net.fit(1, batches(), callbacks=[LambdaCallback(on_batch_end=at_1)], verbose=0)
    assert_same_weights(model, twin, 1e-5)
    assert way(twin) == "one graph"


def test_jit_leaves_a_state_that_is_cleared_each_epoch_in_eager_and_warns_once(monkeypatch):
    def train(one, **kwargs):
        compiled(one, optimizer=OPTIMIZERS["SGD"](one.parameters()), **kwargs)
        clear = LambdaCallback(on_epoch_begin=lambda epoch: forget(one))
        one.fit(6, batches(20, 20, 20), callbacks=[clear], verbose=0)

    monkeypatch.setattr("minikeras.jit.steps.RENEWALS", 3)
    model, twin = pair()
    train(model)
    with pytest.warns(UserWarning, match="jit") as caught:
        train(twin, jit=FAST)
    assert [str(warning.message) for warning in caught] == [
        "jit: train_step is not one graph: forward and loss, because the parameters that the loss "
        "uses, or the optimizer's state, keep changing"
    ]
    assert_same_weights(model, twin)


class Annealed(nn.BCELoss):
    """A loss with a Python number that a callback lowers."""

    share = 1.0

    def forward(self, y_pred, y_true):
        return super().forward(y_pred, y_true) + self.share * y_pred.mean()


def test_jit_leaves_a_loss_whose_number_changes_each_epoch_in_eager_and_warns():
    def train(one, **kwargs):
        loss_func = Annealed()
        lower = LambdaCallback(on_epoch_begin=lambda epoch: setattr(loss_func, "share", 1 / epoch))
        compiled(one, loss_func, **kwargs)
        return one.fit(10, batches(20, 20, 20), batches(20, 20), callbacks=[lower], verbose=0)

    model, twin = pair()
    expected = train(model)
    with pytest.warns(UserWarning, match="jit") as caught:
        found = train(twin, jit=FAST)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    assert_same_weights(model, twin, 1e-5)
    assert [str(warning.message) for warning in caught] == [
        f"jit: {step} is not one graph: {way}, because a Python value that is part of it, in the "
        "model, the loss, a metric or the data, has changed too often. Store it in a tensor to "
        "keep one graph"
        for step, way in (("train_step", "forward and loss"), ("evaluate_step", "eager"))
    ]


class Counting(torch.optim.Optimizer):
    """Counts its steps in Python: in its groups, or for each parameter."""

    def __init__(self, parameters, per_parameter):
        super().__init__(parameters, {"lr": 0.1, "count": 0})
        self.per_parameter = per_parameter

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += not self.per_parameter
            for parameter in group["params"]:
                counted = self.state[parameter] if self.per_parameter else group
                counted["count"] = counted.get("count", 0) + self.per_parameter
                parameter.sub_(parameter.grad * group["lr"] / counted["count"] ** 0.5)


@pytest.mark.parametrize("per_parameter", [False, True])
def test_jit_leaves_an_optimizer_that_counts_in_python_outside_the_graph_and_warns(per_parameter):
    model, twin = pair()
    compiled(model, optimizer=Counting(model.parameters(), per_parameter)).fit(
        2, batches(), verbose=0
    )
    compiled(twin, optimizer=Counting(twin.parameters(), per_parameter), jit=FAST)
    with pytest.warns(UserWarning, match="jit") as caught:
        twin.fit(2, batches(), verbose=0)
    assert [str(warning.message) for warning in caught] == [
        "jit: train_step is not one graph: forward and loss, because a step of the optimizer "
        "changes a Python number, 'count'. If it were a tensor, it would be in the graph"
    ]
    assert_same_weights(model, twin, 1e-5)
    assert twin.optimizer.state_dict() == model.optimizer.state_dict()


class Unrated(torch.optim.Optimizer):
    """Has no learning rate, or none yet."""

    def __init__(self, parameters, **settings):
        super().__init__(parameters, {"size": 0.1, **settings})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["size"] * parameter.grad)


@pytest.mark.parametrize("settings", [{}, {"lr": None}])
def test_jit_takes_an_optimizer_without_a_learning_rate(settings):
    model, twin = pair()
    expected = compiled(model, optimizer=Unrated(model.parameters(), **settings)).fit(
        2, batches(), verbose=0
    )
    found = compiled(twin, optimizer=Unrated(twin.parameters(), **settings), jit=FAST).fit(
        2, batches(), verbose=0
    )
    assert list(expected) == ["loss", "accuracy"]
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    assert_same_weights(model, twin)
    assert way(twin) == "one graph"


# --- what the user's own objects look like --------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_jit_state_dicts_are_those_without_jit(make):
    model, twin = pair()
    states = []
    keep = LambdaCallback(
        on_batch_end=lambda batch, logs: states.append(copy.deepcopy(twin.optimizer.state_dict()))
    )
    compiled(model, optimizer=make(model.parameters())).fit(1, batches(), verbose=0)
    compiled(twin, optimizer=make(twin.parameters()), jit=FAST).fit(
        1, batches(), callbacks=[keep], verbose=0
    )
    expected = model.optimizer.state_dict()
    for state in (states[-1], twin.optimizer.state_dict()):
        assert state["param_groups"] == expected["param_groups"]
        for key, values in expected["state"].items():
            for name, value in values.items():
                torch.testing.assert_close(state["state"][key][name], value, rtol=1e-5, atol=1e-6)
    assert [step["state"][0]["step"].item() for step in states if "step" in step["state"][0]][
        :3
    ] in ([1, 2, 3], [])
    assert list(twin.state_dict()) == list(model.state_dict())
    assert all(parameter.grad is None for parameter in twin.parameters())
    compiled(twin, optimizer=twin.optimizer)
    compiled(model, optimizer=model.optimizer)
    model.fit(1, batches(), verbose=0)
    twin.fit(1, batches(), verbose=0)
    assert_same_weights(model, twin, 1e-5)


def test_jit_model_copied_by_deepcopy_is_not_compiled():
    model = compiled(Net(), jit=FAST)
    model.fit(1, batches(20, 20, 20), verbose=0)
    twin = copy.deepcopy(model)
    with pytest.raises(minikeras.NotCompiledError):
        twin.evaluate(batches())
    torch.testing.assert_close(twin.predict(points(20)[0]), model.predict(points(20)[0]))


# --- the ways down --------------------------------------------------------------------------------


def sklearn_accuracy(y_pred, y_true):
    return float(accuracy_score(y_true.numpy(), y_pred.numpy() > 0.5))


def branching(y_pred, y_true):
    """A loss whose flow depends on the data."""
    loss = F.binary_cross_entropy(y_pred, y_true)
    return loss * 2 if loss.item() > 0.6 else loss


def test_jit_runs_a_metric_that_leaves_torch_outside_the_one_graph():
    model, twin = pair()
    metrics = {"accuracy": sklearn_accuracy}
    expected = compiled(model, metrics_dict=metrics).fit(2, batches(), batches(), verbose=0)
    with pytest.warns(
        UserWarning, match="_step is not one graph: metrics outside, because in "
    ) as caught:
        found = compiled(twin, metrics_dict=metrics, jit=FAST).fit(
            2, batches(), batches(), verbose=0
        )
    assert [str(warning.message).split()[1] for warning in caught] == [
        "train_step",
        "evaluate_step",
    ]
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    assert way(twin) == "metrics outside"


def test_jit_updates_a_metric_object_outside_the_graph():
    model, twin = pair()
    metrics = {"f1": torchmetrics.classification.BinaryF1Score(), "accuracy": accuracy}
    expected = compiled(model, metrics_dict=metrics).fit(2, batches(), batches(), verbose=0)
    found = compiled(twin, metrics_dict=metrics, jit=FAST, steps_per_execution=2).fit(
        2, batches(), batches(), verbose=0
    )
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    assert way(twin) == "one graph"


def test_jit_falls_back_by_parts_for_a_loss_whose_flow_depends_on_the_data_and_says_where():
    model, twin = pair()
    expected = compiled(model, branching).fit(2, batches(), verbose=0)
    with pytest.warns(UserWarning, match="forward and loss, because in branching: ") as caught:
        found = compiled(twin, branching, jit=FAST).fit(2, batches(), verbose=0)
    assert len(caught) == 1
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    assert_same_weights(model, twin)


def test_jit_trains_an_adaptive_softmax():
    def make():
        torch.manual_seed(0)
        loss_func = nn.AdaptiveLogSoftmaxWithLoss(8, 30, cutoffs=[5, 20], div_value=2)
        return minikeras.Model(nn.Linear(2, 8)), loss_func

    data = [(X, torch.randint(30, (len(X),))) for X, _ in batches()]
    results = []
    for jit in (False, FAST):
        model, loss_func = make()
        model.compile(loss_func, device="cpu", jit=jit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(model.fit(2, data, verbose=0))
    pd.testing.assert_frame_equal(*results, rtol=1e-5)


def test_jit_without_a_compiler_runs_in_eager():
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    model, twin = pair()
    expected = compiled(model).fit(2, batches(), batches(), verbose=0)
    with pytest.warns(UserWarning, match="no compiler here"):
        found = compiled(twin, jit={"backend": backend}).fit(2, batches(), batches(), verbose=0)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-6)
    assert_same_weights(model, twin)


def test_jit_failure_after_the_first_compiled_step_is_an_error_and_no_step_is_taken_twice():
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("broken graph")
            return graph(*args)

        return run

    model = compiled(Net(), jit={"backend": backend})
    with pytest.raises(RuntimeError, match="broken graph"):
        model.fit(1, batches(), verbose=0)


def test_jit_failure_in_the_first_call_leaves_no_trace():
    def backend(graph, inputs):
        def run(*args):
            graph(*args)  # the step is taken, and then something breaks
            raise RuntimeError("broken graph")

        return run

    model, twin = pair()
    compiled(model).fit(1, batches(20, 20, 20), verbose=0)
    with pytest.warns(UserWarning, match="broken graph"):
        compiled(twin, jit={"backend": backend}).fit(1, batches(20, 20, 20), verbose=0)
    assert_same_weights(model, twin)


# --- hooks and steps of one's own -----------------------------------------------------------------


def test_jit_fires_hooks_of_parameters_and_optimizers():
    seen = []
    model, twin = pair()
    compiled(model).fit(1, batches(), verbose=0)
    compiled(twin, jit=FAST)
    twin.fc1.weight.register_hook(lambda grad: seen.append("gradient"))
    twin.optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    twin.fit(1, batches(), verbose=0)
    assert seen.count("gradient") == seen.count("step") == 8
    assert_same_weights(model, twin)


def test_jit_of_a_custom_step_compiles_forward_and_loss():
    steps = []

    class Own(Net):
        def train_step(self, features, labels):
            steps.append(len(features))
            return super().train_step(features, labels)

    model, twin = pair(Own)
    expected = compiled(model).fit(2, batches(), batches(), verbose=0)
    del steps[:]
    found = compiled(twin, jit=FAST).fit(2, batches(), batches(), verbose=0)
    assert len(steps) == 16
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    assert twin._run.engine.forwards["whole"].has_worked


def test_jit_refuses_a_bad_batch_with_the_same_error_also_when_it_comes_later():
    X, y = points(20)
    model = compiled(Net(), jit=FAST)
    with pytest.raises(ValueError, match="layer fc1 takes rows of 2 values"):
        model.fit(1, [(X, y), (X[:, :1], y)], verbose=0)


def test_jit_fit_that_fails_leaves_the_optimizer_as_it_should_be():
    def stop(batch, logs):
        if batch == 3:
            raise KeyboardInterrupt

    model = compiled(Net(), jit=FAST)
    with pytest.raises(KeyboardInterrupt):
        model.fit(1, batches(), callbacks=[LambdaCallback(on_batch_end=stop)], verbose=0)
    assert model.optimizer.state_dict()["state"][0]["step"] == 3
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(model.fit(1, batches(), verbose=0)) == 1


def test_jit_shows_that_it_compiles_with_the_seconds(capsys):
    compiled(Net(), jit=FAST).fit(1, batches(20, 20, 20))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "compiling the train step ..."
    assert lines[1].startswith("compiled in ")


def test_jit_draws_the_same_batches_from_a_shuffled_loader():
    X, y = points(50)
    model, twin = pair()
    loader = DataLoader(TensorDataset(X, y), 8, shuffle=True)
    for net, jit in ((model, False), (twin, FAST)):
        torch.manual_seed(3)
        compiled(net, jit=jit).fit(2, loader, verbose=0)
    assert_same_weights(model, twin)


def test_steps_per_execution_needs_jit():
    with pytest.raises(ValueError, match="steps") as error:
        compiled(Net(), steps_per_execution=4)
    assert (
        str(error.value)
        == "steps_per_execution=4 needs jit=True, which makes a graph of the steps."
    )


@pytest.mark.parametrize(
    ("jit", "message"),
    [
        (
            "max-autotune",
            "jit must be True, False or a dict of torch.compile's arguments, got 'max-autotune'.",
        ),
        (None, "jit must be True, False or a dict of torch.compile's arguments, got None."),
        (
            {"fullgraph": True},
            "jit={'fullgraph': True}: fullgraph is set by minikeras, which makes one graph where "
            "it can and says with a warning where it cannot. Leave it out; mode, backend and "
            "options are yours.",
        ),
    ],
)
def test_jit_options_that_the_compiler_cannot_take_are_refused(jit, message):
    with pytest.raises((TypeError, ValueError)) as error:
        compiled(Net(), jit=jit)
    assert str(error.value) == message


# --- CUDA graphs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "on_cpu", "on_cuda"),
    [
        ({}, {"size_asserts": False}, {"size_asserts": False, "triton.cudagraphs": True}),
        (
            {"options": {"triton.cudagraphs": False}},
            {"size_asserts": False, "triton.cudagraphs": False},
            {"size_asserts": False, "triton.cudagraphs": False},
        ),
        ({"mode": "default"}, None, None),
        (FAST, None, None),
    ],
)
def test_jit_options_of_the_user_come_before_our_choice(options, on_cpu, on_cuda):
    with_graph = add_to_options(chosen(options), CUDA_GRAPH)
    assert chosen(options).get("options") == on_cpu
    assert with_graph.get("options") == on_cuda
    assert {key: value for key, value in with_graph.items() if key != "options"} == {
        key: value for key, value in options.items() if key != "options"
    }


def test_jit_shows_no_log_lines_of_operations_without_compiled_calls():
    handler = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("torch")
    logger.addHandler(handler)
    try:
        with without_notes_on_operations():
            logger.warning("aten.x is missing a c-shim implementation, using proxy executor")
            logger.warning("something else")
        logger.warning("another c-shim")
    finally:
        logger.removeHandler(handler)
    assert handler.stream.getvalue() == "something else\nanother c-shim\n"


def test_jit_takes_plain_calls_if_the_compiled_ones_do_not_work():
    tried = []

    class Failing(Graphs):
        def _compile(self, batches, other, options):
            tried.append(options["options"].get("cpp_wrapper", False))
            if tried[-1]:
                raise CompileError("no such operation")
            return "result"

    def function(batch):
        return batch

    graphs = Failing(function, chosen({}), lambda message: None, [], torch.device("cpu"))
    assert graphs(None, other=False) == "result"
    assert tried == [True, False]


def test_jit_leaves_out_options_that_this_torch_does_not_have():
    theirs = chosen({})
    assert add_to_options(theirs, {"no_such_option": True}) == theirs


# torch's own, as it loads its CUDA graphs
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_jit_results_are_kept_though_the_next_replay_overwrites_them():
    buffer = torch.zeros(1)

    def replay(batch):
        return {"loss": buffer.add_(1)}, None

    graphs = Graphs(replay, {"backend": "eager"}, lambda message: None, [], torch.device("cuda"))
    results = [graphs(None, other=False)[0]["loss"].item() for _ in range(3)]
    kept = [graphs(None, other=False)[0]["loss"] for _ in range(3)]
    assert results == [1, 2, 3]
    assert [value.item() for value in kept] == [4, 5, 6]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("together", [1, 3])
def test_jit_step_captured_as_a_cuda_graph_takes_the_steps_of_eager(kind, together):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model, twin = pair()
    histories = []
    for net, options in ((model, {}), (twin, {"jit": True, "steps_per_execution": together})):
        # AUROC keeps all outputs
        metrics_dict = {
            "accuracy": accuracy,
            "auroc": torchmetrics.AUROC(task="binary"),
        }
        net.to("cuda").compile(
            nn.BCELoss(), OPTIMIZERS[kind](net.parameters()), metrics_dict, **options
        )
        histories.append(net.fit(3, batches(), batches(20, 20, 7), verbose=0))
    assert way(twin) == "one graph"
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert_same_weights(model, twin, 1e-5)
    pd.testing.assert_frame_equal(*histories, rtol=1e-5)
    states = [net.optimizer.state_dict()["state"] for net in (model, twin)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)


# --- a loss that is not finite --------------------------------------------------------------------


def spoiled(batch, batches=9):
    """Batches of which one holds a NaN."""
    X, y = points(16 * batches)
    X[16 * batch - 1] = float("nan")
    return list(zip(X.split(16), y.split(16), strict=True))


@pytest.mark.parametrize("steps", [1, 3])
# of which the last alone reads its count
@pytest.mark.parametrize("kind", ["RMSprop", "Adagrad", "Adam"])
def test_jit_counts_the_steps_except_those_held_back(kind, steps):
    model = Net()
    compiled(
        model,
        nn.MSELoss(),
        OPTIMIZERS[kind](model.parameters()),
        jit=FAST,
        steps_per_execution=steps,
    )
    with pytest.raises(FloatingPointError):
        model.fit(1, spoiled(6), verbose=0)
    assert {state["step"].item() for state in model.optimizer.state.values()} == {5}


@pytest.mark.parametrize("steps", [1, 3])
def test_jit_graph_moves_no_weight_by_a_nan_loss(steps):
    model = Net()
    weights = []
    compiled(
        model,
        nn.MSELoss(),
        torch.optim.Adam(model.parameters()),
        jit=FAST,
        steps_per_execution=steps,
    )
    data = spoiled(6)
    keep = LambdaCallback(
        on_batch_end=lambda batch, logs: weights.append(copy.deepcopy(model.state_dict()))
    )
    with pytest.raises(FloatingPointError) as raised:
        model.fit(1, data, callbacks=[keep], verbose=0)
    batch, ago = (6, 0) if steps == 1 else (7, 1)  # batches 5 to 7 go together
    began = f" (it started {ago} steps before)" if ago > 0 else ""
    assert str(raised.value).startswith(
        f"the loss is nan in epoch 1, batch {batch}{began}; expected a finite number."
    )
    assert "The weights are those from before this step." in str(raised.value)
    twin = Net()
    twin.load_state_dict(weights[-1])
    if steps == 3:  # the batch before it, in the same graph, has had its step
        assert not torch.equal(twin.fc1.weight, model.fc1.weight)
    else:
        assert torch.equal(twin.fc1.weight, model.fc1.weight)
    assert model.fc1.weight.isfinite().all()


def test_jit_graph_continues_under_on_nan_ignore_and_the_next_fit_looks_again():
    model = Net()
    compiled(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), jit=FAST)
    kept = copy.deepcopy(model.state_dict())
    assert model.fit(1, spoiled(6), verbose=0, on_nan="ignore")["loss"].isna().all()
    assert model.fc1.weight.isnan().all()
    model.load_state_dict(kept)
    with pytest.raises(FloatingPointError, match="in epoch 2, batch 6"):
        model.fit(1, spoiled(6), verbose=0)
    model.load_state_dict(kept)
    with pytest.warns(UserWarning, match="in epoch 2, batch 6"):
        model.fit(1, spoiled(6), verbose=0, on_nan="stop")
