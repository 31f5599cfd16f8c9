"""What can befall a fit, and how it ends then.

loss.py       a loss that is NaN or infinite: found before it moves a weight
signals.py    SIGTERM and Ctrl-C: the batch is finished and the state written first
told.py       no memory, a dead worker, a row that cannot be read: torch's error, with what is known of the cause
"""

from minikeras.faults.loss import FiniteLoss, NonFiniteLoss, count_bad, explained
from minikeras.faults.signals import Interruptions
from minikeras.faults.told import tell_of_reading, tell_of_step

__all__ = ["FiniteLoss", "Interruptions", "NonFiniteLoss", "count_bad", "explained", "tell_of_reading", "tell_of_step"]
