"""compile, devices, optimizers and custom steps of a Model."""

import copy
import io
import pickle

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers.compare import assert_equal_tensors
from helpers.metrics import cosine
from helpers.models import Net, accuracy, compiled, points
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import minikeras

# --- scripts written for torchkeras ---------------------------------------------------------------


def test_torchkeras_script_with_a_subclass_runs(capsys):
    from minikeras import Model, summary

    class DNNModel(Model):
        def __init__(self):
            super(DNNModel, self).__init__()  # noqa: UP008 - as such scripts have it
            self.fc1 = nn.Linear(2, 4)
            self.fc2 = nn.Linear(4, 1)

        def forward(self, x):
            x = F.relu(self.fc1(x))
            return nn.Sigmoid()(self.fc2(x))

    X, Y = points(100)
    dl_train = DataLoader(TensorDataset(X, Y), batch_size=10, shuffle=True)
    dl_valid = DataLoader(TensorDataset(X, Y), batch_size=10)
    model = DNNModel()
    model.summary(input_shape=(2,))
    summary(model, input_shape=(2,), input_dtype=torch.FloatTensor)
    model.compile(
        loss_func=nn.BCELoss(),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        metrics_dict={"accuracy": accuracy},
    )
    dfhistory = model.fit(3, dl_train=dl_train, dl_val=dl_valid, log_step_freq=5)
    assert list(dfhistory) == ["loss", "accuracy", "val_loss", "val_accuracy"]
    assert set(model.evaluate(dl_valid)) == {"val_loss", "val_accuracy"}
    assert model.predict(dl_valid).shape == (100, 1)
    assert "Linear" in capsys.readouterr().out


def test_torchkeras_script_that_wraps_a_network_runs():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1), nn.Sigmoid())
    model = minikeras.Model(net)
    model.compile(
        nn.BCELoss(), torch.optim.Adam(model.parameters(), lr=0.01), {"accuracy": accuracy}, "cpu"
    )
    dfhistory = model.fit(2, points(50), points(50), 1)
    assert len(dfhistory) == 2
    assert model.net is net


# --- compile --------------------------------------------------------------------------------------


class Holds(nn.Module):
    """A loss with a tensor and a parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(1))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, y_pred, y_true):
        return (self.scale * self.weight * (y_pred - y_true) ** 2).mean()


def test_compile_never_changes_the_state_dict():
    import torchmetrics

    model = Net()
    before = copy.deepcopy(model.state_dict())
    metrics = {"acc": torchmetrics.classification.BinaryAccuracy(), "mae": nn.L1Loss()}
    model.compile(Holds(), metrics_dict=metrics, device="cpu")
    assert list(model.state_dict()) == list(before)
    assert_equal_tensors(model.state_dict(), before)
    assert [name for name, _ in model.named_modules()] == ["", "fc1", "fc2"]
    model.fit(1, points(), verbose=0)
    assert list(model.state_dict()) == list(before)


def test_default_optimizer_is_adam_on_the_parameters_of_model_and_loss():
    model = Net()
    loss_func = Holds()
    model.fc1.bias.requires_grad_(False)
    model.compile(loss_func)
    (group,) = model.optimizer.param_groups
    assert type(model.optimizer) is torch.optim.Adam
    assert group["lr"] == 1e-3
    expected = [*model.parameters(), loss_func.scale]  # what is frozen may be thawed later
    assert [id(parameter) for parameter in group["params"]] == [
        id(parameter) for parameter in expected
    ]


def test_default_device_is_the_accelerator_that_works(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda")
        )
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        model = Net()
        model.compile(nn.BCELoss())  # a CUDA build without a GPU answers "cuda" all the same
        assert model.fc1.weight.device.type == "cpu"
        patch.setattr(
            torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("meta")
        )
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        other = Net()
        other.compile(nn.BCELoss())
        assert other.fc1.weight.device.type == "meta"
    assert len(model.fit(1, points(), verbose=0)) == 1


def test_device_gets_model_loss_metrics_and_nested_batches():
    import torchmetrics

    seen = []

    class Watch(Net):
        def train_step(self, features, labels):
            seen.extend(leaf.device.type for leaf in (features["a"][0], features["b"], labels))
            return {"n": 1.0}

    model = Watch()
    loss_func = Holds()
    metric = torchmetrics.classification.BinaryAccuracy()
    model.compile(loss_func, metrics_dict={"acc": metric}, device=torch.device("meta"))
    X, y = points(8)
    with pytest.raises(RuntimeError, match="meta"):  # nothing can be read from there
        model.fit(1, [({"a": [X], "b": X.numpy()}, y)], verbose=0)
    assert seen == ["meta"] * 3
    assert {
        p.device.type for p in (*model.parameters(), *loss_func.parameters(), *loss_func.buffers())
    } == {"meta"}
    assert metric.device.type == "cpu"  # the user's own object is left alone


@pytest.mark.gpu
def test_device_gets_the_state_of_an_optimizer_with_its_parameters():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    model(points()[0]).sum().backward()
    optimizer.step()
    model.compile(nn.BCELoss(), optimizer)
    assert {state["exp_avg"].device for state in optimizer.state.values()} == {
        model.fc1.weight.device
    }
    assert len(model.fit(1, points(), verbose=0)) == 1


@pytest.mark.gpu
def test_device_runs_training_and_predict_returns_on_the_cpu():
    model = Net()
    model.compile(nn.BCELoss(), metrics_dict={"accuracy": accuracy})
    X, y = points(100)
    dfhistory = model.fit(3, DataLoader(TensorDataset(X, y), 16), (X, y), verbose=0)
    assert model.fc1.weight.device.type == torch.accelerator.current_accelerator().type
    assert dfhistory.notna().all(axis=None)
    assert model.predict(X).device.type == "cpu"


@pytest.mark.gpu
def test_device_gets_a_model_back_that_was_moved_away_by_hand():
    model = Net()
    model.compile(nn.BCELoss())
    model.fit(1, points(), verbose=0)
    model.to("cpu")
    assert len(model.fit(1, points(), verbose=0)) == 2


# --- what surprises and must not ------------------------------------------------------------------


def test_subclass_keeps_its_own_history_optimizer_and_device():
    class Own(Net):
        device = "mine"

        def __init__(self):
            super().__init__()
            self.history = ["mine"]
            self.register_buffer("optimizer", torch.ones(1))

    model = compiled(Own())
    dfhistory = model.fit(1, points(), verbose=0)
    assert isinstance(dfhistory, pd.DataFrame)
    assert (model.history, model.device) == (["mine"], "mine")
    assert torch.equal(model.optimizer, torch.ones(1))
    assert copy.deepcopy(model).history == ["mine"]


def test_deepcopy_and_pickle_give_an_uncompiled_model():
    model = compiled()
    model.fit(1, points(), verbose=0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert not hasattr(twin, "optimizer")
        assert not hasattr(twin, "history")
        with pytest.raises(minikeras.NotCompiledError):
            twin.evaluate(points())
        torch.testing.assert_close(twin.predict(points()[0]), model.predict(points()[0]))
        compiled(twin).fit(1, points(), verbose=0)
    assert len(model.history) == 1


def test_compiled_network_keeps_its_names_in_the_state_dict():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Sigmoid())
    plain = minikeras.Model(copy.deepcopy(net))
    model = minikeras.Model(torch.compile(net, backend="eager"))
    assert list(model.state_dict()) == list(plain.state_dict())
    for parameter in plain.parameters():
        nn.init.constant_(parameter, 0.5)
    model.load_state_dict(plain.state_dict())
    assert all(
        torch.equal(parameter, other)
        for parameter, other in zip(model.parameters(), plain.parameters(), strict=True)
    )
    plain.load_state_dict(model.state_dict())
    nn.Sequential(model).load_state_dict(nn.Sequential(plain).state_dict())
    assert len(compiled(model).fit(2, points(), points(), verbose=0)) == 2
    assert compiled(copy.deepcopy(model)).predict(points()[0]).shape == (100, 1)


def test_compiled_network_of_several_inputs_gets_them_unpacked():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 1)

        def forward(self, a, b):
            return torch.sigmoid(self.fc(a + b))

    X, y = points(20)
    for net in (Add(), torch.compile(Add(), backend="eager"), nn.DataParallel(Add())):
        model = minikeras.Model(net)
        model.compile(nn.BCELoss())  # on an accelerator where there is one: DataParallel insists
        assert len(model.fit(1, ((X, X), y), verbose=0)) == 1
        assert model.predict({"a": X, "b": X}).shape == (20, 1)


def test_model_without_a_network_or_a_forward_raises_an_error_that_says_so():
    with pytest.raises(NotImplementedError) as error:
        minikeras.Model()(torch.ones(1))
    assert str(error.value) == "Model has no forward. Write it, or wrap a network: Model(net)."


# --- every loss of the article --------------------------------------------------------------------


LOSSES = {
    "MSELoss": (nn.MSELoss(), 1, None),
    "L1Loss": (nn.L1Loss(), 1, None),
    "SmoothL1Loss": (nn.SmoothL1Loss(), 1, None),
    "BCELoss": (nn.BCELoss(weight=torch.tensor([2.0])), 1, nn.Sigmoid()),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0])), 1, None),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), 3, None),
    "NLLLoss": (nn.NLLLoss(), 3, nn.LogSoftmax(dim=1)),
    "a function": (F.binary_cross_entropy, 1, nn.Sigmoid()),
    "around CosineSimilarity": (cosine, 2, None),
    "AdaptiveLogSoftmaxWithLoss": (
        nn.AdaptiveLogSoftmaxWithLoss(8, 30, cutoffs=[5, 20], div_value=2),
        8,
        None,
    ),
    "FocalLoss": (minikeras.FocalLoss(), 1, nn.Sigmoid()),
}


@pytest.mark.parametrize(("loss_func", "width", "end"), LOSSES.values(), ids=LOSSES)
def test_loss_of_each_kind_in_the_article_trains_as_it_is(loss_func, width, end):
    X, y = points(64)
    labels = {1: y, 2: X, 3: y[:, 0].long(), 8: y[:, 0].long() * 20}[width]
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, width), end or nn.Identity())
    model = minikeras.Model(net)
    model.compile(loss_func, device="cpu")
    dfhistory = model.fit(15, (X, labels), (X, labels), verbose=0)
    assert dfhistory["loss"].iloc[-1] < dfhistory["loss"].iloc[0]
    assert dfhistory["val_loss"].iloc[-1] < dfhistory["val_loss"].iloc[0]


def test_default_optimizer_trains_the_parameters_of_a_loss():
    loss_func = nn.AdaptiveLogSoftmaxWithLoss(2, 10, cutoffs=[5], div_value=1)
    before = copy.deepcopy(loss_func.state_dict())
    model = minikeras.Model(nn.Linear(2, 2))
    model.compile(loss_func, device="cpu")
    model.fit(1, (points(32)[0], torch.randint(10, (32,))), verbose=0)
    assert not torch.equal(before["head.weight"], loss_func.head.weight)


def test_loss_may_return_an_average_if_rows_are_not_the_unit():
    def per_token(y_pred, y_true):  # labels of -1 are padding
        mask = y_true >= 0
        return minikeras.Average((((y_pred - y_true) ** 2) * mask).sum(), mask.sum())

    X = torch.randn(10, 4)
    y = torch.randn(10, 4).abs()
    y[torch.rand(10, 4) < 0.4] = -1
    y[9] = -1  # a batch of nothing but padding
    model = compiled(minikeras.Model(nn.Linear(4, 4)), per_token)
    with torch.no_grad():
        expected = ((model(X) - y) ** 2)[y >= 0].mean().item()
    assert model.evaluate((X, y), batch_size=3)["val_loss"] == pytest.approx(expected, rel=1e-6)
    twin = copy.deepcopy(model)
    compiled(twin, lambda y_pred, y_true: ((y_pred - y_true) ** 2)[y_true >= 0].mean())
    model.fit(1, [(X[:9], y[:9])], verbose=0)
    twin.fit(1, [(X[:9], y[:9])], verbose=0)
    torch.testing.assert_close(model.net.weight, twin.net.weight)
    model.fit(1, [(X[9:], y[9:])], verbose=0)
    assert model.net.weight.isfinite().all()


# --- steps of one's own ---------------------------------------------------------------------------


class Pair(minikeras.Model):
    """An adversarial pair: the generator learns the distribution of what it is shown."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Linear(4, 1)
        self.discriminator = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))

    def train_step(self, features, labels):
        fake = self.generator(torch.randn(len(features), 4))
        d_real = self.discriminator(features)
        d_fake = self.discriminator(fake.detach())
        d_loss = self.compute_loss(d_real, torch.ones_like(d_real)) + self.compute_loss(
            d_fake, torch.zeros_like(d_fake)
        )
        self.backward(d_loss, "d")
        self.optimizer_step("d")
        g_out = self.discriminator(fake)
        g_loss = self.compute_loss(g_out, torch.ones_like(g_out))
        self.backward(g_loss, "g")
        self.optimizer_step("g")
        return {"d_loss": d_loss, "g_loss": g_loss}

    def forward(self, z):
        return self.generator(z)


def adversarial():
    torch.manual_seed(0)
    model = Pair()
    optimizers = {
        "g": torch.optim.SGD(model.generator.parameters(), lr=0.05),
        "d": torch.optim.SGD(model.discriminator.parameters(), lr=0.05),
    }
    model.compile(nn.BCEWithLogitsLoss(), optimizers, device="cpu")
    return model


def test_two_optimizers_train_an_adversarial_pair_and_its_keys_reach_the_history():
    model = adversarial()
    dfhistory = model.fit(3, torch.randn(64, 1) + 3, verbose=0)
    assert list(dfhistory) == ["d_loss", "g_loss"]
    assert set(model.optimizer) == {"g", "d"}


def test_two_optimizers_take_the_steps_of_a_bare_loop():
    X = torch.randn(16, 1) + 3
    model = adversarial()
    bare = adversarial()
    torch.manual_seed(1)
    model.fit(3, [(X,)], verbose=0)
    torch.manual_seed(1)
    bce = nn.BCEWithLogitsLoss()
    for _ in range(3):
        fake = bare.generator(torch.randn(16, 4))
        d_real = bare.discriminator(X)
        d_fake = bare.discriminator(fake.detach())
        bare.zero_grad()
        (bce(d_real, torch.ones(16, 1)) + bce(d_fake, torch.zeros(16, 1))).backward()
        bare.optimizer["d"].step()
        bare.zero_grad()
        bce(bare.discriminator(fake), torch.ones(16, 1)).backward()
        bare.optimizer["g"].step()
    for found, expected in zip(model.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_two_optimizers_are_both_stepped_by_the_default_step():
    model = Net()
    optimizers = {
        name: torch.optim.SGD(getattr(model, name).parameters(), lr=0.1) for name in ("fc1", "fc2")
    }
    model.compile(nn.BCELoss(), optimizers, device="cpu")
    twin = compiled(copy.deepcopy(model), lr=0.1)
    X, y = points(32)
    for net in (model, twin):
        net.fit(2, [(X, y)], verbose=0)
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_two_optimizers_may_hold_what_is_not_in_the_model():
    model = Net()
    temperature = torch.ones((), requires_grad=True)
    optimizers = {
        "net": torch.optim.SGD(model.parameters(), lr=0.1),
        "temperature": torch.optim.SGD([temperature]),
    }
    model.compile(nn.BCELoss(), optimizers, device="cpu")
    assert len(model.fit(1, points(), verbose=0)) == 1


def test_lbfgs_trains_with_a_step_of_its_own():
    class Closure(Net):
        def train_step(self, features, labels):
            def closure():
                self.optimizer.zero_grad()
                loss = self.compute_loss(self(features), labels)
                self.backward(loss)
                return loss

            return {"loss": self.optimizer.step(closure)}

    model = Closure()
    model.compile(
        nn.BCELoss(),
        torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe"),
        device="cpu",
    )
    dfhistory = model.fit(3, [points(64)], verbose=0)
    assert dfhistory["loss"].iloc[-1] < dfhistory["loss"].iloc[0]


def test_custom_evaluate_step_names_the_columns():
    class Own(Net):
        def evaluate_step(self, features, labels):
            return {"rows": float(len(features))}

    assert compiled(Own()).evaluate(points(64), batch_size=32) == {"val_rows": 32.0}
