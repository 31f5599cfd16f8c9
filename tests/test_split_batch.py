"""compile(split_batch=function): batches of another form than (features, labels)."""

import copy
import dataclasses
import os
import re
import types
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.bad_input import Scale, refused, sgd
from helpers.bad_input import X as WIDE
from helpers.bad_input import Y as TARGETS
from helpers.bad_input import compiled as compiled_badly
from helpers.compare import assert_equal_tensors, assert_same_weights, copy_weights
from helpers.compiling import FAST
from helpers.exact import assert_exact
from helpers.models import Net, compiled, points
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import minikeras

X, y = points(22)
SIZE = 8  # the last batch has 6 rows
PAIRS = list(zip(X.split(SIZE), y.split(SIZE), strict=True))


def bare_fit(net, batches, epochs=1, lr=0.1, accumulate=1):
    """Train by a bare loop; return the mean loss over the rows of each epoch."""
    means = []
    for _ in range(epochs):
        total = 0.0
        rows = 0
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            outputs = torch.cat([net(x) for x, _ in window])
            loss = F.binary_cross_entropy(outputs, torch.cat([labels for _, labels in window]))
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                    parameter -= lr * gradient
            total += loss.item() * len(outputs)
            rows += len(outputs)
        means.append(total / rows)
    return means


class Encoded(UserDict):
    """A batch as a tokenizer gives it: a mapping that is no dict, and moves as a whole."""

    def to(self, device):
        return self


Four = namedtuple("Four", ["labels", "x", "mask", "name"])


@dataclasses.dataclass
class Named:
    x: torch.Tensor
    labels: torch.Tensor
    name: str = "a"


FORMS = {
    "dict": (
        lambda x, labels: {"x": x, "labels": labels},
        lambda batch: (batch["x"], batch["labels"]),
    ),
    "dict of features": (
        lambda x, labels: {"x": x, "labels": labels, "names": ["a"] * len(x)},
        lambda batch: ({"x": batch["x"]}["x"], batch["labels"]),
    ),
    "mapping with to": (
        lambda x, labels: Encoded({"x": x, "labels": labels}),
        lambda batch: (batch["x"], batch["labels"]),
    ),
    "labels first": (lambda x, labels: (labels, x), lambda batch: batch[::-1]),
    "triple": (
        lambda x, labels: [x, torch.arange(len(x)), labels],
        lambda batch: (batch[0], batch[2]),
    ),
    "four parts": (
        lambda x, labels: (x[:, :1], x[:, 1:], labels, "a name"),
        lambda batch: (torch.cat([batch[0], batch[1]], 1), batch[2]),
    ),
    "named tuple": (
        lambda x, labels: Four(labels, x, None, "a"),
        lambda batch: (batch.x, batch.labels),
    ),
    "dataclass": (Named, lambda batch: (batch.x, batch.labels)),
    "object": (
        lambda x, labels: types.SimpleNamespace(x=x, labels=labels),
        lambda batch: (batch.x, batch.labels),
    ),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def test_split_batch_trains_as_a_bare_loop_on_batches_of_any_form(form):
    make, split = form
    batches = [make(x, labels) for x, labels in PAIRS]
    model = Net()
    expected = copy.deepcopy(model)
    compiled(model, split_batch=split)
    dfhistory = model.fit(2, batches, batches, verbose=0)
    assert dfhistory["loss"].tolist() == pytest.approx(bare_fit(expected, PAIRS, epochs=2))
    assert_same_weights(model, expected)
    with torch.no_grad():
        loss = F.binary_cross_entropy(expected(X), y).item()
        assert model.evaluate(batches)["val_loss"] == pytest.approx(loss)
        assert dfhistory["val_loss"].iloc[-1] == pytest.approx(loss)
        torch.testing.assert_close(model.predict(batches), expected(X))


def test_split_batch_of_features_in_a_dict_passes_them_by_name():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 1)

        def forward(self, left, right):
            return torch.sigmoid(self.fc(left) - self.fc(right))

    net = Sum()
    expected = copy.deepcopy(net)
    batches = [{"right": -x, "left": x, "labels": labels} for x, labels in PAIRS]

    def split(batch):
        return {name: batch[name] for name in batch if name != "labels"}, batch["labels"]

    model = compiled(minikeras.Model(net), split_batch=split)
    model.fit(1, batches, verbose=0)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for x, labels in PAIRS:
        optimizer.zero_grad()
        F.binary_cross_entropy(expected(x, -x), labels).backward()
        optimizer.step()
    assert_same_weights(net, expected)


def test_split_batch_may_return_a_weight_per_row():
    weights = torch.arange(22) % 3 / 2
    batches = [
        {"x": x, "y": labels, "w": weight}
        for (x, labels), weight in zip(PAIRS, weights.split(SIZE), strict=True)
    ]
    model = Net()
    expected = copy.deepcopy(model)
    compiled(
        model,
        nn.BCELoss(reduction="none"),
        split_batch=lambda batch: (batch["x"], batch["y"], batch["w"]),
    )
    dfhistory = model.fit(1, batches, verbose=0)
    total = 0.0
    for batch in batches:
        losses = F.binary_cross_entropy(expected(batch["x"]), batch["y"], reduction="none")
        loss = (losses[:, 0] * batch["w"]).mean()
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        total += loss.item() * len(losses)
    assert dfhistory["loss"].tolist() == pytest.approx([total / 22])
    assert_same_weights(model, expected)


# --- what it is called with -----------------------------------------------------------------------


class Dicts(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        return {"x": X[row].numpy(), "labels": y[row], "process": os.getpid()}


@pytest.mark.parametrize("workers", [0, 1])
def test_split_batch_gets_each_batch_once_in_the_loaders_order_in_the_main_process(workers):
    seen = []

    def split(batch):
        seen.append((batch, os.getpid()))
        return batch["x"], batch["labels"]

    model = Net()
    expected = copy.deepcopy(model)
    compiled(model, split_batch=split).fit(
        1, DataLoader(Dicts(), SIZE, num_workers=workers), verbose=0
    )
    bare_fit(expected, PAIRS)
    assert_same_weights(model, expected)
    assert [batch["x"].tolist() for batch, _ in seen] == [x.tolist() for x, _ in PAIRS]
    assert {process for _, process in seen} == {os.getpid()}
    read_in = {int(process) for batch, _ in seen for process in batch["process"]}
    assert (read_in == {os.getpid()}) == (workers == 0)


def test_split_batch_gets_numpy_arrays_before_they_are_moved():
    kinds = []

    def split(batch):
        kinds.append({name: type(value).__name__ for name, value in batch.items()})
        return batch["x"], batch["labels"]

    model = Net()
    expected = copy.deepcopy(model)
    batches = [{"x": x.numpy(), "labels": labels} for x, labels in PAIRS]
    compiled(model, split_batch=split).fit(1, batches, verbose=0)
    bare_fit(expected, PAIRS)
    assert_same_weights(model, expected)
    assert kinds == [{"x": "ndarray", "labels": "Tensor"}] * 3


# --- what it combines with ------------------------------------------------------------------------

DICTS = [{"x": x, "labels": labels} for x, labels in PAIRS]


def split_dict(batch):
    return batch["x"], batch["labels"]


def test_split_batch_with_accumulate_is_a_bare_loop_over_windows():
    model = Net()
    expected = copy.deepcopy(model)
    dfhistory = compiled(model, split_batch=split_dict, accumulate=2).fit(2, DICTS, verbose=0)
    assert dfhistory["loss"].tolist() == pytest.approx(bare_fit(expected, PAIRS, 2, accumulate=2))
    assert_same_weights(model, expected)


def test_split_batch_with_steps_per_epoch_continues_where_the_epoch_stopped():
    model = Net()
    expected = copy.deepcopy(model)
    compiled(model, split_batch=split_dict).fit(2, DICTS, steps_per_epoch=2, verbose=0)
    bare_fit(expected, [*PAIRS, PAIRS[0]])
    assert_same_weights(model, expected)


IN_MEMORY = {
    "arrays": lambda: ((X[:, :1], X[:, 1:], y), 8),
    "four arrays": lambda: ((X[:, :1].numpy(), X[:, 1:], np.arange(22), y.numpy()), 8),
    "loader over tensors": lambda: (
        DataLoader(TensorDataset(X[:, :1], X[:, 1:], torch.arange(22), y), 8, shuffle=True),
        None,
    ),
    "dataset": lambda: (TensorDataset(X[:, :1], X[:, 1:], torch.arange(22), y), 8),
}


@pytest.mark.parametrize("data", IN_MEMORY)
def test_split_batch_takes_data_in_memory(data):
    data, batch_size = IN_MEMORY[data]()

    def split(batch):
        return torch.cat(list(batch[:2]), 1), batch[-1]

    model = Net()
    expected = copy.deepcopy(model)
    torch.manual_seed(3)
    dfhistory = compiled(model, split_batch=split).fit(2, data, batch_size=batch_size, verbose=0)
    plain = (X, y) if isinstance(data, tuple) else TensorDataset(X, y)
    if isinstance(data, DataLoader):
        plain = DataLoader(plain, 8, shuffle=True)
    torch.manual_seed(3)
    other = compiled(expected).fit(2, plain, batch_size=batch_size, verbose=0)
    assert dfhistory.equals(other)
    assert_equal_tensors(model.state_dict(), expected.state_dict())
    assert model.evaluate(data)["val_loss"] == pytest.approx(expected.evaluate((X, y))["val_loss"])


def test_split_batch_takes_a_dict_of_arrays():
    model = Net()
    expected = copy.deepcopy(model)
    data = {"x": X, "labels": y}
    torch.manual_seed(3)
    compiled(model, split_batch=split_dict).fit(1, data, data, batch_size=8, verbose=0)
    torch.manual_seed(3)
    compiled(expected).fit(1, (X, y), batch_size=8, verbose=0)
    assert_equal_tensors(model.state_dict(), expected.state_dict())


def test_split_batch_with_several_optimizers_and_a_custom_step():
    class Halves(Net):
        def train_step(self, features, labels, sample_weight=None):
            loss = self.compute_loss(self(features), labels)
            for name in ("first", "second"):
                self.backward(self.compute_loss(self(features), labels), name)
                self.optimizer_step(name)
            return {"loss": loss}

    model = Halves()
    expected = copy.deepcopy(model)
    for net, split, data in ((model, split_dict, DICTS), (expected, None, PAIRS)):
        optimizers = {
            "first": torch.optim.SGD(net.fc1.parameters(), lr=0.1),
            "second": torch.optim.Adam(net.fc2.parameters(), lr=0.1),
        }
        net.compile(nn.BCELoss(), optimizers, device="cpu", split_batch=split)
        net.fit(2, data, verbose=0)
    assert_equal_tensors(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("together", [1, 2])
def test_split_batch_with_jit_finds_what_eager_finds(together):
    model = Net()
    expected = copy.deepcopy(model)
    options = {"jit": FAST, "steps_per_execution": together}
    dfhistory = compiled(model, split_batch=split_dict, **options).fit(3, DICTS, DICTS, verbose=0)
    bare = bare_fit(expected, PAIRS, 3)
    assert dfhistory["loss"].tolist() == pytest.approx(bare, rel=1e-5)
    assert_same_weights(model, expected, 1e-5)


class Stream:
    """Dicts of another order in each epoch."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self):
        rows = torch.randperm(60, generator=self.generator)
        source = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        for part in rows.split(20):
            yield {"x": source[part], "labels": source[part].sum(1, keepdim=True)}


@pytest.mark.usefixtures("quick_disk")
def test_split_batch_resumes_in_the_middle_of_an_epoch(tmp_path):
    assert_exact(lambda: {"compile": {"split_batch": split_dict}, "data": Stream}, tmp_path)


# --- rows -----------------------------------------------------------------------------------------


class Sized(dict):
    """A dict that states its number of rows, which its tensors do not show."""

    def __init__(self, rows, **parts):
        super().__init__(parts)
        self.batch_size = rows


SENTENCES = [
    Sized(rows, x=x, labels=labels) for rows, (x, labels) in zip((2, 5, 1), PAIRS, strict=True)
]


@pytest.mark.parametrize("jit", [False, FAST])
def test_split_batch_rows_are_those_of_an_int_batch_size_of_the_batch(jit):
    model = Net()
    expected = copy.deepcopy(model)
    compiled(model, split_batch=split_dict, jit=jit)
    dfhistory = model.fit(1, SENTENCES, SENTENCES, verbose=0)
    losses = [bare_fit(expected, [pair])[0] for pair in PAIRS]
    mean = (2 * losses[0] + 5 * losses[1] + 1 * losses[2]) / 8
    assert dfhistory["loss"].tolist() == pytest.approx([mean])
    with torch.no_grad():
        losses = [F.binary_cross_entropy(expected(x), labels).item() for x, labels in PAIRS]
    mean = (2 * losses[0] + 5 * losses[1] + 1 * losses[2]) / 8
    assert model.evaluate(SENTENCES)["val_loss"] == pytest.approx(mean)
    assert dfhistory["val_loss"].tolist() == pytest.approx([mean])


def test_split_batch_that_states_rows_is_refused_with_several_steps_in_a_graph():
    message = (
        "ValueError: a batch states its rows, batch_size=2, and with split_batch and "
        "steps_per_execution=2 they are counted by the labels. Leave steps_per_execution out."
    )
    model = compiled(Net(), split_batch=split_dict, jit=FAST, steps_per_execution=2)
    with refused(message, model):
        model.fit(1, SENTENCES, verbose=0)
    compiled(model, split_batch=split_dict, jit=FAST).fit(1, SENTENCES, verbose=0)


# --- what it may not return -----------------------------------------------------------------------

FORM = "{'x': Tensor (8, 2) float32, 'labels': Tensor (8, 1) float32}"
EXPECTED = "expected a tuple (features, labels) or (features, labels, sample_weight)."
RESULTS = {
    "None": (
        lambda batch: None,
        "TypeError",
        "None",
        "Let it end in `return features, labels`.",
    ),
    "features alone": (
        lambda batch: batch["x"],
        "TypeError",
        "Tensor (8, 2) float32",
        "Return two parts or three; without labels (features, None).",
    ),
    "list": (
        lambda batch: list(batch.values()),
        "TypeError",
        "[Tensor (8, 2) float32, Tensor (8, 1) float32]",
        "Return two parts or three; without labels (features, None).",
    ),
    "one part": (
        lambda batch: (batch["x"],),
        "ValueError",
        "(Tensor (8, 2) float32)",
        "Return two parts or three; without labels (features, None).",
    ),
    "four parts": (
        lambda batch: (batch["x"], batch["x"], batch["labels"], None),
        "ValueError",
        "(Tensor (8, 2) float32, Tensor (8, 2) float32, Tensor (8, 1) float32, None)",
        "Put several inputs into a tuple of their own: ((a, b), labels).",
    ),
}


@pytest.mark.parametrize("verb", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize(("split", "kind", "shown", "remedy"), RESULTS.values(), ids=RESULTS)
def test_split_batch_that_returns_something_else_is_an_error_before_a_weight_moves(
    verb, split, kind, shown, remedy
):
    shown = shown.replace("None", "NoneType")
    message = f"{kind}: split_batch returned {shown} for a batch {FORM}; {EXPECTED} {remedy}"
    model = compiled(Net(), split_batch=split)
    with refused(message, model):
        model.fit(1, DICTS, verbose=0) if verb == "fit" else getattr(model, verb)(DICTS)


def test_split_batch_that_raises_gets_a_note_with_the_form_of_the_batch():
    model = compiled(Net(), split_batch=lambda batch: (batch["x"], batch["label"]))
    with refused("KeyError: 'label'", model) as error:
        model.fit(1, DICTS, verbose=0)
    assert error.value.__notes__ == [
        f"raised by split_batch, called with {FORM}",
        "If the batches have no labels, as in predict, let split_batch return (features, None); of "
        "a dict batch.get(name) is None if it has no such name.",
        "dl_train, batch 1",
        "epoch 1",
    ]


SHOWN = {
    "named tuple": (
        "Four {'labels': Tensor (8, 1) float32, 'x': Tensor (8, 2) float32, 'mask': NoneType, "
        "'name': str}"
    ),
    "mapping with to": "Encoded {'x': Tensor (8, 2) float32, 'labels': Tensor (8, 1) float32}",
    "dataclass": (
        "Named {'x': Tensor (8, 2) float32, 'labels': Tensor (8, 1) float32, 'name': str}"
    ),
    "object": "SimpleNamespace",
}


@pytest.mark.parametrize("name", SHOWN)
def test_split_batch_errors_name_the_parts_of_the_batch(name):
    def split(batch):
        raise ZeroDivisionError

    batches = [FORMS[name][0](x, labels) for x, labels in PAIRS]
    with pytest.raises(ZeroDivisionError) as error:
        compiled(Net(), split_batch=split).predict(batches)
    assert error.value.__notes__ == [f"raised by split_batch, called with {SHOWN[name]}"]


def test_split_batch_that_fails_on_dl_val_is_an_error_before_a_weight_moves():
    model = compiled(Net(), split_batch=split_dict)
    with refused("KeyError: 'labels'", model) as error:
        model.fit(1, DICTS, [{"x": X, "y": y}], verbose=0)
    assert error.value.__notes__[0].endswith(
        "{'x': Tensor (22, 2) float32, 'y': Tensor (22, 1) float32}"
    )
    assert "dl_val, batch 1, checked before the first step" in error.value.__notes__


def test_split_batch_that_is_no_function_is_refused_by_compile():
    message = (
        "TypeError: split_batch must be a function from a batch to (features, labels), got str. "
        'Pass for instance lambda batch: (batch["x"], batch["y"]).'
    )
    with refused(message):
        compiled(Net(), split_batch="labels")


class Splitter:
    """A class whose objects split a batch."""

    def __call__(self, batch):
        return split_dict(batch)


def split_pair(features, labels):
    """Take two arguments, where one batch is passed."""
    return features, labels


NO_FUNCTIONS = {
    "class": (
        Splitter,
        "the class Splitter. Pass an instance whose __call__ takes the batch, Splitter().",
    ),
    "two arguments": (
        split_pair,
        "split_pair, which cannot be called with one argument, the batch: missing a required "
        'argument: \'labels\'. Pass for instance lambda batch: (batch["x"], batch["y"]).',
    ),
}


@pytest.mark.parametrize(("split", "got"), NO_FUNCTIONS.values(), ids=NO_FUNCTIONS)
def test_split_batch_that_does_not_take_one_batch_is_refused_by_compile(split, got):
    message = (
        "TypeError: split_batch must be a function from a batch to (features, labels), got " + got
    )
    with refused(message):
        compiled(Net(), split_batch=split)
    compiled(Net(), split_batch=Splitter()).fit(1, DICTS, verbose=0)


def pop_from_dict(batch):
    labels = batch.pop("labels", None)
    return batch["x"], labels


def pop_from_list(batch):
    labels = batch.pop()
    return batch[0], labels


POPPED = {
    "dict": (pop_from_dict, dict),
    "mapping": (pop_from_dict, UserDict),
    "list": (pop_from_list, lambda batch: list(batch.values())),
}


@pytest.mark.parametrize(("split", "form"), POPPED.values(), ids=POPPED)
def test_split_batch_that_pops_parts_leaves_a_list_of_batches_as_it_is(split, form):
    batches = [form(batch) for batch in DICTS]
    model = compiled(Net(), split_batch=split)
    reference = copy.deepcopy(model)
    dfhistory = model.fit(2, batches, batches, verbose=0)
    expected = bare_fit(reference, PAIRS, epochs=2)
    assert dfhistory["loss"].tolist() == pytest.approx(expected, rel=1e-6)
    assert [len(batch) for batch in batches] == [2, 2, 2]


@pytest.mark.parametrize("verb", ["fit", "evaluate", "predict"])
def test_split_batch_that_takes_rows_of_a_single_tensor_for_parts_is_an_error(verb):
    message = (
        "ValueError: split_batch returned features Tensor (2,) float32, which is one row of the "
        "batch Tensor (22, 2) float32: the batch is a single tensor, and batch[0] its first row. "
        "If batches of features alone have no labels, let split_batch begin with `if "
        "isinstance(batch, torch.Tensor): return batch, None`."
    )
    model = compiled(Net(), split_batch=lambda batch: (batch[0], batch[1]))
    with refused(message, model):
        model.fit(1, X, verbose=0) if verb == "fit" else getattr(model, verb)(X)

    def split(batch):
        if isinstance(batch, torch.Tensor):
            return batch, None
        return batch[0], batch[1]

    compiled(model, split_batch=split)
    assert torch.equal(model.predict(X), model.predict((X, y)))


def test_split_batch_takes_features_and_labels_that_are_stacked_into_a_tensor():
    net = nn.Linear(1, 1)
    expected = net(X[:, :1]).detach()
    model = compiled(
        minikeras.Model(nn.Sequential(nn.Unflatten(0, (-1, 1)), net)),
        split_batch=lambda batch: (batch[0], batch[1]),
    )
    stacked = [torch.stack([x[:, 0], labels[:, 0]]) for x, labels in PAIRS]
    torch.testing.assert_close(model.predict(stacked), expected)


def test_split_batch_that_returns_no_labels_for_fit_is_an_error():
    message = (
        "ValueError: split_batch returned no labels, (Tensor (8, 2) float32, None), and the loss "
        "compares with labels. Let it return (features, labels); or override train_step."
    )
    model = compiled(Net(), split_batch=lambda batch: (batch["x"], None))
    with refused(message, model):
        model.fit(1, DICTS, verbose=0)


def test_split_batch_that_returns_no_labels_for_dl_val_is_an_error_before_a_weight_moves():
    model = compiled(Net(), split_batch=lambda batch: (batch["x"], batch.get("labels")))
    message = "ValueError: split_batch returned no labels, (Tensor (22, 2) float32, None), and ..."
    with refused(message, model) as error:
        model.fit(1, DICTS, [{"x": X}], verbose=0)
    assert "dl_val, batch 1, checked before the first step" in error.value.__notes__


def test_split_batch_weight_of_another_shape_is_an_error():
    message = (
        "ValueError: the third part of a batch is a weight per row: expected shape (8,), got "
        "Tensor (8, 2) float32. Put several inputs into a tuple of their own: ((a, b), labels)."
    )
    model = compiled(
        Net(), nn.BCELoss(reduction="none"), split_batch=lambda batch: (X[:8], y[:8], X[:8])
    )
    with refused(message, model):
        model.fit(1, DICTS, verbose=0)


# --- predict --------------------------------------------------------------------------------------


def test_split_batch_for_batches_without_labels_returns_none_for_them_in_predict():
    model = Net()
    expected = model(X).detach()
    batches = [{"x": x} for x, _ in PAIRS]
    compiled(model, split_batch=split_dict)
    with refused("KeyError: 'labels'", model) as error:
        model.predict(batches)
    assert "let split_batch return (features, None)" in error.value.__notes__[1]
    compiled(model, split_batch=lambda batch: (batch["x"], batch.get("labels")))
    torch.testing.assert_close(model.predict(batches), expected)
    torch.testing.assert_close(model.predict(DICTS), expected)


# --- other errors that name it as the remedy ------------------------------------------------------


class Two(nn.Module):
    """A network of two inputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, first, second):
        return self.fc(first) + self.fc(second)


class Three(Two):
    def forward(self, first, second, third):
        return super().forward(first, second) + self.fc(third)


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor
    target: torch.Tensor
    weight: float = 1.0


class Graph:
    def __init__(self, x, y):
        self.x = x
        self.y = y


REMEDIES = {
    "four parts": (Three(), (WIDE, WIDE, WIDE, TARGETS), (WIDE, WIDE, WIDE)),
    "four arrays": (Three(), (WIDE, WIDE, WIDE, TARGETS), (WIDE, WIDE, WIDE)),
    "triple": (Two(), (WIDE, WIDE, TARGETS), (WIDE, WIDE)),
    "triple whose labels look like weights": (Two(), (WIDE, WIDE, TARGETS[:, 0]), (WIDE, WIDE)),
    "dict of two": (nn.Linear(4, 1), {"x": WIDE, "y": TARGETS}, WIDE),
    "dict of two, labels first": (nn.Linear(4, 1), {"labels": TARGETS, "x": WIDE}, WIDE),
    "dict of several": (
        Two(),
        {"first": WIDE, "labels": TARGETS, "second": -WIDE},
        (WIDE, -WIDE),
    ),
    "mapping": (Two(), Encoded(first=WIDE, label=TARGETS, second=-WIDE), (WIDE, -WIDE)),
    "row numbers as the third part": (nn.Linear(4, 1), (WIDE, TARGETS, torch.arange(8)), WIDE),
    "object": (nn.Linear(4, 1), Graph(WIDE, TARGETS), WIDE),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_split_batch_is_the_remedy_that_errors_about_odd_batches_name(name):
    net, batch, inputs = REMEDIES[name]
    net = copy.deepcopy(net)
    model = compiled_badly(net, optimizer=sgd)
    before = copy_weights(model)
    data = batch if name.endswith("arrays") else [batch]
    with pytest.raises((ValueError, TypeError)) as error:
        model.fit(1, data, verbose=0)
    assert_equal_tensors(model.state_dict(), before)
    message = "\n".join([str(error.value), *getattr(error.value, "__notes__", ())])
    text = re.search(r"split_batch=(lambda batch: .*?\))\)(?:[.,;]| for)", message)
    assert text, message
    expected = copy.deepcopy(model.net)
    labels = TARGETS
    loss_func = nn.MSELoss()
    if name.endswith("look like weights"):
        labels = TARGETS[:, 0]
        loss_func = lambda outputs, labels: F.mse_loss(outputs[:, 0], labels)  # noqa: E731
    model.compile(loss_func, sgd(model), device="cpu", split_batch=eval(text[1]))
    model.fit(1, data, verbose=0)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    outputs = expected(*inputs) if isinstance(inputs, tuple) else expected(inputs)
    loss_func(outputs, labels).backward()
    optimizer.step()
    assert_same_weights(model.net, expected)


def test_split_batch_is_the_remedy_for_a_dict_with_keys_that_forward_does_not_take():
    """A custom loss may do without labels, so the dict reaches forward."""

    def loss_func(y_pred, y_true):
        return (y_pred - y_true).square().mean()

    batches = [{"second": -WIDE, "labels": TARGETS, "first": WIDE}]
    model = compiled_badly(Two(), loss_func, sgd)
    expected = copy.deepcopy(model.net)
    for verb in (lambda: model.fit(1, batches, verbose=0), lambda: model.predict(batches)):
        with pytest.raises(ValueError, match=r"forward takes first, second\. Leave") as error:
            verb()
    text = re.search(r"split_batch=(lambda batch: .*?\))\),", str(error.value))
    model.compile(loss_func, sgd(model), device="cpu", split_batch=eval(text[1]))
    torch.testing.assert_close(model.predict(batches), expected(WIDE, -WIDE).detach())
    model.fit(1, batches, verbose=0)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    loss_func(expected(WIDE, -WIDE), TARGETS).backward()
    optimizer.step()
    assert_same_weights(model.net, expected)


def test_split_batch_is_named_for_a_dataclass_with_its_fields():
    message = (
        "ValueError: the batches are Pair objects of first, second, weight, target, all of them "
        "features, and the loss compares with labels. Pass compile(split_batch=lambda batch: "
        "((batch.first, batch.second, batch.weight), batch.target)), with the name of your labels; "
        "or override train_step."
    )

    class Whole(minikeras.Model):
        def forward(self, batch):
            return self.net(batch.first)

    model = compiled_badly(Scale(), optimizer=sgd, kind=Whole)
    with refused(message, model):
        model.fit(1, [Pair(WIDE, WIDE, TARGETS)], verbose=0)
    model.compile(
        nn.MSELoss(),
        sgd(model),
        device="cpu",
        split_batch=lambda batch: (batch, batch.target.expand(8, 4)),
    )
    model.fit(1, [Pair(WIDE, WIDE, TARGETS)], verbose=0)


def test_split_batch_is_named_for_a_dict_that_forward_of_one_argument_gets_whole():
    message = (
        "ValueError: the features are a dict with the keys words, length, and forward takes one "
        "argument, words, which gets the whole dict. Take the part out in forward, "
        "words['words']; or pass compile(split_batch=function), which returns (batch['words'], "
        "labels)."
    )

    class Tagger(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 3)

        def forward(self, words):
            return self.embedding(words).movedim(-1, 1)

    words = torch.tensor([[1, 2, 0], [3, 4, 2]])
    batches = [({"words": words, "length": torch.tensor([3, 3])}, words % 3)]
    model = Tagger()
    model.compile(nn.CrossEntropyLoss(), sgd(model), device="cpu")
    with refused(message, model):
        model.fit(1, batches, verbose=0)
    model.compile(
        nn.CrossEntropyLoss(),
        sgd(model),
        device="cpu",
        split_batch=lambda batch: (batch[0]["words"], batch[1]),
    )
    model.fit(1, batches, verbose=0)
