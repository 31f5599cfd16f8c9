"""Whatever the user has -> batches of (features, labels, sample_weight) on the device.

    DataLoader, or any re-iterable of batches    iterated as it is
    Dataset                                      a DataLoader round it
    (X, y), (X, y, sample_weight) or X           of tensors, NumPy arrays, DataFrames, Series: rows cut into batches

nests.py        what batches are made of
arrays.py       from one array or DataFrame to the rows that batches are cut from
sources.py      from what the user has to batches
in_memory.py    the batches of a loader over tensors, fetched whole
sharded.py      one process's part, where there are several
endless.py      the first batches of a pass, and data that may never end
epochs.py       the epoch's number, for samplers that shuffle by it
peek.py         the first batch of what is in memory
position.py     how far an iteration has come, and carried on from there
checksums.py    whether batches that are read again are the same
batch.py        from a batch to what the step takes
rows.py         how many rows a batch has
joining.py      the outputs of many batches as those of all rows
"""

from minikeras.data.batch import (
    call_as,
    call_with,
    choose_device,
    manner,
    placed,
    to_device,
    unpack,
)
from minikeras.data.checksums import SAMPLE, checksum
from minikeras.data.endless import check_ends, limited, long_pass
from minikeras.data.epochs import set_epoch
from minikeras.data.joining import join
from minikeras.data.nests import cloned, leaves, map_leaves, parts
from minikeras.data.peek import first_rows
from minikeras.data.position import Positioned, warn_of_hidden_draws
from minikeras.data.rows import (
    RowCounter,
    UnknownRows,
    count_rows,
    first_size,
    first_sizes,
    shapes_of,
)
from minikeras.data.sharded import Idle, seeded, sharded, worked
from minikeras.data.sources import ContinuedBatches, as_batches, empty, is_batched, length

__all__ = [
    "SAMPLE",
    "ContinuedBatches",
    "Idle",
    "Positioned",
    "RowCounter",
    "UnknownRows",
    "as_batches",
    "call_as",
    "call_with",
    "check_ends",
    "checksum",
    "choose_device",
    "cloned",
    "count_rows",
    "empty",
    "first_rows",
    "first_size",
    "first_sizes",
    "is_batched",
    "join",
    "leaves",
    "length",
    "limited",
    "long_pass",
    "manner",
    "map_leaves",
    "parts",
    "placed",
    "seeded",
    "set_epoch",
    "shapes_of",
    "sharded",
    "to_device",
    "unpack",
    "warn_of_hidden_draws",
    "worked",
]
