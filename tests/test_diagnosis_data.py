"""The checks of `model.diagnose` that look at data, time and history, where they are hard to judge.

Each case says what a user has, and which level is right. A healthy case has no error and no
warning; notes may be.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.set_ups import DIGIT_CLASSES, DIGITS, compiled, mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import minikeras
from minikeras.diagnosis import loading
from minikeras.diagnosis.diagnose import DATA, HISTORY
from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.loading import check_loading_time

HEALTHY = {}
FAULTS = {}


def healthy(build):
    """Add a function to the table: it returns a model, dl_train and dl_val."""
    HEALTHY[build.__name__] = build
    return build


def fault(check, words="", level="warning"):
    """Add a function to the table: the line of this check must have the words and the level."""

    def add(build):
        FAULTS[build.__name__] = check, words, level, build
        return build

    return add


def look(build):
    """Return what the checks of data and history find; an error in one of them is raised."""
    torch.manual_seed(0)
    model, dl_train, dl_val = build()
    evidence = Evidence(model, dl_train, dl_val, steps=10)
    findings = []
    for check in [*DATA, *HISTORY]:
        for finding in check(evidence):
            findings.append((check.__name__, finding))
    return findings


def classifier(features, classes=2):
    return compiled(mlp(features, classes, 8), nn.CrossEntropyLoss())


def regressor(features):
    return compiled(mlp(features, 1, 8), nn.MSELoss())


class Before(nn.Module):
    """A network that changes its features with a function first."""

    def __init__(self, function, net):
        super().__init__()
        self.function = function
        self.net = net

    def forward(self, x):
        return self.net(self.function(x))


# --- features ---------------------------------------------------------------------------------


@healthy
def missing_values_that_forward_fills():
    X = torch.randn(200, 4)
    X[::7, 2] = torch.nan
    net = Before(lambda x: torch.nan_to_num(x), mlp(4, 2, 8))
    return compiled(net, nn.CrossEntropyLoss()), (X, torch.arange(200) % 2), None


@healthy
def an_attention_mask_of_minus_infinity():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
            self.last = nn.Linear(4, 2)

        def forward(self, features):
            values, mask = features
            mixed, _ = self.attention(values, values, values, key_padding_mask=mask)
            return self.last(mixed.mean(1))

    mask = torch.zeros(100, 5)
    mask[::2, 3:] = -torch.inf
    data = ((torch.randn(100, 5, 4), mask), torch.arange(100) % 2)
    return compiled(Net(), nn.CrossEntropyLoss()), data, None


@fault("check_missing_features", 'feature "b": NaN or infinite in 3 of 100 rows', "error")
def missing_values_of_a_named_column():
    X = pd.DataFrame(np.random.RandomState(0).randn(100, 2), columns=["a", "b"])
    X.loc[[3, 50, 99], "b"] = np.nan
    return classifier(2), (X, pd.Series(np.arange(100) % 2)), None


@fault("check_missing_features", "column 2 of features", "error")
def missing_values_of_a_column_of_windows():
    X = torch.randn(100, 6, 3)
    X[5, 1, 2] = torch.nan
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, 2))
    return compiled(net, nn.CrossEntropyLoss()), (X, torch.arange(100) % 2), None


@fault("check_missing_features", "NaN or infinite in 1 of 100 rows", "error")
def infinity_that_tanh_hides_in_forward():
    X = torch.randn(100, 4)
    X[5, 1] = torch.inf
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return compiled(net, nn.CrossEntropyLoss()), (X, torch.arange(100) % 2), None


@healthy
def images_standardized_with_one_mean_and_flattened():
    X = (DIGITS - DIGITS.mean()) / DIGITS.std()  # the border is -0.8 in all rows
    return classifier(64, 10), (X, DIGIT_CLASSES), None


@healthy
def one_hot_columns_of_which_some_are_rare():
    X = nn.functional.one_hot(torch.arange(400) % 30, 40).float()
    X[:, 35] = 1.0
    return classifier(40), (X, torch.arange(400) // 2 % 2), None


@healthy
def a_year_that_is_constant_in_the_first_rows_only():
    rows = 6000
    X = torch.randn(rows, 3)
    X[:5000, 1] = -1.0
    data = TensorDataset(X, torch.arange(rows) % 2)
    return classifier(3), DataLoader(data, 512), None


@fault("check_constant_features", 'feature "unit"')
def a_constant_column():
    X = pd.DataFrame(np.random.RandomState(0).randn(100, 2), columns=["a", "b"])
    X["unit"] = 1.0
    return classifier(3), (X, pd.Series(np.arange(100) % 2)), None


@healthy
def a_model_that_standardizes_in_forward_and_has_a_parameter_of_its_own():
    class Net(minikeras.Model):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))
            self.net = mlp(3, 2, 8)

        def forward(self, x):
            return self.net((x - 500) / 300 * self.gain)

    X = 500 + 300 * torch.randn(200, 3)
    return compiled(Net(), nn.CrossEntropyLoss()), (X, torch.arange(200) % 2), None


class Scale(nn.Module):
    """A norm layer of the user's."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt() * self.gain


@pytest.mark.parametrize("make_norm", [Scale, lambda: nn.RMSNorm(3), lambda: nn.LayerNorm(3)])
def test_a_network_that_begins_with_a_norm_layer_scales_its_features_itself(make_norm):
    def build():
        net = nn.Sequential(make_norm(), mlp(3, 2, 8))
        X = 500 + 300 * torch.randn(200, 3)
        return compiled(net, nn.CrossEntropyLoss()), (X, torch.arange(200) % 2), None

    assert warnings_of(look(build)) == []


@healthy
def bytes_that_forward_divides():
    X = torch.randint(0, 256, (100, 1, 6, 6), dtype=torch.uint8)
    net = Before(lambda x: x.float() / 255, nn.Sequential(nn.Flatten(), nn.Linear(36, 2)))
    return compiled(net, nn.CrossEntropyLoss()), (X, torch.arange(100) % 2), None


@fault("check_feature_scales", "Divide by 255")
def bytes_that_forward_does_not_divide():
    X = torch.randint(0, 256, (100, 6, 6, 1), dtype=torch.uint8)
    net = Before(lambda x: x.float(), nn.Sequential(nn.Flatten(), nn.Linear(36, 2)))
    return compiled(net, nn.CrossEntropyLoss()), (X, torch.arange(100) % 2), None


@fault("check_feature_scales", "Divide by 255")
def flat_images_of_0_to_255():
    return classifier(64, 10), ((DIGITS * 255).round(), DIGIT_CLASSES), None


@fault("check_feature_scales", "Divide by 255")
def images_without_a_channel_of_0_to_255():
    X = (DIGITS * 255).round().reshape(-1, 8, 8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return compiled(net, nn.CrossEntropyLoss()), (X, DIGIT_CLASSES), None


@fault("check_feature_scales", 'feature "income"')
def a_large_column_beside_a_category_with_an_embedding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.city = nn.Embedding(5, 3)
            self.last = nn.Linear(5, 2)

        def forward(self, x):
            return self.last(torch.cat([self.city(x[:, 0].long()), x[:, 1:]], 1))

    rng = np.random.RandomState(0)
    X = pd.DataFrame({"city": rng.randint(0, 5, 200), "income": rng.rand(200) * 90000})
    X["age"] = rng.randn(200)
    model = compiled(Net(), nn.CrossEntropyLoss())
    return model, (X.astype("float32"), pd.Series(np.arange(200) % 2)), None


@healthy
def numbers_of_users_with_an_embedding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.user = nn.Embedding(1000, 3)
            self.last = nn.Linear(5, 2)

        def forward(self, x):
            return self.last(torch.cat([self.user(x[:, 0].long()), x[:, 1:]], 1))

    X = torch.cat([torch.randint(0, 1000, (200, 1)).float(), torch.randn(200, 2)], 1)
    return compiled(Net(), nn.CrossEntropyLoss()), (X, torch.arange(200) % 2), None


@healthy
def tokens_of_batches_with_different_lengths():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(500, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.embed(x).mean(1))

    batches = []
    for length in (5, 9, 7):
        tokens = torch.randint(0, 500, (16, length))
        batches.append((tokens, tokens[:, 0] % 2))
    return compiled(Net(), nn.CrossEntropyLoss()), batches, None


@healthy
def lazy_layers():
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2))
    model = compiled(net, nn.CrossEntropyLoss(), None)
    return model, (torch.randn(100, 3), torch.arange(100) % 2), None


@healthy
def complex_features():
    net = Before(lambda x: torch.cat([x.real, x.imag], 1), mlp(6, 2, 8))
    X = torch.randn(100, 3, dtype=torch.complex64)
    return compiled(net, nn.CrossEntropyLoss()), (X, torch.arange(100) % 2), None


@healthy
def a_mask_of_rows_without_padding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 4)
            self.last = nn.Linear(4, 2)

        def forward(self, features):
            tokens, mask = features
            return self.last((self.embed(tokens) * mask[:, :, None]).mean(1))

    data = ((torch.randint(0, 50, (100, 7)), torch.ones(100, 7)), torch.arange(100) % 2)
    return compiled(Net(), nn.CrossEntropyLoss()), data, None


@healthy
def sparse_features():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(30, 2)

        def forward(self, x):
            return self.last(x.to_dense())

    batches = []
    for _ in range(6):
        words = (torch.rand(32, 30) < 0.1).float()
        batches.append((words.to_sparse(), torch.arange(32) % 2))
    return compiled(Net(), nn.CrossEntropyLoss()), batches, batches[:2]


@fault("check_feature_scales", "column 3 of features")
def a_large_column_of_which_forward_takes_a_part():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.city = nn.Embedding(5, 3)
            self.rest = nn.Linear(3, 3)
            self.last = nn.Linear(6, 2)

        def forward(self, x):
            return self.last(torch.cat([self.city(x[:, 0].long()), self.rest(x[:, 1:])], 1))

    X = torch.cat([torch.randint(0, 5, (200, 1)).float(), torch.randn(200, 3)], 1)
    X[:, 3] = 5000 + 2000 * X[:, 3]
    return compiled(Net(), nn.CrossEntropyLoss()), (X, torch.arange(200) % 2), None


# --- labels -----------------------------------------------------------------------------------


@healthy
def missing_labels_that_the_loss_leaves_out():
    def masked_loss(y_pred, y_true):
        known = ~y_true.isnan()
        return (y_pred - y_true)[known].square().mean()

    y = torch.randn(200, 3)
    y[::3, 1] = torch.nan
    return compiled(mlp(4, 3, 8), masked_loss), (torch.randn(200, 4), y), None


@healthy
def missing_labels_of_late_rows_that_the_loss_leaves_out():
    def masked_loss(y_pred, y_true):
        known = ~y_true.isnan()
        return (y_pred - y_true)[known].square().mean()

    y = torch.randn(3000, 1)
    y[2900:2950] = torch.nan
    data = TensorDataset(torch.randn(3000, 4), y)
    return compiled(mlp(4, 1, 8), masked_loss), DataLoader(data, 500), None


@fault("check_missing_labels", "2 of 200 rows", "error")
def missing_targets():
    y = torch.randn(200, 1)
    y[[3, 150]] = torch.nan
    return regressor(4), (torch.randn(200, 4), y), None


class Words(nn.Module):
    def __init__(self, words=12):
        super().__init__()
        self.embed = nn.Embedding(words, 4)
        self.last = nn.Linear(4, words)

    def forward(self, x):
        return self.last(self.embed(x)).transpose(1, 2)


@healthy
def words_with_a_filler_that_the_loss_ignores():
    X = torch.randint(1, 12, (200, 10))
    X[:, 7:] = 0
    model = compiled(Words(), nn.CrossEntropyLoss(ignore_index=0))
    return model, (X, X), None


@healthy
def words_of_which_the_first_never_comes():
    X = torch.randint(1, 12, (200, 10))  # 0 begins a text, and is no label
    return compiled(Words(), nn.CrossEntropyLoss()), (X, X), None


@healthy
def a_class_of_2_percent_and_a_loss_with_weights():
    y = (torch.arange(1000) % 50 == 0).float()[:, None]
    loss_func = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([30.0]))
    return compiled(mlp(4, 1, 8), loss_func), (torch.randn(1000, 4), y), None


@healthy
def a_class_of_5_percent():
    y = (torch.arange(1000) % 20 == 0).float()[:, None]
    return compiled(mlp(4, 1, 8), nn.BCEWithLogitsLoss()), (torch.randn(1000, 4), y), None


@fault("check_class_shares", "accuracy of 99.0%")
def a_class_of_1_percent():
    y = (torch.arange(1000) % 100 == 0).float()[:, None]
    return compiled(mlp(4, 1, 8), nn.BCEWithLogitsLoss()), (torch.randn(1000, 4), y), None


@fault("check_class_shares", "sorted")
def the_first_rows_of_many_are_of_one_class():
    y = torch.arange(9000) // 4500
    data = TensorDataset(torch.randn(9000, 3), y)
    return classifier(3), DataLoader(data, 512), None


@fault("check_class_range", "class -1", "error")
def labels_below_0():
    return (
        classifier(3, 4),
        DataLoader(TensorDataset(torch.randn(64, 3), torch.arange(64) % 4 - 1), 64),
        None,
    )


@healthy
def a_network_that_undoes_the_scale_of_its_targets():
    net = nn.Sequential(mlp(4, 1, 8), Undo())
    return compiled(net, nn.MSELoss()), (torch.randn(200, 4), torch.randn(200, 1) * 50 + 300), None


class Undo(nn.Module):
    def forward(self, x):
        return x * 50 + 300


@fault("check_target_scale", "the same for all", "error")
def targets_that_are_constant_and_no_sum_of_powers_of_2():
    return regressor(4), (torch.randn(200, 4), torch.full((200, 1), 100.1)), None


@fault("check_target_scale", "the same for all", "error")
def targets_that_are_constant_and_large():
    return regressor(4), (torch.randn(200, 4), torch.full((200, 1), 150.0)), None


@fault("check_target_scale", "values of about")
def targets_around_0_of_1000():
    return regressor(4), (torch.randn(200, 4), torch.randn(200, 1) * 1000), None


# --- dl_train against dl_val ------------------------------------------------------------------


@healthy
def classes_that_are_too_rare_to_be_in_both():
    # 100 classes, the last ones of a row each, as of words or species
    y = (torch.rand(3000).pow(6) * 100).long()
    X = torch.randn(3000, 4)
    return classifier(4, 100), (X[:2400], y[:2400]), (X[2400:], y[2400:])


@fault("check_split", "class 2 is in dl_val and not in dl_train")
def a_class_of_validation_only():
    y = torch.arange(300) % 3
    X = torch.randn(300, 4)
    first = y[:200].clamp(max=1)
    return classifier(4, 3), (X[:200], first), (X[200:], y[200:])


@healthy
def few_valued_columns_that_repeat():
    X = torch.randint(0, 2, (600, 6)).float()
    y = X.sum(1, keepdim=True)
    return regressor(6), (X[:400], y[:400]), (X[400:], y[400:])


@fault("check_leaks", "the same", "error")
def validation_on_one_and_the_same_large_loader():
    data = TensorDataset(torch.randn(50_000, 3), torch.arange(50_000) % 2)
    loader = DataLoader(data, 256, shuffle=True)
    return classifier(3), loader, loader


@fault("check_leaks", "the same", "error")
def validation_on_the_same_large_arrays():
    X = torch.randn(50_000, 3)
    y = torch.arange(50_000) % 2
    return classifier(3), (X, y), (X, y)


@fault("check_leaks", "the same", "error")
def two_loaders_of_the_same_large_dataset():
    data = TensorDataset(torch.randn(50_000, 3), torch.arange(50_000) % 2)
    return classifier(3), DataLoader(data, 256, shuffle=True), DataLoader(data, 256)


@healthy
def two_samplers_of_one_dataset():
    data = TensorDataset(torch.randn(400, 3), torch.arange(400) % 2)
    first = torch.utils.data.SubsetRandomSampler(range(300))
    second = torch.utils.data.SubsetRandomSampler(range(300, 400))
    return classifier(3), DataLoader(data, 32, sampler=first), DataLoader(data, 32, sampler=second)


@healthy
def two_batch_samplers_of_one_dataset():
    data = TensorDataset(torch.randn(400, 3), torch.arange(400) % 2)
    loaders = []
    for rows in (range(300), range(300, 400)):
        sampler = torch.utils.data.SubsetRandomSampler(rows)
        batches = torch.utils.data.BatchSampler(sampler, 32, drop_last=False)
        loaders.append(DataLoader(data, batch_sampler=batches))
    return classifier(3), *loaders


# --- order ------------------------------------------------------------------------------------


def in_order(y, features=3):
    return DataLoader(TensorDataset(torch.randn(len(y), features), y), 32)


@healthy
def a_target_that_is_0_nearly_always():
    y = torch.zeros(1000, 1)
    y[::90] = torch.rand(12, 1)
    return regressor(3), in_order(y), None


@healthy
def life_that_remains_of_several_machines():
    lives = []
    for length in (120.0, 171, 140, 133, 160):
        lives.append(torch.arange(length, 0, -1) / 100)
    y = torch.cat(lives)[:, None]
    return regressor(3), in_order(y + 1e-4 * torch.rand_like(y)), None


@healthy
def windows_of_a_time_series_in_order():
    series = torch.sin(torch.arange(500) / 7)
    windows = series.unfold(0, 11, 1)
    data = TensorDataset(windows[:, :10], windows[:, 10:])
    return regressor(10), DataLoader(data, 32), None


@healthy
def batches_of_8_with_a_rare_class():
    y = (torch.rand(400, 1) < 0.06).float()
    data = DataLoader(TensorDataset(torch.randn(400, 3), y), 8)
    return compiled(mlp(3, 1, 8), nn.BCEWithLogitsLoss()), data, None


@healthy
def sorted_arrays_that_fit_shuffles():
    y = torch.arange(400) // 200
    return classifier(3), (torch.randn(400, 3), y), None


@fault("check_order", "of one class")
def sorted_one_hot_labels():
    y = nn.functional.one_hot(torch.arange(320) // 80, 4).float()
    return classifier(3, 4), in_order(y), None


@fault("check_order", "of one class")
def sorted_labels_of_one_output_of_two():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(3, 5, 8)

        def forward(self, x):
            y = self.net(x)
            return {"kind": y[:, :4], "size": y[:, 4:]}

    losses = {"kind": nn.CrossEntropyLoss(), "size": nn.MSELoss()}
    batches = []
    for kind in (0, 0, 1, 1, 2, 2, 3, 3):
        labels = {"kind": torch.full((32,), kind), "size": torch.randn(32, 1)}
        batches.append((torch.randn(32, 3), labels))
    return compiled(Net(), losses), batches, None


@fault("check_order", "of one class")
def sorted_labels_of_true_and_false():
    def loss_func(y_pred, y_true):
        return nn.functional.binary_cross_entropy_with_logits(y_pred[:, 0], y_true.float())

    return compiled(mlp(3, 1, 8), loss_func), in_order(torch.arange(320) < 160), None


@fault("check_order", "sorted")
def sorted_targets():
    return regressor(3), in_order(torch.randn(500, 1).sort(0).values), None


# --- time -------------------------------------------------------------------------------------


def look_at_time(monkeypatch, make_loader, reads, step, workers=0):
    """Return what is found with these seconds of reading each batch, and of a training step."""
    data = TensorDataset(torch.randn(64, 3), torch.arange(64) % 2)
    evidence = Evidence(classifier(3), make_loader(data), None, steps=10)
    evidence.train.seconds[:] = reads
    evidence.dl_train.num_workers = workers  # it has been read; no process starts
    monkeypatch.setattr(loading, "measure_step", lambda evidence: step)
    return list(check_loading_time(evidence))


def in_process(data):
    return DataLoader(data, 8)


def wrapped(data):
    """Return a loader of a Dataset that is not in memory."""
    return DataLoader(torch.utils.data.Subset(data, range(64)), 8)


SLOW = [0.5, 0.03, 0.04, 0.03, 0.05, 0.03, 0.04]


def test_a_loader_that_is_slower_than_the_network_is_found_with_the_share_of_the_step(monkeypatch):
    (finding,) = look_at_time(monkeypatch, wrapped, SLOW, step=0.005)
    assert finding.level == "warning"
    assert "88% waits for dl_train: 35 ms for a batch, 5 ms for the step" in finding.found
    assert "num_workers=4" in finding.remedy


def test_tensors_in_a_loader_are_better_passed_as_they_are(monkeypatch):
    (finding,) = look_at_time(monkeypatch, in_process, SLOW, step=0.005)
    assert "model.fit(epochs, (X, y)" in finding.remedy
    assert "num_workers" not in finding.remedy


@pytest.mark.parametrize(
    ("make_loader", "reads", "step"),
    [
        pytest.param(wrapped, [2.0, *[0.001] * 6], 0.0001, id="the first batch alone is slow"),
        pytest.param(wrapped, [0.1, *[0.001] * 5, 0.9], 0.0001, id="one pause of the machine"),
        pytest.param(wrapped, SLOW, 0.03, id="the network takes as long"),
        pytest.param(wrapped, [0.5, 0.5, 0.5], 0.001, id="too few batches"),
    ],
)
def test_no_warning_of_a_loader_that_is_fast_enough(monkeypatch, make_loader, reads, step):
    assert look_at_time(monkeypatch, make_loader, reads, step) == []


def test_workers_read_while_the_network_computes(monkeypatch):
    assert look_at_time(monkeypatch, wrapped, SLOW, step=0.04, workers=2) == []


def test_workers_that_bring_batches_at_once_are_judged_by_the_mean(monkeypatch):
    reads = [0.5, 0.0, 0.2, 0.0, 0.2, 0.0, 0.2, 0.0, 0.2]
    (finding,) = look_at_time(monkeypatch, wrapped, reads, step=0.01, workers=2)
    assert "90 ms for a batch" in finding.found


# --- a history --------------------------------------------------------------------------------


def with_history(model, **columns):
    """Give a model a history, as if it had been trained."""
    run = model._compiled("diagnose")
    for values in zip(*columns.values(), strict=True):
        run.epochs.append((dict(zip(columns, values, strict=True)), {}))
    return model


def after(model=None, **columns):
    data = (torch.randn(200, 3), torch.randn(200, 1))
    return with_history(model or regressor(3), **columns), data, None


NAN = float("nan")


@healthy
def val_loss_that_rises_a_little_near_0():
    return after(loss=[1, 0.1, 0.02, 0.01, 0.009, 0.008, 0.007, 0.006],
                 val_loss=[1, 0.1, 0.02, 0.01, 0.012, 0.013, 0.013, 0.013])  # fmt: skip


@healthy
def val_loss_of_every_second_epoch():
    return after(loss=[1, 0.8, 0.7, 0.6, 0.55, 0.5], val_loss=[NAN, 0.9, NAN, 0.8, NAN, 0.75])


@healthy
def a_loss_that_was_nan_in_one_epoch_and_recovered():
    return after(loss=[1, NAN, 0.8, 0.7, 0.6, 0.6])


@healthy
def a_loss_that_rises_in_a_few_epochs():
    return after(loss=[0.1, 0.15, 0.3])


@healthy
def a_loss_below_0():
    return after(loss=[-1, -2, -3, -3.5, -3.6, -3.5])


@fault("check_history", "overfitting since epoch 3: val_loss 0.5")
def val_loss_that_rises():
    return after(loss=[0.7, 0.6, 0.4, 0.3, 0.2, 0.1], val_loss=[0.7, 0.6, 0.5, 0.7, 0.9, 1.1])


@fault("check_history", "diverged in epoch 2", "error")
def a_short_fit_that_ended_with_nan():
    return after(loss=[2.0, NAN])


@fault("check_history", "diverged")
def a_loss_that_rises_far():
    return after(loss=[1.0, 0.9, 3.0, 20.0, 400.0])


def always_0(rows, positives):
    model = compiled(mlp(3, 2, 8), nn.CrossEntropyLoss())
    with torch.no_grad():
        list(model.modules())[-1].bias.copy_(torch.tensor([20.0, -20.0]))
    y = (torch.arange(rows) % rows < positives).long()
    return model, (torch.randn(rows, 3), y), None


@fault("check_history", "most frequent class")
def an_accuracy_that_stands_at_the_share_of_a_class():
    model, data, _ = always_0(200, 40)
    return with_history(model, loss=[0.5] * 6, acc=[0.79, 0.8, 0.8, 0.8, 0.8, 0.8]), data, None


@healthy
def an_accuracy_that_happens_to_be_the_share_of_a_class():
    model = compiled(mlp(3, 2, 8), nn.CrossEntropyLoss())
    X = torch.randn(200, 3)
    y = (torch.arange(200) % 5 == 0).long()
    with_history(model, loss=[0.5] * 6, acc=[0.8] * 6)
    return model, (X, y), None


def overfitted(lowest, last):
    """Return a model with a history whose val_loss is given in parts of that of the weights."""
    torch.manual_seed(0)
    model = regressor(3)
    val = torch.randn(200, 3), torch.randn(200, 1)
    val_loss = model.evaluate(val)["val_loss"]
    parts = np.array([1.2, 1.1, 1, *[1 + (last / lowest - 1) * part / 5 for part in range(1, 6)]])
    losses = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    with_history(model, loss=losses, val_loss=list(parts * lowest * val_loss))
    return model, (torch.randn(200, 3), torch.randn(200, 1)), val


@healthy
def early_stopping_that_restored_the_best_weights():
    return overfitted(lowest=1.0, last=1.8)


@fault("check_history", "overfitting since epoch 3")
def overfitting_with_the_weights_of_the_last_epoch():
    return overfitted(lowest=0.5, last=1.0)


# --- the tables -------------------------------------------------------------------------------


def warnings_of(findings):
    found = []
    for check, finding in findings:
        if finding.level != "note":
            found.append((check, finding.looked_at, finding.found))
    return found


@pytest.mark.parametrize("name", HEALTHY)
def test_no_warning_for(name):
    assert warnings_of(look(HEALTHY[name])) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_line_for(name):
    check, words, level, build = FAULTS[name]
    lines = []
    for found_by, finding in look(build):
        if found_by == check and finding.level == level:
            lines.append(f"{finding.looked_at}: {finding.found}. {finding.remedy}")
    assert any(words in line for line in lines), lines or warnings_of(look(build))
