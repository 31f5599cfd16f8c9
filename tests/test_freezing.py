"""minikeras.freeze and unfreeze: what is frozen stands still, and what is unfrozen trains."""

import copy
import pickle
import re

import pytest
import torch
from helpers.compare import assert_same_weights, copy_weights
from helpers.interruptions import Stopped
from helpers.models import points
from torch import nn

import minikeras
from minikeras import LambdaCallback, freeze, unfreeze
from minikeras.checkpoint.fits import USES

X, y = points(50)  # in batches of 16 the last one is short
BATCHES = [(X[first : first + 16], y[first : first + 16]) for first in range(0, 50, 16)]


def body_and_head():
    torch.manual_seed(3)
    body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    return nn.Sequential(body, nn.BatchNorm1d(4), nn.Linear(4, 1))


def exactly(message):
    return f"^{re.escape(message)}$"


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)


def sgd(parameters):
    """Adam would turn the rounding of a gradient that is 0, as of a bias before BatchNorm, up."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def fit(net, optimizer=adam, epochs=2, model=None, data=BATCHES, fit=(), **kwargs):
    """Compile and fit; `fit` has further arguments of fit."""
    model = minikeras.Model(net) if model is None else model
    model.compile(nn.MSELoss(), optimizer(model.parameters()), device="cpu", **kwargs)
    model.fit(epochs, data, BATCHES, verbose=0, **dict(fit))
    return model


def train_by_hand(net, frozen=(), optimizer=None, epochs=2, window=1):
    """A bare loop: frozen modules have no gradient, and are in eval mode."""
    optimizer = adam(net.parameters()) if optimizer is None else optimizer
    for module in frozen:
        module.requires_grad_(False)
    for _ in range(epochs):
        net.train()
        for module in frozen:
            module.eval()
        for first in range(0, len(BATCHES), window):
            optimizer.zero_grad()
            batches = BATCHES[first : first + window]
            rows = sum(len(labels) for _, labels in batches)
            for features, labels in batches:
                loss = nn.functional.mse_loss(net(features), labels, reduction="sum")
                (loss / rows).backward()
            optimizer.step()
    return net


def assert_frozen(net, before, prefix="0."):
    """Check that weights and buffers under a name are as they were, and that others are not."""
    moved = {name for name, value in net.state_dict().items() if not value.equal(before[name])}
    assert moved
    assert not [name for name in moved if name.startswith(prefix)]


class OwnStep(minikeras.Model):
    """A custom step, and a custom train that puts every part into train mode."""

    def train(self, mode=True):
        super().train(mode)
        self.net[0].train(mode)
        return self

    def train_step(self, features, labels, sample_weight=None):
        loss = self.compute_loss(self(features), labels)
        self.backward(loss)
        self.optimizer_step()
        return {"loss": loss}


# name -> arguments of fit() here, batches per step
WAYS = {
    "plain": ({}, 1),
    "accumulate": ({"accumulate": 3}, 3),
    "jit": ({"jit": {"backend": "eager"}}, 1),
    "custom step": ({"model": OwnStep}, 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_frozen_part_stands_still_and_the_rest_trains_as_in_a_bare_loop(way):
    kwargs, window = WAYS[way]
    net, expected = body_and_head(), body_and_head()
    before = copy_weights(net)
    train_by_hand(expected, [expected[0]], window=window)
    assert freeze(net[0]) is net[0]
    if "model" in kwargs:
        kwargs = kwargs | {"model": kwargs["model"](net)}
    model = fit(net, **kwargs)
    assert_same_weights(net, expected, 1e-6)
    assert_frozen(net, before)
    assert [part.training for part in (model, net, net[0], net[0][1], net[1])] == [
        True,
        True,
        False,
        False,
        True,
    ]


BETWEEN = {
    "model.train()": lambda model: model.train(),
    "model.eval()": lambda model: model.eval(),
    "model.eval(), then model.train()": lambda model: model.eval().train(),
    "net.train()": lambda model: model.net.train(),
    "the body's train()": lambda model: model.net[0].train(),
    "evaluate": lambda model: model.evaluate((X, y)),
    "predict": lambda model: model.predict(X),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_frozen_part_stays_in_eval_mode_whatever_is_called_between_two_fits(between):
    net, expected = body_and_head(), body_and_head()
    optimizer = adam(expected.parameters())
    train_by_hand(expected, [expected[0]], optimizer, epochs=3)
    freeze(net[0])
    before = copy_weights(net)
    model = fit(net, epochs=1)
    BETWEEN[between](model)
    model.fit(2, BATCHES, verbose=0)
    assert_frozen(net, before)
    assert_same_weights(net, expected, 0)


def test_model_train_leaves_frozen_parts_in_eval_mode_outside_a_fit():
    net = body_and_head()
    model = minikeras.Model(net)
    freeze(net[0])
    assert model.eval().train() is model
    assert [net[0].training, net[0][1].training, net[1].training] == [False, False, True]
    before = copy_weights(net)
    model(X)
    assert net[0][1].running_mean.equal(before["0.1.running_mean"])
    assert not net[1].running_mean.equal(before["1.running_mean"])


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD, foreach": lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.1, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.1, fused=True),
    "Adam, foreach": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.05, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_that_has_trained_a_part_does_not_move_it_once_it_is_frozen(name):
    net, expected = body_and_head(), body_and_head()
    by_hand = OPTIMIZERS[name](expected.parameters())
    torch.manual_seed(1)
    train_by_hand(expected, [], by_hand, epochs=1)
    train_by_hand(expected, [expected[0]], by_hand)
    torch.manual_seed(1)
    model = fit(net, OPTIMIZERS[name], epochs=1)
    before = copy_weights(net)
    freeze(net[0])
    model.fit(2, BATCHES, verbose=0)
    assert_frozen(net, before)
    assert_same_weights(net, expected, 1e-6)


@pytest.mark.parametrize("jit", [False, {"backend": "eager"}], ids=["eager", "jit"])
@pytest.mark.parametrize("moment", ["epoch", "batch"])
def test_callback_freezes_and_unfreezes_in_the_middle_of_a_fit(jit, moment):
    net = body_and_head()
    net[0][2] = nn.Identity()  # with jit dropout draws other numbers
    expected = copy.deepcopy(net)
    model = minikeras.Model(net)
    count = 0
    seen = []

    def change(number, logs=None):
        nonlocal count
        count += 1
        if count == 2:
            freeze(net[0])
        if count == 4:
            unfreeze(net[0][3])

    def look(batch, logs):
        seen.append([net[0][1].training, net[0][3].training])

    callback = {"epoch": "on_epoch_begin", "batch": "on_batch_end"}[moment]
    callbacks = [LambdaCallback(**{callback: change}), LambdaCallback(on_batch_end=look)]
    fit(net, sgd, epochs=5, model=model, jit=jit, fit={"callbacks": callbacks})

    optimizer = sgd(expected.parameters())
    expected.train()
    steps = 0
    for epoch in range(1, 6):
        for features, labels in BATCHES:
            time = epoch if moment == "epoch" else steps
            if time == 2:
                expected[0].eval().requires_grad_(False)
            if time == 4:
                expected[0][3].train().requires_grad_(True)
            optimizer.zero_grad()
            nn.functional.mse_loss(expected(features), labels).backward()
            optimizer.step()
            steps += 1
    assert_same_weights(net, expected, 1e-5)
    assert seen[0] == [True, True]
    assert seen[-1] == [False, True]
    # the fit has put the modes back, and what has been unfrozen is not taken for chosen
    assert [net[0][1].training, net[0][3].training, net[1].training] == [False, True, True]


def test_unfreeze_after_model_eval_does_not_leave_the_rest_in_eval_mode():
    net, expected = body_and_head(), body_and_head()
    model = minikeras.Model(freeze(net))
    unfreeze(net[1])
    unfreeze(net[2])
    by_hand = adam(expected.parameters())
    train_by_hand(expected, [expected[0]], by_hand, epochs=1)
    fit(net, model=model, epochs=1)
    assert_same_weights(net, expected, 0)
    model.eval()  # as for predictions by hand
    unfreeze(net[0][3])
    expected[0][3].requires_grad_(True)
    for features, labels in BATCHES:
        expected.train()
        expected[0].eval()
        expected[0][3].train()
        by_hand.zero_grad()
        nn.functional.mse_loss(expected(features), labels).backward()
        by_hand.step()
    model.fit(1, BATCHES, verbose=0)
    assert_same_weights(net, expected, 0)


def test_unfreeze_is_the_reverse_of_freeze():
    net, expected = body_and_head(), body_and_head()
    torch.manual_seed(1)
    train_by_hand(expected)
    assert unfreeze(freeze(freeze(net))) is net
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(module.training for module in net.modules())
    net[1].eval()  # the user's own choice still counts
    modes = minikeras.modes.TrainingModes(minikeras.Model(net))
    modes.enter()
    assert modes.in_eval == ["net.1"]
    net[1].train()
    torch.manual_seed(1)
    assert_same_weights(fit(net).net, expected, 0)


def test_freeze_of_a_model_and_unfreeze_of_its_head_trains_the_head(capsys):
    net = body_and_head()
    before = copy_weights(net)
    model = freeze(minikeras.Model(net))
    unfreeze(net[2])
    fit(net, model=model)
    moved = [name for name, value in net.state_dict().items() if not value.equal(before[name])]
    assert moved == ["2.weight", "2.bias"]
    model.fit(1, BATCHES, verbose=2)
    assert "frozen: net.0, net.1\n" in capsys.readouterr().out


def test_frozen_parts_and_those_in_eval_mode_are_printed_in_lines_of_their_own(capsys):
    net = body_and_head()
    freeze(net[0])
    net[1].eval()
    model = minikeras.Model(net)
    model.compile(nn.MSELoss(), device="cpu")
    model.fit(1, BATCHES, verbose=2)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["frozen: net.0", "in eval mode, as you left them: net.1"]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copy_of_a_model_with_a_frozen_part_has_it_frozen(duplicate):
    net = body_and_head()
    freeze(net[0])
    model = duplicate(minikeras.Model(net))
    assert model.state_dict().keys() == minikeras.Model(body_and_head()).state_dict().keys()
    model.train()
    assert not model.net[0][1].training
    before = copy_weights(model.net)
    fit(model.net, model=model)
    assert_frozen(model.net, before)
    unfreeze(model.net[0])
    assert not net[0][1].training


def test_unfreeze_leaves_integer_parameters_and_takes_lazy_ones():
    net = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    codes = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    net.register_parameter("codes", codes)
    freeze(net)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    unfreeze(net)
    net(X)
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert trained == ["0.weight", "0.bias", "1.weight", "1.bias"]


class Two(minikeras.Model):
    """Two networks with an optimizer each."""

    def __init__(self):
        super().__init__()
        self.g = body_and_head()
        self.d = body_and_head()

    def forward(self, x):
        return self.g(x) + self.d(x)

    def train_step(self, features, labels, sample_weight=None):
        loss = self.compute_loss(self(features), labels)
        self.backward(loss)
        self.optimizer_step("g")
        self.optimizer_step("d")
        return {"loss": loss}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_frozen_network_of_two_with_an_optimizer_each_stands_still(accumulate):
    model, expected = Two(), Two()
    model.compile(
        nn.MSELoss(),
        {"g": sgd(model.g.parameters()), "d": sgd(model.d.parameters())},
        device="cpu",
        accumulate=accumulate,
    )
    torch.manual_seed(1)
    model.fit(1, BATCHES, verbose=0)
    expected.load_state_dict(model.state_dict())
    by_hand = sgd(expected.g.parameters())
    by_hand.load_state_dict(copy.deepcopy(model.optimizer["g"].state_dict()))
    before = copy_weights(model.d)
    freeze(model.d)
    torch.manual_seed(2)
    model.fit(2, BATCHES, verbose=0)
    assert all(value.equal(before[name]) for name, value in model.d.state_dict().items())
    torch.manual_seed(2)
    train_by_hand(expected, [expected.d], by_hand, window=accumulate)
    assert_same_weights(model, expected, 1e-6)


def test_freeze_between_the_batches_of_one_step_drops_what_has_been_accumulated():
    net = body_and_head()
    before = copy_weights(net)

    def change(batch, logs):
        if batch == 1:
            freeze(net[0])
            assert all(parameter.grad is None for parameter in net[0].parameters())

    callbacks = [LambdaCallback(on_batch_end=change)]
    fit(net, epochs=1, accumulate=2, fit={"callbacks": callbacks})
    weights = [name for name, _ in net.named_parameters() if name.startswith("0.")]
    assert all(net.state_dict()[name].equal(before[name]) for name in weights)


# --- with a checkpoint ----------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 1])
@pytest.mark.parametrize("stop_in", [(2, 2), (4, 1)], ids=["frozen", "unfrozen"])
def test_fit_that_freezes_resumes_bit_for_bit(tmp_path, every, stop_in):
    def run(path, stop_in=None):
        net = body_and_head()
        freeze(net[0])
        model = minikeras.Model(net)

        def change(epoch):
            if epoch == 3:
                unfreeze(net[0][1])
                freeze(net[1])

        def stop(batch, logs):
            if stop_in == (len(model._run.epochs) + 1, batch):
                raise Stopped

        callbacks = [LambdaCallback(on_epoch_begin=change), LambdaCallback(on_batch_end=stop)]
        kwargs = {"checkpoint": path, "checkpoint_every": every, "callbacks": callbacks}
        fit(net, epochs=5, model=model, fit=kwargs)
        model.train()
        return net

    expected = run(tmp_path / "whole.pt")
    with pytest.raises(Stopped):
        run(tmp_path / "run.pt", stop_in)
    resumed = run(tmp_path / "run.pt")
    assert_same_weights(resumed, expected, 0)
    for part, other in zip(resumed.modules(), expected.modules(), strict=True):
        assert part.training == other.training
    for parameter, other in zip(resumed.parameters(), expected.parameters(), strict=True):
        assert parameter.requires_grad == other.requires_grad


def test_script_that_freezes_otherwise_than_the_file_is_warned_and_taken(tmp_path):
    path = tmp_path / "run.pt"

    def run(epochs, parts):
        USES.clear()  # as in another process
        net = body_and_head()
        for part in parts:
            freeze(net[part])
        return fit(net, epochs=epochs, fit={"checkpoint": path}).net

    before = copy_weights(run(1, [0]))
    with pytest.warns(UserWarning, match="a script with other settings") as warned:
        net = run(2, [1])
    assert [str(warning.message) for warning in warned] == [
        f"{path} was started by a script with other settings: net.0.0.weight, net.0.0.bias, "
        "net.0.1.weight frozen, and trained here; net.1.weight, net.1.bias trained, and frozen "
        "here. This script's settings are used from now on."
    ]
    assert_frozen(net, before, "1.")
    assert [net[0][1].training, net[1].training] == [True, False]


# --- errors ---------------------------------------------------------------------------------------

MISTAKES = {
    "a class": (
        lambda net: nn.Linear,
        "the class Linear. Pass an instance, as freeze(Linear(...)).",
    ),
    "parameters": (
        lambda net: list(net.parameters())[:1],
        "[Parameter (4, 2) float32]. Pass the module, not its parameters: freeze(model.net[0]). "
        "For several modules call it once for each.",
    ),
    "a generator": (
        lambda net: net.parameters(),
        "generator. Pass the module, not its parameters: freeze(model.net[0]). For several "
        "modules call it once for each.",
    ),
    "a parameter": (
        lambda net: net[2].bias,
        "Parameter (1,) float32. Pass the layer that has it; for one parameter alone, "
        "parameter.requires_grad_(False) does it.",
    ),
    "a name": (
        lambda net: "net.0",
        "str. Pass the layer or the network itself, as freeze(model.net[0]).",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_freeze_of_what_is_no_module_is_refused_with_the_way_to_do_it(mistake):
    make, message = MISTAKES[mistake]
    net = body_and_head()
    expected = f"freeze expects `module`, a torch.nn.Module, got {message}"
    with pytest.raises(TypeError, match=exactly(expected)):
        freeze(make(net))
    with pytest.raises(TypeError, match="unfreeze expects `module`"):
        unfreeze(make(net))
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_fit_of_a_wholly_frozen_model_names_unfreeze_and_the_remedy_works():
    net = body_and_head()
    before = copy_weights(net)
    model = freeze(minikeras.Model(net))
    message = (
        "there is nothing to train: all 10 parameters of Model are frozen. Call minikeras.unfreeze "
        "on the layers to train, then compile again."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        fit(net, model=model)
    unfreeze(net[2])
    fit(net, model=model)
    assert_frozen(net, before, "0.")


def test_parameters_unfrozen_after_compile_that_no_optimizer_holds_are_refused():
    net = body_and_head()
    freeze(net[0])
    model = fit(net, lambda _: adam([*net[1].parameters(), *net[2].parameters()]))
    unfreeze(net[0][3])
    message = (
        "the optimizer lacks parameters: 2 parameter tensors were frozen when Model.compile was "
        "called, and have been unfrozen since. They would not be trained. Make a new optimizer "
        "from model.parameters() and call Model.compile again."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        model.fit(1, BATCHES, verbose=0)
    before = copy_weights(net)
    fit(net, model=model)
    moved = [name for name, value in net.state_dict().items() if not value.equal(before[name])]
    assert {"0.3.weight", "0.3.bias"} < set(moved)
    assert not [name for name in moved if name.startswith(("0.0", "0.1"))]


def test_parameters_left_out_of_the_optimizer_by_choice_are_warned_of_until_they_are_frozen():
    net = body_and_head()
    before = copy_weights(net)
    message = (
        "8 parameters require a gradient and are in no optimizer, so they are not trained: "
        "net.0.0.weight, net.0.0.bias, net.0.1.weight, net.0.1.bias and 4 more. Make an optimizer "
        "with them and call Model.compile again, or freeze them: minikeras.freeze(module)."
    )
    with pytest.warns(UserWarning, match=exactly(message)):
        model = fit(net, lambda _: adam(net[2].parameters()))
    assert net[0][0].weight.equal(before["0.0.weight"])
    before = copy_weights(net)
    freeze(net[0])
    freeze(net[1])
    model.fit(1, BATCHES, verbose=0)  # without a warning
    assert_frozen(net, before, ("0.", "1."))


def test_weight_decay_groups_made_while_a_part_is_frozen_train_it_once_it_is_unfrozen():
    def optimizer(parameters):
        return torch.optim.SGD(minikeras.weight_decay_groups(net, 0.1), 0.05, momentum=0.9)

    net = body_and_head()
    freeze(net[0])
    before = copy_weights(net)
    model = fit(net, optimizer)
    assert_frozen(net, before)
    unfreeze(net[0])
    model.fit(1, BATCHES, verbose=0)
    assert not net[0][0].weight.equal(before["0.0.weight"])


@pytest.mark.parametrize(
    ("path", "place", "layer", "count"),
    [
        ("net.0", "model.get_submodule('net.0')", "net.0 (Linear)", 2),
        ("", "model", "the model (Model)", 4),
    ],
)
def test_fit_refuses_a_trainable_of_keras_which_freezes_nothing(path, place, layer, count):
    model = minikeras.Model(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1)))
    model.compile(nn.MSELoss(), device="cpu")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    module = model.get_submodule(path)
    module.trainable = False
    message = (
        f"`trainable` of {layer} is False, as in Keras; torch does not know it, and {count} "
        f"parameters would be trained. Call minikeras.freeze({place}) instead."
    )
    data = (torch.ones(8, 2), torch.ones(8, 1))
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        model.fit(1, data, verbose=0)
    assert all(map(torch.equal, before, model.parameters()))
    eval(f"minikeras.freeze({place})", {"minikeras": minikeras, "model": model})
    minikeras.unfreeze(model.net[1])
    vars(model).pop("trainable", None)
    model.fit(1, data, verbose=0)
    assert torch.equal(before[0], model.net[0].weight)


def test_fit_leaves_a_trainable_of_a_users_class_alone():
    class Scale(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            self.trainable = False  # of its own

    model = minikeras.Model(Scale())
    model.compile(nn.MSELoss(), device="cpu")
    model.fit(1, (torch.ones(8, 2), torch.ones(8, 1)), verbose=0)


@pytest.mark.filterwarnings("ignore:.* in no optimizer")
def test_layer_that_an_optimizer_gets_as_an_epoch_begins_steps_with_that_epochs_gradients():
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    bare = copy.deepcopy(net)
    optimizer = sgd(bare[2].parameters())
    for epoch in range(3):
        if epoch == 1:
            optimizer.add_param_group({"params": list(bare[0].parameters())})
        for features, labels in BATCHES:
            bare.zero_grad()  # the optimizer's would leave those of other layers
            nn.functional.mse_loss(bare(features), labels).backward()
            optimizer.step()

    def give(epoch):
        if epoch == 2:
            model.optimizer.add_param_group({"params": list(net[0].parameters())})

    model = minikeras.Model(net)
    model.compile(nn.MSELoss(), sgd(net[2].parameters()), device="cpu")
    callback = LambdaCallback(on_epoch_begin=give)
    model.fit(3, BATCHES, verbose=0, callbacks=[callback])
    assert_same_weights(net, bare)


class Scaled(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, y_pred, y_true):
        return nn.functional.mse_loss(self.scale * y_pred, y_true)


@pytest.mark.filterwarnings("ignore:.* in no optimizer")
def test_parameter_of_the_loss_that_an_optimizer_gets_later_steps_with_new_gradients_alone():
    loss = Scaled()
    at_steps = []

    def give(epoch):
        if epoch == 2:
            model.optimizer.add_param_group({"params": [loss.scale]})

    def look(optimizer, args, kwargs):
        at_steps.append(loss.scale.grad.clone())

    model = minikeras.Model(nn.Linear(2, 1))
    model.compile(loss, torch.optim.SGD(model.parameters(), lr=0.0), device="cpu")
    model.optimizer.register_step_pre_hook(look)
    model.fit(2, BATCHES[:1], verbose=0, callbacks=[LambdaCallback(on_epoch_begin=give)])
    assert torch.equal(at_steps[1], at_steps[0])  # of the same batch and weights
    assert loss.scale.grad is None  # after the fit
