"""A custom step is distinguished from the default, however it is set."""

import functools
import types

import pytest
import torch
from helpers.models import points
from torch import nn

import minikeras
from minikeras import Model
from minikeras.overrides import overrides

X, y = points(8)


def bare_step(self, features, labels, sample_weight=None):
    """Backward and step past the model's own methods."""
    loss = self.compute_loss(self(features), labels)
    loss.backward()
    self.optimizer.step()
    self.optimizer.zero_grad()
    return {"loss": loss}


@functools.wraps(Model.train_step)
def wrapped_step(self, features, labels, sample_weight=None):
    return bare_step(self, features, labels)


def in_a_class(step):
    return type("Own", (Model,), {"train_step": step})(nn.Linear(2, 1))


def on_the_instance(make):
    model = Model(nn.Linear(2, 1))
    model.train_step = make(model)
    return model


def logged(method):
    @functools.wraps(method)
    def call(*args):
        return method(*args)

    return call


OWN = {
    "in a class": lambda: in_a_class(bare_step),
    "decorated with the library's own name": lambda: in_a_class(wrapped_step),
    "a partial method": lambda: in_a_class(functools.partialmethod(bare_step, sample_weight=None)),
    "on the instance": lambda: on_the_instance(lambda model: types.MethodType(bare_step, model)),
    "a partial on the instance": lambda: on_the_instance(lambda m: functools.partial(bare_step, m)),
    "a wrapped function on the instance": lambda: on_the_instance(
        lambda model: functools.partial(wrapped_step, model)
    ),
}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_custom_step_is_distinguished_from_the_default(make):
    model = make()
    assert overrides(model, "train_step")
    assert overrides(model, "train_step")
    assert not overrides(model, "evaluate_step", "backward")


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_custom_step_with_a_bare_backward_is_refused_under_accumulate(make):
    model = make()
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
    model.compile(nn.MSELoss(), optimizer, device="cpu", accumulate=2)
    with pytest.raises(RuntimeError, match=r"loss.backward\(\) bypasses accumulate=2"):
        model.fit(1, (X, y), verbose=0)


def test_custom_step_by_a_decorator_of_the_default_trains_the_same():
    torch.manual_seed(0)
    plain = Model(nn.Linear(2, 1))
    decorated = on_the_instance(lambda model: logged(model.train_step))
    decorated.load_state_dict(plain.state_dict())
    for model in (plain, decorated):
        model.compile(nn.MSELoss(), torch.optim.SGD(model.net.parameters(), lr=0.1), device="cpu")
        model.fit(2, [(X, y)], verbose=0)
    assert overrides(decorated, "train_step")
    assert not overrides(plain, "train_step")
    assert torch.equal(plain.net.weight, decorated.net.weight)


def test_default_step_assigned_to_its_own_instance_stays_the_default():
    assert not overrides(on_the_instance(lambda model: model.train_step), "train_step")


class Reconstruction(minikeras.Model):
    """A loss that needs no labels, with the default step."""

    def compute_loss(self, outputs, labels, sample_weight=None):
        return (outputs**2).mean()


def test_custom_step_or_loss_may_train_on_features_alone():
    def step(self, features, labels):
        return wrapped_step(self, features, features[:, :1])

    decorated = in_a_class(functools.wraps(Model.train_step)(step))
    for model in (Reconstruction(nn.Linear(2, 1)), decorated):
        model.compile(nn.MSELoss(), device="cpu")
        model.fit(1, X, verbose=0)
    plain = Model(nn.Linear(2, 1))
    plain.compile(nn.MSELoss(), device="cpu")
    with pytest.raises(ValueError, match="the batches are features alone"):
        plain.fit(1, X, verbose=0)


def test_custom_step_by_a_decorator_stays_eager_under_jit():
    model = in_a_class(wrapped_step)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.compile(nn.MSELoss(), optimizer, device="cpu", jit={"backend": "eager"})
    assert model._run.engine.overrides("train_step")
    assert not model._run.engine.overrides("evaluate_step")
