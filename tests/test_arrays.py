"""Arrays of any library become the same batches, or an error whose remedy works."""

import decimal
import functools
import pathlib
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models import compiled
from torch import nn
from torch.utils.data import DataLoader, StackDataset, Subset, TensorDataset

import minikeras
from minikeras import sources
from minikeras.data.arrays import as_tensor
from minikeras.data.in_memory import FastFetch
from minikeras.nests import leaves

ROWS = 20
DENSE = np.random.default_rng(0).uniform(-1, 1, (ROWS, 3)).astype("float32")
TARGET = torch.as_tensor(DENSE.sum(1, keepdims=True))

as_batches = functools.partial(sources.as_batches, fetch=FastFetch())


def regression(width=3, **kwargs):
    torch.manual_seed(0)
    return compiled(minikeras.Model(nn.Linear(width, 1)), nn.MSELoss(), **kwargs)


def trained_on(X, y=TARGET, width=3):
    """Losses, weights and predictions after two epochs."""
    model = regression(width)
    dfhistory = model.fit(2, (X, y), (X, y), batch_size=8, verbose=0)
    return dfhistory.to_numpy(), model.net.weight.detach().clone(), model.predict(X, batch_size=8)


def refused(kind, data, words, verb=None):
    """The data is refused with these words as the verb begins: no weight has moved."""
    model = regression()
    before = model.net.weight.detach().clone()
    with pytest.raises(kind, match=words):
        (verb or (lambda model, data: model.fit(1, data, verbose=0)))(model, data)
    assert torch.equal(model.net.weight, before)


# --- what is taken --------------------------------------------------------------------------------


def csr(X):
    return pytest.importorskip("scipy.sparse").csr_matrix(X)


def polars_frame(X):
    return pytest.importorskip("polars").DataFrame(dict(zip("abc", X.T, strict=True)))


def read_only(X):
    X = X.copy()
    X.flags.writeable = False
    return X


TAKEN = {
    "scipy.sparse matrix": csr,
    "scipy.sparse array of float64": lambda X: pytest.importorskip("scipy.sparse").coo_array(
        X.astype("float64")
    ),
    "polars DataFrame": polars_frame,
    "torch COO tensor": lambda X: torch.as_tensor(X).to_sparse(),
    "DataFrame": pd.DataFrame,
    "DataFrame of objects": lambda X: pd.DataFrame(X).astype(object),
    "DataFrame of Float32": lambda X: pd.DataFrame(X).astype("Float32"),
    "sparse DataFrame": lambda X: pd.DataFrame(X).astype(pd.SparseDtype("float32", 0.0)),
    "array of objects": lambda X: X.astype(object),
    "array of decimals": lambda X: np.vectorize(decimal.Decimal, otypes=[object])(
        X.astype("float64")
    ),
    "array in column order": np.asfortranarray,
    "array backwards": lambda X: X[::-1].copy()[::-1],
    "big-endian array": lambda X: X.astype(">f4"),
    "read-only array": read_only,
    "array of every other column": lambda X: np.repeat(X, 2, axis=1)[:, ::2],
    "masked array with nothing masked": np.ma.asarray,
    "longdouble": lambda X: X.astype(np.longdouble),
}


@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
def test_arrays_of_each_kind_train_as_the_same_numbers_in_a_plain_array(make):
    for theirs, plain in zip(trained_on(make(DENSE)), trained_on(DENSE), strict=True):
        np.testing.assert_allclose(theirs, plain, rtol=1e-6)


@pytest.mark.parametrize(
    "dtype", ["float16", "int8", "int16", "uint16", "int32", "uint32", "uint64", "bool"]
)
def test_arrays_of_narrow_dtype_give_batches_of_the_dtype_that_the_whole_would_have(dtype):
    X = np.arange(21).reshape(7, 3).astype(dtype)
    for shuffled in (True, False):
        torch.manual_seed(3)
        batches = list(as_batches(X, "dl", 2, shuffle=shuffled))
        torch.manual_seed(3)
        order = torch.randperm(7) if shuffled else torch.arange(7)
        assert all(batch.dtype == as_tensor(X).dtype for batch in batches)
        assert torch.equal(torch.cat(batches), as_tensor(X)[order])


def test_arrays_that_are_read_only_are_not_reached_by_a_forward_that_writes_into_its_batch():
    X = read_only(DENSE)
    for batch in as_batches(X, "dl", 8):
        batch.zero_()
    as_tensor(X).zero_()
    assert np.array_equal(X, DENSE)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_tensors_give_batches_of_their_layout_in_and_out_of_order(layout):
    X = torch.as_tensor(DENSE)
    for shuffled in (True, False):
        torch.manual_seed(3)
        batches = list(as_batches((X.to_sparse(layout=layout), TARGET), "dl", 8, shuffle=shuffled))
        assert all(features.layout is layout for features, _ in batches)
        dense = torch.cat([features.to_dense() for features, _ in batches])
        torch.testing.assert_close(
            dense.sum(1, keepdim=True), torch.cat([labels for _, labels in batches])
        )


def test_jagged_tensors_give_batches_of_their_rows():
    rows = [torch.full((length, 3), float(length)) for length in (2, 5, 1, 4, 3)]
    X = torch.nested.nested_tensor(rows, layout=torch.jagged)
    lengths = torch.tensor([2.0, 5.0, 1.0, 4.0, 3.0])
    batches = list(as_batches((X, lengths), "dl", 2, shuffle=True))
    found = []
    for features, labels in batches:
        found += zip(features.unbind(), labels, strict=True)
    assert sorted(label.item() for _, label in found) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert all(
        torch.equal(part, torch.full((int(label), 3), label.item())) for part, label in found
    )


class Means(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, x):
        return torch.stack([part.mean(0) for part in self.fc(x).unbind()])


def test_jagged_tensors_train_a_model():
    rows = [torch.randn(length, 3) for length in (2, 5, 1, 4, 3)]
    y = torch.randn(5, 1)
    model = compiled(Means(), nn.MSELoss(), lr=0.0)
    expected = torch.stack(
        [(model.fc(row).mean(0) - label) ** 2 for row, label in zip(rows, y, strict=True)]
    ).mean()
    X = torch.nested.nested_tensor(rows, layout=torch.jagged)
    assert model.fit(1, (X, y), batch_size=2, verbose=0)["loss"].item() == pytest.approx(
        expected.item(), rel=1e-6
    )
    assert model.predict(X, batch_size=2).shape == (5, 1)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
@pytest.mark.parametrize(
    "of",
    [
        lambda data: data,
        lambda data: Subset(data, [0, 2, 5]),
        lambda d: StackDataset(a=d.tensors[0]),
    ],
)
def test_unsigned_integers_in_a_loader_give_what_torch_gives(dtype, of):
    top = {torch.uint16: 2**16, torch.uint32: 2**32, torch.uint64: 2**63}[dtype]
    data = of(
        TensorDataset(
            torch.tensor([[0, 1], [top - 1, 3], [4, 5], [6, 7], [8, 9], [1, top - 2]]).to(dtype)
        )
    )
    for shuffled in (True, False):
        loader = DataLoader(data, 2, shuffle=shuffled)
        torch.manual_seed(1)
        theirs = [torch.stack(leaves(batch)) for batch in loader]
        torch.manual_seed(1)
        ours = [
            torch.stack(list(batch.values()) if type(batch) is dict else batch)
            for batch in as_batches(loader, "dl")
        ]
        assert [batch.dtype for batch in ours] == [dtype] * len(theirs)
        assert [batch.tolist() for batch in ours] == [batch.tolist() for batch in theirs]


def test_none_as_a_part_is_left_out_of_arrays_as_it_is_of_batches():
    for theirs, plain in zip(trained_on(DENSE), trained_on(DENSE), strict=True):
        np.testing.assert_array_equal(theirs, plain)
    model = regression(lr=0.0)
    alone = model.fit(1, (DENSE, TARGET), verbose=0)["loss"].item()
    assert model.fit(1, (DENSE, TARGET, None), verbose=0)["loss"].iloc[-1] == pytest.approx(
        alone, rel=1e-6
    )
    assert torch.equal(model.predict((DENSE, None)), model.predict(DENSE))


class AttributeDict(dict):
    """Answers to any name, as some configuration dicts do."""

    __getattr__ = dict.get


class StrictAttributeDict(dict):
    def __getattr__(self, name):
        return self[name]  # KeyError, where hasattr expects an AttributeError


class ByName(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, batch):
        return self.fc(batch["x"])


def tensor_dict(**tensors):
    return pytest.importorskip("tensordict").TensorDict(tensors, batch_size=[len(tensors["x"])])


@pytest.mark.parametrize("kind", [dict, AttributeDict, StrictAttributeDict, tensor_dict])
def test_arrays_in_a_dict_with_attributes_are_those_of_a_dict(kind):
    losses = []
    for make in (dict, kind):
        torch.manual_seed(0)
        model = compiled(ByName(), nn.MSELoss())
        features = make(x=torch.as_tensor(DENSE))
        batches = [(features, TARGET)]
        losses.append(model.fit(2, batches, verbose=0)["loss"].tolist())
        losses[-1] += [model.evaluate((features, TARGET), batch_size=8)["val_loss"]]
        losses[-1] += model.predict(batches).flatten().tolist()
    assert losses[0] == losses[1]


# --- memory ---------------------------------------------------------------------------------------


def own_memory():
    """Bytes of memory that are no file's."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists() or "RssAnon" not in status.read_text():
        pytest.skip("needs Linux's /proc")
    return int(status.read_text().partition("RssAnon:")[2].split()[0]) * 1024


class Highest(minikeras.Callback):
    """The most memory that there was at any batch's end."""

    def on_fit_begin(self):
        self.bytes = 0

    def on_batch_end(self, batch, logs):
        self.bytes = max(self.bytes, own_memory())


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", ">f4"])
@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_memmap_is_read_batch_by_batch(tmp_path, dtype, mode):
    width = 512
    rows = 80_000 // np.dtype(dtype).itemsize  # a file of 41 MB
    path = tmp_path / "x.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(rows, width)).flush()
    X = np.load(path, mmap_mode=mode)
    y = torch.zeros(rows, 1)

    class AsFloats(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(width, 1)

        def forward(self, x):
            return self.fc(x.float())

    model = compiled(minikeras.Model(AsFloats()), nn.MSELoss(), lr=0.0)
    model.fit(1, (X[:512], y[:512]), (X[:512], y[:512]), batch_size=256, verbose=0)
    before = own_memory()
    highest = Highest()
    expected = model.net.fc.bias.item()
    assert model.fit(1, (X, y), batch_size=256, verbose=0, callbacks=[highest])["loss"].iloc[
        -1
    ] == pytest.approx(expected**2, rel=1e-5)
    assert model.evaluate((X, y), batch_size=256)["val_loss"] == pytest.approx(
        expected**2, rel=1e-5
    )
    grown = max(highest.bytes, own_memory()) - before
    assert grown < rows * width * np.dtype(dtype).itemsize / 2
    assert model.predict(X, batch_size=256).shape == (rows, 1)


HANDED_OVER = """
import resource, sys
import numpy as np, pandas as pd, torch, minikeras
from minikeras import sources
from minikeras.data.in_memory import FastFetch
as_batches = lambda *args: sources.as_batches(*args, fetch=FastFetch())
rows, width = 40_000, 512
kind, dtype = sys.argv[1:]
array = np.ones((rows, width), dtype)
if kind == "array":
    X = array
elif kind == "frame":
    X = pd.DataFrame(array, copy=False)
elif kind == "mixed":
    ones = pd.DataFrame({"a": np.ones(rows, "float32")})
    X = pd.concat([pd.DataFrame(array, copy=False), ones], axis=1)
else:
    X = pd.DataFrame({str(number): array[:, number].copy() for number in range(width)})
next(iter(as_batches(pd.DataFrame(np.ones((9, 2))), "dl", 4)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
batch = next(iter(as_batches(X, "dl", 256)))
assert batch.float().mean() == 1
grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(grown / (rows * width * np.dtype(dtype).itemsize))
"""


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("array", "float64"),
        ("array", "int16"),
        ("frame", "float32"),
        ("frame", "bool"),
        ("columns", "float64"),
        ("mixed", "bool"),
    ],
)
def test_arrays_and_dataframes_cost_at_most_twice_their_memory(kind, dtype):
    if not sys.platform.startswith("linux"):
        pytest.skip("counts in Linux's units")
    run = subprocess.run(
        [sys.executable, "-c", HANDED_OVER, kind, dtype], capture_output=True, text=True, check=True
    )
    copies = float(run.stdout)
    most = 1.25 if kind != "array" or dtype == "float64" else 0.3  # of the size of X, beside itself
    assert copies < most


# --- what is refused, and what comes of its remedy ------------------------------------------------


def test_masked_array_is_refused_until_it_is_filled():
    X = np.ma.masked_greater(DENSE, 0.9)
    hidden = int(np.ma.count_masked(X))
    words = (
        rf"dl_train holds a masked array with {hidden} of 60 values masked; "
        r".* Pass array.filled\(0\)"
    )
    refused(ValueError, (X, TARGET), words)
    refused(ValueError, [(X, TARGET)], "holds a masked array")  # in a batch as well
    expected = np.where(DENSE > 0.9, 0, DENSE)
    np.testing.assert_array_equal(trained_on(X.filled(0))[1], trained_on(expected)[1])


BASE = pd.DataFrame(DENSE[:, :2], columns=["a", "b"])
DATES = pd.Series(pd.date_range("2020", periods=ROWS))
SPANS = pd.Series(pd.to_timedelta(range(ROWS), "h"))
CITY = pd.Series(["Rome", "Oslo"] * (ROWS // 2))


def seconds(column):
    return (column - column.min()).dt.total_seconds()


ODD_COLUMNS = {
    "text": (CITY, r"columns that are not numbers: c\. .*get_dummies\(frame, dtype=float\)", None),
    "categories": (CITY.astype("category"), "columns that are not numbers: c", None),
    "text as codes": (
        CITY,
        r"pandas\.Index\(categories\)\.get_indexer\(column\) \+ 1",
        lambda c: pd.Index(sorted(CITY.unique())).get_indexer(c) + 1,
    ),
    "dates": (
        pd.Series(pd.date_range("2020", periods=ROWS)),
        r"\(column - column.min\(\)\)\.dt\.total_seconds",
        seconds,
    ),
    "time spans": (
        pd.Series(pd.to_timedelta(range(ROWS), "h")),
        r"column\.dt\.total_seconds",
        lambda c: c.dt.total_seconds(),
    ),
    "missing integers": (
        pd.Series([None, *range(ROWS - 1)], dtype="Int64"),
        r"missing in c \(1\)",
        lambda c: c.fillna(0),
    ),
    "missing bools": (
        pd.Series([None, True] * (ROWS // 2), dtype="boolean"),
        r"missing in c \(10\).*frame.astype\('float64'\).fillna\(0\)",
        None,
    ),
}


@pytest.mark.parametrize(("column", "words", "remedy"), ODD_COLUMNS.values(), ids=ODD_COLUMNS)
def test_dataframe_column_that_is_no_number_is_named_and_the_remedy_works(column, words, remedy):
    frame = BASE.assign(c=column)
    refused((TypeError, ValueError), (frame, TARGET), f"dl_train.*{words}")
    if "missing" in words:
        mended = (
            frame.astype("float64").fillna(0) if "bool" in str(column.dtype) else frame.fillna(0)
        )
    elif remedy is None:
        mended = pd.get_dummies(frame, dtype=float)
    else:
        mended = frame.assign(c=remedy(column) / 1e7)
    width = mended.shape[1]
    assert np.isfinite(trained_on(mended, width=width)[0]).all()


def test_dataframe_of_text_alone_becomes_numbers_by_the_remedy():
    frame = pd.DataFrame({"c": CITY, "d": CITY})
    refused(TypeError, (frame, TARGET), r"pandas.get_dummies\(frame, dtype=float\)")
    assert np.isfinite(trained_on(pd.get_dummies(frame, dtype=float), width=4)[0]).all()


def test_series_of_missing_labels_is_refused():
    labels = pd.Series([None] + [1] * (ROWS - 1), dtype="Int64")
    refused(ValueError, (DENSE, labels), "dl_train: 1 of 20 values are missing")
    tensor = as_tensor(labels.astype("float64"))
    assert torch.isnan(tensor).tolist() == [True] + [False] * (ROWS - 1)
    assert as_tensor(labels.fillna(0)).tolist() == [0] + [1] * (ROWS - 1)


ODD_ARRAYS = {
    "text": (
        np.array(["cat", "dog"] * 10),
        r"pandas.factorize\(array\)\[0\]",
        lambda array: pd.factorize(array)[0],
    ),
    "objects": (
        np.array(["cat", None] * 10, object),
        "objects",
        lambda array: pd.factorize(array)[0],
    ),
    "written numbers": (
        np.array(["1", "2.5"] * 10),
        r"array.astype\('float32'\)",
        lambda array: array.astype("float32"),
    ),
    "dates": (
        np.arange("2020-01-01", "2020-01-21", dtype="M8[D]"),
        r"\(array - array.min\(\)\) / numpy.timedelta64\(1, 'D'\)",
        lambda array: (array - array.min()) / np.timedelta64(1, "D"),
    ),
    "missing": (
        np.array([1.0, None] * 10, object),
        "10 missing values",
        lambda array: pd.DataFrame(array).fillna(0).astype("float32"),
    ),
    "rows of two lengths": (
        np.array([np.zeros(2), np.zeros(3)] * 10, dtype=object),
        r"numpy.stack\(rows\)",
        lambda array: np.stack([np.pad(row, (0, 3 - len(row))) for row in array]),
    ),
}


@pytest.mark.parametrize(("array", "words", "remedy"), ODD_ARRAYS.values(), ids=ODD_ARRAYS)
def test_arrays_that_are_not_of_numbers_are_refused_and_the_remedy_works(array, words, remedy):
    refused((TypeError, ValueError), (DENSE, array), f"dl_train.*{words}")
    assert len(as_tensor(remedy(array))) == ROWS


def test_arrays_of_text_in_two_columns_become_numbers_by_the_remedy():
    array = np.array([["a", "1"], ["b", "2"]] * 10)
    refused(
        TypeError,
        (array, TARGET),
        r"pandas.get_dummies\(pandas.DataFrame\(array\).infer_objects\(\), dtype=float\)",
    )
    assert as_tensor(pd.get_dummies(pd.DataFrame(array).infer_objects(), dtype=float)).shape == (
        ROWS,
        4,
    )


def test_dataframe_of_many_bools_and_a_float_gives_the_same_batches_fetched_or_copied(monkeypatch):
    frame = pd.DataFrame({"a": DENSE[:, 0], "b": DENSE[:, 1] > 0, "c": DENSE[:, 2] > 0})
    expected = trained_on(frame)
    monkeypatch.setattr("minikeras.data.arrays.LARGE", 0)
    for theirs, plain in zip(trained_on(frame), expected, strict=True):
        np.testing.assert_array_equal(theirs, plain)


def test_dataset_of_sparse_tensors_raises_an_error_that_says_what_to_pass():
    X = torch.as_tensor(DENSE).to_sparse()
    with pytest.raises(RuntimeError) as error:
        regression().fit(1, TensorDataset(X, TARGET), verbose=0)
    assert (
        "Pass the tensors to fit, (X, y): their rows are fetched batch by batch."
        in error.value.__notes__
    )
    trained_on(X)


def test_list_of_texts_raises_an_error_that_says_how_to_make_class_numbers():
    labels = ["cat", "dog"] * (ROWS // 2)
    refused(
        TypeError,
        (DENSE, labels),
        r"holds the text 'cat'.*pandas.factorize\(numpy.array\(labels\)\)\[0\]",
    )
    model = compiled(minikeras.Model(nn.Linear(3, 2)), nn.CrossEntropyLoss())
    model.fit(1, (DENSE, pd.factorize(np.array(labels))[0]), verbose=0)


def test_batch_without_features_raises_an_error():
    refused(ValueError, [(None, TARGET)], "the first part of a batch is None")


@pytest.mark.parametrize("number", [torch.tensor(1.0), np.array(1.0)])
def test_one_number_as_data_is_refused_and_the_remedy_makes_it_a_row(number):
    words = r"dl holds .* expected an? (tensor|array) with the rows first. .* \.?.*reshape\(1, 1\)"
    refused(ValueError, number, words, verb=lambda model, data: model.predict(data))
    assert regression(width=1).predict(number.reshape(1, 1)).shape == (1, 1)


def test_labels_of_shape_1_n_raise_an_error_that_says_to_make_a_column():
    refused(ValueError, (DENSE, TARGET.T), "A column has shape .rows, 1.: pass y.T")
    regression().fit(1, (DENSE, TARGET.T.T), verbose=0)


NO_DATA = {
    "a path": (
        "data.csv",
        TypeError,
        "is the path 'data.csv'; expected data. Read it first: frame = pandas.read_csv",
    ),
    "a Path": (
        pathlib.Path("x.npy"),
        TypeError,
        r"is the path 'x.npy'.*numpy.load\('x.npy', mmap_mode='r'\)",
    ),
    "bytes": (b"abc", TypeError, r"is 3 bytes; .* numpy.frombuffer\(data, dtype=numpy.uint8\)"),
    "a text": ("some words", TypeError, "is the text 'some words'; expected an array of numbers"),
    "a set": ({1.0, 2.0}, TypeError, "is a set, which has no order"),
    "a class": (
        DataLoader,
        TypeError,
        r"is the class DataLoader; expected an instance. Pass DataLoader\(...\)",
    ),
    "paths": (
        ["a.png", "b.png"],
        TypeError,
        "is a list of str; .* whose __getitem__ reads one of them",
    ),
    "a path for X": (("x.npy", TARGET), TypeError, "holds the path 'x.npy'"),
    "a set for X": (({1, 2}, TARGET), TypeError, "holds a set"),
    "no X": ((None, TARGET), TypeError, "holds None"),
    "a tensor without values": (
        (torch.empty(ROWS, 3, device="meta"), TARGET),
        ValueError,
        "holds a tensor on the meta device",
    ),
}


@pytest.mark.parametrize(("data", "kind", "words"), NO_DATA.values(), ids=NO_DATA)
def test_data_of_a_wrong_type_is_refused_by_the_arguments_name_before_an_epoch(data, kind, words):
    refused(kind, data, f"^dl_train {words}")
    refused(
        kind,
        data,
        f"^dl_val {words}",
        lambda model, data: model.fit(1, (DENSE, TARGET), data, verbose=0),
    )
    refused(kind, data, f"^dl_val {words}", lambda model, data: model.evaluate(data))
    refused(kind, data, f"^dl {words}", lambda model, data: model.predict(data))


def test_path_as_data_is_refused_and_the_remedies_read_the_file(tmp_path):
    path = tmp_path / "data.csv"
    BASE.assign(label=TARGET[:, 0].numpy()).to_csv(path, index=False)
    with pytest.raises(TypeError) as error:
        regression(2).fit(1, path, verbose=0)
    names = {"pandas": pd, "numpy": np, "torch": torch}
    line = str(error.value).partition("Read it first: ")[2].partition(". Then")[0]
    exec(line, names)
    frame = names["frame"]
    expression = str(error.value).partition("as (X, y): ")[2].removesuffix(".")
    data = eval(expression, {"frame": frame})
    np.testing.assert_allclose(
        trained_on(*data, width=2)[1], trained_on(BASE, width=2)[1], rtol=1e-5
    )
    array = tmp_path / "x.npy"
    np.save(array, DENSE)
    with pytest.raises(TypeError) as error:
        regression().predict(str(array))
    exec(str(error.value).partition("Read it first: ")[2].removesuffix("."), names)
    np.testing.assert_array_equal(trained_on(names["X"])[1], trained_on(DENSE)[1])


def test_polars_frame_that_cannot_be_used_says_why():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"a": [1.5] * ROWS, "city": ["Rome"] * ROWS})
    refused(TypeError, (frame, TARGET), "columns that are not numbers: city")
    refused(
        TypeError, frame.lazy(), r"LazyFrame, which is not computed yet. Pass dl_train.collect\(\)"
    )
    missing = polars.DataFrame({"a": [1, None] * (ROWS // 2), "b": [0.5] * ROWS})
    refused(ValueError, (missing, TARGET), r"missing in a \(10\).*frame.fill_null\(0\)")
    assert np.isfinite(trained_on(missing.fill_null(0), width=2)[0]).all()


class Frame:
    """A frame of another library: columns by name, each with to_numpy."""

    def __init__(self, columns):
        self.by_name = columns

    @property
    def columns(self):
        return list(self.by_name)

    def __getitem__(self, name):
        return types.SimpleNamespace(to_numpy=lambda: self.by_name[name])

    def to_numpy(self):
        return np.stack(list(self.by_name.values()), axis=1)


def test_dataframe_of_any_library_is_read_by_its_columns():
    frame = Frame(dict(zip("abc", DENSE.T, strict=True)))
    np.testing.assert_array_equal(trained_on(frame)[1], trained_on(DENSE)[1])
    frame.by_name["c"] = CITY.to_numpy(object)
    refused(TypeError, (frame, TARGET), "columns that are not numbers: c")
