"""Several processes that train one model.

world.py      who this process is, and what all do together
gradients.py  gradients added up, while backward is still at work
"""

from minikeras.distributed.gradients import GradientSums
from minikeras.distributed.world import World, is_main, leave, world_of

__all__ = ["GradientSums", "World", "is_main", "leave", "world_of"]
