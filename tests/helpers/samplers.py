"""Samplers and batch samplers that draw rows as they go."""

import random

import torch
from torch.utils.data import Sampler


class Pool(Sampler):
    """A sampler that draws row by row, without replacement, from Python's generator."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __iter__(self):
        left = list(range(self.rows))
        while left:
            yield left.pop(random.randrange(len(left)))


class Buckets(Sampler):
    """A batch sampler that shuffles a bucket of 30 rows when it comes to it."""

    def __init__(self, rows, batch_size):
        self.rows = rows
        self.batch_size = batch_size

    def __len__(self):
        return self.rows // self.batch_size

    def __iter__(self):
        for bucket in torch.arange(self.rows).split(30):
            yield from bucket[torch.randperm(30)].split(self.batch_size)
