"""Data of any kind becomes the same batches."""

import collections
import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.datasets import Rows
from helpers.models import compiled, points
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import minikeras
from minikeras.batch import pins_memory, to_device
from minikeras.data.arrays import as_tensor
from minikeras.nests import leaves, map_leaves
from minikeras.rows import count_rows


class Stream(IterableDataset):
    def __init__(self, X, y):
        self.X = X
        self.y = y

    def __iter__(self):
        return iter(zip(self.X, self.y, strict=True))


class Batches:
    """Batches again and again, without a length; NumPy arrays, as many generators yield them."""

    def __init__(self, X, y):
        self.X = X.numpy()
        self.y = y.numpy()

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
    "pandas": lambda X, y: (
        pd.DataFrame(X.numpy(), columns=["a", "b"]),
        pd.DataFrame({"y": y[:, 0].numpy()}),
    ),
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
    handle = model.register_forward_pre_hook(
        lambda module, args: rows.extend(args[0][:, 0].tolist())
    )
    model.fit(1, data, verbose=0, **kwargs)
    handle.remove()
    return rows


@pytest.mark.parametrize("kind", ["Dataset", "tensors"])
def test_arrays_are_shuffled_for_training_only(kind):
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


def test_batch_size_of_arrays_does_not_touch_a_validation_loader():
    X, y = points(20)
    assert (
        len(compiled().fit(1, (X, y), DataLoader(TensorDataset(X, y), 5), batch_size=10, verbose=0))
        == 1
    )


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
    "join",
    [tuple, list, lambda parts: {"b": parts[1], "a": parts[0]}],
    ids=["tuple", "list", "dict"],
)
def test_inputs_in_a_tuple_go_to_forward_unpacked_or_whole(model, join):
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
def test_inputs_in_a_dict_go_by_name_if_the_names_fit_and_whole_if_not(model):
    X, y = points(50)
    assert len(compiled(model()).fit(1, ({"a": X[:, :1], "b": X[:, 1:]}, y), verbose=0)) == 1


def test_packed_sequence_is_one_input():
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
        (pd.DataFrame({"a": np.ones(2, np.uint8)}), torch.int64),
        (pd.Series([1 + 2j, 3]), torch.complex128),
        (np.ones(3, np.longdouble), torch.float32),
        (np.ones(3, ">f4"), torch.float32),
        (np.ones(3, np.uint64), torch.int64),
        (torch.ones(3, dtype=torch.float64), torch.float64),
    ],
)
def test_arrays_become_tensors_of_the_default_dtype_and_tensors_stay(array, dtype):
    tensor = as_tensor(array)
    assert tensor.dtype == dtype
    assert np.array_equal(tensor.numpy(), np.asarray(array).astype(tensor.numpy().dtype))


@pytest.mark.parametrize("kind", [np.array, pd.Series, lambda values: pd.DataFrame({"a": values})])
def test_arrays_of_whole_numbers_that_int64_cannot_hold_are_refused(kind):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        as_tensor(kind(np.array([1, 2**63 + 5], np.uint64)), "dl_train")
    expected = "expected whole numbers below 2**63, int64's. Pass floats."
    assert str(error.value) == f"dl_train holds 9223372036854775813; {expected}"


def test_arrays_become_bfloat16_if_that_is_the_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert as_tensor(np.ones(3)).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(before)


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
def test_nested_data_keeps_its_structure_when_its_leaves_change(nest):
    moved = to_device(nest, torch.device("meta"))
    assert type(moved) is type(nest)
    assert len(leaves(moved)) == len(leaves(nest))
    assert all(
        leaf.device.type == "meta" for leaf in leaves(moved) if isinstance(leaf, torch.Tensor)
    )
    assert repr(map_leaves(lambda leaf: leaf, nest)) == repr(nest)


class Bag(collections.abc.MutableMapping):
    """A custom mapping, which keeps its items in a dict."""

    def __init__(self, items):
        self.items_inside = dict(items)

    def __getitem__(self, key):
        return self.items_inside[key]

    def __setitem__(self, key, value):
        self.items_inside[key] = value

    def __delitem__(self, key):
        del self.items_inside[key]

    def __iter__(self):
        return iter(self.items_inside)

    def __len__(self):
        return len(self.items_inside)


def test_mapping_of_a_custom_class_is_not_written_into():
    X, y = points(50)
    parts = {"a": X[:, :1], "b": X[:, 1:]}
    features = Bag(parts)
    histories = []
    for data in (parts, features):
        torch.manual_seed(0)
        histories.append(
            compiled(TwoInputs()).fit(3, (data, y), (data, y), batch_size=20, verbose=0)
        )
    pd.testing.assert_frame_equal(*histories)
    assert all(features[name] is parts[name] for name in parts)
    assert to_device(features, torch.device("meta"))["a"].device.type == "meta"


class Reusing(DataLoader):
    """A loader that may write each batch into the same memory."""

    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("make", "pinned"),
    [
        (lambda rows: DataLoader(rows, pin_memory=True), True),
        (lambda rows: SimpleNamespace(loader=DataLoader(rows, pin_memory=True)), True),
        (lambda rows: DataLoader(rows), False),
        (lambda rows: Reusing(rows, pin_memory=True), False),
        (lambda rows: [torch.zeros(2)], False),
    ],
)
def test_copy_is_not_waited_for_if_the_loader_pins_each_batch_anew(make, pinned):
    assert pins_memory(make(TensorDataset(torch.zeros(4, 2)))) is pinned


def test_packed_sequence_moves_as_one():
    assert isinstance(
        to_device(pack_sequence([torch.ones(2)]), torch.device("meta")), PackedSequence
    )


# --- a batch's rows -------------------------------------------------------------------------------


class Moves:
    """Rows and labels in an object that moves as one."""

    def __init__(self, x, y):
        self.x = x
        self.y = y

    def to(self, device):
        return type(self)(self.x.to(device), self.y.to(device))


class Tells(Moves):
    """An object that says how many rows it has, as the batches of graph libraries do."""

    @property
    def batch_size(self):
        return len(self.x)


@dataclasses.dataclass
class Fields(Moves):
    x: torch.Tensor
    y: torch.Tensor


class Encoded(collections.UserDict):
    """What a tokenizer gives."""

    def __init__(self, x, y):
        super().__init__(x=x, y=y)

    def to(self, device):
        return type(self)(self["x"].to(device), self["y"].to(device))

    def __getattr__(self, name):
        return self.__dict__["data"][name] if name in ("x", "y") else super().__getattribute__(name)


class OwnSteps(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, batch):
        return self.fc(batch.x)

    def evaluate_step(self, features, labels, sample_weight=None):
        return {"loss": nn.functional.mse_loss(self.compute_outputs(features), features.y)}

    def train_step(self, features, labels, sample_weight=None):
        results = self.evaluate_step(features, labels)
        self.backward(results["loss"])
        self.optimizer_step()
        return results


@pytest.mark.parametrize("kind", [Tells, Fields, Encoded])
def test_batches_that_are_one_object_are_counted_by_their_rows(kind):
    X, y = points(50)
    model = compiled(OwnSteps(), accumulate=2)
    with torch.no_grad():
        expected = nn.functional.mse_loss(model.fc(X), y).item()
    data = [kind(X[:48], y[:48]), kind(X[48:], y[48:])]
    assert model.evaluate(data)["val_loss"] == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(model.predict(data), model.fc(X).detach())
    whole = compiled(OwnSteps())
    whole.load_state_dict(model.state_dict())
    whole.fit(1, [Tells(X, y)], verbose=0)
    model.fit(1, data, verbose=0)
    torch.testing.assert_close(model.fc.weight, whole.fc.weight)


def test_batch_whose_rows_cannot_be_counted_is_refused_before_a_weight_moves():
    model = compiled(OwnSteps())
    before = model.fc.weight.clone()
    with pytest.raises(ValueError) as error:  # noqa: PT011
        model.fit(1, [(Moves(*points(8)), None)], verbose=0)
    assert str(error.value) == (
        "the rows of a batch, over which the means are taken, cannot be told: there is no tensor "
        "in features Moves, labels NoneType. Give labels whose first size is the number of rows; "
        "or set an int `batch_size` on the batch, as an attribute of an object or a dict subclass "
        "of your own; or return minikeras.Average(total, count) from the loss and the metrics."
    )
    assert torch.equal(model.fc.weight, before)


def test_labels_give_the_row_count_if_the_features_do_not():
    X, y = points(10)
    model = compiled(OwnSteps())
    data = [(Moves(X[:8], y[:8]), y[:8]), (Moves(X[8:], y[8:]), y[8:])]
    whole = model.evaluate([Tells(X, y)])["val_loss"]
    assert model.evaluate(data)["val_loss"] == pytest.approx(whole, rel=1e-6)


def test_predict_needs_no_row_count():
    X, y = points(10)
    model = OwnSteps()
    torch.testing.assert_close(
        model.predict([Moves(X[:8], y[:8]), Moves(X[8:], y[8:])]), model.fc(X).detach()
    )


def test_predict_counts_the_rows_of_a_batch_by_its_labels_where_time_comes_first():
    class Last(nn.Module):
        def forward(self, x):
            return x[-1]

    time_first = torch.randn(10, 4, 10)
    labels = np.zeros(4)
    assert torch.equal(minikeras.Model(Last()).predict([(time_first, labels)]), time_first[-1])


@pytest.mark.parametrize("batch", [3, 2.5, torch.tensor(1.0), None])
def test_batch_of_one_number_is_one_row(batch):
    assert count_rows(batch) == 1
