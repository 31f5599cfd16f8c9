"""Several processes that train one model.

world.py        who this process is, and what all do together: `World`, in the place of `OneProcess`
together.py     keep processes together during a fit: a hook
sharded.py      one process's part of the batches; you may skip it
all_reduce.py   gradients added up over the processes: a part of the stepper
gradients.py    the same in buckets, while backward is still running; you may skip it
shards.py       sharded parameters, one shard in each process
outputs.py      predictions of all processes, joined
"""
