"""The rows of a batch of any structure: means, steps and predictions are over all rows."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers.compare import assert_equal_tensors
from helpers.compiling import FAST
from helpers.models import compiled
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import minikeras
from minikeras import Average
from minikeras.rows import RowCounter, UnknownRows, count_rows

LR = 0.1


class Mean(nn.Module):
    """Images of any size in a list, one number for each."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, images):
        return torch.stack([self.fc(image.mean((1, 2)))[0] for image in images])


class Bag(nn.Module):
    """Tokens in a row, with the offsets of the rows."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 4)
        self.fc = nn.Linear(4, 1)

    def forward(self, tokens, offsets):
        return self.fc(self.bag(tokens, offsets))[:, 0]


class TimeFirst(nn.Module):
    """(time, rows, 2) features."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, x):
        return self.fc(x.mean(0))[:, 0]


class Rows(nn.Module):
    """(rows, 2) features."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, x):
        return self.fc(x)[:, 0]


class Sequence(Rows):
    """One sequence a batch, without a dimension for the rows."""

    def forward(self, x):
        return self.fc(x.mean(0))


class Cloud(Rows):
    """Points in a row, and for each the number of its cloud."""

    def forward(self, points, number):
        sums = torch.zeros(int(number.max()) + 1, 2).index_add(0, number, points)
        return self.fc(sums)[:, 0]


class Packed(Rows):
    def forward(self, x):
        padded, lengths = nn.utils.rnn.pad_packed_sequence(x, batch_first=True)
        return self.fc(padded.sum(1) / lengths[:, None])[:, 0]


class Boxed(dict):
    """A custom batch that says how many rows it has."""


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


class OfPair(Rows):
    def forward(self, batch):
        return self.fc(torch.stack([batch.left, batch.right], 1))[:, 0]


def bare(labels):
    return labels


def values(labels):
    return torch.stack([label["value"] for label in labels])


SIZES = (4, 3, 1)


def images(rows, channels=3):
    return [torch.rand(channels, 4 + row, 5) for row in range(rows)]


def tokens(rows, length):
    return torch.randint(20, (rows * length,)), torch.arange(rows) * length


def boxes(rows, counts=None):
    counts = counts or [1 + row % 3 for row in range(rows)]
    return [{"boxes": torch.rand(count, 4), "value": torch.randn(())} for count in counts]


# name: net, batches of 4, 3 and 1 rows, how the labels become one tensor of the rows
KINDS = {
    "images in a list, dicts as labels": (Mean, [(images(n), boxes(n)) for n in SIZES], values),
    "as many boxes as channels": (
        Mean,
        [(images(n), boxes(n, [3] * n if n < 4 else [3, 1, 2, 3])) for n in SIZES],
        values,
    ),
    "images in a list, numbers as labels": (
        Mean,
        [(images(n), [torch.randn(()) for _ in range(n)]) for n in SIZES],
        torch.stack,
    ),
    "images in a tuple, Python numbers as labels": (
        Mean,
        [(tuple(images(n)), [0.5 * row for row in range(n)]) for n in SIZES],
        torch.tensor,
    ),
    "images in a list, masks of all sizes": (
        Mean,
        [(images(n), [image[:1].round() for image in images(n)]) for n in SIZES],
        lambda masks: torch.stack([mask.mean() for mask in masks]),
    ),
    "images in one tensor, boxes in a list": (
        Mean,
        [(torch.rand(n, 3, 4, 4), [torch.rand(1 + row, 4) for row in range(n)]) for n in SIZES],
        lambda found: torch.stack([box.mean() for box in found]),
    ),
    "labels in a dict, tokens and offsets": (
        Bag,
        [
            ((torch.randint(20, (n * t,)), torch.arange(n) * t), {"y": torch.randn(n)})
            for n, t in ((4, 2), (3, 5), (1, 9))
        ],
        lambda labels: labels["y"],
    ),
    "labels alone, tokens and offsets": (
        Bag,
        [(tokens(n, t), torch.randn(n)) for n, t in ((4, 2), (3, 5), (1, 9))],
        bare,
    ),
    "time first, labels in a dict": (
        TimeFirst,
        [
            (torch.randn(7, n, 2), {"y": torch.randn(n), "temperature": torch.tensor(2.0)})
            for n in SIZES
        ],
        lambda labels: labels["y"],
    ),
    "time first, other lengths": (
        TimeFirst,
        [(torch.randn(5 + n, n, 2), torch.randn(n)) for n in SIZES],
        bare,
    ),
    "two outputs in a list": (
        Rows,
        [(torch.randn(n, 2), [torch.randn(n), torch.randn(n, 3)]) for n in SIZES],
        lambda labels: labels[0],
    ),
    "two outputs of one shape in a tuple": (
        Rows,
        [(torch.randn(n, 2), (torch.randn(n), torch.randn(n))) for n in SIZES],
        lambda labels: labels[1],
    ),
    "labels in a dataclass": (
        Rows,
        [(torch.randn(n, 2), Pair(torch.randn(n), torch.randn(n))) for n in SIZES],
        lambda labels: labels.left,
    ),
    "features in a dataclass": (
        OfPair,
        [(Pair(torch.randn(n), torch.randn(n)), torch.randn(n)) for n in SIZES],
        bare,
    ),
    "one sequence and a number": (
        Sequence,
        [(torch.randn(n, 2), torch.randn(())) for n in (3, 40, 2)],
        lambda y: y[None],
    ),
    "one sequence and a Python number": (
        Sequence,
        [(torch.randn(n, 2), 0.1 * n) for n in (3, 40, 2)],
        lambda y: torch.tensor([y]),
    ),
    "one sequence and one label": (
        Sequence,
        [(torch.randn(n, 2), torch.randn(1)) for n in (3, 40, 2)],
        bare,
    ),
    "points and the numbers of their clouds": (
        Cloud,
        [((torch.randn(9 * n + 1, 2), torch.arange(9 * n + 1) % n), torch.randn(n)) for n in SIZES],
        bare,
    ),
    "packed sequences": (
        Packed,
        [
            (pack_sequence([torch.randn(9 - row, 2) for row in range(n)]), {"y": torch.randn(n)})
            for n in SIZES
        ],
        lambda labels: labels["y"],
    ),
}


def mse(as_tensor):
    return lambda y_pred, y_true: ((y_pred - as_tensor(y_true)) ** 2).mean()


def mae(as_tensor):
    return lambda y_pred, y_true: (y_pred - as_tensor(y_true)).abs().mean()


def outputs_of(net, features):
    if isinstance(features, tuple) and isinstance(net, (Bag, Cloud)):
        return net(*features)
    return net(features)


def errors_of(net, batches, as_tensor):
    """The error of each row, of all batches."""
    return torch.cat([outputs_of(net, x) - as_tensor(y) for x, y in batches])


@pytest.mark.parametrize(("kind", "batches", "as_tensor"), KINDS.values(), ids=KINDS)
def test_rows_weigh_alike_in_evaluate_and_history(kind, batches, as_tensor):
    net = kind()
    model = minikeras.Model(net)
    model.compile(
        mse(as_tensor),
        torch.optim.SGD(net.parameters(), lr=0.0),
        {"mae": mae(as_tensor)},
        device="cpu",
    )
    with torch.no_grad():
        errors = errors_of(net, batches, as_tensor).double()
    expected = {"loss": errors.square().mean().item(), "mae": errors.abs().mean().item()}
    for order in (batches, batches[::-1]):
        assert model.evaluate(order) == pytest.approx(
            {f"val_{k}": v for k, v in expected.items()}, rel=1e-5
        )
        assert model.fit(1, order, verbose=0).iloc[-1].to_dict() == pytest.approx(
            expected, rel=1e-5
        )


@pytest.mark.parametrize(("kind", "batches", "as_tensor"), KINDS.values(), ids=KINDS)
def test_rows_of_accumulated_batches_make_one_step(kind, batches, as_tensor):
    net = kind()
    twin = copy.deepcopy(net)
    model = minikeras.Model(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    model.compile(mse(as_tensor), optimizer, device="cpu", accumulate=3)
    model.fit(1, batches, verbose=0)
    step = torch.optim.SGD(twin.parameters(), lr=LR)
    errors_of(twin, batches, as_tensor).square().mean().backward()
    step.step()
    for own, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("together", [1, 2])
def test_rows_of_labels_in_a_dict_are_counted_under_jit(together):
    kind, batches, as_tensor = KINDS["time first, labels in a dict"]
    batches = [*batches[:1] * 3, *batches[1:]]
    net = kind()
    model = minikeras.Model(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    model.compile(mse(as_tensor), optimizer, device="cpu", jit=FAST, steps_per_execution=together)
    with torch.no_grad():
        expected = errors_of(net, batches, as_tensor).square().mean().item()
    assert model.fit(1, batches, verbose=0)["loss"].iloc[0] == pytest.approx(expected, rel=1e-5)
    assert model.evaluate(batches)["val_loss"] == pytest.approx(expected, rel=1e-5)


class Flat(nn.Module):
    """Scores of (rows, time, 2) features, in one dimension."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, x):
        return self.fc(x).flatten()


@pytest.mark.parametrize("time", [lambda n: 5, lambda n: 2 + n], ids=["fixed", "padded by batch"])
def test_rows_of_labels_flattened_by_the_collate_function_are_counted_each(time):
    batches = [(torch.randn(n, time(n), 2), torch.randn(n * time(n))) for n in SIZES]
    model = compiled(minikeras.Model(Flat()), mse(bare))
    with torch.no_grad():
        expected = torch.cat([model(x) - y for x, y in batches]).square().mean().item()
    assert model.evaluate(batches)["val_loss"] == pytest.approx(expected, rel=1e-5)


# --- what cannot be told --------------------------------------------------------------------------


def found_boxes(counts):
    """Images in a tensor, and all their boxes in one tensor, as one-stage detectors have them."""
    return [(torch.rand(8, 3, 6, 6), torch.rand(count, 6)) for count in counts]


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, images):
        return self.fc(images.mean((2, 3)))[:, 0]


def box_loss(y_pred, y_true):
    return y_pred.square().mean() + y_true.mean()


def as_average(y_pred, y_true):
    return Average(box_loss(y_pred, y_true) * len(y_pred), len(y_pred))


TOLD = "the rows of a batch, over which the means are taken, cannot be told"


@pytest.mark.parametrize("verb", ["fit", "evaluate"])
@pytest.mark.parametrize("counts", [(13, 9), (5, 7), (0, 3), (16, 9), (8, 5)], ids=str)
def test_rows_of_labels_in_other_units_than_the_features_are_refused_and_an_average_helps(
    verb, counts
):
    batches = found_boxes(counts)
    model = compiled(minikeras.Model(Detector()), box_loss)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=TOLD):
        model.fit(1, batches, verbose=0) if verb == "fit" else model.evaluate(batches)
    if counts[0] not in (8, 16):  # which may be a number for each image
        assert_equal_tensors(model.state_dict(), before)
    compiled(model, as_average)
    counted = [(x, y) for x, y in batches if len(y)]
    expected = sum(box_loss(model(x), y).item() for x, y in counted) / len(counted)
    assert model.evaluate(counted)["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_rows_are_needed_by_a_metric_that_is_no_average():
    model = compiled(minikeras.Model(Detector()), as_average, {"m": lambda p, t: p.mean()})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=TOLD):
        model.fit(1, found_boxes((13, 9)), verbose=0)
    assert_equal_tensors(model.state_dict(), before)


def test_rows_are_counted_by_a_batch_size_of_the_batch():
    class OfDict(Detector):
        def forward(self, batch):
            return super().forward(batch["images"])

    batches = found_boxes((13, 9, 7))
    batches[2] = (batches[2][0][:3], batches[2][1])
    told = []
    for x, y in batches:
        batch = Boxed(images=x)
        batch.batch_size = len(x)
        told.append((batch, y))
    model = compiled(minikeras.Model(OfDict()), box_loss)
    with torch.no_grad():
        expected = sum(box_loss(model({"images": x}), y).item() * len(x) for x, y in batches) / 19
    assert model.evaluate(told)["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_rows_first_in_the_labels_are_the_other_remedy():
    batches = [(x, y) for x, y in found_boxes((13, 9))]
    padded = [(x, {"boxes": torch.zeros(8, 20, 6), "count": torch.ones(8)}) for x, _ in batches]
    model = compiled(
        minikeras.Model(Detector()), lambda p, t: p.square().mean() + t["boxes"].mean()
    )
    with torch.no_grad():
        expected = sum(model(x).square().mean().item() for x, _ in batches) / 2
    assert model.evaluate(padded)["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_rows_of_targets_in_one_tensor_beside_time_first_features_are_refused():
    batch = (
        (torch.randn(7, 4, 2), torch.full((4,), 7)),
        (torch.randint(5, (11,)), torch.tensor([3, 5, 1, 2])),
    )
    assert isinstance(count_rows(*batch), UnknownRows)
    (x, lengths), labels = batch
    assert count_rows((x.transpose(0, 1), lengths), labels) == 4  # rows first: the features tell


def test_rows_in_a_list_that_is_taken_one_way_and_turns_out_the_other_raise_an_error():
    """Two lists of two tensors of one first size: two inputs and two outputs, or two rows."""
    counter = RowCounter()
    assert (
        counter.count([torch.zeros(4, 2), torch.zeros(4, 2)], [torch.zeros(4), torch.zeros(4)]) == 4
    )
    assert (
        counter.count([torch.zeros(3, 2), torch.zeros(3, 2)], [torch.zeros(3), torch.zeros(3)]) == 3
    )
    rows = counter.count([torch.zeros(3, 2)], [torch.zeros(3)])  # one item less, and as many values
    assert isinstance(rows, UnknownRows)
    assert "number of its items" in rows.why


def test_rows_of_a_single_image_are_one_after_batches_that_were_clear():
    counter = RowCounter()
    assert (
        counter.count(
            images(4), [torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(1, 4), torch.zeros(3, 4)]
        )
        == 4
    )
    assert counter.count(images(2), [torch.zeros(3, 4), torch.zeros(3, 4)]) == 2
    assert counter.count(images(1), [torch.zeros(3, 4)]) == 1


# --- predict --------------------------------------------------------------------------------------


class Of(minikeras.Model):
    """The model of one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


X = torch.arange(1.0, 25.0).reshape(12, 2)
SPLITS = (12, 6, 5, 4, 3, 2, 1)

JOINED = {
    "rows": lambda x: 2 * x,
    "three rows each": lambda x: x.repeat_interleave(3, 0),
    "as wide as the batch": lambda x: x[:, :1].expand(-1, 4),
    "rows and None": lambda x: (x, None),
    "a dict": lambda x: {"a": x, "b": x.sum(1)},
    "two heads": lambda x: [x, -x],
    "one head": lambda x: [x],
    "an item for each row": lambda x: [row.repeat(int(row[0]) % 3 + 1, 1) for row in x],
    "items of one shape": lambda x: list(x),
    "a tuple of items": lambda x: x.unbind(),
    "dicts for each row": lambda x: [
        {"boxes": row.repeat(int(row[0]) % 3 + 1, 1), "name": str(int(row[0]))} for row in x
    ],
    "words": lambda x: {"words": [str(row.tolist()) for row in x]},
    "packed sequences": lambda x: pack_sequence(
        [row[:1].repeat(int(row[0]) % 3 + 1, 1) for row in x], False
    ),
}


def same(one, other):
    if isinstance(one, PackedSequence):
        return all(
            same(a, b)
            for a, b in zip(
                nn.utils.rnn.unpack_sequence(one), nn.utils.rnn.unpack_sequence(other), strict=True
            )
        )
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("function", JOINED.values(), ids=JOINED)
@pytest.mark.parametrize("size", SPLITS)
def test_predict_joins_outputs_in_the_same_way_for_every_batch_size(function, size):
    assert same(Of(function).predict(X, batch_size=size), function(X))


REFUSED = {
    "a table": lambda x: {"rows": x, "table": torch.ones(4, 3)},
    "a mean over the batch": lambda x: x.mean(0),
    "a mean with its dimension": lambda x: x.mean(0, keepdim=True),
    "a number": lambda x: (x, x.sum()),
    "a Python number": lambda x: (x, 0.5),
    "a matrix of all pairs": lambda x: x @ x.T,
    "all pairs": lambda x: F.pdist(x),
    "time first": lambda x: x.expand(3, *x.shape),
    "those that are kept": lambda x: x[x[:, 0] % 3 > 1],
}


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("size", SPLITS)
def test_predict_refuses_outputs_that_are_not_one_a_row_for_every_batch_size(function, size):
    with pytest.raises(ValueError, match=r"the model returned|rows of different shapes"):
        Of(function).predict(X, batch_size=size)


def test_predict_of_a_table_has_remedies_that_work():
    class Table(minikeras.Model):
        def forward(self, x):
            return (x, torch.ones(4, 3)) if self.training else x

    assert torch.equal(Table().predict(X, batch_size=4), X)
    assert Of(lambda x: (x, torch.ones(4, 3).expand(len(x), -1, -1))).predict(X, batch_size=4)[
        1
    ].shape == (12, 4, 3)


@pytest.mark.parametrize("first", [True, False])
def test_predict_refuses_a_part_that_is_none_in_some_batches(first):
    model = Of(lambda x: {"x": x, "aux": None if bool(x[0, 0] == 1) == first else x})
    with pytest.raises(
        ValueError, match=r"is None in one batch and Tensor \(4, 2\) float32 in another"
    ):
        model.predict(X, batch_size=4)


def test_predict_probes_without_a_trace():
    calls = []

    def noisy(x):
        calls.append(len(x))
        return x[:, 0] + torch.rand(())

    torch.manual_seed(0)
    outputs = Of(noisy).predict(X, batch_size=4)
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(outputs, torch.cat([part[:, 0] + torch.rand(()) for part in X.split(4)]))
    assert torch.equal(after, torch.rand(()))
    assert calls == [4, 4, 4, 2]


def test_predict_of_one_batch_runs_the_model_once():
    calls = []
    model = Of(lambda x: calls.append(len(x)) or x)
    model.predict(X)
    model.predict(X[:1])
    model.predict(X, batch_size=5)
    assert calls == [12, 1, 5, 5, 2]


def test_predict_ignores_labels():
    X = torch.rand(8, 3, 6, 6)
    model = minikeras.Model(Detector())
    loader = [(X[:4], torch.rand(13, 6)), (X[4:], torch.rand(9, 6))]
    torch.testing.assert_close(model.predict(loader), model(X).detach())
    assert minikeras.Model(Bag()).predict([(tokens(4, 3),), (tokens(3, 2),)]).shape == (7,)


class Squeezed(nn.Module):
    def __init__(self, dim=None):
        super().__init__()
        self.fc = nn.Linear(2, 1)
        self.dim = dim

    def forward(self, x):
        return self.fc(x).squeeze() if self.dim is None else self.fc(x).squeeze(self.dim)


LOSSES = [nn.BCEWithLogitsLoss(), nn.MSELoss(), lambda p, t: ((p - t) ** 2).mean()]


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("verb", ["fit", "evaluate"])
@pytest.mark.parametrize("loss_func", LOSSES)
def test_squeeze_of_a_last_row_raises_an_error_with_a_remedy_that_works(verb, loss_func):
    y = (torch.arange(9) % 2).float()
    data = [(X[start : start + 4], y[start : start + 4]) for start in range(0, 9, 4)]
    data[2] = (X[8:9], y[8:9])

    def run(model):
        compiled(model, loss_func)
        return model.fit(1, data, verbose=0) if verb == "fit" else model.evaluate(data)

    if isinstance(loss_func, nn.BCEWithLogitsLoss):
        with pytest.raises(ValueError, match=r"Name the dimension in forward: squeeze\(-1\)"):
            run(minikeras.Model(Squeezed()))
    else:
        with pytest.warns(UserWarning, match=r"Name the dimension in forward: squeeze\(-1\)"):
            run(minikeras.Model(Squeezed()))
    run(minikeras.Model(Squeezed(-1)))


@pytest.mark.parametrize("rows", [9, 1])
def test_squeeze_of_a_last_row_in_predict_raises_an_error(rows):
    with pytest.raises(ValueError, match=r"Name the dimension in forward: squeeze\(-1\)"):
        minikeras.Model(Squeezed()).predict(X[:rows], batch_size=4)
    assert minikeras.Model(Squeezed(-1)).predict(X[:rows], batch_size=4).shape == (rows,)
    # no batch of one row
    assert minikeras.Model(Squeezed()).predict(X, batch_size=4).shape == (12,)


class Cache:
    """A key-value cache as transformers has it: tensors that torch does not see."""

    def __init__(self, keys):
        self.keys = keys

    def get_seq_length(self):
        return self.keys.shape[-1]


def test_predict_leaves_key_value_caches_out():
    outputs = Of(lambda x: {"logits": x, "past_key_values": Cache(x)}).predict(X, batch_size=5)
    assert torch.equal(outputs["logits"], X)
    assert outputs["past_key_values"] is None


def test_predict_refuses_an_object_that_cannot_be_joined():
    with pytest.raises(ValueError, match="the model returned object in its outputs"):
        Of(lambda x: (x, object())).predict(X, batch_size=5)


def test_predict_refuses_rows_that_nothing_counts_and_takes_the_count_from_labels():
    time_first = torch.randn(7, 4, 2), torch.randn(7, 3, 2)
    model = minikeras.Model(TimeFirst())
    with pytest.raises(ValueError, match=r"shape \(4,\) for 7 rows.* give labels that have"):
        model.predict(list(time_first))
    expected = torch.cat([model(x) for x in time_first]).detach()
    assert torch.equal(model.predict([(x, torch.zeros(x.shape[1])) for x in time_first]), expected)


def transcripts(rows, time=9):
    """Time-first features; targets of all rows in one tensor, and lengths, as CTC takes them."""
    lengths = torch.tensor([1 + row % 3 for row in range(rows)])
    targets = torch.randint(1, 5, (int(lengths.sum()),))
    return torch.randn(time, rows, 2), (targets, torch.full((rows,), time), lengths)


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 5)

    def forward(self, x):
        return self.fc(x).log_softmax(-1)


def test_rows_are_not_counted_by_targets_and_lengths_in_a_tuple_and_an_average_helps():
    batches = [transcripts(rows) for rows in (4, 4, 3, 2)]
    model = compiled(minikeras.Model(Scores()), lambda p, t: F.ctc_loss(p, *t))
    with pytest.raises(ValueError, match=TOLD):
        model.evaluate(batches)
    compiled(model, lambda p, t: Average(F.ctc_loss(p, *t) * len(t[2]), len(t[2])))
    with torch.no_grad():
        losses = [F.ctc_loss(model(x), *t, reduction="none") / t[2] for x, t in batches]
    expected = torch.cat(losses).mean().item()
    assert model.evaluate(batches)["val_loss"] == pytest.approx(expected, rel=1e-5)
    # 12 is a multiple of 3
    assert isinstance(count_rows(torch.zeros(12, 5, 2), transcripts(5)[1]), UnknownRows)


def test_rows_are_counted_by_sample_weight():
    """Batches of (label, tokens, offsets), for a step of the user's own."""

    class Texts(minikeras.Model):
        def evaluate_step(self, label, text, offsets=None):
            return {"loss": F.mse_loss(self(text, offsets), label)}

    batches = []
    for counts in ([1, 2, 3, 1], [1, 2, 3], [1]):
        offsets = torch.tensor([0, *counts[:-1]]).cumsum(0)
        batches.append((torch.randn(len(counts)), torch.randint(20, (sum(counts),)), offsets))
    model = compiled(Texts(Bag()), nn.MSELoss())
    with torch.no_grad():
        errors = [model(text, offsets) - label for label, text, offsets in batches]
    expected = torch.cat(errors).square().mean().item()
    assert model.evaluate(batches)["val_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [12, 4, 3, 2])
def test_predict_refuses_time_first_outputs_if_the_labels_count_the_rows(size):
    features = torch.randn(5, 12, 2)
    batches = [(x, torch.zeros(size)) for x in features.split(size, 1)]
    model = Of(lambda x: 2 * x)
    with pytest.raises(ValueError, match=r"the rows are in dimension 1.*\.transpose\(0, 1\)"):
        model.predict(batches)
    followed = Of(lambda x: (2 * x).transpose(0, 1))
    assert torch.equal(followed.predict(batches), 2 * features.transpose(0, 1))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2), (3, 1), (4,)])
@pytest.mark.parametrize("stacked", [False, True])
def test_predict_keeps_the_detections_of_each_image_apart_at_any_batch_size(sizes, stacked):
    def detect(images):
        return [{"boxes": image[0, :2], "scores": image[0, 0, :2]} for image in images]

    batches = []
    for size in sizes:
        batch = [torch.rand(3, 4, 4) for _ in range(size)]
        if stacked:
            batch = torch.stack(batch)
        batches.append((batch, boxes(size)))
    found = Of(detect).predict(batches)
    expected = []
    for batch, _ in batches:
        expected += detect(batch)
    assert same(found, expected)


def test_predict_joins_a_last_bag_of_one_instance():
    class Bags(Rows):
        def forward(self, bag):
            return self.fc(bag.mean(0))

    for sizes in ((3, 5, 1), (3, 3, 3)):
        batches = [(torch.randn(size, 2), torch.zeros(1)) for size in sizes]
        model = minikeras.Model(Bags())
        expected = torch.cat([model(bag) for bag, _ in batches]).detach()
        assert torch.equal(model.predict(batches), expected)


def test_predict_does_not_concatenate_outputs_without_a_dimension_for_the_rows():
    # as batch_size=None gives them
    samples = [(torch.randn(3), torch.tensor(0.0)) for _ in range(4)]
    model = minikeras.Model(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"returned shape \(2,\) for 1 rows"):
        model.predict(samples)
    assert model.predict([(x[None], y[None]) for x, y in samples]).shape == (4, 2)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_predict_fires_hooks_of_the_user_for_its_batches_alone(size):
    model = minikeras.Model(
        nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))
    )
    X = torch.randn(8, 3)
    seen = []
    model.net[1].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    outputs = model.predict(X, batch_size=size)
    assert outputs.shape == (8,)
    torch.testing.assert_close(torch.cat(seen), torch.relu(model.net[0](X)))
