"""What outlives a process: the whole state of a run, and weights alone, each in one file or folder.

file.py       any plain values <-> a file that is whole or not there
folder.py     ... and a folder, where tensors lie in parts in several processes
archive.py    what is in a file of torch.save, before it is loaded
validate.py   whether each value of a run's state can be one
plain.py      plain values: what can be read without running code
matching.py   whether the state in a file fits this run
weights.py    model.save, model.load
state.py      fit(checkpoint=...): the state of a run, a hook of the fit
fits.py       whose fit a file is
position.py   how far an iteration of batches has come, and carried on from there
checksums.py  whether batches that are read again are the same
signals.py    SIGTERM and Ctrl-C: the batch is finished and the state written first
"""
