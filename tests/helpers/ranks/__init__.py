"""Fits that torchrun runs on several processes, and that one process runs with bigger batches.

    torchrun --nproc-per-node=2 -m helpers.ranks FOLDER CASE ...     each rank leaves FOLDER/CASE.RANK.pt

BUCKET=64 sends gradients in buckets of so many bytes, most while backward is at work; STEP=own makes a step of the
user's own of Net's, whose gradients are all sent when it calls optimizer_step.

A case is a function of the number of processes; what it returns, of plain values, is to be the same for all numbers.
"""

from helpers.launch import cases_of
from helpers.ranks import differ, metrics, resume, rows, same_numbers

CASES = cases_of(same_numbers, metrics, rows, differ, resume)
