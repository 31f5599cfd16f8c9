"""Functions compiled: as whole graphs, or part by part. A first call that fails leaves no trace."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import textwrap
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minikeras.nests import leaves, map_leaves
from minikeras.support.randomness import device_states, set_device_states

Batch = tuple[Any, Any, Tensor | None]  # features, labels, sample_weight
Say = Callable[[str], None]  # tells the user that something is being compiled
Verify = Callable[
    [], Callable[[], None]
]  # called before a graph's first step; what it gives, after it: may raise
TOO_OFTEN = (
    "a Python value that is part of it, in the model, the loss, a metric or the data, has changed too often. "
    "Keep it in a tensor, and it stays one graph"
)
_numbers = itertools.count()


class CompileError(Exception):
    """Tracing or compiling failed; whatever the attempt had changed has been put back."""


class Kept(nn.Module):
    """Tensors that a graph changes, as buffers: those of a module stay where they are, as a CUDA graph wants them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.names = [f"tensor_{number}" for number in range(len(tensors))]
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_buffer(name, tensor)

    def forward(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.names]


class Graphs:
    """One function compiled twice at most: for the shapes it is called with first, and for all others."""

    def __init__(
        self,
        function: Callable[..., Any],
        options: Mapping[str, Any],
        say: Say,
        state: list[Tensor],
        device: torch.device,
        verify: Verify | None = None,
    ) -> None:
        self.function = function
        self.verify = verify
        self.device = device
        self.on_cuda = device.type == "cuda"
        self.options = options
        self.say = say
        self.state = state  # the tensors that the function changes
        self.shapes: list[Any] = []
        self.compiled: dict[
            bool, Callable[..., Any]
        ] = {}  # for other shapes or not -> the compiled function

    def fits(self, batches: Sequence[Batch]) -> bool:
        """Whether the batches have the shapes that the function was called with first."""
        return not self.shapes or [shapes_of(batch) for batch in batches] == self.shapes

    def __call__(self, *batches: Any, other: bool) -> Any:
        """The function's answer; `other` says that the batches do not fit."""
        if not self.on_cuda:
            return self._call(batches, other)
        torch.compiler.cudagraph_mark_step_begin()  # the graph may write over the results of the call before
        results = self._call(batches, other)
        return map_leaves(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, results
        )  # ... not these

    def _call(self, batches: Sequence[Any], other: bool) -> Any:
        if other in self.compiled:
            try:
                return self.compiled[other](*batches)
            except Exception as error:
                if not is_of_tracing(error):
                    raise
                often = "RecompileLimit" in type(error).__name__
                raise CompileError(
                    TOO_OFTEN if often else f"{type(error).__name__}: {error}"
                ) from error
        begun = time.perf_counter()
        self.say(
            f"compiling the {self.function.__name__.replace('_', ' ')}{' for other batch sizes' * other} ..."
        )
        options = captured(self.options) if self.on_cuda and not other else self.options
        function = compiled(own_code(self.function), fullgraph=True, dynamic=other, **options)
        with undone_on_error(self.state, self.device):
            check = None if self.verify is None else self.verify()
            result = function(*batches)
            if check is not None:
                check()
        self.say(f"compiled in {time.perf_counter() - begun:.1f} s")
        self.compiled[other] = function
        if not other:
            self.shapes = [shapes_of(batch) for batch in batches]
        return result


class ByParts:
    """A function compiled part by part: what does not trace runs in eager."""

    def __init__(
        self,
        function: Callable[..., Any],
        options: Mapping[str, Any],
        state: list[Tensor],
        device: torch.device,
    ) -> None:
        self.function = function
        self.state = state
        self.device = device
        self.compiled = compiled(own_code(function), **options)
        self.worked = False

    def __call__(self, *args: Any) -> Any:
        if self.worked:
            return self.compiled(*args)
        with undone_on_error(self.state, self.device):
            result = self.compiled(*args)
        self.worked = True
        return result


class OrEager(ByParts):
    """A function compiled part by part, or in eager where nothing compiles."""

    def __call__(self, *args: Any) -> Any:
        try:
            return super().__call__(*args)
        except CompileError as error:
            result = self.function(*args)  # raises by itself where the batch is at fault
            self.give_up(reason(error))
            return result

    def give_up(self, why: str) -> None:
        """From now on in eager, which is said."""
        warnings.warn(f"jit: {self.function.__name__} runs in eager, since {why}", stacklevel=3)
        self.compiled, self.worked = self.function, True


def chosen(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The user's arguments for torch.compile, and ours where they leave room."""
    if "mode" in options or options.get("backend", "inductor") != "inductor":
        return options
    # the compiler's check of its own work at each call: a tenth of a small step
    return {**options, "options": {"size_asserts": False, **options.get("options", {})}}


def captured(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments that also capture the step as a CUDA graph, as mode="reduce-overhead" does."""
    if "options" not in options:  # a mode or backend of the user's own
        return options
    return {**options, "options": {"triton.cudagraphs": True, **options["options"]}}


def shapes_of(batch: Any) -> Any:
    """What a graph is made for: the shape of each tensor in a batch."""
    if isinstance(batch, Tensor) or batch is None:
        return None if batch is None else batch.shape
    if isinstance(batch, tuple):
        return [shapes_of(part) for part in batch]
    return [leaf.shape for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile, without what torch's own modules warn of as they are loaded for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(function, **options)


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own: Dynamo limits graphs per code object, which models share."""
    code = function.__code__.replace(
        co_name=f"{function.__name__}_{next(_numbers)}"
    )  # the same from run to run
    return types.FunctionType(
        code, function.__globals__, function.__name__, None, function.__closure__
    )


@contextlib.contextmanager
def undone_on_error(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Puts tensors and random states back when a first call fails, so that the step can be taken in another way."""
    restore = way_back(state, device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the compiler's of torch; the user's own came with the batch in eager
            yield
    except BaseException as error:
        restore()
        if isinstance(error, Exception):
            raise CompileError(f"{type(error).__name__}: {error}") from error
        raise


def way_back(tensors: Sequence[Tensor], device: torch.device) -> Callable[[], None]:
    """What fills the tensors with the values of now, and puts Python's, NumPy's and torch's random states back."""
    values, own, others = (
        [one.detach().clone() for one in tensors],
        torch.get_rng_state(),
        device_states(device),
    )
    of_python, of_numpy = random.getstate(), np.random.get_state()

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(own)
        set_device_states(device, others)
        random.setstate(of_python)
        np.random.set_state(of_numpy)

    return restore


def is_of_tracing(error: Exception) -> bool:
    """Whether a function that had worked was being traced anew, of which nothing had run yet."""
    return any("dynamo" in kind.__module__ for kind in type(error).__mro__)


def reason(error: CompileError) -> str:
    """Why something did not compile: the user's function it came from, and torch's first words."""
    text = str(error)
    functions = re.findall(r"^ *File .*, in (\w+)$", text, re.MULTILINE)
    words = textwrap.shorten(
        " ".join(line for line in text.splitlines()[:3]), 200, placeholder=" ..."
    )
    return f"in {functions[-1]}: {words}" if functions else words
