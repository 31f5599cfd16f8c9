"""Find NaN or infinite weights and buffers after finite losses, before they reach a file.

at the start of a fit     record what is not finite already, such as a mask of -inf, and allow it
at the end of an epoch    after the last step of training; before validation, callbacks and files
before a file is written  the state of the run, or weights that `save` writes within the fit
before a clipped step     the norm of the gradients, computed anyway: see `FiniteLoss.look_at_norm`

A check is one reduction of each tensor, and waits for the device once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from minikeras.faults.loss import (
    CAUSE,
    REMEDY,
    FiniteLoss,
    NonFiniteGradient,
    NonFiniteLoss,
    last_loss,
    shown_rates,
)
from minikeras.nests import is_sharded
from minikeras.processes import OneProcess

ANOMALY = "torch.autograd.set_detect_anomaly(True) names the operation."
LOOKED_AT = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
OF_THE_LOSS = "the loss's "  # in front of the names of its parameters and buffers
# in the order in which a message looks for the cause
KINDS = ("parameter", "gradient", "buffer", "state", "average")


class NonFiniteWeights(NonFiniteLoss):
    """Weights, buffers, gradients or the optimizer's state are NaN or infinite, and no loss was."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__(float("nan"))
        # kind and name of each tensor; empty if they are in another process alone
        self.found = found


class FiniteWeights:
    """Watch the tensors of a fit.

    Args:
        model, loss_func, optimizers: what is trained.
        world: the processes that train together.
        finite_loss: watches the losses; None for on_nan="ignore".
        gradients_wait: gradients of several batches wait for a step, and must be finite.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_func: Any,
        optimizers: Mapping[str, Optimizer],
        world: OneProcess,
        finite_loss: FiniteLoss | None = None,
        gradients_wait: bool = False,
    ) -> None:
        self.model = model
        self.loss_func = loss_func
        self.optimizers = optimizers
        self.world = world
        self.finite_loss = finite_loss
        self.gradients_wait = gradients_wait
        # name -> shape, and a mask of what was not finite as the fit began
        self.begun: dict[str, tuple[Any, Tensor | None]] = {}
        named = dict(self._weights())
        spoiled = set(self._find(named))
        for key, tensor in named.items():
            mask = ~tensor.isfinite() if key in spoiled else None
            self.begun[key[1]] = (tensor.shape, mask)

    def check(self) -> None:
        """Check weights, buffers and the state of the optimizers.

        Several processes hear of each other's as they add up the totals, and raise it then.

        Raises:
            NonFiniteWeights: one is not finite and was as the fit began, in any of the processes.
        """
        found = self._find(dict([*self._weights(), *self._state()]))

        def hear(is_anywhere: bool) -> None:
            if is_anywhere:
                raise NonFiniteWeights(found)

        self.world.tell_with_totals(bool(found), hear)

    def allow(self, path: Any, averages: Iterable[tuple[str, str, Tensor]] = ()) -> bool:
        """Tell whether a file may be written; with on_nan="ignore" warn if it may not.

        Args:
            path: of the file.
            averages: what else would be in it: a title, the name of the parameter that it is an
                average of, a tensor.

        Raises:
            NonFiniteLoss: a loss, or something that would be in the file, is not finite.
        """
        named = dict([*self._weights(), *self._state(), *self._waiting_gradients()])
        for title, name, tensor in averages:
            for key, local in select_checkable("parameter", name, tensor):
                named["average", title] = self._without_known(key, local)
        found = self._find(named)
        if self.finite_loss is None:
            if self._anywhere(bool(found)):
                warnings.warn(
                    f"{path} is not written: {listed(found) or 'weights of another process'} would "
                    f"be NaN or infinite in it. An existing file is unchanged. Pass "
                    'on_nan="raise" to stop the fit when that happens.',
                    stacklevel=7,
                )
                return False
            return True
        self._raise_if_bad_loss(self.finite_loss)
        self._raise_if_any(found)
        return True

    def suspects(self) -> tuple[list[str], list[str]]:
        """Return the names of what may have made a loss NaN.

        First those that are not finite and were as the fit began, then those that were NaN then.
        """
        since = [name for _, name in self._find(dict(self._weights()))]
        before = []
        for (_, name), tensor in self._weights():
            _, mask = self.begun.get(name, (None, None))
            if mask is not None and bool(tensor.isnan().any()):
                before.append(name)
        return since, before

    def _raise_if_bad_loss(self, finite_loss: FiniteLoss) -> None:
        """Raise an error for a bad loss; on a device the count is read now, before it is due."""
        if self.world.size == 1:
            finite_loss.ended()
            return
        own = bool(finite_loss.own())  # which the others do not know yet
        if self._anywhere(own):
            error = NonFiniteLoss(finite_loss.value if finite_loss.reads_each else float("nan"))
            error.elsewhere = not own
            raise error

    def _raise_if_any(self, found: list[tuple[str, str]]) -> None:
        if self._anywhere(bool(found)):
            raise NonFiniteWeights(found)

    def _anywhere(self, here: bool) -> bool:
        return bool(self.world.agree(here)[0])

    # --- what is checked --------------------------------------------------------------------------

    def _prefixed_modules(self) -> list[tuple[str, nn.Module]]:
        modules = [("", self.model)]
        if isinstance(self.loss_func, nn.Module):
            modules.append((OF_THE_LOSS, self.loss_func))
        return modules

    def _weights(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        for prefix, module in self._prefixed_modules():
            for name, parameter in module.named_parameters():
                yield from select_checkable("parameter", prefix + name, parameter)
            for name, buffer in module.named_buffers():
                yield from select_checkable("buffer", prefix + name, buffer)

    def _prefixed_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self._prefixed_modules():
            for name, parameter in module.named_parameters():
                yield prefix + name, parameter

    def _state(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Yield the state of torch's own optimizers; in others an infinity may have a meaning."""
        for optimizer in self.optimizers.values():
            if not type(optimizer).__module__.startswith("torch.optim"):
                continue
            for name, parameter in self._prefixed_parameters():
                for key, value in optimizer.state.get(parameter, {}).items():
                    title = f"{key} of {type(optimizer).__name__} for {name}"
                    yield from select_checkable("state", title, value)

    def _waiting_gradients(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Yield gradients that wait for a step; in float16 the scaler skips infinite ones."""
        if not self.gradients_wait:
            return
        for name, parameter in self._prefixed_parameters():
            if parameter.grad is not None:
                yield from select_checkable("gradient", name, parameter.grad)

    @torch.no_grad()
    def _find(self, named: Mapping[tuple[str, str], Tensor]) -> list[tuple[str, str]]:
        """Return the keys of tensors with NaN or infinities that they did not have at first."""
        tensors = []
        for key, tensor in named.items():
            comparable = self._without_known(key, tensor)
            if comparable.is_complex():
                comparable = torch.view_as_real(comparable)
            tensors.append(comparable)
        # A sum is finite only if all its terms are, and is quicker than a minimum and a maximum.
        if all(_are_finite([_sum(tensor) for tensor in tensors])):
            return []
        extremes = []  # a sum of finite numbers may be infinite
        for tensor in tensors:
            extremes += [tensor.min(), tensor.max()]  # NaN where one value is
        finite = _are_finite(extremes)
        keys = []
        for number, key in enumerate(named):
            if not (finite[2 * number] and finite[2 * number + 1]):
                keys.append(key)
        return keys

    def _without_known(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        """Return a tensor without the values that may be infinite."""
        kind, name = key
        if kind not in ("parameter", "buffer") or not self.begun:
            return tensor
        shape, mask = self.begun.get(name, (None, None))
        if shape == tensor.shape:
            return tensor if mask is None else torch.where(mask, torch.zeros_like(tensor), tensor)
        if kind == "buffer":
            # a new one, such as a mask for attention of another length: -inf has a meaning there
            return tensor.nan_to_num(nan=float("nan"), posinf=0.0, neginf=0.0)
        return tensor


def _are_finite(numbers: list[Tensor]) -> list[bool]:
    """Tell of each 0-d tensor whether it is finite; waits for the device, once."""
    if not numbers:
        return []
    device = numbers[0].device
    on_one_device = []
    for number in numbers:
        on_one_device.append(number if number.device == device else number.to(device))
    finite: list[bool] = torch.stack(on_one_device).isfinite().tolist()
    return finite


def _sum(tensor: Tensor) -> Tensor:
    """Add up a tensor; in float32 if it has 16 bits, whose sums overflow soon."""
    return tensor.sum(dtype=torch.float32 if tensor.dtype.itemsize == 2 else None)


def select_checkable(kind: str, name: str, tensor: Any) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield a tensor, or this process's shard, under its key; nothing if it cannot be checked."""
    if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.is_meta:
        return
    if is_sharded(tensor):
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    if tensor.dtype in LOOKED_AT and tensor.layout == torch.strided and tensor.numel() > 0:
        yield (kind, name), tensor.detach()


# --- what is said of it ---------------------------------------------------------------------------


def explain_weights(
    error: NonFiniteWeights,
    model: nn.Module,
    epoch: int,
    rates: Mapping[str, float],
    watch: FiniteLoss,
) -> str:
    """Return the message: what is not finite, where, the likely cause, and what to do."""
    batch = error.batch[2]
    where = f"epoch {epoch}, batch {batch}" if batch else f"epoch {epoch}"
    if not error.found:
        return (
            f"weights are NaN or infinite in another process in {where}; expected finite weights. "
            "See the error message of that process. Restore a checkpoint."
        )
    kinds = {found for found, _ in error.found}
    kind = next(kind for kind in KINDS if kind in kinds)
    of_kind = [key for key in error.found if key[0] == kind]
    subject = f"the gradient of {listed(of_kind)}" if kind == "gradient" else listed(of_kind)
    verb = "is" if len(of_kind) == 1 else "are"
    sentences = [f"{subject} {verb} NaN or infinite in {where}; expected finite numbers."]
    if kind in ("parameter", "gradient"):
        sentences.append(layer_of(model, of_kind[0][1]))
    if watch.looked:
        sentences.append(f"{last_loss(error, watch)} at {shown_rates(rates)}.")
    if kind == "buffer":
        sentences.append(
            "The weights are finite, so the forward pass caused it, as a batch with inf does to "
            "the statistics of BatchNorm. Clean the data."
        )
    elif kind == "state":
        sentences.append(
            "The weights are finite: a gradient was so large that its square is infinite, and "
            "such a weight is never updated again. Make the loss smaller, or compile with "
            "clip_grad_norm=1.0."
        )
    elif kind == "average":
        sentences.append(
            "The weights are finite now: the average included them after a step when they were "
            "not, and it cannot become finite again. Find that step, for instance with "
            "compile(clip_grad_norm=1.0)."
        )
    elif watch.looked:
        sentences.append(
            f"Each loss was finite, so a gradient was not, or a step was too large: {CAUSE}. "
            f"{REMEDY}"
        )
    else:
        sentences.append(
            "No loss was checked: train_step calls loss.backward() directly. Call "
            "self.backward(loss) instead, which finds a bad loss before the weights are updated. "
            f"If it was finite, a gradient was not: {CAUSE}. {REMEDY}"
        )
    if kind in ("parameter", "gradient"):
        sentences.append(
            f"compile(clip_grad_norm=1.0) finds such a gradient before its step, and {ANOMALY}"
        )
    sentences.append(
        "Nothing of it was written to a file, but the model contains it: restore a checkpoint."
    )
    return " ".join(sentences)


def explain_gradient(
    error: NonFiniteGradient,
    model: nn.Module,
    epoch: int,
    rates: Mapping[str, float],
    watch: FiniteLoss,
) -> str:
    """Return the message for a norm of gradients that is not finite, found before the step."""
    began = f" (it started {error.ago} steps before)" if error.ago else ""
    sentences = [
        f"the norm of the gradient is {error.value} in epoch {epoch}, batch {error.batch[2]}"
        f"{began}; expected a finite number. The loss was finite. {last_loss(error, watch)} at "
        f"{shown_rates(rates)}."
    ]
    name = None  # of the first parameter whose gradient is not finite
    for candidate, parameter in model.named_parameters():
        if parameter is error.parameter:
            name = candidate
    if error.overflown:
        sentences.append(
            "Each gradient is finite, and the sum of their squares is not: make the loss smaller."
        )
    else:
        if name is not None:
            sentences.append(
                f"The first gradient that is not finite is that of {name}. {layer_of(model, name)}"
            )
        sentences.append(
            f"Its gradient was not: {CAUSE}; large numbers overflow. {REMEDY} {ANOMALY}"
        )
    if watch.holds_back:
        sentences.append("The weights are those from before this step.")
    else:
        sentences.append("The optimizer has taken steps since: restore a checkpoint.")
    return " ".join(sentences)


def layer_of(model: nn.Module, name: str) -> str:
    """Return a sentence about the layer that a parameter is in."""
    path = name.rpartition(".")[0]
    if name.startswith(OF_THE_LOSS):
        return "It is a parameter of the loss."
    kind = type(model.get_submodule(path)).__name__
    if path:
        return f"The first layer is {path} ({kind})."
    return f"It is a parameter of {kind} itself."


def listed(found: Iterable[tuple[str, str]]) -> str:
    """Return the first names, and how many more there are."""
    names = [name for _, name in found]
    more = ""
    if len(names) > 3:
        more = f" and {len(names) - 3} more"
    return ", ".join(names[:3]) + more
