"""Cases of loaders: what is divided, what each process reads itself, and what the ranks draw."""

import functools
import io
import itertools
import os
import warnings

import numpy as np
import pandas as pd
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    random_split,
)
from tqdm import tqdm

from helpers.ranks.common import RANK, apart, compiled, doubles, found, row_by_row
from helpers.seeds import seed


def distributed_sampler(size):
    """The rows that a DistributedSampler repeats are counted once, and each epoch has its order."""
    results = []
    rank = 0 if size == 1 else RANK
    for dataset in (row_by_row(41), TensorDataset(*doubles(41))):
        for options in ({}, {"num_workers": 1}):
            seed()
            model = compiled()
            sampler = DistributedSampler(dataset, size, rank, seed=5)
            train = DataLoader(dataset, 12 // size, sampler=sampler, **options)
            in_order = DistributedSampler(dataset, size, rank, shuffle=False)
            val = DataLoader(dataset, 12 // size, sampler=in_order)
            assert size == 1 or sampler.total_size > len(dataset)
            dfhistory = model.fit(3, train, val, verbose=0)
            assert sampler.epoch == 2
            assert len(model.predict(val)) == 41
            results.append(found(model, dfhistory, val, evaluated=model.evaluate(val)))
    return results


def distributed_sampler_of_rows(size):
    """Without batches each row is a step of one process."""
    rank = 0 if size == 1 else RANK
    batches = [doubles(rows) for rows in (5, 6, 7)]
    dataset = Subset(batches, range(3))
    sampler = DistributedSampler(dataset, size, rank, shuffle=False)
    loader = DataLoader(dataset, batch_size=None, sampler=sampler)
    seed()
    return {"evaluated": compiled().evaluate(loader)}


class Named(DataLoader):
    """A subclass that reads as a DataLoader does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.name = "train"


def loaders_of_other_classes(size):
    """A subclass, torchdata's StatefulDataLoader and a bar around a loader are divided."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    results = []
    for make in (Named, StatefulDataLoader, in_a_bar):
        for workers in (0, 1):
            seed()
            model = compiled()
            generator = torch.Generator().manual_seed(RANK)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "'set_vital' is deprecated")
                train = make(
                    row_by_row(41),
                    12 // size,
                    shuffle=True,
                    generator=generator,
                    num_workers=workers,
                )
                val = make(row_by_row(29), 12 // size)
            dfhistory = model.fit(2, train, val, verbose=0)
            outputs = model.predict(val)
            assert len(outputs) == 29
            results.append(found(model, dfhistory, outputs=outputs, left=generator.get_state()))
    return results


def in_a_bar(*args, **kwargs):
    return tqdm(DataLoader(*args, **kwargs), file=io.StringIO())


def shown_in_a_bar(size):
    """The bar of each process shows its share, and iterates the user's loader afterwards."""
    file = io.StringIO()
    loader = DataLoader(row_by_row(41), 12 // size)
    bar = tqdm(loader, file=file)
    compiled().predict(bar)
    assert bar.iterable is loader
    return {"shown": " 4/4 " in file.getvalue()}


class Part(IterableDataset):
    """As the warning says: each process keeps a part of the rows."""

    def __iter__(self):
        rows = zip(*doubles(24), strict=True)
        size = int(os.environ.get("WORLD_SIZE", "1"))
        return itertools.islice(rows, RANK, None, size)


def part_of_an_iterable(size):
    """Nobody warns, and predict has each row once."""
    seed()
    model = compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = DataLoader(Part(), 12 // size)
        dfhistory = model.fit(2, loader, loader, verbose=0)
    return found(model, dfhistory, rows=len(model.predict(loader)))


def generator_of_a_loader_and_a_split(size):
    """The second split is drawn from where the first fit has left the generator."""
    seed()
    model = compiled()
    generator = torch.Generator().manual_seed(1)
    splits = []
    for _ in range(2):
        train, val = random_split(row_by_row(41), [30, 11], generator=generator)
        splits.append([*train.indices, *val.indices])
        loader = DataLoader(train, 12 // size, shuffle=True, generator=generator)
        dfhistory = model.fit(2, loader, DataLoader(val, 12 // size), verbose=0)
        model.evaluate(loader)
    return found(model, dfhistory, splits=splits, left=generator.get_state())


class Noisy(Dataset):
    """Draws from the global generators as it is read."""

    def __len__(self):
        return 13

    def __getitem__(self, row):
        if row % 2:
            np.random.rand()
            torch.rand(row)
        return doubles(13)[0][row], doubles(13)[1][row]


def drawn_by_a_dataset(size):
    """After evaluate and predict the processes draw the same, whatever each has read."""
    seed()
    model = compiled()
    loader = DataLoader(Noisy(), 4)
    model.evaluate(loader)
    evaluated = torch.rand(()).item(), np.random.rand()
    model.predict(loader)
    return {"apart": apart(size, (*evaluated, torch.rand(()).item(), np.random.rand()))}


def workers_that_stay(size):
    """Persistent workers are those of the first epoch in all epochs and fits."""
    seed()
    seen = set()

    def loss(y_pred, y_true):
        seen.update(y_true.flatten().tolist())
        return y_pred.mean() * 0

    model = compiled(loss_func=loss, metrics_dict={})
    train = DataLoader(Pids(), 12 // size, shuffle=True, num_workers=1, persistent_workers=True)
    model.fit(2, train, verbose=0)
    model.fit(1, train, verbose=0)
    model.evaluate(train)
    return {"workers": len(seen)}


class Pids(Dataset):
    """Labels are the process that has read the row."""

    def __len__(self):
        return 36

    def __getitem__(self, row):
        return doubles(36)[0][row], torch.tensor([float(os.getpid())])


class Wrapped:
    """A loader in an object, as prefetchers have it; or one in `size` of its batches."""

    def __init__(self, loader, rank=0, size=1):
        self.loader = loader
        self.rank = rank
        self.size = size

    def __iter__(self):
        return itertools.islice(self.loader, self.rank, None, self.size)


class Unchanged(DataLoader):
    """A subclass whose iteration may be anything."""

    def __iter__(self):
        yield from super().__iter__()


def said_by(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


def same_rows(size):
    """Return who warns of rows that all processes read."""
    model = compiled()
    rows = row_by_row(24)
    shuffled = DataLoader(rows, 4, shuffle=True)
    part = Wrapped(DataLoader(rows, 4), RANK, size)
    return [
        said_by(lambda: model.evaluate(Wrapped(DataLoader(rows, 4)))),
        said_by(lambda: model.fit(1, Wrapped(shuffled), verbose=0)),
        said_by(lambda: model.predict(Unchanged(rows, 4))),
        said_by(lambda: model.fit(2, part, part, verbose=0)),
    ]


class Holds(Dataset):
    """A dataset of arrays, or of names, one for each row."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return doubles(24)[0][row], doubles(24)[1][row]


def other_rows(size):
    """Return the errors and warnings about data that differs between the processes."""
    seed()
    X, y = doubles(24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(RANK))
    rows = TensorDataset(X, y)
    nearly = X * (1 + 1e-7 * RANK)
    data = {
        "arrays": (X[order], y[order]),
        "frames": (pd.DataFrame(X[order].numpy()), y[order].numpy()),
        "split": random_split(rows, [20, 4], torch.Generator().manual_seed(RANK))[0],
        "tensors": TensorDataset(X[order], y[order]),
        "sampler": DataLoader(row_by_row(24), 4, sampler=SubsetRandomSampler(order[:12].tolist())),
        "list": Holds([str(row) for row in order.tolist()]),
        "array": Holds(X[order].numpy()),
        "rounded": (nearly, y),
        "same": Holds([str(row) for row in range(24)]),
    }
    said = {}
    for name, dl_train in data.items():
        model = compiled()
        if name == "frames":  # which become float32
            model.float()
        before = [parameter.clone() for parameter in model.parameters()]
        try:
            told = said_by(functools.partial(model.fit, 1, dl_train, verbose=0))
            said[name] = f"warned: {told[0]}" if told else ""
        except ValueError as error:
            said[name] = str(error)
            assert all(map(torch.equal, before, model.parameters()))
    return said
