"""`model.lr_find` beside the bare procedure, and what it leaves as it was."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers.models import points
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import minikeras
from minikeras.diagnosis import LearningRates
from minikeras.diagnosis.lr_find import MARGIN, find_steepest_fall, has_diverged, smooth

X, y = points(90)
STEPS = 25


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(X.shape[1], 8), nn.Tanh(), nn.Linear(8, 1))


def batches(sizes=(32, 32, 26)):
    return list(zip(X.split(list(sizes)), y.split(list(sizes)), strict=True))


def rates(steps=STEPS, low=1e-5, high=1.0):
    return [low * (high / low) ** (step / (steps - 1)) for step in range(steps)]


def bare_sweep(net, optimizers, data, window=1, loss_func=None, clip=None, autocast=False):
    """The range test as a loop: losses of each step, over the rows of its window."""
    loss_func = loss_func or nn.functional.mse_loss
    first = optimizers[0].param_groups[0]["lr"]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    ratios = [group["lr"] / first for group in groups]
    stream = [data[number % len(data)] for number in range(STEPS * window)]
    losses = []
    for step, rate in enumerate(rates()):
        for group, ratio in zip(groups, ratios, strict=True):
            group["lr"] = rate * ratio
        parts = stream[step * window : (step + 1) * window]
        rows = sum(len(features) for features, _ in parts)
        total = 0.0
        for features, labels in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_func(net(features), labels)
            (loss * len(features) / rows).backward()
            total += loss.item() * len(features)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total / rows)
    return losses


def find(model, data, **options):
    return model.lr_find(data, 1e-5, 1.0, STEPS, **options)


def assert_same_curve(found, losses, tolerance=1e-6):
    assert found.rates == pytest.approx(rates()[: len(found.rates)], rel=1e-12)
    count = len(found.losses)
    assert count > 15
    assert found.losses == pytest.approx(losses[:count], abs=tolerance, rel=tolerance)


def momentum(net):
    return torch.optim.SGD(
        [
            {"params": net[0].parameters(), "lr": 0.1},
            {"params": net[2].parameters(), "lr": 0.01},
        ],
        momentum=0.9,
    )


def adam(net):
    return torch.optim.Adam(net.parameters(), 0.02)


CASES = {
    "adam": (adam, {}, {}),
    "two groups with momentum": (momentum, {}, {}),
    "accumulate": (adam, {"accumulate": 4}, {"window": 4}),
    "clip": (momentum, {"clip_grad_norm": 0.1}, {"clip": 0.1}),
    "bf16": (adam, {"precision": "bf16"}, {"autocast": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_curve_is_that_of_the_bare_procedure(case):
    make_optimizer, options, of_loop = CASES[case]
    net = network()
    model = minikeras.Model(copy.deepcopy(net))
    model.compile(nn.MSELoss(), make_optimizer(model.net), device="cpu", **options)
    expected = bare_sweep(net, [make_optimizer(net)], batches(), **of_loop)
    assert_same_curve(find(model, batches()), expected)


def test_curve_of_compiled_steps_is_that_of_the_bare_procedure():
    net = network()
    model = minikeras.Model(copy.deepcopy(net))
    data = batches((30, 30, 30))
    model.compile(nn.MSELoss(), adam(model.net), device="cpu", jit=True)
    assert_same_curve(find(model, data), bare_sweep(net, [adam(net)], data), 1e-5)


def test_two_optimizers_keep_their_ratio():
    class Two(minikeras.Model):
        def train_step(self, features, labels, sample_weight=None):
            loss = self.compute_loss(self(features), labels)
            self.backward(loss)
            self.optimizer_step()
            return {"loss": loss}

    net = network()
    model = Two(copy.deepcopy(net))

    def two(net):
        return {
            "a": torch.optim.Adam(net[0].parameters(), 0.1),
            "b": torch.optim.SGD(net[2].parameters(), 0.05),
        }

    model.compile(nn.MSELoss(), two(model.net), device="cpu")
    expected = bare_sweep(net, list(two(net).values()), batches())
    assert_same_curve(find(model, batches()), expected)


def test_optimizer_begins_with_its_state():
    net = network()
    model = minikeras.Model(net)
    model.compile(nn.MSELoss(), adam(net), device="cpu")
    model.fit(1, batches(), verbose=0)
    reference, optimizer = copy.deepcopy((net, model.optimizer))
    assert_same_curve(find(model, batches()), bare_sweep(reference, [optimizer], batches()))


def test_penalty_of_a_closure_is_that_of_the_copy():
    net = network()
    model = minikeras.Model(copy.deepcopy(net))

    def penalized(of):
        def loss_func(y_pred, y_true):
            weights = sum(parameter.square().sum() for parameter in of.parameters())
            return nn.functional.mse_loss(y_pred, y_true) + 0.1 * weights

        return loss_func

    model.compile(penalized(model), adam(model.net), device="cpu")
    expected = bare_sweep(net, [adam(net)], batches(), loss_func=penalized(net))
    assert_same_curve(find(model, batches()), expected)


def test_loader_draws_what_the_next_fit_would_draw():
    net = network()
    model = minikeras.Model(copy.deepcopy(net))
    model.compile(nn.MSELoss(), adam(model.net), device="cpu")
    loader = DataLoader(TensorDataset(X, y), 6, shuffle=True)
    torch.manual_seed(5)
    data = [*loader, *loader]  # 30 batches
    torch.manual_seed(5)
    found = find(model, loader)
    assert_same_curve(found, bare_sweep(net, [adam(net)], data))
    torch.manual_seed(5)
    assert torch.equal(next(iter(loader))[0], data[0][0])


def test_arrays_have_the_batch_size_that_is_asked_for():
    model = minikeras.Model(network())
    model.compile(nn.MSELoss(), adam(model.net), device="cpu")
    whole = find(model, (X, y), batch_size=90)
    assert whole.losses[0] == pytest.approx(nn.functional.mse_loss(model.net(X), y).item())


def test_test_stops_when_the_loss_diverges():
    model = minikeras.Model(nn.Linear(X.shape[1], 1))
    model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    found = model.lr_find((X, y), 1e-4, 1e4, 60)
    assert found.diverges_at == found.rates[-1] < 1e3
    assert len(found.rates) == len(found.losses) == len(found.smoothed) < 60
    assert found.suggestion < found.diverges_at
    assert str(found) == (
        f"lr_find: try {found.suggestion:.1e} (steepest fall of the loss); it diverges at "
        f"{found.diverges_at:.1e}; {len(found.rates)} of 60 steps"
    )


def test_loss_that_becomes_nan_ends_the_test():
    class Root(nn.Module):
        def forward(self, y_pred, y_true):
            return (1 - (y_pred - y_true).square().mean() / 50).sqrt()

    model = minikeras.Model(nn.Linear(X.shape[1], 1))
    model.compile(Root(), torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    found = model.lr_find((X, y), 1e-3, 1e5, 50)
    assert math.isnan(found.losses[-1])
    assert found.diverges_at == found.rates[-1]


def test_suggestion_trains_and_the_limit_does_not():
    def loss_after(rate):
        model = minikeras.Model(network())
        model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), rate), device="cpu")
        torch.manual_seed(0)
        return model.fit(5, (X, y), verbose=0, on_nan="ignore")["loss"].iloc[-1]

    model = minikeras.Model(network())
    model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    found = model.lr_find((X, y), max_lr=1e3)
    start = model.evaluate((X, y))["val_loss"]
    assert loss_after(found.suggestion) < 0.7 * start
    limit = loss_after(found.diverges_at)
    assert not limit < start


def test_smoothed_loss_is_the_weighted_mean_of_the_formula():
    losses = list(np.random.default_rng(0).normal(size=30))
    for place, value in enumerate(smooth(losses)):
        weights = 0.8 ** np.arange(place, -1, -1)
        assert value == pytest.approx(np.average(losses[: place + 1], weights=weights))


NOISE = {
    "normal": lambda rng: 2.3 + 0.1 * rng.normal(size=60),
    "around 0": lambda rng: rng.normal(size=60),
    "below 0": lambda rng: rng.normal(size=60) - 5,
    "with outliers": lambda rng: rng.lognormal(0, 1, 60),
}


@pytest.mark.parametrize("kind", NOISE)
def test_noise_alone_neither_falls_nor_diverges(kind):
    rng = np.random.default_rng(0)
    suggested = diverged = 0
    for _ in range(50):
        losses = list(NOISE[kind](rng))
        suggested += find_steepest_fall(rates(60), losses, smooth(losses)) is not None
        diverged += any(has_diverged(losses[:count]) for count in range(1, 61))
    assert suggested <= 2
    assert diverged <= 4


def sigmoid_fall(start, end, center=60):
    """Return a loss that falls around a step of 100."""
    return start + (end - start) / (1 + np.exp(-0.5 * (np.arange(100) - center)))


@pytest.mark.parametrize("start", [2.5, 0.5, -8.0])
@pytest.mark.parametrize("seed", range(4))
def test_fall_is_found_behind_noise_whatever_the_sign_of_the_loss(start, seed):
    noise = np.random.default_rng(seed).normal(size=100)
    losses = list(sigmoid_fall(start, start - 2) + 0.6 * noise)
    tried = rates(100, 1e-7, 10.0)
    found = find_steepest_fall(tried, losses, smooth(losses))
    assert abs(math.log10(found / tried[60])) < 1


def first_divergence(losses):
    """Return the step at which the test stops; None if it does not."""
    for count in range(1, len(losses) + 1):
        if has_diverged(list(losses[:count])):
            return count - 1
    return None


@pytest.mark.parametrize(("start", "lowest"), [(-0.02, -0.95), (-0.4, -0.9), (1.0, -3.0)])
def test_loss_below_0_diverges_if_it_loses_what_it_has_fallen(start, lowest):
    fall = sigmoid_fall(start, lowest, 40)
    rise = sigmoid_fall(0, start - lowest, 75)  # back to the start, and not above it
    noise = 0.05 * np.random.default_rng(0).normal(size=100)
    assert 75 <= first_divergence(fall + rise + noise) <= 90
    assert first_divergence(fall + noise) is None
    assert first_divergence(fall + 0.3 * rise + noise) is None


def test_loss_with_a_bound_above_diverges():
    class Closeness(nn.Module):
        def forward(self, y_pred, y_true):
            return -torch.exp(-(y_pred - y_true).square().mean())

    model = minikeras.Model(network())
    model.compile(Closeness(), torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    found = model.lr_find((X, y), max_lr=1e3)
    assert max(found.losses) <= 0
    assert found.suggestion < found.diverges_at / MARGIN


def test_negative_likelihood_gets_a_suggestion_that_trains():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(300, 1, generator=generator)
    targets = 0.05 * features + 0.01 * torch.randn(300, 1, generator=generator)

    def loss_func(outputs, y_true):
        mean, variance = outputs.chunk(2, 1)
        return nn.functional.gaussian_nll_loss(mean, y_true, variance.exp())

    def compiled(rate):
        torch.manual_seed(0)
        model = minikeras.Model(nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2)))
        model.compile(loss_func, torch.optim.Adam(model.parameters(), rate), device="cpu")
        return model

    found = compiled(1e-3).lr_find((features, targets))
    assert min(found.losses) < -1
    model = compiled(found.suggestion)
    loss = model.fit(5, (features, targets), verbose=0)["loss"]
    assert loss.iloc[-1] < min(-1, loss.iloc[0])


@pytest.mark.parametrize("center", range(20, 80, 10))
def test_steepest_fall_is_found_wherever_it_is(center):
    points_in_decades = np.linspace(-7, 1, 100)
    losses = list(2.3 - 2 / (1 + np.exp(-3 * (points_in_decades - points_in_decades[center]))))
    found = find_steepest_fall(list(10**points_in_decades), losses, smooth(losses))
    assert abs(math.log10(found) - points_in_decades[center]) < 0.2


def test_frame_has_a_row_for_each_step():
    model = minikeras.Model(network())
    model.compile(nn.MSELoss(), adam(model.net), device="cpu")
    found = find(model, (X, y))
    assert isinstance(found, LearningRates)
    frame = found.to_dataframe()
    assert list(frame) == ["lr", "loss", "smoothed_loss"]
    assert len(frame) == len(found.rates)


def test_plot_has_both_curves_on_a_logarithmic_axis():
    pytest.importorskip("matplotlib")
    model = minikeras.Model(network())
    model.compile(nn.MSELoss(), adam(model.net), device="cpu")
    axis = find(model, (X, y)).plot()
    assert axis.get_xscale() == "log"
    assert [line.get_label() for line in axis.get_lines()][:2] == ["loss", "smoothed"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"min_lr": 0.0}, "min_lr must be"),
        ({"max_lr": math.inf}, "max_lr must be"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "min_lr must be below max_lr, got min_lr=1.0 and"),
        ({"steps": 1}, "steps must be"),
    ],
)
def test_bad_limits_are_refused(limits, words):
    model = minikeras.Model(network())
    model.compile(nn.MSELoss(), adam(model.net), device="cpu")
    with pytest.raises((TypeError, ValueError), match=words):
        model.lr_find((X, y), **limits)


def test_first_group_needs_a_learning_rate_above_0():
    model = minikeras.Model(network())
    model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.0), device="cpu")
    with pytest.raises(ValueError, match="Compile with an optimizer whose first group has"):
        model.lr_find((X, y))
    model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1), device="cpu")
    assert model.lr_find((X, y), steps=10).rates


def test_model_without_a_trained_parameter_is_refused():
    model = minikeras.Model(network())
    minikeras.freeze(model)
    model.compile(nn.MSELoss(), device="cpu")
    with pytest.raises(ValueError, match="lr_find needs an optimizer"):
        model.lr_find((X, y))
    minikeras.unfreeze(model)
    model.compile(nn.MSELoss(), device="cpu")
    assert model.lr_find((X, y), steps=10).rates


def test_generator_is_refused_and_a_list_is_taken():
    model = minikeras.Model(network())
    model.compile(nn.MSELoss(), adam(model.net), device="cpu")
    with pytest.raises(TypeError, match="lr_find reads dl_train and must leave it as it is"):
        model.lr_find(iter(batches()))
    assert model.lr_find(batches(), steps=10).rates


@pytest.mark.parametrize("verb", ["lr_find", "diagnose"])
def test_it_is_refused_inside_a_fit_of_the_same_model(verb):
    model = minikeras.Model(network())
    model.compile(nn.MSELoss(), adam(model.net), device="cpu")

    def find_inside(epoch, logs):
        getattr(model, verb)((X, y))

    callback = minikeras.LambdaCallback(on_epoch_end=find_inside)
    with pytest.raises(RuntimeError, match=f"{verb} was called inside a fit of the same model"):
        model.fit(1, (X, y), callbacks=[callback], verbose=0)


@pytest.mark.parametrize("verb", ["lr_find", "diagnose"])
def test_unknown_argument_is_refused_with_the_line_to_write(verb):
    model = minikeras.Model(network())
    model.compile(nn.MSELoss(), adam(model.net), device="cpu")
    with pytest.raises(TypeError, match=rf"{verb}\(\) got an .*Write model.{verb}\(dl_train"):
        getattr(model, verb)((X, y), step=10)
