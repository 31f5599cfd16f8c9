"""What a user is told when something is wrong. Where does a new hint go? See first_batch.py.

first_batch.py   what is looked at when: the room's door
inputs.py        what compile, a fit and its first batch are given
validation.py    what is wrong with dl_val, before an epoch is spent
calls.py         calls in the words of other libraries
classes.py       which dimension of the outputs holds the classes
causes.py        what torch refuses anyway, in the user's words
forms.py         the split_batch that batches of another form need
torch_errors.py  reading, memory, dead workers: torch's error, with what is known of the cause
broadcast.py     outputs and labels that broadcast each other
row_means.py     functions of metrics_dict that are no means over rows
twin.py          a metric to be called on trial
raw_scores.py    torchmetrics objects that are given raw scores
peek.py          the first batch of data in memory
"""
