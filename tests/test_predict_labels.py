"""predict(return_labels=True) and predict(join=False)."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from helpers.bad_input import refused
from helpers.compiling import FAST
from helpers.models import Net, compiled, points
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import minikeras
from minikeras import Model

X, y = points(22)
IDENTITY = Model(nn.Identity())


class Rows(Dataset):
    """Rows that are not in memory."""

    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        return X[row], y[row]


def assert_rows_match(outputs, labels):
    """Check that these are all points, in any order, each with its own label."""
    order = torch.as_tensor([(row == X).all(1).nonzero().item() for row in outputs])
    assert sorted(order.tolist()) == list(range(len(X)))
    assert torch.equal(labels, y[order])


DATA = {
    "arrays": lambda: (X, y),
    "NumPy arrays": lambda: (X.numpy(), y.numpy()),
    "weights as well": lambda: (X, y, torch.ones(22)),
    "dataset": Rows,
    "shuffling loader": lambda: DataLoader(Rows(), 8, shuffle=True),
    "shuffling loader over tensors": lambda: DataLoader(TensorDataset(X, y), 8, shuffle=True),
    "workers": lambda: DataLoader(Rows(), 8, shuffle=True, num_workers=1),
    "list": lambda: list(zip(X.split(8), y.split(8), strict=True)),
    "generator": lambda: iter(zip(X.split(8), y.split(8), strict=True)),
    "batches of one row": lambda: DataLoader(Rows(), 1, shuffle=True),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_predict_labels_are_those_of_the_outputs_whatever_the_loaders_order(data, is_compiled):
    model = copy.deepcopy(IDENTITY)
    if is_compiled:
        model.compile(nn.MSELoss(), device="cpu")
    torch.manual_seed(1)
    outputs, labels = model.predict(DATA[data](), return_labels=True)
    assert_rows_match(outputs, labels)
    torch.manual_seed(1)
    assert torch.equal(model.predict(DATA[data]()), outputs)
    torch.manual_seed(1)
    pieces, labels_of_each = model.predict(DATA[data](), return_labels=True, join=False)
    assert torch.equal(torch.cat(pieces), outputs)
    assert torch.equal(torch.cat(labels_of_each), labels)
    assert [len(piece) for piece in pieces] == [len(piece) for piece in labels_of_each]


def test_predict_labels_with_jit():
    model = compiled(Net(), jit=FAST)
    loader = DataLoader(TensorDataset(X, y), 8, shuffle=True)
    outputs, labels = model.predict(loader, return_labels=True)
    expected = {tuple(row.tolist()) for row in torch.cat([model(X), y], 1).detach()}
    found = torch.cat([outputs, labels], 1)
    for row in found:
        assert any(torch.allclose(row, torch.tensor(other)) for other in expected)
    assert len(found) == 22


def test_predict_labels_give_the_confusion_matrix_of_one_pass():
    model = compiled(Net())
    loader = DataLoader(Rows(), 8, shuffle=True)
    outputs, labels = model.predict(loader, return_labels=True)
    found = confusion_matrix(labels > 0.5, outputs > 0.5)
    assert (found == confusion_matrix(y > 0.5, model(X).detach() > 0.5)).all()


def test_predict_labels_end_after_some_steps():
    loader = DataLoader(Rows(), 8)
    outputs, labels = IDENTITY.predict(loader, return_labels=True, steps=2)
    assert torch.equal(outputs, X[:16])
    assert torch.equal(labels, y[:16])


@dataclasses.dataclass
class Targets:
    box: torch.Tensor
    name: list[str]


STRUCTURES = {
    "tuple": lambda rows: (y[rows], rows),
    "list": lambda rows: [y[rows], rows],
    "dict": lambda rows: {"y": y[rows], "more": (rows, rows[:, None])},
    "NumPy": lambda rows: {"y": y[rows].numpy(), "more": rows.numpy()},
    "names": lambda rows: [f"row {row}" for row in rows.tolist()],
    "numbers": lambda rows: rows.tolist(),
    "dataclass": lambda rows: Targets(y[rows], [f"row {row % 2}" for row in rows.tolist()]),
    "dict for each row": lambda rows: [
        {"boxes": torch.full((row + 1, 4), row)} for row in rows.tolist()
    ],
    "tensor for each row": lambda rows: [torch.full((row + 1,), row) for row in rows.tolist()],
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("size", [8, 11, 2])
def test_predict_labels_have_the_structure_of_the_batches(structure, size):
    make = STRUCTURES[structure]
    order = torch.randperm(22, generator=torch.Generator().manual_seed(0))
    batches = [(X[rows], make(rows)) for rows in order.split(size)]
    outputs, labels = IDENTITY.predict(batches, return_labels=True)
    assert torch.equal(outputs, X[order])
    expected = make(order)
    if structure == "NumPy":  # as the loss and the metrics get them
        expected = {name: torch.from_numpy(value) for name, value in expected.items()}
    assert type(labels) is type(expected)
    assert str(labels) == str(expected)


def test_predict_labels_that_repeat_in_each_batch_are_rows():
    batches = [(X[:2], ["cat", "dog"]), (X[2:4], ["cat", "dog"])]
    _, labels = IDENTITY.predict(batches, return_labels=True)
    assert labels == ["cat", "dog", "cat", "dog"]


def test_predict_labels_are_not_what_forward_writes_into_or_the_loader_fills_again():
    class Doubled(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    class Reused:
        def __iter__(self):
            memory = torch.zeros(8, 2)
            for x in X.split(8):
                memory[: len(x)] = x
                yield memory[: len(x)], memory[: len(x)]

    outputs, labels = Model(Doubled()).predict(Reused(), return_labels=True)
    assert torch.equal(labels, X)
    assert torch.equal(outputs, 2 * X)


class TimeFirst(nn.Module):
    """A network of sequences with time first; an output for each sequence."""

    def forward(self, x):
        return x.sum(0)


def test_predict_labels_of_sequences_with_time_first():
    series = torch.randn(5, 22, 2)
    batches = [(series[:, rows], y[rows]) for rows in (slice(0, 9), slice(9, 18), slice(18, 22))]
    outputs, labels = Model(TimeFirst()).predict(batches, return_labels=True)
    torch.testing.assert_close(outputs, series.sum(0))
    assert torch.equal(labels, y)


def test_predict_labels_that_have_time_first_are_joined_as_the_outputs_or_not_at_all():
    series = torch.randn(5, 22, 2)
    targets = torch.randn(5, 22)
    parts = [slice(0, 11), slice(11, 22)]
    outputs, labels = IDENTITY.predict(
        [(series[:, rows], targets[:, rows]) for rows in parts], return_labels=True
    )
    assert torch.equal(outputs, torch.cat([series[:, rows] for rows in parts]))
    assert torch.equal(labels, torch.cat([targets[:, rows] for rows in parts]))
    parts = [slice(0, 9), slice(9, 18), slice(18, 22)]
    batches = [(series[:, rows], targets[:, rows]) for rows in parts]
    with pytest.raises(ValueError, match="pass join=False for a list with the outputs"):
        IDENTITY.predict(batches, return_labels=True)
    outputs, labels = IDENTITY.predict(batches, return_labels=True, join=False)
    assert torch.equal(torch.cat(outputs, 1), series)
    assert torch.equal(torch.cat(labels, 1), targets)


def test_predict_labels_for_each_token_are_joined_to_outputs_for_each_row():
    """A row has four labels, which stand in one tensor."""
    tokens = torch.arange(88)
    batches = list(zip(X.split(8), tokens.split(32), strict=True))
    outputs, labels = IDENTITY.predict(batches, return_labels=True)
    assert torch.equal(outputs, X)
    assert torch.equal(labels, tokens)


def split_dict(batch):
    return batch["x"], batch["labels"]


def test_predict_labels_of_split_batches():
    model = compiled(Net(), split_batch=split_dict)
    batches = [{"x": X[8:], "labels": y[8:]}, {"x": X[:8], "labels": y[:8]}]
    outputs, labels = model.predict(batches, return_labels=True)
    torch.testing.assert_close(outputs, model(torch.cat([X[8:], X[:8]])).detach())
    assert torch.equal(labels, torch.cat([y[8:], y[:8]]))


# --- labels that are not there --------------------------------------------------------------------

REMEDY = (
    "Give batches of (features, labels), arrays as a tuple (X, y); if the batches have labels in "
    "another place, such as in a dict, pass compile(split_batch=function), which returns "
    "(features, labels)."
)
WITHOUT = {
    "array": (X, "batch 1 of dl is features alone, Tensor (22, 2) float32"),
    "list": ([X[:4], X[4:]], "batch 1 of dl is features alone, Tensor (4, 2) float32"),
    "dict": (
        [{"x": X, "labels": y}],
        "batch 1 of dl is features alone, {'x': Tensor (22, 2) float32, 'labels': Tensor (22, 1) "
        "float32}",
    ),
    "later batch": (
        [(X[:4], y[:4]), (X[4:],)],
        "batch 2 of dl is features alone, Tensor (18, 2) float32",
    ),
}


@pytest.mark.parametrize(("data", "said"), WITHOUT.values(), ids=WITHOUT)
def test_predict_labels_that_are_not_there_are_an_error_before_forward(data, said):
    calls = []

    class Counted(nn.Module):
        def forward(self, x):
            calls.append(x)
            return x

    message = f"ValueError: return_labels=True needs labels, and {said}. {REMEDY}"
    with refused(message):
        Model(Counted()).predict(data, batch_size=32 if data is X else None, return_labels=True)
    assert len(calls) == (said[6] == "2")


def test_predict_labels_that_are_not_there_are_given_by_split_batch():
    batches = WITHOUT["dict"][0]
    model = compiled(Net(), split_batch=split_dict)
    assert torch.equal(model.predict(batches, return_labels=True)[1], y)


def test_predict_labels_that_cannot_be_joined_are_an_error_with_a_remedy():
    message = (
        "ValueError: return_labels=True: the labels of the batches cannot be joined like the "
        "outputs; expected the rows first, one label for each row or a fixed number, and got "
        "Tensor (3, 5) float32 for 3 rows and Tensor (2, 6) float32 for 2 rows. Pass join=False "
        "for two lists, with the outputs and the labels of each batch."
    )
    batches = [(X[:3], torch.zeros(3, 5)), (X[3:5], torch.ones(2, 6))]
    with refused(message):
        IDENTITY.predict(batches, return_labels=True)
    outputs, labels = IDENTITY.predict(batches, return_labels=True, join=False)
    assert torch.equal(torch.cat(outputs), X[:5])
    assert [label.shape for label in labels] == [(3, 5), (2, 6)]


def test_predict_labels_without_rows_are_an_error_in_the_first_batch():
    def endless():
        yield X[:3], object()
        raise AssertionError("the second batch is read")

    message = "the labels of the batches cannot be joined like the outputs"
    with pytest.raises(ValueError, match=message):
        IDENTITY.predict(endless(), return_labels=True)


ARGUMENTS = {
    "return_labels": "TypeError: return_labels must be True or False, got str.",
    "join": "TypeError: join must be True or False, got str.",
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_predict_refuses_arguments_that_are_neither_true_nor_false(name):
    with refused(ARGUMENTS[name]):
        IDENTITY.predict(X, **{name: "all"})


# --- join=False -----------------------------------------------------------------------------------


def sequences():
    torch.manual_seed(0)
    return [(torch.randn(4, time, 3), torch.zeros(4, time, 2)) for time in (5, 7)]


def test_predict_unjoined_outputs_are_a_list_with_those_of_each_batch():
    batches = sequences()
    model = Model(nn.Linear(3, 2))
    message = (
        "ValueError: the outputs of the batches have rows of different shapes, (5, 2) and (7, 2), "
        "and cannot be joined. Pad them to one shape in forward, or pass join=False for a list "
        "with the outputs of each batch."
    )
    with refused(message):
        model.predict(batches)
    outputs = model.predict(batches, join=False)
    assert type(outputs) is list
    for found, (x, _) in zip(outputs, batches, strict=True):
        torch.testing.assert_close(found, model(x).detach())
        assert not found.requires_grad


def turned(first, other):
    """A network that answers the first batch in one way, and others in another."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = itertools.count()

        def forward(self, x):
            return (first if next(self.count) == 0 else other)(x)

    return Model(Turned())


CANNOT_BE_JOINED = {
    "a table for the whole batch": (lambda x: (x, torch.zeros(5, 7)),) * 2,
    "a number": (lambda x: {"x": x, "norm": x.norm()},) * 2,
    "a Python number": (lambda x: (x, 3),) * 2,
    "other objects": (lambda x: (x, np.random),) * 2,
    "None in one": (lambda x: (x, None), lambda x: (x, x)),
    "other keys": (lambda x: {"a": x}, lambda x: {"b": x}),
    "rows in another dimension": (lambda x: x.T.reshape(2, -1, 1),) * 2,
}


@pytest.mark.parametrize("name", CANNOT_BE_JOINED)
def test_predict_unjoined_outputs_are_the_remedy_that_errors_name(name):
    ways = CANNOT_BE_JOINED[name]
    data = list(X[:16].split(8))
    with pytest.raises(ValueError, match=r"join|transpose"):
        turned(*ways).predict(data)
    found = turned(*ways).predict(data, join=False)
    expected = [way(x) for way, x in zip(ways, data, strict=True)]
    assert str(found) == str(expected)


def test_predict_unjoined_outputs_need_no_number_of_rows():
    class Table(nn.Module):
        def forward(self, batch):
            return batch["x"], batch["table"]

    batches = [{"x": X[:6], "table": X[:5, 0]}]
    message = (
        "ValueError: the rows of a batch, along which predict joins the outputs, cannot be told: "
        "first sizes differ in features {'x': Tensor (6, 2) float32, 'table': Tensor (5,) "
        "float32}, labels NoneType. Set an int `batch_size` on the batch, as an attribute of an "
        "object or a dict subclass of your own; or pass join=False for a list with the outputs of "
        "each batch."
    )
    with refused(message):
        Model(Table()).predict(batches)
    ((x, table),) = Model(Table()).predict(batches, join=False)
    assert torch.equal(x, X[:6])
    assert torch.equal(table, X[:5, 0])


def test_predict_unjoined_outputs_of_no_batch_are_an_error():
    with refused("ValueError: dl gave no batch: iterating it ended at once."):
        IDENTITY.predict([], join=False)


def test_predict_unjoined_outputs_of_arrays_and_steps():
    assert [len(piece) for piece in IDENTITY.predict(X, batch_size=8, join=False)] == [8, 8, 6]
    assert [len(piece) for piece in IDENTITY.predict(X, batch_size=8, join=False, steps=2)] == [
        8,
        8,
    ]


def test_predict_labels_and_unjoined_outputs_leave_the_model_as_it_was():
    model = compiled(minikeras.Model(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))))
    model.net[0].eval()
    before = copy.deepcopy(model.state_dict())
    model.predict((X, y), return_labels=True, join=False)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
