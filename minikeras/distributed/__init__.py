"""Several processes that train one model.

world.py        who this process is, and what all do together: `World`, in the place of `OneProcess`
together.py     what keeps processes together during a fit: a hook
sharded.py      one process's part of the batches
all_reduce.py   gradients added up over the processes: a part of the stepper
gradients.py    ... in buckets, while backward is still at work
shards.py       parameters in parts, one in each process
outputs.py      predictions of all processes, joined
"""
