"""Losses of probabilities under autocast, where those near 1 become 1."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikeras.errors import described


def check_not_half(loss_func: Any, outputs: Any) -> None:
    """Under autocast probabilities have lost what -log(1 - p) needs, unless the model made them in float32.

    Raises:
        ValueError: with the loss to take instead.
    """
    takes_them = isinstance(loss_func, nn.BCELoss) or loss_func is F.binary_cross_entropy
    takes_them = takes_them or getattr(loss_func, "takes_probabilities", False)
    half = isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16)
    if takes_them and half and torch.is_autocast_enabled(outputs.device.type):
        raise ValueError(half_probabilities(outputs))


def half_probabilities(outputs: Any) -> str:
    """What is wrong with a loss of probabilities under autocast, and what to take instead."""
    return (
        f"the loss takes probabilities, and the model's outputs are {described(outputs)} under autocast: those near 1 "
        f"become 1, with a loss of 100 or none. Leave the sigmoid out of the model and take nn.BCEWithLogitsLoss() or "
        f'FocalLoss(from_logits=True); or compile with precision="fp32".'
    )
