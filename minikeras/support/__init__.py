"""Helpers that several rooms use and the core does not.

atomic.py            write a file atomically
checksums.py         compare batches, and other nested values, by a sample
paths.py             check the paths that users pass
loaders.py           how a DataLoader draws: rows, seeds, epochs
pyplot.py            import matplotlib, or show the install command
randomness.py        random states of Python, NumPy, torch and of generators, saved and restored
reachable.py         walk the objects that the user's objects refer to
shown.py             results that print or display themselves, once
sharded_tensors.py   sharded tensors, one shard in each process
twin.py              copy a metric or a loss with all that it reaches
"""
