"""Several processes that train one model.

world.py      who this process is, and what all do together
gradients.py  gradients added up, while backward is still at work
shards.py     parameters in parts, one in each process
"""

from minikeras.distributed.gradients import GradientSums
from minikeras.distributed.shards import (
    as_part,
    backward,
    is_part,
    load_optimizer,
    load_whole,
    settle,
    settled,
    shard,
    sum_of_parts,
    whole,
)
from minikeras.distributed.world import World, is_main, leave, world_of

__all__ = [
    "GradientSums",
    "World",
    "as_part",
    "backward",
    "is_main",
    "is_part",
    "leave",
    "load_optimizer",
    "load_whole",
    "settle",
    "settled",
    "shard",
    "sum_of_parts",
    "whole",
    "world_of",
]
