"""What a user is told when something is wrong, and that nothing that is right is refused.

labels that broadcast    (N,) against (N, 1) in any loss or metric is found; what looks alike and is meant passes
bad input                one error: what was expected, what came, what to do; before that batch moves a weight
no false alarms          what looks wrong and is right trains
"""

import contextlib
import copy
import re
import warnings
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers.metrics import cosine, mse, r2
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minikeras import Average, Callback, Model
from minikeras.checks.inputs import guarded
from minikeras.errors import described

random = torch.Generator().manual_seed(0)
X, Y = torch.randn(8, 4, generator=random), torch.randn(8, 1, generator=random)
S = X[:, :3]  # raw scores of 3 classes
CLASSES = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
COLUMN, ROW = (
    torch.rand(8, 1, generator=random),
    torch.rand(8, generator=random),
)  # 8 numbers between 0 and 1 each
OTHER_ROW = torch.rand(8, generator=random)
ONES = torch.ones(8, 1)
MAPS = torch.rand(8, 1, 5, 5, generator=random)
CE = nn.CrossEntropyLoss()


class Scale(nn.Module):
    """Outputs are the features; there is a weight to train."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.weight


def compiled(net=None, loss=None, optimizer=None, metrics=None, kind=Model):
    """A compiled model on the CPU; `optimizer` is a function of it."""
    torch.manual_seed(0)
    model = kind(nn.Linear(4, 1) if net is None else copy.deepcopy(net))
    model.compile(loss or nn.MSELoss(), optimizer and optimizer(model), metrics, device="cpu")
    return model


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@contextlib.contextmanager
def refused(message, model=None):
    """The block ends in exactly this error, "ValueError: ...", and no weight has moved by then."""
    before = (
        {} if model is None else {name: value.clone() for name, value in model.state_dict().items()}
    )
    with pytest.raises(Exception) as error:  # noqa: PT011
        yield error
    assert f"{error.type.__name__}: {error.value}" == message
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def cases(table, messages):
    """Each thing given with its message; `messages` has a "name | message" per case, or "name | name | message"."""
    told = {}
    for entry in re.split(r"\n(?! )", messages.strip()):
        *names, message = " ".join(entry.split()).split(" | ")
        told |= dict.fromkeys(names, message)
    assert list(told) == list(table)
    return [pytest.param(table[name], told[name], id=name) for name in table]


# ---------------------------------------------------------------- labels that broadcast: found


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
IT_BROADCASTS = "predictions (8, 1) and labels (8,) would broadcast to (8, 8). "
IT_BROADCASTS += (
    "Pass labels.unsqueeze(-1), in NumPy labels[:, None], in pandas labels.to_frame(), "
)
IT_BROADCASTS += "or squeeze the predictions."


@pytest.mark.parametrize("function", BROADCAST.values(), ids=BROADCAST)
def test_a_loss_that_broadcasts_the_labels_is_refused_before_a_weight_moves(function):
    model = compiled(Scale(), function)
    with refused(f"ValueError: the loss: {IT_BROADCASTS}", model):
        model.fit(1, (COLUMN, ROW), verbose=0)


@pytest.mark.parametrize("function", BROADCAST.values(), ids=BROADCAST)
def test_a_metric_that_broadcasts_the_labels_is_refused_before_a_weight_moves(function):
    model = compiled(Scale(), loss=lambda p, t: p.mean(), metrics={"m": function})
    with refused(f"ValueError: metric 'm': {IT_BROADCASTS}", model):
        model.fit(1, (COLUMN, ROW), verbose=0)


class RunningError:
    """A metric object as torchmetrics has them."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.total, self.rows = torch.zeros(()), 0

    def update(self, p, t):
        self.total, self.rows = self.total + ((p - t) ** 2).sum(), self.rows + len(t)

    def compute(self):
        return self.total / self.rows


def test_a_metric_object_that_broadcasts_the_labels_is_refused_before_a_weight_moves():
    model = compiled(Scale(), loss=lambda p, t: p.mean(), metrics={"m": RunningError()})
    with refused(f"ValueError: metric 'm': {IT_BROADCASTS}", model):
        model.fit(1, (COLUMN, ROW), verbose=0)


def test_labels_that_broadcast_in_validation_alone_are_refused_there():
    with refused(f"ValueError: the loss: {IT_BROADCASTS}") as error:
        compiled(Scale()).fit(1, (COLUMN, COLUMN), (COLUMN, ROW), verbose=0)
    assert error.value.__notes__ == ["dl_val, batch 1, looked at before the first step", "epoch 1"]


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
def test_what_is_taken_from_the_outputs_is_followed(function, outputs, labels):
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
def test_the_remedy_fits_the_shapes(function, outputs, labels, wide, remedy):
    message = f"predictions {outputs} and labels {labels} would broadcast to {wide}. "
    with refused(f"ValueError: the loss: {message}Pass labels.{remedy} the predictions."):
        guarded(function, torch.rand(outputs), torch.rand(labels), "the loss")


# ---------------------------------------------------------------- labels that broadcast: not disturbed


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
def test_a_loss_that_means_what_it_does_is_not_disturbed(function, outputs, labels):
    torch.manual_seed(0)
    plain = function(outputs, labels)
    torch.manual_seed(0)
    assert guarded(function, outputs, labels, "the loss").item() == plain.item()


# ---------------------------------------------------------------- bad input: what fit is given


def fits_badly(message, data=(X, Y), epochs=1, model=None, **arguments):
    model = compiled(**(model or {}))
    with refused(message, model):
        model.fit(epochs, data, **{"verbose": 0, **arguments})


@pytest.mark.parametrize(
    "verb", ["fit", "evaluate", "compute_loss", "backward", "compute_metrics", "optimizer_step"]
)
def test_a_model_that_is_not_compiled_says_so(verb):
    arguments = {
        "fit": (1, (X, Y)),
        "evaluate": ((X, Y),),
        "backward": (Y,),
        "optimizer_step": (),
    }.get(verb, (Y, Y))
    message = (
        f"NotCompiledError: {verb} needs a loss and an optimizer, and Model has not been compiled. "
    )
    with refused(message + "Call model.compile(loss_func, optimizer) first."):
        getattr(Model(nn.Linear(4, 1)), verb)(*arguments)


NOT_COUNTS = [("epochs", value) for value in (0, -1, "3", True, 2.5, None)]
NOT_COUNTS += [
    (name, 0) for name in ("steps_per_epoch", "validation_freq", "batch_size", "log_step_freq")
]


KERAS = {"X first": X, "arrays first": (X, Y), "NumPy first": X.numpy()}
KERAS_SAYS = """
X first | ValueError: epochs must be a whole number of 1 or more, got Tensor (8, 4) float32. Epochs come first: fit(5,
    (X, y)).
arrays first | ValueError: epochs must be a whole number of 1 or more, got (Tensor (8, 4) float32, Tensor (8, 1)
    float32). Epochs come first: fit(5, (X, y)).
NumPy first | ValueError: epochs must be a whole number of 1 or more, got ndarray (8, 4) float32. Epochs come first:
    fit(5, (X, y)).
"""


@pytest.mark.parametrize(("first", "message"), cases(KERAS, KERAS_SAYS))
def test_who_gives_the_data_first_is_told_that_epochs_come_first(first, message):
    fits_badly(message, Y, first)


@pytest.mark.parametrize(("name", "value"), NOT_COUNTS)
def test_a_count_must_be_a_whole_number_of_one_or_more(name, value):
    fits_badly(
        f"ValueError: {name} must be a whole number of 1 or more, got {value!r}.", **{name: value}
    )


class Indexed:
    def __getitem__(self, number):
        return X, Y


LOADER = DataLoader(TensorDataset(X, Y), 16, drop_last=True)
NO_ROWS = TensorDataset(X[:0], Y[:0])
CITIES = pd.DataFrame({"age": [1.0] * 8, "city": ["Rome"] * 8})
FIT = {
    "batch_size beside a DataLoader": {"data": LOADER, "batch_size": 4},
    "a loader without rows": {"data": DataLoader(NO_ROWS, 4)},
    "a dataset without rows": {"data": NO_ROWS},
    "arrays without rows": {"data": (X[:0], Y[:0])},
    "validation without rows": {"dl_val": (X[:0], Y[:0])},
    "drop_last drops everything": {"data": LOADER},
    "an empty list": {"data": []},
    "an empty list in steps": {"data": [], "steps_per_epoch": 2},
    "X and y of different lengths": {"data": (X, Y[:7])},
    "labels as a list": {"data": (X, ONES.tolist())},
    "X and y as lists": {"data": (ONES.tolist(), Y.tolist())},
    "rows of many lengths": {"data": ([np.zeros(3), np.zeros(5), np.zeros(4), np.zeros(6)], Y)},
    "a tuple of 4 arrays": {"data": (X, X, Y, Y)},
    "a batch of 4 parts": {"data": [(X, X, Y, Y)]},
    "a batch that is a lone tensor": {"data": [X]},
    "X alone": {"data": X},
    "a dict of one": {"data": [{"x": X}]},
    "a dict without labels": {"data": [{"x": X, "y": Y}]},
    "a dict with labels first": {"data": [{"labels": Y, "input_ids": X}]},
    "a number": {"data": 5},
    "no iteration but items": {"data": Indexed()},
    "a text column": {"data": (CITIES, Y)},
    "an array of text": {"data": (np.array(["a"] * 8), Y)},
    "a sample_weight of two columns": {"data": (X, Y, torch.ones(8, 2))},
    "a sample_weight that is short": {"data": [(X, Y, torch.ones(7))]},
    "a sample_weight and one loss for all rows": {"data": (X, Y, torch.ones(8))},
    "a loud verbose": {"verbose": "loud"},
    "a callback class": {"callbacks": [Callback]},
    "a lone callback class": {"callbacks": Callback},
    "a function as callback": {"callbacks": [print]},
}
FIT_SAYS = """
batch_size beside a DataLoader | ValueError: batch_size=4 is for data that is not batched yet, and dl_train is a
    DataLoader, which makes its own batches. Leave batch_size out, or set it where dl_train is made.
a loader without rows | a dataset without rows | ValueError: dl_train gave no batch: its dataset has no rows.
arrays without rows | ValueError: dl_train gave no batch: its arrays have no rows.
validation without rows | ValueError: dl_val gave no batch: its arrays have no rows.
drop_last drops everything | ValueError: dl_train gave no batch: drop_last=True drops the only batch, 8 rows of
    batch_size=16. Set drop_last=False.
an empty list | an empty list in steps | ValueError: dl_train gave no batch: iterating it ended at once.
X and y of different lengths | ValueError: dl_train holds arrays of 8 and 7 rows; expected as many rows in each. Got
    (Tensor (8, 4) float32, Tensor (7, 1) float32).
labels as a list | X and y as lists | TypeError: dl_train holds 1.0; expected an array of numbers. A list is many
    arrays: pass one array of equal rows, numpy.array(rows), or a DataLoader with a collate_fn.
rows of many lengths | ValueError: dl_train holds arrays of 3 and 5 and 4 and ... rows; expected as many rows in each.
    Got ([Tensor (3,) float32, Tensor (5,) float32, Tensor (4,) float32, Tensor (6,) float32], Tensor (8, 1) float32). A
    list is many arrays: pass one array of equal rows, numpy.array(rows), or a DataLoader with a collate_fn.
a tuple of 4 arrays | ValueError: dl_train is a tuple of 4; expected (X, y) or (X, y, sample_weight). Put several inputs
    into a tuple of their own: ((X1, X2), y).
a batch of 4 parts | ValueError: a batch has 4 parts: (Tensor (8, 4) float32, Tensor (8, 4) float32, Tensor (8, 1)
    float32, Tensor (8, 1) float32); expected (features, labels) or (features, labels, sample_weight). Put several
    inputs into a tuple of their own: ((a, b), labels).
a batch that is a lone tensor | X alone | a dict of one | ValueError: the batches are features alone, and the loss
    compares with labels. Give batches of (features, labels), arrays as a tuple (X, y), for an autoencoder (X, X); or
    override train_step.
a dict without labels | ValueError: the batches are dicts of x, y, all of them features, and the loss compares with
    labels. Give batches of (features, labels), (batch, batch.pop('y')) where they are made; or override train_step.
a dict with labels first | ValueError: the batches are dicts of labels, input_ids, all of them features, and the loss
    compares with labels. Give batches of (features, labels), (batch, batch.pop('labels')) where they are made; or
    override train_step.
a number | TypeError: dl_train must be a DataLoader, a Dataset, an iterable of (features, labels) batches or arrays (X,
    y), got int.
no iteration but items | TypeError: dl_train must be a DataLoader, a Dataset, an iterable of (features, labels) batches
    or arrays (X, y), got Indexed. Give it an __iter__, or derive it from torch.utils.data.Dataset if its items are
    rows.
a text column | TypeError: dl_train has columns that are not numbers: city. Encode them first, for instance with
    pandas.get_dummies(frame, dtype=float) or column.astype('category').cat.codes.
an array of text | TypeError: dl_train holds <U1 values; expected numbers. Encode them as numbers first: as class
    numbers, pandas.factorize(array)[0].
a sample_weight of two columns | ValueError: the third part of a batch is a weight per row: expected shape (8,), got
    Tensor (8, 2) float32. Put several inputs into a tuple of their own: ((a, b), labels).
a sample_weight that is short | ValueError: the third part of a batch is a weight per row: expected shape (8,), got
    Tensor (7,) float32. Put several inputs into a tuple of their own: ((a, b), labels).
a sample_weight and one loss for all rows | ValueError: the batches carry a sample_weight, their third part, so the loss
    must have a value per row: expected shape (8,), got Tensor () float32. Build it with reduction="none"; two inputs
    are ((a, b), y).
a loud verbose | ValueError: verbose must be "auto", 0 (nothing), 1 (bar) or 2 (lines), got 'loud'.
a callback class | a lone callback class | TypeError: callbacks must be instances of minikeras.Callback, got the class
    Callback. Pass Callback().
a function as callback | TypeError: callbacks must be instances of minikeras.Callback, got <built-in function print>.
    Pass LambdaCallback(on_epoch_end=...) for a function.
"""


@pytest.mark.parametrize(("arguments", "message"), cases(FIT, FIT_SAYS))
def test_fit_refuses_what_it_cannot_use_before_a_weight_moves(arguments, message):
    fits_badly(message, **arguments)


def batches(number):
    return ((X, Y) for _ in range(number))


ONLY_ONCE = "it is a generator, which can be iterated only once. "
ONLY_ONCE += "Pass a list of batches or an object whose __iter__ starts anew"


USED_UP = f"a generator, {ONLY_ONCE.removeprefix('it is a generator, ')}"


def test_a_generator_lasts_for_one_epoch_and_is_refused_for_more_before_a_weight_moves():
    assert len(compiled().fit(1, batches(2), verbose=0)) == 1
    says = f"dl_train is {USED_UP}, or give steps_per_epoch. It was to last for 2 epochs."
    fits_badly(f"ValueError: {says}", batches(2), epochs=2)


def test_so_is_one_for_validation_which_is_told_of_validation_steps():
    assert len(compiled().fit(2, (X, Y), batches(2), validation_freq=2, verbose=0)) == 2
    says = (
        f"ValueError: dl_val is {USED_UP}, or give validation_steps. It was to last for 2 epochs."
    )
    fits_badly(says, epochs=2, dl_val=batches(2))


class StartsAnew:
    def __iter__(self):
        self.left = 2
        return self

    def __next__(self):
        self.left -= 1
        if self.left < 0:
            raise StopIteration
        return X, Y


def test_an_iterator_that_starts_anew_lasts_as_long_as_it_is_asked():
    assert len(compiled().fit(2, StartsAnew(), StartsAnew(), verbose=0)) == 2


def test_a_generator_that_is_used_up_says_so():
    used = batches(1)
    model = compiled()
    model.fit(1, used, verbose=0)
    with refused(f"ValueError: dl_train gave no batch: {ONLY_ONCE}."):
        model.fit(1, used, verbose=0)


def test_a_generator_that_is_long_enough_serves_steps_per_epoch():
    assert len(compiled().fit(2, batches(4), steps_per_epoch=2, verbose=0)) == 2


def test_a_generator_that_runs_out_within_steps_per_epoch_says_after_how_many_batches():
    with refused(
        f"ValueError: dl_train ended after 3 batches, and steps_per_epoch=2 needs more: {ONLY_ONCE}."
    ):
        compiled().fit(2, batches(3), steps_per_epoch=2, verbose=0)


@pytest.mark.parametrize("jit", [False, True])
def test_rows_without_weights_are_all_alike_in_an_evaluation_and_refused_in_training(jit):
    model = Model(nn.Linear(4, 1))
    model.compile(nn.MSELoss(reduction="none"), device="cpu", jit=jit)
    weighted = model.fit(2, (X, Y, torch.ones(8)), (X, Y), batch_size=3, verbose=0)
    expected = F.mse_loss(model.predict(X), Y).item()
    assert weighted["val_loss"][1] == pytest.approx(expected, rel=1e-6)
    assert model.evaluate((X, Y), batch_size=3)["val_loss"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="expected one number, a 0-d tensor"):
        model.fit(1, (X, Y), verbose=0)


def test_an_error_in_a_batch_says_where_in_the_fit_it_was():
    with pytest.raises(ValueError, match="parts") as error:
        compiled().fit(1, [(X, Y), (X, X, Y, Y)], verbose=0)
    assert error.value.__notes__ == ["dl_train, batch 2", "epoch 1"]


# ---------------------------------------------------------------- bad input: losses and metrics in the first batch

BCE, LOGITS = nn.BCELoss(), nn.BCEWithLogitsLoss()
LOSSES = {
    "float labels": (CE, S, CLASSES.float()),
    "(N, 1) labels": (CE, S, CLASSES[:, None]),
    "(N, 1) float labels": (CE, S, CLASSES[:, None].float()),
    "probabilities of 2 of 3 classes": (CE, S, S[:, :2]),
    "int32 labels": (CE, S, CLASSES.int()),
    "float labels for NLLLoss": (nn.NLLLoss(), S, CLASSES.float()),
    "a label past the classes": (CE, S, CLASSES + 1),
    "a label below 0": (CE, S, CLASSES - 1),
    "a label past the classes in a loss of one's own": (
        lambda p, t: F.cross_entropy(p, t) * 2,
        S,
        CLASSES + 1,
    ),
    "one class": (CE, ONES, torch.zeros(8).long()),
    "raw scores for BCELoss": (BCE, ONES.cumsum(0), ONES),
    "labels of 1 to 8 for BCELoss": (BCE, ONES, ONES.cumsum(0)),
    "NaN for BCELoss": (BCE, torch.where(ONES.cumsum(0) > 7, torch.nan, ONES), ONES),
    "int labels for BCELoss": (BCE, ONES, ONES.long()),
    "int labels for logits": (LOGITS, ONES, ONES.long()),
    "bool labels for BCELoss": (BCE, ONES, ONES.bool()),
    "bool labels for logits": (LOGITS, ONES, ONES.bool()),
    "bool labels for a loss of one's own": (mse, ONES, ONES.bool()),
    "float64 labels for BCELoss": (BCE, ONES, ONES.double()),
    "one loss per row": (nn.MSELoss(reduction="none"), ONES, Y),
    "a loss cut off by detach": (lambda p, t: mse(p.detach(), t), S, S),
    "a loss cut off by item": (lambda p, t: mse(p, t).item(), S, S),
    "two losses": (lambda p, t: (p.mean() * 4, p.mean() * 2.5), ONES, ONES),
    "a loss and its detached part": (lambda p, t: (mse(p, t), p.detach().mean()), S, S),
    "a loss and a part of 0": (lambda p, t: (mse(p, t), torch.tensor(0.0)), S, S),
    "a loss and a part below 0": (lambda p, t: (mse(p, t), torch.tensor(-1.0)), S, S),
    "a loss and a float": (lambda p, t: (mse(p, t), 0.3), S, S),
    "a loss and a number of pairs": (lambda p, t: (mse(p, t), len(p) ** 2), S, S),
    "a loss and a dict": (lambda p, t: (mse(p, t), {"mse": 1.0}), S, S),
    "a list": (lambda p, t: [mse(p, t)], S, S),
    "a dict": (lambda p, t: {"mse": mse(p, t), "part": 0.5}, S, S),
    "an average with a count below 0": (lambda p, t: Average(mse(p, t), torch.tensor(-1)), S, S),
    "an average with a count of NaN": (lambda p, t: Average(mse(p, t), float("nan")), S, S),
    "an average with a gradient in both": (lambda p, t: Average(mse(p, t), p.mean()), S, S),
    "an average that is not summed": (lambda p, t: Average((p - t) ** 2, 8), S, S),
}
LOSSES_SAY = """
float labels | ValueError: labels are float32 (8,); expected one class index (int64) a row, or class probabilities of
    shape (8, 3). Pass labels.long(), or in NumPy and pandas .astype('int64').
(N, 1) labels | ValueError: labels have shape (8, 1); expected one class index (int64) a row, or class probabilities of
    shape (8, 3). Pass labels.squeeze(1).
(N, 1) float labels | ValueError: labels are float32 (8, 1); expected one class index (int64) a row, or class
    probabilities of shape (8, 3). Pass labels.squeeze(1).long(), or in NumPy and pandas .astype('int64').
probabilities of 2 of 3 classes | ValueError: labels are float32 (8, 2); expected one class index (int64) a row, or
    class probabilities of shape (8, 3). Give labels and predictions as many columns.
int32 labels | ValueError: labels are int32; expected one class index (int64) a row, or class probabilities of shape (8,
    3). Pass labels.long(), or in NumPy and pandas .astype('int64').
float labels for NLLLoss | ValueError: labels are float32 (8,); expected one class index (int64) a row. Pass
    labels.long(), or in NumPy and pandas .astype('int64').
a label past the classes | ValueError: label 3 is outside the classes: the model has 3 outputs, so labels go from 0 to
    2. Number the classes from 0, or give the model more outputs.
a label below 0 | ValueError: label -1 is outside the classes: the model has 3 outputs, so labels go from 0 to 2. Number
    the classes from 0; or build the loss with ignore_index=-1 to leave such labels out.
a label past the classes in a loss of one's own | ValueError: label 3 is outside the classes: the model has 3 outputs,
    so labels go from 0 to 2. Number the classes from 0, or give the model more outputs.
one class | ValueError: predictions (8, 1) have one class, so the loss is always 0. Give the model as many outputs as
    there are classes, or use BCEWithLogitsLoss for a yes-or-no question.
raw scores for BCELoss | ValueError: BCELoss takes probabilities from 0 to 1, and the predictions go from 1 to 8. End
    the model with a sigmoid, or use BCEWithLogitsLoss on raw scores.
labels of 1 to 8 for BCELoss | ValueError: BCELoss takes probabilities from 0 to 1, and the labels go from 1 to 8. Scale
    the labels to 0 and 1.
NaN for BCELoss | ValueError: BCELoss takes probabilities from 0 to 1, and 1 of 8 predictions is NaN. Look for NaN in
    the features, or lower the learning rate.
int labels for BCELoss | int labels for logits | ValueError: labels are int64 and predictions float32; the loss takes
    both in one dtype. Pass labels.float(), or in NumPy and pandas .astype('float32').
bool labels for BCELoss | bool labels for logits | bool labels for a loss of one's own | ValueError: labels are bool and
    predictions float32; the loss takes both in one dtype. Pass labels.float(), or in NumPy and pandas
    .astype('float32').
float64 labels for BCELoss | ValueError: labels are float64 and predictions float32; the loss takes both in one dtype.
    Pass labels.float(), or in NumPy and pandas .astype('float32').
one loss per row | ValueError: the loss gave Tensor (8, 1) float32; expected one number, a 0-d tensor. Build it with
    reduction="mean", or end it with .mean().
a loss cut off by detach | ValueError: the loss is Tensor () float32 without a gradient: it does not depend on any
    trainable parameter. Compute it from the model's outputs in torch, without detach, .item() or NumPy.
a loss cut off by item | ValueError: the loss is float without a gradient: it does not depend on any trainable
    parameter. Compute it from the model's outputs in torch, without detach, .item() or NumPy.
two losses | a loss and its detached part | a loss and a part of 0 | a loss and a part below 0 | ValueError: the loss
    gave a tuple, (Tensor () float32, Tensor () float32); expected one number. Return one part, such as [0], or the sum
    of several; or minikeras.Average(total, count), if they are a total and the count to divide it by.
a loss and a float | ValueError: the loss gave a tuple, (Tensor () float32, float); expected one number. Return one
    part, such as [0], or the sum of several; or minikeras.Average(total, count), if they are a total and the count to
    divide it by.
a loss and a number of pairs | ValueError: the loss gave a tuple, (Tensor () float32, int); expected one number. Return
    one part, such as [0], or the sum of several; or minikeras.Average(total, count), if they are a total and the count
    to divide it by.
a loss and a dict | ValueError: the loss gave a tuple, (Tensor () float32, {'mse': float}); expected one number. Return
    one part, such as [0], or the sum of several; or minikeras.Average(total, count), if they are a total and the count
    to divide it by.
a list | ValueError: the loss gave a list, [Tensor () float32]; expected one number. Return one part, such as [0], or
    the sum of several; or minikeras.Average(total, count), if they are a total and the count to divide it by.
a dict | ValueError: the loss gave a dict, {'mse': Tensor () float32, 'part': float}; expected one number. Return one of
    its values, such as ['mse'], or their sum. The others can be metrics under names of their own.
an average with a count below 0 | ValueError: the loss gave an Average with count -1; expected a finite number, 0 or
    more. The count is how many units the total is a sum of. If it is something else, return the number [0] alone.
an average with a count of NaN | ValueError: the loss gave an Average with count nan; expected a finite number, 0 or
    more. The count is how many units the total is a sum of. If it is something else, return the number [0] alone.
an average with a gradient in both | ValueError: the loss gave an Average whose count has a gradient, and a count is a
    constant. Pass count.detach(); if the second part is another loss, add the two up and return one number.
an average that is not summed | ValueError: the loss gave Average(total=Tensor (8, 3) float32, count=int); expected a
    number for each: a float or a 0-d tensor. Add up what counts with .sum().
"""


@pytest.mark.parametrize(("given", "message"), cases(LOSSES, LOSSES_SAY))
def test_a_loss_that_cannot_train_is_refused_before_a_weight_moves(given, message):
    loss, outputs, labels = given
    fits_badly(message, data=(outputs, labels), model={"net": Scale(), "loss": loss})


NUMBER = "expected one number: a float, a NumPy scalar, a 0-d tensor, or minikeras.Average(total, count). "
NUMBER += "Take the mean over the rows."
METRICS = {
    "not a scalar": (lambda p, t: p[:, 0] - t, f"gave Tensor (8,) float32; {NUMBER}"),
    "not a scalar, which broadcasts too": (
        lambda p, t: p - t,
        f"gave Tensor (8, 8) float32; {NUMBER}",
    ),
    "nothing": (lambda p, t: None, f"gave NoneType; {NUMBER}"),
}


def refused_metric(metric, message):
    model = {"net": Scale(), "loss": lambda p, t: p.mean(), "metrics": {"m": metric}}
    fits_badly(f"ValueError: metric 'm' {message}", data=(COLUMN, ROW), model=model)


@pytest.mark.parametrize(("metric", "message"), METRICS.values(), ids=METRICS)
def test_a_metric_that_is_no_number_is_refused_before_a_weight_moves(metric, message):
    refused_metric(metric, message)


@pytest.mark.parametrize("count", [-1.0, float("nan"), float("inf")])
def test_a_metric_whose_count_is_no_count_is_refused_before_a_weight_moves(count):
    message = f"gave an Average with count {count:g}; expected a finite number, 0 or more. The count is how many units "
    message += "the total is a sum of. If it is something else, return the number [0] alone."
    refused_metric(lambda p, t: Average(torch.tensor(1.0), torch.tensor(count)), message)


@pytest.mark.parametrize(
    "pair", [(0.5, 0.25), (0.0, 0.0), (1.0, 1.0), (torch.tensor(0.5), torch.tensor(8))]
)
def test_a_metric_that_gives_two_numbers_is_refused_whatever_they_are(pair):
    message = f"gave a tuple, {described(pair)}; expected one number. Return one part, such as [0], or the sum of "
    message += "several; or minikeras.Average(total, count), if they are a total and the count to divide it by."
    refused_metric(lambda p, t: pair, message)


FAILS = {
    "a metric": (
        {"metrics": {"m": lambda p, t: 1 / 0}},
        "metric 'm', given y_pred Tensor (8, 1) float32, y_true Tensor (8, 1) float32",
    ),
    "a loss": (
        {"loss": lambda p, t: 1 / 0},
        "the loss, given y_pred Tensor (8, 1) float32, y_true Tensor (8, 1) float32",
    ),
}


@pytest.mark.parametrize(("model", "note"), FAILS.values(), ids=FAILS)
def test_an_error_in_a_metric_or_a_loss_says_which_and_what_it_was_given(model, note):
    with pytest.raises(ZeroDivisionError) as error:
        compiled(**model).fit(1, (X, Y), verbose=0)
    assert error.value.__notes__ == [note, "dl_train, batch 1", "epoch 1"]


def test_a_loss_that_is_given_all_that_an_lstm_returns_is_told_so():
    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'size'") as error:
        compiled(nn.LSTM(4, 1), lambda p, t: F.mse_loss(p, t)).fit(1, (X, Y), verbose=0)
    assert error.value.__notes__ == [
        "the loss, given y_pred (Tensor (8, 1) float32, (Tensor (1, 1) float32, Tensor (1, 1) float32)), y_true Tensor "
        "(8, 1) float32. Let forward return the first part alone.",
        "dl_train, batch 1",
        "epoch 1",
    ]


SWAPPED = {
    "cross entropy": (lambda y_true, y_pred: F.cross_entropy(y_pred, y_true), S, CLASSES),
    "binary cross entropy": (
        lambda y_true, y_pred: F.binary_cross_entropy(y_pred, y_true),
        COLUMN,
        ONES * 2,
    ),
    "a module's": (lambda y_true, y_pred: CE(y_pred, y_true), S, CLASSES),
}


@pytest.mark.parametrize("given", SWAPPED.values(), ids=SWAPPED)
def test_a_loss_that_takes_its_arguments_in_kerass_order_is_told_ours(given):
    loss, features, labels = given
    with pytest.raises(RuntimeError) as error:
        compiled(Scale(), loss).fit(1, (features, labels), verbose=0)
    assert error.value.__notes__[1:] == [
        "The labels came in for the predictions: a loss is called with (y_pred, y_true), unlike Keras's.",
        "dl_train, batch 1",
        "epoch 1",
    ]


SENTENCES = torch.zeros(8, 5, 12)  # scores of 12 words at 5 places
WORDS = torch.tensor([[0, 1, 2, 3, 40]] * 8)
OTHERWISE = {
    "labels of words": (
        lambda p, t: F.cross_entropy(p.reshape(-1, 12), t.reshape(-1)),
        SENTENCES,
        WORDS,
    ),
    "weights of 2 classes": (
        lambda p, t: F.cross_entropy(p, t.long(), weight=torch.ones(2)),
        S,
        CLASSES.float(),
    ),
    "probabilities made in the loss": (
        lambda p, t: F.binary_cross_entropy(2 * p, t),
        ONES * 0.75,
        ONES,
    ),
}
OTHERWISE_SAY = """
labels of words | IndexError: Target 40 is out of bounds.
weights of 2 classes | RuntimeError: weight tensor should be defined either for all 3 classes or no classes but got
    weight tensor of shape: [2]
probabilities made in the loss | RuntimeError: all elements of input should be between 0 and 1
"""


@pytest.mark.parametrize(("given", "message"), cases(OTHERWISE, OTHERWISE_SAY))
def test_of_what_a_loss_of_ones_own_makes_of_outputs_and_labels_nothing_wrong_is_said(
    given, message
):
    loss, outputs, labels = given
    fits_badly(message, data=(outputs, labels), model={"net": Scale(), "loss": loss})


# ---------------------------------------------------------------- bad input: what reaches a layer


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(5, 1)

    def forward(self, x):
        return self.fc2(self.fc1(x))


LAYERS = {
    "float64 tensors": {"data": (X.double(), Y.double())},
    "integers": {"data": (X.long().numpy(), Y)},
    "too few features": {"data": (X[:, :3], Y)},
    "layers that do not meet": {"model": {"net": Narrow()}},
    "pictures for rows": {"data": (MAPS, Y), "model": {"net": nn.Linear(25, 1)}},
}
LAYERS_SAY = """
float64 tensors | ValueError: layer net has float32 parameters and was given float64 values. Pass features.float(), or
    in NumPy and pandas .astype('float32'), or change the model with model.to(torch.float64) before compile.
integers | ValueError: layer net has float32 parameters and was given int64 values. Pass features.float(), or in NumPy
    and pandas .astype('float32').
too few features | ValueError: layer net takes rows of 4 values (in_features) and was given (8, 3). Pass 4 features a
    row, or build it with in_features=3.
layers that do not meet | ValueError: layer net.fc2 takes rows of 5 values (in_features) and was given (8, 6). Build it
    with in_features=6, or make what comes before it give 5 values a row.
pictures for rows | ValueError: layer net takes rows of 25 values (in_features) and was given (8, 1, 5, 5). Put
    nn.Flatten() before it.
"""


@pytest.mark.parametrize(("arguments", "message"), cases(LAYERS, LAYERS_SAY))
def test_features_that_a_layer_cannot_take_name_the_layer(arguments, message):
    fits_badly(message, **arguments)


class Joins(Scale):
    def forward(self, x):
        return x * self.weight + "suffix"


class Masks(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(3, 1)

    def forward(self, x):
        return self.words(x).masked_fill((x == 0).long()[:, None], -1e9)


class Widens(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x + torch.zeros(4, dtype=torch.float64))


RNN = nn.LSTM(4, 4)
FIRST = "It came from a layer that returns a tuple, as nn.LSTM does: take the first part, outputs, _ = self.lstm(x)."
CONV = "layer net.0: Conv2d(3, 1, kernel_size=(5, 5), stride=(1, 1))"
NOTES = {
    "a flat picture": (
        nn.Sequential(nn.Conv2d(3, 1, 5)),
        X,
        f"{CONV} was given Tensor (8, 4) float32",
    ),
    "int16 words": (
        nn.Embedding(5, 2),
        CLASSES.short(),
        "layer net: Embedding(5, 2) was given Tensor (8,) int16",
    ),
    "words past the end": (
        nn.Embedding(2, 2),
        CLASSES,
        "layer net: Embedding(2, 2) was given Tensor (8,) int64 of 0 to 2, and takes 0 to 1: number from 0, or build "
        "it with more rows.",
    ),
    "all that an LSTM returns": (
        nn.Sequential(RNN, nn.Linear(4, 1)),
        X,
        "layer net.1: Linear(in_features=4, out_features=1, bias=True) was given (Tensor (8, 4) float32, "
        f"(Tensor (1, 4) float32, Tensor (1, 4) float32)). {FIRST}",
    ),
    "two inputs for one": (
        nn.Linear(4, 1),
        (X, X),
        "layer net: Linear(in_features=4, out_features=1, bias=True) was given (Tensor (8, 4) float32, Tensor (8, 4) "
        "float32)",
    ),
    "a slip of one's own": (Joins(), CLASSES, "layer net: Joins() was given Tensor (8,) int64"),
    "a mask of integers in a forward of one's own": (
        Masks(),
        CLASSES,
        "layer net: Masks was given Tensor (8,) int64",
    ),
    "a float64 that forward makes": (
        Widens(),
        X,
        "layer net.fc: Linear(in_features=4, out_features=1, bias=True) was given Tensor (8, 4) float64",
    ),
    "one number for a row": (
        nn.Linear(4, 1),
        X[0, 0],
        "layer net: Linear(in_features=4, out_features=1, bias=True) was given Tensor () float32",
    ),
}


@pytest.mark.parametrize(("net", "features", "note"), NOTES.values(), ids=NOTES)
def test_any_other_error_in_a_layer_carries_a_note_that_names_it(net, features, note):
    with pytest.raises((RuntimeError, IndexError, TypeError)) as error:
        compiled(net).fit(1, [(features, Y)], verbose=0)
    assert error.value.__notes__ == [note, "dl_train, batch 1", "epoch 1"]


class Tab(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 1)

    def forward(self, num, cat):
        return self.fc(torch.cat([num, cat], 1))


@pytest.mark.parametrize(
    "keys", [("numb", "cat"), ("num",), ("num", "cat", "id")], ids=["other", "missing", "extra"]
)
@pytest.mark.parametrize("verb", ["fit", "predict"])
def test_a_dict_whose_keys_are_not_forwards_names_is_told_both(keys, verb):
    model, features = compiled(Tab()), dict.fromkeys(keys, X)
    message = (
        f"the features are a dict with the keys {', '.join(keys)}, and forward takes num, cat. "
    )
    with refused(f"ValueError: {message}Name the keys like these.", model):
        model.fit(1, (features, Y), verbose=0) if verb == "fit" else model.predict(features)


def test_one_input_for_two_is_told_to_make_them_a_tuple():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'cat'") as error:
        compiled(Tab()).predict(X)
    note = "Put several inputs into a tuple of their own: ((a, b), labels), or ((a, b),) without labels."
    assert error.value.__notes__ == [note]


def test_a_layer_of_ones_own_that_is_called_wrongly_is_not_put_down_to_the_keys():
    class Inner(Tab):
        def forward(self, num, cat):
            return self.tab(num)

    net = Inner()
    net.tab = Tab()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'cat'") as error:
        compiled(net).predict({"num": X, "cat": X})
    assert error.value.__notes__ == ["layer net: Inner was given Tensor (8, 4) float32"]


def test_outputs_of_ragged_shapes_cannot_be_joined():
    message = "the outputs of the batches have rows of different shapes, (3,) and (4,), and cannot be joined. "
    with refused(
        f"ValueError: {message}Pad them to one shape in forward, or predict batch by batch."
    ):
        Model(nn.Identity()).predict([torch.ones(2, 3), torch.ones(2, 4)])


class Peak(nn.Module):
    """A row's last value of many, and the most memory that earlier answers had kept."""

    def __init__(self):
        super().__init__()
        self.answers, self.alive = [], 0

    def forward(self, x):
        self.alive = max(self.alive, sum(answer() is not None for answer in self.answers))
        many = x.repeat(1, 1000)
        self.answers.append(weakref.ref(many.untyped_storage()))
        return many[:, -1:]


def test_predict_keeps_no_more_than_the_outputs():
    net = Peak()
    assert torch.equal(Model(net).predict(Y, batch_size=1), Y)
    assert net.alive <= 1


class Force(nn.Module):
    """A gradient is its output."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Linear(4, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.energy(x).square()
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return {"energy": energy, "force": -force}


def test_predict_gives_plain_numbers_though_forward_asks_for_gradients():
    model = Model(Force())
    outputs = model.predict(X, batch_size=3)
    expected = model(X)
    for name, output in outputs.items():
        assert not output.requires_grad
        torch.testing.assert_close(output, expected[name].detach())


def test_predict_has_each_batchs_answer_though_forward_gives_one_buffer_again_and_again():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("out", torch.zeros(2, 1))

        def forward(self, x):
            return self.out.copy_(x)

    assert torch.equal(Model(Buffered()).predict(Y, batch_size=2), Y)


def test_outputs_in_a_list_are_joined_one_by_one():
    class Heads(nn.Module):
        def forward(self, x):
            return [x, -x]

    x = torch.arange(8.0).reshape(4, 2)
    first, second = Model(Heads()).predict(x, batch_size=2)
    assert torch.equal(first, x)
    assert torch.equal(second, -x)


def turned(other):
    """A network that answers with a dict, and from the second batch on with another."""

    class Turned(nn.Module):
        def forward(self, x):
            return {"a": x, "b": -x} if x[0, 0] == 0 else other(x)

    return Model(Turned())


def test_a_dict_of_outputs_is_joined_by_its_keys_in_whatever_order_they_come():
    x = torch.arange(8.0).reshape(4, 2)
    outputs = turned(lambda x: {"b": -x, "a": x}).predict(x, batch_size=2)
    assert torch.equal(outputs["a"], x)
    assert torch.equal(outputs["b"], -x)


X_2, X_2_2 = "Tensor (2, 2) float32", "(Tensor (2, 2) float32, Tensor (2, 2) float32)"
OTHERS = [
    (lambda x: {"a": x}, f"{{'a': {X_2}}}"),
    (lambda x: (x, -x), X_2_2),
    (lambda x: x, X_2),
]


@pytest.mark.parametrize(("other", "shown"), OTHERS)
def test_outputs_that_are_made_in_different_ways_cannot_be_joined(other, shown):
    message = f"the outputs of the batches are made in different ways, {{'a': {X_2}, 'b': {X_2}}} and {shown}, and "
    with refused(
        f"ValueError: {message}cannot be joined. Return the same from each, or predict batch by batch."
    ):
        turned(other).predict(torch.arange(8.0).reshape(4, 2), batch_size=2)


# ---------------------------------------------------------------- bad input: what Model and compile are given

NETS = {"a class": nn.Linear, "layers": [nn.Linear(4, 1), nn.ReLU()], "a function": mse}
NETS_SAY = """
a class | TypeError: Model wraps a torch.nn.Module, got the class Linear. Pass an instance, Linear(...).
layers | TypeError: Model wraps a torch.nn.Module, got [Linear, ReLU]. Pass nn.Sequential(*layers), or subclass Model
    and write its forward.
a function | TypeError: Model wraps a torch.nn.Module, got function. Pass nn.Sequential(*layers), or subclass Model
    and write its forward.
"""


@pytest.mark.parametrize(("net", "message"), cases(NETS, NETS_SAY))
def test_model_wraps_a_module_and_nothing_else(net, message):
    with refused(message):
        Model(net)


class Forgetful(nn.Module):
    def __init__(self):
        self.margin = 1

    def forward(self, p, t):
        return (p - t).mean()


COMPILE = {
    "a loss class": {"loss_func": nn.MSELoss},
    "a loss by name": {"loss_func": "mse"},
    "a loss without super": {"loss_func": Forgetful()},
    "a metric without super": {"metrics_dict": {"m": Forgetful()}},
    "a metric class": {"metrics_dict": {"m": nn.L1Loss}},
    "a list of metrics": {"metrics_dict": [mse]},
    "a metric named 3": {"metrics_dict": {3: mse}},
    "a metric named loss": {"metrics_dict": {"loss": mse}},
    "a metric named val_x": {"metrics_dict": {"val_x": mse}},
    "an optimizer class": {"optimizer": torch.optim.Adam},
    "an optimizer by name": {"optimizer": "adam"},
    "a class in a dict": {"optimizer": {"d": torch.optim.Adam}},
    "no optimizers": {"optimizer": {}},
}
COMPILE_SAYS = """
a loss class | TypeError: loss_func is the class MSELoss; expected an instance. Pass MSELoss().
a loss by name | TypeError: loss_func must be a function of (y_pred, y_true) or a module, got 'mse'. Names stand for
    nothing here: pass for instance nn.MSELoss(); the optimizer comes second, torch.optim.Adam(model.parameters(),
    lr=1e-3).
a loss without super | TypeError: loss_func is a Forgetful whose __init__ did not call super().__init__(). Call it
    there, before anything else.
a metric without super | TypeError: metric 'm' is a Forgetful whose __init__ did not call super().__init__(). Call it
    there, before anything else.
a metric class | TypeError: metric 'm' is the class L1Loss; expected an instance. Pass L1Loss().
a list of metrics | TypeError: metrics_dict must be a dict of name -> metric, got list. Pass for instance {"accuracy":
    accuracy}.
a metric named 3 | TypeError: metrics_dict has the name 3; expected a string.
a metric named loss | ValueError: metrics_dict has the name 'loss', which history uses itself (loss, lr, epoch and
    val_...). Give it another name.
a metric named val_x | ValueError: metrics_dict has the name 'val_x', which history uses itself (loss, lr, epoch and
    val_...). Give it another name.
an optimizer class | TypeError: optimizer must be a torch.optim.Optimizer or a dict of them, got the class Adam. Pass
    for instance torch.optim.Adam(model.parameters(), lr=1e-3).
an optimizer by name | TypeError: optimizer must be a torch.optim.Optimizer or a dict of them, got 'adam'. Pass for
    instance torch.optim.Adam(model.parameters(), lr=1e-3).
a class in a dict | TypeError: optimizer 'd' must be a torch.optim.Optimizer or a dict of them, got the class Adam. Pass
    for instance torch.optim.Adam(model.parameters(), lr=1e-3).
no optimizers | ValueError: optimizer is an empty dict; expected at least one. Leave it out for Adam(lr=1e-3).
"""


@pytest.mark.parametrize(("arguments", "message"), cases(COMPILE, COMPILE_SAYS))
def test_compile_refuses_what_it_cannot_use(arguments, message):
    model = Model(nn.Linear(4, 1))
    with refused(message, model):
        model.compile(**{"loss_func": nn.MSELoss(), **arguments})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the message names what is there")
@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:0"])
def test_a_device_that_is_not_there_names_those_that_are(device):
    with refused(f"ValueError: device {device!r} is not there; expected one of cpu."):
        Model(nn.Linear(4, 1)).compile(nn.MSELoss(), device=device)


# ---------------------------------------------------------------- bad input: optimizers and steps


def foreign(model):
    return sgd(nn.Linear(4, 1))


def two(model):
    return {"generator": sgd(model.net[0]), "critic": sgd(model.net[1])}


def replace_layer(model):
    model.net[1] = nn.Linear(4, 1)


def replace_net(model):
    model.net = nn.Linear(4, 1)


def replace_optimizer(model):
    model.optimizer = sgd(model)


def double_after_training(model):
    model.fit(1, (X, Y), verbose=0)
    model.double()


DEEP = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
OPTIMIZERS = {
    # network, optimizer, what happens after compile
    "made from another model": (None, foreign, lambda model: model.evaluate((X, Y))),
    "everything is frozen": (DEEP, None, lambda model: model.requires_grad_(False)),
    "no parameters": (nn.Flatten(), None, lambda model: model.evaluate((X, X))),
    "LBFGS": (None, lambda model: torch.optim.LBFGS(model.parameters()), lambda model: None),
    "another model.optimizer": (None, sgd, replace_optimizer),
    "another network": (None, sgd, replace_net),
    "another layer": (DEEP, sgd, replace_layer),
    "another layer under the default optimizer": (DEEP, None, replace_layer),
    "another layer, which was all that one optimizer held": (DEEP, two, replace_layer),
    "one more layer": (DEEP, sgd, lambda model: model.net.append(nn.Linear(1, 1))),
    "another dtype after training": (None, None, double_after_training),
}
OPTIMIZERS_SAY = """
made from another model | ValueError: the optimizer holds none of the parameters of Model: it was made from another
    model, or the network was replaced after compile. Make a new optimizer from model.parameters() and call
    Model.compile again.
everything is frozen | ValueError: there is nothing to train: all 4 parameters of Model are frozen. Set
    requires_grad=True on some, then compile again.
no parameters | ValueError: there is nothing to train: Model has no parameters. Add a layer that has some, then compile
    again.
LBFGS | ValueError: LBFGS needs a closure that computes the loss anew, which the default train_step does not give.
    Override train_step and call self.optimizer.step(closure) there.
another model.optimizer | ValueError: model.optimizer was replaced after compile. Call model.compile with the new
    optimizer.
another network | ValueError: the optimizer holds none of the parameters of Model: it was made from another model, or
    the network was replaced after compile. Make a new optimizer from model.parameters() and call Model.compile again.
another layer | another layer under the default optimizer | ValueError: the optimizer holds stale parameters: a layer
    was replaced after compile, and 2 new parameters would not be trained. Make a new optimizer from model.parameters()
    and call Model.compile again.
another layer, which was all that one optimizer held | ValueError: optimizer 'critic' holds none of the parameters of
    Model: it was made from another model, or the network was replaced after compile. Make a new optimizer from
    model.parameters() and call Model.compile again.
one more layer | ValueError: the optimizer lacks parameters: a layer was added after compile, and 2 new parameters would
    not be trained. Make a new optimizer from model.parameters() and call Model.compile again.
another dtype after training | ValueError: the optimizer holds stale state: it is float32 from earlier steps and the
    parameters are float64 now. Make a new optimizer from model.parameters() and call Model.compile again.
"""


@pytest.mark.parametrize(("given", "message"), cases(OPTIMIZERS, OPTIMIZERS_SAY))
def test_an_optimizer_that_does_not_hold_the_model_as_it_is_is_refused_by_fit(given, message):
    net, optimizer, then = given
    model = compiled(net, optimizer=optimizer)
    then(model)
    with refused(message, model):
        model.fit(1, (X, Y), verbose=0)


UNKNOWN = {
    "misspelt": (two, "critc", "compile was given 'generator', 'critic'. Did you mean 'critic'?"),
    "another word": (two, "zzz", "compile was given 'generator', 'critic'."),
    "of one without a name": (
        sgd,
        "critic",
        "compile was given one without a name. Leave the name out.",
    ),
}


@pytest.mark.parametrize("verb", ["backward", "optimizer_step"])
@pytest.mark.parametrize(("optimizer", "name", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_optimizer_is_told_the_known_ones(verb, optimizer, name, message):
    model = compiled(DEEP, optimizer=optimizer)
    arguments = (model(X).sum(), name) if verb == "backward" else (name,)
    with refused(f"ValueError: there is no optimizer {name!r}; {message}", model):
        getattr(model, verb)(*arguments)


class OfTwo(Model):
    def train_step(self, features, labels):
        return super().train_step(features, labels)

    def evaluate_step(self, features, labels):
        return super().evaluate_step(features, labels)


@pytest.mark.parametrize("step", ["train_step", "evaluate_step"])
def test_a_step_that_takes_no_sample_weight_is_told_how_to(step):
    model, weighted = compiled(kind=OfTwo), (X, Y, torch.ones(8))
    message = f"the batches carry a sample_weight, and OfTwo.{step} does not take one. "
    message += f"Write it as {step}(self, features, labels, sample_weight=None)."
    with refused(f"TypeError: {message}", model):
        model.fit(1, weighted, verbose=0) if step == "train_step" else model.evaluate(weighted)


class Answers(Model):
    """Its train_step returns what it was told to."""

    def train_step(self, features, labels, sample_weight=None):
        return self.answers.pop(0)


ANSWERS = {
    "nothing": [None],
    "nothing at the second step": [{"loss": 1.0}, None],
    "a list": [[1.0]],
    "an empty dict": [{}],
    "a name that is a number": [{3: 1.0}],
    "a name of the history's": [{"loss": 1.0, "lr": 0.1}],
    "a value per row": [{"loss": torch.ones(8)}],
    "other names at the second step": [{"loss": 1.0}, {"loss": 1.0, "f1": 1.0}],
}
ANSWERS_SAY = """
nothing | nothing at the second step | TypeError: train_step returned NoneType; expected a dict of name -> number for
    the history. Return for instance {"loss": loss}.
a list | TypeError: train_step returned [float]; expected a dict of name -> number for the history. Return for instance
    {"loss": loss}.
an empty dict | TypeError: train_step returned {}; expected a dict of name -> number for the history. Return for
    instance {"loss": loss}.
a name that is a number | TypeError: train_step returned the name 3; expected a string.
a name of the history's | ValueError: train_step returned the name 'lr', which history uses itself (lr, epoch and
    val_...). Give it another name.
a value per row | ValueError: train_step's 'loss' gave Tensor (8,) float32; expected one number: a float, a NumPy
    scalar, a 0-d tensor, or minikeras.Average(total, count). Take the mean over the rows.
other names at the second step | ValueError: a step returned loss, f1 and the one before it loss; expected the same
    names at each step, since the history has a column for each.
"""


@pytest.mark.parametrize(("answers", "message"), cases(ANSWERS, ANSWERS_SAY))
def test_a_train_step_must_return_the_same_numbers_by_name(answers, message):
    model = compiled(kind=Answers)
    model.answers = list(answers)
    with refused(message, model):
        model.fit(1, [(X, Y)] * len(answers), verbose=0)


# ---------------------------------------------------------------- no false alarms


FRAME, SERIES = pd.DataFrame(X.double().numpy()), pd.Series(ROW.double().numpy())
TRAINS = {
    "class probabilities": (CE, S, S.softmax(1)),
    "ignored labels": (CE, S, CLASSES.where(CLASSES < 2, -100)),
    "labels ignored by a number of one's own": (
        nn.CrossEntropyLoss(ignore_index=9),
        S,
        CLASSES.where(CLASSES < 2, 9),
    ),
    "uint8 labels": (CE, S, CLASSES.to(torch.uint8)),
    "(N, 1) labels and outputs": (nn.BCELoss(), COLUMN.sigmoid(), COLUMN.round()),
    "int labels for MSELoss": (nn.MSELoss(), COLUMN, COLUMN.long()),
    "a loss round CosineSimilarity": (cosine, S, S.roll(1, 0)),
    "a weight per row": (nn.MSELoss(reduction="none"), COLUMN, Y, ROW),
    "NumPy arrays of float64": (nn.MSELoss(), X.double().numpy(), X.double().numpy()),
    "DataFrames of float64": (nn.MSELoss(), FRAME, FRAME),
    "Series of float64": (nn.MSELoss(), SERIES, SERIES),
}


class InOneDtype(torch.autograd.Function):
    """A loss that has a gradient for labels of the predictions' dtype alone, as MSELoss of older torch."""

    @staticmethod
    def forward(ctx, y_pred, y_true):
        return ((y_pred - y_true) ** 2).mean()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("Found dtype Long but expected Float")


def test_int_labels_are_told_where_the_loss_has_no_gradient_for_them():
    model = compiled(Scale(), InOneDtype.apply, sgd)
    with pytest.raises(RuntimeError, match="Found dtype Long") as error:
        model.fit(1, (COLUMN, COLUMN.long()), verbose=0)
    assert error.value.__notes__[0] == (
        "The labels are int64, and here the loss has a gradient in the predictions' dtype alone. Pass labels.float()."
    )


@pytest.mark.parametrize("given", TRAINS.values(), ids=TRAINS)
def test_what_looks_wrong_and_is_right_trains(given):
    loss, *data = given
    history = compiled(Scale(), loss, sgd).fit(1, tuple(data), verbose=0)
    assert history["loss"].notna().all()


class Shifted(nn.Module):
    """Labels from 1, as its users number them."""

    def __init__(self):
        super().__init__()
        self.loss_func = CE

    def forward(self, p, t):
        return self.loss_func(p, t - 1)


class PerStep(nn.CrossEntropyLoss):
    """Scores (N, T, classes) against labels (N, T)."""

    def forward(self, p, t):
        return super().forward(p.transpose(1, 2), t)


OWN = {
    "all pairs of rows": (
        lambda p, t: ((p.unsqueeze(1) - t) ** 2).sum(-1).min(1)[0].mean(),
        S,
        S.abs(),
    ),
    "all pairs of numbers": (lambda p, t: (p[:, None] - t).abs().mean(), ROW.clone(), ROW),
    "a wrapper with labels of its own": (Shifted(), S, CLASSES + 1),
    "a subclass with axes of its own": (PerStep(), torch.randn(8, 2, 5), torch.full((8, 2), 4)),
}


@pytest.mark.parametrize("given", OWN.values(), ids=OWN)
def test_a_loss_that_treats_its_labels_in_its_own_way_trains(given):
    loss, *data = given
    assert compiled(Scale(), loss, sgd).fit(1, tuple(data), verbose=0)["loss"].notna().all()


def test_a_state_of_another_dtype_is_refused_though_compiled_anew():
    model = compiled()
    model.fit(1, (X, Y), verbose=0)
    model.double().compile(nn.MSELoss(), model.optimizer, device="cpu")
    with pytest.raises(
        ValueError, match="the optimizer holds stale state: it is float32 from earlier steps"
    ):
        model.fit(1, (X.double(), Y.double()), verbose=0)


def test_softmax_before_cross_entropy_is_warned_of_once_per_fit():
    model = compiled(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), CE)
    for _ in range(2):
        with pytest.warns(UserWarning, match="already sum to 1") as caught:
            model.fit(2, (X, CLASSES), (X, CLASSES), batch_size=4, verbose=0)
        assert [str(warning.message) for warning in caught] == [
            "the model's outputs already sum to 1 in each row, and CrossEntropyLoss applies softmax itself. "
            "Give it raw scores: leave the softmax out of the model, or take log_softmax and NLLLoss."
        ]


SCORES = {
    "raw": S,
    "summing to 1, some below 0": torch.tensor([[2.0, -1.0, 0.0]]).expand(8, 3),
    "positive": S.abs(),
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_raw_scores_are_not_warned_of(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(Scale(), CE).fit(1, (scores, CLASSES), verbose=0)


def test_the_checks_call_a_metric_once_per_batch():
    calls = []
    model = compiled(metrics={"rows": lambda p, t: calls.append(len(t)) or 0.0})
    model.fit(2, (X, Y), (X, Y), batch_size=3, verbose=0)
    assert calls == [3, 3, 2] * 4


def test_labels_are_looked_at_in_the_first_batch_of_every_fit_and_not_again():
    model = compiled(Scale(), mse)
    assert len(model.fit(1, [(COLUMN, COLUMN), (COLUMN, ROW)], verbose=0)) == 1
    with refused(f"ValueError: the loss: {IT_BROADCASTS}", model):
        model.fit(1, [(COLUMN, ROW)], verbose=0)
