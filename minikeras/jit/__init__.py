"""The steps as compiled graphs: forward, loss, metrics, backward and optimizer in one.

a fit's first batch    in eager, as without jit: it is looked at closely, and the optimizers make their state
the next one           traced and compiled in the first of these ways that works; a lesser one comes with a warning
    "one graph"        everything
    "metrics outside"  metrics that leave torch run on the graph's outputs
    "forward and loss" backward and step in eager: also where hooks of parameters or optimizers must fire
    "eager"
every other            that graph for batches of its shape, one more graph for all other shapes
a batch for which the loss reaches other parameters, or the optimizer has other groups or another state
                       in eager, as the first; then a new graph

On CUDA the graph for the first shape is captured as a CUDA graph too, unless the user gives a mode or backend, or the
option "triton.cudagraphs"; its results are copied, for the next replay writes over them. One for all other shapes would
be captured anew for each of them.

Gradients are those of the real parameters: a loss that holds on to them, as a penalty does, keeps its share.
"""

from minikeras.jit.engine import Jit

__all__ = ["Jit"]
