"""Check inputs and explain errors. Where does a new hint go? See first_batch.py.

first_batch.py   what is checked when: the entry point of this folder
inputs.py        check the arguments of compile and the first batch of a fit
validation.py    check dl_val before the first epoch
calls.py         explain calls written for other libraries
classes.py       which dimension of the outputs holds the classes
causes.py        explain errors that torch raises anyway
forms.py         the split_batch that batches of another form need
torch_errors.py  reading, memory, dead workers: add the likely cause to torch's error
broadcast.py     outputs and labels that broadcast each other
row_means.py     functions of metrics_dict that are not means over rows
raw_scores.py    torchmetrics objects that are given raw scores
weighted_means.py  losses whose mean is not over rows, under accumulate and several processes
peek.py          the first batch of data in memory
"""
