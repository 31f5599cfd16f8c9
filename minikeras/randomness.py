"""The random state of a run: of Python, NumPy, torch and the device, and of what its loaders hold.

states    plain values, for a file
restore   ... put back
reseed    ... begun anew
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minikeras.errors import CheckpointError

KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


class Randomness:
    """The random generators that a fit with these loaders draws from, and the epochs its samplers stand at.

    >>> randomness = Randomness(torch.device("cpu"), [])
    >>> before = randomness.states()
    >>> first = torch.rand(2), np.random.rand(), random.random()
    >>> randomness.restore(before)
    >>> torch.equal(first[0], torch.rand(2)), first[1:] == (np.random.rand(), random.random())
    (True, True)
    """

    def __init__(self, device: torch.device, loaders: list[Any]) -> None:
        self.device = device
        holders = [holder for loader in loaders for holder in holders_of(loader)]
        held = [value for holder in holders for value in vars(holder).values() if isinstance(value, KINDS)]
        self.generators = list({id(generator): generator for generator in held}.values())
        counting = [holder for holder in holders if type(getattr(holder, "epoch", None)) is int]
        self.samplers = [holder for holder in counting if hasattr(holder, "set_epoch")]

    def states(self) -> dict[str, Any]:
        """Where everything stands, as plain values."""
        return {
            "python": random.getstate(),
            "numpy": numpy_state(np.random.get_state(legacy=False)),
            "torch": torch.get_rng_state(),
            "device": device_states(self.device),
            "generators": [state_of(generator) for generator in self.generators],
            "epochs": [sampler.epoch for sampler in self.samplers],
        }

    def restore(self, states: dict[str, Any]) -> None:
        """Put everything back where it stood.

        Raises:
            CheckpointError: the states are of other loaders.
        """
        for what, held in (("generators", self.generators), ("epochs", self.samplers)):
            if len(states[what]) != len(held):
                raise CheckpointError(
                    f"the checkpoint was written with {len(states[what])} random generators or counting samplers in "
                    f"the loaders, and here are {len(held)}. Make the loaders as they were made then."
                )
        random.setstate(states["python"])
        np.random.set_state(numpy_state(states["numpy"], back=True))
        torch.set_rng_state(states["torch"])
        set_device_states(self.device, states["device"])
        for generator, state in zip(self.generators, states["generators"], strict=True):
            set_state(generator, state)
        for sampler, epoch in zip(self.samplers, states["epochs"], strict=True):
            sampler.set_epoch(epoch)


def reseed(seed: int) -> None:
    """Start Python's, NumPy's and torch's global generators anew."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def holders_of(loader: Any) -> list[Any]:
    """A loader, its sampler, its batch sampler and what that samples from."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return [holder for holder in found if hasattr(holder, "__dict__")]


def state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return numpy_state(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return numpy_state(generator.get_state(legacy=False))
    return generator.getstate()


def set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = numpy_state(state, back=True)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(numpy_state(state, back=True))
    else:
        generator.setstate(state)


def numpy_state(state: Any, back: bool = False) -> Any:
    """A state of NumPy's with its arrays as lists, or back; NumPy takes lists where it gave arrays, but wants uint."""
    if isinstance(state, dict):
        return {key: numpy_state(value, back) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return state.tolist()
    return np.array(state, np.uint64) if back and isinstance(state, list) else state


def device_states(device: torch.device) -> list[Tensor]:
    if device.type == "cpu":
        return []
    module = torch.get_device_module(device)
    return list(module.get_rng_state_all()) if hasattr(module, "get_rng_state_all") else [module.get_rng_state()]


def set_device_states(device: torch.device, states: list[Tensor]) -> None:
    module = torch.get_device_module(device)
    if len(states) > 1:
        module.set_rng_state_all(states)
    elif states:
        module.set_rng_state(states[0])
