"""Checks that the rows of a batch do not see each other.

The gradient of one row's output with respect to another row's input is 0, unless rows are mixed.
Where inputs are whole numbers, such as tokens, the other rows are changed instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minikeras.diagnosis.copies import silenced
from minikeras.diagnosis.evidence import Evidence, copy_leaf
from minikeras.diagnosis.findings import Finding
from minikeras.diagnosis.kinds import BATCH_NORMS
from minikeras.nests import leaves, map_leaves

ROWS = 6  # of the batch that is looked at
SEED = 0  # of the random directions; the global generator is left alone
# relative to the gradient of a row's own input; matrix products of other sizes round differently
SMALL = 1e-5


def check_rows_are_separate(evidence: Evidence) -> Iterator[Finding]:
    """Find outputs of a row that depend on the input of another row."""
    features = take_rows(evidence)
    if features is None:
        return
    model = evidence.model
    model.eval()
    with silenced(), without_fastpath():
        share = measure_mixing(model, features)
        if share is None or share <= SMALL:
            return
        layer = find_mixing_layer(model, features)
    yield Finding(
        "error",
        f"{layer or 'forward'}: rows of a batch",
        f"the output of one row changes with the input of another, {share:.0%} as much as with its "
        "own",
        "no effect",
        f"The rows are mixed{' before or in this layer' if layer else ''}: predictions depend on "
        f"which rows share a batch. {explain(model, layer)}",
    )


def explain(model: nn.Module, layer: str) -> str:
    """Return what to change."""
    module = dict(model.named_modules()).get(layer.partition(" ")[0])
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and not module.batch_first:
        return (
            f"{type(module).__name__} takes (steps, rows, ...) here: pass batch_first=True, or "
            "give it features.transpose(0, 1)."
        )
    if isinstance(module, BATCH_NORMS):
        return (
            "With track_running_stats=False it uses the batch's own mean in eval mode too: leave "
            "that argument out."
        )
    if isinstance(module, nn.Softmax):
        return "A softmax over dim=0 goes over the rows: pass dim=1, or dim=-1."
    return (
        "Look for view, reshape, transpose or permute that move dimension 0 (flatten with "
        "x.flatten(1)), for a softmax, mean or norm over dim=0, and for batch_first=True."
    )


def take_rows(evidence: Evidence) -> Any:
    """Return the first rows of the features; None if they are not plain rows."""
    if not evidence.output_batches:
        return None  # forward does not take the features, as in a custom train_step
    features = evidence.train.batches[0][0]
    size = evidence.train.sizes[0]
    tensors = [leaf for leaf in leaves(features) if isinstance(leaf, Tensor)]
    if not tensors or len(tensors) != len(leaves(features)) or size < 2:
        return None
    if any(not tensor.ndim or tensor.shape[0] != size for tensor in tensors):
        return None  # such as the edges of a graph
    if any(tensor.is_nested for tensor in tensors):
        return None  # rows of different lengths

    def first_rows(leaf: Tensor) -> Tensor:
        return pick_rows(leaf, range(min(ROWS, size)))

    return map_leaves(first_rows, features)


def pick_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return a copy of some rows of a tensor, which may be sparse."""
    numbers = torch.tensor(rows, device=tensor.device)
    if tensor.layout is torch.strided:
        return tensor.detach()[numbers]
    # the only sparse layout with index_select
    picked: Tensor = tensor.detach().to_sparse_coo().index_select(0, numbers).coalesce()
    return picked if tensor.layout is torch.sparse_coo else picked.to_sparse(layout=tensor.layout)


def measure_mixing(model: Any, features: Any) -> float | None:
    """Return how much the other rows count for the output of a row, relative to the row itself.

    None if the outputs are no rows, or not finite.
    """
    has_gradient = all(
        leaf.is_floating_point() and leaf.layout is torch.strided for leaf in leaves(features)
    )
    if has_gradient:
        share = measure_by_gradient(model, features)
        if share is not None:
            return share
    return measure_by_change(model, features)


def measure_by_gradient(model: Any, features: Any) -> float | None:
    """Return the largest gradient with respect to another row, relative to that of the row."""
    inputs = map_leaves(lambda leaf: leaf.detach().clone().requires_grad_(), features)
    with torch.enable_grad():
        # a layer may write into its input, which a leaf with a gradient does not allow
        try:
            outputs = model.compute_outputs(map_leaves(lambda leaf: leaf * 1, inputs))
        except RuntimeError:
            return None
    rows = leaves(inputs)[0].shape[0]
    tensors = rows_of(outputs, rows)
    if not tensors or not any(tensor.requires_grad for tensor in tensors):
        return None
    generator = torch.Generator().manual_seed(SEED)
    own = other = 0.0
    for row in range(rows):
        loss: Any = 0
        for tensor in tensors:
            if tensor.requires_grad:
                direction = torch.randn(tensor.shape[1:], generator=generator)
                loss = loss + (tensor[row] * direction.to(tensor)).sum()
        gradients = torch.autograd.grad(loss, leaves(inputs), retain_graph=True, allow_unused=True)
        for gradient in gradients:
            if gradient is None:
                continue
            sizes = gradient.detach().float().reshape(rows, -1).abs().amax(1)
            own = max(own, sizes[row].item())
            sizes[row] = 0
            other = max(other, sizes.max().item())
    if not own and not other:
        return None
    return other / max(own, other)


def measure_by_change(model: Any, features: Any) -> float | None:
    """Return how much the last row changes with the others, relative to a change of its own."""
    first = outputs_of(model, features)
    rows = leaves(features)[0].shape[0]

    def replace_last(leaf: Tensor) -> Tensor:
        return pick_rows(leaf, [*range(rows - 1), 0])

    moved = outputs_of(model, map_leaves(replace_others, features))
    replaced = outputs_of(model, map_leaves(replace_last, features))
    tensors = [rows_of(outputs, rows) for outputs in (first, moved, replaced)]
    if len({len(part) for part in tensors}) > 1:
        return None  # some are not finite
    other = own = 0.0
    for before, after, changed in zip(*tensors, strict=True):
        other = max(other, (before[-1] - after[-1]).abs().max().item())
        own = max(own, (before[-1] - changed[-1]).abs().max().item())
    if not own and not other:
        return None
    share = other / max(own, other)
    return share if share > 100 * SMALL else 0.0  # sizes of matrix products round differently


def replace_others(leaf: Tensor) -> Tensor:
    """Replace all rows but the last one by row 0: a mean over the rows changes too."""
    rows = leaf.shape[0]
    return pick_rows(leaf, [*[0] * (rows - 1), rows - 1])


def outputs_of(model: Any, features: Any) -> Any:
    """Call the model without gradients."""
    with torch.no_grad():
        return model.compute_outputs(map_leaves(copy_leaf, features))


def rows_of(outputs: Any, rows: int) -> list[Tensor]:
    """Return the tensors of the outputs that have a row for each row of the features."""
    found = []
    for leaf in leaves(outputs):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.ndim:
            continue
        if len(leaf) == rows and leaf.numel() and bool(leaf.isfinite().all()):
            found.append(leaf)
    return found


def find_mixing_layer(model: Any, features: Any) -> str:
    """Return the name and class of the first layer whose outputs mix rows; "" if none does.

    What the last row gives in each layer is compared between two batches that share that row
    alone. It is the last, since an LSTM that takes rows for steps looks back only.
    """
    seen: list[dict[str, Tensor]] = []

    def others_changed(leaf: Tensor) -> Tensor:
        if leaf.is_floating_point() and leaf.layout is torch.strided:
            return torch.cat([leaf[:-1] * 1.5 + 0.5, leaf[-1:]])
        return replace_others(leaf)

    for batch in (features, map_leaves(others_changed, features)):
        found: dict[str, Tensor] = {}
        handles = []
        for name, module in model.named_modules():
            if name and name != "net":
                handles.append(module.register_forward_hook(keep_last_row(name, found)))
        try:
            outputs_of(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        seen.append(found)
    modules = dict(model.named_modules())
    for name, before in seen[0].items():
        after = seen[1].get(name)
        if after is None or after.shape != before.shape:
            continue
        size = before.abs().max().item()
        if (before - after).abs().max().item() > 100 * SMALL * max(size, 1e-12):
            return f"{name} ({type(modules[name]).__name__})"
    return ""


def keep_last_row(name: str, found: dict[str, Tensor]) -> Any:
    """Return a hook that keeps the last row of a layer's output."""

    def keep(module: nn.Module, args: Any, outputs: Any) -> None:
        for leaf in leaves(outputs):
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.is_floating_point():
                found.setdefault(name, leaf[-1].detach().clone())
                return

    return keep


@contextlib.contextmanager
def without_fastpath() -> Iterator[None]:
    """Let nn.TransformerEncoder call its layers, so that hooks see them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
