"""The numbers that `model.diagnose` judges by are right, against plain references.

They are the loss of the best constant answer, what a loss asks of an output, how much rows mix,
which rows are equal, and the chance of batches of one class.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import optimize, stats
from torch import nn

import minikeras
from minikeras.by_name import LossesByName
from minikeras.diagnosis.constant_answer import best_constant_loss
from minikeras.diagnosis.evidence import Sample
from minikeras.diagnosis.mixing import SMALL, measure_mixing
from minikeras.diagnosis.split import hash_rows
from minikeras.diagnosis.tasks import (
    BINARY,
    CLASSES,
    LOG_PROBABILITIES,
    PROBABILITIES,
    REGRESSION,
    SCORES,
    UNKNOWN,
    VALUES,
    Task,
    classify,
    find_tasks,
)

ROWS = 60
RNG = np.random.RandomState(0)
CLASS_NUMBERS = RNG.choice(4, ROWS, p=[0.5, 0.3, 0.15, 0.05])
SHARES = np.bincount(CLASS_NUMBERS, minlength=4) / ROWS
ONES = (RNG.rand(ROWS, 1) < 0.3).astype("f4")
TARGETS = RNG.lognormal(0, 1, (ROWS, 1)).astype("f4")
COUNTS = RNG.poisson(3, (ROWS, 1)).astype("f4")
WEIGHTS = np.array([1.0, 2.0, 5.0, 10.0], "f4")


def entropy_of_ones():
    share = ONES.mean()
    return stats.entropy([share, 1 - share])


def weighted_entropy():
    weighted = SHARES * WEIGHTS / (SHARES * WEIGHTS).sum()
    return stats.entropy(weighted)


def smoothed_entropy():
    return stats.entropy(0.9 * SHARES + 0.1 / 4)


def lowest(loss):
    """Return the lowest value of a function of a number."""
    return optimize.minimize_scalar(loss, bounds=(-10, 20), method="bounded").fun


def huber(answer, delta):
    far = np.abs(answer - TARGETS)
    return np.where(far < delta, far**2 / 2, delta * (far - delta / 2)).mean()


def deviation_from_median():
    return np.abs(TARGETS - np.median(TARGETS)).mean()


def poisson():
    mean = COUNTS.mean()
    return mean - mean * np.log(mean)


def pos_weighted():
    share = ONES.mean()

    def loss(score):
        p = 1 / (1 + np.exp(-score))
        return -(3 * share * np.log(p) + (1 - share) * np.log(1 - p))

    return lowest(loss)


CONSTANTS = {
    "cross_entropy": (nn.CrossEntropyLoss(), CLASS_NUMBERS, lambda: stats.entropy(SHARES)),
    "function": (F.cross_entropy, CLASS_NUMBERS, lambda: stats.entropy(SHARES)),
    "nll": (nn.NLLLoss(), CLASS_NUMBERS, lambda: stats.entropy(SHARES)),
    "weighted": (
        nn.CrossEntropyLoss(weight=torch.tensor(WEIGHTS)),
        CLASS_NUMBERS,
        weighted_entropy,
    ),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), CLASS_NUMBERS, smoothed_entropy),
    "bce": (nn.BCELoss(), ONES, entropy_of_ones),
    "bce_with_logits": (nn.BCEWithLogitsLoss(), ONES, entropy_of_ones),
    "pos_weight": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0])), ONES, pos_weighted),
    "mse": (nn.MSELoss(), TARGETS, lambda: TARGETS.var()),
    "l1": (nn.L1Loss(), TARGETS, deviation_from_median),
    "huber": (nn.HuberLoss(delta=0.5), TARGETS, lambda: lowest(lambda a: huber(a, 0.5))),
    "smooth_l1": (nn.SmoothL1Loss(), TARGETS, lambda: lowest(lambda a: huber(a, 1.0))),
    "poisson": (nn.PoissonNLLLoss(), COUNTS, poisson),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_loss_of_the_best_constant_answer(name):
    loss_func, labels, expected = CONSTANTS[name]
    labels = torch.as_tensor(labels)
    outputs = torch.randn(ROWS, 1 if labels.is_floating_point() else 4)
    kind, takes = classify(loss_func, outputs, labels)

    found = best_constant_loss(Task("", kind, takes, loss_func, outputs, labels))

    # L1 has a corner at its lowest point, where the search ends next to it
    assert found == pytest.approx(expected(), rel=1e-3 if name == "l1" else 1e-4)


def test_no_random_constant_is_better_than_the_best_one():
    for loss_func, given, _ in CONSTANTS.values():
        labels = torch.as_tensor(given)
        outputs = torch.randn(ROWS, 1 if labels.is_floating_point() else 4)
        kind, takes = classify(loss_func, outputs, labels)
        best = best_constant_loss(Task("", kind, takes, loss_func, outputs, labels))
        for _ in range(20):
            row = 2 * torch.randn(1, outputs.shape[1])
            if takes == PROBABILITIES:
                row = row.sigmoid()
            elif takes == LOG_PROBABILITIES:
                row = row.log_softmax(1)
            assert loss_func(row.expand_as(outputs), labels).item() >= best - 1e-5


def test_ignored_labels_do_not_count_in_the_best_constant_answer():
    labels = torch.tensor(CLASS_NUMBERS)
    labels[:10] = -100
    shares = np.bincount(CLASS_NUMBERS[10:], minlength=4) / (ROWS - 10)
    task = Task("", CLASSES, SCORES, nn.CrossEntropyLoss(), torch.randn(ROWS, 4), labels)
    assert best_constant_loss(task) == pytest.approx(stats.entropy(shares), rel=1e-4)


# --- what a loss asks of an output ----------------------------------------------------------------


SCORES_OF_4 = torch.randn(ROWS, 4)
ONE_SCORE = torch.randn(ROWS, 1)
HARD = torch.tensor(CLASS_NUMBERS)
BITS = torch.tensor(ONES)


def cross_entropy_of_my_own(y_pred, y_true):
    return -y_pred.log_softmax(1).gather(1, y_true[:, None]).mean()


def average_of_my_own(y_pred, y_true):
    return minikeras.Average(F.cross_entropy(y_pred, y_true, reduction="sum"), len(y_true))


class OwnForward(nn.CrossEntropyLoss):
    def forward(self, y_pred, y_true):
        return super().forward(y_pred.log(), y_true)


class OwnName(nn.CrossEntropyLoss):
    pass


def absolute(y_pred, y_true):
    return (y_pred - y_true).abs().mean()


KINDS = {
    "module": (nn.CrossEntropyLoss(), SCORES_OF_4, HARD, (CLASSES, SCORES)),
    "subclass": (OwnName(), SCORES_OF_4, HARD, (CLASSES, SCORES)),
    "nll": (nn.NLLLoss(), SCORES_OF_4, HARD, (CLASSES, LOG_PROBABILITIES)),
    "bce": (nn.BCELoss(), ONE_SCORE.sigmoid(), BITS, (BINARY, PROBABILITIES)),
    "bce_with_logits": (nn.BCEWithLogitsLoss(), ONE_SCORE, BITS, (BINARY, SCORES)),
    "focal": (minikeras.FocalLoss(), ONE_SCORE.sigmoid(), BITS, (BINARY, PROBABILITIES)),
    "focal_of_logits": (
        minikeras.FocalLoss(from_logits=True),
        ONE_SCORE,
        BITS,
        (BINARY, SCORES),
    ),
    "huber": (nn.HuberLoss(), ONE_SCORE, BITS, (REGRESSION, VALUES)),
    "function": (F.nll_loss, SCORES_OF_4, HARD, (CLASSES, LOG_PROBABILITIES)),
    "binary_function": (F.binary_cross_entropy, ONE_SCORE, BITS, (BINARY, PROBABILITIES)),
    "own_cross_entropy": (cross_entropy_of_my_own, SCORES_OF_4, HARD, (CLASSES, SCORES)),
    "own_average": (average_of_my_own, SCORES_OF_4, HARD, (CLASSES, SCORES)),
    "lambda": (
        lambda a, b: F.cross_entropy(a, b),
        SCORES_OF_4,
        HARD,
        (CLASSES, SCORES),
    ),
    "own_forward": (OwnForward(), SCORES_OF_4.softmax(1), HARD, (UNKNOWN, UNKNOWN)),
    "unknown_lambda": (
        lambda a, b: (a.sum(1) - b).square().mean(),
        SCORES_OF_4,
        HARD,
        (UNKNOWN, UNKNOWN),
    ),
    "unknown_function": (absolute, ONE_SCORE, BITS, (UNKNOWN, UNKNOWN)),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("is_regularized", [False, True])
def test_kind_of_a_loss(name, is_regularized):
    loss_func, outputs, labels, expected = KINDS[name]
    if is_regularized:
        loss_func = minikeras.Regularized(loss_func, nn.Linear(2, 1), l2=0.1)
    (task,) = find_tasks(loss_func, outputs, labels)
    assert (task.kind, task.takes) == expected


def test_losses_by_name_give_a_task_each():
    losses = {"digit": nn.CrossEntropyLoss(), "is_even": (nn.BCELoss(), 0.5)}
    outputs = {"is_even": ONE_SCORE.sigmoid(), "digit": SCORES_OF_4, "unused": ONE_SCORE}
    labels = {"digit": HARD, "is_even": BITS}
    digit, is_even = find_tasks(LossesByName(losses), outputs, labels)
    assert (digit.name, digit.kind, digit.takes) == ("digit", CLASSES, SCORES)
    assert (is_even.name, is_even.kind, is_even.takes) == ("is_even", BINARY, PROBABILITIES)
    assert digit.outputs is SCORES_OF_4
    assert is_even.labels is BITS


@pytest.mark.parametrize("ignored", [-100, 0, 255])
def test_class_numbers_leave_out_what_the_loss_ignores(ignored):
    labels = torch.tensor([[1, 2], [ignored, 1], [2, ignored]])
    loss_func = nn.CrossEntropyLoss(ignore_index=ignored)
    task = Task("", CLASSES, SCORES, loss_func, torch.zeros(3, 3, 2), labels)
    assert task.class_numbers.tolist() == [1, 2, 1, 2]


def test_class_numbers_of_binary_labels_and_of_probabilities():
    def numbers(kind, labels, width):
        labels = torch.tensor(labels)
        return Task("", kind, SCORES, None, torch.zeros(2, width), labels).class_numbers

    assert numbers(BINARY, [[0.0], [1.0]], 1).tolist() == [0, 1]
    assert numbers(BINARY, [[0.1], [0.9]], 1) is None  # smoothed
    assert numbers(BINARY, [[-1.0], [1.0]], 1) is None
    assert numbers(CLASSES, [[0.2, 0.8], [0.9, 0.1]], 2).tolist() == [1, 0]
    assert numbers(REGRESSION, [[0.0], [1.0]], 1) is None


# --- rows that mix --------------------------------------------------------------------------------


class First(nn.Module):
    """Return the first part of what a layer returns, of inputs that it is given several times."""

    def __init__(self, layer, times=1):
        super().__init__()
        self.layer = layer
        self.times = times

    def forward(self, x):
        return self.layer(*[x] * self.times)[0]


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def encoder(batch_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


TABLE = (6, 8)
SEQUENCES = (6, 5, 8)
SEPARATE = {
    "Linear": (lambda: nn.Linear(8, 4), TABLE),
    "Conv1d": (lambda: nn.Conv1d(5, 4, 3), SEQUENCES),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3), (6, 2, 5, 5)),
    "LSTM": (lambda: First(nn.LSTM(8, 4, batch_first=True)), SEQUENCES),
    "TransformerEncoder": (lambda: encoder(True), SEQUENCES),
    "MultiheadAttention": (
        lambda: First(nn.MultiheadAttention(8, 2, batch_first=True), 3),
        SEQUENCES,
    ),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), TABLE),
    "LayerNorm": (lambda: nn.LayerNorm(8), TABLE),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), TABLE),
    "Softmax": (lambda: nn.Softmax(1), TABLE),
    "Embedding": (lambda: nn.Embedding(50, 4), None),
    "in place": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 4)), TABLE),
}
MIXING = {
    "LSTM": (lambda: First(nn.LSTM(8, 4)), SEQUENCES),
    "GRU": (lambda: First(nn.GRU(8, 4)), SEQUENCES),
    "TransformerEncoder": (lambda: encoder(False), SEQUENCES),
    "MultiheadAttention": (lambda: First(nn.MultiheadAttention(8, 2), 3), SEQUENCES),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8, track_running_stats=False), TABLE),
    "Softmax": (lambda: nn.Softmax(0), TABLE),
    "mean": (lambda: Function(lambda x: x - x.mean(0)), TABLE),
    "normalize": (lambda: Function(lambda x: F.normalize(x, dim=0)), TABLE),
    "reshape": (lambda: Function(lambda x: x.T.reshape(6, 8)), TABLE),
    "roll": (lambda: Function(lambda x: x.roll(1, 0)), TABLE),
    "tokens": (lambda: nn.Sequential(nn.Embedding(50, 8), encoder(False)), None),
}


def mixing(make_layer, shape):
    torch.manual_seed(0)
    features = torch.randint(0, 50, (6, 5)) if shape is None else torch.randn(shape)
    model = minikeras.Model(make_layer())
    model.eval()
    return measure_mixing(model, features)


@pytest.mark.parametrize("name", SEPARATE)
def test_layers_that_keep_rows_separate(name):
    assert mixing(*SEPARATE[name]) <= SMALL


@pytest.mark.parametrize("name", MIXING)
def test_layers_that_mix_rows(name):
    assert mixing(*MIXING[name]) > 100 * SMALL


def test_share_of_mixing_is_that_of_the_gradients():
    # the row has 1, each other row 0.25
    def mix(x):
        return x + 0.25 * (x.sum(0, keepdim=True) - x)

    assert mixing(lambda: Function(mix), TABLE) == pytest.approx(0.25)


# --- rows that are equal --------------------------------------------------------------------------


def hashes(*batches):
    sample = Sample("dl_train", [(batch, None, None) for batch in batches])
    first = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    sample.sizes = [len(tensor) for tensor in first]
    return hash_rows(sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_equal_rows_have_equal_hashes_and_others_do_not(dtype):
    rows = torch.randint(0, 3, (50, 3)).to(dtype)
    found = hashes(rows[:30], rows[30:])
    for i in range(50):
        for j in range(50):
            assert (found[i] == found[j]) == torch.equal(rows[i], rows[j])


def test_rows_with_nan_are_equal_if_nan_is_in_the_same_place():
    rows = torch.zeros(20, 2)
    rows[0, 0] = rows[1, 0] = rows[2, 1] = float("nan")
    found = hashes(rows)
    assert found[0] == found[1]
    assert len({found[0], found[2], found[3]}) == 3


def test_zero_is_equal_to_minus_zero():
    rows = torch.zeros(20, 2)
    rows[0] = -0.0
    assert len(set(hashes(rows))) == 1


def test_rows_of_two_dtypes_are_compared_by_value():
    rows = torch.randint(0, 100, (20, 2))
    assert hashes(rows.float()) == hashes(rows.double()) == hashes(rows)


def test_rows_are_equal_only_if_all_their_features_are():
    first = torch.arange(20).float()[:, None]
    second = torch.zeros(20, 1)
    assert len(set(hashes((first, second)))) == 20
    assert len(set(hashes((second, second)))) == 1


def test_too_few_rows_have_no_hashes():
    assert hashes(torch.zeros(19, 2)) is None


# --- batches of one class -------------------------------------------------------------------------
