"""Kinds of data that need more than the core does to become batches.

arrays.py       arrays and DataFrames of any library as rows; what is wrong with one
in_memory.py    the batches of a loader over tensors, fetched whole; you may skip it
split_batch.py  batches of another form, taken apart by the user's function
endless.py      the first batches of a pass, and data that may never end
epochs.py       the epoch's number, for samplers that shuffle by it
"""
