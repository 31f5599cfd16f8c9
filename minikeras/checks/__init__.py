"""What a user is told when something is wrong.

inputs.py       what compile, a fit and its first batch are given
validation.py   what is wrong with dl_val, before an epoch is spent
calls.py        calls in the words of other libraries
classes.py      which dimension of the outputs holds the classes
causes.py       what torch refuses anyway, in the user's words
row_means.py    functions of metrics_dict that are no means over rows
twin.py         a metric to be called on trial
raw_scores.py   torchmetrics objects that are given raw scores
"""

from minikeras.checks import calls, causes, inputs, validation

__all__ = ["calls", "causes", "inputs", "validation"]
