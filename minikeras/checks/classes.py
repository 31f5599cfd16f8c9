"""Check which dimension of the outputs holds the classes.

torch's losses over classes take (rows, classes, ...), and most layers put the classes last.

scores (rows, steps, classes) with labels (rows, steps):
    steps != classes     torch raises, and the error says which dimension is wrong
    steps == classes     torch silently takes the steps for classes: a warning, if the model puts
                         the classes last
class probabilities (rows, steps, classes) as labels:
    an error if they add up to 1 along the last dimension only
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

REMEDY = (
    "End forward with .movedim(-1, 1); or keep forward and pass as loss_func "
    "lambda y_pred, y_true: nn.functional.{}(y_pred.movedim(-1, 1), {}). If the loss ignores "
    "labels, such as padding, let it return minikeras.Average(total, count)."
)
CHANNELS_FIRST = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.GroupNorm,
)
# words in the names of autograd nodes that move dimensions or give the classes in dimension 1
MOVED = ("Transpose", "Permute", "Convolution", "BatchNorm", "GroupNorm")
# words in the names of autograd nodes that give the classes in the last dimension
LAST = ("Addmm", "MmBackward", "Bmm", "Linear", "Embedding", "LayerNorm")
NODES = 30  # autograd nodes that are looked at, from the outputs backward


def explain_class_dimension(
    outputs: Tensor, labels: Tensor, function: str = "cross_entropy"
) -> str:
    """Say that the classes of the scores are last, if the shapes show it; else return ""."""
    if outputs.ndim < 3 or labels.shape != outputs.shape[:-1] or labels.is_floating_point():
        return ""
    if labels.shape == (outputs.shape[0], *outputs.shape[2:]):
        return ""
    return (
        f"predictions have shape {tuple(outputs.shape)} and labels {tuple(labels.shape)}: the "
        "classes are last, and the loss takes them in dimension 1. "
        f"{REMEDY.format(function, 'y_true')}"
    )


def check_class_dimension(
    function: str, outputs: Tensor, labels: Tensor, model: nn.Module, warn: bool
) -> None:
    """Check that scores over steps do not have their classes last.

    Warn if the shapes leave it open, `warn` is True and the model puts the classes last.

    Raises:
        ValueError: the shapes or the values show that the classes are last.
    """
    if outputs.ndim < 3:
        return
    wrong = explain_class_dimension(outputs, labels, function)
    if wrong:
        raise ValueError(wrong)
    shown = f"predictions have shape {tuple(outputs.shape)} and labels {tuple(labels.shape)}"
    if labels.shape == outputs.shape and labels.is_floating_point():
        if adds_up_to_one(labels, -1) and not adds_up_to_one(labels, 1):
            raise ValueError(
                f"{shown}: the labels add up to 1 over the last dimension, and the loss takes the "
                f"classes in dimension 1. {REMEDY.format(function, 'y_true.movedim(-1, 1)')}"
            )
        return
    if labels.shape != outputs.shape[:-1] or labels.is_floating_point():
        return
    # From here on, either of the last two dimensions may hold the classes.
    if function == "nll_loss":
        scores = outputs.detach().float().exp()
        if adds_up_to_one(scores, -1) and not adds_up_to_one(scores, 1):
            raise ValueError(
                f"{shown}: the predictions are log-probabilities over the last dimension, and the "
                f"loss takes the classes in dimension 1. {REMEDY.format(function, 'y_true')}"
            )
        return
    if warn and gives_classes_last(outputs, model):
        warnings.warn(
            f"{shown}, so that either of the last two dimensions may hold the classes. The loss "
            "takes dimension 1, and the model's last layer gives its values in the last one. If "
            f"the classes are last: {REMEDY.format(function, 'y_true')}",
            stacklevel=3,
        )


def adds_up_to_one(values: Tensor, dim: int) -> bool:
    """Tell whether values are probabilities over a dimension."""
    values = values.detach().float()
    return bool((values >= 0).all()) and bool(((values.sum(dim) - 1).abs() < 1e-3).all())


def gives_classes_last(outputs: Tensor, model: nn.Module) -> bool:
    """Tell whether the outputs come from a layer such as nn.Linear, with no dimension moved after.

    Such a layer gives the values of one step in the last dimension.
    """
    if outputs.stride(1) < outputs.stride(-1):  # a view with its dimensions moved
        return False
    widths = find_widths(model)
    # A last size that no layer has: one long row of scores was cut into classes and steps.
    if widths and outputs.shape[-1] not in widths:
        return False
    node: Any = outputs.grad_fn
    for _ in range(NODES):
        if node is None:
            break
        if any(word in node.name() for word in MOVED):
            return False
        if any(word in node.name() for word in LAST):
            return True
        earlier = [function for function, _ in node.next_functions if function is not None]
        node = earlier[0] if earlier else None
    last_layer = None
    for layer in model.modules():
        if list(layer.parameters(recurse=False)):
            last_layer = layer
    return last_layer is not None and not isinstance(last_layer, CHANNELS_FIRST)


def find_widths(model: nn.Module) -> set[int]:
    """Collect how many values each layer gives, of layers that give them in the last dimension."""
    widths: set[int] = set()
    for layer in model.modules():
        for name in ("out_features", "embedding_dim", "hidden_size", "embed_dim"):
            width = getattr(layer, name, None)
            if isinstance(width, int):
                widths.add(width)
        if isinstance(layer, nn.LayerNorm):
            widths.add(layer.normalized_shape[-1])
    return widths
