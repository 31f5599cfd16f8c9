"""jit=True: a resumed fit is exact, and what a graph would lose gets the numbers of eager."""

import random
import warnings

import numpy as np
import pytest
import torch
from helpers.compiling import FAST
from helpers.interruptions import Stopped
from torch import nn

import minikeras
from minikeras import LambdaCallback

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(1)) + 1
BATCHES = list(zip(X.split(10), X[:, :1].split(10), strict=True))


@pytest.fixture(autouse=True)
def compile_all_at_once(monkeypatch):
    """Compile each graph at its first batch: the tests look at the numbers of all of them."""
    monkeypatch.setattr("minikeras.jit.steps.BATCHES_BEFORE_A_GRAPH", 0)


# --- the step that is only looked at --------------------------------------------------------------


class Drawing(nn.Module):
    """Draws from one of the generators that are not torch's own."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        if not self.training:
            return x
        return x + 0.1 * (random.random() if self.kind == "python" else float(np.random.rand()))


class Centred(nn.Module):
    """Assign new buffers, one of which was None."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", None, persistent=False)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.count = torch.ones(4) if self.count is None else self.count + 1
        return x - self.mean / self.count


class Counted(nn.Module):
    """Counts its batches in Python, in a number and in a list, of which its scale depends."""

    def __init__(self):
        super().__init__()
        self.batches = 0
        self.seen = []

    def forward(self, x):
        if self.training and not torch.compiler.is_compiling():
            self.batches += 1
            self.seen.append(len(x))
        return x


class MovingLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, y_pred, y_true):
        if torch.is_grad_enabled():
            self.mean = 0.9 * self.mean + 0.1 * y_pred.detach().mean()
        return ((y_pred - y_true - self.mean) ** 2).mean()


class Assigning(torch.optim.Optimizer):
    """Puts a new tensor into its state at each step."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["m"] = 0.9 * state.get("m", torch.zeros_like(parameter)) + parameter.grad
                parameter.sub_(group["lr"] * state["m"])


class Counting(torch.optim.Optimizer):
    """Counts its steps in Python, in its groups and for each parameter."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                parameter.sub_(
                    group["lr"] / (group["count"] + state["step"]) ** 0.5 * parameter.grad
                )


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def linear():
    return nn.Linear(4, 1)


KINDS = {
    "plain": (linear, sgd, nn.MSELoss, {}),
    "Python's generator": (lambda: nn.Sequential(Drawing("python"), linear()), sgd, nn.MSELoss, {}),
    "NumPy's generator": (lambda: nn.Sequential(Drawing("numpy"), linear()), sgd, nn.MSELoss, {}),
    "assigned buffers": (lambda: nn.Sequential(Centred(), linear()), sgd, nn.MSELoss, {}),
    "an assigned buffer of the loss": (linear, sgd, MovingLoss, {}),
    "assigned state": (linear, Assigning, nn.MSELoss, {}),
    "counts in Python": (linear, Counting, nn.MSELoss, {}),
    "accumulate 2": (linear, sgd, nn.MSELoss, {"accumulate": 2}),
    "accumulate 4": (linear, sgd, nn.MSELoss, {"accumulate": 4}),
    "clipping": (linear, sgd, nn.MSELoss, {"clip_grad_norm": 0.1}),
    "fp16": (linear, sgd, nn.MSELoss, {"precision": "fp16"}),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.3), linear()), sgd, nn.MSELoss, {}),
}


def train(kind, path=None, every=None, kill=None):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    net, optimizer, loss, options = KINDS[kind]
    model = minikeras.Model(net())
    loss_func = loss()
    model.compile(loss_func, optimizer(model.parameters()), device="cpu", jit=FAST, **options)
    batches = []

    def die(batch, logs):
        batches.append(batch)
        if len(batches) == kill:
            raise Stopped

    saving = {} if path is None else {"checkpoint": path, "checkpoint_every": every}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the way down, which other tests look at
        history = model.fit(
            2,
            BATCHES,
            BATCHES[:2],
            callbacks=[LambdaCallback(on_batch_end=die)],
            verbose=0,
            **saving,
        )
    states = [model.state_dict(), *([] if loss is nn.MSELoss else [loss_func.state_dict()])]
    tensors = [value.clone() for state in states for value in state.values()]
    return (
        history,
        tensors,
        model.optimizer.state_dict(),
        (random.random(), np.random.rand(), torch.rand(()).item()),
    )


@pytest.mark.parametrize(("every", "kill"), [(None, 8), (1, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_jit_fit_that_resumes_is_the_one_never_stopped(kind, every, kill, tmp_path):
    expected = train(kind)
    with pytest.raises(Stopped):
        train(kind, tmp_path / "run.pt", every, kill)
    found = train(kind, tmp_path / "run.pt", every)
    assert found[0].equals(expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    torch.testing.assert_close(found[2], expected[2], rtol=0, atol=0)
    assert found[3] == expected[3]


@pytest.mark.parametrize("kill", [2, 3, 5, 6, 9])
def test_jit_resumed_fit_compiles_its_graphs_at_the_same_batches(kill, tmp_path, monkeypatch):
    monkeypatch.setattr("minikeras.jit.steps.BATCHES_BEFORE_A_GRAPH", 2)
    parts = list(zip(X[:27].split(10), X[:27, :1].split(10), strict=True))
    graphs = []

    def fit(kill=None, **saving):
        torch.manual_seed(0)
        model = minikeras.Model(nn.Sequential(linear(), nn.Tanh(), nn.Linear(1, 1)))
        model.compile(nn.MSELoss(), sgd(model.parameters()), device="cpu", jit=FAST)
        steps = []
        taken = []

        def die(batch, logs):
            engine = model._run.engine
            graph = engine.train.graphs
            taken.append(engine.state_dict())
            steps.append((len(taken), set(graph.compiled) if graph else set()))
            if len(taken) == kill:
                raise Stopped

        graphs.append(taken)
        history = model.fit(
            4, parts, parts[1:], callbacks=[LambdaCallback(on_batch_end=die)], verbose=0, **saving
        )
        return history, model

    history, whole = fit()
    saving = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 1}
    with pytest.raises(Stopped):
        fit(kill, **saving)
    resumed, model = fit(**saving)
    # the step that was stopped in its callback was not saved, and is taken again
    assert graphs[2] == graphs[0][kill - 1 :]
    assert model._run.engine.state_dict() == whole._run.engine.state_dict()
    assert resumed.equals(history)
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_jit_puts_the_attributes_of_a_module_back(tmp_path):
    def model_of():
        torch.manual_seed(0)
        model = minikeras.Model(nn.Sequential(Counted(), linear()))
        model.compile(nn.MSELoss(), sgd(model.parameters()), device="cpu", jit=FAST)
        return model

    saving = {"checkpoint": tmp_path / "run.pt", "verbose": 0}
    whole = model_of()
    whole.fit(2, BATCHES, callbacks=[LambdaCallback()], verbose=0)
    with pytest.raises(Stopped):
        model_of().fit(2, BATCHES, callbacks=[LambdaCallback(on_batch_end=raise_at_8())], **saving)
    model = model_of()
    model.fit(2, BATCHES, callbacks=[LambdaCallback()], **saving)
    # but for the first batch every one went through the graph, which does not count
    assert whole.net[0].batches == 1
    assert model.net[0].batches == 1
    assert model.net[0].seen == whole.net[0].seen == [len(BATCHES[0][0])]


def raise_at_8():
    count = []

    def die(batch, logs):
        count.append(batch)
        if len(count) == 8:
            raise Stopped

    return die


def test_jit_resumes_a_sparse_optimizer(tmp_path):
    rows = torch.arange(24).reshape(6, 4) % 9
    data = [(row[None], torch.ones(1, 2)) for row in rows]

    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 2, sparse=True)

        def forward(self, x):
            return self.table(x).mean(1)

    def fit(kill=None, **saving):
        torch.manual_seed(0)
        model = minikeras.Model(Embedded())
        model.compile(
            nn.MSELoss(), torch.optim.SparseAdam(model.parameters(), lr=0.1), device="cpu", jit=FAST
        )
        callbacks = [] if kill is None else [LambdaCallback(on_batch_end=raise_at_8())]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(2, data, callbacks=callbacks, verbose=0, **saving)
        return model

    expected = fit()
    with pytest.raises(Stopped):
        fit(kill=8, checkpoint=tmp_path / "run.pt", checkpoint_every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit(checkpoint=tmp_path / "run.pt", checkpoint_every=1)
    assert torch.equal(found.net.table.weight, expected.net.table.weight)
    assert [state["step"] for state in found.optimizer.state.values()] == [12]


# --- what a graph would lose ----------------------------------------------------------------------


class Reading(torch.optim.Optimizer):
    """Has its count in a tensor, and reads it as a Python number."""

    def __init__(self, parameters, how):
        super().__init__(parameters, {"lr": 0.05})
        self.how = how

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                state["step"] += 1
                share = 0.5 if self.how == "branch" and state["step"].item() > 3 else 1.0
                if self.how == "value":
                    share = 1 / state["step"].item()
                if self.how == "float":
                    share = 1 / float(state["step"])
                parameter.sub_(group["lr"] * share * parameter.grad)


def both(model_of, loss_of, optimizer_of, dtype=torch.float32, **options):
    """The same fit in eager and under jit: models, and the warnings of the second."""
    models = []
    for jit in (False, FAST):
        torch.manual_seed(0)
        model = minikeras.Model(model_of().to(dtype))
        loss_func = loss_of().to(dtype)
        model.compile(loss_func, optimizer_of(model.parameters()), device="cpu", jit=jit, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.fit(2, [(x.to(dtype), y.to(dtype)) for x, y in BATCHES], verbose=0)
        models.append((model, loss_func))
    return models, [str(warning.message) for warning in caught]


def assert_as_in_eager(models):
    (expected, loss_of_eager), (found, loss_of_jit) = models
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        loss_of_jit.state_dict(), loss_of_eager.state_dict(), rtol=1e-6, atol=1e-6
    )
    states = [model.optimizer.state_dict()["state"] for model in (found, expected)]
    torch.testing.assert_close(*states, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", ["branch", "value", "float"])
def test_jit_optimizer_that_reads_its_state_as_a_number_takes_the_steps_of_eager(how):
    models, told = both(linear, nn.MSELoss, lambda p: Reading(p, how))
    assert_as_in_eager(models)
    outside = ["jit: train_step is not one graph: forward and loss, because in step"]
    # torch can trace some
    assert [text.partition(": U")[0].partition(": G")[0] for text in told] in (
        [],
        outside,
    )
    assert bool(told) or how != "branch"


def test_jit_leaves_an_optimizer_that_assigns_its_state_outside_the_graph_and_warns():
    models, told = both(linear, nn.MSELoss, Assigning)
    assert_as_in_eager(models)
    assert told == [
        "jit: train_step is not one graph: forward and loss, because RuntimeError: a step of the "
        "optimizer replaces a tensor in its state, 'm'. If the step updated it in place, it would "
        "be in the graph"
    ]


@pytest.mark.parametrize("foreach", [None, False, True])
def test_jit_averages_of_asgd_are_those_of_eager(foreach):
    models, told = both(
        linear, nn.MSELoss, lambda p: torch.optim.ASGD(p, lr=0.05, t0=3, foreach=foreach)
    )
    assert_as_in_eager(models)
    state = models[1][0].optimizer.state[models[1][0].net.weight]
    assert state["mu"].item() == pytest.approx(1 / 9)  # 12 steps, 3 of them before the averaging
    assert told == [
        "jit: train_step is not one graph: forward and loss, because ASGD branches on numbers in "
        "its state, which would be constants in a graph"
    ]


class Scaled(nn.Module):
    """A parameter that is one number."""

    def __init__(self):
        super().__init__()
        self.linear = linear()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.linear(x) * self.scale.exp()


class Averaged(nn.Module):
    """A buffer that is one number, changed in place."""

    def __init__(self):
        super().__init__()
        self.linear = linear()
        self.register_buffer("mean", torch.tensor(0.0))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.mean(), alpha=0.1)
        return self.linear(x - self.mean)


class AveragedLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.0))

    def forward(self, y_pred, y_true):
        if torch.is_grad_enabled():
            self.mean.mul_(0.9).add_(y_pred.detach().mean(), alpha=0.1)
        return ((y_pred - y_true - self.mean) ** 2).mean()


OPTIMIZERS = {
    "SGD": sgd,
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_jit_parameter_that_is_one_number_trains_as_in_eager(optimizer, dtype):
    models, told = both(Scaled, nn.MSELoss, optimizer, dtype)
    assert_as_in_eager(models)
    lost = (
        "jit: train_step is not one graph: forward and loss, because a parameter is a 0-d float64 "
        "tensor, and torch.compile loses changes to it on the CPU"
    )
    assert told == ([lost] if dtype == torch.float64 else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("model", "loss"), [(Averaged, nn.MSELoss), (linear, AveragedLoss)], ids=["model", "loss"]
)
def test_jit_buffer_that_is_one_number_changes_as_in_eager(model, loss, dtype):
    models, told = both(model, loss, sgd, dtype)
    assert_as_in_eager(models)
    name = "net.mean" if loss is nn.MSELoss else "mean"
    lost = (
        f"jit: train_step is not one graph: eager, because the buffer {name} is a 0-d float64 "
        "tensor, and torch.compile loses changes to it on the CPU. With shape (1,) it would be in "
        "the graph"
    )
    assert told == ([lost] if dtype == torch.float64 else [])


@pytest.mark.parametrize("name", ["Rprop", "Adadelta", "RMSprop", "AdamW", "NAdam"])
def test_jit_counts_steps_if_float64_is_torchs_default(name):
    torch.set_default_dtype(torch.float64)
    try:
        models, told = both(linear, nn.MSELoss, getattr(torch.optim, name), torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_as_in_eager(models)
    assert told == []
    assert {state["step"].item() for state in models[1][0].optimizer.state.values()} == {12}
