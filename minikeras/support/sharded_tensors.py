"""Tensors in parts, one part in each process, and whole ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.nests import is_sharded


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all parts, on the CPU where it was in parts; to be called by all processes."""
    return tensor.detach().full_tensor().cpu() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def as_part(value: Any, like: Any) -> Any:
    """This process's part of a whole tensor, where `like` is in parts; anything else as it is."""
    if (
        not is_sharded(like)
        or not isinstance(value, Tensor)
        or is_sharded(value)
        or value.shape != like.shape
    ):
        return value
    from torch.distributed.tensor import distribute_tensor

    there = value.detach().to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def load_whole(model: nn.Module, state: Mapping[str, Any]) -> None:
    """load_state_dict of whole tensors, each process taking its parts."""
    own = model.state_dict()
    if any(map(is_sharded, own.values())):
        parts: Any = copy.copy(state)  # with torch's version numbers
        for name, value in state.items():
            parts[name] = as_part(value, own.get(name))
        state = parts
    model.load_state_dict(state)


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """load_state_dict of whole tensors, each process taking its parts."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = {
        number: {name: as_part(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    own = optimizer.state_dict()[
        "param_groups"
    ]  # with what a scheduler has put into them meanwhile
    groups = [{**mine, **group} for mine, group in zip(own, state["param_groups"], strict=True)]
    optimizer.load_state_dict({**state, "state": parts, "param_groups": groups})
