"""Add notes about the cause to errors of torch that say too little."""

from __future__ import annotations

import contextlib
import re
import traceback
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer

from minikeras.errors import describe, dtype_name
from minikeras.rows import first_size


def explain_reading(error: Exception, loader: Any) -> None:
    """Add a note that a worker has died, or about the row that could not be read."""
    tell_of_worker(error)
    if "Batches of sparse tensors" in str(error):
        error.add_note("Pass the tensors to fit, (X, y): their rows are fetched batch by batch.")
    if "batch must contain tensors" in str(error) and "scipy.sparse" in str(error):
        error.add_note("Pass the matrix to fit, (X, y): its rows are fetched batch by batch.")
    row = row_being_read(error, getattr(loader, "dataset", None))
    if row is not None:
        error.add_note(f"row {row} of the dataset")
    elif getattr(loader, "num_workers", 0) and "Caught" in str(error):
        error.add_note(
            "It was raised in a worker process: pass num_workers=0 to see which row it was."
        )


def tell_of_worker(error: Exception) -> None:
    """Add a note if a worker has died.

    torch raises that error wherever the main process is, even in the middle of a step.
    """
    text = str(error)
    if "DataLoader worker" not in text:
        return
    if "exited unexpectedly" in text or "killed by signal" in text:
        error.add_note(
            "A DataLoader worker process has died, usually because memory or shared memory "
            "(/dev/shm) ran out. Try fewer workers or smaller batches, or "
            'torch.multiprocessing.set_sharing_strategy("file_system").'
        )


def row_being_read(error: BaseException, dataset: Any) -> Any:
    """Return what the dataset's __getitem__ was asked for when it raised; None if unknown."""
    step = error.__traceback__
    while step is not None:
        frame: FrameType = step.tb_frame
        code = frame.f_code
        if code.co_name == "__getitem__" and code.co_argcount > 1:
            own_name, row_name = code.co_varnames[:2]
            row = frame.f_locals.get(row_name)
            if frame.f_locals.get(own_name) is dataset and isinstance(row, int):
                return row
        step = step.tb_next
    return None


def explain_step(error: Exception, features: Any, labels: Any) -> None:
    """Add notes about causes that torch does not name.

    If memory does not suffice: the shapes of the batch and what to try. What the failed step held
    is released, so that it can be tried.
    """
    tell_of_worker(error)
    if "mixed torch.Tensor and DTensor" in str(error):
        error.add_note(
            "A custom train_step called a layer with sharded weights outside the forward of the "
            "block that gathers them. Add the class of the layer to the blocks: "
            'compile(distributed="fsdp", fsdp_blocks=(nn.Linear,)).'
        )
    optimizer = optimizer_of_shards(error)
    if optimizer is not None:
        error.add_note(
            f'{type(optimizer).__name__} cannot step the shards of distributed="fsdp": torch '
            "lacks one of its operations for them. Use another optimizer, such as "
            'torch.optim.AdamW, or pass distributed="ddp".'
        )
    wanted = re.search(r"Found dtype \w+ but expected (\w+)", str(error))
    if wanted and isinstance(labels, torch.Tensor):
        casts = {"Double": "double()", "Half": "half()", "BFloat16": "bfloat16()"}
        cast = casts.get(wanted[1], "float()")
        error.add_note(
            f"The labels are {dtype_name(labels)}, and this loss has a gradient only if both have "
            f"the predictions' dtype. Pass labels.{cast}."
        )
    if not is_out_of_memory(error):
        return
    rows = first_size((labels, features), unknown=1)
    half = "smaller inputs"
    if rows > 1:
        half = f"batch_size={rows // 2}, with accumulate=2 for the same gradient"
    shapes = f"features {describe(features)}, labels {describe(labels)}"
    error.add_note(f'The batch was {shapes}. Try {half}; precision="bf16"; or a smaller model.')
    for frame, _ in traceback.walk_tb(error.__traceback__):
        with contextlib.suppress(RuntimeError):  # those that still run
            frame.clear()
            # if it was read before, Python keeps the values of then until it is read again
            frame.f_locals  # noqa: B018


def optimizer_of_shards(error: Exception) -> Optimizer | None:
    """Return the optimizer whose step torch's sharded tensors refused; None if it is not that."""
    optimizer = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, Optimizer):
            optimizer = owner
        if str(frame.f_globals.get("__name__")).startswith("torch.distributed.tensor"):
            return optimizer
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory did not suffice; on the CPU torch has no class for that error."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
