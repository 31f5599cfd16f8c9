"""Compile functions as whole graphs, or part by part.

A first call that fails is undone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
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
# called before a graph's first step; returns a check to be called after it, which may raise
Verify = Callable[[], Callable[[], None]]
TOO_OFTEN = (
    "a Python value that is part of it, in the model, the loss, a metric or the data, has changed "
    "too often. Store it in a tensor to keep one graph"
)
# as mode="reduce-overhead" does
CUDA_GRAPH = {"triton.cudagraphs": True}
# the calls between the kernels are compiled too: half as many files, and less time in each step;
# some operations cannot be in them
IN_CPP = {"cpp_wrapper": True}
# The compiler keeps no graph on the disk that holds a function which it does not know. It may keep
# those with this one; change the number if you change the function.
CACHED = {"unsafe_marked_cacheable_functions": {"minikeras.jit.optimizer.gradients_in_graph": "1"}}
_numbers = itertools.count()


class CompileError(Exception):
    """Tracing or compiling failed; what the attempt had changed has been put back."""


class ChangedTensors(nn.Module):
    """Tensors that a graph changes, as buffers of a module.

    Those stay where they are, as a CUDA graph needs them to.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.names = [f"tensor_{number}" for number in range(len(tensors))]
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_buffer(name, tensor)

    def forward(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.names]


class Graphs:
    """Compile a function for its own shapes, and once for all others."""

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
        # whether it is for other shapes -> the compiled function
        self.compiled: dict[bool, Callable[..., Any]] = {}

    def __call__(self, *batches: Any, other: bool) -> Any:
        """Return what the function returns.

        Args:
            other: the batches do not have the graph's own shapes.
        """
        if not self.on_cuda:
            return self._call(batches, other)
        # the graph may now write over the results of the last call, but not over these copies
        torch.compiler.cudagraph_mark_step_begin()
        return map_leaves(copy_if_tensor, self._call(batches, other))

    def _call(self, batches: Sequence[Any], other: bool) -> Any:
        if other in self.compiled:
            try:
                return self.compiled[other](*batches)
            except Exception as error:
                if not is_of_tracing(error):
                    raise
                why = f"{type(error).__name__}: {error}"
                if "RecompileLimit" in type(error).__name__:
                    why = TOO_OFTEN
                raise CompileError(why) from error
        return self._first_call(batches, other)

    def _first_call(self, batches: Sequence[Any], other: bool) -> Any:
        """Compile the function and call it."""
        begun = time.perf_counter()
        name = self.function.__name__.replace("_", " ")
        for_sizes = " for other batch sizes" if other else ""
        self.say(f"compiling the {name}{for_sizes} ...")
        *preferred, plain = self._choices(other)
        for options in preferred:
            with contextlib.suppress(CompileError):
                result = self._compile(batches, other, options)
                break
        else:
            result = self._compile(batches, other, plain)
        self.say(f"compiled in {time.perf_counter() - begun:.1f} s")
        return result

    def _choices(self, other: bool) -> list[Mapping[str, Any]]:
        """Return arguments for torch.compile, the best first."""
        options = add_to_options(self.options, CACHED)
        if self.on_cuda:
            return [options if other else add_to_options(options, CUDA_GRAPH)]
        in_cpp = add_to_options(options, IN_CPP)
        if self.device.type != "cpu" or in_cpp == options:
            return [options]
        return [in_cpp, options]

    def _compile(self, batches: Sequence[Any], other: bool, options: Mapping[str, Any]) -> Any:
        """Compile the function and call it.

        Raises:
            CompileError: it does not work; nothing has changed.
        """
        function = compiled(copy_code(self.function), fullgraph=True, dynamic=other, **options)
        with undo_on_error(self.state, self.device), without_notes_on_operations():
            check = None if self.verify is None else self.verify()
            result = function(*batches)
            if check is not None:
                check()
        self.compiled[other] = function
        return result


class ByParts:
    """Compile a function part by part: what does not trace runs in eager mode."""

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
        self.compiled = compiled(copy_code(function), **options)
        self.has_worked = False

    def __call__(self, *args: Any) -> Any:
        if self.has_worked:
            return self.compiled(*args)
        with undo_on_error(self.state, self.device):
            result = self.compiled(*args)
        self.has_worked = True
        return result


class OrEager(ByParts):
    """Compile a function part by part, or run it in eager mode if nothing compiles."""

    def __call__(self, *args: Any) -> Any:
        try:
            return super().__call__(*args)
        except CompileError as error:
            result = self.function(*args)  # raises an error if the batch is the cause
            self.give_up(reason(error))
            return result

    def give_up(self, why: str) -> None:
        """Run in eager mode from now on, with a warning."""
        warnings.warn(
            f"jit: {self.function.__name__} runs in eager mode, because {why}", stacklevel=3
        )
        self.compiled = self.function
        self.has_worked = True


def copy_if_tensor(leaf: Any) -> Any:
    """Return a copy of a tensor, and anything else as it is."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def chosen(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the user's arguments for torch.compile, plus ours if they do not conflict."""
    if "mode" in options or options.get("backend", "inductor") != "inductor":
        return options
    # the compiler's check of its own work at each call: a tenth of a small step
    return {**options, "options": {"size_asserts": False, **options.get("options", {})}}


def add_to_options(options: Mapping[str, Any], ours: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return arguments for torch.compile with options of ours, if the user has not set them.

    Options that this version of torch does not have are left out.
    """
    if "options" not in options:  # a mode or backend that the user passed
        return options
    both = {**options, "options": {**ours, **options["options"]}}
    try:
        compiled(add_to_options, **both)  # it compiles nothing before it is called
    except RuntimeError:
        return options
    return both


def shapes_of(batch: Any) -> Any:
    """Return what a graph is made for: the shape of each tensor in a batch, in plain lists."""
    if batch is None:
        return None
    if isinstance(batch, Tensor):
        return list(batch.shape)
    if isinstance(batch, tuple):
        return [shapes_of(part) for part in batch]
    return [list(leaf.shape) for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Call torch.compile, without the warnings of torch's own modules as they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(function, **options)


def copy_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function with a code object of its own.

    Dynamo limits graphs per code object, which models would share.
    """
    name = f"{function.__name__}_{next(_numbers)}"  # the same from run to run
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(
        code, function.__globals__, function.__name__, None, function.__closure__
    )


@contextlib.contextmanager
def undo_on_error(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Restore tensors and random states if a first call fails.

    The step can then be taken in another way.
    """
    restore = way_back(state, device)
    try:
        with warnings.catch_warnings():
            # those of torch's compiler; the user's own came with the batch in eager mode
            warnings.simplefilter("ignore")
            yield
    except BaseException as error:
        restore()
        if isinstance(error, Exception):
            raise CompileError(f"{type(error).__name__}: {error}") from error
        raise


@contextlib.contextmanager
def without_notes_on_operations() -> Iterator[None]:
    """Leave out log lines of operations that compiled code calls through Python.

    It says "aten.x is missing a c-shim implementation", which is no fault and has no remedy.
    """

    def is_of_interest(record: logging.LogRecord) -> bool:
        return "c-shim" not in record.getMessage()

    handlers = list(logging.getLogger("torch").handlers)
    for handler in handlers:
        handler.addFilter(is_of_interest)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_of_interest)


def way_back(tensors: Sequence[Tensor], device: torch.device) -> Callable[[], None]:
    """Return a function that restores the current values of tensors, and the random states.

    The random states of Python, NumPy, torch and the device.
    """
    values = [tensor.detach().clone() for tensor in tensors]
    torch_state = torch.get_rng_state()
    states_of_device = device_states(device)
    python_state = random.getstate()
    numpy_state = np.random.get_state()

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(torch_state)
        set_device_states(device, states_of_device)
        random.setstate(python_state)
        np.random.set_state(numpy_state)

    return restore


def is_of_tracing(error: Exception) -> bool:
    """Tell whether an error comes from tracing again, before anything ran."""
    return any("dynamo" in kind.__module__ for kind in type(error).__mro__)


def reason(error: CompileError) -> str:
    """Return why something did not compile: the user's function, and torch's first words."""
    text = str(error)
    functions = re.findall(r"^ *File .*, in (\w+)$", text, re.MULTILINE)
    first_lines = " ".join(text.splitlines()[:3])
    words = textwrap.shorten(first_lines, 200, placeholder=" ...")
    if functions:
        return f"in {functions[-1]}: {words}"
    return words
