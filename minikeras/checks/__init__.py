"""What a user is told when something is wrong.

inputs.py    what compile, a fit and its first batch are given
validation.py    what is wrong with dl_val, before an epoch is spent
causes.py    what torch refuses anyway, in the user's words
"""

from minikeras.checks import causes, inputs, validation

__all__ = ["causes", "inputs", "validation"]
