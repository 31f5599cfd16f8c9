"""What a user is told when something is wrong.

inputs.py    what compile, a fit and its first batch are given
classes.py   which dimension of the outputs holds the classes
causes.py    what torch refuses anyway, in the user's words
"""

from minikeras.checks import causes, inputs

__all__ = ["causes", "inputs"]
