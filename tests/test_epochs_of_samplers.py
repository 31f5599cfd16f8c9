"""Samplers and datasets that shuffle by the epoch are given its number."""

import pytest
import torch
from helpers.interruptions import Stopped
from helpers.models import points
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, TensorDataset

import minikeras
from minikeras import LambdaCallback

ROWS = 24
DATA = TensorDataset(torch.arange(float(ROWS))[:, None], torch.zeros(ROWS, 1))


class Seen(minikeras.Model):
    """Keeps the rows that it has trained on."""

    def __init__(self):
        super().__init__(nn.Linear(1, 1))
        self.rows = []

    def train_step(self, features, labels):
        self.rows.append(features.flatten().int().tolist())
        return super().train_step(features, labels)


def model():
    torch.manual_seed(0)
    seen = Seen()
    seen.compile(nn.MSELoss(), torch.optim.SGD(seen.parameters(), lr=1e-4), device="cpu")
    return seen


class InBatches:
    """A batch sampler of the user's, which passes the number on."""

    def __init__(self):
        self.sampler = half()

    def set_epoch(self, epoch):
        self.sampler.set_epoch(epoch)

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(BatchSampler(self.sampler, 4, False))


class Shifted(Dataset):
    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 4

    def __getitem__(self, row):
        return torch.tensor([10.0 * self.epoch + row]), torch.zeros(1)


class Wrapper:
    """A loader round a loader, as prefetchers are."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def half():
    return DistributedSampler(range(ROWS), num_replicas=2, rank=0, shuffle=True)


class NotInMemory(Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return DATA[row]


LOADERS = {
    "sampler": lambda: DataLoader(DATA, 4, sampler=half()),
    "sampler, rows read one by one": lambda: DataLoader(NotInMemory(), 4, sampler=half()),
    "in a batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(half(), 4, False)),
    "a batch sampler": lambda: DataLoader(DATA, batch_sampler=InBatches()),
    "in a wrapper": lambda: Wrapper(DataLoader(DATA, 4, sampler=half())),
    "in workers": lambda: DataLoader(NotInMemory(), 4, sampler=half(), num_workers=1),
}


def by_hand(epochs):
    """The batches of a hand-written loop."""
    sampler = half()
    rows = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        order = list(sampler)
        rows += [order[start : start + 4] for start in range(0, len(order), 4)]
    return rows


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_set_epoch_gives_each_epoch_the_order_of_a_hand_written_loop_over_several_fits(make):
    seen = model()
    loader = make()
    seen.fit(2, loader, verbose=0)
    seen.fit(2, loader, verbose=0)
    assert seen.rows == by_hand([0, 1, 2, 3])


def test_set_epoch_of_a_dataset_gets_the_number_for_training_and_for_validation():
    seen = model()
    dataset = Shifted()
    validated = Shifted()
    numbers = []
    look = LambdaCallback(on_evaluate_begin=lambda: numbers.append(validated.epoch))
    seen.fit(3, DataLoader(dataset, 4), DataLoader(validated, 4), callbacks=[look], verbose=0)
    assert [rows[0] for rows in seen.rows] == [0, 10, 20]
    assert numbers == [0, 1, 2]


def test_set_epoch_of_a_callback_is_the_one_that_counts():
    seen = model()
    loader = LOADERS["sampler"]()
    callback = LambdaCallback(on_epoch_begin=lambda epoch: loader.sampler.set_epoch(100 + epoch))
    seen.fit(2, loader, callbacks=[callback], verbose=0)
    assert seen.rows == by_hand([101, 102])


@pytest.mark.parametrize("steps", [None, 2], ids=["whole epochs", "epochs of 2 batches of 3"])
@pytest.mark.parametrize("name", ["sampler", "sampler, rows read one by one", "in workers"])
@pytest.mark.parametrize("stop_at", [2, 4, 5, 6])
def test_set_epoch_gives_a_resumed_fit_the_order_of_one_never_stopped(
    tmp_path, name, steps, stop_at
):
    def fit(path, stop_at=None):
        seen = model()

        def stop(batch, logs):
            if len(seen.rows) == stop_at:
                raise Stopped

        options = {"checkpoint": path, "checkpoint_every": 1, "steps_per_epoch": steps}
        try:
            callbacks = [LambdaCallback(on_batch_end=stop)]
            seen.fit(4, LOADERS[name](), callbacks=callbacks, verbose=0, **options)
        except Stopped:
            pass
        return seen

    whole = fit(tmp_path / "whole.pt")
    broken = fit(tmp_path / "run.pt", stop_at)
    resumed = fit(tmp_path / "run.pt")
    done = stop_at - 1  # the batch at which it stopped was not saved
    assert broken.rows[:done] + resumed.rows == whole.rows
    assert torch.equal(resumed.net.weight, whole.net.weight)


def test_set_epoch_that_is_missing_changes_nothing():
    X, y = points(8)
    plain = minikeras.Model(nn.Linear(2, 1))
    plain.compile(nn.MSELoss(), device="cpu")
    assert len(plain.fit(2, (X, y), verbose=0)) == 2
