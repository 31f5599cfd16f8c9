"""What the checks look at. Each part is made when a check first asks for it, and kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from minikeras.batch import move_to_device
from minikeras.diagnosis.copies import PLAIN, compiled_copy, silenced
from minikeras.diagnosis.kinds import BATCH_NORMS
from minikeras.diagnosis.tasks import Task, find_tasks
from minikeras.nests import detach_nest, leaves, map_leaves, names_in, take_apart
from minikeras.rows import first_size
from minikeras.run import has_own_step
from minikeras.sources import as_batches, is_batched, make_empty_error

if TYPE_CHECKING:
    from minikeras.diagnosis.findings import Finding
    from minikeras.diagnosis.layers import LayerStatistics, Step
    from minikeras.diagnosis.lr_find import LearningRates
    from minikeras.diagnosis.memorize import Memorized
    from minikeras.model import Model

ROWS = 4096  # rows of the data that are looked at
BATCHES = 200  # batches, at most
SECONDS = 5.0  # for reading them; at least two batches are read
NUMBERS = 2**25  # in features and labels together
LEAST_STEPS = 20  # of the learning-rate range test, however long they take
ROWS_OF_OUTPUTS = 1024  # rows that the model is called with


@dataclass
class Sample:
    """The first rows of dl_train or dl_val, in batches, on the model's device."""

    name: str  # the argument
    # (features, labels, sample_weight) of each batch
    batches: list[tuple[Any, Any, Any]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # rows of each batch
    seconds: list[float] = field(default_factory=list)  # that reading each batch took
    is_whole: bool = False  # these are all rows
    # minikeras makes the batches, of arrays or a Dataset; those of dl_train are shuffled
    is_batched_here: bool = False
    columns: list[str] | None = None  # of a DataFrame of features
    batch_size: int = 0  # the usual one

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(self.sizes)

    @cached_property
    def features(self) -> Any:
        """All rows in the structure of a batch; None if the shapes differ from batch to batch."""
        return join([features for features, _, _ in self.batches])

    @cached_property
    def labels(self) -> Any:
        """As `features`; None also if the batches have no labels."""
        return join([labels for _, labels, _ in self.batches])


class Evidence:
    """What `diagnose` has found out about a model and its data; the checks look at it.

    Every attribute is made when it is first asked for. Nothing here is the user's own model: what a
    check does with `model` or with a copy stays in the diagnosis.

    Args:
        model: the user's compiled model.
        dl_train, dl_val, batch_size: as for `fit`.
        steps: the number of steps of each trial training.
        report: called with a few words before something that takes time.
    """

    def __init__(
        self,
        model: Model,
        dl_train: Any,
        dl_val: Any,
        steps: int,
        batch_size: int | None = None,
        report: Callable[[str], None] = lambda words: None,
    ) -> None:
        self._users_model = model
        self.dl_train = dl_train
        self.dl_val = dl_val
        self.steps = steps
        self.batch_size = batch_size
        self.report = report
        self.run = model._compiled("diagnose")
        self.device = self.run.device
        self.findings: list[Finding] = []  # of the checks so far, in their order

    # --- copies of the model ----------------------------------------------------------------------

    @cached_property
    def model(self) -> Model:
        """A copy of the model as it is now, compiled, to look at and to call, not to train.

        It has no metrics, and a step per batch in eager mode, whatever compile was asked for.
        """
        return self.copy_model()

    def copy_model(self, **changes: Any) -> Model:
        """Return another copy of the model as it is now, to train.

        Args:
            changes: arguments of compile that differ.
        """
        twin = compiled_copy(self._users_model, "diagnose", **{**PLAIN, **changes})
        twin._compiled("diagnose").world.settle(twin)
        with silenced():
            twin.to(self.device)
        return twin

    @property
    def loss_func(self) -> Any:
        """The loss of `model`."""
        return self.model._compiled("diagnose").loss_func

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers of `model`; one alone goes by the name ""."""
        return self.model._compiled("diagnose").optimizers

    @cached_property
    def history(self) -> pd.DataFrame:
        """The history of the user's model: empty if it has not been trained since compile."""
        return self.run.history()

    # --- data -------------------------------------------------------------------------------------

    @cached_property
    def train(self) -> Sample:
        """The first rows of dl_train; of arrays and a Dataset random rows, as `fit` shuffles."""
        self.report("reading dl_train")
        return self._read(self.dl_train, "dl_train")

    @cached_property
    def val(self) -> Sample | None:
        """The first rows of dl_val, or random rows of arrays and a Dataset; None without it."""
        if self.dl_val is None:
            return None
        self.report("reading dl_val")
        return self._read(self.dl_val, "dl_val")

    def _read(self, data: Any, name: str) -> Sample:
        from minikeras.data.in_memory import FastFetch

        size = None if name == "dl_val" and is_batched(data) else self.batch_size
        sample = Sample(name, is_batched_here=not is_batched(data), columns=find_columns(data))
        source = as_batches(data, name, size, shuffle=True, fetch=FastFetch())
        batches = iter(source)
        split_batch = self.run.split_batch
        begin = time.perf_counter()
        numbers = 0
        while len(sample.batches) < BATCHES:
            start = time.perf_counter()
            batch = next(batches, None)
            now = time.perf_counter()
            if batch is None:
                sample.is_whole = True
                break
            features, labels, weight, rows = move_to_device(batch, self.device, split_batch)
            for leaf in leaves((features, labels)):
                numbers += leaf.numel() if isinstance(leaf, Tensor) else 1
            # a loader may fill the same memory again
            sample.batches.append(map_leaves(copy_leaf, (features, labels, weight)))
            size_of_batch = rows
            if size_of_batch is None:
                size_of_batch = first_size(labels, 0) or first_size(features, 1)
            sample.sizes.append(size_of_batch)
            sample.seconds.append(now - start)
            if sample.rows >= ROWS or numbers >= NUMBERS:
                break
            if now - begin > SECONDS and len(sample.batches) > 1:
                break
        if not sample.batches:
            raise make_empty_error(source, name)
        sample.batch_size = max(sample.sizes)
        return sample

    # --- the model on the data --------------------------------------------------------------------

    @cached_property
    def outputs(self) -> Any:
        """The outputs of the first rows of dl_train, in eval mode, joined; None if they cannot be.

        They are of `outputs_rows` rows.
        """
        self.report("calling the model")
        return join(self.output_batches)

    @cached_property
    def output_batches(self) -> list[Any]:
        """The outputs of the first batches of dl_train, in eval mode, at least of one batch.

        A BatchNorm that has seen no batch yet uses the statistics of the batch.
        """
        outputs = []
        rows = 0
        model = self.model
        norms: Any = contextlib.nullcontext()
        model.eval()
        if min(self.train.sizes) > 1 and has_new_batch_norm(model):
            norms = use_batch_statistics(model)
        with torch.no_grad(), silenced(), norms:
            for (features, _, _), size in zip(self.train.batches, self.train.sizes, strict=True):
                given = map_leaves(copy_leaf, features)  # a layer may work in place
                outputs.append(detach_nest(model.compute_outputs(given)))
                rows += size
                if rows >= ROWS_OF_OUTPUTS:
                    break
        return outputs

    @cached_property
    def tasks(self) -> list[Task]:
        """What each loss asks of its output; empty if outputs or labels are not plain tensors.

        It is empty too if a custom step does not compare the outputs with the labels.
        """
        if not self.compares_labels:
            return []
        count = len(self.output_batches)
        labels = join([labels for _, labels, _ in self.train.batches[:count]])
        if self.outputs is None or labels is None:
            return []
        return find_tasks(self.loss_func, self.outputs, labels)

    @cached_property
    def compares_labels(self) -> bool:
        """Whether training compares the outputs with the labels: a custom step may not."""
        if not has_own_step(self.model):
            return True
        try:
            return self.step.compares_labels
        except Exception:  # said by the check of one step
            return True

    @cached_property
    def step(self) -> Step:
        """One training step of a copy, on the first batch: loss, gradients and updates."""
        from minikeras.diagnosis.layers import take_step

        self.report("taking one step")
        return take_step(self)

    @cached_property
    def layers(self) -> list[LayerStatistics]:
        """What each layer returns for the first rows of dl_train."""
        from minikeras.diagnosis.layers import watch_layers

        self.report("watching the layers")
        return watch_layers(self)

    @cached_property
    def memorized(self) -> Memorized:
        """The training of a copy on one small batch."""
        from minikeras.diagnosis.memorize import memorize

        self.report("training on one small batch")
        return memorize(self)

    @cached_property
    def learning_rates(self) -> LearningRates:
        """The learning-rate range test of a copy; with fewer steps if they take too long."""
        from minikeras.diagnosis.lr_find import find_learning_rates
        from minikeras.diagnosis.memorize import SECONDS as MOST_SECONDS

        larger = max(1.0, self.train.sizes[0] / self.memorized.rows)
        possible = MOST_SECONDS / (self.memorized.seconds * larger)
        steps = min(self.steps, max(int(possible), LEAST_STEPS))
        self.report("finding the learning rate")
        return find_learning_rates(
            self.copy_model(), self.dl_train, steps=max(2, steps), batch_size=self.batch_size
        )


def has_new_batch_norm(model: nn.Module) -> bool:
    """Tell whether a BatchNorm has the running statistics that it was created with."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and module.num_batches_tracked is not None:
            if not module.num_batches_tracked:
                return True
    return False


@contextlib.contextmanager
def use_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, but let BatchNorm use the statistics of the batch.

    All buffers are as before at the end of the block.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.train()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        yield
    finally:
        model.eval()
        for name, value in model.named_buffers():
            if name in buffers:
                value.copy_(buffers[name])


def copy_leaf(leaf: Any) -> Any:
    """Copy a tensor or an array; return anything else as it is."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def join(nests: list[Any]) -> Any:
    """Join the rows of nests whose tensors have the same shapes but for the rows; else None.

    >>> join([{"a": torch.zeros(2, 3)}, {"a": torch.ones(1, 3)}])["a"].shape
    torch.Size([3, 3])
    >>> join([torch.zeros(2, 3), torch.zeros(2, 4)]) is None
    True
    """
    if not nests:
        return None
    parts = [leaves(nest) for nest in nests]
    if len({len(part) for part in parts}) > 1:
        return None
    joined = []
    for column in zip(*parts, strict=True):
        if not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in column):
            return None
        if len({(leaf.shape[1:], leaf.dtype, leaf.layout) for leaf in column}) > 1:
            return None
        if column[0].layout is not torch.strided:
            return None
        joined.append(torch.cat(column))
    remaining = iter(joined)
    return map_leaves(lambda leaf: next(remaining), nests[0])


def find_columns(data: Any) -> list[str] | None:
    """Return the column names of a DataFrame of features; None for anything else."""
    features = data[0] if isinstance(data, tuple) and data else data
    if isinstance(features, pd.DataFrame):
        return [str(name) for name in features.columns]
    return None


def named_tensors(nest: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the dense tensors of a nest with names to call them by, such as features["age"].

    >>> [name for name, _ in named_tensors({"a": torch.zeros(1), "b": 2}, "features")]
    ['features["a"]']
    """
    if isinstance(nest, Tensor):
        if nest.layout is torch.strided and not nest.is_nested:
            yield name, nest
        return
    container = take_apart(nest)
    if container is None:
        return
    for key, part in zip(names_in(nest) or (), container[0], strict=True):
        shown = f'"{key}"' if isinstance(key, str) else key
        yield from named_tensors(part, f"{name}[{shown}]")
