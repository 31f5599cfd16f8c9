"""Finds outputs and labels that broadcast each other, (N, 1) against (N,), inside any loss or metric.

each torch function that the loss calls:
    a tensor made from the outputs only is of the outputs' side; one made from the labels only, of the labels'
    one of each side, of as many elements but another shape, that give the larger shape: noted
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minikeras.nests import leaves

CLASS_LOSSES = ("cross_entropy", "nll_loss")  # take a class index a row
NOT_ELEMENTWISE = (
    *CLASS_LOSSES,
    "ctc_loss",
    "cosine_embedding_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
)


class BroadcastGuard(TorchFunctionMode):
    """Notes where outputs and labels of as many elements but another shape broadcast each other: (N, 1) against (N,).

    Follows the tensors derived from the outputs only and from the labels only. It is wrong when one of each meet in an
    op whose result has the larger shape, or in an elementwise loss of torch.nn.functional, which reduces it at once.
    What is done in NumPy is not seen.
    """

    def __init__(self, outputs: Any, labels: Any) -> None:
        super().__init__()
        # by identity, with the tensor itself beside it: a freed tensor's id would be used again
        self.side = {
            id(leaf): ("outputs", leaf) for leaf in leaves(outputs) if isinstance(leaf, Tensor)
        }
        self.side |= {
            id(leaf): ("labels", leaf) for leaf in leaves(labels) if isinstance(leaf, Tensor)
        }
        shapes = [
            {leaf.shape for leaf in leaves(nest) if isinstance(leaf, Tensor)}
            for nest in (outputs, labels)
        ]
        self.alike = (
            shapes[0] & shapes[1]
        )  # what came in one shape and is crossed was crossed on purpose
        self.found: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in leaves([args, kwargs or {}]) if isinstance(leaf, Tensor)]
        elementwise = (
            getattr(func, "__module__", "") == F.__name__
            and func.__name__.endswith(
                ("_loss", "_div", "binary_cross_entropy", "binary_cross_entropy_with_logits")
            )
            and func.__name__ not in NOT_ELEMENTWISE
        )
        wide = self._wide(inputs, elementwise)
        if wide and elementwise:
            self._note(wide)
        with warnings.catch_warnings():
            if wide or self.found:
                warnings.simplefilter(
                    "ignore"
                )  # torch's own "Using a target size": ours is raised for it
            try:
                result = func(*args, **(kwargs or {}))
            except RuntimeError as error:
                if wide and "broadcast" in str(error):  # an op in place, whose result cannot grow
                    self._note(wide)
                raise
        sides = {self.side[id(tensor)][0] for tensor in inputs if id(tensor) in self.side}
        for part in leaves(result):  # max, topk, chunk and split give several
            if isinstance(part, Tensor):
                if wide and part.shape == wide[2]:
                    self._note(wide)
                if len(sides) == 1:
                    self.side[id(part)] = (next(iter(sides)), part)
        return result

    def _wide(
        self, inputs: list[Tensor], elementwise: bool
    ) -> tuple[Tensor, Tensor, torch.Size] | None:
        """A tensor of the outputs, one of the labels, and the larger shape they would broadcast to."""
        from_outputs = [
            tensor for tensor in inputs if self.side.get(id(tensor), "?")[0] == "outputs"
        ]
        from_labels = [tensor for tensor in inputs if self.side.get(id(tensor), "?")[0] == "labels"]
        for one in from_outputs:
            for other in from_labels:
                # with as many dimensions they were put crosswise on purpose, as for a matrix of distances
                differ = one.shape != other.shape if elementwise else one.ndim != other.ndim
                crossed = min(one, other, key=Tensor.dim).shape in self.alike
                if differ and not crossed and one.numel() == other.numel() > 1:
                    try:
                        wide = torch.broadcast_shapes(one.shape, other.shape)
                    except RuntimeError:
                        if elementwise:
                            self._note_unequal(one, other)
                        continue
                    if wide.numel() > one.numel():
                        return one, other, wide
        return None

    def _note_unequal(self, one: Tensor, other: Tensor) -> None:
        """Predictions (N, 12) and labels (N, 12, 1), which torch cannot even broadcast."""
        if self.found is None and one.squeeze().shape == other.squeeze().shape:
            verb = f"reshape(-1{''.join(f', {size}' for size in one.shape[1:])})"
            if other.shape == (*one.shape, 1):
                verb = "squeeze(-1)"
            elif one.shape == (*other.shape, 1):
                verb = "unsqueeze(-1)"
            self.found = (
                f"predictions {tuple(one.shape)} and labels {tuple(other.shape)} hold the same values in different "
                f"shapes. Pass labels.{verb}."
            )

    def _note(self, wide: tuple[Tensor, Tensor, torch.Size]) -> None:
        one, other, shape = wide
        if self.found is None:
            longer = one.ndim > other.ndim
            here, there = (one, other) if longer else (other, one)
            dims = [
                d for d in range(here.ndim) if here.shape[:d] + here.shape[d + 1 :] == there.shape
            ]
            dim = -1 if here.ndim - 1 in dims else dims[0] if dims else None
            verb = (
                f"reshape{tuple(one.shape)}"
                if dim is None
                else f"{'un' if longer else ''}squeeze({dim})"
            )
            array = ", in NumPy labels[:, None], in pandas labels.to_frame()" * (
                dim == -1 and other.ndim == 1
            )
            self.found = (
                f"predictions {tuple(one.shape)} and labels {tuple(other.shape)} would broadcast to {tuple(shape)}. "
                f"Pass labels.{verb}{array}, or {'' if longer else 'un'}squeeze the predictions."
            )
