"""Datasets and iterables of batches."""

import random

import numpy as np
import torch
from torch.utils.data import Dataset


class Rows(Dataset):
    """A dataset that is not in memory: it is read row by row."""

    def __init__(self, X, y):
        self.X = X
        self.y = y

    def __len__(self):
        return len(self.X)

    def __getitem__(self, row):
        return self.X[row], self.y[row]


class AsItGoes:
    """An iterable that draws each batch when asked, from generators that the model uses too."""

    def __init__(self, X, y, batches, batch_size):
        self.X = X
        self.y = y
        self.batches = batches
        self.batch_size = batch_size

    def __iter__(self):
        for _ in range(self.batches):
            rows = torch.randint(len(self.X), (self.batch_size,))
            yield self.X[rows] + 0.1 * np.random.rand() + 0.1 * random.random(), self.y[rows]


class ShuffledPairs:
    """An iterable that shuffles its own list of pairs in place."""

    def __init__(self, X, y):
        self.pairs = list(zip(X, y, strict=True))

    def __iter__(self):
        random.shuffle(self.pairs)
        for start in range(0, len(self.pairs), 20):
            features, labels = zip(*self.pairs[start : start + 20], strict=True)
            yield torch.stack(features), torch.stack(labels)
