"""Wrong validation data is refused before the first step; the check changes nothing."""

import io

import numpy as np
import pytest
import torch
from helpers.models import accuracy, compiled, points
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import minikeras
from minikeras import LambdaCallback

X, y = points(64)

WRONG = {
    "an open file": (
        io.StringIO("a,b"),
        TypeError,
        "is an open file; expected data. Read it first",
    ),
    "labels (N,)": ((X, y[:, 0]), ValueError, "would broadcast"),
    "labels (N,) in a loader": (
        DataLoader(TensorDataset(X, y[:, 0]), 8),
        ValueError,
        "would broadcast",
    ),
    "labels (N,) in a list": ([(X[:8], y[:8, 0])], ValueError, "would broadcast"),
    "other columns": ((torch.randn(64, 3), y), ValueError, "takes rows of 2 values"),
    "labels of text": ([(X[:8], ["a"] * 8)], ValueError, "the labels are text"),
    "features alone": (X, ValueError, "the batches are features alone"),
    "a weight for a loss that is a mean": ((X, y, torch.ones(64)), ValueError, "reduction"),
    "no rows": ((X[:0], y[:0]), ValueError, "its arrays have no rows"),
    "empty": ([], ValueError, "gave no batch"),
}


@pytest.mark.parametrize(("dl_val", "error", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize(
    "train", [(X, y), DataLoader(TensorDataset(X, y), 8, shuffle=True)], ids=["arrays", "loader"]
)
def test_validation_data_that_is_wrong_is_refused_before_a_step(dl_val, error, message, train):
    model = compiled()
    steps = []
    before = [parameter.detach().clone() for parameter in model.parameters()]
    count = LambdaCallback(on_batch_end=lambda batch, logs: steps.append(batch))
    with pytest.raises(error, match=message) as raised:
        model.fit(2, train, dl_val, callbacks=[count], verbose=0)
    assert steps == []
    notes = getattr(raised.value, "__notes__", [])
    assert not any(note.startswith("dl_train") for note in notes)
    for parameter, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)
    model.fit(1, train, (X, y), verbose=0)


def dropout_net():
    torch.manual_seed(0)
    layers = (
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
    )
    model = minikeras.Model(nn.Sequential(*layers, nn.Linear(4, 1), nn.Sigmoid()))
    return compiled(model, metrics_dict={"accuracy": accuracy})


def test_validation_data_of_signals_of_another_length_is_evaluated_as_without_the_check():
    """Evaluated once more before the first step, they change no number, mode or random state."""
    signals = torch.randn(64, 1, 10)
    longer = torch.randn(32, 1, 14)
    by_lists = list(zip(longer.split(8), y[:32].split(8), strict=True))
    results = []
    for dl_val in ((longer, y[:32]), by_lists, iter_only(by_lists)):  # the last cannot be looked at
        model = dropout_net()
        size = {"batch_size": 8}
        dfhistory = model.fit(2, (signals, y), dl_val, verbose=0, **size)
        results.append(
            (
                dfhistory,
                model.state_dict(),
                torch.rand(()).item(),
                np.random.get_state()[1].tolist(),
            )
        )
    for dfhistory, state, drawn, drawn_by_numpy in results[:-1]:
        expected, expected_state, *expected_draws = results[-1]
        assert dfhistory.equals(expected)
        torch.testing.assert_close(state, expected_state, rtol=0, atol=0)
        assert [drawn, drawn_by_numpy] == expected_draws


def iter_only(batches):
    class Batches:
        def __iter__(self):
            return iter(batches)

    return Batches()


def test_validation_batch_like_those_of_training_is_not_evaluated_before_its_turn():
    calls = []
    model = compiled()
    model.register_forward_pre_hook(lambda module, args: calls.append(module.training))
    model.fit(1, (X, y), (X[:32], y[:32]), verbose=0)
    assert calls == [True, True, False]


def test_validation_by_a_custom_step_is_not_called_before_its_turn():
    class Own(minikeras.Model):
        def evaluate_step(self, features, labels):
            order.append("validation")
            return {"loss": self.compute_loss(self(features), labels)}

        def train_step(self, features, labels):
            order.append("training")
            return super().train_step(features, labels)

    order = []
    model = Own(nn.Linear(2, 1))
    model.compile(nn.MSELoss(), device="cpu")
    model.fit(1, [(X, y)], [(X.double().float()[:8, :2], y[:8].reshape(-1, 1))], verbose=0)
    model.fit(1, [(X, y)], [(X[:8, None], y[:8, None])], verbose=0)
    assert order == ["training", "validation"] * 2


def own_loss(y_pred, y_true):
    return y_pred["loss"].mean()


class GivesLoss(nn.Module):
    """A model that takes the labels as a feature, and computes the loss of each row."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, x, labels):
        return {"loss": (self.fc(x) - labels).square()}


@pytest.mark.parametrize("end", [(None,), ()])
def test_loss_that_ignores_labels_needs_none(end):
    batches = []
    for rows in (5, 3):
        batches.append(({"x": torch.rand(rows, 2), "labels": torch.rand(rows, 1)}, *end))
    model = minikeras.Model(GivesLoss())
    model.compile(own_loss, torch.optim.SGD(model.parameters(), lr=0.0), device="cpu")
    with torch.no_grad():
        losses = [model(**batch[0])["loss"] for batch in batches]
    expected = torch.cat(losses).mean().item()
    history = model.fit(1, batches, batches, verbose=0)
    assert history[["loss", "val_loss"]].iloc[0].tolist() == pytest.approx(
        [expected, expected], rel=1e-5
    )


def test_loss_that_fails_without_labels_says_that_there_are_none():
    model = compiled(minikeras.Model(nn.Linear(2, 1)), lambda p, t: (p - t).square().mean())
    with pytest.raises(TypeError, match="NoneType") as caught:
        model.fit(1, [X[:8, :2]], verbose=0)
    assert "The batches contain only features: pass (features, labels)" in caught.value.__notes__[0]
    rows = X[:8, :1]
    compiled(minikeras.Model(nn.Linear(1, 1)), lambda p, t: (p - t).square().mean()).fit(
        1, (rows, rows), verbose=0
    )
