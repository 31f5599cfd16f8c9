"""How predict joins the outputs of the batches."""

import weakref

import numpy as np
import pytest
import torch
from helpers.bad_input import X, Y, refused
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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


class Watched:
    """Four batches; it notes how many earlier ones are still in memory as each is asked for."""

    def __init__(self):
        self.alive = []

    def __len__(self):
        return 4

    def __iter__(self):
        earlier = []
        for _ in range(len(self)):
            self.alive.append(sum(batch() is not None for batch in earlier))
            batch = torch.ones(2, 1)
            earlier.append(weakref.ref(batch))
            yield batch
            del batch


def test_predict_keeps_no_batch_but_the_first_until_it_asks_for_the_next():
    batches = Watched()
    Model(nn.Linear(1, 1)).predict(batches)
    assert batches.alive == [0, 1, 1, 1]


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


class Calls(nn.Module):
    """Answers by a function of the features and the number of the call, from 0."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.answer(x, self.calls - 1)


ANSWERS = {
    "a table": lambda x, call: x * 2,
    "a vector": lambda x, call: x[:, 0] * 2,
    "a view": lambda x, call: x[:, 1:],
    "a transposed view": lambda x, call: x.T.contiguous().T,
    "its input": lambda x, call: x,
    "two rows for each": lambda x, call: x.repeat_interleave(2, 0),
    "a sequence for each": lambda x, call: x[:, :, None] * torch.ones(3),
    "images": lambda x, call: x[:, :, None, None].to(memory_format=torch.channels_last),
    "bools": lambda x, call: x > 4,
    "half": lambda x, call: x.half(),
    "bfloat16": lambda x, call: x.bfloat16(),
    "complex": lambda x, call: torch.complex(x, -x).conj(),
    "a gradient": lambda x, call: x.clone().requires_grad_(),
    "another dtype in the last": lambda x, call: x.double() / 3 if call == 2 else x / 3,
    "another dtype in the first": lambda x, call: x.double() / 3 if call == 0 else x / 3,
}
KINDS = {
    "array": lambda x, size: {"dl": x.numpy(), "batch_size": size},
    "tensor": lambda x, size: {"dl": x, "batch_size": size},
    "loader": lambda x, size: {"dl": DataLoader(TensorDataset(x), size)},
    "pairs": lambda x, size: {"dl": (x, x), "batch_size": size},
    "batches": lambda x, size: {"dl": list(x.split(size))},
    "batches of two sizes": lambda x, size: {"dl": [*x[:2].split(1), *x[2:].split(size)]},
}


@pytest.mark.parametrize("size", [1, 3, 4, 30])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ANSWERS)
def test_predict_gives_the_outputs_of_a_bare_loop_one_after_the_other(name, kind, size):
    x = torch.arange(20.0).reshape(10, 2)
    given = KINDS[kind](x, size)
    bare = Calls(ANSWERS[name])
    batches = given["dl"] if type(given["dl"]) is list else x.split(size)
    expected = torch.cat([bare(batch.clone()).detach() for batch in batches])
    outputs = Model(Calls(ANSWERS[name])).predict(**given)
    assert torch.equal(outputs, expected)
    assert outputs.dtype == expected.dtype
    assert not outputs.requires_grad
    assert outputs.stride() == expected.stride()
    assert outputs.untyped_storage().nbytes() == outputs.nbytes  # and nothing else


def test_predict_of_arrays_has_nothing_left_to_concatenate(monkeypatch):
    x = torch.arange(20.0).reshape(10, 2)
    monkeypatch.setattr(torch, "cat", lambda *args: pytest.fail("outputs are copied twice"))
    assert torch.equal(Model(nn.Identity()).predict(x, batch_size=3), x)


def test_predict_has_each_batchs_answer_though_forward_changes_an_earlier_one():
    class Changing(nn.Module):
        last = torch.zeros(1)

        def forward(self, x):
            self.last.zero_()
            self.last = x * 2
            return self.last[:]

    x = torch.arange(20.0).reshape(10, 2)
    assert torch.equal(Model(Changing()).predict(x, batch_size=2), x * 2)


INPUTS = {
    "float32": lambda x: x,
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "backwards": lambda x: x[::-1],
    "column by column": np.asfortranarray,
    "every second row": lambda x: x[::2],
    "float64": lambda x: x.astype(np.float64),
    "big-endian": lambda x: x.astype(">f4"),
}


@pytest.mark.parametrize("size", [1, 16, 33, 1000])
@pytest.mark.parametrize("name", INPUTS)
def test_predict_leaves_the_array_alone_though_forward_writes_into_its_input(name, size):
    array = INPUTS[name](np.arange(600, dtype=np.float32).reshape(200, 3))
    before = array.copy()
    outputs = Model(Calls(lambda x, call: x.add_(1))).predict(array, batch_size=size)
    assert np.array_equal(array, before)
    assert np.array_equal(outputs.numpy(), before + 1)


def test_predict_features_that_forward_keeps_stay_as_they_were():
    kept = []
    x = torch.arange(40.0).reshape(20, 2)
    Model(Calls(lambda x, call: kept.append(x) or x)).predict(x, batch_size=3)
    assert torch.equal(torch.cat(kept), x)


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
