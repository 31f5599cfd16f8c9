"""Seeds of the random generators of torch, NumPy and Python."""

import random

import numpy as np
import torch


def seed(number=0):
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def seeded(number=5):
    return torch.Generator().manual_seed(number)
