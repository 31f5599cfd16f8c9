"""What a callback or a step may call inside a fit, and what is refused."""

import pytest
import torch
from helpers.models import compiled, points
from torch import nn

import minikeras
from minikeras import LambdaCallback

X, y = points(48)
MOMENTS = [
    "on_fit_begin",
    "on_epoch_begin",
    "on_batch_begin",
    "on_batch_end",
    "on_evaluate_begin",
    "on_epoch_end",
    "on_fit_end",
]


def at(moment, action):
    """A callback that acts once at that moment."""
    done = []

    def act(*args):
        if not done:
            done.append(True)
            action()

    return LambdaCallback(**{moment: act})


def fitted(model, *callbacks):
    return model.fit(2, (X, y), (X, y), callbacks=callbacks, verbose=0)


def state_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("verb", ["fit", "compile"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_fit_and_compile_inside_a_fit_of_the_same_model_are_refused_at_every_moment(moment, verb):
    model = compiled()
    run, optimizer = model._run, model.optimizer
    actions = {
        "fit": lambda: model.fit(1, (X, y), verbose=0),
        "compile": lambda: model.compile(nn.MSELoss()),
    }
    with pytest.raises(
        RuntimeError, match=f"^{verb} was called inside a fit of the same model"
    ) as raised:
        fitted(model, at(moment, actions[verb]))
    assert raised.value.__notes__[0] == f"LambdaCallback.{moment}"
    assert model._run is run
    assert model.optimizer is optimizer
    actions[verb]()  # the remedy: after fit has returned
    assert len(model.history) == (0 if verb == "compile" else len(run.epochs))


def test_fit_inside_a_train_step_of_the_same_model_is_refused():
    class Nested(minikeras.Model):
        def train_step(self, features, labels):
            self.fit(1, (features, labels), verbose=0)

    model = Nested(nn.Linear(2, 1))
    model.compile(nn.MSELoss(), device="cpu")
    with pytest.raises(RuntimeError, match="fit was called inside a fit of the same model"):
        model.fit(1, (X, y), verbose=0)


@pytest.mark.parametrize("moment", MOMENTS)
def test_evaluate_predict_and_a_fit_of_another_model_inside_a_fit_change_nothing(moment):
    def expected():
        torch.manual_seed(0)
        return compiled()

    plain = expected()
    history = fitted(plain, at(moment, lambda: None))
    other = compiled()
    model = expected()
    seen = []

    def act():
        state = torch.get_rng_state()
        seen.append(model.evaluate((X, y))["val_loss"])
        seen.append(model.predict(X))
        other.fit(2, (X, y), (X, y), verbose=0)
        torch.set_rng_state(state)

    dfhistory = fitted(model, at(moment, act))
    assert len(seen) == 2
    assert len(other.history) == 2
    assert dfhistory.equals(history)
    for mine, theirs in zip(state_of(model), state_of(plain), strict=True):
        assert torch.equal(mine, theirs)


def test_fit_that_an_error_ended_leaves_a_model_to_fit_and_compile():
    model = compiled()
    with pytest.raises(ZeroDivisionError):
        fitted(model, at("on_batch_end", lambda: 1 / 0))
    assert len(fitted(model)) == 2
    model.compile(nn.MSELoss())
