"""What a fit with a checkpoint holds beside weights and optimizers, and what it says of the rest."""

import random
import sys
import types
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.datasets import AsItGoes, ShuffledPairs
from helpers.interruptions import Killed, killed_after
from helpers.models import compiled, points
from helpers.samplers import Buckets, Pool
from helpers.seeds import seed
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    default_collate,
)

import minikeras
from minikeras import CheckpointError, LambdaCallback, LRScheduler
from minikeras.checkpoint import fits

X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
Y = X.sum(dim=1, keepdim=True)
SCHEDULES = torch.optim.lr_scheduler

pytestmark = pytest.mark.usefixtures("quick_disk")


def start(make, path=None, kill=None, epochs=3, every=1):
    """What a script does from its first line on; `make` gives its parts."""
    seed()
    parts = {
        "loss": nn.MSELoss,
        "net": lambda: nn.Linear(2, 1),
        "data": lambda: (X, Y),
        "callbacks": list,
    }
    parts |= make()
    net = parts["net"]()
    model = net if isinstance(net, minikeras.Model) else minikeras.Model(net)
    loss = parts["loss"]()
    trained = [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]
    optimizer = parts.get(
        "optimizer", lambda trained: torch.optim.SGD(trained, lr=0.02, momentum=0.9)
    )(trained)
    model.compile(loss, optimizer, device="cpu", **parts.get("compile", {}))
    data = parts["data"]()
    callbacks = [*parts["callbacks"](), *([] if kill is None else [killed_after(kill)])]
    kwargs = {"batch_size": 20} if isinstance(data, (tuple, Dataset)) else {}
    if path is not None:
        kwargs |= {"checkpoint": path, "checkpoint_every": every}
    model.fit(epochs, data, callbacks=callbacks, verbose=0, **parts.get("fit", {}), **kwargs)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.rand(()).item(), np.random.rand(), random.random()
    return model.history, state, drawn, model


def assert_same(first, second):
    pd.testing.assert_frame_equal(first[0], second[0], check_exact=True)
    assert all(torch.equal(first[1][name], value) for name, value in second[1].items())
    assert first[2] == second[2]


def assert_exact(make, tmp_path, kills=(4, 7), epochs=3):
    whole = start(make, epochs=epochs)
    for kill in kills:
        path = tmp_path / f"{kill}.pt"
        with pytest.raises(Killed):
            start(make, path, kill, epochs)
        assert_same(start(make, path, epochs=epochs), whole)


# --- generators, wherever they are held -------------------------------------------------------------------------------

GENERATORS = {
    "numpy": lambda: np.random.default_rng(0),
    "numpy, old": lambda: np.random.RandomState(0),
    "python": lambda: random.Random(0),
    "torch": lambda: torch.Generator().manual_seed(0),
}
SHARED = np.random.default_rng(4)


def draw(generator):
    if isinstance(generator, torch.Generator):
        return torch.randn((), generator=generator).item()
    return generator.normal() if hasattr(generator, "normal") else generator.gauss(0, 1)


class Jitter:
    def __init__(self, kind="numpy"):
        self.rng = GENERATORS[kind]()

    def __call__(self, x):
        return x + 0.1 * draw(self.rng)


class Compose:
    def __init__(self, *transforms):
        self.transforms = list(transforms)

    def __call__(self, x):
        for transform in self.transforms:
            x = transform(x)
        return x


class Slotted:
    __slots__ = ("inner",)

    def __init__(self):
        self.inner = {"jitter": [Jitter()]}

    def __call__(self, x):
        return self.inner["jitter"][0](x)


class Transformed(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 60

    def __getitem__(self, row):
        return self.transform(X[row]), Y[row]


class Collate:
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __call__(self, rows):
        x, y = default_collate(rows)
        return x + 0.1 * self.rng.normal(), y

    def method(self, rows):
        return self(rows)


def closed_over():
    rng = random.Random(0)

    def collate(rows):
        x, y = default_collate(rows)
        return x + 0.1 * rng.gauss(0, 1), y

    return collate


def from_a_global(x):
    return x + 0.1 * SHARED.normal()


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x + 0.1 * torch.randn(x.shape, generator=self.generator))


class NoisyLoss:
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __call__(self, y_pred, y_true):
        return ((y_pred - y_true + 0.1 * self.rng.normal()) ** 2).mean()


class Perturbs(minikeras.Callback):
    def __init__(self):
        self.jitter = Jitter("python")

    def on_batch_end(self, batch, logs):
        with torch.no_grad():
            next(self.model.parameters()).add_(0.01 * self.jitter(0.0))


def loader(dataset=None, **kwargs):
    kwargs = (
        {"shuffle": True} | kwargs if not {"sampler", "batch_sampler"} & kwargs.keys() else kwargs
    )
    if "batch_sampler" not in kwargs:
        kwargs["batch_size"] = 20
    return DataLoader(dataset or TensorDataset(X, Y), **kwargs)


class Wrapping(Sampler):
    def __init__(self):
        self.inner = RandomSampler(range(60), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 60

    def __iter__(self):
        return iter(self.inner)


class ByHand:
    def __init__(self):
        self.rows = RandomSampler(range(60), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 3

    def __iter__(self):
        rows = list(self.rows)
        return iter([rows[start : start + 20] for start in range(0, 60, 20)])


class Counts(Sampler):
    def __init__(self):
        self.epoch = 0

    def __len__(self):
        return 60

    def __iter__(self):
        self.epoch += 1
        return iter(
            torch.randperm(60, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        )


class ShufflesInPlace(Sampler):
    def __init__(self):
        self.rows = list(range(60))

    def __len__(self):
        return 60

    def __iter__(self):
        random.shuffle(self.rows)
        return iter(self.rows)


class Augmented(Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, row):
        return X[row] + 0.1 * random.random(), Y[row]


class Counting(minikeras.Model):
    steps = 0

    def train_step(self, features, labels):
        self.steps += 1
        return super().train_step(features if self.steps % 3 else -features, labels)


def two_loaders_of_one_generator():
    shared = torch.Generator().manual_seed(3)
    rows = RandomSampler(range(60), replacement=True, num_samples=60, generator=shared)
    val = DataLoader(TensorDataset(X, Y), 20, shuffle=True, generator=shared)
    return {"data": lambda: loader(sampler=rows), "fit": {"dl_val": val, "steps_per_epoch": 2}}


def dropped_out():
    return nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))


def seed_the_global():
    SHARED.bit_generator.state = np.random.default_rng(4).bit_generator.state
    return {"data": lambda: loader(Transformed(from_a_global))}


EXACT = {
    **{
        f"transform, {kind}": (
            lambda kind=kind: {"data": lambda: loader(Transformed(Jitter(kind)))}
        )
        for kind in GENERATORS
    },
    "transforms in a list": lambda: {
        "data": lambda: loader(Transformed(Compose(Jitter(), Jitter("torch"))))
    },
    "slots, dicts and lists": lambda: {"data": lambda: loader(Transformed(Slotted()))},
    "a global of the script": seed_the_global,
    "concatenated": lambda: {
        "data": lambda: loader(
            ConcatDataset([Transformed(Jitter()), Transformed(Jitter("python"))])
        )
    },
    "a Dataset": lambda: {"data": lambda: Transformed(Jitter())},
    "with workers": lambda: {"data": lambda: loader(Transformed(Jitter()), num_workers=1)},
    "collate_fn": lambda: {"data": lambda: loader(collate_fn=Collate())},
    "collate_fn, a method": lambda: {"data": lambda: loader(collate_fn=Collate().method)},
    "collate_fn, a closure": lambda: {"data": lambda: loader(collate_fn=closed_over())},
    "model": lambda: {"net": Noise},
    "loss": lambda: {"loss": NoisyLoss},
    "callback": lambda: {"callbacks": lambda: [Perturbs()]},
    "sampler in a sampler": lambda: {"data": lambda: loader(sampler=Wrapping())},
    "sampler under another name": lambda: {"data": lambda: loader(batch_sampler=ByHand())},
    "sampler that counts": lambda: {"data": lambda: loader(sampler=Counts())},
    "sampler that shuffles in place": lambda: {
        "data": lambda: loader(Augmented(), sampler=ShufflesInPlace())
    },
    "pool and augmentation": lambda: {"data": lambda: loader(Augmented(), sampler=Pool(60))},
    "pool and augmentation, in a worker": lambda: {
        "data": lambda: loader(Augmented(), sampler=Pool(60), num_workers=1)
    },
    "buckets and dropout": lambda: {
        "net": dropped_out,
        "data": lambda: loader(batch_sampler=Buckets(60, 10)),
    },
    "buckets and dropout, read": lambda: {
        "net": dropped_out,
        "data": lambda: loader(Augmented(), batch_sampler=Buckets(60, 10)),
    },
    "two loaders of one generator": two_loaders_of_one_generator,
    "a number in the model": lambda: {"net": lambda: Counting(nn.Linear(2, 1))},
}


@pytest.mark.parametrize("kind", EXACT)
def test_what_draws_or_counts_is_held_wherever_it_is(kind, tmp_path):
    assert_exact(EXACT[kind], tmp_path, kills=(2, 4, 5))


class Stream(IterableDataset):
    def __init__(self, reader=None):
        self.rng = np.random.default_rng(0)
        self.reader = reader

    def __iter__(self):
        for row in self.rng.permutation(60):
            yield X[row], Y[row]


class Constants:
    def __iter__(self):
        return zip(X.split(20), Y.split(20), strict=True)


class SubclassOfList(list):
    """Empty as a list, and read in a way of its own."""

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(list(AsItGoes(X, Y, 3, 20)))


ITERABLES = {
    "a generator of its own": lambda: DataLoader(Stream(), 20),
    "... with a worker": lambda: DataLoader(Stream(), 20, num_workers=1),
    "pairs shuffled in place": lambda: ShuffledPairs(X, Y),
    "drawn as it goes": lambda: AsItGoes(X, Y, 3, 20),
    "a subclass of list": SubclassOfList,
    "batches that are there already": lambda: Constants(),
}


@pytest.mark.parametrize("kind", ITERABLES)
def test_an_iterable_of_ones_own_is_exact_and_nothing_is_told_of_it(kind, tmp_path):
    assert_exact(lambda: {"net": dropped_out, "data": ITERABLES[kind]}, tmp_path, kills=(2, 3, 5))


def test_a_position_that_cannot_be_held_is_told_as_the_fit_begins(tmp_path, monkeypatch):
    class Reader:
        __module__ = "reader"

    installed = types.ModuleType("reader")
    installed.__file__ = "/usr/lib/python3/site-packages/reader.py"
    monkeypatch.setitem(sys.modules, "reader", installed)
    with pytest.warns(UserWarning, match="dl_train is a Stream") as told:
        start(
            lambda: {"data": lambda: DataLoader(Stream(Reader()), 20)},
            tmp_path / "run.pt",
            epochs=1,
        )
    assert [str(warning.message) for warning in told] == [
        "dl_train is a Stream, which has no state_dict: a checkpoint does not hold its position. When a run is resumed "
        "in the middle of an epoch, the batches already seen are read again and left out; the run is exact only if "
        "they come as before. Give it state_dict and load_state_dict, or use a Dataset with __getitem__."
    ]


class Unseeded(Stream):
    def __iter__(self):
        self.rng = np.random.default_rng(UNSEEDED.pop())  # as default_rng() gives
        return super().__iter__()


UNSEEDED = []


def test_batches_that_are_others_when_they_are_read_again_are_told(tmp_path):
    path = tmp_path / "run.pt"
    UNSEEDED[:] = range(20)
    with pytest.raises(Killed):
        start(lambda: {"data": lambda: DataLoader(Unseeded(), 20)}, path, kill=1)
    with pytest.warns(UserWarning, match="other batches") as told:
        start(lambda: {"data": lambda: DataLoader(Unseeded(), 20)}, path)
    assert [str(warning.message) for warning in told] == [
        "dl_train gives other batches when it is read again: the checkpoint stands in the middle of an epoch, and the "
        "first batch of that epoch is another one here. The batches that are left out are not those that were trained "
        "on. Draw from a generator that is an attribute, seeded where the script makes it; or give dl_train state_dict "
        "and load_state_dict."
    ]


class FromAnIterator(Dataset):
    def __init__(self):
        self.lines = iter(list(range(1000)))

    def __len__(self):
        return 60

    def __getitem__(self, row):
        return X[row] + next(self.lines), Y[row]


class FromTheSystem(Transformed):
    def __init__(self):
        self.transform = lambda x: x
        self.random = random.SystemRandom()


@pytest.mark.parametrize(
    ("dataset", "name"), [(FromAnIterator, "lines"), (FromTheSystem, "random")]
)
def test_an_iterator_inside_a_dataset_is_told_by_name(dataset, name, tmp_path):
    with pytest.warns(
        UserWarning, match=rf"dl_train\.dataset\.{name} has a position or a random state"
    ) as told:
        start(lambda: {"data": lambda: loader(dataset())}, tmp_path / "run.pt", epochs=1)
    assert len(told) == 1


def test_large_data_are_not_walked_through(tmp_path):
    class Files(Dataset):
        def __init__(self):
            self.samples = [(f"{row}.png", row % 2) for row in range(300_000)]

        def __len__(self):
            return 20

        def __getitem__(self, row):
            return X[row], Y[row]

    found = list(minikeras.reachable.reachable({"data": Files()}))
    assert len(found) < 100


# --- the beginning of an epoch ----------------------------------------------------------------------------------------


class Halves(minikeras.Callback):
    """Acts on the rate, the weights and the random state, and sets up what the epoch needs."""

    def on_epoch_begin(self, epoch):
        self.batches = 0
        self.model.optimizer.param_groups[0]["lr"] *= 0.5
        with torch.no_grad():
            next(self.model.parameters()).add_(torch.rand(()))

    def on_batch_end(self, batch, logs):
        self.batches += 1

    def on_epoch_end(self, epoch, logs):
        assert self.batches > 0


class Counted(minikeras.Callback):
    epochs = 0

    def on_epoch_begin(self, epoch):
        self.epochs += 1

    def on_epoch_end(self, epoch, logs):
        logs["epochs"] = self.epochs

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


def test_an_epoch_that_is_resumed_does_not_begin_twice(tmp_path):
    assert_exact(lambda: {"callbacks": lambda: [Halves(), Counted()]}, tmp_path, kills=(1, 3, 4, 8))


class Unfreezes(minikeras.Callback):
    """Adds a layer to the optimizer in the second epoch, and one in the third; later ones have a rate of their own."""

    def on_epoch_begin(self, epoch):
        layers = {2: 2, 3: 0}
        if epoch in layers:
            layer = self.model.net[layers[epoch]].requires_grad_(True)
            self.model.optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.01})
        if epoch == 3:
            self.model.optimizer.param_groups[1]["lr"] = 0.005


def frozen_net():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    return net


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)]
)
def test_groups_that_a_callback_adds_are_resumed(optimizer, tmp_path):
    def make():
        return {
            "net": frozen_net,
            "optimizer": lambda trained: optimizer(trained[-2:], lr=0.01),
            "callbacks": lambda: [Unfreezes()],
        }

    assert_exact(make, tmp_path, kills=(2, 3, 4, 6, 7, 10), epochs=4)


def test_so_they_are_in_the_middle_of_a_window_of_accumulate(tmp_path):
    def make():
        return {
            "net": frozen_net,
            "compile": {"accumulate": 3},
            "optimizer": lambda trained: torch.optim.Adam(trained[-2:], lr=0.01),
            "callbacks": lambda: [Unfreezes()],
        }

    assert_exact(make, tmp_path, kills=(3, 4, 6, 7), epochs=3)


def test_groups_of_another_script_are_refused(tmp_path):
    def halves(trained):
        return torch.optim.SGD([{"params": trained[:1]}, {"params": trained[1:]}], lr=0.1)

    start(lambda: {"optimizer": halves}, tmp_path / "run.pt", epochs=1)
    fits.USES.clear()  # in another process
    with pytest.raises(CheckpointError, match="another optimizer: SGD"):
        start(dict, tmp_path / "run.pt", epochs=2)


# --- what the loss holds ----------------------------------------------------------------------------------------------


class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(1), persistent=False)
        self.plain = torch.zeros(1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, y_pred, y_true):
        self.center.mul_(0.9).add_(0.1 * y_pred.detach().mean(0))
        self.plain = self.plain * 0.9 + 0.1
        loss = ((y_pred - self.center - self.plain - y_true) ** 2).mean()
        return loss * self.scale.exp() + self.scale**2


class FreezesTheLoss(minikeras.Callback):
    def on_epoch_begin(self, epoch):
        if epoch == 2:
            self.model._run.loss_func.scale.requires_grad_(False)


def test_hidden_buffers_and_frozen_parameters_of_a_loss_are_held(tmp_path):
    assert_exact(
        lambda: {"loss": Centered, "callbacks": lambda: [FreezesTheLoss()]},
        tmp_path,
        kills=(1, 4, 7),
    )


class LateCenter(nn.Module):
    """Its buffers are None until the first batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("mean", None)
        self.register_buffer("scale", None)

    def forward(self, x):
        if self.mean is None:
            self.mean = x.mean(dim=0)
        if self.scale is None:
            self.scale = x.std(dim=0)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.mean(dim=0))
        return self.layer((x - self.mean) / self.scale)


class LateLoss(LateCenter):
    def forward(self, y_pred, y_true):
        if self.mean is None:
            self.mean = y_true.mean()
        return ((y_pred - y_true - 0.1 * self.mean) ** 2).mean() + 0.01 * (
            self.layer.weight**2
        ).sum()


@pytest.mark.parametrize("part", ["net", "loss"])
def test_buffers_that_come_with_the_first_batch_are_held(part, tmp_path):
    assert_exact(
        lambda: {part: {"net": LateCenter, "loss": LateLoss}[part]}, tmp_path, kills=(1, 4)
    )


def test_a_file_of_weights_fills_buffers_that_come_with_the_first_batch(tmp_path):
    model, other = minikeras.Model(LateCenter()), minikeras.Model(LateCenter())
    model(X)
    model.save(tmp_path / "weights.pt")
    other.load(tmp_path / "weights.pt")
    model.eval()
    other.eval()
    assert torch.equal(other(X), model(X))
    assert other.state_dict().keys() == model.state_dict().keys()


class MaybeBiased(nn.Module):
    def __init__(self, biased, registered=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1))
        if registered:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.ones(1)) if biased else None

    def forward(self, x):
        return x @ self.weight + (0 if self.bias is None else self.bias)


@pytest.mark.parametrize("registered", [True, False])
def test_a_parameter_that_is_none_here_is_not_taken_for_such_a_buffer(registered, tmp_path):
    minikeras.Model(MaybeBiased(True)).save(tmp_path / "weights.pt")
    model = minikeras.Model(MaybeBiased(False, registered))
    with pytest.raises(CheckpointError, match=r"unexpected: net\.bias"):
        model.load(tmp_path / "weights.pt")
    assert model.net.bias is None


# --- a script that was changed between two starts ---------------------------------------------------------------------


def rates_after_change(path, first, second, step, before=3, epochs=6):
    """The rates of a run of which the script got another scheduler after three epochs, and what was said."""
    for count, make in ((before, first), (epochs, second)):
        fits.USES.clear()  # each start is a process
        torch.manual_seed(0)
        model = minikeras.Model(nn.Linear(2, 1))
        model.compile(
            nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), device="cpu"
        )
        callback = LRScheduler(make(model.optimizer), step=step)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model.fit(
                count, (X, Y), batch_size=15, callbacks=[callback], checkpoint=path, verbose=0
            )
    return model, [str(warning.message) for warning in told]


def plain_loop(first, second, step, before=3, epochs=6):
    """Weights and rates of a bare loop that goes over to the second schedule, replayed to where it stands."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    other = torch.optim.SGD(
        [torch.zeros(1)], lr=0.1, momentum=0.9
    )  # has the second schedule from the beginning
    schedulers = first(optimizer), second(other)
    rates = []
    for epoch in range(epochs):
        if epoch == before:
            optimizer.param_groups[0]["lr"] = other.param_groups[0]["lr"]
            optimizer.param_groups[0]["momentum"] = other.param_groups[0]["momentum"]
        for rows in torch.randperm(60).split(15):
            used = optimizer.param_groups[0]["lr"]
            optimizer.zero_grad()
            nn.functional.mse_loss(model(X[rows]), Y[rows]).backward()
            optimizer.step()
            other.step()
            if step == "batch":
                step_both(schedulers, optimizer, other, epoch >= before)
        if step == "epoch":
            step_both(schedulers, optimizer, other, epoch >= before)
        rates.append(used)
    return model, rates


def step_both(schedulers, optimizer, other, changed):
    schedulers[1].step()
    if changed:
        for name in ("lr", "momentum"):
            optimizer.param_groups[0][name] = other.param_groups[0][name]
    else:
        schedulers[0].step()


CHANGES = {
    "OneCycleLR, longer": (
        lambda o: SCHEDULES.OneCycleLR(o, 0.1, total_steps=13),
        lambda o: SCHEDULES.OneCycleLR(o, 0.1, total_steps=25),
        "batch",
        "total_steps 13 and not 25",
    ),
    "CosineAnnealingLR, longer": (
        lambda o: SCHEDULES.CosineAnnealingLR(o, 3),
        lambda o: SCHEDULES.CosineAnnealingLR(o, 6),
        "epoch",
        "T_max 3 and not 6",
    ),
    "StepLR, quicker": (
        lambda o: SCHEDULES.StepLR(o, 2),
        lambda o: SCHEDULES.StepLR(o, 1),
        "epoch",
        "step_size 2 and not 1",
    ),
    "another class": (
        lambda o: SCHEDULES.ExponentialLR(o, 0.5),
        lambda o: SCHEDULES.CosineAnnealingLR(o, 6),
        "epoch",
        "class ExponentialLR and not CosineAnnealingLR",
    ),
    "one after another": (
        lambda o: SCHEDULES.SequentialLR(
            o, [SCHEDULES.ConstantLR(o, 0.1, 2), SCHEDULES.CosineAnnealingLR(o, 3)], milestones=[2]
        ),
        lambda o: SCHEDULES.SequentialLR(
            o, [SCHEDULES.ConstantLR(o, 0.1, 2), SCHEDULES.CosineAnnealingLR(o, 5)], milestones=[2]
        ),
        "epoch",
        "T_max 3 and not 5",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_schedule_that_was_changed_is_taken_from_the_script_and_told(change, tmp_path):
    first, second, step, words = CHANGES[change]
    expected, rates = plain_loop(first, second, step)
    model, told = rates_after_change(tmp_path / "run.pt", first, second, step)
    assert model.history["lr"].tolist() == pytest.approx(rates, rel=1e-12)
    assert torch.equal(model.net.weight, expected.weight)
    assert len(told) == 1
    assert words in told[0]
    assert "The script's is taken" in told[0]


def test_the_same_schedule_again_is_nothing_to_tell_of(tmp_path):
    def cosine(optimizer):
        return SCHEDULES.CosineAnnealingLR(optimizer, 6)

    model, told = rates_after_change(tmp_path / "run.pt", cosine, cosine, "epoch")
    assert told == []
    assert model.history["lr"].tolist() == pytest.approx(plain_loop(cosine, cosine, "epoch")[1])


def test_other_betas_are_told_and_the_files_go_on(tmp_path):
    def adam(betas):
        return lambda: {
            "optimizer": lambda trained: torch.optim.Adam(trained, lr=0.01, betas=betas)
        }

    start(adam((0.9, 0.999)), tmp_path / "run.pt", epochs=1)
    fits.USES.clear()
    with pytest.warns(UserWarning, match=r"betas\[0\] 0\.9 and not 0\.5") as told:
        model = start(adam((0.5, 0.999)), tmp_path / "run.pt", epochs=2)[3]
    assert "The file's go on" in str(told[0].message)
    assert model.optimizer.param_groups[0]["betas"][0] == 0.9


@pytest.mark.parametrize("change", ["loss", "frozen"])
def test_another_loss_or_other_frozen_layers_are_told_and_taken(change, tmp_path):
    start(dict, tmp_path / "run.pt", epochs=1)
    fits.USES.clear()
    changed = {"loss": lambda: {"loss": nn.L1Loss}, "frozen": lambda: {"net": half_frozen}}[change]
    words = {
        "loss": "loss_func MSELoss and not L1Loss",
        "frozen": "net.bias trained, and frozen here",
    }[change]
    with pytest.warns(UserWarning, match=words):
        start(changed, tmp_path / "run.pt", epochs=2)


def half_frozen():
    layer = nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    return layer


def best_of(monitor, path, epochs):
    fits.USES.clear()
    torch.manual_seed(0)
    model = compiled(
        metrics_dict={
            "accuracy": lambda y_pred, y_true: ((y_pred > 0.5) == (y_true > 0.5)).float().mean()
        }
    )
    stop = minikeras.EarlyStopping(monitor, patience=50, restore_best_weights=True)
    save = minikeras.ModelCheckpoint(path.parent / "best.pt", monitor, save_best_only=True)
    model.fit(epochs, points(60), points(60), callbacks=[stop, save], checkpoint=path, verbose=0)
    return model, stop, save


def test_the_best_value_of_another_monitor_is_not_taken(tmp_path):
    best_of("val_loss", tmp_path / "run.pt", 2)
    with pytest.warns(UserWarning, match="that watched") as told:
        model, stop, save = best_of("val_accuracy", tmp_path / "run.pt", 5)
    assert stop.best == save.best == model.history["val_accuracy"].iloc[2:].max()
    assert [str(warning.message) for warning in told] == [
        f"{tmp_path / 'run.pt'} was written with {name} that watched 'val_loss' (min), and this script's watches "
        f"'val_accuracy' (max). The script's is taken, and its best value is looked for anew from here on."
        for name in ("an EarlyStopping", "a ModelCheckpoint")
    ]


@pytest.mark.parametrize("finished", [True, False])
def test_other_data_of_as_many_rows_are_told(finished, tmp_path):
    path = tmp_path / "run.pt"
    if finished:
        start(dict, path, epochs=1)
    else:
        with pytest.raises(Killed):
            start(dict, path, kill=1, epochs=1)
    fits.USES.clear()
    with pytest.warns(
        UserWarning,
        match="nothing is trained on them" if finished else "the batches that are left out",
    ):
        start(lambda: {"data": lambda: (X * 3, Y)}, path, epochs=1)


# --- nothing is half restored -----------------------------------------------------------------------------------------


class Keeps(minikeras.Callback):
    def __init__(self, key):
        self.key = key
        self.value = 0

    def state_dict(self):
        return {self.key: self.value}

    def load_state_dict(self, state):
        self.value = state[self.key]


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x):
        return x + self.table


class Identity(nn.Module):
    def forward(self, x):
        return x


REFUSED = {
    "a generator in the loader": (
        {"data": loader},
        {"data": lambda: loader(generator=torch.Generator())},
        "other random generators",
    ),
    "another kind of generator": (
        {"data": lambda: loader(Transformed(Jitter("numpy")))},
        {"data": lambda: loader(Transformed(Jitter("python")))},
        "another kind of random generator at dl_train.dataset.transform.rng",
    ),
    "fewer rows": ({"data": loader}, {"data": lambda: (X[:10], Y[:10])}, "ended after 1"),
    "a layer with a hidden buffer": (
        {"net": lambda: nn.Sequential(nn.Sequential(Hidden()), nn.Linear(2, 1))},
        {"net": lambda: nn.Sequential(nn.Sequential(), nn.Linear(2, 1))},
        "holds the buffer net.0.0.table",
    ),
    "another key of a callback": (
        {"callbacks": lambda: [Keeps("a")]},
        {"callbacks": lambda: [Keeps("b")]},
        "callback Keeps cannot take: KeyError",
    ),
    "parameters in another order": (
        {"optimizer": lambda trained: torch.optim.SGD(trained, lr=0.1, momentum=0.9)},
        {"optimizer": lambda trained: torch.optim.SGD(trained[::-1], lr=0.1, momentum=0.9)},
        "in another order",
    ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_does_not_fit_is_refused_before_a_weight_changes(change, tmp_path):
    first, second, words = REFUSED[change]
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        start(lambda: first, path, kill=2)
    before = {}

    def remember(model):
        before.update({name: value.clone() for name, value in model.state_dict().items()})

    models = []
    net = second.get("net", lambda: nn.Linear(2, 1))

    def remembered():
        model = minikeras.Model(net())
        models.append(model)
        remember(model)
        return model

    with pytest.raises(CheckpointError, match=words):
        start(lambda: second | {"net": remembered}, path)
    (model,) = models
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.optimizer.state
    assert model.history.empty
    start(lambda: first, path)  # the remedy: as it was then


# --- one checkpoint for one fit ---------------------------------------------------------------------------------------


def fold(number, path, seed=True, error=None):
    if seed:
        torch.manual_seed(0)
    model = minikeras.Model(nn.Linear(2, 1))
    model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), device="cpu")
    rows = torch.arange(60) % 3 != number
    callbacks = [LambdaCallback(on_epoch_end=lambda epoch, logs: 1 // (not error))]
    model.fit(2, (X[rows], Y[rows]), callbacks=callbacks, checkpoint=path, verbose=0)
    return model.history["loss"].tolist()


@pytest.mark.parametrize("seed", [True, False])
def test_folds_with_one_file_are_refused_and_with_a_file_each_they_are_trained(seed, tmp_path):
    path = tmp_path / "run.pt"
    fold(0, path, seed)
    with pytest.raises(CheckpointError) as raised:
        fold(1, path, seed)
    assert str(raised.value) == (
        f"{path} is the checkpoint of another fit of this process: of another model, or of another compile. Taking it "
        f"would give this fit the weights and the history of that one. Give each fit a file of its own, such as "
        f'checkpoint="run_2.pt", or delete run.pt to start anew. To resume that fit, call fit of the model that it '
        f"trained, or start the script again."
    )
    assert fold(1, tmp_path / "run_2.pt") == fold(1, None)
    path.unlink()
    fold(2, path)


def test_a_fold_after_one_that_failed_is_refused_too(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fold(0, tmp_path / "run.pt", error=True)
    fold(0, tmp_path / "run.pt")  # the same fit, begun again
    with pytest.raises(ZeroDivisionError):
        fold(0, tmp_path / "other.pt", error=True)
    (tmp_path / "run.pt").rename(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="another fit of this process"):
        fold(1, tmp_path / "other.pt")


@pytest.mark.parametrize("rate", [0.1, 0.2])
def test_a_second_phase_with_the_file_of_the_first_is_refused(rate, tmp_path):
    path = tmp_path / "run.pt"
    model = minikeras.Model(nn.Linear(2, 1))
    for phase in (1, 2):
        model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=rate), device="cpu")
        if phase == 1:
            model.fit(2, (X, Y), checkpoint=path, verbose=0)
            model.fit(
                1, (X, Y), checkpoint=path, verbose=0
            )  # a second fit of the same compile may go on
            assert len(model.history) == 3
    weight = model.net.weight.clone()
    with pytest.raises(CheckpointError, match="Give each fit a file of its own"):
        model.fit(2, (X, Y), checkpoint=path, verbose=0)
    assert torch.equal(model.net.weight, weight)
    model.fit(2, (X, Y), checkpoint=tmp_path / "run_2.pt", verbose=0)
    assert len(model.history) == 2


@pytest.mark.parametrize("change", [{"lr": 0.2}, {"dropout": 0.2}, {"weight": 0.5}], ids=str)
def test_a_sweep_with_one_file_is_refused(change, tmp_path):
    def trial(lr=0.1, dropout=0.1, weight=1.0):
        torch.manual_seed(0)
        model = minikeras.Model(
            nn.Sequential(nn.Linear(2, 4), nn.Dropout(dropout), nn.Linear(4, 1))
        )
        model.compile(
            lambda y_pred, y_true: weight * ((y_pred - y_true) ** 2).mean(),
            torch.optim.SGD(model.parameters(), lr=lr),
            device="cpu",
        )
        return model.fit(2, (X, Y), checkpoint=tmp_path / "run.pt", verbose=0)

    first = trial()
    pd.testing.assert_frame_equal(trial(), first, check_exact=True)  # the same fit once more
    with pytest.raises(CheckpointError, match="another fit of this process"):
        trial(**change)


def test_a_callback_that_writes_under_the_checkpoints_path_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"would write one file\. Give each a path of its own"):
        start(
            lambda: {
                "callbacks": lambda: [minikeras.ModelCheckpoint(tmp_path / "a" / ".." / "run.pt")]
            },
            tmp_path / "run.pt",
        )
    start(
        lambda: {"callbacks": lambda: [minikeras.ModelCheckpoint(tmp_path / "best.pt")]},
        tmp_path / "run.pt",
    )
