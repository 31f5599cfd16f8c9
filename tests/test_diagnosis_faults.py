"""`model.diagnose` finds planted faults, each in the first three lines.

Each fault is a mistake that people make, on a little network. The table says which check has to
find it; the words that its line must have are those of the fault.
"""

import functools
import time

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.set_ups import (
    CANCER,
    DIGIT_CLASSES,
    DIGITS,
    adam,
    compiled,
    digits,
    mlp,
    split,
    to_tensor,
    train_quietly,
)
from sklearn import datasets
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import minikeras

FAULTS = {}


def fault(*checks, words=""):
    """Add a function to the table: it returns a model, dl_train and dl_val.

    Args:
        checks: the names of the checks of which one must find it.
        words: what the line must say.
    """

    def add(build):
        FAULTS[build.__name__] = checks, words, build
        return build

    return add


@fault("check_missing_features")
def nan_column():
    X = (CANCER.data - CANCER.data.mean()) / CANCER.data.std()
    X.loc[::40, "mean area"] = np.nan
    return (
        compiled(mlp(30, 1, 32), nn.BCEWithLogitsLoss(), adam),
        (X, CANCER.target.astype(float).to_frame()),
        None,
    )


@fault("check_missing_features")
def inf_image():
    X = DIGITS.reshape(-1, 1, 8, 8).clone()
    X[5, 0, 3, 3] = float("inf")
    return digits(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)), X=X
    )


@fault("check_feature_scales")
def raw_table():
    return (
        compiled(mlp(30, 1, 32), nn.BCEWithLogitsLoss(), adam),
        (CANCER.data, CANCER.target.astype(float).to_frame()),
        None,
    )


@fault("check_feature_scales")
def income_in_dollars():
    rng = np.random.RandomState(0)
    X = pd.DataFrame(
        {"age": rng.randn(500), "income": rng.lognormal(11, 0.5, 500), "years": rng.randn(500)}
    )
    y = (X.age + X.years > 0).astype(float).to_frame()
    return (compiled(mlp(3, 1, 32), nn.BCEWithLogitsLoss(), adam), (X, y), None)


@fault("check_feature_scales")
def images_of_0_to_255():
    return digits(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)),
        X=(DIGITS * 255).round().reshape(-1, 1, 8, 8),
    )


@fault("check_feature_scales")
def tiny_features():
    return digits(mlp(64, 10), X=DIGITS * 1e-05)


@fault("check_constant_features")
def constant_column():
    rng = np.random.RandomState(0)
    X = pd.DataFrame({"a": rng.randn(500), "unit": np.ones(500), "b": rng.randn(500)})
    return (compiled(mlp(3, 1), nn.MSELoss(), adam), (X, X[["a"]] + X[["b"]].to_numpy()), None)


@fault("check_constant_features")
def features_of_zeros():
    return digits(mlp(64, 10), X=(DIGITS / 255).long().float())


@fault("check_class_range", "try_step")
def labels_from_1():
    return digits(mlp(64, 10), y=DIGIT_CLASSES + 1)


@fault("check_class_range")
def one_label_out_of_range():
    Y = DIGIT_CLASSES.clone()
    Y[700] = 11
    return (
        compiled(mlp(64, 10), nn.CrossEntropyLoss(), adam),
        DataLoader(TensorDataset(DIGITS, Y), 32),
        None,
    )


@fault("check_class_range")
def labels_of_minus_1_and_1():
    X, y = datasets.make_moons(400, random_state=0)
    return (
        compiled(mlp(2, 1), nn.BCEWithLogitsLoss(), adam),
        (to_tensor(X), to_tensor(y * 2 - 1)[:, None]),
        None,
    )


@fault("check_class_shares")
def class_that_is_nearly_all():
    X, y = datasets.make_classification(1000, weights=[0.99], flip_y=0, random_state=0)
    return (
        compiled(mlp(20, 1), nn.BCEWithLogitsLoss(), adam),
        (to_tensor(X), to_tensor(y)[:, None]),
        None,
    )


@fault("check_class_shares")
def class_that_never_comes():
    k = DIGIT_CLASSES != 7
    return (compiled(mlp(64, 10), nn.CrossEntropyLoss(), adam), (DIGITS[k], DIGIT_CLASSES[k]), None)


@fault("check_missing_labels")
def nan_target():
    X, y = datasets.load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std()
    y[3] = np.nan
    return (
        compiled(mlp(10, 1), nn.MSELoss(), adam),
        (to_tensor(X * 20), to_tensor(y)[:, None]),
        None,
    )


@fault("check_target_scale")
def targets_of_100000():
    X, y = datasets.load_diabetes(return_X_y=True)
    return (
        compiled(mlp(10, 1), nn.MSELoss(), adam),
        (to_tensor(X * 20), to_tensor(y * 2000)[:, None]),
        None,
    )


@fault("check_target_scale")
def targets_of_150():
    X, y = datasets.load_diabetes(return_X_y=True)
    return (
        compiled(mlp(10, 1), nn.L1Loss(), adam),
        (to_tensor(X * 20), to_tensor(y)[:, None]),
        None,
    )


@fault("check_leaks")
def validation_on_training_rows():
    return (
        compiled(mlp(64, 10), nn.CrossEntropyLoss(), adam),
        (DIGITS, DIGIT_CLASSES),
        (DIGITS[:300], DIGIT_CLASSES[:300]),
    )


@fault("check_leaks")
def some_rows_in_both():
    X = (CANCER.data - CANCER.data.mean()) / CANCER.data.std()
    y = CANCER.target.astype(float).to_frame()
    return (
        compiled(mlp(30, 1), nn.BCEWithLogitsLoss(), adam),
        (X[:400], y[:400]),
        (X[350:], y[350:]),
    )


@fault("check_split")
def validation_that_is_not_scaled():
    return (
        compiled(mlp(64, 10), nn.CrossEntropyLoss(), adam),
        (DIGITS[:1400], DIGIT_CLASSES[:1400]),
        (DIGITS[1400:] * 16, DIGIT_CLASSES[1400:]),
    )


@fault("check_split")
def validation_of_other_classes():
    k = DIGIT_CLASSES < 8
    return (
        compiled(mlp(64, 10), nn.CrossEntropyLoss(), adam),
        (DIGITS[k], DIGIT_CLASSES[k]),
        (DIGITS[~k], DIGIT_CLASSES[~k]),
    )


@fault("check_split")
def validation_with_a_shifted_column():
    rng = np.random.RandomState(0)
    X = pd.DataFrame(rng.randn(900, 4), columns=list("abcd"))
    y = X[["a"]]
    V = X[600:].copy()
    V["c"] += 10
    return (compiled(mlp(4, 1), nn.MSELoss(), adam), (X[:600], y[:600]), (V, y[600:]))


@fault("check_order")
def sorted_classes():
    o = DIGIT_CLASSES.argsort(stable=True)
    return (
        compiled(mlp(64, 10), nn.CrossEntropyLoss(), adam),
        DataLoader(TensorDataset(DIGITS[o], DIGIT_CLASSES[o]), 32),
        None,
    )


@fault("check_order")
def sorted_target():
    X = torch.randn(500, 4)
    y = X.sum(1)
    o = y.argsort()
    return (
        compiled(mlp(4, 1), nn.MSELoss(), adam),
        DataLoader(TensorDataset(X[o], y[o][:, None]), 32),
        None,
    )


@fault("check_first_loss")
def large_last_layer():
    net = mlp(64, 10)
    nn.init.normal_(net[-1].weight, std=20.0)
    return digits(net)


@fault("check_first_loss")
def large_last_layer_of_a_regression():
    net = mlp(4, 1)
    net[-1].weight.data.mul_(200)
    X = torch.randn(500, 4)
    return (compiled(net, nn.MSELoss(), adam), (X, X.sum(1, keepdim=True)), None)


@fault("check_first_loss")
def label_in_features():
    X = (CANCER.data - CANCER.data.mean()) / CANCER.data.std()
    X["diagnosis"] = CANCER.target * 2.0 - 1
    return (
        compiled(mlp(31, 1), nn.BCEWithLogitsLoss(), adam),
        (X, CANCER.target.astype(float).to_frame()),
        None,
    )


@fault("check_first_loss")
def target_in_features():
    X = torch.randn(400, 5)
    y = X[:, :1].exp()
    return (compiled(mlp(6, 1), nn.MSELoss(), adam), (torch.cat([X, 2 * y + 1], 1), y), None)


@fault("check_rows_are_separate")
def transpose_that_mixes_rows():

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(8, 32)
            self.o = nn.Linear(256, 10)

        def forward(self, x):
            x = x.reshape(-1, 8, 8).transpose(0, 1)
            hidden = torch.relu(self.f(x))
            return self.o(hidden.reshape(x.shape[1], -1))

    return digits(Net())


@fault("check_rows_are_separate")
def softmax_over_rows():
    return digits(nn.Sequential(nn.Linear(64, 32), nn.Softmax(dim=0), nn.Linear(32, 10)))


@fault("check_rows_are_separate")
def lstm_no_batch_first():

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.LSTM(8, 32)
            self.o = nn.Linear(32, 10)

        def forward(self, x):
            return self.o(self.l(x.reshape(-1, 8, 8))[0][:, -1])

    return digits(Net())


@fault("check_rows_are_separate")
def attention_no_batch_first():

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(50, 16)
            self.t = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 2, 32), 1, enable_nested_tensor=False
            )
            self.o = nn.Linear(16, 3)

        def forward(self, x):
            return self.o(self.t(self.e(x)).mean(1))

    X = torch.randint(0, 50, (400, 12))
    return (compiled(Net(), nn.CrossEntropyLoss(), adam), (X, X[:, 0] % 3), None)


@fault("check_rows_are_separate")
def mean_over_rows():

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(64, 32)
            self.o = nn.Linear(32, 10)

        def forward(self, x):
            hidden = torch.relu(self.f(x))
            return self.o(hidden - hidden.mean(0))

    return digits(Net())


@fault("check_dead_units", "check_outputs_differ", "check_gradients")
def dead_relu_units():
    net = mlp(64, 10)
    nn.init.constant_(net[0].bias, -10.0)
    return digits(net)


@fault("check_outputs_differ")
def forward_that_ignores_its_argument():

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(64, 10)

        def forward(self, x):
            return self.f(torch.zeros_like(x))

    return digits(Net())


@fault("check_activation_before_loss")
def softmax_before_cross_entropy():
    return digits(nn.Sequential(mlp(64, 10), nn.Softmax(1)))


@fault("check_activation_before_loss")
def sigmoid_before_bce_with_logits():
    X, y = datasets.make_moons(400, random_state=0)
    return (
        compiled(nn.Sequential(mlp(2, 1), nn.Sigmoid()), nn.BCEWithLogitsLoss(), adam),
        (to_tensor(X), to_tensor(y)[:, None]),
        None,
    )


@fault("check_activation_before_loss")
def raw_scores_before_nll():
    return digits(mlp(64, 10), loss_func=nn.NLLLoss())


@fault("check_activation_before_loss")
def relu_before_a_regression():
    X = torch.randn(400, 4)
    return (
        compiled(nn.Sequential(mlp(4, 1), nn.ReLU()), nn.MSELoss(), adam),
        (X, X.sum(1, keepdim=True)),
        None,
    )


@fault("check_saturated_outputs", "check_first_loss")
def saturated_outputs():
    net = nn.Sequential(mlp(2, 1), nn.Sigmoid())
    net[0][-1].weight.data.mul_(3000)
    X, y = datasets.make_moons(400, random_state=0)
    return (compiled(net, nn.BCELoss(), adam), (to_tensor(X), to_tensor(y)[:, None]), None)


@fault("check_frozen")
def all_frozen_but_bias():
    net = mlp(64, 10)
    for k, p in net.named_parameters():
        if "weight" in k:
            p.requires_grad_(False)
    return digits(net)


@fault("check_frozen")
def head_frozen():
    net = mlp(64, 10)
    net[-1].requires_grad_(False)
    return digits(net)


@fault("check_optimizers", "check_frozen")
def head_not_in_optimizer():
    net = mlp(64, 10)
    model = minikeras.Model(net)
    model.compile(nn.CrossEntropyLoss(), torch.optim.Adam(net[:4].parameters()), device="cpu")
    return (model, *split(DIGITS, DIGIT_CLASSES, 1400))


@fault("check_optimizers", "check_unused")
def layers_in_a_list():

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.ls = [nn.Linear(64, 64) for _ in range(3)]
            self.o = nn.Linear(64, 10)

        def forward(self, x):
            for layer in self.ls:
                x = torch.relu(layer(x))
            return self.o(x)

    return digits(Net())


@fault("check_unused")
def unused_layer():

    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.b = nn.Linear(64, 64)
            self.o = nn.Linear(64, 10)

        def forward(self, x):
            self.b(x)
            return self.o(torch.relu(self.a(x)))

    return digits(Net())


@fault("check_symmetry", "check_gradients")
def weights_of_zeros():
    net = mlp(64, 10)
    for p in net.parameters():
        nn.init.zeros_(p)
    return digits(net)


@fault("check_symmetry")
def weights_of_one_value():
    net = mlp(64, 10)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.weight, 0.05)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    return digits(net)


@fault("check_gradients")
def sigmoid_stack():
    layers = []
    for _ in range(12):
        layers += [nn.Linear(64, 64), nn.Sigmoid()]
    return digits(nn.Sequential(*layers, nn.Linear(64, 10)))


@fault("check_gradients")
def square_root_of_zero():

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.o = nn.Linear(64, 10)

        def forward(self, x):
            hidden = self.a(x)[:, :8]
            d = torch.sqrt((hidden[:, :, None] - hidden[:, None]) ** 2)
            return self.o(d.flatten(1))

    return digits(Net())


@fault("check_gradients", "check_unused", "check_optimizers")
def detach_in_forward():

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.o = nn.Linear(64, 10)

        def forward(self, x):
            return self.o(torch.relu(self.a(x)).detach())

    return digits(Net())


@fault("check_gradients", "check_activation_growth")
def exploding_activations():
    layers = []
    for _ in range(8):
        layer = nn.Linear(64, 64)
        nn.init.normal_(layer.weight, std=1.0)
        layers += [layer, nn.ReLU()]
    return digits(nn.Sequential(*layers, nn.Linear(64, 10)))


@fault("check_saturated_units")
def saturated_tanh():
    layers = []
    for _ in range(3):
        layer = nn.Linear(64, 64)
        nn.init.normal_(layer.weight, std=2.0)
        layers += [layer, nn.Tanh()]
    return digits(nn.Sequential(*layers, nn.Linear(64, 10)))


@fault("check_activation_growth", "check_gradients")
def vanishing_activations():
    layers = []
    for _ in range(10):
        layer = nn.Linear(64, 64, bias=False)
        nn.init.normal_(layer.weight, std=0.01)
        layers += [layer, nn.ReLU()]
    return digits(nn.Sequential(*layers, nn.Linear(64, 10)))


@fault("check_dead_units")
def dead_channels():
    choices = nn.Conv2d(1, 16, 3)
    nn.init.constant_(choices.bias, -5.0)
    return digits(
        nn.Sequential(choices, nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)),
        X=DIGITS.reshape(-1, 1, 8, 8),
    )


@fault("check_batch_norm")
def batch_norm_with_batches_of_2():
    return (
        compiled(mlp(64, 10, 64, nn.ReLU, nn.BatchNorm1d(64)), nn.CrossEntropyLoss(), adam),
        DataLoader(TensorDataset(DIGITS, DIGIT_CLASSES), 2, shuffle=True),
        None,
    )


@fault("check_batch_norm")
def batch_norm_that_never_settles():
    return digits(mlp(64, 10, 64, nn.ReLU, nn.BatchNorm1d(64, momentum=0.0001)))


@fault("check_dropout")
def dropout_of_95_percent():
    return digits(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.95), nn.Linear(64, 10)))


@fault("check_dropout")
def dropout_everywhere():
    return digits(
        nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Dropout(0.5),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(64, 10),
            nn.Dropout(0.5),
        )
    )


@fault("check_memorized")
def loss_without_a_gradient():
    return digits(
        mlp(64, 10),
        loss_func=lambda a, b: (
            nn.functional.cross_entropy(a, b) * 0
            + (a.round() - nn.functional.one_hot(b, 10)).abs().mean() * 0.001
            + a.sum() * 0
        ),
    )


@fault("check_memorized")
def labels_that_contradict_each_other():
    X = torch.randint(0, 2, (400, 1)).float()
    y = torch.randint(0, 2, (400, 1)).float()
    return (compiled(mlp(1, 1), nn.BCEWithLogitsLoss(), adam), (X, y), None)


@fault("check_learning_rate", "check_updates")
def adam_with_10():
    return digits(mlp(64, 10), make_optimizer=lambda p: torch.optim.Adam(p, 10.0))


@fault("check_learning_rate", "check_updates")
def sgd_with_100():
    return digits(mlp(64, 10), make_optimizer=lambda p: torch.optim.SGD(p, 100.0))


@fault("check_learning_rate", "check_updates")
def adam_with_1e_9():
    return digits(mlp(64, 10), make_optimizer=lambda p: torch.optim.Adam(p, 1e-09))


@fault("check_learning_rate", "check_updates")
def sgd_with_1e_7():
    return digits(mlp(64, 10), make_optimizer=lambda p: torch.optim.SGD(p, 1e-07))


@fault("check_learning_rate", "check_updates")
def adam_with_0_5():
    return digits(mlp(64, 10), make_optimizer=lambda p: torch.optim.Adam(p, 0.5))


@fault("check_learning_rate")
def adam_with_5():
    return digits(mlp(64, 10), make_optimizer=lambda p: torch.optim.Adam(p, 5.0))


class Slow(torch.utils.data.Dataset):
    def __init__(self, d):
        self.d = d

    def __len__(self):
        return 1400

    def __getitem__(self, i):
        time.sleep(self.d)
        return (DIGITS[i], DIGIT_CLASSES[i])


@fault("check_loading_time")
def slow_loader():
    return (
        compiled(mlp(64, 10), nn.CrossEntropyLoss(), adam),
        DataLoader(Slow(0.002), 32, shuffle=True),
        None,
    )


@fault("check_loading_time")
def slow_dataset():
    return (compiled(mlp(64, 10), nn.CrossEntropyLoss(), adam), Slow(0.001), None)


@fault("check_history")
def fit_that_overfits():
    X = torch.randn(60, 20)
    y = torch.randint(0, 2, (60, 1)).float()
    V = torch.randn(60, 20)
    model = compiled(mlp(20, 1, 128), nn.BCEWithLogitsLoss(), lambda p: torch.optim.Adam(p, 0.01))
    model.fit(20, (X, y), (V, torch.randint(0, 2, (60, 1)).float()), verbose=0)
    return (model, (X, y), (V, y))


@fault("check_history")
def fit_that_stands_at_the_majority_class():
    X = torch.zeros(500, 4) + 0.01 * torch.randn(500, 4)
    y = (torch.rand(500, 1) < 0.2).float()
    model = minikeras.Model(mlp(4, 1))
    model.compile(
        nn.BCEWithLogitsLoss(),
        torch.optim.Adam(model.parameters(), 0.001),
        {
            "acc": minikeras.binary_accuracy
            if False
            else lambda a, b: ((a > 0) == (b > 0.5)).float().mean()
        },
        device="cpu",
    )
    model.fit(8, (X, y), verbose=0)
    return (model, (X, y), None)


@fault("check_history", words="diverged")
def fit_that_diverged():
    X, y = datasets.load_diabetes(return_X_y=True)
    X, y = to_tensor(X * 20), to_tensor((y - y.mean()) / y.std())[:, None]
    model = compiled(mlp(10, 1), nn.MSELoss(), lambda p: torch.optim.SGD(p, 3.0))
    train_quietly(model, (X, y), epochs=6)
    return model, (X, y), None


@functools.cache
def diagnose(name):
    _, _, build = FAULTS[name]
    torch.manual_seed(0)
    np.random.seed(0)
    model, dl_train, dl_val = build()
    return model.diagnose(dl_train, dl_val)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_in_the_first_three_lines(name):
    checks, words, _ = FAULTS[name]
    first = diagnose(name).findings[:3]
    lines = []
    for finding in first:
        if finding.level != "note" and finding.check in checks:
            lines.append(f"{finding.looked_at}: {finding.found} {finding.remedy}")
    assert lines, [(finding.level, finding.check, finding.found) for finding in first]
    assert any(words in line for line in lines), lines
