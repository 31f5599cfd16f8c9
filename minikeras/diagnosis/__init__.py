"""Find out why a network does not learn: `model.diagnose` and `model.lr_find`.

diagnose.py     the list of checks, in order, and the function that calls them
findings.py     `Finding`, and `Diagnosis`: the table of findings
evidence.py     `Evidence`: what the checks look at, each part made when it is first asked for
lr_find.py      the learning-rate range test
figure.py       the figure of a diagnosis
bar.py          the bar of a diagnosis that takes a while
copies.py       everything that is trained here is a copy; data and random states are put back
"""

from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.findings import Diagnosis, Finding
from minikeras.diagnosis.lr_find import LearningRates

__all__ = ["Diagnosis", "Evidence", "Finding", "LearningRates"]
