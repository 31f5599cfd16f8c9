"""Fits that torchrun runs on several processes, and that one process runs with bigger batches.

    torchrun --nproc-per-node=2 -m helpers.ranks FOLDER CASE ...

Each rank writes FOLDER/CASE.RANK.pt. BUCKET=64 sends gradients in buckets of so many bytes, most of
them during backward. STEP=own gives Net a custom train_step, whose gradients are all sent when it
calls optimizer_step.

A case is a function of the number of processes. It returns plain values, which must be the same for
any number.
"""

from helpers.launch import cases_of
from helpers.ranks import (
    agreement,
    buffers,
    differ,
    loaders,
    metrics,
    orders,
    planted,
    resume,
    rows,
    same_numbers,
)

CASES = cases_of(
    same_numbers,
    metrics,
    rows,
    loaders,
    differ,
    resume,
    planted,
    agreement,
    buffers,
    orders,
)
