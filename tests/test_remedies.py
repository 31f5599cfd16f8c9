"""The remedies in errors about data, layers and losses work."""

import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers.compare import assert_equal_tensors
from helpers.models import compiled
from torch import nn
from torch.utils.data import DataLoader, StackDataset

import minikeras

X = torch.randn(64, 3)
Y = torch.randn(64, 1)
CLASSES = torch.randint(0, 4, (64,))


def model_of(net, loss=None, **kwargs):
    torch.manual_seed(0)
    return compiled(minikeras.Model(copy.deepcopy(net)), loss or nn.MSELoss(), **kwargs)


def told(model, data, *words, kind=ValueError):
    """Check that the first batch raises an error with these words; return the whole message."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind) as error:
        model.fit(1, data, verbose=0)
    message = " ".join([str(error.value), *getattr(error.value, "__notes__", ())])
    for word in words:
        assert word in message
    assert_equal_tensors(model.state_dict(), before)
    return message


def trains(model, data):
    """Ten epochs end with a lower loss than the first."""
    losses = model.fit(10, data, batch_size=16, verbose=0)["loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    return losses.iloc[-1]


# --- shapes of features ---------------------------------------------------------------------------

LINE = np.linspace(0, 1, 64, dtype="float32")
AS_COLUMN = {
    "tensor": (
        torch.as_tensor(LINE),
        lambda X: X.reshape(-1, 1),
        lambda labels: labels.unsqueeze(-1),
    ),
    "NumPy": (LINE, lambda X: X[:, None], lambda labels: labels[:, None]),
    "pandas": (pd.Series(LINE), lambda X: X.to_frame(), lambda labels: labels.to_frame()),
}


@pytest.mark.parametrize(("x", "column", "labels"), AS_COLUMN.values(), ids=AS_COLUMN)
def test_features_of_one_number_a_row_raise_an_error_that_says_to_make_a_column(x, column, labels):
    y = 2 * x + 1
    message = told(
        model_of(nn.Linear(1, 1)), (x, y), "got shape (32,). Pass X as a column, X.reshape(-1, 1)"
    )
    assert "in_features=32" not in message
    told(
        model_of(nn.Linear(1, 1)),
        (column(x), y),
        "(32, 1) and labels (32,)",
        "labels.unsqueeze(-1)",
    )
    model = model_of(nn.Linear(1, 1))
    model.fit(200, (column(x), labels(y)), verbose=0)
    assert model.predict(column(x)).shape == (64, 1)
    assert model.evaluate((column(x), labels(y)))["val_loss"] < 1e-3


def test_features_of_one_number_a_row_for_a_wider_layer_raise_an_error_with_both_remedies():
    message = told(
        model_of(nn.Linear(3, 1)), (X[:, 0], Y), "in_features=1 and pass X as a column", "(rows, 3)"
    )
    assert "in_features=32" not in message
    trains(model_of(nn.Linear(1, 1)), (X[:, :1], Y))
    trains(model_of(nn.Linear(3, 1)), (X, Y))


PICTURES = torch.randn(64, 3, 5, 5)
CONVOLUTION = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 1))
OF_ONE_CHANNEL = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(36, 1))


def test_images_with_the_channels_last_raise_an_error_that_says_to_move_them():
    told(
        model_of(CONVOLUTION),
        (PICTURES.permute(0, 2, 3, 1), Y),
        "channels are last: pass X.movedim(-1, 1)",
    )
    expected = trains(model_of(CONVOLUTION), (PICTURES, Y))
    channels_last = PICTURES.permute(0, 2, 3, 1).contiguous()
    torch.manual_seed(0)
    assert trains(model_of(CONVOLUTION), (channels_last.movedim(-1, 1), Y)) == pytest.approx(
        expected, rel=1e-4
    )
    in_numpy = np.moveaxis(channels_last.numpy(), -1, 1)
    assert trains(model_of(CONVOLUTION), (in_numpy, Y)) == pytest.approx(expected, rel=1e-4)


def test_sequences_with_the_channels_last_raise_an_error_that_says_to_move_them():
    net = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(16, 1))
    told(
        model_of(net),
        (torch.randn(64, 5, 3), Y),
        "pass X.movedim(-1, 1), in NumPy numpy.moveaxis(X, -1, 1)",
    )
    trains(model_of(net), (torch.randn(64, 5, 3).movedim(-1, 1), Y))


def test_images_without_a_channel_raise_an_error_that_says_to_add_one():
    grey = PICTURES[:, 0]
    told(
        model_of(OF_ONE_CHANNEL),
        (grey, Y),
        "channel is missing: pass X.unsqueeze(1), in NumPy X[:, None]",
    )
    trains(model_of(OF_ONE_CHANNEL), (grey.unsqueeze(1), Y))
    trains(model_of(OF_ONE_CHANNEL), (grey.numpy()[:, None], Y))


def test_images_of_other_channels_than_the_layers_raise_an_error_with_both_remedies():
    told(
        model_of(CONVOLUTION),
        (PICTURES[:, :1], Y),
        "Build it with in_channels=1, or pass 3 channels.",
    )
    trains(model_of(OF_ONE_CHANNEL), (PICTURES[:, :1], Y))


def test_images_for_a_linear_layer_raise_an_error_that_says_to_flatten_them():
    told(model_of(nn.Linear(75, 1)), (PICTURES, Y), "Put nn.Flatten() before it.")
    trains(model_of(nn.Sequential(nn.Flatten(), nn.Linear(75, 1))), (PICTURES, Y))
    told(
        model_of(nn.Linear(70, 1)),
        (PICTURES, Y),
        "or put nn.Flatten() before it and build it with in_features=75",
    )


# --- dtypes of features ---------------------------------------------------------------------------


def test_numpy_floats_for_a_float64_model_raise_an_error_with_a_remedy_that_keeps_them():
    net = nn.Linear(3, 1).double()
    features = X.double().numpy()
    labels = Y.double().numpy()
    rows = DataLoader(StackDataset(torch.as_tensor(features), torch.as_tensor(labels)), 32)
    expected = model_of(net, lr=0.0).evaluate(rows)["val_loss"]
    for data in (
        (features, labels),
        (pd.DataFrame(features), pd.DataFrame(labels)),
        [(features, labels)],
    ):
        message = told(
            model_of(net), data, "pass torch.tensor(numpy.asarray(features), dtype=torch.float64)"
        )
        assert ".astype(" not in message  # it would be cast down again
    for array in (features, pd.DataFrame(features)):
        tensors = [torch.tensor(np.asarray(part), dtype=torch.float64) for part in (array, labels)]
        assert model_of(net, lr=0.0).evaluate(tuple(tensors))["val_loss"] == pytest.approx(
            expected, rel=1e-14
        )
    model = minikeras.Model(copy.deepcopy(net))
    model.to(torch.float32)
    assert compiled(model, nn.MSELoss()).evaluate((features, labels))["val_loss"] == pytest.approx(
        expected, rel=1e-6
    )


@pytest.fixture
def in_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("in_float64")
def test_numpy_floats_and_integers_arrive_in_float64_if_that_is_the_default():
    net = nn.Linear(3, 1)
    model = model_of(net, lr=0.0)
    features = X.double()
    labels = Y.double()
    expected = ((model.net(features) - labels) ** 2).mean().item()
    assert model.evaluate((features.numpy(), labels.numpy()))["val_loss"] == pytest.approx(
        expected, rel=1e-14
    )
    told(model_of(net), (features.long(), labels), "in NumPy and pandas .astype('float64')")
    trains(model_of(net), (X.long().numpy().astype("float64"), labels))


def test_features_of_complex_numbers_raise_an_error_that_says_to_make_them_real():
    features = torch.complex(X, X)
    told(model_of(nn.Linear(3, 1)), (features, Y), "Pass features.real or features.abs(), in NumPy")
    array = features.numpy()
    frame = pd.DataFrame(features.numpy())
    for real in (
        features.real,
        features.abs(),
        np.real(array),
        np.abs(array),
        np.real(frame),
        np.abs(frame),
    ):
        assert np.isfinite(model_of(nn.Linear(3, 1)).fit(1, (real, Y), verbose=0)["loss"].item())


def test_features_of_half_precision_or_integers_raise_an_error_that_says_float():
    for features in (X.half(), X.bfloat16(), X.long()):
        message = told(model_of(nn.Linear(3, 1)), (features, Y), "Pass features.float()")
        assert "model.to(torch.bfloat16)" not in message
        trains(model_of(nn.Linear(3, 1)), (features.float(), Y))


# --- labels ---------------------------------------------------------------------------------------

ZERO_ONE = torch.randint(0, 2, (64, 1))
LOSSES = {
    "mse": nn.MSELoss(),
    "huber": nn.HuberLoss(),
    "logits": nn.BCEWithLogitsLoss(),
    "l1": nn.L1Loss(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int64, torch.float16, torch.bfloat16, torch.bool]
)
@pytest.mark.parametrize(
    "kwargs", [{}, {"precision": "bf16"}, {"accumulate": 2}, {"jit": {"backend": "eager"}}], ids=str
)
def test_labels_of_another_dtype_train_as_float32_or_raise_an_error_with_a_cast_that_does(
    loss, dtype, kwargs
):
    labels = ZERO_ONE.to(dtype)
    expected = model_of(nn.Linear(3, 1), loss, **kwargs).fit(2, [(X, ZERO_ONE.float())], verbose=0)
    model = model_of(nn.Linear(3, 1), loss, **kwargs)
    try:
        found = model.fit(2, [(X, labels)], verbose=0)
    except (ValueError, RuntimeError) as error:
        message = " ".join([str(error), *error.__notes__])
        assert "Pass labels.float()" in message
        assert "bfloat16'" not in message  # which NumPy does not have
        found = model_of(nn.Linear(3, 1), loss, **kwargs).fit(2, [(X, labels.float())], verbose=0)
        if "in NumPy" in message:
            in_numpy = ZERO_ONE.numpy().astype("float32")
            again = model_of(nn.Linear(3, 1), loss, **kwargs).fit(2, [(X, in_numpy)], verbose=0)
            pd.testing.assert_frame_equal(again, expected)
    pd.testing.assert_frame_equal(
        found, expected, rtol=1e-2 if kwargs or dtype.itemsize == 2 else 1e-5
    )


def test_labels_for_a_bfloat16_model_raise_an_error_with_its_own_dtype():
    net = nn.Linear(3, 1).bfloat16()
    words = (
        "Pass labels.to(torch.bfloat16); from NumPy and pandas floats arrive as float32, so pass "
    )
    words += "torch.tensor(numpy.asarray(labels), dtype=torch.bfloat16)"
    message = told(model_of(net, nn.BCEWithLogitsLoss()), (X.bfloat16(), ZERO_ONE), words)
    assert "astype" not in message
    labels = torch.tensor(np.asarray(ZERO_ONE.numpy()), dtype=torch.bfloat16)
    trains(model_of(net, nn.BCEWithLogitsLoss()), (X.bfloat16(), labels))


def test_labels_of_one_dimension_too_many_raise_an_error_with_a_remedy():
    labels = torch.randn(64, 12, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told(
            model_of(nn.Linear(3, 12)),
            (X, labels),
            "(32, 12) and labels (32, 12, 1)",
            "Pass labels.squeeze(-1)",
        )
    trains(model_of(nn.Linear(3, 12)), (X, labels.squeeze(-1)))


def test_labels_outside_the_classes_raise_an_error_with_a_remedy():
    told(
        model_of(nn.Linear(3, 4), nn.CrossEntropyLoss()),
        (X, CLASSES + 1),
        "Number the classes from 0, or give the",
    )
    trains(model_of(nn.Linear(3, 5), nn.CrossEntropyLoss()), (X, CLASSES + 1))
    told(
        model_of(nn.Linear(3, 4), nn.CrossEntropyLoss()),
        (X, CLASSES - 1),
        "the loss with ignore_index=-1",
    )
    trains(model_of(nn.Linear(3, 4), nn.CrossEntropyLoss(ignore_index=-1)), (X, CLASSES - 1))


class Squeezed(minikeras.Model):
    def __init__(self, *dims):
        super().__init__()
        self.fc = nn.Linear(3, 1)
        self.dims = dims

    def forward(self, x):
        return self.fc(x).squeeze(*self.dims)


def test_squeeze_of_a_last_row_raises_an_error_that_says_to_name_the_dimension():
    data = (X[:33], ZERO_ONE[:33, 0].float())
    with pytest.raises(ValueError, match=r"have lost the dimension of the rows.*squeeze\(-1\)"):
        compiled(Squeezed(), nn.BCEWithLogitsLoss()).evaluate(data)
    model = compiled(Squeezed(-1), nn.BCEWithLogitsLoss())
    with torch.no_grad():
        expected = F.binary_cross_entropy_with_logits(model.fc(data[0])[:, 0], data[1]).item()
    assert model.evaluate(data)["val_loss"] == pytest.approx(expected, rel=1e-6)


# --- scores whose classes are last ----------------------------------------------------------------


def sequences(steps, classes):
    torch.manual_seed(1)
    X = torch.randn(64, steps, classes)
    return X, X.argmax(-1)


class Last(minikeras.Model):
    """Scores (N, steps, classes)."""

    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(classes, classes)

    def forward(self, x):
        return self.fc(x)


class Moved(Last):
    def forward(self, x):
        return super().forward(x).movedim(-1, 1)


LOSS_OF_LAST = lambda y_pred, y_true: nn.functional.cross_entropy(y_pred.movedim(-1, 1), y_true)  # noqa: E731


def reference(model, data):
    X, y = data
    with torch.no_grad():
        return F.cross_entropy(model.fc(X).reshape(-1, X.shape[-1]), y.reshape(-1)).item()


@pytest.mark.parametrize("labels", ["classes", "probabilities"])
@pytest.mark.parametrize(("steps", "classes"), [(6, 4), (3, 4)])
def test_classes_in_the_last_dimension_are_refused_and_both_remedies_train(steps, classes, labels):
    X, y = sequences(steps, classes)
    given = y if labels == "classes" else F.one_hot(y, classes).float()
    told(
        compiled(Last(classes), nn.CrossEntropyLoss()),
        (X, given),
        "are last" if labels == "classes" else "over",
        "End forward with .movedim(-1, 1)",
        "nn.functional.cross_entropy(y_pred.movedim(-1, 1), y_true",
    )
    moved = given if labels == "classes" else given.movedim(-1, 1)
    for model, loss in ((Moved(classes), nn.CrossEntropyLoss()), (Last(classes), LOSS_OF_LAST)):
        trains(compiled(model, loss), (X, moved))
        assert model.evaluate((X, moved))["val_loss"] == pytest.approx(
            reference(model, (X, y)), rel=1e-5
        )


def warned(model, data, verb="fit", loss=None):
    """Whether the classes' dimension is warned of."""
    compiled(model, loss or nn.CrossEntropyLoss())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if verb == "fit":
            model.fit(2, data, data, verbose=0)
        else:
            model.evaluate(data)
    return sum("either of the last two dimensions" in str(warning.message) for warning in caught)


SQUARE = sequences(4, 4)


@pytest.mark.parametrize("verb", ["fit", "evaluate"])
def test_classes_in_the_last_dimension_are_warned_of_once_if_there_are_as_many_steps(verb):
    assert warned(Last(4), SQUARE, verb) == 1
    words = torch.randint(0, 4, (64, 4))
    assert (
        warned(
            minikeras.Model(nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4))),
            (words, words),
            verb,
        )
        == 1
    )


class Contiguous(Last):
    def forward(self, x):
        return super().forward(x).transpose(1, 2).contiguous()


class Recurrent(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.lstm(x)[0]).permute(0, 2, 1)


class Cut(minikeras.Model):
    """Scores of 4 classes at 4 places from one row."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x):
        return self.fc(x.flatten(1)).view(-1, 4, 4)


class ByMatrix(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return self.weight @ x.transpose(1, 2)


RIGHT = {
    "one row cut into places": lambda: (Cut(), SQUARE),
    "a matrix from the left": lambda: (ByMatrix(), SQUARE),
    "moved": lambda: (Moved(4), SQUARE),
    "moved and copied": lambda: (Contiguous(4), SQUARE),
    "an LSTM's, moved": lambda: (Recurrent(), SQUARE),
    "Conv1d": lambda: (minikeras.Model(nn.Conv1d(4, 4, 1)), SQUARE),
    "Conv1d and BatchNorm": lambda: (
        minikeras.Model(nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))),
        SQUARE,
    ),
    "Conv1d and ReLU": lambda: (
        minikeras.Model(nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU())),
        SQUARE,
    ),
    "pictures": lambda: (
        minikeras.Model(nn.Conv2d(3, 5, 1)),
        (torch.randn(8, 3, 5, 5), torch.randint(0, 5, (8, 5, 5))),
    ),
    "probabilities in dimension 1": lambda: (
        minikeras.Model(nn.Conv1d(4, 4, 1)),
        (SQUARE[0], F.one_hot(SQUARE[1], 4).float().movedim(-1, 1)),
    ),
    "more steps": lambda: (
        minikeras.Model(nn.Conv1d(4, 4, 1)),
        (torch.randn(8, 4, 9), torch.randint(0, 4, (8, 9))),
    ),
    "flat rows": lambda: (minikeras.Model(nn.Linear(4, 4)), (SQUARE[0][:, 0], SQUARE[1][:, 0])),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_classes_in_dimension_1_are_neither_refused_nor_warned_of(make):
    assert warned(*make()) == 0


def test_classes_of_log_probabilities_in_the_last_dimension_are_refused_though_the_shapes_fit():
    net = nn.Sequential(nn.Linear(4, 4), nn.LogSoftmax(-1))
    message = told(model_of(net, nn.NLLLoss()), SQUARE, "log-probabilities over the last dimension")
    assert "nn.functional.nll_loss(y_pred.movedim(-1, 1), y_true)" in message
    loss = lambda y_pred, y_true: nn.functional.nll_loss(y_pred.movedim(-1, 1), y_true)  # noqa: E731
    trains(model_of(net, loss), SQUARE)
    model_of(nn.Sequential(nn.Conv1d(4, 4, 1), nn.LogSoftmax(1)), nn.NLLLoss()).fit(
        1, SQUARE, verbose=0
    )


# --- one loss for several outputs -----------------------------------------------------------------


class Two(minikeras.Model):
    def __init__(self, kind):
        super().__init__()
        self.a = nn.Linear(3, 1)
        self.b = nn.Linear(3, 4)
        self.kind = kind

    def forward(self, x):
        return {"a": self.a(x), "b": self.b(x)} if self.kind is dict else (self.a(x), self.b(x))


@pytest.mark.parametrize("kind", [dict, tuple])
@pytest.mark.parametrize(
    "loss",
    [nn.MSELoss(), nn.CrossEntropyLoss(), F.mse_loss],
    ids=["MSELoss", "CrossEntropyLoss", "mse_loss"],
)
def test_loss_for_one_of_several_outputs_raises_an_error_that_says_one_for_each(kind, loss):
    labels = {"a": Y, "b": CLASSES} if kind is dict else (Y, CLASSES)
    first, second = ("a", "b") if kind is dict else (0, 1)
    words = "takes one tensor of predictions and one of labels, and the model gave"
    told(
        compiled(Two(kind), loss),
        (X, labels),
        words,
        f"or pass a dict with a loss for each output as loss_func, starting with {{{first!r}: ",
    )
    trains(compiled(Two(kind), {first: nn.MSELoss(), second: F.cross_entropy}), (X, labels))


def test_labels_in_several_parts_for_one_output_raise_an_error():
    told(
        model_of(nn.Linear(3, 1)),
        (X, {"a": Y, "b": Y}),
        "and the labels are {'a': Tensor",
        "Give the labels as one",
    )
    trains(model_of(nn.Linear(3, 1)), (X, Y))


def test_nested_tensor_without_a_shape_raises_an_error_that_says_how_to_build_one():
    rows = [torch.randn(2), torch.randn(1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strided = torch.nested.nested_tensor(rows)
    made = minikeras.Model(nn.Linear(2, 1))
    with pytest.raises(
        ValueError, match=r"layout=torch\.jagged\).*torch\.nested\.to_padded_tensor\(tensor, 0\.0\)"
    ):
        made.predict(strided)
    padded = torch.nested.to_padded_tensor(strided, 0.0)
    assert made.predict(padded).shape == (2, 1)
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with pytest.raises(RuntimeError) as raised:
        made.predict(jagged)
    assert "to_padded_tensor(features, 0.0)" in raised.value.__notes__[0]
    assert torch.equal(torch.nested.to_padded_tensor(jagged, 0.0), padded)


def test_scipy_matrices_as_batches_raise_an_error_that_says_to_pass_the_matrix():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    dense = np.eye(6, 2, dtype="float32")
    matrix = scipy_sparse.csr_matrix(dense)
    made = minikeras.Model(nn.Linear(2, 1))
    with pytest.raises(TypeError) as raised:
        made.predict([matrix])
    assert "matrix.toarray() in each batch" in raised.value.__notes__[0]
    rows = [(matrix[row], row) for row in range(6)]
    with pytest.raises(TypeError) as raised:
        model_of(nn.Linear(2, 1)).evaluate(DataLoader(rows, batch_size=2))
    assert "Pass the matrix to fit, (X, y)" in raised.value.__notes__[0]
    expected = made.predict(dense)
    torch.testing.assert_close(made.predict(matrix), expected)
    torch.testing.assert_close(made.predict([matrix.toarray()]), expected)
