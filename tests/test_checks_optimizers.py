"""Optimizers that do not hold the model, and steps that return something else."""

import pytest
import torch
from helpers.bad_input import X, Y, cases, compiled, refused, sgd
from helpers.compare import assert_equal_tensors, copy_weights
from torch import nn

from minikeras import Model


def foreign(model):
    return sgd(nn.Linear(4, 1))


def two(model):
    return {"generator": sgd(model.net[0]), "critic": sgd(model.net[1])}


def replace_layer(model):
    model.net[1] = nn.Linear(4, 1)


def replace_net(model):
    model.net = nn.Linear(4, 1)


def replace_optimizer(model):
    model.optimizer = sgd(model)


def double_after_training(model):
    model.fit(1, (X, Y), verbose=0)
    model.double()


DEEP = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
OPTIMIZERS = {
    # network, optimizer, what happens after compile
    "made from another model": (None, foreign, lambda model: model.evaluate((X, Y))),
    "everything is frozen": (DEEP, None, lambda model: model.requires_grad_(False)),
    "no parameters": (nn.Flatten(), None, lambda model: model.evaluate((X, X))),
    "LBFGS": (None, lambda model: torch.optim.LBFGS(model.parameters()), lambda model: None),
    "another model.optimizer": (None, sgd, replace_optimizer),
    "another network": (None, sgd, replace_net),
    "another layer": (DEEP, sgd, replace_layer),
    "another layer under the default optimizer": (DEEP, None, replace_layer),
    "another layer, which was all that one optimizer held": (DEEP, two, replace_layer),
    "one more layer": (DEEP, sgd, lambda model: model.net.append(nn.Linear(1, 1))),
    "another dtype after training": (None, None, double_after_training),
}
OPTIMIZERS_SAY = """
made from another model | ValueError: the optimizer holds none of the parameters of Model: it was
    made from another model, or the network was replaced after compile. Make a new optimizer from
    model.parameters() and call Model.compile again.
everything is frozen | ValueError: there is nothing to train: all 4 parameters of Model are frozen.
    Call minikeras.unfreeze on the layers to train, then compile again.
no parameters | ValueError: there is nothing to train: Model has no parameters. Add a layer that has
    some, then compile again.
LBFGS | ValueError: LBFGS needs a closure that computes the loss again, which the default train_step
    does not pass. Override train_step and call self.optimizer.step(closure) there.
another model.optimizer | ValueError: model.optimizer was replaced after compile. Call model.compile
    with the new optimizer.
another network | ValueError: the optimizer holds none of the parameters of Model: ...
another layer | another layer under the default optimizer | ValueError: the optimizer holds stale
    parameters: a layer was replaced after compile, and 2 new parameters would not be trained. Make
    a new optimizer from model.parameters() and call Model.compile again.
another layer, which was all that one optimizer held | ValueError: optimizer 'critic' holds none of
    the parameters of Model: it was made from another model, or the network was replaced after
    compile. Make a new optimizer from model.parameters() and call Model.compile again.
one more layer | ValueError: the optimizer lacks parameters: a layer was added after compile, and 2
    new parameters would not be trained. Make a new optimizer from model.parameters() and call
    Model.compile again.
another dtype after training | ValueError: the optimizer holds stale state: it is float32 from
    earlier steps and the parameters are float64 now. Make a new optimizer from model.parameters()
    and call Model.compile again.
"""


@pytest.mark.parametrize(("given", "message"), cases(OPTIMIZERS, OPTIMIZERS_SAY))
def test_optimizer_that_does_not_hold_the_current_model_is_refused_by_fit(given, message):
    net, optimizer, then = given
    model = compiled(net, optimizer=optimizer)
    then(model)
    with refused(message, model):
        model.fit(1, (X, Y), verbose=0)


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, y_pred, y_true):
        return self.scale * nn.functional.mse_loss(y_pred, y_true)


class OwnStep(Model):
    """It trains its second layer by itself."""

    def train_step(self, features, labels):
        return super().train_step(features, labels)


LEFT_OUT = {
    # loss, the optimizer, what is left out
    "a head": (nn.MSELoss(), lambda model: sgd(model.net[0]), ["net.1.weight", "net.1.bias"]),
    "a bias": (nn.MSELoss(), lambda model: sgd(model.net[0]), ["net.1.bias"]),
    "a parameter of the loss": (Scaled(), sgd, ["scale of the loss"]),
}


@pytest.mark.parametrize(("loss", "optimizer", "names"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_parameters_in_no_optimizer_are_warned_of_and_the_remedy_works(loss, optimizer, names):
    model = compiled(DEEP, loss, optimizer=optimizer)
    if len(names) == 1:
        model.net[1].weight.requires_grad_(names == ["scale of the loss"])
    before = copy_weights(model.net[1])
    with pytest.warns(UserWarning, match="in no optimizer") as caught:
        model.fit(1, (X, Y), verbose=0)
    beginning = "1 parameter requires a gradient and is in no optimizer, so it is"
    them = "it"
    if len(names) > 1:
        beginning = "2 parameters require a gradient and are in no optimizer, so they are"
        them = "them"
    assert [str(warning.message) for warning in caught] == [
        f"{beginning} not trained: {', '.join(names)}. Make an optimizer with {them} and call "
        f"Model.compile again, or freeze {them}: minikeras.freeze(module)."
    ]
    if optimizer is not sgd:
        assert_equal_tensors(copy_weights(model.net[1]), before)
    whole = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    model.compile(loss, whole, device="cpu")
    model.fit(1, (X, Y), verbose=0)  # without a warning
    assert not model.net[1].bias.equal(before["bias"])


class Unused(nn.Sequential):
    """A network whose second layer takes no part."""

    def forward(self, features):
        return self[0](features)


NOT_LEFT_OUT = {
    "a custom step": (DEEP, OwnStep, lambda model: sgd(model.net[0])),
    "one optimizer for each layer": (DEEP, Model, two),
    "a layer that takes no part": (Unused(nn.Linear(4, 1), nn.Linear(1, 1)), Model, sgd),
    "the default optimizer": (DEEP, Model, None),
}


@pytest.mark.parametrize(("net", "kind", "optimizer"), NOT_LEFT_OUT.values(), ids=NOT_LEFT_OUT)
def test_parameters_that_an_optimizer_or_a_custom_step_trains_are_not_warned_of(
    net, kind, optimizer
):
    compiled(net, optimizer=optimizer, kind=kind).fit(1, (X, Y), verbose=0)


UNKNOWN = {
    "misspelt": (two, "critc", "compile was given 'generator', 'critic'. Did you mean 'critic'?"),
    "another word": (two, "zzz", "compile was given 'generator', 'critic'."),
    "of one without a name": (
        sgd,
        "critic",
        "compile was given one without a name. Leave the name out.",
    ),
}


@pytest.mark.parametrize("verb", ["backward", "optimizer_step"])
@pytest.mark.parametrize(("optimizer", "name", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_optimizer_of_an_unknown_name_raises_an_error_with_the_known_ones(
    verb, optimizer, name, message
):
    model = compiled(DEEP, optimizer=optimizer)
    arguments = (model(X).sum(), name) if verb == "backward" else (name,)
    with refused(f"ValueError: there is no optimizer {name!r}; {message}", model):
        getattr(model, verb)(*arguments)


class OfTwo(Model):
    def train_step(self, features, labels):
        return super().train_step(features, labels)

    def evaluate_step(self, features, labels):
        return super().evaluate_step(features, labels)


@pytest.mark.parametrize("step", ["train_step", "evaluate_step"])
def test_custom_step_without_sample_weight_raises_an_error_that_says_how_to_take_it(step):
    model = compiled(kind=OfTwo)
    weighted = (X, Y, torch.ones(8))
    message = f"the batches carry a sample_weight, and OfTwo.{step} does not take one. "
    message += f"Write it as {step}(self, features, labels, sample_weight=None)."
    with refused(f"TypeError: {message}", model):
        model.fit(1, weighted, verbose=0) if step == "train_step" else model.evaluate(weighted)


class Answers(Model):
    """Its train_step returns what `answers` holds."""

    def train_step(self, features, labels, sample_weight=None):
        return self.answers.pop(0)


ANSWERS = {
    "nothing": [None],
    "nothing at the second step": [{"loss": 1.0}, None],
    "a list": [[1.0]],
    "an empty dict": [{}],
    "a name that is a number": [{3: 1.0}],
    "a name of the history's": [{"loss": 1.0, "lr": 0.1}],
    "a value per row": [{"loss": torch.ones(8)}],
    "other names at the second step": [{"loss": 1.0}, {"loss": 1.0, "f1": 1.0}],
}
ANSWERS_SAY = """
nothing | nothing at the second step | TypeError: train_step returned NoneType; expected a dict of
    name -> number for the history. Return for instance {"loss": loss}.
a list | TypeError: train_step returned [float]; expected a dict of name -> number for the history.
    Return for instance {"loss": loss}.
an empty dict | TypeError: train_step returned {}; expected a dict of name -> number for the
    history. Return for instance {"loss": loss}.
a name that is a number | TypeError: train_step returned the name 3; expected a string.
a name of the history's | ValueError: train_step returned the name 'lr', which history uses itself
    (lr, epoch and val_...). Give it another name.
a value per row | ValueError: train_step's 'loss' gave Tensor (8,) float32; expected one number: ...
other names at the second step | ValueError: a step returned loss, f1 and the one before it loss;
    expected the same names at each step, since the history has a column for each.
"""


@pytest.mark.parametrize(("answers", "message"), cases(ANSWERS, ANSWERS_SAY))
def test_train_step_must_return_the_same_numbers_by_name(answers, message):
    model = compiled(kind=Answers)
    model.answers = list(answers)
    with refused(message, model):
        model.fit(1, [(X, Y)] * len(answers), verbose=0)


def test_optimizer_state_of_another_dtype_is_refused_after_compile():
    model = compiled()
    model.fit(1, (X, Y), verbose=0)
    model.double().compile(nn.MSELoss(), model.optimizer, device="cpu")
    with pytest.raises(
        ValueError, match="the optimizer holds stale state: it is float32 from earlier steps"
    ):
        model.fit(1, (X.double(), Y.double()), verbose=0)
