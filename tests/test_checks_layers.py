"""Features that a layer cannot take: the error names the layer."""

import pytest
import torch
from helpers.bad_input import CLASSES, MAPS, Scale, X, Y, cases, compiled, fits_badly, refused
from torch import nn


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(5, 1)

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
float64 tensors | ValueError: layer net has float32 parameters and got float64 values. Pass
    features.float(), or in NumPy and pandas .astype('float32'), or change the model with
    model.to(torch.float64) before compile.
integers | ValueError: layer net has float32 parameters and got int64 values. Pass features.float(),
    or in NumPy and pandas .astype('float32').
too few features | ValueError: layer net takes rows of 4 values (in_features) and got shape (8, 3).
    Pass 4 features per row, or build it with in_features=3.
layers that do not meet | ValueError: layer net.fc2 takes rows of 5 values (in_features) and got
    shape (8, 6). Build it with in_features=6, or change the layer before it to give 5 values per
    row.
pictures for rows | ValueError: layer net takes rows of 25 values (in_features) and got shape (8, 1,
    5, 5). Put nn.Flatten() before it.
"""


@pytest.mark.parametrize(("arguments", "message"), cases(LAYERS, LAYERS_SAY))
def test_layer_that_cannot_take_the_features_is_named(arguments, message):
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
FIRST = (
    "It came from a layer that returns a tuple, as nn.LSTM does: use the first part, outputs, _ = "
    "self.lstm(x)."
)
CONV = "layer net.0: Conv2d(3, 1, kernel_size=(5, 5), stride=(1, 1))"
NOTES = {
    "a flat picture": (
        nn.Sequential(nn.Conv2d(3, 1, 5)),
        X,
        f"{CONV} got Tensor (8, 4) float32",
    ),
    "int16 words": (
        nn.Embedding(5, 2),
        CLASSES.short(),
        "layer net: Embedding(5, 2) got Tensor (8,) int16",
    ),
    "words past the end": (
        nn.Embedding(2, 2),
        CLASSES,
        "layer net: Embedding(2, 2) got Tensor (8,) int64 of 0 to 2, and takes 0 to 1: "
        "number from 0, or build it with more rows.",
    ),
    "all that an LSTM returns": (
        nn.Sequential(RNN, nn.Linear(4, 1)),
        X,
        "layer net.1: Linear(in_features=4, out_features=1, bias=True) got (Tensor (8, 4) "
        f"float32, (Tensor (1, 4) float32, Tensor (1, 4) float32)). {FIRST}",
    ),
    "two inputs for one": (
        nn.Linear(4, 1),
        (X, X),
        "layer net: Linear(in_features=4, out_features=1, bias=True) got (Tensor (8, 4) "
        "float32, Tensor (8, 4) float32)",
    ),
    "a slip of one's own": (Joins(), CLASSES, "layer net: Joins() got Tensor (8,) int64"),
    "a mask of integers in a forward of one's own": (
        Masks(),
        CLASSES,
        "layer net: Masks got Tensor (8,) int64",
    ),
    "a float64 that forward makes": (
        Widens(),
        X,
        "layer net.fc: Linear(in_features=4, out_features=1, bias=True) got Tensor (8, 4) float64",
    ),
    "one number for a row": (
        nn.Linear(4, 1),
        X[0, 0],
        "layer net: Linear(in_features=4, out_features=1, bias=True) got Tensor () float32",
    ),
}


@pytest.mark.parametrize(("net", "features", "note"), NOTES.values(), ids=NOTES)
def test_layer_that_raises_any_other_error_is_named_in_a_note(net, features, note):
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
    ("keys", "remedy"),
    [
        (("numb", "cat"), "Name the keys like these."),
        (("num",), "Name the keys like these."),
        (
            ("num", "labels", "cat", "id"),
            "Leave out id, labels; if the batches are such dicts with the labels inside, pass "
            "compile(split_batch=lambda batch: ({name: batch[name] for name in ('num', 'cat')}, "
            "batch['labels'])), with the name of your labels.",
        ),
    ],
    ids=["other", "missing", "extra"],
)
@pytest.mark.parametrize("verb", ["fit", "predict"])
def test_features_in_a_dict_whose_keys_are_not_forwards_names_raise_an_error_with_both(
    keys, remedy, verb
):
    model = compiled(Tab())
    features = dict.fromkeys(keys, X)
    message = (
        f"the features are a dict with the keys {', '.join(keys)}, and forward takes num, cat. "
    )
    with refused(f"ValueError: {message}{remedy}", model):
        model.fit(1, (features, Y), verbose=0) if verb == "fit" else model.predict(features)


def test_features_in_one_part_for_two_inputs_raise_an_error_that_says_tuple():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'cat'") as error:
        compiled(Tab()).predict(X)
    note = (
        "Put several inputs into a tuple of their own: ((a, b), labels), or ((a, b),) without "
        "labels; or pass compile(split_batch=lambda batch: ((batch[0], batch[1]), batch[2]))."
    )
    assert error.value.__notes__ == [note]


def test_layer_that_is_called_wrongly_by_the_user_is_not_blamed_on_the_keys():
    class Inner(Tab):
        def forward(self, num, cat):
            return self.tab(num)

    net = Inner()
    net.tab = Tab()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'cat'") as error:
        compiled(net).predict({"num": X, "cat": X})
    assert error.value.__notes__ == ["layer net: Inner got Tensor (8, 4) float32"]
