"""Save and load the whole state of a run, or only its weights, in one file or folder.

file.py       write plain values to a file atomically, and read them back verified
folder.py     the same for a folder, with tensors sharded over several processes
archive.py    validate a file of torch.save before it is loaded
validate.py   validate each value of a run's state
plain.py      plain values: what can be read without running code
matching.py   check that the state in a file fits this run
weights.py    model.save, model.load
state.py      fit(checkpoint=...): the state of a run, a hook of the fit
snapshot.py   copy the state into memory, and write the copy as a file of torch.save's format
background.py write a file in a thread while the fit goes on
fits.py       which fit of this process a file belongs to
position.py   the position in an iteration of batches, and how to resume from it
drawn_order.py  the random states of an order that another number of processes has begun
signals.py    SIGTERM and Ctrl-C: the batch is finished and the state written first
"""
