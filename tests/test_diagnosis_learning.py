"""How `model.diagnose` judges the training on one small batch, and the learning rate."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.set_ups import compiled, mlp
from torch import nn

import minikeras
from minikeras.diagnosis import Finding, LearningRates
from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.memorize import (
    ROWS,
    Training,
    memorize,
    perfect_answer,
    search_lowest,
    share_of_way,
)
from minikeras.diagnosis.memory import name_cause
from minikeras.diagnosis.rates import is_too_high
from minikeras.diagnosis.tasks import find_tasks

# --- the share of the way to the lowest loss ------------------------------------------------------

NAN = math.nan
WAYS = {  # first, last, floor, losses of the steps -> share
    "all": (2.0, 0.0, 0.0, [], 1.0),
    "half": (2.0, 1.0, 0.0, [], 0.5),
    "a floor above 0": (22.0, 20.5, 20.0, [], 0.75),
    "a floor below 0": (1.0, 0.0, -1.0, [], 0.5),
    "it rises": (2.0, 3.0, 0.0, [], -0.5),
    "at the floor already": (0.0, 0.0, 0.0, [], 1.0),
    "NaN at the end": (2.0, NAN, 0.0, [], 0.0),
    "NaN at the start": (NAN, 1.0, 0.0, [], 0.0),
    "no floor": (2.0, 1.5, None, [], 0.25),
    "no floor, and it falls below 0": (2.0, -0.1, None, [], 1.0),
    "no floor, and it falls from below 0": (-0.1, -0.5, None, [], 1.0),
    "no floor, and it rises from below 0": (-0.5, 3.0, None, [], 0.0),
    "no floor, and it rises below 0": (-0.5, -0.2, None, [], 0.0),
    "the losses of the steps alone": (None, None, None, [4.0, 5.0, NAN, 3.0], 0.25),
    "no loss at all": (None, None, None, [NAN], None),
}


@pytest.mark.parametrize("case", WAYS)
def test_share_of_the_way(case):
    *given, expected = WAYS[case]
    assert share_of_way(*given) == expected


# --- the lowest loss ------------------------------------------------------------------------------

COUNTS = torch.tensor([[1.0], [2.0], [5.0]])
TARGETS = torch.tensor([[1.0], [-2.0], [5.0]])
SHARES = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]])


def entropy_of_poisson():
    return (COUNTS - COUNTS * COUNTS.log()).mean().item()


LOWEST = {
    "counts": (nn.PoissonNLLLoss(), torch.zeros(3, 1), COUNTS, entropy_of_poisson()),
    "a constant is added": (lambda a, b: 20 + F.mse_loss(a, b), torch.zeros(3, 1), TARGETS, 20.0),
    "a distance": (lambda a, b: (a - b).pow(4).mean(), torch.zeros(3, 1), TARGETS, 0.0),
    "of minus one": (lambda a, b: -torch.exp(-F.mse_loss(a, b)), 0.9 * TARGETS, TARGETS, -1.0),
    "several outputs": (
        lambda a, b: F.mse_loss(a["x"], b) + a["y"].square().mean() + 1,
        {"x": torch.zeros(3, 1), "y": torch.ones(3)},
        TARGETS,
        1.0,
    ),
    "no bound below": (lambda a, b: (a - b).mean(), torch.zeros(3, 1), TARGETS, None),
    "no gradient": (lambda a, b: (a > b).float().mean(), torch.zeros(3, 1), TARGETS, None),
    "an error": (lambda a, b: a.missing, torch.zeros(3, 1), TARGETS, None),
    "no numbers": (F.mse_loss, torch.zeros(3, dtype=torch.long), TARGETS, None),
}


@pytest.mark.parametrize("case", LOWEST)
def test_lowest_loss_is_found_without_a_network(case):
    loss_func, outputs, labels, expected = LOWEST[case]
    found = search_lowest(loss_func, outputs, labels)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-2))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_perfect_answer_to_soft_labels_is_their_logarithm(smoothing):
    loss_func = nn.CrossEntropyLoss(label_smoothing=smoothing)
    (task,) = find_tasks(loss_func, torch.zeros(2, 3), SHARES)
    smoothed = SHARES * (1 - smoothing) + smoothing / 3
    entropy = -(smoothed * smoothed.log()).sum(1).mean()
    assert loss_func(perfect_answer(task, SHARES), SHARES).item() == pytest.approx(entropy.item())


# --- the batch ------------------------------------------------------------------------------------


class Pair(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, a, b):
        return self.fc(torch.cat([a, b], 1))


@pytest.mark.parametrize("form", ["arrays", "batches", "split"])
def test_rows_that_are_stated_are_those_that_are_trained_on(form):
    seen = []

    class Seen(Pair):
        def train_step(self, features, labels, sample_weight=None):
            seen.append((len(labels), self._run.train.batch.rows))
            return super().train_step(features, labels)

    a, b = torch.randn(64, 1), torch.randn(64, 1)
    data = [((a, b), a + b)]
    options = {}
    size = None
    if form == "split":
        data = [{"a": a, "b": b, "y": a + b}]
        options["split_batch"] = lambda batch: ((batch["a"], batch["b"]), batch["y"])
    if form == "arrays":
        data = ((a, b), a + b)
        size = 64
    model = compiled(Seen(), nn.MSELoss(), **options)
    evidence = Evidence(model, data, None, 3, size)
    _ = evidence.compares_labels
    seen.clear()
    assert memorize(evidence).rows == ROWS
    assert set(seen) == {(ROWS, ROWS)}


# --- the cause ------------------------------------------------------------------------------------


def finding(level, looked_at, is_symptom=False):
    return Finding(level, looked_at, "found", "usual", "remedy", is_symptom)


def evidence_with(findings, features=None, labels=None):
    features = torch.arange(8.0)[:, None] if features is None else features
    labels = torch.arange(8.0)[:, None] if labels is None else labels
    train = SimpleNamespace(batches=[(features, labels, None)], sizes=[8])
    return SimpleNamespace(findings=findings, train=train)


def test_cause_is_the_worst_finding_that_is_no_symptom():
    findings = [
        finding("note", "a note"),
        finding("error", "a symptom", is_symptom=True),
        finding("warning", "a warning"),
        finding("error", "an error"),
    ]
    assert name_cause(evidence_with(findings)).startswith("The likely cause: an error, see")
    assert name_cause(evidence_with(findings[:3])).startswith("The likely cause: a warning, see")


def test_cause_that_is_not_known_is_looked_for_in_forward():
    words = "Nothing else that was looked at explains it. Check forward line by line"
    assert name_cause(evidence_with([finding("note", "a note")])).startswith(words)


def test_cause_is_the_labels_of_equal_rows_if_they_differ():
    features = torch.tensor([0.0, 0, 1, 2, 3, 4, 5, 6])[:, None]
    found = name_cause(evidence_with([finding("error", "an error")], features))
    assert found.startswith("The likely cause: 25% of the rows have the same features as another")
    same = torch.tensor([0.0, 0, 1, 2, 3, 4, 5, 6])[:, None]
    assert "an error" in name_cause(evidence_with([finding("error", "an error")], features, same))


# --- the learning rate ----------------------------------------------------------------------------


def curve(suggestion=1e-2, diverges_at=1.0):
    return LearningRates([], [], [], suggestion, diverges_at, 100)


FALLS = [2.0, 1.9, 1.8, 1.7, 1.6]
RISES = [2.0, 2.5, 3.0, 4.0, 5.0]
JUMPS = [2.0, 500.0, 90.0, 3.0, 0.1]
RATES = {  # rate, curve, losses, share -> too high
    "below": (1e-3, curve(), FALLS, 0.2, False),
    "above where it diverges": (2.0, curve(), FALLS, 0.2, True),
    "above where it diverges, and it memorizes": (2.0, curve(), FALLS, 0.9, False),
    "the loss rises": (0.1, curve(), RISES, -1.0, True),
    "the loss rises at a low rate": (1e-3, curve(), RISES, -1.0, False),
    "the loss rises, and no rate is known": (0.1, curve(None, None), RISES, -1.0, False),
    "NaN": (0.1, curve(), [2.0, 3.0, NAN, NAN, NAN], 0.0, True),
    "far above in between": (0.1, curve(), JUMPS, 0.95, True),
    "far above in between at a low rate": (1e-3, curve(), JUMPS, 0.95, False),
    "a negative loss falls": (0.1, curve(), [-0.1, -0.5, -0.8], 1.0, False),
    "a negative loss rises": (0.1, curve(), [-1.0, 0.0, 2.0], 0.0, True),
    "no loss is known": (0.1, curve(), [], None, False),
}


@pytest.mark.parametrize("case", RATES)
def test_rate_is_too_high_if_the_range_test_and_the_training_say_so(case):
    rate, found, losses, share, expected = RATES[case]
    assert is_too_high(rate, found, Training(losses, share)) is expected


# --- what validation needs ------------------------------------------------------------------------


def test_rows_of_dl_val_that_forward_does_not_take_are_found():
    X = torch.randn(60, 4)
    model = compiled(mlp(4, 1), nn.MSELoss())
    y = X.sum(1, keepdim=True)
    (found,) = model.diagnose((X[:30], y[:30]), (X[30:, :3], y[30:])).warnings
    assert (found.level, found.looked_at) == ("error", "dl_val")
    assert found.remedy.startswith("layer net.0 takes rows of 4 values (in_features) and got")


def test_empty_data_is_told_with_the_reason():
    X = torch.randn(5, 4)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(X, X[:, :1]), 8, drop_last=True
    )
    model = compiled(mlp(4, 1), nn.MSELoss())
    with pytest.raises(ValueError, match="drop_last=True drops the only batch, 5 rows"):
        model.diagnose(loader)
    with pytest.raises(ValueError, match="dl_val gave no batch: its arrays have no rows"):
        model.diagnose((X, X[:, :1]), (X[:0], X[:0, :1]))
