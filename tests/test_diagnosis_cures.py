"""What `model.diagnose` advises works: the remedy, applied as it is written, cures the fault.

Each cure is code that does what the words of the remedy say, and nothing else. After it the check
finds nothing, and the network learns: its loss falls far below that of the best constant answer.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.set_ups import DIGITS, adam, compiled, mlp
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from test_diagnosis_faults import FAULTS
from torch import nn
from torch.utils.data import DataLoader

import minikeras

FEW_STEPS = 10  # of the trial trainings, where the check does not ask for them
ENOUGH = 0.5  # of the loss of the best constant answer


@dataclass
class Cure:
    fault: str
    check: str
    words: str  # of the remedy that are applied
    apply: Callable
    epochs: int  # at most, until it has learnt; 0 if there is nothing to learn


CURES = {}


def cure(fault, check, words, epochs=10):
    """Add a function (model, train, val, finding) -> (model, train, val) to the table."""

    def add(apply):
        name = apply.__name__
        CURES[name] = Cure(fault, check, words, apply, epochs)
        return apply

    return add


def cross_entropy():
    return nn.CrossEntropyLoss()


def bce_with_logits():
    return nn.BCEWithLogitsLoss()


# --- features -------------------------------------------------------------------------------------


@cure("nan_column", "check_missing_features", "X.fillna(X.median())")
def fill_missing_features(model, train, val, finding):
    X, y = train
    return model, (X.fillna(X.median()), y), val


@cure("nan_column", "check_missing_features", "X.dropna()")
def drop_rows_with_missing_features(model, train, val, finding):
    X, y = train
    X = X.dropna()
    return model, (X, y.loc[X.index]), val


@cure("raw_table", "check_feature_scales", "X = (X - X_train.mean(0)) / X_train.std(0)")
def standardize_by_hand(model, train, val, finding):
    X, y = (torch.tensor(part.to_numpy("f4")) for part in train)
    return model, ((X - X.mean(0)) / X.std(0), y), val


@cure("income_in_dollars", "check_feature_scales", "sklearn.preprocessing.StandardScaler", 30)
def standardize_with_sklearn(model, train, val, finding):
    X, y = train
    return model, (StandardScaler().fit_transform(X).astype(np.float32), y.to_numpy("f4")), val


@cure("raw_table", "check_feature_scales", "begin the network with nn.BatchNorm1d")
def begin_with_batch_norm(model, train, val, finding):
    return (
        compiled(nn.Sequential(nn.BatchNorm1d(30), model.net), bce_with_logits(), adam),
        train,
        val,
    )


@cure("tiny_features", "check_feature_scales", "sklearn.preprocessing.StandardScaler")
def standardize_tiny_features(model, train, val, finding):
    # BatchNorm does not scale columns this small, so it must not be advised
    assert "BatchNorm" not in finding.remedy
    scaler = StandardScaler().fit(train[0])
    X, X_val = (scaler.transform(part[0]).astype(np.float32) for part in (train, val))
    return model, (X, train[1]), (X_val, val[1])


@cure("images_of_0_to_255", "check_feature_scales", "X = X.float() / 255")
def divide_by_255(model, train, val, finding):
    return model, (train[0].float() / 255, train[1]), (val[0].float() / 255, val[1])


@cure("constant_column", "check_constant_features", "Drop it", 30)
def drop_the_constant_column(model, train, val, finding):
    column = re.search('"(.*?)"', finding.looked_at)[1]
    X = train[0].drop(columns=column)
    return compiled(mlp(2, 1), nn.MSELoss(), adam), (X, train[1]), val


@cure("label_in_features", "check_first_loss", "Drop the column")
def drop_the_leaking_column(model, train, val, finding):
    column = re.search('"(.*?)"', finding.looked_at)[1]
    return (
        compiled(mlp(30, 1), bce_with_logits(), adam),
        (train[0].drop(columns=column), train[1]),
        val,
    )


# --- labels ---------------------------------------------------------------------------------------


@cure("labels_from_1", "check_class_range", "y = y - 1")
def subtract_1_from_the_classes(model, train, val, finding):
    return model, (train[0], train[1] - 1), (val[0], val[1] - 1)


@cure("one_label_out_of_range", "check_class_range", "Give the last layer 12 outputs")
def give_the_last_layer_more_outputs(model, train, val, finding):
    outputs = int(re.search(r"(\d+) outputs", finding.remedy)[1])
    return compiled(mlp(64, outputs), cross_entropy(), adam), train, val


@cure("labels_of_minus_1_and_1", "check_class_range", "y = (y > 0).float()", 60)
def map_the_labels_to_0_and_1(model, train, val, finding):
    return model, (train[0], (train[1] > 0).float()), val


@cure("class_that_never_comes", "check_class_shares", "as many outputs as there are classes")
def give_as_many_outputs_as_classes(model, train, val, finding):
    X, y = train
    _, y = y.unique(return_inverse=True)
    return compiled(mlp(64, 9), cross_entropy(), adam), (X, y), val


@cure("nan_target", "check_missing_labels", "Drop these rows, from features and labels alike", 60)
def drop_rows_with_missing_labels(model, train, val, finding):
    X, y = train
    known = y.isfinite().all(1)
    return model, (X[known], y[known]), val


@cure(
    "targets_of_100000", "check_target_scale", "Train on (y - y_train.mean()) / y_train.std()", 60
)
def standardize_the_targets(model, train, val, finding):
    X, y = train
    return model, (X, (y - y.mean()) / y.std()), val


# --- the split and the order ----------------------------------------------------------------------


@cure("validation_on_training_rows", "check_leaks", "sklearn.model_selection.train_test_split")
def split_before_training(model, train, val, finding):
    X, X_val, y, y_val = train_test_split(*train, random_state=0)
    return model, (X, y), (X_val, y_val)


@cure("validation_that_is_not_scaled", "check_split", "scaler.fit(X_train), then scaler.transform")
def scale_with_the_numbers_of_training(model, train, val, finding):
    X = DIGITS.numpy() * 16  # as they were read
    scaler = StandardScaler().fit(X[:1400])
    X, X_val = (scaler.transform(part).astype(np.float32) for part in (X[:1400], X[1400:]))
    return model, (X, train[1]), (X_val, val[1])


@cure("validation_of_other_classes", "check_split", "train_test_split(X, y, stratify=y)")
def split_by_class(model, train, val, finding):
    X, y = (torch.cat(parts) for parts in zip(train, val, strict=True))
    X, X_val, y, y_val = train_test_split(X, y, stratify=y, random_state=0)
    return model, (X, y), (X_val, y_val)


@cure("sorted_classes", "check_order", "DataLoader(..., shuffle=True)")
def shuffle_sorted_classes(model, train, val, finding):
    return model, DataLoader(train.dataset, 32, shuffle=True), val


@cure("sorted_target", "check_order", "DataLoader(..., shuffle=True)", 30)
def shuffle_a_sorted_target(model, train, val, finding):
    return model, DataLoader(train.dataset, 32, shuffle=True), val


# --- the network ----------------------------------------------------------------------------------


@cure("large_last_layer", "check_first_loss", "weight.mul_(0.01) and model.LAYER.bias.zero_()", 20)
@torch.no_grad()
def make_the_last_layer_small(model, train, val, finding):
    model.net[-1].weight.mul_(0.01)
    model.net[-1].bias.zero_()
    return model, train, val


@cure("large_last_layer_of_a_regression", "check_first_loss", "weight.mul_(0.01)", 30)
@torch.no_grad()
def make_the_last_layer_of_a_regression_small(model, train, val, finding):
    model.net[-1].weight.mul_(0.01)
    model.net[-1].bias.zero_()
    return model, train, val


@cure("softmax_over_rows", "check_rows_are_separate", "pass dim=1", 60)
def softmax_over_columns(model, train, val, finding):
    model.net[1] = nn.Softmax(dim=1)
    return model, train, val


@cure("lstm_no_batch_first", "check_rows_are_separate", "pass batch_first=True", 20)
def lstm_batch_first(model, train, val, finding):
    model.net.l.batch_first = True
    return model, train, val


@cure("lstm_no_batch_first", "check_rows_are_separate", "features.transpose(0, 1)", 20)
def give_the_lstm_steps_first(model, train, val, finding):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.LSTM(8, 32)
            self.o = nn.Linear(32, 10)

        def forward(self, x):
            return self.o(self.l(x.reshape(-1, 8, 8).transpose(0, 1))[0][-1])

    return compiled(Net(), cross_entropy(), adam), train, val


@cure("attention_no_batch_first", "check_rows_are_separate", "pass batch_first=True", 0)
def attention_batch_first(model, train, val, finding):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(50, 16)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.t = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.o = nn.Linear(16, 3)

        def forward(self, x):
            return self.o(self.t(self.e(x)).mean(1))

    return compiled(Net(), cross_entropy(), adam), train, val


@cure("softmax_before_cross_entropy", "check_activation_before_loss", "Leave out the softmax")
def leave_out_the_softmax(model, train, val, finding):
    return compiled(model.net[0], cross_entropy(), adam), train, val


@cure("sigmoid_before_bce_with_logits", "check_activation_before_loss", "out the sigmoid", 60)
def leave_out_the_sigmoid(model, train, val, finding):
    return compiled(model.net[0], bce_with_logits(), adam), train, val


@cure("raw_scores_before_nll", "check_activation_before_loss", "End forward with .log_softmax(1)")
def end_with_log_softmax(model, train, val, finding):
    net = nn.Sequential(model.net, nn.LogSoftmax(1))
    return compiled(net, nn.NLLLoss(), adam), train, val


@cure("raw_scores_before_nll", "check_activation_before_loss", "nn.CrossEntropyLoss()")
def pass_cross_entropy(model, train, val, finding):
    return compiled(model.net, cross_entropy(), adam), train, val


@cure("relu_before_a_regression", "check_activation_before_loss", "Leave out the relu", 30)
def leave_out_the_relu(model, train, val, finding):
    return compiled(model.net[0], nn.MSELoss(), adam), train, val


@cure("head_frozen", "check_frozen", "minikeras.unfreeze(layer)")
def unfreeze_the_head(model, train, val, finding):
    minikeras.unfreeze(model.get_submodule(finding.looked_at.split()[1]))
    return model, train, val


@cure("all_frozen_but_bias", "check_frozen", "minikeras.unfreeze(layer)")
def unfreeze_all_layers(model, train, val, finding):
    for layer in model.net:
        minikeras.unfreeze(layer)
    return model, train, val


@cure("head_not_in_optimizer", "check_optimizers", "torch.optim.Adam(model.parameters())")
def give_the_optimizer_all_parameters(model, train, val, finding):
    model.compile(cross_entropy(), torch.optim.Adam(model.parameters()), device="cpu")
    return model, train, val


@cure("layers_in_a_list", "check_optimizers", "nn.ModuleList(...) instead of a plain list")
def put_the_layers_into_a_module_list(model, train, val, finding):
    model.ls = nn.ModuleList(model.ls)
    model.compile(cross_entropy(), torch.optim.Adam(model.parameters()), device="cpu")
    return model, train, val


@cure("weights_of_zeros", "check_symmetry", "nn.init.kaiming_normal_(layer.weight)")
def initialize_with_kaiming(model, train, val, finding):
    for name in re.findall(r"net\.\d", finding.looked_at):
        nn.init.kaiming_normal_(model.get_submodule(name).weight)
    return model, train, val


@cure("weights_of_one_value", "check_symmetry", "Use PyTorch's initialization")
def initialize_as_pytorch_does(model, train, val, finding):
    for name in re.findall(r"net\.\d", finding.looked_at):
        model.get_submodule(name).reset_parameters()
    return model, train, val


@cure("sigmoid_stack", "check_gradients", "Use ReLU or GELU instead of sigmoid", 20)
def use_relu_instead_of_sigmoid(model, train, val, finding):
    layers = [nn.ReLU() if isinstance(x, nn.Sigmoid) else x for x in model.net]
    return compiled(nn.Sequential(*layers), cross_entropy(), adam), train, val


@cure("sigmoid_stack", "check_gradients", "a norm layer between the layers", 20)
def put_norm_layers_between_sigmoids(model, train, val, finding):
    layers = []
    for layer in model.net:
        layers += [nn.LayerNorm(64), layer] if isinstance(layer, nn.Sigmoid) else [layer]
    return compiled(nn.Sequential(*layers), cross_entropy(), adam), train, val


@cure("square_root_of_zero", "check_gradients", "torch.sqrt(x + 1e-8)")
def add_a_little_before_the_square_root(model, train, val, finding):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.o = nn.Linear(64, 10)

        def forward(self, x):
            hidden = self.a(x)[:, :8]
            squares = (hidden[:, :, None] - hidden[:, None]) ** 2
            return self.o(torch.sqrt(squares + 1e-8).flatten(1))

    return compiled(Net(), cross_entropy(), adam), train, val


@cure("exploding_activations", "check_activation_growth", "nn.init.kaiming_normal_")
def initialize_a_deep_network_with_kaiming(model, train, val, finding):
    for layer in model.net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    return model, train, val


@cure("vanishing_activations", "check_activation_growth", "nn.init.kaiming_normal_", 20)
def initialize_small_weights_with_kaiming(model, train, val, finding):
    return initialize_a_deep_network_with_kaiming(model, train, val, finding)


@cure("saturated_tanh", "check_saturated_units", "nn.init.xavier_uniform_")
def initialize_with_xavier(model, train, val, finding):
    for layer in model.net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return model, train, val


@cure("dead_channels", "check_dead_units", "Start from new weights")
def start_from_new_weights(model, train, val, finding):
    model.net[0].reset_parameters()
    return model, train, val


@cure("dead_channels", "check_dead_units", "a norm layer before ReLU")
def put_a_norm_layer_before_relu(model, train, val, finding):
    first, *others = model.net
    return (
        compiled(nn.Sequential(first, nn.BatchNorm2d(16), *others), cross_entropy(), adam),
        train,
        val,
    )


@cure("dead_channels", "check_dead_units", "With new weights, nn.LeakyReLU")
def use_leaky_relu(model, train, val, finding):
    first, _, *others = model.net
    first.reset_parameters()
    return (
        compiled(nn.Sequential(first, nn.LeakyReLU(), *others), cross_entropy(), adam),
        train,
        val,
    )


@cure("batch_norm_with_batches_of_2", "check_batch_norm", "Use larger batches")
def use_larger_batches(model, train, val, finding):
    rows = int(finding.usual.split()[0])
    return model, DataLoader(train.dataset, rows, shuffle=True), val


@cure("batch_norm_with_batches_of_2", "check_batch_norm", "nn.LayerNorm", 2)
def use_layer_norm(model, train, val, finding):
    model.net[1] = nn.LayerNorm(64)
    return compiled(model.net, cross_entropy(), adam), train, val


@cure("batch_norm_that_never_settles", "check_batch_norm", "leave it at 0.1")
def leave_momentum_at_its_default(model, train, val, finding):
    model.net[1] = nn.BatchNorm1d(64)
    return compiled(model.net, cross_entropy(), adam), train, val


@cure("dropout_of_95_percent", "check_dropout", "Use p=0.1 to 0.5")
def use_less_dropout(model, train, val, finding):
    model.net[2].p = 0.5
    return model, train, val


# --- the training ---------------------------------------------------------------------------------


@cure("adam_with_10", "check_learning_rate", "Lower it. Try lr=")
def lower_the_rate_of_adam(model, train, val, finding):
    return compiled(model.net, cross_entropy(), at_rate(torch.optim.Adam, finding)), train, val


@cure("sgd_with_100", "check_learning_rate", "Lower it. Try lr=")
def lower_the_rate_of_sgd(model, train, val, finding):
    return compiled(model.net, cross_entropy(), at_rate(torch.optim.SGD, finding)), train, val


@cure("adam_with_1e_9", "check_learning_rate", "Raise it. Try lr=")
def raise_the_rate_of_adam(model, train, val, finding):
    return compiled(model.net, cross_entropy(), at_rate(torch.optim.Adam, finding)), train, val


@cure("sgd_with_1e_7", "check_learning_rate", "Raise it. Try lr=")
def raise_the_rate_of_sgd(model, train, val, finding):
    return compiled(model.net, cross_entropy(), at_rate(torch.optim.SGD, finding)), train, val


@cure("adam_with_0_5", "check_updates", "try a tenth or a hundredth of it")
def take_a_hundredth_of_the_rate(model, train, val, finding):
    return (
        compiled(model.net, cross_entropy(), lambda p: torch.optim.Adam(p, 0.5 / 100)),
        train,
        val,
    )


@cure("adam_with_0_5", "check_updates", "try a tenth or a hundredth of it")
def take_a_tenth_of_the_rate(model, train, val, finding):
    return compiled(model.net, cross_entropy(), lambda p: torch.optim.Adam(p, 0.5 / 10)), train, val


def at_rate(kind, finding):
    """Return what makes an optimizer with the learning rate that a finding suggests."""
    rate = float(re.search(r"Try lr=([\d.]+e[+-]\d+)", finding.remedy)[1])
    return lambda parameters: kind(parameters, rate)


# --- the law --------------------------------------------------------------------------------------


def build(fault):
    torch.manual_seed(0)
    np.random.seed(0)
    return FAULTS[fault][2]()


def faults_of(check, data, model):
    steps = 100 if check == "check_learning_rate" else FEW_STEPS
    found = model.diagnose(*data, steps=steps).findings
    assert not [finding for finding in found if "not made" in finding.found]
    return [finding for finding in found if finding.check == check and finding.level != "note"]


def loss_of_constant(train):
    """Return the entropy of the labels, or their variance."""
    y = train.dataset.tensors[1] if isinstance(train, DataLoader) else train[1]
    y = np.asarray(y)
    shares = np.unique(y, return_counts=True)[1] / y.size
    if y.dtype.kind == "i" or len(shares) == 2:
        return -(shares * np.log(shares)).sum()
    return y.var()


@pytest.mark.parametrize("name", CURES)
def test_remedy_as_it_is_written_cures_the_fault(name):
    case = CURES[name]
    model, *data = build(case.fault)
    before = faults_of(case.check, data, model)
    advised = [finding for finding in before if case.words in finding.remedy]
    assert advised, [finding.remedy for finding in before]

    model, *data = case.apply(model, *data, advised[0])

    assert not faults_of(case.check, data, model)
    if case.epochs:
        goal = ENOUGH * loss_of_constant(data[0])
        losses = []
        while len(losses) < case.epochs and (not losses or losses[-1] >= goal):
            history = model.fit(1, data[0], verbose=0)
            losses = list(history["loss"])
        assert losses[-1] < goal
