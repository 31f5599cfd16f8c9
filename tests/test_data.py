"""Whatever the user has becomes the same batches."""

import collections
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import compiled, points
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import minikeras
from minikeras.data import as_tensor, count_rows, leaves, map_leaves, to_device


class Rows(Dataset):
    def __init__(self, X, y):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.X)

    def __getitem__(self, row):
        return self.X[row], self.y[row]


class Stream(IterableDataset):
    def __init__(self, X, y):
        self.X, self.y = X, y

    def __iter__(self):
        return iter(zip(self.X, self.y, strict=True))


class Batches:
    """Batches again and again, without a length; NumPy arrays, as many generators yield them."""

    def __init__(self, X, y):
        self.X, self.y = X.numpy(), y.numpy()

    def __iter__(self):
        for start in range(0, len(self.X), 32):
            yield self.X[start : start + 32], self.y[start : start + 32]


KINDS = {
    "DataLoader": lambda X, y: DataLoader(TensorDataset(X, y), 32),
    "DataLoader of workers": lambda X, y: DataLoader(TensorDataset(X, y), 32, num_workers=2),
    "Dataset": Rows,
    "IterableDataset": Stream,
    "iterable": Batches,
    "list of batches": lambda X, y: list(zip(X.split(32), y.split(32), strict=True)),
    "tensors": lambda X, y: (X, y),
    "NumPy": lambda X, y: (X.double().numpy(), y.double().numpy()),
    "pandas": lambda X, y: (pd.DataFrame(X.numpy(), columns=["a", "b"]), pd.DataFrame({"y": y[:, 0].numpy()})),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_fit_evaluate_and_predict_take_each_kind_of_data(kind):
    X, y = points(100)
    model = compiled()
    expected = model.evaluate([(X, y)])["val_loss"]
    data = kind(X, y)
    assert model.evaluate(data)["val_loss"] == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(model.predict(data), model.predict(X))
    dfhistory = model.fit(2, data, data, verbose=0)
    assert dfhistory["loss"].iloc[1] < dfhistory["loss"].iloc[0]


def seen_by(model, data, **kwargs):
    rows = []
    handle = model.register_forward_pre_hook(lambda module, args: rows.extend(args[0][:, 0].tolist()))
    model.fit(1, data, verbose=0, **kwargs)
    handle.remove()
    return rows


@pytest.mark.parametrize("kind", ["Dataset", "tensors"])
def test_rows_that_are_not_batched_are_shuffled_for_training_only(kind):
    X, y = points(100)
    model = compiled()
    first, second = (seen_by(model, KINDS[kind](X, y)) for _ in range(2))
    assert first != second
    assert first != X[:, 0].tolist()
    assert sorted(first) == sorted(second) == sorted(X[:, 0].tolist())


def test_batch_size_is_32_unless_given():
    batches = []
    model = compiled()
    model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    model.fit(1, points(70), verbose=0)
    model.fit(1, points(70), batch_size=50, verbose=0)
    model.evaluate(points(70), batch_size=60)
    assert batches == [32, 32, 6, 50, 20, 60, 10]


def test_one_batch_size_serves_arrays_beside_a_validation_loader():
    X, y = points(20)
    assert len(compiled().fit(1, (X, y), DataLoader(TensorDataset(X, y), 5), batch_size=10, verbose=0)) == 1


class TwoInputs(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, a, b):
        return torch.sigmoid(self.fc(torch.cat([a, b], 1)))


class Whole(TwoInputs):
    def forward(self, features):
        a, b = features.values() if isinstance(features, dict) else features
        return super().forward(a, b)


@pytest.mark.parametrize("model", [TwoInputs, Whole])
@pytest.mark.parametrize(
    "join", [tuple, list, lambda parts: {"b": parts[1], "a": parts[0]}], ids=["tuple", "list", "dict"]
)
def test_several_inputs_go_to_forward_unpacked_or_whole(model, join):
    X, y = points(50)
    features = join([X[:, :1], X[:, 1:]])
    if model is Whole and isinstance(features, dict):
        features = {"a": X[:, :1], "b": X[:, 1:]}
    compiled_model = compiled(model())
    assert len(compiled_model.fit(1, [(features, y)], verbose=0)) == 1
    compiled_model = compiled(model())
    expected = torch.sigmoid(compiled_model.fc(X)).detach()
    torch.testing.assert_close(compiled_model.predict([(features, y)]), expected)
    torch.testing.assert_close(compiled_model.predict((features, y)), expected)


class Optional(TwoInputs):
    def forward(self, batch, swap=False):
        return super().forward(batch["a"], batch["b"])


class Keywords(TwoInputs):
    def forward(self, **batch):
        return super().forward(batch["a"], batch["b"])


@pytest.mark.parametrize("model", [Optional, Keywords])
def test_a_dict_goes_by_name_where_its_names_fit_and_whole_where_they_do_not(model):
    X, y = points(50)
    assert len(compiled(model()).fit(1, ({"a": X[:, :1], "b": X[:, 1:]}, y), verbose=0)) == 1


def test_a_packed_sequence_is_one_input():
    class Packed(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(2, 1)

        def forward(self, x):
            return torch.sigmoid(self.lstm(x)[1][0][0])

    batch = pack_sequence([torch.randn(3, 2), torch.randn(2, 2)]), torch.ones(2, 1)
    assert len(compiled(Packed()).fit(2, [batch], [batch], verbose=0)) == 2
    assert count_rows(batch[0]) == 2


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.ones(3), torch.float32),
        (np.ones(3, np.float16), torch.float32),
        (np.ones(3, np.int32), torch.int64),
        (np.ones(3, np.uint8), torch.uint8),
        (np.ones(3, bool), torch.bool),
        (np.ones((4, 3))[::-2], torch.float32),
        (pd.Series([1, 2]), torch.int64),
        (pd.Series([1.5, 2.5]), torch.float32),
        (pd.Series([True, False]), torch.bool),
        (pd.DataFrame({"a": [1, 2], "b": [3, 4]}), torch.int64),
        (pd.DataFrame({"a": [1, 2], "b": [0.5, 4]}), torch.float32),
        (pd.DataFrame({"a": [True, False], "b": [0.5, 4]}), torch.float32),
        (pd.DataFrame({"a": [True, False]}), torch.bool),
        (torch.ones(3, dtype=torch.float64), torch.float64),
    ],
)
def test_arrays_become_tensors_of_the_default_dtype_and_tensors_stay(array, dtype):
    tensor = as_tensor(array)
    assert tensor.dtype == dtype
    assert np.array_equal(tensor.numpy(), np.asarray(array).astype(tensor.numpy().dtype))


Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    name: str


NESTS = [
    torch.ones(2),
    (torch.ones(2), [torch.zeros(1)]),
    {"a": torch.ones(1), "b": {"c": None}},
    Point(torch.ones(1), (torch.ones(2),)),
    collections.OrderedDict(a=torch.ones(1)),
    collections.defaultdict(list, a=torch.ones(1)),
    Record(torch.ones(1), "name"),
]


@pytest.mark.parametrize("nest", NESTS, ids=lambda nest: type(nest).__name__)
def test_a_nest_keeps_its_structure_when_its_leaves_change(nest):
    moved = to_device(nest, torch.device("meta"))
    assert type(moved) is type(nest)
    assert len(leaves(moved)) == len(leaves(nest))
    assert all(leaf.device.type == "meta" for leaf in leaves(moved) if isinstance(leaf, torch.Tensor))
    assert repr(map_leaves(lambda leaf: leaf, nest)) == repr(nest)


def test_a_packed_sequence_moves_as_one():
    assert isinstance(to_device(pack_sequence([torch.ones(2)]), torch.device("meta")), PackedSequence)
