"""What a user is told when something is wrong.

inputs.py    what compile, a fit and its first batch are given
validation.py    what is wrong with dl_val, before an epoch is spent
calls.py     calls in the words of other libraries
causes.py    what torch refuses anyway, in the user's words
"""

from minikeras.checks import calls, causes, inputs, validation

__all__ = ["calls", "causes", "inputs", "validation"]
