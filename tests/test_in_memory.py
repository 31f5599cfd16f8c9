"""Batches fetched whole are those of the loader, with the same random states after them."""

import itertools
import random

import numpy as np
import pytest
import torch
from helpers.seeds import seeded
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

from minikeras.data import in_memory
from minikeras.data.in_memory import InMemoryBatches, gathered, is_in_memory
from minikeras.support import loaders

ROWS = 23


class DrawsAllTheTime(Sampler):
    """Draw from the global generator when iteration begins, at each row, and at its end."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __iter__(self):
        torch.rand(1)
        return self.numbers()

    def numbers(self):
        for _ in range(self.rows):
            yield int(torch.randint(self.rows, (1,)))
        torch.rand(1)


class DrawsAfterItsEnd(DrawsAllTheTime):
    def __iter__(self):
        self.left = 4
        return self

    def __next__(self):
        start = int(torch.randint(self.rows - 3, (1,)))
        self.left -= 1
        if self.left < 0:
            raise StopIteration
        return [start, start + 2]


class Backwards(BatchSampler):
    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


class OneListAgainAndAgain:
    """A batch sampler that is no Sampler, and yields one list that it fills again."""

    def __len__(self):
        return 5

    def __iter__(self):
        rows = []
        for start in range(5):
            rows[:] = range(start, 2 * start + 1)
            yield rows


def tensors(rows=ROWS):
    X = torch.arange(rows * 3.0).reshape(rows, 3)
    return X, torch.arange(rows) % 2 == 0, X[:, 0].to(torch.int16)


def plain(rows=ROWS):
    return TensorDataset(*tensors(rows))


def images():
    X = torch.randn(ROWS, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    return TensorDataset(
        X.to(memory_format=torch.channels_last), X.transpose(1, 3), X[:, :, ::2], X[:1].expand_as(X)
    )


DATASETS = {
    "tensors": plain,
    "images": images,
    "one column": lambda: TensorDataset(torch.arange(ROWS)),
    "rows of nothing": lambda: TensorDataset(torch.zeros(ROWS, 0), torch.arange(ROWS)),
    "tuple": lambda: StackDataset(*tensors()),
    "dict": lambda: StackDataset(**dict(zip(("X", "y", "z"), tensors(), strict=True))),
    "list": lambda: Subset(plain(), list(range(3, 20))),
    "tensor": lambda: Subset(plain(), torch.randperm(ROWS, generator=seeded(7))),
    "numpy": lambda: Subset(plain(), np.arange(20, 3, -1, dtype=np.int32)),
    "range": lambda: Subset(plain(), range(0, ROWS, 2)),
    "negative, repeated": lambda: Subset(plain(), (5, -1, -1, 5, -23, 0, 2, -2, 8)),
    "nested": lambda: Subset(
        Subset(plain(), torch.arange(22, 2, -1)), [-1, 0, 3, 3, -5, 10, 2, 7, 1]
    ),
    "nested dict": lambda: random_split(StackDataset(a=tensors()[0]), [9, 14], generator=seeded(7))[
        1
    ],
}
SAMPLING = {
    "in order": lambda d: {},
    "shuffle": lambda d: {"shuffle": True},
    "drop_last": lambda d: {"shuffle": True, "drop_last": True},
    "own generator": lambda d: {"shuffle": True, "generator": seeded(7)},
    "own generator, drop_last": lambda d: {
        "shuffle": True,
        "generator": seeded(7),
        "drop_last": True,
    },
    "generator of the loader alone": lambda d: {
        "sampler": RandomSampler(d),
        "generator": seeded(7),
    },
    "generator of the sampler alone": lambda d: {"sampler": RandomSampler(d, generator=seeded(7))},
    "replacement": lambda d: {"sampler": RandomSampler(d, replacement=True)},
    "replacement, generator": lambda d: {
        "sampler": RandomSampler(d, replacement=True, generator=seeded(7))
    },
    "fewer samples": lambda d: {"sampler": RandomSampler(d, num_samples=5)},
    "more samples": lambda d: {"sampler": RandomSampler(d, num_samples=2 * len(d) + 3)},
    "weighted": lambda d: {"sampler": WeightedRandomSampler(torch.arange(len(d)) + 1.0, 40)},
    "weighted, generator": lambda d: {
        "sampler": WeightedRandomSampler([1.0] * len(d), 40, generator=seeded(7))
    },
    "subset sampler": lambda d: {"sampler": SubsetRandomSampler([0, 5, -1, 2, 2])},
    "subset sampler, generator": lambda d: {
        "sampler": SubsetRandomSampler(range(8), generator=seeded(7))
    },
    "distributed": lambda d: {"sampler": DistributedSampler(d, num_replicas=2, rank=1)},
    "list as sampler": lambda d: {"sampler": [3, 1, -2, 1]},
    "sequential over less": lambda d: {"sampler": SequentialSampler(range(7))},
    "draws all the time": lambda d: {"sampler": DrawsAllTheTime(len(d))},
    "batch sampler": lambda d: {"batch_sampler": BatchSampler(RandomSampler(d), 3, True)},
    "batch sampler that draws": lambda d: {
        "batch_sampler": BatchSampler(DrawsAllTheTime(len(d)), 3, False)
    },
    "batch sampler, draws after its end": lambda d: {"batch_sampler": DrawsAfterItsEnd(len(d))},
    "BatchSampler subclass": lambda d: {"batch_sampler": Backwards(RandomSampler(d), 4, False)},
    "list as batch sampler": lambda d: {"batch_sampler": [[1, 2], [-1], [0, 0, 3]]},
    "NumPy arrays as batch sampler": lambda d: {
        "batch_sampler": np.array_split(np.arange(len(d)), 3)
    },
    "tensors as batch sampler": lambda d: {"batch_sampler": torch.arange(len(d)).split(4)},
    "one list again and again": lambda d: {"batch_sampler": OneListAgainAndAgain()},
    "tensors as rows": lambda d: {"sampler": list(torch.tensor([1, 0, 4]))},
}


def loader_of(dataset, sampling, num_workers=0, batch_size=4, **kwargs):
    data = plain(300) if dataset == "many rows" else DATASETS[dataset]()
    options = SAMPLING[sampling](data) | kwargs
    if "batch_sampler" not in options:
        options["batch_size"] = batch_size
    return DataLoader(data, num_workers=num_workers, **options)


def seen(batches, epochs=3, stop=None, draw=False):
    """Return batches of some epochs, the second cut short after `stop`, and the random states."""
    torch.manual_seed(3)
    for epoch in range(epochs):
        iterator = iter(batches)
        if draw:
            yield torch.rand(1)
        for batch in itertools.islice(iterator, stop if epoch == 1 else None):
            yield batch
            if draw:
                yield torch.rand(1)
        del iterator
        yield torch.get_rng_state()
        yield from states(getattr(batches, "loader", batches))


def states(loader):
    owners = [
        loader,
        loader.sampler,
        loader.batch_sampler,
        getattr(loader.batch_sampler, "sampler", None),
    ]
    return [
        owner.generator.get_state()
        for owner in owners
        if getattr(owner, "generator", None) is not None
    ]


def facts(batch):
    """All that can be told of a batch: containers, values, dtypes, strides."""
    if isinstance(batch, dict):
        return [dict, *((name, facts(part)) for name, part in batch.items())]
    if isinstance(batch, (tuple, list)):
        return [type(batch), *map(facts, batch)]
    return batch.dtype, batch.shape, batch.stride(), batch.numpy().tobytes()


def assert_alike(make, **kwargs):
    loader = make()
    assert is_in_memory(loader)
    expected = list(map(facts, seen(make(), **kwargs)))
    found = list(map(facts, seen(InMemoryBatches(loader), **kwargs)))
    assert found == expected
    assert len(expected) > 1


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("dataset", DATASETS)
def test_in_memory_batches_and_random_states_are_those_of_the_loader(dataset, sampling):
    assert_alike(lambda: loader_of(dataset, sampling), draw=sampling == "more samples")


@pytest.mark.parametrize("draw", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_in_memory_batches_are_the_same_after_a_break_and_draws_in_mid_epoch(sampling, stop, draw):
    assert_alike(lambda: loader_of("list", sampling), stop=stop, draw=draw)


# without the list that is filled anew: which of its contents a worker gets is a race in torch
@pytest.mark.parametrize(
    "sampling", [name for name in SAMPLING if name != "one list again and again"]
)
def test_in_memory_loader_with_workers_draws_the_same_though_none_is_started(sampling):
    assert_alike(
        lambda: loader_of("nested", sampling, 1, prefetch_factor=2), epochs=2, stop=1, draw=True
    )


@pytest.mark.parametrize("dataset", ["images", "nested dict"])
def test_in_memory_loader_with_workers_may_prefetch_more_than_there_are_batches(dataset):
    assert_alike(
        lambda: loader_of(dataset, "draws all the time", 2, prefetch_factor=9),
        epochs=2,
        stop=2,
        draw=True,
    )


@pytest.mark.parametrize("batch_size", [3, 16, 33, 64, 100, 299, 300, 301])
@pytest.mark.parametrize("block", [1, 4096, 2**18])
@pytest.mark.parametrize("sampling", ["in order", "shuffle", "drop_last", "more samples"])
def test_in_memory_batches_are_the_same_for_any_batch_size_and_block(
    monkeypatch, batch_size, block, sampling
):
    monkeypatch.setattr(in_memory, "BLOCK", block)
    assert_alike(lambda: loader_of("many rows", sampling, batch_size=batch_size), epochs=2, stop=1)


@pytest.mark.parametrize("dataset", ["tensors", "dict"])
def test_in_memory_sampler_of_lists_gives_batches_of_lists(dataset):
    data = DATASETS[dataset]()
    assert_alike(lambda: DataLoader(data, sampler=BatchSampler(SequentialSampler(data), 4, False)))


def test_in_memory_order_is_the_loaders_if_a_later_torch_shuffles_in_another_way(monkeypatch):
    monkeypatch.setattr(loaders, "_shuffles_as_we_do", lambda: False)
    assert_alike(lambda: loader_of("many rows", "shuffle"))


def test_in_memory_order_knows_how_the_installed_torch_shuffles():
    before = torch.get_rng_state()
    loaders._shuffles_as_we_do.cache_clear()
    assert loaders._shuffles_as_we_do()
    assert torch.equal(before, torch.get_rng_state())


def test_in_memory_batches_leave_the_random_states_of_python_and_numpy_alone():
    before = random.getstate(), repr(np.random.get_state())
    for sampling in SAMPLING:
        list(InMemoryBatches(loader_of("list", sampling, 2)))
    assert (random.getstate(), repr(np.random.get_state())) == before


def test_in_memory_batches_start_no_worker(monkeypatch):
    monkeypatch.setattr(
        torch.multiprocessing.Process, "start", lambda self: pytest.fail("a worker was started")
    )
    assert len(list(InMemoryBatches(loader_of("list", "shuffle", 2)))) == 5


def test_in_memory_data_changed_between_epochs_is_in_the_next_one():
    X = torch.zeros(200, 1)
    dataset = Subset(TensorDataset(X), list(range(100)))
    batches = InMemoryBatches(DataLoader(dataset, batch_size=10))
    assert sum(batch.sum() for (batch,) in batches) == 0
    X[100] = 1
    dataset.indices[7] = 100
    assert sum(batch.sum() for (batch,) in batches) == 1
    dataset.dataset.tensors = (torch.full((200, 1), 2.0),)
    assert sum(batch.sum() for (batch,) in batches) == 200


def test_in_memory_batches_have_a_length_and_their_loader():
    loader = loader_of("list", "drop_last")
    assert len(InMemoryBatches(loader)) == len(loader) == 4
    assert InMemoryBatches(loader).loader is loader


@pytest.mark.parametrize("sampling", ["in order", "own generator"])
def test_in_memory_batches_may_be_written_into(sampling):
    loader = loader_of("many rows", sampling)
    before = [tensor.clone() for tensor in loader.dataset.tensors]
    expected = [facts(batch) for batch in seen(loader, epochs=1)]
    batches = list(seen(InMemoryBatches(loader_of("many rows", sampling)), epochs=1))
    for number, batch in enumerate(batches[:75]):
        assert facts(batch) == expected[number]
        for tensor in batch:
            tensor.zero_()
    assert all(map(torch.equal, loader.dataset.tensors, before))


def test_in_memory_batches_may_be_changed_in_place_by_a_layer():
    scale = nn.Parameter(torch.ones(1))
    first, second = itertools.islice(InMemoryBatches(loader_of("many rows", "shuffle")), 2)
    kept = (first[0] * scale.exp()).sum()
    second[0].mul_(scale).sum().backward()  # an error on views of one block
    kept.backward()  # an error where batches share one count of changes
    assert not first[0].requires_grad


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_in_memory_batches_are_aligned_as_memory_of_their_own(dtype, shuffle):
    # a matrix product differs in its last bit from one alignment to another
    dataset = TensorDataset(torch.zeros(500, 3, dtype=dtype), torch.zeros(500, 1))
    for batch in InMemoryBatches(DataLoader(dataset, batch_size=33, shuffle=shuffle)):
        assert [tensor.data_ptr() % 64 for tensor in batch] == [0, 0]


# --- what is left as it is ------------------------------------------------------------------------


class OwnLoader(DataLoader):
    def __iter__(self):
        return iter([])


class OwnDataset(TensorDataset):
    def __getitem__(self, row):
        return tuple(part + 1 for part in super().__getitem__(row))


class OwnSubset(Subset):
    pass


class OwnTensor(torch.Tensor):
    pass


class Rows(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, row):
        return torch.zeros(1), torch.zeros(1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(3, 1))


X = torch.zeros(6, 2)
LEFT = {
    "no loader": lambda: [(X, X)],
    "a subclass of DataLoader": lambda: OwnLoader(plain()),
    "a subclass of TensorDataset": lambda: DataLoader(OwnDataset(X)),
    "a Subset of a subclass": lambda: DataLoader(Subset(OwnDataset(X), [1])),
    "a subclass of Subset": lambda: DataLoader(OwnSubset(plain(), [1])),
    "a dataset of one's own": lambda: DataLoader(Rows()),
    "an IterableDataset": lambda: DataLoader(Stream()),
    "a ConcatDataset": lambda: DataLoader(ConcatDataset([plain(), plain()])),
    "a list of rows": lambda: DataLoader([(X[0], X[1])]),
    "a StackDataset of datasets": lambda: DataLoader(StackDataset(plain(), plain())),
    "a StackDataset of arrays": lambda: DataLoader(StackDataset(X.numpy(), X.numpy())),
    "a collate_fn of one's own": lambda: DataLoader(
        plain(), collate_fn=lambda rows: default_collate(rows)
    ),
    "a worker_init_fn": lambda: DataLoader(plain(), num_workers=1, worker_init_fn=print),
    "persistent workers": lambda: DataLoader(plain(), num_workers=1, persistent_workers=True),
    "batches out of order": lambda: DataLoader(plain(), num_workers=1, in_order=False),
    "no batching": lambda: DataLoader(plain(), batch_size=None),
    "a timeout without workers": lambda: DataLoader(plain(), timeout=1),
    "nothing fetched ahead": lambda: DataLoader(plain(), num_workers=1, prefetch_factor=0),
    "a Parameter": lambda: DataLoader(TensorDataset(nn.Parameter(X))),
    "a tensor with a gradient": lambda: DataLoader(TensorDataset(X.clone().requires_grad_())),
    "a subclass of Tensor": lambda: DataLoader(TensorDataset(X.as_subclass(OwnTensor))),
    "a sparse tensor": lambda: DataLoader(TensorDataset(X.to_sparse())),
    "a mask as indices": lambda: DataLoader(Subset(plain(), [True, False])),
    "a boolean tensor as indices": lambda: DataLoader(Subset(plain(), torch.ones(ROWS) > 0)),
    "labels of one's own as indices": lambda: DataLoader(Subset(plain(), {0: 1, 1: 0})),
    "a table of indices": lambda: DataLoader(Subset(plain(), torch.zeros(2, 2, dtype=torch.int64))),
    "indices of no row": lambda: DataLoader(Subset(plain(), [0, ROWS])),
    "no indices": lambda: DataLoader(Subset(plain(), [])),
}


@pytest.mark.parametrize("kind", LEFT)
def test_in_memory_is_not_used_for_loaders_with_custom_parts(kind):
    assert not is_in_memory(LEFT[kind]())


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 5},
        {"multiprocessing_context": "spawn"},
        {"prefetch_factor": 3},
        {"pin_memory": True},
    ],
)
def test_in_memory_ignores_options_of_workers(options):
    loader = DataLoader(plain(), batch_size=4, num_workers=2, **options)
    assert is_in_memory(loader)
    assert len(list(InMemoryBatches(loader))) == 6


@pytest.mark.parametrize("rows", [[-24], [23], [[]]])
@pytest.mark.parametrize("key", ["sampler", "batch_sampler"])
def test_in_memory_row_that_does_not_exist_is_an_index_error(rows, key):
    loader = DataLoader(plain(), **{key: rows if key == "sampler" or not rows[0] else [rows]})
    for batches in (loader, InMemoryBatches(loader)):
        if key == "sampler" and rows == [[]]:
            assert next(iter(batches))[0].shape == (1, 0, 3)
        else:
            with pytest.raises(IndexError):
                next(iter(batches))


# --- arrays handed in, devices --------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 100, 1000])
def test_in_memory_rows_are_gathered_in_their_order_unless_one_is_given(batch_size):
    whole = tensors(700)
    order = torch.randperm(700)
    for given, rows in ((None, torch.arange(700)), (order, order)):
        batches = list(gathered(list(whole), given, batch_size))
        assert [len(batch[0]) for batch in batches] == [
            len(part) for part in rows.split(batch_size)
        ]
        for tensor, parts in zip(whole, zip(*batches, strict=True), strict=True):
            assert torch.equal(torch.cat(parts), tensor[rows])
            assert all(
                part.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
                for part in parts
            )


def test_in_memory_data_without_rows_gives_no_batch():
    assert list(gathered([torch.zeros(0, 2)], None, 4)) == []


def test_in_memory_data_that_is_trained_gets_its_gradient():
    X = torch.ones(100, 2, requires_grad=True)
    for (batch,) in gathered([X], None, 10):
        batch.sum().backward()
    assert torch.equal(X.grad, torch.ones(100, 2))


@pytest.mark.parametrize("sampling", ["shuffle", "own generator"])
def test_in_memory_batches_come_on_the_device(sampling):
    loader = loader_of("dict", sampling)
    shapes = [{name: part.shape for name, part in batch.items()} for batch in loader]
    batches = list(InMemoryBatches(loader, torch.device("meta")))
    assert [{name: part.shape for name, part in batch.items()} for batch in batches] == shapes
    assert all(part.is_meta for batch in batches for part in batch.values())


@pytest.mark.parametrize(
    ("free", "rows", "moved"),
    [(400, 10, True), (399, 10, False), (10**9, 5, True), (10**9, 4, False)],
)
def test_in_memory_data_moves_to_the_device_only_if_it_fits_and_half_is_used(
    monkeypatch, free, rows, moved
):
    class Tracked(torch.Tensor):
        def to(self, device):
            return f"on {device}"

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    data = [
        torch.zeros(10, 2).as_subclass(Tracked),
        torch.zeros(10, dtype=torch.int16).as_subclass(Tracked),
    ]
    found = in_memory.resident(data, rows, torch.device("cuda"))
    assert found == ["on cuda", "on cuda"] if moved else found[0] is data[0]


@pytest.mark.gpu
@pytest.mark.parametrize("free", [0, 10**12])
@pytest.mark.parametrize("sampling", ["shuffle", "own generator", "drop_last"])
@pytest.mark.parametrize("dataset", ["many rows", "images", "nested"])
def test_in_memory_batches_on_a_gpu_are_those_of_the_loader(monkeypatch, dataset, sampling, free):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    expected = list(seen(loader_of(dataset, sampling)))
    found = list(seen(InMemoryBatches(loader_of(dataset, sampling), torch.device("cuda"))))
    assert all(part.is_cuda for part in found[0])
    cpu = [[part.cpu() for part in batch] if isinstance(batch, list) else batch for batch in found]
    assert [facts(batch) for batch in cpu] == [facts(batch) for batch in expected]
