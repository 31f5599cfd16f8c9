"""Several processes that train one model.

world.py      who this process is, and what all do together
"""

from minikeras.distributed.world import World, is_main, leave, world_of

__all__ = ["World", "is_main", "leave", "world_of"]
