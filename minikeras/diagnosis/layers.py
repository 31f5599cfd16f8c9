"""What happens in each layer: what it returns, its gradient, and its update in one step.

take_step       a few training steps of a copy, on the first batches of dl_train
watch_layers    what each layer, and each call of relu, tanh, sigmoid or dropout, returns
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from minikeras.batch import unpack
from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import copy_leaf
from minikeras.diagnosis.kinds import TRANSPOSED, WITH_CHANNELS, WITH_ROWS
from minikeras.modes import TrainingModes
from minikeras.nests import leaves, map_leaves
from minikeras.run import has_own_step
from minikeras.stepper import optimizer_parameters

if TYPE_CHECKING:
    from minikeras.diagnosis.evidence import Evidence, Sample
    from minikeras.model import Model

STEPS = 3  # the second shows whether a layer that begins with zeros lets gradients through
# if a layer has had no gradient yet, or 0: a GAN may train a part in each fifth step
MOST_STEPS = 12
VALUES = 32  # of each unit, at least, to judge a layer: rows times positions
ROWS_TO_WATCH = 256  # a unit that fires for 1 % of the rows is seen with a probability of 92 %

# --- one training step ----------------------------------------------------------------------------


@dataclass
class ParameterStep:
    """What the first step did to a parameter, and whether the next ones changed the picture."""

    name: str  # dotted, as in model.named_parameters(); those of the loss begin with loss_func.
    dimensions: int
    optimizer: str | None = None  # the name of the one that moved it; None if none did
    weight_norm: float = 0.0  # before the step
    gradient_norm: float | None = None  # None if the loss does not use the parameter
    update_norm: float = 0.0  # of the change that the optimizer made
    is_finite: bool = True  # the gradient has neither NaN nor infinity
    is_used: bool = False  # one of the steps gave it a gradient
    is_moving: bool = False  # one of the steps gave it a gradient that is not 0 everywhere
    begins_alike: bool = False  # all its units are the same before the first step
    stays_alike: bool = False  # and after the last one

    @property
    def layer(self) -> str:
        """The name of the layer that has the parameter; "" for the model itself."""
        return self.name.rpartition(".")[0]

    @property
    def is_weight(self) -> bool:
        """Whether it is a matrix or a kernel, and not a bias or the scale of a norm layer."""
        return self.dimensions > 1

    @property
    def gradient_ratio(self) -> float | None:
        """The norm of the gradient to that of the weights; None if one is 0 or not known."""
        if not self.gradient_norm or not self.weight_norm or not self.is_finite:
            return None
        return self.gradient_norm / self.weight_norm

    @property
    def update_ratio(self) -> float | None:
        """The norm of the update to that of the weights; None if the weights are all 0."""
        if self.optimizer is None or not self.weight_norm:
            return None
        return self.update_norm / self.weight_norm


@dataclass
class Step:
    """The first training step of a copy."""

    loss: float | None  # None if a custom train_step returns no "loss"
    parameters: list[ParameterStep]  # those that are trained
    unregistered: list[str]  # modules that get a gradient and that the model does not know
    # False if a custom train_step does not use the labels of the batch, or gives others to
    # compute_loss
    compares_labels: bool = True


class StatedBatch(tuple[Any, ...]):
    """Features, labels and weights that split_batch has taken apart, with their rows."""

    batch_size: int


def return_parts(batch: StatedBatch) -> tuple[Any, ...]:
    """Return the parts of a `StatedBatch`: the split_batch of the copy."""
    return tuple(batch)


def take_step(evidence: Evidence) -> Step:
    """Train a copy on the first batches; return what its first step did.

    Raises:
        Exception: the training raises it.
    """
    model, batches = copy_to_train(evidence)
    recorder = StepRecorder(model)
    watched = WatchedLabels(model) if has_own_step(model) else None
    loss = None
    with silenced(), recorder.recording():
        for number in range(MOST_STEPS):
            if number >= STEPS and recorder.has_seen_all():
                break
            batch = next(batches)
            if watched is not None:
                watched.expect(batch[1])
            history = model.fit(1, [batch], verbose=0, on_nan="ignore")
            if number == 0 and "loss" in history:
                loss = float(history["loss"].iloc[0])
    compares_labels = watched is None or watched.are_compared
    return Step(loss, recorder.results(), recorder.unregistered_in_use(), compares_labels)


class WatchedLabels(TorchFunctionMode):
    """Sees whether the train_step of a copy compares outputs with the labels of the batch.

    Args:
        model: a copy; its train_step and compute_loss are replaced.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.expected: list[Tensor] = []  # the labels of the batch
        self.in_loss: bool | None = None  # compute_loss got them; None if it was not called
        self.are_used = False  # a function was called with them
        self.compute_loss = model.compute_loss
        self.train_step = model.train_step
        vars(model).update(compute_loss=self._compute_loss, train_step=self._train_step)

    @property
    def are_compared(self) -> bool:
        """Whether outputs were compared with the labels of a batch."""
        return self.are_used if self.in_loss is None else self.in_loss

    def expect(self, labels: Any) -> None:
        """Note the labels of the next batch."""
        self.expected = [leaf for leaf in leaves(labels) if isinstance(leaf, Tensor)]

    def _train_step(self, *args: Any, **kwargs: Any) -> Any:
        with self:
            return self.train_step(*args, **kwargs)

    def _compute_loss(self, outputs: Any, labels: Any, *args: Any, **kwargs: Any) -> Any:
        given = [leaf for leaf in leaves(labels) if isinstance(leaf, Tensor)]
        is_same = len(given) == len(self.expected)
        for found, label in zip(given, self.expected, strict=False):
            is_same = is_same and found.shape == label.shape and bool((found == label).all())
        self.in_loss = is_same or bool(self.in_loss)
        return self.compute_loss(outputs, labels, *args, **kwargs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function, and note whether it gets the labels; their sizes do not count."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in ("__get__", "__len__", "size", "dim"):
            for leaf in leaves((args, kwargs)):
                if any(leaf is label for label in self.expected):
                    self.are_used = True
        return func(*args, **kwargs)


def copy_to_train(evidence: Evidence) -> tuple[Model, Iterator[Any]]:
    """Return a copy of the model, and the first batches for its `fit`, again and again."""
    is_split = evidence.run.split_batch is not unpack
    model = evidence.copy_model(split_batch=return_parts if is_split else None)
    return model, repeat_batches(evidence.train, is_split)


def repeat_batches(sample: Sample, is_split: bool) -> Iterator[Any]:
    """Yield the batches of as many rows as the first, for `fit`, without an end.

    A short last batch may be another matter, as with BatchNorm.
    """
    while True:
        for parts, size in zip(sample.batches, sample.sizes, strict=True):
            if size == sample.sizes[0]:
                yield make_batch(parts, size, is_split)


def make_batch(parts: tuple[Any, Any, Any], rows: int, is_split: bool) -> Any:
    """Return a batch for `fit` from the parts that the evidence has of it."""
    features, labels, weight = map_leaves(copy_leaf, parts)
    if is_split:
        stated = StatedBatch((features, labels, weight))
        stated.batch_size = rows
        return stated
    if weight is None:
        return features, labels
    return features, labels, weight


class StepRecorder:
    """Records the gradients and updates of a model's optimizers.

    A parameter that no optimizer has is known by a hook of its own gradient alone.
    """

    def __init__(self, model: Model) -> None:
        run = model._compiled("diagnose")
        self.optimizers = run.optimizers
        self.modules = dict(model.named_modules())
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in named_parameters(model, run.loss_func).items():
            if parameter.requires_grad:
                self.parameters[name] = parameter
        self.steps: dict[int, ParameterStep] = {}
        for name, parameter in self.parameters.items():
            self.steps[id(parameter)] = ParameterStep(name, 0)
        self.unregistered = find_unregistered(model)
        self.with_gradient: set[int] = set()  # ids of parameters
        self.before: dict[int, Tensor] = {}  # id of a parameter -> its values before a step

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Listen to optimizers and gradients inside the block."""
        handles: list[Any] = []
        watched = list(self.parameters.values())
        for module in self.unregistered.values():
            watched += module.parameters()
        for parameter in watched:
            # a lazy parameter has no gradient yet; its optimizer tells
            if parameter.requires_grad and not is_lazy(parameter):
                handles.append(parameter.register_hook(self._gradient_hook(parameter)))
        for name, optimizer in self.optimizers.items():
            handles.append(optimizer.register_step_pre_hook(self._pre_hook(name)))
            handles.append(optimizer.register_step_post_hook(self._post_hook()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _gradient_hook(self, parameter: nn.Parameter) -> Any:
        def look(gradient: Tensor) -> None:
            self.with_gradient.add(id(parameter))

        return look

    def _pre_hook(self, name: str) -> Any:
        def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for parameter in optimizer_parameters(optimizer):
                step = self.steps.get(id(parameter))
                if step is None or parameter.grad is None:
                    continue
                self.with_gradient.add(id(parameter))
                norm, is_finite = measure_gradient(parameter.grad)
                step.is_moving = step.is_moving or norm != 0
                if step.optimizer is not None:
                    continue  # the numbers are of the first step
                step.optimizer = name
                step.gradient_norm = norm
                step.is_finite = is_finite
                step.weight_norm = norm_of(parameter)
                step.begins_alike = self._begins_alike(parameter, step)
                self.before[id(parameter)] = parameter.detach().clone()

        return look

    def _post_hook(self) -> Any:
        def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for parameter in optimizer_parameters(optimizer):
                before = self.before.pop(id(parameter), None)
                if before is not None:
                    self.steps[id(parameter)].update_norm = norm_of(parameter.detach() - before)

        return look

    def _unit_axis(self, step: ParameterStep) -> int:
        # a matrix of the user's own is mostly (inputs, units)
        axis = find_unit_axis(self.modules.get(step.layer))
        return -1 if axis is None else axis

    def _begins_alike(self, parameter: Tensor, step: ParameterStep) -> bool:
        module = self.modules.get(step.layer)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return False  # its rows get different gradients, of different tokens
        is_alike = has_equal_units(parameter, self._unit_axis(step))
        if find_unit_axis(module) is None:
            return is_alike and has_equal_units(parameter, 0)
        return is_alike

    def has_seen_all(self) -> bool:
        """Tell whether each trained parameter has had a gradient that is not 0.

        An expert of a mixture may be chosen for no row of a batch.
        """
        for key, step in self.steps.items():
            if step.optimizer is None and key not in self.with_gradient:
                return False
            if step.optimizer is not None and not step.is_moving:
                return False
        return True

    def results(self) -> list[ParameterStep]:
        """Return what was recorded of each trained parameter, in the model's order."""
        for parameter in self.parameters.values():
            step = self.steps[id(parameter)]
            step.dimensions = 0 if is_lazy(parameter) else parameter.ndim
            step.is_used = id(parameter) in self.with_gradient
            step.stays_alike = step.begins_alike and has_equal_units(
                parameter, self._unit_axis(step)
            )
        return list(self.steps.values())

    def unregistered_in_use(self) -> list[str]:
        """Return the unregistered modules that got a gradient, and that no optimizer has."""
        moved = set()
        for optimizer in self.optimizers.values():
            moved |= {id(parameter) for parameter in optimizer_parameters(optimizer)}
        names = []
        for name, module in self.unregistered.items():
            trained = {id(parameter) for parameter in module.parameters()} & self.with_gradient
            if trained - moved:
                names.append(name)
        return names


def named_parameters(model: nn.Module, loss_func: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of a model and of its loss by name, each once."""
    named = dict(model.named_parameters())
    if isinstance(loss_func, nn.Module):
        known = set(map(id, named.values()))
        for name, parameter in loss_func.named_parameters():
            if id(parameter) not in known:
                named[f"loss_func.{name}"] = parameter
    return named


def find_unregistered(model: nn.Module) -> dict[str, nn.Module]:
    """Return modules in plain lists, tuples and dicts of a model, by the name to reach them.

    `model.parameters()` does not know them.

    >>> net = nn.Module()
    >>> net.layers = [nn.Linear(1, 1)]
    >>> list(find_unregistered(net))
    ['layers[0]']
    """
    known = set(map(id, model.parameters()))
    found: dict[str, nn.Module] = {}
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            path = f"{prefix}.{attribute}" if prefix else attribute
            for name, part in parts_of(value, path):
                parameters = {id(parameter) for parameter in part.parameters()}
                if parameters - known:
                    found[name] = part
    return found


def parts_of(value: Any, path: str, depth: int = 3) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules in a list, tuple or dict, with the names to reach them.

    Args:
        depth: of containers in containers.
    """
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    for key, part in items:
        name = f"{path}[{key!r}]"
        if isinstance(part, nn.Module):
            yield name, part
        elif depth > 1:
            yield from parts_of(part, name, depth - 1)


def norm_of(tensor: Tensor) -> float:
    """Return the Euclidean norm of a tensor, in float32 at least."""
    values = tensor.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    return float(torch.linalg.vector_norm(values))


def measure_gradient(gradient: Tensor) -> tuple[float, bool]:
    """Return the norm of a gradient, and whether all its values are finite."""
    values = gradient.detach()
    if values.is_sparse:
        values = values.coalesce().values()
    return norm_of(values), bool(torch.isfinite(values).all())


def find_unit_axis(module: nn.Module | None) -> int | None:
    """Return the dimension of a weight that has an entry for each unit; None if it is not known."""
    if isinstance(module, TRANSPOSED):
        return 1
    if isinstance(module, WITH_ROWS):
        return 0
    return None


def has_equal_units(parameter: Tensor, axis: int) -> bool:
    """Tell whether all units of a weight have the same values.

    >>> weight = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    >>> has_equal_units(weight, 0), has_equal_units(weight, 1)
    (True, False)
    """
    if parameter.ndim < 2 or parameter.shape[axis] < 2 or not parameter.is_floating_point():
        return False
    units = parameter.detach().movedim(axis, 0)
    return bool((units == units[:1]).all())


# --- what each layer returns ----------------------------------------------------------------------

RELU = "relu"
TANH = "tanh"
SIGMOID = "sigmoid"
DROPOUT = "dropout"
LAYER = "layer"  # a module without modules inside

KINDS = {  # of torch's functions, by name
    "relu": RELU,
    "relu_": RELU,
    "relu6": RELU,
    "tanh": TANH,
    "tanh_": TANH,
    "sigmoid": SIGMOID,
    "sigmoid_": SIGMOID,
    "dropout": DROPOUT,
    "dropout_": DROPOUT,
    "dropout1d": DROPOUT,
    "dropout2d": DROPOUT,
    "dropout3d": DROPOUT,
    "alpha_dropout": DROPOUT,
    "feature_alpha_dropout": DROPOUT,
}
# modules after which dimension 1 is the channels; after others it is the last one
# tanh and sigmoid are saturated where their slope is below 2 % of its maximum
TANH_LIMIT = 0.99
SIGMOID_LIMIT = 0.995


@dataclass
class LayerStatistics:
    """What a layer, or a call of an activation function, returns over the rows looked at.

    A layer that is called several times, as in a loop over time, is one.
    """

    name: str  # dotted, as in model.named_modules()
    type: str  # the class of that module
    kind: str  # RELU, TANH, SIGMOID or DROPOUT for a call of such a function, else LAYER
    has_weights: bool = False  # a layer with weights of its own
    units: int = 0  # channels, or elements of the last dimension
    values: int = 0  # for each unit: rows times positions
    is_output: bool = False  # what it returns is an output of the model
    is_finite: bool = True
    rate: float = 0.0  # of DROPOUT: the share that it removes
    is_on_in_eval: bool = False  # of DROPOUT: also in eval mode
    fires: Tensor | None = None  # (units,), bool: it was above 0 for one row at least
    saturated: float = 0.0  # number of saturated values
    variance: float = 0.0  # summed over rows, the mean over units

    @property
    def called(self) -> str:
        """The words for this layer in a message."""
        shown = f"layer {self.name} ({self.type})" if self.name else self.type
        if self.kind == LAYER or self.type.lower().startswith(self.kind):
            return shown
        return f"{self.kind} in {shown}"

    @property
    def dead_units(self) -> int:
        """How many units were 0 for all rows."""
        return 0 if self.fires is None else int((~self.fires).sum())

    @property
    def is_dead(self) -> bool:
        """Whether it is a hidden ReLU none of whose units fired."""
        is_seen = self.kind == RELU and self.units > 0 and self.values >= VALUES
        return is_seen and not self.is_output and self.dead_units == self.units

    @property
    def saturated_share(self) -> float:
        """The share of values that are saturated."""
        return self.saturated / max(1, self.values * self.units)

    @property
    def spread(self) -> float:
        """The standard deviation of a unit from row to row: the root of the mean over units."""
        return math.sqrt(self.variance / max(1, self.values))

    def add(self, outputs: Tensor, unit_axis: int) -> None:
        """Count what was returned for another batch."""
        values = outputs.detach()
        if not values.is_floating_point() or not values.ndim or not values.numel():
            return
        values = values.movedim(unit_axis, -1).reshape(-1, values.shape[unit_axis]).float()
        self.units = values.shape[1]
        self.values += len(values)
        self.is_finite = self.is_finite and bool(torch.isfinite(values).all())
        if len(values) > 1:
            self.variance += float(values.var(0, correction=0).mean()) * len(values)
        if self.kind == RELU:
            fires = (values > 0).any(0)
            self.fires = fires if self.fires is None else self.fires | fires
        elif self.kind == TANH:
            self.saturated += int((values.abs() > TANH_LIMIT).sum())
        elif self.kind == SIGMOID:
            self.saturated += int(((values - 0.5).abs() > SIGMOID_LIMIT - 0.5).sum())


@dataclass
class Frame:
    """A module whose forward is running."""

    name: str
    module: nn.Module
    calls: dict[str, int] = field(default_factory=dict)  # of each function, so far


class Watcher(TorchFunctionMode):
    """Sees the layers and the functions that a forward calls, in their order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.found: dict[tuple[Any, ...], LayerStatistics] = {}
        self.frames: list[Frame] = [Frame("", model)]
        self.last_layer: nn.Module | None = None  # that has weights
        # kept until the outputs are known: freed memory would be used again
        self.returned: list[tuple[LayerStatistics, Tensor, Tensor | None]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function, and look at what an activation or dropout returns."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        kind = KINDS.get(getattr(func, "__name__", ""))
        if kind is None or not isinstance(result, Tensor):
            return result
        rate = 0.0
        if kind == DROPOUT:
            rate = find_rate(args, kwargs)
            if not rate:
                return result
        frame = self.frames[-1]
        number = frame.calls.get(kind, 0)
        frame.calls[kind] = number + 1
        statistics = self._statistics(frame, kind, number, result)
        statistics.rate = rate
        self._add(statistics, result)
        return result

    def _statistics(self, frame: Frame, kind: str, number: int, result: Tensor) -> LayerStatistics:
        size = result.shape[self._unit_axis(result)] if result.ndim else 0
        key = (frame.name, kind, number, size)
        if key not in self.found:
            self.found[key] = LayerStatistics(frame.name, type(frame.module).__name__, kind)
        return self.found[key]

    def _add(self, statistics: LayerStatistics, result: Tensor) -> None:
        statistics.add(result, self._unit_axis(result))
        before = result.detach().clone() if statistics.kind == DROPOUT else None
        self.returned.append((statistics, result, before))

    def _unit_axis(self, result: Tensor) -> int:
        """Return the dimension of the units: the channels after a convolution, else the last."""
        if result.ndim > 2 and isinstance(self.last_layer, WITH_CHANNELS):
            return 1
        return max(0, result.ndim - 1)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the calls of the model inside the block."""
        handles: list[Any] = []
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            enter, leave = self._hooks(name)
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        is_fast = torch.backends.mha.get_fastpath_enabled()
        # in eval mode one kernel would take the place of the layers of an nn.TransformerEncoder
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with run_eagerly(), self:
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(is_fast)
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: Any) -> None:
            self.frames.append(Frame(name, module))

        def leave(module: nn.Module, args: Any, outputs: Any) -> None:
            frame = self.frames.pop()
            if outputs is not None:  # else it raised an error
                self._look_at_layer(frame, outputs)

        return enter, leave

    def _look_at_layer(self, frame: Frame, outputs: Any) -> None:
        module = frame.module
        has_weights = any(True for _ in module.parameters(recurse=False))
        if not has_weights and (frame.calls or any(True for _ in module.children())):
            return  # what it has called has been looked at
        result = first_tensor(outputs)
        if result is None or isinstance(module, nn.Identity):
            return
        if has_weights:
            self.last_layer = module
        statistics = self._statistics(frame, LAYER, 0, result)
        statistics.has_weights = has_weights
        self._add(statistics, result)

    def note_outputs(self, outputs: Any) -> None:
        """Find the layers that return the model's outputs, or what the outputs are a view of."""
        places = set()
        for leaf in leaves(outputs, inside=True):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.numel():
                places.add(leaf.untyped_storage().data_ptr())
        for statistics, result, before in self.returned:
            if result.layout is not torch.strided or not result.numel():
                continue
            # a residual connection may have been added in place to what dropout has returned
            is_changed = before is not None and not torch.equal(before, result)
            if result.untyped_storage().data_ptr() in places and not is_changed:
                statistics.is_output = True
        self.returned.clear()


@contextlib.contextmanager
def run_eagerly() -> Iterator[None]:
    """Run what torch.compile has compiled as it is written, so that its layers are seen."""
    with torch.compiler.set_stance("force_eager"):
        yield


def first_tensor(outputs: Any) -> Tensor | None:
    """Return the first tensor of what a layer returns, such as the outputs of an LSTM."""
    for leaf in leaves(outputs):
        if isinstance(leaf, Tensor):
            return leaf
        if isinstance(leaf, PackedSequence):
            return leaf.data
    return None


def find_rate(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Return the share that a call of a dropout function removes; 0 if it is off."""
    rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    is_on = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return float(rate) if is_on else 0.0


def watch_layers(evidence: Evidence) -> list[LayerStatistics]:
    """Call a copy with the first rows, in train mode; return what each layer gives, in order.

    In train mode BatchNorm works as it does in training. A model that cannot be called so, as with
    BatchNorm and one row, is watched in eval mode. If forward does not take the features, as in a
    GAN whose forward takes noise, the custom train_step is watched.
    """
    try:
        in_eval = watch_in_mode(evidence, is_training=False, rows=1)
    except Exception:
        if not has_own_step(evidence.model):
            raise
        return watch_custom_step(evidence)
    try:
        layers = watch_in_mode(evidence, is_training=True, rows=ROWS_TO_WATCH)
    except Exception:  # forward may need more in train mode
        return watch_in_mode(evidence, is_training=False, rows=ROWS_TO_WATCH)
    on_in_eval = {statistics.name for statistics in in_eval if statistics.kind == DROPOUT}
    for statistics in layers:
        if statistics.kind == DROPOUT:
            statistics.is_on_in_eval = statistics.name in on_in_eval
    return layers


def watch_custom_step(evidence: Evidence) -> list[LayerStatistics]:
    """Take a training step of a copy, and return what each layer gives in it, in order."""
    model, batches = copy_to_train(evidence)
    watcher = Watcher(model)
    with silenced(), watcher.watching():
        model.fit(1, [next(batches)], verbose=0, on_nan="ignore")
    return list(watcher.found.values())


def watch_in_mode(evidence: Evidence, is_training: bool, rows: int) -> list[LayerStatistics]:
    """Call a copy in one mode with the first batches that have that many rows."""
    model = evidence.copy_model()
    if is_training:
        TrainingModes(model).enter()
    else:
        model.eval()
    watcher = Watcher(model)
    seen = 0
    sample = evidence.train
    with torch.no_grad(), silenced():
        for (features, _, _), size in zip(sample.batches, sample.sizes, strict=True):
            given = map_leaves(copy_leaf, features)
            with watcher.watching():
                outputs = model.compute_outputs(given)
            watcher.note_outputs(outputs)
            seen += size
            if seen >= rows:
                break
    return list(watcher.found.values())
