"""What outlives a process: the whole state of a run, and weights alone, each in one file or folder.

file.py       any plain values <-> a file that is whole or not there
folder.py     ... and a folder, where tensors lie in parts in several processes
archive.py    what is in a file of torch.save, before it is loaded
validate.py   whether each value of a run's state can be one
plain.py      plain values: what can be read without running code
matching.py   whether the state in a file fits this run
weights.py    model.save, model.load
state.py      fit(checkpoint=...): the state of a run, and whose fit it is
"""

from minikeras.checkpoint.state import Checkpoint, Position
from minikeras.checkpoint.weights import load_weights, save_weights, under_plain_names

__all__ = ["Checkpoint", "Position", "load_weights", "save_weights", "under_plain_names"]
