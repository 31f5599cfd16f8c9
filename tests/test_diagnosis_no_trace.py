"""Nothing of a diagnosis stays: every bit is afterwards what it was, however it ends."""

import contextlib
import copy
import itertools
import random
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.examples import EXAMPLES, first_fit
from helpers.models import Net, compiled, points
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import minikeras

X, y = points(24)


# --- what must be as it was -----------------------------------------------------------------------


def freeze_value(value, seen=()):
    """Return a value as plain nested tuples that compare bit for bit."""
    if id(value) in seen:
        return "itself"
    seen = (*seen, id(value))
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return str(value.dtype), tuple(value.shape), value.cpu().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, torch.Generator):
        return freeze_value(value.get_state())
    if isinstance(value, np.random.Generator):
        return freeze_value(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, dict):
        return tuple((repr(key), freeze_value(part, seen)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(freeze_value(part, seen) for part in value)
    if isinstance(value, (bool, int, float, str, type(None))):
        return repr(value)
    if isinstance(value, (pd.DataFrame, pd.Series)):  # pandas keeps caches in its attributes
        return value.to_csv(), str(value.to_numpy().dtype)
    if callable(value) or not hasattr(value, "__dict__"):
        return id(value)
    return freeze_value(vars(value), seen)


def everything(model, *data):
    """Return all that a diagnosis must leave as it is."""
    run = model._run
    modules = list(model.modules())
    modules += run.loss_func.modules() if isinstance(run.loss_func, nn.Module) else []
    tensors = [*model.parameters(), *model.buffers()]
    found = {
        "tensors": freeze_value(tensors),
        "same tensors": [id(tensor) for tensor in tensors],
        "versions": [tensor._version for tensor in tensors],
        "requires_grad": [tensor.requires_grad for tensor in tensors],
        "gradients": [freeze_value(tensor.grad) for tensor in tensors],
        "same gradients": [id(tensor.grad) for tensor in tensors],
        "modes": [module.training for module in modules],
        "attributes": [list(vars(module)) for module in modules],
        "model": freeze_value(
            {name: part for name, part in vars(model).items() if not name.startswith("_")}
        ),
        "optimizer": id(model.optimizer),
        "stop_training": model.stop_training,
        "history": freeze_value(model.history),
        "loss_func": freeze_value(run.loss_func),
        "totals": list(TOTALS),
        "random": random.getstate(),
        "numpy": freeze_value(np.random.get_state(legacy=False)),
        "torch": freeze_value(torch.get_rng_state()),
        "filters": list(warnings.filters),
        "switches": (
            torch.get_default_dtype(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            torch.is_autocast_enabled("cpu"),
        ),
        "threads": [
            thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)
        ],
    }
    for module in modules:
        for name, value in vars(module).items():
            if "hook" in name:
                found.setdefault("hooks", []).append((name, freeze_value(value)))
    for name, optimizer in run.optimizers.items():
        state = [
            (id(parameter), freeze_value(value)) for parameter, value in optimizer.state.items()
        ]
        groups = []
        for group in optimizer.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            groups.append((freeze_value(options), [id(parameter) for parameter in group["params"]]))
        found[f"optimizer {name}"] = state, groups, list(vars(optimizer))
    for number, part in enumerate(data):
        found[f"data {number}"] = traces_of(part)
    return found


def traces_of(data):
    """Return what reading changes in data."""
    data = data.loader if isinstance(data, Wrapped) else data
    if isinstance(data, DataLoader):
        parts = [data.dataset, data.sampler, data.batch_sampler]
        kept = [id(data._iterator)]
        if data._iterator is not None:
            kept += [worker.pid for worker in data._iterator._workers]
            kept += [worker.is_alive() for worker in data._iterator._workers]
            kept += [data._iterator._send_idx, data._iterator._rcvd_idx]
        return kept, [freeze_value(getattr(part, "__dict__", None)) for part in parts]
    return freeze_value(data)


def differences(before, after):
    """Name what is not as it was."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


# --- what is called -------------------------------------------------------------------------------


def use_everything(evidence):
    """Train a copy as far as a check could: on the user's data, in every mode."""
    twin = evidence.copy_model()
    twin.fit(2, evidence.dl_train, batch_size=evidence.batch_size, steps_per_epoch=2, verbose=0)
    evidence.model.train()
    if evidence.output_batches:  # forward takes the features
        for features, _, _ in evidence.train.batches[:2]:
            evidence.model.compute_outputs(features)
    random.random()
    np.random.rand()
    torch.rand(3)
    assert evidence.train.rows
    return []


def diagnose(model, dl_train, dl_val=None, **kwargs):
    checks = kwargs.pop("checks", [use_everything])
    diagnosis = model.diagnose(dl_train, dl_val, steps=3, checks=checks, **kwargs)
    not_made = [finding for finding in diagnosis.findings if finding.found.startswith("not made")]
    assert not_made == []


def lr_find(model, dl_train, dl_val=None, **kwargs):
    model.lr_find(dl_train, steps=5, **kwargs)


VERBS = [diagnose, lr_find]
verbs = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)


# --- every example --------------------------------------------------------------------------------


@verbs
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_as_it_was(path, verb, monkeypatch, tmp_path):
    model, dl_train, dl_val, options = first_fit(path, monkeypatch, tmp_path)
    data = [part for part in (dl_train, dl_val) if part is not None]
    before = everything(model, *data)
    verb(model, dl_train, dl_val, **options)
    assert differences(before, everything(model, *data)) == []


# --- every kind of data ---------------------------------------------------------------------------


class Counting(Dataset):
    """A dataset that counts its reads, and draws."""

    def __init__(self):
        self.reads = 0
        self.order = []
        self.rng = np.random.default_rng(1)

    def __len__(self):
        return 24

    def __getitem__(self, row):
        self.reads += 1
        self.order.append(row)
        noise = np.random.rand() + self.rng.random() + random.random() + torch.rand(()).item()
        return X[row] + noise, y[row]


class Stream(IterableDataset):
    """Rows that go on where the last reading stopped."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        for _ in range(24):
            self.position += 1
            yield X[self.position % 24], y[self.position % 24]


class Endless:
    """Batches without an end."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        while True:
            yield X[:8] + torch.randn(8, 2), y[:8]


class ByName(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, row):
        return {"x": X[row] + float(np.random.rand())}, y[row]


class NetByName(Net):
    def forward(self, features):
        return super().forward(features["x"])


class Wrapped:
    """Batches of a loader that is inside."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        yield from self.loader


def begun(loader):
    """Read two batches of a loader that is kept in the middle of its epoch."""
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    loader.kept = iterator
    return loader


def in_epoch(sampler, epoch):
    sampler.set_epoch(epoch)
    return sampler


rows = TensorDataset(X, y)
KINDS = {
    "arrays": lambda: (X.numpy(), y.numpy()),
    "tensors": lambda: (X, y),
    "DataFrames": lambda: (pd.DataFrame(X.numpy(), columns=["a", "b"]), pd.Series(y[:, 0].numpy())),
    "Dataset": Counting,
    "list of batches": lambda: [(X[:8], y[:8]), (X[8:], y[8:])],
    "shuffled": lambda: DataLoader(rows, 8, shuffle=True),
    "own generator": lambda: DataLoader(
        rows, 8, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "weighted": lambda: DataLoader(
        rows, 8, sampler=WeightedRandomSampler([1.0] * 24, 24, generator=torch.Generator())
    ),
    "sampler with an epoch": lambda: DataLoader(
        rows, 8, sampler=in_epoch(DistributedSampler(rows, num_replicas=1, rank=0), 5)
    ),
    "counting rows": lambda: DataLoader(Counting(), 8, shuffle=True),
    "subset": lambda: DataLoader(Subset(Counting(), range(16)), 8),
    "stream": lambda: DataLoader(Stream(), 8),
    "dict of features": lambda: DataLoader(ByName(), 8, shuffle=True),
    "persistent workers": lambda: begun(
        DataLoader(Counting(), 4, shuffle=True, num_workers=1, persistent_workers=True)
    ),
    "persistent workers inside": lambda: Wrapped(KINDS["persistent workers"]()),
    "workers": lambda: DataLoader(Counting(), 8, shuffle=True, num_workers=1),
    "endless": Endless,
}
no_workers = {kind: make for kind, make in KINDS.items() if "workers" not in kind}


def trained(data, kind="", **kwargs):
    """Return a model with Adam that has a history, gradients and a frozen part."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    model = minikeras.Model(nn.Sequential(net, nn.Sigmoid()))
    if kind == "dict of features":
        model = NetByName()
    if kind == "DataFrames":
        model = minikeras.Model(nn.Sequential(net, nn.Flatten(0), nn.Sigmoid()))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss_func = kwargs.pop("loss_func", nn.BCELoss())
    model.compile(loss_func, optimizer, {"mae": nn.L1Loss()}, device="cpu", **kwargs)
    return model


@verbs
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_is_as_it_was(kind, verb):
    data = KINDS[kind]()
    model = trained(data, kind)
    before = everything(model, data)
    verb(model, data, data)
    assert differences(before, everything(model, data)) == []


@pytest.mark.filterwarnings("ignore:the last epoch")
@verbs
@pytest.mark.parametrize("kind", no_workers)
def test_fit_afterwards_has_the_same_history(kind, verb):
    histories = []
    for calls_it in (False, True):
        torch.manual_seed(2)
        np.random.seed(2)
        random.seed(2)
        data = KINDS[kind]()
        model = trained(data, kind)
        steps = {"steps_per_epoch": 3} if kind == "endless" else {}
        model.fit(1, data, verbose=0, **steps)
        if calls_it:
            verb(model, data, data)
        histories.append((model.fit(2, data, verbose=0, **steps), model.state_dict()))
    (without, weights), (after, other_weights) = histories
    assert without.equals(after)
    assert freeze_value(weights) == freeze_value(other_weights)


@verbs
def test_persistent_workers_go_on_with_the_batch_that_was_next(verb):
    batches = []
    for calls_it in (False, True):
        torch.manual_seed(4)
        np.random.seed(4)
        loader = begun(KINDS["persistent workers"]())
        model = trained(loader)
        torch.manual_seed(5)
        if calls_it:
            verb(model, loader)
        remaining = list(loader.kept)
        assert len(remaining) == 4  # of six
        batches.append([remaining, list(loader)])
    assert freeze_value(batches[0]) == freeze_value(batches[1])


# --- every kind of model --------------------------------------------------------------------------


class HoldsOptimizer(Net):
    """A model that steps an optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.opt = torch.optim.Adam(self.parameters(), lr=0.01)
        self.seen = []

    def train_step(self, features, labels, sample_weight=None):
        self.seen.append(len(features))
        return super().train_step(features, labels, sample_weight)


def holds_optimizer():
    model = HoldsOptimizer()
    model.compile(nn.BCELoss(), model.opt, device="cpu")
    return model


def with_loss_that_reaches_the_model():
    model = Net()
    calls = []

    def loss_func(y_pred, y_true):
        calls.append(len(y_pred))
        return nn.functional.binary_cross_entropy(y_pred, y_true) + model.fc1.weight.square().sum()

    model.calls = calls
    return compiled(model, loss_func=loss_func)


def with_penalty():
    model = Net()
    return compiled(model, loss_func=minikeras.Regularized(nn.BCELoss(), model, l2=0.1))


class WithClosure(Net):
    def train_step(self, features, labels, sample_weight=None):
        def closure():
            self.optimizer.zero_grad()
            loss = self.compute_loss(self(features), labels)
            loss.backward()
            return loss

        return {"loss": self.optimizer.step(closure)}


def with_lbfgs():
    model = WithClosure()
    model.compile(nn.BCELoss(), torch.optim.LBFGS(model.parameters(), max_iter=3), device="cpu")
    return model


def with_scheduler():
    model = compiled()
    model.schedule = torch.optim.lr_scheduler.StepLR(model.optimizer, 1)
    return model


def with_parametrizations():
    model = Net()
    parametrizations.weight_norm(model.fc1)
    parametrizations.spectral_norm(model.fc2)
    return compiled(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def with_old_weight_norm():
    model = Net()
    nn.utils.weight_norm(model.fc1)
    nn.utils.spectral_norm(model.fc2)
    return compiled(model)


class Tied(minikeras.Model):
    def __init__(self):
        super().__init__()
        self.there = nn.Linear(2, 2)
        self.back = nn.Linear(2, 2)
        self.back.weight = self.there.weight
        self.out = nn.Linear(2, 1)

    def forward(self, x):
        return torch.sigmoid(self.out(self.back(torch.relu(self.there(x)))))


def with_hooks():
    model = Net()
    model.seen = []
    model.fc1.register_forward_hook(lambda layer, inputs, output: model.seen.append(output.sum()))
    model.fc2.register_forward_pre_hook(lambda layer, inputs: model.seen.append(1))
    model.fc2.register_full_backward_hook(lambda layer, *gradients: model.seen.append(2))
    model = compiled(model)
    model.optimizer.register_step_post_hook(lambda *given: model.seen.append(3))
    return model


def with_a_function_that_reaches_the_model():
    model = Net()
    model.norm = nn.BatchNorm1d(2)
    model.fc1.look = lambda x: model.norm(x)
    model.fc1.register_forward_pre_hook(lambda layer, inputs: (layer.look(inputs[0]),))
    return compiled(model)


def in_parts():
    model = Net()
    model.fc1.eval()
    model.fc1.requires_grad_(False)
    model.fc2.weight.grad = torch.ones_like(model.fc2.weight)
    model.register_buffer("unsaved", torch.ones(2), persistent=False)
    return compiled(model)


def with_a_tensor_of_a_forward():
    model = Net()
    model.last = model.fc1(X)
    return compiled(model)


def with_own_generator():
    model = Net()
    model.generator = torch.Generator().manual_seed(1)
    model.fc1.register_forward_pre_hook(
        lambda layer, inputs: (inputs[0] + torch.rand(2, generator=model.generator),)
    )
    return compiled(model)


def compiled_by_torch():
    model = Net()
    model.fc1 = torch.compile(model.fc1, backend="eager")
    return compiled(model)


class CompiledMethod(Net):
    """A model that has compiled a method of its own, and a layer with running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.scale = torch.compile(self.scale, backend="eager")

    def scale(self, x):
        return self.norm(x)

    def forward(self, x):
        return super().forward(self.scale(x))


def with_compiled_loss():
    return compiled(loss_func=torch.compile(loss_that_counts, backend="eager"))


TOTALS = []


def loss_that_counts(y_pred, y_true):
    TOTALS.append(len(y_pred))
    return nn.functional.binary_cross_entropy(y_pred, y_true)


class CountingLoss(nn.Module):
    """A loss with a parameter and a count."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, y_pred, y_true):
        self.count += 1
        return self.scale * nn.functional.binary_cross_entropy(y_pred, y_true)


def with_counting_loss():
    model = Net()
    loss_func = CountingLoss()
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=0.01)
    model.compile(loss_func, optimizer, device="cpu")
    return model


class Gan(minikeras.Model):
    """Two networks and two optimizers."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Linear(2, 2)
        self.critic = nn.Linear(2, 1)

    def forward(self, x):
        return self.generator(x)

    def train_step(self, features, labels, sample_weight=None):
        made = self.generator(torch.randn(len(features), 2))
        loss = self.critic(made.detach()).mean() - self.critic(features).mean()
        self.backward(loss, "critic")
        self.optimizer_step("critic")
        other = -self.critic(made).mean()
        self.backward(other, "generator")
        self.optimizer_step("generator")
        return {"loss": loss, "other": other}


def gan():
    model = Gan()
    optimizers = {
        "critic": torch.optim.Adam(model.critic.parameters()),
        "generator": torch.optim.RMSprop(model.generator.parameters()),
    }
    model.compile(nn.L1Loss(), optimizers, device="cpu")
    return model


MODELS = {
    "torch.compile": compiled_by_torch,
    "torch.compile of a method": lambda: compiled(CompiledMethod()),
    "torch.compile of the loss": with_compiled_loss,
    "loss that counts in a global": lambda: compiled(loss_func=loss_that_counts),
    "loss with a parameter": with_counting_loss,
    "two optimizers": gan,
    "holds its optimizer": holds_optimizer,
    "loss that reaches the model": with_loss_that_reaches_the_model,
    "penalty": with_penalty,
    "LBFGS": with_lbfgs,
    "scheduler": with_scheduler,
    "parametrizations": with_parametrizations,
    "tied weights": lambda: compiled(Tied()),
    "hooks": with_hooks,
    "function that reaches the model": with_a_function_that_reaches_the_model,
    "eval, frozen, gradients": in_parts,
    "tensor of a forward": with_a_tensor_of_a_forward,
    "own generator": with_own_generator,
    "accumulate": lambda: compiled(accumulate=2),
    "bf16": lambda: compiled(
        minikeras.Model(nn.Linear(2, 1)), nn.BCEWithLogitsLoss(), precision="bf16"
    ),
    "float64": lambda: compiled(Net().double(), lambda p, t: nn.functional.mse_loss(p.float(), t)),
    "lazy": lambda: minikeras.Model(nn.Sequential(nn.LazyLinear(1), nn.Sigmoid())),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by torch.compile
@verbs
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("is_fitted", [False, True], ids=["new", "fitted"])
def test_every_kind_of_model_is_as_it_was(kind, is_fitted, verb):
    model = MODELS[kind]()
    data = (X, y)
    if kind == "float64":
        data = (X.double(), y)
    if kind == "lazy":
        model(X)
        model = compiled(model)
    if is_fitted:
        model.fit(2, data, verbose=0)
    before = everything(model, *data)
    verb(model, data)
    assert differences(before, everything(model, *data)) == []


def test_copy_trains_with_the_optimizer_that_the_model_holds():
    model = holds_optimizer()
    found = []

    def look(evidence):
        twin = evidence.copy_model()
        found.append(twin.opt is twin.optimizer)
        before = copy.deepcopy(twin.state_dict())
        twin.fit(1, (X, y), verbose=0)
        found.append(freeze_value(before) != freeze_value(twin.state_dict()))
        return []

    model.diagnose((X, y), checks=[look])
    assert found == [True, True]


def test_copy_has_the_functions_of_torch_themselves():
    found = []
    model = compiled(loss_func=nn.functional.binary_cross_entropy)
    model.diagnose((X, y), checks=[lambda evidence: found.append(evidence.loss_func) or []])
    assert found == [nn.functional.binary_cross_entropy]


def test_hooks_of_a_copy_act_on_the_copy():
    model = with_hooks()
    twins = []

    def train(evidence):
        twins.append(evidence.copy_model())
        twins[0].fit(2, (X, y), verbose=0)
        return []

    torch.manual_seed(5)
    model.diagnose((X, y), checks=[train])
    assert model.seen == []
    assert len(twins[0].seen) > 4


# --- however it ends ------------------------------------------------------------------------------


class Fails:
    """Counts calls, and raises at one of them."""

    def __init__(self, call, error):
        self.left = itertools.count(1 - call)
        self.error = error

    def __call__(self):
        if next(self.left) == 0:
            raise self.error


class FailingNet(Net):
    fails = staticmethod(lambda: None)

    def forward(self, x):
        type(self).fails()
        return super().forward(x)


ERRORS = [RuntimeError("broken"), KeyboardInterrupt()]


@verbs
@pytest.mark.parametrize("call", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["forward", "loss", "row"])
def test_error_in_the_middle_leaves_everything_as_it_was(place, error, call, verb, monkeypatch):
    fails = Fails(call, error)
    nothing = Fails(0, error)
    places = dict.fromkeys(("forward", "loss", "row"), nothing) | {place: fails}

    def loss_func(y_pred, y_true):
        places["loss"]()
        return nn.functional.binary_cross_entropy(y_pred, y_true)

    class Rows(Counting):
        def __getitem__(self, row):
            if row == 3:
                places["row"]()
            return super().__getitem__(row)

    monkeypatch.setattr(FailingNet, "fails", staticmethod(lambda: places["forward"]()))
    model = FailingNet()
    model.compile(loss_func, torch.optim.Adam(model.parameters()), device="cpu")
    data = DataLoader(Rows(), 8, shuffle=True, generator=torch.Generator())
    before = everything(model, data)
    with contextlib.suppress(RuntimeError, KeyboardInterrupt, AssertionError):
        verb(model, data)
    assert differences(before, everything(model, data)) == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_check_that_raises_leaves_everything_as_it_was(error):
    def check(evidence):
        use_everything(evidence)
        raise error

    data = DataLoader(Counting(), 8, shuffle=True)
    model = trained(data)
    before = everything(model, data)
    with pytest.raises(type(error)):
        model.diagnose(data, checks=[check])
    assert differences(before, everything(model, data)) == []


# --- what is refused ------------------------------------------------------------------------------


class Locked(Net):
    """A model with a lock, which cannot be copied."""

    def __init__(self, lock):
        super().__init__()
        self.lock = lock


@verbs
def test_model_that_cannot_be_copied_is_refused_and_can_be_mended(verb):
    model = compiled(Locked(threading.Lock()))
    before = everything(model, X)
    with pytest.raises(
        TypeError, match=r"cannot be copied: TypeError: cannot pickle.*__deepcopy__"
    ):
        verb(model, (X, y))
    assert differences(before, everything(model, X)) == []

    class Lock:
        def __init__(self):
            self.lock = threading.Lock()

        def __deepcopy__(self, memo):
            return Lock()

    verb(compiled(Locked(Lock())), (X, y))


@verbs
def test_hook_that_cannot_be_copied_is_refused_and_can_be_removed(verb):
    model = Net()
    lock = threading.Lock()

    def hook(layer, inputs):
        with lock:
            raise AssertionError

    handle = model.fc1.register_forward_pre_hook(hook)
    compiled(model)
    before = everything(model, X)
    with pytest.raises(TypeError, match=r"of their hooks cannot be copied.*handle\.remove\(\)"):
        verb(model, (X, y))
    assert differences(before, everything(model, X)) == []
    handle.remove()
    verb(model, (X, y))


@verbs
def test_generator_of_batches_is_refused_and_the_remedy_works(verb):
    dl_train = ((X[:8] + number, y[:8]) for number in range(4))
    model = compiled()
    with pytest.raises(TypeError, match=r"dl_train .*list\(itertools.islice\(dl_train, 100\)\)"):
        verb(model, dl_train)
    batches = list(itertools.islice(dl_train, 100))
    assert len(batches) == 4  # none was read
    verb(model, batches)
