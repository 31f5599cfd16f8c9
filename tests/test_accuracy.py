"""minikeras.accuracy and binary_accuracy: scikit-learn's numbers, and what they refuse."""

import copy
import functools
import re

import pandas as pd
import pytest
import torch
from helpers.compiling import FAST
from helpers.models import compiled, points
from sklearn.metrics import accuracy_score
from torch import nn

import minikeras
from minikeras.results import allow_waiting

RAW = functools.partial(minikeras.binary_accuracy, threshold=0.0)


def scores(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(classes, *shape, seed=1):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def exactly(message):
    return "^" + re.escape(" ".join(message.split())) + "$"


class ClassesLast(nn.Module):
    """Scores of 4 classes for each of 5 tokens, (rows, 5, 4)."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, X):
        return self.fc(X)


class ClassesInDimension1(ClassesLast):
    """The same, (rows, 4, 5)."""

    def forward(self, X):
        return self.fc(X).movedim(-1, 1)


def loss_of_rows(y_pred, y_true):
    return nn.functional.cross_entropy(y_pred.flatten(0, -2), y_true.flatten())


# --- the number over the whole set ----------------------------------------------------------------


def assert_is_of_scikit_learn(net, loss_func, metric, X, y, predict, keep=None, **options):
    """Evaluate with a short last batch, train, and compare with scikit-learn on all labels."""
    model = compiled(minikeras.Model(net), loss_func, {"accuracy": metric}, lr=0.0, **options)
    history = model.fit(1, (X, y), (X, y), batch_size=8, verbose=0)
    predicted = predict(model.predict(X))
    keep = slice(None) if keep is None else keep
    expected = accuracy_score(y.flatten()[keep], predicted.flatten()[keep])
    assert 0.05 < expected < 0.95
    assert history["accuracy"].item() == pytest.approx(expected, abs=1e-7)
    assert history["val_accuracy"].item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "options",
    [{}, {"jit": FAST, "steps_per_execution": 2}, {"precision": "bf16"}],
    ids=["eager", "jit", "bf16"],
)
@pytest.mark.parametrize("labels", ["numbers", "column", "one-hot", "ignored"])
def test_accuracy_over_classes_is_scikit_learns_on_the_whole_set(labels, options):
    X, y = scores(53, 3), numbers(4, 53)
    loss_func = nn.CrossEntropyLoss()
    keep = None
    if labels == "ignored":
        y[::3] = -100
        keep = y >= 0
    if labels == "column":
        y = y[:, None]
        loss_func = loss_of_rows
    if labels == "one-hot":
        hot = nn.functional.one_hot(y, 4).float()
        model = compiled(
            minikeras.Model(nn.Linear(3, 4)), loss_func, {"accuracy": minikeras.accuracy}, **options
        )
        model.fit(1, (X, hot), batch_size=8, verbose=0)
        result = model.evaluate((X, hot), batch_size=8)
        expected = accuracy_score(y, model.predict(X).argmax(1))
        assert result["val_accuracy"] == pytest.approx(expected, abs=1e-7)
        return
    assert_is_of_scikit_learn(
        nn.Linear(3, 4), loss_func, minikeras.accuracy, X, y, lambda p: p.argmax(1), keep, **options
    )


@pytest.mark.parametrize("options", [{}, {"jit": FAST}], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("net", "loss_func", "dim"),
    [(ClassesInDimension1, nn.CrossEntropyLoss(), 1), (ClassesLast, loss_of_rows, -1)],
    ids=["classes in dimension 1", "classes last"],
)
def test_accuracy_over_tokens_counts_no_padding(net, loss_func, dim, options):
    X, y = scores(21, 5, 3), numbers(4, 21, 5)
    y[torch.arange(5) >= numbers(6, 21)[:, None]] = -100  # lines of 0 to 5 tokens
    keep = y.flatten() >= 0
    assert_is_of_scikit_learn(
        net(), loss_func, minikeras.accuracy, X, y, lambda p: p.argmax(dim), keep, **options
    )


def test_accuracy_of_pixels_takes_another_ignore_index_even_one_of_the_classes():
    y_pred, y_true = scores(2, 3, 4, 5), numbers(3, 2, 4, 5)
    found = minikeras.accuracy(y_pred, y_true, ignore_index=0)
    keep = y_true != 0
    expected = accuracy_score(y_true[keep], y_pred.argmax(1)[keep])
    assert float(found) == pytest.approx(expected)
    assert found.count == keep.sum() < y_true.numel()


def test_accuracy_of_a_batch_of_padding_alone_is_nan_and_counts_for_nothing():
    y_pred = scores(4, 3)
    nothing = minikeras.accuracy(y_pred, torch.full((4,), -100))
    assert nothing.count == 0
    assert torch.tensor(float(nothing)).isnan()
    right = y_pred.argmax(1)
    batches = [(y_pred, torch.full((4,), -100)), (y_pred, right)]
    model = minikeras.Model(nn.Linear(3, 3, bias=False))
    nn.init.eye_(model.net.weight)
    compiled(model, lambda y_pred, y_true: y_pred.mean(), {"accuracy": minikeras.accuracy})
    assert model.evaluate(batches)["val_accuracy"] == 1.0


def test_accuracy_of_soft_labels_goes_by_the_highest():
    y_pred = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    assert float(minikeras.accuracy(y_pred, torch.tensor([[0.7, 0.3], [0.6, 0.4]]))) == 0.5


@pytest.mark.parametrize(
    "options",
    [{}, {"jit": FAST, "steps_per_execution": 2}, {"precision": "bf16"}],
    ids=["eager", "jit", "bf16"],
)
@pytest.mark.parametrize("shape", [(), (1,), (3,)], ids=["(rows,)", "(rows, 1)", "(rows, 3)"])
def test_binary_accuracy_is_scikit_learns_on_the_whole_set(shape, options):
    X = scores(53, 3)
    y = numbers(2, 53, *shape).float()
    layers = [nn.Linear(3, shape[0] if shape else 1)]
    if not shape:
        layers.append(nn.Flatten(0))
    assert_is_of_scikit_learn(
        nn.Sequential(*layers), nn.BCEWithLogitsLoss(), RAW, X, y, lambda p: p > 0, **options
    )
    assert_is_of_scikit_learn(
        nn.Sequential(*layers, nn.Sigmoid()),
        nn.MSELoss(),
        minikeras.binary_accuracy,
        X,
        y,
        lambda p: p > 0.5,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_binary_accuracy_takes_a_column_against_rows_and_labels_of_any_dtype(dtype):
    y_pred = torch.tensor([0.9, 0.2, 0.6, 0.4])
    y_true = torch.tensor([1, 0, 1, 1]).to(dtype)
    for found in (
        minikeras.binary_accuracy(y_pred, y_true),
        minikeras.binary_accuracy(y_pred[:, None], y_true),
        minikeras.binary_accuracy(y_pred, y_true[:, None]),
        minikeras.binary_accuracy(y_pred.bfloat16(), y_true),
    ):
        assert found.item() == 0.75


def test_binary_accuracy_of_smoothed_labels_counts_those_above_one_half_as_a_yes():
    found = minikeras.binary_accuracy(torch.tensor([0.9, 0.9]), torch.tensor([0.95, 0.05]))
    assert found.item() == 0.5


def test_accuracy_is_the_same_after_steps_of_accumulated_gradients():
    X, y = scores(53, 3), numbers(4, 53)
    metrics = {"accuracy": minikeras.accuracy}
    torch.manual_seed(0)
    model = minikeras.Model(nn.Linear(3, 4))
    bare = copy.deepcopy(model.net)
    compiled(model, nn.CrossEntropyLoss(), metrics, accumulate=2)
    dfhistory = model.fit(1, [(X[:16], y[:16]), (X[16:32], y[16:32]), (X[32:], y[32:])], verbose=0)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    right = (bare(X[:32]).argmax(1) == y[:32]).sum()
    nn.functional.cross_entropy(bare(X[:32]), y[:32]).backward()
    optimizer.step()
    right += (bare(X[32:]).argmax(1) == y[32:]).sum()
    assert dfhistory["accuracy"].item() == pytest.approx(right.item() / 53)


def test_accuracy_and_binary_accuracy_raise_no_warning_that_they_are_no_means():
    X, y = scores(64, 3), numbers(4, 64)
    y[:20] = -100
    model = compiled(
        minikeras.Model(nn.Linear(3, 4)), nn.CrossEntropyLoss(), {"accuracy": minikeras.accuracy}
    )
    model.fit(3, (X, y), batch_size=16, verbose=0)  # warnings are errors
    model = compiled(metrics_dict={"accuracy": minikeras.binary_accuracy})
    model.fit(3, points(64), batch_size=16, verbose=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_accuracy_takes_one_hot_labels_of_any_dtype(dtype):
    y_pred, y_true = scores(53, 3), numbers(3, 53)
    hot = nn.functional.one_hot(y_true).to(dtype)
    assert float(minikeras.accuracy(y_pred, hot)) == accuracy_score(y_true, y_pred.argmax(1))


# --- what is refused ------------------------------------------------------------------------------

REFUSED = {
    "one score per row": (
        minikeras.accuracy,
        (scores(8, 1), numbers(2, 8).float()),
        """accuracy: got y_pred (8, 1) and y_true (8,): one score per label; expected a score per
        class, (8, classes). For yes-or-no questions pass minikeras.binary_accuracy, or
        functools.partial(minikeras.binary_accuracy, threshold=0.0) for raw scores.""",
    ),
    "one score per pixel": (
        minikeras.accuracy,
        (scores(8, 1, 4, 4), numbers(2, 8, 4, 4)),
        """accuracy: got y_pred (8, 1, 4, 4) and y_true (8, 4, 4): one score per label; expected a
        score per class, (8, classes). For yes-or-no questions pass minikeras.binary_accuracy, or
        functools.partial(minikeras.binary_accuracy, threshold=0.0) for raw scores.""",
    ),
    "predicted class numbers": (
        minikeras.accuracy,
        (numbers(3, 8), numbers(3, 8)),
        """accuracy: got y_pred (8,) and y_true (8,): one score per label; expected a score per
        class, (8, classes). For yes-or-no questions pass minikeras.binary_accuracy, or
        functools.partial(minikeras.binary_accuracy, threshold=0.0) for raw scores. For predicted
        class numbers write (y_pred == y_true).float().mean().""",
    ),
    "the labels first": (
        minikeras.accuracy,
        (numbers(3, 8), scores(8, 3)),
        """accuracy: got y_pred (8,) and y_true (8, 3); expected the scores first:
        accuracy(y_pred, y_true).""",
    ),
    "other rows": (
        minikeras.accuracy,
        (scores(8, 3), numbers(3, 7)),
        """accuracy: got y_pred (8, 3) and y_true (7,); expected class numbers of shape (8,), or
        one-hot labels of shape (8, 3). Reshape one of them.""",
    ),
    "other tokens": (
        minikeras.accuracy,
        (scores(8, 5, 3), numbers(3, 8, 4)),
        """accuracy: got y_pred (8, 5, 3) and y_true (8, 4); expected class numbers of shape
        (8, 3), with the classes in dimension 1, or (8, 5), with the classes last. Reshape one of
        them.""",
    ),
    "as many tokens as classes": (
        minikeras.accuracy,
        (scores(8, 5, 5), numbers(5, 8, 5)),
        """accuracy: y_pred (8, 5, 5) may have its classes in dimension 1 or in the last, since
        y_true (8, 5) fits both. Pass rows of scores; with the classes last: lambda y_pred, y_true:
        minikeras.accuracy(y_pred.flatten(0, -2), y_true.flatten()); with the classes in dimension
        1, y_pred.movedim(1, -1).flatten(0, -2) there.""",
    ),
    "one-hot tokens": (
        minikeras.accuracy,
        (scores(8, 5, 3), torch.zeros(8, 5, 3)),
        """accuracy: got y_pred (8, 5, 3) and y_true (8, 5, 3): labels of the scores' shape may have
        their classes in dimension 1 or in the last. Pass class numbers: lambda y_pred, y_true:
        minikeras.accuracy(y_pred, y_true.argmax(1)), or .argmax(-1) with the classes last. For
        yes-or-no questions pass minikeras.binary_accuracy.""",
    ),
    "float class numbers": (
        minikeras.accuracy,
        (scores(8, 3), numbers(3, 8).float()),
        """accuracy: class numbers must be integers, got y_true of float32. Pass y_true.long().""",
    ),
    "class numbers from 1": (
        minikeras.accuracy,
        (scores(8, 3), torch.full((8,), 3)),
        """accuracy: y_true has the class number 3, and y_pred has scores of 3 classes, 0 to 2.
        Number the classes from 0; labels that do not count must equal ignore_index, -100.""",
    ),
    "several labels of a row": (
        minikeras.accuracy,
        (scores(2, 3), torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])),
        """accuracy: one-hot labels add up to 1 in each row, and a row of y_true (2, 3) adds up to
        2. If each label is a yes-or-no question, pass minikeras.binary_accuracy.""",
    ),
    "labels that are NaN": (
        minikeras.accuracy,
        (scores(2, 2), torch.tensor([[1.0, 0.0], [float("nan"), 1.0]])),
        """accuracy: one-hot labels add up to 1 in each row, and a row of y_true (2, 2) adds up to
        nan. If each label is a yes-or-no question, pass minikeras.binary_accuracy.""",
    ),
    "predicted class numbers of tokens": (
        minikeras.accuracy,
        (numbers(3, 2, 4), torch.tensor([[0, 1, 2, 2], [0, 0, 0, 1]])),
        """accuracy: one-hot labels add up to 1 in each row, and a row of y_true (2, 4) adds up to
        5. If each label is a yes-or-no question, pass minikeras.binary_accuracy. For predicted
        class numbers write (y_pred == y_true).float().mean().""",
    ),
    "no ignore_index": (
        minikeras.accuracy,
        (scores(8, 3), numbers(3, 8), None),
        """accuracy: ignore_index must be an integer, got NoneType. If all labels count, leave it
        out.""",
    ),
    "a list of numbers": (
        minikeras.accuracy,
        (scores(2, 3), [0, 2]),
        """accuracy: y_true must be one tensor, got [int, int]. Pass torch.as_tensor(y_true).""",
    ),
    "labels that are missing": (
        minikeras.binary_accuracy,
        (torch.rand(3), torch.tensor([0.0, float("nan"), 1.0])),
        """binary_accuracy: labels must be 0 or 1, got NaN in y_true. If labels are missing, pass a
        function that counts the others and returns minikeras.Average(right, counted).""",
    ),
    "a NumPy array": (
        minikeras.accuracy,
        (scores(8, 3), numbers(3, 8).numpy()),
        """accuracy: y_true must be one tensor, got ndarray (8,) int64. Pass
        torch.as_tensor(y_true).""",
    ),
    "a dict": (
        minikeras.accuracy,
        ({"a": scores(8, 3)}, numbers(3, 8)),
        """accuracy: y_pred must be one tensor, got {'a': Tensor (8, 3) float32}. Pass
        the tensor that it is about: lambda y_pred, y_true: minikeras.accuracy(y_pred['a'],
        y_true).""",
    ),
    "raw scores": (
        minikeras.binary_accuracy,
        (torch.tensor([-1.5, 3.0]), torch.tensor([0.0, 1.0])),
        """binary_accuracy: threshold=0.5 is for probabilities, got y_pred from -1.5 to 3. For raw
        scores pass functools.partial(minikeras.binary_accuracy, threshold=0.0), or pass
        probabilities, y_pred.sigmoid().""",
    ),
    "several classes": (
        minikeras.binary_accuracy,
        (torch.rand(8, 3), numbers(3, 8)),
        """binary_accuracy: got y_pred (8, 3) and y_true (8,); expected a label per prediction,
        y_true of shape (8, 3). For class numbers and a score per class pass minikeras.accuracy.""",
    ),
    "other elements": (
        minikeras.binary_accuracy,
        (torch.rand(8, 3), numbers(2, 8, 4)),
        """binary_accuracy: got y_pred (8, 3) and y_true (8, 4); expected a label per prediction,
        y_true of shape (8, 3). Reshape one of them.""",
    ),
    "class numbers": (
        minikeras.binary_accuracy,
        (torch.rand(4), torch.tensor([0, 1, 2, 1])),
        """binary_accuracy: labels must be 0 or 1, got y_true from 0 to 2. For class numbers pass
        minikeras.accuracy; for labels -1 and 1 lambda y_pred, y_true:
        minikeras.binary_accuracy(y_pred, y_true > 0).""",
    ),
}


@pytest.mark.parametrize(("metric", "batch", "message"), REFUSED.values(), ids=REFUSED)
def test_accuracy_refuses_what_it_would_get_wrong(metric, batch, message):
    with pytest.raises((ValueError, TypeError), match=exactly(message)):
        metric(*batch)


def test_accuracy_remedies_work():
    y_pred, y_true = scores(8, 5, 5), numbers(5, 8, 5)
    last = minikeras.accuracy(y_pred.flatten(0, -2), y_true.flatten())
    first = minikeras.accuracy(y_pred.movedim(1, -1).flatten(0, -2), y_true.flatten())
    assert float(last) == pytest.approx((y_pred.argmax(-1) == y_true).float().mean().item())
    assert float(first) == pytest.approx((y_pred.argmax(1) == y_true).float().mean().item())
    y_pred, hot = scores(8, 5, 3), nn.functional.one_hot(numbers(3, 8, 5))
    assert minikeras.accuracy(y_pred, hot.argmax(-1)).count == 40
    assert minikeras.accuracy(y_pred.movedim(-1, 1), hot.movedim(-1, 1).argmax(1)).count == 40
    assert float(minikeras.accuracy(scores(8, 3), numbers(3, 8).float().long())) < 1
    raw, sign = scores(8), scores(8, seed=2).sign()
    expected = ((raw > 0) == (sign > 0)).float().mean()
    assert RAW(raw, sign > 0) == expected
    assert minikeras.binary_accuracy(raw.sigmoid(), sign > 0) == expected


def test_accuracy_of_raw_scores_is_refused_in_a_fit_before_a_weight_moves():
    X, y = points(64)
    model = minikeras.Model(nn.Linear(2, 1))
    nn.init.constant_(model.net.weight, 3.0)
    compiled(model, nn.BCEWithLogitsLoss(), {"accuracy": minikeras.binary_accuracy})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"threshold=0\.5 is for probabilities") as raised:
        model.fit(1, (X, y), verbose=0)
    assert any("metric 'accuracy'" in note for note in raised.value.__notes__)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    compiled(model, nn.BCEWithLogitsLoss(), {"accuracy": RAW}).fit(1, (X, y), verbose=0)


def test_accuracy_never_reads_a_device_but_where_waiting_is_allowed():
    # a tensor on "meta" has no values: to read one is an error
    y_pred, y_true = torch.empty(8, 3, device="meta"), torch.empty(8, device="meta").long()
    assert minikeras.accuracy(y_pred, y_true).total.device.type == "meta"
    assert minikeras.binary_accuracy(y_pred, y_pred > 0).device.type == "meta"
    for metric, labels in ((minikeras.accuracy, y_true), (minikeras.binary_accuracy, y_pred)):
        with allow_waiting(), pytest.raises((RuntimeError, NotImplementedError)):
            metric(y_pred, labels)
    assert minikeras.accuracy(y_pred, y_true).total.device.type == "meta"


@pytest.mark.gpu
def test_accuracy_of_raw_scores_on_a_gpu_is_refused_in_the_first_batch():
    device = torch.accelerator.current_accelerator()
    X, y = points(64)
    model = minikeras.Model(nn.Linear(2, 1))
    model.compile(
        nn.BCEWithLogitsLoss(), metrics_dict={"accuracy": minikeras.binary_accuracy}, device=device
    )
    with pytest.raises(ValueError, match=r"threshold=0\.5 is for probabilities"):
        model.fit(1, (X, y), verbose=0)


def test_accuracy_goes_on_exactly_after_a_resume(tmp_path):
    X, y = scores(53, 3), numbers(4, 53)
    y[::4] = -100

    def fit(*callbacks, **kwargs):
        torch.manual_seed(0)
        model = minikeras.Model(nn.Linear(3, 4))
        compiled(model, nn.CrossEntropyLoss(), {"accuracy": minikeras.accuracy})
        return model.fit(
            2, (X, y), (X, y), batch_size=8, verbose=0, callbacks=[*callbacks], **kwargs
        )

    def interrupt(batch, logs):
        if batch == 3:
            raise KeyboardInterrupt

    file = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 1}
    expected = fit()
    with pytest.raises(KeyboardInterrupt):
        fit(minikeras.LambdaCallback(on_batch_end=interrupt), **file)
    pd.testing.assert_frame_equal(fit(**file), expected, check_exact=True)
