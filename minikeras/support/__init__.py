"""What several rooms use, and the core does not.

atomic.py            write a file completely or not at all
paths.py             what users give as paths
loaders.py           how a DataLoader draws: rows, seeds, epochs
randomness.py        random states of Python, NumPy, torch and of generators, taken and put back
reachable.py         the objects that the user's objects reach
sharded_tensors.py   tensors in parts, one part in each process
"""
