"""Weights that become NaN or infinite after a finite loss: an error, and never in a file."""

import math
import warnings

import pytest
import torch
from helpers.compare import assert_equal_tensors, copy_weights
from helpers.compiling import FAST
from helpers.models import compiled
from torch import nn

import minikeras
from minikeras import LambdaCallback
from minikeras.faults.loss import FiniteLoss

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
Y = X[:, :1]
BATCHES = list(zip(X.split(10), Y.split(10), strict=True))
BAD_LABEL = 99.0


def loss_func(y_pred, y_true):
    """Finite for every batch; its gradient is infinite times 0, NaN, for a batch with BAD_LABEL."""
    return ((y_pred - y_true).clamp(-9, 9) ** 2).mean() + torch.sqrt(
        y_pred - y_pred.detach() + (y_true != 99)
    ).mean()


class Data:
    """BATCHES, but for one with bad labels: an (epoch, batch), each from 1."""

    def __init__(self, bad=None):
        self.bad = bad
        self.epoch = 0

    def __len__(self):
        return 4

    def __iter__(self):
        self.epoch += 1
        for number, (features, labels) in enumerate(BATCHES, start=1):
            bad = (self.epoch, number) == self.bad
            yield features, torch.full_like(labels, BAD_LABEL) if bad else labels


def network():
    torch.manual_seed(0)
    return minikeras.Model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))


def trainer(**options):
    model = network()
    model.compile(loss_func, torch.optim.Adam(model.parameters(), lr=0.01), device="cpu", **options)
    return model


def is_finite(model):
    return all(value.isfinite().all() for value in model.state_dict().values())


def files_are_finite(folder):
    for path in folder.iterdir():
        state = torch.load(path)
        assert all(value.isfinite().all() for value in state.get("model", state).values()), path


WHERE = "net.0.weight, net.0.bias, net.2.weight and 1 more are NaN or infinite in epoch 2, batch 4"
WAY_OUT = (
    "sqrt and log have no finite gradient at 0, and NaN in the data reaches the gradient through "
    "torch.where, nan_to_num and nanmean. Add a small number inside, as in torch.sqrt(x + 1e-8), "
    "clean the data, or lower the learning rate."
)


OPTIONS = [
    {},
    {"precision": "bf16"},
    {"clip_grad_norm": 1.0},
    {"clip_grad_value": 1.0},
    {"accumulate": 2},
]


@pytest.mark.usefixtures("each_fit_in_a_process_of_its_own")
@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize(
    ("options", "every"),
    [*((options, 1) for options in OPTIONS), ({}, None), ({}, 2), ({}, 4)],
    ids=str,
)
def test_nan_gradient_reaches_no_file_and_the_fit_resumes_from_the_last_good_one(
    options, batch, every, tmp_path
):
    path = tmp_path / "run.pt"
    expected = trainer(**options).fit(3, Data(), (X, Y), verbose=0)
    best = minikeras.ModelCheckpoint(tmp_path / "best.pt", "loss", save_best_only=True)
    saving = {"checkpoint": path, "checkpoint_every": every, "callbacks": [best], "verbose": 0}
    with pytest.raises(FloatingPointError, match="in epoch 2, batch"):
        trainer(**options).fit(3, Data((2, batch)), (X, Y), **saving)
    files_are_finite(tmp_path)
    again = trainer(**options).fit(3, Data(), (X, Y), **saving)
    assert again.equals(expected)


@pytest.mark.usefixtures("each_fit_in_a_process_of_its_own")
@pytest.mark.parametrize("options", [{"jit": FAST}, {"jit": FAST, "clip_grad_norm": 1.0}], ids=str)
def test_nan_gradient_under_jit_reaches_no_file(options, tmp_path):
    expected = trainer(**options).fit(3, Data(), verbose=0)
    model = trainer(**options)
    with pytest.raises(FloatingPointError, match="in epoch 2, batch 4") as raised:
        model.fit(3, Data((2, 4)), checkpoint=tmp_path / "run.pt", verbose=0)
    if "clip_grad_norm" in options:
        assert "the norm of the gradient is nan in epoch 2, batch 4; " in str(raised.value)
        assert is_finite(model)
    files_are_finite(tmp_path)
    again = trainer(**options).fit(3, Data(), checkpoint=tmp_path / "run.pt", verbose=0)
    assert again["loss"].tolist() == pytest.approx(expected["loss"].tolist(), rel=1e-6)


def test_nan_weight_error_names_the_first_layer_the_epoch_the_cause_and_the_remedies():
    with pytest.raises(FloatingPointError) as raised:
        trainer().fit(3, Data((2, 4)), verbose=0)
    last = str(raised.value).partition("The last finite loss was ")[2].partition(",")[0]
    assert str(raised.value) == (
        f"{WHERE}; expected finite numbers. The first layer is net.0 (Linear). The last finite "
        f"loss was {last}, at lr 0.01. Each loss was finite, so a gradient was not, or a step was "
        f"too large: {WAY_OUT} compile(clip_grad_norm=1.0) finds such a gradient before its step, "
        "and torch.autograd.set_detect_anomaly(True) names the operation. Nothing of it was "
        "written to a file, but the model contains it: restore a checkpoint."
    )
    assert float(last) < 100


def test_nan_gradient_is_found_before_the_step_with_clip_grad_norm():
    model = trainer(clip_grad_norm=1.0)
    kept = []
    keep = LambdaCallback(on_batch_end=lambda batch, logs: kept.append(copy_weights(model)))
    with pytest.raises(FloatingPointError) as raised:
        model.fit(3, Data((2, 2)), callbacks=[keep], verbose=0)
    last = str(raised.value).partition("The last finite loss was ")[2].partition(",")[0]
    assert str(raised.value) == (
        "the norm of the gradient is nan in epoch 2, batch 2; expected a finite number. The loss "
        f"was finite. The last finite loss was {last}, at lr 0.01. The first gradient that is not "
        "finite is that of net.0.weight. The first layer is net.0 (Linear). Its gradient was not: "
        f"{WAY_OUT.replace('nanmean. ', 'nanmean; large numbers overflow. ')} "
        "torch.autograd.set_detect_anomaly(True) names the operation. The weights are those from "
        "before this step."
    )
    assert_equal_tensors(model.state_dict(), kept[-1])


def test_nan_gradient_error_tells_the_first_bad_gradient_from_finite_ones():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.good = nn.Linear(4, 1)
            self.bad = nn.Linear(4, 1)

        def forward(self, x):
            return self.good(x) + torch.sqrt(self.bad(x) * 0)

    with pytest.raises(
        FloatingPointError,
        match=r"is that of net\.bad\.weight\. The first layer is net\.bad \(Linear",
    ):
        compiled(minikeras.Model(Half()), nn.MSELoss(), clip_grad_norm=1.0).fit(
            1, BATCHES, verbose=0
        )


def test_gradients_whose_squares_overflow_raise_an_error_that_says_so():
    model = compiled(
        network(), lambda y_pred, y_true: (y_pred * 1e25).mean().abs(), clip_grad_norm=1.0
    )
    with pytest.raises(
        FloatingPointError,
        match=r"norm of the gradient is inf.*Each gradient is finite, and the sum",
    ):
        model.fit(1, BATCHES, verbose=0)


def test_nan_gradient_remedies_of_the_message_help():
    def rmse(y_pred, y_true):
        return torch.sqrt(nn.functional.mse_loss(y_pred, y_true))

    def remedied(y_pred, y_true):
        return torch.sqrt(nn.functional.mse_loss(y_pred, y_true) + 1e-8)

    zeros = torch.zeros(8, 4), torch.zeros(8, 1)
    for loss, helps in ((rmse, False), (remedied, True)):
        model = compiled(minikeras.Model(nn.Linear(4, 1, bias=False)), loss)
        if helps:
            model.fit(2, [zeros], verbose=0)
            assert is_finite(model)
        else:
            with pytest.raises(
                FloatingPointError, match=r"net\.weight is NaN or infinite in epoch 1, batch 1"
            ):
                model.fit(2, [zeros], verbose=0)
    model = compiled(minikeras.Model(nn.Linear(4, 1, bias=False)), rmse)
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="Backward0' returned nan values"):
            model.fit(1, [zeros], verbose=0)


def test_nan_gradient_in_float16_skips_the_step_as_its_scaler_does():
    model = trainer(precision="fp16")
    history = model.fit(3, Data((2, 4)), verbose=0)
    assert len(history) == 3
    assert is_finite(model)


def test_nan_gradient_in_mid_epoch_is_explained_at_the_next_loss():
    with pytest.raises(FloatingPointError) as raised:
        trainer().fit(3, Data((2, 2)), verbose=0)
    assert str(raised.value).startswith("the loss is nan in epoch 2, batch 3; ")
    raised.match(
        "They were finite when the fit started: in an earlier step the loss was finite and its "
        "gradient was not, or a step was too large. Possible causes: sqrt and log"
    )


def test_on_nan_stop_warns_of_a_nan_gradient_and_leaves_the_good_file(tmp_path):
    model = trainer()
    with pytest.warns(UserWarning, match="are NaN or infinite in epoch 2, batch 4"):
        history = model.fit(
            3, Data((2, 4)), checkpoint=tmp_path / "run.pt", on_nan="stop", verbose=0
        )
    assert len(history) == 1
    files_are_finite(tmp_path)


def test_on_nan_ignore_trains_on_and_writes_no_nan_state(tmp_path):
    model = trainer()
    best = minikeras.ModelCheckpoint(tmp_path / "last.pt")
    with pytest.warns(UserWarning, match=r"is not written: net\.0\.weight, net\.0\.bias") as caught:
        history = model.fit(
            3,
            Data((2, 4)),
            checkpoint=tmp_path / "run.pt",
            callbacks=[best],
            on_nan="ignore",
            verbose=0,
        )
    assert history["loss"].isna().tolist() == [False, False, True]
    refused = [str(warning.message).partition(" is not written")[0] for warning in caught]
    assert sorted(refused) == [str(tmp_path / "last.pt")] * 2 + [str(tmp_path / "run.pt")] * 2
    files_are_finite(tmp_path)
    assert len(torch.load(tmp_path / "run.pt")["history"]) == 1


def test_nan_weights_are_not_saved_by_a_callback(tmp_path):
    path = tmp_path / "weights.pt"
    model = trainer()
    save = LambdaCallback(on_batch_end=lambda batch, logs: model.save(path))
    with pytest.raises(FloatingPointError, match="are NaN or infinite in epoch 2, batch 2"):
        model.fit(3, Data((2, 2)), callbacks=[save], verbose=0)
    files_are_finite(tmp_path)
    model.save(path)  # after the fit it is the user's own affair
    assert not torch.load(path)["net.0.weight"].isfinite().all()


# --- what is looked at ----------------------------------------------------------------------------


class Masked(nn.Module):
    """A parameter with -inf, one that is NaN and frozen, and a mask that forward creates."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.mask = nn.Parameter(torch.tensor([0.0, 0.0, -math.inf, 0.0]))
        self.unused = nn.Parameter(torch.full((2,), math.nan), requires_grad=False)
        self.register_buffer("causal", None)
        self.register_buffer("lowest", torch.tensor(math.inf))

    def forward(self, x):
        self.causal = torch.full((len(x), len(x)), -math.inf).triu(1)
        self.lowest = torch.minimum(self.lowest, x.detach().min())
        return self.linear(x * self.mask.softmax(0))


def test_nan_weights_from_before_the_fit_are_left_alone(tmp_path):
    model = compiled(minikeras.Model(Masked()), nn.MSELoss())
    model.fit(2, BATCHES, checkpoint=tmp_path / "run.pt", verbose=0)
    assert model.net.mask[2] == -math.inf
    assert model.net.mask[:2].isfinite().all()


def test_nan_weights_from_before_the_fit_do_not_hide_new_ones_in_the_same_parameter():
    model = compiled(minikeras.Model(Masked()), nn.MSELoss())

    def spoil(batch, logs):
        if batch == 4:
            with torch.no_grad():
                model.net.mask[0] = math.inf

    with pytest.raises(
        FloatingPointError, match=r"net\.mask is NaN or infinite in epoch 1, batch 4"
    ):
        model.fit(2, BATCHES, callbacks=[LambdaCallback(on_batch_end=spoil)], verbose=0)


def test_nan_loss_is_not_blamed_on_a_mask():
    model = compiled(
        minikeras.Model(Masked()),
        lambda y_pred, y_true: nn.functional.mse_loss(y_pred, y_true) * math.nan,
    )
    del model.net.unused
    with pytest.raises(
        FloatingPointError,
        match=r"or check the loss\. The weights are those from before this step\.\n",
    ):
        model.fit(1, BATCHES, verbose=0)


def test_nan_statistics_of_batchnorm_reach_no_file(tmp_path):
    class Hiding(minikeras.Model):
        def forward(self, x):
            clean = self.net(x.nan_to_num(posinf=0.0))
            self.norm(x)
            return clean

    model = Hiding(nn.Linear(4, 1))
    model.norm = nn.BatchNorm1d(4, affine=False)
    features = [x.clone() for x, _ in BATCHES]
    data = list(zip(features, [y for _, y in BATCHES], strict=True))
    compiled(model, nn.MSELoss()).fit(1, data, checkpoint=tmp_path / "run.pt", verbose=0)
    features[3][0, 0] = math.inf
    with pytest.raises(FloatingPointError) as raised:
        model.fit(1, data, checkpoint=tmp_path / "run.pt", verbose=0)
    assert str(raised.value).startswith(
        "norm.running_mean, norm.running_var are NaN or infinite in epoch 2, batch 4; expected "
        "finite numbers. "
    )
    raised.match(
        "The weights are finite, so the forward pass caused it, .* Clean the data. Nothing of it "
        "was"
    )
    assert torch.load(tmp_path / "run.pt")["model"]["norm.running_mean"].isfinite().all()


def test_nan_parameter_of_the_loss_reaches_no_file():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, y_pred, y_true):
            return nn.functional.mse_loss(y_pred, y_true) + self.w.sqrt()

    model = network()
    loss = Weighted()
    model.compile(
        loss, torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1), device="cpu"
    )
    with pytest.raises(
        FloatingPointError,
        match=r"the loss's w is NaN or infinite.* It is a parameter of the loss\.",
    ):
        model.fit(1, (X, Y), batch_size=40, verbose=0)


@pytest.mark.parametrize("row", [5, 35])
def test_nan_gradient_of_a_bare_backward_says_what_would_have_found_it(row, tmp_path):
    class Own(minikeras.Model):
        def train_step(self, features, labels):
            loss = self.compute_loss(self(features), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return {"loss": loss}

    features = X.clone()
    features[row] = math.nan
    model = compiled(Own(nn.Linear(4, 1)), nn.MSELoss())
    with pytest.raises(
        FloatingPointError, match=r"No loss was checked.* Call self\.backward\(loss\) instead"
    ):
        model.fit(
            2,
            list(zip(features.split(10), Y.split(10), strict=True)),
            checkpoint=tmp_path / "r.pt",
            verbose=0,
        )
    assert not list(tmp_path.iterdir())


def test_nan_in_the_state_of_the_optimizer_is_an_error():
    model = minikeras.Model(nn.Linear(4, 1))
    model.compile(
        lambda y_pred, y_true: (y_pred * 1e22).mean(),
        torch.optim.Adam(model.parameters()),
        device="cpu",
    )
    with pytest.raises(
        FloatingPointError, match=r"exp_avg_sq of Adam for net\.weight, .* is never updated again"
    ):
        model.fit(1, BATCHES, verbose=0)


@pytest.mark.parametrize("evaluate", [False, True])
def test_nan_in_an_ema_reaches_no_file(evaluate, tmp_path):
    def saving(model, path):
        kept = []

        def spoil(batch, logs):
            kept.append(model.net[0].bias.detach().clone())
            if len(kept) == 6:  # in the second epoch
                model.net[0].bias.detach().fill_(math.inf)

        def heal(batch, logs):
            model.net[0].bias.detach().copy_(kept[-1])

        ema = minikeras.EMA(0.9, evaluate=evaluate)
        listed = [LambdaCallback(on_batch_end=spoil), ema, LambdaCallback(on_batch_end=heal)]
        return {"checkpoint": path, "callbacks": listed, "verbose": 0}

    model = trainer()
    with pytest.warns(
        UserWarning, match=r"run\.pt is not written: .*the EMA of net\.0\.bias would"
    ) as caught:
        model.fit(3, BATCHES, on_nan="ignore", **saving(model, tmp_path / "run.pt"))
    told = [warning for warning in caught if "is not written" in str(warning.message)]
    assert len(told) == 2
    model = trainer()
    told = r"^the EMA of net\.0\.bias is .* The weights are finite now: the average included them"
    if evaluate:
        told = r"^net\.0\.bias is NaN or infinite"  # the model holds the average then
    with pytest.raises(FloatingPointError, match=told):
        model.fit(3, BATCHES, **saving(model, tmp_path / "other.pt"))
    assert len(torch.load(tmp_path / "other.pt")["history"]) == 1
    state = torch.load(tmp_path / "run.pt")
    assert len(state["history"]) == 1
    assert all(value.isfinite().all() for value in state["callbacks"]["EMA"]["averaged"].values())


def test_nan_gradients_that_wait_for_a_step_reach_no_file(tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"the gradient of net\.0\.weight, .* in epoch 2, batch 1; "
    ):
        trainer(accumulate=4).fit(
            3, Data((2, 1)), checkpoint=tmp_path / "run.pt", checkpoint_every=1, verbose=0
        )
    assert torch.load(tmp_path / "run.pt")["position"]["epoch"] == 2
    assert torch.load(tmp_path / "run.pt")["position"]["step"] == 0


# --- on a device, played on the CPU ---------------------------------------------------------------


@pytest.fixture
def _as_on_a_device(monkeypatch):
    real = FiniteLoss.__init__

    def as_on_a_device(self, *args):
        real(self, *args)
        self.reads_each = False

    monkeypatch.setattr(FiniteLoss, "__init__", as_on_a_device)


@pytest.mark.filterwarnings(
    "ignore:.* was written in the middle of an epoch, and dl_train has other data"
)
@pytest.mark.usefixtures("_as_on_a_device", "each_fit_in_a_process_of_its_own")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("every", [1, 3, 7])
def test_nan_count_is_read_before_a_state_is_written(every, fused, tmp_path):
    def train(**kwargs):
        model = network()
        model.compile(nn.MSELoss(), torch.optim.Adam(model.parameters(), fused=fused), device="cpu")
        return model.fit(2, verbose=0, checkpoint_every=every, **kwargs)

    features = X.clone()
    features[13] = math.nan
    bad, clean = (list(zip(x.split(2), Y.split(2), strict=True)) for x in (features, X))
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1, batch"):
        train(dl_train=bad, checkpoint=tmp_path / "run.pt")
    files_are_finite(tmp_path)
    assert train(dl_train=clean, checkpoint=tmp_path / "run.pt").equals(
        train(dl_train=clean, checkpoint=tmp_path / "other.pt")
    )


@pytest.mark.usefixtures("_as_on_a_device")
@pytest.mark.parametrize("fused", [True, False])
def test_nan_norm_is_counted_without_waiting_for_the_device(fused):
    model = network()
    kept = []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    model.compile(loss_func, optimizer, device="cpu", clip_grad_norm=1.0)
    keep = LambdaCallback(
        on_batch_end=lambda batch, logs: kept.append(model.net[0].weight.detach().clone())
    )
    with pytest.raises(FloatingPointError) as raised:
        model.fit(3, Data((2, 2)), callbacks=[keep], verbose=0)
    assert str(raised.value).startswith(
        "the norm of the gradient is nan in epoch 2, batch 4 (it started 2 steps before); "
    )
    assert torch.equal(model.net[0].weight, kept[4]) == fused
    end = (
        "The weights are those from before this step."
        if fused
        else "The optimizer has taken steps since: restore a"
    )
    assert end in str(raised.value)


@pytest.mark.usefixtures("_as_on_a_device")
@pytest.mark.parametrize("spoiled", [13, 39], ids=["an earlier batch", "the batch at hand"])
def test_nan_loss_error_judges_the_batch_of_the_bad_loss_and_no_other(spoiled):
    features = X.clone()
    features[spoiled] = math.nan
    model = network()
    model.compile(nn.MSELoss(), torch.optim.Adam(model.parameters(), fused=True), device="cpu")
    with pytest.raises(FloatingPointError) as raised:
        model.fit(1, list(zip(features.split(1), Y.split(1), strict=True)), verbose=0)
    if spoiled == 39:
        assert "The features of this batch contained NaN or inf: clean the data." in str(
            raised.value
        )
    else:
        assert "Features, labels" not in str(raised.value)
        raised.match(
            r"batch 40 \(it started 26 steps before\); .* "
            r"The batch of that loss was not kept, so its data could not be "
            'checked: compile with device="cpu", where each loss is checked at once, or '
            "look for NaN and inf"
        )


@pytest.mark.parametrize("spoiled", [2, 3, 4], ids="batch {}".format)
def test_nan_loss_in_a_graph_of_several_steps_names_the_batch_at_fault(spoiled):
    labels = Y.clone()
    labels[10 * spoiled - 1] = math.nan
    model = compiled(network(), nn.MSELoss(), jit=FAST, steps_per_execution=3)
    with pytest.raises(
        FloatingPointError, match="The labels of this batch contained NaN or inf: clean the data"
    ):
        model.fit(1, list(zip(X.split(10), labels.split(10), strict=True)), verbose=0)
