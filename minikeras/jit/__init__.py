"""Compile the steps as graphs: forward, loss, metrics, backward and optimizer in one.

the first batch of a fit    in eager mode, as without jit: it is checked, and the optimizers create
                            their state
the next batch              traced and compiled in the first of these ways that works; any but the
                            first comes with a warning
    "one graph"             everything
    "metrics outside"       metrics that leave torch run on the graph's outputs
    "forward and loss"      backward and step in eager mode: also if hooks of parameters or
                            optimizers must be called
    "eager"
every other batch           that graph for batches of its shape, one more graph for all other shapes
a short batch, validation   in eager mode, until so many batches have come that their graph pays;
                            they are counted, and the count is in the checkpoint, so that a fit
                            that resumes compiles it at the same batch
a batch for which the loss  in eager mode, as the first; then a new graph
reaches other parameters,
or the optimizer has other
groups or another state

On CUDA the graph for the first shape is also captured as a CUDA graph, unless the user passes a
mode, a backend or the option "triton.cudagraphs"; its results are copied, since the next replay
writes over them. A graph for all other shapes would be captured again for each of them.

Gradients are those of the real parameters: a loss that refers to them, such as a penalty, keeps its
share.

engine.py      `Jit`, which replaces `Eager`
steps.py       the two steps, each as a graph
graphs.py      compile a function, and undo everything if that fails
optimizer.py   a copy of the optimizer for the graph; you may skip it
looking.py     run a step only to check it, after a resume; you may skip it
"""

from minikeras.jit.engine import Jit

__all__ = ["Jit"]
