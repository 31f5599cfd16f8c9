"""What can befall a fit, and how it ends then.

loss.py       a loss that is NaN or infinite: found before it moves a weight
weights.py    weights that are, though each loss was finite: found before they reach a file
signals.py    SIGTERM and Ctrl-C: the batch is finished and the state written first
told.py       no memory, a dead worker, a row that cannot be read: torch's error, with what is known of the cause
"""

from minikeras.faults.loss import (
    FiniteLoss,
    NonFiniteGradient,
    NonFiniteLoss,
    count_bad,
    count_bad_gradient,
    explained,
)
from minikeras.faults.signals import Interruptions
from minikeras.faults.told import tell_of_reading, tell_of_step
from minikeras.faults.weights import (
    FiniteWeights,
    NonFiniteWeights,
    explain_gradient,
    explain_weights,
)

__all__ = [
    "FiniteLoss",
    "FiniteWeights",
    "Interruptions",
    "NonFiniteGradient",
    "NonFiniteLoss",
    "NonFiniteWeights",
    "count_bad",
    "count_bad_gradient",
    "explain_gradient",
    "explain_weights",
    "explained",
    "tell_of_reading",
    "tell_of_step",
]
