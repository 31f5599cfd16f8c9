"""`diagnose`: what keeps a network from learning, in one call.

leave_no_trace        everything is as it was, however this ends
    read the first rows of dl_train and dl_val
    DATA              checks of the rows
    call a copy of the model
    NETWORK           checks of the outputs and the parameters
    train copies      one step; one small batch; the learning-rate range test
    TRAINING          checks of gradients, activations and of how the copies learnt
    HISTORY           checks of earlier fits
    the user's own checks
sort the findings     the worst first, causes before symptoms
show the diagnosis
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minikeras.diagnosis.activations import (
    check_activation_growth,
    check_dead_units,
    check_saturated_units,
)
from minikeras.diagnosis.bar import show_progress
from minikeras.diagnosis.copies import leave_no_trace
from minikeras.diagnosis.evidence import Evidence
from minikeras.diagnosis.features import (
    check_constant_features,
    check_feature_scales,
    check_missing_features,
)
from minikeras.diagnosis.figure import collect
from minikeras.diagnosis.findings import Diagnosis, Finding, rank
from minikeras.diagnosis.first_loss import (
    check_first_loss,
)
from minikeras.diagnosis.gradients import (
    check_gradients,
    check_updates,
)
from minikeras.diagnosis.labels import (
    check_class_range,
    check_class_shares,
    check_missing_labels,
    check_target_scale,
)
from minikeras.diagnosis.loading import (
    check_loading_time,
)
from minikeras.diagnosis.memory import (
    check_memorized,
)
from minikeras.diagnosis.mixing import (
    check_rows_are_separate,
)
from minikeras.diagnosis.modes import (
    check_batch_norm,
    check_dropout,
)
from minikeras.diagnosis.order import (
    check_order,
)
from minikeras.diagnosis.outputs import (
    check_activation_before_loss,
    check_outputs_differ,
    check_saturated_outputs,
)
from minikeras.diagnosis.parameters import (
    check_frozen,
    check_optimizers,
    check_symmetry,
    check_unused,
)
from minikeras.diagnosis.past import (
    check_history,
)
from minikeras.diagnosis.rates import (
    check_learning_rate,
)
from minikeras.diagnosis.split import (
    check_leaks,
    check_split,
)
from minikeras.errors import check_positive_int
from minikeras.overrides import overrides
from minikeras.support.shown import show

if TYPE_CHECKING:
    from minikeras.diagnosis.bar import Bar, NoBar
    from minikeras.model import Model

LONGEST = 600  # characters of an error's message

Check = Callable[[Evidence], Iterable[Finding]]

# The checks, in the order in which they are made. Those of one level are listed in this order.
DATA: list[Check] = [
    check_missing_features,
    check_constant_features,
    check_feature_scales,
    check_missing_labels,
    check_class_range,
    check_class_shares,
    check_target_scale,
    check_leaks,
    check_split,
    check_order,
]
NETWORK: list[Check] = [
    check_rows_are_separate,
    check_outputs_differ,
    check_saturated_outputs,
    check_activation_before_loss,
    check_first_loss,
    check_frozen,
    check_optimizers,
    check_unused,
    check_symmetry,
    check_batch_norm,
    check_dropout,
]
TRAINING: list[Check] = [
    check_gradients,
    check_updates,
    check_dead_units,
    check_saturated_units,
    check_activation_growth,
    check_memorized,
    check_learning_rate,
    check_loading_time,
]
HISTORY: list[Check] = [check_history]


def diagnose(
    model: Model,
    dl_train: Any,
    dl_val: Any = None,
    steps: int = 100,
    batch_size: int | None = None,
    checks: Iterable[Check] = (),
) -> Diagnosis:
    """Look at data, network and training, and return what was found; see `Model.diagnose`."""
    check_positive_int("steps", steps)
    model._compiled("diagnose")
    model._check_not_fitting("diagnose", "It may be called inside a fit of another model.")
    own_checks = check_checks(checks)
    start = time.perf_counter()
    total = sum(map(len, (DATA, NETWORK, TRAINING, HISTORY, own_checks)))
    data = {"dl_train": dl_train, "dl_val": dl_val}
    with leave_no_trace(model, "diagnose", data), show_progress(total) as bar:
        evidence = Evidence(model, dl_train, dl_val, steps, batch_size, bar.say)
        run_checks(DATA, evidence, bar)
        call_model(evidence)
        run_checks(NETWORK, evidence, bar)
        failure = try_step(evidence)
        if failure is None:
            run_checks(TRAINING, evidence, bar)
        else:
            evidence.findings.append(failure)
        run_checks(HISTORY, evidence, bar)
        for check in own_checks:
            evidence.findings += run_own_check(check, evidence)
            bar.count()
        rows = {"dl_train": evidence.train.rows}
        if evidence.val is not None:
            rows["dl_val"] = evidence.val.rows
        curves = collect(evidence)
    findings = sorted(evidence.findings, key=rank)
    seconds = time.perf_counter() - start
    diagnosis = Diagnosis(type(model).__name__, findings, steps, seconds, rows, curves)
    show(diagnosis)
    return diagnosis


def call_model(evidence: Evidence) -> None:
    """Call the model with the first batches, so that an error of forward is raised here.

    A custom train_step may call submodules with the features, and never forward.
    """
    try:
        _ = evidence.output_batches
    except Exception:
        if not overrides(evidence.model, "train_step"):
            raise
        evidence.output_batches = []
        evidence.outputs = None


def check_checks(checks: Iterable[Check]) -> list[Check]:
    """Check the user's own checks.

    Raises:
        TypeError: they are not a list of functions.
    """
    remedy = (
        "Write def check_x(evidence): return [Finding(...)], with Finding from "
        "minikeras.diagnosis, and pass checks=[check_x]."
    )
    if callable(checks) or not isinstance(checks, Iterable):
        raise TypeError(f"checks must be a list of functions, got {checks!r}. {remedy}")
    listed = list(checks)
    for check in listed:
        if not callable(check):
            raise TypeError(
                "checks must be functions of an Evidence that return a list of Findings, got "
                f"{check!r}. {remedy}"
            )
    return listed


def run_checks(checks: list[Check], evidence: Evidence, bar: Bar | NoBar) -> None:
    """Make checks, and add what they find to the evidence."""
    for check in checks:
        evidence.findings += run_check(check, evidence)
        bar.count()


def run_check(check: Check, evidence: Evidence) -> list[Finding]:
    """Make a check. What it cannot look at is a note, so that the others are made."""
    name = name_of(check)
    try:
        return [replace(finding, check=name) for finding in check(evidence)]
    except Exception as error:
        return [
            Finding(
                "note",
                name,
                f"not made: {type(error).__name__}: {shorten(str(error))}",
                "no error",
                "Nothing is known from this check; the others were made.",
                check=name,
            )
        ]


def shorten(message: str) -> str:
    """Return the first lines of a message: some of torch's are of several pages.

    >>> shorten("No such kernel." + 2 * chr(10) + "CPU: registered at ...")
    'No such kernel.'
    """
    return textwrap.shorten(message.partition("\n\n")[0], LONGEST, placeholder=" ...")


def run_own_check(check: Check, evidence: Evidence) -> list[Finding]:
    """Make a check of the user's, whose errors are raised.

    Raises:
        TypeError: it returns something else than Findings.
    """
    name = name_of(check)
    try:
        found: Any = check(evidence)
        listed = list(found) if is_list_of_parts(found) else [found]
    except Exception as error:
        error.add_note(f"diagnose, your check {name}")
        raise
    for finding in listed:
        if not is_list_of_parts(found) or not isinstance(finding, Finding):
            got = "a single Finding" if isinstance(finding, Finding) else f"{finding!r}"
            raise TypeError(
                f"the check {name} must return a list of Findings, or yield them, got {got}. Write "
                "return [Finding(level, looked_at, found, usual, remedy)], with Finding from "
                "minikeras.diagnosis; return [] if nothing was found."
            )
    return [replace(finding, check=name) for finding in listed]


def is_list_of_parts(found: Any) -> bool:
    """Tell whether what a check returned can be a list of findings."""
    return isinstance(found, Iterable) and not isinstance(found, (str, bytes, Mapping))


def name_of(check: Check) -> str:
    """Return the name of a check."""
    return getattr(check, "__name__", type(check).__name__)


def try_step(evidence: Evidence) -> Finding | None:
    """Take one training step of a copy; an error is a finding."""
    try:
        _ = evidence.step
    except Exception as error:
        remedy = shorten(str(error))
        if not remedy.endswith("."):  # of another library, or of the user's own code
            remedy = f"{remedy}. model.fit(1, dl_train) shows where."
        return Finding(
            "error",
            "one training step",
            f"raises {type(error).__name__}",
            "no error",
            remedy,
            check="try_step",
        )
    return None
