"""The order of rows: resumed on another number of processes, and drawn differently in each."""

import contextlib
import os
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    TensorDataset,
)

import minikeras
from helpers.compare import copy_weights
from helpers.datasets import Rows
from helpers.ranks.common import RANK
from helpers.samplers import Pool
from helpers.seeds import seed

ROWS = 26
STEP = 6  # rows of all processes together
X = torch.arange(float(ROWS)).reshape(-1, 1)
Y = torch.zeros(ROWS, 1)


class Recorded(minikeras.Model):
    """A model that notes the rows that it is trained on; of a filler none."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)
        self.rows = []

    def forward(self, x):
        if self.training:
            is_filler = self._run.phase.batch.is_filler
            self.rows.append([] if is_filler else x[:, 0].int().tolist())
        return self.fc(x)


def compiled(**kwargs):
    seed()
    model = Recorded()
    model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), 1e-4), device="cpu", **kwargs)
    return model


def generator():
    return torch.Generator().manual_seed(5)


class Counting(Sampler):
    """A sampler that shuffles by the number of its passes, which it counts at their end."""

    def __init__(self):
        self.passes = 0

    def __len__(self):
        return ROWS

    def __iter__(self):
        yield from torch.randperm(ROWS, generator=torch.Generator().manual_seed(self.passes))
        self.passes += 1


class OwnPool(Pool):
    """A sampler that draws row by row, from a generator of its own."""

    def __init__(self, rows):
        super().__init__(rows)
        self.generator = np.random.default_rng(3)

    def __iter__(self):
        left = list(range(self.rows))
        while left:
            yield left.pop(int(self.generator.integers(len(left))))


def with_replacement(data, size):
    sampler = RandomSampler(data, replacement=True, num_samples=50, generator=generator())
    return DataLoader(data, size, sampler=sampler)


IN_MEMORY = TensorDataset(X, Y)
BY_ROWS = Rows(X, Y)
LOADERS = {
    "in memory": lambda size: DataLoader(IN_MEMORY, size, shuffle=True, generator=generator()),
    "rows": lambda size: DataLoader(BY_ROWS, size, shuffle=True, generator=generator()),
    "drop_last": lambda size: DataLoader(
        BY_ROWS, size, shuffle=True, generator=generator(), drop_last=True
    ),
    "no generator": lambda size: DataLoader(BY_ROWS, size, shuffle=True),
    "with replacement": lambda size: with_replacement(IN_MEMORY, size),
    "global draws": lambda size: DataLoader(BY_ROWS, size, sampler=Pool(ROWS)),
    "own draws": lambda size: DataLoader(BY_ROWS, size, sampler=OwnPool(ROWS)),
    "counting": lambda size: DataLoader(IN_MEMORY, size, sampler=Counting()),
}


def steps_of(size, name, together, file=None, stop=None):
    """Return the rows of each step of a fit of 3 epochs, of all processes or of one alone.

    It may be interrupted in a step, whose state is not in the file.
    """
    model = compiled(distributed="auto" if together else None)

    def interrupt(batch, logs):
        if len(model.rows) == stop:
            raise InterruptedError

    callbacks = []
    if stop is not None:
        callbacks = [minikeras.LambdaCallback(on_batch_end=interrupt)]
    kwargs = {} if file is None else {"checkpoint": file, "checkpoint_every": 1}
    loader = LOADERS[name](STEP // size if together else STEP)
    with contextlib.suppress(InterruptedError):
        model.fit(3, loader, callbacks=callbacks, verbose=0, **kwargs)
    if not together:
        return model.rows
    parts = [None] * size
    dist.all_gather_object(parts, model.rows)
    return [[*chain(*step)] for step in zip(*parts, strict=True)]


def wrong_orders(size, stops, ways):
    """Name the loaders and ways of which the rest of a resumed fit has other rows.

    A way is two letters: N if all processes train together, 1 if each trains alone, before the
    interruption and after it.
    """
    folder = Path(os.environ["FOLDER"])
    compiled()  # creates the process group
    wrong = []
    for name in LOADERS:
        expected = steps_of(size, name, together=False)
        for stop, way in product(stops, ways):
            key = f"{name} {stop} {way}"
            together = [letter == "N" for letter in way]
            first, second = (
                folder / f"{key} {part} {0 if is_shared else RANK}.pt"
                for part, is_shared in enumerate(together)
            )
            steps_of(size, name, together[0], first, stop)
            dist.barrier()
            if RANK == 0 or not together[1]:
                second.write_bytes(first.read_bytes())
            dist.barrier()
            if steps_of(size, name, together[1], second) != expected[stop - 1 :]:
                wrong.append(key)
    return wrong


def resumed_orders(size):
    """Return what is wrong on another number of processes."""
    return wrong_orders(size, (3, 6), ("1N", "N1"))


def all_resumed_orders(size):
    """Return what is wrong on the same number of processes as well."""
    return wrong_orders(size, (4, 6), ("11", "1N", "N1", "NN"))


# --- drawn differently ----------------------------------------------------------------------------


class Fresh(Sampler):
    """A sampler with new entropy in each process, from the second pass on if `late`."""

    def __init__(self, late=False):
        self.late = late

    def __len__(self):
        return 24

    def __iter__(self):
        rows = np.random.default_rng(1 if self.late else RANK).permutation(24)
        self.late = False
        return iter(rows.tolist())


class ByRank(Sampler):
    """A sampler that gives each process its share."""

    def __len__(self):
        return 24 // dist.get_world_size()

    def __iter__(self):
        return iter(range(RANK, 24, dist.get_world_size()))


class BatchesByRank(ByRank):
    """A batch sampler that gives each process its share."""

    def __len__(self):
        return 12 // dist.get_world_size()

    def __iter__(self):
        return iter([[row, row + 12] for row in super().__iter__() if row < 12])


def declared(sampler):
    """Return a sampler that says that it gives each process its share."""
    sampler.num_replicas = dist.get_world_size()
    return sampler


def distributed(**kwargs):
    return DistributedSampler(DATA, **kwargs)


DATA = TensorDataset(X[:24], Y[:24])
DIFFERENT = {
    "fresh": lambda: DataLoader(DATA, 3, sampler=Fresh()),
    "late": lambda: DataLoader(DATA, 3, sampler=Fresh(late=True)),
    "by rank": lambda: DataLoader(DATA, 3, sampler=ByRank()),
    "batches by rank": lambda: DataLoader(DATA, batch_sampler=BatchesByRank()),
    "no batches": lambda: DataLoader(
        DATA, batch_size=None, sampler=BatchSampler(Fresh(), 3, drop_last=False)
    ),
    "seed": lambda: DataLoader(DATA, 3, sampler=distributed(seed=RANK)),
    "shuffle": lambda: DataLoader(DATA, 3, sampler=distributed(shuffle=RANK == 0)),
    "declared": lambda: DataLoader(DATA, 3, sampler=declared(ByRank())),
    "batches declared": lambda: DataLoader(DATA, batch_sampler=declared(BatchesByRank())),
    "alike": lambda: DataLoader(DATA, 3, sampler=list(reversed(range(24)))),
}


def different_orders(size):
    """Return what is said of each sampler, whether weights are the first ones, and the rows."""
    said = {}
    for name, make in DIFFERENT.items():
        model = compiled()
        before = copy_weights(model)
        try:
            model.fit(3, make(), verbose=0)
            message = "nothing"
        except ValueError as error:
            message = str(error)
        same = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        parts = [None] * size
        dist.all_gather_object(parts, [*chain(*model.rows)])
        said[name] = [message, same, sorted(chain(*parts))]
    return said


def messages_of_orders(size):
    """Return the small messages of a fit, with torch's sampler and with a custom one."""
    counts = []
    # an agreement after each batch: otherwise their number depends on the time
    callbacks = [minikeras.LambdaCallback(on_batch_end=lambda batch, logs: None)]
    for sampler in (RandomSampler(DATA), Pool(24)):
        model = compiled()
        for _ in range(2):
            before = model._run.world.channel.messages
            loader = DataLoader(DATA, 3, sampler=sampler)
            model.fit(3, loader, callbacks=callbacks, verbose=0)
        counts.append(model._run.world.channel.messages - before)
    return counts


# --- within another fit ---------------------------------------------------------------------------


def draws_around_other_models(size):
    """Tell for each verb of another model, called in a fit, in which batches ranks draw alike."""
    found = {}
    for verb in ("predict", "evaluate", "fit"):
        model, other = compiled(), compiled()
        calls = {
            "predict": lambda other=other: other.predict(X),
            "evaluate": lambda other=other: other.evaluate((X, Y)),
            "fit": lambda other=other: other.fit(1, (X, Y), verbose=0),
        }
        numbers = []

        def call(batch, logs, numbers=numbers, act=calls[verb]):
            act()
            numbers.append(torch.rand(1).item())

        callback = minikeras.LambdaCallback(on_batch_end=call)
        model.fit(1, (X, Y), batch_size=4, callbacks=[callback], verbose=0)
        numbers.append(torch.rand(1).item())  # after the fit
        parts = [None] * size
        dist.all_gather_object(parts, numbers)
        found[verb] = [len(set(drawn)) == 1 for drawn in zip(*parts, strict=True)]
        found[f"{verb}, repeated"] = len(set(numbers)) < len(numbers)
    return found
