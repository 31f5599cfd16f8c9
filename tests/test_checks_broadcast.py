"""Labels (N,) that broadcast against outputs (N, 1) are found in any loss or metric.

A loss that broadcasts on purpose passes.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.bad_input import (
    CLASSES,
    COLUMN,
    IT_BROADCASTS,
    MAPS,
    ONES,
    OTHER_ROW,
    ROW,
    Scale,
    X,
    Y,
    compiled,
    refused,
)
from helpers.metrics import mse, r2
from torch import nn

from minikeras.checks.inputs import guarded


def own_hinge(p, t):
    return torch.clamp(1 - p * (2 * t - 1), min=0).mean()


def own_bce(p, t):
    return -(t * p.log() + (1 - t) * (1 - p).log()).mean()


def own_huber(p, t):
    error = (p - t).abs()
    return torch.where(error < 0.5, error**2 / 2, 0.5 * error - 0.125).mean()


def quantile_loss(p, t):
    return torch.maximum(0.9 * (t - p), -0.1 * (t - p)).mean()


BROADCAST = {
    "own mse": lambda p, t: ((p - t) ** 2).mean(),
    "own rmse": lambda p, t: torch.sqrt(torch.mean(torch.square(t - p))),
    "own mae": lambda p, t: torch.abs(torch.sub(p, t)).mean(),
    "own huber": own_huber,
    "log-cosh": lambda p, t: torch.log(torch.cosh(p - t)).mean(),
    "own bce": own_bce,
    "hinge": own_hinge,
    "quantile loss": quantile_loss,
    "R2": r2,
    "F.mse_loss": F.mse_loss,
    "F.l1_loss": F.l1_loss,
    "F.smooth_l1_loss": F.smooth_l1_loss,
    "F.huber_loss": F.huber_loss,
    "nn.MSELoss": nn.MSELoss(),
    "nn.L1Loss": nn.L1Loss(),
    "nn.BCELoss": nn.BCELoss(),
    "F.kl_div": lambda p, t: F.kl_div(p.log(), t, reduction="batchmean"),
    "gaussian NLL": lambda p, t: F.gaussian_nll_loss(p, t, torch.ones_like(p)),
    "poisson NLL": nn.PoissonNLLLoss(),
    "accuracy by ==": lambda p, t: ((p > 0.5) == (t > 0.5)).float().mean(),
    "accuracy by rounding": lambda p, t: torch.eq(p.round(), t.round()).float().mean(),
    "accuracy by where": lambda p, t: (
        (torch.where(p > 0.5, 1, 0) == t.round().long()).sum() / len(t)
    ),
    "after float and detach": lambda p, t: ((p.detach().float() - t.float()) ** 2).mean().item(),
}


@pytest.mark.parametrize("function", BROADCAST.values(), ids=BROADCAST)
def test_broadcasting_labels_in_a_loss_are_refused_before_a_weight_moves(function):
    model = compiled(Scale(), function)
    with refused(f"ValueError: the loss: {IT_BROADCASTS}", model):
        model.fit(1, (COLUMN, ROW), verbose=0)


@pytest.mark.parametrize("function", BROADCAST.values(), ids=BROADCAST)
def test_broadcasting_labels_in_a_metric_are_refused_before_a_weight_moves(function):
    model = compiled(Scale(), loss=lambda p, t: p.mean(), metrics={"m": function})
    with refused(f"ValueError: metric 'm': {IT_BROADCASTS}", model):
        model.fit(1, (COLUMN, ROW), verbose=0)


class RunningError:
    """A metric object as torchmetrics has them."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.total = torch.zeros(())
        self.rows = 0

    def update(self, p, t):
        self.total = self.total + ((p - t) ** 2).sum()
        self.rows = self.rows + len(t)

    def compute(self):
        return self.total / self.rows


def test_broadcasting_labels_in_a_metric_object_are_refused_before_a_weight_moves():
    model = compiled(Scale(), loss=lambda p, t: p.mean(), metrics={"m": RunningError()})
    with refused(f"ValueError: metric 'm': {IT_BROADCASTS}", model):
        model.fit(1, (COLUMN, ROW), verbose=0)


def test_broadcasting_labels_in_validation_alone_are_refused_there():
    with refused(f"ValueError: the loss: {IT_BROADCASTS}") as error:
        compiled(Scale()).fit(1, (COLUMN, COLUMN), (COLUMN, ROW), verbose=0)
    assert error.value.__notes__ == ["dl_val, batch 1, checked before the first step", "epoch 1"]


def nll_of_chunks(outputs, t):
    mean, log_variance = outputs.chunk(2, dim=1)
    return ((mean - t) ** 2 / log_variance.exp() + log_variance).mean()


DERIVED = {
    "argmax keepdim": (lambda p, t: (p.argmax(1, keepdim=True) == t).float().mean(), X, CLASSES),
    "max keepdim": (lambda p, t: (p.max(1, keepdim=True)[1] == t).float().mean(), X, CLASSES),
    "topk": (lambda p, t: (p.topk(1).indices == t).float().mean(), X, CLASSES),
    "chunk": (nll_of_chunks, X[:, :2], ROW),
    "split": (lambda p, t: mse(p.split(1, 1)[0], t), X, ROW),
    "a column": (lambda p, t: mse(p[:, :1], t), X, ROW),
    "a dict": (lambda p, t: mse(p["mean"], t), {"mean": COLUMN}, ROW),
    "in place": (lambda p, t: p.clone().sub_(t).abs().mean(), COLUMN, ROW),
}


@pytest.mark.parametrize(("function", "outputs", "labels"), DERIVED.values(), ids=DERIVED)
def test_broadcasting_labels_are_found_in_what_is_taken_from_the_outputs(function, outputs, labels):
    with refused(f"ValueError: the loss: {IT_BROADCASTS}"):
        guarded(function, outputs, labels, "the loss")


SHAPES = [
    # outputs, labels, what they would broadcast to, what to pass
    ((8,), (8, 1), (8, 8), "squeeze(-1), or unsqueeze"),
    ((8, 8, 1), (8, 8), (8, 8, 8), "unsqueeze(-1), or squeeze"),
    ((8, 1, 5, 5), (8, 5, 5), (8, 8, 5, 5), "unsqueeze(1), or squeeze"),
    ((8, 5, 5), (8, 1, 5, 5), (8, 8, 5, 5), "squeeze(1), or unsqueeze"),
    ((8, 1, 1), (8,), (8, 1, 8), "reshape(8, 1, 1), or squeeze"),
]


@pytest.mark.parametrize(
    "function", [mse, nn.BCEWithLogitsLoss(), nn.L1Loss()], ids=["own", "logits", "L1"]
)
@pytest.mark.parametrize(("outputs", "labels", "wide", "remedy"), SHAPES)
def test_broadcasting_labels_raise_an_error_whose_remedy_fits_the_shapes(
    function, outputs, labels, wide, remedy
):
    message = f"predictions {outputs} and labels {labels} would broadcast to {wide}. "
    with refused(f"ValueError: the loss: {message}Pass labels.{remedy} the predictions."):
        guarded(function, torch.rand(outputs), torch.rand(labels), "the loss")


def ctc(outputs, labels):
    return F.ctc_loss(outputs, labels, torch.full((4,), 6), torch.full((4,), 3))


def cox(p, t):  # negative log partial likelihood, every event observed
    at_risk = t[None, :] >= t[:, None]
    return -(p - torch.where(at_risk, p[None, :], -torch.inf).logsumexp(1)).mean()


def pairwise_ranking(p, t):
    above = t[:, None] > t[None, :]
    return (F.softplus(p[None, :] - p[:, None]) * above).sum() / above.sum()


def info_nce(p, t):
    similar = F.normalize(p) @ F.normalize(p).T
    same = (t[:, None] == t[None, :]).float()
    return -(similar.log_softmax(1) * same).mean()


def quantiles(p, t):  # (N, Q) against (N, 1)
    levels = torch.tensor([0.1, 0.5, 0.9, 0.99])
    return torch.maximum(levels * (t - p), (levels - 1) * (t - p)).mean()


def dice(p, t):
    return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())


def confusion(p, t):
    hits = F.one_hot(t, 4).float().T @ F.one_hot(p.argmax(1), 4).float()
    return hits.diag().sum() / hits.sum()


def chamfer(p, t):  # distances between all points of two clouds (batch, points, 3)
    return (p[:, :, None] - t[:, None, :]).norm(dim=-1).amin(-1).mean()


LOG_PROBABILITIES = torch.randn(6, 4, 5).log_softmax(-1)
MEANT = {
    "squeezed outputs": (lambda p, t: mse(p.squeeze(-1), t), COLUMN, ROW),
    "unsqueezed labels": (lambda p, t: mse(p, t.unsqueeze(-1)), COLUMN, ROW),
    "view_as": (lambda p, t: F.l1_loss(p, t.view_as(p)), COLUMN, ROW),
    "CTC": (ctc, LOG_PROBABILITIES, torch.randint(1, 5, (4, 3))),
    "Cox": (cox, ROW, OTHER_ROW),
    "pairwise ranking": (pairwise_ranking, ROW, OTHER_ROW),
    "pairwise ranking of a column": (lambda p, t: pairwise_ranking(p[:, 0], t), COLUMN, ROW),
    "InfoNCE": (info_nce, X, CLASSES),
    "quantiles": (quantiles, X, Y),
    "mask from labels": (lambda p, t: p[t > 0.5].mean(), COLUMN, ROW),
    "mask beside labels": (
        lambda p, t: ((p - t[0]) ** 2 * t[1]).mean(),
        ROW,
        (OTHER_ROW, ONES[:, 0]),
    ),
    "segmentation": (
        nn.CrossEntropyLoss(),
        torch.randn(8, 3, 5, 5),
        torch.randint(0, 3, (8, 5, 5)),
    ),
    "class index": (nn.CrossEntropyLoss(), X, CLASSES),
    "class probabilities": (nn.CrossEntropyLoss(), X, torch.rand(8, 4).softmax(1)),
    "class weights": (nn.CrossEntropyLoss(weight=torch.arange(1.0, 5)), X, CLASSES),
    "weights looked up": (
        lambda p, t: (torch.arange(1.0, 5)[t] * F.cross_entropy(p, t)).mean(),
        X,
        CLASSES,
    ),
    "multi-label BCE": (nn.BCEWithLogitsLoss(), X, (X > 0).float()),
    "one row": (mse, COLUMN[:1], ROW[:1]),
    "a sequence": (mse, torch.rand(8, 5, 1), torch.rand(8, 5, 1)),
    "a scalar": (lambda p, t: ((p - t.mean()) ** 2).mean(), COLUMN, ROW),
    "triplet": (
        lambda p, t: F.triplet_margin_loss(p, p.roll(1, 0), p.roll(2, 0)) * (t > 0).float().mean(),
        X,
        ROW,
    ),
    "cosine embedding": (
        lambda p, t: F.cosine_embedding_loss(*p, t),
        (X, X.roll(1, 0)),
        ROW.round() * 2 - 1,
    ),
    "multi-margin": (nn.MultiMarginLoss(), X, CLASSES),
    "multi-label margin": (
        nn.MultiLabelMarginLoss(),
        X,
        torch.tensor([[0, 2, -1, -1]]).expand(8, 4),
    ),
    "dice": (dice, MAPS, MAPS.round()),
    "adaptive softmax": (
        lambda p, t: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2])(p, t).loss,
        X,
        CLASSES,
    ),
    "nll_loss": (lambda p, t: F.nll_loss(p.log_softmax(1), t), X, CLASSES),
    "top-k accuracy": (
        lambda p, t: (p.topk(2).indices == t[:, None]).any(1).float().mean(),
        X,
        CLASSES,
    ),
    "top-1 accuracy": (
        lambda p, t: (p.topk(1).indices == t[:, None]).any(1).float().mean(),
        X,
        CLASSES,
    ),
    "confusion matrix": (confusion, X, CLASSES),
    "two heads": (
        lambda p, t: mse(p["a"], t[0]) + mse(p["b"], t[1]),
        {"a": COLUMN, "b": ROW},
        (COLUMN, ROW),
    ),
    "Chamfer distance": (chamfer, torch.rand(2, 6, 3), torch.rand(2, 6, 3)),
    "kernel distance": (
        lambda p, t: torch.exp(-((p[:, None] - t[None, :]) ** 2)).mean(),
        ROW,
        OTHER_ROW,
    ),
}


@pytest.mark.parametrize(("function", "outputs", "labels"), MEANT.values(), ids=MEANT)
def test_broadcasting_that_a_loss_means_is_not_disturbed(function, outputs, labels):
    torch.manual_seed(0)
    plain = function(outputs, labels)
    torch.manual_seed(0)
    assert guarded(function, outputs, labels, "the loss").item() == plain.item()


def test_broadcasting_labels_are_looked_for_in_the_first_batch_of_every_fit_alone():
    model = compiled(Scale(), mse)
    assert len(model.fit(1, [(COLUMN, COLUMN), (COLUMN, ROW)], verbose=0)) == 1
    with refused(f"ValueError: the loss: {IT_BROADCASTS}", model):
        model.fit(1, [(COLUMN, ROW)], verbose=0)
