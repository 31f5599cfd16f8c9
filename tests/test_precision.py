"""Mixed precision, clipping and accumulation: what the optimizer gets, and what is refused."""

import copy
import re
import warnings

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers.compare import assert_same_weights
from helpers.compiling import FAST
from helpers.models import Net, accuracy, compiled, points
from torch import nn

import minikeras
from minikeras import FocalLoss, LambdaCallback, LRScheduler
from minikeras.faults.loss import FiniteLoss

ROWS = [7, 20, 1, 13, 4, 9, 16]


class Scores(Net):
    """Raw scores; notes the dtypes it computes in."""

    seen: list

    def forward(self, x):
        outputs = self.fc2(torch.relu(self.fc1(x)))
        self.__dict__.setdefault("seen", []).append(outputs.dtype)
        return outputs


def precision_of(model):
    """Return the part of the stepper that has the loss scale."""
    (part,) = [part for part in model._run.stepper.parts if hasattr(part, "scaler")]
    return part


def scaler_of(model):
    return precision_of(model).scaler


def batches(rows=ROWS, double=False):
    found = [points(n) for n in rows]
    return [(X.double(), y.double()) for X, y in found] if double else found


def windows(data, k):
    """The big batch that each k batches make."""
    return [
        tuple(map(torch.cat, zip(*data[i : i + k], strict=True))) for i in range(0, len(data), k)
    ]


def bare_fit(model, data, epochs=2, lr=0.1, loss_func=F.binary_cross_entropy):
    """The loop one would write, of plain SGD."""
    for _ in range(epochs):
        for X, y in data:
            gradients = torch.autograd.grad(loss_func(model(X), y), list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= lr * gradient
    return model


# --- accumulate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 7, 10])
def test_accumulate_makes_the_step_of_the_big_batch(k):
    model = Net().double()
    expected = bare_fit(copy.deepcopy(model), windows(batches(double=True), k))
    compiled(model, accumulate=k).fit(2, batches(double=True), verbose=0)
    assert_same_weights(model, expected, 1e-12)


def test_accumulate_leaves_a_history_of_rows_and_no_gradient():
    data = batches()
    model = compiled(lr=0.0, accumulate=3)
    expected = model.evaluate(data)["val_loss"]
    assert model.fit(1, data, verbose=0)["loss"].iloc[0] == pytest.approx(expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def per_token(y_pred, y_true):
    """Only the elements that count."""
    counted = y_true >= 0
    return minikeras.Average(
        (F.mse_loss(y_pred, y_true, reduction="none") * counted).sum(), counted.sum()
    )


def test_accumulate_weighs_an_average_by_its_count():
    data = [(X, torch.where(torch.rand(y.shape) < 0.5, -1.0, y)) for X, y in batches(double=True)]
    data[2] = (data[2][0], torch.full_like(data[2][1], -1))  # nothing counts in it
    model = Net().double()

    def mean(y_pred, y_true):
        total, count = per_token(y_pred, y_true)
        return total / count

    expected = bare_fit(copy.deepcopy(model), windows(data, 3), loss_func=mean)
    compiled(model, per_token, accumulate=3).fit(2, data, verbose=0)
    assert_same_weights(model, expected, 1e-12)


def test_accumulate_window_in_which_nothing_counts_moves_nothing():
    data = [(X, torch.full_like(y, -1)) for X, y in batches()]
    model = Net()
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(model, per_token, accumulate=3).fit(1, data, verbose=0)
    assert_same_weights(model, before, 0)


def test_accumulate_weighs_rows_by_sample_weight_as_the_big_batch_does():
    data = [(X, y, torch.rand(len(X)).double()) for X, y in batches(double=True)]
    model = Net().double()
    twin = Net().double()
    twin.load_state_dict(model.state_dict())
    compiled(model, nn.BCELoss(reduction="none"), accumulate=3).fit(2, data, verbose=0)
    compiled(twin, nn.BCELoss(reduction="none")).fit(2, windows(data, 3), verbose=0)
    assert_same_weights(model, twin, 1e-12)


class Twice(Net):
    """Its loss in two parts."""

    def train_step(self, features, labels):
        outputs = self(features)
        self.backward(0.5 * self.compute_loss(outputs, labels))
        penalty = (self(features) ** 2).mean()
        self.backward(penalty)
        self.optimizer_step()
        return {"loss": penalty}


def test_accumulate_counts_rows_once_if_a_step_calls_backward_twice():
    model = Twice().double()
    expected = bare_fit(
        copy.deepcopy(model),
        windows(batches(double=True), 3),
        loss_func=lambda p, y: 0.5 * F.binary_cross_entropy(p, y) + (p**2).mean(),
    )
    compiled(model, accumulate=3).fit(2, batches(double=True), verbose=0)
    assert_same_weights(model, expected, 1e-12)


def test_accumulate_refuses_two_losses_of_different_weight():
    class Mixed(Net):
        def train_step(self, features, labels):
            outputs = self(features)
            self.backward(minikeras.Average(outputs.sum(), 3))
            self.backward(outputs.mean())
            self.optimizer_step()
            return {"loss": 0.0}

    with pytest.raises(ValueError, match="units") as error:
        compiled(Mixed(), accumulate=2).fit(1, batches(), verbose=0)
    assert str(error.value) == (
        "backward was called for one batch with losses over 3 and 7 units, which accumulate "
        "cannot divide separately. Give each loss a separate optimizer, or make both means over "
        "the rows of the batch."
    )


class Pair(minikeras.Model):
    """Two optimizers; the second steps at every second batch."""

    def __init__(self, every=1):
        super().__init__()
        self.a = nn.Linear(2, 1)
        self.b = nn.Linear(2, 1)
        self.every = every
        self.batch = 0

    def forward(self, x):
        return torch.sigmoid(self.a(x) + self.b(x))

    def train_step(self, features, labels):
        loss = self.compute_loss(self(features), labels)
        self.backward(loss, "a")
        self.optimizer_step("a")
        if self.batch % self.every == 0:
            loss = self.compute_loss(self(features), labels)
            self.backward(loss, "b")
            self.optimizer_step("b")
        self.batch += 1
        return {"loss": loss}


def pair_of(model, **kwargs):
    optimizers = {
        name: torch.optim.SGD(getattr(model, name).parameters(), lr=0.1) for name in ("a", "b")
    }
    model.compile(nn.BCELoss(), optimizers, device="cpu", **kwargs)
    return model


def test_accumulate_has_a_window_for_each_optimizer():
    data = batches([8, 3, 8, 5, 6, 7], double=True)
    model = Pair(every=2).double()
    nets = {"a": copy.deepcopy(model.a), "b": copy.deepcopy(model.b)}
    gathered = {"a": [], "b": []}

    def close(name):
        rows = sum(n for n, _ in gathered[name])
        with torch.no_grad():
            for i, parameter in enumerate(nets[name].parameters()):
                parameter -= 0.1 * sum(n * gradients[i] for n, gradients in gathered[name]) / rows
        gathered[name] = []

    for number, (X, y) in enumerate(data):
        for name in ("a", "b") if number % 2 == 0 else ("a",):
            loss = F.binary_cross_entropy(torch.sigmoid(nets["a"](X) + nets["b"](X)), y)
            gathered[name].append(
                (len(X), torch.autograd.grad(loss, list(nets[name].parameters())))
            )
            if len(gathered[name]) == 2:
                close(name)
    close("b")  # of batch 5 alone
    pair_of(model, accumulate=2).fit(1, data, verbose=0)
    assert_same_weights(model.a, nets["a"], 1e-12)
    assert_same_weights(model.b, nets["b"], 1e-12)


def test_accumulate_closes_its_window_at_stop_training():
    model = Net().double()
    data = batches(double=True)
    expected = bare_fit(copy.deepcopy(model), [*windows(data[:3], 3), data[3]], epochs=1)
    compiled(model, accumulate=3)

    def stop(batch, logs):
        model.stop_training = batch == 4

    model.fit(5, data, callbacks=[LambdaCallback(on_batch_end=stop)], verbose=0)
    assert_same_weights(model, expected, 1e-12)


def test_accumulate_leaves_nothing_of_a_fit_that_fails_in_a_window():
    model = Net().double()
    data = batches(double=True)
    compiled(model, nn.MSELoss(), accumulate=3)
    with pytest.raises(FloatingPointError):
        model.fit(1, [data[0], (data[1][0] * torch.nan, data[1][1])], verbose=0)
    expected = bare_fit(copy.deepcopy(model), windows(data, 3), loss_func=F.mse_loss)
    model.fit(2, data, verbose=0)
    assert_same_weights(model, expected, 1e-12)


def test_accumulate_finds_a_nan_loss_before_it_enters_a_window():
    model = Net()
    data = batches()
    before = copy.deepcopy(model)
    bad = (data[1][0] * torch.nan, data[1][1])
    with pytest.warns(UserWarning, match="contained NaN or inf"):
        compiled(model, nn.MSELoss(), accumulate=3).fit(
            1, [data[0], bad, data[2]], on_nan="stop", verbose=0
        )
    assert_same_weights(model, before, 0)


def test_accumulate_steps_a_scheduler_once_for_each_step_of_its_optimizer():
    rates = {}
    for k, data in ((3, batches(double=True)), (1, windows(batches(double=True), 3))):
        torch.manual_seed(0)
        model = compiled(Net().double(), accumulate=k)
        scheduler = LRScheduler(
            torch.optim.lr_scheduler.ExponentialLR(model.optimizer, 0.5), step="batch"
        )
        rates[k] = (
            model.fit(3, data, callbacks=[scheduler], verbose=0),
            copy.deepcopy(model.state_dict()),
        )
    pd.testing.assert_series_equal(rates[3][0]["lr"], rates[1][0]["lr"])
    assert list(rates[3][0]["lr"]) == [0.1 * 0.5**n for n in (2, 5, 8)]
    for key, value in rates[3][1].items():
        torch.testing.assert_close(value, rates[1][1][key], rtol=1e-12, atol=1e-12)


def test_accumulate_resumed_in_mid_window_continues_the_scheduler_exactly(tmp_path):
    def run(stop_at=None):
        torch.manual_seed(0)
        model = compiled(Net(), accumulate=3)
        scheduler = LRScheduler(
            torch.optim.lr_scheduler.ExponentialLR(model.optimizer, 0.5), step="batch"
        )

        def stop(batch, logs):
            if batch == stop_at:
                raise KeyError

        listed = [scheduler, LambdaCallback(on_batch_end=stop)]
        path = tmp_path / "run.pt" if stop_at is not None else None
        return model.fit(
            2,
            batches(),
            callbacks=listed,
            verbose=0,
            checkpoint=path,
            checkpoint_every=1 if path else None,
        )

    for batch in (5, 6):
        with pytest.raises(KeyError):
            run(batch)
    pd.testing.assert_frame_equal(run(0), run(), rtol=0, atol=0)


def test_accumulate_resumed_in_mid_window_must_be_the_same(tmp_path):
    def stop(batch, logs):
        if batch == 3:
            raise KeyError

    data = batches()
    path = tmp_path / "run.pt"
    with pytest.raises(KeyError):
        compiled(accumulate=3).fit(
            1,
            data,
            callbacks=[LambdaCallback(on_batch_end=stop)],
            verbose=0,
            checkpoint=path,
            checkpoint_every=2,
        )
    with pytest.raises(minikeras.CheckpointError, match="in a partly filled window") as error:
        compiled().fit(1, data, verbose=0, checkpoint=path)
    assert str(error.value).startswith(
        f"{path} was written in a partly filled window of accumulate=3, and the model is now "
        "compiled with accumulate=1. Call compile with the same arguments as then."
    )


def test_accumulate_resumes_a_file_from_before_it_existed(tmp_path):
    path = tmp_path / "run.pt"
    compiled().fit(1, batches(), verbose=0, checkpoint=path)
    state = torch.load(path, weights_only=True)
    del state["precision"]
    older = tmp_path / "older.pt"  # of another process: a path belongs to one compile of this one
    torch.save(state, older)
    with pytest.warns(UserWarning, match="other settings: accumulate 1 and not 3"):
        history = compiled(accumulate=3).fit(1, batches(), verbose=0, checkpoint=older)
    assert list(history.index) == [0]


# --- clipping -------------------------------------------------------------------------------------


def test_accumulate_clips_the_norm_of_the_windows_gradient():
    model = Net().double()
    data = batches(double=True)
    expected = copy.deepcopy(model)
    for X, y in windows(data, 3):
        gradients = torch.autograd.grad(
            F.binary_cross_entropy(expected(X), y), list(expected.parameters())
        )
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > 0.01
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient * 0.01 / (norm + 1e-6)
    compiled(model, accumulate=3, clip_grad_norm=0.01).fit(1, data, verbose=0)
    assert_same_weights(model, expected, 1e-12)


@pytest.mark.parametrize("jit", [False, FAST])
@pytest.mark.parametrize(
    "options",
    [{"clip_grad_norm": 0.05}, {"clip_grad_value": 0.01, "clip_grad_norm": 0.015}],
    ids=str,
)
def test_clipping_is_torchs_own_in_eager_and_in_the_graph(options, jit):
    model = Net()
    data = batches([20, 20, 20, 7])
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for X, y in data * 2:
        F.binary_cross_entropy(expected(X), y).backward()
        if "clip_grad_value" in options:
            nn.utils.clip_grad_value_(expected.parameters(), options["clip_grad_value"])
        nn.utils.clip_grad_norm_(expected.parameters(), options["clip_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
    compiled(model, jit=jit, **options).fit(2, data, verbose=0)
    assert_same_weights(model, expected)
    assert not jit or model._run.engine.train.way == "one graph"


def test_clipping_does_nothing_for_an_optimizer_whose_layers_are_all_frozen():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizers = {
        "body": torch.optim.SGD(net[0].parameters(), lr=0.1),
        "head": torch.optim.SGD(net[1].parameters(), lr=0.1),
    }
    model = minikeras.Model(net)
    model.compile(nn.MSELoss(), optimizers, device="cpu", clip_grad_value=0.1, clip_grad_norm=0.1)
    freeze = minikeras.LambdaCallback(on_batch_end=lambda batch, logs: net[0].requires_grad_(False))
    X = torch.randn(8, 2)
    before = copy.deepcopy(net[1])
    model.fit(1, (X, X[:, :1]), batch_size=2, verbose=0, callbacks=[freeze])
    assert not torch.equal(net[1].weight, before.weight)


# --- precision ------------------------------------------------------------------------------------


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("precision", DTYPES)
def test_half_precision_is_in_forward_and_what_the_user_sees_is_float32(precision):
    seen = []

    def looked(y_pred, y_true):
        seen.append((y_pred.dtype, (y_pred.T @ y_pred).dtype))
        return y_pred.mean()

    model = compiled(Scores(), nn.BCEWithLogitsLoss(), {"looked": looked}, precision=precision)
    model.fit(2, batches(), batches(), verbose=0)
    model.evaluate(batches())
    assert set(model.seen) == {DTYPES[precision]}
    assert set(seen) == {(torch.float32, torch.float32)}
    assert model.predict(batches()).dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.seen[-1] == DTYPES[precision]
    assert model(points()[0]).dtype == torch.float32  # outside the verbs it is the module it was


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"clip_grad_norm": 1.0}], ids=str)
def test_half_precision_trains_as_float32_does_but_for_rounding(precision, options):
    losses = []
    for kind in (precision, "fp32"):
        torch.manual_seed(0)
        model = compiled(Scores(), nn.BCEWithLogitsLoss(), precision=kind, lr=0.5, **options)
        losses.append(model.fit(12, points(300), verbose=0)["loss"])
    assert losses[0].iloc[-1] == pytest.approx(losses[1].iloc[-1], rel=0.1)
    assert losses[0].iloc[-1] < losses[0].iloc[0]


def test_bf16_is_torchs_own_loop_with_autocast():
    model = Scores()
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for X, y in batches():
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.binary_cross_entropy_with_logits(expected(X), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    compiled(model, nn.BCEWithLogitsLoss(), precision="bf16").fit(1, batches(), verbose=0)
    assert_same_weights(model, expected, 0)


def test_fp16_is_torchs_own_loop_with_a_scaler():
    model = Scores()
    expected = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for X, y in batches():
        with torch.autocast("cpu", torch.float16):
            loss = F.binary_cross_entropy_with_logits(expected(X), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    compiled(model, nn.BCEWithLogitsLoss(), precision="fp16").fit(1, batches(), verbose=0)
    assert_same_weights(model, expected, 0)
    assert scaler_of(model).state_dict() == scaler.state_dict()


def test_fp16_skips_the_step_of_a_gradient_too_large_and_lowers_the_scale():
    model = Scores()
    before = copy.deepcopy(model)
    X, y = points(8)
    data = [(X, y * 1e4)]  # a loss that is finite, with a scaled gradient that is not
    compiled(model, nn.MSELoss(), precision="fp16").fit(1, data, verbose=0)
    assert_same_weights(model, before, 0)
    assert scaler_of(model).get_scale() == 2.0**15


def test_fp16_lets_a_bad_loss_hold_back_the_steps_after_it(monkeypatch):
    """As on a device."""
    look = FiniteLoss.__init__

    def later(self, device, *args):
        look(self, device, *args)
        self.reads_each = False

    monkeypatch.setattr(FiniteLoss, "__init__", later)
    model = Scores()
    data = batches()
    expected = copy.deepcopy(model)
    compiled(expected, nn.MSELoss(), precision="fp16").fit(1, data[:2], verbose=0)
    bad = (data[2][0] * torch.nan, data[2][1])
    compiled(model, nn.MSELoss(), precision="fp16")
    with pytest.raises(FloatingPointError, match="it started 4 steps before"):
        model.fit(1, [*data[:2], bad, *data[3:]], verbose=0)
    assert_same_weights(model, expected, 0)


@pytest.mark.parametrize("rows", [8, 256])
def test_fp16_keeps_the_first_scale_of_torch_when_batches_are_accumulated(rows):
    model = compiled(
        minikeras.Model(nn.Linear(2, 1)), nn.BCEWithLogitsLoss(), precision="fp16", accumulate=2
    )
    model.fit(1, points(4 * rows), batch_size=rows, verbose=0)
    assert scaler_of(model).get_scale() == 2**16


def test_accumulate_takes_lazy_layers():
    class Lazy(Scores):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.LazyLinear(8)

        def train_step(self, features, labels):
            return super().train_step(features, labels)

    assert (
        len(compiled(Lazy(), nn.BCEWithLogitsLoss(), accumulate=2).fit(2, batches(), verbose=0))
        == 2
    )


class Own(Scores):
    """A custom step that calls the module, and steps in its middle."""

    def train_step(self, features, labels):
        with torch.no_grad():
            self(features)
        for _ in range(2):
            loss = self.compute_loss(self(features), labels)
            self.backward(loss)
            self.optimizer_step()
        return {"loss": loss, **self.compute_metrics(self(features), labels)}


def test_half_precision_runs_a_custom_step_under_autocast_and_sees_each_new_weight():
    model = Own()
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for X, y in batches():
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.binary_cross_entropy_with_logits(expected(X), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    compiled(model, nn.BCEWithLogitsLoss(), {"accuracy": accuracy}, precision="bf16").fit(
        1, batches(), verbose=0
    )
    assert set(model.seen) == {torch.bfloat16}
    assert_same_weights(model, expected, 0)


def test_fp16_rescales_the_gradients_that_wait_in_a_window():
    """The scale halves as optimizer a steps, while b is in the middle of its window."""

    class Scored(Pair):
        def forward(self, x):
            return self.a(x) + self.b(x)

    torch.manual_seed(1)
    model = Scored(every=2)
    twin = copy.deepcopy(model)
    for one, options in ((model, {"precision": "fp16"}), (twin, {})):
        pair_of(one, accumulate=2, **options)
        one._run.loss_func = one._run.train.loss_func = nn.MSELoss()
        if options:
            precision_of(one).scaler = torch.amp.GradScaler(
                "cpu", init_scale=64.0, growth_interval=1
            )
        one.fit(2, batches([8, 8, 8, 8, 8, 8]), verbose=0)
    assert scaler_of(model).get_scale() > 64
    assert_same_weights(model, twin, 5e-3)


@pytest.mark.parametrize("jit", [False, FAST])
@pytest.mark.parametrize(
    "loss_func", [nn.BCELoss(), FocalLoss(), F.binary_cross_entropy], ids=lambda f: str(f)[:12]
)
def test_half_precision_refuses_a_loss_of_probabilities_with_a_remedy(loss_func, jit):
    model = compiled(Net(), loss_func, precision="bf16", jit=jit)
    for verb in (lambda: model.fit(1, batches(), verbose=0), lambda: model.evaluate(batches())):
        with pytest.raises(ValueError, match="probabilities") as error:
            verb()
        assert str(error.value) == (
            "the loss takes probabilities, and the model's outputs are Tensor (7, 1) bfloat16 "
            "under autocast: those near 1 become 1, with a loss of 100 or none. Remove the sigmoid "
            "from the model and use "
            "nn.BCEWithLogitsLoss() or FocalLoss(from_logits=True); or compile with "
            'precision="fp32".'
        )


def test_half_precision_on_a_gpu_raises_the_same_error_for_a_loss_of_probabilities():
    def loss_func(y_pred, y_true):
        raise RuntimeError(
            "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast."
        )

    with pytest.raises(
        ValueError, match=r"^the loss takes probabilities, and the model's outputs are Tensor"
    ):
        compiled(Scores(), loss_func, precision="bf16").fit(1, batches(), verbose=0)


def test_half_precision_takes_probabilities_computed_in_float32():
    class Careful(Scores):
        def forward(self, x):
            return torch.sigmoid(super().forward(x).float())

    model = compiled(Careful(), nn.BCELoss(), precision="bf16")
    assert len(model.fit(1, batches(), verbose=0)) == 1


def test_precision_auto_is_float32_on_the_cpu():
    assert not compiled(precision="auto")._run.stepper.parts


def test_precision_object_is_not_created_if_no_option_needs_it():
    assert not compiled()._run.stepper.parts


# --- steps that go past us ------------------------------------------------------------------------


def bare(*, backward, step):
    class Bare(Scores):
        def train_step(self, features, labels):
            loss = self.compute_loss(self(features), labels)
            loss.backward() if backward else self.backward(loss)
            self.optimizer.step() if step else self.optimizer_step()
            return {"loss": loss}

    return Bare()


OPTIONS = {
    "accumulate=3": {"accumulate": 3},
    'precision="fp16"': {"precision": "fp16"},
    "clip_grad_norm=1": {"clip_grad_norm": 1.0},
    "clip_grad_value=1": {"clip_grad_value": 1.0},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("called", "instead"), [("backward", "self.backward(loss)"), ("step", "self.optimizer_step()")]
)
def test_accumulate_with_a_bare_backward_or_step_raises_an_error_that_names_ours(
    option, called, instead
):
    model = compiled(
        bare(backward=called == "backward", step=called == "step"),
        nn.BCEWithLogitsLoss(),
        **OPTIONS[option],
    )
    with pytest.raises(RuntimeError, match="in train_step") as error:
        model.fit(1, batches(), verbose=0)
    name = "loss.backward()" if called == "backward" else "optimizer.step()"
    assert str(error.value) == f"{name} bypasses {option}. Call {instead} in train_step."
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.optimizer.step()  # after the fit it is the user's again
    model(points()[0]).sum().backward()


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}], ids=str)
def test_bare_backward_and_step_train_without_those_options(options):
    model = compiled(bare(backward=True, step=True), nn.BCEWithLogitsLoss(), **options)
    assert len(model.fit(1, batches(), verbose=0)) == 1


# --- jit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 2])
def test_bf16_is_in_the_one_graph_of_jit(together):
    model = Scores()
    twin = copy.deepcopy(model)
    model.__dict__["seen"] = twin.__dict__["seen"] = []
    histories = []
    data = batches([20, 20, 20, 20, 20, 7])
    for net, options in ((model, {}), (twin, {"jit": FAST, "steps_per_execution": together})):
        type(net).forward = lambda self, x: self.fc2(torch.relu(self.fc1(x)))
        compiled(net, nn.BCEWithLogitsLoss(), {"accuracy": accuracy}, precision="bf16", **options)
        histories.append(net.fit(3, data, data, verbose=0))
    pd.testing.assert_frame_equal(*histories, rtol=1e-2)
    assert_same_weights(model, twin, 5e-3)
    assert twin._run.engine.train.way == "one graph"
    assert twin.predict(data).dtype == torch.float32


@pytest.mark.parametrize("option", ["accumulate=3", 'precision="fp16"'])
@pytest.mark.parametrize("together", [1, 2])
def test_precision_options_that_a_graph_cannot_hold_go_by_parts_and_are_warned_of_once(
    option, together
):
    model = minikeras.Model(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)))
    twin = copy.deepcopy(model)
    data = batches([20, 20, 20, 20, 7])
    compiled(model, nn.BCEWithLogitsLoss(), **OPTIONS[option])
    compiled(
        twin, nn.BCEWithLogitsLoss(), jit=FAST, steps_per_execution=together, **OPTIONS[option]
    )
    expected = model.fit(3, data, verbose=0)
    with pytest.warns(UserWarning, match="jit:") as caught:
        found = twin.fit(3, data, verbose=0)
    assert [str(warning.message) for warning in caught] == [
        f"jit: train_step is not one graph: forward and loss, because {option} needs backward and "
        "step outside it"
    ]
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3)
    assert_same_weights(model, twin, 1e-3 if "fp16" in option else 1e-6)


# --- refused at compile ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "bf61"},
            "precision must be 'fp32', 'bf16', 'fp16' or 'auto', got 'bf61'. Did you mean 'bf16'?",
        ),
        ({"accumulate": 0}, "accumulate must be a whole number of 1 or more, got 0."),
        ({"clip_grad_norm": 0}, "clip_grad_norm must be a number above 0, or None, got 0."),
        ({"clip_grad_value": "1"}, "clip_grad_value must be a number above 0, or None, got '1'."),
        (
            {"accumulate": 2, "loss_func": nn.MSELoss(reduction="sum")},
            'loss_func has reduction="sum", and accumulate=2 weights each batch by its rows, and '
            'a sum has already counted them. Build it with reduction="mean", or return '
            "minikeras.Average(total, count).",
        ),
        (
            {"precision": "fp16", "model": Net().half()},
            "precision='fp16' needs parameters in float32, which it casts within the step, but "
            "they are float16. Call model.float() before you create the optimizer.",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_precision_options_that_mean_nothing_are_refused_at_compile(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        compiled(**options)
    assert str(error.value) == message


# --- on a GPU -------------------------------------------------------------------------------------


# torch's own, as it loads its CUDA graphs
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "auto"])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 3}, {"clip_grad_norm": 1.0}, {"jit": True}], ids=str
)
def test_half_precision_trains_on_a_gpu(precision, options):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model = minikeras.Model(nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "jit: train_step is not one graph")
        model.compile(
            nn.BCEWithLogitsLoss(),
            optimizer,
            {"accuracy": accuracy},
            precision=precision,
            **options,
        )
        dfhistory = model.fit(20, points(1000), points(300), verbose=0)
    assert dfhistory["val_loss"].iloc[-1] < 0.7 * dfhistory["val_loss"].iloc[0]
    assert model.predict(points(10)).dtype == torch.float32


@pytest.mark.gpu
def test_fp16_scaler_and_the_default_optimizer_share_what_holds_a_step_back():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model = minikeras.Model(nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1)))
    model.compile(nn.BCEWithLogitsLoss(), precision="fp16")
    dfhistory = model.fit(20, points(1000), verbose=0)
    assert dfhistory["loss"].iloc[-1] < 0.7 * dfhistory["loss"].iloc[0]
    X, y = points(100)
    X[44] = float("nan")
    with pytest.raises(FloatingPointError, match="The weights are those from before this step"):
        model.fit(1, (X, y), batch_size=10, verbose=0)


@pytest.mark.gpu
@pytest.mark.parametrize("loss_func", [nn.BCELoss(), FocalLoss()], ids=["BCELoss", "FocalLoss"])
def test_half_precision_on_a_gpu_refuses_a_loss_of_probabilities(loss_func):
    model = minikeras.Model(nn.Sequential(nn.Linear(2, 1), nn.Sigmoid()))
    model.compile(loss_func, precision="fp16")
    with pytest.raises(ValueError, match=r"^the loss takes probabilities"):
        model.fit(1, points(8), verbose=0)
