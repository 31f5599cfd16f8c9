"""Refuse losses of probabilities under autocast, where probabilities near 1 become 1."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikeras.errors import describe


def check_not_half(loss_func: Any, outputs: Any) -> None:
    """Refuse probabilities in half precision under autocast.

    They have lost what -log(1 - p) needs. If the model computes them in float32 they have not.

    Raises:
        ValueError: the message names the loss to use instead.
    """
    takes_probabilities = getattr(loss_func, "takes_probabilities", False)
    if isinstance(loss_func, nn.BCELoss) or loss_func is F.binary_cross_entropy:
        takes_probabilities = True
    if not takes_probabilities or not isinstance(outputs, Tensor):
        return
    if outputs.dtype not in (torch.bfloat16, torch.float16):
        return
    if torch.is_autocast_enabled(outputs.device.type):
        raise ValueError(half_probabilities(outputs))


def half_probabilities(outputs: Any) -> str:
    """Return what is wrong with a loss of probabilities under autocast, and what to use instead."""
    return (
        f"the loss takes probabilities, and the model's outputs are {describe(outputs)} under "
        f"autocast: those near 1 become 1, with a loss of 100 or none. Remove the sigmoid from "
        "the model and use nn.BCEWithLogitsLoss() or FocalLoss(from_logits=True); or compile "
        f'with precision="fp32".'
    )
