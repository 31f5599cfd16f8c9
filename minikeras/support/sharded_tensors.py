"""Sharded tensors, one shard in each process, and whole ones.

whole            the tensor that all shards make up
as_part          this process's shard of a whole tensor
load_whole       load whole tensors into a sharded model
load_optimizer   load whole tensors into the optimizer of a sharded model
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras.nests import is_sharded


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor that all shards make up, on the CPU; a tensor without shards itself.

    All processes must call this.
    """
    if is_sharded(tensor):
        return tensor.detach().full_tensor().cpu()  # type: ignore[attr-defined, no-any-return]
    return tensor


def as_part(value: Any, like: Any) -> Any:
    """Return this process's shard of a whole tensor if `like` is sharded, else the value itself."""
    if not is_sharded(like) or not isinstance(value, Tensor):
        return value
    if is_sharded(value) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    on_device = value.detach().to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def load_whole(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state_dict of whole tensors, of which each process takes its shards."""
    own = model.state_dict()
    if any(map(is_sharded, own.values())):
        shards: Any = copy.copy(state)  # with torch's version numbers
        for name, value in state.items():
            shards[name] = as_part(value, own.get(name))
        state = shards
    model.load_state_dict(state)


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state_dict of whole tensors, of which each process takes its shards."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    states = {}
    for number, values in state["state"].items():
        shards = {}
        for name, value in values.items():
            shards[name] = as_part(value, parameters[number])
        states[number] = shards
    # with what a scheduler has put into the groups meanwhile
    own_groups = optimizer.state_dict()["param_groups"]
    groups = []
    for own, group in zip(own_groups, state["param_groups"], strict=True):
        groups.append({**own, **group})
    optimizer.load_state_dict({**state, "state": states, "param_groups": groups})
