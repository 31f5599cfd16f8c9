"""What several rooms use, and the core does not.

atomic.py       a file that is whole or not there
paths.py        what users give as paths
randomness.py   random states of Python, NumPy, torch and of generators, taken and put back
sharded_tensors.py   tensors in parts, one part in each process
reachable.py    the objects that the user's objects reach
"""
