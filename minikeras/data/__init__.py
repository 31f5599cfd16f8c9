"""Make batches of data that the core cannot read by itself.

arrays.py       arrays and DataFrames of any library as rows; explain wrong ones
in_memory.py    the batches of a loader over tensors, fetched whole; you may skip it
split_batch.py  batches of another form, taken apart by the user's function
endless.py      the first batches of a pass, and data that may never end
epochs.py       the epoch's number, for samplers that shuffle by it
"""
