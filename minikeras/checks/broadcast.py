"""Find outputs and labels that broadcast, such as (N, 1) with (N,), inside any loss or metric.

for each torch function that the loss calls:
    a tensor computed from the outputs alone belongs to the outputs, one from the labels alone to
    the labels
    two tensors, one of each, with the same number of elements but different shapes, and a result
    of the larger shape: record the mistake
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minikeras.nests import leaves

CLASS_LOSSES = ("cross_entropy", "nll_loss")  # take one class index per row
NOT_ELEMENTWISE = (
    *CLASS_LOSSES,
    "ctc_loss",
    "cosine_embedding_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
)
LOSS_ENDINGS = ("_loss", "_div", "binary_cross_entropy", "binary_cross_entropy_with_logits")


class BroadcastGuard(TorchFunctionMode):
    """Record whether outputs and labels broadcast by mistake, such as (N, 1) with (N,).

    They have the same number of elements but different shapes. The guard follows the tensors
    derived from the outputs alone and from the labels alone. It is a mistake if one of each meet in
    an operation whose result has the larger shape, or in an elementwise loss of
    torch.nn.functional, which reduces the result at once. Computations in NumPy are not seen.
    """

    def __init__(self, outputs: Any, labels: Any) -> None:
        super().__init__()
        output_tensors = _tensors(outputs)
        label_tensors = _tensors(labels)
        # by id, next to the tensor itself: the id of a freed tensor would be used again
        self.side: dict[int, tuple[str, Tensor]] = {}
        for tensor in output_tensors:
            self.side[id(tensor)] = ("outputs", tensor)
        for tensor in label_tensors:
            self.side[id(tensor)] = ("labels", tensor)
        # outputs and labels of the same shape that are crossed later are crossed on purpose
        output_shapes = {tensor.shape for tensor in output_tensors}
        self.alike = output_shapes & {tensor.shape for tensor in label_tensors}
        self.found: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _tensors([args, kwargs or {}])
        elementwise = _is_elementwise_loss(func)
        wide = self._find_pair(inputs, elementwise)
        if wide and elementwise:
            self._record(wide)
        with warnings.catch_warnings():
            if wide or self.found:
                # torch's own "Using a target size": our error is raised instead
                warnings.simplefilter("ignore")
            try:
                result = func(*args, **(kwargs or {}))
            except RuntimeError as error:
                # an in-place operation, whose result cannot grow
                if wide and "broadcast" in str(error):
                    self._record(wide)
                raise
        sides = {self.side[id(tensor)][0] for tensor in inputs if id(tensor) in self.side}
        for part in _tensors(result):  # max, topk, chunk and split return several
            if wide and part.shape == wide[2]:
                self._record(wide)
            if len(sides) == 1:
                self.side[id(part)] = (next(iter(sides)), part)
        return result

    def _of_side(self, side: str, tensors: list[Tensor]) -> list[Tensor]:
        found = []
        for tensor in tensors:
            if id(tensor) in self.side and self.side[id(tensor)][0] == side:
                found.append(tensor)
        return found

    def _find_pair(
        self, inputs: list[Tensor], elementwise: bool
    ) -> tuple[Tensor, Tensor, torch.Size] | None:
        """Find a tensor of the outputs and one of the labels that broadcast to a larger shape.

        Returns both and that shape.
        """
        from_labels = self._of_side("labels", inputs)
        for output in self._of_side("outputs", inputs):
            for label in from_labels:
                if not self._are_mismatched(output, label, elementwise):
                    continue
                try:
                    shape = torch.broadcast_shapes(output.shape, label.shape)
                except RuntimeError:
                    if elementwise:
                        self._record_unequal(output, label)
                    continue
                if shape.numel() > output.numel():
                    return output, label, shape
        return None

    def _are_mismatched(self, output: Tensor, label: Tensor, elementwise: bool) -> bool:
        if elementwise:
            differ = output.shape != label.shape
        else:
            # with the same number of dimensions they were crossed on purpose, as for a matrix of
            # distances
            differ = output.ndim != label.ndim
        crossed_on_purpose = min(output, label, key=Tensor.dim).shape in self.alike
        return differ and not crossed_on_purpose and output.numel() == label.numel() > 1

    def _record_unequal(self, output: Tensor, label: Tensor) -> None:
        """Record predictions (N, 12) and labels (N, 12, 1), which torch cannot even broadcast."""
        if self.found is not None or output.squeeze().shape != label.squeeze().shape:
            return
        if label.shape == (*output.shape, 1):
            method = "squeeze(-1)"
        elif output.shape == (*label.shape, 1):
            method = "unsqueeze(-1)"
        else:
            sizes = "".join(f", {size}" for size in output.shape[1:])
            method = f"reshape(-1{sizes})"
        self.found = (
            f"predictions {tuple(output.shape)} and labels {tuple(label.shape)} hold the same "
            f"values in different shapes. Pass labels.{method}."
        )

    def _record(self, wide: tuple[Tensor, Tensor, torch.Size]) -> None:
        output, label, shape = wide
        if self.found is not None:
            return
        outputs_have_more = output.ndim > label.ndim
        more, fewer = (output, label) if outputs_have_more else (label, output)
        dim = _extra_dim(more.shape, fewer.shape)
        if dim is None:
            method = f"reshape{tuple(output.shape)}"
        elif outputs_have_more:
            method = f"unsqueeze({dim})"
        else:
            method = f"squeeze({dim})"
        elsewhere = ""
        if dim == -1 and label.ndim == 1:
            elsewhere = ", in NumPy labels[:, None], in pandas labels.to_frame()"
        inverse = "squeeze" if outputs_have_more else "unsqueeze"
        self.found = (
            f"predictions {tuple(output.shape)} and labels {tuple(label.shape)} would broadcast to "
            f"{tuple(shape)}. Pass labels.{method}{elsewhere}, or {inverse} the predictions."
        )


def _extra_dim(more: torch.Size, fewer: torch.Size) -> int | None:
    """Return the dimension that `more` has and `fewer` lacks; -1 for the last, None if none."""
    dims = []
    for dim in range(len(more)):
        if more[:dim] + more[dim + 1 :] == fewer:
            dims.append(dim)
    if len(more) - 1 in dims:
        return -1
    return dims[0] if dims else None


def _is_elementwise_loss(func: Any) -> bool:
    """Tell whether a function is an elementwise loss of torch.nn.functional."""
    if getattr(func, "__module__", "") != F.__name__:
        return False
    return func.__name__.endswith(LOSS_ENDINGS) and func.__name__ not in NOT_ELEMENTWISE


def _tensors(nest: Any) -> list[Tensor]:
    """Return the tensors in a nest."""
    return [leaf for leaf in leaves(nest) if isinstance(leaf, Tensor)]
