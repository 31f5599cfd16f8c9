"""The epoch's number for the user's samplers and datasets that shuffle by it."""

from __future__ import annotations

from minikeras.hooks import Fit, Hook
from minikeras.support.loaders import set_epoch


class SamplerEpochs(Hook):
    """Give samplers that shuffle by it the number of each epoch of a fit."""

    def before_epoch(self, fit: Fit) -> None:
        """Give them the number, from 0."""
        for batches in (fit.train, fit.val):
            set_epoch(batches, fit.at.epoch - 1)
