"""How predict joins the outputs of the batches."""

import weakref

import pytest
import torch
from helpers.bad_input import X, Y, refused
from torch import nn

from minikeras import Model

BY_BATCH = "pass join=False for a list with the outputs of each batch"


def test_predict_outputs_of_ragged_shapes_cannot_be_joined():
    message = (
        "the outputs of the batches have rows of different shapes, (3,) and (4,), and cannot be "
        "joined. "
    )
    with refused(f"ValueError: {message}Pad them to one shape in forward, or {BY_BATCH}."):
        Model(nn.Identity()).predict([torch.ones(2, 3), torch.ones(2, 4)])


class Peak(nn.Module):
    """A row's last value of many, and the most memory that earlier answers had kept."""

    def __init__(self):
        super().__init__()
        self.answers = []
        self.alive = 0

    def forward(self, x):
        self.alive = max(self.alive, sum(answer() is not None for answer in self.answers))
        many = x.repeat(1, 1000)
        self.answers.append(weakref.ref(many.untyped_storage()))
        return many[:, -1:]


def test_predict_keeps_no_more_than_the_outputs():
    net = Peak()
    assert torch.equal(Model(net).predict(Y, batch_size=1), Y)
    assert net.alive <= 1


class Force(nn.Module):
    """A gradient is its output."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Linear(4, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.energy(x).square()
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return {"energy": energy, "force": -force}


def test_predict_gives_plain_numbers_though_forward_asks_for_gradients():
    model = Model(Force())
    outputs = model.predict(X, batch_size=3)
    expected = model(X)
    for name, output in outputs.items():
        assert not output.requires_grad
        torch.testing.assert_close(output, expected[name].detach())


def test_predict_has_each_batchs_answer_though_forward_gives_one_buffer_again_and_again():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("out", torch.zeros(2, 1))

        def forward(self, x):
            return self.out.copy_(x)

    assert torch.equal(Model(Buffered()).predict(Y, batch_size=2), Y)


def test_predict_joins_outputs_in_a_list_one_by_one():
    class Heads(nn.Module):
        def forward(self, x):
            return [x, -x]

    x = torch.arange(8.0).reshape(4, 2)
    first, second = Model(Heads()).predict(x, batch_size=2)
    assert torch.equal(first, x)
    assert torch.equal(second, -x)


def turned(other):
    """A network that answers with a dict, and from the second batch on with another."""

    class Turned(nn.Module):
        def forward(self, x):
            return {"a": x, "b": -x} if x[0, 0] == 0 else other(x)

    return Model(Turned())


def test_predict_joins_outputs_in_a_dict_by_its_keys_in_any_order():
    x = torch.arange(8.0).reshape(4, 2)
    outputs = turned(lambda x: {"b": -x, "a": x}).predict(x, batch_size=2)
    assert torch.equal(outputs["a"], x)
    assert torch.equal(outputs["b"], -x)


X_2 = "Tensor (2, 2) float32"
X_2_2 = "(Tensor (2, 2) float32, Tensor (2, 2) float32)"
OTHERS = [
    (lambda x: {"a": x}, f"{{'a': {X_2}}}"),
    (lambda x: (x, -x), X_2_2),
    (lambda x: x, X_2),
]


@pytest.mark.parametrize(("other", "shown"), OTHERS)
def test_predict_outputs_of_different_structure_cannot_be_joined(other, shown):
    message = (
        f"the outputs of the batches are made in different ways, {{'a': {X_2}, 'b': {X_2}}} and "
        f"{shown}, and "
    )
    with refused(
        f"ValueError: {message}cannot be joined. Return the same from each, or {BY_BATCH}."
    ):
        turned(other).predict(torch.arange(8.0).reshape(4, 2), batch_size=2)
