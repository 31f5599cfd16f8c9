"""The predictions of all processes, and their labels, in the order of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from minikeras.distributed.world import World
from minikeras.nests import take_apart
from minikeras.phase import unwrap_filler
from minikeras.prediction import Outputs
from minikeras.rows import UnknownRows


def gathered(outputs: Outputs, world: World, everywhere: bool) -> Outputs | None:
    """Return the outputs of all processes, by step and rank; None if they are not wanted here."""
    template, _ = unwrap_filler(outputs.pieces[0])
    own = []
    for filled in outputs.pieces:
        piece, is_filler = unwrap_filler(filled)
        own.append(None if is_filler else plain(piece))
    own_labels = [plain(labels) for labels in outputs.labels]  # none if they are not wanted
    why = None if outputs.unknown is None else outputs.unknown.why
    found = world.gather([own, own_labels, outputs.rows, why], everywhere)
    if found is None:
        return None
    together = Outputs(features=outputs.features)
    for *_, why in found:
        if together.unknown is None and why is not None:
            together.unknown = UnknownRows(why)
    for rank, step in by_step(found):
        piece = found[rank][0][step]
        if piece is None:
            continue
        together.pieces.append(rebuilt(piece, template))
        if outputs.labels:
            labels = found[rank][1][step]
            together.labels.append(rebuilt(labels, outputs.labels[0]))
        for name, counts in found[rank][2].items():
            together.rows.setdefault(name, []).append(counts[step])
    return together


def by_step(found: list[Any]) -> Iterator[tuple[int, int]]:
    """Yield the rank and the step of each piece, in the order of the rows."""
    for step in range(len(found[0][0])):
        for rank in range(len(found)):
            yield rank, step


def plain(nest: Any) -> Any:
    """Return a nest as values that can be sent.

    ["parts", ...] for a container, ["leaf", value] for anything else.
    """
    if isinstance(nest, PackedSequence):
        return ["packed", list(nest)]
    if isinstance(nest, np.ndarray):
        return ["array", torch.from_numpy(nest)]
    found = take_apart(nest)
    if found is None:
        return ["leaf", nest]
    return ["parts", [plain(part) for part in found[0]]]


def rebuilt(sent: Any, template: Any) -> Any:
    """Return a nest from values that were sent, in containers like those of the template."""
    kind, value = sent
    if kind == "packed":
        return PackedSequence(*value)
    if kind == "array":
        return value.numpy()
    if kind == "leaf":
        return value
    found = take_apart(template)
    if found is not None and len(found[0]) == len(value):
        items = [rebuilt(part, like) for part, like in zip(value, found[0], strict=True)]
        return found[1](items)
    like = found[0][0] if found is not None and found[0] else None
    items = [rebuilt(part, like) for part in value]
    return type(template)(items) if isinstance(template, (list, tuple)) else items
