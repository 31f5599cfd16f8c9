"""Whatever the user has -> batches of (features, labels, sample_weight) on the device.

    DataLoader, or any re-iterable of batches    iterated as it is
    Dataset                                      a DataLoader round it
    (X, y), (X, y, sample_weight) or X           of tensors, NumPy arrays, DataFrames, Series: rows cut into batches

nests.py        what batches are made of
arrays.py       from one array or DataFrame to the rows that batches are cut from
sources.py      from what the user has to batches
in_memory.py    the batches of a loader over tensors, fetched whole
sharded.py      one process's part, where there are several
position.py     how far an iteration has come, and carried on from there
batch.py        from a batch to what the step takes
"""

from minikeras.data.batch import call_as, call_with, choose_device, count_rows, join, manner, placed, to_device, unpack
from minikeras.data.nests import leaves, map_leaves, parts
from minikeras.data.position import Positioned, warn_of_hidden_draws
from minikeras.data.sharded import Idle, seeded, sharded, worked
from minikeras.data.sources import ContinuedBatches, as_batches, empty, is_batched, length

__all__ = [
    "ContinuedBatches",
    "Idle",
    "Positioned",
    "as_batches",
    "call_as",
    "call_with",
    "choose_device",
    "count_rows",
    "empty",
    "is_batched",
    "join",
    "leaves",
    "length",
    "manner",
    "map_leaves",
    "parts",
    "placed",
    "seeded",
    "sharded",
    "to_device",
    "unpack",
    "warn_of_hidden_draws",
    "worked",
]
