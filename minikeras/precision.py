"""Between a loss and an optimizer's step: mixed precision, accumulation, clipping.

each step       forward and loss under autocast; metrics, backward and optimizer outside it
backward        the gradient of loss * rows, or of the total of an Average, is added to what is there; in float16
                it is scaled up, so that small gradients do not vanish
optimizer_step  counts a batch of that optimizer's window, and closes it when it is full
close           add up those of all processes, unscale, divide by the window's rows, clip, step, clear
finish          a pass over the data has ended: what windows hold is closed as it is

Nothing of this is made where compile is asked for nothing of it: `Run.precision` is None then.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer

from minikeras.data import map_leaves
from minikeras.distributed import GradientSums, World, backward, is_part
from minikeras.errors import dtype_name, one_of, positive_int, real
from minikeras.faults import FiniteLoss
from minikeras.losses import Regularized
from minikeras.metrics import Totals
from minikeras.overrides import overrides
from minikeras.results import Average, Result, counted_total

DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass
class Window:
    """What an optimizer's gradients have gathered since its last step."""

    weight: Any = 0  # rows, or counts of Averages, so far: a number or a 0-d tensor
    current: Any = None  # of them those of the batch at hand, from its first backward on
    batches: int = 0
    steps: int = 0  # that the optimizer took in this fit

    def add(self, weight: Any) -> None:
        """A batch's weight counts once, however often backward is called for it."""
        if self.current is None:
            self.current, self.weight = weight, self.weight + weight
        elif self.current is not weight and bool(self.current != weight):
            raise ValueError(
                f"backward was called for one batch with losses over {float(self.current):g} and {float(weight):g} "
                f"units, which accumulate cannot divide apart. Give each loss an optimizer of its own, or make both "
                f"means over the batch's rows."
            )


class Precision:
    """One compile's mixed precision, clipping and accumulation, and where its windows stand."""

    def __init__(
        self,
        device: torch.device,
        optimizers: Mapping[str, Optimizer],
        dtype: torch.dtype | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        accumulate: int = 1,
        world: World | None = None,
    ) -> None:
        self.optimizers = optimizers
        self.world = world
        self.finite_loss: FiniteLoss | None = None  # during a fit of several processes
        self.norm_watch: FiniteLoss | None = None  # during a fit, unless on_nan="ignore"
        self.dtype = dtype  # of autocast; None for none
        self.clip_grad_norm, self.clip_grad_value, self.accumulate = (
            clip_grad_norm,
            clip_grad_value,
            accumulate,
        )
        self.scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
        # no cache of cast weights: it would outlive a step in the middle of train_step
        cast = functools.partial(torch.autocast, device.type, dtype, cache_enabled=False)
        self.autocast: Callable[[], Any] = contextlib.nullcontext if dtype is None else cast
        off = functools.partial(torch.autocast, device.type, enabled=False)
        self.no_autocast: Callable[[], Any] = contextlib.nullcontext if dtype is None else off
        self.weighted = (
            accumulate > 1 or world is not None
        )  # gradients are sums over rows until their window is closed
        self.sized = not self.weighted  # the scale allows for gradients that are sums
        self.found: Tensor | None = (
            None  # 1 from the first loss on that was not finite, on a device
        )
        self.at_work = False  # it is we who fill gradients and move weights
        self.order: dict[Tensor, int] = {}  # of the layers, during a fit
        self.one_backward = False  # a step has one, during a fit
        self._begin()

    def _begin(self) -> None:
        self.windows = {one: Window() for one in self.optimizers.values()}
        self.sums: GradientSums | None = None  # which backward feeds

    # --- forward ------------------------------------------------------------------------------------------------------

    def under_autocast(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The same step with autocast round it."""
        if self.dtype is None:
            return step

        @functools.wraps(step)
        def under_autocast(*args: Any) -> Any:
            with self.autocast():
                return step(*args)

        return under_autocast

    def metrics(
        self, totals: Totals, outputs: Any, labels: Any, call: Callable[..., Any]
    ) -> dict[str, Result]:
        """The metrics of a batch, in float32."""
        with self.no_autocast():
            return totals.metrics(in_float32(outputs), labels, call)

    # --- backward and step --------------------------------------------------------------------------------------------

    def backward(
        self, loss: Any, mean: Tensor, rows: Any, optimizers: Iterable[Optimizer], inputs: Any
    ) -> None:
        """Add a batch's gradients; `mean` is the loss as one number, `inputs` the parameters to fill, None for all."""
        total = wide(mean)
        if self.weighted:
            if isinstance(loss, Average):
                total, weight = wide(counted_total(loss)), loss.count
            else:
                total, weight = total * rows, rows
            if not rows:  # a batch that counts for nothing
                total, weight = total * 0, 0
            for one in optimizers:
                self.windows[one].add(weight)
            self._size_scale(weight)
        if self.scaler is not None:
            total = self.scaler.scale(total)
            if self.found is not None:
                total = total * torch.where(
                    self.found > 0, torch.nan, 1.0
                )  # the scaler skips these steps
        if self.one_backward and all(
            window.batches == self.accumulate - 1 for window in self.windows.values()
        ):
            self.sums = self._sums(self.windows)
        with self.working():
            backward(
                total,
                inputs,
                [parameter for one in self.windows for parameter in parameters_of(one)],
            )

    def _size_scale(self, weight: Any) -> None:
        """A sum over 1000 rows is 1000 times as large: its first scale is that much smaller, or steps are skipped."""
        if self.scaler is not None and not self.sized:
            weight = weight if self.world is None else self.world.agree(float(weight))[0]
            smaller = math.ceil(math.log2(max(float(weight), 1)))
            self.scaler.load_state_dict(
                self.scaler.state_dict() | {"scale": self.scaler.get_scale() / 2**smaller}
            )
        self.sized = True

    def step(self, optimizers: Iterable[Optimizer]) -> None:
        """One more batch in the windows of these optimizers; those that are full are closed."""
        for one in (optimizers := list(optimizers)):
            untold = not self.windows[one].batches and self.windows[one].current is None
            if untold and any(
                map(is_part, gradients_of(one))
            ):  # which call no hook as they are filled
                self.refuse("loss.backward()", "self.backward(loss)")
            self.windows[one].batches += 1
            self.windows[one].current = None
        self.close([one for one in optimizers if self.windows[one].batches == self.accumulate])

    def finish(self) -> None:
        """Close what is open."""
        self.close([one for one, window in self.windows.items() if window.batches])

    def close(self, optimizers: list[Optimizer]) -> None:
        """Step these optimizers with the gradients of their windows, and clear them."""
        with self.working():
            if self.world is not None and optimizers:
                self._reduce(optimizers)
            scaled = [self._close(one) for one in optimizers]
            if any(scaled):
                self.update_scale()

    def _close(self, one: Optimizer) -> bool:
        """Whether its gradients were scaled."""
        trained = [parameter for parameter in parameters_of(one) if parameter.grad is not None]
        scaler = self.scaler if trained else None  # it takes no step without a gradient
        if scaler is not None:
            scaler.unscale_(one)
        self.divide(gradients_of(one), self.windows[one].weight)
        look = None
        if scaler is None and self.norm_watch is not None:  # a scaler skips such a step by itself
            look = self.norm_watch.look_at_norm
        clipped(trained, self.clip_grad_norm, self.clip_grad_value, look)
        if scaler is not None:
            scaler.step(one)  # or not, where a gradient is infinite
        else:
            one.step()
        one.zero_grad()
        self.windows[one] = Window(steps=self.windows[one].steps + 1)
        return scaler is not None

    def _reduce(self, optimizers: list[Optimizer]) -> None:
        """Gradients and weights of all processes; one bad loss among them holds back all."""
        bad = 0.0 if self.finite_loss is None else self.finite_loss.own()
        sums, self.sums = self.sums or self._sums(optimizers), None
        *weights, bad = sums.finish(*(self.windows[one].weight for one in optimizers), bad)
        for one, weight in zip(optimizers, weights, strict=True):
            self.windows[one].weight = weight
        if self.finite_loss is not None:
            self.finite_loss.heard(bad)

    def _sums(self, optimizers: Iterable[Optimizer]) -> GradientSums:
        """What is trained by these, in the order of the layers; a loss's parameters come after them.

        The gradients of parameters in parts have been added up in backward.
        """
        assert self.world is not None
        trained = {
            p: None
            for one in optimizers
            for p in parameters_of(one)
            if p.requires_grad and not is_part(p)
        }
        return GradientSums(
            self.world, sorted(trained, key=lambda p: self.order.get(p, len(self.order)))
        )

    def divide(self, gradients: Iterable[Tensor], weight: Any) -> None:
        """From sums over the rows to means; where nothing was counted they stay 0."""
        if self.weighted:
            weight = (
                torch.where(weight == 0, 1, weight) if isinstance(weight, Tensor) else weight or 1
            )
            for gradient in gradients:
                gradient.div_(weight)

    def update_scale(self) -> None:
        """The scale of the next batch; gradients that wait in other windows follow it."""
        assert self.scaler is not None
        waiting = {gradient for one in self.windows for gradient in gradients_of(one)}
        before = {gradient: self.scaler.scale(gradient.new_ones(())) for gradient in waiting}
        self.scaler.update()
        for gradient, scale in before.items():
            gradient.mul_(self.scaler.scale(gradient.new_ones(())) / scale)  # a power of 2

    # --- a fit --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def fitting(self, model: nn.Module) -> Iterator[None]:
        """Empty windows; in a step of the user's own, gradients and weights that go past us are an error."""
        self._begin()
        own = overrides(model, "train_step", "backward", "optimizer_step")
        handles = self._guards() if own and self.must_be_asked() else []
        if self.world is not None:
            self.order = {parameter: number for number, parameter in enumerate(model.parameters())}
            self.one_backward = not own
            sent_early = self._sums(self.windows).bucket_of if self.one_backward else ()
            handles += [
                parameter.register_post_accumulate_grad_hook(self._arrived)
                for parameter in sent_early
            ]
        try:
            yield
        finally:
            self._begin()
            self.order, self.one_backward = {}, False
            self.found = self.finite_loss = self.norm_watch = None
            for handle in handles:
                handle.remove()

    def _arrived(self, parameter: Tensor) -> None:
        if self.sums is not None:
            self.sums.arrived(parameter)

    def outside_a_graph(self) -> str:
        """What a graph of forward, backward and step cannot hold; empty where there is nothing."""
        if self.accumulate > 1:
            return f"accumulate={self.accumulate}"
        if self.world is not None:
            return f"training on {self.world.size} processes"
        return "" if self.scaler is None else 'precision="fp16"'

    def must_be_asked(self) -> str:
        """Why a bare backward or step would be wrong; empty where it would not."""
        if self.outside_a_graph():
            return self.outside_a_graph()
        if self.clip_grad_norm is not None:
            return f"clip_grad_norm={self.clip_grad_norm:g}"
        return "" if self.clip_grad_value is None else f"clip_grad_value={self.clip_grad_value:g}"

    def refuse(self, called: str, instead: str) -> None:
        if not self.at_work:
            raise RuntimeError(
                f"{called} passes {self.must_be_asked()} by. Call {instead} in train_step."
            )

    def _guards(self) -> list[Any]:
        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.refuse("optimizer.step()", "self.optimizer_step()")

        def after_gradient(parameter: Tensor) -> None:
            self.refuse("loss.backward()", "self.backward(loss)")

        held = {parameter for one in self.windows for parameter in parameters_of(one)}
        trained = [
            parameter for parameter in held if parameter.requires_grad and not is_lazy(parameter)
        ]
        hooks = [one.register_step_pre_hook(before_step) for one in self.windows]
        return [
            *hooks,
            *(
                parameter.register_post_accumulate_grad_hook(after_gradient)
                for parameter in trained
            ),
        ]

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Our own backward or step: outside autocast, which is for forward passes."""
        self.at_work = True
        try:
            with self.no_autocast():
                yield
        finally:
            self.at_work = False

    def state_dict(self) -> dict[str, Any]:
        """The scale, and what the windows hold: gradients too, in the middle of one."""
        return {
            "accumulate": self.accumulate,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "windows": {name: asdict(self.windows[one]) for name, one in self.optimizers.items()},
            "gradients": {
                name: [p.grad for p in parameters_of(one)] for name, one in self.optimizers.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
            self.sized = True
        for name, one in self.optimizers.items():
            self.windows[one] = Window(**state["windows"][name])
            parameters, gradients = parameters_of(one), state["gradients"][name]
            if len(gradients) < len(parameters):
                raise ValueError(f"{len(gradients)} gradients for {len(parameters)} parameters")
            # there are more where on_epoch_begin, which is to come, has added a group: they are taken after it
            for parameter, gradient in zip(parameters, gradients, strict=False):
                parameter.grad = None if gradient is None else gradient.to(parameter.device)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of all its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter.grad for parameter in parameters_of(optimizer) if parameter.grad is not None]


def clipped(
    parameters: list[Tensor],
    norm: float | None,
    value: float | None,
    look: Callable[[Tensor, list[Tensor]], None] | None = None,
) -> None:
    """Clip their gradients: each by itself, then their norm together, which `look` sees before it is clipped."""
    if value is not None:
        nn.utils.clip_grad_value_(parameters, value)
    if norm is None:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    total = nn.utils.get_total_norm(gradients)
    if look is not None:
        look(total, parameters)
    nn.utils.clip_grads_with_norm_(parameters, norm, total)


def wide(leaf: Any) -> Any:
    """A half-precision tensor or packed sequence in float32, anything else as it is."""
    values = leaf.data if isinstance(leaf, PackedSequence) else leaf
    if isinstance(values, Tensor) and values.dtype in (torch.bfloat16, torch.float16):
        return leaf.float()
    return leaf


def in_float32(nest: Any) -> Any:
    """A nest with its half-precision tensors in float32."""
    return wide(nest) if isinstance(nest, Tensor) else map_leaves(wide, nest)


# --- what compile is given --------------------------------------------------------------------------------------------


def precision_of(
    device: torch.device,
    loss_func: Any,
    optimizers: Mapping[str, Optimizer],
    precision: str = "fp32",
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    accumulate: int = 1,
    world: World | None = None,
) -> Precision | None:
    """What compile's arguments ask for, checked; None where they ask for nothing."""
    one_of("precision", precision, (*DTYPES, "auto"))
    clips = {"clip_grad_norm": clip_grad_norm, "clip_grad_value": clip_grad_value}
    for name, most in clips.items():
        if most is not None:
            clips[name] = real(name, most, "above 0, or None", lambda number: number > 0)
    dtype = best_dtype(device) if precision == "auto" else DTYPES[precision]
    check_dtype(device, dtype, precision, optimizers)
    if positive_int("accumulate", accumulate) > 1:
        check_mean(loss_func, f"accumulate={accumulate}")
    if world is not None:
        check_mean(loss_func, f"training on {world.size} processes")
    elif dtype is None and accumulate == 1 and set(clips.values()) == {None}:
        return None
    return Precision(device, optimizers, dtype, **clips, accumulate=accumulate, world=world)


def best_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where CUDA has it, else float16 on CUDA; elsewhere float32 alone."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )


def check_dtype(
    device: torch.device,
    dtype: torch.dtype | None,
    precision: str,
    optimizers: Mapping[str, Optimizer],
) -> None:
    """The device must have the dtype, and the parameters must be wider than it."""
    if dtype is None:
        return
    try:
        if not torch.amp.is_autocast_available(device.type):
            raise RuntimeError("torch has no autocast there")
        torch.autocast(device.type, dtype)
    except RuntimeError as error:
        raise ValueError(
            f'precision={precision!r} cannot be had on {device}: {error}. Pass precision="auto", or leave it out.'
        ) from error
    narrow = next(
        (p for one in optimizers.values() for p in parameters_of(one) if wide(p) is not p), None
    )
    if narrow is not None:
        raise ValueError(
            f"precision={precision!r} keeps the parameters in float32 and casts within the step, and they are "
            f"{dtype_name(narrow)}. Call model.float() before you make the optimizer."
        )


def check_mean(loss_func: Any, what: str) -> None:
    """Batches are put together by their rows, which a sum over rows has counted already."""
    inner = loss_func.loss_func if isinstance(loss_func, Regularized) else loss_func
    if getattr(inner, "reduction", None) == "sum":
        raise ValueError(
            f'loss_func has reduction="sum", and {what} weighs each batch by its rows, which such a '
            f'sum has counted already. Build it with reduction="mean", or return minikeras.Average(total, count).'
        )
