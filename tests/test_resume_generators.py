"""Generators, counters and positions that a checkpoint holds, and warnings of the rest."""

import random
import sys
import types

import numpy as np
import pytest
import torch
from helpers.datasets import AsItGoes, ShuffledPairs
from helpers.exact import (
    GENERATORS,
    Jitter,
    Transformed,
    X,
    Y,
    assert_exact,
    dropped_out,
    loader,
    start,
)
from helpers.interruptions import Killed
from helpers.samplers import Buckets, Pool
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
from minikeras.support.reachable import reachable

pytestmark = pytest.mark.usefixtures("quick_disk")

SHARED = np.random.default_rng(4)


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
def test_checkpoint_holds_what_draws_or_counts_wherever_it_is(kind, tmp_path):
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
def test_checkpoint_of_a_custom_iterable_is_exact_without_a_warning(kind, tmp_path):
    assert_exact(lambda: {"net": dropped_out, "data": ITERABLES[kind]}, tmp_path, kills=(2, 3, 5))


def test_checkpoint_warns_of_a_position_that_it_cannot_hold_as_the_fit_begins(
    tmp_path, monkeypatch
):
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
        "dl_train is a Stream, which has no state_dict: a checkpoint cannot save its position. A "
        "run that resumes in the middle of an epoch reads the batches already seen again and "
        "skips them; it is exact only if they are the same as before. Give it the methods "
        "state_dict and load_state_dict, or use a Dataset with __getitem__."
    ]


class Unseeded(Stream):
    def __iter__(self):
        self.rng = np.random.default_rng(UNSEEDED.pop())  # as default_rng() gives
        return super().__iter__()


UNSEEDED = []


def test_resumed_fit_warns_of_batches_that_differ_when_they_are_read_again(tmp_path):
    path = tmp_path / "run.pt"
    UNSEEDED[:] = range(20)
    with pytest.raises(Killed):
        start(lambda: {"data": lambda: DataLoader(Unseeded(), 20)}, path, kill=1)
    with pytest.warns(UserWarning, match="different batches") as told:
        start(lambda: {"data": lambda: DataLoader(Unseeded(), 20)}, path)
    assert [str(warning.message) for warning in told] == [
        "dl_train gives different batches when it is read again: the checkpoint was written in "
        "the middle of an epoch, and the first batch of that epoch is different now. The batches "
        "that are skipped are not those that were trained on. Draw from a generator that is an "
        "attribute, seeded where the script creates it; or give dl_train the methods state_dict "
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
def test_checkpoint_warns_of_an_iterator_inside_a_dataset_by_name(dataset, name, tmp_path):
    with pytest.warns(
        UserWarning, match=rf"dl_train\.dataset\.{name} has a position or a random state"
    ) as told:
        start(lambda: {"data": lambda: loader(dataset())}, tmp_path / "run.pt", epochs=1)
    assert len(told) == 1


def test_checkpoint_does_not_walk_through_large_data(tmp_path):
    class Files(Dataset):
        def __init__(self):
            self.samples = [(f"{row}.png", row % 2) for row in range(300_000)]

        def __len__(self):
            return 20

        def __getitem__(self, row):
            return X[row], Y[row]

    found = list(reachable({"data": Files()}))
    assert len(found) < 100
