"""Wrong arguments of fit, evaluate and predict: one error with expected, received and remedy."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers.bad_input import ONES, X, Y, cases, compiled, fits_badly, refused
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from minikeras import Callback, Model


@pytest.mark.parametrize(
    "verb", ["fit", "evaluate", "compute_loss", "backward", "compute_metrics", "optimizer_step"]
)
def test_model_that_is_not_compiled_raises_an_error_that_says_so(verb):
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
X first | ValueError: epochs must be a whole number of 1 or more, got Tensor (8, 4) float32. Epochs
    come first: fit(5, (X, y)).
arrays first | ValueError: epochs must be a whole number of 1 or more, got (Tensor (8, 4) float32,
    Tensor (8, 1) float32). Epochs come first: fit(5, (X, y)).
NumPy first | ValueError: epochs must be a whole number of 1 or more, got ndarray (8, 4) float32.
    Epochs come first: fit(5, (X, y)).
"""


@pytest.mark.parametrize(("first", "message"), cases(KERAS, KERAS_SAYS))
def test_fit_with_the_data_first_raises_an_error_that_says_epochs_come_first(first, message):
    fits_badly(message, Y, first)


@pytest.mark.parametrize(("name", "value"), NOT_COUNTS)
def test_fit_counts_must_be_whole_numbers_of_one_or_more(name, value):
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
    "an empty tuple": {"data": ()},
    "a tuple of 4 arrays": {"data": (X, X, Y, Y)},
    "a batch of 4 parts": {"data": [(X, X, Y, Y)]},
    "a batch that is a lone tensor": {"data": [X]},
    "X alone": {"data": X},
    "a dict of one": {"data": [{"x": X}]},
    "a dict without labels": {"data": [{"x": X, "y": Y}]},
    "a dict with labels first": {"data": [{"labels": Y, "input_ids": X, "mask": X}]},
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
batch_size beside a DataLoader | ValueError: batch_size=4 is for data that is not batched yet, and
    dl_train is a DataLoader, which makes its own batches. Leave batch_size out, or set it where
    dl_train is made.
a loader without rows | a dataset without rows | ValueError: dl_train gave no batch: its dataset has
    no rows.
arrays without rows | ValueError: dl_train gave no batch: its arrays have no rows.
validation without rows | ValueError: dl_val gave no batch: its arrays have no rows.
drop_last drops everything | ValueError: dl_train gave no batch: drop_last=True drops the only
    batch, 8 rows of batch_size=16. Set drop_last=False.
an empty list | an empty list in steps | ValueError: dl_train gave no batch: iterating it ended at
    once.
X and y of different lengths | ValueError: dl_train holds arrays of 8 and 7 rows; expected as many
    rows in each. Got (Tensor (8, 4) float32, Tensor (7, 1) float32).
labels as a list | X and y as lists | TypeError: dl_train holds 1.0; expected an array of numbers. A
    list counts as many arrays: pass one array of rows with equal length, numpy.array(rows), or a
    DataLoader with a collate_fn.
rows of many lengths | ValueError: dl_train holds arrays of 3 and 5 and 4 and ... rows; expected as
    many rows in each. Got ([Tensor (3,) float32, Tensor (5,) float32, Tensor (4,) float32, Tensor
    (6,) float32], Tensor (8, 1) float32). A list counts as many arrays: pass one array of rows with
    equal length, numpy.array(rows), or a DataLoader with a collate_fn.
an empty tuple | ValueError: dl_train is an empty tuple; expected arrays. Pass (X, y) or (X, y,
    sample_weight).
a tuple of 4 arrays | a batch of 4 parts | ValueError: a batch has 4 parts: (Tensor (8, 4) float32,
    Tensor (8, 4) float32, Tensor (8, 1) float32, Tensor (8, 1) float32); expected (features,
    labels) or (features, labels, sample_weight). Put several inputs into a tuple of their own: ((a,
    b), labels); or, with the labels last, pass compile(split_batch=lambda batch: (batch[:-1],
    batch[-1])).
a batch that is a lone tensor | X alone | a dict of one | ValueError: the batches are features
    alone, and the loss compares with labels. Give batches of (features, labels), arrays as a tuple
    (X, y), for an autoencoder (X, X); or override train_step.
a dict without labels | ValueError: the batches are dicts of x, y, all of them features, and the
    loss compares with labels. Pass compile(split_batch=lambda batch: (batch['x'], batch['y'])),
    with the name of your labels; or override train_step.
a dict with labels first | ValueError: the batches are dicts of input_ids, mask, labels, all of them
    features, and the loss compares with labels. Pass compile(split_batch=lambda batch: ({name:
    batch[name] for name in batch if name != 'labels'}, batch['labels'])), with the name of your
    labels; or override train_step.
a number | TypeError: dl_train must be a DataLoader, a Dataset, an iterable of (features, labels)
    batches or arrays (X, y), got int.
no iteration but items | TypeError: dl_train must be a DataLoader, a Dataset, an iterable of
    (features, labels) batches or arrays (X, y), got Indexed. Give it an __iter__, or derive it from
    torch.utils.data.Dataset if its items are rows.
a text column | TypeError: dl_train has columns that are not numbers: city. Encode them first, for
    instance with pandas.get_dummies(frame, dtype=float) or
    pandas.Index(categories).get_indexer(column) + 1, where 0 is any other category. Keep the
    categories of the training rows, and use them for new rows too.
an array of text | TypeError: dl_train holds <U1 values; expected numbers. Encode them as numbers
    first: as class numbers, pandas.factorize(array)[0].
a sample_weight of two columns | ValueError: the third part of a batch is a weight per row: expected
    shape (8,), got Tensor (8, 2) float32. Put several inputs into a tuple of their own: ((a, b),
    labels), or pass compile(split_batch=lambda batch: ((batch[0], batch[1]), batch[2])) for batches
    (a, b, labels).
a sample_weight that is short | ValueError: the third part of a batch is a weight per row: expected
    shape (8,), got Tensor (7,) float32. Put several inputs into a tuple of their own: ((a, b),
    labels), or pass compile(split_batch=lambda batch: ((batch[0], batch[1]), batch[2])) for batches
    (a, b, labels).
a sample_weight and one loss for all rows | ValueError: the batches carry a sample_weight, their
    third part, so the loss must have a value per row: expected shape (8,), got Tensor () float32.
    Build it with reduction="none"; two inputs are ((a, b), y); to leave out a third part that is no
    weight pass compile(split_batch=lambda batch: (batch[0], batch[1])).
a loud verbose | ValueError: verbose must be "auto", 0 (nothing), 1 (bar) or 2 (lines), got 'loud'.
a callback class | a lone callback class | TypeError: callbacks must be instances of
    minikeras.Callback, got the class Callback. Pass Callback().
a function as callback | TypeError: callbacks must be instances of minikeras.Callback, got <built-in
    function print>. Pass LambdaCallback(on_epoch_end=...) for a function.
"""


@pytest.mark.parametrize(("arguments", "message"), cases(FIT, FIT_SAYS))
def test_fit_refuses_what_it_cannot_use_before_a_weight_moves(arguments, message):
    fits_badly(message, **arguments)


def batches(number):
    return ((X, Y) for _ in range(number))


ONLY_ONCE = "it is a generator, which can be iterated only once. "
ONLY_ONCE += "Pass a list of batches or an object whose __iter__ starts again"


USED_UP = f"a generator, {ONLY_ONCE.removeprefix('it is a generator, ')}"


def test_generator_as_dl_train_lasts_one_epoch_and_is_refused_for_more_before_a_weight_moves():
    assert len(compiled().fit(1, batches(2), verbose=0)) == 1
    says = f"dl_train is {USED_UP}, or give steps_per_epoch. It was to last for 2 epochs."
    fits_badly(f"ValueError: {says}", batches(2), epochs=2)


def test_generator_as_dl_val_lasts_one_epoch_and_is_refused_for_more_with_validation_steps():
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


def test_iterator_that_starts_again_lasts_any_number_of_epochs():
    assert len(compiled().fit(2, StartsAnew(), StartsAnew(), verbose=0)) == 2


def test_generator_that_is_used_up_raises_an_error_that_says_so():
    used = batches(1)
    model = compiled()
    model.fit(1, used, verbose=0)
    with refused(f"ValueError: dl_train gave no batch: {ONLY_ONCE}."):
        model.fit(1, used, verbose=0)


def test_generator_that_is_long_enough_trains_with_steps_per_epoch():
    assert len(compiled().fit(2, batches(4), steps_per_epoch=2, verbose=0)) == 2


def test_generator_that_ends_within_steps_per_epoch_says_after_how_many_batches():
    with refused(
        "ValueError: dl_train ended after 3 batches, and steps_per_epoch=2 needs more: "
        f"{ONLY_ONCE}."
    ):
        compiled().fit(2, batches(3), steps_per_epoch=2, verbose=0)


@pytest.mark.parametrize("jit", [False, True])
def test_loss_without_reduction_is_averaged_in_evaluation_and_refused_in_training(jit):
    model = Model(nn.Linear(4, 1))
    model.compile(nn.MSELoss(reduction="none"), device="cpu", jit=jit)
    weighted = model.fit(2, (X, Y, torch.ones(8)), (X, Y), batch_size=3, verbose=0)
    expected = F.mse_loss(model.predict(X), Y).item()
    assert weighted["val_loss"][1] == pytest.approx(expected, rel=1e-6)
    assert model.evaluate((X, Y), batch_size=3)["val_loss"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="expected one number, a 0-d tensor"):
        model.fit(1, (X, Y), verbose=0)


def test_error_in_a_batch_says_where_in_the_fit_it_was():
    with pytest.raises(ValueError, match="parts") as error:
        compiled().fit(1, [(X, Y), (X, X, Y, Y)], verbose=0)
    assert error.value.__notes__ == ["dl_train, batch 2", "epoch 1"]
