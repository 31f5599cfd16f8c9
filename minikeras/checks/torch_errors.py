"""Errors of torch's that say too little, with what is known of the cause added to them as notes."""

from __future__ import annotations

import contextlib
import re
import traceback
from types import FrameType
from typing import Any

import torch

from minikeras.errors import described, dtype_name
from minikeras.rows import first_size


def explain_reading(error: Exception, loader: Any) -> None:
    """A worker that died, or the row that could not be read."""
    tell_of_worker(error)
    if "Batches of sparse tensors" in str(error):
        error.add_note(
            "Pass the tensors themselves, (X, y): their rows are fetched batch by batch."
        )
    if "batch must contain tensors" in str(error) and "scipy.sparse" in str(error):
        error.add_note("Pass the matrix itself, (X, y): its rows are fetched batch by batch.")
    row = row_being_read(error, getattr(loader, "dataset", None))
    if row is not None:
        error.add_note(f"row {row} of the dataset")
    elif getattr(loader, "num_workers", 0) and "Caught" in str(error):
        error.add_note("It was raised in a worker: with num_workers=0 the row is named too.")


def tell_of_worker(error: Exception) -> None:
    """torch says it where the main process happens to be, be it in the middle of a step."""
    if "DataLoader worker" in str(error) and (
        "exited unexpectedly" in str(error) or "killed by signal" in str(error)
    ):
        error.add_note(
            "A worker process has died, most often for want of memory or of shared memory (/dev/shm). Try fewer "
            'workers or smaller batches, or torch.multiprocessing.set_sharing_strategy("file_system").'
        )


def row_being_read(error: BaseException, dataset: Any) -> Any:
    """What the dataset's __getitem__ was asked for when it raised; None where that is not known."""
    step = error.__traceback__
    while step is not None:
        frame: FrameType = step.tb_frame
        code = frame.f_code
        if code.co_name == "__getitem__" and code.co_argcount > 1:
            holder, row = (frame.f_locals.get(name) for name in code.co_varnames[:2])
            if holder is dataset and isinstance(row, int):
                return row
        step = step.tb_next
    return None


def explain_step(error: Exception, features: Any, labels: Any) -> None:
    """The causes that torch's words hide. No memory: the batch's shapes and what to try; what the failed step held is
    let go, so that it can be tried."""
    tell_of_worker(error)
    if "mixed torch.Tensor and DTensor" in str(error):
        error.add_note(
            "A step of your own called a layer whose weights are in parts, outside the forward of the block that puts "
            'them together. Name its class among the blocks: compile(distributed="fsdp", fsdp_blocks=(nn.Linear,)).'
        )
    wanted = re.search(r"Found dtype \w+ but expected (\w+)", str(error))
    if wanted and isinstance(labels, torch.Tensor):
        cast = {"Double": "double()", "Half": "half()", "BFloat16": "bfloat16()"}.get(
            wanted[1], "float()"
        )
        error.add_note(
            f"The labels are {dtype_name(labels)}, and here the loss has a gradient in the predictions' dtype alone. "
            f"Pass labels.{cast}."
        )
    if not is_out_of_memory(error):
        return
    rows = first_size((labels, features), unknown=1)
    half = (
        f"batch_size={rows // 2}, with accumulate=2 for the same gradient"
        if rows > 1
        else "smaller inputs"
    )
    shapes = f"features {described(features)}, labels {described(labels)}"
    error.add_note(f'The batch was {shapes}. Try {half}; precision="bf16"; or a smaller model.')
    for frame, _ in traceback.walk_tb(error.__traceback__):
        with contextlib.suppress(RuntimeError):  # those that still run
            frame.clear()
            frame.f_locals  # noqa: B018 - if it was looked at before, Python keeps what it showed until now


def is_out_of_memory(error: Exception) -> bool:
    """On a device torch has a class for it; on the CPU only words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
