"""Several processes that train one model.

world.py        the rank of this process, and collective operations: `World` replaces `OneProcess`
handshake.py    what all processes must have in common, compared at the beginning of each call
channel.py      small messages, and what to say if a process does not answer
together.py     keep processes together during a fit: a hook
sharded.py      one process's share of the batches; you may skip it
in_step.py      batches that each process reads for itself
same_data.py    check that all processes were given the same data
all_reduce.py   gradients added up over the processes: a part of the stepper
gradients.py    the same in buckets, while backward is still running; you may skip it
shards.py       sharded parameters, one shard in each process
outputs.py      predictions of all processes, joined
"""
